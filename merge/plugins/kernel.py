"""What carries out a method of mergekit's: a whole tensor of every model gathered, and merged by mergekit's interface.

It sees whole tensors, in fp32 (fp64 for fp64), the base last, as mergekit adds one that is not listed among the models.
One at a time: methods may draw from torch's generator, which is seeded by the tensor's and the models' names.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any

from ..errors import MergeError
from ..kernels import one_thread
from ..operator import WHOLE, Part, Parts, each

if TYPE_CHECKING:
    from torch import Tensor

_BASE = "mergekit.merge_methods.base"
_LOCK = threading.Lock()


class Kernel:
    """What a method makes of a whole tensor: the operator's measure."""

    def __init__(self, method: Any) -> None:
        """Wrap a method."""
        self.spec = method.spec
        self._method = method

    @property
    def home(self) -> str:
        """The module that defines the method."""
        return getattr(self._method, "implementation", type(self._method)).__module__

    def __call__(self, parts: Parts, *, streams: tuple[int, ...] = (), **settings: Any) -> Tensor:
        """Gather the tensor of every model, and of the base, and let the method merge them."""
        import torch

        tensors, has_base = _gathered(parts)
        parameters = {one.name: self._value(one, settings, parts.models, has_base) for one in self.spec.parameters}
        seed = hashlib.blake2b(repr((parts.name, streams)).encode(), digest_size=8).digest()
        with _LOCK, one_thread(), torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(int.from_bytes(seed, "little"))
            result = self._merged(tensors, parameters, has_base, parts.name)
        return result.to(tensors[0].dtype)

    def _merged(self, inputs: Sequence[Tensor], parameters: Mapping[str, Any], has_base: bool, name: str) -> Tensor:
        """Call the method through mergekit's own interface."""
        group = import_module(_BASE).TensorGroup.from_tensors(
            inputs, base_index=len(inputs) - 1 if has_base else None, name=name or None
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
        if not of_base(parameter, has_base):
            return list(each(value, count))
        own = settings.get(f"base_{parameter.name}")
        if own is None:
            raise MergeError("", f"needs the base's own {parameter.name}", f"base_{parameter.name}: …")
        return [*each(value, count), own]

    def _default(self, parameter: Any) -> Any:
        if parameter.required:
            raise MergeError("", f"needs {parameter.name!r}")
        return parameter.default


def _gathered(parts: Parts) -> tuple[list[Tensor], bool]:
    """Put the parts of every model together, and behind them the base's, if any, in the tensor's shape; on the CPU."""
    import torch

    whole: Tensor | None = None
    for start, part in parts.placed():
        models, *base = part
        rows = torch.cat([models.reshape(len(models), -1), *(one.reshape(1, -1) for one in base)])
        if whole is None:
            whole = torch.empty((len(rows), parts.entries), dtype=rows.dtype, device="cpu")
        whole[:, start : start + rows.shape[1]] = rows
    assert whole is not None
    return [row.view(parts.shape) for row in whole], len(whole) > parts.models


def applied(name: str, kernel: Kernel, text: str) -> Callable[..., Tensor]:
    """Make the function of the operator: the run of entries that is asked for, of what the kernel made."""

    def apply(models: Tensor, base: Tensor | None = None, *, part: Part = WHOLE, **settings: Any) -> Tensor:
        whole = part.measured
        if whole is None:
            given = (models,) if base is None else (models, base)
            whole = kernel(Parts.whole(*given), streams=part.streams, **settings)
        run: Tensor = whole.reshape(-1)[part.start : part.start + models[0].numel()]
        return run.reshape(models.shape[1:]).to(models.device, copy=True)

    apply.__name__ = apply.__qualname__ = name
    apply.__doc__ = text
    return apply


def of_base(parameter: Any, takes_base: bool) -> bool:
    """Tell whether a base has a value of its own of a parameter."""
    return takes_base and parameter.scope.value == "input"
