"""Checkpoint and run averaging: which snapshots meet, with which weights, and what is refused or noted."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path
from textwrap import dedent

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from portmanteau import compositions, merge


def snapshot(folder: Path, step: int, tensors: Mapping[str, Tensor], loss: float | None = None) -> None:
    """Save a snapshot as the Trainer does: checkpoint-STEP with its state."""
    place = folder / f"checkpoint-{step}"
    place.mkdir(parents=True)
    save_file(dict(tensors), place / "model.safetensors")
    if loss is not None:
        history = [{"loss": loss, "step": step}, {"eval_loss": 1.0, "step": step}]
        (place / "trainer_state.json").write_text(json.dumps({"global_step": step, "log_history": history}))


def numbered(value: float) -> dict[str, Tensor]:
    return {"encoder.layer.0.dense.weight": torch.full((2, 2), value), "classifier.weight": torch.full((2,), 1.0)}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Give a run with snapshots at steps 90, 100, 1000 and 2000, of 0, 1, 3 and 8."""
    for step, value in ((90, 0.0), (100, 1.0), (1000, 3.0), (2000, 8.0)):
        snapshot(tmp_path / "run", step, numbered(value))
    return tmp_path / "run"


def averaged(tmp_path: Path, keys: str) -> merge.Composed:
    path = tmp_path / "average.yaml"
    path.write_text(dedent(f"merge: {{average: {{{keys}}}}}"))
    return compositions.compose(compositions.load(path))


def entry(merged: merge.Checkpoint) -> float:
    return float(merged["encoder.layer.0.dense.weight"][0, 0])


def labels(merged: merge.Composed) -> tuple[str, ...]:
    step = merged.node("encoder.layer.0.dense.weight")
    assert isinstance(step, merge.Step)
    return step.labels


@pytest.mark.usefixtures("run")
def test_a_pattern_finds_the_snapshots_in_the_order_of_their_steps(tmp_path: Path) -> None:
    merged = averaged(tmp_path, "models: run/checkpoint-*")
    assert labels(merged) == tuple(f"run/checkpoint-{step}" for step in (90, 100, 1000, 2000))
    assert entry(merged) == 3.0


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ("weights: [1, 1, 1, 3]", (0 + 1 + 3 + 24) / 6),
        ("weights: {exponential: 0.5}", (0 * 0.125 + 1 * 0.25 + 3 * 0.5 + 8) / 1.875),
        ("skip_first: 0.25", 4.0),
        ("skip_first: 0.3", 4.0),
        ("skip_first: 2", 5.5),
        ("last: 1", 8.0),
        ("last: 2, weights: [3, 1]", (9 + 8) / 4),
        ("skip_first: 3, last: 3", 8.0),
    ],
)
@pytest.mark.usefixtures("run")
def test_weights_and_selection_are_those_on_paper(tmp_path: Path, keys: str, expected: float) -> None:
    assert entry(averaged(tmp_path, f"models: run/checkpoint-*, {keys}")) == pytest.approx(expected, rel=1e-6)


@pytest.mark.usefixtures("run")
def test_one_path_stands_for_a_list_of_one(tmp_path: Path) -> None:
    assert entry(averaged(tmp_path, "models: run/checkpoint-1000")) == 3.0


def test_every_snapshot_or_every_run_weighs_the_same(tmp_path: Path) -> None:
    for step, value in ((1, 0.0), (2, 3.0)):
        snapshot(tmp_path / "seed-1", step, numbered(value))
    snapshot(tmp_path / "seed-2", 1, numbered(9.0))
    assert entry(averaged(tmp_path, "models: seed-*/checkpoint-*")) == 4.0  # (0 + 3 + 9) / 3
    assert entry(averaged(tmp_path, "models: seed-*/checkpoint-*, over: runs")) == 5.25  # (1.5 + 9) / 2
    assert entry(averaged(tmp_path, "models: seed-*/checkpoint-*, last: 1")) == 6.0  # (3 + 9) / 2


