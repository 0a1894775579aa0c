"""The command line: parse, call one function, print. Data on stdout, everything else on stderr."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from portmanteau import merge
from portmanteau.compositions import (
    change_tables,
    changes,
    compose,
    greedy_soup,
    heat_map,
    load,
    lock_file,
    measured_by,
    overlaps,
    preflight,
    rebuilt,
    reference_page,
)
from portmanteau.compositions.recipe import text as recipe_text
from portmanteau.merge import describe
from portmanteau.merge.limits import MEMORY, Limits
from portmanteau.merge.output import check_file
from portmanteau.merge.plugins.discovery import announce
from portmanteau.merge.shown import json_text, printable, printable_lines
from portmanteau.merge.units import byte_count, readable

if TYPE_CHECKING:
    from rich.progress import Progress as Bars
    from rich.progress import TaskID

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Build one good model out of many checkpoints, from a recipe kept in version control.",
)

Recipe = Annotated[Path, typer.Argument(help="The recipe, a YAML file.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Tensors made at once; the result does not depend on it.")]


def _bytes(text: str) -> int:
    """Read a size given on the command line."""
    try:
        return byte_count(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


_MEMORY_HELP = "Bytes in flight; the result does not depend on it."
Memory = Annotated[int, typer.Option(parser=_bytes, metavar="SIZE", help=_MEMORY_HELP, show_default="256 MiB")]


_NON_FINITE_HELP = "What to do where an input or the result has NaN or infinity."
NonFinite = Annotated[Literal["error", "warn", "keep"], typer.Option("--non-finite", help=_NON_FINITE_HELP)]


def _announce(modules: list[str] | None) -> list[str] | None:
    """Tell where operators are found that are none of ours; they are imported where a recipe names one."""
    for module in modules or ():
        announce(module)
    return modules


_PLUGIN_HELP = "A module, or a .py file, that registers operators or mergekit methods; may be given again."
Plugin = Annotated[list[str] | None, typer.Option("--plugin", metavar="MODULE", callback=_announce, help=_PLUGIN_HELP)]


@app.command()
def build(
    recipe: Recipe,
    out: Annotated[Path, typer.Argument(help="The folder to make.", show_default=False)],
    threads: Threads = None,
    memory: Memory = MEMORY,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier result.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start anew: continue no build that was ended.")] = False,
    non_finite: NonFinite = "error",
    locked: Annotated[bool, typer.Option("--locked", help="Refuse inputs other than those in RECIPE.lock.")] = False,
    plugin: Plugin = None,
    as_json: Json = False,
) -> None:
    """Plan and build: write the model that a recipe asks for. A build that was ended is continued."""
    loaded = None
    if locked:
        with _drawn_progress() as progress:
            loaded = lock_file.held_to_lock(load(recipe), threads=threads, progress=progress)
    ready = preflight(loaded or recipe, out, force=force, may_stand=True)
    loaded, composed = ready.recipe, ready.composed
    _notes(composed.notes)
    if ready.bytes_to_download:
        _say(f"downloads {readable(ready.bytes_to_download)} from the Hub")
        composed = compose(loaded)
    with _drawn_progress() as progress:
        receipt = merge.build(
            composed,
            out,
            dtype=loaded.output.dtype,
            shard_size=loaded.output.shard_size,
            threads=threads,
            memory=memory,
            force=force,
            fresh=fresh,
            non_finite=non_finite,
            recipe=loaded.text,
            recipe_folder=loaded.folder,
            progress=progress,
        )
    _notes([note for note in receipt.notes if note not in composed.notes])  # what only the weights could tell
    if as_json:
        _print_json({"out": str(out), **asdict(receipt)})
    elif receipt.outcome == "up to date":
        _say(f"{out}: up to date")
    else:
        _say(f"{out}: {len(receipt.outputs)} tensors in {receipt.seconds:.1f} s")


@app.command()
def verify(
    out: Annotated[Path, typer.Argument(help="A folder that portmanteau built.", show_default=False)],
    rebuild: Annotated[
        bool,
        typer.Option("--rebuild", help="Make every tensor again, without writing: does the recipe give these bits?"),
    ] = False,
    folder: Annotated[
        Path | None, typer.Option(help="With --rebuild: what the recipe's paths are relative to.", show_default=False)
    ] = None,
    threads: Threads = None,
    plugin: Plugin = None,
    as_json: Json = False,
) -> None:
    """Compare a result, every byte of it, with its receipt; name each tensor and file that differs."""
    with _drawn_progress() as progress:
        found = merge.verify(out, threads=threads, progress=progress)
        differing = rebuilt(out, folder=folder, threads=threads, progress=progress) if rebuild else ()
    mistakes = (*found.damaged, *differing)
    if as_json:
        _print_json({**asdict(found), "rebuilt": [asdict(one) for one in differing] if rebuild else None})
    else:
        for mistake in mistakes:
            _say(str(mistake))
        again = ", and the recipe gives these bits" if rebuild else ""
        what = f"{found.tensors} tensors and {found.files} files, {readable(found.nbytes)}"
        _print(f"{out}: {len(mistakes)} damaged, of {what}" if mistakes else f"{out}: whole{again}: {what}")
    raise typer.Exit(1 if mistakes else 0)


@app.command()
def lock(recipe: Recipe, threads: Threads = None, plugin: Plugin = None, as_json: Json = False) -> None:
    """Write RECIPE.lock: the revision and the digest of every file that the recipe reads."""
    with _drawn_progress() as progress:
        path, files = lock_file.write(load(recipe), threads=threads, progress=progress)
    if as_json:
        _print_json({"lock": str(path), "files": files})
    else:
        _say(f"{path}: {files} files; portmanteau build --locked takes no other")


@app.command()
def plan(
    recipe: Recipe, threads: Threads = None, memory: Memory = MEMORY, plugin: Plugin = None, as_json: Json = False
) -> None:
    """Show what a build would do, without reading any weights."""
    ready = preflight(recipe)
    made = ready.plan
    limits = Limits.of(threads, memory)
    summary = describe.plan(made, limits.in_flight(made))
    if as_json:
        _print_json(summary)
        return
    rows = [
        (r["operator"], r["of"], r["settings"], str(r["tensors"]), readable(r["bytes"]), r["why"])
        for r in summary["steps"]
    ]
    if not made.pending:
        _table(("operator", "of", "settings", "tensors", "bytes", "because of"), rows)
    for survey in summary["surveys"]:
        _print(f"survey first: {survey['title']}, reads {readable(survey['bytes'])} each time")
    if ready.bytes_to_download:
        _print(f"downloads {readable(ready.bytes_to_download)} first")
    _print(
        f"reads {readable(summary['bytes_read'])}, writes {_most(made)}, "
        f"in flight at most {readable(summary['bytes_in_flight'])}"
    )
    _notes(made.notes)


@app.command()
def check(
    recipe: Recipe,
    out: Annotated[Path | None, typer.Argument(help="Where it is to be built.", show_default=False)] = None,
    force: Annotated[bool, typer.Option(help="As for build: an earlier result there may be replaced.")] = False,
    plugin: Plugin = None,
    as_json: Json = False,
) -> None:
    """Check a recipe: its text, the headers of all checkpoints that it names, and the place of the result."""
    ready = preflight(recipe, out, force=force)
    made, download = ready.plan, ready.bytes_to_download
    if as_json:
        about = {"tensors": None if made.pending else len(made.steps), "bytes": made.bytes_written}
        _print_json({**about, "bytes_to_download": download, "notes": made.notes})
    else:
        count = "tensors that a survey will tell" if made.pending else f"{len(made.steps)} tensors"
        more = f", after a download of {readable(download)}" if download else ""
        _print(f"{recipe}: good; it makes {count}, {_most(made)}{more}")
        _notes(made.notes)


@app.command()
def convert(recipe: Recipe, plugin: Plugin = None) -> None:
    """Print a mergekit YAML as a recipe of portmanteau's own, which builds the same bytes."""
    loaded = load(recipe)
    _print(recipe_text.written(loaded.document.value).rstrip("\n"))
    _notes(loaded.document.notes)


