"""Builds that would fill the memory give back to the system's cache what they have read and written."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from portmanteau import merge
from portmanteau.compositions import tensorwise
from portmanteau.merge.files import storage

pytestmark = pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="the system takes no advice")
Asked = tuple[str, int, int]
SIZE = 4 * 4096  # bytes of each tensor


@pytest.fixture
def models(save_tensors: Callable[[str, Mapping[str, Tensor]], Path]) -> list[Path]:
    """Save two models of two tensors each: 64 KiB of weights, and 32 KiB of what is made of them."""
    return [save_tensors(name, {w: torch.full((4096,), float(i)) for w in "vw"}) for i, name in enumerate("ab")]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Asked]:
    """Note down what the system is asked to drop: folder, offset, bytes."""
    found: list[Asked] = []

    def advise(descriptor: int, offset: int, count: int, advice: int) -> None:
        assert advice == os.POSIX_FADV_DONTNEED
        found.append((Path(f"/proc/self/fd/{descriptor}").readlink().parent.name, offset, count))

    monkeypatch.setattr(os, "posix_fadvise", advise)
    return found


def places(model: Path) -> list[Asked]:
    """Read from a header where the tensors are."""
    raw = (model / "model.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    header.pop("__metadata__", None)
    return [(model.name, 8 + length + entry["data_offsets"][0], SIZE) for entry in header.values()]


@pytest.mark.parametrize("operator", ["linear", "slerp", "median", "copy"])  # compiled, measured, by torch, as bytes
def test_every_tensor_is_given_back_after_its_last_reading(
    operator: str, models: list[Path], asked: list[Asked], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = models[:1] if operator == "copy" else models
    monkeypatch.setattr(storage, "physical_memory", lambda: 6 * SIZE)  # at least 4 are read and written
    merged = tensorwise(operator, models={model.name: merge.open(model) for model in models})
    merge.build(merged, tmp_path / "out", threads=1)
    *read, written = asked
    assert sorted(read) == sorted(place for model in models for place in places(model))
    assert written == ("result", 0, 0)  # the whole file, once it has reached the disk


def test_what_two_steps_read_is_given_back_once_and_by_the_last(
    models: list[Path], asked: list[Asked], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "physical_memory", lambda: 1)
    model = merge.open(models[0])
    twice = merge.Composed("twice", {"one": model.node("w"), "two": model.node("w")}, model.companions)
    before: list[int] = []

    class Watching(merge.Progress):
        def advance(self, nbytes: int, tensors: int = 0) -> None:
            if tensors:
                before.append(len(asked))

    merge.build(twice, tmp_path / "out", threads=1, progress=Watching())
    assert before == [0, 1]  # dropped after the second tensor is made, not after the first
    assert [one for one in asked if one[0] == "a"] == places(models[0])[1:]


def test_smaller_builds_leave_the_cache_as_it_is(models: list[Path], asked: list[Asked], tmp_path: Path) -> None:
    made = tensorwise("linear", models={model.name: merge.open(model) for model in models})
    merge.build(made, tmp_path / "out")
    assert asked == []


def test_where_the_system_does_not_tell_its_memory_nothing_is_dropped(
    models: list[Path], asked: list[Asked], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "physical_memory", lambda: None)
    merge.build(tensorwise("copy", models={"a": merge.open(models[0])}), tmp_path / "out")
    assert asked == []
