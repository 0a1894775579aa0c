"""Sparse fine-tunes: exactly the largest changes, added and taken out without a stray bit, in both file formats."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from textwrap import dedent
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from portmanteau import compositions, merge
from portmanteau.merge import CheckpointError, MergeError, RecipeError
from portmanteau.merge.sparse import file as sparse_file
from portmanteau.merge.sparse import pytorch_diff, selection
from portmanteau.merge.sparse.fingerprint import fingerprint
from tests.conftest import SaveLlama

SaveTensors = Callable[[str, Mapping[str, Tensor]], Path]
MB = 1 << 20


def awkward(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Quarters, of which many are equal, over several blocks and ranks; and a counter."""
    generator = torch.Generator().manual_seed(seed)

    def quarters(*shape: int) -> Tensor:
        return (torch.randint(-9, 10, shape, generator=generator) / 4).to(dtype)

    return {
        "embed.weight": quarters(300, 701),
        "layers.0.a.weight": quarters(13, 11),
        "layers.0.experts": quarters(3, 4, 5),
        "layers.1.a.weight": quarters(13, 11),
        "norm.weight": quarters(30),
        "scale": quarters(),
        "empty": torch.zeros(0, 3, dtype=dtype),
        "ids": torch.arange(7),
    }


@pytest.fixture
def pair(save_tensors: SaveTensors) -> tuple[Path, Path]:
    """A base and a model tuned from it."""
    return save_tensors("base", awkward(1)), save_tensors("tuned", awkward(2))


def extracted(base: Path, tuned: Path, **settings: Any) -> merge.Surveyed:
    return compositions.extract_sparse(base=merge.open(base), tuned=merge.open(tuned), **settings)


def by_sorting(base: Path, tuned: Path, count: int) -> dict[str, tuple[list[int], list[float]]]:
    """Select with numpy: all changes in one row, sorted by size, of equal ones the first ones first."""
    one, other = load_file(base / "model.safetensors"), load_file(tuned / "model.safetensors")
    names = [name for name in merge.open(base).specs if one[name].is_floating_point()]
    deltas = {name: (other[name].double() - one[name].double()).numpy().ravel() for name in names}
    row = np.concatenate([deltas[name] for name in names])
    keep = np.zeros(len(row), dtype=bool)
    keep[np.argsort(-np.abs(row), kind="stable")[:count]] = True
    found, start = {}, 0
    for name in names:
        index = np.nonzero(keep[start : start + len(deltas[name])])[0]
        start += len(deltas[name])
        if len(index):
            found[name] = (index.tolist(), deltas[name][index].tolist())
    return found


def content(sft: merge.SparseFineTune) -> dict[str, tuple[list[int], list[float]]]:
    return {
        name: (sft.stored.read(f"{name}:indices").tolist(), sft.stored.read(f"{name}:values").tolist())
        for name in sft.shapes
    }


def equal_bytes(one: Path, other: Path) -> bool:
    found = [
        {
            name: tensor.reshape(-1).view(torch.uint8).tolist()
            for name, tensor in load_file(path / "model.safetensors").items()
        }
        for path in (one, other)
    ]
    return found[0] == found[1]


def a_diff(base: Path, label: str = "sft", **chosen: Any) -> merge.SparseFineTune:
    """A sparse fine-tune of two entries of the norm, made for the base."""
    sparse = {"norm.weight": (torch.tensor([2, 29]), torch.tensor([0.5, -1.0]))}
    mark = fingerprint(merge.open(base))
    return sparse_file.in_memory(label, **{"sparse": sparse, "shapes": {"norm.weight": (30,)}, "base": mark, **chosen})


# selecting


@pytest.mark.parametrize("count", [1, 17, 5_000, 150_000])
def test_exactly_the_largest_changes_are_taken_and_of_equal_ones_the_first(
    pair: tuple[Path, Path], count: int, tmp_path: Path
) -> None:
    merge.build(extracted(*pair, count=count), tmp_path / "sft")
    found = merge.open_sparse(tmp_path / "sft")
    assert content(found) == by_sorting(*pair, count)
    assert found.count == count


