"""A recipe built: checked as a whole, held to its lock, downloaded, and made."""

from __future__ import annotations

from pathlib import Path

from portmanteau.merge import Composed, Progress, Receipt, Surveyed, build, describe
from portmanteau.merge.device import CPU
from portmanteau.merge.non_finite import Choice
from portmanteau.merge.units import readable

from .compose import compose
from .preflight import Preflight, preflight
from .recipe.reading import Recipe, load


def build_recipe(
    recipe: str | Path,
    out: str | Path,
    *,
    threads: int | None = None,
    memory: int | None = None,
    device: str = CPU,
    force: bool = False,
    fresh: bool = False,
    non_finite: Choice = "error",
    locked: bool = False,
    progress: Progress | None = None,
) -> Receipt:
    """Write the model that a recipe in a file asks for.

    Args:
        recipe: the file.
        out: the folder; it appears whole, or not at all.
        threads: how many tensors are made at once; the result does not depend on it.
        memory: bytes in flight; the result does not depend on it.
        device: where torch computes, as in `merge.build`.
        force: replace an earlier result.
        fresh: keep nothing of a build that was ended.
        non_finite: what to do where an input or the result has NaN or infinity.
        locked: take no inputs other than those in the recipe's lock.
        progress: is told how far the work is, and every note.

    Raises PortmanteauError: RecipeError with everything that would stop the build, before any weights are read.

    """
    told = progress or Progress()
    held = _held_to_lock(recipe, threads, told) if locked else Path(recipe)
    loaded, composed = _with_weights(preflight(held, out, force=force, may_stand=True), told)
    receipt = build(
        composed,
        out,
        dtype=loaded.output.dtype,
        shard_size=loaded.output.shard_size,
        threads=threads,
        memory=memory,
        device=device,
        force=force,
        fresh=fresh,
        non_finite=non_finite,
        recipe=loaded.text,
        recipe_folder=loaded.folder,
        progress=progress,
    )
    for note in receipt.notes:  # what only the weights could tell
        if note not in composed.notes:
            told.tell(note)
    return receipt


def _held_to_lock(recipe: str | Path, threads: int | None, told: Progress) -> Recipe:
    from .lock_file import held_to_lock

    return held_to_lock(load(recipe), threads=threads, progress=told)


def _with_weights(ready: Preflight, told: Progress) -> tuple[Recipe, Composed | Surveyed]:
    """Tell what a user should know before the result is made; fetch the weights of which only headers are here."""
    for note in (*ready.composed.notes, *describe.lacks(ready.composed.companions)):
        told.tell(note)
    if not ready.bytes_to_download:
        return ready.recipe, ready.composed
    told.tell(f"downloads {readable(ready.bytes_to_download)} from the Hub")
    return ready.recipe, compose(ready.recipe)
