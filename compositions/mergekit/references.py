"""mergekit's model references (`path@revision+lora@revision`) as names, models and steps of a recipe of ours."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from portmanteau.merge.errors import nearest
from portmanteau.merge.files.places import kind, user_path

from ..recipe.lined import Lined
from ..recipe.lines import KeyPath

Wrong = Callable[..., None]  # of (path, what, hint), and whether the recipe is broken by it
Stored = tuple[str, str | None]  # path or Hub id, and revision


@dataclass
class References:
    """The models that a file names, each under a label: the last part of its path, made unique."""

    folder: Path
    wrong: Wrong
    stages: tuple[str, ...] = ()
    models: dict[str, Any] = field(default_factory=dict)
    steps: dict[str, Any] = field(default_factory=dict)
    _labels: dict[tuple[Stored, Stored | None], str] = field(default_factory=dict)

    def label(self, value: Any, path: KeyPath) -> str | None:
        """Give the label of a reference; None, with the mistake told, for what is none."""
        found = self._parsed(value, path)
        if found is None:
            return None
        (model, revision), lora = found
        if lora is None and model in self.stages:
            return model
        if found not in self._labels:
            if lora is None:
                label = self._unique(Path(model).name)
                self.models[label] = Lined(_reference((model, revision)), path)
            else:
                base = model if model in self.stages else self._base((model, revision), path)
                label = self._unique(f"{Path(model).name}+{Path(lora[0]).name}")
                self.steps[label] = Lined({"lora": {"base": base, "adapters": [_reference(lora)]}}, path)
            self._labels[found] = label
        return self._labels[found]

    def _base(self, stored: Stored, path: KeyPath) -> str | None:
        return self.label({"model": dict(zip(("path", "revision"), stored, strict=True))}, path)

    def _unique(self, name: str) -> str:
        taken, name = {*self.models, *self.steps, *self.stages}, name or "model"
        return next(one for one in (name, *(f"{name}-{i}" for i in range(2, len(taken) + 3))) if one not in taken)

    def _parsed(self, value: Any, path: KeyPath) -> tuple[Stored, Stored | None] | None:
        if isinstance(value, str) and value:
            if kind(self.folder / user_path(value)) != "nothing":
                return (value, None), None  # a folder's name may hold @ and +
            model, plus, lora = value.partition("+")
            if "+" not in lora and model.count("@") <= 1 and lora.count("@") <= 1 and bool(lora) == bool(plus):
                return _split(model), _split(lora) if lora else None
        if isinstance(value, Mapping):
            return self._from_mapping(value, path)
        self.wrong(
            path, f"{value!r} is no reference to a model", "write path[@revision][+lora[@revision]]", broken=True
        )
        return None

    def _from_mapping(self, value: Mapping[str, Any], path: KeyPath) -> tuple[Stored, Stored | None] | None:
        known = ("model", "lora", "override_architecture")
        for key in value:
            if key not in known:
                self.wrong((*path, key), f"unknown key {key!r}", nearest(key, known))
        if value.get("override_architecture") is not None:
            what = "override_architecture is not needed: layers are found by the tensors' names"
            self.wrong((*path, "override_architecture"), what, "leave it out")
        model = self._stored(value.get("model"), (*path, "model"))
        lora = self._stored(value["lora"], (*path, "lora")) if value.get("lora") is not None else None
        return (model, lora) if model else None

    def _stored(self, value: Any, path: KeyPath) -> Stored | None:
        if isinstance(value, str) and value:
            return (value, None) if kind(self.folder / user_path(value)) != "nothing" else _split(value)
        if isinstance(value, Mapping) and _is_stored(value):
            for key in value:
                if key not in ("path", "revision"):
                    self.wrong((*path, key), f"unknown key {key!r}", nearest(key, ("path", "revision")))
            return value["path"], value.get("revision")
        self.wrong(
            path, f"{value!r} is no path of a model", "write PATH, PATH@REVISION or {path: …, revision: …}", broken=True
        )
        return None


def _is_stored(value: Mapping[str, Any]) -> bool:
    path, revision = value.get("path"), value.get("revision")
    return isinstance(path, str) and path != "" and (revision is None or isinstance(revision, str))


def _split(text: str) -> Stored:
    path, at, revision = text.partition("@")
    return path, revision if at else None


def _reference(stored: Stored) -> Any:
    path, revision = stored
    return path if revision is None else {"path": path, "revision": revision}
