"""Checkpoints in safetensors: opened by their headers alone, read exactly, and refused with file and cause."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save, save_file
from torch import Tensor

from portmanteau import merge
from portmanteau.merge import CheckpointError

SaveTensors = Callable[[str, Mapping[str, Tensor]], Path]

FLOATS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}
OTHERS = {
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
SHAPES = ((), (3,), (2, 3), (2, 1, 3), (0, 4), (65, 1031))


def stored_bytes(tensor: Tensor) -> bytes:
    return tensor.reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()


def every_pattern(dtype: torch.dtype, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Random bytes as a tensor: every bit pattern of the dtype, NaNs of all kinds too."""
    generator = torch.Generator().manual_seed(seed)
    if dtype is torch.bool:
        return torch.randint(0, 2, shape, dtype=torch.uint8, generator=generator).bool()
    raw = torch.randint(0, 256, (*shape, dtype.itemsize), dtype=torch.uint8, generator=generator)
    return raw.view(dtype).reshape(shape)


def with_header(path: Path, header: object, data: bytes = b"") -> Path:
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def refusal(reference: str | Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        merge.open(reference)
    assert all(mistake.where for mistake in caught.value.mistakes)
    return str(caught.value)


@pytest.mark.parametrize("name", [*FLOATS, *OTHERS])
def test_every_dtype_is_read_as_the_library_reads_it(name: str, save_tensors: SaveTensors) -> None:
    dtype = {**FLOATS, **OTHERS}[name]
    folder = save_tensors("in", {f"x{i}": every_pattern(dtype, shape, i) for i, shape in enumerate(SHAPES)})
    opened, expected = merge.open(folder), load_file(folder / "model.safetensors")
    assert opened.specs.keys() == expected.keys()
    for key, tensor in expected.items():
        spec, found = opened.specs[key], opened[key]
        assert (spec.name, spec.dtype, spec.shape, spec.nbytes) == (key, name, tensor.shape, tensor.nbytes)
        assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
        assert stored_bytes(found) == stored_bytes(tensor)


@pytest.mark.parametrize("name", [*FLOATS, *OTHERS])
def test_every_dtype_is_copied_byte_for_byte(name: str, save_tensors: SaveTensors, tmp_path: Path) -> None:
    dtype = {**FLOATS, **OTHERS}[name]
    folder = save_tensors("in", {f"x{i}": every_pattern(dtype, shape, i) for i, shape in enumerate(SHAPES)})
    merge.build(merge.open(folder), tmp_path / "out", non_finite="keep")
    before, after = (load_file(f / "model.safetensors") for f in (folder, tmp_path / "out"))
    assert {k: (t.dtype, t.shape, stored_bytes(t)) for k, t in after.items()} == {
        k: (t.dtype, t.shape, stored_bytes(t)) for k, t in before.items()
    }


@pytest.mark.parametrize(
    ("name", "shape", "size"),
    [("F4", [2, 8], 8), ("F6_E2M3", [4, 4], 12), ("F6_E3M2", [8], 6), ("F8_E8M0", [5], 5)],
)
def test_packed_dtypes_are_copied_byte_for_byte(name: str, shape: list[int], size: int, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    header = {"x": {"dtype": name, "shape": shape, "data_offsets": [0, size]}}
    path = with_header(tmp_path / "in" / "model.safetensors", header, bytes(range(size)))
    merge.build(merge.open(path), tmp_path / "out")
    out = tmp_path / "out" / "model.safetensors"
    assert out.read_bytes()[-size:] == bytes(range(size))
    with safe_open(out, framework="numpy") as found:
        assert (found.get_slice("x").get_dtype(), found.get_slice("x").get_shape()) == (name, shape)


def test_two_values_of_four_bits_are_read_as_one_entry_of_torch(tmp_path: Path) -> None:
    header = {"x": {"dtype": "F4", "shape": [2, 8], "data_offsets": [0, 8]}}
    found = merge.open(with_header(tmp_path / "x.safetensors", header, bytes(range(8))))["x"]
    assert (found.dtype, found.shape) == (torch.float4_e2m1fn_x2, (2, 4))
    assert stored_bytes(found) == bytes(range(8))


def test_a_part_is_a_run_of_the_flattened_tensor(save_tensors: SaveTensors) -> None:
    tensor = torch.arange(60).reshape(3, 4, 5)
    opened = merge.open(save_tensors("in", {"x": tensor}))
    assert torch.equal(opened.read("x", slice(7, 31)), torch.arange(7, 31))
    assert len(opened.read("x", slice(60, 60))) == 0


def test_a_part_beyond_the_end_is_cut_as_python_does_and_never_reads_a_neighbour(save_tensors: SaveTensors) -> None:
    opened = merge.open(save_tensors("in", {"a": torch.arange(3), "b": torch.arange(100, 103)}))
    assert opened.read("a", slice(1, 6)).tolist() == [1, 2]
    assert opened.read("a", slice(5, 6)).tolist() == []
    assert opened.read("a", slice(None)).tolist() == [0, 1, 2]


def test_an_unknown_tensor_is_a_key_error(save_tensors: SaveTensors) -> None:
    with pytest.raises(KeyError):
        merge.open(save_tensors("in", {"x": torch.ones(1)}))["y"]


def test_a_tensor_that_was_read_belongs_to_the_reader(save_tensors: SaveTensors) -> None:
    opened = merge.open(save_tensors("in", {"x": torch.ones(3)}))
    opened["x"].zero_()
    assert torch.equal(opened["x"], torch.ones(3))


def test_a_shard_set_reads_like_one_file(save_llama: Callable[..., Path]) -> None:
    whole, shards = merge.open(save_llama("whole")), merge.open(save_llama("shards", shard="20KB"))
    assert len(shards.files) > 2
    assert set(whole) == set(shards)
    for name in whole:
        torch.testing.assert_close(shards[name], whole[name], rtol=0, atol=0)


def test_a_file_in_a_folder_takes_the_folders_companions(save_llama: Callable[..., Path]) -> None:
    folder = save_llama("model")
    assert merge.open(folder / "model.safetensors").companions == merge.open(folder).companions


def test_a_lone_file_of_any_name_is_found(tmp_path: Path) -> None:
    save_file({"x": torch.ones(2)}, tmp_path / "weights.safetensors")
    assert list(merge.open(tmp_path)) == ["x"]


def test_opening_reads_no_weights(tmp_path: Path) -> None:
    """The data of a terabyte is a hole in the file: it takes no space, and reading it would take minutes."""
    size = 1 << 40
    path = with_header(
        tmp_path / "model.safetensors", {"x": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}
    )
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size + size)
    opened = merge.open(tmp_path)
    assert merge.make_plan(opened).bytes_written == size
    assert torch.equal(opened.read("x", slice(size - 2, size)), torch.zeros(2, dtype=torch.uint8))


def test_opening_and_planning_do_not_import_torch(save_llama: Callable[..., Path]) -> None:
    code = (
        "import sys; from portmanteau import merge\n"
        "made = merge.make_plan(merge.open(sys.argv[1]), 'BF16')\n"
        "heavy = {'torch', 'transformers', 'huggingface_hub'}\n"
        "print(len(made.steps), *sorted(heavy & sys.modules.keys()))"
    )
    run = [sys.executable, "-c", code, str(save_llama("model"))]
    printed = subprocess.run(run, capture_output=True, text=True, check=True, timeout=60).stdout
    assert printed.split() == ["75"]  # 8 layers of 9, the embedding, the last norm, the head


def test_copying_does_not_import_torch(save_llama: Callable[..., Path], tmp_path: Path) -> None:
    code = (
        "import sys; from portmanteau import merge\n"
        "merge.build(merge.open(sys.argv[1]), sys.argv[2]); print('torch' in sys.modules)"
    )
    run = [sys.executable, "-c", code, str(save_llama("model")), str(tmp_path / "out")]
    assert subprocess.run(run, capture_output=True, text=True, check=True, timeout=60).stdout == "False\n"


# refusals


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """A folder of two shards with one tensor each, and their index."""
    folder = tmp_path / "shards"
    folder.mkdir()
    save_file({"a": torch.ones(4)}, folder / "model-00001-of-00002.safetensors")
    save_file({"b": torch.ones(4)}, folder / "model-00002-of-00002.safetensors")
    reindex(folder, {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"})
    return folder


def reindex(folder: Path, weight_map: object) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_a_shard_set_opens(shards: Path) -> None:
    assert list(merge.open(shards)) == ["a", "b"]


@pytest.mark.parametrize("kept", [0, 3, 8, 20])
def test_a_truncated_header_is_named(kept: int, shards: Path) -> None:
    path = shards / "model-00002-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    message = refusal(shards)
    assert str(path) in message
    assert "truncated or corrupt" in message
    assert "hint: download or save the file again" in message


def test_a_header_of_random_bytes_is_named(shards: Path) -> None:
    path = shards / "model-00001-of-00002.safetensors"
    path.write_bytes((40).to_bytes(8, "little") + bytes(range(200, 256)))
    message = refusal(shards)
    assert f"{path}: the header is truncated or corrupt" in message


def test_truncated_data_is_named(shards: Path) -> None:
    path = shards / "model-00002-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    message = refusal(shards)
    assert f"{path}: not a whole safetensors file" in message
    assert "hint: the file is truncated or corrupt: download or save it again" in message


def test_every_broken_shard_is_reported_at_once(shards: Path) -> None:
    for path in shards.glob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:-1])
    message = refusal(shards)
    assert "model-00001-of-00002.safetensors: not a whole" in message
    assert "model-00002-of-00002.safetensors: not a whole" in message


@pytest.mark.parametrize("length", [100_000_001, 1 << 40, (1 << 64) - 1])
def test_an_absurd_header_length_is_named(length: int, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + b"{}" + bytes(100))
    assert f"{path}: not a safetensors file: its header claims {length} bytes" in refusal(path)


@pytest.mark.parametrize("header", [[], 3, None, "x", {"x": 3}, {"x": {"dtype": "F32"}}, {"__metadata__": {"a": 1}}])
def test_a_header_of_another_kind_is_refused(header: object, tmp_path: Path) -> None:
    path = with_header(tmp_path / "x.safetensors", header)
    message = refusal(path)
    assert message.startswith(f"{path}: ")
    assert "not a whole safetensors file" in message


def test_an_unknown_dtype_is_refused(tmp_path: Path) -> None:
    header = {"x": {"dtype": "F31", "shape": [1], "data_offsets": [0, 4]}}
    path = with_header(tmp_path / "x.safetensors", header, bytes(4))
    message = refusal(path)
    assert str(path) in message
    assert "F31" in message


def test_metadata_may_be_null_as_for_the_library(tmp_path: Path) -> None:
    header = {"__metadata__": None, "x": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}
    path = with_header(tmp_path / "x.safetensors", header, b"\7")
    assert list(load_file(path)) == ["x"]
    assert merge.open(path).files[0].metadata == {}


def test_an_index_that_names_a_missing_file_says_which(shards: Path) -> None:
    (shards / "model-00002-of-00002.safetensors").unlink()
    message = refusal(shards)
    assert "index.json: names the file model-00002-of-00002.safetensors, which is missing" in message
    assert "hint: download the folder again" in message


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "sub/x.safetensors", "..\\x.safetensors", ".."])
def test_an_index_that_points_outside_its_folder_is_refused(name: str, shards: Path) -> None:
    save_file({"b": torch.ones(4)}, shards.parent / "x.safetensors")
    reindex(shards, {"a": "model-00001-of-00002.safetensors", "b": name})
    message = refusal(shards)
    assert f"index.json: names the file {name!r}, outside its folder" in message
    assert "hint:" in message


