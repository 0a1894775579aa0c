"""What a command imports, seen from a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

_PROGRAM = """
import sys
from portmanteau.cli import main
sys.argv = ["portmanteau", *sys.argv[1:]]
try:
    main()
except SystemExit as end:
    assert not end.code
print(*sorted({"torch", "transformers"}.intersection(sys.modules)))
"""


def heavy_imports(*words: str, cwd: Path) -> list[str]:
    """Run a command in a folder; tell which of torch and transformers it imported."""
    done = subprocess.run([sys.executable, "-c", _PROGRAM, *words], cwd=cwd, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()[-1].split()
