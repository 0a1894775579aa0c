"""Builds that are ended at random moments: killed, out of disk, interrupted; then the same command, and the same bytes.

    python -m tests.campaigns.ended --kills 200 --full 50 --interrupts 20 --work /tmp/ended

Every build is a process of its own, forked from this one, which has imported everything: what is killed is the work,
not the start of Python. Half of the moments lie anywhere in the time that a whole build takes, half in the time of its
work. A full disk needs a small file system: it is a tmpfs, so that part needs root; a process that is not told of
`posix_fallocate` runs out of space in the middle of its tensors, one that is in journal, index or companions.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from portmanteau import cli, merge
from portmanteau.merge import journal
from portmanteau.merge.output import Work
from tests.campaigns.recipes import RECIPES, contents, write_inputs

Ending = Callable[[int, Path, float], None]  # ends the process of this number, which builds there, in this time or so
_SPACE = 110 << 20  # of the small file system: a build asks for 64 MiB more than it writes


@dataclass(frozen=True)
class Case:
    """One recipe: where it stands, what it makes, and how long that takes."""

    recipe: Path
    contents: dict[str, str]
    seconds: float


def build(recipe: Path, out: Path, *options: str, says: Path, without_fallocate: bool = False) -> int:
    """Begin `portmanteau build` in a process of its own; give its number. What it says goes to a file."""
    number = os.fork()
    if number:
        return number
    try:
        sys.stdout = sys.stderr = says.open("w", buffering=1, encoding="utf-8")
        if without_fallocate:
            del os.posix_fallocate
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.argv = ["portmanteau", "build", str(recipe), str(out), "--threads", "2", *options]
        cli.main()
    except SystemExit as end:
        os._exit(end.code if isinstance(end.code, int) else 0)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        os._exit(70)
    os._exit(0)


def status(number: int) -> int:
    """Wait for a process; give its status, or the signal that killed it as a negative number."""
    return os.waitstatus_to_exitcode(os.waitpid(number, 0)[1])


def cases(work: Path) -> list[Case]:
    """Build every recipe once, undisturbed."""
    found = []
    for name in RECIPES:
        recipe, out, seconds = work / "inputs" / f"{name}.yaml", work / "whole" / name, []
        for _ in range(3):
            begun = time.monotonic()
            assert status(build(recipe, out, "--force", says=work / "says")) == 0, (work / "says").read_text()
            seconds.append(time.monotonic() - begun)
        found.append(Case(recipe, contents(out), min(seconds)))
    return found


def after(draw: random.Random, out: Path, seconds: float, *, at_work: bool = False) -> None:
    """Wait: for some share of a whole build, or from when its work begins."""
    begun = time.monotonic()
    if not at_work and draw.random() < 0.5:
        time.sleep(draw.uniform(0, seconds))
        return
    while not Work.of(out).journal.exists() and not out.exists() and time.monotonic() - begun < 10 * seconds:
        time.sleep(0.0005)
    time.sleep(draw.uniform(0, seconds / 4))


def stage(out: Path) -> str:
    """Tell how far a build was when it ended."""
    work = Work.of(out)
    if out.exists():
        return "published" if not work.home.exists() else "published, not tidied up"
    read = journal.read(work.journal)
    if read is None:
        return "nothing finished"
    return "some tensors finished" if read.finished else "nothing finished"


def killed(work: Path, every: list[Case], count: int, seed: int = 0) -> Counter[str]:
    """Kill builds, run the same command, compare. Raises AssertionError at the first difference."""
    draw, stages, done = random.Random(seed), Counter[str](), 0
    while done < count:
        case, out = every[done % len(every)], work / "killed" / f"{done}"
        number = build(case.recipe, out, says=work / "says")
        after(draw, out, case.seconds)
        os.kill(number, signal.SIGKILL)
        if status(number):  # else it was done before
            stages[stage(out)] += 1
            done += 1
        _again(case, out, work)
    return stages


def interrupted(work: Path, every: list[Case], count: int, seed: int = 0) -> Counter[str]:
    """Interrupt builds as Ctrl-C does, run the same command, compare."""
    draw, stages, done = random.Random(seed), Counter[str](), 0
    while done < count:
        case, out = every[done % len(every)], work / "interrupted" / f"{done}"
        number = build(case.recipe, out, says=work / "says")
        time.sleep(0.05)  # the process sets its handler
        after(draw, out, case.seconds)
        os.kill(number, signal.SIGINT)
        ended = status(number)
        if ended:
            said, where = (work / "says").read_text(), stage(out)
            assert (ended, "Traceback" in said) == (130, False), said
            assert ("same command continues" in said) == (where == "some tensors finished"), said
            assert ("nothing was written" not in said) or where == "nothing finished", said
            stages[where] += 1
            done += 1
        _again(case, out, work)
    return stages


def out_of_space(work: Path, every: list[Case], count: int, seed: int = 0) -> Counter[str]:
    """Fill the disk under builds, make room, run the same command, compare."""
    draw, stages, done, tried = random.Random(seed), Counter[str](), 0, 0
    with small_disk(work / "disk") as disk:
        while done < count:
            case, out, tried = every[done % len(every)], disk / "out", tried + 1
            ballast = disk / "ballast"
            number = build(case.recipe, out, says=work / "says", without_fallocate=tried % 4 != 0)
            after(draw, out, case.seconds, at_work=True)
            fill(ballast)
            ended = status(number)
            ballast.unlink()
            if ended:
                said = (work / "says").read_text()
                assert ended == 1, said
                assert "No space left on device" in said or "free some space" in said, said
                assert "Traceback" not in said
                if ": needs " not in said:  # else it was refused before any work
                    stages[stage(out)] += 1
                    done += 1
            _again(case, out, work)
    return stages


def fill(ballast: Path) -> None:
    """Take all the space that there is, down to the last page."""
    descriptor = os.open(ballast, os.O_WRONLY | os.O_CREAT)
    try:
        for size in (1 << 20, 4096):
            block = bytes(size)
            try:
                while True:
                    os.write(descriptor, block)
            except OSError:
                pass
    finally:
        os.close(descriptor)


def _again(case: Case, out: Path, work: Path) -> None:
    """Run the same command until its end; the result is that of an undisturbed build, and nothing stands beside it."""
    assert status(build(case.recipe, out, says=work / "says")) == 0, (work / "says").read_text()
    assert contents(out) == case.contents, case.recipe
    assert not merge.verify(out).damaged
    assert not Work.of(out).home.exists()
    shutil.rmtree(out)


@contextmanager
def small_disk(place: Path) -> Iterator[Path]:
    """Mount a small file system; needs root."""
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={_SPACE}", "tmpfs", place], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", place], check=True)


def main() -> None:
    """Run the campaign and print what it came to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--full", type=int, default=50)
    parser.add_argument("--interrupts", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, required=True)
    options = parser.parse_args()
    write_inputs(options.work / "inputs")
    every = cases(options.work)
    for name, run, count in (
        ("killed", killed, options.kills),
        ("out of space", out_of_space, options.full),
        ("interrupted", interrupted, options.interrupts),
    ):
        stages = run(options.work, every, count, options.seed)
        print(f"{name}: {count} of {count} results identical; ended at: {dict(stages)}", flush=True)


if __name__ == "__main__":
    main()
