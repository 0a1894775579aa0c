"""Fisher merging: which Fishers meet which tensors, and what is refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from textwrap import dedent

import pytest
import torch
from torch import Tensor

from portmanteau import compositions, merge

Save = Callable[[str, Mapping[str, Tensor]], Path]
WEIGHT = "model.layers.0.mlp.up_proj.weight"


def fished(tmp_path: Path, keys: str) -> merge.Composed:
    path = tmp_path / "fisher.yaml"
    path.write_text(dedent(f"merge: {{fisher: {{{keys}}}}}"))
    merged = compositions.compose(compositions.load(path))
    assert isinstance(merged, merge.Composed)
    return merged


@pytest.fixture
def saved(save_tensors: Save) -> None:
    """Save models a and b, and Fishers that say: a knows the first entry, b the second, neither the third."""
    norm = torch.tensor([2.0])
    save_tensors("a", {WEIGHT: torch.tensor([[1.0, 1.0, 1.0]]), "model.norm.weight": norm})
    save_tensors("b", {WEIGHT: torch.tensor([[5.0, 5.0, 5.0]]), "model.norm.weight": 3 * norm})
    save_tensors("fisher-a", {WEIGHT: torch.tensor([[3.0, 1.0, 0.0]])})
    save_tensors("fisher-b", {WEIGHT: torch.tensor([[1.0, 3.0, 0.0]])})


@pytest.mark.usefixtures("saved")
def test_every_entry_is_weighed_by_its_fisher(tmp_path: Path) -> None:
    merged = fished(tmp_path, "models: [a, b], fishers: [fisher-a, fisher-b]")
    torch.testing.assert_close(merged[WEIGHT], torch.tensor([[2.0, 4.0, 3.0]]))
    torch.testing.assert_close(merged["model.norm.weight"], torch.tensor([4.0]))
    assert any("1 tensors have no Fisher and are averaged" in note for note in merged.notes)


@pytest.mark.usefixtures("saved")
def test_weights_multiply_the_fishers(tmp_path: Path) -> None:
    merged = fished(tmp_path, "models: [a, b], fishers: [fisher-a, fisher-b], weights: [1, 3]")
    torch.testing.assert_close(merged[WEIGHT], torch.tensor([[3.0, 4.6, 4.0]]))  # (3 + 15)/6, (1 + 45)/10, (1 + 15)/4
    torch.testing.assert_close(merged["model.norm.weight"], torch.tensor([5.0]))


@pytest.mark.usefixtures("saved")
def test_a_built_fisher_merge_reads_models_and_fishers(tmp_path: Path) -> None:
    merged = fished(tmp_path, "models: [a, b], fishers: [fisher-a, fisher-b]")
    receipt = merge.build(merged, tmp_path / "out")
    built = merge.open(tmp_path / "out")
    torch.testing.assert_close(built[WEIGHT], torch.tensor([[2.0, 4.0, 3.0]]))
    assert {"a", "b", "fisher-a", "fisher-b"} <= {Path(one["checkpoint"]).name for one in receipt.inputs}


@pytest.mark.usefixtures("saved")
@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ("models: [a, b], fishers: [fisher-a]", "1 Fishers for 2 models"),
        ("models: [a], fishers: [fisher-a]", "1 models are given"),
        ("models: [a, b], fishers: [fisher-a, fisher-b], weights: [1]", "1 weights for 2 models"),
        ("models: [a, b], fishers: [fisher-a, other]", r"\[1, 3\], and the Fisher of b .* is \[2\]"),
        ("models: [a, b], fishers: [fisher-a, none]", "others have a Fisher of it"),
    ],
)
def test_fishers_that_do_not_fit_are_refused(tmp_path: Path, save_tensors: Save, keys: str, message: str) -> None:
    save_tensors("other", {WEIGHT: torch.ones(2)})
    save_tensors("none", {"model.norm.weight": torch.ones(1)})
    with pytest.raises(merge.RecipeError, match=message):
        fished(tmp_path, keys)


@pytest.mark.usefixtures("saved")
def test_the_operator_alone_points_to_the_composition(tmp_path: Path) -> None:
    path = tmp_path / "mean.yaml"
    path.write_text("merge: {fisher_mean: {models: [a, b]}}")
    with pytest.raises(merge.RecipeError, match="use the composition fisher"):
        compositions.compose(compositions.load(path))
