"""The command line: parse, call one function, print. Data on stdout, everything else on stderr."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from functools import partial
from inspect import Parameter, signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from portmanteau import merge
from portmanteau.compositions import (
    compare,
    compose,
    greedy_soup,
    load,
    lock_file,
    measured_by,
    overlaps,
    preflight,
    rebuilt,
    reference_page,
)
from portmanteau.compositions.one_off import options as one_off_options
from portmanteau.compositions.one_off import starter
from portmanteau.compositions.one_off.options import Option
from portmanteau.compositions.one_off.written import one_off, recipe_beside, write_beside
from portmanteau.compositions.recipe import text as recipe_text
from portmanteau.compositions.reference import json_schema
from portmanteau.compositions.reference import markdown as reference_markdown
from portmanteau.compositions.reports import built, maps, page, tables
from portmanteau.compositions.reports import png as heat_map
from portmanteau.merge import describe
from portmanteau.merge.files.upload import Target, check_target, upload
from portmanteau.merge.limits import MEMORY, Limits
from portmanteau.merge.origins import strips
from portmanteau.merge.output import check_file
from portmanteau.merge.plugins.discovery import announce
from portmanteau.merge.shown import json_text, printable, printable_lines
from portmanteau.merge.units import byte_count, readable

if TYPE_CHECKING:
    from rich.progress import Progress as Bars
    from rich.progress import TaskID
    from rich.text import Text

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Build one good model out of many checkpoints, from a recipe kept in version control.",
)

Recipe = Annotated[Path, typer.Argument(help="The recipe, a YAML file.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
Picture = Annotated[
    bool | None, typer.Option("--picture/--no-picture", help="Draw it in the terminal; by default on a terminal.")
]
Threads = Annotated[int | None, typer.Option(min=1, help="Tensors made at once; the result does not depend on it.")]


def _bytes(text: str) -> int:
    """Read a size given on the command line."""
    try:
        return byte_count(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


_MEMORY_HELP = "Bytes in flight; the result does not depend on it."
Memory = Annotated[int, typer.Option(parser=_bytes, metavar="SIZE", help=_MEMORY_HELP, show_default="256 MiB")]


_DEVICE_HELP = "Where torch computes: cpu, cuda, cuda:1 …; bytes that are only copied never go there."
Device = Annotated[str, typer.Option(metavar="DEVICE", help=_DEVICE_HELP)]
_NON_FINITE_HELP = "What to do where an input or the result has NaN or infinity."
NonFinite = Annotated[Literal["error", "warn", "keep"], typer.Option("--non-finite", help=_NON_FINITE_HELP)]


def _announce(modules: list[str] | None) -> list[str] | None:
    """Tell where operators are found that are none of ours; they are imported where a recipe names one."""
    for module in modules or ():
        announce(module)
    return modules


_PLUGIN_HELP = "A module, or a .py file, that registers operators or mergekit methods; may be given again."
Plugin = Annotated[list[str] | None, typer.Option("--plugin", metavar="MODULE", callback=_announce, help=_PLUGIN_HELP)]
Push = Annotated[
    str | None, typer.Option(metavar="ORG/NAME", help="Publish the result on the Hub, privately.", show_default=False)
]
Public = Annotated[bool, typer.Option("--public", help="Let everyone see what is published.")]


def _names(incomplete: str) -> list[tuple[str, str]]:
    """Complete the name of a composition or an operator."""
    return [(one["name"], one["summary"]) for one in reference_page.overview() if one["name"].startswith(incomplete)]


@app.command()
def build(
    recipe: Recipe,
    out: Annotated[Path, typer.Argument(help="The folder to make.", show_default=False)],
    threads: Threads = None,
    memory: Memory = MEMORY,
    device: Device = "cpu",
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier result.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start anew: continue no build that was ended.")] = False,
    non_finite: NonFinite = "error",
    locked: Annotated[bool, typer.Option("--locked", help="Refuse inputs other than those in RECIPE.lock.")] = False,
    plugin: Plugin = None,
    as_json: Json = False,
    push: Push = None,
    public: Public = False,
) -> None:
    """Plan and build: write the model that a recipe asks for. A build that was ended is continued."""
    if push:
        check_target(Target(push, public), force=force)
    loaded = None
    if locked:
        with _drawn_progress() as progress:
            loaded = lock_file.held_to_lock(load(recipe), threads=threads, progress=progress)
    ready = preflight(loaded or recipe, out, force=force, may_stand=True)
    loaded, composed = ready.recipe, ready.composed
    _notes([*composed.notes, *describe.lacks(composed.companions)])
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
            device=device,
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
    if push:
        _say(f"published: {upload(out, Target(push, public))}")


@app.command("push")
def publish(
    out: Annotated[Path, typer.Argument(help="A folder that `build` made.", show_default=False)],
    repository: Annotated[str, typer.Argument(help="The repository on the Hub: ORG/NAME.", show_default=False)],
    public: Public = False,
    force: Annotated[bool, typer.Option(help="Replace what portmanteau did not build.")] = False,
) -> None:
    """Publish a finished result on the Hub, in a private repository unless --public says otherwise."""
    check_target(Target(repository, public), force=force)
    _say(f"published: {upload(out, Target(repository, public))}")


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
    recipe: Recipe,
    threads: Threads = None,
    memory: Memory = MEMORY,
    picture: Picture = None,
    plugin: Plugin = None,
    as_json: Json = False,
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
    if _drawn(picture):
        from portmanteau.compositions.reports import terminal

        _draw(partial(terminal.strip_lines, strips(made.steps)))
    for survey in summary["surveys"]:
        _print(f"survey first: {survey['title']}, reads {readable(survey['bytes'])} each time")
    if ready.bytes_to_download:
        _print(f"downloads {readable(ready.bytes_to_download)} first")
    _print(
        f"reads {readable(summary['bytes_read'])}, writes {_most(made)}, "
        f"in flight at most {readable(summary['bytes_in_flight'])}"
    )
    _notes([*made.notes, *describe.lacks(made.companions)])


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
    notes = (*made.notes, *describe.lacks(made.companions))
    if as_json:
        about = {"tensors": None if made.pending else len(made.steps), "bytes": made.bytes_written}
        _print_json({**about, "bytes_to_download": download, "notes": notes})
    else:
        count = "tensors that a survey will tell" if made.pending else f"{len(made.steps)} tensors"
        more = f", after a download of {readable(download)}" if download else ""
        _print(f"{recipe}: good; it makes {count}, {_most(made)}{more}")
        _notes(notes)


@app.command()
def convert(recipe: Recipe, plugin: Plugin = None) -> None:
    """Print a mergekit YAML as a recipe of portmanteau's own, which builds the same bytes."""
    loaded = load(recipe)
    _print(recipe_text.written(loaded.document.value).rstrip("\n"))
    _notes(loaded.document.notes)


