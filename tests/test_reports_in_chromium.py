"""The page of a report in a real browser, headless: nothing refused, cells by keyboard, values said, light and dark."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import tempfile
from html import unescape
from pathlib import Path
from types import ModuleType

import pytest
import torch
from matplotlib.image import imread

from portmanteau import compositions, merge
from portmanteau.compositions.reports import page
from tests.test_reports import EVIL, Save

PICTURES = Path(__file__).parents[1] / "examples" / "pictures"


def _script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("screenshots", PICTURES / "screenshots.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


screenshots = _script()
pytestmark = pytest.mark.skipif(screenshots.chromium() is None, reason="no chromium on the PATH")


@pytest.fixture
def report(save_tensors: Save, tmp_path: Path) -> Path:
    """Write the page of an expert of three layers and two modules, with hostile names."""
    base = {f"h.{i}.{name}.weight": torch.ones(2, 2) for i in range(3) for name in ("attn", f"mlp{EVIL}")}
    expert = {name: tensor + 0.25 * int(name[2]) for name, tensor in base.items()}
    models = [merge.open(save_tensors(name, found), label=EVIL) for name, found in (("e", expert), ("b", base))]
    file = tmp_path / "report.html"
    file.write_text(page.of_comparison(compositions.compare(models[:1], models[1])), encoding="utf-8")
    return file


def dom(file: Path) -> tuple[str, list[str]]:
    """Give what a page has become when its script has run, and what the browser's console was told."""
    with tempfile.TemporaryDirectory() as profile:
        command = [screenshots.chromium(), *screenshots.QUIET, f"--user-data-dir={profile}", "--enable-logging=stderr"]
        command += ["--virtual-time-budget=2000", "--dump-dom", file.as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def test_the_browser_refuses_nothing_of_a_page_and_runs_nothing_of_strangers(report: Path) -> None:
    made, console = dom(report)
    assert console == []
    assert made.count("<script") == 1
    title = re.search("<title>(.*?)</title>", made, re.DOTALL)
    assert title is not None
    assert unescape(title[1]).startswith("<script>alert(1)</script>")


def test_a_script_that_is_not_the_pages_own_is_refused(report: Path) -> None:
    text = report.read_text(encoding="utf-8")
    report.write_text(text.replace("</main>", "<script>document.title = 'taken'</script></main>"), encoding="utf-8")
    made, console = dom(report)
    assert "<title>taken" not in made
    assert any("Content Security Policy" in line for line in console)


def test_cells_are_gone_through_by_keyboard_and_say_their_value(report: Path) -> None:
    text = re.sub("<meta http-equiv[^>]*>", "", report.read_text(encoding="utf-8"))
    drive = (
        "const said = document.querySelector('figure output'), heard = [];"
        # a page without a window is never focused, so the browser tells nobody that its focus moves
        "const hear = () => { document.activeElement.dispatchEvent(new FocusEvent('focusin', {bubbles: true}));"
        "  heard.push(said.textContent); };"
        "const press = (key) => { document.activeElement.dispatchEvent("
        "new KeyboardEvent('keydown', {key, bubbles: true, cancelable: true})); hear(); };"
        "document.querySelector('.cell[tabindex=\"0\"]').focus(); hear();"
        "for (const key of ['ArrowRight', 'ArrowRight', 'ArrowRight', 'ArrowDown', 'ArrowUp', 'ArrowUp']) press(key);"
        "document.title = heard.join('|');"
    )
    report.write_text(text.replace("</body>", f"<script>{drive}</script></body>"), encoding="utf-8")
    made, _ = dom(report)
    heard = re.search("<title>(.*?)</title>", made, re.DOTALL)
    assert heard is not None
    said = [re.sub("mlp.*:", "mlp:", one) for one in unescape(heard[1]).split("|")]
    # the right end and the top are where the arrow keys stop
    assert said == [
        "layer 0, attn: 0 %",
        "layer 1, attn: 25 %",
        "layer 2, attn: 50 %",
        "layer 2, attn: 50 %",
        "layer 2, mlp: 50 %",
        "layer 2, attn: 50 %",
        "layer 2, attn: 50 %",
    ]


def test_the_page_is_light_or_dark_as_the_reader_has_it(report: Path, tmp_path: Path) -> None:
    for name, options in (("light", ()), ("dark", screenshots.DARK)):
        screenshots.screenshot(report, tmp_path / f"{name}.png", (500, 400), options)
    light, dark = (imread(tmp_path / f"{name}.png")[-1, -1, :3].mean() for name in ("light", "dark"))
    assert (light > 0.9, dark < 0.2) == (True, True)
