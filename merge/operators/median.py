"""The median of several models, entry by entry."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..operator import WHOLE, Part, operator

if TYPE_CHECKING:
    from torch import Tensor


@operator(
    source="Yin et al. 2018 (arXiv 1803.01498), definition 1",
    laws=("identity", "permutation", "scaling"),
)
def median(models: Tensor, *, part: Part = WHOLE) -> Tensor:
    """Take the median of every entry; of an even number of models the mean of the middle two.

    Formula: the middle of x₁, …, x_n in order. One model that is far off in an entry does not move it.
    Shapes: models [n, *shape] → [*shape].

    >>> import torch
    >>> median(torch.tensor([[1.0, 5.0], [2.0, -9.0], [90.0, 6.0]]))
    tensor([2., 5.])
    """
    ordered, middle = models.sort(dim=0).values, len(models) // 2
    return ordered[middle].clone() if len(models) % 2 else (ordered[middle - 1] + ordered[middle]).mul_(0.5)