@app.command()
def show(
    name: Annotated[
        str | None,
        typer.Argument(help="An operator or a composition.", show_default=False, autocompletion=_names),
    ] = None,
    plugin: Plugin = None,
    as_json: Json = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the whole reference, as Markdown.")] = False,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON Schema of recipes, for editors.")] = False,
) -> None:
    """Show the operators and compositions, or one of them with its settings, formula and source."""
    if markdown:
        _print(reference_markdown.page(typer.main.get_command(app)).rstrip("\n"))
        return
    if schema:
        _print(json_schema.text().rstrip("\n"))
        return
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
    _print(f"{entry['name']} ({entry['kind']})\n\n{entry['text']}\n\nsource: {entry['source']}")
    _print(f"example: {entry['example']}\n" if entry["example"] else "")
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
    for line in tables.beside(found):
        _print(line)
    groups = [(r["where"], r["layers"], str(r["tensors"]), readable(r["bytes"]), r["dtypes"]) for r in found["groups"]]
    _table(("where", "layers", "tensors", "bytes", "dtypes"), groups)
    if found.get("modules"):
        _table(*tables.modules(found["modules"]))
    if tensors:
        listed = [(r["name"], r["dtype"], str(r["shape"]), readable(r["bytes"])) for r in found["list"]]
        _table(("tensor", "dtype", "shape", "bytes"), listed)


