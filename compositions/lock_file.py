"""RECIPE.lock, beside a recipe: the revision and the full digest of every file that the recipe reads."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from portmanteau.merge import Progress, RecipeError
from portmanteau.merge.companions import is_companion
from portmanteau.merge.errors import Mistake
from portmanteau.merge.files import hub
from portmanteau.merge.files.digests import digest, digest_of_file
from portmanteau.merge.limits import Limits
from portmanteau.merge.sparse import file as sparse_file

from .compose import compose
from .recipe.reading import Recipe
from .recipe.reference import Reference, references, replaced

_SHA256 = re.compile(r"[0-9a-f]{64}")
_AGAIN = "portmanteau lock RECIPE takes things as they are now"


def lock_beside(recipe: Recipe) -> Path:
    """Give the place of a recipe's lock."""
    path = Path(recipe.document.file)
    return path.with_name(f"{path.name}.lock")


def write(recipe: Recipe, *, threads: int | None = None, progress: Progress | None = None) -> tuple[Path, int]:
    """Write the lock of a recipe; give its place, and how many files it names.

    Raises RecipeError where the recipe cannot be composed.
    """
    compose(recipe)
    places: dict[str, _Place] = {}
    for reference in _every(recipe):
        key, place = _key(reference, recipe), _place(reference, recipe)
        known = places[key].files if key in places else {}
        places[key] = _Place({**known, **place.files}, place.origin)
    files = {key: places[key].files for key in sorted(places)}
    marks = _marks([path for found in files.values() for path in found.values()], threads, progress)
    models = {
        key: {**places[key].origin, "files": {name: marks[path] for name, path in sorted(found.items())}}
        for key, found in files.items()
    }
    path = lock_beside(recipe)
    text = json.dumps({"recipe": digest(recipe.text.encode()), "models": models}, indent=2, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")
    return path, sum(map(len, files.values()))


def held_to_lock(recipe: Recipe, *, threads: int | None = None, progress: Progress | None = None) -> Recipe:
    """Give the recipe with the revisions of its lock, once every file that it reads is the one that was locked.

    Raises RecipeError with every file that is another, missing, or new.
    """
    path = lock_beside(recipe)
    models = _locked(recipe, path)
    named = {_key(one, recipe): one for one in _every(recipe)}
    mistakes = [
        Mistake(str(path), f"does not name {key}", _AGAIN) if key in named else Mistake(str(path), f"names {key} too")
        for key in sorted(named.keys() ^ models.keys())
    ]
    compared: dict[str, tuple[Path, Mapping[str, Any]]] = {}
    for key in sorted(named.keys() & models.keys()):
        root = _root(named[key], recipe, models[key].get("revision"))
        locked = models[key]["files"]
        there = {name for name in _beside(root) if name in locked or not _is_weights(name)}
        folder = root if root.is_dir() else root.parent
        mistakes += [
            Mistake(str(folder / name), "is not in the lock", _AGAIN) for name in sorted(there - locked.keys())
        ]
        for name, mark in locked.items():
            if (folder / name).is_file():
                compared[f"{key}: {name}"] = folder / name, mark
            else:
                mistakes.append(Mistake(str(folder / name), "is in the lock, and is missing"))
    marks = _marks([place for place, _ in compared.values()], threads, progress)
    for place, mark in compared.values():
        if marks[place]["blake3"] != mark["blake3"] or marks[place]["bytes"] != mark["bytes"]:
            mistakes.append(Mistake(str(place), "is not the file that was locked", _AGAIN))
    if mistakes:
        raise RecipeError.of(mistakes)
    return _pinned(recipe, models)


def _locked(recipe: Recipe, path: Path) -> dict[str, Any]:
    """Read the lock. Raises RecipeError where there is none, and for that of another recipe."""
    if not path.is_file():
        raise RecipeError(str(path), "there is no lock", f"portmanteau lock {recipe.document.file} writes it")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        models = {str(key): dict(value) for key, value in found["models"].items()}
        marks = [mark for value in models.values() for mark in value["files"].values()]
        whole = all(isinstance(mark["blake3"], str) and isinstance(mark["bytes"], int) for mark in marks)
        same = found["recipe"] == digest(recipe.text.encode())
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        whole = False
    if not whole:
        raise RecipeError(str(path), "is no lock, or a damaged one", _AGAIN)
    if not same:
        raise RecipeError(recipe.document.file, "the recipe is not the one that was locked", _AGAIN)
    return models


@dataclass(frozen=True)
class _Place:
    """Where a reference leads: its files by their names in their folder, and where on the Hub they come from."""

    files: Mapping[str, Path]
    origin: Mapping[str, str]


def _key(reference: Reference, recipe: Recipe) -> str:
    meant = recipe.models.get(reference.path, reference)
    return f"{reference.path}@{meant.revision}" if meant.revision else reference.path


def _place(reference: Reference, recipe: Recipe) -> _Place:
    """Find the files that are read for a reference, and those that go with them."""
    root = _root(reference, recipe, None)
    folder, made = root if root.is_dir() else root.parent, reference.opener()(root)
    weights = {file.path.name for file in getattr(made, "stored", made).files} | set(getattr(made, "head", ()))
    if not weights:  # a file that was decoded: the published form of sparse fine-tunes
        weights = {root.name if root.is_file() else sparse_file.PUBLISHED}
    names = [name for name in _beside(root) if name in weights or not _is_weights(name)]
    meant = recipe.models.get(reference.path, reference)
    origin = {}
    if meant.is_on_hub(recipe.folder):
        origin = {"repository": meant.path.partition("@")[0], "revision": root.name}
    return _Place({name: folder / name for name in names}, origin)


def _root(reference: Reference, recipe: Recipe, revision: str | None) -> Path:
    """Give the file or folder that a reference stands for; of the Hub the folder in the cache."""
    meant = recipe.models.get(reference.path, reference)
    if not meant.is_on_hub(recipe.folder):
        return meant.local(recipe.folder)
    repository, _, tag = meant.path.partition("@")
    return hub.download(repository, revision or meant.revision or tag or None, _KINDS[type(reference).__name__])


_KINDS = {
    "Reference": hub.MODEL,
    "AdapterReference": hub.ADAPTER,
    "BottleneckReference": hub.BOTTLENECK,
    "SparseReference": sparse_file.KINDS,
}


def _beside(root: Path) -> Iterator[str]:
    """Go through the names of weights, companions and JSON files in a folder; beside a file through its companions."""
    folder = root if root.is_dir() else root.parent
    for path in sorted([*folder.glob("*"), *folder.glob("*/*")]):
        name = path.relative_to(folder).as_posix()
        is_json = root.is_dir() and path.parent == folder and path.suffix == ".json"
        is_weights = _is_weights(name) and (root.is_dir() or path == root)
        if path.is_file() and (is_companion(name) or is_json or is_weights):
            yield name


def _is_weights(name: str) -> bool:
    return name.endswith((".safetensors", ".bin", ".pt", ".pth"))


def _marks(paths: Iterable[Path], threads: int | None, progress: Progress | None) -> dict[Path, dict[str, Any]]:
    """Take size and digest of files; of one in the Hub's cache also the SHA-256 that the Hub calls it by."""
    every = list(dict.fromkeys(paths))
    told = progress or Progress()
    told.begin("digests", sum(path.stat().st_size for path in every), len(every))

    def mark(path: Path) -> dict[str, Any]:
        found = {"bytes": path.stat().st_size, "blake3": digest_of_file(path, told.advance)}
        told.advance(0, 1)
        blob = path.resolve().name
        return {**found, "sha256": blob} if path.is_symlink() and _SHA256.fullmatch(blob) else found

    with ThreadPoolExecutor(Limits.of(threads, None).threads, "digests") as pool:
        return dict(zip(every, pool.map(mark, every), strict=True))


def _every(recipe: Recipe) -> Iterator[Reference]:
    """Go through all references of a recipe to what is on disk or on the Hub, each as what it is used as."""
    used = [found for body in (*recipe.steps.values(), recipe.merge) for _, found in references(body.arguments)]
    if recipe.output.tokenizer is not None:
        used += [found for _, found in recipe.output.tokenizer.references(())]
    used += [adapter for model in recipe.models.values() for adapter, _ in model.lora]
    named = {found.path for found in used}
    used += [Reference(path=name) for name in recipe.models if name not in named]
    yield from (one.model_copy(update={"lora": ()}) for one in used if one.path not in recipe.steps)


def _pinned(recipe: Recipe, models: Mapping[str, Any]) -> Recipe:
    """Put the revisions of the lock in the place of branches and tags."""

    def pin(reference: Reference) -> Reference:
        revision = models.get(_key(reference, recipe), {}).get("revision")
        lora = tuple((pin(adapter), weight) for adapter, weight in reference.lora)
        if reference.path in recipe.models or not (revision or lora):
            return reference
        return reference.model_copy(update={"revision": revision or reference.revision, "lora": lora})

    named = {}
    for name, one in recipe.models.items():
        revision = models.get(_key(Reference(path=name), recipe), {}).get("revision", one.revision)
        lora = tuple((pin(adapter), weight) for adapter, weight in one.lora)
        named[name] = one.model_copy(update={"revision": revision, "lora": lora})
    output = recipe.output
    if output.tokenizer is not None:
        output = output.model_copy(update={"tokenizer": output.tokenizer.with_models(pin)})
    steps = {name: replace(body, arguments=replaced(body.arguments, pin)) for name, body in recipe.steps.items()}
    merge = replace(recipe.merge, arguments=replaced(recipe.merge.arguments, pin))
    return replace(recipe, models=named, steps=steps, merge=merge, output=output)
