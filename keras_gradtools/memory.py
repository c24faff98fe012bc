"""How much memory this machine, or its accelerator, has."""

import math
import os
import pathlib
import re

from keras_gradtools import backend

# A computation may take this share of the free memory, unless it is told otherwise.
_SHARE = 0.25
_FREE_ON_LINUX = pathlib.Path("/proc/meminfo")


def free_bytes():
    """The free memory of the accelerator. Without one, that of the machine, or all of it if that is unknown."""
    return backend.free_bytes() or _available() or machine_bytes()


def budget():
    """The number of bytes that a computation may take unless it is told otherwise: a quarter of the free memory."""
    return int(_SHARE * free_bytes())


def bytes_of(shape, dtype):
    """The size of a tensor with a known shape and a dtype, given by its name in Keras."""
    # The name holds the number of bits, unless the dtype is bool.
    bits = re.findall(r"\d+", dtype) or [8]
    return math.prod(shape) * int(bits[0]) // 8


def machine_bytes():
    """The memory of the machine. 16 GiB if the system does not report it."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return 16 * 2**30


def _available():
    try:
        lines = _FREE_ON_LINUX.read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None)
