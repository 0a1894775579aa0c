"""Several experts and their base: task vectors against numpy in fp64, ranks against its SVD, and `diff` of several."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from portmanteau import compositions, merge
from portmanteau.merge.differences import delta_ranks as ranking
from portmanteau.merge.differences.task_vectors import Meeting, measure, met
from portmanteau.merge.evaluate import GRID, Session
from portmanteau.merge.operator import Parts

COMMAND = str(Path(sys.executable).with_name("portmanteau"))
Save = Callable[[str, Mapping[str, Tensor]], Path]


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([COMMAND, *map(str, arguments)], capture_output=True, text=True, timeout=120, check=False)


def test_two_small_task_vectors_meet_as_paper_says() -> None:
    deltas = torch.tensor([[3.0, 0.0, -1.0, 2.0], [4.0, 5.0, 1.0, 0.0]])
    (meeting,) = measure(Parts.whole(deltas, torch.ones(4))).meetings
    # both changed entries 0 and 2; they pull apart in entry 2; the top 1 % of 4 entries is one: entry 0, and entry 1
    assert meeting == Meeting(
        entries=4,
        both=2,
        opposed=1,
        product=11,
        square_one=14,
        square_other=42,
        top_one=1,
        top_other=1,
        top_both=0,
        top_chance=0.25,
    )
    assert (meeting.sign_conflicts, meeting.changed_by_both, meeting.top_overlap) == (0.5, 0.5, 0.0)
    assert meeting.cosine == pytest.approx(11 / np.sqrt(14 * 42), rel=1e-12)


def top_of(delta: np.ndarray) -> set[int]:
    """The most changed 1 %, rounded up, by a stable sort; entries that did not change are none."""
    order = np.argsort(-np.abs(delta), kind="stable")[: int(np.ceil(len(delta) / 100))]
    return {int(i) for i in order if delta[i] != 0}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stored_experts_meet_as_numpy_says(dtype: torch.dtype, save_tensors: Save) -> None:
    torch.manual_seed(7)
    base = torch.randn(300, 700).to(dtype)
    common = torch.randn(300, 700) * (torch.rand(300, 700) < 0.5)
    experts = [(base.float() + 0.1 * common + 0.05 * i * torch.randn(300, 700)).to(dtype) for i in range(3)]
    opened = [merge.open(save_tensors(f"e{i}", {"w.weight": one})) for i, one in enumerate(experts)]
    found = compositions.compare(opened, merge.open(save_tensors("base", {"w.weight": base})))
    deltas = [(one.float() - base.float()).double().numpy().ravel() for one in experts]
    for pair, (i, j) in zip(found.pairs, [(0, 1), (0, 2), (1, 2)], strict=True):
        one, other = deltas[i], deltas[j]
        both = (one != 0) & (other != 0)
        tops = top_of(one), top_of(other)
        meeting = pair.tensors[0].meeting
        assert (pair.one, pair.other) == (opened[i].label, opened[j].label)
        assert meeting.both == both.sum()
        assert meeting.opposed == (both & (np.sign(one) != np.sign(other))).sum()
        assert meeting.cosine == pytest.approx(one @ other / np.linalg.norm(one) / np.linalg.norm(other), rel=1e-9)
        assert (meeting.top_one, meeting.top_other) == (len(tops[0]), len(tops[1]))
        assert meeting.top_both == len(tops[0] & tops[1])
        assert meeting.top_chance == pytest.approx(len(tops[0]) * len(tops[1]) / len(one), rel=1e-12)


def test_each_expert_of_several_has_the_changes_that_it_has_alone(save_tensors: Save) -> None:
    torch.manual_seed(8)
    base = {f"h.{i}.{m}.weight": torch.randn(40, 30) for i in range(3) for m in ("attn.q", "mlp")}
    folders = [
        save_tensors(name, {key: tensor + 0.1 * torch.randn(40, 30) for key, tensor in base.items()}) for name in "abc"
    ]
    stored = merge.open(save_tensors("base", base))
    together = compositions.compare([merge.open(folder) for folder in folders], stored)
    for one, folder in zip(together.changes, folders, strict=True):
        assert one.tensors == compositions.changes(merge.open(folder), stored).tensors


def test_no_number_of_several_depends_on_parts_or_on_what_is_kept(save_tensors: Save) -> None:
    torch.manual_seed(9)
    base = {"h.0.mlp.weight": torch.randn(700, 300), "h.1.mlp.weight": torch.randn(700, 300)}
    opened = [
        merge.open(save_tensors(name, {k: t + 0.1 * torch.randn(700, 300) for k, t in base.items()})) for name in "ab"
    ]
    stored = merge.open(save_tensors("base", base))
    small, large = (
        compositions.compare(opened, stored, ranks="sampled", session=session)
        for session in (Session(GRID, keep=0), Session(8 * GRID, threads=3))
    )
    assert small == large


def test_meetings_add_up_as_one_tensor_would_save_the_top() -> None:
    torch.manual_seed(10)
    deltas, base = torch.randn(2, 1000), torch.ones(1000)
    (whole,) = measure(Parts.whole(deltas, base)).meetings
    halves = [measure(Parts.whole(deltas[:, run], base[run])).meetings[0] for run in (slice(0, 500), slice(500, 1000))]
    added = met(halves)
    assert (added.entries, added.both, added.opposed) == (1000, whole.both, whole.opposed)
    assert added.cosine == pytest.approx(whole.cosine, rel=1e-12)
    assert (added.top_one, added.top_chance) == (10, 0.1)  # five of each half; 2 · 5 · 5 / 500


def test_what_did_not_change_meets_nothing() -> None:
    (meeting,) = measure(Parts.whole(torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.ones(2))).meetings
    assert (meeting.cosine, meeting.sign_conflicts, meeting.top_overlap, meeting.changed_by_both) == (
        None,
        None,
        None,
        0,
    )


# ---------------------------------------------------------------------------------------------------------------- ranks


def rank_by_svd(delta: Tensor) -> int:
    squares = np.linalg.svd(delta.double().numpy(), compute_uv=False) ** 2
    return int(np.searchsorted(np.cumsum(squares), 0.9 * squares.sum())) + 1


@pytest.mark.parametrize("shape", [(40, 300), (300, 40), (64, 64)])
def test_ranks_are_those_of_numpys_svd(shape: tuple[int, int], save_tensors: Save) -> None:
    torch.manual_seed(11)
    base = torch.randn(shape)
    experts = [base + torch.randn(shape[0], rank) @ torch.randn(rank, shape[1]) for rank in (3, 20)]
    opened = [merge.open(save_tensors(f"e{i}", {"w.weight": one})) for i, one in enumerate(experts)]
    found = compositions.compare(opened, merge.open(save_tensors("base", {"w.weight": base})), ranks="sampled")
    for changes, expert in zip(found.changes, experts, strict=True):
        rank = changes.tensors[0].rank
        assert rank is not None
        assert (rank.rank, rank.most, rank.is_sampled) == (rank_by_svd(expert - base), min(shape), False)
    assert not any("estimates" in note for note in found.notes)


def test_a_large_matrix_is_sampled_and_that_is_said(save_tensors: Save, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranking, "_SIDE", 32)
    monkeypatch.setattr(ranking, "_ROWS", 20)
    torch.manual_seed(12)
    base = torch.zeros(60, 50)
    expert = torch.randn(60, 2) @ torch.randn(2, 50)
    pair = merge.open(save_tensors("e", {"w.weight": expert})), merge.open(save_tensors("b", {"w.weight": base}))
    found = compositions.compare([pair[0]], pair[1], ranks="sampled")
    rank = found.changes[0].tensors[0].rank
    assert rank == ranking.Rank(2, 20, 20, 60)
    assert "the ranks of 1 matrices are estimates from 20 of their rows, drawn at random: w.weight" in found.notes[-1]
    exact = compositions.compare([pair[0]], pair[1], ranks="exact").changes[0].tensors[0].rank
    assert exact == ranking.Rank(rank_by_svd(expert), 50, 60, 60)


def test_of_several_matrices_the_mean_rank_is_shown_weighted_by_entries(save_tensors: Save) -> None:
    base = {"h.0.a.weight": torch.zeros(4, 4), "h.0.b.weight": torch.zeros(4, 2), "h.0.c.bias": torch.zeros(4)}
    expert = {name: torch.ones(tensor.shape) for name, tensor in base.items()}
    pair = save_tensors("e", expert), save_tensors("b", base)
    found = compositions.compare([merge.open(pair[0])], merge.open(pair[1]), ranks="exact").changes[0]
    assert [row.rank_share for row in found.modules] == [0.25, 0.5, None]
    assert found.rank_share == (16 * 0.25 + 8 * 0.5) / 24
    printed = run("diff", *reversed(pair), "--ranks", "exact", "--tensors").stdout.splitlines()
    assert [line.split()[-3:] for line in printed if "h.0.a" in line] == [["1", "of", "4"]]


def test_a_change_of_zero_has_rank_zero(save_tensors: Save) -> None:
    both = [merge.open(save_tensors(name, {"w.weight": torch.ones(4, 3), "v.weight": torch.ones(3)})) for name in "ab"]
    rows = compositions.compare(both[:1], both[1], ranks="sampled").changes[0].tensors
    assert [row.rank for row in rows] == [None, ranking.Rank(0, 3, 4, 4)]


# ---------------------------------------------------------------------------------------------------------- the command


@pytest.fixture
def family(save_tensors: Save) -> tuple[Path, Path, Path]:
    """Give two experts and their base: two layers; in the first they pull apart, in the second together."""
    names = [f"model.layers.{i}.mlp.up_proj.weight" for i in range(2)] + ["model.norm.weight"]
    ones = {name: torch.ones(2, 2) for name in names}
    return (
        save_tensors("math", {name: tensor + 0.25 for name, tensor in ones.items()}),
        save_tensors("swahili", {name: t + (-0.125 if ".0." in name else 0.125) for name, t in ones.items()}),
        save_tensors("base", ones),
    )


def test_diff_of_several_shows_experts_pairs_and_layers(family: tuple[Path, Path, Path]) -> None:
    done = run("diff", *family[:2], "--base", family[2])
    assert (done.returncode, done.stderr) == (0, "")
    rows = [line.split() for line in done.stdout.splitlines() if "model.layers" in line]
    assert [" ".join(row) for row in rows] == [
        "model.layers.0 25 % 12.5 % -1.000 100 %",
        "model.layers.1 25 % 12.5 % 1.000 0 %",
    ]
    (pair,) = [line for line in done.stdout.splitlines() if " · " in line]
    assert pair.split()[3:6] == ["0.333", "33.33", "%"]  # (−4 + 4 + 4) / 12 of 1/32 each; 4 of 12 entries


def test_json_and_csv_of_several_name_expert_and_other(family: tuple[Path, Path, Path], tmp_path: Path) -> None:
    done = run("diff", *family[:2], "--base", family[2], "--json", "--csv", tmp_path / "d.csv", "--ranks", "exact")
    printed = json.loads(done.stdout)
    assert [one["expert"] for one in printed["experts"]] == [str(family[0]), str(family[1])]
    assert [row["cosine"] for row in printed["pairs"][0]["layers"]] == [-1.0, 1.0, 1.0]
    assert printed["experts"][0]["modules"][0]["rank"] == 1
    lines = (tmp_path / "d.csv").read_text(encoding="utf-8").splitlines()
    assert len(set(lines[0].split(","))) == len(lines[0].split(","))
    written = list(csv.DictReader(lines))
    assert [(row["expert"], row["other"], row["relative"], row["cosine"]) for row in written[::3]] == [
        (str(family[0]), "", "0.25", ""),
        (str(family[1]), "", "0.125", ""),
        (str(family[0]), str(family[1]), "", "-1.0"),
    ]


def test_a_model_named_twice_is_refused(family: tuple[Path, Path, Path]) -> None:
    done = run("diff", family[0], family[0], "--base", family[2])
    assert done.returncode == 1
    assert "is named twice" in done.stderr
