"""Models of several vocabularies: the same mergekit YAML given to mergekit 0.1.5 and to us, over generated tokenizers.

Four kinds of tokenizers, each trained on texts of its own, so that vocabularies overlap, are ordered otherwise, and
have special tokens that the others lack. What differs on purpose stands in DIFFERENT.
"""

from __future__ import annotations

import itertools
import json
import re
import shutil
import subprocess
import sys
import warnings
from array import array
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from portmanteau import compositions, merge
from portmanteau.compositions import RowOf, TokenRule, compose, load, with_vocabulary
from portmanteau.compositions.recipe import text as recipe_text
from portmanteau.compositions.vocabulary.chat_templates import TEMPLATES
from portmanteau.merge.evaluate import Evaluation, Session
from portmanteau.merge.rows import FILL, MEAN, ZERO, RowMap, rows_of
from portmanteau.merge.tensor_spec import TensorSpec

with warnings.catch_warnings():
    # mergekit.io.lazy_unpickle names numpy.core, which NumPy 2 calls numpy._core
    warnings.filterwarnings("ignore", "numpy.core is deprecated", DeprecationWarning)
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

Tensors = Mapping[str, Tensor]
DROPPED = r"predictions\.transform"  # by mergekit: its table of BERTs does not name them
TABLE = r"embed_tokens|word_embeddings|lm_head|predictions\.(bias|decoder)"
OPTIONS = MergeOptions(quiet=True, copy_tokenizer=False, write_model_card=False)
SIZES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
}
KINDS = ("bytes", "fallback", "wordpiece", "unigram", "tied")
NAMES = ("base", "a", "b")
TEXTS = {
    "base": "the merged model reads the words of the other models and the words of the first",
    "a": "watu wote wanasoma maneno ya lugha nyingine na maneno ya kwanza the model reads",
    "b": "other words are in the other model words in models the reader reads wanasoma",
}
SPECIAL = {"base": (), "a": ("<|im_start|>", "<|im_end|>"), "b": ("<|tool|>", "<|im_end|>")}
SAMPLES = (
    "the models read maneno ya kwanza",
    "<|im_start|>watu wanasoma<|im_end|>",
    "words of <|tool|> and the other é ☃",
    "<s>the first</s>",
)

DIFFERENT = {  # what is another result on purpose, each with its test below
    "order": "mergekit numbers the ordinary tokens that a union adds in an order that changes from run to run",
    "slices": "mergekit gives a token zeros that the models of one slice lack; we take the other models' rows too",
    "padding": "mergekit cuts rows beyond the tokens; we keep them where all models, or the tokenizer's, have them",
    "special ids": "mergekit leaves the ids in config.json as they were in the base; we translate them",
    "generation config": "mergekit loses generation_config.json; we keep it, its ids translated",
    "unused": "mergekit fails where the tokenizer's model has tokens without rows; we leave those tokens out",
    "templates": "mergekit's alpaca, llama3 and exaone stray from the published white space; ours do not",
}
_TESTED: set[str] = set()


def differs(key: str) -> Callable[[Any], Any]:
    """Mark the test of a deliberate difference."""
    assert key in DIFFERENT
    _TESTED.add(key)
    return lambda test: test


# ---- tokenizers and models --------------------------------------------------------------------------------------


def tokenizer(kind: str, name: str) -> Any:
    """Train a small tokenizer on the text of that name."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    text = [TEXTS[name]] * 4
    if kind in ("bytes", "tied"):
        made = Tokenizer(models.BPE())
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=290, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
        )
        made.train_from_iterator(text, trainer)
        kinds = {"bos_token": "<s>", "eos_token": "</s>"}
    elif kind == "fallback":
        made = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
        first = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
        made.train_from_iterator(text, trainers.BpeTrainer(vocab_size=310, special_tokens=first, show_progress=False))
        found = json.loads(made.to_str())
        found["added_tokens"] = found["added_tokens"][:3]
        made = Tokenizer.from_str(json.dumps(found))
        kinds = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    elif kind == "wordpiece":
        made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        made.normalizer, made.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
        marks = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        made.train_from_iterator(
            text, trainers.WordPieceTrainer(vocab_size=70, special_tokens=marks, show_progress=False)
        )
        made.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
        kinds = {f"{mark[1:-1].lower()}_token": mark for mark in marks}
    else:
        made = Tokenizer(models.Unigram())
        made.pre_tokenizer = pre_tokenizers.Metaspace()
        made.train_from_iterator(
            text,
            trainers.UnigramTrainer(
                vocab_size=40, special_tokens=["<s>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
            ),
        )
        kinds = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    result = transformers.PreTrainedTokenizerFast(tokenizer_object=made, **kinds)
    result.add_tokens([transformers.AddedToken(one, special=True) for one in SPECIAL[name]])
    result.chat_template = f"{{{{ '{name}' }}}}"
    return result


def model(kind: str, seed: int, rows: int) -> Any:
    """Make a model with so many rows."""
    from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes = {**SIZES, "vocab_size": rows}
    if kind == "wordpiece":
        made: Any = BertForMaskedLM(BertConfig(**sizes))
    elif kind == "tied":
        made = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=1, tie_word_embeddings=True))
    else:
        made = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=1, bos_token_id=0, eos_token_id=1))
    for parameter in made.parameters():
        parameter.data = torch.randn(parameter.shape)
    return made


def save(folder: Path, kind: str, name: str, padding: int = 0) -> None:
    """Save a model and its tokenizer."""
    words = tokenizer(kind, name)
    model(kind, NAMES.index(name), len(words) + padding).save_pretrained(folder)
    words.save_pretrained(folder)
    if kind == "wordpiece":  # mergekit asks for a pooler, which models with this head lack
        more = {"bert.pooler.dense.weight": torch.eye(16), "bert.pooler.dense.bias": torch.zeros(16)}
        save_file({**load_file(folder / "model.safetensors"), **more}, folder / "model.safetensors", {"format": "pt"})


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save base, a and b of each kind: KIND/NAME."""
    folder = tmp_path_factory.mktemp("models")
    for kind, name in itertools.product(KINDS, NAMES):
        save(folder / kind / name, kind, name)
    return folder


