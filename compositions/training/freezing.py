"""Which parameters of a model are trained: layers by the numbers of a layer swap, and heads shared by several runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from portmanteau.merge import Checkpoint, MergeError
from portmanteau.merge.companions import Companions
from portmanteau.merge.errors import Mistake, some
from portmanteau.merge.names import Layers, matches

from ..matching import TASK_HEADS
from ..zones import Asked, Count, Ends, Module, Zone, of_module, resolve

if TYPE_CHECKING:
    from torch.nn import Module as Network

Part = Literal["outer", "middle", "both", "neither"]


@dataclass(frozen=True)
class Partition:
    """Which layers of a model are the outer ones (a language expert's) and which the middle ones (a task expert's).

    The numbers are those of `layer_swap`; `bottom` and `top` layers are outer, the others middle.

    Attributes:
        bottom: outer layers at the bottom.
        top: outer layers at the top.
        transition: layers next to these that belong to both parts.
        outside: the part of what is outside the layers: embeddings, final norm, heads.
        modules: other numbers for attention, mlp or norm parameters.
        stacks: numbers for each stack, where there are several.

    """

    bottom: Count | None = None
    top: Count | None = None
    transition: Count | Ends = 0
    outside: Part = "outer"
    modules: Mapping[Module, Zone] = field(default_factory=dict)
    stacks: Mapping[str, Zone | Literal["outside"]] = field(default_factory=dict)

    def of(self, model: Network) -> dict[str, Part]:
        """Give the part of every parameter. Raises MergeError where the layers cannot be found, or are too few."""
        shown = _Shown(model)
        zones = resolve(shown, Asked(Zone(self.bottom, self.top, self.transition), self.modules, self.stacks))
        parts: dict[str, Part] = {}
        for name, _ in model.named_parameters():
            place = shown.layers.place(name)
            if place is None or place.stack not in zones:
                parts[name] = self.outside
            else:
                side = of_module(zones[place.stack], place)[1].side(place.layer, place.stack.count)
                parts[name] = "outer" if side == "language" else "middle" if side == "task" else "both"
        return parts


class _Shown:
    """A model that is being trained, as the sharing out of layers sees it."""

    def __init__(self, model: Network) -> None:
        config: Any = getattr(model, "config", None)
        self.layers = Layers(name for name, _ in model.named_parameters())
        self.companions = Companions(config.to_dict() if hasattr(config, "to_dict") else None)


def freeze_layers(model: Network, partition: Partition, *, train: Literal["outer", "middle"]) -> tuple[str, ...]:
    """Hold still all parameters but those of one part: partial-parameter fine-tuning (arXiv 2505.18356).

    `freeze_layers(model, Partition(bottom=5, top=2), train="outer")` before the optimizer is made trains what
    `layer_swap: {bottom: 5, top: 2, transition: 0}` takes from the language expert, `train="middle"` what it takes from
    the task expert. Gives the names of the parameters that are now still and were not.

    >>> from torch.nn import Linear, ModuleDict, ModuleList
    >>> model = ModuleDict({"layers": ModuleList(ModuleDict({"mlp": Linear(1, 1, bias=False)}) for _ in range(4))})
    >>> freeze_layers(model, Partition(bottom=1, top=1), train="outer")
    ('layers.1.mlp.weight', 'layers.2.mlp.weight')

    Raises MergeError where the layers cannot be found, are too few, or nothing would be trained.
    """
    parts = partition.of(model)
    if not any(p.requires_grad and parts[name] in (train, "both") for name, p in model.named_parameters()):
        raise MergeError("", f"no parameter of the {train} layers would be trained", "the other part has all layers")
    frozen = [name for name, p in model.named_parameters() if p.requires_grad and parts[name] not in (train, "both")]
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    return tuple(frozen)


def freeze_head(model: Network, checkpoint: Checkpoint, *, head: str = TASK_HEADS) -> tuple[str, ...]:
    """Load the head of a complete first run, and hold it still: what several runs share that are to be averaged.

    Run averaging of arXiv 2305.16834: every run begins at the pretrained body and trains it alone. The head's tensors
    are those whose names fit the pattern, as `average` requires them to be equal. Gives their names.

    >>> import torch
    >>> from portmanteau.merge import InMemory
    >>> parts = ("body", "classifier")
    >>> first_run = InMemory("first run", {f"{name}.weight": torch.tensor([[2.0]]) for name in parts})
    >>> model = torch.nn.ModuleDict({name: torch.nn.Linear(1, 1, bias=False) for name in parts})
    >>> freeze_head(model, first_run)
    ('classifier.weight',)
    >>> model["classifier"].weight.item(), [model[name].weight.requires_grad for name in parts]
    (2.0, [True, False])

    Raises MergeError, the model untouched, for a head whose names or shapes are not the model's.
    """
    import torch

    own = {name: p for name, p in model.named_parameters() if matches(head, name)}
    stored = {name: spec for name, spec in checkpoint.specs.items() if matches(head, name)}
    mistakes = list(_not_of_one_head(head, checkpoint.label, own, stored))
    mistakes += [
        Mistake(checkpoint.label, f"{name} is {list(stored[name].shape)}, the model's {list(own[name].shape)}")
        for name in own
        if name in stored and stored[name].shape != tuple(own[name].shape)
    ]
    if mistakes:
        raise MergeError.of(mistakes)
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(checkpoint.read(name)).requires_grad_(False)
    return tuple(own)


def _not_of_one_head(
    pattern: str, label: str, own: Mapping[str, object], stored: Mapping[str, object]
) -> Iterator[Mistake]:
    """Compare the names of the model's head with those of the checkpoint's."""
    if not own and not stored:
        yield Mistake(label, f"neither it nor the model has a head: no name fits {pattern}", "name the head's tensors")
    for whose, one, other in (("it", own, stored), ("the model", stored, own)):
        if missing := [name for name in one if name not in other]:
            yield Mistake(label, f"{whose} lacks {some(missing)}", "both must have one head, of one architecture")
