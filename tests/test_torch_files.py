"""Legacy PyTorch files: every way of saving a state dict, and nothing in them is ever run."""

from __future__ import annotations

import io
import json
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from portmanteau import merge
from portmanteau.merge import CheckpointError


def state(zipped: bool = True) -> dict[str, Tensor]:
    """Tensors of several dtypes and shapes; one a view into another, one not contiguous."""
    small = {"float8": torch.tensor([1.5, -2.0, 0.0]).to(torch.float8_e4m3fn)}  # the old format has no such storage
    table = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    return {
        "embed.weight": table,
        "head.weight": table,
        "view": table[1:],
        "transposed": table.t(),
        "half": torch.tensor([1.5, -2.0]).bfloat16(),
        **(small if zipped else {}),
        "ids": torch.arange(5),
        "flags": torch.tensor([True, False]),
        "scalar": torch.tensor(7.0),
        "empty": torch.zeros(0, 3),
        "parameter": torch.nn.Parameter(torch.ones(2)),
    }


def assert_same(path: Path, expected: dict[str, Tensor]) -> None:
    opened = merge.open(path)
    assert list(opened) == list(expected)
    for name, tensor in expected.items():
        found = opened[name]
        assert (opened.specs[name].shape, found.dtype) == (tensor.shape, tensor.dtype)
        assert not found.requires_grad
        torch.testing.assert_close(found.float(), tensor.detach().float(), rtol=0, atol=0)


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth"])
@pytest.mark.parametrize("zipped", [True, False])
def test_both_formats_under_each_suffix_are_read(suffix: str, zipped: bool, tmp_path: Path) -> None:
    path = tmp_path / f"weights{suffix}"
    torch.save(state(zipped), path, _use_new_zipfile_serialization=zipped)
    assert zipfile.is_zipfile(path) == zipped
    assert_same(path, state(zipped))


@pytest.mark.parametrize("zipped", [True, False])
def test_a_build_turns_them_into_safetensors(zipped: bool, tmp_path: Path) -> None:
    torch.save(state(zipped), tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    merge.build(merge.open(tmp_path), tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == state(zipped).keys()
    for name, tensor in state(zipped).items():
        assert found[name].dtype == tensor.dtype
        torch.testing.assert_close(found[name].float(), tensor.detach().float(), rtol=0, atol=0)


@pytest.mark.parametrize("zipped", [True, False])
def test_storages_saved_on_a_gpu_are_read_on_the_processor(
    zipped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "pytorch_model.bin"
    with monkeypatch.context() as patched:
        patched.setattr(torch.serialization, "location_tag", lambda storage: "cuda:3")
        torch.save({"x": torch.arange(3.0)}, path, _use_new_zipfile_serialization=zipped)
    raw = zipfile.ZipFile(path).read("pytorch_model/data.pkl") if zipped else path.read_bytes()
    assert b"cuda:3" in raw
    assert_same(tmp_path, {"x": torch.tensor([0.0, 1.0, 2.0])})


def test_shards_with_an_index_are_read(tmp_path: Path) -> None:
    names = ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"]
    torch.save({"a": torch.ones(2)}, tmp_path / names[0])
    torch.save({"b": torch.zeros(3)}, tmp_path / names[1])
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"a": names[0], "b": names[1]}}))
    assert_same(tmp_path, {"a": torch.ones(2), "b": torch.zeros(3)})


