"""Compare `portmanteau build` with its peers and with `cp`: wall time, processor time and peak memory of processes.

    python tests/benchmarks/run.py --work /tmp/bench                       # every row, five runs, 14 GB of inputs
    python tests/benchmarks/run.py --work /tmp/bench --rows linear,ties --runs 3 --json figures.json
    python tests/benchmarks/run.py --work /tmp/bench --scale tiny --runs 1 # does the script itself still work?
    python tests/benchmarks/run.py --table figures.json                    # the table again, from raw figures

Peer, we and `cp` take turns, so that a noisy machine is noisy for all of them. Before the first round every input is
read once, to lie in the page cache for all, and we run once uncounted: what is compiled or cached at a first run is
not measured, nor is it for the peer, which an uncounted `--help` makes ready. We sync our output and `cp` is followed
by `sync`; mergekit and peft do not sync. What nobody else does has our own `linear` as its peer.

Models have 1.1 billion entries (2.2 GB in bf16), but for the ten snapshots: 0.3 billion each, as ten of 2.2 GB would
not stay in the page cache and would measure the disk. LoRA extraction runs once: the peer's SVDs take many minutes.
mergekit is given `dtype: bfloat16`, as in its own examples: it computes deltas in bf16 where we compute in fp32.
Nothing heavy is imported here and the inputs are written by a process of their own: a child's peak begins at the size
of its parent.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from process import Cost, machine, measure
from rows import ROWS, Row, Targets, our_command, peer_command

Round = Mapping[str, Cost]  # by program: peer, ours, cp

_INPUTS = Path(__file__).with_name("inputs.py")
COPY_AND_SYNC = 'cp -r "$1" "$2" && sync "$2"/* "$2"'
_TITLES = (
    *("recipe", "peer", "peer s", "ours s", "cp s", "peer ÷ ours", "target", "ours ÷ cp", "target"),
    *("peer MB", "ours MB", "target", "peer CPU s", "ours CPU s", "met"),
)


@dataclass(frozen=True)
class Figures:
    """What one row measured, at the scale of its models."""

    name: str
    scale: str
    rounds: Sequence[Round]

    @property
    def title(self) -> str:
        """Its name, with what is not as in the other rows."""
        limited = ROWS[self.name].most_runs == len(self.rounds)
        other = [*([self.scale] if self.scale != "1.1B" else []), *([f"runs: {len(self.rounds)}"] if limited else [])]
        return f"{self.name} ({', '.join(other)})" if other else self.name

    def of(self, field: str) -> dict[str, list[float]]:
        """Give one figure of each program's costs, round by round."""
        return {p: [getattr(one[p], field) for one in self.rounds if p in one] for p in ("peer", "ours", "cp")}


def make_inputs(folder: Path, models: Sequence[str], scale: str, *flags: str) -> None:
    """Write the inputs that are not there yet."""
    subprocess.run([sys.executable, _INPUTS, folder, *models, "--scale", scale, *flags], check=True)


def warm(folders: Sequence[Path]) -> None:
    """Read every file once: what fits into the page cache lies there then."""
    buffer = bytearray(1 << 20)
    for path in (path for folder in folders for path in sorted(folder.glob("*.safetensors"))):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def rounds(name: str, inputs: Path, scratch: Path, runs: int, *, alone: bool) -> Iterator[Round]:
    """Let the programs take turns in a folder of their own; each result is removed as soon as it is not needed."""
    row, log = ROWS[name], scratch / "log"
    outs = {program: scratch / program for program in ("peer", "ours", "cp")}
    theirs = peer_command(row, inputs, scratch / "peer.yaml", outs["peer"])
    ours = our_command(row, inputs, scratch / "ours.yaml", outs["ours"])
    warm([inputs / model for model in row.models])
    for number in range(runs + 1):
        costs = {}
        if not alone:
            costs["peer"] = measure(theirs if number else _made_ready(row, theirs), log)
            shutil.rmtree(outs["peer"], ignore_errors=True)
        costs["ours"] = measure(ours, log)
        costs["cp"] = measure(["sh", "-c", COPY_AND_SYNC, "cp", outs["ours"], outs["cp"]], log)
        for program in ("ours", "cp"):
            shutil.rmtree(outs[program])
        if number:
            shown = [f"{p} {c.seconds:.2f} s (CPU {c.processor:.2f}) {c.peak / 1e6:.0f} MB" for p, c in costs.items()]
            print(f"{name}: {', '.join(shown)}", file=sys.stderr, flush=True)
            yield costs