def test_a_density_is_a_share_of_all_entries_that_are_selected_from(pair: tuple[Path, Path]) -> None:
    found = extracted(*pair, density=0.01, exclude="embed*")
    values = [found.read(name) for name in found if name.endswith(":values")]
    assert sum(map(len, values)) == int(0.01 * (2 * 143 + 60 + 30 + 1))
    assert found.notes == (
        "1 tensors are left as the base has them, excluded: embed.weight",
        "1 tensors are left as the base has them, no floats: ids",
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_are_selected_from_exactly(save_tensors: SaveTensors, dtype: torch.dtype, tmp_path: Path) -> None:
    base, tuned = save_tensors("base", awkward(1, dtype)), save_tensors("tuned", awkward(2, dtype))
    merge.build(extracted(base, tuned, count=999), tmp_path / "sft")
    assert content(merge.open_sparse(tmp_path / "sft")) == by_sorting(base, tuned, 999)


def test_fp64_changes_that_fp32_cannot_tell_apart_are_told_apart(save_tensors: SaveTensors) -> None:
    base = save_tensors("base", {"a.w": torch.zeros(3, dtype=torch.float64)})
    tuned = save_tensors("tuned", {"a.w": torch.tensor([1.0, 1.0 + 1e-12, 1.0 + 2e-12], dtype=torch.float64)})
    assert extracted(base, tuned, count=2)["a.w:indices"].tolist() == [1, 2]


@pytest.mark.parametrize(
    "attributes",
    [{"KEPT": 10}, {"_region": lambda *_: (1, 2)}, {"_ENOUGH": 1, "_MARGIN": 0.0}, {"_ENOUGH": 1}],
    ids=["too much near the boundary", "looked in the wrong region", "no margin", "sampled"],
)
def test_every_way_to_the_boundary_gives_the_same(
    pair: tuple[Path, Path], attributes: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, value in attributes.items():
        monkeypatch.setattr(selection, name, value)
    merge.build(extracted(*pair, count=4_321), tmp_path / "sft", memory=8 * MB)
    assert content(merge.open_sparse(tmp_path / "sft")) == by_sorting(*pair, 4_321)


def test_threads_and_memory_change_no_byte_of_a_sparse_fine_tune(pair: tuple[Path, Path], tmp_path: Path) -> None:
    found = []
    for i, (threads, memory) in enumerate([(1, 256 * MB), (2, 8 * MB), (8, 32 * MB)]):
        merge.build(extracted(*pair, count=12_345), tmp_path / str(i), threads=threads, memory=memory)
        found.append((tmp_path / str(i) / sparse_file.WEIGHTS).read_bytes())
    assert found[0] == found[1] == found[2]


def test_more_entries_than_differ_are_refused_and_nothing_is_written(pair: tuple[Path, Path], tmp_path: Path) -> None:
    one, other = (load_file(path / "model.safetensors") for path in pair)
    differ = sum(int((one[name] != other[name]).sum()) for name in one)
    with pytest.raises(MergeError, match=f"{differ + 1:,} entries are asked for, and {differ:,} differ"):
        merge.build(extracted(*pair, count=differ + 1), tmp_path / "sft")
    assert [path.name for path in tmp_path.iterdir() if "sft" in path.name] == []


def test_a_head_that_the_base_lacks_must_be_stored_whole_or_left_out(save_tensors: SaveTensors, tmp_path: Path) -> None:
    head = torch.arange(6.0).view(2, 3)
    base, tuned = save_tensors("base", awkward(1)), save_tensors("tuned", {**awkward(2), "classifier.weight": head})
    with pytest.raises(MergeError, match=r"the base lacks tensors that tuned has: classifier\.weight"):
        extracted(base, tuned, count=5)
    found = extracted(base, tuned, count=5, dense="classifier*")
    torch.testing.assert_close(found["classifier.weight:dense"], head, rtol=0, atol=0)
    assert not any("classifier" in name for name in extracted(base, tuned, count=5, exclude="classifier*"))


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({}, "takes either count or density"),
        ({"count": 1, "density": 0.5}, "takes either count or density"),
        ({"count": 10**9}, "asks for 1,000,000,000 of"),
        ({"density": 1e-9}, "asks for 0 of"),
        ({"count": 1, "exclude": "nothing*"}, r"'nothing\*' fits no tensor"),
        ({"count": 1, "exclude": "*"}, "no tensor is left"),
    ],
)
def test_a_selection_that_cannot_be_meant_is_refused(
    pair: tuple[Path, Path], settings: dict[str, Any], what: str
) -> None:
    with pytest.raises(MergeError, match=what):
        extracted(*pair, **settings)