class _OneOffs(Mapping[str, Any]):
    """The commands of `do`, one for each composition and operator, made from its declaration when it is asked for."""

    def __getitem__(self, name: str) -> Any:
        """Make the command of one of them."""
        if name not in one_off_options.names():
            raise KeyError(name)
        only = typer.Typer(add_completion=False)
        only.command(name, help=f"{one_off_options.summary(name)}\n\n`portmanteau show {name}` says more.")(
            _doing(name)
        )
        return typer.main.get_command(only)

    def __iter__(self) -> Iterator[str]:
        """Go through their names."""
        return iter(one_off_options.names())

    def __len__(self) -> int:
        """Count them."""
        return len(one_off_options.names())


class _DoGroup(typer.core.TyperGroup):
    """The group whose commands are `_OneOffs`."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        self.commands = _OneOffs()  # type: ignore[assignment]  # typer only reads it


app.add_typer(
    typer.Typer(
        cls=_DoGroup, no_args_is_help=True, help="Build from options: writes the recipe OUT.yaml and builds it."
    ),
    name="do",
)


def _doing(name: str) -> Any:
    """Make the function behind `do NAME`, its parameters the options of NAME and those of every build."""

    def do(
        out: Annotated[Path, typer.Argument(help="The folder to make; its recipe is written as OUT.yaml.")],
        dtype: Annotated[str | None, typer.Option(help="The dtype of the result, such as bfloat16.")] = None,
        dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the recipe, and build nothing.")] = False,
        force: Annotated[bool, typer.Option(help="Replace an earlier result, and its recipe.")] = False,
        threads: Threads = None,
        memory: Memory = MEMORY,
        as_json: Json = False,
        push: Push = None,
        public: Public = False,
        **given: Any,
    ) -> None:
        made = one_off(name, given, recipe_beside(out), {"dtype": dtype} if dtype else {})
        made.check()
        if dry_run:
            _print(made.text.rstrip("\n"))
            return
        if push:
            check_target(Target(push, public), force=force)
        write_beside(made, out, force=force)
        build(made.file, out, threads=threads, memory=memory, force=force, as_json=as_json, push=push, public=public)

    declared = signature(do, eval_str=True)
    place, *common = (one for one in declared.parameters.values() if one.kind is not one.VAR_KEYWORD)
    own = map(_parameter, one_off_options.options(name))
    of_build = (one.replace(kind=Parameter.KEYWORD_ONLY) for one in common)
    do.__signature__ = declared.replace(parameters=[place, *own, *of_build])  # type: ignore[attr-defined]
    do.__annotations__ = {}
    return do


def _parameter(option: Option) -> Parameter:
    """Make the parameter that typer reads an option from."""
    annotated: Any = Annotated
    kind: Any = list[str] if option.repeats else bool if option.kind == "flag" else str
    told = typer.Option(
        *([f"{option.flag}/--no-{option.flag[2:]}"] if option.kind == "flag" else option.spellings),
        help=option.help.replace("[", "\\["),
        metavar=None if option.kind == "flag" else option.metavar,
        show_default=False,
    )
    default = Parameter.empty if option.required else None
    annotation = annotated[kind if option.required else kind | None, told]
    return Parameter(option.key, Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


@app.command()
def new(
    recipe: Annotated[Path, typer.Argument(help="The recipe to write.")] = Path("recipe.yaml"),
    kind: Annotated[
        str | None,
        typer.Option(help="What is to be done: a composition or an operator.", autocompletion=_names),
    ] = None,
    models: Annotated[list[str] | None, typer.Option("--model", help="A model: folder, file or Hub id.")] = None,
    base: Annotated[str | None, typer.Option(help="The model that the others were trained from.")] = None,
    force: Annotated[bool, typer.Option(help="Replace an existing recipe.")] = False,
) -> None:
    """Write a first recipe, asking for what is not named, and the schema by which editors help with it."""
    schema = recipe.with_name(starter.SCHEMA)
    check_file(recipe, force=force)
    check_file(schema, force=force or json_schema.is_ours(schema))
    if kind is None:
        _say(f"known: {', '.join(starter.names())}")
        kind = typer.prompt("What is to be done", default="linear", err=True)
    asked = models or list(iter(_asked_model, ""))
    if base is None and not models and starter.needs_base(kind):
        base = typer.prompt("The base that they were trained from", err=True)
    made = starter.starter(kind, asked, base, recipe)
    recipe.write_text(made.text, encoding="utf-8")
    schema.write_text(json_schema.text(), encoding="utf-8")
    _say(f"{recipe} and {starter.SCHEMA} written; next: portmanteau check {recipe}")


def _asked_model() -> str:
    """Ask for one more model."""
    named: str = typer.prompt("A model (enter ends)", default="", show_default=False, err=True)
    return named


@app.command()
def report(
    out: Annotated[Path, typer.Argument(help="A folder that portmanteau built.", show_default=False)],
    html: Annotated[Path | None, typer.Option(help="Write it as a page.")] = None,
    measured: Annotated[bool, typer.Option("--changes", help="Measure the change from each parent.")] = False,
    picture: Picture = None,
    force: Annotated[bool, typer.Option(help="Replace an existing file.")] = False,
    as_json: Json = False,
) -> None:
    """Show what a finished build did: its layers, steps, inputs and notes, and its change from each parent."""
    found = built.read(out)
    if html:
        check_file(html, force=force)
    with _drawn_progress() as progress:
        changed, notes = built.changes_from_parents(found, progress) if measured else ((), ())
    if html:
        html.write_text(page.of_build(found, changed, notes), encoding="utf-8")
    if as_json:
        _print_json({**found.document(), "changes": [tables.document(one) for one in changed]})
        return
    if _drawn(picture):
        from portmanteau.compositions.reports import terminal

        _draw(partial(terminal.strip_lines, found.layers))
    for titles, rows in (found.steps(), found.files()):
        _table(titles, rows)
    for one in changed:
        _print(f"change from {one.base}")
        for titles, rows in tables.printed(one):
            _table(titles, rows)
    _notes([*found.notes, *notes])


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
    checkpoints: Annotated[list[str], typer.Argument(metavar="A [B]...", help="Folders, files or Hub ids.")],
    base: Annotated[str | None, typer.Option(help="What they were trained from; without it, A is.")] = None,
    unmatched: Annotated[
        Literal["error", "drop"], typer.Option(help="Tensors that only some have: refuse, or leave out.")
    ] = "error",
    ranks: Annotated[
        Literal["none", "sampled", "exact"], typer.Option(help="Ranks of changes; of large matrices sampled, or exact.")
    ] = "none",
    tensors: Annotated[bool, typer.Option("--tensors", help="A row for each tensor.")] = False,
    picture: Picture = None,
    csv: Annotated[Path | None, typer.Option(help="Write CSV: by layer and module, or tensor.")] = None,
    png: Annotated[Path | None, typer.Option(help="Draw a heat map, layers against modules.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write a page with heat maps and tables.")] = None,
    force: Annotated[bool, typer.Option(help="Replace existing files.")] = False,
    as_json: Json = False,
) -> None:
    """Show where models changed and meet: `diff EXPERT... --base BASE`, or `diff A B` for the way from A to B."""
    if base is None and len(checkpoints) != 2:
        raise typer.BadParameter("name the base: EXPERT... --base BASE, or BASE EXPERT")
    experts, base = (checkpoints, base) if base else (checkpoints[1:], checkpoints[0])
    for file in filter(None, (csv, png, html)):
        check_file(file, force=force)
    if png:
        heat_map.check_plots()
    with _drawn_progress() as progress:
        opened = [merge.open(expert) for expert in experts]
        found = compare(opened, merge.open(base), unmatched=unmatched, ranks=ranks, progress=progress)
    if csv:
        csv.write_text(tables.csv_text(found, "tensors" if tensors else "modules"), encoding="utf-8")
    if png:
        heat_map.draw(found.changes, png)
    if html:
        html.write_text(page.of_comparison(found), encoding="utf-8")
    if as_json:
        _print_json(tables.document(found, tensors=tensors))
        return
    for titles, rows in tables.printed(found, tensors=tensors):
        _table(titles, rows)
    if _drawn(picture):
        from portmanteau.compositions.reports import terminal

        _draw(partial(terminal.map_lines, maps.of_comparison(found, brief=True)))
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


def _draw(lines: Callable[[int], Iterable[Text]]) -> None:
    """Draw a picture as wide as the terminal."""
    from rich.console import Console

    console = Console(highlight=False, width=None if sys.stdout.isatty() else 100)
    for line in lines(console.width):
        console.print(line, soft_wrap=True)


def _drawn(picture: bool | None) -> bool:
    """Tell whether pictures are asked for; where nothing is said, on a terminal."""
    return sys.stdout.isatty() if picture is None else picture


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
