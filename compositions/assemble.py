"""A model assembled from tensors of others by their names: the vision tower of one, the text decoder of another."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Annotated, Any

from pydantic import Field

from portmanteau.merge import Checkpoint, Composed, MergeError
from portmanteau.merge.errors import Mistake, some
from portmanteau.merge.names import Stack, matches
from portmanteau.merge.node import Node, Step, copy_of

from .components import component, known
from .composition import composition
from .matching import different_vocabularies
from .restacked_config import Origin, restacked

_WORD = re.compile(r"\w+(\.\w+)*")


@composition(source="mergekit 0.1.5 `modules`")
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

    Raises MergeError where a tensor fits no part, where a part fits none, and where vocabularies differ.
    """
    names = list(dict.fromkeys(name for model in parts.values() for name in model.specs))
    owner, mistakes = _owners(list(parts), names)
    lost = [name for name in names if name not in owner]
    if lost:
        hint = f"there are: {', '.join(known(names))}; the last takes the rest"
        mistakes.append(Mistake("parts", f"no part takes {some(lost)}", hint))
    nodes: dict[str, Node] = {}
    for key, model in parts.items():
        lacking = [name for name in names if owner.get(name) == key and _lacks(model, name, parts.values())]
        if lacking:
            mistakes.append(Mistake("parts", f"{model.label} lacks {some(lacking)}, which others have"))
        for name in [name for name in model.specs if owner.get(name) == key]:
            spec, node = model.specs[name], model.node(name)
            nodes[name] = node if isinstance(node, Step) else copy_of(node, replace(spec, name=name), model.label)
    first = donor or next(iter(parts.values()))
    mistakes += different_vocabularies({"donor": first, **{f"part {key}": one for key, one in parts.items()}}, "donor")
    if mistakes:
        raise MergeError.of(mistakes)
    config, notes = _true_config(first, parts, owner)
    notes = [*(note for model in parts.values() if isinstance(model, Composed) for note in model.notes), *notes]
    companions = replace(first.companions, config=config)
    return Composed("assemble", {n: nodes[n] for n in names if n in nodes}, companions, tuple(dict.fromkeys(notes)))


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


def _lacks(model: Checkpoint, name: str, others: Iterable[Checkpoint]) -> bool:
    """Tell whether a model lacks a tensor. Of a stack of layers that it has too, it may have as many as it likes."""
    if name in model.specs:
        return False
    place = next((place for one in others if (place := one.layers.place(name))), None)
    return place is None or not any(own.startswith(f"{place.stack.prefix}.0.") for own in model.specs)


def _true_config(
    donor: Checkpoint, parts: Mapping[str, Checkpoint], owner: Mapping[str, str]
) -> tuple[Mapping[str, Any] | None, list[str]]:
    """Make the donor's config say how many layers, and of which kinds, the stacks of the parts have."""
    config, notes = donor.companions.config, []
    several = len(donor.layers.stacks) > 1
    for stack, model, own in _foreign(donor, parts, owner):
        origins = [Origin(model.label, model.companions.config, own, i) for i in range(own.count)]
        config, more = restacked(config, stack, several, origins)
        notes += more
    return config, notes


def _foreign(
    donor: Checkpoint, parts: Mapping[str, Checkpoint], owner: Mapping[str, str]
) -> Iterator[tuple[Stack, Checkpoint, Stack]]:
    """Find the donor's stacks whose layers come from a model with another config: the stack, the model, its stack."""
    for stack in donor.layers.stacks:
        names = [name for name in donor.specs if (place := donor.layers.place(name)) and place.stack == stack]
        model = next((parts[owner[name]] for name in names if name in owner), donor)
        own = next((one for one in model.layers.stacks if one.prefix == stack.prefix), stack)
        if model is not donor and model.companions.config != donor.companions.config:
            yield stack, model, own