def test_safetensors_are_preferred_to_pickles(tmp_path: Path) -> None:
    torch.save({"x": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    save_file({"x": torch.ones(1)}, tmp_path / "model.safetensors")
    assert_same(tmp_path, {"x": torch.ones(1)})


def test_what_a_trainer_keeps_beside_the_weights_is_no_weights(tmp_path: Path) -> None:
    torch.save({"x": torch.ones(1)}, tmp_path / "weights.bin")
    for name in ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state_0.pth"):
        (tmp_path / name).write_bytes(b"no weights")
    assert_same(tmp_path, {"x": torch.ones(1)})


@pytest.mark.parametrize(
    "wrapped",
    [
        {"state_dict": {"x": torch.ones(2)}, "epoch": 3, "hyper_parameters": {"lr": 0.1}},
        {"model": {"x": torch.ones(2)}, "optimizer": {"state": {}}},
        {"state_dict": {"model": {"x": torch.ones(2)}}},
        {"x": torch.ones(2), "_metadata": {"version": 1}, "step": 7, "name": "run"},
    ],
)
def test_the_weights_of_a_training_snapshot_are_found(wrapped: dict[str, Any], tmp_path: Path) -> None:
    torch.save(wrapped, tmp_path / "last.pt")
    assert_same(tmp_path / "last.pt", {"x": torch.ones(2)})


def test_the_metadata_of_a_modules_state_dict_is_passed_over(tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(2, 1).state_dict(), tmp_path / "x.pt")
    assert list(merge.open(tmp_path / "x.pt")) == ["weight", "bias"]


# refusals


class Runs:
    """An object whose unpickling runs a command."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("kind", ["zip", "old", "plain pickle"])
def test_code_in_a_pickle_is_refused_and_not_run(kind: str, tmp_path: Path) -> None:
    path, marker = tmp_path / "pytorch_model.bin", tmp_path / "was-run"
    content = {"x": torch.ones(1), "y": Runs(marker)}
    if kind == "plain pickle":
        path.write_bytes(pickle.dumps({"y": Runs(marker)}, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "zip")
    with pytest.raises(CheckpointError) as caught:
        merge.open(path)
    assert f"{path}: not a PyTorch file of plain tensors" in str(caught.value)
    assert "hint: save the weights as safetensors; files that carry code are never executed" in str(caught.value)
    assert not marker.exists()
    pickle.loads(pickle.dumps(Runs(marker)))  # the marker is a true witness
    assert marker.exists()


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ([torch.ones(1)], "holds a list, not a state dict"),
        (torch.ones(1), "holds a Tensor, not a state dict"),
        ({"x": [torch.ones(1)]}, "x: a list where a tensor was expected"),
        ({3: torch.ones(1)}, "3: a Tensor where a tensor was expected"),
        ({"x": torch.ones(1, dtype=torch.complex128)}, "x: a tensor of complex128"),
        ({"x": torch.ones(2).to_sparse()}, "x: a sparse tensor"),
        ({"x": torch.ones(2, device="meta")}, "x: a tensor without data"),
    ],
)
def test_what_is_no_state_dict_of_plain_tensors_is_refused(content: object, found: str, tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    torch.save(content, path)
    with pytest.raises(CheckpointError) as caught:
        merge.open(path)
    assert str(path) in str(caught.value)
    assert found in str(caught.value)


def _saved(zipped: bool) -> bytes:
    buffer = io.BytesIO()
    torch.save({"a": torch.arange(3), "b": torch.ones(2, 2)}, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


VALID = {True: _saved(True), False: _saved(False)}


@pytest.mark.parametrize("zipped", [True, False])
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_file_is_a_checkpoint_error_or_opens(zipped: bool, tmp_path: Path, data: st.DataObject) -> None:
    raw = bytearray(VALID[zipped])
    if data.draw(st.booleans()):
        del raw[data.draw(st.integers(0, len(raw) - 1)) :]
    for at in data.draw(st.lists(st.integers(0, max(0, len(raw) - 1)), max_size=3)):
        if raw:
            raw[at] = data.draw(st.integers(0, 255))
    path = tmp_path / "x.pt"
    path.write_bytes(raw)
    try:
        opened = merge.open(path)
    except CheckpointError as error:
        opened, message = None, str(error)
    if opened is None:
        assert str(path) in message
    else:
        assert all(opened[name].shape == spec.shape for name, spec in opened.specs.items())


@pytest.mark.parametrize("zipped", [True, False])
def test_opening_planning_and_copying_do_not_import_torch(zipped: bool, tmp_path: Path) -> None:
    torch.save({"x": torch.ones(2, 3).t()}, tmp_path / "x.bin", _use_new_zipfile_serialization=zipped)
    code = (
        "import sys\nfrom portmanteau import merge\n"
        "opened = merge.open('x.bin')\nmerge.make_plan(opened)\nmerge.build(opened, 'out')\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
    assert load_file(tmp_path / "out" / "model.safetensors")["x"].tolist() == [[1.0, 1.0]] * 3
