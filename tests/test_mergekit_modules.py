"""Bundles and modules of mergekit files: merges of several parts, over toy and real architectures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from textwrap import dedent

import pytest
import torch
from safetensors.torch import load_file, save_file

from portmanteau import merge
from portmanteau.compositions.components import component, stack_of
from portmanteau.merge.names import Layers, Stack
from tests.mergekit_files import NAMES, notes, said
from tests.oracles.mergekit_0_1_5 import (
    Tensors,
    assert_close,
    config_of,
    ours,
)
from tests.oracles.mergekit_differences import differs
from tests.tiny_models import save

pytestmark = pytest.mark.mergekit


@differs("stages")
def test_a_bundle_is_one_merge_whose_stages_are_never_files(llamas: Path) -> None:
    text = """
        name: soup
        merge_method: linear
        parameters: {weight: 1.0}
        models: [{model: a}, {model: b}]
        dtype: bfloat16
        ---
        merge_method: task_arithmetic
        base_model: base
        parameters: {weight: 0.5}
        models: [{model: soup}]
        dtype: float32
    """
    assert notes(text, llamas) == ("line 5: dtype: bfloat16 of the stage 'soup' has no effect: no stage is rounded",)
    before = {path.name for path in llamas.iterdir()}
    merged = ours(dedent(text), llamas / "out")
    assert {path.name for path in llamas.iterdir()} - before == {"out", "out.yml"}
    base, a, b = (load_file(llamas / name / "model.safetensors") for name in NAMES)
    for name, values in merged.items():
        assert values.dtype == torch.float32
        torch.testing.assert_close(values, base[name] / 2 + (a[name] + b[name]) / 4, rtol=1e-6, atol=1e-6)


def test_what_is_said_of_a_stage_is_said_of_the_result(llamas: Path) -> None:
    stage = "name: soup\nmerge_method: linear\nparameters: {weight: [{filter: mpl, value: 2.0}, {value: 1.0}]}\n"
    final = (
        "\n---\nmerge_method: task_arithmetic\nbase_model: base\nparameters: {weight: 0.5}\nmodels: [{model: soup}]\n"
    )
    note = "no tensor is called *mpl*: what is asked for it changes nothing"
    assert notes(stage + "models: [{model: a}, {model: b}]" + final, llamas) == (note,)


@pytest.fixture
def towers(save_tensors: Callable[[str, Tensors], Path], tmp_path: Path) -> Path:
    """Save a (ones) and b (threes), models of text, vision and what joins them."""
    for name, value in (("a", 1.0), ("b", 3.0)):
        tensors = {
            f"{prefix}.layers.{i}.mlp.weight": torch.full((2, 2), value + i / 8)
            for prefix in ("language_model.model", "vision_tower.encoder")
            for i in range(2)
        }
        tensors |= {"multi_modal_projector.linear.weight": torch.full((2, 2), value)}
        save_tensors(name, tensors | {"language_model.lm_head.weight": torch.full((2, 2), value)})
    return tmp_path


MODULES = """
merge_method: linear
modules:
  vision_tower: {models: [{model: a}], parameters: {weight: 1.0}}
  multi_modal_projector: {models: [{model: b}]}
  text_decoder:
    slices:
      - sources: [{model: b, layer_range: [0, 2]}]
      - sources: [{model: a, layer_range: [0, 2]}, {model: b, layer_range: [0, 2]}]
