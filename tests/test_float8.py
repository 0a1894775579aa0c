"""Floats of eight bits: read, merged in fp32, and written where their few bits can hold the result."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from portmanteau import merge
from portmanteau.compositions import tensorwise
from portmanteau.merge import MergeError
from portmanteau.merge.registry import operators

SaveTensors = Callable[[str, Mapping[str, Tensor]], Path]
DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)
ONES = sorted({name for name, operator in operators().items() if "importances" not in operator.roles} - {"equal"})


def tensor(seed: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(30, 20, generator=torch.Generator().manual_seed(seed)).to(dtype)


def merged(name: str, tensors: list[Tensor], save: SaveTensors, label: str) -> merge.Composed:
    """Merge so many of the tensors as the operator takes, over the last of them."""
    operator = operators()[name]
    models = [merge.open(save(f"{label}-{i}", {"w": one})) for i, one in enumerate(tensors)]
    base = models[-1] if operator.needs_base else None
    return tensorwise(name, models={model.label: model for model in models[: operator.takes or 2]}, base=base)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ONES)
def test_eight_bits_are_merged_as_the_same_numbers_in_fp32_and_cast_once(
    name: str, dtype: torch.dtype, save_tensors: SaveTensors, tmp_path: Path
) -> None:
    narrow = [tensor(seed, dtype) for seed in range(3)]
    wide = merged(name, [one.float() for one in narrow], save_tensors, "model")
    merge.build(wide, tmp_path / "wide")
    expected = load_file(tmp_path / "wide" / "model.safetensors")["w"]
    for one in tmp_path.glob("model-*"):
        one.rename(tmp_path / f"wide-{one.name}")
    made = merged(name, narrow, save_tensors, "model")  # of the same names: they pick the random streams
    merge.build(made, tmp_path / "narrow")
    merge.build(made, tmp_path / "half", dtype="bfloat16")
    found = load_file(tmp_path / "narrow" / "model.safetensors")["w"]
    assert found.dtype == dtype
    assert torch.equal(found.float(), expected.to(dtype).float())
    assert torch.equal(load_file(tmp_path / "half" / "model.safetensors")["w"], expected.bfloat16())


def test_models_of_both_kinds_of_eight_bits_meet_in_fp32(save_tensors: SaveTensors, tmp_path: Path) -> None:
    mean = merged("linear", [torch.tensor([1.0]).to(DTYPES[0]), torch.tensor([1.25]).to(DTYPES[1])], save_tensors, "m")
    merge.build(mean, tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")["w"]
    assert (found.dtype, found.item()) == (torch.float32, 1.125)


@pytest.mark.parametrize(("dtype", "most"), [*zip(DTYPES, (448.0, 57344.0), strict=True)], ids=str)
def test_what_eight_bits_cannot_hold_is_refused_by_name(
    dtype: torch.dtype, most: float, save_tensors: SaveTensors, tmp_path: Path
) -> None:
    model, name = merge.open(save_tensors("model", {"w": torch.tensor([0.1, -most])})), str(dtype)
    merge.build(model, tmp_path / "good", dtype=name)
    assert load_file(tmp_path / "good" / "model.safetensors")["w"].float()[1].item() == -most
    model = merge.open(save_tensors("large", {"w": torch.tensor([0.1, -2 * most])}))
    with pytest.raises(MergeError, match=f"tensor w: an entry of magnitude {2 * most:g} does not fit into float8"):
        merge.build(model, tmp_path / "bad", dtype=name)
    assert not (tmp_path / "bad").exists()
