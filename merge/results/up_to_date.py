"""Whether a result that is there is what a build would make, so that there is nothing to do."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ..errors import OutputError
from ..receipt import RECEIPT, Receipt, read
from .identity import Identity, differences
from .verify import damage


def up_to_date(out: Path, made_from: Identity, non_finite: str) -> Receipt | str:
    """Give the receipt of a result that is what is asked for, and whole; else say what differs.

    Files as large as they were, and no younger than the receipt, which is written last, are taken to be unchanged;
    younger ones are read.
    """
    try:
        receipt = read(out)
    except OutputError:
        return ""
    if receipt.made_from is None:
        return ""
    changed = differences(
        {**receipt.made_from, "the choice about NaN and infinity": receipt.non_finite},
        {**made_from, "the choice about NaN and infinity": non_finite},
    )
    if changed:
        return changed
    written = (out / RECEIPT).stat().st_mtime_ns
    found = {path.relative_to(out).as_posix(): path for path in out.rglob("*") if path.is_file()}
    del found[RECEIPT]
    same = found.keys() == receipt.files.keys() and all(
        path.stat().st_size == receipt.files[name]["bytes"] for name, path in found.items()
    )
    if same and any(path.stat().st_mtime_ns > written for path in found.values()):
        same = not damage(out, receipt)
    return replace(receipt, outcome="up to date") if same else "its files changed"
