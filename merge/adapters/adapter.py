"""A PEFT LoRA adapter on disk: its config read strictly, its tensors sorted by what they change in a base."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoint import Checkpoint
from ..companions import gather
from ..errors import CheckpointError, Mistake
from ..files import hub
from ..files.json_file import read_json
from ..stored import StoredCheckpoint
from .folder import CONFIG, locate
from .module_pattern import ModulePatterns

PREFIX = "base_model.model."
_PATTERNS = ("rank_pattern", "alpha_pattern")
_LARGEST = 1e12
_READ = {"peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "fan_in_fan_out"}
_HARMLESS = {  # which modules there are is seen in the file; how they were trained does not matter afterwards
    *("auto_mapping", "base_model_name_or_path", "bias", "corda_config", "eva_config", "exclude_modules"),
    *("inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform", "loftq_config", "lora_dropout"),
    *("lora_ga_config", "megatron_core", "modules_to_save", "peft_version", "qalora_group_size", "revision"),
    *("runtime_config", "target_modules", "task_type"),
}
_KEEPS_BASE = (True, False, None, "gaussian", "eva", "orthogonal")  # initialisations that leave the base as it was
_FACTORS = {  # how the names of a module's tensors end
    "lora_A.weight": "a",
    "lora_B.weight": "b",
    "lora_embedding_A": "a",
    "lora_embedding_B": "b",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
}


@dataclass(frozen=True, slots=True)
class Module:
    """The low-rank change of one module: the names of its tensors in the file, and what scales B A.

    Attributes:
        a: lora_A [rank, in], or lora_embedding_A [rank, rows].
        b: lora_B [out, rank], or lora_embedding_B [width, rank].
        scaling: alpha / rank, or alpha / √rank (rsLoRA).
        rank: the rank that the config gives it.
        embedding: B A is the change of the transposed table.
        magnitude: lora_magnitude_vector [out] of a DoRA module.

    """

    a: str
    b: str
    scaling: float
    rank: int
    embedding: bool = False
    magnitude: str = ""


@dataclass(frozen=True, eq=False)
class Adapter:
    """A LoRA adapter: a low-rank change for each module, and the tensors that it stores whole.

    Attributes:
        label: what messages and receipts call it.
        stored: its tensors: those of its weight file, or those that a composition makes.
        config: its adapter_config.json, parsed.
        modules: path of the module in the base → its change.
        saved: name in the base → name in the file, of tensors trained and stored whole (`modules_to_save`, biases).
        copies: name in the base → name in the file, of the base's own tensors, which peft stores beside embeddings.
        fan_in_fan_out: what the config says about weights that are stored [in, out].

    """

    label: str
    stored: Checkpoint
    config: Mapping[str, Any]
    modules: Mapping[str, Module]
    saved: Mapping[str, str]
    copies: Mapping[str, str]
    fan_in_fan_out: bool

    @property
    def targets(self) -> Iterator[str]:
        """Go through the names of the base's tensors that it changes, as it spells them."""
        yield from (f"{path}.weight" for path in self.modules)
        yield from self.saved


def open_adapter(
    reference: str | Path, *, revision: str | None = None, label: str | None = None, weights: bool = True
) -> Adapter:
    """Open a folder, or a Hub id `ORG/NAME[@REVISION]`, with a LoRA adapter, by config and header alone.

    With `weights=False` only the header of what is on the Hub is fetched.

    >>> adapter = open_adapter("examples/adapters/task")
    >>> len(adapter.modules)
    56
    >>> module = adapter.modules["model.layers.0.mlp.up_proj"]
    >>> module.rank, module.scaling, adapter.stored.specs[module.a].shape
    (4, 1.0, (4, 64))

    Raises CheckpointError, with every mistake found, where there is none or where its arithmetic is not known here.
    """
    found = locate(reference, revision, hub.ADAPTER, "peft's save_pretrained", weights=weights)
    label, path = label or str(reference), found.path
    config = read_json(path / CONFIG)
    mistakes = [Mistake(str(path / CONFIG), what, hint) for what, hint in _refusals(config)]
    file = found.weights(hub.ADAPTER)
    if file is None:
        mistakes.append(Mistake(str(path), f"holds no {hub.ADAPTER[0][0]}", "save or download the adapter again"))
    if mistakes or file is None:
        raise CheckpointError.of(mistakes)
    stored = StoredCheckpoint(label, [file], gather(path), found.revision, found.repository)
    return adapter_of(stored, config, str(file.path))


