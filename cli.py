"""The command line: parse, call one function, print. Data on stdout, everything else on stderr.

What only some commands need they import themselves, so that each starts with what it uses. Annotations are values, not
strings: typer reads those of all commands at every start, and would evaluate them.
"""

import gc
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from portmanteau import compositions, merge
from portmanteau.compositions.one_off import commands
from portmanteau.compositions.terminal import results, tables
from portmanteau.compositions.terminal.bars import added, drawn_progress
from portmanteau.compositions.terminal.options import (
    Beside,
    Built,
    Changes,
    Device,
    Json,
    Memory,
    NonFinite,
    Picture,
    Plugin,
    Public,
    Push,
    Recipe,
    Rows,
    Threads,
    completed,
)
from portmanteau.compositions.terminal.printing import notes, put, put_json, put_table, say
from portmanteau.merge.files.upload import Target, check_target
from portmanteau.merge.limits import MEMORY, Limits
from portmanteau.merge.results.output import check_file

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Build one good model out of many checkpoints, from a recipe kept in version control.",
)


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
    changes: Changes = True,
) -> None:
    """Plan and build: write the model that a recipe asks for. A build that was ended is continued."""
    from portmanteau.compositions.build_recipe import build_recipe
    from portmanteau.merge.receipt import read

    if push:
        check_target(Target(push, public), force=force)
    with drawn_progress() as progress:
        receipt = build_recipe(
            recipe,
            out,
            threads=threads,
            memory=memory,
            device=device,
            force=force,
            fresh=fresh,
            non_finite=non_finite,
            locked=locked,
            progress=progress,
        )
    if not as_json:
        results.built(out, receipt)
    if push:
        _publish(out, Target(push, public), changes)
    if as_json:
        receipt = replace(read(out), outcome=receipt.outcome) if push else receipt  # it may tell of the changes now
        put_json({"out": str(out), **asdict(receipt)})


@app.command()
def push(
    out: Annotated[Path, typer.Argument(help="A folder that `build` made.", show_default=False)],
    repository: Annotated[str, typer.Argument(help="The repository on the Hub: ORG/NAME.", show_default=False)],
    public: Public = False,
    changes: Changes = True,
    force: Annotated[bool, typer.Option(help="Replace what portmanteau did not build.")] = False,
) -> None:
    """Publish a finished result on the Hub, in a private repository unless --public says otherwise."""
    check_target(Target(repository, public), force=force)
    _publish(out, Target(repository, public), changes)


def _publish(out: Path, target: Target, changes: bool) -> None:
    from portmanteau.compositions.publish import publish

    with drawn_progress() as progress:
        address = publish(out, target, changes=changes, progress=progress)
    say(f"published: {address}")


@app.command()
def verify(
    out: Built,
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
    with drawn_progress() as progress:
        found = merge.verify(out, threads=threads, progress=progress)
        differing = compositions.rebuilt(out, folder=folder, threads=threads, progress=progress) if rebuild else ()
    if as_json:
        put_json({**asdict(found), "rebuilt": [asdict(one) for one in differing] if rebuild else None})
    else:
        results.verified(out, found, differing, rebuild=rebuild)
    raise typer.Exit(1 if found.damaged or differing else 0)


@app.command()
def lock(recipe: Recipe, threads: Threads = None, plugin: Plugin = None, as_json: Json = False) -> None:
    """Write RECIPE.lock: the revision and the digest of every file that the recipe reads."""
    from portmanteau.compositions import lock_file

    with drawn_progress() as progress:
        path, files = lock_file.write(compositions.load(recipe), threads=threads, progress=progress)
    if as_json:
        put_json({"lock": str(path), "files": files})
    else:
        say(f"{path}: {files} files; portmanteau build --locked takes no other")


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
    from portmanteau.merge import describe

    ready = compositions.preflight(recipe)
    summary = describe.plan(ready.plan, Limits.of(threads, memory).in_flight(ready.plan))
    if as_json:
        put_json(summary)
    else:
        results.plan(ready, summary, picture)


@app.command()
def check(
    recipe: Recipe,
    out: Annotated[Path | None, typer.Argument(help="Where it is to be built.", show_default=False)] = None,
    force: Annotated[bool, typer.Option(help="As for build: an earlier result there may be replaced.")] = False,
    plugin: Plugin = None,
    as_json: Json = False,
) -> None:
    """Check a recipe: its text, the headers of all checkpoints that it names, and the place of the result."""
    ready = compositions.preflight(recipe, out, force=force)
    if as_json:
        put_json(ready.document())
    else:
        results.checked(recipe, ready)


@app.command()
def convert(recipe: Recipe, plugin: Plugin = None) -> None:
    """Print a mergekit YAML as a recipe of portmanteau's own, which builds the same bytes."""
    from portmanteau.compositions.recipe import text as recipe_text

    loaded = compositions.load(recipe)
    put(recipe_text.written(loaded.document.value).rstrip("\n"))
    notes(loaded.document.notes)


@app.command()
def show(
    name: Annotated[
        str | None,
        typer.Argument(help="An operator or a composition.", show_default=False, autocompletion=completed),
    ] = None,
    plugin: Plugin = None,
    as_json: Json = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the whole reference, as Markdown.")] = False,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON Schema of recipes, for editors.")] = False,
) -> None:
    """Show the operators and compositions, or one of them with its settings, formula and source."""
    from portmanteau.compositions import reference_page
    from portmanteau.compositions.reference import json_schema
    from portmanteau.compositions.reference import markdown as reference_markdown

    if markdown:
        put(reference_markdown.page(typer.main.get_command(app)).rstrip("\n"))
    elif schema:
        put(json_schema.text().rstrip("\n"))
    elif as_json:
        put_json(reference_page.entry(name) if name else reference_page.overview())
    elif name:
        results.entry(reference_page.entry(name))
    else:
        put_table(tables.overview(reference_page.overview()))


