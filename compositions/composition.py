"""What a composition is: a function from checkpoints to a checkpoint, its recipe keys read from its signature."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pkgutil import iter_modules
from typing import Any, TypeVar

from portmanteau.merge import Composed, Surveyed

F = TypeVar("F", bound=Callable[..., Composed | Surveyed])


@dataclass(frozen=True)
class Composition:
    """A registered composition: the function, its keyword-only parameters with types and defaults, its source."""

    name: str
    compose: Callable[..., Composed | Surveyed]
    parameters: Mapping[str, tuple[Any, Any]]
    source: str

    @property
    def summary(self) -> str:
        """The first line of its docstring."""
        return (self.compose.__doc__ or "").strip().splitlines()[0]


_REGISTRY: dict[str, Composition] = {}


def composition(*, source: str) -> Callable[[F], F]:
    """Register a function as the composition of its name, and hand it back unchanged.

    Its keyword-only parameters are its keys in a recipe; Checkpoint, Adapter, Bottleneck in annotations are references.
    """

    def register(function: F) -> F:
        hints = typing.get_type_hints(function, include_extras=True)
        found = inspect.signature(function).parameters.values()
        keys = {p.name: (hints[p.name], p.default) for p in found if p.kind is p.KEYWORD_ONLY}
        _REGISTRY[function.__name__] = Composition(function.__name__, function, keys, source)
        return function

    return register


def compositions() -> Mapping[str, Composition]:
    """Give every composition by name, in alphabetical order; they are found by their files."""
    package = __name__.rpartition(".")[0]
    for module in iter_modules(import_module(package).__path__):
        import_module(f"{package}.{module.name}")
    return {name: _REGISTRY[name] for name in sorted(_REGISTRY)}
