"""An adapter as a result: the factors of each module, and the adapter_config.json with which peft loads them."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from portmanteau.merge import Adapter, Composed
from portmanteau.merge.adapters.adapter import PREFIX
from portmanteau.merge.adapters.folder import CONFIG
from portmanteau.merge.companions import Companions
from portmanteau.merge.errors import some
from portmanteau.merge.form import Form
from portmanteau.merge.node import Node, Step, copy_of

_FIXED = {  # what the formula scaling · B A needs, and peft's defaults for what only training knows
    "peft_type": "LORA",
    "use_rslora": False,
    "use_dora": False,
    "lora_dropout": 0.0,
    "init_lora_weights": True,
    "inference_mode": True,
}


MERGED = "A merged LoRA adapter"


def form(title: str = MERGED) -> Form:
    """Give the layout of an adapter's folder."""
    return Form(weights="adapter_model.safetensors", library="peft", title=title)


@dataclass(frozen=True)
class Pair:
    """The factors of one module.

    Attributes:
        a: A [rank, in].
        b: B [out, rank].
        scaling: what B A is multiplied with; alpha says it.
        embedding: they change an embedding, whose factors have names of their own.
        magnitude: the magnitudes of a DoRA module.
        label: what plans say they come from.

    """

    a: Node
    b: Node
    scaling: float = 1.0
    embedding: bool = False
    magnitude: Node | None = None
    label: str = ""

    @property
    def rank(self) -> int:
        """The rows of A."""
        return self.a.output.shape[0]

    @property
    def alpha(self) -> float:
        """Give scaling · rank, whole where it is but for rounding."""
        exact = self.scaling * self.rank
        return round(exact) if abs(round(exact) - exact) < 1e-9 * abs(exact) else exact


@dataclass(frozen=True)
class Saved:
    """A tensor that the adapter stores whole."""

    node: Node
    label: str


@dataclass(frozen=True)
class Folder:
    """What an adapter folder holds.

    Attributes:
        pairs: path of the module → its factors.
        saved: name in the base → the tensor stored whole.
        settings: what the config says beside ranks and names: base_model_name_or_path, task_type, fan_in_fan_out.
        notes: what a user should know of it.
        derived: files that are made when the weights are written.
        title: what the model card calls it.

    """

    pairs: Mapping[str, Pair]
    saved: Mapping[str, Saved] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    derived: Mapping[str, Callable[[Path], None]] = field(default_factory=dict)
    title: str = MERGED

    @property
    def config(self) -> dict[str, Any]:
        """Give what adapter_config.json says: r is the largest rank, other ranks and alphas stand in patterns."""
        rank = max(pair.rank for pair in self.pairs.values())
        alphas = Counter(pair.alpha for pair in self.pairs.values() if pair.rank == rank)
        alpha = alphas.most_common(1)[0][0]
        biases = [name for name in self.saved if self._is_bias(name)]
        modules = dict.fromkeys(name.rpartition(".")[0] for name in self.saved if name not in biases)
        return {
            **_FIXED,
            "r": rank,
            "lora_alpha": alpha,
            "rank_pattern": {re.escape(path): one.rank for path, one in self.pairs.items() if one.rank != rank},
            "alpha_pattern": {re.escape(path): one.alpha for path, one in self.pairs.items() if one.alpha != alpha},
            "target_modules": list(self.pairs),
            "modules_to_save": list(modules) or None,
            "bias": "lora_only" if biases else "none",
            **self.settings,
            "use_dora": any(pair.magnitude is not None for pair in self.pairs.values()),
        }

    def _is_bias(self, name: str) -> bool:
        """Tell whether it belongs to a module with factors; other tensors are stored with their module."""
        return name.rpartition(".")[0] in self.pairs

    def composed(self, label: str) -> Composed:
        """Make the result, under the names that peft gives."""
        nodes: dict[str, Step] = {}
        for path, pair in self.pairs.items():
            ends = ("lora_embedding_A", "lora_embedding_B") if pair.embedding else ("lora_A.weight", "lora_B.weight")
            made = dict(zip(ends, (pair.a, pair.b), strict=True))
            if pair.magnitude is not None:
                made["lora_magnitude_vector"] = pair.magnitude
            for end, node in made.items():
                nodes[f"{PREFIX}{path}.{end}"] = _named(f"{PREFIX}{path}.{end}", node, pair.label)
        for name, saved in self.saved.items():
            path, _, leaf = name.rpartition(".")
            own = f"{PREFIX}{path}.base_layer.{leaf}" if self._is_bias(name) else f"{PREFIX}{name}"
            nodes[own] = _named(own, saved.node, saved.label)
        text = json.dumps(self.config, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
        companions = Companions(texts={CONFIG: text}, form=form(self.title), derived=self.derived)
        return Composed(label, nodes, companions, self.notes)


def _named(name: str, node: Node, label: str) -> Step:
    return copy_of(node, replace(node.output, name=name), label)


def agreed(adapters: Sequence[Adapter]) -> tuple[dict[str, Any], list[str]]:
    """Give what the configs of all adapters say alike of base and task, and notes where they differ."""
    settings: dict[str, Any] = {}
    notes = []
    for key in ("base_model_name_or_path", "revision", "task_type"):
        values = [adapter.config.get(key) for adapter in adapters]
        same = all(value == values[0] for value in values)
        settings[key] = values[0] if same else None
        if not same:
            shown = some(f"{adapter.label} {value!r}" for adapter, value in zip(adapters, values, strict=True))
            notes.append(f"the adapters' configs differ in {key}, which is left empty: {shown}")
    ways = {adapter.fan_in_fan_out for adapter in adapters}
    settings["fan_in_fan_out"] = adapters[0].fan_in_fan_out
    if len(ways) > 1:
        notes.append(f"the adapters' configs differ in fan_in_fan_out; it is {adapters[0].label}'s")
    return settings, notes
