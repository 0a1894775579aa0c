"""A result published with what it changed from each parent: measured, and written in its card and its receipt."""

from __future__ import annotations

import re
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from portmanteau.merge import OutputError, PortmanteauError, Progress
from portmanteau.merge.cards.card_changes import CardChanges, ParentChange, with_changes
from portmanteau.merge.differences.changes import added
from portmanteau.merge.files.digests import digest
from portmanteau.merge.files.hub import CARD
from portmanteau.merge.files.upload import Target, upload
from portmanteau.merge.receipt import RECEIPT, Receipt, read
from portmanteau.merge.results.output import is_result

from .reports import built
from .reports.rows import OUTSIDE, Changes, Comparison

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")  # of an expert or a block inside a layer


def publish(out: Path, target: Target, *, changes: bool = True, progress: Progress | None = None) -> str:
    """Publish a finished result; give its address.

    Args:
        out: the folder that `build` made.
        target: where it is to be published; `check_target` has looked at it.
        changes: measure its change from each parent, which reads them once more, and tell it in the model card. A
            parent that cannot be compared is named in a note.
        progress: is told how far the measuring is, and the notes.

    Raises OutputError where it is no result of a build, or where the Hub refuses it.
    """
    if changes and is_result(out):
        told = progress or Progress()
        try:
            receipt, found = read(out), measured(out, told)
            earlier = CardChanges.of(receipt.changes)
        except PortmanteauError as error:
            told.tell(f"the card has no table of changes: {error.mistakes[0].what}")
        else:
            _write(out, receipt, earlier, found)
            for note in found.notes:
                told.tell(note)
    return upload(out, target)


def measured(out: Path, progress: Progress) -> CardChanges:
    """Measure a result against every parent that is still there. Raises CheckpointError where it has no receipt."""
    found, notes = built.changes_from_parents(built.read(out), progress)
    return CardChanges(tuple(map(_of_parent, found)), notes)


def _of_parent(found: Comparison) -> ParentChange:
    changes = found.changes[0]
    whole = changes.whole
    return ParentChange(
        found.base,
        len(changes.tensors),
        whole.relative_norm,
        whole.share_changed,
        whole.mean_absolute,
        _by_module(changes),
    )


def _by_module(found: Changes) -> dict[str, float | None]:
    """Give the relative norm of every module, all layers together, and of what is outside them; nothing without layers.

    Experts and blocks that are numbered inside a layer count as one module.
    """
    groups: dict[str, list[int]] = {}
    for i, row in enumerate(found.tensors):
        groups.setdefault(OUTSIDE if row.layer is None else _NUMBER.sub("*", row.module), []).append(i)
    if groups.keys() <= {OUTSIDE}:
        return {}
    return {name: added(found.tensors[i].change for i in rows).relative_norm for name, rows in groups.items()}


def _write(out: Path, receipt: Receipt, earlier: CardChanges, found: CardChanges) -> None:
    """Write what was found in the card, and in the receipt, the card's digest with it.

    A card that its owner edited keeps the edits, and the receipt the digest of the one that was built.
    """
    card = out / CARD
    try:
        before = card.read_bytes()
        text = with_changes(before.decode(), earlier, found).encode()
        files = dict(receipt.files)
        if files.get(CARD, {}).get("digest") == digest(before):
            files[CARD] = {"bytes": len(text), "digest": digest(text)}
        with TemporaryDirectory(prefix=f".{out.name}.", dir=out.absolute().parent) as folder:
            (Path(folder) / CARD).write_bytes(text)
            replace(receipt, files=files, changes=asdict(found)).write(Path(folder))
            for name in (CARD, RECEIPT):  # each is whole, whenever this ends
                (Path(folder) / name).replace(out / name)
    except (OSError, UnicodeDecodeError) as error:
        raise OutputError(str(card), f"cannot be written: {error}", "publish it as it is with --no-changes") from error
