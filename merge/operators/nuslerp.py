"""Spherical interpolation between two models or task vectors by weights, over the whole tensor or row by row."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from ..inner_products import arc, groups_along, inner_products, inner_products_along
from ..kernels import weighted_sum
from ..operator import WHOLE, Part, Parts, PerModel, each, operator
from .linear import Weight, cancelling

if TYPE_CHECKING:
    from torch import Tensor

_COLLINEAR = math.sqrt(1 - 1e-16)


def arcs(
    parts: Parts, *, weight: PerModel[float], flatten: bool, along: Literal["last", "first"]
) -> tuple[tuple[float, ...], ...]:
    """Find the two factors: one pair for the whole tensor, or one for each vector along a dimension."""
    first, second = each(weight, parts.models)
    t = second / (first + second)
    found = [inner_products(parts)] if flatten else inner_products_along(parts, along)
    return tuple(arc(one.cosine(0, 1), t, _COLLINEAR) for one in found)


def no_share(*, count: int, weight: PerModel[float] = 1.0) -> str:
    """Refuse weights that sum to zero."""
    return cancelling(count=count, weight=weight, normalize=True)


@operator(
    source="mergekit 0.1.5 `nuslerp`; the arc as Shoemake 1985, section 3.3",
    laws=("identity", "permutation", "scaling"),
    measure=arcs,
    takes=2,
    refuse=no_share,
)
def nuslerp(
    vectors: Tensor,
    *,
    weight: PerModel[Weight] = 1.0,
    flatten: Annotated[bool, Field(description="one arc for the whole tensor, else one for each row or column")] = True,
    along: Annotated[
        Literal["last", "first"], Field(description="without flatten: the dimension along which a vector lies")
    ] = "last",
    part: Part = WHOLE,
) -> Tensor:
    """Go from one model to another along the arc between them; between task vectors where there is a base.

    Formula: sin((1−t)θ)/sin θ · x₁ + sin(tθ)/sin θ · x₂ with t = w₂/(w₁+w₂) and cos θ = x₁·x₂ / (‖x₁‖‖x₂‖), 0 where one
    is zero; (1−t) x₁ + t x₂ where 1 − cos² θ < 1e-16. Weights that sum to zero are refused (mergekit takes t = ½).
    Shapes: vectors [2, *shape] → [*shape].

    >>> import torch
    >>> nuslerp(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), weight=[1.0, 2.0])  # 60° of 90°
    tensor([0.5000, 0.8660])
    """
    import torch

    whole = Parts.whole(vectors)
    found = part.measured if part.measured is not None else arcs(whole, weight=weight, flatten=flatten, along=along)
    if flatten:
        return weighted_sum(vectors, found[0])
    group, count = groups_along(whole.shape if part.shape is None else part.shape, along)
    index = torch.arange(part.start, part.start + vectors[0].numel(), device=vectors.device)
    pairs = torch.tensor(found, dtype=vectors.dtype, device=vectors.device).reshape(count, 2)
    factors = pairs.T[:, group(index)].reshape(vectors.shape)
    return vectors[0] * factors[0] + vectors[1] * factors[1]
