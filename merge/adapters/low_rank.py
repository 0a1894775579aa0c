"""The change that a LoRA module makes, dense: multiplied from its low-rank factors, run by run, when it is read.

Blocks of whole rows are multiplied in fp64 and rounded once. Where blocks begin depends on the tensor's shape alone,
so no bit depends on the size of parts, the number of threads or the memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..dtypes import torch_dtype
from ..evaluate import GRID
from ..node import Made, Node, Read
from ..tensor_spec import TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

_A, _B, _MAGNITUDE, _BASE = range(4)


def low_rank(spec: TensorSpec, a: Node, b: Node, scaling: float, *, transposed: bool) -> Made:
    """Make Δ = scaling · B A [out, in], or its transpose, of A [rank, in] and B [out, rank]; `spec` is the result's."""
    return Made(spec, LowRank(spec, scaling, transposed), (a, b))


def rescaled(spec: TensorSpec, a: Node, b: Node, scaling: float, magnitude: Node, base: Node) -> Made:
    """Make what DoRA makes of a base W [out, in]: m / ‖W + Δ‖ · (W + Δ), the norm taken along every row."""
    return Made(spec, LowRank(spec, scaling, transposed=False, rescale=True), (a, b, magnitude, base))


@dataclass(frozen=True)
class LowRank:
    """Multiplies the factors of one module."""

    spec: TensorSpec
    scaling: float
    transposed: bool
    rescale: bool = False

    def prepare(self, read: Read) -> tuple[Tensor, Tensor, Tensor | None]:
        """Read the factors as left [rows, rank] and right [rank, width], and the magnitudes [rows]."""
        a, b = read(_A, None), read(_B, None)
        left, right = (a.T, b.T) if self.transposed else (b, a)
        return left, right, read(_MAGNITUDE, None).reshape(-1) if self.rescale else None

    def run(self, span: slice, read: Read, prepared: tuple[Tensor, Tensor, Tensor | None]) -> Tensor:
        """Make a flat run of entries, block of rows by block of rows."""

        rows, width = self.spec.shape
        values = prepared[0].new_empty(span.stop - span.start, dtype=torch_dtype(self.spec.dtype))
        step = max(1, GRID // width)
        for top in range(span.start // width // step * step, rows, step):
            start = top * width
            if start >= span.stop:
                break
            block = self._block(slice(top, min(top + step, rows)), read, prepared).reshape(-1)
            first, last = max(span.start, start), min(span.stop, start + len(block))
            values[first - span.start : last - span.start] = block[first - start : last - start]
        return values

    def _block(self, rows: slice, read: Read, prepared: tuple[Tensor, Tensor, Tensor | None]) -> Tensor:
        """Make a block of whole rows in fp64: [rows, width]."""
        import torch

        left, right, magnitude = prepared
        delta = (left[rows].double() @ right.double()).mul_(self.scaling)
        if magnitude is None:
            return delta
        width = self.spec.shape[1]
        delta += read(_BASE, slice(rows.start * width, rows.stop * width)).double().view(-1, width)
        return delta.mul_((magnitude[rows].double() / torch.linalg.vector_norm(delta, dim=1))[:, None])
