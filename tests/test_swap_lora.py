"""Layer swapping of adapters: the swap of the folded models as oracle, and what stands in the folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from portmanteau import compositions, merge
from tests.conftest import SaveLlama
from tests.test_combine_lora import opened
from tests.test_lora import ATTENTION, assert_same, save_adapter

pytestmark = pytest.mark.filterwarnings(
    "ignore:Setting `save_embedding_layers` to `True`:UserWarning",  # peft: it saves the base's embedding along
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",  # peft calls transformers by an old name
)
ENDS = "bottom: 2, top: 1"


@pytest.fixture
def base(save_llama: SaveLlama) -> Path:
    return save_llama("base", num_hidden_layers=8, tie_word_embeddings=False)


def composed(tmp_path: Path, text: str) -> merge.Composed:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return compositions.compose(compositions.load(path))


def swapped(tmp_path: Path, text: str) -> merge.Composed:
    return composed(tmp_path, f"merge: {{swap_lora: {{task: ./math, language: ./swahili, {text}}}}}\n")


def built(tmp_path: Path, text: str) -> Path:
    merge.build(swapped(tmp_path, text), tmp_path / "out", force=True)
    return tmp_path / "out"


def save_experts(base: Path, tmp_path: Path, task: dict[str, Any], language: dict[str, Any]) -> tuple[Path, Path]:
    return save_adapter(base, tmp_path / "math", **task), save_adapter(base, tmp_path / "swahili", seed=2, **language)


PLAIN = {"target_modules": ATTENTION, "lora_alpha": 16}


@pytest.mark.parametrize(
    ("task", "language", "text"),
    [
        (PLAIN, PLAIN, ""),
        (PLAIN, {"target_modules": [*ATTENTION, "up_proj"], "r": 3, "use_rslora": True}, ""),
        (PLAIN, {**PLAIN, "layers_to_transform": [0, 1, 2, 7]}, ""),
        (PLAIN, {**PLAIN, "rank_pattern": {r"layers\.[0-3]\..*": 2}, "alpha_pattern": {"q_proj": 5}}, ", blend: 0.25"),
        ({**PLAIN, "use_dora": True}, {**PLAIN, "use_dora": True}, ", transition: 0"),
        ({**PLAIN, "modules_to_save": ["lm_head"]}, {**PLAIN, "modules_to_save": ["lm_head"]}, ", outside: average"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, {"target_modules": ["embed_tokens"]}, ""),
        (PLAIN, PLAIN, ", modules: {attention: {bottom: 4, top: 0}}"),
    ],
)
def test_the_swapped_adapter_is_the_swap_of_the_folded_models(
    base: Path, tmp_path: Path, task: dict[str, Any], language: dict[str, Any], text: str
) -> None:
    save_experts(base, tmp_path, task, language)
    out = built(tmp_path, f"{ENDS}{text}, layers: 8")
    ours = opened(base, out).merge_and_unload().state_dict()
    models = "task: {path: ./base, lora: ./math}, language: {path: ./base, lora: ./swahili}"
    assert_same(composed(tmp_path, f"merge: {{layer_swap: {{{models}, {ENDS}{text}}}}}\n"), ours)


def test_outer_and_middle_layers_are_byte_for_byte_and_transitions_stand_side_by_side(
    base: Path, tmp_path: Path
) -> None:
    task, language = save_experts(base, tmp_path, PLAIN, {**PLAIN, "r": 3, "lora_alpha": 5})
    out = built(tmp_path, f"{ENDS}, transition: 1")
    ours, theirs, others = (load_file(one / "adapter_model.safetensors") for one in (out, task, language))
    layer = "base_model.model.model.layers.{}.self_attn.q_proj.lora_A.weight"
    for i, expected in enumerate("LLxTTTxL"):
        name = layer.format(i)
        if expected == "x":
            scales = 0.5 * 5 / 3, 0.5 * 16 / 4
            parts = [part * scale for part, scale in zip((others[name], theirs[name]), scales, strict=True)]
            torch.testing.assert_close(ours[name], torch.cat(parts))
        else:
            assert torch.equal(ours[name], (others if expected == "L" else theirs)[name])
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (7, 7)
    q = r"model\.layers\.{}\.self_attn\.q_proj"
    of_q = {i: config["rank_pattern"].get(q.format(i), 7) for i in range(8)}
    assert list(of_q.values()) == [3, 3, 7, 4, 4, 4, 7, 3]
    assert [config["alpha_pattern"].get(q.format(i), 7) for i in range(8)] == [5, 5, 7, 16, 16, 16, 7, 5]


def test_dora_magnitudes_go_with_their_factors(base: Path, tmp_path: Path) -> None:
    both = {**PLAIN, "use_dora": True}
    task, language = save_experts(base, tmp_path, both, both)
    stored = load_file(built(tmp_path, f"{ENDS}, transition: 0") / "adapter_model.safetensors")
    name = "base_model.model.model.layers.{}.self_attn.q_proj.lora_magnitude_vector"
    for layer, expert in ((0, language), (4, task)):
        expected = load_file(expert / "adapter_model.safetensors")[name.format(layer)]
        assert torch.equal(stored[name.format(layer)], expected)


def test_layers_that_adapters_do_not_show_are_counted_by_layers(base: Path, tmp_path: Path) -> None:
    save_experts(base, tmp_path, {**PLAIN, "layers_to_transform": [3, 4]}, {**PLAIN, "layers_to_transform": [0, 5]})
    merged = swapped(tmp_path, "bottom: 1, top: 1, transition: 0")
    assert merged.notes[-1] == "the adapters change 6 layers in model.layers; layers: says if the base has more"
    assert {merged.layers.place(name) is None for name in merged} == {True}  # layers 0, 3, 4, 5: no whole stack
    assert sorted({name.split(".")[4] for name in merged}) == ["0", "3", "4", "5"]
    more = swapped(tmp_path, "bottom: 1, top: 1, transition: 0, layers: 8")
    assert sorted({name.split(".")[4] for name in more}) == ["0", "3", "4"]
    assert "./swahili: lacks 4 modules of the others; its change of them is zero" in more.notes


def mistakes(tmp_path: Path, text: str) -> list[str]:
    with pytest.raises(merge.RecipeError) as caught:
        swapped(tmp_path, text)
    return [mistake.what for mistake in caught.value.mistakes]


def test_more_layers_than_there_are_are_refused(base: Path, tmp_path: Path) -> None:
    save_experts(base, tmp_path, PLAIN, PLAIN)
    asked = "bottom 5 + top 2 + transitions 2 = 9"
    assert mistakes(tmp_path, "bottom: 5, top: 2") == [
        f"swap_lora: base_model.model.model.layers has 8 layers, and {asked} are asked for".replace(
            "base_model.model.", ""
        )
    ]
    assert mistakes(tmp_path, f"{ENDS}, layers: 4") == ["swap_lora: is 4, and an adapter changes layer 7"]
    assert mistakes(tmp_path, "bottom: 1") == [
        "swap_lora: needs 'top': how many layers of the language expert at the top of model.layers"
    ]


def test_a_result_that_is_dora_in_part_is_refused(base: Path, tmp_path: Path) -> None:
    save_experts(base, tmp_path, {**PLAIN, "use_dora": True}, {**PLAIN, "use_dora": True})
    (what,) = mistakes(tmp_path, ENDS)
    assert what.startswith("swap_lora: some layers would be DoRA and 4 modules not, which no adapter can be: ")


def test_what_only_one_stores_whole_is_not_mixed(base: Path, tmp_path: Path) -> None:
    save_experts(base, tmp_path, PLAIN, {**PLAIN, "modules_to_save": ["lm_head"]})
    what = "swap_lora: only one adapter stores these whole, and both are to be mixed there: lm_head.weight"
    assert mistakes(tmp_path, f"{ENDS}, outside: average") == [what]
    assert "base_model.model.lm_head.weight" in swapped(tmp_path, ENDS)
    assert "base_model.model.lm_head.weight" not in swapped(tmp_path, f"{ENDS}, outside: task")
