"""Arcee Fusion: take over of a model what stands out of its changes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..kernels import largest, sum_rows
from ..operator import WHOLE, Part, Parts, operator, row_width

if TYPE_CHECKING:
    from torch import Tensor

_EPSILON = 1e-8
_QUARTILES = (0.25, 0.5, 0.75)


def threshold(parts: Parts) -> float:
    """Find the median plus 1.5 times the distance of the quartiles of the importance in the whole tensor."""
    if not parts.entries:
        return 0.0
    width = row_width(parts.shape)
    ranks = [parts.entries - int(quartile * (parts.entries - 1)) for quartile in _QUARTILES]
    cuts = largest(lambda: (importance(model[0], base, width).expand(3, -1) for model, base in parts), ranks)
    low, middle, high = (cut.value for cut in cuts if cut is not None)
    return middle + 1.5 * (high - low)


def importance(model: Tensor, base: Tensor, width: int) -> Tensor:
    """Give |x − b| · KL(softmax x ‖ softmax b), the softmax along rows, computed in fp64, as fp32. Flat, whole rows."""
    own, other = (values.reshape(-1, width).double() for values in (model, base))
    difference = (own - other).abs_()
    p, q = own.softmax(dim=1).add_(_EPSILON), other.softmax(dim=1).add_(_EPSILON)
    divergence = sum_rows(p * (p / q).log_()).clamp_(min=0.0)
    return (difference * divergence[:, None]).float().reshape(-1)


@operator(
    source="arcee.ai, Arcee Fusion; mergekit 0.1.5 `arcee_fusion`, whose quartiles are drawn where there are over 10⁶",
    laws=("base",),
    measure=threshold,
    takes=1,
    rows=True,
)
def arcee_fusion(models: Tensor, base: Tensor, *, part: Part = WHOLE) -> Tensor:
    """Take those entries of the model whose change stands out, and keep the base's elsewhere.

    Formula: x where s ≥ median(s) + 1.5 (Q₃(s) − Q₁(s)), else b, with s = |x − b| · KL(p ‖ q) of the row, p and q the
    softmax of the rows of x and b, each plus 1e-8. Quantiles are the exact order statistics at ⌊q (n − 1)⌋ (mergekit
    draws 10⁶ entries of larger tensors), s is computed in fp64. A vector is one row.
    Shapes: models [1, *shape], base [*shape] → [*shape].

    >>> import torch
    >>> arcee_fusion(torch.tensor([[0.0, 0.0, 0.0, 0.1, 3.0]]), torch.zeros(5))
    tensor([0., 0., 0., 0., 3.])
    """
    shape = tuple(base.shape) if part.shape is None else part.shape
    least = threshold(Parts.whole(models, base)) if part.measured is None else part.measured
    taken = (importance(models[0], base, row_width(shape)) >= least).view(base.shape)
    return models[0].where(taken, base)
