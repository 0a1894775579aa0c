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
