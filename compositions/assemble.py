"""A model assembled from tensors of others by their names: the vision tower of one, the text decoder of another."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Annotated, Any

from pydantic import Field

from portmanteau.merge import Checkpoint, Composed, MergeError
from portmanteau.merge.errors import Mistake, some
from portmanteau.merge.names import Layers, align, matches
from portmanteau.merge.node import Node, Step, copy_of

from .components import component, known
from .composition import composition
from .matching import different_vocabularies
from .restacked_config import Origin, is_true_of, restacked

_WORD = re.compile(r"\w+(\.\w+)*")


@composition(
    source="mergekit 0.1.5 `modules`",
    example='assemble: {parts: {"*mlp*": ./math, "*": ./base}}',
)
def assemble(
    *,
    parts: Annotated[
        Mapping[str, Checkpoint],
        Field(
            description="components (`text_decoder`, `vision_tower`, `encoder`) or patterns of tensor names, `|` "
            "between alternatives, and the model each is taken from"
        ),
    ],
    donor: Annotated[
        Checkpoint | None, Field(description="the model whose config and files go with the result; default: the first")
    ] = None,
) -> Composed:
    """Take each tensor from the model that the first fitting component or pattern names.

    The result has the tensors that some model gives under its part: of the parts `{vision_tower: a, "*": b}`, those of
    a's vision tower and all others of b. Steps may stand for models, so that each part is merged in its own way.
    Components are found by the names: `text_decoder`, `vision_tower`, `multi_modal_projector` (what joins the two),
    `encoder`, `decoder`, `shared` (what belongs to neither), `default` (the rest), or a word of the names.
    The config is the donor's, made true to the layers that parts bring along; otherwise they must not change what it
    says of them.

    >>> import torch
    >>> from portmanteau.merge import InMemory
    >>> named = {"m": torch.tensor([2]), "b": torch.tensor([1])}
    >>> math, base = (InMemory(label, {"mlp": value, "norm": value}) for label, value in named.items())
    >>> made = assemble(parts={"mlp*": math, "*": base})
    >>> made["mlp"], made["norm"]
    (tensor([2]), tensor([1]))

    Raises MergeError where a tensor fits no part, where a part fits none, and where vocabularies differ.
    """
    first = donor or next(iter(parts.values()))
    taken, notes = _named_as(first, parts)
    names = list(dict.fromkeys([*first.specs, *(name for nodes in taken.values() for name in nodes)]))
    layers = Layers(names)
    owner, mistakes = _owners(list(parts), names)
    lost = [name for name in names if name not in owner]
    if lost:
        hint = f"there are: {', '.join(known(names))}; the last takes the rest"
        mistakes.append(Mistake("parts", f"no part takes {some(lost)}", hint))
    nodes: dict[str, Node] = {}
    for key, found in taken.items():
        lacking = [name for name in names if owner.get(name) == key and _lacks(found, name, layers)]
        if lacking:
            mistakes.append(Mistake("parts", f"{parts[key].label} lacks {some(lacking)}, which others have"))
        nodes |= {name: node for name, node in found.items() if owner.get(name) == key}
    mistakes += different_vocabularies({"donor": first, **{f"part {key}": one for key, one in parts.items()}}, "donor")
    if mistakes:
        raise MergeError.of(mistakes)
    config, more = _true_config(first, parts, owner)
    notes = [*(note for model in parts.values() for note in model.notes), *notes, *more]
    companions = replace(first.companions, config=config)
    return Composed("assemble", {n: nodes[n] for n in names if n in nodes}, companions, tuple(dict.fromkeys(notes)))


def _named_as(donor: Checkpoint, parts: Mapping[str, Checkpoint]) -> tuple[dict[str, dict[str, Step]], list[str]]:
    """Give the tensors of each part under the donor's names, and notes on what was renamed.

    A language model that becomes the text decoder of a vision-language model calls its layers `model.layers`.
    """
    taken: dict[str, dict[str, Step]] = {}
    notes = []
    for key, model in parts.items():
        found = align(model.specs, donor.specs)
        if found is not None:
            notes.append(found.note(model.label, donor.label))
        taken[key] = {}
        for own, spec in model.specs.items():
            name = found.added + own.removeprefix(found.removed) if found is not None else own
            node = model.node(own)
            made = node if isinstance(node, Step) else copy_of(node, spec, model.label)
            taken[key][name] = replace(made, output=replace(made.output, name=name))
    return taken, notes


def _owners(parts: list[str], names: list[str]) -> tuple[dict[str, str], list[Mistake]]:
    """Find the first part that takes each tensor, and the parts that take none."""
    owner: dict[str, str] = {}
    mistakes = []
    for key in parts:
        is_word = _WORD.fullmatch(key) and key not in names
        meant = component(key, names) if is_word else [name for name in names if matches(key, name)]
        free = [name for name in meant if name not in owner]
        if not free:
            what = f"no tensor belongs to {key!r}" if not meant else f"parts before it take all that belongs to {key!r}"
            hint = f"there are: {', '.join(known(names))}" if is_word and not meant else ""
            mistakes.append(Mistake("parts", what, hint))
        owner |= dict.fromkeys(free, key)
    return owner, mistakes


def _lacks(own: Collection[str], name: str, layers: Layers) -> bool:
    """Tell whether a part lacks a tensor. Of a stack of layers that it has too, it may have as many as it likes."""
    if name in own:
        return False
    place = layers.place(name)
    return place is None or not any(other.startswith(f"{place.stack.prefix}.0.") for other in own)


def _true_config(
    donor: Checkpoint, parts: Mapping[str, Checkpoint], owner: Mapping[str, str]
) -> tuple[Mapping[str, Any] | None, list[str]]:
    """Make the donor's config say how many layers, and of which kinds, the stacks of the parts have."""
    config, notes = donor.companions.config, []
    several = len(donor.layers.stacks) > 1
    for stack in donor.layers.stacks:
        name = next(name for name in donor.specs if (place := donor.layers.place(name)) and place.stack == stack)
        model = parts[owner[name]]
        own = next((one for one in model.layers.stacks if _is_same(one.prefix, stack.prefix)), stack)
        origins = [Origin(model.label, model.companions.config, own, i) for i in range(own.count)]
        if not is_true_of(config, stack, origins[0]):
            config, more = restacked(config, stack, several, origins)
            notes += more
    return config, notes


def _is_same(one: str, other: str) -> bool:
    """Tell whether two stacks are called the same, but for a prefix of either model."""
    return f".{one}".endswith(f".{other}") or f".{other}".endswith(f".{one}")
