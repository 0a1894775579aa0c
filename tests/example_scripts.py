"""The scripts of examples/ that measure something: run in their quick form, and imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def run_quickly(name: str, folder: Path) -> Path:
    """Run a script in its quick form: its runs, results.json and tables.md lie in the folder, which is given back."""
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), "--quick"]
    done = subprocess.run(
        [*command, "--runs", str(folder / "runs"), "--out", str(folder / "results.json")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (folder / "tables.md").write_text(done.stdout, encoding="utf-8")
    return folder


def imported(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Import a script; a test is skipped where what the script needs is not installed."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    module: ModuleType = pytest.importorskip(name, exc_type=ModuleNotFoundError)
    return module
