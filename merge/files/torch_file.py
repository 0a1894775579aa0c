"""One legacy PyTorch file (`.bin`, `.pt`, `.pth`): its pickle looked at and never run, its tensors read by place."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import blake3

from ..dtypes import byte_size
from ..errors import CheckpointError, Mistake
from ..tensor_spec import TensorSpec, name_mistake
from .storage import PositionalFile
from .torch_archive import read_archive
from .torch_values import NAMES, Opaque, StoredTensor
from .weight_file import WeightFile

_WRAPPERS = ("state_dict", "model")  # where training frameworks put the weights of a snapshot
_MOST_PICKLE = 4 << 20  # bytes; that of a model with a thousand tensors has about 100 kB
_HINT = "save the weights as safetensors; files that carry code are never executed"
_PLAIN = "save it as a plain tensor"


class TorchFile(WeightFile):
    """The tensors of a pickled state dict."""

    def __init__(self, path: Path) -> None:
        """Open the file. Raises CheckpointError for anything but tensors: no code of the file is ever run."""
        tensors = TorchTensors(path, NAMES, _MOST_PICKLE, _HINT)
        found = _state_dict(path, tensors.value)
        self.path, self.metadata = path, {}
        mistakes = [one for name, value in found.items() if (one := _mistake(path, name, value))]
        if mistakes:
            raise CheckpointError.of(mistakes)
        self._source = tensors
        self._tensors = {name: value for name, value in found.items() if isinstance(value, StoredTensor)}
        self.specs = {name: TensorSpec(name, one.dtype, one.shape) for name, one in self._tensors.items()}
        self.digest = blake3.blake3(repr([*self.specs.values()]).encode()).hexdigest()  # as a header would tell it

    def read_into(self, name: str, buffer: memoryview, at: int = 0) -> None:
        """Fill a buffer with the tensor's bytes, from byte `at` of the tensor on."""
        self._source.read_into(name, self._tensors[name], buffer, at)


class TorchTensors:
    """The value of a PyTorch file's pickle, in which StoredTensors stand for tensors, and reads of their bytes."""

    def __init__(self, path: Path, names: Mapping[str, Any], most: int, hint: str) -> None:
        """Read the pickle, of at most so many bytes. Raises CheckpointError, with the hint."""
        self.path = path
        try:
            found = read_archive(path, names, most)
        except (ValueError, OSError) as error:
            raise CheckpointError(str(path), f"not a PyTorch file of plain tensors ({error})", hint) from error
        self.value, self._places = found.value, found.places

    @cached_property
    def _file(self) -> PositionalFile:
        return PositionalFile(self.path)

    def read_into(self, name: str, tensor: StoredTensor, buffer: memoryview, at: int) -> None:
        """Fill a buffer with a tensor's bytes in row-major order, from byte `at` of the tensor on."""
        size = byte_size(tensor.dtype, 1)
        if not len(buffer):
            return
        begin = self._places[tensor.storage.key][0] + tensor.storage.begin * tensor.storage.kind.size
        begin += tensor.offset * size
        try:
            if tensor.is_contiguous:
                self._file.read_into(buffer, begin + at)
            else:
                buffer[:] = self._gathered(tensor, begin, at // size, len(buffer) // size)
        except (EOFError, OSError) as error:
            raise CheckpointError(f"{self.path}: tensor {name}", f"cannot be read: {error}") from error

    def _gathered(self, tensor: StoredTensor, begin: int, start: int, count: int) -> memoryview:
        """Gather a run of entries that lie in another order; the tensor's stretch of the storage is read as a whole."""
        import numpy as np

        size = byte_size(tensor.dtype, 1)
        steps = zip(tensor.shape, tensor.stride, strict=True)
        stretch = np.empty(1 + sum((n - 1) * step for n, step in steps), dtype=f"u{size}")
        self._file.read_into(stretch.view(np.uint8).data, begin)
        strides = [step * size for step in tensor.stride]
        view = np.lib.stride_tricks.as_strided(stretch, tensor.shape, strides, writeable=False)
        found: memoryview = view.flat[start : start + count].view(np.uint8).data
        return found


def _state_dict(path: Path, found: Any) -> dict[Any, Any]:
    """Step into the `state_dict` of a training snapshot."""
    for key in _WRAPPERS:
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
    if not isinstance(found, dict):
        kind = "Tensor" if isinstance(found, StoredTensor) else type(found).__name__
        raise CheckpointError(str(path), f"holds a {kind}, not a state dict")
    return found


def _mistake(path: Path, name: str | int, value: object) -> Mistake | None:
    """Take tensors, pass over the bookkeeping of state dicts, find what is anything else."""
    where = f"{path}: {name}"
    if isinstance(name, str):
        if isinstance(value, Opaque):
            return Mistake(where, value.what, _PLAIN)
        if isinstance(value, StoredTensor):
            what = name_mistake(name)
            return Mistake(where, what, "rename it") if what else None
        if name == "_metadata" or isinstance(value, int | float | str | bool):
            return None
    kind = "Tensor" if isinstance(value, StoredTensor) else type(value).__name__
    return Mistake(where, f"a {kind} where a tensor was expected")
