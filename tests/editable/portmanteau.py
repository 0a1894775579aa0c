"""What an editable install puts on the path: a module whose package path is this checkout."""

from pathlib import Path

__path__ = [str(Path(__file__).resolve().parents[2])]
