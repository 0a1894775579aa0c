"""A model assembled from tensors of others by their names: the vision tower of one, the text decoder of another."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Annotated

from pydantic import Field

from portmanteau.merge import Checkpoint, Composed, MergeError
from portmanteau.merge.errors import Mistake, some
from portmanteau.merge.names import matches
from portmanteau.merge.node import Step, copy_of

from .composition import composition
from .matching import different_vocabularies


@composition(
    source="mergekit 0.1.5 `modules`",
    example='assemble: {parts: {"*mlp*": ./math, "*": ./base}}',
)
def assemble(
    *,
    parts: Annotated[
        Mapping[str, Checkpoint],
        Field(description="patterns of tensor names, `|` between alternatives, and the model each is taken from"),
    ],
    donor: Annotated[
        Checkpoint | None, Field(description="the model whose config and files go with the result; default: the first")
    ] = None,
) -> Composed:
    """Take each tensor from the model that the first fitting pattern names.

    The result has the tensors that some model gives under its pattern: of the parts `{"vision.*": a, "*": b}`, those of
    a in `vision` and all others of b. Steps may stand for models, so that each part is merged in its own way. The
    config is the donor's, so other parts must not change what it says of them.

    >>> import torch
    >>> from portmanteau.merge import InMemory
    >>> named = {"m": torch.tensor([2]), "b": torch.tensor([1])}
    >>> math, base = (InMemory(label, {"mlp": value, "norm": value}) for label, value in named.items())
    >>> made = assemble(parts={"mlp*": math, "*": base})
    >>> made["mlp"], made["norm"]
    (tensor([2]), tensor([1]))

    Raises MergeError where a tensor fits no pattern, where a pattern fits none, and where vocabularies differ.
    """
    mistakes, nodes = [], {}
    names = list(dict.fromkeys(name for model in parts.values() for name in model.specs))
    owner = {name: next((pattern for pattern in parts if matches(pattern, name)), None) for name in names}
    lost = [name for name, pattern in owner.items() if pattern is None]
    if lost:
        mistakes.append(Mistake("parts", f"no pattern fits {some(lost)}", 'a last pattern "*" takes the rest'))
    for pattern, model in parts.items():
        lacking = [name for name in names if owner[name] == pattern and _lacks(model, name, parts.values())]
        if lacking:
            mistakes.append(Mistake("parts", f"{model.label} lacks {some(lacking)}, which others have"))
        own = [name for name in model.specs if owner[name] == pattern]
        if not own:
            mistakes.append(Mistake("parts", f"{pattern!r} fits no tensor of {model.label}"))
        for name in own:
            spec, node = model.specs[name], model.node(name)
            nodes[name] = node if isinstance(node, Step) else copy_of(node, replace(spec, name=name), model.label)
    first = donor or next(iter(parts.values()))
    mistakes += different_vocabularies({"donor": first, **{f"part {key}": one for key, one in parts.items()}}, "donor")
    if mistakes:
        raise MergeError.of(mistakes)
    notes = tuple(
        dict.fromkeys(note for model in parts.values() if isinstance(model, Composed) for note in model.notes)
    )
    return Composed("assemble", {name: nodes[name] for name in names if name in nodes}, first.companions, notes)


def _lacks(model: Checkpoint, name: str, others: Iterable[Checkpoint]) -> bool:
    """Tell whether a model lacks a tensor. Of a stack of layers that it has too, it may have as many as it likes."""
    if name in model.specs:
        return False
    place = next((place for one in others if (place := one.layers.place(name))), None)
    return place is None or not any(own.startswith(f"{place.stack.prefix}.0.") for own in model.specs)
