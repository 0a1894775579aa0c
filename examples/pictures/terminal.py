"""Record what two commands show on a terminal, as an SVG for the README: python examples/pictures/terminal.py"""

from __future__ import annotations

import io
import os
import pty
import re
import subprocess
from pathlib import Path

from rich.console import Console
from rich.text import Text

PICTURES = Path(__file__).resolve().parent
WIDTH = 104
COMMANDS = (
    "portmanteau plan examples/layer_swap.yaml",
    "portmanteau diff examples/models/task-expert examples/models/language-expert --base examples/models/base",
)


def recorded(command: str) -> str:
    """Run a command on a terminal of its own; give all that it shows, colours included."""
    ours, theirs = pty.openpty()
    size = {"COLUMNS": str(WIDTH), "LINES": "50", "TERM": "xterm-256color", "COLORTERM": "truecolor"}
    child = subprocess.Popen(
        command.split(), stdin=theirs, stdout=theirs, stderr=subprocess.DEVNULL, env={**os.environ, **size}
    )
    os.close(theirs)
    shown = b""
    try:
        while data := os.read(ours, 65536):
            shown += data
    except OSError:  # the terminal is gone with its last user
        pass
    assert child.wait() == 0, shown.decode()
    return shown.decode().replace("\r\n", "\n")


def main() -> None:
    """Write terminal.svg."""
    console = Console(record=True, width=WIDTH, file=io.StringIO(), color_system="truecolor", force_terminal=True)
    for command in COMMANDS:
        console.print(Text(f"$ {command}", style="bold"))
        console.print(Text.from_ansi(recorded(command)))
    picture = console.export_svg(title="portmanteau", unique_id="terminal")
    without_fonts = re.sub(r"@font-face \{.*?\}\s*", "", picture, flags=re.DOTALL)  # they would come from the network
    (PICTURES / "terminal.svg").write_text(without_fonts, encoding="utf-8")


if __name__ == "__main__":
    main()