def test_a_tensor_that_its_shard_lacks_is_named(shards: Path) -> None:
    reindex(shards, {name: f"model-0000{i}-of-00002.safetensors" for i, name in ((1, "a"), (2, "b"), (2, "c"))})
    message = refusal(shards)
    assert "index.json: names tensor c in model-00002-of-00002.safetensors, which does not hold it" in message
    assert "hint:" in message


def test_a_tensor_that_the_index_lacks_is_named(shards: Path) -> None:
    save_file({"b": torch.ones(4), "c": torch.ones(1)}, shards / "model-00002-of-00002.safetensors")
    message = refusal(shards)
    assert "index.json: does not name tensor c, which model-00002-of-00002.safetensors holds" in message
    assert "hint:" in message


@pytest.mark.parametrize("index", ["{", "[]", "null", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', "\udcff"])
def test_an_index_of_another_kind_is_refused(index: str, shards: Path) -> None:
    path = shards / "model.safetensors.index.json"
    path.write_bytes(index.encode(errors="surrogateescape"))
    assert str(path) in refusal(shards)


def test_an_index_that_names_nothing_is_refused(shards: Path) -> None:
    reindex(shards, {})
    assert "index.json: names no tensors" in refusal(shards)


def test_a_whole_file_beside_an_index_is_ambiguous(shards: Path) -> None:
    save_file({"a": torch.ones(4)}, shards / "model.safetensors")
    message = refusal(shards)
    assert f"{shards}: holds both model.safetensors and model.safetensors.index.json" in message
    assert "hint: one of them is left over from an earlier save" in message


def test_shards_without_an_index_are_not_guessed(shards: Path) -> None:
    (shards / "model.safetensors.index.json").unlink()
    message = refusal(shards)
    assert "holds 2 weight files and no index" in message
    assert "hint: shards need their model.safetensors.index.json" in message


def test_an_empty_folder_holds_no_weights(tmp_path: Path) -> None:
    message = refusal(tmp_path)
    assert f"{tmp_path}: holds no weights" in message
    assert "hint: a checkpoint folder holds model.safetensors" in message


def test_an_adapter_folder_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    save_file({"lora_A.weight": torch.ones(2, 2)}, tmp_path / "adapter_model.safetensors")
    message = refusal(tmp_path)
    assert f"{tmp_path}: holds an adapter, not a model" in message
    assert "hint:" in message


@pytest.mark.parametrize("name", ["model.gguf", "model", "model.h5"])
def test_an_unknown_suffix_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"x")
    message = refusal(tmp_path / name)
    assert f"{tmp_path / name}: not a weight file" in message
    assert "hint: known: .safetensors" in message


def test_a_missing_folder_suggests_its_neighbour(tmp_path: Path) -> None:
    (tmp_path / "swahili").mkdir()
    assert "no such file or folder\n  hint: did you mean 'swahili'?" in refusal(tmp_path / "swahli")


def test_a_config_that_is_no_json_is_named(save_tensors: SaveTensors) -> None:
    folder = save_tensors("in", {"x": torch.ones(1)})
    (folder / "config.json").write_text("{,}")
    assert f"{folder / 'config.json'}: not valid JSON" in refusal(folder)


def test_a_file_cut_short_after_it_was_opened_is_named_when_read(save_tensors: SaveTensors) -> None:
    folder = save_tensors("in", {"x": torch.ones(100)})
    opened = merge.open(folder)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: tensor x: cannot be read"):
        opened["x"]


VALID = save({"a": torch.arange(3, dtype=torch.int16), "b.c": torch.ones(2, 2)}, {"format": "pt"})
Edit = tuple[str, int, int]
EDITS: Any = st.lists(
    st.tuples(
        st.sampled_from(["flip", "put", "insert", "delete", "cut"]), st.integers(0, len(VALID)), st.integers(0, 255)
    ),
    min_size=1,
    max_size=4,
)


def edited(raw: bytes, edits: list[Edit]) -> bytes:
    found = bytearray(raw)
    for kind, at, value in edits:
        at = min(at, max(0, len(found) - 1))
        if kind == "cut":
            del found[at:]
        elif kind == "insert":
            found.insert(at, value)
        elif kind == "delete":
            del found[at : at + 1]
        elif found:
            found[at] = value if kind == "put" else found[at] ^ (1 << value % 8)
    return bytes(found)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(EDITS)
def test_what_the_library_refuses_is_a_checkpoint_error_and_what_it_takes_is_read_alike(
    tmp_path: Path, edits: list[Edit]
) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(edited(VALID, edits))
    try:
        expected = load_file(path)
    except (SafetensorError, KeyError, ValueError, OSError, RuntimeError):  # KeyError: a dtype that torch lacks
        expected = None
    try:
        opened = merge.open(path)
    except CheckpointError as error:
        message = str(error)
        opened = None
    if opened is None:
        assert expected is None
        assert str(path) in message
        return
    if expected is not None:
        assert {k: stored_bytes(opened[k]) for k in opened} == {k: stored_bytes(t) for k, t in expected.items()}
    with safe_open(path, framework="numpy") as accepted:
        assert set(accepted.keys()) == set(opened)
