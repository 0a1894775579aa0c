"""Every example in a docstring runs, and every public function has one."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import pytest

from portmanteau import compositions, merge
from portmanteau.compositions import training
from portmanteau.compositions.composition import _REGISTRY as COMPOSITIONS
from portmanteau.compositions.composition import compositions as every_composition
from portmanteau.merge.operator import REGISTRY as OPERATORS
from portmanteau.merge.registry import operators as every_operator

ROOT = Path(__file__).parents[1]


def modules() -> list[str]:
    """Name every module of both layers."""
    found: list[str] = []
    for package in (merge, compositions):
        found += [package.__name__, *(m.name for m in pkgutil.walk_packages(package.__path__, f"{package.__name__}."))]
    return found


def examples(function: Callable[..., Any]) -> list[doctest.Example]:
    """Give the examples in a function's own docstring."""
    return [one for test in doctest.DocTestFinder(recurse=False).find(function) for one in test.examples]


def public() -> Iterator[tuple[str, Callable[..., Any]]]:
    """Go through all functions that a user of the Python API calls, by the names under which they are found."""
    packages: dict[str, ModuleType] = {"merge": merge, "compositions": compositions, "compositions.training": training}
    for where, package in packages.items():
        found = ((name, getattr(package, name)) for name in package.__all__)
        yield from ((f"{where}.{name}", one) for name, one in found if inspect.isfunction(one))
    yield "compositions.training.lottery_ticket.fine_tune", training.lottery_ticket.fine_tune
    yield from ((f"merge.operators.{name}", operator.apply) for name, operator in every_operator().items())
    yield from ((f"compositions.{name}", one.compose) for name, one in every_composition().items())


@pytest.mark.filterwarnings("ignore:'pin_memory' argument")  # torch's, of a Trainer's defaults without a GPU
@pytest.mark.parametrize("name", modules())
def test_the_examples_in_docstrings_hold(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")  # they read what a reader has, and write elsewhere
    monkeypatch.chdir(tmp_path)
    with patch.dict(OPERATORS, every_operator()), patch.dict(COMPOSITIONS, every_composition()):  # one may be added
        assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_every_public_function_has_an_example_with_output() -> None:
    shown = {name: [one.want for one in examples(function)] for name, function in public()}
    assert len(shown) > 60
    assert [name for name, wanted in shown.items() if not any(wanted)] == []
