"""The benchmarks themselves: their inputs, their arithmetic, and that they run; what they measure is not tested."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

BENCHMARKS = Path(__file__).with_name("benchmarks")


def script(name: str) -> ModuleType:
    """Load a benchmark's module; it stands in no package."""
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def run(name: str, *arguments: object) -> str:
    command = [sys.executable, BENCHMARKS / f"{name}.py", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def loaded(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


def cells(printed: str) -> list[list[str]]:
    """Take a printed table apart: its rows without titles."""
    lines = [line for line in printed.splitlines() if line.startswith("|")][2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_inputs_are_a_base_and_a_fine_tuning_of_it_in_shards(tmp_path: Path) -> None:
    run("inputs", tmp_path, "base", "one", "--scale", "tiny")
    base, one = loaded(tmp_path / "base"), loaded(tmp_path / "one")
    assert len(list((tmp_path / "base").glob("*.safetensors"))) > 1
    assert len(base) == 6 * 9 + 3  # tensors of six layers, and embedding, norm and head
    every, tuned = (torch.cat([model[name].flatten() for name in base]).double() for model in (base, one))
    assert every.std().item() == pytest.approx(0.02, rel=0.02)
    assert (tuned - every).std().item() == pytest.approx(0.002, rel=0.02)


def test_entries_are_rounded_to_bf16_as_torch_rounds_them() -> None:
    values = np.array([0.02, -0.3333, 1.00390625, 1.01171875, 3e-39, -0.0], dtype=np.float32)  # two of them halfway
    expected = torch.from_numpy(values).bfloat16().view(torch.int16).numpy().view(np.uint16)
    np.testing.assert_array_equal(script("inputs")._bf16(values), expected)


def test_headers_alone_take_no_disk(tmp_path: Path) -> None:
    run("inputs", tmp_path, "base", "--scale", "70B", "--headers")
    status = [path.stat() for path in (tmp_path / "base").glob("*.safetensors")]
    assert sum(one.st_size for one in status) == pytest.approx(2 * 70.55e9, rel=0.001)  # Llama 3.1 70B in bf16
    assert sum(one.st_blocks for one in status) * 512 < 1_000_000


def figures(path: Path, name: str, scale: str, rounds: list[dict[str, tuple[float, float, int]]]) -> Path:
    costs = [
        {program: dict(zip(("seconds", "processor", "peak"), cost, strict=True)) for program, cost in one.items()}
        for one in rounds
    ]
    raw: dict[str, Any] = {"machine": "a machine", "rows": [{"name": name, "scale": scale, "rounds": costs}]}
    path.write_text(json.dumps(raw))
    return path


ROUNDS = [  # medians: peer 12 s, ours 2 s, cp 1 s; 600 MB
    {"peer": (11.0, 20.0, 3_000_000_000), "ours": (2.0, 3.0, 600_000_000), "cp": (1.0, 0.5, 20_000_000)},
    {"peer": (12.0, 21.0, 3_000_000_000), "ours": (1.0, 3.0, 600_000_000), "cp": (3.0, 0.5, 20_000_000)},
    {"peer": (99.0, 22.0, 3_000_000_000), "ours": (5.0, 4.0, 600_000_000), "cp": (0.5, 0.5, 20_000_000)},
]


def test_the_table_gives_medians_with_ranges_and_says_which_targets_are_missed(tmp_path: Path) -> None:
    printed = run("run", "--table", figures(tmp_path / "f.json", "linear", "1.1B", ROUNDS))
    (row,) = cells(printed)
    assert printed.splitlines()[2].count("|") == len(row) + 1
    assert row[:5] == ["linear", "mergekit", "12.00 (11.00–99.00)", "2.00 (1.00–5.00)", "1.00 (0.50–3.00)"]
    assert row[5:9] == ["6.0", "≥ 6", "2.00", "≤ 1.5"]
    assert row[9:] == ["3000", "600", "≤ 500", "21.0", "3.0", "not met: cp, memory"]


def test_targets_hold_only_for_models_of_the_size_that_they_were_set_for(tmp_path: Path) -> None:
    (row,) = cells(run("run", "--table", figures(tmp_path / "f.json", "linear", "0.1B", ROUNDS)))
    assert (row[0], row[6], row[8], row[11], row[-1]) == ("linear (0.1B)", "–", "–", "–", "–")


def test_a_target_without_its_peer_is_not_met(tmp_path: Path) -> None:
    alone = [{"ours": (1.0, 1.0, 50_000_000), "cp": (1.0, 0.5, 20_000_000)}]
    (row,) = cells(run("run", "--table", figures(tmp_path / "f.json", "passthrough", "1.1B", alone)))
    assert row[-1] == "not met: peer"


def test_the_benchmark_runs_and_leaves_nothing_but_its_inputs(tmp_path: Path) -> None:
    kept = tmp_path / "kept.json"
    options = ("--work", tmp_path, "--scale", "tiny", "--runs", 1, "--alone", "--json", kept)
    printed = run("run", *options, "--rows", "passthrough,layer_swap")
    assert [row[0] for row in cells(printed)] == ["passthrough (tiny)", "layer_swap (tiny)"]
    assert cells(run("run", "--table", kept)) == cells(printed)
    assert {path.name for path in tmp_path.iterdir()} == {"tiny", "kept.json"}
    assert {path.name for path in (tmp_path / "tiny").iterdir()} == {"one", "two"}


def test_the_scaling_benchmark_runs(tmp_path: Path) -> None:
    (row,) = cells(run("scaling", "--work", tmp_path, "--scales", "tiny", "--rows", "copy", "--runs", 1))
    assert (row[0], row[1], row[8], row[-1]) == ("copy", "tiny", "1.00", "met")


def test_the_planning_benchmark_runs(tmp_path: Path) -> None:
    rows = cells(run("planning", "--work", tmp_path, "--runs", 1))
    assert [row[0] for row in rows][:2] == ["plan, 70B × 4", "check, 70B × 4"]
    assert {path.name for path in tmp_path.iterdir()} == {"70B", "tiny"}


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="descendants are found in /proc")
def test_memory_is_that_of_all_processes_together(tmp_path: Path) -> None:
    hold = "import time; held = b'x' * 100_000_000; time.sleep(1)"
    both = f'{sys.executable} -c "{hold}" & {sys.executable} -c "{hold}"; wait'
    # in a small process: what is started counts the memory of what starts it as its own, until it is another program
    code = f"import pathlib, process; print(process.measure(['sh', '-c', {both!r}], pathlib.Path('log')))"
    env = {**os.environ, "PYTHONPATH": str(BENCHMARKS)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True, check=True
    )
    seconds, _, peak = (float(one.partition("=")[2]) for one in done.stdout.strip(")\n").split(", "))
    assert 200e6 < peak < 300e6
    assert seconds >= 1


def test_a_process_that_ends_while_it_is_looked_at_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(*_: object) -> NoReturn:
        raise FileNotFoundError

    monkeypatch.setattr(Path, "glob", gone)  # as /proc is when a process ends between two looks
    assert [*script("process")._tree(1)] == [1]


@pytest.mark.mergekit
def test_peer_and_we_swap_the_same_layers(tmp_path: Path) -> None:
    rows = script("rows")
    run("inputs", tmp_path, "one", "two", "--scale", "tiny")
    outs = {program: tmp_path / program for program in ("peer", "ours")}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for program, command in (("peer", rows.peer_command), ("ours", rows.our_command)):
        made = command(rows.ROWS["layer_swap"], tmp_path, tmp_path / f"{program}.yaml", outs[program])
        subprocess.run(made, check=True, capture_output=True, env={**os.environ, "PATH": path})
    theirs, ours = loaded(outs["peer"]), loaded(outs["ours"])
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in ours)
