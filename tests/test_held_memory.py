"""Operators that must see a whole row or tensor: the bytes in flight that a plan tells hold when it is carried out."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from portmanteau.merge.operator import Parts

BUILD = """
import re, sys, torch
from pathlib import Path
from safetensors.torch import save_file
from portmanteau import merge
from portmanteau.compositions import tensorwise
from portmanteau.merge.limits import Limits

name, *sizes, count = sys.argv[1:]

def status(key):
    return int(re.search(key + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) << 10

def merged(label, shape):
    models = {}
    for i, model in enumerate(["base", *map(str, range(int(count)))]):
        Path(label, model).mkdir(parents=True)
        tensor = torch.randn(shape, generator=torch.Generator().manual_seed(i)).bfloat16()
        save_file({"x.weight": tensor}, Path(label, model, "model.safetensors"))
        models[model] = merge.open(Path(label, model))
    return tensorwise(name, base=models.pop("base"), models=models)

shape = tuple(map(int, sizes))
merge.build(merged("small", (9,) * len(shape)), "small/out", threads=1)  # what is loaded once is loaded now
large = merged("large", shape)
said = Limits.of(1, None).in_flight(merge.make_plan(large))
Path("/proc/self/clear_refs").write_text("5")  # the peak from now on
before = status("VmRSS")
merge.build(large, "large/out", threads=1)
print(said, status("VmHWM") - before)
"""


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="the kernel tells the peak of a process on Linux"
)
@pytest.mark.parametrize(
    ("name", "shape", "count", "least"),
    [
        ("della", (1_000_000,), 3, 20),  # one row: two fp64 and one index beside each delta
        ("arcee_fusion", (1_000_000,), 1, 20),
        ("tsv", (700, 700), 4, 8),
    ],
)
def test_what_must_be_held_whole_is_accounted_for(
    tmp_path: Path, name: str, shape: tuple[int, ...], count: int, least: int
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", BUILD, name, *map(str, shape), str(count)],
        cwd=tmp_path,
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "100000"},  # as glibc does with large tensors: freed is given back
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    said, peak = map(int, done.stdout.split())
    entries = torch.Size(shape).numel()
    assert least * entries < peak < said


@pytest.mark.parametrize("shape", [(3, 5), (0,), ()], ids=str)
def test_the_parts_of_a_model_are_gathered(shape: tuple[int, ...]) -> None:
    models = torch.randn(2, *shape)
    flat: Any = models.reshape(2, -1)
    runs = [lambda start=start: (flat[:, start : start + 4],) for start in range(0, max(flat.shape[1], 1), 4)]
    assert torch.equal(Parts(lambda: runs, 2, shape).gathered(1), models[1])
