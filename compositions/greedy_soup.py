"""Greedy soups: models taken into an average one by one, as long as a metric does not get worse."""

from __future__ import annotations

import glob
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from portmanteau.merge import Checkpoint, Composed, MergeError, Receipt, build, make_plan
from portmanteau.merge import open as open_checkpoint
from portmanteau.merge.errors import Mistake, PortmanteauError, some
from portmanteau.merge.files.places import kind, user_path
from portmanteau.merge.node import Step
from portmanteau.merge.non_finite import Choice
from portmanteau.merge.results.output import check_file, check_place

from .average import average
from .compose import compose
from .recipe.reading import load
from .recipe.reference import Reference

Measure = Callable[[Path], float]


@dataclass(frozen=True)
class Try:
    """One model's turn, best first: its own metric, that of the soup with it, and whether it was taken."""

    model: str
    alone: float
    soup: float
    taken: bool


@dataclass(frozen=True)
class Soup:
    """What a greedy soup came to: every try in order, the models taken in the order given, the metric, the recipe."""

    tries: tuple[Try, ...]
    models: tuple[str, ...]
    metric: float
    recipe: Path
    receipt: Receipt

    def document(self) -> dict[str, Any]:
        """Describe it as plain values."""
        tries = [asdict(one) for one in self.tries]
        return {"recipe": str(self.recipe), "metric": self.metric, "models": self.models, "tries": tries}


def greedy_soup(
    models: Sequence[str | Path],
    out: str | Path,
    *,
    measure: Measure,
    minimize: bool = False,
    shared: str | None = None,
    force: bool = False,
    non_finite: Choice = "error",
    tell: Callable[[str], None] = lambda line: None,
) -> Soup:
    """Build the greedy soup of several models (Wortsman et al. 2022, arXiv 2203.05482, recipe 1).

    Sort the models by their metric, the best first (ties: as given), and begin with the best; take each of the others
    into the average if the metric of the average with it is at least as good as without. Every candidate is built in a
    folder beside `out`, measured and removed: of n models 2n − 1 are measured. The recipe of the result is written as
    `OUT.yaml` and built as `out`.

    >>> import torch
    >>> from portmanteau.merge import InMemory
    >>> for name, value in (("four", 4.0), ("none", 0.0), ("nine", 9.0)):
    ...     receipt = build(InMemory(name, {"weight": torch.tensor([value])}), name)
    >>> def near_five(folder):
    ...     return -abs(open_checkpoint(folder)["weight"].item() - 5)
    >>> soup = greedy_soup(["four", "none", "nine"], "soup", measure=near_five)
    >>> [(one.alone, one.soup, one.taken) for one in soup.tries]  # 4; (4 + 9) / 2 = 6.5 is worse, (4 + 0) / 2 = 2 too
    [(-1.0, -1.0, True), (-4.0, -1.5, False), (-5.0, -3.0, False)]

    Args:
        models: folders, files, Hub ids and patterns, as in recipes; relative to the working directory.
        out: the folder to make.
        measure: gives the metric of the model in a folder.
        minimize: less is better, as with a loss.
        shared: tensors that must be equal in all models, as in `average`; "" for none.
        force: replace an earlier result, and its recipe.
        non_finite: what to do where a model or an average has NaN or infinity, as in `merge.build`.
        tell: is told every metric, and once each note on NaN and infinity, as a line of text.

    Raises PortmanteauError: before anything is measured, for models that do not fit and a place that cannot be written.

    """
    out = Path(out)
    kitchen = _Kitchen(_opened(models), shared, non_finite, tell)
    _check(kitchen, out, force=force)
    sign = -1 if minimize else 1
    with _folder_for_candidates(out) as folder:
        alone: dict[str, float] = {}
        for name in kitchen.models:
            alone[name] = kitchen.measured([name], folder / "candidate", measure)
            tell(f"{name}: {alone[name]:g}")
        first, *others = sorted(alone, key=lambda name: sign * alone[name], reverse=True)
        taken, best, tries = [first], alone[first], [Try(first, alone[first], alone[first], True)]
        for name in others:
            metric = kitchen.measured([*taken, name], folder / "candidate", measure)
            tries.append(Try(name, alone[name], metric, sign * metric >= sign * best))
            tell(f"with {name}: {metric:g}, {'taken' if tries[-1].taken else 'left out'}")
            if tries[-1].taken:
                taken, best = [*taken, name], metric
    recipe = _recipe_beside(out)
    recipe.write_text(kitchen.recipe(taken, out.absolute().parent), encoding="utf-8")
    loaded = load(recipe)
    receipt = build(compose(loaded), out, force=force, non_finite=non_finite, recipe=loaded.text)
    return Soup(tuple(tries), tuple(kitchen.in_order(taken)), best, recipe, receipt)


