"""The files that go with weights: config.json true to them, tokenizer, chat template, generation config, code."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from .dtypes import is_float, torch_name
from .errors import CheckpointError, Mistake
from .files import places
from .files.json_file import CONFIG_BYTES, TABLE_BYTES, read_json, read_text
from .form import MODEL, Form
from .names import matches
from .tensor_spec import TensorSpec

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
_TOKENIZER = (
    "tokenizer*|vocab.*|vocab*.json|merges.txt|special_tokens_map.json|added_tokens.json|*.model|*.spm|*.tiktoken"
)
_CARRIED = "|".join(
    (
        GENERATION_CONFIG,
        _TOKENIZER,
        "chat_template.*",
        "*processor_config.json|sentence_*_config.json|config_sentence_transformers.json|modules.json|tekken.json|bpe.codes",
        "*.py|LICENSE*|NOTICE*|USE_POLICY*",
    )
)
_CARRIED_FROM_FOLDERS = "additional_chat_templates/*|[0-9]_*/config.json"
_READ = (CONFIG, "adapter_config.json")  # not copied: read, and written anew where they go with the result
_TEMPLATES = "chat_template.*|additional_chat_templates/*"
_GENERATES = "*ForCausalLM|*LMHead*|*ForMaskedLM|*ForConditionalGeneration"
INPUT_EMBEDDINGS = (
    "*embed_tokens.weight|*word_embeddings.weight|*wte.weight|*embed_in.weight|shared.weight|*.shared.weight"
    "|*tok_embeddings.weight|backbone.embeddings.weight"
)


@dataclass(frozen=True)
class Companions:
    """What stands beside the weights, by the name it has in the folder.

    Attributes:
        config: config.json, parsed; None where a folder has none.
        files: files that are copied as they are.
        texts: files that are written: name → text.
        form: how a result with these companions is laid out.
        derived: files made of the finished folder: name → function of (the file to write).

    """

    config: Mapping[str, Any] | None = None
    files: Mapping[str, Path] = field(default_factory=dict)
    texts: Mapping[str, str] = field(default_factory=dict)
    form: Form = MODEL
    derived: Mapping[str, Callable[[Path], None]] = field(default_factory=dict)

    @property
    def architectures(self) -> tuple[str, ...]:
        """The model classes that the config names; what is no text is none."""
        named = (self.config or {}).get("architectures")
        return tuple(one for one in named if isinstance(one, str)) if isinstance(named, list) else ()

    @property
    def ties_head(self) -> bool:
        """Tell whether the head of the config's model is its embedding, where it has none of its own."""
        generates = any(matches(_GENERATES, name) for name in self.architectures)
        return generates and (self.config or {}).get("tie_word_embeddings") is not False

    @property
    def nbytes(self) -> int:
        """Bytes of the files and texts."""
        return sum(path.stat().st_size for path in self.files.values()) + sum(map(len, self.texts.values()))

    @property
    def tokenizer_files(self) -> dict[str, Path]:
        """The files that make the tokenizer and its chat template."""
        return {name: path for name, path in self.files.items() if matches(f"{_TOKENIZER}|{_TEMPLATES}", name)}

    @property
    def chat_template(self) -> str | None:
        """The chat template: of a file of its own, or in the tokenizer's config; of several the default one."""
        if "chat_template.jinja" in self.files:
            return read_text(self.files["chat_template.jinja"], CONFIG_BYTES).strip()
        path = self.files.get("tokenizer_config.json")
        found = read_json(path, TABLE_BYTES).get("chat_template") if path is not None else None
        if isinstance(found, list):
            named = [one for one in found if isinstance(one, dict)]
            found = next((one.get("template") for one in named if one.get("name") == "default"), None)
        return found.strip() if isinstance(found, str) else None

    def with_chat_template(self, text: str) -> Companions:
        """Write this chat template in the place of those that there are."""
        files = {name: path for name, path in self.files.items() if not matches("chat_template.*", name)}
        return replace(self, files=files, texts={**self.texts, "chat_template.jinja": text})

    def json(self, name: str) -> dict[str, Any] | None:
        """Give a JSON file that is written or copied; None where there is none of that name."""
        if name in self.texts:
            found: dict[str, Any] = json.loads(self.texts[name])
            return found
        return read_json(self.files[name]) if name in self.files else None

    def with_tokenizer_of(self, other: Companions) -> Companions:
        """Take every file but the config from another checkpoint, and of the own ones what says how to generate."""
        own = {name: path for name, path in self.files.items() if name == GENERATION_CONFIG}
        texts = {name: text for name, text in self.texts.items() if name not in other.files}
        derived = {name: make for name, make in self.derived.items() if name not in other.files}
        return replace(
            self, files={**own, **other.files}, texts={**texts, **other.texts}, derived={**derived, **other.derived}
        )

    def with_texts_of(self, other: Companions) -> Companions:
        """Add what is written for another: what a survey settled."""
        return replace(self, texts={**self.texts, **other.texts}, derived={**self.derived, **other.derived})

    def without_derived(self) -> Companions:
        """Leave out what is made of the finished folder."""
        return replace(self, derived={})


