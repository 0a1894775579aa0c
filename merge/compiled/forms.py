"""What compiled operators do, as values: an operator says by one of these what it does with these settings."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from ctypes import c_float
from dataclasses import dataclass, replace

from ..inner_products import InnerProducts
from ..kernels import Cut, random_key
from .library import BLOCK, Merging, Thinning, functions
from .measures import inner_products, l1_norms, largest, marks_size, sifting_size
from .runs import Run, Whole

_ELECT = {"none": 0, "weighted": 1, "unweighted": 2}
_DIVIDE = {"none": 0, "weights": 1, "count": 2}
_ALL, _BY_SIZE, _AT_RANDOM = range(3)


@dataclass(frozen=True)
class WeightedSum:
    """[base +] Σ wᵢ (xᵢ [− base]) / divisor · scale; a weight of 0 leaves its model out."""

    weights: tuple[float, ...]
    divisor: float = 1.0
    scale: float = 1.0
    revisits = False

    @property
    def spreads(self) -> bool:
        """Tell whether an entry that is NaN or infinite in any of the tensors is so in the result."""
        return all(self.weights)  # what is added to it, or divides it, is finite, or makes it NaN

    def scratch(self, entries: int) -> int:
        """It needs none."""
        return 0

    def measured(self, whole: Whole) -> WeightedSum:
        """Nothing need be known."""
        return self

    def make(self, run: Run, out: int, dtype: int) -> None:
        """Make a run of the result at an address."""
        count = len(self.weights)
        weights = (c_float * count)(*self.weights)
        functions().weighted_sum(run.count, count, run.models, weights, run.base, self.divisor, self.scale, out, dtype)


@dataclass(frozen=True)
class ByInnerProducts:
    """A sum of two models whose weights follow from their inner products."""

    weights: Callable[[InnerProducts], tuple[float, ...]]
    revisits = True
    spreads = False

    def scratch(self, entries: int) -> int:
        """It needs none."""
        return 0

    def measured(self, whole: Whole) -> WeightedSum:
        """Measure the inner products."""
        return WeightedSum(self.weights(inner_products(whole)))

    def make(self, run: Run, out: int, dtype: int) -> None:
        """Make nothing before it is measured."""
        raise AssertionError("not measured yet")


@dataclass(frozen=True)
class Thin:
    """How one model's delta is thinned before it is added up.

    Attributes:
        kept: tells of so many entries how many are kept, those of largest magnitude; None: all are.
        share: keep each entry with this probability, by a counter; None: keep all.
        factor: of what is kept; None: such that the sum of magnitudes stays.

    """

    kept: Callable[[int], int | None] | None = None
    share: float | None = None
    factor: float | None = 1.0

    @property
    def is_drawn_twice(self) -> bool:
        """Tell whether what is drawn is needed before the result is made, to measure."""
        return self.share is not None and self.factor is None


@dataclass(frozen=True)
class ThinnedSum:
    """base + what is made of deltas of which each is thinned by its own rule.

    Attributes:
        thin: how each is thinned.
        weights: one for each.
        elect, divide, scale: how they are added up; as in merge/thinning.py.
        seed: picks the random streams.
        limits: the rules as the library takes them, once they are measured.
        spreads: whether an entry that is NaN or infinite in any of the tensors is so in the result. What is trimmed is
            gone; but where the magnitudes of all deltas have finite sums, there is none.

    """

    thin: tuple[Thin, ...]
    weights: tuple[float, ...]
    elect: str
    divide: str
    scale: float
    seed: int = 0
    limits: tuple[Thinning, ...] = ()
    spreads: bool = False

    @property
    def revisits(self) -> bool:
        """Tell whether it measures the tensors, and so goes through them more than once."""
        return any(one.kept is not None or one.factor is None for one in self.thin)

    def scratch(self, entries: int) -> int:
        """Tell how many bytes it needs beside tensors of so many entries: to find the boundaries, and for marks."""
        return self._sifting_size(entries) + sum(one.is_drawn_twice for one in self.thin) * marks_size(entries)

    def _sifting_size(self, entries: int) -> int:
        return sifting_size(sum(one.kept is not None for one in self.thin), entries)

    def measured(self, whole: Whole) -> ThinnedSum:
        """Find the boundaries and the factors."""
        counts = [one.kept(whole.entries) if one.kept and whole.entries else None for one in self.thin]
        cuts = largest(whole, counts)
        limits = [
            self._limit(one, cut, whole.streams[i]) for i, (one, cut) in enumerate(zip(self.thin, cuts, strict=True))
        ]
        self._place_marks(limits, whole)
        unknown = {model: limits[model] for model, one in enumerate(self.thin) if one.factor is None}
        norms = l1_norms(whole, unknown)
        for model, (every, kept) in norms.items():
            limits[model].factor = every / kept if kept > 0 else 1.0
        are_finite = len(norms) == len(limits) and all(math.isfinite(every) for every, _ in norms.values())
        return replace(self, limits=tuple(limits), spreads=are_finite)

    def _place_marks(self, limits: Sequence[Thinning], whole: Whole) -> None:
        """Say where the marks of what is drawn twice lie."""
        size, free = marks_size(whole.entries), whole.scratch + self._sifting_size(whole.entries)
        for one, limit in zip(self.thin, limits, strict=True):
            if one.is_drawn_twice and size:
                limit.marks, free = free, free + size

    def _limit(self, one: Thin, cut: Cut | None, stream: int) -> Thinning:
        factor = 1.0 if one.factor is None else one.factor
        if cut is not None:
            return Thinning(_BY_SIZE, factor, cut.value, cut.last_index)
        if one.share is not None:
            key, limit = random_key(self.seed, stream), round(one.share * (1 << 53))
            return Thinning(_AT_RANDOM, factor, 0.0, 0, key, limit)
        return Thinning(_ALL, factor)

    def make(self, run: Run, out: int, dtype: int) -> None:
        """Make a run of the result at an address."""
        count = len(self.weights)
        divisors = {"none": 1.0, "weights": sum(self.weights), "count": float(count)}
        merging = Merging(_ELECT[self.elect], _DIVIDE[self.divide], divisors[self.divide], self.scale)
        thin, weights = (Thinning * count)(*self.limits), (c_float * count)(*self.weights)
        scratch = (c_float * (count * BLOCK))()
        functions().thinned_sum(
            run.count, count, run.models, weights, thin, run.base, merging, run.start, scratch, out, dtype
        )
