"""Methods that plugins registered with mergekit, spelled as mergekit's own are: each parameter under its own name."""

from __future__ import annotations

from typing import Literal

from portmanteau.merge.plugins.mergekit_method import base_settings, registered
from portmanteau.merge.registry import operators, unknown

from ..composition import compositions
from .methods import METHODS, Method


def method_of(name: str) -> Method | None:
    """Give the method that a YAML calls so: one of mergekit's own, else one of a plugin, which is imported for it."""
    if name in METHODS or _is_ours(name):
        return METHODS.get(name)
    operator = registered(name)
    if operator is None:
        return None
    takes_base: Literal["required", "optional", "no"] = "no"
    if operator.takes_base:
        takes_base = "required" if operator.needs_base else "optional"
    of_base = base_settings(operator)
    settings = {key: one for key, one in operator.settings.items() if key not in of_base.values()}
    return Method(
        name,
        {key: one.default for key, one in settings.items() if not one.required},
        {key: key for key in settings},
        per_model=frozenset(key for key, one in settings.items() if one.per_model),
        takes_base=takes_base,
        required=frozenset(key for key, one in settings.items() if one.required),
        of_base=of_base,
        in_order=True,
    )


def hint(name: str) -> str:
    """Say what may have been meant by a name that no method has."""
    if _is_ours(name):
        return f"{name} is a name in our recipes; a plugin's method needs another: known are {', '.join(METHODS)}"
    return unknown(name, METHODS)


def _is_ours(name: str) -> bool:
    return name in operators() or name in compositions()
