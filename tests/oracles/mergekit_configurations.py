"""mergekit configurations, generated: each method with its parameters in every form, written at any of the levels."""

from __future__ import annotations

import itertools
import random
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NAMES = ("base", "a", "b")


@dataclass(frozen=True)
class Kind:
    """One method's parameters to try: name → least and greatest value, of each model or of all."""

    own: Mapping[str, tuple[float, float]]
    common: Mapping[str, tuple[float, float]]
    base: str  # "needed", "none", or "either"
    models: int = 2  # beside the base
    fixed: Mapping[str, Any] | None = None


WEIGHT = {"weight": (0.2, 0.9)}
DENSITY = {"density": (0.4, 0.9)}
LAMBDA = {"lambda": (0.5, 1.5)}
KINDS: dict[str, Kind] = {
    "linear": Kind(WEIGHT, {}, "either"),
    "slerp": Kind({}, {"t": (0.0, 1.0)}, "needed", models=1),
    "nuslerp": Kind(WEIGHT, {}, "either"),
    "multislerp": Kind(WEIGHT, {}, "either"),
    "karcher": Kind({}, {"tol": (1e-9, 1e-8)}, "none"),
    "task_arithmetic": Kind(WEIGHT, LAMBDA, "needed"),
    "ties": Kind({**WEIGHT, **DENSITY}, LAMBDA, "needed"),
    "dare_linear": Kind(WEIGHT, LAMBDA, "needed"),
    "dare_ties": Kind(WEIGHT, LAMBDA, "needed"),
    "breadcrumbs": Kind({**WEIGHT, **DENSITY, "gamma": (0.0, 0.1)}, LAMBDA, "needed"),
    "breadcrumbs_ties": Kind({**WEIGHT, **DENSITY, "gamma": (0.0, 0.1)}, LAMBDA, "needed"),
    "sce": Kind({}, {"select_topk": (0.3, 0.9)}, "needed"),
    "ram": Kind({}, {"epsilon": (0.01, 0.1)}, "needed"),
    "ramplus_tl": Kind({}, {"epsilon": (0.01, 0.1), "r": (0.1, 0.5)}, "needed"),
    "model_stock": Kind({}, {}, "needed", fixed={"filter_wise": True}),
    "nearswap": Kind({}, {"t": (0.001, 0.1)}, "needed", models=1),
    "arcee_fusion": Kind({}, {}, "needed", models=1),
    "passthrough": Kind({"scale": (0.3, 2.0)}, {}, "none", models=1),
}
FORMS = ("scalar", "gradient", "filter", "both")
LAYOUTS = ("models", "slices", "modules")
_WORDS = ("mlp", "self_attn", "attention.self", "attn", "SelfAttention", "norm", "embed", ".1.", "layer", "weight")


@dataclass(frozen=True)
class Architecture:
    """What the configurations for one architecture need to know of it, and where results differ on purpose.

    Attributes:
        modules: mergekit's modules of it, and how many layers each has (0: none).
        aligned: in a slice, take the same layers of all models.
        not_compared: what is no matter of comparison: where (in `slices` or in `gradients`), a pattern of tensor names,
            and the key of the difference.
        lists: keys of config.json that mergekit leaves as long as they were.
        fails: the words with which mergekit ends on slices, after it has written the weights.

    """

    modules: Mapping[str, int]
    aligned: bool = False
    not_compared: tuple[str, str, str] = ("", "", "")
    lists: tuple[str, ...] = ()
    fails: str = ""

    @property
    def single(self) -> bool:
        """Tell whether it has one module, so that `slices` may stand at the top."""
        return len(self.modules) == 1


@dataclass(frozen=True)
class Case:
    """One configuration, by what it is generated from."""

    family: str
    method: str
    form: str
    layout: str
    base: bool

    def __str__(self) -> str:
        """The case as pytest names it."""
        return "-".join([self.family, self.method, self.form, self.layout, *(["base"] if self.base else [])])


def cases(families: Mapping[str, Architecture], *, every: bool = False) -> Iterator[Case]:
    """Go through the cases: each method in each form and layout; for all families, or for one of them in turn."""
    turn = itertools.cycle(families)
    for method, kind in KINDS.items():
        forms = FORMS if kind.own or kind.common else FORMS[:1]
        bases = {"needed": (True,), "none": (False,), "either": (True, False)}[kind.base]
        for form, layout, base in itertools.product(forms, LAYOUTS, bases):
            for family in families if every else [next(turn)]:
                yield Case(family, method, form, layout, base)
        next(turn)


def configuration(case: Case, architecture: Architecture, folder: Path) -> dict[str, Any]:
    """Write the configuration of a case, over the models base, a and b in a folder."""
    return _Writer(case, folder).configuration(architecture)


