"""What the operators share that know the models by their lengths and angles: all inner products, found in one pass.

A vector is written by its coefficients: (c_1, …, c_n) is Σ c_i x_i. Its length and the angle to another follow from the
inner products of the x_i alone, so however many steps an iteration takes, the tensors are read once to measure.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement
from typing import TYPE_CHECKING, Literal

from .kernels import exact_sum, grouped_sums, sums_over
from .operator import Parts

if TYPE_CHECKING:
    from torch import Tensor

Vector = Sequence[float]


@dataclass(frozen=True)
class InnerProducts:
    """The inner products ⟨x_i, x_j⟩ of n vectors.

    >>> found = InnerProducts(((9.0, 0.0), (0.0, 16.0)))
    >>> found.length((1.0, 1.0)), found.cosine(0, 1)
    (5.0, 0.0)
    """

    products: tuple[tuple[float, ...], ...]

    @property
    def lengths(self) -> tuple[float, ...]:
        """The length of every x_i."""
        return tuple(math.sqrt(row[i]) for i, row in enumerate(self.products))

    def dot(self, one: Vector, other: Vector) -> float:
        """Multiply two vectors."""
        rows = zip(one, self.products, strict=True)
        return exact_sum(a * b * product for a, row in rows for b, product in zip(other, row, strict=True))

    def length(self, vector: Vector) -> float:
        """Give the length of a vector."""
        return math.sqrt(max(0.0, self.dot(vector, vector)))

    def cosine(self, i: int, j: int) -> float:
        """Give the cosine between x_i and x_j; 0 where one of them is zero."""
        norms = self.lengths[i] * self.lengths[j]
        return max(-1.0, min(1.0, self.products[i][j] / norms)) if norms > 0 else 0.0


def inner_products(parts: Parts) -> InnerProducts:
    """Measure the inner products of whole tensors."""
    return squared(parts.models, sums_over(_products(vectors) for (vectors, *_) in parts))


def inner_products_along(parts: Parts, along: Literal["last", "first"]) -> list[InnerProducts]:
    """Measure the inner products of all vectors along one dimension, each on its own."""
    group, count = groups_along(parts.shape, along)
    sums = grouped_sums((_products(vectors) for (vectors, *_) in parts), group, count)
    return [squared(parts.models, own) for own in zip(*(column.tolist() for column in sums), strict=True)]


def groups_along(shape: tuple[int, ...], along: str) -> tuple[Callable[[Tensor], Tensor], int]:
    """Give the number of the vector along a dimension in which a flat index lies, and how many such vectors there are.

    >>> import torch
    >>> [groups_along((2, 3), along)[0](torch.arange(6)).tolist() for along in ("last", "first")]
    [[0, 0, 0, 1, 1, 1], [0, 1, 2, 0, 1, 2]]
    """
    entries, shape = math.prod(shape), shape or (1,)
    if not entries:
        return lambda index: index, 0
    if along == "first":
        count = entries // shape[0]
        return lambda index: index % count, count
    return lambda index: index // shape[-1], entries // shape[-1]


def _products(vectors: Tensor) -> list[Tensor]:
    """Multiply all pairs, entry by entry, in fp64: of fp32 numbers exactly. [n, part] → n(n+1)/2 of [part]."""
    wide = vectors.double().reshape(len(vectors), -1)
    return [one * other for one, other in combinations_with_replacement(wide, 2)]


def squared(count: int, sums: Iterable[float]) -> InnerProducts:
    """Put the products of all pairs into rows."""
    square = [[0.0] * count for _ in range(count)]
    for (i, j), value in zip(combinations_with_replacement(range(count), 2), sums, strict=True):
        square[i][j] = square[j][i] = value
    return InnerProducts(tuple(map(tuple, square)))


def arc(cosine: float, t: float, collinear: float) -> tuple[float, float]:
    """Give the two factors of slerp; those of linear interpolation where |cosine| is greater than `collinear`.

    >>> arc(1.0, 0.25, 0.9995)
    (0.75, 0.25)
    """
    if abs(cosine) > collinear:
        return 1 - t, t
    angle = math.acos(cosine)
    return math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)
