"""The README of a merged model: a Hub model card with the parents, the recipe and what was done."""

from __future__ import annotations

import yaml

from ..form import MODEL, Form
from ..plan import Plan
from ..receipt import choices
from ..shown import code, fenced, markdown
from .card_changes import LAST
from .parent_cards import carried, read_cards


def text(plan: Plan, recipe: str | None, form: Form = MODEL) -> str:
    """Write the card in Markdown, with the YAML front matter that the Hub reads."""
    labels = [checkpoint.label for checkpoint in plan.checkpoints if checkpoint.files]
    parents = list(dict.fromkeys(checkpoint.repository for checkpoint in plan.checkpoints if checkpoint.repository))
    relation = {"base_model_relation": "merge"} if form.is_model else {}
    front = {
        **({"base_model": parents, **relation} if parents else {}),
        **carried(read_cards(plan.checkpoints)),
        "library_name": form.library,
        "tags": ["merge", "portmanteau"],
    }
    lines = [
        "---",
        yaml.safe_dump(front, sort_keys=False, allow_unicode=True).strip(),
        "---",
        "",
        f"# {form.title}",
        "",
    ]
    if labels:
        lines += ["Built by portmanteau, without training, from:", "", *(f"- {code(label)}" for label in labels), ""]
    else:
        lines += ["Written by portmanteau from tensors in memory.", ""]
    lines += ["| operator | models | tensors |", "|---|---|---|"]
    for row in choices(plan):
        lines.append(f"| {row['operator']} | {', '.join(map(markdown, row['models']))} | {row['tensors']} |")
    if plan.notes:
        lines += ["", *(f"- {markdown(note)}" for note in plan.notes)]
    if recipe is not None:
        lines += ["", "## Recipe", "", *fenced(recipe, "yaml")]
    return "\n".join([*lines, f"{LAST}: inputs and outputs by digest, versions, settings.", ""])
