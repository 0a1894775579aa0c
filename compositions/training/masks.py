"""Masks over a model's parameters: which entries changed most, and training that moves only those."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from portmanteau.merge import MergeError
from portmanteau.merge.errors import Mistake, nearest
from portmanteau.merge.kernels import largest, select_largest

if TYPE_CHECKING:
    from torch import Tensor, nn

BROKEN, LOWER = "holds NaN or infinity after training", "lower the learning rate, or look for NaN in the data"


def select(
    before: Mapping[str, Tensor], after: Mapping[str, Tensor], *, count: int, taken: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Select the `count` entries that changed most: one ranking of |after − before| over all tensors together.

    Exactly `count` entries. Among equal changes those of the earlier tensor (in the order of `before`) are kept, within
    a tensor those of the smaller row-major index. composable-sft keeps all that equal the boundary, so its masks may
    exceed the count. Changes are computed in fp32 (fp64, if one of the tensors is), of 16-bit tensors too, where
    composable-sft rounds them.

    >>> import torch
    >>> before = {"a": torch.tensor([0.0, 0.0]), "b": torch.tensor([[1.0, 1.0]])}
    >>> after = {"a": torch.tensor([-2.0, 3.0]), "b": torch.tensor([[3.0, 1.5]])}
    >>> select(before, after, count=2)
    {'a': tensor([True, True]), 'b': tensor([[False, False]])}

    Args:
        before: name → tensor [*shape].
        after: the same names and shapes; on any device.
        count: how many entries, 1 or more.
        taken: name → bool [*shape], entries that were selected earlier; `count` further ones are selected.

    Returns:
        name → bool [*shape] on the CPU, the entries taken earlier among them.

    Raises MergeError where a tensor holds NaN or infinity, and where fewer entries changed than asked for.

    """
    changes = _Changes(before, after, taken or {})
    changed = sum(changes.count(name) for name in before)
    entries = sum(tensor.numel() for tensor in before.values())
    if not 1 <= count <= changed:
        found = f"{count:,} entries to select, and {changed:,} of {entries:,} changed"
        hint = f"a count from 1 to {changed:,}, or longer training" if changed else "does the training reach them?"
        raise MergeError("count", found, hint)
    (cut,) = largest(lambda: (changes.of(name)[None] for name in before), [count])
    assert cut is not None
    masks, start = {}, 0
    for name, tensor in before.items():
        masks[name] = select_largest(changes.of(name), cut, start).view(tensor.shape)
        if taken:
            masks[name] |= taken[name]
        start += tensor.numel()
    return masks


class _Changes:
    """The sizes of the changes, made anew at each call: one tensor is in memory at a time."""

    def __init__(self, before: Mapping[str, Tensor], after: Mapping[str, Tensor], taken: Mapping[str, Tensor]) -> None:
        import torch

        self._before, self._after, self._taken = before, after, taken
        dtypes = {tensor.dtype for tensors in (before, after) for tensor in tensors.values()}
        self._dtype = torch.float64 if torch.float64 in dtypes else torch.float32

    def of(self, name: str) -> Tensor:
        """Give |after − before|, flat; zero for entries taken earlier."""
        after = self._after[name].detach().cpu().to(self._dtype)
        change = (after - self._before[name].detach().cpu().to(self._dtype)).abs_()
        if name in self._taken:
            change.masked_fill_(self._taken[name], 0.0)
        return change.reshape(-1)

    def count(self, name: str) -> int:
        """Count the entries that changed."""
        change = self.of(name)
        if not change.isfinite().all():
            raise MergeError(name, BROKEN, LOWER)
        return int(change.count_nonzero())


@contextmanager
def masked(model: nn.Module, masks: Mapping[str, Tensor]) -> Iterator[None]:
    """Let training move only the entries of the masks, while the context lasts.

    Gradient hooks on the parameters set every other entry's gradient to zero in each backward pass: with a stock
    Trainer that is before gradients are accumulated and clipped. Enter it when the model is on its device. An optimizer
    that moves entries without a gradient (weight decay, moments from earlier training) moves them here too.

    Args:
        model: any module; its parameters without a mask train as they would.
        masks: parameter name → bool [*shape], true where it may move.

    Raises MergeError for names that are no parameters, for parameters that do not train and for other shapes.

    """
    parameters: dict[str, Any] = dict(model.named_parameters())
    mistakes = list(_mistakes(parameters, masks))
    if mistakes:
        raise MergeError.of(mistakes)
    hooks = [
        parameters[name].register_hook(_cleared(~mask.to(parameters[name].device))) for name, mask in masks.items()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _cleared(outside: Tensor) -> Callable[[Tensor], Tensor]:
    """Give the hook for one parameter. Filled, not multiplied: −g·0 is −0, and would turn a weight of −0 into +0."""
    return lambda gradient: gradient.masked_fill(outside, 0.0)


def _mistakes(parameters: Mapping[str, nn.Parameter], masks: Mapping[str, Tensor]) -> Iterator[Mistake]:
    for name, mask in masks.items():
        parameter = parameters.get(name)
        if parameter is None:
            yield Mistake(name, "is no parameter of the model", nearest(name, parameters))
        elif parameter.shape != mask.shape:
            yield Mistake(name, f"has the shape {list(parameter.shape)}, its mask {list(mask.shape)}")
        elif not parameter.requires_grad:
            yield Mistake(name, "is frozen, so no entry of it can train", "leave it out of the masks")