@app.command()
def show(
    name: Annotated[str | None, typer.Argument(help="An operator or a composition.", show_default=False)] = None,
    plugin: Plugin = None,
    as_json: Json = False,
) -> None:
    """Show the operators and compositions, or one of them with its settings, formula and source."""
    if name is None:
        rows = reference_page.overview()
        if as_json:
            _print_json(rows)
        else:
            _table(("name", "kind", "what it does"), [(r["name"], r["kind"], r["summary"]) for r in rows])
        return
    entry = reference_page.entry(name)
    if as_json:
        _print_json(entry)
        return
    _print(f"{entry['name']} ({entry['kind']})\n\n{entry['text']}\n\nsource: {entry['source']}\n")
    settings = [(s["name"], s["type"], s["default"], s["description"]) for s in entry["settings"]]
    _table(("setting", "type", "default", "meaning"), settings)


@app.command()
def inspect(
    checkpoint: Annotated[str, typer.Argument(help="A folder, a file or a Hub id.", show_default=False)],
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False,
    as_json: Json = False,
) -> None:
    """Show the tensors, sizes, layers and dtypes of a checkpoint, a bottleneck adapter or a sparse fine-tune."""
    found = describe.reference(checkpoint, tensors=tensors)
    if as_json:
        _print_json(found)
        return
    _print(f"{checkpoint}: {found['tensors']} tensors, {found['entries']:,} entries, {readable(found['bytes'])}")
    for about in found.get("about", ()):
        _print("; ".join(f"{key.replace('_', ' ')}: {value}" for key, value in about.items()))
    groups = [(r["where"], r["layers"], str(r["tensors"]), readable(r["bytes"]), r["dtypes"]) for r in found["groups"]]
    _table(("where", "layers", "tensors", "bytes", "dtypes"), groups)
    if tensors:
        listed = [(r["name"], r["dtype"], str(r["shape"]), readable(r["bytes"])) for r in found["list"]]
        _table(("tensor", "dtype", "shape", "bytes"), listed)