# ---- the two programs -------------------------------------------------------------------------------------------


def theirs(config: Mapping[str, Any], out: Path) -> Path:
    """Let mergekit merge."""
    run_merge(MergeConfiguration.model_validate(config), str(out), OPTIONS)
    return out


def ours(config: Mapping[str, Any] | str, out: Path, folder: Path | None = None) -> Path:
    """Build a mergekit YAML, or a recipe of ours, given as its text."""
    path = (folder or out.parent) / f"{out.name}.yml"
    path.write_text(config if isinstance(config, str) else yaml.safe_dump(dict(config), sort_keys=False))
    loaded = load(path)
    merge.build(compose(loaded), out, dtype=loaded.output.dtype, recipe=loaded.text)
    return out


def auto(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def weights(folder: Path) -> Tensors:
    return load_file(folder / "model.safetensors")


def written(folder: Path, name: str = "config.json") -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / name).read_text())
    return found


def config_of(folder: Path) -> dict[str, Any]:
    """Give the config, but for the ids of tokens: mergekit does not translate them."""
    return {
        key: value for key, value in written(folder).items() if "_token_id" not in key and key != "transformers_version"
    }


def assert_alike(one: Path, other: Path) -> None:
    """Compare two results token by token: rows, all other tensors, config, and how text is cut."""
    mine, their = auto(one), auto(other)
    assert mine.get_vocab().keys() == their.get_vocab().keys()
    ids = sorted((i, their.get_vocab()[word]) for word, i in mine.get_vocab().items())
    left, right = ([pair[side] for pair in ids] for side in (0, 1))
    ours_, theirs_ = weights(one), weights(other)
    assert [name for name in ours_ if name not in theirs_ and not re.search(DROPPED, name)] == []
    for name in theirs_:
        a, b = ours_[name], theirs_[name]
        assert a.shape == b.shape, name
        if re.search(TABLE, name):
            padding = list(range(len(ids), a.shape[0]))
            a, b = a[left + padding], b[right + padding]
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")
    assert config_of(one) == config_of(other)
    for text in SAMPLES:
        cut = [
            mine.convert_ids_to_tokens(mine(text)["input_ids"]),
            their.convert_ids_to_tokens(their(text)["input_ids"]),
        ]
        assert cut[0] == cut[1]


# ---- generated configurations -----------------------------------------------------------------------------------


def asked(folder: Path) -> dict[str, dict[str, Any]]:
    """Give the ways to ask for a tokenizer, by name."""
    base, a, b = (str(folder / name) for name in NAMES)
    return {
        "union": {"tokenizer_source": "union"},
        "base": {"tokenizer_source": "base"},
        "model": {"tokenizer_source": a},
        "long": {"tokenizer": {"source": b}},
        "padded": {"tokenizer": {"source": "union", "pad_to_multiple_of": 16}},
        "base padded": {"tokenizer": {"source": "base", "pad_to_multiple_of": 64}},
        "from a model": {"tokenizer": {"source": "union", "tokens": {"<|im_end|>": {"source": b}}}},
        "forced": {"tokenizer": {"source": "base", "tokens": {"t": {"source": a, "force": True}}}},
        "a token": {
            "tokenizer": {
                "source": "union",
                "tokens": {
                    "<|im_start|>": {"source": {"kind": "model_token", "model": base, "token": "w"}},
                    "e": {"source": {"kind": "model_token", "model": a, "token": "<|im_end|>"}, "force": True},
                },
            }
        },
        "an id": {
            "tokenizer": {
                "source": "union",
                "tokens": {"s": {"source": {"kind": "model_token", "model": b, "token_id": 7}, "force": True}},
            }
        },
        "zero": {
            "tokenizer": {
                "source": "union",
                "tokens": {
                    "<|new|>": {"source": {"kind": "zero"}},
                    "r": {"source": {"kind": "zero"}, "force": True},
                },
                "pad_to_multiple_of": 8,
            }
        },
    }


def configuration(method: str, folder: Path, more: Mapping[str, Any]) -> dict[str, Any]:
    """Write a merge of base, a and b, or of base and a."""
    config: dict[str, Any] = {"merge_method": method, "dtype": "float32", "base_model": str(folder / "base")}
    names = NAMES[:2] if method == "slerp" else NAMES[1:] if method == "ties" else NAMES
    if method == "slices":
        sources = [{"model": str(folder / name), "layer_range": [0, 1]} for name in NAMES]
        parts = [{"sources": sources}, {"sources": [{**one, "layer_range": [1, 2]} for one in sources]}]
        parameters: dict[str, Any] = {"weight": [0.3, 0.9]}
        return {**config, "merge_method": "linear", "slices": parts, "parameters": parameters, **more}
    parameters = {"t": 0.3} if method == "slerp" else {"weight": 0.6}
    parameters |= {"density": 0.5} if method == "ties" else {}
    config["models"] = [{"model": str(folder / name)} for name in names]
    return {**config, "parameters": parameters, **more}


