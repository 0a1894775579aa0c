"""Tokenizer, chat template and generation config beside the weights of a merge that a mergekit file asks for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.mergekit_files import LINEAR
from tests.oracles.mergekit_0_1_5 import (
    config_of,
    converted,
    ours,
)
from tests.oracles.mergekit_differences import differs

pytestmark = pytest.mark.mergekit


@pytest.fixture
def tokenized(llamas: Path) -> Path:
    """Give base, a and b a tokenizer of 8 tokens beside embeddings of 32 rows, and two templates."""
    for name, template in (("base", "{{ 'base' }}"), ("a", "{{ 'a' }}"), ("b", "{{ 'a' }}")):
        write_tokenizer(llamas / name, [f"t{i}" for i in range(8)], template)
        (llamas / name / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 2]}))
    return llamas


def write_tokenizer(folder: Path, words: list[str], template: str) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, "t0")).save(str(folder / "tokenizer.json"))
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "of": folder.name, "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(about))


@differs("vocabularies")
@differs("generation_config")
@pytest.mark.parametrize("asked", ["tokenizer_source: base", "tokenizer: {source: base}", "tokenizer_source: b"])
def test_a_tokenizer_of_the_same_vocabulary_is_taken_and_no_row_cut(tokenized: Path, asked: str) -> None:
    merged = ours(LINEAR + "base_model: base\nmodels: [{model: a}, {model: b}]\n" + asked, tokenized / "out")
    assert merged["model.embed_tokens.weight"].shape == (32, 16)
    assert config_of(tokenized / "out")["vocab_size"] == 32
    wanted = "b" if asked.endswith(" b") else "base"
    assert json.loads((tokenized / "out" / "tokenizer_config.json").read_text())["of"] == wanted
    assert json.loads((tokenized / "out" / "generation_config.json").read_text()) == {"eos_token_id": [1, 2]}


def test_a_tokenizer_that_gives_other_ids_brings_the_rows_in_its_order(tokenized: Path) -> None:
    write_tokenizer(tokenized / "base", [f"t{7 - i}" for i in range(8)], "")
    merged = ours(LINEAR + "models: [{model: a}, {model: b}]\ntokenizer_source: ./base", tokenized / "out")
    a, b = (load_file(tokenized / name / "model.safetensors")["lm_head.weight"] for name in "ab")
    order = [*reversed(range(8)), *range(8, 32)]
    torch.testing.assert_close(merged["lm_head.weight"], (a[order] + b[order]) / 2)


@pytest.mark.parametrize(
    ("asked", "expected"),
    [("auto", "a"), ('"{% if true %}mine{% endif %}"', "mine"), ("|\n  {{ 'one' }}\n  two", "one\ntwo")],
)
def test_a_chat_template_is_written_and_used(tokenized: Path, asked: str, expected: str) -> None:
    from transformers import AutoTokenizer

    text = LINEAR + f"base_model: base\nmodels: [{{model: a}}, {{model: b}}]\nchat_template: {asked}\n"
    ours(text, tokenized / "out")
    tokenizer = AutoTokenizer.from_pretrained(tokenized / "out")
    assert tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False) == expected
    ours(converted(tokenized / "out.yml"), tokenized / "again", tokenized)
    template = "chat_template.jinja"
    assert (tokenized / "again" / template).read_text() == (tokenized / "out" / template).read_text()
