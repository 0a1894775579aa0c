"""mergekit's own tests through our command line, and the YAMLs of its README and examples folder.

They come from its source distribution on PyPI, which has no examples folder; PORTMANTEAU_MERGEKIT_FOLDER names a
checkout of its repository instead. What differs on purpose stands in `oracles/mergekit_suite.py`.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from portmanteau import merge
from portmanteau.compositions import load
from tests.oracles import mergekit_suite
from tests.real_weights import mergekit_sources

pytestmark = pytest.mark.mergekit_suite
# The README shows parts of files: what they stand in
AROUND = "merge_method: linear\nbase_model: a\nmodels: [{model: a}, {model: b}]\nparameters: {weight: 1.0}\n"
MISSING = re.compile(r"no (model, )?file or folder .*")


@pytest.fixture(scope="session")
def sources() -> Path:
    """Give the folder with mergekit's README, tests and, in a checkout, examples."""
    given = os.environ.get("PORTMANTEAU_MERGEKIT_FOLDER")
    return Path(given) if given else mergekit_sources()


def test_mergekits_own_tests_pass_save_those_that_differ_on_purpose(sources: Path) -> None:
    assert mergekit_suite.main(sources, "-W", "ignore") == 0


def test_the_yamls_of_its_readme_and_examples_are_read(sources: Path, tmp_path: Path) -> None:
    readme = (sources / "README.md").read_text(encoding="utf-8")
    texts = re.findall(r"^```ya?ml\n(.*?)^```", readme, re.MULTILINE | re.DOTALL)
    texts = [text if "merge_method:" in text else AROUND + text for text in texts]
    assert len(texts) == 5
    texts += [path.read_text(encoding="utf-8") for path in sorted((sources / "examples").glob("*.y*ml"))]
    for number, text in enumerate(texts):
        path = tmp_path / f"{number}.yml"
        path.write_text(text, encoding="utf-8")
        try:
            load(path)
        except merge.RecipeError as error:
            said = [mistake.what for mistake in error.mistakes if not MISSING.fullmatch(mistake.what)]
            assert said == [], text
