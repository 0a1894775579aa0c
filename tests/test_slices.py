"""Stacks of layers put together anew: which layer goes where, what lies outside, and a config that is true."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from portmanteau import compositions, merge
from portmanteau.compositions import Slice, compose, load
from tests.conftest import Write

Save = Callable[[str, Mapping[str, Tensor]], Path]


@pytest.fixture(autouse=True)
def models(save_tensors: Save) -> None:
    """Save base (0), a (10) and b (20), each number higher by one in each of four layers, 9 outside the layers."""
    for name, value in (("base", 0.0), ("a", 10.0), ("b", 20.0)):
        tensors = {f"model.layers.{i}.mlp.up_proj.weight": torch.full((2, 2), value + i) for i in range(4)}
        tensors |= {f"model.layers.{i}.norm.weight": torch.full((2,), value + i) for i in range(4)}
        outside = ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")
        folder = save_tensors(name, tensors | {one: torch.full((3, 2), value + 9) for one in outside})
        (folder / "config.json").write_text(json.dumps({"num_hidden_layers": 4, "of": name}))


def built(path: Path) -> merge.Checkpoint:
    return compose(load(path))


def values(merged: merge.Checkpoint) -> list[float]:
    """Give the layers' values, bottom first; those of a layer are one."""
    count = merged.layers.stacks[0].count
    found = [merged[f"model.layers.{i}.mlp.up_proj.weight"][0, 0] for i in range(count)]
    assert [merged[f"model.layers.{i}.norm.weight"][0] for i in range(count)] == found
    return [round(float(one), 5) for one in found]


def outside(merged: merge.Checkpoint) -> list[float]:
    names = ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")
    return [round(float(merged[name][0, 0]), 5) for name in names]


def mistakes(path: Path) -> list[str]:
    with pytest.raises(merge.RecipeError) as caught:
        built(path)
    return [f"{m.where.removeprefix(f'{path}:')}: {m.what}" for m in caught.value.mistakes]


def test_layers_are_stacked_and_numbered_anew(write: Write) -> None:
    merged = built(write("merge: {slices: [{model: a, layers: [0, 3]}, {model: b, layers: [1, 4]}, {model: base}]}"))
    assert values(merged) == [10, 11, 12, 21, 22, 23, 0, 1, 2, 3]
    assert outside(merged) == [19, 9, 9]  # embeddings with the first slice, norm and head with the last
    assert merged.companions.config == {"num_hidden_layers": 10, "of": "a"}


def test_a_slice_may_be_merged_of_layers_of_several_models(write: Write) -> None:
    merged = built(
        write("""
        merge:
          slices:
            - {model: a, layers: [0, 1]}
            - {operator: linear, models: {a: 0.75, b: {weight: 0.25}}, layers: {a: [1, 3], b: [0, 2]}}
            - operator: task_arithmetic
              base: base
              models: [a, b]
              layers: {a: [0, 3], b: [1, 4], base: [1, 4]}
              weight: [0.0, 1.0]
    """)
    )
    # 0.75 · 11 + 0.25 · 20; then base + w ((a − base) + (b − base)) with w = 0, 0.5, 1: 9, 9 and 20, 20 apart
    assert values(merged) == [10, 13.25, 14.25, 1, 2 + 0.5 * (9 + 20), 3 + 9 + 20]
    assert outside(merged) == [19, 9, 9]  # outside, a gradient's first value: the base alone


def test_a_gradient_runs_over_the_slice_and_one_layer_takes_its_last_value(write: Write) -> None:
    merged = built(
        write("""
        merge:
          slices:
            - {operator: copy, models: [a], layers: [0, 3], factor: [0.0, 1.0]}
            - {model: a, layers: [3, 4], factor: [5.0, 2.0]}
    """)
    )
    assert values(merged) == [0, 5.5, 12, 26]
    assert outside(merged) == [0, 95, 95]


def test_choices_by_name_see_the_result_and_for_each_model_its_own_names(write: Write) -> None:
    merged = built(
        write("""
        merge:
          slices:
            - {model: a, layers: [0, 2]}
            - operator: linear
              models: {b: {weight: [{tensors: "*.layers.0.*", value: 2}, {value: 1}]}}
              layers: [0, 2]
              normalize: [{tensors: "*.layers.2.*|*.layers.3.*|*embed*|*norm*|lm_head*", value: false}, {value: true}]
    """)
    )
    assert values(merged) == [10, 11, 40, 21]


def test_what_lies_outside_may_be_taken_from_one_model(write: Write) -> None:
    merged = built(write("merge: {slices: {parts: [{model: a, layers: [0, 1]}, {model: b}], outside: base, donor: b}}"))
    assert outside(merged) == [9, 9, 9]
    assert merged.companions.config == {"num_hidden_layers": 5, "of": "b"}


