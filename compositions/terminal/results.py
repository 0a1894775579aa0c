"""What commands found, printed for people: the data on stdout, notes on stderr."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from portmanteau.merge.origins import strips
from portmanteau.merge.units import readable

from . import tables
from .printing import draw_maps, draw_strips, is_drawn, notes, put, put_table, say

if TYPE_CHECKING:
    from portmanteau.merge import Plan, Receipt, Verified
    from portmanteau.merge.errors import Mistake

    from ..greedy_soup import Soup
    from ..preflight import Preflight
    from ..reports.built import Built
    from ..reports.rows import Comparison


def built(out: Path, receipt: Receipt) -> None:
    """Say what a build did."""
    is_new = receipt.outcome != "up to date"
    say(f"{out}: {len(receipt.outputs)} tensors in {receipt.seconds:.1f} s" if is_new else f"{out}: up to date")


def verified(out: Path, found: Verified, differing: Sequence[Mistake], *, rebuild: bool) -> None:
    """Name what is damaged, and say what was compared."""
    mistakes = (*found.damaged, *differing)
    for mistake in mistakes:
        say(str(mistake))
    again = ", and the recipe gives these bits" if rebuild else ""
    what = f"{found.tensors} tensors and {found.files} files, {readable(found.nbytes)}"
    put(f"{out}: {len(mistakes)} damaged, of {what}" if mistakes else f"{out}: whole{again}: {what}")


def plan(ready: Preflight, summary: Mapping[str, Any], picture: bool | None) -> None:
    """Print the steps of a plan, where its layers come from, and what it reads and writes."""
    made = ready.plan
    if not made.pending:
        put_table(tables.steps(summary["steps"]))
    if is_drawn(picture):
        draw_strips(strips(made.steps))
    for survey in summary["surveys"]:
        put(f"survey first: {survey['title']}, reads {readable(survey['bytes'])} each time")
    if ready.bytes_to_download:
        put(f"downloads {readable(ready.bytes_to_download)} first")
    put(
        f"reads {readable(summary['bytes_read'])}, writes {_most(made)}, "
        f"in flight at most {readable(summary['bytes_in_flight'])}"
    )
    notes(ready.notes)


def checked(recipe: Path, ready: Preflight) -> None:
    """Say that a recipe is good, and what it makes."""
    made, download = ready.plan, ready.bytes_to_download
    count = "tensors that a survey will tell" if made.pending else f"{len(made.steps)} tensors"
    more = f", after a download of {readable(download)}" if download else ""
    put(f"{recipe}: good; it makes {count}, {_most(made)}{more}")
    notes(ready.notes)


def entry(found: Mapping[str, Any]) -> None:
    """Print the page of an operator or a composition."""
    put(f"{found['name']} ({found['kind']})\n\n{found['text']}\n\nsource: {found['source']}")
    put(f"example: {found['example']}\n" if found["example"] else "")
    put_table(tables.settings(found["settings"]))


def inspected(checkpoint: str, found: Mapping[str, Any]) -> None:
    """Print what a checkpoint holds."""
    put(f"{checkpoint}: {found['tensors']} tensors, {found['entries']:,} entries, {readable(found['bytes'])}")
    for about in found.get("about", ()):
        put("; ".join(f"{key.replace('_', ' ')}: {value}" for key, value in about.items()))
    for line in tables.beside(found):
        put(line)
    put_table(tables.groups(found["groups"]))
    if found.get("modules"):
        put_table(tables.modules(found["modules"]))
    if "list" in found:
        put_table(tables.tensors(found["list"]))


def report(found: Built, changed: Sequence[Comparison], told: Sequence[str], picture: bool | None) -> None:
    """Print what a finished build did, and its change from each parent."""
    from ..reports import tables as measures

    if is_drawn(picture):
        draw_strips(found.layers)
    put_table(found.steps())
    put_table(found.files())
    for plugin, files in found.plugins.items():
        put(f"plugin {plugin}: {', '.join(f'{name} {mark[:16]}' for name, mark in files.items())}")
    for one in changed:
        put(f"change from {one.base}")
        for table in measures.printed(one):
            put_table(table)
    notes([*found.notes, *told])


def comparison(found: Comparison, picture: bool | None, *, tensors: bool) -> None:
    """Print where models changed and meet."""
    from ..reports import maps
    from ..reports import tables as measures

    for table in measures.printed(found, tensors=tensors):
        put_table(table)
    if is_drawn(picture):
        draw_maps(maps.of_comparison(found, brief=True))
    notes(found.notes)


def soup(out: Path, made: Soup) -> None:
    """Print every model's turn in a greedy soup, and what came of it."""
    put_table(tables.soup(made.tries))
    say(f"{out}: {len(made.models)} of {len(made.tries)} models, metric {made.metric:g}; its recipe is {made.recipe}")


def _most(made: Plan) -> str:
    """Say how many bytes a plan writes; at most, where a survey will tell."""
    return ("at most " if made.pending else "") + readable(made.bytes_written)
