"""What a build is made from, as digests under names for people: whether two builds give the same, and what differs."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ..companions import Companions
from ..files.digests import digest
from ..node import Finding, Inputs, Made, Source, Step
from ..plan import Plan
from ..plugins.source_files import Plugins
from ..tensor_spec import TensorSpec

Identity = Mapping[str, str]
_PACKAGES = ("merge", "compositions")


class _UnknownError(Exception):
    """Something has no description that another process would give as well."""


def identity(
    plan: Plan,
    *,
    recipe: str | None,
    options: Mapping[str, Any],
    read: Identity,
    beside: Companions,
    plugins: Plugins,
) -> Identity | None:
    """Give what decides about the bytes of a result; None where a later process could not tell whether it is the same.

    An input is known by its header's digest, its size and its time. Tensors in memory, and makers of the Python API
    that cannot be described, have no identity: such a build is not continued and never up to date.

    Args:
        plan: the plan, before its surveys are carried out.
        recipe: the recipe's text; what it leaves open the plan says.
        options: what was asked for beside it.
        read: the marks of the inputs.
        beside: the companions.
        plugins: where operators of others come from.

    """
    if any(not store.files for store in plan.checkpoints):
        return None
    try:
        steps = digest(json.dumps([*_described(plan, strict=recipe is None)]).encode())
    except _UnknownError:
        return None
    found = {"the recipe": digest((recipe or "").encode()), "the plan": steps}
    found |= {f"the {name}": str(value) for name, value in options.items()}
    found |= read
    for files in plugins.values():
        found |= {f"the plugin's source {name}": mark for name, mark in files.items()}
    return {**found, **_of_companions(beside), "the version of portmanteau or torch": versions()}


def inputs(plan: Plan) -> Identity:
    """Give what marks the files that a plan reads, as they are now."""
    found: dict[str, str] = {}
    for store in plan.checkpoints:
        for file in store.files:
            status = file.path.stat()
            mark = f"{file.digest} {status.st_size} {status.st_mtime_ns}"
            name = f"the input {store.label}: {file.path.name}"
            found[name] = digest((found.get(name, "") + mark).encode())
    return found


def code() -> Identity:
    """Give the state of this program's own files: only the same code continues what it began."""
    return {"the code of portmanteau": _code()}


def differences(before: Identity, after: Identity) -> str:
    """Say what differs between two builds, in the words of their names."""
    names = [name for name in {**after, **before} if before.get(name) != after.get(name)]
    if len(names) > 1 and "the plan" in names:
        names.remove("the plan")  # it follows from the others
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return f"{shown} changed" if names else ""


def versions() -> str:
    """Give the versions on which bits may depend."""
    return " ".join(map(package_version, ("portmanteau", "torch")))


def package_version(package: str) -> str:
    """Give the version of an installed package."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


def _of_companions(beside: Companions) -> Identity:
    found = {"the config": digest(json.dumps(beside.config, sort_keys=True, default=str).encode())}
    for name, path in beside.files.items():
        status = path.stat()
        found[f"the file {name}"] = f"{status.st_size} {status.st_mtime_ns}"
    found |= {f"the text {name}": digest(text.encode()) for name, text in beside.texts.items()}
    return found


@cache
def _code() -> str:
    """Take name, size and time of every file of the packages; reading them would cost more."""
    root, found = Path(__file__).parents[1], []
    for package in _PACKAGES:
        for folder, _, names in os.walk(root / package):
            for name in names:
                if name.endswith((".py", ".native")):
                    status = os.stat(os.path.join(folder, name))  # noqa: PTH116, PTH118 - a hundred of them
                    found.append((os.path.relpath(folder, root), name, status.st_size, status.st_mtime_ns))
    return digest(repr(sorted(found)).encode())


def _described(plan: Plan, *, strict: bool) -> Iterator[Any]:
    """Describe steps and surveys by plain values."""
    plain = partial(_plain, strict=strict)
    form = plan.companions.form
    yield [form.weights, plain(form.metadata), plain(form.folders), [*plan.companions.derived]]
    yield [plain(step) for step in plan.steps]
    for survey in plan.surveys:
        groups = [[plain(key), [plain(inputs) for inputs in group]] for key, group in survey.groups.items()]
        yield [survey.title, plain(survey.measure), groups, plain(survey.settings)]


def _plain(value: Any, *, strict: bool) -> Any:
    """Describe a value by what JSON has. Where it has no such description, `strict` raises _UnknownError."""
    inner = partial(_plain, strict=strict)
    if value is None or isinstance(value, str | int | float | bool):
        return value
    for kind, describe in _KINDS.items():
        if isinstance(value, kind):
            return describe(value, inner)
    if is_dataclass(value) and not isinstance(value, type):
        return [type(value).__name__, [inner(getattr(value, field.name)) for field in fields(value)]]
    if callable(value) and getattr(value, "__closure__", ()) is None:
        return f"{value.__module__}.{value.__qualname__}"
    if strict:
        raise _UnknownError(type(value).__name__)
    return type(value).__name__


def _of_step(step: Step, inner: Callable[[Any], Any]) -> Any:
    operator = [step.operator.name, inner(step.operator.apply)]
    return [inner(step.output), operator, inner(step.settings), inner(step.inputs), [*step.labels]]


def _of_inputs(inputs: Inputs, inner: Callable[[Any], Any]) -> Any:
    return [inner(inputs.models), inner(inputs.importances), inner(inputs.base)]


_KINDS: dict[type, Callable[[Any, Callable[[Any], Any]], Any]] = {
    Source: lambda source, _: [str(source), source.spec.dtype, [*source.spec.shape]],
    Step: _of_step,
    Made: lambda made, inner: [inner(made.output), inner(made.maker), inner(made.inputs)],
    Inputs: _of_inputs,
    Finding: lambda finding, inner: [finding.survey.title, inner(finding.key)],
    TensorSpec: lambda spec, _: [spec.name, spec.dtype, [*spec.shape]],
    partial: lambda one, inner: [inner(one.func), inner(one.args), inner(one.keywords)],
    Mapping: lambda one, inner: [[inner(key), inner(value)] for key, value in one.items()],
    tuple: lambda one, inner: [*map(inner, one)],
    list: lambda one, inner: [*map(inner, one)],
    range: lambda one, _: repr(one),
}
