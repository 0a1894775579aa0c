"""mergekit YAMLs as text: what is said of them, and the recipe of ours that they stand for."""

from __future__ import annotations

from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest

from portmanteau import merge
from portmanteau.compositions import compose, load

NAMES = ("base", "a", "b")
LINEAR = "merge_method: linear\nparameters: {weight: 1.0}\n"
AB = "models: [{model: a}, {model: b}]\n"
PART = "{model: a, layer_range: [0, 4]}"


def said(text: str, folder: Path) -> list[str]:
    """Give the mistakes of a file as `LINE: WHAT (HINT)`."""
    path = folder / "merge.yml"
    path.write_text(dedent(text).lstrip("\n"))
    with pytest.raises(merge.RecipeError) as caught:
        compose(load(path))
    return [
        f"{m.where.rpartition(':')[2]}: {m.what}" + (f" ({m.hint})" if m.hint else "") for m in caught.value.mistakes
    ]


def native(text: str, folder: Path) -> Any:
    """Give the recipe of ours that a mergekit file stands for."""
    path = folder / "merge.yml"
    path.write_text(dedent(text).lstrip("\n"))
    return load(path).document.value


def notes(text: str, folder: Path) -> tuple[str, ...]:
    """Give what a user is told of the merge that a mergekit file asks for."""
    path = folder / "merge.yml"
    path.write_text(dedent(text).lstrip("\n"))
    made = compose(load(path))
    assert isinstance(made, merge.Composed)
    return made.notes
