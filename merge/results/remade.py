"""A result made again without writing it: whether the same plan still gives the same bits."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from .. import companions
from ..cards import model_card
from ..cards.card_changes import CardChanges, with_changes
from ..checkpoint import Checkpoint
from ..errors import Mistake
from ..execute import Tools, carry_out, surveyed
from ..files.digests import digest, digest_of_file
from ..limits import Limits
from ..plan import make_plan
from ..progress import Progress
from ..receipt import Receipt
from ..writer import layout

_OTHER = "an input, a plugin, portmanteau or torch is another one than then; the receipt names them"


def remade(
    checkpoint: Checkpoint,
    receipt: Receipt,
    *,
    dtype: str | None,
    shard_size: int,
    recipe: str,
    threads: int | None = None,
    memory: int | None = None,
    progress: Progress | None = None,
) -> tuple[Mistake, ...]:
    """Make every tensor and compare its digest with the receipt's; name what differs.

    Headers, configs, copied files and the model card are compared too; not what is derived from the written weights.
    """
    told, limits = progress or Progress(), Limits.of(threads, memory)
    plan = make_plan(checkpoint, dtype)
    found = surveyed(plan, limits, told)
    plan = plan.settled(found)
    digests = carry_out(plan, found, limits, Tools(lambda name, data, at: None, told))
    names = dict.fromkeys([*receipt.outputs, *digests])
    other = [Mistake(f"tensor {n}", _said(receipt.outputs.get(n), digests.get(n)), _OTHER) for n in names]
    specs, beside = [step.output for step in plan.steps], checkpoint.companions.with_texts_of(plan.companions)
    made = {shard.file: digest(shard.header) for shard in layout(specs, shard_size, beside.form)}
    with TemporaryDirectory() as folder:
        path = Path(folder)
        companions.write(beside.without_derived(), path, specs)
        card = with_changes(model_card.text(plan, recipe, beside.form), CardChanges(), CardChanges.of(receipt.changes))
        (path / "README.md").write_text(card, encoding="utf-8")
        made |= {one.relative_to(path).as_posix(): digest_of_file(one) for one in path.rglob("*") if one.is_file()}
    then = {name: record.get("header") or record["digest"] for name, record in receipt.files.items() if name in made}
    other += [Mistake(f"file {name}", _said(then.get(name), own), _OTHER) for name, own in made.items()]
    return tuple(mistake for mistake in other if mistake.what)


def _said(then: str | None, now: str | None) -> str:
    """Say how two digests differ; nothing where they do not."""
    if then is None:
        return "is made now, and was not then"
    if now is None:
        return "is not made any more"
    return "" if then == now else "comes out with other bytes now"
