"""Validation of a recipe's values: schemas from signatures, and pydantic's findings in our words, at their keys."""

from __future__ import annotations

import re
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from inspect import Parameter
from typing import Any

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError, create_model

from portmanteau.merge.errors import nearest

from ..composition import find
from .lines import Document, KeyPath
from .reference import as_reference

Finding = tuple[KeyPath, str, str]  # where, what, hint
_MEMBER_OF_UNION = re.compile(r"[\[\]-]|^[A-Z]|^(int|float|str)$")


@cache
def schema_of(name: str) -> type[BaseModel]:
    """Make the schema of a composition's body from its signature."""
    fields: dict[str, Any] = {}
    composition = find(name)
    assert composition is not None
    for key, (annotation, default) in composition.parameters.items():
        fields[key] = (as_reference(annotation), ... if default is Parameter.empty else default)
    return create_model(name, __config__=ConfigDict(frozen=True, extra="forbid"), **fields)


def validated(kind: Any, value: Any, document: Document, path: KeyPath) -> tuple[Any, list[Finding]]:
    """Validate a value that stands at `path` of a document: give the result, or None and what is wrong."""
    try:
        return TypeAdapter(kind).validate_python(value), []
    except ValidationError as error:
        found = [(_key_path(document, path, one["loc"]), one) for one in error.errors()]
    findings = []
    for location, one in found:
        deeper = any(len(other) > len(location) and other[: len(location)] == location for other, _ in found)
        if not deeper or location == path:  # of a union's members, the one that was meant says most
            findings.append(_explained(one, location, _known_keys(kind, one["loc"]), getattr(kind, "model_fields", {})))
    return None, findings


def _explained(found: Any, location: KeyPath, known: list[str], described: Mapping[str, Any]) -> Finding:
    """Say one of pydantic's findings in our words."""
    key = location[-1]
    if found["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        return location, f"unknown key {key!r}", nearest(str(key), known)
    if found["type"] == "missing":
        meaning = getattr(described.get(str(key)), "description", None)
        return location[:-1], f"{location[-2]} lacks the key {key!r}", f"{key}: {meaning}" if meaning else ""
    message = found["msg"].removeprefix("Value error, ")
    return location, f"{key} is {found['input']!r}: {message[:1].lower()}{message[1:]}", ""


def _key_path(document: Document, path: KeyPath, location: tuple[Any, ...]) -> KeyPath:
    """Strip what is no key from pydantic's location: it names the members of unions too."""
    for i, part in enumerate(location):
        last = i == len(location) - 1
        if (*path, part) in document.lines or (last and not _MEMBER_OF_UNION.search(str(part))):
            path = (*path, part)
    return path


def _known_keys(kind: Any, location: tuple[Any, ...]) -> list[str]:
    """Give the keys that are known at the place where pydantic found one too many."""
    known = getattr(kind, "model_fields", {})
    depth = next((i for i, part in enumerate(location[:-1]) if part in known), None)
    if depth is None:
        return list(known)
    annotation = known[location[depth]].annotation
    inside = list(_classes(annotation, is_dataclass))
    if not inside:
        models = list(_classes(annotation, lambda one: issubclass(one, BaseModel)))
        return _known_keys(models[0], location[depth + 1 :]) if models else []
    meant = [one for one in inside if one.__name__ in location] or inside
    return list(dict.fromkeys(field.name for one in meant for field in fields(one)))


def _classes(annotation: Any, fits: Callable[[type], bool]) -> Iterator[Any]:
    """Go through the classes of one kind in an annotation."""
    if isinstance(annotation, type) and fits(annotation):
        yield annotation
    for one in typing.get_args(annotation):
        yield from _classes(one, fits)
