"""`portmanteau do`: a recipe from options, written beside the result, and built."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from portmanteau.cli import app, main
from portmanteau.compositions.one_off.options import names, options
from portmanteau.merge.registry import operators

Run = Callable[..., tuple[int, str, str]]
OF_BUILD = {"out", "dtype", "dry_run", "force", "threads", "memory", "as_json"}


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Save three models of two layers and one entry a layer as models/{base,math,swahili}; go to the folder above."""
    for name, value in (("base", 1.0), ("math", 2.0), ("swahili", 5.0)):
        folder = tmp_path / "models" / name
        folder.mkdir(parents=True)
        layers = {f"model.layers.{i}.mlp.up_proj.weight": torch.full((1, 1), value) for i in range(4)}
        save_file({**layers, "model.norm.weight": torch.full((1,), value)}, folder / "model.safetensors")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def do(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: str) -> tuple[int, str, str]:
    """Run `portmanteau do …` and give status, stdout and stderr."""
    monkeypatch.setattr(sys, "argv", ["portmanteau", "do", *words])
    with pytest.raises(SystemExit) as end:
        main()
    printed = capsys.readouterr()
    return int(end.value.code or 0), printed.out, printed.err


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    return lambda *words: do(capsys, monkeypatch, *words)


def values(folder: Path) -> Mapping[str, float]:
    return {name: tensor.item() for name, tensor in load_file(folder / "model.safetensors").items()}


def names_in(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def test_a_composition_is_built_from_options_and_its_recipe_stands_beside(models: Path, run: Run) -> None:
    words = [
        "--task",
        "models/math",
        "--language",
        "models/swahili",
        "--bottom",
        "1",
        "--top",
        "1",
        "--transition",
        "0",
    ]
    status, out, errors = run("layer_swap", *words, "results/swap")
    assert (status, out) == (0, "")
    assert "5 tensors" in errors
    # bottom and top layer of the language expert, and the norm, which is outside the layers
    assert list(values(models / "results/swap").values()) == [5, 2, 2, 5, 5]
    assert (models / "results/swap.yaml").read_text() == (
        "# Written by `portmanteau do layer_swap`.\n"
        "models:\n"
        "  task: ../models/math\n"
        "  language: ../models/swahili\n"
        "merge:\n"
        "  layer_swap:\n"
        "    task: task\n"
        "    language: language\n"
        "    bottom: 1\n"
        "    top: 1\n"
        "    transition: 0\n"
    )
    receipt = json.loads((models / "results/swap/portmanteau.json").read_text())
    assert receipt["recipe"]["text"] == (models / "results/swap.yaml").read_text()


def test_an_operator_takes_models_with_weights_or_settings_of_their_own(models: Path, run: Run) -> None:
    words = ["--base", "models/base", "--model", "models/math=0.5", "--model", "models/swahili={weight: 2}"]
    assert run("task_arithmetic", *words, "--scale", "0.5", "--dtype", "float64", "out")[0] == 0
    # 1 + 0.5 · (0.5 · (2 − 1) + 2 · (5 − 1)) = 5.25
    assert set(values(models / "out").values()) == {5.25}
    written = yaml.safe_load((models / "out.yaml").read_text())
    assert written["models"] == {"math": "./models/math", "swahili": "./models/swahili", "base": "./models/base"}
    assert written["merge"]["task_arithmetic"]["models"] == {"math": 0.5, "swahili": {"weight": 2}}
    assert written["output"] == {"dtype": "float64"}


TWO = ["--models", "models/math", "--models", "models/swahili"]  # of 2 and of 5


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["linear", *TWO, "--weight", "{models/math: 3, models/swahili: 1}"], [2.75, 2.75]),
        (["linear", *TWO, "--weight", "{models/math: [0, 1], models/swahili: [1, 0]}"], [5, 5]),
        (["linear", "--model", "models/math=3", "--model", "models/swahili=1", "--no-normalize"], [11, 11]),
        (["average", *TWO, "--weights", "[1, 3]"], [4.25, 4.25]),
        (["average", "--models", "models/[ms]*", "--shared", ""], [3.5, 3.5]),
        (["copy", "--model", "{path: models/math}"], [2, 2]),
        (["assemble", "--part", "*norm*=models/base", "--part", "*=models/math"], [2, 1]),
        (["slices", "--part", "{model: models/math, layers: [0, 2]}", "--part", "{model: models/swahili}"], [2, 5]),
        (["linear", *TWO, "--rule", "{tensors: '*norm*', operator: copy, models: [models/swahili]}"], [3.5, 5]),
    ],
)
def test_lists_patterns_mappings_and_yaml_are_read(
    words: list[str], expected: list[float], models: Path, run: Run
) -> None:
    status, _, errors = run(*words, "out")
    assert status == 0, errors
    made = values(models / "out")
    assert [made["model.layers.0.mlp.up_proj.weight"], made["model.norm.weight"]] == expected


def test_a_dry_run_prints_the_recipe_that_a_run_writes(models: Path, run: Run) -> None:
    words = ["ties", "--base", "models/base", "--model", "models/math=0.6", "--model", "models/swahili", "out"]
    status, printed, _ = run(*words, "--dry-run")
    assert (status, names_in(models)) == (0, ["models"])
    assert run(*words)[0] == 0
    assert (models / "out.yaml").read_text() == printed


