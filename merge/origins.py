"""Which model each layer of a result comes from: a strip of cells for every stack, its ends first and last."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from .companions import INPUT_EMBEDDINGS
from .names import Layers, Stack, matches, module
from .node import Finding, Node, Source, Step, Survey

EMBEDDINGS, NORM, HEAD, OTHER = "embeddings", "norm", "head", "other"
_EMBEDDINGS = re.compile(r"embed|(^|\.)(wte|wpe|shared)\.", re.IGNORECASE)
_HEAD = re.compile(r"head|embed_out|predictions|output_projection|classifier|qa_outputs|(^|\.)score\.|pooler")
_BEFORE, _AFTER = (EMBEDDINGS,), (OTHER, NORM, HEAD)


@dataclass(frozen=True, slots=True)
class Origin:
    """Tensors of one cell that were made alike: of these models, by this operator.

    Attributes:
        models: the stored checkpoints that they are made from; more than one: a blend.
        operator: what made them.
        tensors: how many there are.
        nbytes: their size.

    """

    models: tuple[str, ...]
    operator: str
    tensors: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Cell:
    """One layer, or what stands before or behind the layers.

    Attributes:
        name: the layer's number; `embeddings`, `norm`, `head` or `other` outside.
        origins: where its tensors come from, what makes most bytes first.

    """

    name: str
    origins: tuple[Origin, ...]

    @property
    def models(self) -> tuple[str, ...]:
        """All models that a tensor of the cell comes from."""
        return tuple(dict.fromkeys(model for origin in self.origins for model in origin.models))

    @property
    def is_blend(self) -> bool:
        """Tell whether a tensor is made of several models; else models only stand side by side."""
        return any(len(origin.models) > 1 for origin in self.origins)

    @property
    def is_layer(self) -> bool:
        """Tell whether it is a layer."""
        return self.name.isdecimal()

    def __str__(self) -> str:
        """The models as people read them: `a`, `a × b` for a blend, `a | b` side by side."""
        return " | ".join(dict.fromkeys(" × ".join(origin.models) for origin in self.origins))


@dataclass(frozen=True, slots=True)
class Strip:
    """A stack of layers with its ends; the prefix is empty where a model shows no layers."""

    stack: str
    cells: tuple[Cell, ...]


def strips(steps: Iterable[Step], found: Mapping[Survey, Any] | None = None) -> tuple[Strip, ...]:
    """Tell, layer by layer, which models the steps take from; with what surveys found, a model of weight 0 is none."""
    made = {step.output.name: step for step in steps}
    layers = Layers(made)
    rows: dict[str, dict[str, list[Step]]] = {stack.prefix: {} for stack in layers.stacks} or {"": {}}
    for name, step in made.items():
        place = layers.place(name)
        stack, cell = (place.stack.prefix, str(place.layer)) if place else _outside(name, layers.stacks)
        rows[stack].setdefault(cell, []).append(step)
    return tuple(
        Strip(stack, tuple(Cell(name, _origins(cells[name], found or {})) for name in sorted(cells, key=_order)))
        for stack, cells in rows.items()
    )


def models_of(rows: Iterable[Strip]) -> tuple[str, ...]:
    """All models of some strips, in the order of their first layers."""
    return tuple(dict.fromkeys(model for strip in rows for cell in strip.cells for model in cell.models))


def outside_part(name: str) -> str:
    """Tell what a tensor outside the layers is.

    >>> outside_part("model.embed_tokens.weight"), outside_part("model.norm.weight"), outside_part("lm_head.weight")
    ('embeddings', 'norm', 'head')
    """
    if matches(INPUT_EMBEDDINGS, name) or (_EMBEDDINGS.search(name) and not _HEAD.search(name)):
        return EMBEDDINGS
    return HEAD if _HEAD.search(name) else NORM if module(name) == "norm" else OTHER


def _outside(name: str, stacks: tuple[Stack, ...]) -> tuple[str, str]:
    """Tell which strip a tensor outside the layers belongs to, and what it is there."""
    what = outside_part(name)
    if not stacks:
        return "", what
    shared = [_shared(name, stack.prefix) for stack in stacks]
    if max(shared):
        return stacks[shared.index(max(shared))].prefix, what
    side, end = ("encoder", 0) if what == EMBEDDINGS else ("decoder", -1)
    named = [stack for stack in stacks if side in stack.prefix]
    return (named or stacks)[end].prefix, what


def _shared(name: str, prefix: str) -> int:
    """Count the leading components that a name has in common with a stack."""
    count = 0
    for one, other in zip(name.split("."), prefix.split("."), strict=False):
        if one != other:
            break
        count += 1
    return count


def _order(name: str) -> tuple[int, int]:
    if name.isdecimal():
        return 0, int(name)
    return (-1, _BEFORE.index(name)) if name in _BEFORE else (1, _AFTER.index(name))


def _origins(steps: list[Step], found: Mapping[Survey, Any]) -> tuple[Origin, ...]:
    groups: dict[tuple[tuple[str, ...], str], list[int]] = {}
    for step in steps:
        models = tuple(dict.fromkeys(_leaves(step, found)))
        operator = "copy" if len(models) == 1 and step.operator.name == "linear" else step.operator.name
        groups.setdefault((models, operator), []).append(step.output.nbytes)
    made = [Origin(models, operator, len(sizes), sum(sizes)) for (models, operator), sizes in groups.items()]
    return tuple(sorted(made, key=lambda origin: -origin.nbytes))


def _leaves(node: Node, found: Mapping[Survey, Any]) -> Iterator[str]:
    """Go through the labels of the stored checkpoints that a tensor takes from; a model of weight 0 gives nothing."""
    if isinstance(node, Source):
        yield node.checkpoint.label
    elif isinstance(node, Step):
        weights = node.settings.get("weight")
        if isinstance(weights, Finding):
            weights = found[weights.survey][weights.key] if weights.survey in found else None
        for i, model in enumerate(node.inputs.models):
            if not isinstance(weights, tuple | list) or weights[i] != 0:
                yield from _leaves(model, found)
        if node.inputs.base is not None:
            yield from _leaves(node.inputs.base, found)
    else:
        for inner in node.inputs:
            yield from _leaves(inner, found)
