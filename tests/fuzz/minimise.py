"""Keep of a campaign's inputs those that reach something new in our code, the shortest first.

    python -m tests.fuzz.minimise header /tmp/corpus/header

adds them to the corpus here, which is a regression test.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import tempfile
from pathlib import Path
from types import FrameType
from typing import Any

from tests.fuzz.targets import Target, World

ROOT = str(Path(__file__).parents[2])
CORPUS = Path(__file__).parent / "corpus"
Step = tuple[str, int, int]  # of a file: from one line to another


def reached(target: Target, raw: bytes) -> set[Step]:
    """Run a target, and tell which steps from line to line it takes in our code."""
    steps: set[Step] = set()

    def enter(frame: FrameType, event: str, _: Any) -> Any:
        name = frame.f_code.co_filename
        if not name.startswith(ROOT) or "/tests/" in name:
            return None
        last = 0

        def line(inner: FrameType, event: str, _: Any) -> Any:
            nonlocal last
            steps.add((name, last, inner.f_lineno))
            last = inner.f_lineno
            return line

        return line

    sys.settrace(enter)
    try:
        target(raw)
    finally:
        sys.settrace(None)
    return steps


def main() -> None:
    """Minimise the inputs of one target."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target")
    parser.add_argument("inputs", type=Path)
    given = parser.parse_args()
    home = CORPUS / given.target
    found = {path.read_bytes() for folder in (home, given.inputs) for path in folder.iterdir()}
    known: set[Step] = set()
    kept = []
    with tempfile.TemporaryDirectory() as folder:
        target = World(Path(folder)).targets[given.target]
        target(b"")  # what is imported and made once
        for raw in sorted(found, key=lambda one: (len(one), one)):
            steps = reached(target, raw)
            if not steps <= known:
                known |= steps
                kept.append(raw)
    for raw in kept:
        (home / hashlib.sha1(raw).hexdigest()[:16]).write_bytes(raw)
    print(f"{given.target}: {len(kept)} of {len(found)} inputs, {sum(map(len, kept)):,} bytes")


if __name__ == "__main__":
    main()