def test_rules_hold_in_a_slice_and_steps_may_be_sliced(write: Write) -> None:
    merged = built(
        write("""
        steps:
          soup: {linear: {models: [a, b]}}
        merge:
          slices:
            - {model: soup, layers: [3, 4]}
            - operator: linear
              models: [a, b]
              layers: [0, 1]
              rules: [{tensors: "*norm*|*up_proj*", operator: copy, models: [b]}]
    """)
    )
    assert values(merged) == [18, 20]
    assert outside(merged) == [24, 29, 24]


def test_random_numbers_differ_between_slices_of_the_same_layers(write: Write) -> None:
    part = "{operator: dare, base: base, models: [a, b], layers: [0, 4], density: 0.5}"
    merged = built(write(f"merge: {{slices: [{part}, {part}]}}"))
    names = [f"model.layers.{i}.mlp.up_proj.weight" for i in range(8)]
    first, second = (torch.stack([merged[name] for name in half]) for half in (names[:4], names[4:]))
    assert not torch.equal(first, second)


def test_a_step_names_the_line_of_its_slice(write: Write) -> None:
    path = write("""
        merge:
          slices:
            - {model: a, layers: [0, 1]}
            - {model: b, layers: [0, 1]}
    """)
    steps = {step.output.name: step.why for step in merge.make_plan(built(path)).steps}
    assert steps["model.layers.0.norm.weight"] == f"{path}:4"
    assert steps["model.layers.1.norm.weight"] == f"{path}:5"


def test_from_python_nothing_is_read_until_it_is_asked_for(tmp_path: Path) -> None:
    a, b = merge.open(tmp_path / "a"), merge.open(tmp_path / "b")
    merged = compositions.slices(parts=[Slice({"a": a}, (0, 2)), Slice({"a": a, "b": b}, (2, 4), "linear")])
    assert values(merged) == [10, 11, 17, 18]


def test_lists_by_layer_are_put_together_from_the_configs_of_the_layers(write: Write, tmp_path: Path) -> None:
    for name, kinds in (("a", ["full", "slide", "full", "slide"]), ("b", ["slide", "slide", "slide", "full"])):
        found = {"num_hidden_layers": 4, "layer_types": kinds, "no_rope_layers": [1, 1, 1, 0]}
        found |= {"mlp_only_layers": [0, 3], "architectures": ["X"], "eos_token_id": [1, 2, 3, 4], "sizes": [7, 8]}
        (tmp_path / name / "config.json").write_text(json.dumps(found))
    merged = built(write("merge: {slices: [{model: a, layers: [0, 2]}, {model: b, layers: [1, 4]}]}"))
    assert merged.companions.config == {
        "num_hidden_layers": 5,
        "layer_types": ["full", "slide", "slide", "slide", "full"],
        "no_rope_layers": [1, 1, 1, 1, 0],
        "mlp_only_layers": [0, 4],
        "architectures": ["X"],
        "eos_token_id": [1, 2, 3, 4],
        "sizes": [7, 8],
    }


@pytest.mark.parametrize("key", ["n_layer", "num_layers", "n_layers"])
def test_the_count_is_true_under_each_of_its_names(write: Write, tmp_path: Path, key: str) -> None:
    (tmp_path / "a" / "config.json").write_text(json.dumps({key: 4, "text_config": {"num_hidden_layers": 4, "x": 1}}))
    merged = built(write("merge: {slices: [{model: a}, {model: a, layers: [0, 2]}]}"))
    assert merged.companions.config == {key: 4, "text_config": {"num_hidden_layers": 6, "x": 1}}
    (tmp_path / "a" / "config.json").write_text(json.dumps({key: 4}))
    merged = built(write("merge: {slices: [{model: a}, {model: a, layers: [0, 2]}]}"))
    assert merged.companions.config == {key: 6}


def test_a_config_that_speaks_of_positions_is_noted(write: Write, tmp_path: Path) -> None:
    (tmp_path / "a" / "config.json").write_text(json.dumps({"num_hidden_layers": 4, "first_k_dense_replace": 1}))
    merged = built(write("merge: {slices: [{model: a, layers: [1, 4]}]}"))
    assert isinstance(merged, merge.Composed)
    assert merged.notes == (
        "config.json gives layers their kind by position (first_k_dense_replace: 1): look whether it fits",
    )
    whole = built(write("merge: {slices: [{model: a}]}"))
    assert isinstance(whole, merge.Composed)
    assert whole.notes == ()


def test_a_stack_of_an_encoder_decoder_is_named_or_refused(write: Write, tmp_path: Path) -> None:
    from transformers import AutoModelForSeq2SeqLM, BartConfig, BartForConditionalGeneration

    sizes = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("ffn_dim", 8), ("layers", 3))}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    config = BartConfig(d_model=8, vocab_size=16, max_position_embeddings=8, pad_token_id=1, **sizes, **heads)
    BartForConditionalGeneration(config).save_pretrained(tmp_path / "bart")
    parts = "[{model: bart, layers: [0, 2]}, {model: bart, layers: [0, 3]}]"
    assert mistakes(write(f"merge: {{slices: {parts}}}"))[0] == (
        "1: slices: bart has 2 stacks of layers: model.decoder.layers (3), model.encoder.layers (3)"
    )
    for side, other in (("encoder", "decoder"), ("decoder", "encoder")):
        merged = built(write(f"merge: {{slices: {{parts: {parts}, stack: {side}}}}}"))
        config_ = merged.companions.config or {}
        assert (config_[f"{side}_layers"], config_[f"{other}_layers"]) == (5, 3)
        merge.build(merged, tmp_path / side)
        model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / side)
        assert len(model.get_submodule(f"model.{side}.layers")) == 5
        found, source = (load_file(tmp_path / n / "model.safetensors") for n in (side, "bart"))
        for name in source:
            assert torch.equal(found[name], source[name]) or f"{side}.layers.2" in name


