"""What a path that leads nowhere was probably meant to be."""

from __future__ import annotations

from pathlib import Path

from ..errors import nearest


def nearby(place: Path) -> str:
    """Say what is there in the place of something that is not: the nearest name, or the folder that is missing."""
    if not place.parent.is_dir():
        missing = place.parent
        while missing.parent != missing and not missing.parent.is_dir():
            missing = missing.parent
        close = nearest(missing.name, _names(missing.parent))
        return f"there is no folder {missing}" + (f"; {close}" if close.startswith("did") else "")
    known = _names(place.parent)
    return nearest(place.name, known) if known else f"the folder {place.parent} is empty"


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
