"""A few of each campaign; the whole ones are run by hand, as their first lines say."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.campaigns import ended, flipped, soak
from tests.campaigns.recipes import write_inputs

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="builds are ended as forked processes")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small models and the five recipes."""
    folder = tmp_path_factory.mktemp("campaigns")
    write_inputs(folder / "inputs", layers=4, width=32)
    return folder


@pytest.fixture(scope="module")
def cases(work: Path) -> Iterator[list[ended.Case]]:
    """Every recipe, built once undisturbed."""
    return ended.cases(work)


@needs_fork
def test_builds_that_were_killed_give_the_same_bytes_in_the_end(work: Path, cases: list[ended.Case]) -> None:
    assert ended.killed(work, cases, 10).total == 10


@needs_fork
def test_builds_that_were_interrupted_give_the_same_bytes_in_the_end(work: Path, cases: list[ended.Case]) -> None:
    assert ended.interrupted(work, cases, 5).total == 5


@needs_fork
@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_builds_that_ran_out_of_space_give_the_same_bytes_in_the_end(work: Path, cases: list[ended.Case]) -> None:
    assert ended.out_of_space(work, cases, 2).total == 2


def test_a_flipped_byte_of_a_result_is_found_and_named(tmp_path: Path) -> None:
    write_inputs(tmp_path / "inputs", layers=2, width=16)
    assert flipped.in_outputs(tmp_path, 15).total() == 15


def test_a_flipped_byte_of_a_locked_input_is_refused(tmp_path: Path) -> None:
    write_inputs(tmp_path / "inputs", layers=2, width=16)
    assert flipped.in_inputs(tmp_path, 10).total() == 10


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the size of a process is read from /proc")
def test_builds_by_the_dozen_hold_no_more_memory_and_no_more_files(tmp_path: Path) -> None:
    write_inputs(tmp_path / "inputs", layers=2, width=16)
    soak.soak(tmp_path, 60).check()


def test_a_soak_that_grows_is_found() -> None:
    for memory, files in ((range(0, 10**7, 10**6), [6] * 10), ([10**6] * 10, [6] * 9 + [7])):
        with pytest.raises(AssertionError):
            soak.Grown(10, tuple(memory), tuple(files)).check()
