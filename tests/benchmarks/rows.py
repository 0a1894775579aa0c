"""What is compared: each row's recipe, its inputs, what its peer runs, and the targets it is held to."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_FOLD = Path(__file__).with_name("fold_with_peft.py")
_WEIGHTS = {"one": 0.6, "two": 0.4}
_BOTTOM, _TOP = 2, 1  # layers of model two in the layer swap
_PAIR = ("one", "two")
_TRIO = ("base", "one", "two")
_SNAPSHOTS = tuple(f"snapshot-{i}" for i in range(1, 11))
_RANK = 16

Command = list[str | Path]


@dataclass(frozen=True)
class Targets:
    """What a row is to reach; None: nothing was asked for.

    Attributes:
        faster: the peer's wall time divided by ours, at least.
        of_copy: our wall time divided by that of `cp -r` and `sync` of the result, at most.
        peak: our peak resident bytes, at most.

    """

    faster: float | None = None
    of_copy: float | None = None
    peak: float | None = None

    def verdict(self, faster: float | None, of_copy: float, peak: float) -> str:
        """Say whether all of them are met, and which are not. What was not measured is not met."""
        if self == Targets():
            return "–"
        failed = {
            "peer": self.faster is not None and (faster is None or faster < self.faster),
            "cp": self.of_copy is not None and of_copy > self.of_copy,
            "memory": self.peak is not None and peak > self.peak,
        }
        named = [target for target, is_missed in failed.items() if is_missed]
        return f"not met: {', '.join(named)}" if named else "met"


@dataclass(frozen=True)
class Row:
    """One comparison.

    Attributes:
        ours: what stands under `merge:` in our recipe.
        models: the inputs.
        peer: the program that does the same, as the table names it; `our linear` where there is none.
        theirs: the merge method and its parameters, where the peer is mergekit.
        targets: what it is held to.
        scale: the size of the models.
        most_runs: where the peer takes too long to be repeated.

    """

    ours: Mapping[str, Any]
    models: Sequence[str]
    peer: str = "mergekit"
    theirs: Mapping[str, Any] = field(default_factory=dict)
    targets: Targets = Targets()
    scale: str = "1.1B"
    most_runs: int | None = None


_TIES = {"base": "base", "models": _WEIGHTS, "density": 0.2}
_COPIES = Targets(4, 1.2, 150e6)
_SUMS = Targets(6, 1.5, 500e6)
ROWS: Mapping[str, Row] = {
    "passthrough": Row({"copy": {"models": ["one"]}}, ["one"], theirs={"merge_method": "passthrough"}, targets=_COPIES),
    "layer_swap": Row(
        {"layer_swap": {"task": "one", "language": "two", "bottom": _BOTTOM, "top": _TOP, "transition": 0}},
        _PAIR,
        theirs={"merge_method": "passthrough", "slices": ()},
        targets=_COPIES,
    ),
    "linear": Row({"linear": {"models": _WEIGHTS}}, _PAIR, theirs={"merge_method": "linear"}, targets=_SUMS),
    "task_arithmetic": Row(
        {"task_arithmetic": {"base": "base", "models": _WEIGHTS}},
        _TRIO,
        theirs={"merge_method": "task_arithmetic", "base_model": "base"},
        targets=_SUMS,
    ),
    "slerp": Row(
        {"slerp": {"models": list(_PAIR), "t": 0.4}},
        _PAIR,
        theirs={"merge_method": "slerp", "base_model": "one", "parameters": {"t": 0.4}},
        targets=Targets(10, 2, 500e6),
    ),
    "ties": Row(
        {"ties": _TIES},
        _TRIO,
        theirs={"merge_method": "ties", "base_model": "base", "parameters": {"density": 0.2}},
        targets=Targets(25, 4, 600e6),
    ),
    "dare_ties": Row(
        {"dare": {**_TIES, "rescale": "l1", "elect": "weighted"}},
        _TRIO,
        theirs={"merge_method": "dare_ties", "base_model": "base", "parameters": {"density": 0.2}},
        targets=Targets(20, 4, 600e6),
    ),
    "average_10": Row(
        {"average": {"models": list(_SNAPSHOTS)}},
        _SNAPSHOTS,
        theirs={"merge_method": "linear"},
        targets=Targets(6, None, 500e6),
        scale="0.3B",
    ),
    "extract_sparse": Row(
        {"extract_sparse": {"base": "base", "tuned": "one", "density": 0.01}}, _TRIO, peer="our linear"
    ),
    "fold_lora": Row({"lora": {"base": "base", "adapters": ["adapter"]}}, ("base", "adapter"), peer="peft"),
    "extract_lora": Row(
        {"extract_lora": {"base": "base", "tuned": "one", "rank": _RANK}},
        ("base", "one"),
        peer="mergekit-extract-lora",
        most_runs=1,
    ),
}


def our_recipe(row: Row, inputs: Path) -> dict[str, Any]:
    """Write a recipe our way."""
    return {"models": {model: str(inputs / model) for model in row.models}, "merge": row.ours}


def our_command(row: Row, inputs: Path, recipe: Path, out: Path) -> Command:
    """Write our recipe down and give the command that builds it."""
    return _build(our_recipe(row, inputs), recipe, out)


def peer_command(row: Row, inputs: Path, recipe: Path, out: Path) -> Command:
    """Give the command by which the peer makes the same, its recipe written down where it has one."""
    if row.peer == "peft":
        return [sys.executable, _FOLD, *(inputs / model for model in row.models), out]
    if row.peer == "our linear":
        return _build(our_recipe(ROWS["linear"], inputs), recipe, out)
    if row.peer == "mergekit-extract-lora":
        base, tuned = (inputs / model for model in row.models)
        return [row.peer, "--base-model", base, "--model", tuned, "--out-path", out, "--max-rank", str(_RANK)]
    recipe.write_text(json.dumps(mergekit_recipe(row, inputs), indent=2), encoding="utf-8")
    return ["mergekit-yaml", recipe, out, "--no-copy-tokenizer"]


def _build(value: Mapping[str, Any], recipe: Path, out: Path) -> Command:
    recipe.write_text(json.dumps(value, indent=2), encoding="utf-8")  # JSON is YAML
    return ["portmanteau", "build", recipe, out]


def mergekit_recipe(row: Row, inputs: Path) -> dict[str, Any]:
    """Write the same recipe mergekit's way; `dtype: bfloat16` as in its own examples."""
    recipe: dict[str, Any] = {**row.theirs, "dtype": "bfloat16"}
    if "base_model" in recipe:
        recipe["base_model"] = str(inputs / recipe["base_model"])
    if "slices" in recipe:
        layers = json.loads((inputs / "one" / "config.json").read_text(encoding="utf-8"))["num_hidden_layers"]
        zones = [("two", 0, _BOTTOM), ("one", _BOTTOM, layers - _TOP), ("two", layers - _TOP, layers)]
        sources = [[{"model": str(inputs / model), "layer_range": [a, b]}] for model, a, b in zones]
        return {**recipe, "slices": [{"sources": source} for source in sources]}
    merged = [model for model in row.models if model != "base"]
    takes_weights = recipe["merge_method"] not in ("passthrough", "slerp")
    given = [{"weight": _WEIGHTS.get(model, 1.0)} if takes_weights else {} for model in merged]
    models = [{"model": str(inputs / model), "parameters": one} for model, one in zip(merged, given, strict=True)]
    return {**recipe, "models": models}
