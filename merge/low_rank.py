"""The changes of an adapter as stored tensors: made dense from their low-rank factors, run by run, when they are read.

Blocks of whole rows are multiplied in fp64 and rounded once. Where blocks begin depends on the tensor's shape alone,
so no bit depends on the size of parts, the number of threads or the memory.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .adapter import Adapter, Module
from .dtypes import torch_dtype
from .evaluate import GRID
from .node import Origin, Source
from .tensor_spec import TensorSpec

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False, slots=True)
class Change:
    """What one tensor of the base gets: scaling · B A [rows, width], or its transpose.

    Attributes:
        spec: name, working dtype and shape of the dense change.
        module: the factors.
        transposed: the tensor is stored [in, out] (Conv1D, embeddings).
        base: the tensor that a DoRA module rescales; None for plain LoRA.

    """

    spec: TensorSpec
    module: Module
    transposed: bool
    base: Source | None = None


class LowRankStore:
    """What an adapter makes of tensors of a base: deltas; with DoRA, which rescales the base's rows, their new values.

    A plain change is Δ = s · B A. A DoRA module gives W' = m / ‖W + Δ‖ · (W + Δ), the norm taken along every row.
    """

    def __init__(self, adapter: Adapter, changes: Mapping[str, Change]) -> None:
        """Put the changes together, by the names of the base's tensors."""
        self.label = adapter.label
        self._stored = adapter.stored
        self._changes = dict(changes)
        self._kept = threading.local()  # a thread works on one tensor at a time

    def node(self, name: str) -> Source:
        """Give the dense tensor."""
        return Source(self, self._changes[name].spec)

    def origins(self, name: str) -> tuple[Origin, ...]:
        """Give the checkpoints on disk that it is made from."""
        base = self._changes[name].base
        return (self._stored, *(base.checkpoint.origins(base.spec.name) if base else ()))

    def stored_bytes(self, name: str) -> int:
        """Count the bytes of the factors."""
        change = self._changes[name]
        names = filter(None, (change.module.a, change.module.b, change.module.magnitude))
        return sum(self._stored.specs[one].nbytes for one in names) + (change.base.spec.nbytes if change.base else 0)

    def read(self, name: str, part: slice | None = None) -> Tensor:
        """Make the dense tensor [rows, width], or a flat run of its entries."""
        import torch

        change = self._changes[name]
        rows, width = change.spec.shape
        span = change.spec.run(part or slice(None))
        values = torch.empty(span.stop - span.start, dtype=torch_dtype(change.spec.dtype))
        step = max(1, GRID // width)
        for top in range(span.start // width // step * step, rows, step):
            start = top * width
            if start >= span.stop:
                break
            block = self._block(change, slice(top, min(top + step, rows))).reshape(-1)
            first, last = max(span.start, start), min(span.stop, start + len(block))
            values[first - span.start : last - span.start] = block[first - start : last - start]
        return values if part is not None else values.reshape(change.spec.shape)

    def read_into(self, name: str, buffer: memoryview, at: int = 0) -> None:
        """Never called: no bytes of it are stored."""
        raise AssertionError(f"{name} is made, not stored")

    def _block(self, change: Change, rows: slice) -> Tensor:
        """Make a block of whole rows in fp64: [rows, width]."""
        import torch

        left, right, magnitude = self._factors(change)
        delta = (left[rows].double() @ right.double()).mul_(change.module.scaling)
        if change.base is None or magnitude is None:
            return delta
        width = change.spec.shape[1]
        span = slice(rows.start * width, rows.stop * width)
        delta += change.base.checkpoint.read(change.base.spec.name, span).double().view(-1, width)
        return delta.mul_((magnitude[rows].double() / torch.linalg.vector_norm(delta, dim=1))[:, None])

    def _factors(self, change: Change) -> tuple[Tensor, Tensor, Tensor | None]:
        """Read the factors as left [rows, rank] and right [rank, width]; kept until the thread takes another tensor."""
        if getattr(self._kept, "change", None) is not change:
            a, b = self._stored.read(change.module.a), self._stored.read(change.module.b)
            left, right = (a.T, b.T) if change.transposed else (b, a)
            magnitude = self._stored.read(change.module.magnitude) if change.module.magnitude else None
            self._kept.change, self._kept.factors = change, (left, right, magnitude)
        found: tuple[Tensor, Tensor, Tensor | None] = self._kept.factors
        return found