@app.command()
def inspect(
    checkpoint: Annotated[str, typer.Argument(help="A folder, a file or a Hub id.", show_default=False)],
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False,
    as_json: Json = False,
) -> None:
    """Show the tensors, sizes, layers and dtypes of a checkpoint, a bottleneck adapter or a sparse fine-tune."""
    from portmanteau.merge import describe

    found = describe.reference(checkpoint, tensors=tensors)
    if as_json:
        put_json(found)
    else:
        results.inspected(checkpoint, found)


def _do(
    name: str,
    out: Beside,
    dtype: Annotated[str | None, typer.Option(help="The dtype of the result, such as bfloat16.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the recipe, and build nothing.")] = False,
    force: Annotated[bool, typer.Option(help="Replace an earlier result, and its recipe.")] = False,
    threads: Threads = None,
    memory: Memory = MEMORY,
    device: Device = "cpu",
    non_finite: NonFinite = "error",
    as_json: Json = False,
    push: Push = None,
    public: Public = False,
    changes: Changes = True,
    **given: Any,
) -> None:
    """Write the recipe that the options of a composition or an operator ask for, and build it."""
    from portmanteau.compositions.one_off.written import one_off, recipe_beside, write_beside

    made = one_off(name, given, recipe_beside(out), {"dtype": dtype} if dtype else {})
    made.check()
    if dry_run:
        put(made.text.rstrip("\n"))
        return
    if push:
        check_target(Target(push, public), force=force)
    write_beside(made, out, force=force)
    build(
        made.file,
        out,
        threads=threads,
        memory=memory,
        device=device,
        force=force,
        non_finite=non_finite,
        as_json=as_json,
        push=push,
        public=public,
        changes=changes,
    )


_DO_HELP = "Build from options: writes the recipe OUT.yaml and builds it."
app.add_typer(typer.Typer(cls=commands.group(_do), no_args_is_help=True, help=_DO_HELP), name="do")


@app.command()
def new(
    recipe: Annotated[Path, typer.Argument(help="The recipe to write.")] = Path("recipe.yaml"),
    kind: Annotated[
        str | None,
        typer.Option(help="What is to be done: a composition or an operator.", autocompletion=completed),
    ] = None,
    models: Annotated[list[str] | None, typer.Option("--model", help="A model: folder, file or Hub id.")] = None,
    base: Annotated[str | None, typer.Option(help="The model that the others were trained from.")] = None,
    force: Annotated[bool, typer.Option(help="Replace an existing recipe.")] = False,
) -> None:
    """Write a first recipe, asking for what is not named, and the schema by which editors help with it."""
    from portmanteau.compositions.one_off import starter
    from portmanteau.compositions.terminal import asking

    starter.check_places(recipe, force=force)
    kind, models, base = asking.first_recipe(kind, models, base)
    starter.write(starter.starter(kind, models, base, recipe))
    say(f"{recipe} and {starter.SCHEMA} written; next: portmanteau check {recipe}")