# adding and taking out


def test_all_changes_added_again_give_the_tuned_model_back(save_llama: SaveLlama, tmp_path: Path) -> None:
    base = save_llama("base", 1, torch.bfloat16, tie_word_embeddings=True, shard="5KB")
    tuned = save_llama("tuned", 2, torch.bfloat16, tie_word_embeddings=True)
    one, other = merge.open(base), merge.open(tuned)
    differ = sum(int((one[name] != other[name]).sum()) for name in one)
    merge.build(extracted(base, tuned, count=differ), tmp_path / "sft")
    merged = compositions.sparse_fine_tune(base=one, diffs=[merge.open_sparse(tmp_path / "sft")])
    merge.build(merged, tmp_path / "merged")
    for name in one:
        torch.testing.assert_close(merged[name], other[name], rtol=0, atol=0)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged").dtype == torch.bfloat16


def test_only_the_entries_of_the_diff_change_and_both_zeros_keep_their_sign(save_tensors: SaveTensors) -> None:
    base = save_tensors("base", {"a.w": torch.tensor([0.0, -0.0, 1.0, -0.0])})
    for weight in (1.0, -2.0):
        sft = sparse_file.in_memory("sft", {"a.w": (torch.tensor([2]), torch.tensor([0.5]))}, {"a.w": (4,)})
        found = compositions.sparse_fine_tune(base=merge.open(base), diffs={sft: weight})["a.w"]
        assert found.tolist() == [0.0, 0.0, 1.0 + weight / 2, 0.0]
        assert torch.signbit(found).tolist() == [False, True, False, True]


def test_sparse_fine_tunes_add_up_by_their_weights(pair: tuple[Path, Path]) -> None:
    base = pair[0]
    other = a_diff(base, "other", sparse={"norm.weight": (torch.tensor([2, 3]), torch.tensor([0.25, 4.0]))})
    found = compositions.sparse_fine_tune(base=merge.open(base), diffs={a_diff(base): 2.0, other: -1.0})
    expected = load_file(base / "model.safetensors")["norm.weight"]
    expected[2] += 2 * 0.5 - 0.25
    expected[29] -= 2.0
    expected[3] -= 4.0
    torch.testing.assert_close(found["norm.weight"], expected, rtol=0, atol=0)


def test_two_heads_cannot_stand_in_one_place_and_a_language_brings_none(pair: tuple[Path, Path]) -> None:
    base, head = merge.open(pair[0]), torch.ones(2, 30)
    task = a_diff(pair[0], "task", dense={"classifier.weight": head})
    language = a_diff(pair[0], "language", dense={"classifier.weight": 2 * head, "norm.bias": head})
    with pytest.raises(MergeError, match=r"task, language store the same tensors whole: classifier\.weight"):
        compositions.sparse_fine_tune(base=base, diffs=[task, language])
    diffs = {task: compositions.Term(), language: compositions.Term(dense=False)}
    found = compositions.sparse_fine_tune(base=base, diffs=diffs)
    torch.testing.assert_close(found["classifier.weight"], head, rtol=0, atol=0)
    assert "norm.bias" not in found.specs
    assert "task: adds tensors that the base lacks; its config is kept: classifier.weight" in found.notes
    assert (
        "classifier.weight" not in compositions.sparse_fine_tune(base=base, diffs=[task, language], dense=False).specs
    )
    with pytest.raises(MergeError, match="task: stores tensors whole, which have no weight -1"):
        compositions.sparse_fine_tune(base=base, diffs={task: -1.0})


def test_another_base_is_refused_by_its_fingerprint_before_any_work(pair: tuple[Path, Path]) -> None:
    base, tuned = pair
    with pytest.raises(MergeError, match=r"sft was made for another base \(fingerprint"):
        compositions.sparse_fine_tune(base=merge.open(tuned), diffs=[a_diff(base)])
    allowed = compositions.sparse_fine_tune(base=merge.open(tuned), diffs=[a_diff(base)], other_base="allow")
    assert allowed["norm.weight"][29] == load_file(tuned / "model.safetensors")["norm.weight"][29] - 1


def test_a_fingerprint_knows_the_tensors_and_not_their_files(save_llama: SaveLlama) -> None:
    prints = {
        name: fingerprint(merge.open(save_llama(name, **chosen)))
        for name, chosen in {
            "whole": {},
            "shards": {"shard": "5KB"},
            "bf16": {"dtype": torch.bfloat16},
            "other": {"seed": 1},
        }.items()
    }
    assert prints["whole"] == prints["shards"]
    assert len(set(prints.values())) == 3


