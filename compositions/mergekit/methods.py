"""How mergekit 0.1.5 spells our operators: its method names, its parameters and its defaults, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class Method:
    """One of mergekit's methods in our words.

    Attributes:
        operator: our operator.
        settings: its settings as the method has them when nothing is given: mergekit's defaults, all of them.
        parameters: mergekit's parameter → our setting.
        per_model: the mergekit parameters that each model may have its own value of.
        takes_base: `required`: deltas are taken from it; `optional`: deltas where it is given; `first`: it is one of
            the models, and the first of them; `no`: it is merged as a model like others.
        values: mergekit's parameter → its value → ours, where they are not the same.
        required: the parameters that must be given.
        without_effect: parameters that mergekit takes and that change nothing of the result (here).
        models: the least and the most models; the base counts where it is one of them. None: no limit.
        of_base: parameters that the base has of its own too, though it is apart → our setting for the base's.
        in_order: whether models are given in the order of the file, a base that is one of them too.

    """

    operator: str
    settings: Mapping[str, Any]
    parameters: Mapping[str, str]
    per_model: frozenset[str] = frozenset()
    takes_base: Literal["required", "optional", "first", "no"] = "required"
    values: Mapping[str, Mapping[Any, Any]] = field(default_factory=dict)
    required: frozenset[str] = frozenset()
    without_effect: frozenset[str] = frozenset()
    models: tuple[int, int | None] = (1, None)
    of_base: Mapping[str, str] = field(default_factory=dict)
    in_order: bool = False


_WEIGHT = frozenset({"weight"})
_DIVIDE = MappingProxyType({True: "weights", False: "none"})
_RESCALE = MappingProxyType({True: "l1", False: "none"})


def _thinning(operator: str, *, consensus: bool, normalize: bool, rescale: bool, **own: float) -> Method:
    """Describe one of the methods that thin the deltas out, and add up the rest or what agrees of it."""
    elect = {} if operator == "ties" else {"elect": "weighted" if consensus else "none"}
    choices = {"divide": _DIVIDE[normalize], "rescale": _RESCALE[rescale]}
    alike = {"weight": "weight", "density": "density", **{name: name for name in own}}
    return Method(
        operator,
        {"density": 1.0, **own, **elect, **choices, "scale": 1.0},
        {**alike, "normalize": "divide", "rescale": "rescale", "lambda": "scale"},
        per_model=frozenset(alike),
        values={"normalize": _DIVIDE, "rescale": _RESCALE},
        required=_WEIGHT,
        without_effect=frozenset({"int8_mask"}),
    )


METHODS: Mapping[str, Method] = MappingProxyType(
    {
        "linear": Method(
            "linear",
            {"normalize": True},
            {"weight": "weight", "normalize": "normalize"},
            per_model=_WEIGHT,
            takes_base="no",
            required=_WEIGHT,
        ),
        "slerp": Method("slerp", {}, {"t": "t"}, takes_base="first", required=frozenset({"t"}), models=(2, 2)),
        "nuslerp": Method(
            "nuslerp",
            {"flatten": True, "along": "last"},
            {"weight": "weight", "nuslerp_flatten": "flatten", "nuslerp_row_wise": "along"},
            per_model=_WEIGHT,
            takes_base="optional",
            values={"nuslerp_row_wise": {True: "first", False: "last"}},
            required=_WEIGHT,
            models=(2, 2),
        ),
        "multislerp": Method(
            "multislerp",
            {"normalize": True, "epsilon": 1e-8},
            {"weight": "weight", "normalize_weights": "normalize", "eps": "epsilon"},
            per_model=_WEIGHT,
            takes_base="optional",
            required=_WEIGHT,
        ),
        "karcher": Method(
            "karcher",
            {"iterations": 10, "tolerance": 1e-5},
            {"max_iter": "iterations", "tol": "tolerance"},
            takes_base="no",
        ),
        "task_arithmetic": Method(
            "task_arithmetic",
            {"normalize": False, "scale": 1.0},
            {"weight": "weight", "normalize": "normalize", "lambda": "scale"},
            per_model=frozenset({"weight", "density"}),
            required=_WEIGHT,
            without_effect=frozenset({"density", "rescale", "int8_mask"}),
        ),
        "ties": _thinning("ties", consensus=True, normalize=True, rescale=False),
        "dare_linear": _thinning("dare", consensus=False, normalize=False, rescale=True),
        "dare_ties": _thinning("dare", consensus=True, normalize=False, rescale=True),
        "della": _thinning("della", consensus=True, normalize=True, rescale=True, epsilon=0.15),
        "della_linear": _thinning("della", consensus=False, normalize=False, rescale=True, epsilon=0.15),
        "breadcrumbs": _thinning("breadcrumbs", consensus=False, normalize=False, rescale=False, gamma=0.01),
        "breadcrumbs_ties": _thinning("breadcrumbs", consensus=True, normalize=False, rescale=False, gamma=0.01),
        "sce": Method(
            "sce",
            {"density": 1.0, "uniform_below": 1e-6},
            {"select_topk": "density"},
            without_effect=frozenset({"int8_mask"}),
        ),
        "ram": Method("ram", {"epsilon": 1e-5, "r": 0.0, "alpha": 0.2}, {"epsilon": "epsilon"}),
        "ramplus_tl": Method(
            "ram",
            {"epsilon": 1e-5, "r": 0.1, "alpha": 0.2},
            {"epsilon": "epsilon", "r": "r", "alpha": "alpha"},
        ),
        "model_stock": Method("model_stock", {"filter_wise": False}, {"filter_wise": "filter_wise"}, models=(2, None)),
        "nearswap": Method("nearswap", {}, {"t": "t"}, required=frozenset({"t"}), models=(1, 1)),
        "arcee_fusion": Method("arcee_fusion", {}, {}, models=(1, 1)),
        "passthrough": Method(
            "copy",
            {"factor": 1.0},
            {"scale": "factor"},
            per_model=frozenset({"scale"}),
            takes_base="no",
            values={"scale": {None: 1.0}},
            models=(1, 1),
        ),
    }
)
