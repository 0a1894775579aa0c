"""Values translated from another document, each remembered by the place that it was written at."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from .lines import Document, KeyPath


@dataclass(frozen=True)
class Lined:
    """A value, and the path of keys that it stands for in the document it comes from."""

    value: Any
    path: KeyPath


def plain(value: Any) -> Any:
    """Give a value without its places.

    >>> plain({"weight": Lined([Lined(0.5, ("models", 0))], ("models",))})
    {'weight': [0.5]}
    """
    if isinstance(value, Lined):
        return plain(value.value)
    if isinstance(value, Mapping):
        return {key: plain(one) for key, one in value.items()}
    return [plain(one) for one in value] if isinstance(value, list | tuple) else value


def document_of(value: Any, source: Document) -> Document:
    """Make the document that holds a translated value, its lines those of the source."""
    lines: dict[KeyPath, int] = {}

    def note(one: Any, path: KeyPath, line: int) -> None:
        if isinstance(one, Lined):
            note(one.value, path, source.line(one.path))
            return
        lines[path] = line
        items = one.items() if isinstance(one, Mapping) else enumerate(one) if isinstance(one, list | tuple) else ()
        for key, inner in items:
            note(inner, (*path, key), line)

    note(value, (), 1)
    return replace(source, value=plain(value), lines=lines, bundle=False)
