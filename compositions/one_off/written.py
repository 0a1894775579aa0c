"""From options to a recipe: values by kind, every model under a short name, each option on lines of its own."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from portmanteau.merge import OutputError, PortmanteauError, RecipeError, make_plan
from portmanteau.merge.errors import Mistake
from portmanteau.merge.files.places import nearby
from portmanteau.merge.results.output import check_file, check_place

from ..compose import compose
from ..recipe import text as recipe_text
from ..recipe.lines import parsed
from ..recipe.reading import recipe_of
from ..recipe.reference import Reference
from .options import Option, options


@dataclass(frozen=True)
class OneOff:
    """A recipe made of options.

    Attributes:
        file: where it is to stand; its paths are relative to that.
        text: what it says.
        here: the same with paths relative to the working directory, since the file's folder need not exist yet.
        flags: which option each line comes from.
        mistakes: options that could not be read, or that name a model where there is none.

    """

    file: Path
    text: str
    here: str
    flags: Mapping[int, str]
    mistakes: tuple[Mistake, ...] = ()

    def check(self) -> None:
        """Check it as `check` does a recipe in a file. Raises RecipeError, every mistake under the option it is in."""
        found = list(self.mistakes)
        try:
            recipe = recipe_of(parsed(self.here, self.file.name))
            make_plan(compose(recipe), recipe.output.dtype)
        except PortmanteauError as error:
            known = {mistake.where for mistake in found}
            more = map(self._by_option, error.mistakes)
            found += [one for one in more if not found or one.where.partition(": ")[0] not in {"", *known}]
        if found:
            raise RecipeError.of(found)

    def _by_option(self, mistake: Mistake) -> Mistake:
        """Put the option in the place of the line."""
        found = re.fullmatch(re.escape(self.file.name) + r":(\d+)(?:: (.*))?", mistake.where, re.DOTALL)
        if not found:
            return mistake
        return replace(mistake, where=": ".join(filter(None, [self.flags.get(int(found[1]), ""), found[2]])))


def one_off(name: str, given: Mapping[str, Any], file: Path, output: Mapping[str, Any]) -> OneOff:
    """Write the recipe that some options of a composition or an operator ask for.

    Args:
        name: the composition or operator.
        given: by key what its option was given: a text, several, or a truth value; None where it was left out.
        file: where the recipe is to stand.
        output: the recipe's `output`, by keys that are options too.

    """
    text, flags, mistakes = _written(name, given, file.absolute().parent, output)
    here, _, _ = _written(name, given, Path.cwd(), output)
    return OneOff(file, text, here, flags, mistakes)


def _written(
    name: str, given: Mapping[str, Any], folder: Path, output: Mapping[str, Any]
) -> tuple[str, dict[int, str], tuple[Mistake, ...]]:
    """Write a recipe as it is in a folder; give which option each line comes from, and mistakes in options."""
    reader = _Reader(folder)
    values = [(option, reader.read(option, given[option.key])) for option in options(name) if _is_given(given, option)]
    body = [(option.flag, option.key, reader.renamed(value)) for option, value in values]
    lines: list[tuple[str, str]] = [("", f"# Written by `portmanteau do {name}`.")]
    if reader.models:
        lines.append(("", "models:"))
        lines += [line for key, (flag, place) in reader.models.items() for line in _lines(flag, key, place, 2)]
    lines += [("", "merge:"), ("", f"  {name}:")]
    lines += [line for flag, key, value in body for line in _lines(flag, key, value, 4)]
    lines += _lines("--dtype", "output", dict(output), 0) if output else []
    flags = {number: flag for number, (flag, _) in enumerate(lines, 1) if flag}
    return "".join(f"{line}\n" for _, line in lines), flags, tuple(reader.mistakes)


def write_beside(made: OneOff, out: Path, *, force: bool) -> None:
    """Write a recipe where it is to stand, unless its result cannot be written. Raises OutputError.

    Where the same recipe stands already, as after a build that was cut short, there is nothing to do.
    """
    if made.file.is_file() and made.file.read_bytes() == made.text.encode():
        return
    check_place(out, nbytes=0, force=force)
    if made.file.absolute().parent.is_dir():
        check_file(made.file, force=force)
    made.file.absolute().parent.mkdir(parents=True, exist_ok=True)
    made.file.write_text(made.text, encoding="utf-8")


def recipe_beside(out: Path) -> Path:
    """Give the place of the recipe of a result: OUT.yaml. Raises OutputError for what names no folder."""
    if not out.name or out.name == "..":
        raise OutputError(str(out), "names no folder to make", "give the result a name, such as ./merged")
    return out.with_name(f"{out.name}.yaml")


def _is_given(given: Mapping[str, Any], option: Option) -> bool:
    return given.get(option.key) not in (None, [], ())


def _lines(flag: str, key: str, value: Any, indent: int) -> Iterator[tuple[str, str]]:
    """Write one key, each line with the option that it comes from."""
    for line in recipe_text.written({key: value}).splitlines():
        yield flag, " " * indent + line


@dataclass
class _Reader:
    """Reads the texts of options, and gives every model that they name a short name of its own."""

    folder: Path
    models: dict[str, tuple[str, Any]] = field(default_factory=dict)  # name → (option, what it stands for)
    mistakes: list[Mistake] = field(default_factory=list)
    _names: dict[str, str] = field(default_factory=dict)  # what was written → its name

    def read(self, option: Option, given: Any) -> Any:
        """Give the value of one option."""
        if option.kind == "model":
            return self._named(option, given, option.key)
        if option.kind in ("models", "weighted"):
            return self._listed(option, given)
        if option.kind == "parts":
            pairs = [one.rpartition("=") for one in given]
            self.mistakes += [
                Mistake(option.flag, f"{one!r} names no model", "write PATTERN=MODEL")
                for one, (_, sign, _) in zip(given, pairs, strict=True)
                if not sign
            ]
            return {pattern: self._named(option, model) for pattern, _, model in pairs}
        if option.kind == "items":
            return [self._with_models(option, self._yaml(option, one)) for one in given]
        return self._yaml(option, given) if option.kind == "value" else given

    def renamed(self, value: Any) -> Any:
        """Put the names of models in the place of what was written, where a value has settings for each model."""
        if not isinstance(value, dict):
            return value
        return {self._names.get(key, key): one for key, one in value.items()}

    def _yaml(self, option: Option, text: str) -> Any:
        try:
            return parsed(text, option.flag).value
        except RecipeError as error:
            self.mistakes += [replace(mistake, where=option.flag) for mistake in error.mistakes]
            return None

    def _listed(self, option: Option, given: Sequence[str]) -> Any:
        """Read MODEL or MODEL=VALUE, each once: a list, or where one has a value a mapping."""
        found: list[tuple[str, Any]] = []
        for text in given:
            model, sign, value = text.rpartition("=")
            if option.kind == "models" or not sign or Path(text).expanduser().exists():
                model, sign, value = text, "", ""
            found.append((self._named(option, model), self._yaml(option, value) if sign else None))
        if all(value is None for _, value in found):
            return [name for name, _ in found]
        if len({name for name, _ in found}) < len(found):
            self.mistakes.append(Mistake(option.flag, "a model is named twice", "give it one value"))
        default = 1.0 if option.key != "models" else None
        return {name: default if value is None else value for name, value in found}

    def _named(self, option: Option, text: str, name: str = "") -> str:
        """Give the name under which a model stands in the recipe; a pattern stands for itself."""
        if not name and text in self._names:
            return self._names[text]
        value = self._yaml(option, text) if text.startswith("{") else text
        path = value.get("path") if isinstance(value, dict) else value
        if not isinstance(path, str):
            self.mistakes.append(Mistake(option.flag, f"{text!r} names no model", "write {path: MODEL, …}"))
            return text
        if Reference(path=path).is_pattern and not Path(path).expanduser().exists() and option.kind == "models":
            return self._seen(path)
        self._look(option, path)
        name = self._free(name or re.sub(r"[^\w.-]", "-", Path(path.partition("@")[0]).name) or "model")
        self._names.setdefault(text, name)
        self.models[name] = (option.flag, self._moved(value))
        return name

    def _free(self, name: str) -> str:
        """Give a name that no other model has."""
        names = [name, *(f"{name}-{i}" for i in range(2, len(self.models) + 3))]
        return next(one for one in names if one not in self.models)

    def _look(self, option: Option, path: str) -> None:
        """Look whether something stands there, as seen from the working directory."""
        reference, here = Reference(path=path), Path.cwd()
        place = reference.local(here)
        if place.exists() or (reference.is_on_hub(here) and not path.startswith(".")):
            return
        self.mistakes.append(Mistake(option.flag, f"no model, file or folder {path!r}", nearby(place)))

    def _moved(self, value: Any) -> Any:
        """Write a reference as the recipe's folder sees it; of the long form its path and adapters."""
        if isinstance(value, str):
            return self._seen(value)
        if isinstance(value, list):
            return [self._moved(one) for one in value]
        if isinstance(value, dict) and "path" in value:
            return {key: self._moved(one) if key in ("path", "lora") else one for key, one in value.items()}
        return {self._seen(key): one for key, one in value.items()} if isinstance(value, dict) else value

    def _seen(self, path: str) -> str:
        """Write a path as the recipe's folder sees it; what is no path here (a Hub id) stays as it is."""
        place = Path(path).expanduser()
        if place.is_absolute():
            return place.as_posix()
        if not place.exists() and Reference(path=path).is_on_hub(Path.cwd()):
            return path
        here = Path.cwd() / place
        seen = Path(os.path.relpath(here.parent.resolve() / here.name, self.folder.resolve())).as_posix()
        return seen if seen.startswith(".") else f"./{seen}"

    def _with_models(self, option: Option, value: Any) -> Any:
        """Name the models in an item: of a slice `model`, `base` and all of `models`; of a rule `models`."""
        if not isinstance(value, dict):
            return value
        named = dict(value)
        for key in ("model", "base"):
            if isinstance(value.get(key), str):
                named[key] = self._named(option, value[key])
        if option.key == "parts" and isinstance(value.get("models"), list):
            named["models"] = [self._named(option, str(one)) for one in value["models"]]
        elif option.key == "parts" and isinstance(value.get("models"), dict):
            named["models"] = {self._named(option, one): own for one, own in value["models"].items()}
        elif isinstance(value.get("models"), list):  # of a rule: models that are named already
            named["models"] = [self._names.get(one, one) for one in value["models"]]
        return {key: self.renamed(one) for key, one in named.items()}