@pytest.mark.parametrize("name", ["model.layers.0.mlp.up_proj.weight", "norm.weight"])
def test_what_does_not_fit_the_base_is_refused_by_name(pair: tuple[Path, Path], name: str) -> None:
    wrong = a_diff(pair[0], sparse={name: (torch.tensor([0]), torch.tensor([1.0]))}, shapes={name: (5, 5)})
    what = (
        "the base lacks 1 tensors that it changes" if "mlp" in name else r"norm.weight is \[5, 5\], the base has \[30\]"
    )
    with pytest.raises(MergeError, match=what):
        compositions.sparse_fine_tune(base=merge.open(pair[0]), diffs=[wrong])


def test_taking_out_restores_the_bytes_of_the_base(pair: tuple[Path, Path], tmp_path: Path) -> None:
    base, tuned = pair
    merge.build(extracted(base, tuned, density=0.3), tmp_path / "sft")
    sft, opened = merge.open_sparse(tmp_path / "sft"), merge.open(base)
    merge.build(compositions.sparse_fine_tune(base=opened, diffs=[sft, a_diff(base)]), tmp_path / "both")
    merge.build(compositions.sparse_fine_tune(base=opened, diffs=[a_diff(base)]), tmp_path / "one")
    both, one = merge.open(tmp_path / "both"), load_file(tmp_path / "one" / "model.safetensors")
    merge.build(compositions.revert_sparse(tuned=both, base=opened, diffs=[sft, a_diff(base)]), tmp_path / "none")
    assert equal_bytes(tmp_path / "none", base)
    left = compositions.revert_sparse(tuned=both, base=opened, diffs=[a_diff(base)])
    assert (
        left["norm.weight"][[2, 29]].tolist() == load_file(base / "model.safetensors")["norm.weight"][[2, 29]].tolist()
    )
    assert one["norm.weight"][29] != left["norm.weight"][29]


def test_taking_out_of_a_nested_sum_restores_16_bit_bytes_too(save_tensors: SaveTensors, tmp_path: Path) -> None:
    base = save_tensors("base", awkward(0, torch.bfloat16))
    opened, diffs = merge.open(base), [a_diff(base)]
    both = compositions.sparse_fine_tune(base=opened, diffs=diffs)  # not written in between, so in fp32
    assert both["norm.weight"][29] != opened["norm.weight"][29]
    merge.build(compositions.revert_sparse(tuned=both, base=opened, diffs=diffs), tmp_path / "none")
    assert equal_bytes(tmp_path / "none", base)


# files


def test_a_published_diff_applied_is_what_composable_sft_makes_of_it() -> None:
    """The files are composable-sft's: see tests/oracles/composable_sft.py for the command that made them."""
    fixtures = Path(__file__).parent / "oracles" / "fixtures" / "pytorch_diff"
    base, sft = merge.open(fixtures / "base.safetensors"), merge.open_sparse(fixtures)
    for file, dense in (("applied", True), ("applied_without_abs", False)):
        found = compositions.sparse_fine_tune(base=base, diffs=[sft], dense=dense)
        expected = load_file(fixtures / f"{file}.safetensors")
        assert {name: found[name].tolist() for name in expected} == {n: t.tolist() for n, t in expected.items()}
    assert {len(shape) for shape in sft.shapes.values()} == {1, 2}


def test_positions_in_the_published_form_run_down_the_columns(tmp_path: Path) -> None:
    diff = {"size": torch.Size([3, 4]), "index_steps": [np.int64(2), 1, 7], "values": torch.tensor([1.0, 2.0, 3.0])}
    torch.save({"diffs": {"a.w": diff}, "abs": {"head": torch.ones(2)}}, tmp_path / "pytorch_diff.bin")
    found = pytorch_diff.read(tmp_path / "pytorch_diff.bin")
    indices, values = found.sparse["a.w"]  # (2, 0), (0, 1) and (1, 3), as core.md's C.4 has them
    assert dict(zip(indices.tolist(), values.tolist(), strict=True)) == {1: 2.0, 7: 3.0, 8: 1.0}
    assert indices.tolist() == [1, 7, 8]
    assert found.dense["head"].tolist() == [1, 1]