def _made_ready(row: Row, command: Sequence[str | Path]) -> Sequence[str | Path]:
    """Give what loads a peer's program once without its work."""
    return [sys.executable, "-c", "import peft, transformers"] if row.peer == "peft" else [command[0], "--help"]


def table(figures: Sequence[Figures]) -> str:
    """Draw medians, each with its range, as a Markdown table; with targets where a row has its own scale."""
    lines = [f"| {' | '.join(_TITLES)} |", f"|---|---|{'--:|' * (len(_TITLES) - 3)}---|"]
    return "\n".join([*lines, *(f"| {' | '.join(_cells(found))} |" for found in figures)])


def _cells(found: Figures) -> list[str]:
    row = ROWS[found.name]
    targets = row.targets if found.scale == row.scale else Targets()
    seconds, ours = found.of("seconds"), median(found.of("seconds")["ours"])
    peaks, processor = found.of("peak"), found.of("processor")
    faster = median(seconds["peer"]) / ours if seconds["peer"] else None
    of_copy = ours / median(seconds["cp"])
    return [
        found.title,
        row.peer,
        *(_range(seconds[program]) for program in ("peer", "ours", "cp")),
        "–" if faster is None else f"{faster:.1f}",
        _bound("≥", targets.faster),
        f"{of_copy:.2f}",
        _bound("≤", targets.of_copy),
        *(f"{median(peaks[program]) / 1e6:.0f}" if peaks[program] else "–" for program in ("peer", "ours")),
        _bound("≤", targets.peak and targets.peak / 1e6),
        *(f"{median(processor[program]):.1f}" if processor[program] else "–" for program in ("peer", "ours")),
        targets.verdict(faster, of_copy, median(peaks["ours"])),
    ]


def _range(values: Sequence[float]) -> str:
    if not values:
        return "–"
    if len(values) == 1:
        return f"{values[0]:.2f}"
    return f"{median(values):.2f} ({min(values):.2f}–{max(values):.2f})"


def _bound(sign: str, value: float | None) -> str:
    return "–" if value is None else f"{sign} {value:g}"


def save(path: Path, about: str, figures: Sequence[Figures]) -> None:
    """Keep the raw figures."""
    raw = {"machine": about, "rows": [asdict(found) for found in figures]}
    path.write_text(json.dumps(raw, indent=2), encoding="utf-8")


def read(path: Path) -> tuple[str, list[Figures]]:
    """Read raw figures back."""
    raw = json.loads(path.read_text(encoding="utf-8"))
    figures = []
    for row in raw["rows"]:
        found = [{program: Cost(**cost) for program, cost in one.items()} for one in row["rounds"]]
        figures.append(Figures(row["name"], row["scale"], found))
    return raw["machine"], figures


def _rows(text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in ROWS]:
        raise argparse.ArgumentTypeError(f"unknown row {', '.join(unknown)}; known: {', '.join(ROWS)}")
    return names


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="folder for inputs (kept) and outputs (removed)")
    parser.add_argument("--rows", type=_rows, default=list(ROWS), help=f"of {','.join(ROWS)}; default: all")
    parser.add_argument("--runs", type=int, default=5, help="counted runs of each program; default: 5")
    parser.add_argument("--scale", help="tiny, 0.1B, 0.3B, 1.1B or 8B for all rows; default: each row's own")
    parser.add_argument("--alone", action="store_true", help="without the peers")
    parser.add_argument("--json", type=Path, help="keep the raw figures here, written after every row")
    parser.add_argument("--table", type=Path, help="measure nothing, draw the table of kept figures")
    arguments = parser.parse_args()
    if (arguments.work is None) == (arguments.table is None):
        parser.error("either --work or --table")
    return arguments


def main() -> None:
    """Make the inputs, run every row, print the table."""
    arguments = _arguments()
    if arguments.table:
        about, figures = read(arguments.table)
    else:
        about, figures = machine(), []
        work: Path = arguments.work.absolute()
        for name in arguments.rows:
            scale = arguments.scale or ROWS[name].scale
            needed = {*ROWS[name].models, *(ROWS["linear"].models if ROWS[name].peer == "our linear" else ())}
            make_inputs(work / scale, sorted(needed), scale)
            runs = min(arguments.runs, ROWS[name].most_runs or arguments.runs)
            with TemporaryDirectory(prefix="run-", dir=work) as scratch:
                found = list(rounds(name, work / scale, Path(scratch), runs, alone=arguments.alone))
            figures.append(Figures(name, scale, found))
            if arguments.json:
                save(arguments.json, about, figures)
    most = max(len(found.rounds) for found in figures)
    print(f"{about}; medians of {most} interleaved runs (least–most)\n\n{table(figures)}")


if __name__ == "__main__":
    main()
