"""DARE: drop deltas at random and rescale what is left."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from ..compiled.forms import Thin, ThinnedSum
from ..kernels import keep_at_random
from ..operator import WHOLE, Part, Parts, PerModel, each, operator
from ..thinning import Divide, Elect, Rescale, Scale, Seed, Weight, add_up, cancelling, l1_factors

if TYPE_CHECKING:
    from torch import Tensor

Density = Annotated[float, Field(gt=0, le=1, description="probability with which an entry is kept")]


def keep_factors(
    parts: Parts, *, density: PerModel[float], rescale: str, seed: int, streams: tuple[int, ...] = ()
) -> tuple[float, ...]:
    """Find the factor of every model's kept entries: 1/density, or such that the sum of magnitudes stays."""
    densities = each(density, parts.models)
    if rescale != "l1":
        return tuple(_plain_factor(share, rescale) for share in densities)
    drawn = streams or range(parts.models)
    return l1_factors(parts, lambda values, i, start: keep_at_random(values, densities[i], seed, drawn[i], start))


def _plain_factor(share: float, rescale: str) -> float:
    return 1 / share if rescale == "density" else 1.0


def compiled(
    *,
    count: int,
    weight: PerModel[float],
    density: PerModel[float],
    rescale: str,
    elect: str,
    divide: str,
    scale: float,
    seed: int,
) -> ThinnedSum:
    """Say it to the compiled library."""
    shares = each(density, count)
    thin = (Thin(share=one, factor=None if rescale == "l1" else _plain_factor(one, rescale)) for one in shares)
    return ThinnedSum(tuple(thin), each(weight, count), elect, divide, scale, seed)


@operator(
    source="Yu et al. 2024 (arXiv 2311.03099), section 3; `elect` as mergekit 0.1.5 `dare_ties`, `rescale: l1` as both",
    laws=("permutation", "base", "scaling"),
    measure=keep_factors,
    refuse=cancelling,
    compiled=compiled,
)
def dare(
    deltas: Tensor,
    *,
    weight: PerModel[Weight] = 1.0,
    density: PerModel[Density] = 0.5,
    rescale: Rescale = "density",
    elect: Elect = "none",
    divide: Divide = "none",
    scale: Scale = 1.0,
    seed: Seed = 0,
    part: Part = WHOLE,
) -> Tensor:
    """Drop entries of every delta at random, rescale the rest, and add up (or merge what agrees in sign).

    Formula: Σ w_i r_i m_i d_i with m_i ~ Bernoulli(ρ_i) by (seed, tensor, model, index) and r_i = 1/ρ_i, so that the
    expectation is Σ w_i d_i. Shapes: deltas [n, *shape] → delta [*shape].

    >>> import torch
    >>> dare(torch.ones(1, 8), density=0.5)
    tensor([0., 2., 2., 0., 2., 2., 2., 0.])
    """
    streams = part.streams or tuple(range(len(deltas)))  # called without names, a model's position stands for it
    whole = Parts.whole(deltas)
    factors = part.measured or keep_factors(whole, density=density, rescale=rescale, seed=seed, streams=streams)
    kept = deltas.clone()
    for delta, share, factor, stream in zip(kept, each(density, len(kept)), factors, streams, strict=True):
        delta.masked_fill_(~keep_at_random(delta, share, seed, stream, part.start), 0.0).mul_(factor)
    return add_up(kept, weight, elect=elect, divide=divide, scale=scale)
