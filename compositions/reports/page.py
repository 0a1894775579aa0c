"""A page of one file: no network, nothing from elsewhere; light and dark; every picture with its table beside it."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from string import Template

from portmanteau.merge import palette
from portmanteau.merge.origins import Cell, Strip, models_of
from portmanteau.merge.units import readable

from . import maps, svg, tables
from .built import Built
from .maps import HeatMap
from .rows import Changes, Comparison, Meetings
from .svg import text

_TABLE = "The same as a table"
_HERE = Path(__file__).parent
_WORDS = frozenset(
    {"where", "tensor", "models", "settings", "because of", "operator", "file", "pair", "expert", "layer"}
)


def of_comparison(found: Comparison) -> str:
    """Make the page of a comparison: where each expert changed, and where each pair meets."""
    body = [_section("As wholes", *(_table(*one) for one in _wholes(found)))]
    body += [_section(f"Change of {one.expert}", *_expert(one)) for one in found.changes]
    body += [_section(f"{one.one} and {one.other}", *_pair(one)) for one in found.pairs]
    body.append(_notes(found.notes))
    experts = [one.expert for one in found.changes]
    title = f"{experts[0]} against {found.base}" if len(experts) == 1 else f"{len(experts)} experts of {found.base}"
    return _page(title, "Where models differ. " + _made_by(), body)


def of_build(built: Built, changes: Sequence[Comparison] = (), notes: Sequence[str] = ()) -> str:
    """Make the page of a finished build, with its change from each parent where these were measured."""
    body = []
    if built.layers:
        body.append(_section("Which model each layer comes from", *_strips(built.layers)))
    body.append(_section("What was done", _table(*built.steps())))
    body += [_section(f"Change from {one.base}", *_expert(one.changes[0])) for one in changes]
    if built.recipe is not None:
        digest = f'<p class="about">BLAKE3 <code>{text(built.recipe.digest)}</code></p>'
        body.append(_section("Recipe", digest, f'<pre tabindex="0">{text(built.recipe.text)}</pre>'))
    body.append(_section("Inputs", _table(*built.files())))
    if built.surveys:
        body.append(_section("What surveys found", *_surveys(built)))
    digests = [(name, digest) for name, digest in built.outputs.items()]
    body.append(
        _section("Outputs", _details(f"{len(digests)} tensors by BLAKE3", _table(("tensor", "digest"), digests)))
    )
    body.append(_notes((*built.notes, *notes)))
    made = f"{len(built.outputs)} tensors in {built.seconds:.1f} s, by {_versions(built)}. "
    return _page(f"{built.name}: what the build did", made + _made_by(), body)


def _wholes(found: Comparison) -> Iterator[tuple[Sequence[str], Sequence[Sequence[str]]]]:
    yield (
        ("expert", *tables.titles_of(found.changes[0])),
        [(one.expert, *tables.whole_cells(one)) for one in found.changes],
    )
    if found.pairs:
        rows = [(f"{one.one} · {one.other}", *tables.pair_cells(one.whole)) for one in found.pairs]
        yield ("pair", *tables.OF_PAIRS.values()), rows


def _expert(found: Changes) -> Iterator[str]:
    yield _pictures(maps.of_changes(found))
    rows = [(row.where, *tables.row_cells(row, found)) for row in found.layers]
    yield _details("Every measure, layer by layer", _table(("layer", *tables.titles_of(found)), rows))


def _pair(found: Meetings) -> Iterator[str]:
    yield _pictures(maps.of_meetings(found))
    rows = [(row.where, *tables.pair_cells(row.meeting)) for row in found.layers]
    yield _details("Every measure, layer by layer", _table(("layer", *tables.OF_PAIRS.values()), rows))


def _pictures(found: Iterable[HeatMap]) -> str:
    """Put heat maps side by side, where there is room."""
    return f'<div class="pictures">{"".join(map(_figure, found))}</div>'


def _figure(one: HeatMap) -> str:
    """Show a heat map with its scale, a line that says the cell pointed at, and a table of the same."""
    rows = [
        (str(layer), *(one.shown(values[column]) for values in one.values)) for column, layer in enumerate(one.layers)
    ]
    caption = f"<figcaption>{text(one.measure)}<br>layers of {text(one.stack)}</figcaption>"
    picture = f'<div class="scroll">{svg.heat_map(one)}</div>{svg.scale(one)}<output>&nbsp;</output>'
    return f"<figure>{caption}{picture}{_details(_TABLE, _table(('layer', *one.modules), rows))}</figure>"


def _strips(strips: Sequence[Strip]) -> Iterator[str]:
    """Show the strips with their legend, and a table of the same."""
    models = models_of(strips)
    for one in strips:
        picture = f'<div class="scroll">{svg.strip(one, models)}</div>'
        caption = f"<figcaption>{text(one.stack or 'no layers')}</figcaption>"
        yield f"<figure>{caption}{picture}<output>&nbsp;</output></figure>"
    names = "".join(f'<span class="legend">{svg.swatch(i)} {text(name)}</span>' for i, name in enumerate(models))
    yield f"<p>{names}</p>"
    yield '<p class="about">Striped: a blend. Split: some tensors from one model, others from another.</p>'
    rows = [
        (_where(strip, cell), " × ".join(one.models), one.operator, str(one.tensors), readable(one.nbytes))
        for strip in strips
        for cell in strip.cells
        for one in cell.origins
    ]
    yield _details(_TABLE, _table(("where", "models", "operator", "tensors", "bytes"), rows))


def _where(strip: Strip, cell: Cell) -> str:
    return f"{strip.stack}.{cell.name}" if cell.is_layer else cell.name


def _surveys(built: Built) -> Iterator[str]:
    for title, value in built.surveys.items():
        shown = json.dumps(value, indent=2, ensure_ascii=False)
        yield _details(title, f'<pre tabindex="0">{text(shown)}</pre>')


def _versions(built: Built) -> str:
    return ", ".join(f"{name} {number}" for name, number in built.versions.items())


def _made_by() -> str:
    how = "Point at a cell of a picture for its value, or go from cell to cell with Tab and the arrow keys."
    return f"{how} Page by portmanteau {version('portmanteau')}."


def _notes(notes: Iterable[str]) -> str:
    found = "".join(f"<li>{text(note)}</li>" for note in dict.fromkeys(notes))
    return _section("Notes", f"<ul>{found}</ul>") if found else ""


def _section(title: str, *parts: str) -> str:
    return f"<section><h2>{text(title)}</h2>{''.join(parts)}</section>"


def _details(title: str, content: str) -> str:
    return f"<details><summary>{text(title)}</summary>{content}</details>"


def _table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Write a table; columns of words are set left and may wrap."""
    kinds = [' class="words"' if title in _WORDS else "" for title in titles]
    head = "".join(f'<th scope="col"{kind}>{text(title)}</th>' for title, kind in zip(titles, kinds, strict=True))
    lines = []
    for first, *rest in rows:
        cells = "".join(f"<td{kind}>{text(cell)}</td>" for cell, kind in zip(rest, kinds[1:], strict=True))
        lines.append(f'<tr><th scope="row"{kinds[0]}>{text(first)}</th>{cells}</tr>')
    body = "".join(lines)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _page(title: str, about: str, body: Sequence[str]) -> str:
    """Put the page together; its policy lets nothing run or load but what is in it, known by digest."""
    style, script = _style(), (_HERE / "page.js").read_text(encoding="utf-8")
    return Template((_HERE / "page.html").read_text(encoding="utf-8")).substitute(
        title=text(title),
        about=text(about),
        body="\n".join(body),
        style=style,
        script=script,
        style_hash=_policy(style),
        script_hash=_policy(script),
    )


def _policy(content: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()


def _style() -> str:
    """Fill the colours into the style sheet: those of scales are variables, so that they are others in the dark."""
    scales = {"s": palette.SEQUENTIAL, "d": palette.DIVERGING}
    dark = {"s": palette.SEQUENTIAL_DARK, "d": palette.DIVERGING_DARK}
    classes = [
        f".{kind}{i} {{ fill: var(--{kind}{i}); }}" for kind, colours in scales.items() for i in range(len(colours))
    ]
    classes += [f".m{i} {{ fill: {colour}; }}" for i, colour in enumerate(palette.MODELS)]
    filled = {"light": _variables(scales), "dark": _variables(dark), "classes": "\n".join(classes)}
    return Template((_HERE / "page.css").read_text(encoding="utf-8")).substitute(filled)


def _variables(scales: Mapping[str, Sequence[str]]) -> str:
    return " ".join(f"--{kind}{i}: {colour};" for kind, colours in scales.items() for i, colour in enumerate(colours))
