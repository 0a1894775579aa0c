"""Packages that import their names on demand: what is asked for is what was always there, and no more is imported."""

from __future__ import annotations

import ast
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from portmanteau import compositions, merge
from portmanteau.merge import operators

ROOT = Path(__file__).parents[1]


def declared(package: str) -> dict[str, str]:
    """Read what type checkers are told: name → the file that it is imported from."""
    tree = ast.parse((ROOT / package / "__init__.py").read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    return {alias.name: node.module or alias.name for node in imports for alias in node.names}


@pytest.mark.parametrize("package", [merge, compositions])
def test_a_name_is_what_type_checkers_are_told(package: object) -> None:
    name = package.__name__  # type: ignore[attr-defined]
    homes = declared(name.rpartition(".")[2])
    assert sorted(homes) == package.__all__  # type: ignore[attr-defined]
    for one, home in homes.items():
        module = import_module(f"{name}.{home}")
        assert getattr(package, one) is vars(module).get(one, module)


def test_dir_names_everything_public() -> None:
    for package in (merge, compositions, operators):
        assert {*package.__all__} <= {*dir(package)}


def test_an_unknown_name_is_no_attribute() -> None:
    with pytest.raises(AttributeError, match=r"'portmanteau\.merge' has no attribute 'opne'"):
        _ = merge.opne  # type: ignore[attr-defined]
    with pytest.raises(ImportError, match="opne"):
        exec("from portmanteau.merge import opne")


def printed(code: str) -> str:
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return found.stdout.strip()


@pytest.mark.parametrize(("package", "name"), [("merge.operators", "linear"), ("compositions", "average")])
def test_a_name_stays_its_functions_after_its_file_was_imported(package: str, name: str) -> None:
    code = f"import portmanteau.{package}.{name}\nfrom portmanteau.{package} import {name}\nprint({name}.__name__)"
    assert printed(code) == name


def test_a_recipe_of_one_operator_imports_no_other_and_no_composition(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("merge: {linear: {models: [./one, ./two]}}")
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    code = f"""
import sys
from portmanteau.compositions import load
load({str(tmp_path / "recipe.yaml")!r})
names = [name.removeprefix("portmanteau.") for name in sys.modules]
print([name for name in names if name.startswith("merge.operators.")])
print([name for name in names if name in ("compositions.lora", "compositions.slices", "merge.adapters.adapter")])
"""
    assert printed(code) == "['merge.operators.linear']\n[]"


def test_a_recipe_of_models_imports_nothing_that_opens_adapters() -> None:
    code = """
import sys
from portmanteau.compositions.recipe.schema import schema_of
schema_of("layer_swap")
print([name for name in ("adapters.adapter", "sparse.file") if f"portmanteau.merge.{name}" in sys.modules])
"""
    assert printed(code) == "[]"


def test_an_operator_of_a_user_is_not_replaced_when_ours_of_its_name_is_looked_up() -> None:
    code = """
from portmanteau.merge import operator
from portmanteau.merge.registry import find, operators

@operator(source="mine")
def ties(models):
    "Mine."

print(find("ties").source, operators()["ties"].source, len(operators()))
"""
    assert printed(code) == f"mine mine {len(operators.__all__)}"
