"""A recipe: YAML text to a frozen value, every mistake named by its line."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

from portmanteau.merge import CheckpointError, PortmanteauError, RecipeError
from portmanteau.merge.dtypes import is_float, parse
from portmanteau.merge.errors import Mistake, nearest
from portmanteau.merge.files import places
from portmanteau.merge.files.places import nearby
from portmanteau.merge.registry import exists, operators, unknown
from portmanteau.merge.units import byte_count

from ..composition import compositions, find
from ..vocabulary.chat_templates import TEMPLATES
from .lines import Document, KeyPath, read
from .operator_body import Finding, OperatorBody, SliceBody, each_slice, operator_arguments
from .reference import Reference, references
from .schema import schema_of, validated
from .tokenizer import UNION, ZERO, TokenizerBody

_KEYS = ("models", "steps", "merge", "output")


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Output(_Strict):
    """What the result is to be like on disk."""

    dtype: Annotated[
        str | None, Field(description="the dtype of floats, such as bfloat16; default: what the models promote to")
    ] = None
    shard_size: Annotated[int, Field(description="the most bytes in one file, such as 5GB")] = 5_000_000_000
    tokenizer: Annotated[
        TokenizerBody | None,
        Field(description="the model whose tokenizer and other files are taken; or how vocabularies meet"),
    ] = None
    chat_template: Annotated[
        str | None,
        Field(description="auto: the commonest of the models' templates; a known name; else the template, in Jinja"),
    ] = None

    @field_validator("dtype")
    @classmethod
    def _known(cls, value: str | None) -> str | None:
        try:
            found = value and parse(value)
        except PortmanteauError as error:
            raise ValueError(f"{error.mistakes[0].what}; {error.mistakes[0].hint}") from error
        if found and not is_float(found):
            raise ValueError("weights are written as floats; what is no float is copied as it is")
        return found

    @field_validator("chat_template")
    @classmethod
    def _is_template(cls, value: str | None) -> str | None:
        if value is not None and "{" not in value and value not in (known := ("auto", *TEMPLATES)):
            raise ValueError(f"no Jinja template and no known name; {nearest(value, known)}")
        return value

    @field_validator("shard_size", mode="before")
    @classmethod
    def _bytes(cls, value: str | int) -> int:
        return byte_count(value)


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


def load(path: str | Path, *, text: str | None = None) -> Recipe:
    """Read a recipe. Raises RecipeError with every mistake that its text, and the places it names, show.

    >>> recipe = load("examples/ties.yaml")
    >>> recipe.merge.name, list(recipe.models)
    ('ties', ['base', 'task', 'language'])

    `text`: what stood in the file, for one that need not be there any more.
    """
    return recipe_of(read(Path(path), text))


def recipe_of(document: Document) -> Recipe:
    """Read a recipe from its document. Raises RecipeError as `load` does."""
    if document.is_mergekit:
        return _load_mergekit(document)
    if document.bundle:
        raise RecipeError(document.where((1,)), "a second document", "only bundles of mergekit YAMLs have several")
    if not isinstance(document.value, dict):
        raise RecipeError(document.file, "holds no recipe", "a recipe is a mapping with the key `merge`")
    return _Reader(document).recipe()


def _load_mergekit(document: Document) -> Recipe:
    """Read a mergekit YAML as a recipe of ours, and report together what is wrong with either."""
    from ..mergekit.document import translated

    written, mistakes = translated(document)
    try:
        recipe = _Reader(written).recipe() if written is not None else None
    except RecipeError as error:
        mistakes, recipe = [*mistakes, *error.mistakes], None
    if recipe is None or mistakes:
        raise RecipeError.of(sorted(mistakes, key=_line))
    return recipe


def _line(mistake: Mistake) -> int:
    return int(mistake.where.rpartition(":")[2])


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
                is_body = key in compositions() or key in operators()
                hint = f"it belongs below merge: merge: {{{key}: …}}" if is_body else nearest(key, _KEYS)
                self._wrong((key,), f"unknown key {key!r}", hint)
        models = self._validated(dict[str, Reference], value.get("models") or {}, ("models",)) or {}
        steps = self._steps(value.get("steps") or {})
        merge = self._body(value.get("merge"), ("merge",)) if "merge" in value else None
        if "merge" not in value:
            hint = "merge: says what the result is, such as merge: {linear: {models: [./one, ./other]}}"
            self._wrong((), "has no key 'merge'", hint)
        output = self._validated(Output, value.get("output") or {}, ("output",)) or Output()
        bodies = [*steps.values(), *([merge] if merge else [])]
        self._check_references(models, steps, bodies, output)
        if self._mistakes or merge is None:
            raise RecipeError.of(sorted(self._mistakes, key=_line))
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
            hint = "for example: layer_swap: {task: …, language: …}"
            if isinstance(value, dict) and next(iter(value.values()), "") is None:
                hint = f"indent what belongs to {next(iter(value))} further than {next(iter(value))} itself"
            self._wrong(path, "must name one composition or operator", hint)
            return None
        ((name, arguments),) = value.items()
        here = (*path, name)
        if composition := find(str(name)):
            if isinstance(arguments, list):  # a list alone is what the first key says
                arguments = {next(iter(composition.parameters)): arguments}
            found = self._validated(schema_of(name), arguments or {}, here)
            if found is None:
                return None
            return Body(name, here, self._with_slices(self._expanded(_fields(found), here), here), is_operator=False)
        if not exists(str(name)):
            hint = unknown(str(name), [*compositions(), *operators()])
            self._wrong(here, f"unknown composition or operator {name!r}", hint)
            return None
        body = self._validated(OperatorBody, arguments or {}, here)
        if body is None:
            return None
        made, findings = operator_arguments(name, body, here, self._document)
        self._all_wrong(findings)
        return Body(name, here, made, is_operator=True)

    def _expanded(self, arguments: dict[str, Any], path: KeyPath) -> dict[str, Any]:
        """Put the checkpoints that a pattern stands for in its place, in lists of references."""
        folder = Path(self._document.file).parent
        result = dict(arguments)
        for key, value in arguments.items():
            if isinstance(value, list) and any(isinstance(one, Reference) and one.is_pattern for one in value):
                try:
                    found = [(one, one.expanded(folder)) for one in value]
                except RecipeError as error:
                    self._wrong((*path, key), error.mistakes[0].what, error.mistakes[0].hint)
                    continue
                for one in (one for one, several in found if not several):
                    self._wrong((*path, key), f"nothing is called {one.path!r}")
                result[key] = [reference for _, several in found for reference in several]
        return result

    def _with_slices(self, arguments: dict[str, Any], path: KeyPath) -> dict[str, Any]:
        """Put slices in the place of their bodies."""
        result = dict(arguments)
        for key, value in arguments.items():
            if isinstance(value, list | tuple) and value and all(isinstance(one, SliceBody) for one in value):
                from ..slices import Slice

                made = list(each_slice(value, path, self._document, Slice))
                result[key] = [one for one, _ in made]
                self._all_wrong(found for _, findings in made for found in findings)
        return result

    def _validated(self, kind: Any, value: Any, path: KeyPath) -> Any:
        result, findings = validated(kind, value, self._document, path)
        self._all_wrong(findings)
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
            for path, reference in references(body.arguments, body.path):
                if reference.path not in names:
                    self._check_place(reference, folder, path, names)
                elif reference.path in steps and not reference.may_be_step:
                    what = f"{reference.path!r} is a step; adapters and sparse fine-tunes are read from disk"
                    self._wrong(path, what, "build it first, by a recipe of its own")
        for name in sorted({UNION, ZERO} & {*names} if output.tokenizer is not None else ()):
            section = "models" if name in models else "steps"
            self._wrong((section, name), f"{name!r} is a word of output.tokenizer", "call it something else")
        asked = output.tokenizer.references(("output", "tokenizer")) if output.tokenizer is not None else ()
        for path, reference in asked:
            if reference.path not in names:
                self._check_place(reference, folder, path, names)

    def _check_place(self, reference: Reference, folder: Path, path: KeyPath, names: list[str]) -> None:
        place = reference.local(folder)
        try:
            if places.kind(place) != "nothing" or (reference.is_on_hub(folder) and not reference.path.startswith(".")):
                return
        except CheckpointError as error:
            self._wrong(path, str(error.mistakes[0]))
            return
        what = f"no {'file or folder' if path[0] == 'models' else 'model, file or folder'} {reference.path!r}"
        is_name = bool(names) and "/" not in reference.path
        self._wrong(path, what, nearest(reference.path, names) if is_name else nearby(place))

    def _all_wrong(self, findings: Iterable[Finding]) -> None:
        for location, what, hint in findings:
            self._wrong(location, what, hint)

    def _wrong(self, path: KeyPath, what: str, hint: str = "") -> None:
        self._mistakes.append(Mistake(self._document.where(path), what, hint))


def _fields(model: BaseModel) -> dict[str, Any]:
    """Give the fields as they are, not turned into plain dicts."""
    return {name: getattr(model, name) for name in type(model).model_fields}
