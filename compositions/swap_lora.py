"""Layer swapping of two experts that are LoRA adapters over one base: the result is an adapter again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

from pydantic import Field

from portmanteau.merge import Adapter, Composed, MergeError
from portmanteau.merge.companions import Companions
from portmanteau.merge.dtypes import promote, working
from portmanteau.merge.errors import Mistake, some
from portmanteau.merge.names import Layers, Stack, layers_up_to
from portmanteau.merge.node import Inputs, Node, Step
from portmanteau.merge.registry import find

from .combine_lora import Term, bring_together, concatenated
from .composition import composition
from .lora_folder import Folder, Pair, Saved, agreed
from .zones import Asked, ByModule, Count, Modules, Share, Stacks, Transition, Zone, of_module, resolve

_WHOLE = "swap whole models instead: give each expert as a model with `lora:`, and use layer_swap"


@composition(
    source="Bandarkar et al. 2024 (arXiv 2410.01335), section 4.2, on the changes of two LoRA adapters over one base",
    example="swap_lora: {task: ./math-lora, language: ./swahili-lora, bottom: 5, top: 2, layers: 32}",
)
def swap_lora(
    *,
    task: Annotated[Adapter, Field(description="the adapter of the task, which keeps the middle layers")],
    language: Annotated[Adapter, Field(description="the adapter of the language, which gives the outer layers")],
    bottom: Annotated[Count | None, Field(description="layers of the language adapter at the bottom")] = None,
    top: Annotated[Count | None, Field(description="layers of the language adapter at the top")] = None,
    transition: Transition = 1,
    blend: Annotated[Share, Field(description="share of the language adapter in transition layers")] = 0.5,
    layers: Annotated[
        int | None,
        Field(ge=1, description="layers that the base has; default: up to the highest that an adapter changes"),
    ] = None,
    outside: Annotated[
        Literal["language", "task", "average"], Field(description="where changes of embeddings and heads come from")
    ] = "language",
    modules: Modules = None,
    stacks: Stacks = None,
) -> Composed:
    """Put the task adapter's middle layers between the language adapter's bottom and top layers.

    As `layer_swap` does with models, but the result is an adapter: outer and middle layers keep the A and B of one
    adapter, byte for byte; a transition layer gets blend · Δ_language + (1 − blend) · Δ_task, exactly, by putting both
    adapters' factors side by side (rank r₁ + r₂). Ranks and alphas of modules stand in the config's patterns. A layer
    that an adapter lacks is a change of zero. DoRA magnitudes go with their factors; a DoRA result has no transition.

    >>> from portmanteau import merge
    >>> task, language = (merge.open_adapter(f"examples/adapters/{name}") for name in ("task", "language"))
    >>> swapped = swap_lora(task=task, language=language, bottom=3, top=0, layers=8)
    >>> names = [f"base_model.model.model.layers.{i}.mlp.up_proj.lora_A.weight" for i in range(8)]
    >>> [len(swapped[name]) for name in names]  # the ranks: layer 3 has both
    [4, 4, 4, 8, 4, 4, 4, 4]

    Raises MergeError for adapters that do not fit each other, or more layers asked for than there are.
    """
    weights = {task: 1.0, language: 1.0}
    if len(weights) == 1:
        raise MergeError("language", "is the task adapter too", "name two adapters")
    met = bring_together(weights)
    names = [*(f"{path}.weight" for path in met.terms), *met.saved]
    stand_in = _StandIn(layers_up_to(names, layers))
    deepest = max((stack.count for stack in stand_in.layers.stacks), default=0)
    if layers is not None and deepest > layers:
        raise MergeError("layers", f"is {layers}, and an adapter changes layer {deepest - 1}")
    asked = Asked(Zone(bottom, top, transition, blend), modules or {}, stacks or {})
    job = _Job(task, language, stand_in.layers, resolve(stand_in, asked), outside)
    found = {path: job.pair(path, terms) for path, terms in met.terms.items()}
    pairs = {path: pair for path, pair in found.items() if pair is not None}
    saved = {name: one for name, holders in met.saved.items() if (one := job.saved(name, holders)) is not None}
    mistakes = [*job.mistakes(met.saved), *_mixed_kinds(pairs)]
    if not pairs:
        mistakes.append(Mistake("", "no layer is left in which its adapter changes anything"))
    if mistakes:
        raise MergeError.of(mistakes)
    settings, notes = agreed(list(weights))
    told = () if layers else (f"the adapters change {_counted(stand_in.layers)}; layers: says if the base has more",)
    return Folder(pairs, saved, settings, (*met.notes, *notes, *told)).composed("swap_lora")


@dataclass(frozen=True)
class _StandIn:
    """Stands for the base, of which only the layers are known."""

    layers: Layers
    companions: Companions = field(default_factory=Companions)


def _counted(layers: Layers) -> str:
    return ", ".join(f"{stack.count} layers in {stack}" for stack in layers.stacks)


def _mixed_kinds(pairs: Mapping[str, Pair]) -> Iterator[Mistake]:
    """Refuse a result of which only a part is DoRA: the config says it of the whole."""
    plain = [path for path, pair in pairs.items() if pair.magnitude is None]
    if 0 < len(plain) < len(pairs):
        what = f"some layers would be DoRA and {len(plain)} modules not, which no adapter can be: {some(plain)}"
        yield Mistake("", what, f"transition: 0 where both are DoRA; else {_WHOLE}")


@dataclass(frozen=True)
class _Job:
    """What is asked for, apart from any one module."""

    task: Adapter
    language: Adapter
    layers: Layers
    zones: Mapping[Stack, ByModule]
    outside: str

    def shares(self, name: str) -> dict[Adapter, float]:
        """Give the share of each adapter in a tensor's change."""
        place = self.layers.place(name)
        if place is None or place.stack not in self.zones:
            side, blend = self.outside, 0.5
        else:
            _, zone = of_module(self.zones[place.stack], place)
            side, blend = zone.side(place.layer, place.stack.count), zone.blend
        shares = {"language": (1.0, 0.0), "task": (0.0, 1.0)}.get(side, (blend, 1 - blend))
        both = {self.language: shares[0], self.task: shares[1]}
        return {adapter: share for adapter, share in both.items() if share}

    def pair(self, path: str, terms: tuple[Term, ...]) -> Pair | None:
        """Give the factors of a module; None where the adapter that it is taken from does not change it."""
        shares = self.shares(f"{path}.weight")
        mixed = [replace(term, weight=shares[term.adapter]) for term in terms if term.adapter in shares]
        mixed.sort(key=lambda term: term.adapter is self.task)
        if not mixed:
            return None
        label = ", ".join(term.adapter.label for term in mixed)
        dtype = working([node.output.dtype for term in mixed for node in (term.a, term.b)])
        pair = concatenated(mixed, dtype, label)
        alone, *others = mixed
        if others or alone.weight != 1 or not alone.module.magnitude:
            return pair
        return replace(pair, magnitude=alone.adapter.stored.node(alone.module.magnitude))

    def saved(self, name: str, holders: Mapping[Adapter, Node]) -> Saved | None:
        """Give a tensor stored whole: that of the adapter which gives the layer, or the mean of both."""
        shares = self.shares(name)
        giving = {adapter: share for adapter, share in shares.items() if adapter in holders}
        if not giving:
            return None
        if len(giving) == 1:
            (adapter,) = giving
            return Saved(holders[adapter], adapter.label)
        nodes = tuple(holders[adapter] for adapter in giving)
        labels = tuple(adapter.label for adapter in giving)
        spec = replace(nodes[0].output, name=name, dtype=promote([node.output.dtype for node in nodes]))
        settings = {"weight": tuple(giving.values()), "normalize": False}
        return Saved(Step(spec, find("linear"), settings, Inputs(nodes), labels), ", ".join(labels))

    def mistakes(self, saved: Mapping[str, Mapping[Adapter, Node]]) -> Iterator[Mistake]:
        """Find tensors stored whole by one adapter where both are to be mixed, or of two shapes."""
        lone = [name for name, holders in saved.items() if len(self.shares(name)) > len(holders)]
        if lone:
            what = f"only one adapter stores these whole, and both are to be mixed there: {some(lone)}"
            yield Mistake("", what, f"choose other layers or another outside; or {_WHOLE}")
        unlike = [name for name, nodes in saved.items() if len({one.output.shape for one in nodes.values()}) > 1]
        if unlike:
            yield Mistake("", f"stored whole in two shapes: {some(unlike)}")
