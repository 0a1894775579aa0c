"""Takes the screenshots of the README: reports of the example models, by a headless Chromium.

python examples/pictures/screenshots.py            # needs chromium on the PATH; writes beside this file
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).parent
EXAMPLES = HERE.parent
QUIET = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
DARK = ("--blink-settings=preferredColorScheme=0",)


def chromium() -> str | None:
    """Find the browser; None where there is none."""
    return shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def screenshot(page: Path, picture: Path, size: tuple[int, int], options: Sequence[str] = ()) -> None:
    """Take a picture of a page, in a browser that knows nothing yet. Raises RuntimeError where none is written."""
    with tempfile.TemporaryDirectory() as profile:
        command = [chromium() or "chromium", *QUIET, *options, f"--user-data-dir={profile}"]
        command += [f"--window-size={size[0]},{size[1]}", f"--screenshot={picture}", page.absolute().as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    if not picture.is_file():
        raise RuntimeError(f"{picture} was not written: {done.stderr[-500:]}")


def portmanteau(*arguments: object) -> None:
    """Run the command line, in the folder of the examples."""
    command = Path(sys.executable).with_name("portmanteau")
    subprocess.run([command, *map(str, arguments)], cwd=EXAMPLES, stdout=subprocess.DEVNULL, check=True)


def pages(folder: Path) -> tuple[Path, Path]:
    """Make the page of a build, and that of two experts and their base."""
    build, comparison = folder / "build.html", folder / "comparison.html"
    portmanteau("build", "layer_swap.yaml", folder / "swahili-math")
    portmanteau("report", folder / "swahili-math", "--html", build, "--changes")
    experts = ("models/task-expert", "models/language-expert")
    portmanteau("diff", *experts, "--base", "models/base", "--ranks", "sampled", "--html", comparison)
    return build, comparison


def main() -> None:
    """Write both pictures."""
    with tempfile.TemporaryDirectory() as folder:
        build, comparison = pages(Path(folder))
        screenshot(build, HERE / "report-of-a-build.png", (760, 1040))
        screenshot(comparison, HERE / "report-of-two-experts.png", (900, 850), DARK)


if __name__ == "__main__":
    main()