@pytest.mark.parametrize("shape", [(), (7,), (5, 3), (2, 3, 4), (3, 2, 2, 5), (100_000, 90_000)])
def test_any_rank_and_size_goes_to_the_published_form_and_back(shape: tuple[int, ...], tmp_path: Path) -> None:
    entries = int(np.prod(shape))
    indices = torch.unique(torch.linspace(0, entries - 1, min(entries, 9), dtype=torch.float64).long())
    given = pytorch_diff.Decoded({"a": (indices, torch.arange(1.0, len(indices) + 1))}, {"a": shape}, {})
    pytorch_diff.write(tmp_path / "x.bin", given)
    found = pytorch_diff.read(tmp_path / "x.bin")
    assert [t.tolist() for t in found.sparse["a"]] == [t.tolist() for t in given.sparse["a"]]
    assert found.shapes == {"a": shape}
    raw = torch.load(tmp_path / "x.bin", weights_only=True)["diffs"]["a"]
    at = np.cumsum(raw["index_steps"])  # numpy reads them in column-major order
    where = np.ravel_multi_index(np.unravel_index(at, shape, order="F"), shape) if shape else at
    assert sorted(where.tolist()) == indices.tolist()


def test_a_diff_without_entries_is_read(tmp_path: Path) -> None:
    diff = {"size": torch.Size([3, 0]), "index_steps": [], "values": torch.zeros(0)}
    torch.save({"diffs": {"a.w": diff}, "abs": {}}, tmp_path / "pytorch_diff.bin")
    assert merge.open_sparse(tmp_path).count == 0


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("/tmp/portmanteau-was-here",)


@pytest.mark.parametrize(
    ("saved", "what"),
    [
        ({"diffs": {}}, "holds no `diffs` and `abs`"),
        ([1, 2], "holds no `diffs` and `abs`"),
        (
            {"diffs": {"a": {"size": torch.Size([2]), "index_steps": [5], "values": torch.ones(1)}}, "abs": {}},
            "do not lie",
        ),
        (
            {"diffs": {"a": {"size": torch.Size([9]), "index_steps": [5, 0], "values": torch.ones(2)}}, "abs": {}},
            "do not lie",
        ),
        (
            {"diffs": {"a": {"size": torch.Size([9]), "index_steps": [1], "values": torch.ones(2)}}, "abs": {}},
            "do not go",
        ),
        ({"diffs": {"a": {"size": torch.Size([9]), "index_steps": [1]}}, "abs": {}}, "do not go with its values"),
        ({"diffs": {}, "abs": {"a": 1}}, "a int where a tensor was expected"),
    ],
)
def test_a_published_file_that_contradicts_itself_is_refused(saved: Any, what: str, tmp_path: Path) -> None:
    torch.save(saved, tmp_path / "pytorch_diff.bin")
    with pytest.raises(CheckpointError, match=what):
        merge.open_sparse(tmp_path)


def test_code_in_a_published_file_is_never_run(tmp_path: Path) -> None:
    with (tmp_path / "pytorch_diff.bin").open("wb") as file:
        pickle.dump({"diffs": {}, "abs": {"x": Bomb()}}, file)
    with pytest.raises(CheckpointError, match="not a PyTorch file of plain tensors"):
        merge.open_sparse(tmp_path)
    assert not Path("/tmp/portmanteau-was-here").exists()


def test_the_card_of_what_was_in_memory_claims_no_parents(pair: tuple[Path, Path], tmp_path: Path) -> None:
    merge.build(a_diff(pair[0]).stored, tmp_path / "sft")
    card = (tmp_path / "sft" / "README.md").read_text(encoding="utf-8")
    assert "from tensors in memory" in card
    assert "without training" not in card


def test_both_files_of_one_extraction_say_the_same(pair: tuple[Path, Path], tmp_path: Path) -> None:
    merge.build(extracted(*pair, count=500, pytorch_diff=True), tmp_path / "sft")
    ours, published = (
        merge.open_sparse(tmp_path / "sft" / name) for name in ("sparse_fine_tune.safetensors", "pytorch_diff.bin")
    )
    assert content(ours) == content(published)
    assert ours.shapes == published.shapes
    with safe_open(tmp_path / "sft" / "sparse_fine_tune.safetensors", "pt") as file:
        about = file.metadata()
    assert about["base"] == fingerprint(merge.open(pair[0]))
    assert (about["selected"], about["kind"]) == ("500", "sparse_fine_tune")


