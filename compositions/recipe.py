"""A recipe: YAML text to a frozen value, every mistake named by its line; then to the checkpoint that it asks for."""

from __future__ import annotations

import re
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from inspect import Parameter
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError, create_model, field_validator

from portmanteau.merge import Checkpoint, Composed, MergeError, PortmanteauError, RecipeError
from portmanteau.merge import open as open_checkpoint
from portmanteau.merge.dtypes import parse
from portmanteau.merge.errors import Mistake, nearest
from portmanteau.merge.registry import operators

from .composition import compositions
from .lines import Document, KeyPath, read
from .reference import Reference, as_reference, references, replaced
from .tensorwise import Rule, check, tensorwise

_KEYS = ("models", "steps", "merge", "output")
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?", re.IGNORECASE)


def byte_count(text: str | int) -> int:
    """Read a number of bytes: `5GB`, `512MiB`, `1000`.

    >>> byte_count("5GB"), byte_count("1MiB")
    (5000000000, 1048576)
    """
    match = _SIZE.fullmatch(str(text).strip())
    if match is None or not float(match[1]):
        raise ValueError(f"{text!r} is no size: write 5GB, 512MiB or a number of bytes")
    power = " kmgt".index(match[2].lower() or " ")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** power)


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Output(_Strict):
    """What the result is to be like on disk."""

    dtype: str | None = None
    shard_size: int = 5_000_000_000
    tokenizer: Reference | None = None

    @field_validator("dtype")
    @classmethod
    def _known(cls, value: str | None) -> str | None:
        try:
            return value and parse(value)
        except PortmanteauError as error:
            raise ValueError(f"{error.mistakes[0].what}; {error.mistakes[0].hint}") from error

    @field_validator("shard_size", mode="before")
    @classmethod
    def _bytes(cls, value: str | int) -> int:
        return byte_count(value)


class _RuleBody(BaseModel):
    model_config = ConfigDict(frozen=True, extra="allow")

    tensors: str
    operator: str | None = None
    models: tuple[str, ...] | None = None


class _OperatorBody(BaseModel):
    """An operator over every tensor: what is not named here is a setting."""

    model_config = ConfigDict(frozen=True, extra="allow")

    models: dict[str, Any] | list[Reference]  # name → nothing, its weight, or settings of its own
    base: Reference | None = None
    rules: tuple[_RuleBody, ...] = ()
    unmatched: Literal["error", "keep", "drop"] = "error"


@dataclass(frozen=True)
class Body:
    """One composition, or one operator over every tensor, as the recipe asks for it."""

    name: str
    path: KeyPath
    arguments: Mapping[str, Any]
    is_operator: bool


@dataclass(frozen=True)
class Recipe:
    """A recipe whose text is right; whether its checkpoints go together is seen when it is composed."""

    document: Document
    models: Mapping[str, Reference]
    steps: Mapping[str, Body]
    merge: Body
    output: Output

    @property
    def text(self) -> str:
        """The text as it stands in the file."""
        return self.document.text

    @property
    def folder(self) -> Path:
        """The folder that its paths are relative to."""
        return Path(self.document.file).parent


def load(path: str | Path) -> Recipe:
    """Read a recipe. Raises RecipeError with every mistake that its text, and the places it names, show."""
    document = read(Path(path))
    if not isinstance(document.value, dict):
        raise RecipeError(document.file, "holds no recipe", "a recipe is a mapping with the key `merge`")
    if "merge_method" in document.value:
        raise RecipeError(
            document.where(("merge_method",)), "a mergekit YAML, which is not read yet", "write a native recipe"
        )
    return _Reader(document).recipe()


