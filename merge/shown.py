"""Text that strangers wrote, made safe to show: on a terminal, in JSON, in Markdown. The one place that escapes."""

from __future__ import annotations

import json
import re
from typing import Any

_LONGEST = 4000  # characters of one shown text
_MARKDOWN = re.compile(r"([\\`*\[\]|~])")
_HTML = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}


def printable(text: str) -> str:
    r"""Give a text on one line, in which control characters, escape sequences and bidirectional marks are spelled out.

    >>> printable("a\x1b[31m\nb"), printable("Größe")
    ('a\\x1b[31m\\nb', 'Größe')
    """
    if not text.isprintable():
        text = "".join(sign if sign.isprintable() else _spelled(sign) for sign in text)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} … ({len(text)} characters)"


def printable_lines(text: str) -> str:
    r"""The same for a text of several lines, however long, which keeps its line ends and tabs.

    >>> printable_lines("a\r\x1b\n\tb\n")
    'a\\r\\x1b\n\tb\n'
    """
    kept = "\n\t"
    return "".join(sign if sign in kept or sign.isprintable() else _spelled(sign) for sign in text)


def _spelled(sign: str) -> str:
    return sign.encode("unicode_escape").decode()


def json_text(value: Any, **options: Any) -> str:
    r"""Write JSON in which nothing but line ends between values is a control character, and no text is lost.

    >>> print(json_text(["\x9b31m", "\u202e", "é"]))
    ["\u009b31m", "\u202e", "é"]
    """
    text = json.dumps(value, ensure_ascii=False, **options)
    lines = (
        line if line.isprintable() else "".join(sign if sign.isprintable() else _json_escape(sign) for sign in line)
        for line in text.split("\n")
    )
    return "\n".join(lines)


def _json_escape(sign: str) -> str:
    return json.dumps(sign)[1:-1] if sign != "\x7f" else "\\u007f"


def markdown(text: str) -> str:
    r"""Give a text as plain words in Markdown: no markup, no link, no HTML, no end of a table cell.

    >>> markdown("<b>x</b> [y](z) a_b | c")
    '&lt;b&gt;x&lt;/b&gt; \\[y\\](z) a_b \\| c'
    """
    return "".join(_HTML.get(sign, sign) for sign in _MARKDOWN.sub(r"\\\1", printable(text)))


def code(text: str) -> str:
    """Give a text as inline code in Markdown, in a table too, whatever backticks it holds.

    >>> code("a"), code("a`b")
    ('`a`', '``a`b``')
    """
    shown = printable(text).replace("|", "\\|")
    fence = _longer_than_in(shown, 1)
    return f"{fence} {shown} {fence}" if shown.startswith("`") or shown.endswith("`") else f"{fence}{shown}{fence}"


def fenced(text: str, language: str) -> list[str]:
    """Give a text as the lines of a fenced block in Markdown that it cannot leave."""
    shown = printable_lines(text.rstrip())
    fence = _longer_than_in(shown, 4)
    return [f"{fence}{language}", shown, fence]


def _longer_than_in(text: str, least: int) -> str:
    runs = [len(run) for run in re.findall("`+", text)]
    return "`" * max(least, max(runs, default=0) + 1)
