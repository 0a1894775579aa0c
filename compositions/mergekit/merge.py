"""How one mergekit document merges, as an operator or a composition of ours: its models, slices or modules."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from portmanteau.merge.errors import nearest

from ..components import REST
from ..recipe.lined import Lined, plain
from ..recipe.lines import KeyPath
from .methods import METHODS, Method
from .parameters import Level, Parameters
from .plugin_methods import hint, method_of
from .references import References

Wrong = Callable[..., None]  # of (path, what, hint)
Entry = tuple[str, Mapping[str, Any], KeyPath]  # a model's label, what stands beside it, and where
_PARTS = ("models", "slices", "modules")
_MERGE = (*_PARTS, "merge_method", "base_model", "parameters")
_KEYS = (*_MERGE, "dtype", "out_dtype", "tokenizer_source", "tokenizer", "chat_template")


class Merge:
    """Reads how one document merges."""

    def __init__(
        self,
        value: Mapping[str, Any],
        path: KeyPath,
        references: References,
        wrong: Wrong,
        note: Callable[[KeyPath, str], None],
        prefix: str,
    ) -> None:
        """Read the keys of a document that stands at `path`; its modules' steps are named with the prefix."""
        self._wrong, self._value, self._path, self._references = wrong, value, path, references
        self._prefix = prefix  # of the names of its modules' steps
        known = [*_KEYS, "name"] if path else _KEYS
        self._unknown(value, known, path)
        name = value.get("merge_method")
        self._method: Method | None = method_of(name) if isinstance(name, str) else None
        if self._method is None:
            what = f"unknown merge_method {name!r}" if name is not None else "lacks the key 'merge_method'"
            self._wrong((*path, "merge_method"), what, hint(str(name)), broken=True)
        self._parameters = Parameters(str(name), self._method or METHODS["linear"], self._told, note)
        self._levels = [Level.of(value, path, self._wrong)]
        self._known(self._levels[0])
        base = value.get("base_model")
        self._base = references.label(base, (*path, "base_model")) if base is not None else None
        self._first: str | None = None  # the first model that is named

    def result(self, steps: dict[str, Any]) -> dict[str, Any]:
        """Write one operator or composition; modules become steps beside it."""
        given = [key for key in _PARTS if self._value.get(key)]
        if len(given) != 1:
            what = f"{' and '.join(given)} are given" if given else "none of models, slices and modules is given"
            self._wrong(
                (*self._path, *given[-1:]), what, "a merge is said by one of models, slices and modules", broken=True
            )
            return {}
        key = given[0]
        if key == "modules":
            return self._modules(self._value[key], (*self._path, key), steps)
        return self._of_base(self._part(self._value, self._path, self._levels, None), steps)

    def _of_base(self, merged: dict[str, Any], steps: dict[str, Any]) -> dict[str, Any]:
        """Give a merge the base's config where the base is one of the models, and not the first."""
        method = self._method
        if method is None or method.takes_base != "no" or not method.in_order or method.operator not in merged:
            return merged
        if self._base is None or plain(merged[method.operator]["models"])[0] == self._base:
            return merged
        step = f"{self._prefix}{method.operator}-merged"
        steps[step] = Lined(merged, (*self._path, "merge_method"))
        donor = Lined(self._base, (*self._path, "base_model"))
        return {"assemble": {"parts": {"*": Lined(step, (*self._path, "merge_method"))}, "donor": donor}}

    def _part(
        self, holder: Mapping[str, Any], path: KeyPath, levels: Sequence[Level], module: str | None
    ) -> dict[str, Any]:
        """Write the `models` or the `slices` of a document or of a module."""
        if holder.get("models"):
            return self._models(holder["models"], (*path, "models"), levels, module)
        return self._slices(holder["slices"], (*path, "slices"), levels, module)

    def _models(self, value: Any, path: KeyPath, levels: Sequence[Level], module: str | None) -> dict[str, Any]:
        entries = self._entries(value, path, ("model", "parameters"))
        base, labels = self._base, [label for label, _, _ in entries]
        takes = self._method.takes_base if self._method else "no"
        if base is not None and base not in labels and takes in ("first", "no"):
            added: Entry = (base, {}, (*self._path, "base_model"))
            entries = [*entries, added] if self._method and self._method.in_order else [added, *entries]
        body = self._body(entries, base, path, levels, base_given=base is not None)
        only = {"only": module} if module is not None else {}
        return {self._method.operator if self._method else "linear": {**body, **only}}

    def _slices(self, value: Any, path: KeyPath, levels: Sequence[Level], module: str | None) -> dict[str, Any]:
        parts = []
        known = ("sources", "base_model", "parameters", "residual_weight")
        for i, one in enumerate(self._list(value, path)):
            here = (*path, i)
            if not isinstance(one, dict) or not one.get("sources"):
                self._wrong(
                    here, "a slice lacks its sources", "sources: [{model: …, layer_range: [first, end]}]", broken=True
                )
                continue
            self._unknown(one, known, here)
            if one.get("residual_weight") is not None:
                self._wrong((*here, "residual_weight"), "residual_weight has no effect in mergekit", "leave it out")
            parts.append(Lined(self._slice(one, here, levels), here))
        more: dict[str, Any] = {"only": module} if module is not None else {}
        if self._base is not None:
            more["donor"] = Lined(self._base, (*self._path, "base_model"))
        return {"slices": {"parts": parts, **more} if more else parts}

    def _slice(self, value: Mapping[str, Any], path: KeyPath, levels: Sequence[Level]) -> dict[str, Any]:
        level = Level.of(value, path, self._wrong)
        self._known(level)
        entries = self._entries(value["sources"], (*path, "sources"), ("model", "layer_range", "parameters"))
        own = value.get("base_model")
        base = self._references.label(own, (*path, "base_model")) if own is not None else self._base
        listed = base in [label for label, _, _ in entries]
        body = self._body(entries, base if listed else None, path, [level, *levels], base_given=base is not None)
        ranges = {label: self._range(entry, place) for label, entry, place in entries}
        same = len({str(plain(one)) for one in ranges.values()}) == 1
        layers = next(iter(ranges.values())) if same and ranges else ranges
        operator = self._method.operator if self._method else "copy"
        models = body.pop("models")
        if operator == "copy" and isinstance(models, list) and len(models) == 1:
            return {"model": models[0], "layers": layers, **body}
        return {"operator": operator, "models": models, "layers": layers, **body}

    def _body(
        self,
        entries: Sequence[Entry],
        base: str | None,
        path: KeyPath,
        levels: Sequence[Level],
        *,
        base_given: bool,
    ) -> dict[str, Any]:
        """Write what is merged: the base, the models with their own settings, and the common ones."""
        method = self._method
        apart = method is not None and method.takes_base in ("required", "optional")
        needed = ("required", "first", "optional") if base_given else ("required", "first")
        if method is not None and method.takes_base in needed and base is None:
            where = path if base_given else (*self._path, "merge_method")
            lacks = "and it is not among the sources" if base_given else "and there is none"
            self._wrong(where, f"{self._parameters.name} needs its base_model, {lacks}")
        merged = [entry for entry in entries if not (apart and entry[0] == base)]
        if method is None or not method.in_order:  # the base is the first of equals: what the others are added to
            merged.sort(key=lambda entry: entry[0] != base)
        own: dict[str, Level] = {}
        for label, entry, place in entries:
            level = Level.of(entry, place, self._wrong)
            self._known(level, of_model=True, of_base=apart and label == base)
            own[label] = level
        self._count(len(merged), path)
        places = {label: place for label, _, place in merged}
        common, of_each = self._parameters.settings(levels, {label: own[label] for label in places}, places)
        if apart and base is not None:
            of_base = [own[base]] if base in own else []
            common |= self._parameters.of_base([*of_base, *levels], (*self._path, "base_model"))
        models = {label: Lined(_short(of_each[label]), place) for label, place in places.items()}
        body = {**({"base": base} if apart and base is not None else {}), "models": models, **common}
        if not any(of_each.values()):
            body["models"] = [Lined(label, place) for label, place in places.items()]
        return body

    def _count(self, count: int, path: KeyPath) -> None:
        least, most = self._method.models if self._method else (1, None)
        if count < least or (most is not None and count > most):
            wanted = f"exactly {least}" if least == most else f"at least {least}"
            hint = "a base_model that is not listed counts as one" if self._base is not None else ""
            self._wrong(path, f"{self._parameters.name} takes {wanted} models, and {count} are given", hint)

    def _modules(self, value: Any, path: KeyPath, steps: dict[str, Any]) -> dict[str, Any]:
        """Write each module as a step, and the result as assembled from them."""
        if not isinstance(value, dict):
            self._wrong(path, "modules is no mapping from names to modules", broken=True)
            return {}
        parts: dict[str, Any] = {}
        for name, one in value.items():
            here = (*path, name)
            if not isinstance(one, dict) or bool(one.get("models")) == bool(one.get("slices")):
                self._wrong(here, f"the module {name!r} has either models or slices", broken=True)
                continue
            self._unknown(one, ("models", "slices", "parameters"), here)
            level = Level.of(one, here, self._wrong)
            self._known(level)
            merged = self._part(one, here, [level, *self._levels], name if name != REST else None)
            if list(value) == [REST]:
                return merged
            steps[self._prefix + name] = Lined(merged, here)
            parts[name] = Lined(self._prefix + name, here)
        ordered = dict(sorted(parts.items(), key=lambda part: part[0] == REST))  # what takes the rest comes last
        donor = self._base if self._base is not None else self._first
        return {"assemble": Lined({"parts": ordered, **({"donor": donor} if donor is not None else {})}, path)}

    # ---- lists, keys and ranges

    def _entries(self, value: Any, path: KeyPath, known: Sequence[str]) -> list[Entry]:
        """Read a list of models or sources, each with its label."""
        entries: list[Entry] = []
        for i, one in enumerate(self._list(value, path)):
            here = (*path, i)
            if not isinstance(one, dict) or "model" not in one:
                self._wrong(here, "lacks the key 'model'", broken=True)
                continue
            self._unknown(one, known, here)
            label = self._references.label(one["model"], (*here, "model"))
            if label is not None and label in [other for other, _, _ in entries]:
                hint = "mergekit merges only one of them; in our recipes two names may stand for one model"
                self._wrong((*here, "model"), f"{label} is listed twice", hint, broken=True)
            elif label is not None:
                entries.append((label, one, here))
                self._first = self._first or label
        return entries

    def _range(self, entry: Mapping[str, Any], path: KeyPath) -> Any:
        value = entry.get("layer_range")
        if not isinstance(value, list) or len(value) != 2 or not all(type(one) is int for one in value):
            self._wrong(
                (*path, "layer_range"), "a source needs layer_range: [first, end], end not counted", broken=True
            )
            return [0, 1]
        return Lined(value, (*path, "layer_range"))

    def _list(self, value: Any, path: KeyPath) -> list[Any]:
        if isinstance(value, list):
            return value
        self._wrong(path, f"{path[-1]} is no list", broken=True)
        return []

    def _unknown(self, value: Mapping[str, Any], known: Sequence[str], path: KeyPath) -> None:
        for key in value:
            if key not in known:
                self._wrong((*path, key), f"unknown key {key!r}", nearest(key, known))

    def _known(self, level: Level, *, of_model: bool = False, of_base: bool = False) -> None:
        if self._method is not None:
            self._parameters.refuse_unknown(level, of_model=of_model, of_base=of_base)

    def _told(self, path: KeyPath, what: str, hint: str = "", *, broken: bool = False) -> None:
        """Tell of a mistake in parameters, where the method is known."""
        if self._method is not None:
            self._wrong(path, what, hint, broken=broken)


def _short(settings: dict[str, Any]) -> Any:
    """Write a model's own settings: nothing, its weight alone, or all."""
    if not settings:
        return None
    alone = settings.get("weight") if len(settings) == 1 else None
    return settings if alone is None or isinstance(plain(alone), Mapping) else alone
