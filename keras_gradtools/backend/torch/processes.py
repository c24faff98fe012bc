"""Sums over the processes of `torch.distributed`."""

import torch

from keras_gradtools.keras_internals import backend_modules

get_device = backend_modules.function("core", "get_device")


def summed_over_processes(totals, count):
    distributed = torch.distributed
    if not distributed.is_available() or not distributed.is_initialized() or distributed.get_world_size() == 1:
        return totals, count
    # Imported here because the import is slow.
    from torch.distributed.tensor import DTensor

    if any(isinstance(total, DTensor) for total in totals):
        raise RuntimeError(
            "Sums over processes need weights that each process holds as a whole. Received: weights that are split "
            "between processes (`keras.distribution.ModelParallel`). Use `keras.distribution.DataParallel`, or one "
            "process."
        )
    totals = [torch.as_tensor(total, device=get_device()).contiguous().clone() for total in totals]
    count = torch.tensor(count, dtype=torch.int64, device=totals[0].device)
    for x in (*totals, count):
        distributed.all_reduce(x)
    return totals, int(count)
