"""An operator's body as a recipe writes it, alone or in a slice: models with settings of their own, rules, settings."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from portmanteau.merge.errors import nearest
from portmanteau.merge.registry import exists, find

from ..tensorwise import Rule, base_label, check
from .lines import Document, KeyPath
from .reference import Reference

Finding = tuple[KeyPath, str, str]  # where, what, hint
Models = dict[str, Any] | list[Reference]  # name → nothing, its weight, or settings of its own
Range = tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=0)]]  # first layer, and the one behind the last


class _RuleBody(BaseModel):
    model_config = ConfigDict(frozen=True, extra="allow")

    tensors: str
    operator: str | None = None
    models: tuple[str, ...] | None = None


class OperatorBody(BaseModel):
    """An operator over every tensor: what is not named here is a setting."""

    model_config = ConfigDict(frozen=True, extra="allow")

    models: Models
    base: Reference | None = None
    rules: tuple[_RuleBody, ...] = ()
    unmatched: Literal["error", "keep", "drop"] = "error"
    only: str | None = None


class SliceBody(BaseModel):
    """One slice of a stack: layers of one model, or an operator over layers of several; the rest is settings."""

    model_config = ConfigDict(frozen=True, extra="allow")

    model: Reference | None = None
    models: Models | None = None
    layers: Range | dict[str, Range] | None = None
    operator: str = "copy"
    base: Reference | None = None
    rules: tuple[_RuleBody, ...] = ()

    @model_validator(mode="after")
    def _of_something(self) -> SliceBody:
        if (self.model is None) == (self.models is None):
            raise ValueError("a slice has either `model`, or `models` and the operator that merges them")
        return self


def slice_arguments(body: SliceBody, path: KeyPath, document: Document) -> tuple[dict[str, Any], list[Finding]]:
    """Turn a slice's body into the arguments of `Slice`, and find what is wrong with it."""
    models: Models = [body.model] if body.model is not None else body.models or []
    found, findings = _arguments(body.operator, models, body, path, document)
    layers = body.layers
    if isinstance(layers, dict):
        known = [*found["models"], *([body.base.path] if body.base else [])]
        findings += [
            (_written(document, (*path, "layers", label)), f"unknown model {label!r}", nearest(label, known))
            for label in layers
            if label not in known
        ]
        if body.base is not None and body.base.path in layers and body.base.path not in found["models"]:
            own = {base_label(found["models"]): layers[body.base.path]}
            layers = {**{label: one for label, one in layers.items() if label != body.base.path}, **own}
    return {**found, "operator": body.operator, "layers": layers}, findings


def operator_arguments(
    name: str, body: OperatorBody, path: KeyPath, document: Document
) -> tuple[dict[str, Any], list[Finding]]:
    """Turn an operator's body into the arguments of `tensorwise`, and find what is wrong with it."""
    found, findings = _arguments(name, body.models, body, path, document)
    return {**found, "unmatched": body.unmatched, "only": body.only}, findings


def _arguments(
    name: str, given: Models, body: OperatorBody | SliceBody, path: KeyPath, document: Document
) -> tuple[dict[str, Any], list[Finding]]:
    if isinstance(given, dict):
        models = {label: Reference(path=label) for label in given}
        own = {label: _own_settings(value) for label, value in given.items()}
    else:
        models, own = {reference.path: reference for reference in given}, {}
    settings = _with_own(dict(body.__pydantic_extra__ or {}), own, models)
    rules = tuple(
        Rule(one.tensors, one.operator, one.models, one.__pydantic_extra__ or {}, document.where((*path, "rules", i)))
        for i, one in enumerate(body.rules)
    )
    findings = []
    known = [*find(name).settings, *type(body).model_fields] if exists(name) else []
    for inner, what, hint in check(name, list(models), body.base is not None, settings, rules):
        misspelt = len(inner) == 1 and inner[0] in settings and what.endswith(f"has no setting {inner[0]!r}")
        findings.append(
            (_moved(document, path, inner, models), what, nearest(str(inner[0]), known) if misspelt else hint)
        )
    return {"models": models, "base": body.base, "settings": settings, "rules": rules}, findings


def _own_settings(value: Any) -> dict[str, Any]:
    """Read what stands beside a model's name: a weight, or settings of its own."""
    if value is None:
        return {}
    return dict(value) if isinstance(value, dict) else {"weight": value}


def _with_own(
    settings: dict[str, Any], own: Mapping[str, Mapping[str, Any]], models: Mapping[str, Reference]
) -> dict[str, Any]:
    """Put the settings that models have of their own beside the common ones, as mappings from the models' names."""
    for key in dict.fromkeys(key for given in own.values() for key in given):
        common = settings.get(key)
        of_each = common if isinstance(common, dict) else dict.fromkeys(models, common) if common is not None else {}
        settings[key] = {**of_each, **{label: given[key] for label, given in own.items() if key in given}}
    return settings


def _moved(document: Document, path: KeyPath, inner: KeyPath, labels: Iterable[str]) -> KeyPath:
    """Find where a setting stands: `weight.a` may have been written as `models.a.weight` or `models.a`."""
    choices = [inner]
    if len(inner) > 1:
        choices += [("models", inner[1], inner[0]), ("models", inner[1])]
    elif inner:
        choices += [("models", label, inner[0]) for label in labels]
    return next((p for c in choices if (p := (*path, *c)) in document.lines), (*path, *inner))


def _written(document: Document, path: KeyPath) -> KeyPath:
    return path if path in document.lines else path[:-1]


def each_slice(
    bodies: Iterable[SliceBody], path: KeyPath, document: Document, make: Callable[..., Any]
) -> Iterator[tuple[Any, list[Finding]]]:
    """Make the slices of a body that is their list, or that has their list under `parts`; give the findings of each."""
    here = (*path, "parts") if (*path, "parts") in document.lines else path
    for i, body in enumerate(bodies):
        arguments, findings = slice_arguments(body, (*here, i), document)
        yield make(**arguments, why=document.where((*here, i))), findings
