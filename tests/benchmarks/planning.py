"""How long do commands take that read no weights, and a build before it reads any?

    python tests/benchmarks/planning.py --work /tmp/bench

`plan` and `check` of a recipe over four models of 70 billion entries, 30 shards each: headers with holes behind
them, so 564 GB apparent and no disk. Beside them `--help`, `show ties`, and the build of a copy of a toy, which is
all start.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from process import Cost, machine, measure
from run import make_inputs

_MODELS = ("base", "one", "two", "three")
_MOST_SECONDS = 2.0  # for what reads the headers of 70B
_HELD = ("plan, 70B × 4", "check, 70B × 4")
_TIES = {"base": "base", "models": {"one": 0.6, "two": 0.4, "three": 0.3}, "density": 0.2}
_RULES = [{"tensors": "*.mlp.*", "density": 0.5}]


def recipes(work: Path, scratch: Path) -> tuple[Path, Path]:
    """Write the inputs and two recipes: one over four models of 70B, one that copies a toy."""
    make_inputs(work / "70B", _MODELS, "70B", "--headers")
    make_inputs(work / "tiny", ["one"], "tiny")
    large, toy = scratch / "large.yaml", scratch / "toy.yaml"
    models = {model: str(work / "70B" / model) for model in _MODELS}
    large.write_text(json.dumps({"models": models, "merge": {"ties": {**_TIES, "rules": _RULES}}}), encoding="utf-8")
    toy.write_text(json.dumps({"merge": {"copy": {"models": [str(work / "tiny" / "one")]}}}), encoding="utf-8")
    return large, toy


def measured(large: Path, toy: Path, scratch: Path, runs: int) -> dict[str, list[Cost]]:
    """Let the commands take turns, after one uncounted run of each."""
    out = scratch / "out"
    commands: dict[str, list[str | Path]] = {
        _HELD[0]: ["portmanteau", "plan", large],
        _HELD[1]: ["portmanteau", "check", large],
        "--help": ["portmanteau", "--help"],
        "show ties": ["portmanteau", "show", "ties"],
        "build, copy of a toy": ["portmanteau", "build", toy, out],
    }
    costs: dict[str, list[Cost]] = {name: [] for name in commands}
    for run in range(runs + 1):
        for name, command in commands.items():
            cost = measure(command, scratch / "log")
            costs[name] += [cost] if run else []
        shutil.rmtree(out)
    return costs


def main() -> None:
    """Let the commands take turns, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for inputs")
    parser.add_argument("--runs", type=int, default=5, help="counted runs of each; default: 5")
    arguments = parser.parse_args()
    about, work = machine(), arguments.work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix="run-", dir=work) as scratch:
        found = measured(*recipes(work, Path(scratch)), Path(scratch), arguments.runs)
    print(f"{about}; medians of {arguments.runs} runs (least–most)\n")
    print("| command | s | CPU s | peak MB | target | met |\n|---|--:|--:|--:|--:|---|")
    for name, costs in found.items():
        most = _MOST_SECONDS if name in _HELD else None
        seconds = sorted(cost.seconds for cost in costs)
        shown = f"{median(seconds):.2f} ({seconds[0]:.2f}–{seconds[-1]:.2f})"
        processor, peak = (median(getattr(cost, field) for cost in costs) for field in ("processor", "peak"))
        verdict = "–" if most is None else "met" if median(seconds) < most else "not met"
        target = f"< {most:g} s" if most else "–"
        print(f"| {name} | {shown} | {processor:.2f} | {peak / 1e6:.0f} | {target} | {verdict} |")


if __name__ == "__main__":
    main()