@pytest.mark.parametrize(
    ("changed", "what"),
    [
        ({"norm.weight:values": torch.ones(3)}, r"positions \[2\] and values do not go together"),
        ({"norm.weight:indices": torch.tensor([1.0, 2.0])}, "positions are F32 and values F32"),
        ({"other": torch.ones(1)}, "tensor other is of a kind that is not known"),
        (
            {"norm.weight:indices": torch.arange(31), "norm.weight:values": torch.ones(31)},
            r"31 positions in a tensor of \[30\]",
        ),
    ],
)
def test_a_file_of_ours_that_contradicts_itself_is_refused(
    pair: tuple[Path, Path], changed: dict[str, Tensor], what: str, tmp_path: Path
) -> None:
    sft = a_diff(pair[0]).stored
    tensors = {name: sft[name] for name in sft} | changed
    save_file(tensors, tmp_path / "sparse_fine_tune.safetensors", dict(sft.companions.form.metadata))
    with pytest.raises(CheckpointError, match=what):
        merge.open_sparse(tmp_path)


@pytest.mark.parametrize(
    ("positions", "what"), [([29, 2], "not in ascending order"), ([2, 30], "lies outside"), ([-1, 2], "lies outside")]
)
def test_positions_that_cannot_be_are_found_when_they_are_read(
    pair: tuple[Path, Path], positions: list[int], what: str
) -> None:
    wrong = a_diff(pair[0], sparse={"norm.weight": (torch.tensor(positions), torch.ones(2))})
    with pytest.raises(CheckpointError, match=what):
        compositions.sparse_fine_tune(base=merge.open(pair[0]), diffs=[wrong]).read("norm.weight")