WAYS = tuple(asked(Path()))
METHODS = ("linear", "ties", "slerp", "task_arithmetic", "slices")


def cases() -> Iterator[tuple[str, str, str]]:
    """Go through the cases: every way on every kind, the methods in turn."""
    methods = itertools.cycle(METHODS)
    for kind, way in itertools.product(KINDS, WAYS):
        method = next(methods)
        if method == "slerp" and way in ("long", "from a model", "an id"):  # they name b, which slerp has no place for
            method = next(methods)
        yield kind, method, way


CASES = list(cases())


@pytest.mark.mergekit
@pytest.mark.parametrize(("kind", "method", "way"), CASES, ids=lambda value: str(value))
def test_vocabularies_are_merged_as_in_mergekit(models: Path, tmp_path: Path, kind: str, method: str, way: str) -> None:
    folder = models / kind
    config = configuration(method, folder, asked(folder)[way])
    made = ours(config, tmp_path / "ours")
    assert_alike(made, theirs(config, tmp_path / "theirs"))
    native = recipe_text.written(load(tmp_path / "ours.yml").document.value)
    again = ours(native, tmp_path / "native")
    assert weights(again).keys() == weights(made).keys()
    assert [name for name, values in weights(again).items() if not torch.equal(values, weights(made)[name])] == []
    assert auto(again).get_vocab() == auto(made).get_vocab()


@pytest.mark.mergekit
def test_what_a_union_adds_of_special_tokens_has_the_ids_that_mergekit_gives(tmp_path: Path) -> None:
    for name in NAMES[:2]:
        save(tmp_path / name, "bytes", "base")
    words = auto(tmp_path / "a")
    words.add_tokens(["<|x|>", "<|y|>"], special_tokens=True)
    words.save_pretrained(tmp_path / "a")
    model("bytes", 1, len(words)).save_pretrained(tmp_path / "a")
    config = configuration("task_arithmetic", tmp_path, {"tokenizer_source": "union"})
    config["models"] = config["models"][1:2]
    made, other = (auto(run(config, tmp_path / run.__name__)) for run in (ours, theirs))
    assert made.get_vocab() == other.get_vocab()
    for text in (*SAMPLES, "<|x|>words<|y|>"):
        assert made(text)["input_ids"] == other(text)["input_ids"]


# ---- what is another result on purpose --------------------------------------------------------------------------


def config_with(folder: Path, names: str, more: Mapping[str, Any]) -> dict[str, Any]:
    """Write a linear merge of models in a folder, each at weight 1."""
    found = [{"model": str(folder / name), "parameters": {"weight": 1.0}} for name in names.split()]
    return {"merge_method": "linear", "dtype": "float32", "models": found, **more}


def row(folder: Path, word: str, name: str = "model.embed_tokens.weight") -> Tensor:
    """Give the row of a token in a folder's model."""
    return weights(folder)[name][auto(folder).get_vocab()[word]]


@differs("order")
def test_a_union_adds_words_in_the_order_of_the_models_and_of_their_ids(models: Path, tmp_path: Path) -> None:
    folder = models / "unigram"
    made = auto(ours(config_with(folder, "base a b", {"tokenizer_source": "union"}), tmp_path / "out")).get_vocab()
    own = {name: auto(folder / name) for name in NAMES}
    expected = sorted(own["base"].get_vocab(), key=own["base"].get_vocab().get)
    special = [*SPECIAL["a"], "<|tool|>"]
    for name in "ab":
        words = sorted(own[name].get_vocab(), key=own[name].get_vocab().get)
        expected += [word for word in words if word not in expected and word not in special]
    assert sorted(made, key=made.get) == [*expected, *special]


@differs("slices")
@pytest.mark.mergekit
def test_a_token_that_the_models_of_one_slice_lack_gets_the_row_of_the_others(models: Path, tmp_path: Path) -> None:
    folder = models / "bytes"
    parts = [{"sources": [{"model": str(folder / n), "layer_range": [i, i + 1]}]} for i, n in enumerate(("base", "a"))]
    config = {"merge_method": "passthrough", "slices": parts, "tokenizer_source": str(folder / "a")}
    made, other = ours(config, tmp_path / "ours"), theirs(config, tmp_path / "theirs")
    assert torch.equal(row(made, "<|im_end|>"), row(folder / "a", "<|im_end|>"))
    assert torch.equal(row(made, "w"), row(folder / "base", "w"))
    assert torch.equal(row(made, "w", "lm_head.weight"), row(folder / "a", "w", "lm_head.weight"))
    assert torch.equal(row(other, "<|im_end|>"), torch.zeros(16))


