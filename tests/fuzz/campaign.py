"""The fuzzing campaign: atheris against one target, for so many executions.

    python -m tests.fuzz.campaign header --runs 100000 --corpus /tmp/corpus/header --report /tmp/header.json

needs atheris (`pip install atheris`), and on the path the checkout and its `tests/editable`. New inputs are kept in the
corpus folder. An input that crashes a target, takes more than a second of processor time or 512 MB ends the run with a
message, and lies then in `…crash-…` beside the report.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
import time
from pathlib import Path

import atheris

MOST_SECONDS, MOST_MEGABYTES = 1.0, 512
SEEDS = Path(__file__).parent / "corpus"


def main() -> None:
    """Fuzz one target."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target")
    parser.add_argument("--runs", type=int, default=100_000)
    parser.add_argument("--seconds", type=int, default=0, help="end after so long")
    parser.add_argument("--longest", type=int, default=4096, help="bytes of an input")
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--report", type=Path, required=True)
    given = parser.parse_args()
    with atheris.instrument_imports(include=["portmanteau", "yaml", "zipfile"]):
        from tests.fuzz.targets import World
    memory = Path("/dev/shm")
    folder = tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None)
    target = World(Path(folder.name)).targets[given.target]
    if given.target == "diff":
        import torch  # noqa: F401 - once, and not in the first input's time
    begun, done, slowest = time.time(), 0, 0.0

    def report() -> None:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        seconds = round(time.time() - begun)
        found = {"executions": done, "seconds": seconds, "slowest": round(slowest, 3), "peak_mb": round(peak)}
        given.report.write_text(json.dumps({"target": given.target, **found}) + "\n")

    def once(raw: bytes) -> None:
        nonlocal done, slowest
        at = time.process_time()
        target(raw)
        taken = time.process_time() - at
        done, slowest = done + 1, max(slowest, taken)
        if taken > MOST_SECONDS:
            report()
            raise RuntimeError(f"an input of {len(raw)} bytes took {taken:.1f} s")
        if done % 1000 == 0 or done >= given.runs:
            report()

    given.corpus.mkdir(parents=True, exist_ok=True)
    options = [
        f"-runs={given.runs}",
        f"-max_len={given.longest}",
        f"-rss_limit_mb={MOST_MEGABYTES}",
        "-timeout=20",
        f"-max_total_time={given.seconds}",
        f"-artifact_prefix={given.report.with_suffix('')}-",
    ]
    seeds = SEEDS / given.target
    atheris.Setup([sys.argv[0], *options, str(given.corpus), *([str(seeds)] if seeds.is_dir() else [])], once)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
