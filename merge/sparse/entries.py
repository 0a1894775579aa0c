"""Sparse changes as tensors: dense from positions and values, and positions and values from what is dense."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from ctypes import c_float, c_int64, c_uint32, sizeof
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Literal

from ..compiled.library import functions
from ..compiled.runs import Stores
from ..dtypes import torch_dtype
from ..errors import CheckpointError
from ..evaluate import GRID
from ..node import Made, Node, Read
from ..tensor_spec import TensorSpec
from .selection import chosen

if TYPE_CHECKING:
    from torch import Tensor

_FIRST, _SECOND, _THIRD = range(3)


def scattered(spec: TensorSpec, indices: Node, values: Node, weight: float, where: str) -> Made:
    """Make a dense change: weight · values at the positions, and −0 elsewhere, which added changes no bit.

    Args:
        spec: name, dtype and shape of the dense tensor.
        indices: flat positions, ascending: int64 [k].
        values: what stands there: [k].
        weight: a factor.
        where: names the file, for errors.

    """
    return Made(spec, _Scattered(_Positions(spec, indices.output.entries, where), weight), (indices, values))


def restored(spec: TensorSpec, tuned: Node, base: Node, indices: Node, where: str) -> Made:
    """Make a tensor of a tuned one, with the base's entries at the positions. All have `spec`'s dtype."""
    return Made(spec, _Restored(_Positions(spec, indices.output.entries, where)), (tuned, base, indices))


def selected(
    name: str, tuned: Node, base: Node, boundary: float, counts: Sequence[int], ties: Sequence[int]
) -> tuple[Made, Made]:
    """Make positions (int64 [k]) and values ([k]) of the selected entries of tuned − base, both of one shape.

    `boundary`, `counts` and `ties` are those of the Selection. Values are fp32, or fp64 where an input is.
    """
    dtype = "F64" if "F64" in (tuned.output.dtype, base.output.dtype) else "F32"
    offsets = tuple(accumulate(counts, initial=0))
    made = []
    for part, kind in (("indices", "I64"), ("values", dtype)):
        spec = TensorSpec(f"{name}:{part}", kind, (offsets[-1],))
        maker = _Selected(name, part, dtype, tuned.output.entries, boundary, offsets, tuple(ties))  # type: ignore[arg-type]
        narrow = dtype == "F32" and c_float(boundary).value == boundary
        made.append(Made(spec, maker, (tuned, base), compiled=_CompiledSelected(maker) if narrow else None))
    return made[0], made[1]


@dataclass(frozen=True)
class _Positions:
    """Finds, in the stored positions of one tensor, those that lie in a run of it."""

    spec: TensorSpec
    count: int
    where: str

    def firsts(self, read: Read, index: int) -> list[int]:
        """Go through all positions once; give the first of every GRID of them. Raises CheckpointError out of order."""
        firsts: list[int] = []
        before = -1
        for start in range(0, self.count, GRID):
            run = read(index, slice(start, min(start + GRID, self.count)))
            if int(run.min()) < 0 or int(run.max()) >= self.spec.entries:
                raise CheckpointError(
                    f"{self.where}: {self.spec.name}", f"a position lies outside {list(self.spec.shape)}"
                )
            firsts.append(int(run[0]))
            if firsts[-1] <= before or bool((run[1:] <= run[:-1]).any()):
                raise CheckpointError(f"{self.where}: {self.spec.name}", "its positions are not in ascending order")
            before = int(run[-1])
        return firsts

    def within(self, span: slice, read: Read, index: int, firsts: list[int]) -> tuple[slice, Tensor]:
        """Give which stored positions lie in a run, as a slice of them, and where in the run they lie."""
        import torch

        begin = max(0, bisect_right(firsts, span.start) - 1) * GRID
        end = min(self.count, bisect_right(firsts, span.stop - 1) * GRID)
        if begin >= end:
            return slice(begin, begin), read(index, slice(begin, begin))
        run = read(index, slice(begin, end))
        low, high = (int(torch.searchsorted(run, edge)) for edge in (span.start, span.stop))
        return slice(begin + low, begin + high), run[low:high] - span.start


@dataclass(frozen=True)
class _Scattered:
    positions: _Positions
    weight: float

    def prepare(self, read: Read) -> list[int]:
        return self.positions.firsts(read, _FIRST)

    def run(self, span: slice, read: Read, prepared: list[int]) -> Tensor:
        import torch

        dtype = torch_dtype(self.positions.spec.dtype)
        which, where = self.positions.within(span, read, _FIRST, prepared)
        result = torch.full((span.stop - span.start,), -0.0, dtype=dtype, device=where.device)
        if len(where):
            result[where] = read(_SECOND, which).to(dtype) * self.weight
        return result


@dataclass(frozen=True)
class _Restored:
    positions: _Positions

    def prepare(self, read: Read) -> list[int]:
        return self.positions.firsts(read, _THIRD)

    def run(self, span: slice, read: Read, prepared: list[int]) -> Tensor:
        result = read(_FIRST, span)
        _, where = self.positions.within(span, read, _THIRD, prepared)
        result[where] = read(_SECOND, span)[where].to(result.dtype)  # a nested step gives fp32
        return result


@dataclass(frozen=True)
class _Selected:
    """Gives a run of the selected entries: finds the blocks in which they lie, and goes through those."""

    name: str
    part: Literal["indices", "values"]
    dtype: str
    entries: int
    boundary: float
    offsets: tuple[int, ...]  # where the selected entries of each block begin
    ties: tuple[int, ...]

    def prepare(self, read: Read) -> None:
        """Nothing is needed."""

    def run(self, span: slice, read: Read, prepared: None) -> Tensor:
        """Give a flat run of positions, or of values."""
        import torch

        dtype = torch_dtype(self.dtype)
        kind, nothing = torch.int64 if self.part == "indices" else dtype, read(_FIRST, slice(0, 0))
        result = nothing.new_empty(span.stop - span.start, dtype=kind)  # where the inputs are
        for block in range(bisect_right(self.offsets, span.start) - 1, len(self.ties)):
            start, first, last = block * GRID, self.offsets[block], self.offsets[block + 1]
            if first >= span.stop:
                break
            if first == last:
                continue
            here = slice(start, min(start + GRID, self.entries))
            deltas = read(_FIRST, here).to(dtype).sub_(read(_SECOND, here).to(dtype))
            index = chosen(deltas, self.boundary, self.ties[block]).nonzero()[:, 0]
            values = index + start if self.part == "indices" else deltas[index]
            low, high = max(first, span.start), min(last, span.stop)
            result[low - span.start : high - span.start] = values[low - first : high - first]
        return result


@dataclass(frozen=True)
class _CompiledSelected:
    """The same over stored bytes, of fp32 changes."""

    maker: _Selected
    whole = False
    spreads = True  # the survey has seen every entry

    def make(self, span: slice, inputs: Stores, out: int) -> None:
        """Write a flat run of positions, or of values, at an address."""
        positions = self.maker.part == "indices"
        size, offsets = sizeof(c_int64 if positions else c_float), self.maker.offsets
        boundary = c_uint32.from_buffer(c_float(self.maker.boundary))
        for first, last in self._stretches(span, inputs.part // GRID):
            start, stop = first * GRID, min(last * GRID, self.maker.entries)
            begin = max(offsets[first], span.start)
            most = min(offsets[last], span.stop) - begin
            tensors = (inputs.read(index, slice(start, stop)) for index in (_FIRST, _SECOND))
            ties = (c_int64 * (last - first))(*self.maker.ties[first:last])
            to = out + (begin - span.start) * size
            taken = functions().take_selected(
                *(stop - start, *tensors, boundary, ties, start, begin - offsets[first], most),
                *((to, None) if positions else (None, to)),
            )
            if taken != most:
                hint = "build again, and leave the files alone meanwhile"
                raise CheckpointError(f"tensor {self.maker.name}", "is not what it was when it was surveyed", hint)

    def _stretches(self, span: slice, most: int) -> Iterator[tuple[int, int]]:
        """Give the first and the last block (exclusive) of stretches without empty blocks that meet a run."""
        offsets = self.maker.offsets
        block, end = bisect_right(offsets, span.start) - 1, len(self.maker.ties)
        while block < end and offsets[block] < span.stop:
            first = block
            while block < min(end, first + most) and offsets[block] < min(span.stop, offsets[block + 1]):
                block += 1
            if first < block:
                yield first, block
            else:
                block += 1