@differs("padding")
@pytest.mark.mergekit
def test_padded_rows_are_kept(tmp_path: Path) -> None:
    for name in NAMES:
        save(tmp_path / name, "unigram", name, padding=64 - len(tokenizer("unigram", name)))
    config = config_with(tmp_path, "base a b", {"base_model": str(tmp_path / "base"), "tokenizer_source": "base"})
    made, other = ours(config, tmp_path / "ours"), theirs(config, tmp_path / "theirs")
    count = len(auto(made))
    assert [weights(made)["lm_head.weight"].shape[0], written(made)["vocab_size"]] == [64, 64]
    assert weights(other)["lm_head.weight"].shape[0] == count < 64
    tables = [weights(tmp_path / name)["lm_head.weight"] for name in NAMES]
    used = max(len(auto(tmp_path / name)) for name in NAMES)  # rows above stand for no token in any of them
    torch.testing.assert_close(weights(made)["lm_head.weight"][used:], sum(table[used:] for table in tables) / 3)
    torch.testing.assert_close(weights(made)["lm_head.weight"][:count], weights(other)["lm_head.weight"])


@differs("special ids")
@differs("generation config")
@pytest.mark.mergekit
def test_ids_in_configs_are_those_of_the_new_vocabulary(models: Path, tmp_path: Path) -> None:
    for name in ("base", "a"):
        shutil.copytree(models / "bytes" / name, tmp_path / name)
    ids, new = (auto(tmp_path / name).get_vocab() for name in ("base", "a"))
    lost = next(word for word in ids if word not in new)
    one, two = sorted(word for word in ids if word in new and ids[word] != new[word])[:2]
    config = {"eos_token_id": [ids[one], ids["</s>"]], "pad_token_id": ids[two], "bos_token_id": ids[lost]}
    (tmp_path / "base" / "config.json").write_text(json.dumps({**written(tmp_path / "base"), **config}))
    generation = {"eos_token_id": [ids[one], ids[lost]], "suppress_tokens": [ids[two]], "max_length": 7}
    (tmp_path / "base" / "generation_config.json").write_text(json.dumps(generation))
    (tmp_path / "a" / "generation_config.json").unlink(missing_ok=True)
    (tmp_path / "a" / "config.json").write_text(json.dumps({**written(tmp_path / "a"), "bos_token_id": 33}))
    asked = {"base_model": str(tmp_path / "base"), "tokenizer_source": str(tmp_path / "a")}
    made = ours(config_with(tmp_path, "base a", asked), tmp_path / "ours")
    assert {key: written(made)[key] for key in config} == {
        "eos_token_id": [new[one], new["</s>"]],
        "pad_token_id": new[two],
        "bos_token_id": 33,
    }
    assert written(made, "generation_config.json") == {
        "eos_token_id": [new[one]],
        "suppress_tokens": [new[two]],
        "max_length": 7,
    }
    other = theirs(config_with(tmp_path, "base a", asked), tmp_path / "theirs")
    assert written(other)["pad_token_id"] == ids[two] != new[two]
    assert not (other / "generation_config.json").exists()


@differs("unused")
@pytest.mark.mergekit
def test_tokens_without_rows_are_left_out(models: Path, tmp_path: Path) -> None:
    shutil.copytree(models / "fallback" / "base", tmp_path / "base")
    shutil.copytree(models / "fallback" / "a", tmp_path / "a")
    words = auto(tmp_path / "a")
    words.add_tokens(["<UNUSED_0>", "<UNUSED_1>"])
    words.save_pretrained(tmp_path / "a")
    made = ours(config_with(tmp_path, "base a", {"tokenizer_source": str(tmp_path / "a")}), tmp_path / "out")
    assert auto(made).get_vocab() == auto(models / "fallback" / "a").get_vocab()
    assert weights(made)["lm_head.weight"].shape == weights(tmp_path / "a")["lm_head.weight"].shape
    union = ours(config_with(tmp_path, "base a", {"tokenizer_source": "union"}), tmp_path / "union")
    assert "<UNUSED_0>" not in auto(union).get_vocab()
    asked = {"base_model": str(tmp_path / "base"), "tokenizer_source": str(tmp_path / "a")}
    with pytest.raises(KeyError):
        theirs(config_with(tmp_path, "base a", asked), tmp_path / "theirs")


USER, SYSTEM, REPLY = ({"role": role, "content": f" {role} "} for role in ("user", "system", "assistant"))
CHATS = ([USER], [SYSTEM, USER], [USER, REPLY], [SYSTEM, USER, REPLY, USER])
PUBLISHED = {  # SYSTEM, USER and what asks for a reply, as the formats' authors write it
    "alpaca": "system\n\n### Instruction:\nuser\n\n### Response:\n",
    "chatml": "<|im_start|>system\n system <|im_end|>\n<|im_start|>user\n user <|im_end|>\n<|im_start|>assistant\n",
    "exaone": "[|system|] system [|endofturn|]\n[|user|] user \n[|assistant|]",
    "llama3": "<s><|start_header_id|>system<|end_header_id|>\n\nsystem<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nuser<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    "mistral": "<s> [INST]  system \n\n user  [/INST]",
}


def rendered(template: str, chat: list[dict[str, str]], *, ask: bool) -> str:
    from transformers.utils.chat_template_utils import render_jinja_template

    more = {"bos_token": "<s>", "eos_token": "</s>", "add_generation_prompt": ask}
    texts, _ = render_jinja_template([chat], chat_template=template, **more)
    found: str = texts[0]
    return found


@differs("templates")
@pytest.mark.mergekit
@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_a_named_template_writes_what_its_authors_published(name: str) -> None:
    from importlib.resources import files

    their = (files("mergekit._data.chat_templates") / f"{name}.jinja").read_text()
    assert rendered(TEMPLATES[name], [SYSTEM, USER], ask=True) == PUBLISHED[name]
    for chat, ask in itertools.product(CHATS, (False, True)):
        pair = [rendered(template, chat, ask=ask) for template in (TEMPLATES[name], their)]
        if name in ("chatml", "mistral"):
            assert pair[0] == pair[1]
        else:
            assert pair[0].split() == pair[1].replace("### Response:", " ### Response:").split() or (
                "".join(pair[0].split()) == "".join(pair[1].split())
            )


