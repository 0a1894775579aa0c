"""DELLA: drop deltas at random, small ones more often, and rescale what is left."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from ..kernels import keep_at_random
from ..operator import WHOLE, Part, Parts, PerModel, each, operator, row_width
from ..thinning import Divide, Elect, Rescale, Scale, Seed, Weight, add_up, cancelling, l1_factors

if TYPE_CHECKING:
    from torch import Tensor

Density = Annotated[float, Field(gt=0, le=1, description="mean probability with which an entry is kept; 1 keeps all")]
Epsilon = Annotated[
    float, Field(ge=0, lt=0.5, description="the smallest of a row is kept with density − epsilon, the largest with +")
]


def norm_factors(
    parts: Parts,
    *,
    density: PerModel[float],
    epsilon: PerModel[float],
    rescale: str,
    seed: int,
    streams: tuple[int, ...] = (),
) -> tuple[float, ...] | None:
    """Find for every model the factor by which the sum of magnitudes stays, where that is asked for."""
    if rescale != "l1":
        return None
    densities, epsilons = each(density, parts.models), each(epsilon, parts.models)
    drawn, width = streams or range(parts.models), row_width(parts.shape)

    def keep(values: Tensor, model: int, start: int) -> Tensor:
        share = keep_probability(values, width, densities[model], epsilons[model])
        return keep_at_random(values, share, seed, drawn[model], start)

    return l1_factors(parts, keep, width)


def keep_probability(values: Tensor, width: int, density: float, epsilon: float) -> Tensor:
    """Give each entry its probability: from ρ − ε to ρ + ε by its rank in its row; equals by index. Flat, whole rows.

    >>> import torch
    >>> keep_probability(torch.tensor([3.0, -1.0, 2.0]), 3, 0.5, 0.25)
    tensor([0.7500, 0.2500, 0.5000], dtype=torch.float64)
    """
    import torch

    rows = values.reshape(-1, width)
    if density >= 1 or not len(rows):
        return torch.ones_like(values, dtype=torch.float64)
    spread = epsilon if width > 1 else 0.0
    shares = torch.linspace(density - spread, density + spread, width, dtype=torch.float64, device="cpu")
    order = rows.abs().sort(dim=1, stable=True).indices
    result = torch.empty(rows.shape, dtype=torch.float64, device=rows.device)
    return result.scatter_(1, order, shares.to(rows.device).expand(rows.shape)).reshape(-1)


def outside(
    *,
    count: int,
    density: PerModel[float] = 0.5,
    epsilon: PerModel[float] = 0.15,
    weight: PerModel[float] = 1.0,
    elect: str = "weighted",
    divide: str = "weights",
) -> str:
    """Refuse probabilities outside (0, 1), and to divide by weights that sum to zero."""
    for share, spread in zip(each(density, count), each(epsilon, count), strict=True):
        if share < 1 and not spread < share < 1 - spread:
            return f"density ± epsilon is {share:g} ± {spread:g}: both ends must lie between 0 and 1"
    return cancelling(count=count, weight=weight, elect=elect, divide=divide)


@operator(
    source="Deep et al. 2024 (arXiv 2406.11617), section 3; mergekit 0.1.5 `della`, `della_linear`",
    laws=("permutation", "base", "scaling"),
    measure=norm_factors,
    refuse=outside,
    rows=True,
)
def della(
    deltas: Tensor,
    *,
    weight: PerModel[Weight] = 1.0,
    density: PerModel[Density] = 0.5,
    epsilon: PerModel[Epsilon] = 0.15,
    rescale: Rescale = "density",
    elect: Elect = "weighted",
    divide: Divide = "weights",
    scale: Scale = 1.0,
    seed: Seed = 0,
    part: Part = WHOLE,
) -> Tensor:
    """Drop entries of every delta at random, smaller ones more often, rescale the rest, merge what agrees in sign.

    Formula: t_i = m_i d_i / p_i with m_i ~ Bernoulli(p_i) by (seed, tensor, model, index), where p_i rises from ρ − ε
    at the smallest entry of a row to ρ + ε at the largest, linearly in its rank; then as `ties`. A vector is one row.
    mergekit rescales by the norms (`rescale: l1`). Shapes: deltas [n, *shape] → delta [*shape].

    >>> import torch
    >>> della(torch.tensor([[1.0, 2.0, 3.0, 4.0]]), density=0.5, epsilon=0.25)  # 3 of probability 7/12 is kept
    tensor([0.0000, 0.0000, 5.1429, 0.0000])
    """
    streams = part.streams or tuple(range(len(deltas)))
    shape = tuple(deltas.shape[1:]) if part.shape is None else part.shape
    factors = part.measured or norm_factors(
        Parts.whole(deltas), density=density, epsilon=epsilon, rescale=rescale, seed=seed, streams=streams
    )
    kept = deltas.clone()
    width, shares = row_width(shape), zip(each(density, len(kept)), each(epsilon, len(kept)), strict=True)
    for i, (delta, own) in enumerate(zip(kept, shares, strict=True)):
        share = keep_probability(delta.reshape(-1), width, *own).view(delta.shape)
        delta.masked_fill_(~keep_at_random(delta, share, seed, streams[i], part.start), 0.0)
        if rescale == "density":
            delta.div_(share)
        if factors:
            delta.mul_(factors[i])
    return add_up(kept, weight, elect=elect, divide=divide, scale=scale)
