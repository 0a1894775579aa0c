"""Make the fixtures of sparse fine-tuning with its reference implementation, composable-sft. Run by hand only.

    python -m tests.oracles.composable_sft CHECKOUT

CHECKOUT is a folder with github.com/cambridgeltl/composable-sft at 29f7872d018555ee84fb9620ba7d69df426a7bdb. The
fixtures beside this file were made with Python 3.11, torch 2.13.0 (CPU, one thread), transformers 5.23.0, datasets
5.2.0, numpy 2.4.6.

* `fixtures/pytorch_diff/`: the file that `SFT.save` writes, the base that it goes with, and what `SFT.apply` makes of
  both, with the dense ("abs") tensors and without.
* `fixtures/lottery_ticket/`: runs of `LotteryTicketSparseFineTuner` on a small BERT, without L1. `start` and `examples`
  are shared by all runs; `RUN.safetensors` holds, for every tensor with a mask, `NAME.indices` (row-major) and
  `NAME.values` (the final weights there), and the head whole; its metadata has the run's settings and `dense_phase`, a
  digest of the weights that a stock Trainer, without composable-sft, reaches after the steps of phase 1. All in fp64:
  Adam leaves an entry whose gradient is only rounding noise (a key's bias) where it is, so that other machines find the
  same masks.

composable-sft's Trainer needs two changes to run on transformers 5: an attribute `use_apex`, and transformers' own
`_maybe_log_save_evaluate` in place of its copy of an older one.
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import Trainer

from tests.oracles.lottery_ticket import FIXTURES, RUNS, Run, arguments, digest, examples, load_model, new_model


def main() -> None:
    """Write both folders of fixtures."""
    sys.path.insert(0, str(Path(sys.argv[1]) / "src"))
    torch.set_num_threads(1)
    write_diff(FIXTURES / "pytorch_diff")
    write_runs(FIXTURES / "lottery_ticket")


# ------------------------------------------------------------------------------------------------ files and application


def small_model() -> nn.Module:
    """Make a model with a matrix, vectors and a head."""
    torch.manual_seed(0)
    body = nn.ModuleDict({"dense": nn.Linear(5, 4), "norm": nn.LayerNorm(6)})
    return nn.ModuleDict({"bert": body, "classifier": nn.Linear(4, 3)})


def sparse_difference(shape: torch.Size, entries: int) -> Tensor:
    """Draw a tensor with so many entries that are not zero."""
    difference = torch.zeros(shape)
    difference.view(-1)[torch.randperm(difference.numel())[:entries]] = torch.randn(entries)
    return difference


def write_diff(folder: Path) -> None:
    """Write the base, `pytorch_diff.bin`, and both results of its application."""
    from sft import SFT

    folder.mkdir(parents=True, exist_ok=True)
    model = small_model()
    save_file(dict(model.state_dict()), folder / "base.safetensors")
    tuning, entries = SFT(), {"bert.dense.weight": 7, "bert.dense.bias": 2, "bert.norm.weight": 0, "bert.norm.bias": 6}
    for name, count in entries.items():
        tuning.add_param(name, sparse_difference(model.get_parameter(name).shape, count))
    tuning.add_param("classifier.weight", nn.Parameter(torch.randn(3, 4)), diff=False)  # as its Trainer stores a head
    tuning.add_param("classifier.bias", torch.randn(3), diff=False)
    tuning.save(folder)
    for name, with_abs in (("applied", True), ("applied_without_abs", False)):
        model = small_model()
        tuning.apply(model, with_abs=with_abs)
        save_file(dict(model.state_dict()), folder / f"{name}.safetensors")


# ------------------------------------------------------------------------------------------------------------- training


def write_runs(folder: Path) -> None:
    """Write the start, the examples, and every run."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: p.detach().clone() for name, p in new_model().named_parameters()}, folder / "start.safetensors")
    torch.manual_seed(1)
    tokens = torch.randint(3, 40, (24, 8), dtype=torch.uint8)
    save_file({"input_ids": tokens, "labels": (tokens[:, 0] + tokens[:, 1]) % 3}, folder / "examples.safetensors")
    for run in RUNS:
        tensors = train(run)
        about = {**asdict(run), "dense_phase": dense_phase(run)}  # one key: safetensors keeps no order of several
        save_file(tensors, folder / f"{run.name}.safetensors", metadata={"run": json.dumps(about)})


def train(run: Run) -> dict[str, Tensor]:
    """Train by composable-sft and give the fixture's tensors."""
    from sft import LotteryTicketSparseFineTuner, SftArguments

    class Tuner(LotteryTicketSparseFineTuner(Trainer)):  # type: ignore[misc]
        use_apex = False
        _maybe_log_save_evaluate = Trainer._maybe_log_save_evaluate

    model = load_model(run)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    maskable = [n for n, p in model.named_parameters() if n.startswith(model.base_model_prefix) and p.requires_grad]
    settings = SftArguments(
        ft_params_num=run.count,
        n_ft_iterations=run.iterations,
        full_ft_max_steps_per_iteration=run.dense_steps,
        sparse_ft_max_steps_per_iteration=run.sparse_steps,
    )
    with tempfile.TemporaryDirectory() as folder:
        tuner = Tuner(
            model=model,
            args=arguments(run, "sparse", Path(folder)),
            train_dataset=examples(),
            sft_args=settings,
            maskable_params=maskable,
        )
        tuner.train()
    return gathered(model, before, tuner._mask)


def gathered(model: nn.Module, before: dict[str, Tensor], masks: dict[str, Tensor]) -> dict[str, Tensor]:
    """Keep the entries under the masks and the tensors trained without one; all others have to be as before."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        after = parameter.detach()
        if name in masks:
            tensors[f"{name}.indices"] = masks[name].view(-1).nonzero()[:, 0]
            tensors[f"{name}.values"] = after[masks[name]]
            assert torch.equal(after[~masks[name]], before[name][~masks[name]])
        elif parameter.requires_grad:
            tensors[name] = after.clone()
        else:
            assert torch.equal(after, before[name])
    return tensors


def dense_phase(run: Run) -> str:
    """Train by a stock Trainer for the steps of phase 1 and give a digest of all weights."""
    model: Any = load_model(run)
    with tempfile.TemporaryDirectory() as folder:
        Trainer(model=model, args=arguments(run, "dense", Path(folder)), train_dataset=examples()).train()
    return digest(model)


if __name__ == "__main__":
    main()
