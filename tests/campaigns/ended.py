"""Builds that are ended at random moments: killed, out of disk, interrupted; then the same command, and the same bytes.

    python -m tests.campaigns.ended --kills 200 --full 50 --interrupts 20 --work /tmp/ended

Every build is a process of its own, forked from this one, which has imported everything: what is ended is the work,
not the start of Python. The moments are spread evenly over the time that a whole build of the recipe takes. A build
that had not begun to work by then (it was still reading the recipe and headers), or had already published its result,
is compared like all others, but it is counted apart, and another one is ended in its place.

A disk runs full by becoming smaller: it is a tmpfs, whose size is set, while a build works on it, to what it holds just
then; so that part needs root. Three builds of four are not told of `posix_fallocate`, so that they run out of space in
the middle of their tensors; the fourth finds no room for its weight files, or for journal, index or companions.

Syncing waits for whatever else writes to the same disk, so the time that all this takes is that of the disk's company.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from portmanteau import cli, merge
from portmanteau.merge.receipt import RECEIPT
from portmanteau.merge.results import journal
from portmanteau.merge.results.output import Work
from tests.campaigns.recipes import RECIPES, contents, write_inputs

_SPACE = 110 << 20  # of the small file system: a build asks for 64 MiB more than it writes
_BEYOND = 1.05  # the moments go a little past the usual end, so that its last steps are not spared
_BEFORE, _AFTER = "before any work", "after the end"


@dataclass(frozen=True)
class Case:
    """One recipe: where it stands, what it makes, when its work begins, and how long all of it takes."""

    recipe: Path
    contents: dict[str, str]
    begins: float
    seconds: float


@dataclass
class Tally:
    """What one kind of ending came to: how many builds it met at work, how far they were, and which it missed."""

    kind: str
    seconds: float = 0.0
    stages: Counter[str] = field(default_factory=Counter)
    apart: Counter[str] = field(default_factory=Counter)

    @property
    def total(self) -> int:
        """The builds that were ended in the middle of their work, all of which came out the same in the end."""
        return self.stages.total()

    def add(self, stage: str) -> None:
        """Count one build."""
        (self.apart if stage in (_BEFORE, _AFTER) else self.stages)[stage] += 1

    def plain(self) -> dict[str, Any]:
        """Give it in what JSON has."""
        return {
            "kind": self.kind,
            "identical": self.total,
            "stages": {**self.stages},
            "apart": {stage: self.apart[stage] for stage in (_BEFORE, _AFTER)},
            "seconds": round(self.seconds, 1),
        }

    def line(self) -> str:
        """Say it in one line."""
        reached = ", ".join(f"{count} with {stage}" for stage, count in sorted(self.stages.items()))
        missed = ", ".join(f"{self.apart[stage]} {stage}" for stage in (_BEFORE, _AFTER))
        return (
            f"{self.kind}: {self.total} of {self.total} results identical ({reached}); "
            f"counted apart: {missed}; {self.seconds:.0f} s"
        )


@dataclass(frozen=True)
class Building:
    """A build that runs as a process of its own, since its command began."""

    number: int
    out: Path
    says: Path
    begun: float

    def at(self, seconds: float) -> None:
        """Wait until so long after its beginning."""
        time.sleep(max(0.0, self.begun + seconds - time.monotonic()))

    @property
    def works(self) -> bool:
        """Tell whether it has begun to work: its hidden folder, or its result, stands there."""
        return Work.of(self.out).home.exists() or self.out.exists()

    def status(self) -> int:
        """Wait for its end; give its status, or the signal that killed it as a negative number."""
        return os.waitstatus_to_exitcode(os.waitpid(self.number, 0)[1])


def build(recipe: Path, out: Path, *options: str, says: Path, without_fallocate: bool = False) -> Building:
    """Begin `portmanteau build` in a process of its own, and return when its command has begun."""
    ready, tell = os.pipe()
    number = os.fork()
    if number == 0:
        os.close(ready)
        _child(["build", str(recipe), str(out), "--threads", "2", *options], says, tell, without_fallocate)
    os.close(tell)
    os.read(ready, 1)
    os.close(ready)
    return Building(number, out, says, time.monotonic())


def _child(arguments: list[str], says: Path, tell: int, without_fallocate: bool) -> None:
    """Be the process of a build, and end with its status. What it says goes to a file."""
    code = 70
    try:
        sys.stdout = sys.stderr = says.open("w", buffering=1, encoding="utf-8")
        if without_fallocate:
            del os.posix_fallocate
        signal.signal(signal.SIGINT, signal.default_int_handler)
        _tell_of_beginning(tell)
        sys.argv = ["portmanteau", *arguments]
        cli.main()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:  # whatever comes, an interrupt at the very end too: it never goes on as this campaign
        os._exit(code)


def _tell_of_beginning(tell: int) -> None:
    """Close the pipe as the first thing that the command does."""
    module: Any = importlib.import_module("portmanteau.compositions.build_recipe")
    build_recipe = module.build_recipe

    def telling(*given: Any, **settings: Any) -> Any:
        os.close(tell)
        return build_recipe(*given, **settings)

    module.build_recipe = telling


def _import_all(recipes: list[Path], work: Path) -> None:
    """Import what builds of these recipes import: a process of its own finds out, so that no threads stay here."""
    build_all = "import sys; from portmanteau.cli import app\nfor recipe in sys.argv[2:]:\n"
    build_all += "    app(['build', recipe, sys.argv[1], '--force'], standalone_mode=False)\nprint(*sys.modules)"
    command = [sys.executable, "-c", build_all, work / "whole" / "first", *recipes]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    for name in done.stdout.split():
        with suppress(ImportError):  # what modules made up themselves
            importlib.import_module(name)


def cases(work: Path, times: int = 3) -> list[Case]:
    """Build every recipe a few times, undisturbed."""
    _import_all([work / "inputs" / f"{name}.yaml" for name in RECIPES], work)
    found = []
    for name in RECIPES:
        recipe, out, says = work / "inputs" / f"{name}.yaml", work / "whole" / name, work / "says"
        begins, seconds = [], []
        for _ in range(times):
            shutil.rmtree(out, ignore_errors=True)
            building = build(recipe, out, says=says)
            while not building.works and time.monotonic() - building.begun < 60:
                time.sleep(0.001)
            begins.append(time.monotonic() - building.begun)
            assert building.status() == 0, says.read_text()
            seconds.append(time.monotonic() - building.begun)
        found.append(Case(recipe, contents(out), statistics.median(begins), statistics.median(seconds)))
    return found


def stage(building: Building) -> str:
    """Tell how far a build was when it ended."""
    work = Work.of(building.out)
    if building.out.exists():
        return _AFTER if not work.home.exists() else "the result published, not tidied up"
    read = journal.read(work.journal)
    if read is None or not read.finished:
        return "no tensor finished"
    receipt = (work.result / RECEIPT).exists()
    return "everything made, not published" if receipt else "some tensors finished"


def killed(work: Path, every: list[Case], count: int, seed: int = 0) -> Tally:
    """Kill builds, run the same command, compare. Raises AssertionError at the first difference."""
    return _each("killed", every, count, seed, lambda case, draw, _: _killed(work, case, draw))


def _killed(work: Path, case: Case, draw: random.Random) -> str:
    building = build(case.recipe, work / "killed" / "out", says=work / "says")
    building.at(draw.uniform(0, _BEYOND * case.seconds))
    os.kill(building.number, signal.SIGKILL)
    ended = building.status()
    assert ended in (0, -signal.SIGKILL), building.says.read_text()
    found = _AFTER if ended == 0 else stage(building) if building.works else _BEFORE
    _again(case, building)
    return found


def interrupted(work: Path, every: list[Case], count: int, seed: int = 0) -> Tally:
    """Interrupt builds as Ctrl-C does, run the same command, compare."""
    return _each("interrupted", every, count, seed, lambda case, draw, _: _interrupted(work, case, draw))


def _interrupted(work: Path, case: Case, draw: random.Random) -> str:
    building = build(case.recipe, work / "interrupted" / "out", says=work / "says")
    building.at(draw.uniform(0, _BEYOND * case.seconds))
    worked = building.works
    os.kill(building.number, signal.SIGINT)
    ended, said = building.status(), building.says.read_text()
    found = _AFTER if ended == 0 else stage(building) if worked else _BEFORE
    if found != _AFTER:
        assert (ended, "Traceback" in said) == (130, False), said
        kept = found in ("some tensors finished", "everything made, not published")
        assert ("same command continues" in said) == kept, (found, said)
        assert not ("nothing was written" in said and kept), (found, said)
    _again(case, building)
    return found


def out_of_space(work: Path, every: list[Case], count: int, seed: int = 0) -> Tally:
    """Leave builds at work without space, make room, run the same command, compare."""
    with small_disk(work / "disk") as disk:
        return _each(
            "out of space", every, count, seed, lambda case, draw, tried: _out_of_space(disk, work, case, draw, tried)
        )


def _out_of_space(disk: Path, work: Path, case: Case, draw: random.Random, tried: int) -> str:
    building = build(case.recipe, disk / "out", says=work / "says", without_fallocate=tried % 4 != 0)
    while not building.works and time.monotonic() - building.begun < 60:
        time.sleep(0.0005)
    time.sleep(draw.uniform(0, max(0.0, case.seconds - case.begins)))
    take_space(disk)
    ended, said = building.status(), building.says.read_text()
    resize(disk, _SPACE)
    found = _AFTER if ended == 0 else stage(building)
    if ended:
        assert (ended, "Traceback" in said, ": needs " in said) == (1, False, False), said
        assert "No space left on device" in said, said
    _again(case, building)
    return found


def _each(kind: str, every: list[Case], count: int, seed: int, end: Callable[[Case, random.Random, int], str]) -> Tally:
    """End builds of all recipes in turn, until so many were met at work."""
    draw, tally, begun, tried = random.Random(f"{kind} {seed}"), Tally(kind), time.monotonic(), 0
    while tally.total < count:
        tally.add(end(every[tried % len(every)], draw, tried))
        tried += 1
        assert tried < 20 * count + 100, f"too few of {tried} builds were met at work: {tally.line()}"
    tally.seconds = time.monotonic() - begun
    return tally


def _again(case: Case, ended: Building) -> None:
    """Run the same command until its end; the result is that of an undisturbed build, and nothing stands beside it."""
    out = ended.out
    again = build(case.recipe, out, says=ended.says)
    assert again.status() == 0, again.says.read_text()
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


def resize(disk: Path, nbytes: int) -> None:
    """Give the small file system another size. Raises CalledProcessError where it holds more."""
    command = ["mount", "-o", f"remount,size={nbytes}", disk]
    subprocess.run(command, check=True, capture_output=True)


def take_space(disk: Path) -> None:
    """Make the file system as small as what it holds; what is written meanwhile, it holds."""
    for _ in range(1000):
        found = os.statvfs(disk)
        with suppress(subprocess.CalledProcessError):
            resize(disk, max(1, found.f_blocks - found.f_bfree) * found.f_frsize)
            return
    raise AssertionError("the small file system did not become smaller")


def main() -> None:
    """Run the campaign and print what it came to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--full", type=int, default=50)
    parser.add_argument("--interrupts", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")
    options = parser.parse_args()
    write_inputs(options.work / "inputs")
    every, tallies = cases(options.work), list[Tally]()
    for run, count in ((killed, options.kills), (out_of_space, options.full), (interrupted, options.interrupts)):
        tallies.append(run(options.work, every, count, options.seed))
        print(tallies[-1].line(), file=sys.stderr if options.json else sys.stdout, flush=True)
    if options.json:
        print(json.dumps([tally.plain() for tally in tallies]))


if __name__ == "__main__":
    main()
