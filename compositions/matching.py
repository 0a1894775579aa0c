"""Which tensors of several checkpoints meet: names aligned, shapes compared, everything that does not fit said."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from pydantic import Field

from portmanteau.merge import Checkpoint, MergeError, Step, TensorSpec
from portmanteau.merge.companions import INPUT_EMBEDDINGS, vocabulary
from portmanteau.merge.dtypes import is_float, promote
from portmanteau.merge.errors import Mistake, some
from portmanteau.merge.names import align, matches
from portmanteau.merge.node import Node, copy_of

HEADS = "*lm_head.weight|*embed_out.weight|*predictions.decoder.weight|*output_projection.weight"
TASK_HEADS = "*classifier*|qa_outputs.*|score.*"  # made anew for a task, so initialised by each run's seed
_KEEP = "unmatched: keep takes such tensors from the first model that has them, unmatched: drop leaves them out"
_ONE_VOCABULARY = "output: {tokenizer: NAME}, or {tokenizer: {source: union}}, brings them to one vocabulary"

Unmatched = Annotated[
    Literal["error", "keep", "drop"],
    Field(description="tensors that not every model has: refuse, keep from the first that has it, or drop"),
]


@dataclass(frozen=True)
class Met:
    """One output tensor and the nodes that meet in it, by the labels of their models."""

    spec: TensorSpec  # as all of them promote to
    nodes: Mapping[str, Node]
    complete: bool  # every model has it

    def kept(self) -> Step:
        """Take it from the first model that has it."""
        label, node = next(iter(self.nodes.items()))
        return copy_of(node, self.spec, label)


@dataclass(frozen=True)
class Matching:
    """All output tensors, in the order of the reference, and what a user should know.

    Attributes:
        tensors: by their names in the result.
        told: notes of the models, and on what was renamed.
        left: a note on tensors that not every model has.

    """

    tensors: Mapping[str, Met]
    told: tuple[str, ...]
    left: tuple[str, ...]

    @property
    def notes(self) -> tuple[str, ...]:
        """All of them."""
        return (*self.told, *self.left)


def match(models: Mapping[str, Checkpoint], reference: str, unmatched: str = "error") -> Matching:
    """Bring the tensors of several checkpoints together under the names of one of them.

    Raises MergeError, with every mistake found: names that not all have, shapes or vocabularies that differ.
    """
    names_of, renamings = _aligned(models, reference)
    named = {
        label: {names_of[label][name]: model.node(name) for name in model.specs} for label, model in models.items()
    }
    every = list(dict.fromkeys(name for label in (reference, *models) for name in named[label]))
    partial = {name: [label for label in models if name not in named[label]] for name in every}
    partial = {name: lacking for name, lacking in partial.items() if lacking}
    mistakes = _nothing_shared(models, named, reference) or _different_depths(models, names_of)
    if unmatched == "error" and not mistakes:
        mistakes += _missing(models, partial)
    mistakes += _different_shapes(named, every)
    mistakes += different_vocabularies(models, reference)
    if mistakes:
        raise MergeError.of(mistakes)
    verb = "kept from the first model that has them" if unmatched == "keep" else "left out"
    left = [f"{len(partial)} tensors that not every model has were {verb}: {some(partial)}"] if partial else []
    names = [name for name in every if name not in partial or unmatched == "keep"]
    inherited = (note for model in models.values() for note in model.notes)
    told = tuple(dict.fromkeys((*inherited, *renamings)))
    return Matching({name: _met(name, named, complete=name not in partial) for name in names}, told, tuple(left))


def _aligned(models: Mapping[str, Checkpoint], reference: str) -> tuple[dict[str, dict[str, str]], list[str]]:
    """Give, for every model, the reference's name of each of its tensors, and notes on what was renamed."""
    names_of: dict[str, dict[str, str]] = {}
    notes = []
    wanted = models[reference].specs
    for label, model in models.items():
        alignment = align(model.specs, wanted) if model.specs.keys() != wanted.keys() else None
        renamed = alignment.renamed if alignment else {}
        names_of[label] = {name: renamed.get(name, name) for name in model.specs}
        if alignment:
            notes.append(alignment.note(label, reference))
    return names_of, notes


def _met(name: str, named: Mapping[str, Mapping[str, Node]], *, complete: bool) -> Met:
    nodes = {label: found[name] for label, found in named.items() if name in found}
    first = next(iter(nodes.values())).output
    dtypes = [node.output.dtype for node in nodes.values()]
    dtype = promote(dtypes) if all(is_float(kind) for kind in dtypes) else first.dtype
    return Met(replace(first, name=name, dtype=dtype), nodes, complete)


