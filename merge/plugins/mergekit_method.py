"""A method that somebody registered with mergekit, as an operator: its parameters read, its kernel called as it is.

It sees whole tensors, in fp32 (fp64 for fp64), as mergekit gives them to it, the base first. One at a time: methods may
draw from torch's generator, which is seeded by the tensor's and the models' names.
"""

from __future__ import annotations

import hashlib
import inspect
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any, Optional

from ..errors import MergeError
from ..kernels import one_thread
from ..operator import WHOLE, Operator, Part, Parts, Setting, each
from .discovery import announced, load, load_announced, quiet

if TYPE_CHECKING:
    from torch import Tensor

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
    ["base", "count", "layers", "model", "models", "operator", "part", "rules", "streams", "tensors", "unmatched"]
)
_REGISTRY, _BASE = "mergekit.merge_methods.registry", "mergekit.merge_methods.base"
_LOCK = threading.Lock()


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
    merge = _Kernel(method)
    return Operator(
        spec.name,
        _apply(method, merge),
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
    assert isinstance(kernel, _Kernel)
    return {one.name: f"base_{one.name}" for one in kernel.spec.parameters if _of_base(one, "base" in operator.roles)}


def _of_base(parameter: Any, takes_base: bool) -> bool:
    return takes_base and parameter.scope.value == "input"


def _settings(parameter: Any, takes_base: bool) -> Iterator[Setting]:
    """Give the settings that stand for a parameter: one, and where the base has its own of it, the base's."""
    default = inspect.Parameter.empty if parameter.required else parameter.default
    per_model = parameter.scope.value != "shared"
    yield Setting(parameter.name, parameter.value_type, default, parameter.description or "", per_model)
    if _of_base(parameter, takes_base):
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


class _Kernel:
    """What a method makes of a whole tensor: the operator's measure."""

    def __init__(self, method: Any) -> None:
        self.spec = method.spec
        self._method = method

    def __call__(self, parts: Parts, *, streams: tuple[int, ...] = (), **settings: Any) -> Tensor:
        """Gather the tensor of every model, and of the base, and let the method merge them."""
        import torch

        tensors, has_base = _gathered(parts)
        inputs = [*tensors[-1:], *tensors[:-1]] if has_base else tensors
        parameters = {one.name: self._value(one, settings, parts.models, has_base) for one in self.spec.parameters}
        seed = hashlib.blake2b(repr((parts.name, streams)).encode(), digest_size=8).digest()
        with _LOCK, one_thread(), torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(int.from_bytes(seed, "little"))
            result = self._merged(inputs, parameters, has_base, parts.name)
        return result.to(tensors[0].dtype)

    def _merged(self, inputs: Sequence[Tensor], parameters: Mapping[str, Any], has_base: bool, name: str) -> Tensor:
        """Call the method through mergekit's own interface."""
        group = import_module(_BASE).TensorGroup.from_tensors(
            inputs, base_index=0 if has_base else None, name=name or None
        )
        try:
            (result,) = self._method((group,), parameters=parameters)
        except Exception as error:
            raise MergeError("", f"the plugin gave up: {type(error).__name__}: {error}") from error
        merged: Tensor = result
        return merged

    def _value(self, parameter: Any, settings: Mapping[str, Any], count: int, has_base: bool) -> Any:
        """Give a parameter as mergekit takes it: one value, or one for each input that it is a matter of."""
        value = settings[parameter.name] if parameter.name in settings else self._default(parameter)
        if parameter.scope.value == "shared":
            return value
        if not _of_base(parameter, has_base):
            return list(each(value, count))
        own = settings.get(f"base_{parameter.name}")
        if own is None:
            raise MergeError("", f"needs the base's own {parameter.name}", f"base_{parameter.name}: …")
        return [own, *each(value, count)]

    def _default(self, parameter: Any) -> Any:
        if parameter.required:
            raise MergeError("", f"needs {parameter.name!r}")
        return parameter.default


def _gathered(parts: Parts) -> tuple[list[Tensor], bool]:
    """Put the parts of every model together, and behind them the base's, where there is one, in the tensor's shape."""
    import torch

    whole: Tensor | None = None
    for start, part in parts.placed():
        models, *base = part
        rows = torch.cat([models.reshape(len(models), -1), *(one.reshape(1, -1) for one in base)])
        if whole is None:
            whole = torch.empty((len(rows), parts.entries), dtype=rows.dtype)
        whole[:, start : start + rows.shape[1]] = rows
    assert whole is not None
    return [row.view(parts.shape) for row in whole], len(whole) > parts.models


def _apply(method: Any, kernel: _Kernel) -> Callable[..., Tensor]:
    """Make the function of the operator: the run of entries that is asked for, of what the kernel made."""

    def apply(models: Tensor, base: Tensor | None = None, *, part: Part = WHOLE, **settings: Any) -> Tensor:
        given = (models,) if base is None else (models, base)
        whole = (
            kernel(Parts.whole(*given), streams=part.streams, **settings) if part.measured is None else part.measured
        )
        run = whole.reshape(-1)[part.start : part.start + models[0].numel()]
        return run.reshape(models.shape[1:]).clone()

    apply.__name__ = apply.__qualname__ = method.spec.name
    apply.__doc__ = _text(method)
    return apply


def _text(method: Any) -> str:
    """Say what the method is: what its author wrote, else its title."""
    written = inspect.getdoc(_function(method)) if _function(method) else vars(type(method)).get("__doc__")
    return inspect.cleandoc(written or f"{method.spec.pretty_name or method.spec.name}, a method of a mergekit plugin.")


def _function(method: Any) -> Any:
    return getattr(method, "implementation", None)


def _home(method: Any) -> str:
    function = _function(method)
    return f"{function.__module__}.{function.__name__}" if function else f"{type(method).__module__}"
