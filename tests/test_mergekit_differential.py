"""mergekit YAMLs as they are: the same file given to mergekit 0.1.5 and to us, over generated configurations.

Every method in every form of its parameters (one value, a gradient, filters, both), written at any of the levels that
mergekit knows, over whole models, slices and modules, with and without a base, on eight architectures in turn. What
differs on purpose stands in `test_mergekit_differences.py`. `pytest -m exhaustive` takes every case on every one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from portmanteau.compositions.mergekit.methods import METHODS
from portmanteau.merge.names import matches
from tests.oracles.mergekit_0_1_5 import (
    Tensors,
    assert_cast_once,
    assert_close,
    assert_same,
    config_of,
    converted,
    ours,
    theirs,
)
from tests.oracles.mergekit_configurations import FORMS, KINDS, LAYOUTS, NAMES, Architecture, Case, cases, configuration
from tests.oracles.mergekit_differences import DIFFERENT
from tests.tiny_models import save, save_fused

pytestmark = pytest.mark.mergekit

SEEING = {"text_decoder": 3, "multi_modal_projector": 0, "vision_tower": 2}
ARCHITECTURES = {
    "llama": Architecture({"default": 4}),
    "qwen2": Architecture({"default": 4}, fails="num_hidden_layers"),
    "bert": Architecture({"default": 4}),
    "gpt2": Architecture({"default": 4}),
    "t5": Architecture(
        {"encoder": 4, "decoder": 3, "shared": 0},
        aligned=True,
        not_compared=("slices", "*.relative_attention_bias.weight", "tables of positions"),
    ),
    "qwen3_moe": Architecture({"default": 4}),
    "mistral3": Architecture(SEEING),
    "qwen2_5_vl": Architecture(
        SEEING,
        not_compared=("gradients", "visual.merger.mlp.*", "layers that are none"),
        lists=("layer_types", "fullatt_block_indexes"),
    ),
}
ELSEWHERE = {"della", "della_linear"}  # random at any density: test_mergekit_random.py
IN_TURN = list(cases(ARCHITECTURES))
THE_REST = [case for case in cases(ARCHITECTURES, every=True) if case not in IN_TURN]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save base, a and b of each family: FAMILY/NAME; and in bfloat16: FAMILY-bf16/NAME."""
    folder = tmp_path_factory.mktemp("models")
    for family in ARCHITECTURES:
        write = save_fused if family.endswith("_moe") else save  # as mergekit writes it: DIFFERENT, experts
        for seed, name in enumerate(NAMES):
            write(family, seed, folder / family / name)
            write(family, seed, folder / f"{family}-bf16" / name, torch.bfloat16)
    return folder


EVERY = [*IN_TURN, *(pytest.param(case, marks=pytest.mark.exhaustive) for case in THE_REST)]


@pytest.mark.parametrize("case", EVERY, ids=str)
def test_a_file_merges_as_in_mergekit(models: Path, tmp_path: Path, case: Case) -> None:
    architecture = ARCHITECTURES[case.family]
    config = configuration(case, architecture, models / case.family)
    sliced = "layer_range" in str(config)
    fails = architecture.fails if sliced else ""
    merged, other = ours(config, tmp_path / "ours"), theirs(config, tmp_path / "theirs", fails=fails)
    assert_close(compared(merged, architecture, case, sliced), compared(other, architecture, case, sliced))
    if not fails:
        mine, other_config = config_of(tmp_path / "ours"), config_of(tmp_path / "theirs")
        lists = architecture.lists if sliced else ()
        assert without(mine, lists) == without(other_config, lists)
    native = converted(tmp_path / "ours.yml")
    assert "merge_method" not in native
    assert_same(ours(native, tmp_path / "native"), merged)
    assert config_of(tmp_path / "native") == config_of(tmp_path / "ours")


def compared(tensors: Tensors, architecture: Architecture, case: Case, sliced: bool) -> Tensors:
    """Leave out what is made otherwise on purpose."""
    where, pattern, key = architecture.not_compared
    holds = {"slices": sliced, "gradients": case.form in ("gradient", "both"), "": False}[where]
    assert not where or key in DIFFERENT
    return {name: values for name, values in tensors.items() if not (holds and matches(pattern, name))}


def without(config: Mapping[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    """Leave keys out of a config and of its parts."""
    return {
        key: without(value, keys) if isinstance(value, dict) else value
        for key, value in config.items()
        if key not in keys
    }


SELECTING = ("ties", "breadcrumbs", "breadcrumbs_ties", "sce")  # of equal changes mergekit keeps any: so none are equal


@pytest.mark.parametrize("case", IN_TURN[::5], ids=str)
def test_in_bf16_the_result_is_mergekits_in_float32_cast_once(models: Path, tmp_path: Path, case: Case) -> None:
    architecture = ARCHITECTURES[case.family]
    stored = case.family if case.method in SELECTING else f"{case.family}-bf16"
    config = configuration(case, architecture, models / stored)
    sliced = "layer_range" in str(config)
    exact = theirs(config, tmp_path / "theirs", fails=architecture.fails if sliced else "")
    merged = ours({**config, "dtype": "bfloat16"}, tmp_path / "ours")
    assert_cast_once(compared(merged, architecture, case, sliced), compared(exact, architecture, case, sliced))


def test_the_cases_cover_methods_architectures_and_layouts() -> None:
    assert len(IN_TURN) >= 200
    assert KINDS.keys() | ELSEWHERE == METHODS.keys()
    assert {(case.family, case.layout) for case in IN_TURN} == {
        (f, layout) for f in ARCHITECTURES for layout in LAYOUTS
    }
    assert {(case.family, case.form) for case in IN_TURN} == {(f, form) for f in ARCHITECTURES for form in FORMS}
    assert {(case.method, case.layout) for case in IN_TURN} == {(m, layout) for m in KINDS for layout in LAYOUTS}
