"""The change that a LoRA module makes, dense: multiplied from its low-rank factors, run by run, when it is read.

Products are made in fp64, where those of fp32 factors are exact, summed in the order of the rank, and rounded once. So
no bit depends on the size of parts, threads or memory, nor on whether torch or the compiled library multiplies.
What rescales rows sees blocks of whole rows, which begin where the tensor's shape says.
"""

from __future__ import annotations

from ctypes import c_double, c_float, sizeof
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..compiled.library import TILE, Factor, functions
from ..compiled.runs import Stores
from ..dtypes import torch_dtype
from ..evaluate import GRID
from ..node import Made, Node, Read
from ..tensor_spec import TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

_A, _B, _MAGNITUDE, _BASE = range(4)
_ROWS, _BESIDE = 256, 4  # rows that the library multiplies at once; one more may be begun, and they come in fours


def low_rank(spec: TensorSpec, a: Node, b: Node, scaling: float, *, transposed: bool) -> Made:
    """Make Δ = scaling · B A [out, in], or its transpose, of A [rank, in] and B [out, rank]; `spec` is the result's."""
    maker = LowRank(spec, scaling, transposed)
    rank = a.output.shape[0]
    return Made(spec, maker, (a, b), compiled=_CompiledLowRank(maker, rank) if spec.dtype == "F32" else None)


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
        delta = _product(left[rows].double(), right.double()).mul_(self.scaling)
        if magnitude is None:
            return delta
        width = self.spec.shape[1]
        delta += read(_BASE, slice(rows.start * width, rows.stop * width)).double().view(-1, width)
        return delta.mul_((magnitude[rows].double() / torch.linalg.vector_norm(delta, dim=1))[:, None])


def _product(left: Tensor, right: Tensor) -> Tensor:
    """Multiply [rows, rank] by [rank, width], summing in the order of the rank, from −0, which changes no bit."""
    product = left.new_full((left.shape[0], right.shape[1]), -0.0)
    for column, row in zip(left.T, right, strict=True):
        product.addcmul_(column[:, None], row)
    return product


@dataclass(frozen=True)
class _CompiledLowRank:
    """The same over stored bytes, in fp32."""

    maker: LowRank
    rank: int
    whole = True
    spreads = True

    def make(self, span: slice, inputs: Stores, out: int) -> None:
        """Write a flat run of entries at an address, a few rows at a time."""
        rows, width = self.maker.spec.shape
        across, down = (rows, width) if self.maker.transposed else (width, rows)  # of A and B
        a = Factor(inputs.read(_A, slice(0, self.rank * across)), 1, across)
        b = Factor(inputs.read(_B, slice(0, self.rank * down)), self.rank, 1)
        left, right = (a, b) if self.maker.transposed else (b, a)
        scratch = (c_double * (self.rank * (TILE + _ROWS + _BESIDE)))()
        for start in range(span.start, span.stop, _ROWS * width):
            count = min(span.stop - start, _ROWS * width)
            to = out + (start - span.start) * sizeof(c_float)
            functions().low_rank(start, count, width, self.rank, left, right, self.maker.scaling, scratch, to)