def _refusals(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Find what changes the arithmetic in ways that are not known here: what, and a hint."""
    if "peft_type" not in config and isinstance(config.get("config"), dict):
        hint = "average_adapters and stack_adapters take AdapterHub's bottleneck adapters"
        yield "an adapter of AdapterHub's library adapters, not of peft", hint
        return
    if config.get("peft_type") != "LORA":
        yield f"peft_type is {config.get('peft_type')!r}", "only LoRA adapters can be added to weights"
        return
    for key in ("r", "lora_alpha"):
        if not _is_number(config.get(key)):
            yield f"{key} is {config.get(key)!r}, not a number above 0", ""
    for key in _PATTERNS:
        pattern = config.get(key) or {}
        if not isinstance(pattern, dict) or not all(map(_is_number, pattern.values())):
            yield f"{key} is {pattern!r}, not a mapping to numbers above 0", ""
            continue
        try:
            ModulePatterns(pattern)
        except ValueError as error:
            yield f"{key}: {error}", "name the modules, or write *, +, ?, |, classes and brackets"
    start = config.get("init_lora_weights")
    if start not in _KEEPS_BASE:
        hint = "convert it with peft: save_pretrained(…, path_initial_model_for_weight_conversion=…)"
        yield f"init_lora_weights is {start!r}: it was trained on a base that this changed", hint
    for key in sorted(config.keys() - _READ - _HARMLESS):
        if config[key]:
            yield f"{key} is {config[key]!r}: adapters with it are not supported", "fold it in with peft"


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < _LARGEST


def adapter_of(stored: Checkpoint, config: Mapping[str, Any], where: str) -> Adapter:
    """Sort the tensors of an adapter: factors of modules, tensors stored whole, copies of the base's.

    Raises CheckpointError, at `where`, for modules that lack a factor and tensors that nothing is known about.
    """
    factors: dict[str, dict[str, str]] = {}
    embeddings: set[str] = set()
    saved: dict[str, str] = {}
    copies: dict[str, str] = {}
    for name in stored.specs:
        own = name.removeprefix(PREFIX)
        ending = next((e for e in _FACTORS if own.endswith(f".{e}")), None)
        if ending is not None:
            path = own.removesuffix(f".{ending}")
            factors.setdefault(path, {})[_FACTORS[ending]] = name
            if "embedding" in ending:
                embeddings.add(path)
        elif own.endswith(".base_layer.weight"):
            copies[own.replace(".base_layer.", ".")] = name
        else:
            saved[own.replace(".base_layer.", ".").replace(".modules_to_save.", ".")] = name
    mistakes = list(_incomplete(where, factors, saved, bool(config.get("use_dora"))))
    if mistakes:
        raise CheckpointError.of(mistakes)
    modules = {}
    ranks, alphas = (ModulePatterns(config.get(key) or {}) for key in _PATTERNS)
    for path, found in factors.items():
        rank, alpha = ranks.of(path, config["r"]), alphas.of(path, config["lora_alpha"])
        scaling = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
        modules[path] = Module(found["a"], found["b"], scaling, rank, path in embeddings, found.get("magnitude", ""))
    return Adapter(stored.label, stored, config, modules, saved, copies, bool(config.get("fan_in_fan_out")))


def _incomplete(
    where: str, factors: Mapping[str, Mapping[str, str]], saved: Iterable[str], dora: bool
) -> Iterator[Mistake]:
    """Find modules that lack a factor, and tensors that nothing is known about."""
    if not factors:
        yield Mistake(where, "holds no lora_A and lora_B", "an adapter file is what peft's save_pretrained writes")
    for path, found in factors.items():
        lacking = [part for part in ("a", "b", *(("magnitude",) if dora else ())) if part not in found]
        if lacking:
            names = {"a": "lora_A", "b": "lora_B", "magnitude": "lora_magnitude_vector"}
            yield Mistake(where, f"module {path} lacks {', '.join(names[part] for part in lacking)}")
        elif not dora and "magnitude" in found:
            yield Mistake(where, f"module {path} has a lora_magnitude_vector, and use_dora is not set")
    for name in saved:
        if ".lora_" in name:
            yield Mistake(where, f"tensor {name} is of a kind that is not supported", "fold it in with peft")
        elif f"{name.rpartition('.')[0]}" in factors and name.endswith(".weight"):
            yield Mistake(where, f"tensor {name} is stored whole, and changed by a LoRA too")
