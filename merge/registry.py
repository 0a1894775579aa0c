"""The operators by name. Importing this finds them all; none of them imports torch before it is called."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from . import operators as _found  # noqa: F401 - importing the package registers its operators
from .errors import MergeError, nearest
from .operator import REGISTRY, Operator


def operators() -> Mapping[str, Operator]:
    """Give every operator by name, in alphabetical order; those that a user's program registered too."""
    return MappingProxyType({name: REGISTRY[name] for name in sorted(REGISTRY)})


def find(name: str) -> Operator:
    """Give one operator. Raises MergeError, naming the nearest, for an unknown name."""
    if name not in REGISTRY:
        raise MergeError("", f"unknown operator {name!r}", nearest(name, operators()))
    return REGISTRY[name]
