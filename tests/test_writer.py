"""Safetensors written in place: laid out beforehand, readable by the library, whatever the order of writing."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from portmanteau import merge
from portmanteau.merge import TensorSpec
from portmanteau.merge.dtypes import from_torch
from portmanteau.merge.form import Form
from portmanteau.merge.writer import Writer, layout

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.uint8, torch.bool]


def spec(name: str, dtype: str, *shape: int) -> TensorSpec:
    return TensorSpec(name, dtype, shape)


def spec_of(name: str, tensor: Tensor) -> TensorSpec:
    return TensorSpec(name, from_torch(tensor.dtype), tuple(tensor.shape))


def raw(tensor: Tensor) -> memoryview:
    found: memoryview = tensor.reshape(-1).contiguous().view(torch.uint8).numpy().data
    return found


def write(folder: Path, tensors: Mapping[str, Tensor], shard_size: int, *, piece: int = 7, seed: int = 0) -> list[str]:
    """Write all tensors in pieces of a few bytes, in a random order."""
    writer = Writer(folder, [spec_of(name, tensor) for name, tensor in tensors.items()], shard_size)
    pieces = [(n, raw(t)[at : at + piece], at) for n, t in tensors.items() for at in range(0, t.nbytes, piece)]
    random.Random(seed).shuffle(pieces)
    for name, data, at in pieces:
        writer.put(name, data, at)
    return writer.finish()


def test_shards_are_filled_in_order_up_to_their_size() -> None:
    specs = [spec(f"x{i}", "F32", 10) for i in range(5)]  # 40 bytes each
    shards = layout(specs, 100)
    assert [list(shard.offsets) for shard in shards] == [["x0", "x1"], ["x2", "x3"], ["x4"]]
    assert [shard.file for shard in shards] == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]


def test_a_tensor_larger_than_a_shard_gets_one_of_its_own() -> None:
    specs = [spec("a", "U8", 10), spec("big", "U8", 1000), spec("b", "U8", 10), spec("c", "U8", 10)]
    assert [list(shard.offsets) for shard in layout(specs, 100)] == [["a"], ["big"], ["b", "c"]]
    assert [list(shard.offsets) for shard in layout(specs[1:2], 100)] == [["big"]]


def test_one_shard_is_the_whole_and_has_no_number() -> None:
    (shard,) = layout([spec("a", "F32", 2)], 8)
    assert (shard.file, shard.size) == ("model.safetensors", len(shard.header) + 8)


def test_every_tensor_is_aligned_to_its_entries() -> None:
    specs = [spec("byte", "U8", 3), spec("wide", "F64", 2), spec("half", "BF16", 1), spec("word", "F32", 1)]
    (shard,) = layout(specs, 1000)
    assert list(shard.offsets) == ["wide", "word", "half", "byte"]
    begin = len(shard.header)
    assert {name: at - begin for name, at in shard.offsets.items()} == {"wide": 0, "word": 16, "half": 20, "byte": 22}
    assert begin % 8 == 0


def test_files_have_their_full_size_before_a_byte_is_put(tmp_path: Path) -> None:
    writer = Writer(tmp_path, [spec("a", "F32", 1000), spec("b", "F32", 500)], 4000)
    sizes = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert sizes == {shard.file: shard.size for shard in writer.shards}
    assert [shard.size - len(shard.header) for shard in writer.shards] == [4000, 2000]
    with safe_open(tmp_path / writer.shards[0].file, framework="pt") as found:
        assert found.get_slice("a").get_shape() == [1000]
    writer.close()


def test_the_index_names_every_tensor_and_the_total_size(tmp_path: Path) -> None:
    tensors = {f"x{i}": torch.full((10,), float(i)) for i in range(5)}
    names = write(tmp_path, tensors, 100)
    assert names == [*(f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)), "model.safetensors.index.json"]
    index = json.loads((tmp_path / names[-1]).read_text())
    assert index["metadata"]["total_size"] == 200
    assert index["weight_map"] == {f"x{i}": names[i // 2] for i in range(5)}
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / file)[name], tensors[name])


def test_names_that_json_must_escape_are_kept(tmp_path: Path) -> None:
    tensors = {'quote"': torch.ones(1), "zürich.gewicht": torch.zeros(1), "back\\slash": torch.ones(2)}
    write(tmp_path, tensors, 1000)
    assert set(load_file(tmp_path / "model.safetensors")) == set(tensors)


def test_nothing_at_all_is_a_file_too(tmp_path: Path) -> None:
    assert write(tmp_path, {}, 1000) == ["model.safetensors"]
    assert load_file(tmp_path / "model.safetensors") == {}


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shapes=st.lists(
        st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 5), max_size=3)), min_size=1, max_size=8
    ),
    shard_size=st.integers(1, 400),
    seed=st.integers(0, 99),
)
def test_the_library_reads_back_what_was_put(
    tmp_path_factory: pytest.TempPathFactory,
    shapes: list[tuple[torch.dtype, list[int]]],
    shard_size: int,
    seed: int,
) -> None:
    folder = tmp_path_factory.mktemp("out")
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        f"x{i}": torch.randint(0, 2, shape, generator=generator).to(dtype) for i, (dtype, shape) in enumerate(shapes)
    }
    names = write(folder, tensors, shard_size, seed=seed)
    found: dict[str, Tensor] = {}
    for name in names:
        if name.endswith(".safetensors"):
            found |= load_file(folder / name)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert bytes(raw(found[name])) == bytes(raw(tensor))
    if len(names) == 1:
        with safe_open(folder / names[0], framework="pt") as file:
            assert file.metadata() == {"format": "pt"}


def test_transformers_loads_a_sharded_result(save_llama: Callable[..., Path], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    source = save_llama("in")
    merge.build(merge.open(source), tmp_path / "out", shard_size=10_000)
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 3
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    expected = load_file(source / "model.safetensors")
    assert model.state_dict().keys() == expected.keys()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0)


def test_a_form_puts_tensors_into_files_in_sub_folders_without_an_index(tmp_path: Path) -> None:
    form = Form("adapter.safetensors", folders={"a.x": "a", "b.x": "b"})
    tensors = {"a.x": torch.tensor([1.0, 2.0]), "b.x": torch.tensor([3.0]), "y": torch.tensor([4.0])}
    writer = Writer(tmp_path, [spec_of(name, tensor) for name, tensor in tensors.items()], 1, form)
    for name, tensor in tensors.items():
        writer.put(name, raw(tensor), 0)
    files = ["a/adapter.safetensors", "b/adapter.safetensors", "adapter.safetensors"]
    assert writer.finish() == files
    assert sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()) == sorted(files)
    read = [load_file(tmp_path / file) for file in files]
    values = [{name: tensor.tolist() for name, tensor in found.items()} for found in read]
    assert values == [{"a.x": [1.0, 2.0]}, {"b.x": [3.0]}, {"y": [4.0]}]
