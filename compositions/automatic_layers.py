"""Layers chosen by a survey: each layer, or its attention and mlp apart, from the expert that changed it more."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from portmanteau.merge import Survey
from portmanteau.merge.dtypes import is_float
from portmanteau.merge.names import Layers, Place, Stack, module
from portmanteau.merge.node import Finding, Inputs
from portmanteau.merge.surveys import weights_by_change

from .matching import Matching

By = Literal["layer", "module"]
_MATRIX = 2
_TITLES = {"layer": "shares of change of the layers in {}", "module": "shares of change of attention and mlp in {}"}
_POWERS = {"layer": 1, "module": 2}  # how the code of 2601.22620 adds up the matrices of a layer, and of a module


@dataclass(frozen=True)
class Automatic:
    """What will be found for every layer, or for its modules: the weights of the language and the task expert."""

    by: By
    findings: Mapping[tuple[Stack, str], Finding]

    def of(self, place: Place) -> Finding | None:
        """Give what decides about a tensor; None where no matrix shows a change, as in norms beside the modules."""
        return self.findings.get((place.stack, _key(place, self.by)))


def by_change(matching: Matching, layers: Layers, *, by: By, threshold: float, blend: float) -> Automatic:
    """Plan, for every stack, the survey that gives each layer (or module) to the expert which changed it more."""
    groups: dict[Stack, dict[tuple[str, str], tuple[Inputs]]] = {}
    for name, met in matching.tensors.items():
        place = layers.place(name)
        if place is not None and met.complete and is_float(met.spec.dtype) and len(met.spec.shape) == _MATRIX:
            pair = (met.nodes["language"], met.nodes["task"])
            groups.setdefault(place.stack, {})[_key(place, by), place.inner] = (Inputs(pair, met.nodes["base"]),)
    settings = {"threshold": threshold, "blend": blend, "power": _POWERS[by]}
    surveys = {
        stack: Survey(_TITLES[by].format(stack), weights_by_change, inputs, settings)
        for stack, inputs in groups.items()
    }
    findings = {(stack, key): Finding(surveys[stack], key) for stack, inputs in groups.items() for key, _ in inputs}
    return Automatic(by, findings)


def _key(place: Place, by: By) -> str:
    """Name what is chosen as a whole, as the receipt shows it: `3`, or `3 attention`."""
    return f"{place.layer}" if by == "layer" else f"{place.layer} {_travels_with(place.inner)}"


def _travels_with(inner: str) -> str:
    """Tell with which module of its layer a tensor is swapped: biases, and norms inside attention, go with it.

    >>> _travels_with("self_attn.q_proj.bias"), _travels_with("self_attn.q_norm.weight"), _travels_with("norm.weight")
    ('attention', 'attention', 'norm')
    """
    which, around = module(inner), inner.rsplit(".", 2)
    return "attention" if which == "norm" and len(around) > 2 and module(around[0]) == "attention" else which