class _Reader:
    """Reads the sections of one document, and collects what is wrong with them."""

    def __init__(self, document: Document) -> None:
        self._document = document
        self._mistakes: list[Mistake] = []

    def recipe(self) -> Recipe:
        """Read all sections, or raise with all mistakes."""
        value = self._document.value
        for key in value:
            if key not in _KEYS:
                self._wrong((key,), f"unknown key {key!r}", nearest(key, _KEYS))
        models = self._validated(dict[str, Reference], value.get("models") or {}, ("models",)) or {}
        steps = self._steps(value.get("steps") or {})
        merge = self._body(value.get("merge"), ("merge",)) if "merge" in value else None
        if "merge" not in value:
            self._wrong((), "has no key 'merge'", "merge: says what the result is")
        output = self._validated(Output, value.get("output") or {}, ("output",)) or Output()
        bodies = [*steps.values(), *([merge] if merge else [])]
        self._check_references(models, steps, bodies, output)
        if self._mistakes or merge is None:
            raise RecipeError.of(sorted(self._mistakes, key=lambda mistake: int(mistake.where.rpartition(":")[2])))
        return Recipe(self._document, models, steps, merge, output)

    def _steps(self, value: Any) -> dict[str, Body]:
        if not isinstance(value, dict):
            self._wrong(("steps",), "is no mapping from names to compositions")
            return {}
        found = {name: self._body(one, ("steps", name)) for name, one in value.items()}
        return {name: body for name, body in found.items() if body is not None}

    def _body(self, value: Any, path: KeyPath) -> Body | None:
        """Read `{NAME: {KEY: VALUE, …}}`, NAME a composition or an operator."""
        if not isinstance(value, dict) or len(value) != 1:
            self._wrong(
                path, "must name one composition or operator", "for example: layer_swap: {task: …, language: …}"
            )
            return None
        ((name, arguments),) = value.items()
        here = (*path, name)
        if name in compositions():
            found = self._validated(_schema(name), arguments or {}, here)
            return Body(name, here, _fields(found), is_operator=False) if found is not None else None
        if name not in operators():
            self._wrong(
                here, f"unknown composition or operator {name!r}", nearest(name, [*compositions(), *operators()])
            )
            return None
        body = self._validated(_OperatorBody, arguments or {}, here)
        return Body(name, here, self._operator_arguments(name, body, here), is_operator=True) if body else None

    def _operator_arguments(self, name: str, body: _OperatorBody, path: KeyPath) -> dict[str, Any]:
        """Turn an operator's body into the arguments of `tensorwise`, and check its settings."""
        if isinstance(body.models, dict):
            models = {label: Reference(path=label) for label in body.models}
            own = {label: _own_settings(value) for label, value in body.models.items()}
        else:
            models, own = {reference.path: reference for reference in body.models}, {}
        settings = dict(body.__pydantic_extra__ or {})
        for key in dict.fromkeys(key for given in own.values() for key in given):
            common = settings.get(key)
            of_each = (
                common if isinstance(common, dict) else dict.fromkeys(models, common) if common is not None else {}
            )
            settings[key] = {**of_each, **{label: given[key] for label, given in own.items() if key in given}}
        rules = tuple(
            Rule(
                rule.tensors,
                rule.operator,
                rule.models,
                rule.__pydantic_extra__ or {},
                self._document.where((*path, "rules", i)),
            )
            for i, rule in enumerate(body.rules)
        )
        for inner, what, hint in check(name, list(models), body.base is not None, settings, rules):
            self._wrong(self._moved(path, inner, models), what, hint)
        return {"models": models, "base": body.base, "settings": settings, "rules": rules, "unmatched": body.unmatched}

    def _moved(self, path: KeyPath, inner: KeyPath, labels: Iterable[str]) -> KeyPath:
        """Find where a setting stands: `weight.a` may have been written as `models.a.weight` or `models.a`."""
        choices = [inner]
        if len(inner) > 1:
            choices += [("models", inner[1], inner[0]), ("models", inner[1])]
        elif inner:
            choices += [("models", label, inner[0]) for label in labels]
        return next((p for c in choices if (p := (*path, *c)) in self._document.lines), (*path, *inner))

    def _validated(self, kind: Any, value: Any, path: KeyPath) -> Any:
        try:
            return TypeAdapter(kind).validate_python(value)
        except ValidationError as error:
            found = [(self._real(path, one["loc"]), one) for one in error.errors()]
            for location, one in found:
                deeper = any(len(other) > len(location) and other[: len(location)] == location for other, _ in found)
                if not deeper or location == path:  # of a union's members, the one that was meant says most
                    self._explain(one, location, _known_keys(kind, one["loc"]))
            return None

    def _explain(self, found: Any, location: KeyPath, known: list[str]) -> None:
        """Say one of pydantic's findings in our words, at its line."""
        key = location[-1]
        if found["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
            self._wrong(location, f"unknown key {key!r}", nearest(str(key), known))
        elif found["type"] == "missing":
            self._wrong(location[:-1], f"{location[-2]} lacks the key {key!r}")
        else:
            message = found["msg"].removeprefix("Value error, ")
            self._wrong(location, f"{key} is {found['input']!r}: {message[:1].lower()}{message[1:]}")

    def _real(self, path: KeyPath, location: tuple[Any, ...]) -> KeyPath:
        """Strip what is no key from pydantic's location: it names the members of unions too."""
        for i, part in enumerate(location):
            if (*path, part) in self._document.lines or (
                i == len(location) - 1
                and not (isinstance(part, str) and re.search(r"[\[\]-]|^[A-Z]|^(int|float|str)$", part))
            ):
                path = (*path, part)
        return path

    def _check_references(
        self, models: Mapping[str, Reference], steps: Mapping[str, Body], bodies: list[Body], output: Output
    ) -> None:
        """Look whether something stands where every reference points; what it is, is seen on opening."""
        folder, names = Path(self._document.file).parent, [*models, *steps]
        for name in steps:
            if name in models:
                self._wrong(("steps", name), f"{name!r} is already the name of a model")
        for name, reference in models.items():
            self._check_place(reference, folder, ("models", name), [])
        for body in bodies:
            for key, value in body.arguments.items():
                for reference in references(value):
                    if reference.path not in names:
                        self._check_place(reference, folder, (*body.path, key), names)
        if output.tokenizer is not None and output.tokenizer.path not in names:
            self._check_place(output.tokenizer, folder, ("output", "tokenizer"), names)

    def _check_place(self, reference: Reference, folder: Path, path: KeyPath, names: list[str]) -> None:
        place = reference.local(folder)
        if place.exists() or (reference.is_on_hub(folder) and not reference.path.startswith(".")):
            return
        siblings = [found.name for found in place.parent.glob("*")] if place.parent.is_dir() else []
        what = f"no {'file or folder' if path[0] == 'models' else 'model, file or folder'} {reference.path!r}"
        self._wrong(path, what, nearest(place.name if "/" in reference.path else reference.path, names or siblings))

    def _wrong(self, path: KeyPath, what: str, hint: str = "") -> None:
        self._mistakes.append(Mistake(self._document.where(path), what, hint))


def _own_settings(value: Any) -> dict[str, Any]:
    """Read what stands beside a model's name: a weight, or settings of its own."""
    if value is None:
        return {}
    return dict(value) if isinstance(value, dict) else {"weight": value}


def _known_keys(kind: Any, location: tuple[Any, ...]) -> list[str]:
    """Give the keys that are known at the place where pydantic found one too many."""
    known = getattr(kind, "model_fields", {})
    if len(location) == 1 or location[0] not in known:
        return list(known)
    inside = list(_dataclasses(known[location[0]].annotation))
    meant = [one for one in inside if one.__name__ in location] or inside
    return list(dict.fromkeys(field.name for one in meant for field in fields(one)))


def _dataclasses(annotation: Any) -> Iterator[Any]:
    """Go through the dataclasses in an annotation."""
    if is_dataclass(annotation):
        yield annotation
    for one in typing.get_args(annotation):
        yield from _dataclasses(one)


@cache
def _schema(name: str) -> type[BaseModel]:
    """Make the schema of a composition's body from its signature."""
    fields: dict[str, Any] = {}
    for key, (annotation, default) in compositions()[name].parameters.items():
        fields[key] = (as_reference(annotation), ... if default is Parameter.empty else default)
    return create_model(name, __config__=ConfigDict(frozen=True, extra="forbid"), **fields)


def _fields(model: BaseModel) -> dict[str, Any]:
    """Give the fields as they are, not turned into plain dicts."""
    return {name: getattr(model, name) for name in type(model).model_fields}


def compose(recipe: Recipe) -> Composed:
    """Open the checkpoints and put the result together, from headers alone.

    Raises RecipeError with every mistake found: models that cannot be opened, that do not fit, settings they refuse.
    """
    return _Composer(recipe).result()


class _Composer:
    """Opens each reference once and composes each step once."""

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        self._made: dict[Reference, Checkpoint] = {}
        self._under_way: list[str] = []

    def result(self) -> Composed:
        """Compose the recipe's result."""
        self._open_all()
        merged = self._composed(self._recipe.merge)
        donor = self._recipe.output.tokenizer
        if donor is not None:
            merged.companions = merged.companions.with_tokenizer_of(self._checkpoint(donor).companions)
        return merged

    def _open_all(self) -> None:
        """Open every checkpoint that is named, and report all that cannot be opened."""
        recipe, mistakes = self._recipe, []
        bodies = [*recipe.steps.values(), recipe.merge]
        named: list[tuple[KeyPath, Reference]] = [(("models", name), Reference(path=name)) for name in recipe.models]
        named += [(body.path, found) for body in bodies for found in references(body.arguments)]
        for path, reference in named:
            if reference.path not in recipe.steps:
                try:
                    self._checkpoint(reference)
                except PortmanteauError as error:
                    where = recipe.document.where(path)
                    mistakes += [Mistake(f"{where}: {m.where}", m.what, m.hint) for m in error.mistakes]
        if mistakes:
            raise RecipeError.of({m.where.partition(": ")[2] + m.what: m for m in mistakes}.values())

    def _checkpoint(self, reference: Reference) -> Checkpoint:
        if reference not in self._made:
            name = reference.path
            if name in self._recipe.steps:
                self._made[reference] = self._step(name)
            else:
                self._made[reference] = self._opened(self._recipe.models.get(name, reference), name)
        return self._made[reference]

    def _opened(self, reference: Reference, label: str) -> Checkpoint:
        folder = self._recipe.folder
        place = reference.path if reference.is_on_hub(folder) else reference.local(folder)
        return open_checkpoint(place, revision=reference.revision, label=label)

    def _step(self, name: str) -> Composed:
        body = self._recipe.steps[name]
        if name in self._under_way:
            where = self._recipe.document.where(body.path)
            raise RecipeError(where, f"steps need each other: {' → '.join([*self._under_way, name])}")
        self._under_way.append(name)
        made = self._composed(body)
        self._under_way.pop()
        made.label = name
        return made

    def _composed(self, body: Body) -> Composed:
        document = self._recipe.document
        arguments = replaced(body.arguments, self._checkpoint)
        try:
            if body.is_operator:
                made = tensorwise(body.name, **arguments)
            else:
                made = compositions()[body.name].compose(**arguments)
        except MergeError as error:
            raise RecipeError.of(
                Mistake(document.where((*body.path, *_keys(m.where))), f"{body.name}: {m.what}", m.hint)
                for m in error.mistakes
            ) from error
        return made.because(document.where(body.path))


def _keys(dotted: str) -> Iterator[str | int]:
    """Turn `rules.0.density` back into keys."""
    for part in filter(None, dotted.split(".")):
        yield int(part) if part.isdigit() else part
