"""The commonest mistakes of a first run, each with the message that a new user reads, word for word."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from portmanteau.cli import main

EXAMPLES = Path(__file__).parents[1] / "examples"
TWO = "[./models/task-expert, ./models/language-expert]"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Copy the example's models to models/, put beside them what is mistaken for one, and go there."""
    models = tmp_path / "models"
    for name in ("models/base", "models/task-expert", "models/language-expert", "adapters/task", "adapters/bert-first"):
        shutil.copytree(EXAMPLES / name, models / Path(name).name)
    for name in ("empty", "bare", "other"):
        (models / name).mkdir()
    shutil.copyfile(models / "base" / "model.safetensors", models / "bare" / "model.safetensors")
    save_file({"h.0.attn.weight": torch.zeros(2, 2)}, models / "other" / "model.safetensors")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: str) -> tuple[int, str]:
    """Run the command line; give its status and what it says on stderr."""
    monkeypatch.setattr(sys, "argv", ["portmanteau", *words])
    with pytest.raises(SystemExit) as end:
        main()
    return int(end.value.code or 0), capsys.readouterr().err


IN_RECIPES = {
    "a misspelt model": (
        "merge: {linear: {models: [models/task-exprt, models/base]}}",
        "r.yaml:1: no model, file or folder 'models/task-exprt'\n  hint: did you mean 'task-expert'?\n",
    ),
    "a misspelt folder": (
        "merge: {linear: {models: [./model/task-expert, ./models/base]}}",
        "r.yaml:1: no model, file or folder './model/task-expert'\n"
        "  hint: there is no folder model; did you mean 'models'?\n",
    ),
    "a folder without weights": (
        "merge: {linear: {models: [./models/empty, ./models/base]}}",
        "r.yaml:1: models/empty: holds no weights\n"
        "  hint: a checkpoint folder holds model.safetensors, or shards with model.safetensors.index.json\n",
    ),
    "an adapter for a model": (
        "merge: {linear: {models: [./models/task, ./models/base]}}",
        "r.yaml:1: models/task: holds an adapter, not a model\n"
        "  hint: name its base with it: {path: BASE, lora: models/task}\n",
    ),
    "a bottleneck adapter for a model": (
        "merge: {linear: {models: [./models/bert-first, ./models/base]}}",
        "r.yaml:1: models/bert-first: holds an adapter, not a model\n  hint: average_adapters takes it\n",
    ),
    "another architecture": (
        "merge: {linear: {models: [./models/base, ./models/other]}}",
        "r.yaml:1: linear: ./models/other has no tensor in common with ./models/base: tensors such as h.0.attn.weight"
        " and LlamaForCausalLM\n  hint: models can be merged tensor by tensor where they were trained from one base\n",
    ),
    "a misspelt setting": (
        f"merge: {{linear: {{models: {TWO}, wieght: 2}}}}",
        "r.yaml:1: linear has no setting 'wieght'\n  hint: did you mean 'weight'?\n",
    ),
    "a misspelt operator": (
        f"merge: {{tise: {{models: {TWO}}}}}",
        "r.yaml:1: unknown composition or operator 'tise'\n  hint: did you mean 'ties'?\n",
    ),
    "a text for a number": (
        f"merge: {{ties: {{models: {TWO}, base: ./models/base, density: lots}}}}",
        "r.yaml:1: density is 'lots': input should be a valid number, unable to parse string as a number\n"
        "  hint: density: float, > 0, ≤ 1\n",
    ),
    "a percentage for a share": (
        f"merge: {{ties: {{models: {TWO}, base: ./models/base, density: 30}}}}",
        "r.yaml:1: density is 30: input should be less than or equal to 1\n  hint: density: float, > 0, ≤ 1\n",
    ),
    "a missing base": (
        f"merge: {{ties: {{models: {TWO}}}}}",
        "r.yaml:1: ties needs a base\n  hint: add base: the model that the others were trained from\n",
    ),
    "a missing key": (
        "merge: {layer_swap: {task: ./models/task-expert, bottom: 1, top: 1}}",
        "r.yaml:1: layer_swap lacks the key 'language'\n"
        "  hint: language: the expert in the language, which gives the outer layers\n",
    ),
    "one model for a list": (
        "merge: {linear: {models: ./models/base}}",
        "r.yaml:1: models is './models/base': one model is written [./models/base]; a list, or a mapping to weights,"
        " is meant\n",
    ),
    "too little indentation": (
        f"merge:\n  linear:\n  models: {TWO}\n",
        "r.yaml:1: must name one composition or operator\n"
        "  hint: indent what belongs to linear further than linear itself\n",
    ),
    "crooked indentation": (
        f"merge:\n  linear:\n    models: {TWO}\n   weight: 2\n",
        "r.yaml:4: not valid YAML: expected <block end>, but found '<block mapping start>'\n"
        "  hint: keys of one mapping begin in the same column; what belongs to a key is indented further\n",
    ),
    "tabs": (
        f"merge:\n\tlinear: {{models: {TWO}}}\n",
        "r.yaml:2: not valid YAML: found character '\\t' that cannot start any token\n"
        "  hint: YAML allows no tabs here: indent with spaces\n",
    ),
    "an open bracket": (
        "merge:\n  linear: {models: [./models/base}\n",
        "r.yaml:2: not valid YAML: expected ',' or ']', but got '}'\n"
        "  hint: a bracket or a comma is missing, in this line or above\n",
    ),
    "no merge": (
        f"linear: {{models: {TWO}}}",
        "r.yaml:1: unknown key 'linear'\n  hint: it belongs below merge: merge: {linear: …}\n"
        "r.yaml:1: has no key 'merge'\n"
        "  hint: merge: says what the result is, such as merge: {linear: {models: [./one, ./other]}}\n",
    ),
    "an unknown dtype": (
        f"merge: {{linear: {{models: {TWO}}}}}\noutput: {{dtype: float15}}\n",
        "r.yaml:2: dtype is 'float15': unknown dtype 'float15'; did you mean 'float16'?\n",
    ),
}


