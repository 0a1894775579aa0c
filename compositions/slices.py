"""A stack of layers put together from layers of several models: what the field calls a frankenmerge."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Annotated, Any, ClassVar

from pydantic import Field

from portmanteau.merge import Checkpoint, Composed, MergeError, Step
from portmanteau.merge.errors import Mistake, some
from portmanteau.merge.names import Stack, matches
from portmanteau.merge.node import copy_of
from portmanteau.merge.tensor_spec import TensorSpec

from .components import part_of, stack_of
from .composition import composition
from .matching import HEADS, different_vocabularies, match
from .recipe.operator_body import SliceBody
from .restacked_config import Origin, restacked
from .tensorwise import Job, Rule, base_label, check, refuse_packed, unused

_FRONT = "*emb*|*wte.*|*wpe.*|*shared.weight|*.conv[12].*|*patch*|*class_token*|*ln_pre*|*layernorm_pre*|*pre_la*norm*"


@dataclass(frozen=True)
class Slice:
    """A run of layers of the result.

    Attributes:
        models: the models that it is made of, by the names that settings and random streams know them by.
        layers: the first layer and the one behind the last, of all of them or by name (of the base: `base`); None: all.
        operator: what is done to each tensor of each layer.
        base: what deltas are taken from.
        settings: the operator's settings, as in `tensorwise`; gradients run over the layers of this slice.
        rules: exceptions by tensor name.
        why: the recipe line.

    """

    models: Mapping[str, Checkpoint]
    layers: tuple[int, int] | Mapping[str, tuple[int, int]] | None = None
    operator: str = "copy"
    base: Checkpoint | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    rules: Sequence[Rule] = ()
    why: str = ""
    recipe_form: ClassVar[Any] = SliceBody

    @property
    def inputs(self) -> dict[str, Checkpoint]:
        """The base, where there is one, and the models, by name."""
        return {**({base_label(self.models): self.base} if self.base is not None else {}), **self.models}

    def only(self, word: str) -> Slice:
        """Give the same of one component of the models."""
        models = {label: part_of(model, word) for label, model in self.models.items()}
        return replace(self, models=models, base=part_of(self.base, word) if self.base is not None else None)

    @property
    def job(self) -> Job:
        """What is done to its tensors."""
        base = base_label(self.models) if self.base is not None else None
        return Job(tuple(self.models), base, self.operator, self.settings, tuple(self.rules), self.why)


@composition(
    source="layer stacking as in mergekit 0.1.5 (`slices`, `passthrough`); Kim et al. 2023 (arXiv 2312.15166)",
    example="slices: [{model: ./math, layers: [0, 16]}, {model: ./swahili, layers: [8, 24]}]",
)
def slices(
    *,
    parts: Annotated[Sequence[Slice], Field(description="the slices, from the bottom of the stack to its top")],
    outside: Annotated[
        Checkpoint | None,
        Field(
            description="the model that embeddings, final norm and heads come from; default: those of the end slices"
        ),
    ] = None,
    donor: Annotated[
        Checkpoint | None,
        Field(description="the model whose config and files go with the result; default: the first slice's first"),
    ] = None,
    stack: Annotated[
        str | None,
        Field(description="which stack of layers, where there are several: its name, a pattern, or its component"),
    ] = None,
    only: Annotated[
        str | None, Field(description="restack one component of the models, and leave the others out: for `assemble`")
    ] = None,
) -> Composed:
    """Put a stack of layers together from layers of models.

    Each slice is `{model: a, layers: [first, end]}`, with `end` not counted, or an operator over layers of several
    models: `{operator: slerp, models: [a, b], layers: {a: [8, 16], b: [4, 12]}, t: [0.2, 0.8]}`. Layers are numbered
    anew. Embeddings, and what the first layer alone has (T5's table of relative positions), are made as the first
    slice's layers are, final norm and heads as the last one's (gradients at their first value), or all taken from
    `outside`. The config is made true: the number of layers, and every list that has an entry for each layer.

    >>> import torch
    >>> from portmanteau.merge import InMemory
    >>> names = [f"model.layers.{i}.mlp.up_proj.weight" for i in range(2)]
    >>> a, b = (InMemory(x, {name: torch.tensor([y]) for name in names}) for x, y in (("a", 2), ("b", 4)))
    >>> stacked = slices(parts=[Slice({"a": a}, (0, 2)), Slice({"b": b}, (1, 2))])
    >>> {name: stacked[name].item() for name in stacked if ".2." in name or ".0." in name}
    {'model.layers.0.mlp.up_proj.weight': 2, 'model.layers.2.mlp.up_proj.weight': 4}

    Raises MergeError for models that do not fit, ranges beyond their layers, and a config that cannot be made true.
    """
    if not parts:
        raise MergeError("parts", "there are no slices")
    given = donor or outside or next(iter(parts[0].inputs.values()))
    several = len(given.layers.stacks) > 1
    if only is not None:
        given, parts, stack = part_of(given, only), [part.only(only) for part in parts], None
    pieces = _pieces(parts, stack)
    target = _Target(given, _stack(given, stack, "donor"))
    notes: list[str] = []
    nodes, mistakes = _layers(parts, pieces, target, notes)
    if outside is None:
        mistakes = [*_other_outside(parts, pieces, target), *mistakes]
    every = dict.fromkeys([given, *(model for part in parts for model in part.inputs.values())])
    others = {model.label: model for model in every if model is not given}
    mistakes += different_vocabularies({**others, "the donor": given}, "the donor")
    mistakes += _other_shapes(nodes, target)
    if mistakes:
        raise MergeError.of(mistakes)
    front, behind = _outside(parts, pieces, target, outside, notes)
    nodes = {**front, **nodes, **behind}
    refuse_packed(nodes)
    origins = [origin for piece in pieces for origin in piece.origins]
    config, more = restacked(given.companions.config, target.stack, several, origins)
    notes = [*_inherited(parts), *notes, *_idle(parts, nodes), *more]
    return Composed("slices", nodes, replace(given.companions, config=config), tuple(dict.fromkeys(notes)))


@dataclass(frozen=True)
class _Input:
    """The layers of one model that go into a slice."""

    model: Checkpoint
    stack: Stack
    first: int

    def names(self, count: int) -> Iterator[tuple[str, int, str]]:
        """Go through the tensors of so many layers: name, layer of the slice, name inside the layer."""
        outside = set(_Target(self.model, self.stack).outside)
        for name in self.model.specs:
            place = self.model.layers.place(name)
            if place is None or place.stack != self.stack or name in outside:
                continue
            if 0 <= place.layer - self.first < count:
                yield name, place.layer - self.first, place.inner


@dataclass(frozen=True)
class _Target:
    """The model that the result has its names and its config of, and its stack."""

    model: Checkpoint
    stack: Stack

    @cached_property
    def outside(self) -> list[str]:
        """The tensors outside the stack, and those of the first layer that belong to all of them."""
        places = {name: self.model.layers.place(name) for name in self.model.specs}
        common = set(self.of_all_layers)
        return [name for name, place in places.items() if place is None or place.stack != self.stack or name in common]

    @cached_property
    def of_all_layers(self) -> list[str]:
        """What the first layer has beside all that the others have: T5's table of relative positions."""
        inner: dict[int, dict[str, str]] = {}
        for name in self.model.specs:
            place = self.model.layers.place(name)
            if place is not None and place.stack == self.stack:
                inner.setdefault(place.layer, {})[place.inner] = name
        others = {one for layer, found in inner.items() if layer for one in found}
        first = inner.get(0, {})
        return [name for one, name in first.items() if one not in others] if others and others <= first.keys() else []

    def named(self, model: Checkpoint, stack: Stack) -> dict[str, str]:
        """Give the tensors of a model outside its stack: the name here → its own."""
        added = self.stack.prefix.removesuffix(stack.prefix) if self.stack.prefix.endswith(stack.prefix) else ""
        removed = stack.prefix.removesuffix(self.stack.prefix) if stack.prefix.endswith(self.stack.prefix) else ""
        own = _Target(model, stack).outside
        moved = {name: added + name.removeprefix(removed) for name in own}
        return {moved[name] if moved[name] in self.model.specs else name: name for name in own}


@dataclass(frozen=True)
class _Piece:
    """One slice with its ranges found: where its layers begin in the result, how many, and what goes into it."""

    begin: int
    count: int
    inputs: Mapping[str, _Input]

    @property
    def origins(self) -> list[Origin]:
        """Where each layer's entries in the config come from: the base, or the first of the models."""
        one = next(iter(self.inputs.values()))
        config, label = one.model.companions.config, one.model.label
        return [Origin(label, config, one.stack, one.first + i) for i in range(self.count)]

    def steps(self, part: Slice, target: _Target, notes: list[str]) -> dict[str, Step]:
        """Make the steps of all layers."""
        depths: dict[str, float] = {}
        views = {}
        for label, one in self.inputs.items():
            nodes = {}
            for own, layer, inner in one.names(self.count):
                name = f"{target.stack.prefix}.{self.begin + layer}.{inner}"
                depths[name] = layer / (self.count - 1) if self.count > 1 else 1.0
                nodes[name] = one.model.node(own)
            views[label] = Composed(label, nodes, one.model.companions)
        matching = match(views, next(iter(views)))
        notes += matching.notes
        return {name: part.job.step(met, depths[name]) for name, met in matching.tensors.items()}

    def outside(self, part: Slice, target: _Target, names: Sequence[str], notes: list[str]) -> dict[str, Step]:
        """Make the steps of tensors outside the layers, as if they lay at depth 0."""
        views = {}
        for label, one in self.inputs.items():
            own = target.named(one.model, one.stack)
            views[label] = Composed(label, {name: one.model.node(own[name]) for name in names}, one.model.companions)
        matching = match(views, next(iter(views)))
        notes += matching.notes
        return {name: part.job.step(met, 0.0) for name, met in matching.tensors.items()}


def _pieces(parts: Sequence[Slice], word: str | None) -> list[_Piece]:
    """Find the stack and the range of every model of every slice. Raises MergeError with all mistakes."""
    pieces: list[_Piece] = []
    mistakes: list[Mistake] = []
    begin = 0
    for number, part in enumerate(parts):
        where = f"parts.{number}"
        wrong = check(part.operator, list(part.models), part.base is not None, part.settings, part.rules)
        mistakes += [Mistake(f"{where}.{'.'.join(map(str, path))}", what, hint) for path, what, hint in wrong]
        try:
            inputs, count = _inputs(part, word, where)
        except MergeError as error:
            mistakes += error.mistakes
            continue
        pieces.append(_Piece(begin, count, inputs))
        begin += count
    if mistakes:
        raise MergeError.of(mistakes)
    return pieces


def _inputs(part: Slice, word: str | None, where: str) -> tuple[dict[str, _Input], int]:
    """Find what goes into one slice, and how many layers it has."""
    inputs, counts, mistakes = {}, {}, []
    for label, model in part.inputs.items():
        stack = _stack(model, word, where)
        given = part.layers.get(label) if isinstance(part.layers, Mapping) else part.layers
        first, end = given or (0, stack.count)
        if not first < end <= stack.count:
            hint = f"a range is [first, end], end not counted, between 0 and {stack.count}"
            what = f"layers [{first}, {end}] of {label}, which has {stack.count}"
            mistakes.append(Mistake(f"{where}.layers.{label}", what, hint))
        inputs[label], counts[label] = _Input(model, stack, first), end - first
    if not mistakes and len(set(counts.values())) > 1:
        shown = ", ".join(f"{count} of {label}" for label, count in counts.items())
        mistakes.append(Mistake(f"{where}.layers", f"a slice takes as many layers of each model: {shown}"))
    if mistakes:
        raise MergeError.of(mistakes)
    return inputs, next(iter(counts.values()))


def _stack(model: Checkpoint, word: str | None, where: str) -> Stack:
    """Find the stack that is meant. Raises MergeError."""
    stacks = model.layers.stacks
    shown = ", ".join(f"{stack} ({stack.count})" for stack in stacks)
    if word is not None:
        meant = [one for one in stacks if matches(word, one.prefix) or model.layers.find(word) == one]
        found = meant[0] if len(meant) == 1 else stack_of(word, model.layers, model.specs)
        if found is not None:
            return found
        what = "no stack of layers, or more than one, is called"
        raise MergeError("stack", f"{what} {word!r} in {model.label}", f"there are: {shown}")
    if not stacks:
        raise MergeError(where, f"the tensor names of {model.label} show no layers", "`portmanteau inspect` lists them")
    if len(stacks) > 1:
        what = f"{model.label} has {len(stacks)} stacks of layers: {shown}"
        raise MergeError(where, what, "stack: says which is put together anew; the others stay as they are")
    return stacks[0]


def _layers(
    parts: Sequence[Slice], pieces: Sequence[_Piece], target: _Target, notes: list[str]
) -> tuple[dict[str, Step], list[Mistake]]:
    """Make the steps of all slices' layers, and find the slices whose models do not fit each other."""
    nodes: dict[str, Step] = {}
    mistakes: list[Mistake] = []
    for number, (part, piece) in enumerate(zip(parts, pieces, strict=True)):
        try:
            nodes |= piece.steps(part, target, notes)
        except MergeError as error:
            mistakes += [replace(mistake, where=f"parts.{number}") for mistake in error.mistakes]
    return nodes, mistakes


def _outside(
    parts: Sequence[Slice], pieces: Sequence[_Piece], target: _Target, outside: Checkpoint | None, notes: list[str]
) -> tuple[dict[str, Step], dict[str, Step]]:
    """Make the steps of what lies in front of the layers and behind them."""
    names = target.outside
    if outside is not None:
        stack = next((one for one in outside.layers.stacks if one == target.stack), target.stack)
        own = target.named(outside, stack)
        lacking = [name for name in names if name not in own]
        if lacking or len(own) > len(names):
            other = some(lacking or [name for name in own if name not in names])
            raise MergeError("outside", f"not the same tensors outside the layers as in the donor: {other}")
        specs: Mapping[str, TensorSpec] = outside.specs
        copies = {
            name: copy_of(outside.node(own[name]), replace(specs[own[name]], name=name), outside.label)
            for name in names
        }
        return copies, {}
    common = target.of_all_layers
    front = [name for name in names if name in common or (matches(_FRONT, name) and not matches(HEADS, name))]
    behind = [name for name in names if name not in set(front)]
    return (
        pieces[0].outside(parts[0], target, front, notes),
        pieces[-1].outside(parts[-1], target, behind, notes),
    )


def _inherited(parts: Sequence[Slice]) -> Iterator[str]:
    """Go through what is to be known of the models."""
    for model in (model for part in parts for model in part.inputs.values()):
        yield from model.notes


def _idle(parts: Sequence[Slice], nodes: Mapping[str, Step]) -> list[str]:
    """Note the patterns that fit no tensor, of the result or of any model."""
    names = {name for part in parts for model in part.inputs.values() for name in model.specs}
    return unused([part.job for part in parts], names | nodes.keys())


def _other_outside(parts: Sequence[Slice], pieces: Sequence[_Piece], target: _Target) -> Iterator[Mistake]:
    """Find models of the end slices with other tensors outside the layers than the donor: a head of its own, say."""
    wanted = set(target.outside)
    for number in dict.fromkeys((0, len(parts) - 1)):
        for label, one in pieces[number].inputs.items():
            found, donor = target.named(one.model, one.stack), target.model.label
            for names, verb in (
                (wanted - found.keys(), f"lacks what {donor} has"),
                (found.keys() - wanted, "has more"),
            ):
                if names:
                    what = f"{label} {verb} outside the layers: {some(sorted(names))}"
                    yield Mistake(f"parts.{number}", what, "outside: NAME takes all of that from one model")


def _other_shapes(nodes: Mapping[str, Step], target: _Target) -> Iterator[Mistake]:
    """Find layers that the donor's config cannot describe: with names or shapes that its own layers have not."""
    known: dict[str, set[tuple[int, ...]]] = {}
    for name, spec in target.model.specs.items():
        place = target.model.layers.place(name)
        if place is not None and place.stack == target.stack:
            known.setdefault(place.inner, set()).add(spec.shape)
    for name, step in nodes.items():
        inner = name.removeprefix(f"{target.stack.prefix}.").partition(".")[2]
        if step.output.shape not in known.get(inner, set()):
            had = ", ".join(str(list(shape)) for shape in sorted(known.get(inner, set()))) or "none of this name"
            what = f"{name} is {list(step.output.shape)}, and {target.model.label}, whose config is taken, has {had}"
            yield Mistake("parts", what, "only models of one shape can be stacked; donor: names another config")
