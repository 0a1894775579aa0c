"""What must be known of whole tensors before any part of a result can be made, found by the compiled library.

Each gives what its namesake in merge/kernels.py, merge/inner_products.py or merge/thinning.py gives, to the bit.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from ctypes import Array, c_double, c_float, c_int64, c_uint32, memset, sizeof
from dataclasses import dataclass

from ..inner_products import InnerProducts, squared
from ..kernels import NO_LIMIT, Cut, exact_sum
from .library import DTYPES, HIGHER, NO_TENSOR, ROW, Histograms, Stored, Thinning, functions
from .runs import Whole

_SAMPLED = 16  # one entry in so many is looked at first
_MARGIN = 0.1  # how far, as a share of what is wanted, the first look may be wrong at most
_ROOM = 1 << 21  # entries near a boundary that may be held in memory; where there are more, a radix selection is made
_MARKED = 1 << 27  # entries of which it may be held in memory what was drawn


def inner_products(whole: Whole) -> InnerProducts:
    """Measure the inner products of two whole tensors, as merge/inner_products.py does."""
    sums: tuple[list[float], list[float], list[float]] = [], [], []
    for run in whole.runs():
        rows = -(-run.count // ROW)
        found = (c_double * (3 * rows))()
        functions().inner_products(run.count, *run.models, found)
        for i, pair in enumerate(sums):
            pair.extend(found[i * rows : (i + 1) * rows])
    return squared(2, [exact_sum(pair) for pair in sums])


def l1_norms(whole: Whole, limits: Mapping[int, Thinning]) -> dict[int, tuple[float, float]]:
    """Measure ‖d‖₁ and ‖kept‖₁ of some models. What is drawn of them is marked, where there is room for marks."""
    every: dict[int, list[float]] = {model: [] for model in limits}
    kept: dict[int, list[float]] = {model: [] for model in limits}
    for run in whole.runs() if limits else ():
        rows = -(-run.count // ROW)
        for model, limit in limits.items():
            sums = (c_double * (2 * rows))()
            functions().magnitudes(run.count, run.models[model], run.base, limit, run.start, sums)
            every[model] += sums[:rows]
            kept[model] += sums[rows:]
    return {model: (exact_sum(every[model]), exact_sum(kept[model])) for model in limits}


def marks_size(entries: int) -> int:
    """Tell how much scratch the marks of one model need, in whole rows; of a tensor too large they are drawn anew."""
    return -(-entries // ROW) * ROW // 8 if entries <= _MARKED else 0


def sifting_size(models: int, entries: int) -> int:
    """Tell how much scratch `largest` needs for so many models: histograms, and bits near the boundaries."""
    return models * (sizeof(Histograms) + min(_ROOM, entries) * sizeof(c_uint32))


@dataclass(frozen=True, slots=True)
class _Boundary:
    """The magnitude at a boundary.

    Attributes:
        bits: its bits.
        wanted: how many entries of it are kept.
        equal: how many there are.
        start: where the run begins in which the last one that is kept lies, or an earlier run.
        before: how many there are before that.

    """

    bits: int
    wanted: int
    equal: int
    start: int = 0
    before: int = 0

    @property
    def value(self) -> float:
        """The magnitude."""
        return c_float.from_buffer(c_uint32(self.bits)).value


def largest(whole: Whole, counts: Sequence[int | None]) -> list[Cut | None]:
    """Find for each model the boundary of so many of its largest deltas; None: all are kept.

    A first look at some rows tells about where the boundaries lie; one pass keeps what lies there, and counts what is
    larger. Where that fails, a radix selection takes two passes. Where a boundary cuts among equals, the run in which
    it does is read once more.
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
    counts = _histograms(whole, wanted)
    seen = 0
    parts, rows = (1, _SAMPLED) if whole.held else (_SAMPLED, 1)
    for run in whole.runs(parts):
        seen += sum(min(ROW, run.count - start) for start in range(0, run.count, ROW * rows))
        for model in wanted:
            functions().count_digits(run.count, run.models[model], run.base, rows, HIGHER, counts[model])
    found = {}
    for model, count in wanted.items():
        margin = min(_MARGIN, _ROOM / (4 * count))  # what lies there should fill half of the room at most
        share = count * seen / whole.entries
        low, *_ = _digit(counts[model], min(seen, math.ceil(share * (1 + margin)) + 1))
        high, *_ = _digit(counts[model], max(1, math.floor(share * (1 - margin))))
        found[model] = low << 16, (high + 1) << 16
    return found