@app.command()
def soup(
    out: Annotated[Path, typer.Argument(help="The folder to make; its recipe is written as OUT.yaml.")],
    models: Annotated[list[str], typer.Argument(help="Folders, files, Hub ids, or patterns as in recipes.")],
    metric: Annotated[
        str,
        typer.Option(
            help='A program, "COMMAND {model}": the last line of its stdout is the metric.', show_default=False
        ),
    ],
    minimize: Annotated[bool, typer.Option("--minimize", help="Less is better, as with a loss.")] = False,
    shared: Annotated[str | None, typer.Option(help='Tensors that must be equal, as in average; "" for none.')] = None,
    force: Annotated[bool, typer.Option(help="Replace an earlier result.")] = False,
    as_json: Json = False,
) -> None:
    """Build the greedy soup: models averaged one by one, best first, as long as the metric gets no worse."""
    made = greedy_soup(
        models, out, measure=measured_by(metric), minimize=minimize, shared=shared, force=force, tell=_say
    )
    _notes(made.receipt.notes)
    if as_json:
        rows = [asdict(one) for one in made.tries]
        _print_json(
            {"out": str(out), "recipe": str(made.recipe), "metric": made.metric, "models": made.models, "tries": rows}
        )
        return
    cells = [(one.model, f"{one.alone:g}", f"{one.soup:g}", "yes" if one.taken else "no") for one in made.tries]
    _table(("model", "alone", "soup with it", "taken"), cells)
    _say(f"{out}: {len(made.models)} of {len(made.tries)} models, metric {made.metric:g}; its recipe is {made.recipe}")


@app.command()
def diff(
    expert: Annotated[str, typer.Argument(metavar="A", help="A folder, a file or a Hub id.", show_default=False)],
    other: Annotated[str | None, typer.Argument(metavar="B", help="Without --base: what A became.")] = None,
    base: Annotated[str | None, typer.Option(help="What A was trained from.", show_default=False)] = None,
    unmatched: Annotated[
        Literal["error", "drop"], typer.Option(help="Tensors that only one has: refuse, or leave out.")
    ] = "error",
    tensors: Annotated[bool, typer.Option("--tensors", help="A row for each tensor.")] = False,
    csv: Annotated[Path | None, typer.Option(help="Write CSV: by layer and module, or tensor.")] = None,
    png: Annotated[Path | None, typer.Option(help="Draw a heat map, layers against modules.")] = None,
    force: Annotated[bool, typer.Option(help="Replace existing files.")] = False,
    as_json: Json = False,
) -> None:
    """Show where a fine-tuned model changed: `diff EXPERT --base BASE`, or `diff A B` for the way from A to B."""
    if (other is None) == (base is None):
        raise typer.BadParameter("name the base, either as EXPERT --base BASE or as BASE EXPERT; one expert at a time")
    before, after = (expert, other) if other else (base, expert)
    assert before
    assert after
    for file in filter(None, (csv, png)):
        check_file(file, force=force)
    if png:
        heat_map.check_plots()
    with _drawn_progress() as progress:
        found = changes(merge.open(after), merge.open(before), unmatched=unmatched, progress=progress)
    if csv:
        csv.write_text(change_tables.csv_text(found.tensors if tensors else found.modules), encoding="utf-8")
    if png:
        heat_map.draw(found, png)
    if as_json:
        _print_json(change_tables.document(found, tensors=tensors))
        return
    shown = found.tensors if tensors else found.layers
    rows = [(row.tensor or row.where, *change_tables.cells(row.change)) for row in shown]
    titles = ("tensor" if tensors else "layer", *change_tables.MEASURES.values())
    _table(titles, [*rows, ("whole", *change_tables.cells(found.whole))])
    _notes(found.notes)


