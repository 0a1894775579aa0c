"""The header of a `.safetensors` file, from its bytes alone: a stranger's JSON to specs, or to all its mistakes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import blake3

from ..dtypes import DTYPES, byte_size
from ..errors import CheckpointError, Mistake, nearest
from ..tensor_spec import TensorSpec, name_mistake
from .json_file import parsed

PREFIX = 8  # bytes that say how long the header is
LONGEST = 32 << 20  # the library takes 100 MB; the largest known have 12 MB
_LIBRARY = 100_000_000
_MOST_VALUES = 500_000  # of some 60,000 tensors
_MOST_DIMENSIONS = 64  # numpy's
_LARGEST = 1 << 63
_AGAIN = "the file is truncated or corrupt: download or save it again"


@dataclass(frozen=True)
class Header:
    """What a header says.

    Attributes:
        specs: name → spec, in the order of their bytes.
        offsets: name → where its bytes begin, from the beginning of the file.
        metadata: text that goes with the file.
        digest: of the header's bytes.

    """

    specs: dict[str, TensorSpec]
    offsets: dict[str, int]
    metadata: dict[str, str]
    digest: str


def header_length(prefix: bytes, where: str) -> int:
    """Read how many bytes the header has. Raises CheckpointError for what can be no header."""
    length = int.from_bytes(prefix, "little")
    if length > _LIBRARY:
        hint = "download or save the file again"
        raise CheckpointError(where, f"not a safetensors file: its header claims {length} bytes", hint)
    if length > LONGEST:
        raise CheckpointError(where, f"a header of {length:,} bytes; at most {LONGEST:,} are read", "save it in shards")
    return length


def parse_header(raw: bytes, size: int, where: str) -> Header:
    """Read the header of a file of so many bytes. Raises CheckpointError with every mistake found in it."""
    try:
        found = parsed(raw, _MOST_VALUES)
    except ValueError as error:
        what = f"the header is truncated or corrupt ({error})"
        raise CheckpointError(where, what, "download or save the file again") from error
    mistakes = list(_mistakes(found, size - PREFIX - len(raw), where))
    if mistakes:
        raise CheckpointError.of(mistakes)
    metadata = found.pop("__metadata__", None) or {}
    entries = sorted(found.items(), key=lambda entry: entry[1]["data_offsets"])
    specs = {name: TensorSpec(name, entry["dtype"], tuple(entry["shape"])) for name, entry in entries}
    offsets = {name: PREFIX + len(raw) + entry["data_offsets"][0] for name, entry in entries}
    return Header(specs, offsets, metadata, blake3.blake3(raw).hexdigest())


def _mistakes(found: Any, size: int, where: str) -> Iterator[Mistake]:
    """Find what is wrong with a parsed header in front of so many bytes of data."""
    if not isinstance(found, dict):
        yield Mistake(where, "not a whole safetensors file (its header is no mapping from tensor names)", _AGAIN)
        return
    metadata = found.get("__metadata__")
    if metadata is not None and not _is_texts(metadata):
        yield Mistake(where, "not a whole safetensors file (its metadata are no mapping from text to text)", _AGAIN)
    spans: list[tuple[int, int, str]] = []
    for name, entry in found.items():
        if name == "__metadata__":
            continue
        what = name_mistake(name)
        if what:
            yield Mistake(f"{where}: tensor {name}", what, "rename it")
        what, hint = _entry_mistake(entry)
        if what:
            yield Mistake(f"{where}: tensor {name}", what, hint)
        else:
            spans.append((*entry["data_offsets"], name))
    if len(spans) == len(found) - ("__metadata__" in found):
        yield from _gaps(spans, size, where)


def _is_texts(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(one, str) for one in value.values())


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < _LARGEST


def _entry_mistake(entry: Any) -> tuple[str, str]:
    """Find what is wrong with one tensor, alone: what (empty: nothing), and a hint."""
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        return "not a whole safetensors file (dtype, shape or data_offsets are missing)", _AGAIN
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        return f"unknown dtype {dtype!r}", nearest(str(dtype), DTYPES)
    if not isinstance(shape, list) or not all(map(_is_size, shape)) or len(shape) > _MOST_DIMENSIONS:
        return f"shape is {shape!r}", "a shape is a list of sizes"
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_size, offsets)):
        return f"data_offsets are {offsets!r}", "two offsets into the file"
    if math.prod(size or 1 for size in shape) >= _LARGEST:
        return f"shape is {shape!r}: too many entries", ""
    entries = math.prod(shape)
    if entries * DTYPES[dtype].bits % 8 or offsets[1] - offsets[0] != byte_size(dtype, entries):
        return f"not a whole safetensors file ({dtype} {shape!r} does not take the bytes {offsets!r})", _AGAIN
    return "", ""


def _gaps(spans: list[tuple[int, int, str]], size: int, where: str) -> Iterator[Mistake]:
    """Find bytes that belong to no tensor or to two, and data that end too early or too late."""
    end = 0
    for begin, stop, name in sorted(spans):
        if begin != end:
            what = "overlaps the one before it" if begin < end else "leaves a gap before it"
            yield Mistake(f"{where}: tensor {name}", f"not a whole safetensors file (its data {what})", _AGAIN)
            return
        end = stop
    if end != size:
        yield Mistake(
            where, f"not a whole safetensors file ({end:,} bytes of data promised, {size:,} are there)", _AGAIN
        )
