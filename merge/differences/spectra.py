"""The singular values of a matrix from the smaller of its Gram matrices, and the rank that they tell."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

_BLOCK = 1024  # rows


def spectrum(blocks: Iterable[Tensor], width: int) -> Tensor:
    """Give the squared singular values of a matrix that comes in blocks of rows of this width, the largest first.

    They are the eigenvalues of the sum of XᵀX over the blocks, in fp64: [width].
    """
    import torch

    gram: Tensor | None = None
    for block in blocks:
        gram = block.new_zeros(width, width, dtype=torch.float64) if gram is None else gram
        for start in range(0, len(block), _BLOCK):
            rows = block[start : start + _BLOCK].double()
            gram += rows.T @ rows
    if gram is None:
        gram = torch.zeros(width, width, dtype=torch.float64, device="cpu")
    squares: Tensor = torch.linalg.eigvalsh(gram).cpu().clamp(min=0).flip(0)
    return squares


def rank_of(squares: Tensor, energy: float) -> tuple[int, float]:
    """Find how many of the largest squares keep this share of their sum, and the share that they keep."""
    sums = squares.cumsum(0)
    whole = float(sums[-1])
    if whole == 0:
        return 0, 1.0
    rank = min(int((sums < energy * whole).sum()) + 1, len(squares))
    return rank, float(sums[rank - 1]) / whole
