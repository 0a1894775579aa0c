"""One operator over every tensor of several checkpoints, with settings that change over depth and by tensor name."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from portmanteau.merge import Checkpoint, Composed, MergeError, Operator, Step
from portmanteau.merge.dtypes import is_float, is_packed
from portmanteau.merge.errors import Mistake, nearest, some
from portmanteau.merge.names import Place, matches
from portmanteau.merge.node import Inputs
from portmanteau.merge.operator import Setting
from portmanteau.merge.registry import exists, find, operators, unknown

from .components import part_of
from .matching import Met, match

Path = tuple[str | int, ...]
_CHOICE = "choices by tensor name: [{tensors: PATTERN, value: …}, …, {value: …}]"


@dataclass(frozen=True)
class Rule:
    """What is done otherwise with the tensors that a pattern names. The first rule that fits a tensor holds for it.

    Attributes:
        tensors: a shell pattern on output names; `|` separates alternatives.
        operator: another operator for them.
        models: only these of the models, by their names.
        settings: settings for them; they win over all others.
        why: the recipe line.

    """

    tensors: str
    operator: str | None = None
    models: tuple[str, ...] | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    why: str = ""


def tensorwise(
    operator: str,
    *,
    models: Mapping[str, Checkpoint],
    base: Checkpoint | None = None,
    settings: Mapping[str, Any] | None = None,
    rules: Sequence[Rule] = (),
    unmatched: str = "error",
    only: str | None = None,
) -> Composed:
    """Apply one operator to every tensor of the models.

    A setting is one value; a list, as a gradient over depth (numbers are interpolated between the first and the last
    layer of a stack; tensors outside the layers take the first); choices by tensor name, of which the first that fits
    holds, `[{tensors: PATTERN, value: …}, …, {value: …}]`; or, where it is a matter of each model, a mapping from the
    models' names to any of these. Tensors that are no floats must be equal in all models.

    Args:
        operator: its name.
        models: the models, by the names that settings, rules and random streams know them by; their order is kept.
        base: what deltas are taken from, for operators on deltas.
        settings: the operator's settings.
        rules: exceptions by tensor name.
        unmatched: `error`, `keep` or `drop` tensors that not every model has.
        only: merge one component of the models, such as `text_decoder`, and leave the others out: for `assemble`.

    >>> import torch
    >>> from portmanteau.merge import InMemory
    >>> base, math = (InMemory(x, {"weight": torch.tensor([y])}) for x, y in (("base", 1.0), ("math", 3.0)))
    >>> tensorwise("task_arithmetic", models={"math": math}, base=base, settings={"weight": 0.5})["weight"]
    tensor([2.])

    Raises MergeError with all mistakes found: settings, names, shapes.
    """
    mistakes = list(check(operator, list(models), base is not None, settings or {}, rules))
    if mistakes:
        raise MergeError.of(Mistake(_dotted(path), what, hint) for path, what, hint in mistakes)
    whole = {**({base_label(models): base} if base is not None else {}), **models}
    every = whole if only is None else {label: part_of(model, only) for label, model in whole.items()}
    reference = next(iter(every))
    matching = match(every, reference, unmatched)
    job = Job(tuple(models), reference if base is not None else None, operator, settings or {}, tuple(rules))
    layers = every[reference].layers
    places = {name: layers.place(name) for name in matching.tensors}
    depths = {name: place.depth if place else 0.0 for name, place in places.items()}
    nodes = {name: job.step(met, depths[name]) for name, met in matching.tensors.items()}
    refuse_packed(nodes)
    names = {name for model in whole.values() for name in model.specs}
    notes = (*matching.notes, *unused([job], names | nodes.keys()))
    return Composed(operator, nodes, every[reference].companions, notes)


def refuse_packed(steps: Mapping[str, Step]) -> None:
    """Refuse to compute with quantised tensors. Raises MergeError."""
    packed = [name for name, step in steps.items() if not step.is_copy and is_packed(step.output.dtype)]
    if packed:
        hint = "merge the models before they are quantised, or take these from one of them: a rule with operator: copy"
        raise MergeError("", f"{len(packed)} quantised tensors cannot be merged: {some(packed)}", hint)


def check(
    operator: str, models: Sequence[str], has_base: bool, settings: Mapping[str, Any], rules: Sequence[Rule]
) -> Iterator[tuple[Path, str, str]]:
    """Find what is wrong with settings and rules: where (a path of keys), what, and a hint."""
    if not exists(operator):
        yield (), f"unknown operator {operator!r}", unknown(operator, operators())
        return
    yield from _check_operator((), find(operator), models, has_base)
    common = list(_check_settings((), find(operator), settings, models, required=True))
    yield from common
    for i, rule in enumerate(rules):
        path = ("rules", i)
        name = rule.operator or operator
        if not exists(name):
            yield (*path, "operator"), f"unknown operator {name!r}", unknown(name, operators())
            continue
        for label in rule.models or ():
            if label not in models:
                yield (*path, "models"), f"unknown model {label!r}", nearest(label, models)
        if rule.operator or rule.models:
            yield from _check_operator(path, find(name), rule.models or models, has_base)
        inherited = {} if rule.operator is None or common else _inherited(find(operator), find(name), settings)
        yield from _check_settings(path, find(name), {**inherited, **rule.settings}, models, rule.operator is not None)


def _inherited(one: Operator, other: Operator, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Give the settings of one operator that another takes too, under other bounds."""
    both = {key: value for key, value in settings.items() if key in one.settings and key in other.settings}
    return {key: value for key, value in both.items() if one.settings[key].annotation != other.settings[key].annotation}