parameters: {weight: 2.0}
"""


def test_each_module_is_merged_in_its_own_way(towers: Path) -> None:
    merged = ours(MODULES, towers / "out")
    values = {name: float(tensor[0, 0]) for name, tensor in merged.items()}
    assert values == {
        "vision_tower.encoder.layers.0.mlp.weight": 1.0,
        "vision_tower.encoder.layers.1.mlp.weight": 1.125,
        "multi_modal_projector.linear.weight": 3.0,
        "language_model.model.layers.0.mlp.weight": 3.0,
        "language_model.model.layers.1.mlp.weight": 3.125,
        "language_model.model.layers.2.mlp.weight": 2.0,
        "language_model.model.layers.3.mlp.weight": 2.125,
        "language_model.lm_head.weight": 2.0,
    }


def test_a_module_may_become_shorter(towers: Path) -> None:
    text = MODULES.replace(
        "layer_range: [0, 2]}]\n      - sources: [{model: a, layer_range: [0, 2]}, ", "layer_range: [0, 1]}]\n      # "
    )
    merged = ours(text, towers / "out")
    layers = [name for name in merged if ".layers." in name]
    assert sorted(layers) == [
        "language_model.model.layers.0.mlp.weight",
        "vision_tower.encoder.layers.0.mlp.weight",
        "vision_tower.encoder.layers.1.mlp.weight",
    ]


@differs("modules")
def test_tensors_of_no_module_are_refused(towers: Path) -> None:
    text = "merge_method: linear\nparameters: {weight: 1}\nmodules:\n  vision_tower: {models: [{model: a}]}\n"
    (found,) = said(text, towers)
    assert found == (
        "3: assemble: no part takes language_model.lm_head.weight, language_model.model.layers.0.mlp.weight, "
        "language_model.model.layers.1.mlp.weight, multi_modal_projector.linear.weight "
        "(there are: text_decoder, vision_tower, multi_modal_projector, default; the last takes the rest)"
    )


# ---- real architectures -----------------------------------------------------------------------------------------

SEEING = ("llava", "llava_next", "gemma3", "paligemma", "mistral3", "idefics3", "internvl")
SEEING += ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")


@pytest.mark.parametrize("family", SEEING)
def test_a_vision_language_model_is_merged_by_component_and_loads(family: str, tmp_path: Path) -> None:
    from transformers import AutoModelForImageTextToText

    for seed, name in enumerate("ab"):
        save(family, seed, tmp_path / name)
    a, b = ({"model": str(tmp_path / name)} for name in "ab")
    slices = [[{**a, "layer_range": [0, 2]}], [{**a, "layer_range": [1, 2]}, {**b, "layer_range": [2, 3]}]]
    modules = {
        "text_decoder": {"slices": [{"sources": sources} for sources in slices]},
        "multi_modal_projector": {"models": [a, b]},
        "vision_tower": {"slices": [{"sources": [{**b, "layer_range": ends}]} for ends in ([0, 2], [1, 2])]},
    }
    merged = ours({"merge_method": "linear", "parameters": {"weight": 1.0}, "modules": modules}, tmp_path / "out")
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    text, vision = (stack_of(word, Layers(first), first) for word in ("text_decoder", "vision_tower"))
    assert text is not None
    assert vision is not None

    def layer(stack: Stack, number: int, tensors: Tensors) -> Tensors:
        start = f"{stack}.{number}."
        return {name.removeprefix(start): tensors[name] for name in tensors if name.startswith(start)}

    def mean(one: Tensors, other: Tensors) -> Tensors:
        return {name: (one[name] + other[name]) / 2 for name in one}

    expected = [layer(text, 0, first), layer(text, 1, first), mean(layer(text, 1, first), layer(text, 2, second))]
    for number, values in enumerate(expected):
        assert_close(layer(text, number, merged), values)
    for number, own in enumerate([0, 1, 1]):
        assert_close(layer(vision, number, merged), layer(vision, own, second))
    joining = component("multi_modal_projector", first)
    assert_close({name: merged[name] for name in joining}, mean({n: first[n] for n in joining}, second))
    _, found = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not found["missing_keys"]
    assert not found["unexpected_keys"]
    assert not found["mismatched_keys"]


@pytest.mark.parametrize("depth", [3, 2, 5])
def test_a_language_model_becomes_the_text_decoder_of_a_vision_language_model(depth: int, tmp_path: Path) -> None:
    from transformers import AutoModelForImageTextToText

    save("llava", 1, tmp_path / "seeing")
    for seed, name in ((2, "one"), (3, "two")):
        save("llama", seed, tmp_path / name, num_hidden_layers=depth)
    text = """
        merge_method: linear
        parameters: {weight: 1.0}
        modules:
          vision_tower: {models: [{model: seeing}]}
          multi_modal_projector: {models: [{model: seeing}]}
          text_decoder: {models: [{model: one}, {model: two}]}
    """
    merged = ours(dedent(text), tmp_path / "out")
    seeing, one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("seeing", "one", "two"))
    mean = {f"language_model.{name}": (one[name] + two[name]) / 2 for name in one}
    assert_close(merged, {name: seeing[name] for name in seeing if "language_model" not in name} | mean)
    assert config_of(tmp_path / "out")["text_config"]["num_hidden_layers"] == depth
    _, found = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(found[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    (told,) = notes(text, tmp_path)
    assert told.endswith("tensors renamed to those of seeing: prefix 'language_model.' added")


def test_a_recipe_merges_a_language_model_into_a_component(tmp_path: Path) -> None:
    save("llava", 1, tmp_path / "vlm")
    save("llama", 2, tmp_path / "llm", num_hidden_layers=3)
    recipe = """
        steps: {text: {linear: {models: {./vlm: 0.75, ./llm: 0.25}, only: text_decoder}}}
        merge: {assemble: {parts: {text_decoder: text, default: ./vlm}, donor: ./vlm}}
    """
    merged = ours(dedent(recipe), tmp_path / "out")
    vlm, llm = (load_file(tmp_path / name / "model.safetensors") for name in ("vlm", "llm"))
    text = {f"language_model.{name}": vlm[f"language_model.{name}"] * 0.75 + llm[name] * 0.25 for name in llm}
    assert_close(merged, {**vlm, **text})
    with pytest.raises(merge.RecipeError, match="vlm has no component 'audio_tower'"):
        ours(dedent(recipe).replace("only: text_decoder", "only: audio_tower"), tmp_path / "wrong")


def test_what_a_module_does_not_merge_may_differ(tmp_path: Path) -> None:
    save("llava", 1, tmp_path / "a")
    save("llava", 2, tmp_path / "b", image_seq_length=16)
    tensors = load_file(tmp_path / "b" / "model.safetensors")
    tensors["vision_tower.embeddings.patch_embedding.weight"] = torch.zeros(16, 3, 2, 2)
    save_file(tensors, tmp_path / "b" / "model.safetensors", {"format": "pt"})
    text = """
        merge_method: linear
        parameters: {weight: 1.0}
        modules:
          vision_tower: {models: [{model: a}]}
          multi_modal_projector: {models: [{model: a}]}
          text_decoder: {models: [{model: a}, {model: b}]}
    """
    merged = ours(dedent(text), tmp_path / "out")
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    text_only = {name: (a[name] + b[name]) / 2 for name in component("text_decoder", a)}
    assert_close(merged, {**a, **text_only})


@pytest.mark.parametrize("family", ["qwen2", "gpt2", "t5", "gemma3", "paligemma"])
def test_a_tied_head_stays_tied(family: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForSeq2SeqLM

    for seed, name in enumerate("ab"):
        save(family, seed, tmp_path / name)
    models = [{"model": str(tmp_path / name)} for name in "ab"]
    merged = ours({"merge_method": "linear", "parameters": {"weight": 1.0}, "models": models}, tmp_path / "out")
    assert not any("lm_head" in name for name in merged)
    kinds = {"t5": AutoModelForSeq2SeqLM, "qwen2": AutoModelForCausalLM, "gpt2": AutoModelForCausalLM}
    model = kinds.get(family, AutoModelForImageTextToText).from_pretrained(tmp_path / "out")
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