@pytest.mark.parametrize("mistake", IN_RECIPES)
def test_a_mistake_in_a_recipe_is_said_with_its_cure(
    mistake: str, here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text, said = IN_RECIPES[mistake]
    (here / "r.yaml").write_text(text)
    assert run(capsys, monkeypatch, "check", "r.yaml") == (1, said)


ON_THE_COMMAND_LINE = {
    "a misspelt recipe": (
        ["check", "rr.yaml"],
        "rr.yaml: no such file\n  hint: did you mean 'r.yaml'?\n",
    ),
    "a model for a recipe": (
        ["build", "models/base", "out"],
        "models/base: is a folder, not a recipe\n  hint: a recipe is a YAML file; `portmanteau new` writes one\n",
    ),
    "a weight file for a recipe": (
        ["check", "models/base/model.safetensors"],
        "models/base/model.safetensors: is no text\n"
        "  hint: a recipe is a YAML file; `portmanteau inspect` shows what a weight file holds\n",
    ),
    "a folder that is taken": (
        ["build", "r.yaml", "models"],
        "models: exists already\n  hint: choose another name, it was not built by portmanteau: --force leaves it\n",
    ),
    "too little memory": (
        ["build", "r.yaml", "out", "--memory", "1KB"],
        "--memory: 1.0 kB is too small: this plan needs 3.1 MB\n  hint: give more; without --memory it is 256 MiB\n",
    ),
    "a misspelt model": (
        ["inspect", "models/bas"],
        "models/bas: no such file or folder\n  hint: did you mean 'base'?\n",
    ),
    "a misspelt name": (
        ["show", "tie"],
        "no operator or composition 'tie'\n  hint: did you mean 'ties'?\n",
    ),
}


@pytest.mark.parametrize("mistake", ON_THE_COMMAND_LINE)
def test_a_mistake_on_the_command_line_is_said_with_its_cure(
    mistake: str, here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (here / "r.yaml").write_text(f"merge: {{linear: {{models: {TWO}}}}}\n")
    words, said = ON_THE_COMMAND_LINE[mistake]
    assert run(capsys, monkeypatch, *words) == (1, said)


def test_a_misspelt_command_has_a_suggestion(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    status, said = run(capsys, monkeypatch, "biuld", "r.yaml", "out")
    assert status == 2
    assert "No such command 'biuld'. Did you mean 'build'?" in said


def test_models_without_a_config_are_noted_before_anything_is_built(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (here / "r.yaml").write_text("merge: {linear: {models: [./models/bare, ./models/bare]}}")
    note = "note: the result has no config.json, since the models have none: transformers will not load it\n"
    assert run(capsys, monkeypatch, "check", "r.yaml") == (0, note)
