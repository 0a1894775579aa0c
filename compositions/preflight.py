"""Everything that could stop a build, found before a byte of weights is read or downloaded, and said at once."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from portmanteau.merge import (
    Composed,
    Plan,
    PortmanteauError,
    RecipeError,
    StoredCheckpoint,
    Surveyed,
    describe,
    make_plan,
)
from portmanteau.merge.errors import Mistake
from portmanteau.merge.results.output import is_result, place_mistakes
from portmanteau.merge.units import readable

from .compose import compose
from .recipe.reading import Recipe, load


@dataclass(frozen=True)
class Preflight:
    """A recipe that can be built.

    Attributes:
        recipe: its text, read.
        composed: the result, put together from headers.
        plan: what a build does.
        bytes_to_download: of models on the Hub of which only headers are here; then the result can only be planned.

    """

    recipe: Recipe
    composed: Composed | Surveyed
    plan: Plan
    bytes_to_download: int

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know of the result."""
        return (*self.plan.notes, *describe.lacks(self.plan.companions))

    def document(self) -> dict[str, Any]:
        """Describe what a build would make as plain values."""
        made = {"tensors": None if self.plan.pending else len(self.plan.steps), "bytes": self.plan.bytes_written}
        return {**made, "bytes_to_download": self.bytes_to_download, "notes": self.notes}


def preflight(
    path: str | Path | Recipe, out: str | Path | None = None, *, force: bool = False, may_stand: bool = False
) -> Preflight:
    """Check a recipe, the headers of all models that it names, and the place of the result, if one is named.

    `may_stand`: a result that stands there is nothing wrong as long as nothing is to be downloaded: a build then looks
    whether it is what is asked for.

    >>> preflight("examples/ties.yaml", "merged").plan
    <Plan: 75 tensors, reads 2.0 MB, writes 670.1 kB>
    >>> try:
    ...     preflight("examples/linear.yaml", "examples/models/base")
    ... except RecipeError as error:
    ...     print(error.mistakes[0].what)
    exists already

    Raises RecipeError with everything found that would stop a build.
    """
    mistakes: list[Mistake] = []
    recipe = composed = plan = None
    try:
        recipe = path if isinstance(path, Recipe) else load(path)
        composed = compose(recipe, weights=False)
        plan = make_plan(composed, recipe.output.dtype)
    except PortmanteauError as error:
        mistakes += error.mistakes
    wanted = sum(store.bytes_to_download for store in _stores(plan)) if plan else 0
    if out is not None:
        force = force or (may_stand and not wanted and is_result(Path(out)))
        nbytes = plan.bytes_written + plan.companions.nbytes if plan else 0
        mistakes += place_mistakes(Path(out), nbytes=nbytes, force=force)
    mistakes += _cache_mistakes(wanted)
    if mistakes or recipe is None or composed is None or plan is None:
        raise RecipeError.of(mistakes)
    return Preflight(recipe, composed, plan, wanted)


def _stores(plan: Plan) -> Iterator[StoredCheckpoint]:
    yield from (store for store in plan.checkpoints if isinstance(store, StoredCheckpoint))


def _cache_mistakes(nbytes: int) -> list[Mistake]:
    """Look whether the Hub's cache has room for what is to be downloaded."""
    if not nbytes:
        return []
    from huggingface_hub.constants import HF_HUB_CACHE

    home = Path(HF_HUB_CACHE)
    while not home.exists():
        home = home.parent
    free = shutil.disk_usage(home).free
    if free >= nbytes:
        return []
    what = f"the Hub's cache needs {readable(nbytes)} more, and has {readable(free)} free"
    return [Mistake(HF_HUB_CACHE, what, "free some space, or name another disk by HF_HUB_CACHE")]
