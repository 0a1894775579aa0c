"""A config made true to a stack that was put together anew: the number of layers, and every list by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from portmanteau.merge import MergeError
from portmanteau.merge.errors import Mistake
from portmanteau.merge.names import Stack

from .components import is_of_vision

COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "depth")
_SIDES = {
    "decoder": ("decoder_layers", "num_decoder_layers"),
    "encoder": ("encoder_layers", "num_encoder_layers", *COUNTS),
}
_NOT_BY_LAYER = (  # lists that may happen to be as long
    "architectures",
    "eos_token_id",
    "bos_token_id",
    "pad_token_id",
    "suppress_tokens",
    "image_size",
    "patch_size",
)
_NUMBERS = (  # lists of layer numbers
    "mlp_only_layers",
    "cross_attention_layers",
    "fullatt_block_indexes",
    "deepstack_visual_indexes",
)
_ATTENTION_BY_POSITION = (  # where `layer_types` does not spell it out
    "sliding_window_pattern",
    "global_attn_every_n_layers",
    "full_attention_interval",
    "attn_layer_period",
    "max_window_layers",
)


@dataclass(frozen=True)
class Origin:
    """Where a layer comes from: the model, by its label and its config, the stack and the layer's number there."""

    label: str
    config: Mapping[str, Any] | None
    stack: Stack
    layer: int


def restacked(
    config: Mapping[str, Any] | None, stack: Stack, several: bool, origins: Sequence[Origin]
) -> tuple[dict[str, Any] | None, list[str]]:
    """Make a config say that its stack has these layers; give it, and notes on what it says by position.

    Args:
        config: the donor's; None: there is none.
        stack: the donor's stack.
        several: whether the model has other stacks.
        origins: where each layer comes from.

    Raises MergeError where the config does not say how many layers there are, or another model's has no such list.

    """
    if config is None:
        return None, []
    key = _part(config, stack)
    home = dict(config[key] if key else config)
    counts = [name for name in _count_keys(stack, several and not key) if isinstance(home.get(name), int)]
    if stack.count not in [home[name] for name in counts]:
        said = ", ".join(f"{name}: {home[name]}" for name in counts) or "nothing"
        what = f"the tensor names show {stack.count} layers in {stack}, and config.json says {said}"
        raise MergeError("donor", what, "layers that share one set of weights cannot be stacked anew")
    mistakes: list[Mistake] = []
    for name, value in home.items():
        if name in counts and value == stack.count:
            home[name] = len(origins)
        elif name in _NUMBERS and isinstance(value, list):
            home[name] = [i for i, one in enumerate(origins) if one.layer in _listed(_home(one).get(name))]
        elif _by_layer(name, value, stack):
            home[name] = [_entry(name, one, mistakes) for one in origins]
    if isinstance(home.get("attention_types"), list) and isinstance(home.get("attention_layers"), list):
        home["attention_types"] = [[home["attention_layers"], 1]]  # GPT-Neo: a pattern and how often it is repeated
    if mistakes:
        raise MergeError.of(mistakes)
    return ({**config, key: home} if key else home), _notes(home, stack, origins)


def is_true_of(config: Mapping[str, Any] | None, stack: Stack, other: Origin) -> bool:
    """Tell whether a config is true of its stack with the layers of another model: as many, and of the same kinds.

    Args:
        config: the config; None is true of anything.
        stack: its stack.
        other: the other model, and its stack.

    """
    if config is None or other.config is None:
        return config is None or other.stack.count == stack.count
    key = _part(config, stack)
    own, theirs = config[key] if key else config, _home(other)
    same = (own[name] == theirs[name] for name in own.keys() & theirs.keys() if _by_layer(name, own[name], stack))
    return other.stack.count == stack.count and all(same)


def _by_layer(name: str, value: Any, stack: Stack) -> bool:
    """Tell whether a value has an entry for each layer, or is a list of layers."""
    if not isinstance(value, list) or name in _NOT_BY_LAYER:
        return False
    return name in _NUMBERS or len(value) == stack.count


def _part(config: Mapping[str, Any], stack: Stack) -> str:
    """Find the part of the config that describes the stack: `text_config`, `vision_config`; nothing for the whole."""
    parts = [key for key, value in config.items() if key.endswith("_config") and isinstance(value, Mapping)]
    named = [key for key in parts if key.removesuffix("_config") in stack.prefix]
    if named:
        return named[0]
    if "vision_config" in parts and is_of_vision(stack.prefix):
        return "vision_config"
    return "text_config" if "text_config" in parts else ""


def _count_keys(stack: Stack, several: bool) -> tuple[str, ...]:
    side = next((side for side in _SIDES if side in stack.prefix), None) if several else None
    return _SIDES[side] if side else COUNTS


def _home(origin: Origin) -> Mapping[str, Any]:
    """Give the part of an origin's config that describes its stack."""
    if origin.config is None:
        return {}
    key = _part(origin.config, origin.stack)
    found = origin.config[key] if key else origin.config
    return found if isinstance(found, Mapping) else {}


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _entry(name: str, origin: Origin, mistakes: list[Mistake]) -> Any:
    """Take a layer's entry of a list from where the layer comes from."""
    found = _home(origin).get(name)
    if isinstance(found, list) and len(found) == origin.stack.count:
        return found[origin.layer]
    what = f"the config of {origin.label} has no list {name} with an entry for each of its {origin.stack.count} layers"
    mistakes.append(Mistake("parts", what, "donor: names a model whose config has no such list"))
    return None


def _notes(home: Mapping[str, Any], stack: Stack, origins: Sequence[Origin]) -> list[str]:
    """Say what the config still gives to layers by their position."""
    if [one.layer for one in origins] == list(range(stack.count)):
        return []
    off = {"decoder_sparse_step": 1, "moe_layer_freq": 1, "interleave_moe_layer_step": 1, "first_k_dense_replace": 0}
    spelled = _ATTENTION_BY_POSITION if "layer_types" in home else ()
    unused = () if home.get("use_sliding_window", True) else ("max_window_layers",)
    said = [
        f"{name}: {home[name]}"
        for name in (*_ATTENTION_BY_POSITION, *off)
        if isinstance(home.get(name), int) and home[name] != off.get(name) and name not in (*spelled, *unused)
    ]
    return (
        [f"config.json gives layers their kind by position ({', '.join(said)}): look whether it fits"] if said else []
    )
