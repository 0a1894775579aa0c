"""The source of operators that others wrote, by digest: whose they are, and what their code was."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from ..files.digests import digest_of_file
from ..operator import Operator
from .discovery import package, plugin_of
from .kernel import Kernel

Plugins = Mapping[str, Mapping[str, str]]  # plugin → file of its source → BLAKE3 digest


def source_files(operators: Iterable[Operator]) -> Plugins:
    """Give the plugins that some operators come from, with the digest of each of their files that was imported.

    Of a package all of its modules count, since an operator may call any of them. Ours are in no plugin.
    """
    homes = dict.fromkeys(_home(operator) for operator in operators)
    others = [home for home in homes if package(home) != package(__name__)]
    return {plugin_of(home): dict(_digests(home)) for home in others}


def _home(operator: Operator) -> str:
    """Give the module that defines an operator."""
    return operator.measure.home if isinstance(operator.measure, Kernel) else operator.apply.__module__


def _digests(home: str) -> Iterator[tuple[str, str]]:
    """Go through the files of the package that a module is in, named as seen from where the package stands."""
    for name, module in sorted(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if package(name) == package(home) and file is not None and Path(file).is_file():
            above = len(name.removeprefix(package(name)).split(".")) - (Path(file).name != "__init__.py")
            yield "/".join(Path(file).parts[-1 - above :]), digest_of_file(Path(file))
