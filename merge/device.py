"""Where torch computes: on the processor, or on a device with memory of its own, and an entry's way there and back.

Stored entries are read into pinned memory, from which CUDA copies while the thread goes on; torch's allocator hands a
pinned buffer out again only when the copies from it have been made. What is made is copied back before it is used.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .dtypes import byte_size, from_torch, torch_dtype, torch_shape
from .errors import OutputError
from .kernels import one_thread

if TYPE_CHECKING:
    from torch import Tensor

    from .node import Source

CPU = "cpu"
_CUDA = "cuda"
_own = threading.local()


def offered() -> tuple[str, ...]:
    """Name what this torch can compute on here: the processor, and the GPUs of CUDA, or of ROCm under that name."""
    import torch

    return (CPU, *(f"{_CUDA}:{i}" for i in range(torch.cuda.device_count())))


def chosen(name: str) -> str:
    """Give the full name of a device: `cuda` is the first, `cuda:0`. Raises OutputError for one that is not there."""
    if name == CPU:
        return CPU
    found, full = offered(), name if ":" in name else f"{name}:0"
    if full not in found:
        import torch

        what = f"there is no {name!r} to compute on: torch {torch.__version__} offers {', '.join(found)} here"
        raise OutputError("--device", what, "a GPU needs its driver and a build of torch for CUDA or ROCm")
    return full


@dataclass(frozen=True)
class Device:
    """A device by its full name."""

    name: str

    def read(
        self, source: Source, part: slice | None = None, look: Callable[[memoryview], None] | None = None
    ) -> Tensor:
        """Read a stored tensor, or a flat run of its entries, into the device's memory; `look` is shown the bytes."""
        spec = source.spec
        if self.name == CPU:
            values = source.checkpoint.read(spec.name, part)
            if look is not None:
                look(raw(values))
            return values
        run = spec.run(part or slice(None))
        stored = self._buffer((byte_size(spec.dtype, run.stop - run.start),), "U8")
        source.checkpoint.read_into(spec.name, stored.numpy().data, byte_size(spec.dtype, run.start))
        if look is not None:
            look(stored.numpy().data)
        there = stored.view(torch_dtype(spec.dtype)).to(self.name, non_blocking=True)
        return there.reshape(torch_shape(spec.dtype, spec.shape)) if part is None else there

    def fetched(self, values: Tensor) -> Tensor:
        """Give what was made in the processor's memory, once it has arrived there."""
        if self.name == CPU:
            return values
        return self._buffer(tuple(values.shape), from_torch(values.dtype)).copy_(values)

    def _buffer(self, shape: tuple[int, ...], dtype: str) -> Tensor:
        """Give memory of the processor: pinned, where CUDA copies from it or to it."""
        import torch

        return torch.empty(shape, dtype=torch_dtype(dtype), device=CPU, pin_memory=self._is_cuda)

    @property
    def _is_cuda(self) -> bool:
        return self.name.startswith(_CUDA)

    @contextmanager
    def enough_room(self) -> Iterator[None]:
        """Say what to do where the device's memory is full. Raises OutputError."""
        import torch

        try:
            yield
        except torch.OutOfMemoryError as error:
            hint = "work on less at once: --threads 1, or a smaller --memory"
            raise OutputError("--device", f"the memory of {self.name} is full", hint) from error

    def own_stream(self) -> AbstractContextManager[Any]:
        """Let this thread's work be queued beside that of the others, where the device has queues."""
        if not self._is_cuda:
            return nullcontext()
        import torch

        streams: dict[str, Any] = _own.__dict__.setdefault("streams", {})
        if self.name not in streams:
            streams[self.name] = torch.cuda.Stream(self.name)  # type: ignore[no-untyped-call]
        return torch.cuda.stream(streams[self.name])


@contextmanager
def whole_products() -> Iterator[None]:
    """Let products of fp32 matrices round as fp32 does: not as TF32 or BF16, whatever the program around has chosen."""
    import torch

    backends = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = [backend.fp32_precision for backend in backends]
    for backend in backends:
        backend.fp32_precision = "ieee"
    try:
        yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


@contextmanager
def alone(name: str) -> Iterator[None]:
    """Let torch compute on a device as the results' bits need it, whatever the program around has chosen."""
    with one_thread(), whole_products(), Device(name).enough_room():
        yield


def raw(values: Tensor) -> memoryview:
    """Give the bytes of a tensor."""
    import torch

    data: memoryview = values.contiguous().reshape(-1).view(torch.uint8).numpy().data
    return data
