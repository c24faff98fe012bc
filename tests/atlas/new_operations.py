"""Inputs for the operations that Keras has from 3.16 on. Older versions have a part of them, or none."""

import numpy as np
from keras import ops

from tests.atlas.inputs import bind, many, normal, positive

# Only the names are looked up where the tables are made, because an older Keras does not have the functions.
ENTRIES = {
    "column_stack": [many(lambda xs: ops.column_stack(xs), normal(3), normal(3))],
    "copysign": [(lambda a, b: ops.copysign(a, b), (normal(2, 3), normal(2, 3)))],
    "cov": [(lambda x: ops.cov(x), (normal(2, 4),))],
    "float_power": [
        (lambda a, b: ops.float_power(a, b), (positive(2, 3), normal(2, 3))),
        (lambda x: ops.float_power(x, 3), (normal(3),)),
    ],
    "gammainc": [
        (lambda x: ops.gammainc(np.array([0.5, 1.0, 2.5]), x), (positive(3),)),
        (lambda a, x: ops.gammainc(a, x), (positive(3), positive(3))),
    ],
    "image.reconstruct_patches": [
        (lambda x: ops.image.reconstruct_patches(x, 2, data_format="channels_last"), (normal(1, 2, 2, 4),))
    ],
    "lgamma": [(lambda x: ops.lgamma(x), (positive(2, 3),)), (lambda x: ops.lgamma(x), (normal(3),))],
    "matrix_power": [(bind(lambda x, n: ops.matrix_power(x, n), n), (normal(2, 2),)) for n in (3, 1, 0, -2)],
}


def _is_there(name):
    module = ops.image if name.startswith("image.") else ops
    return hasattr(module, name.removeprefix("image."))


NEW = {name: entries for name, entries in ENTRIES.items() if _is_there(name)}
