"""Spherical interpolation between two models."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from ..compiled.forms import ByInnerProducts
from ..inner_products import InnerProducts, arc, inner_products
from ..kernels import weighted_sum
from ..operator import WHOLE, Part, Parts, operator

if TYPE_CHECKING:
    from torch import Tensor

_COLLINEAR = 0.9995


def factors(found: InnerProducts, t: float) -> tuple[float, float]:
    """Give the factors of both models."""
    return arc(found.cosine(0, 1), t, _COLLINEAR)


def compiled(*, t: float) -> ByInnerProducts:
    """Say it to the compiled library."""
    return ByInnerProducts(partial(factors, t=t))


@operator(
    source="Shoemake 1985, section 3.3; mergekit 0.1.5 `slerp` (whole tensor flattened, not normalised)",
    laws=("identity", "scaling"),
    measure=inner_products,
    takes=2,
    compiled=compiled,
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
    found = part.measured or inner_products(Parts.whole(models))
    return weighted_sum(models, factors(found, t))
