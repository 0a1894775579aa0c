"""Pictures in the terminal: heat maps, and strips of layers. Colours only there; the text says the same without."""

from __future__ import annotations

import string
from collections.abc import Iterable, Iterator, Sequence

from rich.text import Text

from portmanteau.merge.origins import Cell, Strip, models_of
from portmanteau.merge.palette import DIVERGING, MODELS, SEQUENTIAL, ink
from portmanteau.merge.shown import printable

from ..reports.maps import HeatMap

_ENDS = {"embeddings": "emb"}


def map_lines(maps: Iterable[HeatMap], width: int) -> Iterator[Text]:
    """Draw heat maps: a row for each module, a column for each layer."""
    for one in maps:
        yield from _map_lines(one, width)
        yield Text()


def strip_lines(strips: Sequence[Strip], width: int) -> Iterator[Text]:
    """Draw which model each layer comes from, and say what the letters stand for."""
    models = models_of(strips)
    for strip in strips:
        yield from _strip_lines(strip, models, width)
    if models:
        yield _legend(models)


def _map_lines(one: HeatMap, width: int) -> Iterator[Text]:
    """Write a heat map; more layers than fit go into another block below."""
    colours = DIVERGING if one.scale == "diverging" else SEQUENTIAL
    shown = [[one.shown(value).removesuffix(" %") for value in row] for row in one.values]
    cell = 1 + max((len(text) for row in shown for text in row), default=3)
    cell = max(cell, 1 + len(str(max(one.layers, default=0))))
    modules = [printable(module) for module in one.modules]
    left = max(map(len, modules), default=0) + 1
    fits = max(1, (width - left) // cell)
    yield Text(printable(f"{one.title}, {one.stack}"), style="bold")
    yield Text(f"{one.measure}{'' if one.decimals else ', %'}", style="dim")
    for first in range(0, len(one.layers), fits):
        columns = range(first, min(first + fits, len(one.layers)))
        yield Text(" " * left + "".join(f"{one.layers[i]:>{cell}}" for i in columns), style="dim")
        for module, row, words in zip(modules, one.values, shown, strict=True):
            line = Text(f"{module:<{left}}")
            for i in columns:
                number = one.colour(row[i])
                style = "dim" if number is None else f"{ink(colours[number])} on {colours[number]}"
                line.append(f"{words[i]:>{cell}}", style=style)
            yield line


def _strip_lines(strip: Strip, models: Sequence[str], width: int) -> Iterator[Text]:
    """Write the cells' names and, below, the letters of their models; more than fit go below."""
    cells = [(_ENDS.get(cell.name, cell.name), _letters(cell, models)) for cell in strip.cells]
    wide = 1 + max((len(text) for name, letters in cells for text in (name, letters.plain)), default=1)
    fits = max(1, width // wide)
    yield Text(printable(strip.stack) or "no layers", style="bold")
    for first in range(0, len(cells), fits):
        block = cells[first : first + fits]
        yield Text("".join(f"{name:^{wide}}" for name, _ in block), style="dim")
        line = Text()
        for _, letters in block:
            padded = letters.copy()
            padded.align("center", wide - 1)
            line.append_text(padded).append(" ")
        yield line


def _letters(cell: Cell, models: Sequence[str]) -> Text:
    """Write where a cell comes from: `A`, `A×B` a blend, `A|B` side by side, `×3` a blend of three."""
    own, sign = cell.models, "×" if cell.is_blend else "|"
    if len(own) > 2:
        return Text(f"{sign}{len(own)}", style="bold")
    text = Text()
    for i, number in enumerate(sorted(map(models.index, own))):
        text.append(sign if i else "", style="dim")
        text.append(_letter(number), style=_style(number))
    return text


def _letter(index: int) -> str:
    letters = string.ascii_uppercase
    return letters[index] if index < len(letters) else f"{letters[index % 26]}{index // 26}"


def _style(index: int) -> str:
    colour = MODELS[index % len(MODELS)]
    return f"bold {ink(colour)} on {colour}"


def _legend(models: Sequence[str]) -> Text:
    text = Text()
    for i, model in enumerate(models):
        text.append(_letter(i), style=_style(i)).append(f" {printable(model)}   ")
    return text.append("× a blend   | side by side", style="dim")