@dataclass(frozen=True)
class _Kitchen:
    """The models by the names under which they were given, how they are averaged, and what was told of them."""

    models: dict[str, Checkpoint]
    shared: str | None
    non_finite: Choice
    tell: Callable[[str], None]
    _told: dict[str, None] = field(default_factory=dict)

    def in_order(self, names: Sequence[str]) -> list[str]:
        """Give some of the models in the order in which they were given, which is the order of the sum."""
        return [name for name in self.models if name in names]

    def average(self, names: Sequence[str]) -> Composed:
        """Average some of the models."""
        return average(models=[self.models[name] for name in self.in_order(names)], shared=self.shared)

    def measured(self, names: Sequence[str], folder: Path, measure: Measure) -> float:
        """Build the average of some models, measure it, and remove it."""
        composed = self.average(names)
        receipt = build(composed, folder, non_finite=self.non_finite)
        for note in receipt.notes:  # what only the weights could tell, once
            if note not in composed.notes and note not in self._told:
                self._told[note] = None
                self.tell(f"note: {note}")
        try:
            metric = float(measure(folder))
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        if math.isnan(metric):
            raise PortmanteauError(" + ".join(names), "the metric is not a number", "such a candidate has no rank")
        return metric

    def recipe(self, names: Sequence[str], folder: Path) -> str:
        """Write the recipe of an average, its paths relative to a folder."""
        keys: dict[str, Any] = {"models": [_seen_from(folder, name) for name in self.in_order(names)]}
        if self.shared is not None:
            keys["shared"] = self.shared
        return yaml.safe_dump({"merge": {"average": keys}}, sort_keys=False, allow_unicode=True, width=1000)


def _opened(models: Sequence[str | Path]) -> dict[str, Checkpoint]:
    """Open what is named, patterns expanded. Raises MergeError with all that cannot be."""
    found: dict[str, Checkpoint] = {}
    mistakes: list[Mistake] = []
    for asked in map(str, models):
        expanded = Reference(path=asked).expanded(Path.cwd())
        if not expanded:
            mistakes.append(Mistake("models", f"nothing is called {asked!r}"))
        for reference in expanded:
            if reference.path in found:
                mistakes.append(Mistake("models", f"{reference.path} is named twice", "each can be taken once"))
                continue
            try:
                found[reference.path] = open_checkpoint(reference.path)
            except PortmanteauError as error:
                mistakes += error.mistakes
    if not mistakes and len(found) < 2:
        mistakes.append(Mistake("models", f"there is only {some(found) or 'none'}", "a soup is made of several models"))
    if mistakes:
        raise MergeError.of(mistakes)
    return found


def _check(kitchen: _Kitchen, out: Path, *, force: bool) -> None:
    """Check, before anything is measured, that all models fit and that the results can be written.

    Tensors that must be equal are compared here: they are small, and a difference would end the work half done.
    """
    every = kitchen.average(list(kitchen.models))
    plan = make_plan(every)
    check_place(out, nbytes=plan.bytes_written, force=force)
    if _recipe_beside(out).absolute().parent.is_dir():
        check_file(_recipe_beside(out), force=force)
    for step in plan.steps:
        if isinstance(step, Step) and step.operator.name == "equal":
            every.read(step.output.name)


def _recipe_beside(out: Path) -> Path:
    return out.with_name(f"{out.name}.yaml")


def _seen_from(folder: Path, name: str) -> str:
    """Write a path relative to a folder, as a recipe there names it; what is no path here (a Hub id) stays as it is."""
    path = user_path(name)
    if kind(path) == "nothing":
        return name
    if not path.is_absolute():
        here = Path.cwd() / path
        path = Path(os.path.relpath(here.parent.resolve() / here.name, folder.resolve()))
    return glob.escape(path.as_posix())


@contextmanager
def _folder_for_candidates(out: Path) -> Iterator[Path]:
    """Give a folder beside the result; nothing is left of it, whatever happens."""
    folder = out.absolute().with_name(f".{out.name}.portmanteau-candidates")
    shutil.rmtree(folder, ignore_errors=True)  # left over from a run that was killed
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
