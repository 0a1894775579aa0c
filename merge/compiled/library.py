"""The compiled library, where there is one: its functions, and the values that they take."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import POINTER, c_double, c_float, c_int, c_int32, c_int64, c_size_t, c_uint32, c_uint64, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

DTYPES = {"F32": 0, "BF16": 1, "F16": 2}  # what it loads and stores, by the numbers in stored.h
ROW = 4096  # entries that are summed up together
BLOCK = 1024  # entries that are worked on at once
TILE = 16  # columns that are multiplied at once
LANES = 4  # histograms of one digit, side by side
_FILE = Path(__file__).with_name("kernels.native")


class Stored(ctypes.Structure):
    """A run of one tensor's stored bytes; the address 0 stands for no tensor."""

    _fields_ = (("data", c_void_p), ("dtype", c_int32))


class Factor(ctypes.Structure):
    """A matrix of factors: where its entries lie; as kernels.c describes it."""

    _fields_ = (("of", Stored), ("step", c_int64), ("stride", c_int64))


class Thinning(ctypes.Structure):
    """How one delta is thinned; as kernels.c describes it."""

    _fields_ = (
        ("kind", c_int32),
        ("factor", c_float),
        ("value", c_float),
        ("last", c_int64),
        ("key", c_uint64),
        ("limit", c_uint64),
        ("marks", c_void_p),
    )


class Merging(ctypes.Structure):
    """How thinned deltas are added up; as kernels.c describes it."""

    _fields_ = (("elect", c_int32), ("divide", c_int32), ("divisor", c_float), ("scale", c_float))


NO_TENSOR = Stored(None, 0)
HIGHER = -1  # count_digits: count the higher digits

_Floats = POINTER(c_float)
_Doubles = POINTER(c_double)
_SIGNATURES: dict[str, tuple[Any, Sequence[Any]]] = {
    "weighted_sum": (
        None,
        (c_size_t, c_int, POINTER(Stored), _Floats, Stored, c_float, c_float, c_void_p, c_int),
    ),
    "inner_products": (None, (c_size_t, Stored, Stored, _Doubles)),
    "count_digits": (None, (c_size_t, Stored, Stored, c_size_t, c_int64, POINTER(c_uint32))),
    "find_digit": (None, (POINTER(c_uint32), c_int64, POINTER(c_int64))),
    "sift": (c_int64, (c_size_t, Stored, Stored, c_uint32, c_uint32, c_void_p, c_size_t, POINTER(c_int64))),
    "sift_blocks": (
        None,
        (c_size_t, Stored, Stored, c_uint32, c_uint32, c_void_p, POINTER(c_int64), POINTER(c_int64)),
    ),
    "count_around": (
        None,
        (c_size_t, c_void_p, POINTER(c_int64), c_uint32, POINTER(c_int64), POINTER(c_int64)),
    ),
    "take_selected": (
        c_size_t,
        (
            *(c_size_t, Stored, Stored, c_uint32, POINTER(c_int64), c_int64, c_size_t, c_size_t),
            *(c_void_p, c_void_p),
        ),
    ),
    "find_among": (None, (c_void_p, c_size_t, c_int64, POINTER(c_uint32), POINTER(c_int64))),
    "find_equal": (c_int64, (c_size_t, Stored, Stored, c_float, c_int64)),
    "magnitudes": (None, (c_size_t, Stored, Stored, POINTER(Thinning), c_int64, _Doubles)),
    "thinned_sum": (
        None,
        (
            *(c_size_t, c_int, POINTER(Stored), _Floats, POINTER(Thinning), Stored, Merging, c_int64),
            *(_Floats, c_void_p, c_int),
        ),
    ),
    "low_rank": (
        None,
        (c_size_t, c_size_t, c_size_t, c_size_t, Factor, Factor, c_double, _Doubles, c_void_p),
    ),
    "count_matching": (c_int64, (c_size_t, c_void_p, c_int, c_uint64, c_uint64)),
}


Histograms = c_uint32 * (LANES << 16)  # of one digit, side by side


def functions() -> Any:
    """Give the library's functions, where it is known to be there."""
    found = library()
    assert found is not None
    return found


@cache
def library() -> Any | None:
    """Give the library, whose functions let other threads run; None where it was not compiled."""
    try:
        found = ctypes.CDLL(str(_FILE))
    except OSError:
        return None
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(found, name)
        function.restype, function.argtypes = result, arguments
    return found
