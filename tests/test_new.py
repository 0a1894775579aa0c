"""`portmanteau new`: a first recipe from models and a method, asked for or named, which `check` accepts."""

from __future__ import annotations

from pathlib import Path

import jsonschema
import pytest
import torch
import yaml
from safetensors.torch import save_file
from typer.testing import CliRunner

from portmanteau.cli import app
from portmanteau.compositions.one_off import starter
from portmanteau.compositions.reference import json_schema

NAMED = ["--model", "math", "--model", "swahili"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Save three models of eight layers as base, math and swahili, and go there."""
    for name, value in (("base", 1.0), ("math", 2.0), ("swahili", 5.0)):
        (tmp_path / name).mkdir()
        tensors = {f"model.layers.{i}.mlp.up_proj.weight": torch.full((4, 4), value) for i in range(8)}
        save_file(tensors, tmp_path / name / "model.safetensors")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def new(*words: str, typed: str = "") -> str:
    done = CliRunner().invoke(app, ["new", *words], input=typed)
    if done.exception and not isinstance(done.exception, SystemExit):
        return str(done.exception)
    assert done.exit_code == 0, done.output
    assert typed or done.stdout == ""  # the runner echoes what is typed
    return done.stderr


def test_a_named_recipe_is_commented_valid_and_has_the_modeline(here: Path) -> None:
    told = new("first.yaml", "--kind", "ties", *NAMED, "--base", "base")
    assert told == "first.yaml and recipe.schema.json written; next: portmanteau check first.yaml\n"
    text = (here / "first.yaml").read_text()
    assert text.splitlines()[0] == "# yaml-language-server: $schema=./recipe.schema.json"
    assert "    # density: 0.2  # share of entries of largest magnitude that is kept; float, > 0, ≤ 1\n" in text
    assert yaml.safe_load(text) == {
        "models": {"math": "./math", "swahili": "./swahili", "base": "./base"},
        "merge": {"ties": {"models": ["math", "swahili"], "base": "base"}},
    }
    assert CliRunner().invoke(app, ["check", "first.yaml"]).exit_code == 0


def test_a_setting_that_is_only_a_comment_can_be_made_one(here: Path) -> None:
    new("first.yaml", "--kind", "ties", *NAMED, "--base", "base")
    edited = (here / "first.yaml").read_text().replace("# density: 0.2", "density: 0.7")
    (here / "first.yaml").write_text(edited.replace("# output:", "output:"))
    found = yaml.safe_load((here / "first.yaml").read_text())
    assert found["merge"]["ties"]["density"] == 0.7
    assert jsonschema.Draft7Validator(json_schema.schema()).is_valid(found)
    assert CliRunner().invoke(app, ["check", "first.yaml"]).exit_code == 0


def test_what_is_not_named_is_asked_for(here: Path) -> None:
    told = new(typed="task_arithmetic\nmath\nswahili\n\nbase\n")
    assert "What is to be done [linear]:" in told
    assert yaml.safe_load((here / "recipe.yaml").read_text())["merge"] == {
        "task_arithmetic": {"models": ["math", "swahili"], "base": "base"}
    }


@pytest.mark.parametrize("kind", ["layer_swap", "linear", "slerp", "average", "extract_lora", "extract_sparse"])
def test_other_kinds_are_checked_too(kind: str, here: Path) -> None:
    base = ["--base", "base"] if starter.needs_base(kind) else []
    models = NAMED[:2] if kind.startswith("extract") else NAMED
    new("--kind", kind, *models, *base)
    assert CliRunner().invoke(app, ["check", "recipe.yaml"]).exit_code == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--kind", "tise", *NAMED], "--kind: no operator or composition 'tise'\n  hint: did you mean 'ties'?"),
        (
            ["--kind", "ties", *NAMED],
            "--base: ties needs a base\n  hint: name the model that the others were trained from",
        ),
        (
            ["--kind", "linear", *NAMED, "--base", "base"],
            "--base: linear takes no base\n  hint: name it as a --model if it is to be merged",
        ),
        (
            ["--kind", "layer_swap", *NAMED[:2]],
            "--model: 1 models are named\n  hint: layer_swap takes, in this order: task, language",
        ),
        (
            ["--kind", "linear", "--model", "mth", "--model", "swahili"],
            "--model: no model, file or folder 'mth'\n  hint: did you mean 'math'?",
        ),
        (
            ["--kind", "slices", *NAMED],
            "--kind: slices needs more than models\n  hint: write it by hand, as `portmanteau show slices`",
        ),
    ],
)
def test_mistakes_name_the_option_and_write_nothing(words: list[str], said: str, here: Path) -> None:
    assert new(*words) == said
    assert not (here / "recipe.yaml").exists()


def test_what_stands_there_is_left_alone(here: Path) -> None:
    (here / "recipe.schema.json").write_text('{"title": "mine"}')
    said = "recipe.schema.json: exists already\n  hint: choose another name, or replace it with --force"
    assert new("--kind", "linear", *NAMED) == said
    new("--kind", "linear", *NAMED, "--force")
    new("second.yaml", "--kind", "linear", *NAMED)  # the schema is ours now
    assert (here / "recipe.schema.json").read_text() == json_schema.text()
