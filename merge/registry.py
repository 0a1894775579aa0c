"""The operators by name. Ours are known by their files: one is imported when asked for, all of them for a list."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType

from . import operators as ours
from .errors import MergeError, nearest
from .operator import REGISTRY, Operator
from .plugins.discovery import EXTRA
from .plugins.mergekit_method import all_registered, installed, registered


def operators() -> Mapping[str, Operator]:
    """Give every operator by name, in alphabetical order; those that a user's program registered with us too."""
    for name in ours.__all__:
        _import(name)
    return MappingProxyType({name: REGISTRY[name] for name in sorted(REGISTRY)})


def with_plugins() -> Mapping[str, Operator]:
    """Give every operator, and those of the plugins that were announced; imports these."""
    others = all_registered()
    return {**others, **operators()} if others else operators()


def exists(name: str) -> bool:
    """Tell whether there is an operator of this name. Plugins are imported only where there is none of ours."""
    return _lookup(name) is not None


def find(name: str) -> Operator:
    """Give one operator. Raises MergeError, naming the nearest, for an unknown name."""
    found = _lookup(name)
    if found is None:
        raise MergeError("", f"unknown operator {name!r}", unknown(name, operators()))
    return found


def unknown(name: str, known: Iterable[str]) -> str:
    """Say what may have been meant by a name that nothing has: a known one, or an operator of a plugin."""
    hint = nearest(name, known)
    if hint.startswith("did you mean"):
        return hint
    return f"{hint}; for one of a plugin add --plugin MODULE" + ("" if installed() else f" and {EXTRA}")


def _lookup(name: str) -> Operator | None:
    _import(name)
    if name in REGISTRY:
        return REGISTRY[name]
    found = registered(name)  # imports plugins, which may have registered with us
    return REGISTRY.get(name, found)


def _import(name: str) -> None:
    """Import an operator of ours, which registers it; one that a user's program registered under its name stays."""
    if name in ours.__all__ and name not in REGISTRY:
        getattr(ours, name)
