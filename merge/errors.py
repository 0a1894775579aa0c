"""What a user did wrong, as a value: where it is, what was found, and what to do about it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

from .shown import printable, printable_lines

_MOST = 100  # mistakes and words that are shown
_LONGEST_WORD = 100  # that is compared with others


@dataclass(frozen=True, slots=True)
class Mistake:
    """One finding: the file, line or tensor, what was found there, and the cure."""

    where: str
    what: str
    hint: str = ""

    def __str__(self) -> str:
        """`where: what` and, on a line of its own, the hint; what strangers wrote is spelled out, not printed raw."""
        text = f"{printable(self.where)}: {printable(self.what)}" if self.where else printable(self.what)
        return f"{text}\n  hint: {printable_lines(self.hint)}" if self.hint else text


class PortmanteauError(Exception):
    """A user's mistake, or several found at once. The command line prints it and ends with status 1."""

    def __init__(self, where: str, what: str, hint: str = "") -> None:
        """Raise for one mistake; see `of` for several."""
        self.mistakes: tuple[Mistake, ...] = (Mistake(where, what, hint),)
        super().__init__(where, what, hint)

    @classmethod
    def of(cls, mistakes: Iterable[Mistake]) -> Self:
        """Make one error of all mistakes found, in the order in which they were found, each once."""
        found = tuple(dict.fromkeys(mistakes))
        error = cls(found[0].where, found[0].what, found[0].hint)
        error.mistakes = found
        return error

    def __str__(self) -> str:
        """Every mistake on its own lines; of very many the first."""
        shown = [str(mistake) for mistake in self.mistakes[:_MOST]]
        left = len(self.mistakes) - _MOST
        return "\n".join([*shown, *([f"and {left} more mistakes"] if left > 0 else [])])


class CheckpointError(PortmanteauError):
    """An input cannot be opened or read: missing, truncated, corrupt, of an unknown kind."""


class RecipeError(PortmanteauError):
    """A recipe's text is wrong: unknown keys, values out of bounds, names that nothing stands behind."""


class MergeError(PortmanteauError):
    """Checkpoints that do not go together, or settings that do not fit them."""


class OutputError(PortmanteauError):
    """The result cannot be written where it was asked for."""


def nearest(word: str, known: Iterable[str]) -> str:
    """Say which known word was probably meant, or list them all.

    >>> nearest("densty", ["density", "weight"])
    "did you mean 'density'?"
    >>> nearest("zzz", ["density", "weight"])
    'known: density, weight'
    """
    words = list(known)
    near = [one for one in words if len(one) <= _LONGEST_WORD][: 10 * _MOST]  # comparing takes time
    close = difflib.get_close_matches(word[:_LONGEST_WORD], near, n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else f"known: {some(words, _MOST)}"


def some(names: Iterable[str], most: int = 4) -> str:
    """Name the first few of many, and count the rest.

    >>> some(["a", "b", "c"], most=2)
    'a, b and 1 more'
    """
    words = list(names)
    shown = ", ".join(words[:most])
    return f"{shown} and {len(words) - most} more" if len(words) > most else shown