@app.command()
def report(
    out: Built,
    html: Annotated[Path | None, typer.Option(help="Write it as a page.")] = None,
    measured: Annotated[bool, typer.Option("--changes", help="Measure the change from each parent.")] = False,
    picture: Picture = None,
    force: Annotated[bool, typer.Option(help="Replace an existing file.")] = False,
    as_json: Json = False,
) -> None:
    """Show what a finished build did: its layers, steps, inputs and notes, and its change from each parent."""
    from portmanteau.compositions.reports import built, page
    from portmanteau.compositions.reports import tables as measures

    found = built.read(out)
    if html:
        check_file(html, force=force)
    with drawn_progress() as progress:
        changed, told = built.changes_from_parents(found, progress) if measured else ((), ())
    if html:
        html.write_text(page.of_build(found, changed, told), encoding="utf-8")
    if as_json:
        put_json({**found.document(), "changes": [measures.document(one) for one in changed]})
    else:
        results.report(found, changed, told, picture)


@app.command()
def soup(
    out: Beside,
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
    non_finite: NonFinite = "error",
    as_json: Json = False,
) -> None:
    """Build the greedy soup: models averaged one by one, best first, as long as the metric gets no worse."""
    made = compositions.greedy_soup(
        models,
        out,
        measure=compositions.measured_by(metric),
        minimize=minimize,
        shared=shared,
        force=force,
        non_finite=non_finite,
        tell=say,
    )
    notes(made.receipt.notes)
    if as_json:
        put_json({"out": str(out), **made.document()})
    else:
        results.soup(out, made)


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
    tensors: Rows = False,
    picture: Picture = None,
    csv: Annotated[Path | None, typer.Option(help="Write CSV: by layer and module, or tensor.")] = None,
    png: Annotated[Path | None, typer.Option(help="Draw a heat map, layers against modules.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write a page with heat maps and tables.")] = None,
    force: Annotated[bool, typer.Option(help="Replace existing files.")] = False,
    as_json: Json = False,
) -> None:
    """Show where models changed and meet: `diff EXPERT... --base BASE`, or `diff A B` for the way from A to B."""
    from portmanteau.compositions.reports import page
    from portmanteau.compositions.reports import png as heat_map
    from portmanteau.compositions.reports import tables as measures

    if base is None and len(checkpoints) != 2:
        raise typer.BadParameter("name the base: EXPERT... --base BASE, or BASE EXPERT")
    experts, base = (checkpoints, base) if base else (checkpoints[1:], checkpoints[0])
    for file in filter(None, (csv, png, html)):
        check_file(file, force=force)
    if png:
        heat_map.check_plots()
    with drawn_progress() as progress:
        opened = [merge.open(expert) for expert in experts]
        found = compositions.compare(opened, merge.open(base), unmatched=unmatched, ranks=ranks, progress=progress)
    if csv:
        csv.write_text(measures.csv_text(found, "tensors" if tensors else "modules"), encoding="utf-8")
    if png:
        heat_map.draw(found.changes, png)
    if html:
        html.write_text(page.of_comparison(found), encoding="utf-8")
    if as_json:
        put_json(measures.document(found, tensors=tensors))
    else:
        results.comparison(found, picture, tensors=tensors)


@app.command()
def overlap(
    diffs: Annotated[list[str], typer.Argument(help="Sparse fine-tunes: folders or Hub ids.", show_default=False)],
    tensors: Rows = False,
    as_json: Json = False,
) -> None:
    """Show where sparse fine-tunes change the same entries, and whether they pull the same way there."""
    found = [
        row for row in compositions.overlaps([merge.open_sparse(diff) for diff in diffs]) if tensors or not row.tensor
    ]
    if as_json:
        put_json([row.document() for row in found])
    else:
        put_table(tables.overlaps(found, tensors=tensors))


def main() -> None:
    """Run the command line; a user's mistake ends with a message and status 1."""
    gc.freeze()  # what was imported stays: no collection looks through it again, at the exit least of all
    try:
        app()
    except merge.PortmanteauError as error:
        say(str(error))
        notes(added(error))
        sys.exit(1)


if __name__ == "__main__":
    main()
