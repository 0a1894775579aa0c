"""What a composition is: a function from checkpoints to a checkpoint, its recipe keys read from its signature."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from importlib import import_module
from pkgutil import iter_modules
from typing import Any, TypeVar

from portmanteau.merge import Composed, Surveyed

F = TypeVar("F", bound=Callable[..., Composed | Surveyed])


@dataclass(frozen=True)
class Composition:
    """A registered composition: the function, its source, and an example of it in a recipe."""

    name: str
    compose: Callable[..., Composed | Surveyed]
    source: str
    example: str

    @cached_property
    def parameters(self) -> Mapping[str, tuple[Any, Any]]:
        """Its keyword-only parameters with types and defaults; read when first asked for, which keeps starts quick."""
        hints = typing.get_type_hints(self.compose, include_extras=True)
        found = inspect.signature(self.compose).parameters.values()
        return {p.name: (hints[p.name], p.default) for p in found if p.kind is p.KEYWORD_ONLY}

    @property
    def summary(self) -> str:
        """The first line of its docstring."""
        return (self.compose.__doc__ or "").strip().splitlines()[0]


_PACKAGE = __name__.rpartition(".")[0]
_REGISTRY: dict[str, Composition] = {}


def composition(*, source: str, example: str) -> Callable[[F], F]:
    """Register a function as the composition of its name, and hand it back unchanged.

    Its keyword-only parameters are its keys in a recipe; Checkpoint, Adapter, Bottleneck in annotations are references.
    `source` is the paper and section, or the reference code at a commit; `example` what a recipe's `merge` may be.

    >>> from typing import Annotated
    >>> from pydantic import Field
    >>> from portmanteau.merge import Checkpoint
    >>> @composition(source="an example", example="only_norms: {model: ./math}")
    ... def only_norms(*, model: Annotated[Checkpoint, Field(description="where the norms come from")]) -> Composed:
    ...     "Take the norms of a model, and nothing else."
    ...     nodes = {name: model.node(name) for name in model if "norm" in name}
    ...     return Composed("only_norms", nodes, model.companions)
    >>> found = compositions()["only_norms"]  # what recipes find under the name
    >>> list(found.parameters), found.summary
    (['model'], 'Take the norms of a model, and nothing else.')
    >>> from portmanteau import merge
    >>> only_norms(model=merge.open("examples/models/base"))
    <Composed only_norms: 17 tensors, 0.0 MB>
    """

    def register(function: F) -> F:
        _REGISTRY[function.__name__] = Composition(function.__name__, function, source, example)
        return function

    return register


def find(name: str) -> Composition | None:
    """Give one composition by name; only the file of that name is imported, and not where a user registered one."""
    if name not in _REGISTRY and name in _files():
        import_module(f"{_PACKAGE}.{name}")
    return _REGISTRY.get(name)


def compositions() -> Mapping[str, Composition]:
    """Give every composition by name, in alphabetical order; found by their files beside this one."""
    for name in _files():
        find(name)
    return {name: _REGISTRY[name] for name in sorted(_REGISTRY)}


@cache
def _files() -> tuple[str, ...]:
    """Name the files beside this one, some of which hold a composition."""
    return tuple(one.name for one in iter_modules(import_module(_PACKAGE).__path__) if not one.ispkg)
