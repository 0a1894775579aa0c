"""Layer swapping: the task expert's middle layers between the language expert's outer ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import Field

from portmanteau.merge import Checkpoint, Composed, MergeError, Step, Survey
from portmanteau.merge.dtypes import is_float
from portmanteau.merge.names import Place, Stack
from portmanteau.merge.node import Inputs, copy_of
from portmanteau.merge.registry import find
from portmanteau.merge.surveys import balanced_weights

from .composition import composition
from .matching import Matching, Met, Unmatched, match
from .zones import Asked, ByModule, Count, Ends, Module, Share, Zone, of_module, resolve


@composition(
    source="Bandarkar et al. 2024 (arXiv 2410.01335), section 4.2; revert and module forms: 2505.18356, 2601.22620"
)
def layer_swap(
    *,
    task: Annotated[Checkpoint, Field(description="the expert in the task, which keeps the middle layers")],
    language: Annotated[Checkpoint, Field(description="the expert in the language, which gives the outer layers")],
    base: Annotated[Checkpoint | None, Field(description="what both were trained from")] = None,
    bottom: Annotated[Count | None, Field(description="layers of the language expert at the bottom")] = None,
    top: Annotated[Count | None, Field(description="layers of the language expert at the top")] = None,
    transition: Annotated[Count | Ends, Field(description="layers that mix both, next to each of these")] = 1,
    blend: Annotated[Share, Field(description="share of the language expert in transition layers")] = 0.5,
    rescale: Annotated[
        Literal["none", "mav"],
        Field(description="mav: in transition layers, bring both changes from base to the same mean absolute value"),
    ] = "none",
    outside: Annotated[
        Literal["language", "task", "average", "base"],
        Field(description="where embeddings, final norm and heads come from"),
    ] = "language",
    modules: Annotated[
        Mapping[Module, Zone] | None, Field(description="other numbers for attention, mlp or norm tensors")
    ] = None,
    stacks: Annotated[
        Mapping[str, Zone | Literal["outside"]] | None,
        Field(description="numbers for each stack of layers, where there are several (encoder, decoder)"),
    ] = None,
    unmatched: Unmatched = "error",
) -> Composed:
    """Put the task expert's middle layers between the language expert's bottom and top layers.

    Of L layers, the first `bottom` and the last `top` are the language expert's, byte for byte; the `transition` layers
    next to them are blend · language + (1 − blend) · task; the rest is the task expert's, byte for byte. With
    `rescale: mav`, both changes from `base` are first brought to the same mean absolute value over the layer (a
    survey). Everything outside the layers follows `outside`; tensors that are no floats are the task expert's.

    Raises MergeError for models that do not fit, shared layers, or more layers asked for than there are.
    """
    models = {"task": task, "language": language}
    donor = "language" if outside == "average" else outside
    if outside == "base" or rescale == "mav":
        if base is None:
            asked = "outside: base" if outside == "base" else "rescale: mav"
            raise MergeError("base", f"{asked} needs the base", "add base: the model that both were trained from")
        models["base"] = base
    matching = match(models, donor, unmatched)
    zones = resolve(models[donor], Asked(Zone(bottom, top, transition, blend), modules or {}, stacks or {}))
    job = _Job(zones, outside, rescale, _surveys(matching, models[donor], zones) if rescale == "mav" else {})
    nodes = {name: job.step(met, models[donor].layers.place(name)) for name, met in matching.tensors.items()}
    unused = base is not None and "base" not in models
    notes = ("the base is not used: only outside: base and rescale: mav do",) if unused else ()
    return Composed("layer_swap", nodes, models[donor].companions, (*matching.notes, *notes))


def _surveys(
    matching: Matching, donor: Checkpoint, zones: Mapping[Stack, ByModule]
) -> dict[tuple[Stack, int, str], Survey]:
    """Plan, for every transition layer (and module with numbers of its own), the survey of both experts' changes."""
    meeting: dict[tuple[Stack, int, str], list[Inputs]] = {}
    blends: dict[tuple[Stack, int, str], float] = {}
    for name, met in matching.tensors.items():
        place = donor.layers.place(name)
        if place is None or place.stack not in zones or not met.complete or not is_float(met.spec.dtype):
            continue
        which, shares = of_module(zones[place.stack], place)
        if shares.side(place.layer, place.stack.count) == "blend":
            key = (place.stack, place.layer, which)
            pair = (met.nodes["language"], met.nodes["task"])
            meeting.setdefault(key, []).append(Inputs(pair, met.nodes["base"]))
            blends[key] = shares.blend
    return {
        key: Survey(
            f"mean absolute change of {key[0]}.{key[1]}" + (f" ({key[2]})" if key[2] else ""),
            balanced_weights,
            tuple(inputs),
            {"blend": blends[key]},
        )
        for key, inputs in meeting.items()
    }


@dataclass(frozen=True)
class _Job:
    """What is asked for, apart from any one tensor."""

    zones: Mapping[Stack, ByModule]
    outside: str
    rescale: str
    surveys: Mapping[tuple[Stack, int, str], Survey] = field(default_factory=dict)

    def step(self, met: Met, place: Place | None) -> Step:
        """Make the step for one output tensor."""
        if not met.complete:
            label, node = next(iter(met.nodes.items()))
            return copy_of(node, met.spec, label)
        if not is_float(met.spec.dtype):
            return copy_of(met.nodes["task"], met.spec, "task")
        if place is None or place.stack not in self.zones:
            return self._mixed(met, 0.5) if self.outside == "average" else self._copied(met, self.outside)
        which, shares = of_module(self.zones[place.stack], place)
        side = shares.side(place.layer, place.stack.count)
        if side != "blend":
            return self._copied(met, side)
        survey = self.surveys.get((place.stack, place.layer, which))
        return self._mixed(met, shares.blend) if survey is None else self._balanced(met, survey)

    def _copied(self, met: Met, label: str) -> Step:
        return copy_of(met.nodes[label], met.spec, label)

    def _mixed(self, met: Met, blend: float) -> Step:
        inputs = Inputs((met.nodes["language"], met.nodes["task"]))
        settings = {"weight": (blend, 1 - blend), "normalize": False}
        return Step(met.spec, find("linear"), settings, inputs, ("language", "task"))

    def _balanced(self, met: Met, survey: Survey) -> Step:
        inputs = Inputs((met.nodes["language"], met.nodes["task"]), met.nodes["base"])
        settings = {"weight": survey, "normalize": False, "scale": 1.0}
        return Step(met.spec, find("task_arithmetic"), settings, inputs, ("language", "task"))
