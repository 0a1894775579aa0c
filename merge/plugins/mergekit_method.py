"""A method that somebody registered with mergekit, described as an operator of ours."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Optional

from ..errors import MergeError
from ..operator import Operator, Setting
from .discovery import announced, load, load_announced, quiet
from .kernel import Kernel, applied, of_base

KNOWN = "0.1.5"  # the version whose own methods are these
OWN = frozenset(
    [
        "arcee_fusion",
        "breadcrumbs",
        "breadcrumbs_ties",
        "dare_linear",
        "dare_ties",
        "della",
        "della_linear",
        "karcher",
        "linear",
        "model_stock",
        "multislerp",
        "nearswap",
        "nuslerp",
        "passthrough",
        "ram",
        "ramplus_tl",
        "sce",
        "slerp",
        "task_arithmetic",
        "ties",
    ]
)  # native here, under names of ours
RESERVED = frozenset(
    [
        "base",
        "count",
        "layers",
        "model",
        "models",
        "only",
        "operator",
        "part",
        "rules",
        "streams",
        "tensors",
        "unmatched",
    ]
)
_REGISTRY = "mergekit.merge_methods.registry"


def registered(name: str) -> Operator | None:
    """Give the method that mergekit has under this name, beside its own; a plugin of that name is imported for it."""
    load(name)
    return next((operator_of(one) for one in _methods() if one.spec.name == name), None)


def all_registered() -> dict[str, Operator]:
    """Give every method beside mergekit's own, where modules were announced that may have registered some."""
    if not announced():
        return {}
    load_announced()
    return {one.spec.name: operator_of(one) for one in _methods()}


def installed() -> bool:
    """Tell whether mergekit is there to be imported."""
    return _version() is not None


def _methods() -> Iterator[Any]:
    """Go through the methods that are not mergekit's own. It is imported only where there may be such."""
    if _REGISTRY not in sys.modules and _version() in (None, KNOWN):
        return
    with quiet():
        registry = import_module(_REGISTRY)
    yield from (one for one in registry.registered_methods() if one.spec.name not in OWN)


def _version() -> str | None:
    try:
        return version("mergekit")
    except PackageNotFoundError:
        return None


@cache
def operator_of(method: Any) -> Operator:
    """Describe a method of mergekit's as an operator. MergeError where a recipe could not write its parameters."""
    spec, policy = method.spec, method.spec.contract.base.value
    takes_base = policy in ("required", "optional")
    settings = {setting.name: setting for one in spec.parameters for setting in _settings(one, takes_base)}
    written = [setting.name for one in spec.parameters for setting in _settings(one, takes_base)]
    clashing = [name for name in written if name in RESERVED or written.count(name) > 1]
    if clashing:
        what = f"has a parameter {clashing[0]!r}, which means something else in recipes"
        raise MergeError(f"method {spec.name}", what, "call it otherwise in the plugin")
    merge = Kernel(method)
    return Operator(
        spec.name,
        applied(spec.name, merge, _text(method)),
        ("models", "base") if takes_base else ("models",),
        settings,
        source=", ".join(filter(None, (f"mergekit {_version()}, {_home(method)}", spec.reference_url))),
        laws=frozenset(),
        measure=merge,
        takes=None,
        refuse=_refusal(spec.contract),
        rows=False,
        holds=2,
        holds_each=3,
        base_optional=policy == "optional",
    )


def base_settings(operator: Operator) -> Mapping[str, str]:
    """Give those parameters of a plugin's method that its base has of its own too, with the name of the base's."""
    kernel = operator.measure
    assert isinstance(kernel, Kernel)
    return {one.name: f"base_{one.name}" for one in kernel.spec.parameters if of_base(one, "base" in operator.roles)}


def _settings(parameter: Any, takes_base: bool) -> Iterator[Setting]:
    """Give the settings that stand for a parameter: one, and where the base has its own of it, the base's."""
    default = inspect.Parameter.empty if parameter.required else parameter.default
    per_model = parameter.scope.value != "shared"
    yield Setting(parameter.name, parameter.value_type, default, parameter.description or "", per_model)
    if of_base(parameter, takes_base):
        optional = Optional[parameter.value_type]  # noqa: UP045 - of a type that is known only at run time
        own = None if parameter.required else default
        yield Setting(f"base_{parameter.name}", optional, own, f"{parameter.name} of the base", per_model=False)


def _refusal(contract: Any) -> Callable[..., str]:
    """Make the check of the number of models that the method's contract asks for."""
    policy, least, most = contract.base.value, contract.min_inputs, contract.max_inputs
    if policy == "required":  # the base counts as an input
        least, most = least - 1, most and most - 1
    elif policy == "optional":
        least = least - 1
    least = max(least, contract.min_non_base or 0, 1)
    most = min((one for one in (most, contract.max_non_base) if one is not None), default=None)

    beside = "" if policy in ("ignored", "forbidden") else " beside the base"

    def refuse(*, count: int) -> str:
        if least <= count and (most is None or count <= most):
            return ""
        wanted = f"exactly {least}" if least == most else f"{least} or more" if most is None else f"{least} to {most}"
        return f"takes {wanted} models{beside}, and {count} are given"

    return refuse


def _text(method: Any) -> str:
    """Say what the method is: what its author wrote, else its title."""
    written = inspect.getdoc(_function(method)) if _function(method) else vars(type(method)).get("__doc__")
    return inspect.cleandoc(written or f"{method.spec.pretty_name or method.spec.name}, a method of a mergekit plugin.")


def _function(method: Any) -> Any:
    return getattr(method, "implementation", None)


def _home(method: Any) -> str:
    function = _function(method)
    return f"{function.__module__}.{function.__name__}" if function else f"{type(method).__module__}"
