"""What must be known of whole tensors before any part of a result can be made, found by the compiled library.

Each gives what its namesake in merge/kernels.py, merge/inner_products.py or merge/thinning.py gives, to the bit.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from ctypes import Array, addressof, c_double, c_float, c_int64, c_uint32, memset, sizeof
from dataclasses import dataclass

from ..inner_products import InnerProducts, squared
from ..kernels import NO_LIMIT, Cut, exact_sum
from .library import HIGHER, ROW, Thinning, functions, lanes
from .runs import Whole

_SAMPLED = 16  # one row in so many is looked at first
_MARGIN = 0.05  # how far, as a share of what is wanted, the first look may be wrong
_ROOM = 1 << 22  # entries near a boundary that may be held in memory; where there are more, a radix selection is made


def inner_products(whole: Whole) -> InnerProducts:
    """Measure the inner products of whole tensors, as merge/inner_products.py does."""
    sums: list[list[list[float]]] = []
    count = 0
    for run in whole.runs():
        count = len(run.models)
        pairs, rows = count * (count + 1) // 2, -(-run.count // ROW)
        found, scratch = (c_double * (pairs * rows))(), (c_float * (count * ROW))()
        functions().inner_products(run.count, count, run.models, run.base, scratch, found)
        every = list(found)
        sums.append([every[i * rows : (i + 1) * rows] for i in range(pairs)])
    columns = zip(*sums, strict=True)
    return squared(count, [exact_sum(itertools.chain.from_iterable(column)) for column in columns])


def l1_factor(whole: Whole, model: int, limit: Thinning) -> float:
    """Measure ‖d‖₁ / ‖kept‖₁ of one model; 1 where nothing is kept."""
    every: list[float] = []
    kept: list[float] = []
    for run in whole.runs():
        rows = -(-run.count // ROW)
        sums = (c_double * (2 * rows))()
        functions().magnitudes(run.count, run.models[model], run.base, limit, run.start, sums)
        every += sums[:rows]
        kept += sums[rows:]
    below = exact_sum(kept)
    return exact_sum(every) / below if below > 0 else 1.0


@dataclass(frozen=True, slots=True)
class _Boundary:
    """The magnitude at a boundary: its bits, how many entries of it are kept, and how many there are."""

    bits: int
    wanted: int
    equal: int

    @property
    def value(self) -> float:
        """The magnitude."""
        return c_float.from_buffer(c_uint32(self.bits)).value


def largest(whole: Whole, counts: Sequence[int | None]) -> list[Cut | None]:
    """Find for each model the boundary of so many of its largest deltas; None: all are kept.

    A first look at some rows tells about where the boundaries lie; one pass keeps what lies there, and counts what is
    larger. Where that fails, a radix selection takes two passes. Where a boundary cuts among equals, one more finds the
    last index that is kept.
    """
    wanted = {model: count for model, count in enumerate(counts) if count is not None}
    found = _sifted(whole, wanted)
    found |= _by_radix(whole, {model: count for model, count in wanted.items() if model not in found})
    indices = _last_indices(whole, {model: one for model, one in found.items() if one.wanted != one.equal})
    return [
        Cut(found[model].value, indices.get(model, NO_LIMIT)) if model in found else None
        for model in range(len(counts))
    ]


def _digit(counted: Array[c_uint32], wanted: int) -> tuple[int, int, int]:
    """Find the bin of the wanted-th largest: its digit, how many are above it, how many in it."""
    found = (c_int64 * 3)()
    functions().find_digit(counted, wanted, found)
    return found[0], found[1], found[2]


def _regions(whole: Whole, wanted: Mapping[int, int]) -> dict[int, tuple[int, int]]:
    """Tell for each model between which bits its boundary probably lies, from some of the rows."""
    counts = {model: lanes() for model in wanted}
    seen = 0
    for run in whole.runs(_SAMPLED):
        seen += sum(min(ROW, run.count - start) for start in range(0, run.count, ROW * _SAMPLED))
        for model in wanted:
            functions().count_digits(run.count, run.models[model], run.base, _SAMPLED, HIGHER, counts[model])
    found = {}
    for model, count in wanted.items():
        share = count * seen / whole.entries
        low, *_ = _digit(counts[model], min(seen, math.ceil(share * (1 + _MARGIN)) + 1))
        high, *_ = _digit(counts[model], max(1, math.floor(share * (1 - _MARGIN))))
        found[model] = low << 16, (high + 1) << 16
    return found


def _sifted(whole: Whole, wanted: Mapping[int, int]) -> dict[int, _Boundary]:
    """Find the boundaries that lie where they probably lie."""
    if not wanted:
        return {}
    regions = _regions(whole, wanted)
    room = min(_ROOM, whole.entries)
    kept = {model: (c_uint32 * room)() for model in wanted}
    held, above = dict.fromkeys(wanted, 0), {model: c_int64() for model in wanted}
    for run in whole.runs():
        for model in tuple(kept):
            to = addressof(kept[model]) + held[model] * sizeof(c_uint32)
            near = (*regions[model], to, room - held[model], above[model])
            more = functions().sift(run.count, run.models[model], run.base, *near)
            held[model] += more
            if more < 0:
                del kept[model]
    found = {}
    for model, bits in kept.items():
        rest = wanted[model] - above[model].value
        if 0 < rest <= held[model]:
            among = (c_int64 * 3)()
            functions().find_among(bits, held[model], rest, lanes(), among)
            found[model] = _Boundary(among[0], rest - among[1], among[2])
    return found


def _by_radix(whole: Whole, wanted: Mapping[int, int]) -> dict[int, _Boundary]:
    """Find the boundaries by two passes, whatever the magnitudes are."""
    counts = {model: lanes() for model in wanted}
    highs = dict.fromkeys(wanted, HIGHER)
    left = dict(wanted)
    found = {}
    for _ in range(2 if wanted else 0):
        for run in whole.runs():
            for model in wanted:
                functions().count_digits(run.count, run.models[model], run.base, 1, highs[model], counts[model])
        for model in wanted:
            digit, above, equal = _digit(counts[model], left[model])
            memset(counts[model], 0, sizeof(counts[model]))
            left[model] -= above
            found[model] = _Boundary(max(0, highs[model]) << 16 | digit, left[model], equal)
            highs[model] = digit
    return found


def _last_indices(whole: Whole, boundaries: Mapping[int, _Boundary]) -> dict[int, int]:
    """Find for each model the index of the last entry on its boundary that is kept."""
    left = {model: one.wanted for model, one in boundaries.items()}
    found: dict[int, int] = {}
    for run in whole.runs() if left else ():
        for model, wanted in tuple(left.items()):
            at = functions().find_equal(run.count, run.models[model], run.base, boundaries[model].value, wanted)
            if at >= 0:
                found[model] = run.start + at
                del left[model]
            else:
                left[model] += at + 1
        if not left:
            break
    return found
