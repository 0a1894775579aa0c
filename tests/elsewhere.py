"""A device that is not the processor, for machines without one: what is wrong on a GPU is wrong on it too.

Its tensors say that they are elsewhere (torch's device `meta`, whose tensors have no entries of their own), and their
entries lie in a tensor of the processor behind them. Where a GPU would fail or give other bits, so does this device:

- an operation on tensors of both places is refused, but for numbers and copies from one place to the other;
- so is a tensor that is made without saying where, and a look at the entries as numpy or bytes;
- division by a plain number is multiplication by its rounded reciprocal, as in torch's CUDA kernels;
- an operation whose bits IEEE 754 does not fix (exponentials, sums, matrix products, adding to the same entry twice)
  is noted down.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from portmanteau.merge import device

PLACE = "meta"
_MAKERS = frozenset(_device_constructors())
_COPIES = ("copy_", "_to_copy")
_MOVED = (  # entries are taken, put, compared and asked about, not computed
    "_to_copy _unsafe_view alias amax argmax clamp clamp_ clone copy_ detach empty_like eq expand gather ge gt index "
    "index_put_ lt masked_fill masked_fill_ ne new_empty new_full new_zeros permute scatter_ select slice sort unbind "
    "unsqueeze sign_ le view zeros_like"
)
_ROUNDED = "abs abs_ add add_ div div_ mul mul_ reciprocal round_ sub sub_"  # once, as IEEE 754 says
_SUMMED = "addcmul_"  # of fp32 factors in fp64 (merge/adapters/low_rank.py): the products are exact, so fused or not
_EXACT = frozenset(f"{_MOVED} {_ROUNDED} {_SUMMED}".split())


class Elsewhere(Tensor):
    """A tensor of the pretended device."""

    entries: Tensor

    @staticmethod
    def __new__(cls, entries: Tensor) -> Elsewhere:
        layout = {"strides": entries.stride(), "storage_offset": entries.storage_offset()}
        found = Tensor._make_wrapper_subclass(cls, entries.size(), **layout, dtype=entries.dtype, device=PLACE)
        found.entries = entries
        return found

    def tolist(self) -> Any:
        return self.entries.tolist()

    def __repr__(self, **_: Any) -> str:
        return f"Elsewhere({self.entries})"

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{function} outside of the mode")


class _Operations(TorchDispatchMode):
    """Carries out every operation on the entries behind."""

    def __init__(self, inexact: set[str]) -> None:
        super().__init__()
        self._inexact = inexact

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = function._schema.name.removeprefix("aten::")
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        elsewhere = [tensor for tensor in tensors if isinstance(tensor, Elsewhere)]
        if elsewhere and name not in _COPIES and any(t.dim() for t in tensors if not isinstance(t, Elsewhere)):
            raise AssertionError(f"{name}: of tensors on two devices")
        there = isinstance(args[0], Elsewhere) if name in _COPIES else bool(elsewhere)
        if kwargs.get("device") is not None:
            there, kwargs["device"] = torch.device(kwargs["device"]).type == PLACE, torch.device("cpu")
        if there and not _is_exact(name, args):
            self._inexact.add(name)
        plain = tree_map(lambda leaf: leaf.entries if isinstance(leaf, Elsewhere) else leaf, (args, kwargs))
        result = _carried_out(function, name, there, *plain)
        returned = function._schema.returns
        if returned and returned[0].alias_info is not None and returned[0].alias_info.is_write:
            return kwargs.get("out", args[0] if args else None)
        return tree_map(lambda leaf: Elsewhere(leaf) if isinstance(leaf, Tensor) else leaf, result) if there else result


def _is_exact(name: str, args: Any) -> bool:
    """Tell whether every device gives the same bits. Whatever is done to integers, and squares, has the same."""
    if not args or not isinstance(args[0], Tensor) or not args[0].dtype.is_floating_point:
        return True
    return name in _EXACT or (name in ("pow", "pow_") and bool(args[1] == 2))


def _carried_out(function: Any, name: str, there: bool, args: Any, kwargs: Any) -> Any:
    if there and name in ("div", "div_") and not isinstance(args[1], Tensor):
        reciprocal = torch.ones((), dtype=args[0].dtype) / args[1]
        return args[0].mul_(reciprocal) if name == "div_" else args[0].mul(reciprocal)
    return function(*args, **kwargs)


class _Factories(TorchFunctionMode):
    """Refuses to make a tensor without saying where."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in _MAKERS and (kwargs or {}).get("device") is None:
            raise AssertionError(f"torch.{function.__name__} without a device")
        if function is torch.tensor:  # builds the tensor behind the back of all modes
            return function(*args, **{**kwargs, "device": "cpu"}).to(kwargs["device"])
        return function(*args, **(kwargs or {}))


@contextmanager
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[str]]:
    """Let there be a device `meta` for this thread and the pools that it makes; gives the inexact operations met."""
    inexact: set[str] = set()

    def enter() -> None:
        _Factories().__enter__()
        _Operations(inexact).__enter__()

    class Pool(ThreadPoolExecutor):
        def __init__(self, threads: int, name: str = "") -> None:
            super().__init__(threads, name, initializer=enter)

    with monkeypatch.context() as patched, ExitStack() as stack:
        for module in ("execute", "operator", "surveys"):
            patched.setattr(import_module(f"portmanteau.merge.{module}"), "ThreadPoolExecutor", Pool)
        patched.setattr(device, "offered", lambda: ("cpu", f"{PLACE}:0"))
        stack.enter_context(_Factories())
        stack.enter_context(_Operations(inexact))
        yield inexact


def sent(tensor: Tensor) -> Tensor:
    """Give a copy elsewhere."""
    return Elsewhere(tensor.clone())
