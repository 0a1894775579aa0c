"""Does a merge's time grow with its bytes, and its memory not at all? From 0.1 to 8 billion entries.

    python tests/benchmarks/scaling.py --work /tmp/bench      # 0.1B, 1.1B and 8B: 37 GB of inputs, and 16 GB more
    python tests/benchmarks/scaling.py --work /tmp/bench --scales 1.1B,8B --runs 1                  # memory alone

Two models (a base and a fine-tuning of it) are merged by `linear` and by `ties`. The table gives seconds for each GB of
the result, and the peak against that of 1.1B (or of the smallest scale that was asked for). The models of 8B do not fit
the page cache of a machine with 24 GiB, so that they are read from the disk: `cp` of one model and `sync`, which takes
turns with the builds, says what the disk gives at that size.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from process import Cost, machine, measure
from run import COPY_AND_SYNC, make_inputs, warm

_MOST_MEMORY = 1.3  # times the peak of the scale compared with
_MODELS = ("base", "one")
MERGES: Mapping[str, Mapping[str, Any]] = {
    "copy": {"copy": {"models": ["one"]}},
    "linear": {"linear": {"models": {"base": 0.6, "one": 0.4}}},
    "ties": {"ties": {"base": "base", "models": {"one": 0.6}, "density": 0.2}},
}


@dataclass(frozen=True)
class Measured:
    """What one merge cost at one scale.

    Attributes:
        merge: its name.
        scale: the size of the models.
        gigabytes: of the result.
        ours: the cost of each run.
        copied: of `cp` and `sync` of one model, in turns with them.

    """

    merge: str
    scale: str
    gigabytes: float
    ours: Sequence[Cost]
    copied: Sequence[Cost]

    @property
    def peak(self) -> float:
        """Bytes at most resident."""
        return median(one.peak for one in self.ours)


def measured(merge: str, scale: str, inputs: Path, scratch: Path, runs: int) -> Measured:
    """Build one merge at one scale, in turns with a copy of one model; each result is removed at once."""
    recipe, out, log = scratch / "recipe.yaml", scratch / "out", scratch / "log"
    models = {model: str(inputs / model) for model in _MODELS}
    recipe.write_text(json.dumps({"models": models, "merge": MERGES[merge]}), encoding="utf-8")
    warm([inputs / model for model in _MODELS])
    commands: tuple[list[str | Path], ...] = (
        ["portmanteau", "build", recipe, out],
        ["sh", "-c", COPY_AND_SYNC, "cp", inputs / "one", out],
    )
    costs: tuple[list[Cost], list[Cost]] = ([], [])
    for _ in range(runs):
        for command, found in zip(commands, costs, strict=True):
            found.append(measure(command, log))
            shutil.rmtree(out)
    size = sum(path.stat().st_size for path in (inputs / "one").glob("*.safetensors"))
    made = Measured(merge, scale, size / 1e9, *costs)
    print(_row(made, made), file=sys.stderr, flush=True)
    return made


def table(every: Sequence[Measured]) -> str:
    """Draw a Markdown table, each merge's scales together."""
    lines = [
        "| merge | scale | GB out | ours s | s/GB | cp s/GB | ours ÷ cp | peak MB | ÷ compared | target | met |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|---|",
    ]
    for found in every:
        same = [one for one in every if one.merge == found.merge]
        lines.append(_row(found, next((one for one in same if one.scale == "1.1B"), same[0])))
    return "\n".join(lines)


def _row(found: Measured, compared: Measured) -> str:
    ours, copied = (sorted(one.seconds for one in costs) for costs in (found.ours, found.copied))
    memory = found.peak / compared.peak
    cells = [
        found.merge,
        found.scale,
        f"{found.gigabytes:.2f}",
        f"{median(ours):.2f} ({ours[0]:.2f}–{ours[-1]:.2f})",
        f"{median(ours) / found.gigabytes:.2f}",
        f"{median(copied) / found.gigabytes:.2f}",
        f"{median(ours) / median(copied):.2f}",
        f"{found.peak / 1e6:.0f}",
        f"{memory:.2f}",
        f"≤ {_MOST_MEMORY}",
        "met" if memory <= _MOST_MEMORY else "not met: memory",
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Measure every merge at every scale, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for inputs (kept) and outputs (removed)")
    parser.add_argument("--scales", default="0.1B,1.1B,8B", help="of tiny,0.1B,0.3B,1.1B,8B; default: %(default)s")
    parser.add_argument("--rows", default="linear,ties", help=f"of {','.join(MERGES)}; default: %(default)s")
    parser.add_argument("--runs", type=int, default=3, help="runs of each; default: 3")
    parser.add_argument("--json", type=Path, help="keep the raw figures here")
    arguments = parser.parse_args()
    about, work, every = machine(), arguments.work.absolute(), []
    for scale in arguments.scales.split(","):
        make_inputs(work / scale, _MODELS, scale)
        for merge in arguments.rows.split(","):
            with TemporaryDirectory(prefix="run-", dir=work) as scratch:
                every.append(measured(merge, scale, work / scale, Path(scratch), arguments.runs))
    every.sort(key=lambda found: found.merge)  # the scales stay in their order
    if arguments.json:
        raw = {"machine": about, "rows": [asdict(found) for found in every]}
        arguments.json.write_text(json.dumps(raw, indent=2), encoding="utf-8")
    print(f"{about}; medians of {arguments.runs} runs (least–most)\n\n{table(every)}")


if __name__ == "__main__":
    main()