PARTS = "merge: {slices: [%s]}"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (PARTS % "{model: a, layers: [0, 5]}", "1: slices: layers [0, 5] of a, which has 4"),
        (PARTS % "{model: a, layers: [2, 2]}", "1: slices: layers [2, 2] of a, which has 4"),
        (PARTS % "{model: a, layers: [-1, 2]}", "1: 0 is -1: input should be greater than or equal to 0"),
        (PARTS % "{model: a, layrs: [0, 2]}", "1: copy has no setting 'layrs'"),
        (PARTS % "{model: a, models: [a]}", "either `model`, or `models`"),
        (PARTS % "{models: [a, b]}", "1: copy takes exactly 1 models, 2 are given"),
        (PARTS % "{operator: slrp, models: [a, b]}", "1: unknown operator 'slrp'"),
        (PARTS % "{operator: slerp, models: [a, b], layers: {a: [0, 1], c: [0, 1]}}", "1: unknown model 'c'"),
        (PARTS % "{operator: slerp, models: [a, b], layers: {a: [0, 1]}}", "1: slices: a slice takes as many layers"),
        (PARTS % "{operator: ties, models: [a, b]}", "1: ties needs a base"),
        (PARTS % "{operator: linear, models: [a, c]}", "1: no model, file or folder 'c'"),
        (PARTS % "", "1: slices: there are no slices"),
    ],
)
def test_a_mistake_is_named(write: Write, text: str, found: str) -> None:
    assert any(found in one for one in mistakes(write(text)))


def test_the_nearest_key_of_a_slice_is_offered(write: Write) -> None:
    with pytest.raises(merge.RecipeError) as caught:
        built(write("merge: {slices: [{model: a, layrs: [0, 2]}]}"))
    assert caught.value.mistakes[0].hint == "did you mean 'layers'?"


def saved(save_tensors: Save, name: str, width: int = 2, **outside: Any) -> None:
    tensors = {f"model.layers.{i}.mlp.up_proj.weight": torch.ones(width, 2) for i in range(4)}
    tensors |= {f"model.layers.{i}.norm.weight": torch.ones(2) for i in range(4)}
    tensors |= {f"model.{one}.weight": torch.ones(3, 2) for one in ("embed_tokens", "norm")}
    save_tensors(name, tensors | outside)


def test_models_that_differ_outside_the_layers_are_refused_or_left_out_there(write: Write, save_tensors: Save) -> None:
    saved(save_tensors, "tied")
    parts = "[{model: a, layers: [0, 2]}, {model: tied, layers: [2, 4]}]"
    found = mistakes(write(f"merge: {{slices: {parts}}}"))
    assert found == ["1: slices: tied lacks what a has outside the layers: lm_head.weight"]
    assert values(built(write(f"merge: {{slices: {{parts: {parts}, outside: a}}}}"))) == [10, 11, 1, 1]


def test_layers_that_the_config_cannot_describe_are_refused(write: Write, save_tensors: Save) -> None:
    saved(save_tensors, "wide", 5, **{"lm_head.weight": torch.ones(3, 2)})
    (found,) = mistakes(write("merge: {slices: [{model: a, layers: [0, 2]}, {model: wide, layers: [2, 3]}]}"))
    assert found == ("1: slices: model.layers.2.mlp.up_proj.weight is [5, 2], and a, whose config is taken, has [2, 2]")


def test_a_config_of_shared_layers_is_refused(write: Write, tmp_path: Path) -> None:
    (tmp_path / "a" / "config.json").write_text(json.dumps({"num_hidden_layers": 12}))
    (found,) = mistakes(write("merge: {slices: [{model: a}]}"))
    assert found == (
        "1: slices: the tensor names show 4 layers in model.layers, and config.json says num_hidden_layers: 12"
    )


def test_models_whose_tokens_have_other_ids_are_refused(write: Write, tmp_path: Path) -> None:
    for name, words in (("a", {"x": 0, "y": 1}), ("b", {"x": 1, "y": 0})):
        (tmp_path / name / "tokenizer.json").write_text(json.dumps({"model": {"vocab": words}}))
    found = mistakes(write("merge: {slices: [{model: a, layers: [0, 2]}, {model: b, layers: [2, 4]}]}"))
    assert found == ["1: slices: b and the donor give other ids to 2 tokens: 'x', 'y'"]
