"""Where a reference leads: paths of strangers' recipes and folders, looked at without being surprised by them."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Literal

from ..errors import CheckpointError, Mistake

Kind = Literal["folder", "file", "other", "nothing"]


def user_path(reference: str | Path) -> Path:
    """Give the path that a text stands for; `~` is the user's home, and what is nobody's home stands for itself."""
    try:
        return Path(reference).expanduser()
    except RuntimeError:
        return Path(reference)


def kind(path: Path) -> Kind:
    """Tell what stands at a path; devices and pipes are `other`. Raises CheckpointError where it cannot be seen."""
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: no text that a path may hold
        return "nothing"
    except OSError as error:
        raise CheckpointError(str(path), f"cannot be looked at ({error.strerror or error})") from error
    return "folder" if stat.S_ISDIR(mode) else "file" if stat.S_ISREG(mode) else "other"


def neighbours(path: Path) -> list[str]:
    """List what stands beside a path, for hints; nothing where that cannot be seen."""
    try:
        return sorted(sibling.name for sibling in path.parent.iterdir())
    except (OSError, ValueError):
        return []


def link_mistake(path: Path, folder: Path) -> Mistake | None:
    """Find whether a file of a checkpoint's folder is a link that leads out of it; to blobs of the Hub's cache it may.

    A folder from elsewhere could otherwise carry any file of this machine into the result.
    """
    try:
        target = path.resolve()
        inside = target.is_relative_to(folder.resolve())
    except (OSError, RuntimeError) as error:  # a loop of links
        return Mistake(str(path), f"a link that leads nowhere ({error})")
    if inside or (target.parent.name == "blobs" and target.parent.parent.name.startswith("models--")):
        return None
    hint = "put the file itself there; a whole folder may be a link"
    return Mistake(str(path), f"is a link that leads out of its folder, to {target}", hint)


def refuse_link(path: Path, folder: Path) -> Path:
    """Give the path of a file in a folder. Raises CheckpointError where it is a link that leads out of the folder."""
    mistake = link_mistake(path, folder)
    if mistake:
        raise CheckpointError.of([mistake])
    return path