def _check_operator(
    path: Path, operator: Operator, models: Sequence[str], has_base: bool
) -> Iterator[tuple[Path, str, str]]:
    if "importances" in operator.roles:
        yield path, f"{operator.name} takes an importance for each model's entries", "use the composition fisher"
    if operator.needs_base and not has_base:
        yield path, f"{operator.name} needs a base", "add base: the model that the others were trained from"
    if not path and has_base and not operator.takes_base:
        yield ("base",), f"{operator.name} takes no base", "list it among the models if it is to be merged"
    if not models:
        yield ("models",), f"{operator.name} has no models to merge", ""
    elif operator.takes is not None and len(models) != operator.takes:
        yield (*path, "models"), f"{operator.name} takes exactly {operator.takes} models, {len(models)} are given", ""


def _check_settings(
    path: Path, operator: Operator, settings: Mapping[str, Any], models: Sequence[str], required: bool
) -> Iterator[tuple[Path, str, str]]:
    for key, value in settings.items():
        setting = operator.settings.get(key)
        if setting is None:
            yield (*path, key), f"{operator.name} has no setting {key!r}", nearest(key, operator.settings)
            continue
        if wrong := list(_choices(setting, value)):
            yield from (((*path, key, *inner), what, _CHOICE) for inner, what in wrong)
            continue
        for inner, one in _single_values(setting, value):
            if inner and isinstance(inner[0], str) and inner[0] not in models:
                yield (*path, key, *inner), f"unknown model {inner[0]!r}", nearest(inner[0], models)
            try:
                setting.check(one)
            except ValidationError as error:
                what = f"{key} is {one!r}: {error.errors()[0]['msg'].lower()}"
                yield (*path, key, *inner), what, f"{key}: {setting.type_name}"
    for setting in operator.settings.values():
        if required and setting.required and setting.name not in settings:
            yield path, f"{operator.name} needs {setting.name!r}", setting.description


