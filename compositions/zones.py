"""Which layers of a stack are one model's and which another's: what a recipe asks for, against the layers there are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar, Literal, Protocol

from pydantic import Field

from portmanteau.merge import MergeError
from portmanteau.merge.companions import Companions
from portmanteau.merge.errors import Mistake
from portmanteau.merge.names import Layers, Place, Stack, module

Count = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Module = Literal["attention", "mlp", "norm"]
Side = Literal["task", "language", "blend"]
_STRICT: Any = {"extra": "forbid"}
_LAYER_COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")


class Layered(Protocol):
    """What has layers to share out: a checkpoint, or a model that is being trained."""

    @property
    def layers(self) -> Layers:
        """The stacks of layers, learned from the names."""

    @property
    def companions(self) -> Companions:
        """What goes with the weights; the config may count the layers."""


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


Transition = Annotated[Count | Ends, Field(description="layers that mix both, next to each of these")]
Modules = Annotated[Mapping[Module, Zone] | None, Field(description="other numbers for attention, mlp or norm tensors")]
Stacks = Annotated[
    Mapping[str, Zone | Literal["outside"]] | None,
    Field(description="numbers for each stack of layers, where there are several (encoder, decoder)"),
]


@dataclass(frozen=True)
class Shares:
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


ByModule = Mapping[str, Shares]  # "" stands for every module that is not named


@dataclass(frozen=True)
class Asked:
    """What a recipe asks for: common numbers, and others by module and by stack."""

    common: Zone
    modules: Mapping[Module, Zone] = field(default_factory=dict)
    stacks: Mapping[str, Zone | Literal["outside"]] = field(default_factory=dict)

    def of(self, stack: Stack, donor: Layered) -> Zone | None:
        """Give the numbers for a stack; None: it is left to the outside."""
        own = next((zone for word, zone in self.stacks.items() if donor.layers.find(word) == stack), Zone())
        return None if own == "outside" else _over(own, self.common)


def resolve(donor: Layered, asked: Asked) -> dict[Stack, ByModule]:
    """Share out every stack that is not left to the outside. Raises MergeError with all mistakes."""
    mistakes = _unclear(donor, asked) or [*_missing(donor, asked), *_shared_layers(donor)]
    if mistakes:
        raise MergeError.of(mistakes)
    result: dict[Stack, ByModule] = {}
    for stack in donor.layers.stacks:
        zone = asked.of(stack, donor)
        if zone is not None:
            result[stack] = {"": _shares(zone), **{m: _shares(_over(z, zone)) for m, z in asked.modules.items()}}
    mistakes = [
        _too_many(stack, which, shares)
        for stack, zones in result.items()
        for which, shares in zones.items()
        if shares.needed() > stack.count
    ]
    if mistakes:
        raise MergeError.of(mistakes)
    return result


def _too_many(stack: Stack, which: str, shares: Shares) -> Mistake:
    mixed = shares.needed() - shares.bottom - shares.top
    asked = f"bottom {shares.bottom} + top {shares.top} + transitions {mixed} = {shares.needed()}"
    name = f"{stack} ({which})" if which else f"{stack}"
    hint = "ask for fewer; transition: 0 leaves out the mixed layers"
    return Mistake("bottom", f"{name} has {stack.count} layers, and {asked} are asked for", hint)


def _over(zone: Zone, common: Zone) -> Zone:
    """Fill the open keys of a zone from a wider one."""
    given = {key: value for key, value in vars(zone).items() if value is not None}
    return replace(common, **given)


def _shares(zone: Zone) -> Shares:
    ends = zone.transition if isinstance(zone.transition, Ends) else Ends(zone.transition or 0, zone.transition or 0)
    blend = 0.5 if zone.blend is None else zone.blend
    return Shares(zone.bottom or 0, zone.top or 0, ends, blend)


def _unclear(donor: Layered, asked: Asked) -> list[Mistake]:
    """Find what makes it unclear which stacks are meant: none there, unknown names, nothing said of one of several."""
    stacks = donor.layers.stacks
    shown = ", ".join(f"{stack} ({stack.count})" for stack in stacks)
    if not stacks:
        return [Mistake("", "the tensor names show no layers", "`portmanteau inspect` lists them")]
    named = {word: donor.layers.find(word) for word in asked.stacks}
    unknown = [word for word, stack in named.items() if stack is None]
    if unknown:
        what = "no stack of layers, or more than one, is called"
        return [Mistake(f"stacks.{word}", f"{what} {word!r}", f"there are: {shown}") for word in unknown]
    left = [stack for stack in stacks if stack not in named.values()]
    if len(stacks) > 1 and left:
        hint = f"write stacks: {{{left[0]}: {{bottom: …, top: …}}}}, or {left[0]}: outside; there are: {shown}"
        return [Mistake("stacks", f"there are {len(stacks)} stacks of layers, and nothing is said of {left[0]}", hint)]
    return []


def _missing(donor: Layered, asked: Asked) -> list[Mistake]:
    """Find the numbers that nothing says."""
    zones = {stack: asked.of(stack, donor) for stack in donor.layers.stacks}
    return [
        Mistake("", f"needs {key!r}: how many layers of the language expert at the {key} of {stack}")
        for stack, zone in zones.items()
        for key in ("bottom", "top")
        if zone is not None and getattr(zone, key) is None
    ]


def _shared_layers(donor: Layered) -> list[Mistake]:
    """Find a model whose config counts other layers than its tensors show, as where layers share their weights."""
    stacks, config = donor.layers.stacks, donor.companions.config or {}
    declared = next((config[key] for key in _LAYER_COUNTS if isinstance(config.get(key), int)), None)
    if len(stacks) != 1 or declared is None or declared == stacks[0].count:
        return []
    what = f"config.json says {declared} layers, and the tensor names show {stacks[0].count} in {stacks[0]}"
    hint = "layers that share one set of weights cannot be swapped" if declared > stacks[0].count else ""
    return [Mistake("", what, hint)]


def of_module(zones: ByModule, place: Place) -> tuple[str, Shares]:
    """Give the shares that hold for a tensor, and the module that they were asked for by name (else "")."""
    which = module(place.inner)
    return (which, zones[which]) if which in zones else ("", zones[""])
