"""The selection of selection.py over stored bytes: the same boundary and counts, by the compiled library."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from ctypes import Array, addressof, c_float, c_int64, c_uint32, sizeof, string_at
from dataclasses import dataclass, replace
from typing import NoReturn

from ..compiled.library import HIGHER, Histograms, functions
from ..compiled.runs import Run
from ..compiled.surveying import Runs
from ..errors import MergeError
from ..evaluate import GRID
from .selection import AGAIN, KEPT, Counts, Selection, empty, over, taken

_SAMPLED, _ENOUGH = 16, 1 << 22  # one entry in so many is looked at first, if that leaves enough of them
_MARGIN = 0.04  # how far, as a share of k, the first look may be wrong: it sees some of every part
_UNTIL_FULL = 1 << 33  # entries that four lanes can count in 32 bits, however unevenly they fill
_DIGITS = 1 << 16

Groups = Mapping[str, Runs]
Found = tuple[int, Counts, Counts]  # the bits of the boundary; counts and ties of every block


def select(groups: Groups, *, count: int, wide: bool = False) -> Selection:
    """Select the entries of largest magnitude over all tensors.

    Raises MergeError where fewer entries than that differ from the base.
    """
    assert not wide  # fp64 is not read by the library
    boundary, counts, ties = _sifted(groups, count, *_region(groups, count)) or _by_radix(groups, count)
    if boundary == 0:
        _refuse(groups, count)
    value = c_float.from_buffer(c_uint32(boundary)).value
    return Selection(value, counts, ties, sum(runs.entries for runs in groups.values()))


def _refuse(groups: Groups, count: int) -> NoReturn:
    changed = sum(sum(found.above) for _, found in over(groups, _sifter(1, 1)))
    raise MergeError("", f"{count:,} entries are asked for, and {changed:,} differ", AGAIN)


def _region(groups: Groups, count: int) -> tuple[int, int]:
    """Tell in which region the boundary probably lies: the bits of the lowest |δ| in it, and of the lowest above it."""
    entries = sum(one.entries for one in groups.values())
    sampled = max(1, min(_SAMPLED, entries // _ENOUGH))
    totals = _histogram({name: replace(one, share=sampled) for name, one in groups.items()}, HIGHER)
    margin = _MARGIN if sampled > 1 else 0.0
    wanted = count * sum(totals) / entries
    low, *_ = _digit(totals, math.ceil(wanted * (1 + margin)))
    high, *_ = _digit(totals, max(1, math.floor(wanted * (1 - margin))))
    return low << 16, (high + 1) << 16


def _histogram(groups: Groups, high: int) -> list[int]:
    """Count the higher digits of all magnitudes, or the lower ones of those whose higher is `high`."""
    own, every_lanes, totals = threading.local(), [], [0] * _DIGITS

    def count(run: Run) -> None:
        if getattr(own, "left", 0) < run.count:  # this thread begins, or its lanes could overflow
            own.lanes, own.left = Histograms(), _UNTIL_FULL
            every_lanes.append(own.lanes)
        own.left -= run.count
        functions().count_digits(run.count, run.models[0], run.base, 1, high, own.lanes)

    for _ in over(groups, count):
        pass
    for found in every_lanes:
        for lane in range(0, len(found), _DIGITS):
            totals = [one + more for one, more in zip(totals, found[lane : lane + _DIGITS], strict=True)]
    return totals


def _digit(totals: Sequence[int], wanted: int) -> tuple[int, int]:
    """Find the bin of the wanted-th largest: its digit, and how many are above it."""
    above = 0
    for digit in range(_DIGITS - 1, 0, -1):
        if above + totals[digit] >= wanted:
            return digit, above
        above += totals[digit]
    return 0, above


@dataclass(frozen=True, slots=True)
class _Sifted:
    """What one run holds of a region: its bits; for each block how many these are, and how many lie above."""

    bits: bytes
    sizes: Array[c_int64]
    above: Array[c_int64]


def _sifter(low: int, high: int) -> Callable[[Run], _Sifted]:
    """Give what finds in a run the magnitudes in a region."""
    own = threading.local()

    def sift(run: Run) -> _Sifted:
        blocks = -(-run.count // GRID)
        if len(getattr(own, "kept", ())) < run.count:
            own.kept = (c_uint32 * run.count)()
        sizes, above = (c_int64 * blocks)(), (c_int64 * blocks)()
        functions().sift_blocks(run.count, run.models[0], run.base, low, high, own.kept, sizes, above)
        return _Sifted(string_at(own.kept, sum(sizes) * sizeof(c_uint32)), sizes, above)

    return sift


def _sifted(groups: Groups, count: int, low: int, high: int) -> Found | None:
    """Find the boundary in a region of bits, and the counts of every block; nothing where it is not to be found so."""
    region, held = bytearray(KEPT * sizeof(c_uint32)), 0
    pieces: list[tuple[str, Array[c_int64], Array[c_int64]]] = []
    for name, found in over(groups, _sifter(low, high)):
        if held + len(found.bits) > len(region):
            return None
        region[held : held + len(found.bits)] = found.bits
        held += len(found.bits)
        pieces.append((name, found.sizes, found.above))
    wanted = count - sum(sum(above) for *_, above in pieces)
    if not 0 < wanted <= held // sizeof(c_uint32):
        return None
    among, at = (c_int64 * 3)(), addressof(c_uint32.from_buffer(region))
    functions().find_among(at, held // sizeof(c_uint32), wanted, Histograms(), among)
    boundary, ties = among[0], wanted - among[1]
    counts, equals = empty(groups), empty(groups)
    for name, sizes, above in pieces:
        same = (c_int64 * len(sizes))()
        functions().count_around(len(sizes), at, sizes, boundary, above, same)
        ties = taken(counts[name], equals[name], above, same, ties)
        at += sum(sizes) * sizeof(c_uint32)
    return boundary, counts, equals


def _by_radix(groups: Groups, count: int) -> Found:
    """Find the same with three passes, whatever the magnitudes are."""
    high, above = _digit(_histogram(groups, HIGHER), count)
    low, more = _digit(_histogram(groups, high), count - above)
    boundary, ties = high << 16 | low, count - above - more
    counts, equals = empty(groups), empty(groups)
    for name, found in over(groups, _sifter(boundary, boundary + 1)):
        ties = taken(counts[name], equals[name], found.above, found.sizes, ties)
    return boundary, counts, equals
