"""Where an adapter's folder is: named by its path, or downloaded from the Hub."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..errors import CheckpointError, nearest
from ..files import hub

CONFIG = "adapter_config.json"  # both peft and adapters call it so


@dataclass(frozen=True)
class AdapterFolder:
    """A folder that holds an adapter's config, and where on the Hub it comes from."""

    path: Path
    revision: str | None = None
    repository: str | None = None


def locate(
    reference: str | Path, revision: str | None, kinds: hub.Kinds, written_by: str, also: tuple[str, ...] = ()
) -> AdapterFolder:
    """Find the folder that a path or a Hub id `ORG/NAME[@REVISION]` stands for.

    Args:
        reference: the path, or the id.
        revision: of the Hub's repository; of a folder it is only written down.
        kinds: the weight files to download, the best first.
        written_by: what writes such folders, for the hint.
        also: other files to download, where there are any.

    Raises CheckpointError where there is no folder, or none with an adapter's config.

    """
    path, text, repository = Path(reference).expanduser(), str(reference), None
    if not path.exists() and hub.is_on_hub(text, revision) and not (isinstance(reference, Path) and path.is_absolute()):
        repository, _, tag = text.partition("@")
        path = hub.download(repository, revision or tag or None, kinds, also)
        revision = path.name
    if not path.is_dir():
        known = [sibling.name for sibling in path.parent.glob("*")] if path.parent.is_dir() else []
        hint = "name the folder that holds it" if path.is_file() else nearest(path.name, known) if known else ""
        raise CheckpointError(text, "an adapter is a folder" if path.is_file() else "no such folder", hint)
    if not (path / CONFIG).is_file():
        raise CheckpointError(str(path), f"holds no {CONFIG}", f"an adapter folder is what {written_by} writes")
    return AdapterFolder(path, revision, repository)
