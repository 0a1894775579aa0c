"""Layer swapping: the task expert's middle layers between the language expert's outer ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import Field

from portmanteau.merge import Checkpoint, Composed, MergeError, Step, Survey
from portmanteau.merge.dtypes import is_float
from portmanteau.merge.errors import Mistake
from portmanteau.merge.names import Place, Stack
from portmanteau.merge.node import Finding, Inputs, copy_of
from portmanteau.merge.registry import find
from portmanteau.merge.surveys import balanced_weights

from .automatic_layers import Automatic, By, by_change
from .composition import composition
from .matching import Matching, Met, Unmatched, match
from .zones import Asked, ByModule, Count, Modules, Share, Stacks, Transition, Zone, of_module, resolve


@composition(
    source="Bandarkar et al. 2024 (arXiv 2410.01335), section 4.2; revert and module forms: 2505.18356, 2601.22620",
    example="layer_swap: {task: ./math, language: ./swahili, bottom: 3, top: 1}",
)
def layer_swap(
    *,
    task: Annotated[Checkpoint, Field(description="the expert in the task, which keeps the middle layers")],
    language: Annotated[Checkpoint, Field(description="the expert in the language, which gives the outer layers")],
    base: Annotated[Checkpoint | None, Field(description="what both were trained from")] = None,
    bottom: Annotated[Count | None, Field(description="layers of the language expert at the bottom")] = None,
    top: Annotated[Count | None, Field(description="layers of the language expert at the top")] = None,
    transition: Transition = 1,
    blend: Annotated[Share, Field(description="share of the language expert in transition layers")] = 0.5,
    layers: Annotated[
        Literal["auto"] | None, Field(description="auto: each layer from the expert that changed it more, by a survey")
    ] = None,
    by: Annotated[
        By, Field(description="auto: choose whole layers, or attention and mlp of each layer apart")
    ] = "layer",
    threshold: Annotated[Share, Field(description="auto: within this difference of shares, layers are mixed")] = 0.001,
    rescale: Annotated[
        Literal["none", "mav"],
        Field(description="mav: in transition layers, bring both changes from base to the same mean absolute value"),
    ] = "none",
    outside: Annotated[
        Literal["language", "task", "average", "base"],
        Field(description="where embeddings, final norm and heads come from"),
    ] = "language",
    modules: Modules = None,
    stacks: Stacks = None,
    unmatched: Unmatched = "error",
) -> Composed:
    """Put the task expert's middle layers between the language expert's bottom and top layers.

    Of L layers, the first `bottom` and the last `top` are the language expert's, byte for byte; the `transition` layers
    next to them are blend · language + (1 − blend) · task; the rest is the task expert's, byte for byte. With
    `rescale: mav`, both changes from `base` are first brought to the same mean absolute value over the layer (a
    survey). Everything outside the layers follows `outside`; tensors that are no floats are the task expert's.

    With `layers: auto` a survey compares, layer by layer, each expert's share of its own change (Σ ‖Δ‖/‖base‖ over the
    layer's matrices): the one that leads by more than `threshold` gives the layer, else both are mixed by `blend`. With
    `by: module`, attention and mlp of each layer are compared apart, by √Σ (‖Δ‖/‖base‖)² over their matrices; the norms
    beside them are the language expert's.

    >>> import torch
    >>> from portmanteau.merge import InMemory
    >>> names = [f"model.layers.{i}.mlp.up_proj.weight" for i in range(5)]
    >>> math, swahili = (InMemory(x, {name: torch.tensor([y]) for name in names}) for x, y in (("m", 2.0), ("s", 4.0)))
    >>> swapped = layer_swap(task=math, language=swahili, bottom=1, top=1)
    >>> [swapped[name].item() for name in names]
    [4.0, 3.0, 2.0, 3.0, 4.0]

    Raises MergeError for models that do not fit, shared layers, or more layers asked for than there are.
    """
    asked = Asked(Zone(bottom, top, transition, blend), modules or {}, stacks or {})
    auto, mav = layers == "auto", rescale == "mav"
    needs_base = {"layers: auto": auto, "outside: base": outside == "base", "rescale: mav": mav}
    _refuse(needs_base, base, asked, by)
    models = {"task": task, "language": language}
    if base is not None and any(needs_base.values()):
        models["base"] = base
    donor = models["language" if outside == "average" else outside]
    matching = match(models, "language" if outside == "average" else outside, unmatched)
    if auto:
        whole = dict.fromkeys((stack.prefix for stack in donor.layers.stacks), Zone(0, 0, 0, blend))
        zones = resolve(donor, Asked(Zone(0, 0, 0, blend), stacks=whole))
        chosen = by_change(matching, donor.layers, by=by, threshold=threshold, blend=blend)
        job = _Job(zones, outside, automatic=chosen)
    else:
        zones = resolve(donor, asked)
        job = _Job(zones, outside, _surveys(matching, donor, zones) if mav else {})
    nodes = {name: job.step(met, donor.layers.place(name)) for name, met in matching.tensors.items()}
    unused = () if base is None or "base" in models else (f"the base is not used: only {_listed(needs_base)} do",)
    return Composed("layer_swap", nodes, donor.companions, (*matching.notes, *unused))


def _refuse(needs_base: Mapping[str, bool], base: Checkpoint | None, asked: Asked, by: By) -> None:
    """Refuse keys that contradict each other, or that need a base where there is none."""
    mistakes = []
    if base is None and any(needs_base.values()):
        needing = _listed({key: True for key, needed in needs_base.items() if needed})
        hint = "add base: the model that both were trained from"
        mistakes.append(Mistake("base", f"{needing} needs the base", hint))
    given = {**vars(asked.common), "modules": asked.modules, "stacks": asked.stacks}
    told = [key for key in ("bottom", "top", "modules", "stacks") if given[key] not in (None, {})]
    if needs_base["layers: auto"] and (told or needs_base["rescale: mav"]):
        told += ["rescale"] if needs_base["rescale: mav"] else []
        mistakes.append(
            Mistake("layers", f"auto chooses the layers itself, and {', '.join(told)} is given", "leave one out")
        )
    if by == "module" and not needs_base["layers: auto"]:
        hint = "add layers: auto; modules: gives numbers of layers by module"
        mistakes.append(Mistake("by", "says how auto chooses, and layers: auto is not given", hint))
    if mistakes:
        raise MergeError.of(mistakes)


def _listed(keys: Mapping[str, bool]) -> str:
    return " and ".join(keys)


def _surveys(
    matching: Matching, donor: Checkpoint, zones: Mapping[Stack, ByModule]
) -> dict[tuple[Stack, int, str], Finding]:
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
    found = {}
    for key, inputs in meeting.items():
        name = f"{key[0]}.{key[1]}" + (f" ({key[2]})" if key[2] else "")
        title = f"mean absolute change of {name}"
        found[key] = Finding(Survey(title, balanced_weights, {name: tuple(inputs)}, {"blend": blends[key]}), name)
    return found


@dataclass(frozen=True)
class _Job:
    """What is asked for, apart from any one tensor."""

    zones: Mapping[Stack, ByModule]
    outside: str
    findings: Mapping[tuple[Stack, int, str], Finding] = field(default_factory=dict)
    automatic: Automatic | None = None

    def step(self, met: Met, place: Place | None) -> Step:
        """Make the step for one output tensor."""
        if not met.complete:
            return met.kept()
        if not is_float(met.spec.dtype):
            return copy_of(met.nodes["task"], met.spec, "task")
        if place is None or place.stack not in self.zones:
            return self._mixed(met, (0.5, 0.5)) if self.outside == "average" else self._copied(met, self.outside)
        if self.automatic is not None:
            chosen = self.automatic.of(place)
            return self._copied(met, "language") if chosen is None else self._mixed(met, chosen)
        which, shares = of_module(self.zones[place.stack], place)
        finding = self.findings.get((place.stack, place.layer, which))
        side = shares.side(place.layer, place.stack.count)
        if side != "blend":
            return self._copied(met, side)
        weights = (shares.blend, 1 - shares.blend)
        return self._mixed(met, weights) if finding is None else self._balanced(met, finding)

    def _copied(self, met: Met, label: str) -> Step:
        return copy_of(met.nodes[label], met.spec, label)

    def _mixed(self, met: Met, weights: tuple[float, float] | Finding) -> Step:
        inputs = Inputs((met.nodes["language"], met.nodes["task"]))
        settings = {"weight": weights, "normalize": False}
        return Step(met.spec, find("linear"), settings, inputs, ("language", "task"))

    def _balanced(self, met: Met, finding: Finding) -> Step:
        inputs = Inputs((met.nodes["language"], met.nodes["task"]), met.nodes["base"])
        settings = {"weight": finding, "normalize": False, "scale": 1.0}
        return Step(met.spec, find("task_arithmetic"), settings, inputs, ("language", "task"))