def _nothing_shared(
    models: Mapping[str, Checkpoint], named: Mapping[str, Mapping[str, Node]], reference: str
) -> list[Mistake]:
    """Find models of another architecture: no tensor is called as one of the reference's is."""
    own = named[reference].keys()
    hint = "models can be merged tensor by tensor where they were trained from one base"
    return [
        Mistake(
            "", f"{label} has no tensor in common with {reference}: {_kind(model)} and {_kind(models[reference])}", hint
        )
        for label, model in models.items()
        if own and model.specs and own.isdisjoint(named[label])
    ]


def _kind(model: Checkpoint) -> str:
    """Name a model's architecture: as its config does, else by its first tensor."""
    first, *_ = model.companions.architectures or (f"tensors such as {next(iter(model.specs))}",)
    return first


def _different_depths(models: Mapping[str, Checkpoint], names_of: Mapping[str, Mapping[str, str]]) -> list[Mistake]:
    """Compare the layer counts of stacks that several models have. Layers are never kept or dropped as leftovers."""
    counts = {label: _depths(model, names_of[label]) for label, model in models.items()}
    mistakes = []
    for prefix in dict.fromkeys(prefix for found in counts.values() for prefix in found):
        depths = {label: found[prefix] for label, found in counts.items() if prefix in found}
        if len(set(depths.values())) > 1:
            shown = "; ".join(f"{label} has {count} in {prefix}" for label, count in depths.items())
            hint = "only models of one shape can be merged tensor by tensor"
            mistakes.append(Mistake("", f"layer counts differ: {shown}", hint))
    return mistakes


def _depths(model: Checkpoint, names: Mapping[str, str]) -> dict[str, int]:
    """Count the layers of a model's stacks, by the prefix that the reference has for their first layer."""
    places = {name: place for name in names if (place := model.layers.place(name)) and place.layer == 0}
    return {names[name].removesuffix(f".0.{place.inner}"): place.stack.count for name, place in places.items()}


def _missing(models: Mapping[str, Checkpoint], partial: Mapping[str, list[str]]) -> list[Mistake]:
    """Say for each model what it lacks, with the likely cause."""
    mistakes = []
    for label in models:
        names = [name for name, lacking in partial.items() if label in lacking]
        if names:
            tied = [name for name in names if matches(HEADS, name)] if len(names) < 3 else []
            hint = f"its {tied[0]} is tied to the embedding, others have one of their own; {_KEEP}" if tied else _KEEP
            mistakes.append(Mistake("", f"{label} lacks {len(names)} tensors that others have: {some(names)}", hint))
    return mistakes


def _different_shapes(named: Mapping[str, Mapping[str, Node]], names: list[str]) -> list[Mistake]:
    mistakes = []
    for name in names:
        found = {label: nodes[name].output for label, nodes in named.items() if name in nodes}
        if len({spec.shape for spec in found.values()}) > 1:
            shown = ", ".join(f"{label} {list(spec.shape)}" for label, spec in found.items())
            in_rows = matches(f"{INPUT_EMBEDDINGS}|{HEADS}", name) and len({s.shape[1:] for s in found.values()}) == 1
            mistakes.append(Mistake("", f"tensor {name}: shapes differ: {shown}", _ONE_VOCABULARY if in_rows else ""))
        elif len({is_float(spec.dtype) for spec in found.values()}) > 1:
            shown = ", ".join(f"{label} {spec.dtype}" for label, spec in found.items())
            mistakes.append(Mistake("", f"tensor {name}: dtypes cannot be brought together: {shown}"))
    return mistakes


def different_vocabularies(models: Mapping[str, Checkpoint], reference: str) -> list[Mistake]:
    """Compare which token each id stands for; the same files need no look inside."""
    first = models[reference].companions
    own: dict[str, int] | None = None
    mistakes = []
    for label, model in models.items():
        if label == reference or _same_files(first.tokenizer_files, model.companions.tokenizer_files):
            continue
        own = vocabulary(first) if own is None else own
        other = vocabulary(model.companions)
        if own and other and (moved := [word for word, i in other.items() if own.get(word, i) != i]):
            what = f"{label} and {reference} give other ids to {len(moved)} tokens: {some(map(repr, moved))}"
            mistakes.append(Mistake("", what, f"their rows mean different tokens: {_ONE_VOCABULARY}"))
    return mistakes


def _same_files(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    names = ("tokenizer.json", "vocab.txt")
    pairs = [(one.get(name), other.get(name)) for name in names]
    return all(a is None or b is None or a == b or a.read_bytes() == b.read_bytes() for a, b in pairs)


def is_tied(base: Checkpoint) -> bool:
    """Tell whether the head of a language model is its embedding."""
    return base.companions.ties_head and not any(matches(HEADS, name) for name in base.specs)
