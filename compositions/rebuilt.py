"""Whether the recipe in a result's receipt still gives its bits."""

from __future__ import annotations

from pathlib import Path

from portmanteau.merge import OutputError, Progress
from portmanteau.merge.errors import Mistake
from portmanteau.merge.receipt import RECEIPT, read
from portmanteau.merge.results.remade import remade

from .compose import compose
from .recipe.reading import load


def rebuilt(
    out: str | Path,
    *,
    folder: str | Path | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> tuple[Mistake, ...]:
    """Make a result again from the recipe in its receipt, without writing it; name each tensor and file that differs.

    >>> from portmanteau.merge import build
    >>> recipe = load("examples/average.yaml")
    >>> receipt = build(compose(recipe), "merged", recipe=recipe.text, recipe_folder=recipe.folder)
    >>> rebuilt("merged")
    ()

    Args:
        out: the folder of the result.
        folder: what the recipe's paths are relative to, where that has moved.
        threads: how many tensors are made at once.
        progress: is told how far the work is.

    Raises OutputError where the receipt is damaged or holds no recipe, RecipeError where that cannot be composed.
    """
    out = Path(out)
    receipt = read(out)
    if receipt.recipe is None:
        raise OutputError(str(out / RECEIPT), "holds no recipe: it was built from Python")
    home = Path(folder) if folder is not None else out / receipt.recipe.get("folder", "..")
    if not home.is_dir():
        hint = "name the folder that the recipe's paths are relative to: --folder DIR"
        raise OutputError(str(out / RECEIPT), f"its recipe stood in {home}, which is not there", hint)
    loaded = load(home / "the recipe in the receipt", text=receipt.recipe["text"])
    return remade(
        compose(loaded),
        receipt,
        dtype=loaded.output.dtype,
        shard_size=loaded.output.shard_size,
        recipe=loaded.text,
        threads=threads,
        progress=progress,
    )
