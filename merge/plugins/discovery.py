"""Where operators of others come from: modules that the user names, and entry points of installed packages.

A recipe never says what is imported: recipes come from strangers. A module is imported only where a recipe names an
operator that is none of ours; it registers operators with our decorator, or methods with mergekit.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import entry_points
from pathlib import Path

from ..errors import MergeError

GROUP = "portmanteau.operators"  # of entry points: OPERATOR = "the module that registers it"
EXTRA = "pip install 'portmanteau[mergekit]'"

_LONE = "portmanteau_plugin:"  # begins the module name of a lone file
_announced: list[str] = []


def announce(module: str) -> None:
    """Say which module, or .py file, to import for operators that are none of ours. MergeError if there is none."""
    try:
        there = _file(module).is_file() if _is_file(module) else importlib.util.find_spec(module.partition(".")[0])
    except (ImportError, ValueError):
        there = None
    if not there:
        hint = "name a file as ./METHODS.py, or a module that Python finds"
        raise MergeError("--plugin", f"no module {module!r}", hint)
    if module not in _announced:
        _announced.append(module)


def announced() -> bool:
    """Tell whether any module was announced."""
    return bool(_announced)


def package(module: str) -> str:
    """Give the package that a module is in; of a lone file the module itself."""
    return module if module.startswith(_LONE) else module.partition(".")[0]


def plugin_of(module: str) -> str:
    """Give what the user called the plugin that a module belongs to; where it was not announced, its package."""
    own = package(module)
    named = (one for one in _announced if own == (_module(_file(one)) if _is_file(one) else package(one)))
    return next(named, own)


def load(name: str) -> None:
    """Import what may register an operator of this name. MergeError where that fails."""
    load_announced()
    for point in entry_points(group=GROUP, name=name):
        with _blaming(f"the plugin {point.value} for {name!r}"):
            point.load()


def load_announced() -> None:
    """Import the modules that were announced, each once. MergeError where that fails."""
    for module in _announced:
        with _blaming(f"--plugin {module}"):
            _import_file(_file(module)) if _is_file(module) else importlib.import_module(module)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep to itself what mergekit's own imports warn of: no user of ours can mend it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def _blaming(where: str) -> Iterator[None]:
    """Turn what goes wrong in a plugin's import into a message."""
    try:
        with quiet():
            yield
    except ModuleNotFoundError as error:
        needs_extra = (error.name or "").partition(".")[0] == "mergekit"
        raise MergeError(where, f"needs the module {error.name!r}", EXTRA if needs_extra else "") from error
    except Exception as error:
        raise MergeError(where, f"cannot be imported: {type(error).__name__}: {error}") from error


def _is_file(module: str) -> bool:
    return module.endswith(".py")


def _file(module: str) -> Path:
    return Path(module).expanduser().resolve()


def _module(path: Path) -> str:
    return f"{_LONE}{path}"


def _import_file(path: Path) -> None:
    name = _module(path)
    if name in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