def test_the_written_recipe_builds_the_same_from_anywhere(
    models: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    absolute = str(models / "models" / "base")
    words = ["dare", "--base", absolute, "--model", "models/math", "--model", "models/swahili", "deep/er/out"]
    assert run(*words)[0] == 0
    monkeypatch.chdir("/")
    assert CliRunner().invoke(app, ["build", str(models / "deep/er/out.yaml"), str(models / "again")]).exit_code == 0
    assert values(models / "again") == values(models / "deep/er/out")


def test_what_stands_there_is_left_alone_unless_forced(models: Path, run: Run) -> None:
    (models / "out.yaml").write_text("mine")
    words = ["copy", "--model", "models/math", "out"]
    status, _, errors = run(*words)
    assert (status, errors) == (
        1,
        "out.yaml: exists already\n  hint: choose another name, or replace it with --force\n",
    )
    assert not (models / "out").exists()
    assert (models / "out.yaml").read_text() == "mine"
    assert run(*words, "--force")[0] == 0
    assert "out: up to date\n" in run(*words)[2]
    assert "out: exists already" in run("copy", "--model", "models/base", "out")[2]


@pytest.mark.parametrize("out", [".", "..", "/"])
def test_a_result_has_a_name(out: str, models: Path, run: Run) -> None:
    status, _, errors = run("copy", "--model", "models/math", out)
    assert (status, errors.splitlines()[0]) == (1, f"{out}: names no folder to make")


def test_the_same_command_again_goes_on_with_the_recipe_that_it_wrote(models: Path, run: Run) -> None:
    words = ["copy", "--model", "models/math", "out"]
    (models / "out.yaml").write_text(run(*words, "--dry-run")[1])
    assert run(*words)[0] == 0


def test_infinity_is_refused_or_built_as_it_is_told(models: Path, run: Run) -> None:
    save_file({"model.norm.weight": torch.full((1,), torch.inf)}, models / "models" / "infinite.safetensors")
    words = ("copy", "--model", "models/infinite.safetensors", "out")
    assert run(*words)[0] == 1
    status, _, told = run(*words, "--force", "--non-finite", "warn")
    assert status == 0, told
    assert values(models / "out") == {"model.norm.weight": torch.inf}


def test_mistakes_name_their_options_all_at_once(models: Path, run: Run) -> None:
    words = ["--task", "models/mth", "--language", "models/swahili", "--bottom", "x", "--blend", "3", "--modules", "{a"]
    status, out, errors = run("layer_swap", *words, "out")
    assert (status, out) == (1, "")
    assert errors.splitlines() == [
        "--task: no model, file or folder 'models/mth'",
        "  hint: did you mean 'math'?",
        "--modules: not valid YAML: expected ',' or '}', but got '<stream end>'",
        "  hint: a bracket or a comma is missing, in this line or above",
        "--bottom: bottom is 'x': input should be a valid integer, unable to parse string as an integer",
        "--blend: blend is 3: input should be less than or equal to 1",
    ]
    assert names_in(models) == ["models"]


def test_what_does_not_fit_the_models_names_its_option_too(models: Path, run: Run) -> None:
    words = ["--task", "models/math", "--language", "models/swahili", "--bottom", "9", "--top", "0", "out"]
    status, _, errors = run("layer_swap", *words)
    assert (status, errors.splitlines()[0]) == (
        1,
        "--bottom: layer_swap: model.layers has 4 layers, and bottom 9 + top 0 + transitions 1 = 10 are asked for",
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["tise", "out"], "Did you mean 'ties'"),
        (["ties", "--model", "models/math", "out"], "Missing option '--base'"),
        (["ties", "--dense", "0.3", "out"], "No such option: --dense"),
        (["ties", "--model", "models/math", "--base", "models/base"], "Missing argument 'out'"),
    ],
)
def test_wrong_usage_ends_with_status_2(words: list[str], said: str, models: Path, run: Run) -> None:
    status, _, errors = run(*words)
    assert status == 2
    assert said in " ".join(errors.replace("│", " ").split())


@pytest.mark.parametrize("name", names())
def test_every_one_has_a_command_whose_help_names_every_key(name: str) -> None:
    told = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["do", name, "--help"])
    assert told.exit_code == 0
    declared = [option.key for option in options(name)]
    assert OF_BUILD.isdisjoint(declared)
    assert [key for key in declared if f"--{key.replace('_', '-')}" not in told.output] == []


def test_help_shows_type_bounds_default_and_meaning() -> None:
    told = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["do", "ties", "--help"]).output
    line = next(line for line in told.splitlines() if "--density" in line)
    assert "share of entries of largest magnitude that is kept; float, > 0, ≤ 1; default: 0.2" in " ".join(line.split())


def test_every_operator_that_a_recipe_may_name_has_its_settings() -> None:
    for name in names():
        if name in operators():
            assert {option.key for option in options(name)} >= {"models", "rules", *operators()[name].settings}


def test_help_imports_neither_torch_nor_transformers(models: Path) -> None:
    program = (
        "import sys; from portmanteau.cli import app\n"
        "try: app(['do', 'ties', '--help'])\n"
        "except SystemExit as end: assert not end.code\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize(
    ("words", "completed"),
    [
        ("portmanteau do layer", {"layer_swap"}),
        ("portmanteau do ties --den", {"--density"}),
        ("portmanteau do ties --mod", {"--models", "--model"}),
        ("portmanteau show geo", {"geometric_median"}),
        ("portmanteau new --kind slerp", {"slerp"}),
    ],
)
def test_the_shell_completes_names_and_settings(words: str, completed: set[str]) -> None:
    asked = {"_PORTMANTEAU_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(len(words.split()) - 1)}
    command = [sys.executable, "-c", "from portmanteau.cli import app; app(prog_name='portmanteau')"]
    done = subprocess.run(command, env={**os.environ, **asked}, capture_output=True, text=True, timeout=60, check=True)
    assert set(done.stdout.split()) == completed
