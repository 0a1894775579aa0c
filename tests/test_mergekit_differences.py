"""Where a mergekit file gives another result here than in mergekit 0.1.5, on purpose: each reason with its test."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.mergekit_files import LINEAR, NAMES
from tests.oracles.mergekit_0_1_5 import (
    assert_close,
    assert_same,
    config_of,
    ours,
    theirs,
)
from tests.oracles.mergekit_differences import DIFFERENT, differs
from tests.tiny_models import SIZES, save

pytestmark = pytest.mark.mergekit


@differs("bf16")
def test_the_result_is_cast_once_to_out_dtype(llama_family: Path, tmp_path: Path) -> None:
    folder = llama_family
    config: dict[str, Any] = {
        "merge_method": "ties",
        "base_model": str(folder / "base"),
        "models": [{"model": str(folder / name)} for name in "ab"],
        "parameters": {"weight": 0.7, "density": 0.5},
        "dtype": "float32",
    }
    exact = theirs(config, tmp_path / "fp32")
    merged = ours({**config, "dtype": "bfloat16"}, tmp_path / "ours")
    # where terms cancel, the last bit of an fp32 sum may decide on the rounding
    differing = sum(int((merged[name] != exact[name].bfloat16()).sum()) for name in exact)
    assert {values.dtype for values in merged.values()} == {torch.bfloat16}
    assert differing <= 3
    assert config_of(tmp_path / "ours")["dtype"] == "bfloat16"
    wide = ours({**config, "dtype": "bfloat16", "out_dtype": "float32"}, tmp_path / "wide")
    assert_close(wide, exact)


@differs("per-layer lists")
def test_a_stack_that_was_put_together_anew_loads_with_its_kinds_of_layers(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

    kinds = ["full_attention", "sliding_attention"] * 2
    more = {"layer_types": kinds, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 4}
    Qwen2ForCausalLM(Qwen2Config(**SIZES, num_key_value_heads=1, **more)).save_pretrained(tmp_path / "a")
    ranges = [[0, 3], [1, 4], [3, 4]]
    parts = [{"sources": [{"model": str(tmp_path / "a"), "layer_range": one}]} for one in ranges]
    config = {"merge_method": "passthrough", "slices": parts}
    theirs(config, tmp_path / "theirs", fails="num_hidden_layers")
    merged = ours(config, tmp_path / "ours")
    found = config_of(tmp_path / "ours")
    assert found["num_hidden_layers"] == 7
    assert found["layer_types"] == [*kinds[0:3], *kinds[1:4], *kinds[3:4]]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert_same(dict(model.state_dict()), merged)


@differs("dropped tensors")
def test_biases_that_mergekit_drops_are_merged(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        LlamaForCausalLM(LlamaConfig(**SIZES, attention_bias=True)).save_pretrained(tmp_path / name)
    config = {"merge_method": "linear", "models": [{"model": str(tmp_path / n)} for n in "ab"]}
    config["parameters"] = {"weight": 1.0}
    merged, other = ours(config, tmp_path / "ours"), theirs(config, tmp_path / "theirs")
    inputs = [load_file(tmp_path / name / "model.safetensors") for name in "ab"]
    assert merged.keys() == inputs[0].keys() > other.keys()
    assert_close(merged, {name: (inputs[0][name] + inputs[1][name]) / 2 for name in merged})


@differs("sources of the last slice")
def test_what_is_behind_the_layers_is_made_as_the_last_slice_is(llama_family: Path, tmp_path: Path) -> None:
    folder = llama_family
    source = lambda name, first, end: {"model": str(folder / name), "layer_range": [first, end]}  # noqa: E731
    config = {
        "merge_method": "linear",
        "parameters": {"weight": 1.0},
        "slices": [{"sources": [source("a", 0, 2)]}, {"sources": [source("a", 2, 4), source("b", 2, 4)]}],
    }
    merged, other = ours(config, tmp_path / "ours"), theirs(config, tmp_path / "theirs")
    a, b = (load_file(folder / name / "model.safetensors") for name in "ab")
    for name in ("model.norm.weight", "lm_head.weight"):
        torch.testing.assert_close(merged[name], (a[name] + b[name]) / 2)
        assert torch.equal(other[name], a[name])
    assert torch.equal(merged["model.embed_tokens.weight"], a["model.embed_tokens.weight"])


@differs("no base_model")
def test_without_a_base_config_and_files_are_those_of_the_first_model(llamas: Path) -> None:
    for name in NAMES:
        found = json.loads((llamas / name / "config.json").read_text())
        (llamas / name / "config.json").write_text(json.dumps({**found, "of": name}))
    ours(LINEAR + "models: [{model: b}, {model: a}]", llamas / "out")
    assert config_of(llamas / "out")["of"] == "b"
    ours(LINEAR + "base_model: base\nmodels: [{model: b}, {model: a}, {model: base}]", llamas / "with")
    assert config_of(llamas / "with")["of"] == "base"
    parts = "slices: [{sources: [{model: a, layer_range: [0, 2]}]}, {sources: [{model: b, layer_range: [2, 4]}]}]"
    ours("merge_method: passthrough\nbase_model: b\n" + parts, llamas / "sliced")
    assert config_of(llamas / "sliced")["of"] == "b"


@differs("layers that are none")
def test_the_maps_in_a_mergers_of_a_qwen_vl_are_no_layers(tmp_path: Path) -> None:
    for seed, name in enumerate("ab"):
        save("qwen2_5_vl", seed, tmp_path / name)
    config = {"merge_method": "passthrough", "models": [{"model": str(tmp_path / "b")}], "dtype": "float32"}
    config["parameters"] = {"scale": [1.0, 3.0]}
    merged, other = ours(config, tmp_path / "ours"), theirs(config, tmp_path / "theirs")
    stored = load_file(tmp_path / "b" / "model.safetensors")
    for name in ("visual.merger.mlp.0.weight", "visual.merger.mlp.2.weight", "visual.merger.ln_q.weight"):
        torch.testing.assert_close(merged[name], stored[name])  # outside the layers: the first of the gradient
    torch.testing.assert_close(other["visual.merger.mlp.2.weight"], stored["visual.merger.mlp.2.weight"] * 3)


@differs("tables of positions")
def test_t5s_table_of_positions_stays_in_the_first_block(tmp_path: Path) -> None:
    from transformers import T5ForConditionalGeneration

    save("t5", 1, tmp_path / "a")
    source = lambda *ends: {"sources": [{"model": str(tmp_path / "a"), "layer_range": list(ends)}]}  # noqa: E731
    sides = {"encoder": {"slices": [source(2, 4), source(0, 3)]}, "decoder": {"slices": [source(1, 3)]}}
    whole = {"models": [{"model": str(tmp_path / "a")}]}
    config = {"merge_method": "passthrough", "modules": {**sides, "shared": whole}}
    merged, other = ours(config, tmp_path / "ours"), theirs(config, tmp_path / "theirs")
    table = "{}.block.{}.layer.0.SelfAttention.relative_attention_bias.weight"
    assert [name for name in other if "relative" in name] == [table.format("encoder", 2)]  # and none of the decoder's
    stored = load_file(tmp_path / "a" / "model.safetensors")
    for side in ("encoder", "decoder"):
        torch.testing.assert_close(merged[table.format(side, 0)], stored[table.format(side, 0)])
    model, loaded = T5ForConditionalGeneration.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not loaded["missing_keys"]
    assert not loaded["unexpected_keys"]
    assert (model.config.num_layers, model.config.num_decoder_layers) == (5, 2)


@differs("names")
def test_a_llava_keeps_the_names_of_its_checkpoint_and_all_its_tensors(tmp_path: Path) -> None:
    for seed, name in enumerate("ab"):
        save("llava", seed, tmp_path / name)
    config = {"merge_method": "linear", "models": [{"model": str(tmp_path / name)} for name in "ab"]}
    config["parameters"] = {"weight": 1.0}
    merged, other = ours(config, tmp_path / "ours"), theirs(config, tmp_path / "theirs")
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert_close(merged, {name: (a[name] + b[name]) / 2 for name in a})
    assert {name.split(".")[1] for name in other} == {"vision_tower", "multi_modal_projector"}  # no text decoder


@differs("architectures")
@pytest.mark.parametrize(
    ("family", "more"),
    [
        ("t5", {"feed_forward_proj": "relu"}),
        ("whisper", {}),
        ("gemma3", {}),
        ("qwen2_vl", {}),
    ],
)
def test_what_mergekits_tables_do_not_fit_is_merged(family: str, more: dict[str, Any], tmp_path: Path) -> None:
    for seed, name in enumerate("ab"):
        save(family, seed, tmp_path / name, **more)
    config = {"merge_method": "linear", "models": [{"model": str(tmp_path / name)} for name in "ab"]}
    config["parameters"] = {"weight": 1.0}
    with pytest.raises(RuntimeError, match=r"not present in model|has no attribute num_hidden_layers"):
        theirs(config, tmp_path / "theirs")
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert_close(ours(config, tmp_path / "ours"), {name: (a[name] + b[name]) / 2 for name in a})


def test_every_difference_has_a_test() -> None:
    texts = [path.read_text(encoding="utf-8") for path in Path(__file__).parent.glob("test_mergekit_*.py")]
    tested = {key for text in texts for key in re.findall(r'^@differs\("(.+?)"\)$', text, re.MULTILINE)}
    assert DIFFERENT.keys() == tested


def test_every_difference_has_a_line_in_the_guide() -> None:
    page = (Path(__file__).parents[1] / "examples/guide/mergekit.md").read_text(encoding="utf-8")
    table = page.partition("| | mergekit 0.1.5 | here |\n|---|---|---|\n")[2].partition("\n\n")[0]
    assert sorted(row.split("|")[1].strip() for row in table.splitlines()) == sorted(DIFFERENT)
