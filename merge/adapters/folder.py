"""Where an adapter's folder is: named by its path, or downloaded from the Hub."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import CheckpointError, nearest
from ..files import hub, places
from ..files.remote_file import RemoteFile
from ..files.weight_file import WeightFile
from ..stored import open

CONFIG = "adapter_config.json"  # both peft and adapters call it so


@dataclass(frozen=True)
class AdapterFolder:
    """A folder that holds an adapter's config, and where on the Hub it comes from."""

    path: Path
    revision: str | None = None
    repository: str | None = None
    missing: Mapping[str, RemoteFile] = field(default_factory=dict)  # weights of which only the header is here

    def weights(self, kinds: hub.Kinds) -> WeightFile | None:
        """Open the best of the kinds of weight files that it holds, by its header; None where it holds none."""
        for name, _ in kinds:
            if name in self.missing:
                return self.missing[name]
            if (self.path / name).is_file():
                return open(places.refuse_link(self.path / name, self.path)).files[0]
        return None


def locate(
    reference: str | Path,
    revision: str | None,
    kinds: hub.Kinds,
    written_by: str,
    also: tuple[str, ...] = (),
    *,
    weights: bool = True,
) -> AdapterFolder:
    """Find the folder that a path or a Hub id `ORG/NAME[@REVISION]` stands for.

    Args:
        reference: the path, or the id.
        revision: of the Hub's repository; of a folder it is only written down.
        kinds: the weight files to download, the best first.
        written_by: what writes such folders, for the hint.
        also: other files to download, where there are any.
        weights: whether weights are downloaded too, or only their headers.

    Raises CheckpointError where there is no folder, or none with an adapter's config.

    """
    path, text = places.user_path(reference), str(reference)
    kind, found = places.kind(path), None
    if kind == "nothing" and hub.is_on_hub(text, revision):
        found = hub.fetched(text, revision, kinds, also, weights=weights)
        path, revision, kind = found.folder, found.folder.name, "folder"
    if kind != "folder":
        known = places.neighbours(path)
        hint = "name the folder that holds it" if kind == "file" else nearest(path.name, known) if known else ""
        raise CheckpointError(text, "an adapter is a folder" if kind == "file" else "no such folder", hint)
    if not (path / CONFIG).is_file():
        raise CheckpointError(str(path), f"holds no {CONFIG}", f"an adapter folder is what {written_by} writes")
    places.refuse_link(path / CONFIG, path)
    return AdapterFolder(path, revision, found.repository, found.missing) if found else AdapterFolder(path, revision)
