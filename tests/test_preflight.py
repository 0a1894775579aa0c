"""Preflight: everything that could stop a build is said at once, before a byte of weights is read or downloaded."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from portmanteau import compositions, merge
from portmanteau.compositions import preflight

Save = Callable[[str, Mapping[str, Tensor]], Path]


@pytest.fixture
def recipe(tmp_path: Path, save_tensors: Save) -> Path:
    """Save two models a and b of 4 × 4 bytes, and a recipe that merges them."""
    for name in ("a", "b"):
        save_tensors(name, {"x": torch.ones(4)})
    path = tmp_path / "recipe.yaml"
    path.write_text("merge: {linear: {models: [a, b]}}\n")
    return path


def findings(path: Path, out: Path | None = None, *, force: bool = False) -> list[str]:
    with pytest.raises(merge.PortmanteauError) as caught:
        preflight(path, out, force=force)
    return [f"{m.where.removeprefix(str(path.parent))}: {m.what}" for m in caught.value.mistakes]


def test_a_good_recipe_gives_its_plan_and_nothing_to_download(recipe: Path, tmp_path: Path) -> None:
    ready = preflight(recipe, tmp_path / "out")
    assert (ready.plan.bytes_written, ready.bytes_to_download) == (16, 0)
    assert not (tmp_path / "out").exists()


def test_broken_shards_and_the_place_of_the_result_are_said_at_once(recipe: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        weights = tmp_path / name / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1])
    (tmp_path / "out").mkdir()
    found = findings(recipe, tmp_path / "out")
    assert [part for part in found if "not a whole safetensors file (16 bytes of data promised, 15 are there)" in part]
    assert [("/a/" in f, "/b/" in f, f == "/out: exists already") for f in found] == [
        (True, False, False),
        (False, True, False),
        (False, False, True),
    ]


def test_mistakes_in_the_text_and_the_place_of_the_result_are_said_at_once(recipe: Path, tmp_path: Path) -> None:
    recipe.write_text("merge: {linear: {models: [a, nothing]}}\noutput: {dtpe: fp16}\n")
    (tmp_path / "file").write_text("")
    assert findings(recipe, tmp_path / "file" / "out") == [
        "/recipe.yaml:1: no model, file or folder 'nothing'",
        "/recipe.yaml:2: unknown key 'dtpe'",
        f"/file/out: {tmp_path / 'file'} is a file",
    ]


def test_every_step_that_does_not_fit_is_named(recipe: Path, save_tensors: Save) -> None:
    save_tensors("c", {"x": torch.ones(5)})
    recipe.write_text(
        "steps:\n  one: {linear: {models: [a, c]}}\n  two: {linear: {models: [b, c]}}\n"
        "merge: {linear: {models: [one, two]}}\n"
    )
    assert findings(recipe) == [
        "/recipe.yaml:2: linear: tensor x: shapes differ: a [4], c [5]",
        "/recipe.yaml:3: linear: tensor x: shapes differ: b [4], c [5]",
    ]


def test_the_space_that_is_needed_counts_the_companions(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (tmp_path / "a" / "vocab.json").open("wb") as file:
        file.truncate(10**9)  # a hole: it takes no space
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10**9))
    assert findings(recipe, tmp_path / "out") == [f"/out: needs 1.1 GB, and {tmp_path} has 1.0 GB free"]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2 * 10**9))
    preflight(recipe, tmp_path / "out")


def test_rights_are_looked_at_for_companions_and_for_the_result(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a" / "tokenizer.model").write_bytes(b"")
    forbidden = {tmp_path / "a" / "tokenizer.model": os.R_OK, tmp_path: os.W_OK}
    monkeypatch.setattr(os, "access", lambda path, mode: not forbidden.get(Path(path), 0) & mode)
    found = findings(recipe, tmp_path / "out")
    assert len(found) == 2
    assert found[0].endswith("a/tokenizer.model: there is no right to read it")
    assert found[1] == f"/out: no right to write in {tmp_path}"


def test_a_name_that_leaves_no_room_for_temporary_ones_is_refused(recipe: Path, tmp_path: Path) -> None:
    assert findings(recipe, tmp_path / ("o" * 240)) == [f"/{'o' * 240}: is no name for a folder"]


def test_preflight_reads_no_weights(recipe: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(merge.StoredCheckpoint, "read", refuse)
    monkeypatch.setattr(merge.StoredCheckpoint, "read_into", refuse)
    assert len(compositions.preflight(recipe, tmp_path / "out").plan.steps) == 1
