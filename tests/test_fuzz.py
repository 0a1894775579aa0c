"""The fuzz targets on their corpus, on mutations of it, and the header's reader against the library's."""

from __future__ import annotations

import json
import os
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open

from portmanteau import merge
from portmanteau.merge.files import hub
from portmanteau.merge.files.safetensors_header import parse_header

from .fuzz.targets import World

CORPUS = Path(__file__).parent / "fuzz" / "corpus"
EXAMPLES = int(os.environ.get("PORTMANTEAU_FUZZ_EXAMPLES", "40"))  # of each target; a campaign asks for more
NAMES = ("header", "index", "recipe", "mergekit", "adapter", "config", "diff")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """Make the folder of models that the targets need, with no network behind it."""
    import torch  # noqa: F401 - once, and in nobody's time

    download = hub.download
    made = World(tmp_path_factory.mktemp("world"))
    yield made
    hub.download = download


@pytest.mark.parametrize("name", NAMES)
def test_every_input_of_the_corpus_is_read_or_refused_within_a_second(name: str, world: World) -> None:
    inputs = sorted((CORPUS / name).iterdir())
    assert inputs
    for path in inputs:
        begun = time.process_time()
        world.targets[name](path.read_bytes())
        assert time.process_time() - begun < 1.0, path


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_mutations_of_the_corpus_are_read_or_refused_within_a_second(
    name: str, world: World, data: st.DataObject
) -> None:
    raw = bytearray(data.draw(st.sampled_from([path.read_bytes() for path in sorted((CORPUS / name).iterdir())])))
    other = data.draw(st.sampled_from([path.read_bytes() for path in sorted((CORPUS / name).iterdir())]))
    for _ in range(data.draw(st.integers(0, 3))):
        at, to = sorted(data.draw(st.tuples(*[st.integers(0, len(raw))] * 2)))
        kinds = (st.binary(max_size=8), st.just(bytes(raw[at:to]) * 2), st.just(other[at:to]), st.sampled_from(TOKENS))
        raw[at:to] = data.draw(st.one_of(*kinds))
    begun = time.process_time()
    world.targets[name](bytes(raw))
    assert time.process_time() - begun < 1.0


TOKENS = (
    *(b'"\\ud800"', b"1e999", b"-1", b"9" * 5000, b"null", b"[" * 200, b'{"a":' * 100, b"\xff", b"\0", b"\x1b[2J"),
    *(b"&a [*a]", b"!!python/object:os.system", b"!!int ''", b"1:1:1:1:1.5", b"<<: *a", b"? [a]", b"%TAG ! x", b"\x85"),
    *(
        b"../../etc/passwd",
        b"\\u202e",
        b"(a+)+$",
        b"~nobody/x",
        b"org/model@main",
        b"/*/*/*/*",
        b"c__builtin__\neval\n",
    ),
)


# ---- the header, against the library

SIZES: Any = st.integers(-1, 4) | st.sampled_from([1 << 62, 1 << 63, 1 << 64, True, 1.0, "1", None])
ENTRIES: Any = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "U8", "BOOL", "F4", "I64", "F31", 3, None]),
        "shape": st.lists(SIZES, max_size=3) | st.just("2"),
        "data_offsets": st.lists(SIZES, min_size=1, max_size=3) | st.none(),
    },
    optional={"more": st.none()},
)
WHOLE: Any = st.lists(st.tuples(st.sampled_from(["F32", "U8", "F4", "BF16"]), st.lists(st.integers(0, 3), max_size=3)))


def header_of(tensors: list[tuple[str, list[int]]]) -> dict[str, Any]:
    """Lay tensors out one after the other."""
    bits = {"F32": 32, "U8": 8, "F4": 4, "BF16": 16}
    end, found = 0, {}
    for i, (dtype, shape) in enumerate(tensors):
        entries = 1
        for size in shape:
            entries *= size
        begin, end = end, end + bits[dtype] * entries // 8
        found[f"t{i}"] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    return found


@settings(max_examples=max(300, EXAMPLES), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    header=WHOLE.map(header_of) | st.dictionaries(st.sampled_from(["a", "b", "__metadata__"]), ENTRIES, max_size=2),
    changed=st.dictionaries(st.sampled_from(["t0", "t1"]), ENTRIES, max_size=1),
    size=st.integers(0, 40),
    exact=st.booleans(),
)
def test_a_header_is_read_where_the_library_reads_it_and_refused_where_it_does_not(
    tmp_path: Path, header: dict[str, Any], changed: dict[str, Any], size: int, exact: bool
) -> None:
    found = {**header, **changed}
    ends = [e["data_offsets"][-1] for e in header.values() if isinstance(e.get("data_offsets"), list)] if exact else []
    size = max((end for end in ends if type(end) is int and 0 <= end < 1000), default=size) if exact else size
    raw = json.dumps(found).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(size))
    try:
        with safe_open(path, framework="numpy") as library:
            names = set(library.keys())
            shapes = {name: tuple(library.get_slice(name).get_shape()) for name in names}
    except SafetensorError:
        shapes = None
    try:
        ours = {name: spec.shape for name, spec in parse_header(raw, path.stat().st_size, "x").specs.items()}
    except merge.CheckpointError:
        ours = None
    assert ours == shapes
