"""JSON that strangers wrote: bounded before it is parsed, strict in what it may say twice, never too deep to walk."""

from __future__ import annotations

import gc
import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import CheckpointError

_MOST_VALUES = 2_500_000  # commas and brackets bound what the parsed values take; the largest known have 1,900,000
_MOST_KEYS = 500_000  # colons, of which every key has one, and it costs four values; the largest known have 310,000
CONFIG_BYTES = 8 << 20  # of a config; the largest known have some hundred kB
TABLE_BYTES = 40 << 20  # of a tokenizer; the largest known have 35 MB
INDEX_BYTES, INDEX_VALUES = 32 << 20, 250_000  # of an index of shards; the largest known have 8 MB and 91,000 tensors
_DEEPEST = 64
_NESTING = (dict, list)


def read_json(path: Path, most: int = CONFIG_BYTES, most_values: int = _MOST_VALUES) -> dict[str, Any]:
    """Read a JSON object of at most so many bytes and values. Raises CheckpointError for anything else."""
    try:
        raw = read_bytes(path, most)
        found = parsed(raw, most_values)
    except (ValueError, OSError) as error:
        raise CheckpointError(str(path), f"not valid JSON ({error})") from error
    if not isinstance(found, dict):
        raise CheckpointError(str(path), f"holds a JSON {type(found).__name__}, not an object")
    return found


def read_text(path: Path, most: int) -> str:
    """Read a text file of at most so many bytes. Raises CheckpointError where it is larger, or not UTF-8."""
    try:
        return text_of(read_bytes(path, most))
    except (ValueError, OSError) as error:
        raise CheckpointError(str(path), f"cannot be read as text ({error})") from error


def text_of(raw: bytes) -> str:
    """Decode UTF-8, with line ends of any system as one sign. Raises ValueError."""
    return raw.decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")


def read_bytes(path: Path, most: int) -> bytes:
    """Read a file of at most so many bytes, and not one more. Raises ValueError where it is larger, or OSError."""
    with path.open("rb") as file:
        raw = file.read(most + 1)
    if len(raw) > most:
        raise ValueError(f"it is larger than {most:,} bytes")
    return raw


def parsed(raw: bytes, most_values: int = _MOST_VALUES) -> Any:
    """Parse JSON. Raises ValueError for what is not, for a key given twice, for nesting and for values without end."""
    if sum(raw.count(sign) for sign in b",[{") > most_values:
        raise ValueError(f"it holds more than {most_values:,} values")
    if raw.count(b":") > _MOST_KEYS:
        raise ValueError(f"it holds more than {_MOST_KEYS:,} keys")
    try:
        with _uncollected():
            found = json.loads(raw.decode("utf-8"), object_pairs_hook=_without_doubles)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if _is_too_deep(found):
        raise ValueError("it is nested too deeply")
    if b"\\ud" in raw or b"\\uD" in raw:  # half of a surrogate pair is no text: it could not be written again
        json.dumps(found, ensure_ascii=False).encode("utf-8")
    return found


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {twice!r} is given twice")
    return found


@contextmanager
def _uncollected() -> Iterator[None]:
    """Let nobody look for circles meanwhile: a parser makes none, and looking would take longer than the parsing."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _is_too_deep(value: Any) -> bool:
    level = [value] if type(value) in _NESTING else []
    for _ in range(_DEEPEST):
        level = [
            inner for one in level for inner in (one.values() if type(one) is dict else one) if type(inner) in _NESTING
        ]
        if not level:
            return False
    return True
