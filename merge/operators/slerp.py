"""Spherical interpolation between two models."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from ..kernels import sums_over, weighted_sum
from ..operator import WHOLE, Part, Parts, operator

if TYPE_CHECKING:
    from torch import Tensor

_COLLINEAR = 0.9995
_EPSILON = 1e-8


def cosine(parts: Parts) -> float:
    """Measure the cosine between the two tensors, flattened; 0 where one of them is zero."""
    pairs = (models.double() for (models,) in parts)
    dot, first, second = sums_over((x * y, x * x, y * y) for x, y in pairs)
    norms = math.sqrt(first), math.sqrt(second)
    return dot / (norms[0] * norms[1]) if min(norms) > _EPSILON else 0.0


@operator(
    source="Shoemake 1985, section 3.3; mergekit 0.1.5 `slerp` (whole tensor flattened, not normalised)",
    laws=("identity", "scaling"),
    measure=cosine,
    takes=2,
)
def slerp(
    models: Tensor,
    *,
    t: Annotated[float, Field(ge=0, le=1, description="0 gives the first model, 1 the second")] = 0.5,
    part: Part = WHOLE,
) -> Tensor:
    """Go from one model to another along the arc between them.

    Formula: sin((1−t)θ)/sin θ · x₁ + sin(tθ)/sin θ · x₂ with cos θ = x₁·x₂ / (‖x₁‖‖x₂‖) over the whole tensor;
    (1−t) x₁ + t x₂ where |cos θ| > 0.9995 (almost collinear). Shapes: models [2, *shape] → [*shape].

    >>> import torch
    >>> slerp(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), t=0.5)
    tensor([0.7071, 0.7071])
    """
    found = cosine(Parts.whole(models)) if part.measured is None else part.measured
    if abs(found) > _COLLINEAR:
        return weighted_sum(models, (1 - t, t))
    angle = math.acos(found)
    return weighted_sum(models, (math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)))