class _Draw:
    """Random values of a parameter, in one of the forms, the same for the same case."""

    def __init__(self, case: str, form: str) -> None:
        self.random = random.Random(zlib.crc32(case.encode()))
        self._form = form

    def value(self, bounds: tuple[float, float]) -> float:
        return round(self.random.uniform(*bounds), 4) if bounds[1] > 1e-3 else self.random.uniform(*bounds)

    def gradient(self, bounds: tuple[float, float]) -> list[float]:
        return [self.value(bounds) for _ in range(self.random.choice((2, 3, 5)))]

    def parameter(self, bounds: tuple[float, float]) -> Any:
        """Give one value, a gradient, or filters over either."""
        if self._form == "scalar":
            return self.value(bounds)
        if self._form == "gradient":
            return self.gradient(bounds)
        inner = self.value if self._form == "filter" else self.gradient
        words = self.random.sample(_WORDS, 3)
        return [*({"filter": word, "value": inner(bounds)} for word in words), {"value": inner(bounds)}]

    def open_filters(self, bounds: tuple[float, float]) -> Any:
        """Give filters that do not fit every tensor: the next level holds for the others."""
        words = ("q_proj", "query", "down_proj", "c_attn", "wi_0", "norm")
        return [{"filter": word, "value": self.value(bounds)} for word in words]

    def chance(self, share: float) -> bool:
        return self.random.random() < share


class _Writer:
    """Writes one configuration: parameters of models at their sources or above, common ones at the slice or above."""

    def __init__(self, case: Case, folder: Path) -> None:
        self._case, self._kind, self._folder = case, KINDS[case.method], folder
        self._draw = _Draw(f"{case.method} {case.form} {case.layout} {case.base}", case.form)
        self._aligned = False
        self._labels = [*(["base"] if case.base else []), *NAMES[1 : 1 + self._kind.models]]
        self._draw.random.shuffle(self._labels)

    def configuration(self, architecture: Architecture) -> dict[str, Any]:
        case, kind, draw = self._case, self._kind, self._draw
        self._aligned = architecture.aligned
        parameters = {**kind.own, **kind.common}
        top = dict(kind.fixed or {}) | {name: draw.parameter(bounds) for name, bounds in parameters.items()}
        config: dict[str, Any] = {"merge_method": case.method, "dtype": "float32"}
        (first, depth), *_ = architecture.modules.items()
        if case.layout == "models":
            config["models"] = self._models()
        elif case.layout == "slices" and architecture.single:
            config["slices"] = self._slices(depth)
        elif architecture.single:
            config["modules"] = {first: draw.random.choice((self._module_of_models, self._module_of_slices))(depth)}
        else:
            sliced = case.layout == "slices"
            config["modules"] = {
                name: self._module_of_slices(depth) if depth and (sliced or draw.chance(0.5)) else self._module()
                for name, depth in architecture.modules.items()
            }
        if case.base:
            config["base_model"] = str(self._folder / "base")
        return {**config, **({"parameters": top} if top else {})}

    def _module(self) -> dict[str, Any]:
        return self._module_of_models(0)

    def _module_of_models(self, _: int) -> dict[str, Any]:
        return {"models": self._models(), **self._level()}

    def _module_of_slices(self, depth: int) -> dict[str, Any]:
        return {"slices": self._slices(depth), **self._level()}

    def _models(self) -> list[dict[str, Any]]:
        listed = list(self._labels)
        if self._case.base and self._draw.chance(0.5):
            listed.remove("base")  # then it is added
        return [{"model": str(self._folder / label), **self._own(label)} for label in listed]

    def _slices(self, depth: int) -> list[dict[str, Any]]:
        slices = []
        for count in (min(3, depth), 1, 2):
            sources = []
            common = self._draw.random.randint(0, depth - count)
            for label in self._labels:
                first = common if self._aligned else self._draw.random.randint(0, depth - count)
                source = {"model": str(self._folder / label), "layer_range": [first, first + count]}
                sources.append({**source, **self._own(label)})
            slices.append({"sources": sources, **self._level()})
        return slices

    def _level(self) -> dict[str, Any]:
        """Write parameters common to all models for a slice or a module, or none."""
        common = self._kind.common
        level = {name: self._draw.open_filters(common[name]) for name in common if self._draw.chance(0.4)}
        return {"parameters": level} if level else {}

    def _own(self, label: str) -> dict[str, Any]:
        """Write parameters of one model, or none."""
        if label == "base" and self._case.method != "linear":
            return {}
        names = [name for name in self._kind.own if self._draw.chance(0.7)]
        wide = {name: self._draw.open_filters if self._draw.chance(0.3) else self._draw.parameter for name in names}
        found = {name: write(self._kind.own[name]) for name, write in wide.items()}
        return {"parameters": found} if found else {}
