"""The digests of what every operator and composition makes, under other threads, part sizes and memory budgets.

    python -m tests.campaigns.same_bits --work /tmp/bits          # operators in every variant, compositions, hash seeds
    python -m tests.campaigns.same_bits --work INPUTS --digests   # of one process, as JSON

Operators and compositions come from the registries, so that a new one is among them; of a composition a recipe must be
written here. All is made twice: by the compiled library where it has a form, and by the definitions alone.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import typing
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from portmanteau import compositions, merge
from portmanteau.compositions.composition import compositions as registered
from portmanteau.merge import Operator, TensorSpec, limits
from portmanteau.merge.compiled import library
from portmanteau.merge.dtypes import from_torch
from portmanteau.merge.execute import Tools, carry_out, surveyed
from portmanteau.merge.files.digests import digest
from portmanteau.merge.limits import Limits
from portmanteau.merge.node import Inputs, Step
from portmanteau.merge.plan import Plan
from portmanteau.merge.progress import Progress
from portmanteau.merge.registry import operators
from tests.campaigns.recipes import write_inputs

SHAPES = {"embed.weight": (300, 701), "row": (70_001,), "norm.weight": (7,), "scale": (), "empty": (0, 3)}
_ADAPTERS = Path(__file__).parents[1] / "oracles" / "fixtures" / "adapters_1_3_0"
COMPOSITIONS = {
    "assemble": 'assemble: {parts: {"*mlp*": a, "*": b}}',
    "average": "average: {models: [a, b, base], weights: [1, 2, 3]}",
    "average_adapters": f"average_adapters: {{adapters: {{{_ADAPTERS}/first: 0.3, {_ADAPTERS}/second: 0.7}}, name: x}}",
    "emr_task": "emr_task: {base: base, task: a, others: [b]}",
    "extract_lora": "extract_lora: {base: base, tuned: a, energy: 0.5}",
    "extract_sparse": "extract_sparse: {base: base, tuned: a, density: 0.07}",
    "fisher": "fisher: {models: [a, b], fishers: [fisher-a, fisher-b]}",
    "layer_swap": "layer_swap: {task: a, language: b, base: base, bottom: 1, top: 1, transition: 1, rescale: mav}",
    "lora": "lora: {base: base, adapters: {lora-a: 1.0, lora-b: 0.7}}",
    "revert_sparse": "revert_sparse: {tuned: applied, base: base, diffs: [sparse-a]}",
    "slices": (
        "slices: [{operator: slerp, models: [a, b], layers: {a: [0, 2], b: [1, 3]}, t: [0, 1]}, "
        "{model: b, layers: [2, 4]}]"
    ),
    "sparse_fine_tune": "sparse_fine_tune: {base: base, diffs: {sparse-a: 1.0, sparse-b: 0.5}}",
    "stack_adapters": f"stack_adapters: {{language: {_ADAPTERS}/swahili, task: {_ADAPTERS}/task}}",
    "swap_lora": "swap_lora: {task: lora-a, language: lora-b, bottom: 1, top: 1, layers: 4}",
}
_FIRST = {
    "lora-a": "extract_lora: {base: base, tuned: a, rank: 6, rest: drop}",
    "lora-b": "extract_lora: {base: base, tuned: b, rank: 4, rest: drop}",
    "sparse-a": "extract_sparse: {base: base, tuned: a, density: 0.05}",
    "sparse-b": "extract_sparse: {base: base, tuned: b, density: 0.1}",
    "applied": "sparse_fine_tune: {base: base, diffs: [sparse-a]}",
}


@dataclass(frozen=True)
class Machine:
    """How much of a machine a build has."""

    threads: int = 2
    part: int = 1 << 18
    memory: int = 1 << 30

    @contextmanager
    def used(self) -> Iterator[Limits]:
        """Give its limits; parts are as large as it says, as far as memory allows."""
        before = limits.LARGEST_PART
        limits.LARGEST_PART = self.part  # type: ignore[misc]
        try:
            yield Limits(self.threads, self.memory)
        finally:
            limits.LARGEST_PART = before  # type: ignore[misc]


MACHINES = (
    *(Machine(threads=threads, part=1 << 16) for threads in (1, 2, 8)),
    *(Machine(part=part, memory=1 << 36) for part in (1 << 16, 1 << 18, 1 << 20, 1 << 26)),
    *(Machine(memory=memory) for memory in (16 << 20, 64 << 20, 1 << 30)),
)


@contextmanager
def by_definition() -> Iterator[None]:
    """Make everything by the definitions, as where the library was not compiled."""
    before = library._FILE
    library._FILE = before.with_name("none")  # type: ignore[misc]
    library.library.cache_clear()
    try:
        yield
    finally:
        library._FILE = before  # type: ignore[misc]
        library.library.cache_clear()


def digests(plan: Plan, machine: Machine) -> dict[str, str]:
    """Carry a plan out, without writing; give the digest of every tensor."""
    with machine.used() as found:
        surveys = surveyed(plan, found, Progress())
        settled = plan.settled(surveys)
        return carry_out(settled, surveys, found, Tools(lambda name, data, at: None, Progress()))


def variants(operator: Operator) -> Iterator[dict[str, Any]]:
    """The defaults, and every single choice and switch set otherwise."""
    count = operator.takes or 3
    yield {}
    for setting in operator.settings.values():
        plain = typing.get_args(setting.annotation)[0] if typing.get_args(setting.annotation) else setting.annotation
        choices = typing.get_args(plain) if typing.get_origin(plain) is typing.Literal else ()
        for choice in (True, False) if plain is bool else choices:
            if choice != setting.default and not operator.refuses(count, {setting.name: choice}):
                yield {setting.name: choice}


def of_operator(operator: Operator, chosen: Mapping[str, Any]) -> Plan:
    """Plan an operator over tensors of every shape: some larger than parts, in bf16 and fp32."""
    count = operator.takes or 3
    generator = torch.Generator().manual_seed(5)
    base = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    seeds = {f"model {i}": 0 if operator.name == "equal" else i for i in range(1, count + 1)}
    stored = {name: merge.InMemory(name, _near(base, seed)) for name, seed in seeds.items()}
    given = merge.InMemory("base", _near(base, 0))
    weighed = {name: merge.InMemory(name, {k: one[k].abs() for k in base}) for name, one in stored.items()}
    settings = {name: one.default for name, one in operator.settings.items()} | dict(chosen)
    steps = []
    for tensor, shape in SHAPES.items():
        importances = tuple(one.node(tensor) for one in weighed.values()) if "importances" in operator.roles else ()
        own = given.node(tensor) if operator.takes_base else None
        inputs = Inputs(tuple(one.node(tensor) for one in stored.values()), own, importances)
        dtype = from_torch(stored["model 1"][tensor].dtype)
        steps.append(Step(TensorSpec(tensor, dtype, shape), operator, settings, inputs, tuple(stored)))
    return Plan(tuple(steps))


def _near(base: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(100 + seed)
    found = {k: v + (0.1 * torch.randn(v.shape, generator=generator) if seed else 0) for k, v in base.items()}
    return {k: v.to(torch.bfloat16) if k == "embed.weight" else v for k, v in found.items()}


def prepare(folder: Path) -> None:
    """Write what the compositions need: models, adapters, sparse fine-tunes, importances."""
    write_inputs(folder, layers=4, width=96)
    for name in ("a", "b"):
        (folder / f"fisher-{name}").mkdir()
        found = {key: value.float().square() for key, value in load_file(folder / name / "model.safetensors").items()}
        save_file(found, folder / f"fisher-{name}" / "model.safetensors")
    for name, text in _FIRST.items():
        merge.build(_composed(folder, text), folder / name)


def of_composition(folder: Path, name: str) -> Plan:
    """Plan the recipe of a composition."""
    return merge.make_plan(_composed(folder, COMPOSITIONS[name]))


def _composed(folder: Path, text: str) -> Any:
    path = folder / "recipe.yaml"
    path.write_text(f"merge: {{{text}}}\n")
    return compositions.compose(compositions.load(path))


def plans(folder: Path, *, every_variant: bool) -> Iterator[tuple[str, Plan]]:
    """Go through all operators, with their defaults or in every variant, and all compositions."""
    for name, operator in operators().items():
        for chosen in variants(operator) if every_variant else ({},):
            yield f"{name} {chosen or ''}".strip(), of_operator(operator, chosen)
    for name in COMPOSITIONS:
        yield name, of_composition(folder, name)


def one_digest(found: Mapping[str, str]) -> str:
    """Give one digest of all."""
    return digest(json.dumps(found).encode())


def by_hash_seed(folder: Path, seed: str) -> dict[str, str]:
    """Ask a process with another hash seed for a digest of every operator and composition."""
    command = [sys.executable, "-m", "tests.campaigns.same_bits", "--work", str(folder), "--digests"]
    environment = {**os.environ, "PYTHONHASHSEED": seed}
    done = subprocess.run(command, env=environment, cwd=Path(__file__).parents[2], capture_output=True, check=True)
    found: dict[str, str] = json.loads(done.stdout)
    return found


def main() -> None:
    """Compare everything with everything, or print the digests of one process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--digests", action="store_true")
    options = parser.parse_args()
    folder = options.work / "inputs" if not options.digests else options.work
    if options.digests:
        print(json.dumps({n: one_digest(digests(p, Machine())) for n, p in plans(folder, every_variant=False)}))
        return
    assert COMPOSITIONS.keys() == registered().keys()
    assert library.library() is not None, "build the library first: python merge/compiled/build_hook.py"
    begun = time.monotonic()
    prepare(folder)
    count = 0
    for name, plan in plans(folder, every_variant=True):
        first = digests(plan, MACHINES[0])
        for way in (nullcontext, by_definition):
            for machine in MACHINES:
                with way():
                    assert digests(plan, machine) == first, (name, machine, way.__name__)
        count += 1
    seeds = [by_hash_seed(folder, seed) for seed in ("0", "1", "2")]
    assert seeds[0] == seeds[1] == seeds[2]
    print(
        f"same bits: {count} plans, of {len(operators())} operators in every variant and {len(COMPOSITIONS)} "
        f"compositions, on {len(MACHINES)} machines, compiled and by definition; {len(seeds[0])} under 3 hash seeds; "
        f"{time.monotonic() - begun:.0f} s"
    )


if __name__ == "__main__":
    main()