def _sifted(whole: Whole, wanted: Mapping[int, int]) -> dict[int, _Boundary]:
    """Find the boundaries that lie where they probably lie."""
    if not wanted:
        return {}
    regions = _regions(whole, wanted)
    room = min(_ROOM, whole.entries)
    free = whole.scratch + len(wanted) * sizeof(Histograms)
    sifted = {model: _Sifted(free + at * room * sizeof(c_uint32)) for at, model in enumerate(wanted)}
    for run in whole.runs():
        for model, one in tuple(sifted.items()):
            one.starts.append(run.start)
            one.ends.append(one.ends[-1])
            near = (*regions[model], one.address + one.ends[-1] * sizeof(c_uint32), room - one.ends[-1], one.above)
            more = functions().sift(run.count, run.models[model], run.base, *near)
            one.ends[-1] += more
            if more < 0:
                del sifted[model]
    (lanes,) = _histograms(whole, (0,)).values()
    found = {model: one.boundary(wanted[model], lanes) for model, one in sifted.items()}
    return {model: boundary for model, boundary in found.items() if boundary is not None}


class _Sifted:
    """The bits of one model's magnitudes that lie near its boundary, in the order of the entries."""

    def __init__(self, address: int) -> None:
        """Keep them at an address."""
        self.address = address
        self.above = c_int64()  # how many are larger than all of them
        self.starts: list[int] = []  # of each run that was sifted
        self.ends = [0]  # where what is kept of it ends; the first one begins at 0

    def boundary(self, wanted: int, lanes: Array[c_uint32]) -> _Boundary | None:
        """Find the magnitude of the wanted-th largest of all, if it is among them."""
        rest = wanted - self.above.value
        if not 0 < rest <= self.ends[-1]:
            return None
        among = (c_int64 * 3)()
        functions().find_among(self.address, self.ends[-1], rest, lanes, among)
        bits, larger, equal = among
        last = self._equal(self.ends[-1], bits, rest - larger)
        at = bisect_right(self.ends, last) - 1
        before = -self._equal(self.ends[at], bits, NO_LIMIT) - 1
        return _Boundary(bits, rest - larger, equal, self.starts[at], before)

    def _equal(self, count: int, bits: int, ordinal: int) -> int:
        """Find, of the first so many, the ordinal-th that has these bits; where there are fewer, -(how many) - 1."""
        kept, value = Stored(self.address, DTYPES["F32"]), c_float.from_buffer(c_uint32(bits))
        found: int = functions().find_equal(count, kept, NO_TENSOR, value, ordinal)
        return found


def _histograms(whole: Whole, models: Iterable[int]) -> dict[int, Array[c_uint32]]:
    """Give empty histograms of one digit for each model, at the beginning of the scratch."""
    found = {}
    for at, model in enumerate(models):
        found[model] = Histograms.from_address(whole.scratch + at * sizeof(Histograms))
        memset(found[model], 0, sizeof(Histograms))
    return found


def _by_radix(whole: Whole, wanted: Mapping[int, int]) -> dict[int, _Boundary]:
    """Find the boundaries by two passes, whatever the magnitudes are."""
    if not wanted:
        return {}
    counts = _histograms(whole, wanted)
    highs = dict.fromkeys(wanted, HIGHER)
    left = dict(wanted)
    found = {}
    for _ in range(2):
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
    found: dict[int, int] = {}
    for model, boundary in boundaries.items():
        left = boundary.wanted - boundary.before
        for run in whole.runs(start=boundary.start):
            at = functions().find_equal(run.count, run.models[model], run.base, boundary.value, left)
            if at >= 0:
                found[model] = run.start + at
                break
            left += at + 1
    return found
