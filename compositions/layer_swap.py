"""Layer swapping: the task expert's middle layers between the language expert's outer ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from portmanteau.merge import Checkpoint, Composed, MergeError, Step, Survey
from portmanteau.merge.dtypes import is_float
from portmanteau.merge.errors import Mistake
from portmanteau.merge.names import Place, Stack, module
from portmanteau.merge.node import Inputs, copy_of
from portmanteau.merge.registry import find
from portmanteau.merge.surveys import balanced_weights

from .composition import composition
from .matching import Matching, Met, Unmatched, match

Count = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Module = Literal["attention", "mlp", "norm"]
Side = Literal["task", "language", "blend"]
_STRICT: Any = {"extra": "forbid"}
_LAYER_COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")


@dataclass(frozen=True)
class Ends:
    """A number of layers at either end."""

    bottom: Count = 0
    top: Count = 0
    __pydantic_config__: ClassVar[Any] = _STRICT


@dataclass(frozen=True)
class Zone:
    """How one stack, or one kind of module in it, is shared out; keys left out are those of the composition."""

    bottom: Count | None = None
    top: Count | None = None
    transition: Count | Ends | None = None
    blend: Share | None = None
    __pydantic_config__: ClassVar[Any] = _STRICT


@dataclass(frozen=True)
class _Shares:
    """A zone with nothing left open, for a stack of known size."""

    bottom: int
    top: int
    transition: Ends
    blend: float

    def side(self, layer: int, count: int) -> Side:
        """Tell which expert a layer is taken from."""
        from_top = count - 1 - layer
        if layer < self.bottom or from_top < self.top:
            return "language"
        # a transition lies between layers of both experts: an end without language layers has none
        low = self.transition.bottom if self.bottom else 0
        high = self.transition.top if self.top else 0
        return "blend" if layer < self.bottom + low or from_top < self.top + high else "task"

    def needed(self) -> int:
        """Count the layers that are not wholly the task expert's."""
        low = self.transition.bottom if self.bottom else 0
        return self.bottom + self.top + low + (self.transition.top if self.top else 0)


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
    models = {"task": task, "language": language, **({"base": base} if base is not None else {})}
    donor = "language" if outside == "average" else outside
    if base is None and (outside == "base" or rescale == "mav"):
        asked = "outside: base" if outside == "base" else "rescale: mav"
        raise MergeError("base", f"{asked} needs the base", "add base: the model that both were trained from")
    matching = match(models, donor, unmatched)
    zones = _zones(models[donor], _Zones(Zone(bottom, top, transition, blend), modules or {}, stacks or {}))
    job = _Job(zones, outside, rescale, _surveys(matching, models[donor], zones) if rescale == "mav" else {})
    nodes = {name: job.step(met, models[donor].layers.place(name)) for name, met in matching.tensors.items()}
    return Composed("layer_swap", nodes, models[donor].companions, matching.notes)


@dataclass(frozen=True)
class _Zones:
    """What was asked for, by stack and module."""

    common: Zone
    modules: Mapping[Module, Zone]
    stacks: Mapping[str, Zone | Literal["outside"]]


ByModule = Mapping[str, _Shares]  # "" stands for every module that is not named


def _zones(donor: Checkpoint, asked: _Zones) -> dict[Stack, ByModule]:
    """Resolve what was asked for against the stacks that the names show. Raises MergeError with all mistakes."""
    mistakes = _stack_mistakes(donor, asked)
    if mistakes:
        raise MergeError.of(mistakes)
    result: dict[Stack, ByModule] = {}
    for stack in donor.layers.stacks:
        own = next((zone for word, zone in asked.stacks.items() if donor.layers.find(word) == stack), Zone())
        if own == "outside":
            continue
        zone = _over(own, asked.common)
        result[stack] = {"": _shares(zone), **{m: _shares(_over(z, zone)) for m, z in asked.modules.items()}}
        mistakes += [_too_many(stack, which, s) for which, s in result[stack].items() if s.needed() > stack.count]
    if mistakes:
        raise MergeError.of(mistakes)
    return result


def _too_many(stack: Stack, which: str, shares: _Shares) -> Mistake:
    mixed = shares.needed() - shares.bottom - shares.top
    asked = f"bottom {shares.bottom} + top {shares.top} + transitions {mixed} = {shares.needed()}"
    name = f"{stack} ({which})" if which else f"{stack}"
    hint = "ask for fewer; transition: 0 leaves out the mixed layers"
    return Mistake("bottom", f"{name} has {stack.count} layers, and {asked} are asked for", hint)


def _over(zone: Zone, common: Zone) -> Zone:
    """Fill the open keys of a zone from a wider one."""
    given = {key: value for key, value in vars(zone).items() if value is not None}
    return replace(common, **given)


def _shares(zone: Zone) -> _Shares:
    ends = zone.transition if isinstance(zone.transition, Ends) else Ends(zone.transition or 0, zone.transition or 0)
    blend = 0.5 if zone.blend is None else zone.blend
    return _Shares(zone.bottom or 0, zone.top or 0, ends, blend)


def _stack_mistakes(donor: Checkpoint, asked: _Zones) -> list[Mistake]:
    """Hold what was asked for against the stacks: none, several, shared, unknown."""
    stacks = donor.layers.stacks
    shown = ", ".join(f"{stack} ({stack.count})" for stack in stacks)
    if not stacks:
        return [Mistake("", "the tensor names show no layers", "`portmanteau inspect` lists them")]
    mistakes = [
        Mistake(f"stacks.{word}", f"no stack of layers, or more than one, is called {word!r}", f"there are: {shown}")
        for word in asked.stacks
        if donor.layers.find(word) is None
    ]
    if mistakes:
        return mistakes
    named = {donor.layers.find(word) for word in asked.stacks}
    if len(stacks) > 1 and (left := [stack for stack in stacks if stack not in named]):
        hint = f"write stacks: {{{left[0]}: {{bottom: …, top: …}}}}, or {left[0]}: outside; there are: {shown}"
        return [Mistake("stacks", f"there are {len(stacks)} stacks of layers, and nothing is said of {left[0]}", hint)]
    for stack in stacks:
        own = next((zone for word, zone in asked.stacks.items() if donor.layers.find(word) == stack), Zone())
        if own != "outside":
            zone = _over(own, asked.common)
            mistakes += [
                Mistake("", f"needs {key!r}: how many layers of the language expert at the {key} of {stack}")
                for key in ("bottom", "top")
                if getattr(zone, key) is None
            ]
    config = donor.companions.config or {}
    declared = next((config[key] for key in _LAYER_COUNTS if isinstance(config.get(key), int)), None)
    if len(stacks) == 1 and declared is not None and declared != stacks[0].count:
        what = f"config.json says {declared} layers, and the tensor names show {stacks[0].count} in {stacks[0]}"
        hint = "layers that share one set of weights cannot be swapped" if declared > stacks[0].count else ""
        mistakes.append(Mistake("", what, hint))
    return mistakes


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
        which, shares = _of_module(zones[place.stack], place)
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


def _of_module(zones: ByModule, place: Place) -> tuple[str, _Shares]:
    """Give the shares that hold for a tensor, and the module that they were asked for by name (else "")."""
    which = module(place.inner)
    return (which, zones[which]) if which in zones else ("", zones[""])


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
        which, shares = _of_module(self.zones[place.stack], place)
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
