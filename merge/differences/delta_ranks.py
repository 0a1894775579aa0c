"""How many dimensions a change has: the rank that keeps 90 % of its energy, exact where cheap, else of a sample."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from .spectra import rank_of, spectrum

if TYPE_CHECKING:
    from torch import Tensor

Ranks = Literal["none", "sampled", "exact"]
ENERGY = 0.9
_SIDE = 1024  # a matrix whose smaller side is longer is sampled
_ROWS = 512  # so many rows of it
_HELD = 1 << 23  # entries of one expert that may be held at once


@dataclass(frozen=True, slots=True)
class Rank:
    """The rank of a matrix of changes.

    Attributes:
        rank: min {k : Σ_{i≤k} σᵢ² ≥ 0.9 · Σ σᵢ²}; 0 for a change of zero.
        most: what it could be at most: the smaller side of what was looked at.
        rows: how many rows were looked at.
        of_rows: how many there are; where that is more, the rank is that of a sample of rows, an estimate.

    """

    rank: int
    most: int
    rows: int
    of_rows: int

    @property
    def is_sampled(self) -> bool:
        """Tell whether only some of the rows were looked at."""
        return self.rows < self.of_rows

    @property
    def share(self) -> float:
        """The rank as a share of what it could be."""
        return self.rank / self.most if self.most else 0.0


def delta_ranks(
    read: Callable[[slice], Tensor], shape: tuple[int, int], *, experts: int, name: str, exact: bool = False
) -> tuple[Rank, ...]:
    """Find the rank of every expert's change of one matrix.

    Exact where the smaller side is at most 1024: a tall matrix by its Gram matrix, row blocks one after the other, a
    wide one held at once, where it has at most 2²³ entries. Else 512 rows are looked at (fewer of very wide ones),
    drawn from the tensor's name alone. With `exact` every matrix is looked at as a whole, whatever that takes.

    Args:
        read: gives a flat run of all experts' changes [experts, run].
        shape: rows and columns.
        experts: how many there are.
        name: the tensor's.
        exact: never sample.

    """
    rows, columns = shape
    if not rows or not columns:
        return (Rank(0, 0, rows, rows),) * experts
    tall = rows >= columns
    if tall and (exact or columns <= _SIDE):
        return tuple(_rank(spectrum(_blocks(read, shape, i), columns), rows, rows) for i in range(experts))
    whole = exact or (rows <= _SIDE and rows * columns <= _HELD)
    count = rows if whole else min(rows, _ROWS, max(1, _HELD // columns))
    return _of_rows(read, shape, _chosen(rows, count, name), experts)


def _chosen(rows: int, count: int, name: str) -> list[int]:
    """Draw rows, in order: the same for the same tensor, in every run and of every expert."""
    return sorted(random.Random(name).sample(range(rows), count)) if count < rows else list(range(rows))


def _blocks(read: Callable[[slice], Tensor], shape: tuple[int, int], expert: int) -> Iterator[Tensor]:
    rows, columns = shape
    step = max(1, _HELD // 8 // columns)
    for first in range(0, rows, step):
        last = min(first + step, rows)
        yield read(slice(first * columns, last * columns))[expert].reshape(-1, columns)


def _of_rows(
    read: Callable[[slice], Tensor], shape: tuple[int, int], chosen: list[int], experts: int
) -> tuple[Rank, ...]:
    """Look at some rows, held at once."""
    import torch

    columns = shape[1]
    matrix = torch.stack([read(slice(row * columns, (row + 1) * columns)) for row in chosen], dim=1)
    tall = matrix if len(chosen) >= columns else matrix.transpose(1, 2)
    return tuple(_rank(spectrum([tall[i]], tall.shape[2]), len(chosen), shape[0]) for i in range(experts))


def _rank(squares: Tensor, rows: int, of_rows: int) -> Rank:
    return Rank(rank_of(squares, ENERGY)[0], len(squares), rows, of_rows)
