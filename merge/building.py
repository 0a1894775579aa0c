"""A build: a plan carried out into a folder that appears whole, continued where an earlier one was ended."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

from . import companions
from .cards import model_card
from .checkpoint import Checkpoint
from .companions import Companions
from .device import CPU, chosen
from .dtypes import parse
from .errors import MergeError, nearest
from .execute import Tools, carry_out, shared, surveyed
from .files.digests import digest
from .limits import Limits
from .node import Step, Survey
from .non_finite import Choice, Watch
from .page_cache import crowds_memory
from .plan import Plan, make_plan
from .plugins.source_files import Plugins, source_files
from .progress import Progress
from .receipt import Done, Receipt, file_records, make_receipt, surveys
from .results import journal
from .results.identity import Identity, code, differences, identity, inputs
from .results.journal import Finished, Journal
from .results.output import Work, check_name, check_place, healed, is_result, published
from .writer import Writer

SHARD_SIZE = 5_000_000_000


def build(
    checkpoint: Checkpoint,
    out: str | Path,
    *,
    dtype: str | None = None,
    shard_size: int = SHARD_SIZE,
    threads: int | None = None,
    memory: int | None = None,
    device: str = CPU,
    force: bool = False,
    fresh: bool = False,
    non_finite: Choice = "error",
    recipe: str | None = None,
    recipe_folder: Path | None = None,
    progress: Progress | None = None,
) -> Receipt:
    """Write a checkpoint, made or stored, to a folder that transformers loads as it is.

    A build that was ended, whatever ended it, is continued by the same call: finished tensors are kept if their bytes
    are still those that were written. A result that is there already and is what is asked for is left as it is.

    >>> from portmanteau.merge import open
    >>> task = open("examples/models/task-expert")
    >>> build(task, "merged", dtype="float32").outcome
    'built'
    >>> build(task, "merged", dtype="float32").outcome
    'up to date'
    >>> open("merged").specs["model.norm.weight"].dtype
    'F32'

    Args:
        checkpoint: what to write.
        out: the folder; it appears whole, or not at all.
        dtype: the dtype of its floats (`bfloat16`); default: what its inputs promote to.
        shard_size: the most bytes in one file.
        threads: how many tensors are made at once; the result does not depend on it.
        memory: bytes in flight; the result does not depend on it.
        device: where torch computes what is not copied byte for byte: `cpu`, `cuda`, `cuda:1`.
        force: replace an earlier result.
        fresh: keep nothing of a build that was ended.
        non_finite: what to do where an input or the result has NaN or infinity: `error`, `warn` or `keep`.
        recipe: the recipe's text, for receipt and model card.
        recipe_folder: the folder that its paths are relative to.
        progress: is told how far the work is; default: a bar in a notebook, else nothing.

    Raises MergeError, CheckpointError or OutputError; the first two before any weights are read, where headers show it.
    """
    begun, out, progress, device = time.monotonic(), Path(out), progress or _default_progress(), chosen(device)
    if non_finite not in get_args(Choice):
        raise MergeError("non_finite", f"unknown choice {non_finite!r}", nearest(non_finite, get_args(Choice)))
    plan = make_plan(checkpoint, parse(dtype) if dtype else None)
    limits, beside = Limits.of(threads, memory, device), checkpoint.companions
    limits.session(plan)  # a budget that is too small is refused here
    options = {"dtype": dtype and parse(dtype), "size of shards": shard_size, "device": device}
    plugins = source_files(plan.operators)
    as_begun = inputs(plan)
    made_from = identity(plan, recipe=recipe, options=options, read=as_begun, beside=beside, plugins=plugins)
    healed(out)
    earlier = "" if force else _standing(out, made_from, non_finite)
    if isinstance(earlier, Receipt):
        return earlier
    check_place(out, nbytes=plan.bytes_written, force=force, since=earlier)
    text = _of_recipe(recipe, recipe_folder, out) if recipe is not None else None
    with published(out, fresh=fresh, check=partial(check_name, out, force=force)) as work:
        watch = Watch() if non_finite != "keep" else None
        making = _Build(limits, progress, watch, non_finite, made_from, plugins, work)
        receipt = making.result(plan, shard_size, beside, text, begun)
        _check_unchanged(plan, as_begun)
        return receipt


def _check_unchanged(plan: Plan, as_begun: Identity) -> None:
    """Refuse a result that may hold bytes of two states of an input: MergeError."""
    if changed := differences(as_begun, inputs(plan)):
        raise MergeError("", f"{changed} while it was read", "the same command starts anew, with what is there now")


def _default_progress() -> Progress:
    from .notebook import default_progress

    return default_progress()


def _standing(out: Path, made_from: Identity | None, non_finite: str) -> Receipt | str:
    """Give the receipt of a result that stands there and is what is asked for; else how it differs, as far as known."""
    if made_from is None or not is_result(out):
        return ""
    from .results.up_to_date import up_to_date

    return up_to_date(out, made_from, non_finite)


def _of_recipe(text: str, folder: Path | None, out: Path) -> dict[str, str]:
    """Give what a receipt says of the recipe; its folder as it is seen from the result, so that both may be moved."""
    found = {"text": text, "digest": digest(text.encode())}
    if folder is not None:
        try:
            found["folder"] = Path(os.path.relpath(folder.resolve(), out.absolute())).as_posix()
        except ValueError:  # on another drive of Windows
            found["folder"] = folder.resolve().as_posix()
    return found


@dataclass(frozen=True)
class _Build:
    """What the parts of one build share."""

    limits: Limits
    progress: Progress
    watch: Watch | None
    non_finite: Choice
    made_from: Identity | None
    plugins: Plugins
    work: Work

    def result(
        self, plan: Plan, shard_size: int, beside: Companions, recipe: Mapping[str, str] | None, begun: float
    ) -> Receipt:
        """Make everything that stands in the folder; the receipt last."""
        plan, done, writer, continued = self.weights(plan, shard_size, beside)
        folder, beside = self.work.result, beside.with_texts_of(plan.companions)
        companions.write(beside, folder, [step.output for step in plan.steps])
        card = model_card.text(plan, recipe["text"] if recipe else None, beside.form)
        (folder / "README.md").write_text(card, encoding="utf-8")
        receipt = make_receipt(plan, done, recipe, time.monotonic() - begun, self.work.home)
        return replace(
            receipt,
            notes=(*receipt.notes, *self.notes),
            files=file_records(folder, writer.shards),
            plugins=self.plugins,
            made_from=self.made_from,
            non_finite=self.non_finite,
            outcome="continued" if continued else "built",
        ).write(folder)

    def weights(self, plan: Plan, shard_size: int, beside: Companions) -> tuple[Plan, Done, Writer, bool]:
        """Carry out surveys and steps; give the settled plan, what came out, and whether an earlier build went on."""
        found = surveyed(plan, self.limits, self.progress, self.watch)
        self._refuse(survey=True)
        plan = plan.settled(found)
        own = self._identity(found)
        earlier = self._earlier(own)
        self.work.result.mkdir(exist_ok=True)
        writer = Writer(self.work.result, (step.output for step in plan.steps), shard_size, beside.form)
        try:
            finished = self._still_whole(plan, writer, earlier)
            with self._journal(own, finished, writer) as log:
                tools = Tools(writer.put, self.progress, self.watch, self.non_finite == "error", log)
                digests = self._carried_out(plan, found, tools, finished)
                writer.finish(forget=crowds_memory(plan))
        finally:
            writer.close()
        return plan, Done(digests, found, self.limits.device), writer, bool(finished)

    def _carried_out(
        self, plan: Plan, found: Mapping[Survey, Any], tools: Tools, finished: Mapping[str, Finished]
    ) -> dict[str, str]:
        try:
            return carry_out(plan, found, self.limits, tools, {name: one.digest for name, one in finished.items()})
        except MergeError:
            self._refuse()  # with all that was found until everything stood still
            raise

    @property
    def notes(self) -> list[str]:
        """What a user should know who let NaN and infinity pass with a warning."""
        found = self.watch.found if self.watch else ()
        return [f"{one.mistake.where}: {one.mistake.what}" for one in found]

    def _refuse(self, *, survey: bool = False) -> None:
        """Raise MergeError where NaN or infinity was found and is to be an error."""
        if self.watch is None:
            return
        if survey:
            self.watch.settle_inputs()
        if self.non_finite == "error" and self.watch.found:
            raise MergeError.of(one.mistake for one in self.watch.found)

    def _identity(self, found: Mapping[Survey, Any]) -> Identity | None:
        """Give the identity of what is written: also the same code, and the same findings of surveys."""
        if self.made_from is None:
            return None
        of_surveys = json.dumps(surveys(found), sort_keys=True, default=str)
        return {**self.made_from, **code(), "what the surveys found": digest(of_surveys.encode())}

    def _earlier(self, own: Identity | None) -> Mapping[str, Finished]:
        """Give what the journal of an earlier build says; clear away what cannot be continued, and say why."""
        read = journal.read(self.work.journal)
        if read is None or own is None or read.identity != own:
            if read is not None and read.finished:
                changed = differences(read.identity, own) if own else "it builds from what is in memory"
                self.progress.tell(f"starting anew, not continuing the build that was ended: {changed}")
            self.work.clear()
            return {}
        return {n: one for n, one in read.finished.items() if one.clean or self.non_finite == "keep"}

    def _still_whole(self, plan: Plan, writer: Writer, earlier: Mapping[str, Finished]) -> dict[str, Finished]:
        """Keep the finished tensors whose bytes are those that were written: all are read again."""
        steps = [step for step in plan.steps if step.output.name in earlier]
        if not steps:
            return {}
        self.progress.begin("check", sum(step.output.nbytes for step in steps), len(steps))

        def is_whole(step: Step) -> bool:
            found = writer.digest(step.output.name, self.progress.advance)
            self.progress.advance(0, 1)
            return found == earlier[step.output.name].digest

        with ThreadPoolExecutor(self.limits.threads, "check") as pool:
            kept = [step for step, whole in zip(steps, pool.map(is_whole, steps), strict=True) if whole]
        for step in kept:
            common, learned = shared(step), earlier[step.output.name].learned
            if common is not None and learned is not None:
                common.recall(learned)
        self.progress.tell(f"continuing: {len(kept)} of {len(plan.steps)} tensors were finished before")
        return {step.output.name: earlier[step.output.name] for step in kept}

    def _journal(
        self, own: Identity | None, finished: Mapping[str, Finished], writer: Writer
    ) -> AbstractContextManager[Journal | None]:
        if own is None:
            return nullcontext()
        return Journal(self.work.journal, own, finished.values(), writer.sync)
