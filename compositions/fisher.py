"""Fisher merging: the mean of models, every entry weighed by the Fisher information that each has of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from portmanteau.merge import Checkpoint, Composed, MergeError, Step
from portmanteau.merge.dtypes import is_float
from portmanteau.merge.errors import Mistake, some
from portmanteau.merge.names import align
from portmanteau.merge.node import Inputs, Node
from portmanteau.merge.registry import find

from .composition import composition
from .matching import Met, Unmatched, match

Weight = Annotated[float, Field(gt=0, allow_inf_nan=False)]


@composition(
    source="Matena and Raffel 2022 (arXiv 2111.09832), section 3.2",
    example="fisher: {models: [./math, ./swahili], fishers: [./math-fisher, ./swahili-fisher]}",
)
def fisher(
    *,
    models: Annotated[Sequence[Checkpoint], Field(description="the models that are merged")],
    fishers: Annotated[
        Sequence[Checkpoint],
        Field(
            description="for each model, in the same order, its diagonal Fisher: tensors of the same names and shapes"
        ),
    ],
    weights: Annotated[Sequence[Weight] | None, Field(description="factor of each model's Fisher; default: 1")] = None,
    floor: Annotated[float, Field(gt=0, description="no Fisher counts less, so that no entry has none")] = 1e-6,
    unmatched: Unmatched = "error",
) -> Composed:
    """Take the mean of models, weighed in each entry by their diagonal Fishers.

    Formula: Σ wᵢ Fᵢ xᵢ / Σ wᵢ Fᵢ with Fᵢ = max(Fisherᵢ, floor). The Fishers are used as they are stored: where they
    were computed over different numbers of examples, `weights` brings them together. Tensors that are no floats must be
    equal in all models. A float tensor of which no model has a Fisher is averaged with the weights alone; one of which
    only some have is refused.

    >>> import torch
    >>> from portmanteau.merge import InMemory
    >>> math, swahili, of_math, of_swahili = (
    ...     InMemory(name, {"weight": torch.tensor([value])})
    ...     for name, value in (("m", 2.0), ("s", 4.0), ("fm", 3.0), ("fs", 1.0))
    ... )
    >>> fisher(models=[math, swahili], fishers=[of_math, of_swahili])["weight"]  # (3 · 2 + 1 · 4) / 4
    tensor([2.5000])

    Raises MergeError, with every mistake found, for other counts, names and shapes.
    """
    if mistakes := list(_counts(len(models), len(fishers), weights)):
        raise MergeError.of(mistakes)
    labels = tuple(f"{model.label} ({i + 1})" for i, model in enumerate(models))
    matching = match(dict(zip(labels, models, strict=True)), labels[0], unmatched)
    found = [_named(one, models[0]) for one in fishers]
    if mistakes := [mistake for met in matching.tensors.values() for mistake in _fit(met, found, labels)]:
        raise MergeError.of(mistakes)
    job = _Job(labels, tuple(weights or (1.0,) * len(models)), floor)
    nodes = {name: job.step(met, [nodes.get(name) for nodes in found]) for name, met in matching.tensors.items()}
    plain = [name for name, step in nodes.items() if step.operator.name == "linear"]
    notes = [f"{len(plain)} tensors have no Fisher and are averaged with the weights: {some(plain)}"] if plain else []
    return Composed("fisher", nodes, models[0].companions, (*matching.notes, *notes))


def _counts(models: int, fishers: int, weights: Sequence[float] | None) -> list[Mistake]:
    mistakes = []
    if models < 2:
        mistakes.append(Mistake("models", f"{models} models are given", "there is nothing to merge"))
    if fishers != models:
        mistakes.append(Mistake("fishers", f"{fishers} Fishers for {models} models", "one for each, in their order"))
    if weights is not None and len(weights) != models:
        mistakes.append(Mistake("weights", f"{len(weights)} weights for {models} models", "one for each"))
    return mistakes


def _named(one: Checkpoint, reference: Checkpoint) -> Mapping[str, Node]:
    """Give the tensors of a Fisher under the names of the reference model."""
    alignment = align(one.specs, reference.specs) if one.specs.keys() - reference.specs.keys() else None
    renamed = alignment.renamed if alignment else {}
    return {renamed.get(name, name): one.node(name) for name in one.specs}


def _fit(met: Met, found: Sequence[Mapping[str, Node]], labels: Sequence[str]) -> list[Mistake]:
    """Compare the Fishers of one tensor with it."""
    name, shape = met.spec.name, met.spec.shape
    present = [name in nodes for nodes in found]
    if not met.complete or not is_float(met.spec.dtype) or not any(present):
        return []
    lacking = [label for label, there in zip(labels, present, strict=True) if not there]
    if lacking:
        what = f"tensor {name}: others have a Fisher of it, and that of {some(lacking)} has not"
        return [Mistake("fishers", what, "compute it for all models, or leave the tensor out of all Fishers")]
    return [
        Mistake("fishers", f"tensor {name}: {list(shape)}, and the Fisher of {label} is {list(node.output.shape)}")
        for label, node in zip(labels, (nodes[name] for nodes in found), strict=True)
        if node.output.shape != shape
    ]


@dataclass(frozen=True)
class _Job:
    """What is asked for, apart from any one tensor."""

    labels: tuple[str, ...]
    weights: tuple[float, ...]
    floor: float

    def step(self, met: Met, fishers: Sequence[Node | None]) -> Step:
        """Make the step for one output tensor."""
        models = tuple(met.nodes.values())
        if not met.complete:
            return met.kept()
        if not is_float(met.spec.dtype):
            return Step(met.spec, find("equal"), {}, Inputs(models), self.labels)
        given = tuple(node for node in fishers if node is not None)
        if not given:
            return Step(met.spec, find("linear"), {"weight": self.weights}, Inputs(models), self.labels)
        settings = {"weight": self.weights, "floor": self.floor}
        return Step(met.spec, find("fisher_mean"), settings, Inputs(models, importances=given), self.labels)
