"""Where the changes of several experts from one base meet: angles, signs, and the entries that changed most."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, combinations
from typing import TYPE_CHECKING

from ..errors import MergeError
from ..kernels import Cut, largest, row_sums, select_largest
from ..operator import Parts
from .changes import Change
from .sums import total

if TYPE_CHECKING:
    from torch import Tensor

_TOP = 100  # concentration and overlap look at one entry in so many


@dataclass(frozen=True, slots=True)
class Meeting:
    """What two task vectors have in common over the entries of a tensor, or of several.

    Every measure is None where it would divide by zero.

    Attributes:
        entries: how many there are.
        both: how many both experts changed.
        opposed: how many of those they changed in opposite directions.
        product: Σ δ₁ δ₂.
        square_one: Σ δ₁².
        square_other: Σ δ₂².
        top_one: how many entries are among the 1 % of their tensor (rounded up) that the first changed most.
        top_other: the same of the other.
        top_both: how many are among both.
        top_chance: how many would be if two sets of these sizes were chosen at random.

    """

    entries: int = 0
    both: int = 0
    opposed: int = 0
    product: float = 0.0
    square_one: float = 0.0
    square_other: float = 0.0
    top_one: int = 0
    top_other: int = 0
    top_both: int = 0
    top_chance: float = 0.0

    @property
    def cosine(self) -> float | None:
        """The cosine between both task vectors, δ₁ · δ₂ / (‖δ₁‖ ‖δ₂‖)."""
        lengths = math.sqrt(self.square_one) * math.sqrt(self.square_other)
        return max(-1.0, min(1.0, self.product / lengths)) if lengths else None

    @property
    def sign_conflicts(self) -> float | None:
        """Share of the entries that both changed in which the signs differ; 0.5 by chance."""
        return self.opposed / self.both if self.both else None

    @property
    def changed_by_both(self) -> float | None:
        """Share of all entries that both changed."""
        return self.both / self.entries if self.entries else None

    @property
    def top_overlap(self) -> float | None:
        """Share of the most changed 1 % of the one (of the smaller set) that are among the other's."""
        smaller = min(self.top_one, self.top_other)
        return self.top_both / smaller if smaller else None

    @property
    def top_by_chance(self) -> float | None:
        """What that share would be by chance."""
        smaller = min(self.top_one, self.top_other)
        return self.top_chance / smaller if smaller else None


def met(meetings: Iterable[Meeting]) -> Meeting:
    """Add up what was found for several tensors, exactly, so that their order does not matter."""
    return total(Meeting, meetings)


@dataclass(frozen=True, slots=True)
class Measured:
    """What was found of one tensor: the change of every expert, and a meeting for every pair of them, in order."""

    changes: tuple[Change, ...]
    meetings: tuple[Meeting, ...]


def measure(parts: Parts) -> Measured:
    """Measure a tensor of n experts that comes in parts of (deltas [n, part], base [part]), in their working dtype.

    Passes over the parts: one for the sums, two or three for the exact boundaries of the top 1 %, one to count there.
    Sums are taken in fp64 on the fixed grid, so no bit depends on the size of the parts.

    Raises MergeError where an entry is NaN or infinite.
    """
    pairs = list(combinations(range(parts.models), 2))
    if not parts.entries:
        return Measured((Change(),) * parts.models, (Meeting(),) * len(pairs))
    sums, counts = _totals(parts.map(lambda deltas, base: _summed(_quantities(deltas, base, pairs))))
    base, base_squared, *rest = sums
    single, products = rest[: 2 * parts.models], rest[2 * parts.models :]
    changed, shared = counts[: parts.models], counts[parts.models :]
    if not math.isfinite(base + sum(single[::2])):
        raise MergeError("", "holds NaN or infinite values", "such a checkpoint is damaged: save or download it again")
    tops, common = _tops(parts, changed, pairs)
    changes = tuple(
        Change(parts.entries, changed[i], single[2 * i], single[2 * i + 1], base, base_squared, tops[i])
        for i in range(parts.models)
    )
    meetings = tuple(
        _meeting(parts.entries, products[n], (shared[2 * n], shared[2 * n + 1]), (changes[i], changes[j]), common[n])
        for n, (i, j) in enumerate(pairs)
    )
    return Measured(changes, meetings)


def _quantities(
    deltas: Tensor, base: Tensor, pairs: list[tuple[int, int]]
) -> tuple[Iterator[Tensor], Iterator[Tensor]]:
    """Give what is summed of one part, and what is counted.

    Sums: of the base two, of every expert two, of every pair one. Counts: of every expert one, of every pair two.
    """
    wide, changed, negative = deltas.double(), deltas != 0, deltas < 0

    def summed() -> Iterator[Tensor]:
        yield from (base.abs(), base.double().square())
        for delta, own in zip(deltas, wide, strict=True):
            yield from (delta.abs(), own.square())
        yield from (wide[i] * wide[j] for i, j in pairs)

    def counted() -> Iterator[Tensor]:
        yield from changed
        for i, j in pairs:
            both = changed[i] & changed[j]
            yield from (both, both & (negative[i] != negative[j]))

    return summed(), counted()


def _summed(quantities: tuple[Iterable[Tensor], Iterable[Tensor]]) -> tuple[list[list[float]], list[int]]:
    """Sum some quantities of one part along the fixed grid, and count the true entries of others."""
    summed, counted = quantities
    return [row_sums(values) for values in summed], [int(mask.count_nonzero()) for mask in counted]


def _totals(parts: Iterable[tuple[list[list[float]], list[int]]]) -> tuple[list[float], list[int]]:
    """Add up what was summed and counted of all parts, exactly."""
    rows, counts = zip(*parts, strict=True)
    sums = [math.fsum(chain.from_iterable(column)) for column in zip(*rows, strict=True)]
    return sums, [sum(column) for column in zip(*counts, strict=True)]


def _meeting(
    entries: int, product: float, shared: tuple[int, int], changes: tuple[Change, Change], top_both: int
) -> Meeting:
    first, second = changes
    one, other = (min(_top_count(entries), change.changed) for change in changes)
    return Meeting(
        entries=entries,
        both=shared[0],
        opposed=shared[1],
        product=product,
        square_one=first.delta_squared,
        square_other=second.delta_squared,
        top_one=one,
        top_other=other,
        top_both=top_both,
        top_chance=one * other / entries,
    )


def _top_count(entries: int) -> int:
    return -(-entries // _TOP)


def _tops(parts: Parts, changed: list[int], pairs: list[tuple[int, int]]) -> tuple[list[float], list[int]]:
    """Sum |δ| over each expert's most changed entries, and count those that are among both of a pair."""
    count = _top_count(parts.entries)
    cuts = largest(lambda: (deltas for deltas, _ in parts), [min(count, one) or None for one in changed])
    return _totals(map(_summed, _kept(parts, cuts, pairs)))


def _kept(
    parts: Parts, cuts: tuple[Cut | None, ...], pairs: list[tuple[int, int]]
) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Give, part by part, |δ| of every expert with zeros below its boundary, and for every pair where both are kept."""
    import torch

    start = 0
    for deltas, _ in parts:
        kept = [
            select_largest(delta, cut, start) if cut else torch.zeros_like(delta, dtype=torch.bool)
            for delta, cut in zip(deltas, cuts, strict=True)
        ]
        magnitudes = [delta.abs() * one for delta, one in zip(deltas, kept, strict=True)]
        yield magnitudes, [kept[i] & kept[j] for i, j in pairs]
        start += deltas.shape[1]
