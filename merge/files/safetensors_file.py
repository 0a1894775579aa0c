"""One `.safetensors` file: its header, and its tensors by positional reads."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

from ..errors import CheckpointError
from .safetensors_header import PREFIX, Header, header_length, parse_header
from .storage import PositionalFile
from .weight_file import WeightFile


class SafetensorsFile(WeightFile):
    """The specs of a file's tensors (name → TensorSpec, in the order of their bytes) and reads of their bytes."""

    def __init__(self, path: Path) -> None:
        """Read and check the header only. Raises CheckpointError for a file that is not whole."""
        self.path = path
        found = _header(path)
        self.specs, self._offsets, self.metadata, self.digest = found.specs, found.offsets, found.metadata, found.digest

    @cached_property
    def _file(self) -> PositionalFile:
        return PositionalFile(self.path)

    def read_into(self, name: str, buffer: memoryview, at: int = 0) -> None:
        """Fill a buffer with the tensor's stored bytes, from byte `at` of the tensor on."""
        try:
            self._file.read_into(buffer, self._offsets[name] + at)
        except (EOFError, OSError) as error:
            raise CheckpointError(f"{self.path}: tensor {name}", f"cannot be read: {error}") from error


def _header(path: Path) -> Header:
    """Read the header. Raises CheckpointError with all that is wrong with it."""
    try:
        with path.open("rb") as file:
            raw = file.read(header_length(file.read(PREFIX), str(path)))
            size = file.seek(0, 2)
    except OSError as error:
        raise CheckpointError(str(path), f"cannot be read ({error.strerror or error})") from error
    return parse_header(raw, size, str(path))
