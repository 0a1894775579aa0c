"""Mixtures of experts in mergekit files: stored one by one or all in one tensor; and mergekit's results, once fused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.oracles.mergekit_0_1_5 import assert_close, config_of, ours, theirs
from tests.oracles.mergekit_differences import differs
from tests.tiny_models import fused, save, save_fused

pytestmark = pytest.mark.mergekit

FAMILIES = ("qwen2_moe", "qwen3_moe", "mixtral")
# What looks at each entry by itself gives the same for one expert as for all in one tensor; what looks at a whole
# tensor (an angle, a threshold) does not: there each expert is merged by itself.
BY_ENTRY: dict[str, dict[str, Any]] = {
    "linear": {"weight": [0.3, 0.9]},
    "task_arithmetic": {"weight": [{"filter": "self_attn", "value": 0.4}, {"value": [0.2, 0.7]}], "lambda": 1.2},
    "ties": {"weight": 0.6},
    "dare_ties": {"weight": [0.5, 0.8]},
    "ram": {"epsilon": 0.05},
    "nearswap": {"t": [0.01, 0.1]},
}


@pytest.fixture(scope="module")
def mixtures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save base, a and b of each family, the experts one by one: FAMILY/NAME."""
    folder = tmp_path_factory.mktemp("mixtures")
    for family in FAMILIES:
        for seed, name in enumerate(("base", "a", "b")):
            save(family, seed, folder / family / name)
    return folder


def configuration(method: str, folder: Path) -> dict[str, Any]:
    labels = "a" if method == "nearswap" else "ab"
    models = [{"model": str(folder / name)} for name in labels]
    config = {"merge_method": method, "dtype": "float32", "models": models, "parameters": BY_ENTRY[method]}
    return {**config, "base_model": str(folder / "base")}


@differs("experts")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", BY_ENTRY)
def test_experts_that_are_stored_one_by_one_stay_so(mixtures: Path, tmp_path: Path, family: str, method: str) -> None:
    config = configuration(method, mixtures / family)
    merged, other = ours(config, tmp_path / "ours"), theirs(config, tmp_path / "theirs")
    assert merged.keys() == load_file(mixtures / family / "a" / "model.safetensors").keys()
    assert_close(fused(merged), other)
    assert config_of(tmp_path / "ours") == config_of(tmp_path / "theirs")


@pytest.mark.parametrize("family", FAMILIES)
def test_either_layout_loads_and_restacks(family: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    for write, name in ((save, "apart"), (save_fused, "fused")):
        write(family, 1, tmp_path / name)
        ranges = ([0, 3], [1, 4])
        slices = [{"sources": [{"model": str(tmp_path / name), "layer_range": one}]} for one in ranges]
        merged = ours({"merge_method": "passthrough", "slices": slices}, tmp_path / f"{name}-6")
        model, found = AutoModelForCausalLM.from_pretrained(tmp_path / f"{name}-6", output_loading_info=True)
        assert not found["missing_keys"]
        assert not found["unexpected_keys"]
        stored = load_file(tmp_path / name / "model.safetensors")
        for layer, own in enumerate([0, 1, 2, 1, 2, 3]):
            inside = [key for key in stored if f".layers.{own}." in key]
            assert {f"model.layers.{layer}.{key.split('.', 3)[3]}" for key in inside} <= merged.keys()
        assert_close(dict(model.state_dict()), fused(merged))


def test_layouts_that_differ_are_refused(tmp_path: Path) -> None:
    from portmanteau import merge

    save("mixtral", 0, tmp_path / "apart")
    save_fused("mixtral", 1, tmp_path / "fused")
    models = [{"model": str(tmp_path / name)} for name in ("apart", "fused")]
    with pytest.raises(merge.RecipeError, match=r"fused lacks .* tensors that others have"):
        ours({"merge_method": "linear", "models": models, "parameters": {"weight": 1}}, tmp_path / "out")
