"""Measures that run over many tensors before a merge begins: what a Survey finds."""

from __future__ import annotations

from .kernels import sums_over
from .operator import Parts


def balanced_weights(parts: Parts, *, blend: float) -> tuple[float, float]:
    """Find weights for two deltas such that both bring the same mean absolute change, shared out by `blend`.

    Formula: s_i = mean |d_i| over all tensors, m = (s_1 + s_2) / 2; the weights are blend · m / s_1 and
    (1 − blend) · m / s_2. A delta of zero keeps its plain share.
    """
    first, second = sums_over((deltas[0].abs(), deltas[1].abs()) for (deltas, *_) in parts)
    mean = (first + second) / 2
    return blend * (mean / first if first else 1.0), (1 - blend) * (mean / second if second else 1.0)
