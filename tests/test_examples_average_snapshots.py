"""The measurement of checkpoint averaging in `examples/`: that it runs, what it writes, that its means are means."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file

from tests.example_scripts import EXAMPLES, imported, run_quickly

RUNS = ("grid-0.0001-32/seed-0", "grid-0.0001-32/seed-1", "grid-0.001-32/seed-0", "grid-0.001-32/seed-1")
Snapshot = dict[str, NDArray[Any]]


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run the script once, in its quick form: 64 examples, 4 epochs of 2 steps, 2 learning rates, 2 seeds."""
    return run_quickly("average_snapshots", tmp_path_factory.mktemp("average_snapshots"))


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Import the script."""
    return imported("average_snapshots", monkeypatch)


def results(folder: Path) -> Any:
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


def snapshots(folder: Path, run: str) -> list[Snapshot]:
    return [load_file(folder / "runs" / run / f"checkpoint-{step}" / "model.safetensors") for step in (2, 4, 6, 8)]


def test_every_run_leaves_one_snapshot_an_epoch_and_no_optimizer(quick: Path) -> None:
    for run in (*RUNS, "head-0.001-32/seed-1000", "control-0.001-32/seed-0"):
        found = {path.name: {file.name for file in path.iterdir()} for path in (quick / "runs" / run).iterdir()}
        assert sorted(found) == ["checkpoint-2", "checkpoint-4", "checkpoint-6", "checkpoint-8"]
        files = {"config.json", "model.safetensors", "trainer_state.json", "training_args.bin"}
        assert all(content == files for content in found.values())


@pytest.mark.parametrize("run", RUNS)
def test_portmanteaus_average_is_the_mean_that_numpy_takes_in_float64(
    quick: Path, script: ModuleType, run: str
) -> None:
    trained = script.Run(1e-3, 32, 0, quick / "runs" / run)
    found, every = script.averages(trained.snapshots, 0.5), snapshots(quick, run)
    kept = {"last": every[3:], "average": every, "average, first half left out": every[2:]}
    assert list(found) == list(kept)
    for name, chosen in kept.items():
        assert set(found[name].specs) == set(every[0])
        for tensor in every[0]:
            expected = np.mean([one[tensor].astype(np.float64) for one in chosen], axis=0)
            np.testing.assert_allclose(found[name][tensor].numpy(), expected, rtol=3e-7, atol=1e-9, err_msg=tensor)


def test_the_encoder_is_trained_and_the_head_of_all_runs_is_the_given_one(quick: Path) -> None:
    given = snapshots(quick, "head-0.001-32/seed-1000")[-1]
    head = [name for name in given if name.startswith("classifier.")]
    assert len(head) == 4
    for run in RUNS:
        first, *_, last = snapshots(quick, run)
        assert all(np.array_equal(one[name], given[name]) for one in (first, last) for name in head)
        changed = [name for name in first if not np.array_equal(first[name], last[name])]
        assert any(name.startswith("roberta.encoder.layer.0.") for name in changed)
    own = [snapshots(quick, f"control-0.001-32/seed-{seed}")[-1] for seed in (0, 1)]
    assert not np.array_equal(own[0]["classifier.dense.weight"], own[1]["classifier.dense.weight"])


def test_the_results_hold_every_cell_of_the_grid_and_the_refusal_of_heads_trained_apart(quick: Path) -> None:
    found = results(quick)
    keys = ("learning_rate", "batch", "seed")
    assert [[row[key] for key in keys] for row in found["runs"]] == [
        [1e-4, 32, 0],
        [1e-4, 32, 1],
        [1e-3, 32, 0],
        [1e-3, 32, 1],
    ]
    names = ("last", "average", "average, first half left out")
    scores = [score for row in found["runs"] for name in names for score in row[name].values()]
    assert len(scores) == 4 * 3 * 2
    assert all(round(score * 50) == pytest.approx(score * 50) for score in scores)  # of 50 questions
    groups = found["averages over the seeds"]
    assert [(group["learning_rate"], group["batch"]) for group in groups] == [(1e-4, 32), (1e-3, 32)]
    assert all(set(group["last"]) == set(group["all"]) == {"source", "target"} for group in groups)
    assert "classifier" in found["control: heads of their own"]["refusal"]


def test_the_tables_are_those_of_the_results(quick: Path, script: ModuleType) -> None:
    assert (quick / "tables.md").read_text(encoding="utf-8") == script.tables(results(quick)) + "\n"


def test_a_table_gives_mean_and_standard_deviation(script: ModuleType) -> None:
    assert script.spread([0.5, 0.6, 0.7]) == "0.600 (0.100)"


@pytest.mark.parametrize(("name", "world"), [("decaying", 0), ("constant", 1)])
def test_the_committed_page_shows_the_committed_results_of_each_setting(
    script: ModuleType, name: str, world: int
) -> None:
    committed = json.loads((EXAMPLES / f"average_snapshots_{name}.json").read_text(encoding="utf-8"))
    setting = json.loads(json.dumps(asdict(script.SETTINGS[name])))
    assert {key: committed["setting"][key] for key in setting} == setting
    assert (committed["setting"]["split"], committed["setting"]["world"]) == ("test", world)
    for table in script.tables(committed).split("\n\n"):
        assert table in (EXAMPLES / "average_snapshots.md").read_text(encoding="utf-8")


def test_a_gain_is_counted_only_in_the_language_in_which_the_average_is_better(script: ModuleType) -> None:
    last = {"source": 0.5, "target": 0.5}
    found = [{"source": 0.6, "target": 0.4}, {"source": 0.5, "target": 0.6}, {"source": 0.4, "target": 0.6}]
    runs = [{"last": last, "average": average} for average in found]
    assert [script.above(runs, where) for where in ("source", "target")] == [1, 2]


def test_wrong_labels_are_as_many_as_asked_for_and_leave_the_pairs_alone(script: ModuleType) -> None:
    world = script.World(0)
    (pairs, labels), (same, noisy) = (world.task(4000, "A", "train", noise) for noise in (0.0, 0.1))
    assert pairs.equal(same)
    assert 0.08 < (labels != noisy).double().mean() < 0.12  # standard error 0.005
    assert set(noisy.tolist()) == {0, 1, 2}


def test_the_learning_rate_falls_in_one_setting_and_stays_in_the_other(
    quick: Path, script: ModuleType, tmp_path: Path
) -> None:
    script_of_one_run = (
        f"import sys; sys.path.insert(0, {str(EXAMPLES)!r}); from pathlib import Path; import average_snapshots as a\n"
        f"a.Run(1e-3, 32, 0, Path({str(tmp_path)!r})).train("
        f"a.World(0), a.QUICK(a.SETTINGS['constant']), Path({str(quick / 'runs' / 'encoder')!r}), None)"
    )
    subprocess.run([sys.executable, "-c", script_of_one_run], check=True, capture_output=True)
    rates = {}
    for name, folder in (("decaying", quick / "runs" / "grid-0.001-32" / "seed-0"), ("constant", tmp_path)):
        state = json.loads((folder / "checkpoint-8" / "trainer_state.json").read_text(encoding="utf-8"))
        rates[name] = [line["learning_rate"] for line in state["log_history"] if "learning_rate" in line]
    assert rates["constant"] == [1e-3] * 4
    assert rates["decaying"] == sorted(rates["decaying"], reverse=True)
    assert rates["decaying"][-1] < 2e-4
