"""One byte flipped, anywhere in a result or in an input: found, and the right tensor or file named.

    python -m tests.campaigns.flipped --outputs 100 --inputs 100 --work /tmp/flipped

Files take turns, so that small ones are hit as well as weights; neither size nor time of a file tell of the flip.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from portmanteau import compositions, merge
from portmanteau.compositions import lock_file
from portmanteau.merge import PortmanteauError
from tests.campaigns.recipes import RECIPES, write_inputs


def flip(path: Path, at: int, bits: int) -> None:
    """Change one byte of a file; its time stays."""
    times = (path.stat().st_atime_ns, path.stat().st_mtime_ns)
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ bits]))
    os.utime(path, ns=times)


@contextmanager
def flipped(path: Path, draw: random.Random) -> Iterator[int]:
    """Flip some bits of a byte anywhere in a file, for a while; give where."""
    at, bits = draw.randrange(path.stat().st_size), draw.randrange(1, 256)
    flip(path, at, bits)
    try:
        yield at
    finally:
        flip(path, at, bits)


def name_of(path: Path, at: int) -> str:
    """Tell by the header, read before anything is flipped, in which tensor a byte of a weight file lies."""
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    if at < start:
        return ""
    entries = json.loads(raw[8:start])
    entries.pop("__metadata__", None)
    spans = {name: entry["data_offsets"] for name, entry in entries.items()}
    return next(name for name, (first, last) in spans.items() if first <= at - start < last)


def files_of(folder: Path) -> list[Path]:
    """Give the files that have bytes."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)


def in_outputs(work: Path, count: int, seed: int = 0) -> Counter[str]:
    """Flip bytes of results. Raises AssertionError where `verify` does not find one, or names something else."""
    draw, hit = random.Random(seed), Counter[str]()
    outs = []
    for name in RECIPES:
        loaded = compositions.load(work / "inputs" / f"{name}.yaml")
        out = work / "whole" / name
        options = {"dtype": loaded.output.dtype, "shard_size": loaded.output.shard_size}
        merge.build(compositions.compose(loaded), out, recipe=loaded.text, recipe_folder=loaded.folder, **options)
        outs.append(out)
    for i in range(count):
        out = outs[i % len(outs)]
        weights = [path for path in files_of(out) if path.suffix == ".safetensors"]
        path = draw.choice(weights if draw.random() < 0.5 else files_of(out))
        before = path.read_bytes()
        with flipped(path, draw) as at:
            named = _named(out)
        assert path.read_bytes() == before
        tensor = name_of(path, at) if path.suffix == ".safetensors" else ""
        assert named == [f"{path}: tensor {tensor}" if tensor else str(path)], (path, at, named)
        hit["tensor" if tensor else "header" if path.suffix == ".safetensors" else path.name] += 1
    for out in outs:
        assert not merge.verify(out).damaged
    return hit


def _named(out: Path) -> list[str]:
    try:
        return [mistake.where for mistake in merge.verify(out).damaged]
    except PortmanteauError as error:  # the receipt itself
        return [mistake.where for mistake in error.mistakes]


def in_inputs(work: Path, count: int, seed: int = 0) -> Counter[str]:
    """Flip bytes of inputs after `lock`. Raises AssertionError where one is not refused, or another is named."""
    draw, hit = random.Random(seed), Counter[str]()
    for name in RECIPES:
        lock_file.write(compositions.load(work / "inputs" / f"{name}.yaml"))
    for i in range(count):
        recipe = work / "inputs" / f"{[*RECIPES][i % len(RECIPES)]}.yaml"
        models = json.loads(recipe.with_name(f"{recipe.name}.lock").read_text())["models"]
        places = [work / "inputs" / model / file for model, found in models.items() for file in found["files"]]
        weights = [path for path in places if path.suffix == ".safetensors"]
        path = draw.choice(weights if draw.random() < 0.5 else places)
        with flipped(path, draw):
            try:
                lock_file.held_to_lock(compositions.load(recipe))
            except PortmanteauError as error:
                named = [mistake.where for mistake in error.mistakes]
            else:
                named = []
        assert named == [str(path)], (path, named)
        hit[path.name] += 1
    for name in RECIPES:
        lock_file.held_to_lock(compositions.load(work / "inputs" / f"{name}.yaml"))
    return hit


def main() -> None:
    """Run the campaign and print what it came to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--outputs", type=int, default=100)
    parser.add_argument("--inputs", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, required=True)
    options = parser.parse_args()
    write_inputs(options.work / "inputs", layers=4, width=32)
    for name, run, count in (("outputs", in_outputs, options.outputs), ("inputs", in_inputs, options.inputs)):
        begun = time.monotonic()
        hit = run(options.work, count, options.seed)
        lay = ", ".join(f"{times} in {where}" for where, times in sorted(hit.items()))
        took = time.monotonic() - begun
        print(f"{name}: {hit.total()} of {count} flips found and named ({lay}); {took:.0f} s", flush=True)


if __name__ == "__main__":
    main()
