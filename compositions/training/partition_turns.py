"""Simultaneous partition fine-tuning: one run in which batches of two data sets each train their own layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any, Literal

from portmanteau.merge import MergeError
from portmanteau.merge.errors import Mistake

from ..random_order import random_order
from .freezing import Part, Partition

if TYPE_CHECKING:
    from torch.nn import Module as Network
    from transformers import TrainerCallback

Source = Literal["task", "language"]
_TRAINS: Mapping[Source, Part] = {"task": "middle", "language": "outer"}
_order = lru_cache(maxsize=4)(random_order)  # asked for every example of a pass


@dataclass(frozen=True)
class Turns:
    """Which data set each optimizer step belongs to: so many steps of one, so many of the other, and again.

    >>> turns = Turns((("task", 2), ("language", 1)))
    >>> [turns.source(step) for step in range(4)]
    ['task', 'task', 'language', 'task']
    """

    order: tuple[tuple[Source, int], ...] = (("task", 1), ("language", 1))

    def __post_init__(self) -> None:
        """Refuse, with a MergeError, other names than these two, one of them alone, and turns of no steps."""
        if {source for source, _ in self.order} != set(_TRAINS) or any(steps < 1 for _, steps in self.order):
            hint = 'for example Turns((("task", 2), ("language", 1)))'
            raise MergeError("order", f"{self.order!r} does not give steps to both task and language", hint)

    @cached_property
    def _cycle(self) -> tuple[Source, ...]:
        return tuple(source for source, steps in self.order for _ in range(steps))

    def source(self, step: int) -> Source:
        """Give the data set of an optimizer step, counted from 0."""
        return self._cycle[step % len(self._cycle)]

    def before(self, step: int) -> int:
        """Count the earlier steps of the same data set as this one's."""
        source, (rounds, rest) = self.source(step), divmod(step, len(self._cycle))
        return rounds * self._cycle.count(source) + self._cycle[:rest].count(source)


@dataclass(frozen=True)
class Interleaved:
    """Examples of two data sets in the order in which the turns use them; a data set for a stock Trainer.

    Every data set is gone through in a random order, and anew in another one when it ends. The order depends on seed
    and sizes alone. A Trainer must keep it: `train_sampling_strategy="sequential"`, `num_train_epochs=1`.

    Attributes:
        task: the task's examples; anything with a length and an index.
        language: those of the language.
        steps: optimizer steps of the whole run.
        examples_per_step: `per_device_train_batch_size` × `gradient_accumulation_steps` × devices.
        turns: as the callback has them.
        seed: of the random orders.

    """

    task: Sequence[Any]
    language: Sequence[Any]
    steps: int
    examples_per_step: int
    turns: Turns = Turns()
    seed: int = 0

    def __len__(self) -> int:
        """Count the examples of the whole run."""
        return self.steps * self.examples_per_step

    def __getitem__(self, i: int) -> Any:
        """Give the i-th example of the run."""
        if not 0 <= i < len(self):
            raise IndexError(i)
        step, at = divmod(i, self.examples_per_step)
        name = self.turns.source(step)
        found = self.task if name == "task" else self.language
        again, which = divmod(self.turns.before(step) * self.examples_per_step + at, len(found))
        return found[_order(f"{self.seed} {name} {again}", len(found))[which]]


def partition_turns(model: Network, partition: Partition, *, turns: Turns | None = None) -> TrainerCallback:
    """Make the callback by which each optimizer step trains one part only (arXiv 2505.18356, simultaneous partition).

    In a step of the task the middle layers are trained, in one of the language the outer ones, as `partition` has them.
    The other parameters do not require gradients in that step and have none (`grad is None`), so that AdamW leaves
    them out: no momentum moves them and no weight decay shrinks them. They require them again after the training.

    The batches must take the same turns, by optimizer steps: `Interleaved` gives them to a stock Trainer. For one
    process; DistributedDataParallel settles once what has gradients.

    >>> from torch.nn import Linear, ModuleDict, ModuleList
    >>> from transformers import TrainerControl, TrainerState
    >>> model = ModuleDict({"layers": ModuleList(ModuleDict({"mlp": Linear(1, 1, bias=False)}) for _ in range(4))})
    >>> callback = partition_turns(model, Partition(bottom=1, top=1))
    >>> for step in range(2):  # as a Trainer tells it: one of the task, one of the language
    ...     callback.on_step_begin(None, TrainerState(global_step=step), TrainerControl())
    ...     print([name for name, parameter in model.named_parameters() if parameter.requires_grad])
    ['layers.1.mlp.weight', 'layers.2.mlp.weight']
    ['layers.0.mlp.weight', 'layers.3.mlp.weight']

    Raises MergeError, here for layers that cannot be found, and as the training begins for arguments that would mix up
    the turns.
    """
    from transformers import TrainerCallback

    taken, parts = turns or Turns(), partition.of(model)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for source, part in _TRAINS.items():
        if not any(parts[name] in (part, "both") for name in trainable):
            raise MergeError("", f"the steps of the {source} would train no parameter", "give each part some layers")

    class PartitionTurns(TrainerCallback):
        """Lets the parameters of one part require gradients at a time."""

        def on_train_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
            """Refuse what would mix up the turns."""
            mistakes = _mixed_up(args, state, others.get("train_dataloader"), taken)
            if mistakes:
                raise MergeError.of(mistakes)

        def on_step_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
            """Give the step to the part of its data set."""
            part = _TRAINS[taken.source(state.global_step)]
            for name, parameter in trainable.items():
                mine = parts[name] in (part, "both")
                parameter.requires_grad_(mine)
                if not mine:
                    parameter.grad = None

        def on_train_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
            """Let all parameters require gradients that did before."""
            for parameter in trainable.values():
                parameter.requires_grad_(True)

    return PartitionTurns()


def _mixed_up(args: Any, state: Any, loader: Any, turns: Turns) -> list[Mistake]:
    """Find arguments with which a batch would train the other data set's part."""
    mistakes = []
    if args.world_size > 1:
        mistakes.append(Mistake("", f"{args.world_size} processes train, and turns work in one", "start one process"))
    dataset = getattr(loader, "dataset", None)
    if not isinstance(dataset, Interleaved):
        return mistakes
    if getattr(args, "train_sampling_strategy", "") != "sequential":  # an early transformers 5 may not have it
        hint = 'TrainingArguments(train_sampling_strategy="sequential")'
        mistakes.append(Mistake("train_sampling_strategy", "the order of the examples would be lost", hint))
    own = args.train_batch_size * args.gradient_accumulation_steps
    if own != dataset.examples_per_step:
        what = f"is {dataset.examples_per_step}, and a step of the Trainer takes {own}"
        mistakes.append(Mistake("examples_per_step", what, "batch size × gradient_accumulation_steps"))
    if state.max_steps > dataset.steps:
        what = f"the Trainer makes {state.max_steps} steps, and the examples are for {dataset.steps}"
        mistakes.append(Mistake("steps", what, "set num_train_epochs=1, or give Interleaved as many steps"))
    if dataset.turns != turns:
        mistakes.append(Mistake("turns", "callback and examples take other turns", "give both the same Turns"))
    return mistakes
