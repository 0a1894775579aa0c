"""The random methods of mergekit files: kept shares, norms, and equality where nothing is dropped."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.mergekit_files import NAMES
from tests.oracles.mergekit_0_1_5 import assert_close, assert_same, converted, ours, theirs
from tests.tiny_models import save

pytestmark = pytest.mark.mergekit
FAMILIES = ("llama", "bert", "gpt2", "t5", "mistral3")
METHODS = ("dare_linear", "dare_ties", "della", "della_linear")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save base and a of each family: FAMILY/NAME."""
    folder = tmp_path_factory.mktemp("pairs")
    for family in FAMILIES:
        for seed, name in enumerate(("base", "a")):
            save(family, seed, folder / family / name)
    return folder


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
def test_a_random_method_keeps_its_share_and_the_norm_of_every_tensor(
    pairs: Path, tmp_path: Path, family: str, method: str
) -> None:
    folder = pairs / family
    config = {"merge_method": method, "base_model": str(folder / "base"), "models": [{"model": str(folder / "a")}]}
    config["parameters"] = {"weight": 1.0, "density": 0.6}
    base, a = (load_file(folder / name / "model.safetensors") for name in ("base", "a"))
    for build, where in ((ours, "ours"), (theirs, "theirs")):
        merged = build(config, tmp_path / where)
        changed = [(merged[name] != base[name]).sum().item() for name in base]
        entries = sum(values.numel() for values in base.values())
        assert abs(sum(changed) - 0.6 * entries) < 5 * math.sqrt(entries * 0.6 * 0.4)
        for name, kept in zip(base, changed, strict=True):
            if kept:  # what keeps nothing of a tensor has nothing to rescale
                norm = (merged[name] - base[name]).double().abs().sum().item()
                assert norm == pytest.approx((a[name] - base[name]).double().abs().sum().item(), rel=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_at_density_1_nothing_is_random(pairs: Path, tmp_path: Path, family: str) -> None:
    folder = pairs / family
    for method in ("dare_linear", "dare_ties"):
        config: dict[str, Any] = {"merge_method": method, "base_model": str(folder / "base")}
        config |= {"models": [{"model": str(folder / "a")}], "parameters": {"weight": 0.7, "density": 1.0}}
        assert_close(ours(config, tmp_path / method), theirs(config, tmp_path / f"{method}-theirs"))


def test_random_methods_convert_to_the_same_bytes(llama_family: Path, tmp_path: Path) -> None:
    for method in ("dare_ties", "della"):
        config = {
            "merge_method": method,
            "base_model": str(llama_family / "base"),
            "parameters": {"weight": 0.5, "density": 0.5},
            "slices": [
                {"sources": [{"model": str(llama_family / n), "layer_range": [0, 2]} for n in NAMES]} for _ in range(2)
            ],
        }
        merged = ours(config, tmp_path / method)
        native = converted(tmp_path / f"{method}.yml")
        assert_same(ours(native, tmp_path / f"{method}-native"), merged)
        one, other = (merged[f"model.layers.{i}.mlp.up_proj.weight"] for i in (0, 2))
        assert not torch.equal(one, other)  # the same layers, and random numbers of their own
