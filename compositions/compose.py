"""From a recipe to the checkpoint that it asks for: open what it names, put it together, from headers alone."""

from __future__ import annotations

from collections.abc import Iterator

from portmanteau.merge import Checkpoint, Composed, MergeError, PortmanteauError, RecipeError
from portmanteau.merge import open as open_checkpoint
from portmanteau.merge.errors import Mistake

from .composition import compositions
from .lines import KeyPath
from .recipe import Body, Recipe
from .reference import Reference, references, replaced
from .tensorwise import tensorwise


def compose(recipe: Recipe) -> Composed:
    """Open the checkpoints and put the result together, from headers alone.

    Raises RecipeError with every mistake found: models that cannot be opened, that do not fit, settings they refuse.
    """
    return _Composer(recipe).result()


class _Composer:
    """Opens each reference once and composes each step once."""

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        self._made: dict[Reference, Checkpoint] = {}
        self._under_way: list[str] = []

    def result(self) -> Composed:
        """Compose the recipe's result."""
        self._open_all()
        merged = self._composed(self._recipe.merge)
        donor = self._recipe.output.tokenizer
        if donor is None:
            return merged
        return merged.beside(merged.companions.with_tokenizer_of(self._checkpoint(donor).companions))

    def _open_all(self) -> None:
        """Open every checkpoint that is named, and report all that cannot be opened."""
        recipe, mistakes = self._recipe, []
        bodies = [*recipe.steps.values(), recipe.merge]
        named: list[tuple[KeyPath, Reference]] = [(("models", name), Reference(path=name)) for name in recipe.models]
        named += [(body.path, found) for body in bodies for found in references(body.arguments)]
        for path, reference in named:
            if reference.path not in recipe.steps:
                try:
                    self._checkpoint(reference)
                except PortmanteauError as error:
                    where = recipe.document.where(path)
                    mistakes += [Mistake(f"{where}: {m.where}", m.what, m.hint) for m in error.mistakes]
        if mistakes:
            raise RecipeError.of({m.where.partition(": ")[2] + m.what: m for m in mistakes}.values())

    def _checkpoint(self, reference: Reference) -> Checkpoint:
        if reference not in self._made:
            name = reference.path
            if name in self._recipe.steps:
                self._made[reference] = self._step(name)
            else:
                self._made[reference] = self._opened(self._recipe.models.get(name, reference), name)
        return self._made[reference]

    def _opened(self, reference: Reference, label: str) -> Checkpoint:
        folder = self._recipe.folder
        place = reference.path if reference.is_on_hub(folder) else reference.local(folder)
        return open_checkpoint(place, revision=reference.revision, label=label)

    def _step(self, name: str) -> Composed:
        body = self._recipe.steps[name]
        if name in self._under_way:
            where = self._recipe.document.where(body.path)
            raise RecipeError(where, f"steps need each other: {' → '.join([*self._under_way, name])}")
        self._under_way.append(name)
        made = self._composed(body)
        self._under_way.pop()
        return made.called(name)

    def _composed(self, body: Body) -> Composed:
        document = self._recipe.document
        arguments = replaced(body.arguments, self._checkpoint)
        try:
            if body.is_operator:
                made = tensorwise(body.name, **arguments)
            else:
                made = compositions()[body.name].compose(**arguments)
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
