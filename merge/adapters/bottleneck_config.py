"""The architecture of a bottleneck adapter as AdapterHub configs spell it: defaults, old spellings, other methods."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

_LEAST = 1e-6  # of a reduction factor, which is 2 to 64 in practice
REQUIRED = ("mh_adapter", "output_adapter", "non_linearity", "reduction_factor")
_DEFAULTS: Mapping[str, Any] = {  # adapters 1.3.0, BnConfig: configs of earlier versions lack the later options
    "original_ln_before": False,
    "original_ln_after": True,
    "ln_before": False,
    "ln_after": False,
    "init_weights": "bert",
    "init_weights_seed": None,
    "is_parallel": False,
    "scaling": 1.0,
    "use_gating": False,
    "residual_before_ln": True,
    "adapter_residual_before_ln": False,
    "inv_adapter": None,
    "inv_adapter_reduction_factor": None,
    "cross_adapter": False,
    "leave_out": [],
    "dropout": 0.0,
    "phm_layer": False,
    "phm_dim": 4,
    "factorized_phm_W": True,
    "shared_W_phm": False,
    "shared_phm_rule": True,
    "factorized_phm_rule": False,
    "phm_c_init": "normal",
    "phm_init_range": 0.0001,
    "learn_phm": True,
    "hypercomplex_nonlinearity": "glorot-uniform",
    "phm_rank": 1,
    "phm_bias": True,
    "stochastic_depth": 0.0,
}
_ACTIVATIONS = {"gelu": "gelu_new", "gelu_orig": "gelu"}  # as configs without a version mean them
_METHODS = {  # by the key `architecture`, which a bottleneck's config lacks
    "lora": "a LoRA",
    "mtl_lora": "a multi-task LoRA",
    "prefix_tuning": "a prefix tuning",
    "prompt_tuning": "a prompt tuning",
    "reft": "a ReFT",
    "union": "a union of several methods",
}
_IN_WEIGHTS = "it can be merged into weights: load it with the library adapters, call merge_adapter, save the model"
_AT_RUN_TIME = "it acts at run time only: there is nothing to merge; compose it with the library adapters"
_TRAINING = ("dropout", "init_weights", "init_weights_seed", "stochastic_depth")  # of no consequence afterwards


def refusals(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Find what makes an adapter_config.json none of a bottleneck adapter: what, and a hint."""
    if "peft_type" in config:
        kind = config["peft_type"]
        hint = "`lora` folds it into its base" if kind == "LORA" else ""
        yield f"a PEFT adapter ({kind}), not one of AdapterHub's library adapters", hint
        return
    own = config.get("config")
    if not isinstance(own, dict):
        yield "has no architecture under the key config", "an adapter folder is what save_adapter of adapters writes"
        return
    name = config.get("name")
    if not isinstance(name, str) or not name or any(sign in name for sign in "./\\") or not name.isprintable():
        yield f"name is {name!r}: an adapter's name is text without dots and slashes", ""
    method = own.get("architecture")
    if method is not None:
        scales = method == "lora" and own.get("composition_mode") == "scale"
        kind = "an (IA)³" if scales else _METHODS.get(str(method), f"an adapter of the method {method!r}")
        yield f"{kind}, not a bottleneck adapter", _IN_WEIGHTS if method == "lora" else _AT_RUN_TIME
        return
    lacking = [key for key in REQUIRED if key not in own]
    if lacking:
        yield f"its architecture lacks {', '.join(lacking)}", "load it with the library adapters, and save it again"
    reduction = own.get("reduction_factor", 1)
    factors = reduction.values() if isinstance(reduction, dict) else [reduction]
    if not factors or not all(isinstance(one, int | float) and _LEAST < one < 1 / _LEAST for one in factors):
        yield f"reduction_factor is {reduction!r}, not a number above 0, nor a mapping to such", ""
    if not isinstance(own.get("non_linearity", ""), str):
        yield f"non_linearity is {own['non_linearity']!r}, not a name", ""


def current(config: Mapping[str, Any], *, has_invertible: bool) -> dict[str, Any]:
    """Give the architecture as adapters 1.3.0 writes it: defaults filled in, old spellings replaced."""
    own = dict(config["config"])
    nested = own.pop("invertible_adapter", None)  # of adapter-transformers 1
    if isinstance(nested, dict):
        names = {"inv_adapter": "block_type", "inv_adapter_reduction_factor": "reduction_factor"}
        own |= {new: nested.get(old) for new, old in names.items()}
    if "version" not in config:
        own["non_linearity"] = _ACTIVATIONS.get(own["non_linearity"], own["non_linearity"])
    if config.get("type") == "text_task" and not has_invertible:  # they named one, and had none
        own |= {"inv_adapter": None, "inv_adapter_reduction_factor": None}
    return {**_DEFAULTS, **own, "leave_out": own.get("leave_out") or []}


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Give the options in which two architectures differ, apart from those that matter only in training."""
    keys = [key for key in dict.fromkeys([*one, *other]) if key not in _TRAINING]
    return [key for key in keys if one.get(key) != other.get(key)]


def is_invertible(architecture: Mapping[str, Any]) -> bool:
    """Tell whether it has an invertible adapter."""
    return bool(architecture["inv_adapter"])


def width(hidden: int, factor: float) -> int:
    """Give the width of the bottleneck.

    >>> width(768, 16), width(8, 16)
    (48, 1)
    """
    return max(1, int(hidden // factor))
