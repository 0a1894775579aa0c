"""The command line as a user meets it: statuses, streams, JSON, and what is not imported."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.conftest import SaveLlama

COMMAND = str(Path(sys.executable).with_name("portmanteau"))


def run(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [COMMAND, *map(str, arguments)], capture_output=True, text=True, cwd=cwd, timeout=120, check=False
    )


@pytest.fixture
def recipe(save_llama: SaveLlama, tmp_path: Path) -> Path:
    """Give a layer swap of two small Llamas."""
    save_llama("task", seed=1)
    save_llama("language", seed=2)
    path = tmp_path / "swap.yaml"
    path.write_text("merge:\n  layer_swap: {task: task, language: language, bottom: 2, top: 1}\n")
    return path


def test_build_makes_a_folder_and_speaks_on_stderr_only(recipe: Path, tmp_path: Path) -> None:
    done = run("build", recipe, tmp_path / "out")
    assert (done.returncode, done.stdout) == (0, "")
    assert "75 tensors" in done.stderr
    assert len(load_file(tmp_path / "out" / "model.safetensors")) == 75


def test_build_prints_its_receipt_as_json(recipe: Path, tmp_path: Path) -> None:
    done = run("build", recipe, tmp_path / "out", "--json")
    printed = json.loads(done.stdout)
    written = json.loads((tmp_path / "out" / "portmanteau.json").read_text())
    assert printed["outputs"] == written["outputs"]
    assert written["recipe"]["text"] == recipe.read_text()
    assert [entry["checkpoint"] for entry in written["inputs"]] == ["language", "task"]


def test_an_existing_folder_is_left_alone_unless_forced(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run("build", recipe, out).returncode == 0
    (out / "model.safetensors").write_bytes(b"mine")
    done = run("build", recipe, out)
    assert (done.returncode, done.stdout) == (1, "")
    assert "exists already" in done.stderr
    assert "hint:" in done.stderr
    assert (out / "model.safetensors").read_bytes() == b"mine"
    assert run("build", recipe, out, "--force").returncode == 0
    assert len(load_file(out / "model.safetensors")) == 75


def test_force_does_not_replace_a_folder_that_is_not_ours(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "home"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    done = run("build", recipe, out, "--force")
    assert done.returncode == 1
    assert "not built by portmanteau" in done.stderr
    assert (out / "thesis.tex").read_text() == "years of work"


def test_a_mistake_ends_with_status_1_and_no_traceback(recipe: Path, tmp_path: Path) -> None:
    recipe.write_text(recipe.read_text().replace("bottom: 2", "bottom: 20"))
    for command in (["build", recipe, tmp_path / "out"], ["plan", recipe], ["check", recipe]):
        done = run(*command)
        assert (done.returncode, done.stdout) == (1, "")
        assert f"{recipe}:2: layer_swap: model.layers has 8 layers" in done.stderr
        assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments",
    [["build"], ["nonsense"], ["plan", "x.yaml", "--threads", "none"], ["build", "x", "y", "--memory", "big"]],
)
def test_wrong_usage_ends_with_status_2(arguments: list[str], tmp_path: Path) -> None:
    assert run(*arguments, cwd=tmp_path).returncode == 2


def test_a_missing_recipe_is_named(tmp_path: Path) -> None:
    done = run("plan", "nowhere.yaml", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("nowhere.yaml: no such file")


def test_plan_shows_every_kind_of_step_with_its_line(recipe: Path) -> None:
    plan = json.loads(run("plan", recipe, "--json").stdout)
    rows = {(row["operator"], row["of"]): (row["tensors"], row["why"]) for row in plan["steps"]}
    why = f"{recipe}:2"
    # 9 tensors a layer, 3 outside: language has 2 + 1 layers and the outside, 2 layers are mixed, 3 are the task's
    assert rows == {
        ("copy", "language"): (30, why),
        ("linear", "language, task"): (18, why),
        ("copy", "task"): (27, why),
    }
    assert plan["bytes_written"] == sum(row["bytes"] for row in plan["steps"])


def test_check_says_that_a_recipe_is_good(recipe: Path) -> None:
    done = run("check", recipe)
    assert (done.returncode, done.stderr) == (0, "")
    assert "good" in done.stdout


def test_show_lists_everything_and_explains_one(tmp_path: Path) -> None:
    names = [row["name"] for row in json.loads(run("show", "--json").stdout)]
    assert names == [
        "assemble",
        "average",
        "average_adapters",
        "emr_task",
        "extract_lora",
        "extract_sparse",
        "fisher",
        "layer_swap",
        "lora",
        "revert_sparse",
        "slices",
        "sparse_fine_tune",
        "stack_adapters",
        "swap_lora",
        "arcee_fusion",
        "breadcrumbs",
        "consensus",
        "copy",
        "dare",
        "della",
        "emr",
        "equal",
        "fisher_mean",
        "geometric_median",
        "karcher",
        "linear",
        "median",
        "model_stock",
        "multislerp",
        "nearswap",
        "nuslerp",
        "ram",
        "sce",
        "slerp",
        "task_arithmetic",
        "ties",
        "tsv",
    ]
    shown = run("show", "ties").stdout
    assert "2306.01708" in shown
    assert "share of entries of largest magnitude" in shown
    done = run("show", "tise")
    assert (done.returncode, "did you mean 'ties'?" in done.stderr) == (1, True)


def test_inspect_shows_stacks_and_tensors(recipe: Path, tmp_path: Path) -> None:
    found = json.loads(run("inspect", tmp_path / "task", "--tensors", "--json").stdout)
    assert [(group["where"], group["layers"], group["tensors"]) for group in found["groups"]] == [
        ("outside the layers", "", 3),
        ("model.layers", "8", 72),
    ]
    assert {"name": "model.norm.weight", "dtype": "F32", "shape": [16], "bytes": 64} in found["list"]


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["plan", "{}"], ["check", "{}"], ["convert", "{}"], ["show"], ["show", "ties"], ["inspect", "task"]],
)
def test_what_reads_no_weights_imports_neither_torch_nor_transformers(recipe: Path, arguments: list[str]) -> None:
    program = (
        "import sys; from portmanteau.cli import app\n"
        "try: app(sys.argv[1:])\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "print({name for name in ('torch', 'transformers') if name in sys.modules}, file=sys.stderr)"
    )
    words = [word.format(recipe) for word in arguments]
    done = subprocess.run(
        [sys.executable, "-c", program, *words],
        capture_output=True,
        text=True,
        cwd=recipe.parent,
        check=True,
        timeout=60,
    )
    assert done.stderr.strip().splitlines()[-1] == "set()"


def test_a_plain_swap_is_built_without_torch(recipe: Path, tmp_path: Path) -> None:
    recipe.write_text(recipe.read_text().replace("top: 1", "top: 1, transition: 0"))
    program = (
        "import sys; from portmanteau.cli import app\n"
        "try: app(sys.argv[1:])\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program, "build", str(recipe), str(tmp_path / "out")], check=True, timeout=60)
    assert len(load_file(tmp_path / "out" / "model.safetensors")) == 75


def test_an_interrupt_ends_with_status_130_and_says_what_stays(save_llama: SaveLlama, tmp_path: Path) -> None:
    for name in ("a", "b", "base"):
        save_llama(name, hidden_size=256, intermediate_size=1024, vocab_size=20_000)
    recipe = tmp_path / "ties.yaml"
    recipe.write_text("merge: {ties: {base: base, models: [a, b]}}")
    process = subprocess.Popen([COMMAND, "build", recipe, tmp_path / "out"], stderr=subprocess.PIPE, text=True)
    work = tmp_path / ".out.portmanteau-partial"
    deadline = time.monotonic() + 60
    while not work.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, "Traceback" in errors) == (130, False)
    assert "interrupted: " in errors
    assert not (tmp_path / "out").exists()
    assert work.exists() == ("the same command continues" in errors) != ("nothing was written" in errors)


def test_a_result_that_is_up_to_date_is_left_alone(recipe: Path, tmp_path: Path) -> None:
    assert run("build", recipe, tmp_path / "out").returncode == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    done = run("build", recipe, tmp_path / "out", "--json")
    assert (done.returncode, json.loads(done.stdout)["outcome"]) == (0, "up to date")
    assert "out: up to date" in run("build", recipe, tmp_path / "out").stderr
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before
    recipe.write_text(recipe.read_text().replace("bottom: 2", "bottom: 3"))
    done = run("build", recipe, tmp_path / "out")
    assert done.returncode == 1
    assert "exists already, and is not what is asked for: the recipe changed" in done.stderr


def test_verify_names_a_damaged_tensor_and_a_damaged_file(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run("build", recipe, out).returncode == 0
    done = run("verify", out, "--rebuild")
    assert (done.returncode, done.stderr) == (0, "")
    assert "whole, and the recipe gives these bits: 75 tensors" in done.stdout
    raw = bytearray((out / "model.safetensors").read_bytes())
    raw[-1] ^= 1
    (out / "model.safetensors").write_bytes(raw)
    (out / "config.json").write_text("{}")
    done = run("verify", out, "--json")
    damaged = {Path(one["where"].split(":")[0]).name: one["where"] for one in json.loads(done.stdout)["damaged"]}
    assert done.returncode == 1
    assert damaged.keys() == {"model.safetensors", "config.json"}
    last = max(_offsets(out / "model.safetensors").items(), key=lambda item: item[1])[0]
    assert damaged["model.safetensors"].endswith(f"tensor {last}")


def _offsets(path: Path) -> dict[str, int]:
    raw = path.read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    return {name: entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"}


def test_a_locked_build_takes_no_other_input(recipe: Path, tmp_path: Path) -> None:
    assert "there is no lock" in run("build", recipe, tmp_path / "out", "--locked").stderr
    assert run("lock", recipe).returncode == 0
    assert run("build", recipe, tmp_path / "out", "--locked").returncode == 0
    config = tmp_path / "task" / "generation_config.json"
    config.write_text(config.read_text() + "\n")
    done = run("build", recipe, tmp_path / "other", "--locked")
    assert (done.returncode, "Traceback" in done.stderr) == (1, False)
    assert f"{config}: is not the file that was locked" in done.stderr
    assert not (tmp_path / "other").exists()


def test_nan_stops_a_build_unless_it_is_asked_for(recipe: Path, tmp_path: Path) -> None:
    path = tmp_path / "task" / "model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-4:] = (0x7FC00000).to_bytes(4, "little")
    path.write_bytes(raw)
    last = max(_offsets(path).items(), key=lambda item: item[1])[0]
    recipe.write_text("merge: {linear: {models: [task, language]}}")
    done = run("build", recipe, tmp_path / "out")
    assert (done.returncode, "Traceback" in done.stderr) == (1, False)
    assert f"tensor {last} of task: 1 of " in done.stderr
    assert "--non-finite keep" in done.stderr
    done = run("build", recipe, tmp_path / "out", "--non-finite", "warn")
    assert done.returncode == 0
    assert f"note: tensor {last} of task: 1 of " in done.stderr
    done = run("build", recipe, tmp_path / "kept", "--non-finite", "keep")
    assert (done.returncode, "NaN" in done.stderr) == (0, False)


def test_progress_is_drawn_on_a_terminal(recipe: Path, tmp_path: Path) -> None:
    mine, its = pty.openpty()
    done = subprocess.run(
        [COMMAND, "build", recipe, tmp_path / "out"], stderr=its, stdout=subprocess.PIPE, check=True, timeout=60
    )
    os.close(its)
    seen = b""
    while b"75/75 tensors" not in seen:
        try:
            seen += os.read(mine, 4096)
        except OSError:
            break
    os.close(mine)
    assert b"75/75 tensors" in seen
    assert done.stdout == b""


def test_convert_prints_a_recipe_that_builds_the_same_bytes(save_llama: SaveLlama, tmp_path: Path) -> None:
    for seed, name in enumerate("ab"):
        save_llama(name, seed=seed)
    path = tmp_path / "mergekit.yml"
    path.write_text(
        "merge_method: slerp\nbase_model: a\nmodels: [{model: a}, {model: b}]\n"
        "parameters: {t: [{filter: mlp, value: [0, 1]}, {value: 0.5}]}\ndtype: bfloat16\n"
    )
    done = run("convert", path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == (
        "models: {a: a, b: b}\n"
        "merge:\n"
        "  slerp:\n"
        "    models: [a, b]\n"
        "    t:\n"
        "    - {tensors: '*mlp*', value: [0, 1]}\n"
        "    - {value: 0.5}\n"
        "output: {dtype: bfloat16}\n"
    )
    (tmp_path / "native.yaml").write_text(done.stdout)
    for name in ("mergekit.yml", "native.yaml"):
        assert run("build", tmp_path / name, tmp_path / f"{name}-out").returncode == 0
    one, other = (tmp_path / f"{name}-out" / "model.safetensors" for name in ("mergekit.yml", "native.yaml"))
    assert one.read_bytes() == other.read_bytes()