def test_heads_that_were_trained_apart_are_refused_with_the_reason(tmp_path: Path) -> None:
    snapshot(tmp_path / "seed-1", 1, numbered(1.0))
    snapshot(tmp_path / "seed-2", 1, numbered(2.0) | {"classifier.weight": torch.tensor([1.0, 2.0])})
    with pytest.raises(merge.MergeError, match=r"classifier\.weight.*\n.*trained apart cannot be averaged"):
        merge.build(averaged(tmp_path, "models: seed-*/checkpoint-*"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    merged = averaged(tmp_path, 'models: seed-*/checkpoint-*, shared: ""')
    assert merged["classifier.weight"].tolist() == [1.0, 1.5]


def test_one_run_may_train_its_head(tmp_path: Path) -> None:
    snapshot(tmp_path / "run", 1, numbered(1.0))
    snapshot(tmp_path / "run", 2, numbered(2.0) | {"classifier.weight": torch.tensor([1.0, 2.0])})
    assert averaged(tmp_path, "models: run/checkpoint-*")["classifier.weight"].tolist() == [1.0, 1.5]


def test_counters_come_from_the_last_snapshot_and_running_statistics_are_noted(tmp_path: Path) -> None:
    for step in (1, 2):
        tensors = {"bn.num_batches_tracked": torch.tensor(step), "bn.running_mean": torch.full((2,), float(step))}
        snapshot(tmp_path / "run", step, numbered(1.0) | tensors)
    merged = averaged(tmp_path, "models: run/checkpoint-*")
    assert int(merged["bn.num_batches_tracked"]) == 2
    assert merged["bn.running_mean"].tolist() == [1.5, 1.5]
    assert merged.notes == (
        "1 tensors that are no floats come from the last snapshot: bn.num_batches_tracked",
        "1 running statistics are averaged; recompute them on data: bn.running_mean",
    )


def test_a_first_snapshot_far_from_the_end_is_noted(tmp_path: Path) -> None:
    for step, loss in ((1, 4.0), (2, 1.2), (3, 1.0)):
        snapshot(tmp_path / "run", step, numbered(1.0), loss)
    assert averaged(tmp_path, "models: run/checkpoint-*").notes == (
        "run/checkpoint-1: the training loss was 4 there, 1 at the end; skip_first leaves it out",
    )
    assert averaged(tmp_path, "models: run/checkpoint-*, skip_first: 1").notes == ()


@pytest.fixture
def five_runs(tmp_path: Path) -> list[merge.Checkpoint]:
    """Give the two snapshots each of five runs: run i has 10 i and 10 i + 1."""
    for i in range(5):
        for step in (1, 2):
            snapshot(tmp_path / f"seed-{i}", step, numbered(10.0 * i + step - 1))
    return [merge.open(tmp_path / f"seed-{i}" / f"checkpoint-{step}") for i in range(5) for step in (1, 2)]


def order_on_paper(seed: int, count: int) -> list[int]:
    """Sort the runs by a number drawn for each."""
    dice = random.Random(seed)
    return [i for _, i in sorted((dice.random(), i) for i in range(count))]


def test_the_first_runs_are_taken_as_listed(tmp_path: Path, five_runs: list[merge.Checkpoint]) -> None:
    merged = averaged(tmp_path, "models: seed-*/checkpoint-*, first_runs: 2, last: 1")
    assert labels(merged) == ("seed-0/checkpoint-2", "seed-1/checkpoint-2")
    assert merged.notes == ("of 5 runs, these are taken: seed-0/checkpoint-1 … seed-0/checkpoint-2, "
                            "seed-1/checkpoint-1 … seed-1/checkpoint-2",)  # fmt: skip
    assert len(five_runs) == 10


@pytest.mark.usefixtures("five_runs")
def test_a_seed_has_one_order_and_more_runs_are_more_of_it(tmp_path: Path) -> None:
    order = order_on_paper(3, 5)
    assert order != sorted(order)
    for count in range(1, 6):
        merged = averaged(tmp_path, f"models: seed-*/checkpoint-*, shuffle_runs: 3, first_runs: {count}")
        assert labels(merged) == tuple(f"seed-{i}/checkpoint-{step}" for i in order[:count] for step in (1, 2))
        assert entry(merged) == pytest.approx(np.mean([10 * i + 0.5 for i in order[:count]]), rel=1e-6)
        assert merged.notes[0].startswith(f"of 5 runs, shuffled with seed 3, these are taken: seed-{order[0]}/")
    two = averaged(tmp_path, "models: seed-*/checkpoint-*, shuffle_runs: 3, first_runs: 2, last: 1")
    receipt = merge.build(two, tmp_path / "out")
    assert [one["checkpoint"] for one in receipt.inputs] == [f"seed-{i}/checkpoint-2" for i in order[:2]]
    assert "shuffled with seed 3" in receipt.notes[0]


def test_accumulative_averages_are_the_running_means(five_runs: list[merge.Checkpoint]) -> None:
    found = [entry(merged) for merged in compositions.accumulative_averages(models=five_runs, shuffle_runs=7)]
    mean, expected = 0.0, []
    for k, i in enumerate(order_on_paper(7, 5), start=1):
        mean += (10 * i + 0.5 - mean) / k  # m_k = m_(k-1) + (x_k - m_(k-1)) / k
        expected.append(mean)
    assert found == pytest.approx(expected, rel=1e-6)
    few = compositions.accumulative_averages(models=five_runs, first_runs=2, last=1)
    assert [entry(merged) for merged in few] == [1.0, 6.0]


@pytest.mark.parametrize(
    ("keys", "what"),
    [
        ("first_runs: 6", "of 5 runs the first 6 cannot be taken"),
        ("shuffle_runs: 1", "the average of all runs does not depend on their order"),
        ("shuffle_runs: 1, first_runs: 1, weights: [1, 2]", "are in the order of the list, and the runs are shuffled"),
        ("first_runs: 0", "should be greater than 0"),
    ],
)
@pytest.mark.usefixtures("five_runs")
def test_an_order_of_runs_that_decides_nothing_is_refused(tmp_path: Path, keys: str, what: str) -> None:
    with pytest.raises(merge.RecipeError, match=r"average\.yaml:1") as caught:
        averaged(tmp_path, f"models: seed-*/checkpoint-*, {keys}")
    assert what in str(caught.value)


@pytest.mark.parametrize(
    ("keys", "what"),
    [
        ("models: nowhere/checkpoint-*", "nothing is called 'nowhere/checkpoint-*'"),
        ("models: run/checkpoint-*, weights: [1, 2]", "2 weights for 4 snapshots"),
        ("models: run/checkpoint-*, skip_first: 4", "of 4 snapshots none is left"),
        ("models: run/checkpoint-*, weights: {exponential: 2}", "should be less than or equal to 1"),
        ("models: run/checkpoint-*, skip_frist: 1", "unknown key 'skip_frist'"),
    ],
)
@pytest.mark.usefixtures("run")
def test_a_mistake_is_named(tmp_path: Path, keys: str, what: str) -> None:
    with pytest.raises(merge.RecipeError, match=r"average\.yaml:1") as caught:
        averaged(tmp_path, keys)
    assert what in str(caught.value)


def test_the_mean_is_that_of_numpy_and_of_torch(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(3)
    states = [{"layer.weight": torch.randn(50, 40, generator=generator).to(torch.bfloat16)} for _ in range(7)]
    for step, state in enumerate(states):
        snapshot(tmp_path / "run", step, state)
    merge.build(averaged(tmp_path, "models: run/checkpoint-*"), tmp_path / "out")
    found = merge.open(tmp_path / "out")["layer.weight"]
    in_numpy = np.mean([state["layer.weight"].double().numpy() for state in states], axis=0)
    assert torch.equal(found, torch.from_numpy(in_numpy).to(torch.bfloat16))
    model = torch.nn.ParameterDict({"weight": states[0]["layer.weight"].float()})
    swa = AveragedModel(model)
    for state in states:
        model["weight"].data.copy_(state["layer.weight"].float())
        swa.update_parameters(model)
    torch.testing.assert_close(found.float(), swa.module["weight"].data, rtol=2**-8, atol=1e-6)
