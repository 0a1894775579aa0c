"""README, guide and examples: every link leads somewhere, every recipe is one, every command line can be given."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
import typer

from portmanteau import compositions
from portmanteau.cli import app
from portmanteau.compositions.composition import compositions as registered
from portmanteau.merge import RecipeError
from portmanteau.merge.registry import operators

ROOT = Path(__file__).parents[1]
GUIDE = sorted(ROOT.glob("examples/guide/*.md"))
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("examples/**/*.md"))]
COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]  # it is a group
NOWHERE = re.compile(r"no (?:model, )?file or folder '(.+)'|nothing is called '(.+)'")


def named(page: Path) -> str:
    return str(page.relative_to(ROOT))


def without_code(text: str) -> str:
    """Give the text with its code blocks and code spans taken out."""
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL))


def links(text: str) -> list[str]:
    return re.findall(r"\]\(([^)\s]+)\)", without_code(text))


def anchors(text: str) -> set[str]:
    """Give the anchors of a page's headings, as GitHub makes them."""
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#{1,6} (.+)$", prose, re.MULTILINE)
    made: dict[str, int] = {}
    for heading in headings:
        anchor = re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")
        made[anchor] = made.get(anchor, -1) + 1
    return {f"{anchor}-{n}" if n else anchor for anchor, last in made.items() for n in range(last + 1)}


def dead(page: Path) -> Iterator[str]:
    """Yield the links of a page that lead to no file in the checkout, or to no heading there."""
    for link in links(page.read_text(encoding="utf-8")):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = unquote(link).partition("#")
        target = (page.parent / path).resolve() if path else page
        inside = target.is_relative_to(ROOT) and target.exists()
        if not inside or (anchor and anchor not in anchors(target.read_text(encoding="utf-8"))):
            yield link


def recipes(text: str) -> list[str]:
    """Give every recipe of a page: its YAML blocks, and what stands in a line as `merge: {…}`."""
    return re.findall(r"^```yaml\n(.*?)^```$", text, re.MULTILINE | re.DOTALL) + re.findall(r"`(merge: \{.+?\})`", text)


def command_lines(text: str) -> list[str]:
    """Give what runs a command of ours: lines of a page's shell blocks, and `portmanteau …` in its prose and tables."""
    blocks = re.findall(r"^```bash\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    lines = [line.rpartition("&& ")[2] for block in blocks for line in block.splitlines()]
    spans = re.findall(r"`(portmanteau \w[^`\n]*)`", text)
    return [*(line for line in lines if line.startswith("portmanteau ")), *spans]


def options_of(name: str, word: str = "") -> set[str]:
    """Give the options of a command; of `do`, of the composition or operator `word`."""
    found: Any = COMMANDS[name]
    found = found.commands[word] if name == "do" else found
    return {spelled for parameter in found.params for spelled in (*parameter.opts, *parameter.secondary_opts)}


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_every_link_leads_to_a_file_and_a_heading(page: Path) -> None:
    assert list(dead(page)) == []


def test_a_link_to_no_heading_and_one_out_of_the_checkout_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    page = tmp_path / "page.md"
    text = "# A `b`: c\n[1](#a-b-c) [2](#a-b) [3](page.md#a-b-c) [4](no.md) [5](../../etc) [6](https://x) `[7](no)`\n"
    page.write_text(text)
    assert list(dead(page)) == ["#a-b", "no.md", "../../etc"]


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(text, id=f"{named(page)}-{n}")
        for page in PAGES
        for n, text in enumerate(recipes(page.read_text(encoding="utf-8")))
    ],
)
def test_every_recipe_is_one_when_its_models_are_there(text: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    try:
        compositions.load(path)
    except RecipeError as error:
        for mistake in error.mistakes:
            place = NOWHERE.match(mistake.what)
            assert place, mistake
            (tmp_path / (place[1] or place[2]).replace("*", "1")).mkdir(parents=True, exist_ok=True)
    assert compositions.load(path).text == text


@pytest.mark.parametrize("page", [ROOT / "README.md", *GUIDE], ids=named)  # the reference is made from the commands
def test_every_command_line_names_a_command_and_its_options(page: Path) -> None:
    for line in command_lines(page.read_text(encoding="utf-8")):
        _, name, *words = shlex.split(line)
        asked = {word.partition("=")[0] for word in words if word.startswith("--")} - {"--help"}
        assert name in COMMANDS, line
        assert not asked or asked <= options_of(name, *words[:1]), line


def test_the_readme_has_a_row_for_every_command_with_options_that_there_are() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `portmanteau (\w+)[^`]*` \| (.*) \|$", text, re.MULTILINE)
    assert sorted(name for name, _ in rows) == sorted(COMMANDS)
    elsewhere = {"do": {"--dry-run"}, "lock": {"--locked"}}  # of each NAME; of build
    for name, told in rows:
        assert set(re.findall(r"--[\w-]+", told)) <= options_of(name, "ties") | elsewhere.get(name, set()), name


def test_the_readme_leads_to_every_page_of_the_guide() -> None:
    assert {ROOT / link.partition("#")[0] for link in links((ROOT / "README.md").read_text(encoding="utf-8"))} >= set(
        GUIDE
    )


def test_the_guide_names_every_operator_and_every_composition() -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in GUIDE)
    assert [name for name in (*operators(), *registered()) if not re.search(rf"\b{name}\b", text)] == []
