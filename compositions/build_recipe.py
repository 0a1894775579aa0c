"""A recipe built: checked as a whole, held to its lock, downloaded, and made."""

from __future__ import annotations

from pathlib import Path

from portmanteau.merge import Progress, Receipt, build, describe
from portmanteau.merge.device import CPU
from portmanteau.merge.non_finite import Choice
from portmanteau.merge.units import readable

from .compose import compose
from .preflight import preflight
from .recipe.reading import load


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
    loaded = None
    if locked:
        from .lock_file import held_to_lock

        loaded = held_to_lock(load(recipe), threads=threads, progress=told)
    ready = preflight(loaded or Path(recipe), out, force=force, may_stand=True)
    loaded, composed = ready.recipe, ready.composed
    for note in (*composed.notes, *describe.lacks(composed.companions)):
        told.tell(note)
    if ready.bytes_to_download:
        told.tell(f"downloads {readable(ready.bytes_to_download)} from the Hub")
        composed = compose(loaded)
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