def gather(folder: Path) -> Companions:
    """Find the companions in a checkpoint's folder.

    Raises CheckpointError for a config that is not JSON, and for links that lead out of the folder.
    """
    path = folder / CONFIG
    found = [path for path in sorted([*folder.glob("*"), *folder.glob("*/*")]) if path.is_file()]
    files = {path.relative_to(folder).as_posix(): path for path in found}
    mistakes = [places.link_mistake(path, folder) for name, path in files.items() if is_companion(name)]
    mistakes += [
        Mistake(str(path), "no text that can be shown", "rename it")
        for name, path in files.items()
        if is_companion(name) and not name.isprintable()
    ]
    mistakes += [
        Mistake(str(path), "there is no right to read it", "a result needs it beside its weights")
        for name, path in files.items()
        if is_companion(name) and not os.access(path, os.R_OK)
    ]
    if any(mistakes):
        raise CheckpointError.of(filter(None, mistakes))
    config = read_json(path) if path.is_file() else None
    carried = {name: path for name, path in files.items() if is_companion(name) and name not in _READ}
    return Companions(MappingProxyType(config) if config is not None else None, MappingProxyType(carried))


def is_companion(name: str) -> bool:
    """Tell whether a file of this name, as it stands in a checkpoint's folder, goes with the weights.

    >>> is_companion("tokenizer.json"), is_companion("original/tokenizer.model"), is_companion("model.safetensors")
    (True, False, False)
    """
    return name in _READ or matches(_CARRIED_FROM_FOLDERS if "/" in name else _CARRIED, name)


def true_config(config: Mapping[str, Any], specs: Iterable[TensorSpec]) -> dict[str, Any]:
    """Make a config say what the weights are: their dtype and the rows of their input embedding."""
    specs = list(specs)
    result = {key: value for key, value in config.items() if key != "_name_or_path"}
    weight: Counter[str] = Counter()
    for spec in specs:
        if is_float(spec.dtype):
            weight[spec.dtype] += spec.nbytes
    if weight:
        dtype = torch_name(weight.most_common(1)[0][0])
        result["torch_dtype" if "torch_dtype" in result else "dtype"] = dtype
        if len(weight) == 1:
            result = {key: _typed(key, value, dtype) for key, value in result.items()}
    rows = {spec.shape[0] for spec in specs if len(spec.shape) == 2 and matches(INPUT_EMBEDDINGS, spec.name)}
    return _with_rows(result, rows.pop()) if len(rows) == 1 else result


def _with_rows(config: dict[str, Any], rows: int) -> dict[str, Any]:
    """Set the size of the vocabulary, where a config has it or the config of its text part."""
    text = config.get("text_config")
    if isinstance(text, dict) and isinstance(text.get("vocab_size"), int):
        config = {**config, "text_config": {**text, "vocab_size": rows}}
    return {**config, "vocab_size": rows} if isinstance(config.get("vocab_size"), int) else config


def _typed(key: str, value: Any, dtype: str) -> Any:
    """Set the dtype in the config of a part (`text_config`, `vision_config`), and of its parts."""
    if not isinstance(value, dict) or not key.endswith("_config") or key == "quantization_config":
        return value
    found = {inner: _typed(inner, one, dtype) for inner, one in value.items()}
    return {inner: dtype if inner in ("dtype", "torch_dtype") else one for inner, one in found.items()}


def write(companions: Companions, folder: Path, specs: Iterable[TensorSpec]) -> list[str]:
    """Write config and files beside the weights, which stand there already; give the names written."""
    names = []
    if companions.config is not None:
        text = json.dumps(true_config(companions.config, specs), indent=2, sort_keys=True, ensure_ascii=False)
        (folder / CONFIG).write_text(text + "\n", encoding="utf-8")
        names.append(CONFIG)
    for name, path in companions.files.items():
        if name in companions.texts or name in companions.derived:
            continue
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
        names.append(name)
    for name, text in companions.texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
        names.append(name)
    for name, make in companions.derived.items():
        make(folder / name)
        names.append(name)
    return names


def vocabulary(companions: Companions) -> dict[str, int] | None:
    """Give the tokenizer's map from token to id, added tokens included; None where its files do not show it.

    Raises CheckpointError for a tokenizer.json of another make.
    """
    path = companions.files.get("tokenizer.json")
    if path is not None:
        found = read_json(path, TABLE_BYTES)
        table = {**_words(found.get("model")), **_added(found.get("added_tokens"))}
        if not all(type(number) is int for number in table.values()):
            raise CheckpointError(str(path), "its vocabulary is no mapping from tokens to numbers")
        return table
    path = companions.files.get("vocab.txt")
    if path is not None:
        return {word: i for i, word in enumerate(read_text(path, TABLE_BYTES).splitlines())}
    return None


def _words(model: Any) -> dict[str, int]:
    """Read the vocabulary of a tokenizer's model: a mapping, or pieces with their scores."""
    words = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(words, list):
        return {str(piece[0]): i for i, piece in enumerate(words) if isinstance(piece, list) and piece}
    return words if isinstance(words, dict) else {}


def _added(tokens: Any) -> dict[str, int]:
    """Read the tokens that were added beside the model's."""
    listed = tokens if isinstance(tokens, list) else []
    return {str(one.get("content")): one["id"] for one in listed if isinstance(one, dict) and "id" in one}