@app.command()
def overlap(
    diffs: Annotated[list[str], typer.Argument(help="Sparse fine-tunes: folders or Hub ids.", show_default=False)],
    tensors: Annotated[bool, typer.Option("--tensors", help="A row for each tensor.")] = False,
    as_json: Json = False,
) -> None:
    """Show where sparse fine-tunes change the same entries, and whether they pull the same way there."""
    found = [row for row in overlaps([merge.open_sparse(diff) for diff in diffs]) if tensors or not row.tensor]
    if as_json:
        extra = ("by_chance", "cosine", "opposed_share")
        _print_json([{**asdict(row), **{name: getattr(row, name) for name in extra}} for row in found])
        return
    rows = [
        (
            f"{row.one} · {row.other}",
            *([row.tensor or "all"] if tensors else []),
            f"{row.counts[0]:,} · {row.counts[1]:,}",
            f"{row.shared:,}",
            f"{row.by_chance:,.0f}",
            "–" if row.opposed_share is None else f"{row.opposed_share:.1%}",
            "–" if row.cosine is None else f"{row.cosine:.3f}",
        )
        for row in found
    ]
    titles = ("pair", *(["tensor"] if tensors else []), "entries", "shared", "by chance", "opposed", "cosine")
    _table(titles, rows)


def _most(made: merge.Plan) -> str:
    """Say how many bytes a plan writes; at most, where a survey will tell."""
    return ("at most " if made.pending else "") + readable(made.bytes_written)


def _say(text: str) -> None:
    """Print on stderr. This and the next three are all that prints: nothing that strangers wrote goes out raw."""
    typer.echo(printable_lines(text), err=True)


def _print(text: str) -> None:
    typer.echo(printable_lines(text))


def _notes(notes: Sequence[str]) -> None:
    for note in notes:
        _say(f"note: {note}")


def _print_json(value: Any) -> None:
    typer.echo(json_text(value, indent=2, default=str))


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table; as wide as it needs to be where nobody's terminal limits it."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False, width=None if sys.stdout.isatty() else 1000)
    table = Table(*titles, box=box.SIMPLE_HEAD, pad_edge=False)
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    console.print(table)


@contextmanager
def _drawn_progress() -> Iterator[merge.Progress]:
    """Draw bars on stderr, where that is a terminal; what draws them is not even imported where it is none."""
    try:
        with _bars() if sys.stderr.isatty() else nullcontext() as bars:
            yield _Drawn(bars) if bars else _Telling()
    except KeyboardInterrupt as error:
        _say(": ".join(["interrupted", *_added(error)]))
        raise


def _added(error: BaseException) -> list[str]:
    """Give what was added to an error on its way: what stays of a build."""
    return getattr(error, "__notes__", [])


def _bars() -> Bars:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(),
        TextColumn("{task.fields[done]}/{task.fields[tensors]} tensors"),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )


class _Telling(merge.Progress):
    """Tells, where nothing is drawn, what the user should know."""

    def tell(self, text: str) -> None:
        """Say it."""
        _say(f"note: {text}")


class _Drawn(_Telling):
    """Draws what a build tells."""

    def __init__(self, bars: Bars) -> None:
        self._bars = bars
        self._task: TaskID | None = None
        self._done = 0

    def begin(self, title: str, nbytes: int, tensors: int) -> None:
        """Begin a bar."""
        self._done = 0
        self._task = self._bars.add_task(printable(title), total=nbytes, done=0, tensors=tensors)

    def tell(self, text: str) -> None:
        """Say it above the bars."""
        self._bars.console.print(f"note: {text}", markup=False, highlight=False, soft_wrap=True)

    def advance(self, nbytes: int, tensors: int = 0) -> None:
        """Move the bar on."""
        assert self._task is not None
        self._done += tensors
        self._bars.update(self._task, advance=nbytes, done=self._done)


def main() -> None:
    """Run the command line; a user's mistake ends with a message and status 1."""
    try:
        app()
    except merge.PortmanteauError as error:
        _say(str(error))
        _notes(_added(error))
        sys.exit(1)


if __name__ == "__main__":
    main()
