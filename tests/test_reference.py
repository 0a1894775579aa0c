"""The generated reference and the JSON Schema: fresh, complete, and at one with what recipes are checked by."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import typer
import yaml

from portmanteau.cli import app
from portmanteau.compositions.composition import compositions
from portmanteau.compositions.recipe.lines import parsed
from portmanteau.compositions.recipe.reading import recipe_of
from portmanteau.compositions.reference import markdown
from portmanteau.compositions.reference.json_schema import schema
from portmanteau.compositions.reference_page import entry
from portmanteau.merge import RecipeError
from portmanteau.merge.operator import REGISTRY
from portmanteau.merge.registry import operators

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted(ROOT.glob("examples/*.yaml"))
BAD = """\
models:
  math: ./math
merge:
  layer_swap: {task: math, language: ./swahili, botom: 5, top: -2, outside: everywhere}
outputs: {dtype: bfloat16}
"""


def printed(*words: str) -> str:
    program = "import sys; from portmanteau.cli import app; app(sys.argv[1:])"
    done = subprocess.run(
        [sys.executable, "-c", program, *words], capture_output=True, text=True, check=True, timeout=60
    )
    return done.stdout


def findings(document: Any) -> list[str]:
    """Give where and what a validator finds, as an editor would underline it."""
    validator = jsonschema.Draft7Validator(schema())
    inner = [error for found in validator.iter_errors(document) for error in (found, *(found.context or ()))]
    return [f"{'.'.join(map(str, error.absolute_path))}: {error.message}" for error in inner]


@pytest.mark.parametrize(("option", "file"), [("--markdown", "reference.md"), ("--schema", "recipe.schema.json")])
def test_what_is_committed_is_what_the_declarations_say(option: str, file: str) -> None:
    # after a change: portmanteau show --markdown > examples/reference.md, and --schema > examples/recipe.schema.json
    assert (ROOT / "examples" / file).read_text(encoding="utf-8") == printed("show", option)


def test_a_changed_default_makes_both_stale(monkeypatch: pytest.MonkeyPatch) -> None:
    ties = operators()["ties"]
    settings = {**ties.settings, "density": replace(ties.settings["density"], default=0.5)}
    monkeypatch.setitem(REGISTRY, "ties", replace(ties, settings=settings))
    page = (ROOT / "examples" / "reference.md").read_text(encoding="utf-8")
    now = markdown.page(typer.main.get_command(app))
    assert [line for line in now.splitlines() if line not in page.splitlines()] == [
        "| `density` | float, > 0, ≤ 1; for each model | `0.5` | share of entries of largest magnitude that is kept |"
    ]
    committed = json.loads((ROOT / "examples" / "recipe.schema.json").read_text(encoding="utf-8"))
    assert committed["$defs"]["ties"]["properties"]["density"]["default"] == 0.2
    assert schema()["$defs"]["ties"]["properties"]["density"]["default"] == 0.5


def test_the_schema_is_a_valid_schema() -> None:
    jsonschema.Draft7Validator.check_schema(schema())


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_every_example_is_valid(path: Path) -> None:
    assert findings(yaml.safe_load(path.read_text(encoding="utf-8"))) == []


def test_the_typos_of_a_bad_recipe_are_all_found() -> None:
    found = "\n".join(findings(yaml.safe_load(BAD)))
    assert "merge.layer_swap: Additional properties are not allowed ('botom' was unexpected)" in found
    assert "merge.layer_swap.top: -2 is less than the minimum of 0" in found
    assert "merge.layer_swap.outside: 'everywhere' is not one of ['language', 'task', 'average', 'base']" in found
    assert ": Additional properties are not allowed ('outputs' was unexpected)" in found


@pytest.mark.parametrize(
    "merge",
    [
        "{ties: {base: ./b, models: {./m: {weight: [0, 0.5, 1], density: 0.2}, ./s: 0.4, ./t: null}, density: 0.3}}",
        "{ties: {base: ./b, models: [./m], rules: [{tensors: '*m*', density: 0.5}, {tensors: '*', operator: linear}]}}",
        "{slerp: {models: [./m, ./s], t: [{tensors: '*mlp*', value: [0, 1]}, {value: 0.5}]}}",
        "{linear: {models: [{path: org/m, revision: 3f2a, lora: {./l: 0.5}}, ./s], weight: {./s: 0.5}}}",
        "{average: {models: runs/*, weights: {exponential: 0.9}}}",
        "{slices: {parts: [{model: ./m, layers: [0, 2]}, {models: [./m, ./s], operator: slerp, t: 0.2}]}}",
        "{layer_swap: {task: ./m, language: ./s, transition: {bottom: 1}, modules: {mlp: {bottom: 2}}}}",
        "{sparse_fine_tune: {base: ./b, diffs: {./m: 1.0, ./s: {weight: 1.0, dense: false}}}}",
    ],
)
def test_the_forms_that_recipes_have_are_valid(merge: str) -> None:
    assert findings({"merge": yaml.safe_load(merge), "output": {"shard_size": "5GB"}}) == []


@pytest.mark.parametrize(
    "merge",
    [
        "{ties: {base: ./b, models: [./m], densty: 0.3}}",
        "{ties: {base: ./b, models: [./m], density: 3}}",
        "{ties: {models: [./m]}}",
        "{ties: {base: ./b, models: {./m: {wieght: 1}}}}",
        "{linear: {models: [./m], rules: [{tensors: '*', oprator: copy}]}}",
        "{tise: {models: [./m]}}",
        "{linear: {models: [./m]}, copy: {models: [./m]}}",
        "{slices: [{model: ./m, layer: [0, 2]}]}",
        "{average: {models: runs/*, weights: {exponentail: 0.9}}}",
    ],
)
def test_what_the_recipe_reader_refuses_is_not_valid(merge: str) -> None:
    assert findings({"merge": yaml.safe_load(merge)})
    with pytest.raises(RecipeError):
        recipe_of(parsed(f"merge: {merge}", "recipe.yaml"))


def every_key(part: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    return list(part.get("properties", {}).items())


def test_a_key_that_an_editor_completes_has_a_description() -> None:
    whole = schema()
    keys = every_key(whole) + every_key(whole["$defs"]["Body"]) + every_key(whole["$defs"]["Output"])
    for name in (*compositions(), *operators()):
        keys += [(f"{name}.{key}", one) for key, one in every_key(whole["$defs"][name])]
    assert len(keys) > 200
    assert [key for key, one in keys if not one.get("description")] == []


@pytest.mark.parametrize("name", [*compositions(), *operators()])
def test_every_entry_has_an_example_that_reads(name: str) -> None:
    example = entry(name)["example"]
    if name == "fisher_mean":  # recipes name the composition fisher
        assert example == ""
        return
    assert findings({"merge": yaml.safe_load(example)}) == []
    with pytest.raises(RecipeError) as refused:  # there are no such models here, and nothing else is wrong
        recipe_of(parsed(f"merge:\n  {example}\n", "recipe.yaml"))
    assert {one.what.partition(" '")[0] for one in refused.value.mistakes} <= {
        "no model, file or folder",
        "nothing is called",
    }


def test_the_page_has_each_setting_with_its_bounds_and_default() -> None:
    page = (ROOT / "examples" / "reference.md").read_text(encoding="utf-8")
    of_ties = page.partition("\n### ties\n")[2].partition("\n### ")[0]
    assert "| `density` | float, > 0, ≤ 1; for each model | `0.2` | share of entries" in of_ties
    assert "Source: Yadav et al. 2023" in of_ties
    assert "```yaml\nmerge:\n  ties: {base: ./base, models: [./math, ./swahili]}\n```" in of_ties
    for command in ("build", "plan", "check", "show", "inspect", "do"):
        assert f"\n### portmanteau {command}\n" in page


def test_the_committed_schema_is_what_an_editor_loads() -> None:
    loaded = json.loads((ROOT / "examples" / "recipe.schema.json").read_text(encoding="utf-8"))
    assert loaded == json.loads(json.dumps(schema()))
