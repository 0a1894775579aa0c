"""Compare `portmanteau build` with `mergekit-yaml`, and both with `cp`: wall time and peak memory of whole processes.

    python tests/benchmarks/run.py --work /tmp/bench                      # every recipe, five runs, 14 GB of disk
    python tests/benchmarks/run.py --work /tmp/bench --recipes linear,ties --runs 3
    python tests/benchmarks/run.py --work /tmp/bench --scale tiny --runs 1         # does the script itself still work?

For every recipe the programs take turns, so that a noisy machine is noisy for all of them; the first round is a warm-up
that is not counted, and leaves the inputs in the page cache for all. Before every process everything written is synced,
so that nobody pays for another's writes. We sync our output and `cp` is followed by `sync`; mergekit does not sync.
What mergekit does not do has our own `linear` as its peer.

mergekit is given `dtype: bfloat16`, as in its own examples: it computes deltas in bf16 where we compute in fp32.
Peak memory is the kernel's `ru_maxrss`, which counts the pages of mapped input files too. Nothing heavy is imported
here and the inputs are written by a process of their own: a child's peak begins at the size of its parent.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

_INPUTS = Path(__file__).with_name("inputs.py")
_BIN = Path(sys.executable).parent
_RSS_UNIT = 1 if sys.platform == "darwin" else 1024
_COPY_AND_SYNC = 'cp -r "$1" "$2" && sync "$2"/* "$2"'
_WEIGHTS = {"one": 0.6, "two": 0.4}
_BOTTOM, _TOP = 2, 1  # layers of model two in the recipe `copy`

OURS: Mapping[str, Any] = {
    "copy": {"layer_swap": {"task": "one", "language": "two", "bottom": _BOTTOM, "top": _TOP, "transition": 0}},
    "linear": {"linear": {"models": _WEIGHTS}},
    "slerp": {"slerp": {"models": ["one", "two"], "t": 0.4}},
    "task_arithmetic": {"task_arithmetic": {"base": "base", "models": _WEIGHTS}},
    "extract_sparse": {"extract_sparse": {"base": "base", "tuned": "one", "density": 0.01}},
    "ties": {"ties": {"base": "base", "models": _WEIGHTS, "density": 0.2}},
    "dare_ties": {
        "dare": {"base": "base", "models": _WEIGHTS, "density": 0.2, "rescale": "l1", "elect": "weighted"},
    },
}


OURS_ALONE = ("extract_sparse",)


def our_recipe(name: str, inputs: Path) -> dict[str, Any]:
    """Write a recipe our way."""
    return {"models": {model: str(inputs / model) for model in ("base", "one", "two")}, "merge": OURS[name]}


def mergekit_recipe(name: str, inputs: Path) -> dict[str, Any]:
    """Write the same recipe mergekit's way."""
    if name == "copy":
        layers = json.loads((inputs / "base" / "config.json").read_text(encoding="utf-8"))["num_hidden_layers"]
        zones = [("two", 0, _BOTTOM), ("one", _BOTTOM, layers - _TOP), ("two", layers - _TOP, layers)]
        slices = [{"sources": [{"model": str(inputs / model), "layer_range": [a, b]}]} for model, a, b in zones]
        return {"merge_method": "passthrough", "slices": slices, "dtype": "bfloat16"}
    weights: dict[str, Any] = {str(inputs / model): {"weight": weight} for model, weight in _WEIGHTS.items()}
    recipe: dict[str, Any] = {"merge_method": name, "dtype": "bfloat16"}
    if name == "slerp":
        recipe |= {"base_model": str(inputs / "one"), "parameters": {"t": 0.4}}
    elif name != "linear":
        recipe["base_model"] = str(inputs / "base")
    if name in ("ties", "dare_ties"):
        recipe["parameters"] = {"density": 0.2}
    return {**recipe, "models": [{"model": path, "parameters": given} for path, given in weights.items()]}


@dataclass(frozen=True)
class Cost:
    """What one process took: wall seconds, processor seconds, and peak resident bytes."""

    seconds: float
    processor: float
    peak: int


