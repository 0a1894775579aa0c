"""mergekit's `parameters` as settings of ours: which level's value holds, for which tensors, and under which name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from portmanteau.merge.errors import nearest
from portmanteau.merge.registry import find

from ..recipe.lined import Lined, plain
from ..recipe.lines import KeyPath
from .methods import Method

Wrong = Callable[..., None]  # of (path, what, hint)
_CONDITION = ("value", "filter")


@dataclass(frozen=True)
class Level:
    """One `parameters:` mapping, and where it stands."""

    values: Mapping[str, Any]
    path: KeyPath

    @classmethod
    def of(cls, holder: Mapping[str, Any], path: KeyPath, wrong: Wrong) -> Level:
        """Read the `parameters` of a document, module, slice, source or model; none are empty ones."""
        value = holder.get("parameters")
        if value is not None and not isinstance(value, Mapping):
            wrong((*path, "parameters"), "parameters is no mapping from names to values", "")
            value = None
        return cls(value or {}, (*path, "parameters"))


@dataclass(frozen=True)
class Parameters:
    """The parameters of one method, and how mistakes in them, and what has no effect, are told."""

    name: str
    method: Method
    wrong: Wrong
    note: Callable[[KeyPath, str], None]

    def refuse_unknown(self, level: Level, *, of_model: bool = False, of_base: bool = False) -> None:
        """Refuse what the method does not know, or does not know of one model; note what the base does not need."""
        known = (*self.method.parameters, *self.method.without_effect)
        for key in level.values:
            if key not in known:
                self.wrong((*level.path, key), f"{self.name} has no parameter {key!r}", nearest(key, known))
            elif of_base and key not in self.method.of_base:
                self.note((*level.path, key), f"{key} of the base_model has no effect in {self.name}")
            elif of_model and not of_base and key not in self.method.per_model | self.method.without_effect:
                hint = "write it into the parameters of the slice or of the whole file"
                self.wrong((*level.path, key), f"{key} is no matter of one model in {self.name}", hint)

    def settings(
        self, shared: Sequence[Level], own: Mapping[str, Level], where: Mapping[str, KeyPath]
    ) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
        """Give our settings: those common to all models, and each model's own.

        Args:
            shared: the levels above the models, the nearest first.
            own: each model's level.
            where: each model's place, for what it lacks.

        """
        common: dict[str, Any] = {}
        of_each: dict[str, dict[str, Any]] = {label: {} for label in own}
        for parameter, setting in self.method.parameters.items():
            if parameter not in self.method.per_model:
                value = self._value(parameter, shared, next(iter(where.values()), ()))
                if value is not None:
                    common[setting] = value
                continue
            values = {label: self._value(parameter, (level, *shared), where[label]) for label, level in own.items()}
            first = next(iter(values.values()), None)
            if all(plain(value) == plain(first) for value in values.values()):
                if first is not None:
                    common[setting] = first
                continue
            for label, value in values.items():
                of_each[label][setting] = value if value is not None else self.method.settings.get(setting)
        defaults = {key: value for key, value in self.method.settings.items() if key not in self._per_model_names}
        common = {**{key: value for key, value in defaults.items() if key not in common}, **common}
        return self._told(common), of_each

    def of_base(self, levels: Sequence[Level], where: KeyPath) -> dict[str, Any]:
        """Give our settings of the base's own: the nearest level first, its own before those above the models."""
        found = {setting: self._value(name, levels, where) for name, setting in self.method.of_base.items()}
        return self._told({setting: value for setting, value in found.items() if value is not None})

    @property
    def _per_model_names(self) -> set[str]:
        """Our names of the settings that each model may have its own of: their defaults are filled in already."""
        return {self.method.parameters[name] for name in self.method.per_model if name in self.method.parameters}

    def _told(self, common: Mapping[str, Any]) -> dict[str, Any]:
        """Leave out what our operator does by default."""
        defaults = {name: setting.default for name, setting in find(self.method.operator).settings.items()}
        return {key: value for key, value in common.items() if key not in defaults or plain(value) != defaults[key]}

    def _value(self, parameter: str, levels: Sequence[Level], where: KeyPath) -> Any:
        """Give what holds for one parameter, as one value or as choices by tensor name; None: nothing is given."""
        choices: list[dict[str, Any]] = []
        for level in levels:
            for condition, value, path in self._conditions(parameter, level):
                one = Lined(self._ours(parameter, value, path), path)
                if condition is None:
                    return Lined([*choices, {"value": one}], path) if choices else one
                choices.append({"tensors": Lined(_pattern(condition), path), "value": one})
        if parameter in self.method.required:
            lacks = "has no value for tensors that no filter fits" if choices else "is not given"
            self.wrong(where, f"{self.name} needs the parameter {parameter!r}, which {lacks}", broken=True)
        default = self.method.settings.get(self.method.parameters[parameter])
        return [*choices, *([{"value": default}] if default is not None else [])] if choices else default

    def _conditions(self, parameter: str, level: Level) -> list[tuple[str | None, Any, KeyPath]]:
        """Read one level's value: a filter (None: no condition), the value, and its place."""
        if parameter not in level.values:
            return []
        value, path = level.values[parameter], (*level.path, parameter)
        if isinstance(value, Mapping):
            return self._condition(value, path)
        if isinstance(value, list) and any(isinstance(one, Mapping) for one in value):
            return [found for i, one in enumerate(value) for found in self._condition(one, (*path, i))]
        return [(None, value, path)] if value != [] else []

    def _condition(self, value: Any, path: KeyPath) -> list[tuple[str | None, Any, KeyPath]]:
        if not isinstance(value, Mapping) or "value" not in value:
            self.wrong(path, f"{plain(value)!r} is no {{filter: …, value: …}}", "")
            return []
        for key in value:
            if key not in _CONDITION:
                self.wrong((*path, key), f"unknown key {key!r}", nearest(key, _CONDITION))
        condition = value.get("filter")
        if condition is not None and (not isinstance(condition, str) or "|" in condition):
            self.wrong((*path, "filter"), f"{condition!r} is no part of a tensor name", "")
            return []
        return [(None if condition in (None, "*") else condition, value["value"], (*path, "value"))]

    def _ours(self, parameter: str, value: Any, path: KeyPath) -> Any:
        """Put our value in the place of mergekit's; of each value of a gradient."""
        table = self.method.values.get(parameter)
        if isinstance(value, list):
            return [self._ours(parameter, one, (*path, i)) for i, one in enumerate(value)]
        if table is None or isinstance(value, Mapping):
            return value
        if value in table:
            return table[value]
        if None in table:  # what is given is taken as it is
            return value
        self.wrong(path, f"{parameter} is {value!r}", f"write {' or '.join(str(one).lower() for one in table)}")
        return next(iter(table.values()))


def _pattern(text: str) -> str:
    """Write a filter, a part of a tensor's name, as a shell pattern.

    >>> _pattern("mlp"), _pattern("a[0]*")
    ('*mlp*', '*a[[]0][*]*')
    """
    return "*" + "".join(f"[{sign}]" if sign in "*?[" else sign for sign in text) + "*"
