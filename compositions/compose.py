"""From a recipe to the checkpoint that it asks for: open what it names, put it together, from headers alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from portmanteau.merge import (
    Checkpoint,
    CheckpointError,
    Composed,
    MergeError,
    PortmanteauError,
    RecipeError,
    StoredCheckpoint,
    Surveyed,
)
from portmanteau.merge.errors import Mistake

from .composition import compositions
from .lora import lora
from .matching import different_vocabularies
from .recipe.lines import KeyPath
from .recipe.reading import Body, Recipe
from .recipe.reference import Reference, references, replaced
from .tensorwise import tensorwise


def compose(recipe: Recipe) -> Composed | Surveyed:
    """Open the checkpoints and put the result together, from headers alone.

    Raises RecipeError with every mistake found: models that cannot be opened, that do not fit, settings they refuse.
    """
    made = _Composer(recipe).result()
    return made.noted(recipe.document.notes) if isinstance(made, Composed) else made


class _Composer:
    """Opens each reference once and composes each step once."""

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        self._made: dict[Reference, Any] = {}  # by each kind of reference what that kind opens
        self._under_way: list[str] = []

    def result(self) -> Composed | Surveyed:
        """Compose the recipe's result."""
        self._open_all()
        merged, output = self._composed(self._recipe.merge), self._recipe.output
        companions = merged.companions
        if output.tokenizer is not None:
            donor = self._opened(output.tokenizer)
            self._refuse_tokenizer(donor, merged)
            companions = companions.with_tokenizer_of(donor.companions)
        template = output.chat_template
        if template == "auto":
            template = self._commonest_template()
        return merged.beside(companions.with_chat_template(template) if template else companions)

    def _refuse_tokenizer(self, donor: Checkpoint, merged: Composed | Surveyed) -> None:
        """Refuse a tokenizer that gives other ids to tokens. Raises RecipeError."""
        mistakes = different_vocabularies({"the result": merged, donor.label: donor}, "the result")
        if mistakes:
            where = self._recipe.document.where(("output", "tokenizer"))
            raise RecipeError.of(replace(mistake, where=where) for mistake in mistakes)

    def _commonest_template(self) -> str | None:
        """Give the chat template that most of the models have; of equals the first named one's."""
        opened = [one for one in self._made.values() if isinstance(one, StoredCheckpoint)]
        count = Counter(found for one in opened if (found := one.companions.chat_template))
        return count.most_common(1)[0][0] if count else None

    def _open_all(self) -> None:
        """Open everything that is named, as what it is used for, and report all that cannot be opened."""
        recipe, mistakes = self._recipe, []
        bodies = [*recipe.steps.values(), recipe.merge]
        used = [found for body in bodies for found in references(body.arguments, body.path)]
        used += [(("models", name, "lora"), one) for name, found in recipe.models.items() for one, _ in found.lora]
        named: list[tuple[KeyPath, Reference]] = []
        for name in recipe.models:
            kinds = [found for _, found in used if found.path == name] or [Reference(path=name)]
            named += [(("models", name), found) for found in kinds]
        named += [(path, found) for path, found in used if found.path not in recipe.models]
        for path, reference in named:
            if reference.path not in recipe.steps:
                try:
                    self._opened(reference)
                except PortmanteauError as error:
                    where = recipe.document.where(path)
                    mistakes += [Mistake(f"{where}: {m.where}", m.what, m.hint) for m in error.mistakes]
        if mistakes:
            raise RecipeError.of({m.where.partition(": ")[2] + m.what: m for m in mistakes}.values())

    def _opened(self, reference: Reference) -> Any:
        """Give what a reference stands for: a step's result, or what its kind of reference opens; once for each."""
        if reference not in self._made:
            self._made[reference] = self._opening(reference)
        return self._made[reference]

    def _opening(self, reference: Reference) -> Any:
        name, folder = reference.path, self._recipe.folder
        if reference.lora:
            return self._folded(self._opened(reference.model_copy(update={"lora": ()})), reference)
        if name in self._recipe.steps:
            return self._step(name)
        meant = self._recipe.models.get(name, reference)
        place = meant.path if meant.is_on_hub(folder) else meant.local(folder)
        opened = reference.opener(place, revision=meant.revision, label=name)
        return self._folded(opened, meant) if meant.lora else opened

    def _folded(self, base: Any, reference: Reference) -> Composed:
        """Fold the adapters of a reference into its model."""
        if not isinstance(base, Checkpoint):
            raise CheckpointError(reference.path, "only a model takes a lora")
        adapters = {self._opened(adapter): weight for adapter, weight in reference.lora}
        if len(adapters) < len(reference.lora):
            raise CheckpointError("lora", "an adapter is named twice", "give it a weight instead")
        return lora(base=base, adapters=adapters).called(base.label)

    def _step(self, name: str) -> Composed:
        body = self._recipe.steps[name]
        if name in self._under_way:
            where = self._recipe.document.where(body.path)
            raise RecipeError(where, f"steps need each other: {' → '.join([*self._under_way, name])}")
        self._under_way.append(name)
        made = self._composed(body)
        self._under_way.pop()
        if isinstance(made, Surveyed):
            where = self._recipe.document.where(body.path)
            raise RecipeError(where, f"{body.name} makes no model", "build it first, by a recipe of its own")
        return made.called(name)

    def _composed(self, body: Body) -> Composed | Surveyed:
        document = self._recipe.document
        arguments = replaced(body.arguments, self._opened)
        try:
            made: Composed | Surveyed = (
                tensorwise(body.name, **arguments)
                if body.is_operator
                else compositions()[body.name].compose(**arguments)
            )
        except MergeError as error:
            raise RecipeError.of(
                Mistake(document.where((*body.path, *_keys(m.where))), f"{body.name}: {m.what}", m.hint)
                for m in error.mistakes
            ) from error
        return made.because(document.where(body.path))


def _keys(dotted: str) -> Iterator[str | int]:
    """Turn `rules.0.density` back into keys."""
    for part in filter(None, dotted.split(".")):
        yield int(part) if part.isdigit() else part