def test_a_named_template_is_written_and_loaded(models: Path, tmp_path: Path) -> None:
    assert sorted(TEMPLATES) == sorted(PUBLISHED)
    for name in TEMPLATES:
        config = config_with(models / "unigram", "base", {"chat_template": name})
        made = ours(config, tmp_path / name)
        assert auto(made).chat_template == TEMPLATES[name]


# ---- our own recipes --------------------------------------------------------------------------------------------


def said(text: str, folder: Path) -> list[str]:
    """Give the mistakes of a recipe as `LINE: WHAT (HINT)`."""
    path = folder / "recipe.yaml"
    path.write_text(dedent(text).lstrip("\n"))
    with pytest.raises(merge.RecipeError) as caught:
        compose(load(path))
    return [f"{m.where.rpartition(':')[2]}: {m.what}" + f" ({m.hint})" * bool(m.hint) for m in caught.value.mistakes]


@pytest.fixture
def three(models: Path, tmp_path: Path) -> Path:
    """Give a folder with base, a and b."""
    for name in NAMES:
        shutil.copytree(models / "unigram" / name, tmp_path / name)
    return tmp_path


def test_mistakes_are_named_by_their_lines(three: Path) -> None:
    text = """
        merge: {linear: {models: [base, a, bass]}}
        output:
          tokenizer:
            sorce: union
            pad_to_multiple_of: 0
            tokens:
              x: {source: zero, forse: true}
              y: {source: {model: b}}
    """
    assert said(text, three) == [
        "1: no model, file or folder 'bass' (did you mean 'base'?)",
        "4: unknown key 'sorce' (did you mean 'source'?)",
        "5: pad_to_multiple_of is 0: input should be greater than or equal to 1",
        "7: unknown key 'forse' (did you mean 'force'?)",
        "8: source is {'model': 'b'}: name one of token and id",
    ]


def test_rules_that_name_what_is_not_there_are_refused_together(three: Path) -> None:
    text = """
        merge: {linear: {models: [base, a]}}
        output:
          tokenizer:
            source: union
            tokens:
              <|im_start|>: base
              e: {source: {model: b, token: nothing}}
              s: {source: {model: b, id: 4000}, force: true}
              r: {force: true}
    """
    assert [one.partition(" (")[0] for one in said(text, three)] == [
        "6: base has no token '<|im_start|>'",
        "7: b has no token 'nothing'",
        "8: b has no row 4000",
        "9: force needs a source",
    ]


def test_a_model_without_a_tokenizer_is_refused_where_its_rows_do_not_fit(three: Path) -> None:
    for path in three.glob("a/tokenizer*"):
        path.unlink()
    found = said("merge: {linear: {models: [base, a]}}\noutput: {tokenizer: {source: union}}", three)
    assert found == [
        "2: a has no tokenizer to tell what its rows stand for (put its tokenizer.json beside it)",
    ]


@pytest.mark.parametrize(
    ("written_", "found"),
    [
        ({"model": {"vocab": [1, 2]}}, "is no tokenizer (TypeError"),
        ({"model": {"vocab": {"e": 0}}, "added_tokens": [{"id": 1}]}, "is no tokenizer (KeyError('content'))"),
        ({"model": {"vocab": {"e": 10**12}}}, "gives 'e' the id 1000000000000"),
        ({"model": {"vocab": {"e": -1}}}, "gives 'e' the id -1"),
        ({"model": {"vocab": {"e": "0"}}}, "is no tokenizer (TypeError"),
        ({"model": 5}, "is no tokenizer (AttributeError"),
    ],
)
def test_a_tokenizer_that_is_none_is_named(three: Path, written_: Any, found: str) -> None:
    (three / "a" / "tokenizer.json").write_text(json.dumps(written_))
    (one,) = said("merge: {linear: {models: [base, a]}}\noutput: {tokenizer: {source: union}}", three)
    assert one.strip().startswith(f"{three / 'a' / 'tokenizer.json'}: {found}")


def test_words_of_the_tokenizer_are_no_names_of_models(three: Path) -> None:
    text = """
        models: {union: a}
        merge: {linear: {models: [base, union]}}
        output: {tokenizer: {source: union}}
    """
    assert said(text, three) == ["1: 'union' is a word of output.tokenizer (call it something else)"]


def test_without_a_tokenizer_other_vocabularies_are_refused_with_the_cure(three: Path) -> None:
    found = said("merge: {linear: {models: [base, a]}}", three)
    assert [one for one in found if "embed_tokens" in one and "tokenizer: NAME" in one]


NESTED = """
steps:
  soup: {linear: {models: [a, b]}}
merge: {layer_swap: {task: soup, language: base, bottom: 1, top: 0, transition: 0, outside: average}}
output: {tokenizer: {source: union, base: base}}
"""


def test_a_plan_notes_what_becomes_of_each_model(three: Path) -> None:
    (three / "recipe.yaml").write_text("merge: {linear: {models: [base, a]}}\noutput: {tokenizer: base}")
    kept = len(auto(three / "base").get_vocab().keys() & auto(three / "a").get_vocab().keys())
    rows = len(auto(three / "base"))
    note = f"a: {kept} of {rows} rows are its own, in the order of the result's vocabulary"
    assert note in merge.make_plan(compose(load(three / "recipe.yaml"))).notes


