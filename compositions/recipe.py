"""A recipe: YAML text to a frozen value, every mistake named by its line."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, field_validator

from portmanteau.merge import PortmanteauError, RecipeError
from portmanteau.merge.dtypes import parse
from portmanteau.merge.errors import Mistake, nearest
from portmanteau.merge.registry import operators
from portmanteau.merge.units import byte_count

from .composition import compositions
from .lines import Document, KeyPath, read
from .reference import Reference, references
from .schema import schema_of, validated
from .tensorwise import Rule, check

_KEYS = ("models", "steps", "merge", "output")


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
            found = self._validated(schema_of(name), arguments or {}, here)
            return (
                Body(name, here, self._expanded(_fields(found), here), is_operator=False) if found is not None else None
            )
        if name not in operators():
            self._wrong(
                here, f"unknown composition or operator {name!r}", nearest(name, [*compositions(), *operators()])
            )
            return None
        body = self._validated(_OperatorBody, arguments or {}, here)
        return Body(name, here, self._operator_arguments(name, body, here), is_operator=True) if body else None

    def _expanded(self, arguments: dict[str, Any], path: KeyPath) -> dict[str, Any]:
        """Put the checkpoints that a pattern stands for in its place, in lists of references."""
        folder = Path(self._document.file).parent
        result = dict(arguments)
        for key, value in arguments.items():
            if isinstance(value, list) and any(isinstance(one, Reference) and one.is_pattern for one in value):
                found = [(one, one.expanded(folder)) for one in value]
                for one in (one for one, several in found if not several):
                    self._wrong((*path, key), f"nothing is called {one.path!r}")
                result[key] = [reference for _, several in found for reference in several]
        return result

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
        result, findings = validated(kind, value, self._document, path)
        for location, what, hint in findings:
            self._wrong(location, what, hint)
        return result

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
            for adapter, _ in reference.lora:
                if adapter.path not in models:
                    self._check_place(adapter, folder, ("models", name, "lora"), [])
        for body in bodies:
            for key, value in body.arguments.items():
                for reference in references(value):
                    if reference.path not in names:
                        self._check_place(reference, folder, (*body.path, key), names)
                    elif reference.path in steps and not reference.may_be_step:
                        what = f"{reference.path!r} is a step; adapters and sparse fine-tunes are read from disk"
                        self._wrong((*body.path, key), what, "build it first, by a recipe of its own")
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


def _fields(model: BaseModel) -> dict[str, Any]:
    """Give the fields as they are, not turned into plain dicts."""
    return {name: getattr(model, name) for name in type(model).model_fields}
