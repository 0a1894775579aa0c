"""The files that go with weights: config.json true to them, tokenizer, chat template, generation config, code."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from .dtypes import is_float, torch_name
from .errors import CheckpointError
from .form import MODEL, Form
from .names import matches
from .tensor_spec import TensorSpec

CONFIG = "config.json"
_CARRIED = "|".join(
    (
        "generation_config.json",
        "tokenizer*|vocab.*|vocab*.json|merges.txt|special_tokens_map.json|added_tokens.json|*.model|*.spm|*.tiktoken",
        "chat_template.*",
        "*processor_config.json|sentence_*_config.json|config_sentence_transformers.json|modules.json|tekken.json|bpe.codes",
        "*.py|LICENSE*|NOTICE*|USE_POLICY*",
    )
)
_CARRIED_FROM_FOLDERS = "additional_chat_templates/*|[0-9]_*/config.json"
_READ = (CONFIG, "adapter_config.json")  # not copied: read, and written anew where they go with the result
_TOKENIZER = (
    "tokenizer*|vocab.*|vocab*.json|merges.txt|special_tokens_map.json|added_tokens.json|*.model|*.spm|*.tiktoken"
)
_TEMPLATES = "chat_template.*|additional_chat_templates/*"
INPUT_EMBEDDINGS = (
    "*embed_tokens.weight|*word_embeddings.weight|*wte.weight|*embed_in.weight|shared.weight|*tok_embeddings.weight"
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
    def tokenizer_files(self) -> dict[str, Path]:
        """The files that make the tokenizer and its chat template."""
        return {name: path for name, path in self.files.items() if matches(f"{_TOKENIZER}|{_TEMPLATES}", name)}

    @property
    def chat_template(self) -> str | None:
        """The chat template: of a file of its own, or in the tokenizer's config; of several the default one."""
        if "chat_template.jinja" in self.files:
            return self.files["chat_template.jinja"].read_text(encoding="utf-8").strip()
        path = self.files.get("tokenizer_config.json")
        found = read_json(path).get("chat_template") if path is not None else None
        if isinstance(found, list):
            found = next((one.get("template") for one in found if one.get("name") == "default"), None)
        return found.strip() if isinstance(found, str) else None

    def with_chat_template(self, text: str) -> Companions:
        """Write this chat template in the place of those that there are."""
        files = {name: path for name, path in self.files.items() if not matches("chat_template.*", name)}
        return replace(self, files=files, texts={**self.texts, "chat_template.jinja": text})

    def with_tokenizer_of(self, other: Companions) -> Companions:
        """Take every file but the config from another checkpoint."""
        return replace(self, files=other.files)

    def with_texts_of(self, other: Companions) -> Companions:
        """Add what is written for another: what a survey settled."""
        return replace(self, texts={**self.texts, **other.texts}, derived={**self.derived, **other.derived})

    def without_derived(self) -> Companions:
        """Leave out what is made of the finished folder."""
        return replace(self, derived={})


def gather(folder: Path) -> Companions:
    """Find the companions in a checkpoint's folder. Raises CheckpointError for a config that is not JSON."""
    path = folder / CONFIG
    config = read_json(path) if path.is_file() else None
    found = [path for path in sorted([*folder.glob("*"), *folder.glob("*/*")]) if path.is_file()]
    files = {path.relative_to(folder).as_posix(): path for path in found}
    carried = {name: path for name, path in files.items() if is_companion(name) and name not in _READ}
    return Companions(MappingProxyType(config) if config is not None else None, MappingProxyType(carried))


def is_companion(name: str) -> bool:
    """Tell whether a file of this name, as it stands in a checkpoint's folder, goes with the weights.

    >>> is_companion("tokenizer.json"), is_companion("original/tokenizer.model"), is_companion("model.safetensors")
    (True, False, False)
    """
    return name in _READ or matches(_CARRIED_FROM_FOLDERS if "/" in name else _CARRIED, name)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises CheckpointError for anything else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        raise CheckpointError(str(path), f"not valid JSON ({error})") from error
    if not isinstance(found, dict):
        raise CheckpointError(str(path), f"holds a JSON {type(found).__name__}, not an object")
    return found


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
    if len(rows) == 1 and isinstance(result.get("vocab_size"), int):
        result["vocab_size"] = rows.pop()
    return result


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
    """Give the tokenizer's map from token to id, added tokens included; None where its files do not show it."""
    path = companions.files.get("tokenizer.json")
    if path is not None:
        found = read_json(path)
        words = found.get("model", {}).get("vocab", {})
        table = words if isinstance(words, dict) else {str(piece[0]): i for i, piece in enumerate(words)}
        return {**table, **{token["content"]: token["id"] for token in found.get("added_tokens", ())}}
    path = companions.files.get("vocab.txt")
    if path is not None:
        return {word: i for i, word in enumerate(path.read_text(encoding="utf-8").splitlines())}
    return None
