"""DARE: drop deltas at random and rescale what is left."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from ..kernels import keep_at_random, mix_agreeing, sums_over, weighted_sum
from ..operator import WHOLE, Part, Parts, PerModel, each, operator
from .linear import SMALLEST_SUM

if TYPE_CHECKING:
    from torch import Tensor

Weight = Annotated[float, Field(description="factor of this model's delta", allow_inf_nan=False)]
Density = Annotated[float, Field(gt=0, le=1, description="probability with which an entry is kept")]


def keep_factors(
    parts: Parts, *, density: PerModel[float], rescale: str, seed: int, streams: tuple[int, ...] = ()
) -> tuple[float, ...]:
    """Find the factor of every model's kept entries: 1/density, or such that the sum of magnitudes stays."""
    densities = each(density, parts.models)
    if rescale != "l1":
        return tuple(1 / share if rescale == "density" else 1.0 for share in densities)
    sums: list[float] = []
    for model, share in enumerate(densities):
        sums += _sums_of_magnitudes(parts, model, share, seed, _stream(streams, model))
    return tuple(all_of / kept if kept > 0 else 1.0 for all_of, kept in zip(sums[::2], sums[1::2], strict=True))


def _sums_of_magnitudes(parts: Parts, model: int, share: float, seed: int, stream: int) -> list[float]:
    """Sum |d| over all entries, and over the kept ones."""

    def magnitudes() -> Iterator[tuple[Tensor, Tensor]]:
        start = 0
        for deltas, *_ in parts:
            values = deltas[model].reshape(-1)
            yield values.abs(), values.abs() * keep_at_random(values, share, seed, stream, start)
            start += len(values)

    return sums_over(magnitudes())


def _stream(streams: tuple[int, ...], model: int) -> int:
    """Give the model's random stream; called without names, its position stands for it."""
    return streams[model] if streams else model


def cancelling(*, count: int, weight: PerModel[float] = 1.0, elect: str = "none", divide: str = "none") -> str:
    """Refuse to divide by weights that sum to zero."""
    divides = elect == "none" and divide == "weights"
    return "the weights sum to zero" if divides and abs(sum(each(weight, count))) < SMALLEST_SUM else ""


@operator(
    source="Yu et al. 2024 (arXiv 2311.03099), section 3; `elect` as mergekit 0.1.5 `dare_ties`, `rescale: l1` as both",
    laws=("permutation", "base", "scaling"),
    measure=keep_factors,
    refuse=cancelling,
)
def dare(
    deltas: Tensor,
    *,
    weight: PerModel[Weight] = 1.0,
    density: PerModel[Density] = 0.5,
    rescale: Annotated[
        Literal["density", "l1", "none"],
        Field(description="multiply what is kept by 1/density (paper), by ‖d‖₁/‖kept‖₁ (mergekit), or not"),
    ] = "density",
    elect: Annotated[
        Literal["none", "weighted", "unweighted"],
        Field(description="merge all (dare_linear), or only what agrees with the elected sign (dare_ties)"),
    ] = "none",
    divide: Annotated[
        Literal["none", "weights", "count"],
        Field(description="divide by the (agreeing) weights, by the count of (agreeing) models, or not"),
    ] = "none",
    scale: Annotated[float, Field(description="factor of the merged delta (λ)", allow_inf_nan=False)] = 1.0,
    seed: Annotated[int, Field(ge=0, lt=1 << 63, description="picks the entries, with tensor and model name")] = 0,
    part: Part = WHOLE,
) -> Tensor:
    """Drop entries of every delta at random, rescale the rest, and add up (or merge what agrees in sign).

    Formula: Σ w_i r_i m_i d_i with m_i ~ Bernoulli(ρ_i) by (seed, tensor, model, index) and r_i = 1/ρ_i, so that the
    expectation is Σ w_i d_i. Shapes: deltas [n, *shape] → delta [*shape].

    >>> import torch
    >>> dare(torch.ones(1, 8), density=0.5)
    tensor([0., 2., 2., 0., 2., 2., 2., 0.])
    """
    whole = Parts.whole(deltas)
    factors = part.measured or keep_factors(whole, density=density, rescale=rescale, seed=seed, streams=part.streams)
    kept = deltas.clone()
    for model, (delta, share, factor) in enumerate(zip(kept, each(density, len(kept)), factors, strict=True)):
        mask = keep_at_random(delta, share, seed, _stream(part.streams, model), part.start)
        delta.masked_fill_(~mask, 0.0).mul_(factor)
    weights = each(weight, len(kept))
    if elect != "none":
        return mix_agreeing(kept, weights, elect=elect, divide=divide) * scale
    mixed = weighted_sum(kept, weights)
    if divide != "none":
        mixed = mixed / (sum(weights) if divide == "weights" else float(len(kept)))
    return mixed * scale
