"""The components of real architectures, found by names: transformers' own modules as the oracle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from portmanteau.compositions.components import component, known, stack_of
from portmanteau.merge.names import Layers
from tests.tiny_models import make

# A family → its vision tower, and what joins that to the text decoder, as transformers calls them below `model`.
SEEING = {
    "llava": ("vision_tower", ("multi_modal_projector",)),
    "llava_next": ("vision_tower", ("multi_modal_projector", "image_newline")),
    "gemma3": ("vision_tower", ("multi_modal_projector",)),
    "paligemma": ("vision_tower", ("multi_modal_projector",)),
    "mistral3": ("vision_tower", ("multi_modal_projector",)),
    "internvl": ("vision_tower", ("multi_modal_projector",)),
    "qwen2_vl": ("visual", ("visual.merger",)),
    "qwen2_5_vl": ("visual", ("visual.merger",)),
    "qwen3_vl": ("visual", ("visual.merger", "visual.deepstack_merger_list")),
    "idefics3": ("vision_model", ("connector",)),
}
TEXT, VISION, JOINING = "text_decoder", "vision_tower", "multi_modal_projector"


def marked(model: Any, marks: dict[str, Any], folder: Path) -> dict[str, str]:
    """Fill modules with a number each, later ones over earlier ones, save the model, and read whose every tensor is."""
    for number, module in enumerate(marks.values()):
        for parameter in [module] if isinstance(module, torch.nn.Parameter) else module.parameters():
            parameter.data.fill_(number)
    model.save_pretrained(folder)
    return {name: list(marks)[int(values.max())] for name, values in load_file(folder / "model.safetensors").items()}


@pytest.mark.parametrize("family", SEEING)
def test_a_vision_language_model_is_taken_apart_as_transformers_does(family: str, tmp_path: Path) -> None:
    model = make(family)
    vision, joining = SEEING[family]
    marks = {TEXT: model, VISION: model.model.get_submodule(vision)}
    for path in joining:
        parent, _, name = path.rpartition(".")
        marks[f"{JOINING} {path}"] = getattr(model.model.get_submodule(parent), name)
    owner = {name: whose.partition(" ")[0] for name, whose in marked(model, marks, tmp_path).items()}
    for word in (TEXT, VISION, JOINING):
        assert component(word, owner) == [name for name, whose in owner.items() if whose == word]
    assert known(owner) == [TEXT, VISION, JOINING, "default"]
    assert {str(stack_of(word, Layers(owner), owner)) for word in (TEXT, VISION)} == {
        str(stack) for stack in Layers(owner).stacks
    }


@pytest.mark.parametrize("family", ["t5", "bart", "whisper"])
def test_an_encoder_and_a_decoder_are_taken_apart_as_transformers_does(family: str, tmp_path: Path) -> None:
    model = make(family)
    marks = {"": model, "encoder": model.get_encoder(), "decoder": model.get_decoder()}
    if family != "whisper":  # there the table of tokens is the decoder's
        marks["shared"] = model.get_input_embeddings()
    owner = {name: whose or "shared" for name, whose in marked(model, marks, tmp_path).items()}
    for word in ("encoder", "decoder", "shared"):
        assert component(word, owner) == [name for name, whose in owner.items() if whose == word]


def test_a_component_may_be_called_by_the_name_that_transformers_gives_its_layers(tmp_path: Path) -> None:
    make("llava").save_pretrained(tmp_path)
    names = load_file(tmp_path / "model.safetensors").keys()
    for word, prefix in (
        ("model.language_model.layers", "language_model.model.layers."),
        ("model.vision_tower.encoder.layers", "vision_tower.encoder.layers."),
        ("vision_tower.encoder", "vision_tower.encoder."),
    ):
        assert component(word, names) == [name for name in names if name.startswith(prefix)]
    assert component("audio_tower", names) == []


def test_a_language_model_is_all_text(tmp_path: Path) -> None:
    make("llama").save_pretrained(tmp_path)
    names = list(load_file(tmp_path / "model.safetensors"))
    assert component(TEXT, names) == names == component("default", names)
    assert known(names) == ["default"]
