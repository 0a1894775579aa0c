"""The same bits for any threads, size of parts, memory budget and hash seed: every operator, every composition."""

from __future__ import annotations

from pathlib import Path

import pytest

from portmanteau.compositions.composition import compositions
from portmanteau.merge.compiled import library
from portmanteau.merge.registry import operators
from tests.campaigns.same_bits import (
    COMPOSITIONS,
    MACHINES,
    Machine,
    by_definition,
    by_hash_seed,
    digests,
    of_composition,
    of_operator,
    one_digest,
    prepare,
)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, adapters and sparse fine-tunes."""
    folder = tmp_path_factory.mktemp("inputs") / "models"
    prepare(folder)
    return folder


def test_every_composition_has_a_recipe_here() -> None:
    assert COMPOSITIONS.keys() == compositions().keys()


@pytest.mark.parametrize("name", operators())
def test_an_operator_gives_the_same_bits_on_any_machine(name: str) -> None:
    plan = of_operator(operators()[name], {})
    first = digests(plan, MACHINES[0])
    for machine in MACHINES[1:]:
        assert digests(plan, machine) == first, machine


@pytest.mark.parametrize("name", [name for name, one in operators().items() if one.compiled])
def test_the_definition_gives_the_bits_of_the_compiled_form_on_any_machine(name: str) -> None:
    plan = of_operator(operators()[name], {})
    first = digests(plan, MACHINES[0])
    with by_definition():
        assert library.library() is None
        for machine in MACHINES:
            assert digests(plan, machine) == first, machine
    assert library.library() is not None


@pytest.mark.parametrize("name", COMPOSITIONS)
def test_a_composition_gives_the_same_bits_on_any_machine(name: str, inputs: Path) -> None:
    plan = of_composition(inputs, name)
    first = digests(plan, MACHINES[0])
    for machine in MACHINES[1:]:
        assert digests(plan, machine) == first, machine


def test_the_hash_seed_changes_no_bit(inputs: Path) -> None:
    first = by_hash_seed(inputs, "0")
    assert by_hash_seed(inputs, "1") == by_hash_seed(inputs, "2") == first
    own = {name: one_digest(digests(of_composition(inputs, name), Machine())) for name in COMPOSITIONS}
    assert {name: first[name] for name in COMPOSITIONS} == own
