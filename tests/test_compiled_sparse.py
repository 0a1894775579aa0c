"""Sparse extraction by the compiled library against the same in torch: the same selection, the same bytes."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from portmanteau import compositions, merge
from portmanteau.merge import CheckpointError, MergeError
from portmanteau.merge.compiled import library, making, surveying
from portmanteau.merge.evaluate import GRID, Session
from portmanteau.merge.node import copy_of
from portmanteau.merge.sparse import compiled_selection, selection
from portmanteau.merge.sparse.entries import selected
from tests.conftest import WithoutLibrary
from tests.imports import heavy_imports

MB = 1 << 20
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIZES = (0, 1, 4097, GRID - 1, GRID, GRID + 1, 200_001)

pytestmark = pytest.mark.skipif(library.library() is None, reason="there is no C compiler here")


def drawn(seed: int) -> dict[str, merge.InMemory]:
    """Draw a base and a tuned model: changes of zero, changes that are equal, tensors that do not change."""
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    models: dict[str, dict[str, Tensor]] = {"base": {}, "tuned": {}}
    for number in range(draw.choice((1, 3, 6))):
        size = draw.choice(SIZES if number else SIZES[2:])
        base = torch.randn(size, generator=generator)
        change = torch.randn(size, generator=generator)
        if draw.random() < 0.5:
            change = (change * 4).round() / 4  # many are equal
        change *= draw.choice((0.01, 1.0))
        change[torch.rand(size, generator=generator) < draw.choice((0.1, 0.99))] = 0.0
        models["base"][f"tensor {number}"] = base.to(draw.choice(DTYPES))
        models["tuned"][f"tensor {number}"] = (base.to(draw.choice(DTYPES)) + change).to(draw.choice(DTYPES))
    return {name: merge.InMemory(name, tensors) for name, tensors in models.items()}


def extracted(models: Mapping[str, merge.Checkpoint], seed: int) -> merge.Surveyed:
    """Extract some of the entries that differ."""
    base, tuned = models["base"], models["tuned"]
    differ = sum(int((tuned.read(name).double() != base.read(name).double()).sum()) for name in base)
    draw = random.Random(seed)
    count = max(1, draw.choice((differ, int(differ * draw.random()), int(differ * 0.01))))
    return compositions.extract_sparse(base=base, tuned=tuned, count=count)


def by_torch(checkpoint: merge.Surveyed) -> Any:
    survey = checkpoint.survey
    return surveying.conduct_by_torch(survey, Session())


def compiled(checkpoint: merge.Surveyed, **chosen: int) -> Any:
    assert all(surveying.is_streamed(node, Session()) for node in checkpoint.survey)
    return surveying.conduct(checkpoint.survey, Session(**chosen))


@pytest.mark.parametrize("seed", range(30))
def test_the_library_selects_what_torch_selects(seed: int) -> None:
    made = extracted(drawn(seed), seed)
    assert compiled(made) == compiled(made, part=GRID, threads=3) == by_torch(made)


@pytest.mark.parametrize("seed", range(30, 36))
@pytest.mark.parametrize(
    "attributes",
    [
        {"KEPT": 10},
        {"_region": lambda *_: (1, 2)},
        {"_ENOUGH": 1 << 12},
        {"_ENOUGH": 1 << 12, "_MARGIN": 0.0},
        {"KEPT": 10, "_UNTIL_FULL": 1 << 17},
    ],
    ids=["too much near the boundary", "looked in the wrong region", "sampled", "no margin", "full histograms"],
)
def test_every_way_to_the_boundary_gives_the_same(
    seed: int, attributes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = extracted(drawn(seed), seed)
    expected = by_torch(made)
    for name, value in attributes.items():
        monkeypatch.setattr(compiled_selection, name, value)
    assert compiled(made, part=GRID, threads=2) == expected


@pytest.mark.parametrize("seed", range(40, 52))
def test_a_sparse_fine_tune_has_the_same_bytes_with_and_without_the_library(
    seed: int, tmp_path: Path, without_library: WithoutLibrary
) -> None:
    made = extracted(drawn(seed), seed)
    dtype = "bfloat16" if seed % 3 == 0 else None
    receipts = [
        merge.build(made, tmp_path / "wide", threads=1, dtype=dtype),
        merge.build(made, tmp_path / "narrow", threads=2, memory=8 * MB, dtype=dtype),
    ]
    with without_library():
        receipts.append(merge.build(made, tmp_path / "without", dtype=dtype))
    assert receipts[0].outputs == receipts[1].outputs == receipts[2].outputs


@pytest.mark.parametrize("operator", ["linear", "ties"])
def test_entries_are_selected_from_what_steps_make(
    operator: str, tmp_path: Path, without_library: WithoutLibrary
) -> None:
    """TIES goes through whole tensors before it makes a part: what it makes is surveyed by torch."""
    models = drawn(61)
    base = models["base"] if operator == "ties" else None
    step = compositions.tensorwise(operator, models=models, base=base)
    made = compositions.extract_sparse(base=models["base"], tuned=step, density=0.01)
    receipts = [merge.build(made, tmp_path / "with")]
    with without_library():
        receipts.append(merge.build(made, tmp_path / "without"))
    assert receipts[0].outputs == receipts[1].outputs


@pytest.mark.parametrize(
    ("count", "radix"), [(2, False), (3, False), (3, True), (4, False), (4, True), (40, False), (40, True)]
)
def test_nan_and_infinity_count_as_the_largest_changes(
    count: int, radix: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuned = torch.arange(100.0)
    tuned[[7, 50, 51]], tuned[[3, 99]] = float("nan"), float("-inf")
    models = {"base": merge.InMemory("base", {"w": torch.zeros(100)}), "tuned": merge.InMemory("tuned", {"w": tuned})}
    made = compositions.extract_sparse(**models, count=count)
    if radix:
        monkeypatch.setattr(selection, "KEPT", 1)
        monkeypatch.setattr(compiled_selection, "KEPT", 1)
    first = [7, 50, 51, 3, 99, *range(98, 0, -1)]
    expected = sorted([*dict.fromkeys(first)][:count])
    for way in (compiled, by_torch):
        assert made.settle(way(made)).read("w:indices").tolist() == expected
    step = merge.make_plan(made.settle(compiled(made))).steps[0]
    assert making.is_compiled(step, Session()) == (count > 3)  # not where the boundary itself is NaN
    if count > 3:
        assert b"".join(making.made(step, Session())) == torch.tensor(expected).numpy().tobytes()


def test_files_that_change_between_survey_and_making_are_found_out() -> None:
    models = {"base": {"w": torch.zeros(70_000)}, "tuned": {"w": torch.zeros(70_000)}}
    base, tuned = (merge.InMemory(name, tensors).node("w") for name, tensors in models.items())
    indices, _ = selected("w", tuned, base, 0.5, counts=(2, 1), ties=(0, 0))
    with pytest.raises(CheckpointError, match="tensor w: is not what it was when it was surveyed"):
        list(making.made(copy_of(indices, indices.output, "w"), Session()))


def test_more_entries_than_differ_are_refused_in_the_same_words(tmp_path: Path) -> None:
    base = {"a": torch.zeros(70_000), "b": torch.ones(3, dtype=torch.bfloat16)}
    tuned = {"a": torch.zeros(70_000).index_fill(0, torch.tensor([5, 69_999]), -0.5), "b": base["b"]}
    made = compositions.extract_sparse(base=merge.InMemory("base", base), tuned=merge.InMemory("tuned", tuned), count=3)
    for way in (compiled, by_torch):
        with pytest.raises(MergeError, match="3 entries are asked for, and 2 differ"):
            way(made)


def test_a_sparse_fine_tune_is_extracted_without_torch(tmp_path: Path, save_tensors: Any) -> None:
    save_tensors("base", {"w": torch.zeros(9, dtype=torch.bfloat16)})
    save_tensors("tuned", {"w": torch.arange(9, dtype=torch.bfloat16)})
    (tmp_path / "recipe.yaml").write_text("merge: {extract_sparse: {base: base, tuned: tuned, count: 2}}")
    assert heavy_imports("build", "recipe.yaml", "out", cwd=tmp_path) == []
    found = merge.open_sparse(tmp_path / "out").stored
    assert (found.read("w:indices").tolist(), found.read("w:values").tolist()) == ([7, 8], [7.0, 8.0])
