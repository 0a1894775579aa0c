"""The operators: one file, one operator, found by their files. `operators.ties(deltas, density=0.3)` calls one."""

from pkgutil import iter_modules

from ..on_demand import on_demand

__all__ = sorted(module.name for module in iter_modules(__path__))
on_demand(__name__, {name: name for name in __all__})