def measure(command: Sequence[str | Path], log: Path) -> Cost:
    """Run a command to its end, its output in a log file. Raises SystemExit with the log where it fails."""
    os.sync()
    with log.open("wb") as output:
        begun = time.perf_counter()
        child = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=_environment())
        _, status, usage = os.wait4(child.pid, 0)
        seconds = time.perf_counter() - begun
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}: status {child.returncode}\n{log.read_text(errors='replace')}")
    return Cost(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * _RSS_UNIT)


def _environment() -> dict[str, str]:
    return {**os.environ, "HF_HUB_OFFLINE": "1", "PATH": f"{_BIN}{os.pathsep}{os.environ['PATH']}"}


def one_round(name: str, work: Path, inputs: Path) -> dict[str, Cost]:
    """Let a peer, us and `cp` do one recipe, one after the other; nothing of it is left afterwards."""
    ours, theirs = work / f"{name}.portmanteau.yaml", work / f"{name}.peer.yaml"  # JSON is YAML
    ours.write_text(json.dumps(our_recipe(name, inputs), indent=2), encoding="utf-8")
    outs = {program: work / f"out-{program}" for program in ("peer", "ours", "cp")}
    if name in OURS_ALONE:
        recipe, peer = our_recipe("linear", inputs), ["portmanteau", "build", theirs, outs["peer"]]
    else:
        recipe, peer = mergekit_recipe(name, inputs), ["mergekit-yaml", theirs, outs["peer"], "--no-copy-tokenizer"]
    theirs.write_text(json.dumps(recipe, indent=2), encoding="utf-8")
    log = work / "last.log"
    for out in outs.values():
        shutil.rmtree(out, ignore_errors=True)
    try:
        costs = {"peer": measure(peer, log)}
        shutil.rmtree(outs["peer"])
        costs["ours"] = measure(["portmanteau", "build", ours, outs["ours"]], log)
        costs["cp"] = measure(["sh", "-c", _COPY_AND_SYNC, "cp", outs["ours"], outs["cp"]], log)
    finally:
        for out in outs.values():
            shutil.rmtree(out, ignore_errors=True)
    shown = [f"{p} {c.seconds:.2f} s (CPU {c.processor:.2f}) {c.peak / 1e6:.0f} MB" for p, c in costs.items()]
    print(f"{name}: {', '.join(shown)}", file=sys.stderr, flush=True)
    return costs


def table(rounds: Mapping[str, Sequence[Mapping[str, Cost]]]) -> str:
    """Draw the medians as a Markdown table."""
    lines = [
        "| recipe | peer | peer s | ours s | peer ÷ ours | cp s | ours ÷ cp | peer MB | ours MB |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for name, costs in rounds.items():
        theirs, ours, copied = (median(one[program].seconds for one in costs) for program in ("peer", "ours", "cp"))
        their_peak, our_peak = (median(one[program].peak for one in costs) / 1e6 for program in ("peer", "ours"))
        peer = "our `linear`" if name in OURS_ALONE else "mergekit"
        lines.append(
            f"| {name} | {peer} | {theirs:.2f} | {ours:.2f} | {theirs / ours:.2f} | {copied:.2f} | {ours / copied:.2f} "
            f"| {their_peak:.0f} | {our_peak:.0f} |"
        )
    return "\n".join(lines)


def _recipes(text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in OURS]:
        raise argparse.ArgumentTypeError(f"unknown recipe {', '.join(unknown)}; known: {', '.join(OURS)}")
    return names


def main() -> None:
    """Make the inputs, run every recipe, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for inputs (kept) and outputs (removed)")
    parser.add_argument("--recipes", type=_recipes, default=list(OURS), help=f"of {','.join(OURS)}; default: all")
    parser.add_argument("--runs", type=int, default=5, help="counted runs of each program; default: 5")
    parser.add_argument("--scale", choices=("full", "tiny"), default="full", help="1.1 billion parameters, or a toy")
    arguments = parser.parse_args()
    inputs = (arguments.work / arguments.scale).absolute()
    subprocess.run([sys.executable, _INPUTS, inputs, "--scale", arguments.scale], check=True)
    rounds = {}
    for name in arguments.recipes:
        rounds[name] = [one_round(name, arguments.work.absolute(), inputs) for _ in range(1 + arguments.runs)][1:]
    print(f"{platform.machine()}, {os.cpu_count()} processors; medians of {arguments.runs} runs\n\n{table(rounds)}")


if __name__ == "__main__":
    main()
