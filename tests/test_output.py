"""The output folder: whole or not there, and never over anything that is not ours."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from portmanteau import merge
from portmanteau.merge import OutputError, StoredCheckpoint
from portmanteau.merge.results import output as output_module
from portmanteau.merge.results.output import published, readable

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def model(tmp_path: Path) -> StoredCheckpoint:
    """A checkpoint of one tensor of four bytes."""
    save_file({"x": torch.ones(1)}, tmp_path / "in.safetensors")
    return merge.open(tmp_path / "in.safetensors")


def listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_result_has_weights_receipt_and_card(model: StoredCheckpoint, tmp_path: Path) -> None:
    merge.build(model, tmp_path / "deep" / "out")
    assert listing(tmp_path / "deep") == ["out"]
    assert listing(tmp_path / "deep" / "out") == ["README.md", "model.safetensors", "portmanteau.json"]


def test_an_existing_result_is_kept_without_force(model: StoredCheckpoint, tmp_path: Path) -> None:
    merge.build(model, tmp_path / "out")
    refusal = r"out: exists already, and is not what is asked for: the dtype changed\n  hint: .* --force"
    with pytest.raises(OutputError, match=refusal):
        merge.build(model, tmp_path / "out", dtype="float64")


def test_force_replaces_what_portmanteau_built(model: StoredCheckpoint, tmp_path: Path) -> None:
    merge.build(model, tmp_path / "out")
    (tmp_path / "out" / "left-over").write_text("old")
    merge.build(model, tmp_path / "out", force=True)
    assert "left-over" not in listing(tmp_path / "out")
    assert listing(tmp_path) == ["in.safetensors", "out"]


def test_force_fills_an_empty_folder(model: StoredCheckpoint, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    merge.build(model, tmp_path / "out", force=True)
    assert load_file(tmp_path / "out" / "model.safetensors")["x"].item() == 1.0


def test_force_replaces_no_folder_of_another_kind(model: StoredCheckpoint, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    with pytest.raises(OutputError, match="was not built by portmanteau"):
        merge.build(model, tmp_path / "out", force=True)
    assert (tmp_path / "out" / "thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize("kind", ["file", "link to a result", "broken link"])
def test_force_replaces_no_file_and_no_link(kind: str, model: StoredCheckpoint, tmp_path: Path) -> None:
    out, result = tmp_path / "out", tmp_path / "result"
    if kind == "file":
        out.write_text("mine")
    else:
        out.symlink_to(result, target_is_directory=True)
    if kind == "link to a result":
        merge.build(model, result)
    with pytest.raises(OutputError, match="was not built by portmanteau"):
        merge.build(model, out, force=True)
    with pytest.raises(OutputError, match="exists already"):
        merge.build(model, out)
    assert out.is_file() or out.is_symlink()


def test_a_file_in_the_way_is_named(model: StoredCheckpoint, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"in\.safetensors is a file"):
        merge.build(model, tmp_path / "in.safetensors" / "out")


def test_too_little_space_is_found_before_any_work(
    model: StoredCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slack = output_module._SLACK
    monkeypatch.setattr(shutil, "disk_usage", lambda place: Usage(0, 0, slack + 3))
    with pytest.raises(OutputError, match=r"needs 67\.1 MB, and .* has 67\.1 MB free\n  hint: free some space"):
        merge.build(model, tmp_path / "new" / "out")
    assert listing(tmp_path) == ["in.safetensors"]
    monkeypatch.setattr(shutil, "disk_usage", lambda place: Usage(0, 0, slack + 4))
    merge.build(model, tmp_path / "new" / "out")


def test_the_space_asked_for_is_that_of_the_output_dtype(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({"x": torch.ones(1000)}, tmp_path / "in.safetensors")
    monkeypatch.setattr(shutil, "disk_usage", lambda place: Usage(0, 0, output_module._SLACK + 2000))
    with pytest.raises(OutputError, match="needs"):
        merge.build(merge.open(tmp_path / "in.safetensors"), tmp_path / "out")
    merge.build(merge.open(tmp_path / "in.safetensors"), tmp_path / "out", dtype="bfloat16")


def test_a_disk_that_fills_up_is_a_clear_message_and_leaves_nothing(
    model: StoredCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OutputError, match="out: cannot be written: No space left on device"):
        merge.build(model, tmp_path / "out")
    assert listing(tmp_path) == ["in.safetensors"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_an_error_while_filling_leaves_nothing(error: type[BaseException], tmp_path: Path) -> None:
    def fill() -> None:
        with published(tmp_path / "out") as work:
            work.result.mkdir()
            (work.result / "half").write_text("x")
            raise error

    with pytest.raises(error):
        fill()
    assert listing(tmp_path) == []


def test_an_error_while_filling_keeps_the_earlier_result(model: StoredCheckpoint, tmp_path: Path) -> None:
    merge.build(model, tmp_path / "out")
    before = (tmp_path / "out" / "portmanteau.json").read_bytes()

    def fill() -> None:
        with published(tmp_path / "out"):
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fill()
    assert (tmp_path / "out" / "portmanteau.json").read_bytes() == before
    assert listing(tmp_path) == ["in.safetensors", "out"]


def test_a_rename_that_fails_puts_the_earlier_result_back(
    model: StoredCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merge.build(model, tmp_path / "out")
    before = (tmp_path / "out" / "portmanteau.json").read_bytes()
    rename = Path.rename

    def refuse(path: Path, target: Path) -> Path:
        if path.name == "result":
            raise OSError(errno.EACCES, "Permission denied")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(OutputError, match="cannot be written: Permission denied"):
        merge.build(model, tmp_path / "out", force=True)
    assert (tmp_path / "out" / "portmanteau.json").read_bytes() == before
    monkeypatch.undo()
    assert merge.build(model, tmp_path / "out", force=True).outcome == "continued"
    assert listing(tmp_path) == ["in.safetensors", "out"]


def test_a_result_may_replace_its_own_input(model: StoredCheckpoint, tmp_path: Path) -> None:
    merge.build(model, tmp_path / "out")
    merge.build(merge.open(tmp_path / "out"), tmp_path / "out", dtype="float64", force=True)
    assert load_file(tmp_path / "out" / "model.safetensors")["x"].dtype == torch.float64


def test_the_receipt_is_json(model: StoredCheckpoint, tmp_path: Path) -> None:
    merge.build(model, tmp_path / "out", recipe="merge: {}\n")
    receipt = json.loads((tmp_path / "out" / "portmanteau.json").read_text())
    assert receipt["recipe"]["text"] == "merge: {}\n"
    assert list(receipt["outputs"]) == ["x"]


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (5e9, "5.0 GB"), (1.5e12, "1.5 TB"), (2e15, "2000.0 TB")],
)
def test_sizes_are_written_for_people(nbytes: float, text: str) -> None:
    assert readable(nbytes) == text
