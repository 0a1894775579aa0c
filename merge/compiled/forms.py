"""What compiled operators do, as values: an operator says by one of these what it does with these settings."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from ctypes import Array, c_double, c_float, c_int64, c_uint32, memset, sizeof
from dataclasses import dataclass, replace
from typing import Any, Protocol

from ..inner_products import InnerProducts, squared
from ..kernels import NO_LIMIT, Cut, random_key
from .library import LANES, ROW, Merging, Stored, Thinning, library

_ELECT = {"none": 0, "weighted": 1, "unweighted": 2}
_DIVIDE = {"none": 0, "weights": 1, "count": 2}
_ALL, _BY_SIZE, _AT_RANDOM = range(3)
_UNKNOWN = -1  # no higher digit is known yet


@dataclass(frozen=True, slots=True)
class Run:
    """A run of the tensors that meet: where it begins in them, how long it is, and its bytes."""

    start: int
    count: int
    models: Array[Stored]
    base: Stored


class Whole(Protocol):
    """The tensors that meet, as often as they must be gone through."""

    streams: Sequence[int]

    @property
    def entries(self) -> int:
        """How many each of them has."""

    def runs(self) -> Iterator[Run]:
        """Read them, run by run."""


class Form(Protocol):
    """What an operator does: first it may measure whole tensors, then it makes any run of the result."""

    @property
    def revisits(self) -> bool:
        """Tell whether it measures the tensors, and so goes through them more than once."""

    def measured(self, whole: Whole) -> Form:
        """Find what must be known of the whole tensors; give what can make runs."""

    def make(self, run: Run, out: int, dtype: int) -> None:
        """Make a run of the result at an address."""


@dataclass(frozen=True)
class WeightedSum:
    """[base +] Σ wᵢ (xᵢ [− base]) / divisor · scale; a weight of 0 leaves its model out."""

    weights: tuple[float, ...]
    divisor: float = 1.0
    scale: float = 1.0
    revisits = False

    def measured(self, whole: Whole) -> WeightedSum:
        """Nothing need be known."""
        return self

    def make(self, run: Run, out: int, dtype: int) -> None:
        """Make a run of the result at an address."""
        count = len(self.weights)
        weights = (c_float * count)(*self.weights)
        _library().weighted_sum(run.count, count, run.models, weights, run.base, self.divisor, self.scale, out, dtype)


@dataclass(frozen=True)
class ByInnerProducts:
    """A sum whose weights follow from the inner products of the models."""

    weights: Callable[[InnerProducts], tuple[float, ...]]
    revisits = True

    def measured(self, whole: Whole) -> WeightedSum:
        """Measure the inner products."""
        return WeightedSum(self.weights(inner_products(whole)))

    def make(self, run: Run, out: int, dtype: int) -> None:
        """Make nothing before it is measured."""
        raise AssertionError("not measured yet")


def inner_products(whole: Whole) -> InnerProducts:
    """Measure the inner products of whole tensors, as merge/inner_products.py does."""
    sums: list[list[list[float]]] = []
    count = 0
    for run in whole.runs():
        count = len(run.models)
        pairs, rows = count * (count + 1) // 2, -(-run.count // ROW)
        found, scratch = (c_double * (pairs * rows))(), (c_float * (count * ROW))()
        _library().inner_products(run.count, count, run.models, run.base, scratch, found)
        every = list(found)
        sums.append([every[i * rows : (i + 1) * rows] for i in range(pairs)])
    columns = zip(*sums, strict=True)
    return squared(count, [math.fsum(itertools.chain.from_iterable(column)) for column in columns])


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


@dataclass(frozen=True)
class ThinnedSum:
    """base + what is made of deltas of which each is thinned by its own rule.

    Attributes:
        thin: how each is thinned.
        weights: one for each.
        elect, divide, scale: how they are added up; as in merge/thinning.py.
        seed: picks the random streams.
        limits: the rules as the library takes them, once they are measured.

    """

    thin: tuple[Thin, ...]
    weights: tuple[float, ...]
    elect: str
    divide: str
    scale: float
    seed: int = 0
    limits: tuple[Thinning, ...] = ()

    @property
    def revisits(self) -> bool:
        """Tell whether it measures the tensors, and so goes through them more than once."""
        return any(one.kept is not None or one.factor is None for one in self.thin)

    def measured(self, whole: Whole) -> ThinnedSum:
        """Find the boundaries and the factors."""
        counts = [one.kept(whole.entries) if one.kept and whole.entries else None for one in self.thin]
        cuts = largest(whole, counts)
        limits = [
            self._limit(one, cut, whole.streams[i]) for i, (one, cut) in enumerate(zip(self.thin, cuts, strict=True))
        ]
        for model, one in enumerate(self.thin):
            if one.factor is None:
                limits[model].factor = _l1_factor(whole, model, limits[model])
        return replace(self, limits=tuple(limits))

    def _limit(self, one: Thin, cut: Cut | None, stream: int) -> Thinning:
        factor = 1.0 if one.factor is None else one.factor
        if cut is not None:
            return Thinning(_BY_SIZE, factor, cut.value, cut.last_index, 0, 0)
        if one.share is not None:
            key, limit = random_key(self.seed, stream), round(one.share * (1 << 53))
            return Thinning(_AT_RANDOM, factor, 0.0, 0, key, limit)
        return Thinning(_ALL, factor, 0.0, 0, 0, 0)

    def make(self, run: Run, out: int, dtype: int) -> None:
        """Make a run of the result at an address."""
        count = len(self.weights)
        divisors = {"none": 1.0, "weights": sum(self.weights), "count": float(count)}
        merging = Merging(_ELECT[self.elect], _DIVIDE[self.divide], divisors[self.divide], self.scale)
        thin, weights = (Thinning * count)(*self.limits), (c_float * count)(*self.weights)
        scratch = (c_float * (count * ROW))()
        _library().thinned_sum(
            run.count, count, run.models, weights, thin, run.base, merging, run.start, scratch, out, dtype
        )


def largest(whole: Whole, counts: Sequence[int | None]) -> list[Cut | None]:
    """Find for each model the boundary of its largest deltas, as merge/kernels.py does; in three passes."""
    lanes = {model: (c_uint32 * (LANES << 16))() for model, count in enumerate(counts) if count is not None}
    searches = {model: _Search(count) for model, count in enumerate(counts) if count is not None}
    for _ in range(2 if searches else 0):
        for run in whole.runs():
            for model, search in searches.items():
                _library().count_digits(run.count, run.models[model], run.base, search.prefix, lanes[model])
        searches = {model: search.narrowed(lanes[model]) for model, search in searches.items()}
    indices = _indices_of_equals(whole, {m: s for m, s in searches.items() if s.wanted != s.equal})
    return [
        Cut(searches[model].value, indices.get(model, NO_LIMIT)) if model in searches else None
        for model in range(len(counts))
    ]


@dataclass(frozen=True, slots=True)
class _Search:
    """The search for the wanted-th largest of those magnitudes whose bits begin with a prefix."""

    wanted: int
    prefix: int = _UNKNOWN
    equal: int = 0

    def narrowed(self, lanes: Array[c_uint32]) -> _Search:
        """Lengthen the prefix by the digit in whose bin the wanted magnitude lies, and clear the bins."""
        found = (c_int64 * 3)()
        _library().find_digit(lanes, self.wanted, found)
        memset(lanes, 0, sizeof(lanes))
        digit, above, equal = found
        return _Search(self.wanted - above, max(0, self.prefix) << 16 | digit, equal)

    @property
    def value(self) -> float:
        """The magnitude whose bits the prefix is."""
        return c_float.from_buffer(c_uint32(self.prefix)).value


def _indices_of_equals(whole: Whole, searches: dict[int, _Search]) -> dict[int, int]:
    """Find for each model the index of the wanted-th entry on its boundary."""
    left = {model: search.wanted for model, search in searches.items()}
    found: dict[int, int] = {}
    for run in whole.runs() if left else ():
        for model, wanted in tuple(left.items()):
            at = _library().find_equal(run.count, run.models[model], run.base, searches[model].value, wanted)
            if at >= 0:
                found[model] = run.start + at
                del left[model]
            else:
                left[model] += at + 1
        if not left:
            break
    return found


def _l1_factor(whole: Whole, model: int, limit: Thinning) -> float:
    """Measure ‖d‖₁ / ‖kept‖₁ of one model; 1 where nothing is kept."""
    every: list[float] = []
    kept: list[float] = []
    for run in whole.runs():
        rows = -(-run.count // ROW)
        sums = (c_double * (2 * rows))()
        _library().magnitudes(run.count, run.models[model], run.base, limit, run.start, sums)
        every += sums[:rows]
        kept += sums[rows:]
    below = math.fsum(kept)
    return math.fsum(every) / below if below > 0 else 1.0


def _library() -> Any:
    found = library()
    assert found is not None
    return found
