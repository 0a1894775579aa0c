"""One `.safetensors` file: its header, checked by the safetensors library, and its tensors by positional reads."""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import blake3
from safetensors import SafetensorError, safe_open

from ..dtypes import DTYPES, byte_size, torch_dtype
from ..errors import CheckpointError, nearest
from ..tensor_spec import TensorSpec
from .storage import PositionalFile

if TYPE_CHECKING:
    from torch import Tensor

_LENGTH = 8
_LONGEST_HEADER = 100_000_000  # the library's own limit


class SafetensorsFile:
    """The specs of a file's tensors (name → TensorSpec, in the order of their bytes) and reads of their bytes."""

    def __init__(self, path: Path) -> None:
        """Read and check the header only. Raises CheckpointError for a file that is not whole."""
        self.path = path
        header, self._start, self.digest = _header(path)
        _validate(path)
        self.metadata: dict[str, str] = header.pop("__metadata__", None) or {}
        entries = sorted(header.items(), key=lambda entry: entry[1]["data_offsets"][0])
        self._offsets = {name: int(entry["data_offsets"][0]) for name, entry in entries}
        self.specs = {name: TensorSpec(name, _known(path, name, e["dtype"]), tuple(e["shape"])) for name, e in entries}

    @cached_property
    def _file(self) -> PositionalFile:
        return PositionalFile(self.path)

    def read_into(self, name: str, buffer: memoryview, at: int = 0) -> None:
        """Fill a buffer with the tensor's stored bytes, from byte `at` of the tensor on."""
        try:
            self._file.read_into(buffer, self._start + self._offsets[name] + at)
        except (EOFError, OSError) as error:
            raise CheckpointError(f"{self.path}: tensor {name}", f"cannot be read: {error}") from error

    def forget(self, name: str) -> None:
        """Tell the system that the tensor is not read again."""
        self._file.forget(self._start + self._offsets[name], self.specs[name].nbytes)

    def read(self, name: str, part: slice) -> Tensor:
        """Read a flat run of entries [part.stop - part.start], in the stored dtype."""
        import torch

        spec = self.specs[name]
        size = byte_size(spec.dtype, part.stop - part.start)
        raw = torch.empty(size, dtype=torch.uint8, device="cpu")
        self.read_into(name, raw.numpy().data, byte_size(spec.dtype, part.start))
        return raw.view(torch_dtype(spec.dtype))


def _header(path: Path) -> tuple[dict[str, Any], int, str]:
    """Read the header: its entries, where the data begins, and its digest."""
    hint = "download or save the file again"
    with path.open("rb") as file:
        length = int.from_bytes(file.read(_LENGTH), "little")
        if length > _LONGEST_HEADER:
            raise CheckpointError(str(path), f"not a safetensors file: its header claims {length} bytes", hint)
        raw = file.read(length)
    try:
        header = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(str(path), f"the header is truncated or corrupt ({error})", hint) from error
    return header, _LENGTH + length, blake3.blake3(raw).hexdigest()


def _validate(path: Path) -> None:
    """Let the library check dtypes, shapes, offsets and the file's size."""
    try:
        with safe_open(path, framework="numpy"):
            pass
    except (SafetensorError, OSError) as error:
        hint = "the file is truncated or corrupt: download or save it again"
        raise CheckpointError(str(path), f"not a whole safetensors file ({error})", hint) from error


def _known(path: Path, name: str, dtype: object) -> str:
    if dtype not in DTYPES:
        raise CheckpointError(f"{path}: tensor {name}", f"unknown dtype {dtype!r}", nearest(str(dtype), DTYPES))
    return str(dtype)