def test_rules_have_short_forms(three: Path) -> None:
    text = """
        merge: {linear: {models: [base, a]}}
        output:
          tokenizer:
            source: union
            tokens:
              <|im_end|>: b
              <|user|>: {source: {model: a, token: <|im_start|>}, force: true}
              <|new|>: zero
              <|five|>: {model: b, id: 5}
    """
    made = ours(dedent(text), three / "out")
    expected = (row(three / "a", "<|im_end|>") + row(three / "b", "<|im_end|>")) / 2
    torch.testing.assert_close(row(made, "<|im_end|>"), expected)
    assert torch.equal(row(made, "<|user|>"), row(three / "a", "<|im_start|>"))
    assert torch.equal(row(made, "<|new|>"), torch.zeros(16))
    assert torch.equal(row(made, "<|five|>"), weights(three / "b")["model.embed_tokens.weight"][5])


def test_steps_and_layer_swaps_see_models_of_one_vocabulary(three: Path) -> None:
    made = ours(NESTED, three / "out")
    assert written(made)["vocab_size"] == len(auto(made))
    assert torch.equal(row(made, "<|tool|>"), row(three / "b", "<|tool|>"))  # of all three, which have it from b
    expected = (row(three / "a", "<|im_end|>") + row(three / "b", "<|im_end|>")) / 2
    torch.testing.assert_close(row(made, "<|im_end|>"), (expected + expected) / 2)
    expected = row(three / "base", "e") / 2 + (row(three / "a", "e") + row(three / "b", "e")) / 4
    torch.testing.assert_close(row(made, "e"), expected)
    only = weights(three / "base")["model.layers.0.mlp.up_proj.weight"]
    assert torch.equal(weights(made)["model.layers.0.mlp.up_proj.weight"], only)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")  # the next line says it too
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft calls it so
def test_an_adapter_is_folded_in_before_rows_are_moved(three: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    tuned = get_peft_model(
        AutoModelForCausalLM.from_pretrained(three / "a"),
        LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"], init_lora_weights=False),
    )
    tuned.save_pretrained(three / "adapter", save_embedding_layers=False)
    folded = tuned.merge_and_unload().state_dict()["model.embed_tokens.weight"]
    own = auto(three / "a").get_vocab()
    for text in (
        "merge: {linear: {models: [{path: a, lora: adapter}]}}",
        "merge: {lora: {base: a, adapters: [adapter]}}",
    ):
        made = ours(text + "\noutput: {tokenizer: base}", three / f"out{len(text)}")
        assert auto(made).get_vocab() == auto(three / "base").get_vocab()
        for word in ("e", "<s>"):
            torch.testing.assert_close(row(made, word), folded[own[word]])


def test_equal_vocabularies_are_copied_byte_for_byte(three: Path) -> None:
    shutil.copytree(three / "a", three / "c")
    path = three / "recipe.yaml"
    path.write_text(
        "merge: {layer_swap: {task: a, language: c, bottom: 1, top: 0}}\noutput: {tokenizer: {source: union}}"
    )
    merged = compose(load(path))
    assert type(merged.node("lm_head.weight").inputs.models[0]).__name__ == "Source"
    out = three / "out"
    merge.build(merged, out)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (out / name).read_bytes() == (three / "a" / name).read_bytes()


def test_equal_tokenizers_keep_tokens_without_rows(three: Path) -> None:
    words = auto(three / "a")
    words.add_tokens(["<UNUSED>"])
    words.save_pretrained(three / "a")
    shutil.copytree(three / "a", three / "c")
    made = ours("merge: {linear: {models: [a, c]}}\noutput: {tokenizer: a}", three / "out")
    assert (made / "tokenizer.json").read_bytes() == (three / "a" / "tokenizer.json").read_bytes()
    (three / "recipe.yaml").write_text("merge: {linear: {models: [base, c]}}\noutput: {tokenizer: a}")
    note = "a has no rows for 1 tokens, which are left out: '<UNUSED>'"
    assert note in merge.make_plan(compose(load(three / "recipe.yaml"))).notes


def test_tied_heads_stay_tied(models: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    made = ours(config_with(models / "tied", "base a b", {"tokenizer_source": "union"}), tmp_path / "out")
    assert "lm_head.weight" not in weights(made)
    assert written(made)["tie_word_embeddings"] is True
    loaded = AutoModelForCausalLM.from_pretrained(made)
    assert torch.equal(loaded.lm_head.weight, weights(made)["model.embed_tokens.weight"])


def test_a_result_loads_and_computes_with_a_bfloat16_table(three: Path) -> None:
    for name in NAMES:
        tensors = {key: value.bfloat16() for key, value in weights(three / name).items()}
        save_file(tensors, three / name / "model.safetensors", {"format": "pt"})
    made = ours("merge: {linear: {models: [b]}}\noutput: {tokenizer: a}", three / "out")
    assert weights(made)["lm_head.weight"].dtype == torch.bfloat16
    for word in ("e", "<|im_end|>", "<s>"):
        assert torch.equal(row(made, word), row(three / "b", word))


def test_a_vocabulary_in_other_files_than_tokenizer_json_is_read(models: Path, tmp_path: Path) -> None:
    for name in ("base", "a"):
        shutil.copytree(models / "wordpiece" / name, tmp_path / name)
    ids = auto(tmp_path / "base").get_vocab()
    for path in tmp_path.glob("base/tokenizer*"):
        path.unlink()
    (tmp_path / "base" / "vocab.txt").write_text("\n".join(sorted(ids, key=ids.__getitem__)) + "\n")
    (tmp_path / "base" / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))
    made = ours("merge: {linear: {models: [a]}}\noutput: {tokenizer: base}", tmp_path / "out")
    assert (made / "vocab.txt").read_bytes() == (tmp_path / "base" / "vocab.txt").read_bytes()
    for name in ("cls.predictions.bias", "bert.embeddings.word_embeddings.weight"):
        for word in ("t", "[MASK]"):
            assert torch.equal(weights(made)[name][ids[word]], row(tmp_path / "a", word, name))


@pytest.mark.mergekit
@pytest.mark.filterwarnings("ignore:builtin type .* has no __module__ attribute:DeprecationWarning")  # sentencepiece's
def test_sentencepiece_models_are_put_together_as_in_mergekit(tmp_path: Path) -> None:
    import sentencepiece

    for number, name in enumerate(("base", "a")):
        (tmp_path / name).mkdir()
        (tmp_path / f"{name}.txt").write_text("\n".join(TEXTS[name].split() * 20))
        sentencepiece.SentencePieceTrainer.train(
            input=str(tmp_path / f"{name}.txt"),
            model_prefix=str(tmp_path / name / "tokenizer"),
            vocab_size=300,
            model_type="bpe",
            byte_fallback=True,
            minloglevel=2,
        )
        about = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        (tmp_path / name / "tokenizer_config.json").write_text(json.dumps(about))
        model("fallback", number, 300).save_pretrained(tmp_path / name)
    config = configuration("task_arithmetic", tmp_path, {"tokenizer_source": "union"})
    config["models"] = config["models"][1:2]
    made = ours(config, tmp_path / "ours")
    assert not (made / "tokenizer.model").exists()
    assert_alike(made, theirs(config, tmp_path / "theirs"))


def test_planning_imports_neither_torch_nor_transformers(three: Path) -> None:
    (three / "recipe.yaml").write_text(NESTED)
    code = (
        "import sys; from portmanteau import merge; from portmanteau.compositions import compose, load\n"
        "plan = merge.make_plan(compose(load('recipe.yaml')))\n"
        "print(len(plan.steps), {'torch', 'transformers', 'tokenizers'} & sys.modules.keys())"
    )
    shown = subprocess.run([sys.executable, "-c", code], cwd=three, capture_output=True, text=True, check=True).stdout
    assert shown == f"{len(weights(three / 'base'))} set()\n"


# ---- from Python ------------------------------------------------------------------------------------------------


def test_models_share_a_vocabulary_in_python(three: Path) -> None:
    base, a, b = (merge.open(three / name) for name in NAMES)
    rules = {"<|new|>": TokenRule("zero"), "e": TokenRule(RowOf(b, token="s"), force=True), "s": TokenRule(a)}
    found = with_vocabulary([base, a], tokens=rules, pad_to_multiple_of=64)
    merge.build(compositions.tensorwise("linear", models=dict(zip("xy", found, strict=True))), three / "out")
    assert weights(three / "out")["lm_head.weight"].shape == (64, 16)
    assert torch.equal(row(three / "out", "<|new|>"), torch.zeros(16))
    assert torch.equal(row(three / "out", "e"), row(three / "b", "s"))
    torch.testing.assert_close(row(three / "out", "s"), (row(three / "base", "s") + row(three / "a", "s")) / 2)


# ---- the rows ---------------------------------------------------------------------------------------------------


def table(values: list[list[float]]) -> merge.InMemory:
    return merge.InMemory("t", {"x": torch.tensor(values)})


def test_rows_are_copied_averaged_zeroed_and_filled_as_on_paper() -> None:
    one, two = table([[1, 2], [3, 4], [5, 6]]), table([[10, 20]])
    source = array("i", [0, 0, 1, MEAN, ZERO, FILL])
    owned = (array("i", [-1, -1, -1, 0, -1, -1]), array("i", [-1, -1, -1, 0, -1, -1]))
    rows = RowMap(source, array("i", [1, 2, 0, 0, 0, 0]), owned, bytes([1, 1, 1, 1, 1, 0]))
    made = rows_of(TensorSpec("x", "F32", (6, 2)), rows, [one.node("x"), two.node("x")])
    found = merge.Composed("made", {"x": made}, one.companions)["x"]
    # (3 + 5 + 10 + 5.5 + 0) / 5 and (4 + 6 + 20 + 11 + 0) / 5
    expected = [[3, 4], [5, 6], [10, 20], [5.5, 11], [0, 0], [4.7, 8.2]]
    torch.testing.assert_close(found, torch.tensor(expected))


def test_rows_that_lie_close_are_read_in_one_go() -> None:
    model_ = Counted("t", {"x": torch.arange(40.0).reshape(20, 2)})
    rows = RowMap(array("i", [0] * 4), array("i", [7, 5, 6, 9]), (), bytes(4))
    made = rows_of(TensorSpec("x", "F32", (4, 2)), rows, [model_.node("x")])
    found = merge.Composed("made", {"x": made}, model_.companions).read("x", slice(1, 7))
    assert found.tolist() == [15, 10, 11, 12, 13, 18]
    assert model_.reads == [(10, 20)]


class Counted(merge.InMemory):
    """Tensors that note which runs are read of them."""

    def __init__(self, label: str, tensors: Tensors) -> None:
        super().__init__(label, tensors)
        self.reads: list[tuple[int, int]] = []

    def read(self, name: str, part: slice | None = None) -> Tensor:
        assert part is not None
        self.reads.append((part.start, part.stop))
        return super().read(name, part)


@pytest.mark.parametrize("rows", [1 << 10, 1 << 14])
def test_no_more_than_a_part_is_read_at_once_however_large_the_table(rows: int) -> None:
    width, part = 64, 1 << 16
    model_ = Counted("t", {"x": torch.randn(rows, width)})
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(0)).tolist()
    source = array("i", [0] * (rows // 2) + [FILL] * (rows // 2))
    moved = RowMap(source, array("i", order), (), bytes([1] * (rows // 2) + [0] * (rows // 2)))
    made = rows_of(TensorSpec("x", "F32", (rows, width)), moved, [model_.node("x")])
    for _, values in Evaluation(Session(part=part)).parts(made):
        assert values.numel() <= part
    assert max(stop - start for start, stop in model_.reads) <= 2 * part
    assert made.held == 2 * 8 * part


def test_the_bits_do_not_depend_on_the_size_of_parts(three: Path) -> None:
    wide = {f"{n}": torch.randn(700, 300, generator=torch.Generator().manual_seed(i)) for i, n in enumerate("ab")}
    tensors = merge.InMemory("t", wide)
    random = torch.Generator().manual_seed(3)
    source = array("i", torch.randint(-3, 2, (900,), generator=random).tolist())
    rows = array("i", torch.randint(0, 700, (900,), generator=random).tolist())
    counted = bytes(int(one != FILL) for one in source)
    made = rows_of(
        TensorSpec("x", "F32", (900, 300)), RowMap(source, rows, (rows, rows), counted), [*map(tensors.node, "ab")]
    )
    results = []
    for part in (1 << 16, 1 << 17, 1 << 20):
        results.append(torch.cat([values for _, values in Evaluation(Session(part=part)).parts(made)]))
    assert all(torch.equal(results[0], one) for one in results[1:])


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_every_table_of_an_encoder_decoder_is_brought_in_order(three: Path, family: str) -> None:
    from transformers import (
        AutoModelForSeq2SeqLM,
        BartConfig,
        BartForConditionalGeneration,
        T5Config,
        T5ForConditionalGeneration,
    )

    count = len(auto(three / "a"))
    torch.manual_seed(0)
    if family == "t5":
        sizes: dict[str, Any] = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
        made: Any = T5ForConditionalGeneration(T5Config(vocab_size=count, tie_word_embeddings=False, **sizes))
    else:
        halves = ("encoder_layers", "decoder_layers", "encoder_attention_heads", "decoder_attention_heads")
        more = {"encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "max_position_embeddings": 50, **dict.fromkeys(halves, 2)}
        made = BartForConditionalGeneration(BartConfig(vocab_size=count, d_model=16, **more))
        made.final_logits_bias = torch.randn(1, count)
    made.save_pretrained(three / "a")
    out = ours("merge: {linear: {models: [a]}}\noutput: {tokenizer: {source: base}}", three / "out")
    old, new = auto(three / "a").get_vocab(), auto(out).get_vocab()
    both = [word for word in old if word in new]
    before, after = weights(three / "a"), weights(out)
    assert before.keys() == after.keys()
    moved = [name for name in sorted(before) if not torch.equal(after[name], before[name])]
    assert moved == (["shared.weight"] if family == "t5" else ["final_logits_bias", "model.shared.weight"])
    for name in moved:
        rows = [
            side[name].reshape(len(ids), -1)[[ids[word] for word in both]]
            for side, ids in ((before, old), (after, new))
        ]
        assert torch.equal(*rows)
    assert AutoModelForSeq2SeqLM.from_pretrained(out).config.vocab_size == len(new)


@pytest.mark.mergekit
def test_a_bundle_is_brought_to_the_vocabulary_of_its_last_document(models: Path, tmp_path: Path) -> None:
    folder = models / "fallback"
    soup = config_with(folder, "a b", {"name": "soup"})
    last = config_with(folder, "base", {"base_model": str(folder / "base"), "tokenizer_source": "union"})
    last["models"].append({"model": "soup", "parameters": {"weight": 1.0}})
    made = ours(yaml.safe_dump_all([soup, last], sort_keys=False), tmp_path / "ours")
    flat = config_with(folder, "base a b", {"base_model": str(folder / "base"), "tokenizer_source": "union"})
    for one, weight in zip(flat["models"], (0.5, 0.25, 0.25), strict=True):
        one["parameters"]["weight"] = weight
    assert_alike(made, theirs(flat, tmp_path / "theirs"))


def test_a_union_has_the_same_bytes_for_any_number_of_threads(three: Path) -> None:
    (three / "recipe.yaml").write_text(NESTED)
    outs = []
    for threads in (1, 4):
        outs.append(three / f"out{threads}")
        merge.build(compose(load(three / "recipe.yaml")), outs[-1], threads=threads)
    for name in ("model.safetensors", "tokenizer.json", "tokenizer_config.json", "config.json"):
        assert (outs[0] / name).read_bytes() == (outs[1] / name).read_bytes()


def test_every_difference_has_a_test() -> None:
    assert DIFFERENT.keys() == _TESTED
