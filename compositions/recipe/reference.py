"""References in recipes: a name from `models` or `steps`, a path, or a Hub id, of a checkpoint or an adapter."""

from __future__ import annotations

import functools
import glob
import operator
import re
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from portmanteau import merge
from portmanteau.merge import Checkpoint, RecipeError
from portmanteau.merge.files.hub import is_on_hub
from portmanteau.merge.files.places import kind, user_path

from .lines import KeyPath

_MOST_STARS, _MOST_FOUND = 3, 10_000
Weight = Annotated[float, Field(allow_inf_nan=False)]


class Reference(BaseModel):
    """What stands for a checkpoint in a recipe: text alone, or the long form."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    may_be_step: ClassVar[bool] = True

    path: str
    revision: str | None = None
    lora: tuple[tuple[AdapterReference, Weight], ...] = ()  # adapters that are folded in, with their weights

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value

    @field_validator("lora", mode="before")
    @classmethod
    def _weighted(cls, value: Any) -> Any:
        """Read one adapter, a list of them, or a mapping from adapters to weights; the long form is one adapter."""
        if isinstance(value, dict) and "path" not in value:
            return tuple(value.items())
        return tuple(one if isinstance(one, tuple) else (one, 1.0) for one in _listed(value))

    @staticmethod
    def opener() -> Callable[..., Any]:
        """Give what opens it; asked only then, as a recipe without adapters does not import what opens them."""
        return merge.open

    def local(self, folder: Path) -> Path:
        """Give the path that it would be on this machine, relative to the recipe's folder."""
        return folder / user_path(self.path)

    @property
    def is_pattern(self) -> bool:
        """Tell whether it may stand for several checkpoints: `runs/*/checkpoint-*`."""
        return any(sign in self.path for sign in "*?[")

    def expanded(self, folder: Path) -> list[Reference]:
        """Give what a pattern stands for, sorted with numbers as numbers; what is no pattern stands for itself.

        Raises RecipeError for a pattern that would look through too much.
        """
        if not self.is_pattern:
            return [self]
        if sum(any(sign in part for sign in "*?[") for part in self.path.split("/")) > _MOST_STARS or "\0" in self.path:
            raise RecipeError("", f"the pattern {self.path!r} looks through too many folders", "name more of the path")
        matched = islice(glob.iglob(self.path, root_dir=folder), _MOST_FOUND)  # noqa: PTH207 - keeps the path as written
        found = sorted(matched, key=_numbers_as_numbers)
        return [self.model_copy(update={"path": path}) for path in found]

    def is_on_hub(self, folder: Path) -> bool:
        """Tell whether it is no local path, and stands for a repository of the Hub."""
        return kind(self.local(folder)) == "nothing" and is_on_hub(self.path, self.revision, folder)


class AdapterReference(Reference):
    """What stands for an adapter in a recipe."""

    may_be_step: ClassVar[bool] = False

    @staticmethod
    def opener() -> Callable[..., Any]:
        """Give what opens an adapter."""
        return merge.open_adapter

    @model_validator(mode="after")
    def _alone(self) -> Self:
        if self.lora:
            raise ValueError("an adapter takes no lora: name both in one list")
        return self


Reference.model_rebuild()


class BottleneckReference(Reference):
    """What stands for a bottleneck adapter in a recipe."""

    may_be_step: ClassVar[bool] = False

    @staticmethod
    def opener() -> Callable[..., Any]:
        """Give what opens a bottleneck adapter."""
        return merge.open_bottleneck


class SparseReference(Reference):
    """What stands for a sparse fine-tune in a recipe."""

    may_be_step: ClassVar[bool] = False

    @staticmethod
    def opener() -> Callable[..., Any]:
        """Give what opens a sparse fine-tune."""
        return merge.open_sparse


_KINDS: Mapping[str, type[Reference]] = {  # by the name that what they open has in merge
    "Checkpoint": Reference,
    "Adapter": AdapterReference,
    "Bottleneck": BottleneckReference,
    "SparseFineTune": SparseReference,
}


def _numbers_as_numbers(path: str) -> list[str | int]:
    """Order `checkpoint-90` before `checkpoint-100`."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d{1,4000})", path)]


def _listed(value: Any) -> Any:
    """Let one reference stand for a list of one."""
    return value if isinstance(value, list | tuple) else [value]


def as_reference(annotation: Any) -> Any:
    """Put references in the place of what they open, anywhere in an annotation; one may stand for several models."""
    kind = _KINDS.get(name := getattr(annotation, "__name__", ""))
    if kind and annotation is getattr(merge, name):
        return kind
    if hasattr(annotation, "recipe_form"):
        return annotation.recipe_form
    if annotation == Sequence[Checkpoint]:
        return Annotated[list[Reference], BeforeValidator(_listed)]
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return Annotated[as_reference(arguments[0]), *arguments[1:]]
    if origin in (typing.Union, types.UnionType):
        return functools.reduce(operator.or_, map(as_reference, arguments))
    if origin is not None and any(as_reference(one) is not one for one in arguments):
        return origin[tuple(map(as_reference, arguments))]
    return annotation


def references(value: Any, path: KeyPath = ()) -> Iterator[tuple[KeyPath, Reference]]:
    """Go through the references in a value that stands at `path`, adapters inside them too, and their places."""
    if isinstance(value, Reference):
        yield path, value
        yield from (((*path, "lora"), adapter) for adapter, _ in value.lora)
    elif isinstance(value, Mapping):
        for key, one in value.items():
            yield from references(key, path)
            yield from references(one, (*path, key) if isinstance(key, str) else path)
    elif isinstance(value, list | tuple):
        for i, one in enumerate(value):
            yield from references(one, (*path, i))
    elif is_dataclass(value):
        yield from references(_fields(value), path)


def replaced(value: Any, opened: Callable[[Reference], Any]) -> Any:
    """Put what they open in the place of references, anywhere in a validated value."""
    if isinstance(value, Reference):
        return opened(value)
    if isinstance(value, Mapping):
        return {replaced(key, opened): replaced(one, opened) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(replaced(one, opened) for one in value)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **replaced(_fields(value), opened))
    return value


def _fields(value: Any) -> dict[str, Any]:
    return {field.name: getattr(value, field.name) for field in fields(value)}
