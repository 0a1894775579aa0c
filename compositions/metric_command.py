"""A user's own program as the measure of a model: run for a folder, its last line is the number."""

from __future__ import annotations

import math
import shlex
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

from portmanteau.merge import PortmanteauError

_WHERE = "--metric"
_PLACE = "{model}"
_SHOWN = 5  # last lines of stderr that an error shows


def measured_by(command: str) -> Callable[[Path], float]:
    """Make a measure of a command line in which `{model}` stands for the folder; no shell runs it.

    >>> import sys
    >>> loss = measured_by(f"{sys.executable} -c 'print(0.25)' {{model}}")
    >>> loss(Path("merged"))
    0.25

    Raises PortmanteauError, here for a command that cannot be run, and in the measure where it fails or prints no
    number as the last line of its stdout.
    """
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise PortmanteauError(_WHERE, f"cannot be split into words: {error}", f"it is {command!r}") from error
    if not any(_PLACE in word for word in words):
        hint = f'for example: --metric "python evaluate.py {_PLACE}"'
        raise PortmanteauError(_WHERE, f"does not say where the model's folder goes: {command!r}", hint)
    if shutil.which(words[0]) is None:
        hint = "no shell reads it: for pipes and variables name a script of yours"
        raise PortmanteauError(_WHERE, f"there is no program {words[0]!r}", hint)
    return lambda folder: _run([word.replace(_PLACE, str(folder.absolute())) for word in words])


def _run(words: Sequence[str]) -> float:
    """Run the program and read its number."""
    try:
        done = subprocess.run(
            words, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", check=False
        )
    except OSError as error:
        raise PortmanteauError(_WHERE, f"{shlex.join(words)} cannot be run: {error.strerror or error}") from error
    if done.returncode:
        raise PortmanteauError(_WHERE, f"{shlex.join(words)} ended with status {done.returncode}", _last(done.stderr))
    lines = done.stdout.strip().splitlines() or [""]
    try:
        number = float(lines[-1])
    except ValueError:
        number = math.nan
    if math.isnan(number):
        what = f"{shlex.join(words)}: the last line of its stdout is {lines[-1]!r}, which is no number"
        raise PortmanteauError(_WHERE, what, _last(done.stderr))
    return number


def _last(stderr: str) -> str:
    """Give the last lines of what a program said."""
    lines = stderr.strip().splitlines()[-_SHOWN:]
    return "its stderr ended with:\n    " + "\n    ".join(lines) if lines else "its stderr is empty"
