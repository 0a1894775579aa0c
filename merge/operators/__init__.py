"""The operators: one file, one operator, found by their files. `operators.ties(deltas, density=0.3)` calls one."""

from importlib import import_module
from pkgutil import iter_modules

for _module in iter_modules(__path__):
    globals()[_module.name] = getattr(import_module(f"{__name__}.{_module.name}"), _module.name)

__all__ = sorted(module.name for module in iter_modules(__path__))
