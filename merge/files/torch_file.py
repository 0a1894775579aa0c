"""One legacy PyTorch file (`.bin`, `.pt`, `.pth`): unpickled with weights only, mapped into memory where it can be."""

from __future__ import annotations

import zipfile
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import blake3

from ..dtypes import byte_size, from_torch, is_known
from ..errors import CheckpointError
from ..tensor_spec import TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

_WRAPPERS = ("state_dict", "model")  # where training frameworks put the weights of a snapshot


class TorchFile:
    """The tensors of a pickled state dict. Opening one imports torch: these files have no header."""

    def __init__(self, path: Path) -> None:
        """Open the file. Raises CheckpointError for anything but tensors: no code of the file is ever run."""
        self.path = path
        self.metadata: dict[str, str] = {}
        found = _load(path)
        self._tensors = {name: value.detach() for name, value in found.items() if _is_tensor(path, name, value)}
        self.specs = {n: TensorSpec(n, from_torch(t.dtype), tuple(t.shape)) for n, t in self._tensors.items()}

    @cached_property
    def digest(self) -> str:
        """A digest of the names, dtypes and shapes: what a safetensors header would say."""
        return blake3.blake3(repr([*self.specs.values()]).encode()).hexdigest()

    def read_into(self, name: str, buffer: memoryview, at: int = 0) -> None:
        """Fill a buffer with the tensor's bytes, from byte `at` of the tensor on."""
        import torch

        size = byte_size(self.specs[name].dtype, 1)
        flat = self.read(name, slice(at // size, (at + len(buffer)) // size))
        buffer[:] = flat.view(torch.uint8).numpy().data

    def forget(self, name: str) -> None:
        """Do nothing: its pages are mapped, and the system drops those by itself."""

    def read(self, name: str, part: slice) -> Tensor:
        """Read a flat run of entries [part.stop - part.start], in the stored dtype."""
        return self._tensors[name].reshape(-1)[part].clone()


def _load(path: Path) -> dict[str, Tensor]:
    """Unpickle with weights only; step into the `state_dict` of a training snapshot."""
    import torch

    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path) or None)
    except Exception as error:  # a damaged pickle can lead anywhere in the unpickler
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        hint = "save the weights as safetensors; files that carry code are never executed"
        raise CheckpointError(str(path), f"not a PyTorch file of plain tensors ({first})", hint) from error
    for key in _WRAPPERS:
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
    if not isinstance(found, dict):
        raise CheckpointError(str(path), f"holds a {type(found).__name__}, not a state dict")
    return found


def _refuse_special(path: Path, name: str, tensor: Tensor) -> None:
    """Refuse tensors that safetensors has no place for."""
    import torch

    if tensor.layout is not torch.strided:
        what = "a sparse tensor"
    elif tensor.is_meta:
        what = "a tensor without data"
    elif not is_known(tensor.dtype):
        what = f"a tensor of {str(tensor.dtype).removeprefix('torch.')}"
    else:
        return
    raise CheckpointError(f"{path}: {name}", what, "save it as a plain tensor")


def _is_tensor(path: Path, name: object, value: object) -> bool:
    """Keep tensors, pass over the bookkeeping of state dicts, refuse what looks like anything else."""
    import torch

    if isinstance(value, torch.Tensor) and isinstance(name, str):
        _refuse_special(path, name, value)
        return True
    if isinstance(name, str) and (name == "_metadata" or isinstance(value, int | float | str | bool)):
        return False
    raise CheckpointError(f"{path}: {name}", f"a {type(value).__name__} where a tensor was expected")
