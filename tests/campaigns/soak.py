"""Builds by the hundred in one process: neither memory nor open files grow.

    python -m tests.campaigns.soak --builds 500 --work /tmp/soak

Memory is the resident size after each round of all recipes. What the allocator keeps settles in the first rounds, so
growth is the slope of a line through the rounds of the second half.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

from portmanteau import compositions, merge
from tests.campaigns.recipes import RECIPES, write_inputs

_MOST_GROWTH = 100_000  # bytes a build


@dataclass(frozen=True)
class Grown:
    """What one process held after each round of builds: bytes of memory, open files."""

    builds: int
    memory: tuple[int, ...]
    files: tuple[int, ...]

    @property
    def bytes_a_build(self) -> float:
        """The growth of memory in the second half, for each build."""
        late = self.memory[len(self.memory) // 2 :]
        slope, _ = statistics.linear_regression(range(len(late)), late)
        return slope * len(self.memory) / self.builds

    def check(self) -> None:
        """Raise AssertionError where something grew: one receipt kept alive would be 100 kB a build."""
        assert len(set(self.files)) == 1, f"open files: {self.files}"
        assert self.bytes_a_build < _MOST_GROWTH, f"memory: {self.memory}"


def resident() -> int:
    """Give the bytes of this process that lie in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def soak(work: Path, builds: int) -> Grown:
    """Build the recipes in turn, in this process."""
    memory, files, done = list[int](), list[int](), 0
    while done < builds:
        for name in RECIPES:
            loaded = compositions.load(work / "inputs" / f"{name}.yaml")
            options = {"dtype": loaded.output.dtype, "shard_size": loaded.output.shard_size}
            merge.build(compositions.compose(loaded), work / "out", force=True, recipe=loaded.text, **options)
            done += 1
        gc.collect()
        memory.append(resident())
        files.append(len(os.listdir("/proc/self/fd")))  # noqa: PTH208 - as many as there are
    return Grown(done, tuple(memory), tuple(files))


def main() -> None:
    """Run the campaign and print what it came to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--builds", type=int, default=500)
    parser.add_argument("--work", type=Path, required=True)
    options = parser.parse_args()
    write_inputs(options.work / "inputs", layers=2, width=32)
    begun = time.monotonic()
    found = soak(options.work, options.builds)
    halves = [found.memory[0], found.memory[len(found.memory) // 2], found.memory[-1]]
    print(
        f"soak: {found.builds} builds: {', '.join(f'{one / 1e6:.1f} MB' for one in halves)} resident after the first "
        f"round, half and all; {found.bytes_a_build:.0f} bytes a build in the second half; "
        f"{found.files[0]} open files after the first round, {found.files[-1]} at the end; "
        f"{time.monotonic() - begun:.0f} s"
    )
    found.check()


if __name__ == "__main__":
    main()
