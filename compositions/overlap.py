"""Where sparse fine-tunes meet: how many entries two of them share, and whether they pull the same way there."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

from portmanteau.merge import MergeError, SparseFineTune
from portmanteau.merge.errors import Mistake, some
from portmanteau.merge.kernels import sums_over

_PAIR = 2


@dataclass(frozen=True, slots=True)
class Overlap:
    """Two sparse fine-tunes of one base, or what they do to one tensor of it.

    Attributes:
        one: the label of the first.
        other: the label of the second.
        tensor: the name of the tensor; empty for all together.
        entries: how many entries the tensors that either changes have in the base.
        counts: how many entries each changes.
        shared: how many entries both change.
        opposed: how many of those they change in opposite directions.
        mass: Σ |φ| of each.
        shared_mass: Σ |φ| of each over the shared entries.
        product: Σ φ₁ φ₂.
        squares: Σ φ² of each.

    """

    one: str
    other: str
    tensor: str
    entries: int
    counts: tuple[int, int]
    shared: int = 0
    opposed: int = 0
    mass: tuple[float, float] = (0.0, 0.0)
    shared_mass: tuple[float, float] = (0.0, 0.0)
    product: float = 0.0
    squares: tuple[float, float] = (0.0, 0.0)

    def document(self) -> dict[str, Any]:
        """Describe it as plain values, with the measures that its sums give."""
        measures = {"by_chance": self.by_chance, "cosine": self.cosine, "opposed_share": self.opposed_share}
        return asdict(self) | measures

    @property
    def by_chance(self) -> float:
        """How many entries two random choices of the same sizes would share."""
        return self.counts[0] * self.counts[1] / self.entries if self.entries else 0.0

    @property
    def cosine(self) -> float | None:
        """The cosine between both changes as wholes: φ₁ · φ₂ / (‖φ₁‖ ‖φ₂‖); None where one is zero."""
        lengths = math.sqrt(self.squares[0]) * math.sqrt(self.squares[1])
        return self.product / lengths if lengths else None

    @property
    def opposed_share(self) -> float | None:
        """Share of the shared entries that both pull in opposite directions; None where none is shared."""
        return self.opposed / self.shared if self.shared else None


def overlaps(diffs: Sequence[SparseFineTune]) -> tuple[Overlap, ...]:
    """Compare sparse fine-tunes pair by pair: a row for each tensor that either changes, then one for all of them.

    Sums are taken in fp64 on a fixed grid. One tensor's positions and values are in memory at a time.

    >>> from portmanteau import merge
    >>> *of_tensors, whole = overlaps([merge.open_sparse(f"examples/models/{x}-sparse") for x in ("task", "language")])
    >>> whole.counts, whole.shared, whole.opposed
    ((4962, 4962), 109, 58)
    >>> round(whole.by_chance, 1)  # 4962 · 4962 / 330816
    74.4

    Raises MergeError for fewer than two, and for sparse fine-tunes of different bases or shapes.
    """
    mistakes = list(_mistakes(diffs))
    if mistakes:
        raise MergeError.of(mistakes)
    found = []
    for one, other in combinations(diffs, _PAIR):
        names = dict.fromkeys([*one.shapes, *other.shapes])
        rows = [_of_tensor(one, other, name) for name in names]
        found += [*rows, _together(one, other, rows)]
    return tuple(found)


def _mistakes(diffs: Sequence[SparseFineTune]) -> Iterator[Mistake]:
    if len(diffs) < _PAIR:
        yield Mistake("", f"{len(diffs)} sparse fine-tune given", "name two or more")
    for one, other in combinations(diffs, _PAIR):
        where = f"{one.label} and {other.label}"
        if one.base and other.base and one.base != other.base:
            yield Mistake(where, "were made for different bases", "their positions mean different weights")
        shapes = [name for name, shape in one.shapes.items() if other.shapes.get(name, shape) != shape]
        if shapes:
            yield Mistake(where, f"have different shapes in {some(shapes)}", "they were made for different bases")


def _of_tensor(one: SparseFineTune, other: SparseFineTune, name: str) -> Overlap:
    """Compare what both do to one tensor of the base."""
    import torch

    entries = math.prod(one.shapes.get(name) or other.shapes[name])
    positions, values = [], []
    for diff in (one, other):
        has = name in diff.shapes
        read = (diff.indices(name), diff.values(name)) if has else ()
        tensors = [source.checkpoint.read(source.spec.name) for source in read]
        positions.append(tensors[0] if has else torch.empty(0, dtype=torch.int64, device="cpu"))
        values.append(tensors[1].double() if has else torch.empty(0, dtype=torch.float64, device="cpu"))
    shared = torch.isin(positions[0], positions[1], assume_unique=True)
    first, second = values[0][shared], values[1][torch.isin(positions[1], positions[0], assume_unique=True)]
    mass = [sums_over([(value.abs(), value.square())]) for value in values]
    common = sums_over([(first.abs(), second.abs(), first * second)])
    return Overlap(
        one.label,
        other.label,
        name,
        entries,
        (len(positions[0]), len(positions[1])),
        len(first),
        int((first * second < 0).sum()),
        (mass[0][0], mass[1][0]),
        (common[0], common[1]),
        common[2],
        (mass[0][1], mass[1][1]),
    )


def _together(one: SparseFineTune, other: SparseFineTune, rows: Sequence[Overlap]) -> Overlap:
    """Add up what was found for the single tensors."""
    return Overlap(
        one.label,
        other.label,
        "",
        sum(row.entries for row in rows),
        (sum(row.counts[0] for row in rows), sum(row.counts[1] for row in rows)),
        sum(row.shared for row in rows),
        sum(row.opposed for row in rows),
        (math.fsum(row.mass[0] for row in rows), math.fsum(row.mass[1] for row in rows)),
        (math.fsum(row.shared_mass[0] for row in rows), math.fsum(row.shared_mass[1] for row in rows)),
        math.fsum(row.product for row in rows),
        (math.fsum(row.squares[0] for row in rows), math.fsum(row.squares[1] for row in rows)),
    )
