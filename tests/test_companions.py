"""What goes with the weights: a config that is true to them, the tokenizer and its friends, the model card."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from portmanteau import merge
from portmanteau.compositions import tensorwise
from portmanteau.merge import CheckpointError, StoredCheckpoint
from portmanteau.merge.companions import is_companion, vocabulary

SaveLlama = Callable[..., Path]
SaveTensors = Callable[[str, Mapping[str, Tensor]], Path]

CARRIED = {
    "generation_config.json": "{}",
    "tokenizer.json": "{}",
    "tokenizer_config.json": "{}",
    "special_tokens_map.json": "{}",
    "tokenizer.model": "sentencepiece",
    "source.spm": "sentencepiece",
    "vocab.txt": "[PAD]\n",
    "merges.txt": "a b\n",
    "chat_template.jinja": "{{ messages }}",
    "additional_chat_templates/tool_use.jinja": "{{ tools }}",
    "preprocessor_config.json": "{}",
    "configuration_own.py": "class Own: ...\n",
    "LICENSE": "free",
}
LEFT = {
    "README.md": "# another model",
    "pytorch_model.bin.index.json": "{}",
    "training_args.bin": "x",
    "trainer_state.json": "{}",
    "original/params.json": "{}",
    "original/tokenizer.model": "x",
    ".gitattributes": "x",
}


def add(folder: Path, files: Mapping[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)


def written_config(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


def test_what_belongs_to_a_model_is_carried_over_byte_for_byte(save_tensors: SaveTensors, tmp_path: Path) -> None:
    folder = save_tensors("in", {"x": torch.ones(1)})
    add(folder, {**CARRIED, **LEFT})
    merge.build(merge.open(folder), tmp_path / "out")
    out = tmp_path / "out"
    found = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert found == {*CARRIED, "model.safetensors", "README.md", "portmanteau.json"}
    assert {name: (out / name).read_text() for name in CARRIED} == CARRIED


@pytest.mark.parametrize("name", [*LEFT, "model.safetensors", "checkpoint-1/tokenizer.json", "onnx/config.json"])
def test_what_belongs_to_another_model_is_left(name: str) -> None:
    assert not is_companion(name)


def test_the_config_says_the_dtype_that_the_weights_have(save_llama: SaveLlama, tmp_path: Path) -> None:
    source = save_llama("in", dtype=torch.float32)
    assert written_config(source)["dtype"] == "float32"
    merge.build(merge.open(source), tmp_path / "out", dtype="bfloat16")
    found = written_config(tmp_path / "out")
    assert found.pop("dtype") == "bfloat16"
    assert {**written_config(source), **found} == written_config(source) | found
    assert {key: value for key, value in written_config(source).items() if key != "dtype"} == found


def test_the_dtype_is_that_of_most_bytes(save_tensors: SaveTensors, tmp_path: Path) -> None:
    folder = save_tensors("in", {"w": torch.ones(100).bfloat16(), "norm": torch.ones(3), "ids": torch.arange(1000)})
    add(folder, {"config.json": json.dumps({"torch_dtype": "float32"})})
    merge.build(merge.open(folder), tmp_path / "out")
    assert written_config(tmp_path / "out") == {"torch_dtype": "bfloat16"}


def test_the_dtypes_inside_a_config_of_several_parts_are_true_too(save_tensors: SaveTensors, tmp_path: Path) -> None:
    folder = save_tensors("in", {"language_model.w": torch.ones(4), "vision_tower.w": torch.ones(4)})
    inner = {"dtype": "float32", "hidden_size": 4}
    add(folder, {"config.json": json.dumps({"dtype": "float32", "text_config": inner, "vision_config": inner})})
    merge.build(merge.open(folder), tmp_path / "out", dtype="float16")
    found = written_config(tmp_path / "out")
    assert [found["dtype"], found["text_config"]["dtype"], found["vision_config"]["dtype"]] == ["float16"] * 3


def test_the_vocabulary_size_is_the_number_of_embedding_rows(save_llama: SaveLlama, tmp_path: Path) -> None:
    source = save_llama("in", vocab_size=40)
    weights = load_file(source / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weights[name] = torch.cat([weights[name], torch.ones(8, 16)])
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    merge.build(merge.open(source), tmp_path / "out")
    assert written_config(tmp_path / "out")["vocab_size"] == 48
    assert merge.open(tmp_path / "out").to_model().get_input_embeddings().weight.shape == (48, 16)


def test_the_vocabulary_size_of_a_text_part_is_true_too(save_tensors: SaveTensors, tmp_path: Path) -> None:
    folder = save_tensors("in", {"language_model.model.embed_tokens.weight": torch.ones(6, 2)})
    parts = {"text_config": {"vocab_size": 4}, "vision_config": {"vocab_size": 9}}
    add(folder, {"config.json": json.dumps(parts)})
    merge.build(merge.open(folder), tmp_path / "out")
    found = written_config(tmp_path / "out")
    assert (found["text_config"]["vocab_size"], found["vision_config"]["vocab_size"]) == (6, 9)


def test_a_donor_without_a_generation_config_leaves_the_own_one(save_tensors: SaveTensors) -> None:
    one, other = (save_tensors(name, {"x": torch.ones(1)}) for name in "ab")
    add(one, {"generation_config.json": '{"a": 1}', "tokenizer.json": "{}"})
    add(other, {"tokenizer.json": "{}"})
    found = merge.open(one).companions.with_tokenizer_of(merge.open(other).companions)
    assert {name: path.parent.name for name, path in found.files.items()} == {
        "generation_config.json": "a",
        "tokenizer.json": "b",
    }


def test_the_tokenizer_of_a_named_donor_is_taken_with_its_template(save_tensors: SaveTensors) -> None:
    one, other = (save_tensors(name, {"x": torch.ones(1)}) for name in "ab")
    add(one, {"config.json": "{}", "tokenizer.json": '{"a": 1}', "chat_template.jinja": "one"})
    add(other, {"config.json": '{"x": 1}', "tokenizer.json": '{"b": 1}', "vocab.txt": "x"})
    found = merge.open(one).companions.with_tokenizer_of(merge.open(other).companions)
    assert found.config == {}
    assert {name: path.parent.name for name, path in found.tokenizer_files.items()} == {
        "tokenizer.json": "b",
        "vocab.txt": "b",
    }


def test_a_result_loads_with_transformers_as_it_is(save_llama: SaveLlama, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    models = {name: merge.open(save_llama(name, seed)) for seed, name in enumerate("ab")}
    merge.build(tensorwise("linear", models=models), tmp_path / "out", dtype="bfloat16")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.bfloat16
    pairs = [load_file(tmp_path / name / "model.safetensors") for name in "ab"]
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, ((pairs[0][name] + pairs[1][name]) / 2).bfloat16(), rtol=0, atol=0)


def test_a_model_in_memory_is_the_one_that_was_saved(save_llama: SaveLlama) -> None:
    source = save_llama("in")
    model = merge.open(source).to_model()
    assert type(model).__name__ == "LlamaForCausalLM"
    for name, tensor in load_file(source / "model.safetensors").items():
        torch.testing.assert_close(model.state_dict()[name], tensor, rtol=0, atol=0)


def test_without_a_config_there_is_no_model(save_tensors: SaveTensors) -> None:
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        merge.open(save_tensors("in", {"x": torch.ones(1)})).to_model()


# the model card


def front_matter(folder: Path) -> tuple[dict[str, Any], str]:
    _, front, body = (folder / "README.md").read_text().split("---\n", 2)
    found: dict[str, Any] = yaml.safe_load(front)
    return found, body


def test_the_card_has_front_matter_that_the_hub_reads(save_tensors: SaveTensors, tmp_path: Path) -> None:
    recipe = "merge:\n  linear: {models: [a, b]}  # ```half``` and half\n"
    models = {name: merge.open(save_tensors(name, {"x": torch.ones(1)})) for name in "ab"}
    merge.build(tensorwise("linear", models=models), tmp_path / "out", recipe=recipe)
    front, body = front_matter(tmp_path / "out")
    assert front == {"library_name": "transformers", "tags": ["merge", "portmanteau"]}
    assert "| linear | a, b | 1 |" in body
    assert f"````yaml\n{recipe}````" in body


def test_the_card_names_the_parents_on_the_hub_and_no_local_folder(
    save_tensors: SaveTensors, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(save_tensors("runs", {"x": torch.ones(1)}).parent)
    (tmp_path / "models").mkdir()
    (tmp_path / "runs").rename(tmp_path / "models" / "math")
    local = merge.open("models/math")  # looks like a Hub id
    hub = StoredCheckpoint("swahili", local.files, local.companions, "3f2a", "org/swahili-expert")
    merge.build(tensorwise("linear", models={"math": local, "swahili": hub}), tmp_path / "out")
    assert front_matter(tmp_path / "out")[0]["base_model"] == ["org/swahili-expert"]


# the vocabulary


def test_the_vocabulary_has_added_tokens(save_tensors: SaveTensors) -> None:
    folder = save_tensors("in", {"x": torch.ones(1)})
    tokens = {"model": {"vocab": {"a": 0, "b": 1}}, "added_tokens": [{"content": "<eos>", "id": 2}]}
    add(folder, {"tokenizer.json": json.dumps(tokens)})
    assert vocabulary(merge.open(folder).companions) == {"a": 0, "b": 1, "<eos>": 2}


def test_a_unigram_vocabulary_is_counted(save_tensors: SaveTensors) -> None:
    folder = save_tensors("in", {"x": torch.ones(1)})
    add(folder, {"tokenizer.json": json.dumps({"model": {"vocab": [["<unk>", 0.0], ["▁a", -1.5]]}})})
    assert vocabulary(merge.open(folder).companions) == {"<unk>": 0, "▁a": 1}


def test_the_vocabulary_of_bert_is_a_list_of_lines(save_tensors: SaveTensors) -> None:
    folder = save_tensors("in", {"x": torch.ones(1)})
    add(folder, {"vocab.txt": "[PAD]\nhabari\n"})
    assert vocabulary(merge.open(folder).companions) == {"[PAD]": 0, "habari": 1}


def test_without_tokenizer_files_the_vocabulary_is_not_known(save_tensors: SaveTensors) -> None:
    assert vocabulary(merge.open(save_tensors("in", {"x": torch.ones(1)})).companions) is None