def _single_values(setting: Setting, value: Any, inner: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Go through the single values in a gradient or in a mapping from models to values."""
    if isinstance(value, Mapping) and setting.per_model and not inner:
        for label, one in value.items():
            yield from _single_values(setting, one, (label,))
    elif by_name(value):
        for i, choice in enumerate(value):
            yield from _single_values(setting, choice["value"], (*inner, i, "value"))
    elif isinstance(value, list | tuple) and value:
        yield from (((*inner, i), one) for i, one in enumerate(value))
    else:
        yield inner, value


def by_name(value: Any) -> bool:
    """Tell whether a value is choices by tensor name: a list of mappings."""
    return isinstance(value, list | tuple) and bool(value) and all(isinstance(one, Mapping) for one in value)


def _choices(setting: Setting, value: Any, inner: Path = ()) -> Iterator[tuple[Path, str]]:
    """Find what is wrong with the form of choices by tensor name."""
    if isinstance(value, Mapping) and setting.per_model and not inner:
        for label, one in value.items():
            yield from _choices(setting, one, (label,))
    if not by_name(value):
        return
    for i, choice in enumerate(value):
        for key in choice.keys() - {"tensors", "value"}:
            yield (*inner, i, key), f"unknown key {key!r}"
        if "value" not in choice or by_name(choice["value"]):
            yield (*inner, i), f"a choice of {setting.name} lacks its value"
        if not isinstance(choice.get("tensors", ""), str):
            yield (*inner, i, "tensors"), f"{choice['tensors']!r} is no pattern"
    if setting.required and "tensors" in value[-1]:
        yield inner, f"{setting.name} has no value where no pattern fits"


def step_on_deltas(operator: str, settings: Mapping[str, Any], met: Met, place: Place | None) -> Step:
    """Make the step of one operator over tensors that are deltas already; settings as `tensorwise` takes them."""
    return Job(tuple(met.nodes), None, operator, settings, ()).step(met, place.depth if place else 0.0)


@dataclass(frozen=True)
class Job:
    """What is asked for, apart from any one tensor."""

    models: tuple[str, ...]
    base: str | None
    operator: str
    settings: Mapping[str, Any]
    rules: tuple[Rule, ...]
    why: str = ""

    def step(self, met: Met, depth: float) -> Step:
        """Make the step for one output tensor at a depth from 0 to 1; 0 outside the layers."""
        if not met.complete:
            return met.kept()
        rule = next((rule for rule in self.rules if matches(rule.tensors, met.spec.name)), None)
        operator = find(rule.operator if rule and rule.operator else self.operator)
        labels = rule.models if rule and rule.models else self.models
        why = rule.why if rule else self.why
        models = tuple(met.nodes[label] for label in labels)
        if not is_float(met.spec.dtype) and operator.name != "copy":
            return Step(met.spec, find("equal"), {}, Inputs(models), labels, why)
        base = met.nodes[self.base] if self.base is not None and operator.takes_base else None
        settings = {s.name: self._value(s, rule, labels, met, depth) for s in operator.settings.values()}
        if not is_float(met.spec.dtype) and not is_packed(met.spec.dtype):
            settings = {}  # counters and the like are never multiplied
        return Step(met.spec, operator, settings, Inputs(models, base), labels, why)

    def _value(self, setting: Setting, rule: Rule | None, labels: tuple[str, ...], met: Met, depth: float) -> Any:
        """Resolve one setting: the rule's, else the recipe's, else the default; for each model and at this depth.

        Choices see the tensor's name in the result; in what is given for each model, the name that it has there.
        """
        given: Any = self.settings.get(setting.name, setting.default)
        if rule is not None and setting.name in rule.settings:
            given = rule.settings[setting.name]
        if not setting.per_model:
            return setting.check(at_depth(chosen(given, met.spec.name, setting.default), depth))
        of_each = [given.get(label, setting.default) if isinstance(given, Mapping) else given for label in labels]
        names = [met.nodes[label].output.name for label in labels]
        found = [chosen(one, name, setting.default) for one, name in zip(of_each, names, strict=True)]
        return tuple(setting.check(at_depth(one, depth)) for one in found)


def chosen(value: Any, name: str, default: Any) -> Any:
    """Choose a value by a tensor's name: of choices, the first whose pattern fits.

    >>> chosen([{"tensors": "*mlp*", "value": 0.5}, {"value": 1.0}], "model.norm.weight", 0.0)
    1.0
    """
    if not by_name(value):
        return value
    return next((choice["value"] for choice in value if matches(choice.get("tensors", "*"), name)), default)


def at_depth(value: Any, depth: float) -> Any:
    """Read a gradient at a depth from 0 to 1: numbers piecewise linearly, anything else in steps.

    >>> at_depth([0.0, 1.0, 0.0], 0.25), at_depth(["none", "weighted"], 0.9), at_depth(0.3, 0.9)
    (0.5, 'none', 0.3)
    """
    if not isinstance(value, list | tuple):
        return value
    position = depth * (len(value) - 1)
    low = int(position)
    if low == len(value) - 1 or any(isinstance(one, bool) or not isinstance(one, int | float) for one in value):
        return value[low]
    share = position - low
    return value[low] * (1 - share) + value[low + 1] * share


def unused(jobs: Iterable[Job], names: Collection[str]) -> list[str]:
    """Note the patterns that fit no tensor of these names: of rules, and of choices by name."""
    patterns = [rule.tensors for job in jobs for rule in job.rules]
    patterns += [found for job in jobs for value in job.settings.values() for found in _patterns(value)]
    idle = [one for one in dict.fromkeys(patterns) if not any(matches(one, name) for name in names)]
    return [f"no tensor is called {pattern}: what is asked for it changes nothing" for pattern in idle]


def _patterns(value: Any) -> Iterator[str]:
    """Go through the patterns of choices, of all models or of each."""
    if isinstance(value, Mapping):
        yield from (found for one in value.values() for found in _patterns(one))
    elif by_name(value):
        yield from (choice["tensors"] for choice in value if "tensors" in choice)


def base_label(models: Mapping[str, Any]) -> str:
    """Name the base beside models of these names."""
    return "base" if "base" not in models else "the base"


def _dotted(path: Path) -> str:
    return ".".join(str(part) for part in path)