def test_a_folder_that_holds_none_is_told_what_one_is(pair: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds no sparse_fine_tune\.safetensors"):
        merge.open_sparse(pair[0])
    with pytest.raises(CheckpointError, match="is no sparse fine-tune"):
        merge.open_sparse(pair[0] / "model.safetensors")
    with pytest.raises(CheckpointError, match="no such folder"):
        merge.open_sparse(tmp_path / "nowhere")


# comparing


def test_two_that_meet_are_compared_by_what_they_share(pair: tuple[Path, Path]) -> None:
    one = a_diff(pair[0], "one", sparse={"norm.weight": (torch.tensor([1, 2, 3]), torch.tensor([1.0, 2.0, -2.0]))})
    other = a_diff(
        pair[0], "other", sparse={"norm.weight": (torch.tensor([2, 3, 9, 10]), torch.tensor([3.0, 4.0, 0.0, 12.0]))}
    )
    tensor, together = compositions.overlaps([one, other])
    assert (tensor.tensor, together.tensor) == ("norm.weight", "")
    for row in (tensor, together):
        assert (row.counts, row.shared, row.opposed, row.entries) == ((3, 4), 2, 1, 30)
        assert row.by_chance == 3 * 4 / 30
        assert row.opposed_share == 0.5
        assert (row.mass, row.shared_mass) == ((5.0, 19.0), (4.0, 7.0))
        assert row.cosine == pytest.approx((2 * 3 - 2 * 4) / (3 * 13))


def test_what_cannot_be_compared_is_refused(pair: tuple[Path, Path]) -> None:
    one, other = a_diff(pair[0], "one"), a_diff(pair[1], "other")
    with pytest.raises(MergeError, match="one and other: were made for different bases"):
        compositions.overlaps([one, other])
    with pytest.raises(MergeError, match="name two or more"):
        compositions.overlaps([one])


# at a terminal


def run(*arguments: str | Path, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "portmanteau.cli", *map(str, arguments)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def test_from_extraction_to_a_model_at_a_terminal(save_llama: SaveLlama, tmp_path: Path) -> None:
    for seed, name in enumerate(("base", "task", "language")):
        save_llama(name, seed, torch.bfloat16, shard="8KB")
    recipes = {
        "task-sft": "merge: {extract_sparse: {base: base, tuned: task, density: 0.2}}",
        "language-sft": "merge: {extract_sparse: {base: base, tuned: language, density: 0.1, exclude: '*norm*'}}",
        "both": """\
            merge:
              sparse_fine_tune:
                base: base
                diffs: {task-sft: 1.0, language-sft: {weight: 0.5, dense: false}}
            """,
    }
    for name, text in recipes.items():
        (tmp_path / f"{name}.yaml").write_text(dedent(text), encoding="utf-8")
        done = run("build", f"{name}.yaml", name, folder=tmp_path)
        assert done.returncode == 0, done.stderr
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "both").config.num_hidden_layers == 8
    receipt = json.loads((tmp_path / "task-sft" / "portmanteau.json").read_text())
    (survey,) = receipt["surveys"].values()
    assert survey["selected"] == int(0.2 * survey["of"]) == sum(survey["tensors"].values())
    shown = run("inspect", "task-sft", folder=tmp_path).stdout
    assert f"changes: {survey['selected']:,} of {survey['of']:,} entries (20.00%)" in shown
    assert "model.layers" in shown
    found = run("overlap", "task-sft", "language-sft", "--json", folder=tmp_path)
    assert json.loads(found.stdout)[0]["counts"][0] == survey["selected"]
    plan = run("plan", "task-sft.yaml", folder=tmp_path)
    assert "survey first: the" in plan.stdout
    assert "writes at most" in plan.stdout
    (tmp_path / "wrong.yaml").write_text("merge: {sparse_fine_tune: {base: task, diffs: [task-sft]}}", encoding="utf-8")
    refused = run("build", "wrong.yaml", "x", folder=tmp_path)
    assert refused.returncode == 1
    assert "wrong.yaml:1: sparse_fine_tune: task-sft was made for another base" in refused.stderr


def test_a_sparse_fine_tune_is_no_step(pair: tuple[Path, Path], tmp_path: Path) -> None:
    text = """\
        steps: {sft: {extract_sparse: {base: base, tuned: tuned, count: 3}}}
        merge: {sparse_fine_tune: {base: base, diffs: [sft]}}
        """
    (tmp_path / "r.yaml").write_text(dedent(text), encoding="utf-8")
    with pytest.raises(RecipeError, match="'sft' is a step; adapters and sparse fine-tunes are read"):
        compositions.load(tmp_path / "r.yaml")


def test_what_a_survey_must_settle_is_no_model(pair: tuple[Path, Path], tmp_path: Path) -> None:
    text = """\
        steps:
          sft: {extract_sparse: {base: base, tuned: tuned, count: 3}}
        merge: {linear: {models: [sft, base]}}
        """
    (tmp_path / "r.yaml").write_text(dedent(text), encoding="utf-8")
    with pytest.raises(RecipeError, match=r"r\.yaml:2: extract_sparse makes no model"):
        compositions.compose(compositions.load(tmp_path / "r.yaml"))


def test_what_is_known_of_the_models_is_known_of_what_is_made_of_them() -> None:
    def noted(name: str, value: float, note: str) -> merge.Composed:
        model = merge.InMemory(name, {"weight": torch.tensor([value])})
        return compositions.tensorwise("copy", models={name: model}).noted((note,))

    base, tuned = noted("base", 1.0, "of the base"), noted("tuned", 3.0, "of the model")
    diff = sparse_file.in_memory("diff", {"weight": (torch.tensor([0]), torch.tensor([2.0]))}, {"weight": (1,)})
    added = compositions.sparse_fine_tune(base=base, diffs=[diff])
    reverted = compositions.revert_sparse(tuned=tuned, base=base, diffs=[diff])
    assert added.notes[0] == "of the base"
    assert reverted.notes[:2] == ("of the model", "of the base")


def test_what_is_taken_out_is_found_where_model_and_base_spell_names_otherwise() -> None:
    names = [f"layers.{i}.w" for i in range(3)]
    base = merge.InMemory("base", {name: torch.tensor([1.0, 1.0]) for name in names})
    tuned = merge.InMemory("tuned", {f"model.{name}": torch.tensor([3.0, 5.0]) for name in names})
    diff = sparse_file.in_memory("diff", {names[1]: (torch.tensor([1]), torch.tensor([4.0]))}, {names[1]: (2,)})
    reverted = compositions.revert_sparse(tuned=tuned, base=base, diffs=[diff])
    assert [reverted[name].tolist() for name in tuned] == [[3.0, 5.0], [3.0, 1.0], [3.0, 5.0]]
    assert "base: 3 tensors renamed to those of tuned: prefix 'model.' added" in reverted.notes
