"""EMR-Merging for one task: the unified model, under that model's mask and factor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated

from pydantic import Field

from portmanteau.merge import Checkpoint, Composed, Step, Survey
from portmanteau.merge.node import Finding
from portmanteau.merge.operators.emr import rescaler

from .composition import composition
from .matching import Unmatched
from .tensorwise import tensorwise


@composition(
    source="Huang et al. 2024 (arXiv 2405.17461), section 3.2; harveyhuang18/EMR_Merging at cc225ec",
    example="emr_task: {base: ./base, task: ./math, others: [./swahili, ./code]}",
)
def emr_task(
    *,
    base: Annotated[Checkpoint, Field(description="the model that all others were trained from")],
    task: Annotated[Checkpoint, Field(description="the model whose mask and factor the result gets")],
    others: Annotated[Sequence[Checkpoint], Field(description="the other models that are merged")],
    unmatched: Unmatched = "error",
) -> Composed:
    """Give a task back what the unified model of several (the operator `emr`) keeps of it.

    Formula: b + λ m τ with τ the unified delta, m = 1 where it has the sign of the task's delta d, and
    λ = Σ |d| / Σ |m τ|, one number over all tensors, found by a survey. (In the paper's code, the
    script for eight models adds up the means of tensors in λ instead.) The unified model is `emr: {base, models}`.

    >>> import torch
    >>> from portmanteau.merge import InMemory
    >>> values = {"base": [0.0, 0.0], "math": [1.0, -2.0], "swahili": [3.0, 1.0]}
    >>> base, math, swahili = (InMemory(name, {"weight": torch.tensor(value)}) for name, value in values.items())
    >>> emr_task(base=base, task=math, others=[swahili])["weight"]  # τ = (3, −2), λ = (1 + 2) / (3 + 2)
    tensor([ 1.8000, -1.2000])

    Raises MergeError with all mistakes found in names and shapes.
    """
    models = dict(zip(_labels([task, *others]), (task, *others), strict=True))
    merged = tensorwise("emr", models=models, base=base, settings={"task": 1}, unmatched=unmatched)
    nodes = {name: merged.node(name) for name in merged.specs}
    steps = {name: one for name, one in nodes.items() if isinstance(one, Step) and one.operator.name == "emr"}
    groups = {name: (step.inputs,) for name, step in steps.items()}
    factor = Finding(Survey(f"factor of {task.label}", rescaler, groups, {"task": 1}), "factor")
    own = {name: replace(step, settings={**step.settings, "scale": factor}) for name, step in steps.items()}
    return Composed("emr_task", {**nodes, **own}, base.companions, merged.notes)


def _labels(models: Sequence[Checkpoint]) -> list[str]:
    """Name the models, each by its own name, or by that and a number where another has it too."""
    names = [model.label for model in models]
    return [name if names.count(name) == 1 else f"{name} ({i + 1})" for i, name in enumerate(names)]
