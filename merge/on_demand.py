"""Packages that import a public name when it is first asked for, so that a command pays for what it uses.

A package's `__init__` says in which of its files each name lives, and under TYPE_CHECKING imports the names plainly:
type checkers and editors see what they always saw. A file often has the name of its function (`operators.ties`), and
Python binds that name to the file when something imports the file; here it is bound to the function, as a reader means.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from importlib import import_module
from types import ModuleType
from typing import Any


class OnDemand(ModuleType):
    """A package whose names are imported on demand."""

    _homes: Mapping[str, str]

    def __getattr__(self, name: str) -> Any:
        """Import the file that a name lives in, and keep what it has under that name; a file itself, where nothing."""
        if name not in self._homes:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}", name=name, obj=self)
        home = import_module(f"{self.__name__}.{self._homes[name]}")
        value = vars(self)[name] = vars(home).get(name, home)
        return value

    def __setattr__(self, name: str, value: object) -> None:
        """Bind a name; that of a file which was just imported to what lives in it under the same name."""
        if isinstance(value, ModuleType) and self._homes.get(name) == name:
            value = vars(value).get(name, value)
        super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        """Name everything that can be asked for."""
        return sorted({*vars(self), *self._homes})


def on_demand(package: str, homes: Mapping[str, str]) -> None:
    """Let a package import its names on demand: name → the file it lives in, seen from the package."""
    module = sys.modules[package]
    vars(module)["_homes"] = homes
    module.__class__ = OnDemand
