"""A language and a task adapter, one after the other, as a folder that the library adapters loads and activates."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Annotated

from pydantic import Field

from portmanteau.merge import Bottleneck, Composed, MergeError
from portmanteau.merge.adapters.bottleneck import LIBRARY, SETUP, VERSION, WEIGHTS
from portmanteau.merge.adapters.folder import CONFIG
from portmanteau.merge.companions import Companions
from portmanteau.merge.errors import Mistake
from portmanteau.merge.form import Form
from portmanteau.merge.node import copy_of

from .composition import composition
from .same_model import other_models, other_paths

_NOTE = (
    "bottleneck adapters cannot be merged into weights, an activation stands between their projections: the stack "
    "acts at run time; the library adapters loads it: "
    "model.load_adapter_setup(FOLDER, set_active=True, use_safetensors=True)"
)


@composition(
    source="Pfeiffer et al. 2020 (arXiv 2005.00052), MAD-X; folders as adapters 1.3.0 `save_adapter_setup`",
    example="stack_adapters: {language: ./swahili, task: ./ner}",
)
def stack_adapters(
    *,
    language: Annotated[Bottleneck, Field(description="the adapter that comes first: folder or Hub id")],
    task: Annotated[Bottleneck, Field(description="the adapter that comes after it, with its prediction head")],
) -> Composed:
    """Stack a task adapter on a language adapter, as MAD-X does: a folder that the library adapters loads as it is.

    Formula: task(language(x)) at every place where both stand; the language's invertible adapter around the
    embeddings. Both adapters are copied, each into the sub-folder of its name, beside adapter_setup.json. Bottleneck
    adapters cannot be merged into weights: the result is no model.

    >>> from portmanteau import merge
    >>> swahili, task = (merge.open_bottleneck(f"examples/adapters/bert-{name}") for name in ("swahili", "task"))
    >>> stacked = stack_adapters(language=swahili, task=task)
    >>> sorted(stacked.companions.texts)
    ['adapter_setup.json', 'swahili/adapter_config.json', 'task/adapter_config.json']

    Raises MergeError for adapters of one name, or of different models.
    """
    both = {"language": language, "task": task}
    mistakes = [*_same_name(language, task), *other_models([language, task], "task")]
    if mistakes:
        raise MergeError.of(mistakes)
    made = {role: adapter.called(adapter.name) for role, adapter in both.items()}
    nodes = {
        key: copy_of(made[role].node(key), spec, adapter.label)
        for role, adapter in both.items()
        for key, spec in made[role].specs.items()
    }
    folders = {key: adapter.name for role, adapter in both.items() for key in made[role].specs}
    texts = {f"{adapter.name}/{CONFIG}": adapter.config_text(adapter.name) for adapter in both.values()}
    form = Form(WEIGHTS, folders=folders, library=LIBRARY, title="Two stacked adapters")
    head = {f"{task.name}/{name}": path for name, path in task.head.items()}
    companions = Companions(files=head, texts={**texts, SETUP: _setup(language.name, task.name)}, form=form)
    notes = (_NOTE, *_left_out(language, task), *other_paths([language, task]))
    return Composed("stack_adapters", nodes, companions, notes)


def _same_name(language: Bottleneck, task: Bottleneck) -> Iterator[Mistake]:
    if language.name == task.name:
        hint = f"rename one: build {{average_adapters: {{adapters: [{task.label}], name: …}}}}, and name the result"
        yield Mistake("task", f"both adapters are called {task.name!r}, and a model holds a name once", hint)


def _left_out(language: Bottleneck, task: Bottleneck) -> Iterator[str]:
    """Say what of the two has no part in a stack."""
    if language.head:
        yield f"{language.label}: its prediction head is left out, the task's is used"
    if task.is_invertible:
        yield f"{task.label}: its invertible adapter has no effect: adapters uses only that of the first in a stack"


def _setup(*names: str) -> str:
    """Write adapter_setup.json: the composition block as adapters' `to_dict` gives it."""
    children = [{"type": "single", "children": [name]} for name in names]
    setup = {"adapter_setup": {"type": "Stack", "children": children}, "head_setup": None, "version": VERSION}
    return json.dumps(setup, indent=2, ensure_ascii=False) + "\n"
