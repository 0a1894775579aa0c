"""From a recipe to the checkpoint that it asks for: open what it names, put it together, from headers alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

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

from .composition import find
from .recipe.lines import Document, KeyPath
from .recipe.reading import Body, Recipe
from .recipe.reference import Reference, references, replaced
from .recipe.tokenizer import RowBody, RuleBody, TokenizerBody
from .tensorwise import tensorwise
from .vocabulary.chat_templates import TEMPLATES

if TYPE_CHECKING:
    from .vocabulary.row_maps import TokenRule


def compose(recipe: Recipe, *, weights: bool = True) -> Composed | Surveyed:
    """Open the checkpoints and put the result together, from headers alone.

    Models on the Hub are downloaded; with `weights=False` only their headers are, and the result can be planned.

    >>> from portmanteau.compositions import load
    >>> soup = compose(load("examples/linear.yaml"))
    >>> soup
    <Composed linear: 75 tensors, 0.7 MB>
    >>> soup["model.norm.weight"].shape  # made now
    torch.Size([64])

    Raises RecipeError with every mistake found: models that cannot be opened, that do not fit, settings they refuse.
    """
    made = _Composer(recipe, weights).result()
    return made.noted(recipe.document.notes) if isinstance(made, Composed) else made


class _Composer:
    """Opens each reference once and composes each step once."""

    def __init__(self, recipe: Recipe, weights: bool) -> None:
        self._recipe, self._weights = recipe, weights
        self._made: dict[tuple[Reference, bool], Any] = {}  # by kind of reference, and whether with its own vocabulary
        self._under_way: list[str] = []
        self._failed: dict[tuple[str, bool], PortmanteauError] = {}  # by step, and the same
        self._shared: dict[Reference | None, Checkpoint] = {}  # models of the result's vocabulary; None: of the result

    def result(self) -> Composed | Surveyed:
        """Compose the recipe's result."""
        self._open_all()
        output = self._recipe.output
        notes = self._share(output.tokenizer) if output.tokenizer is not None else ()
        self._compose_steps()
        shared = self._shared.get(None)
        merged = shared if isinstance(shared, Composed) else self._composed(self._recipe.merge)
        companions = merged.companions
        if output.tokenizer is not None and output.tokenizer.donor is not None:
            donor = self._opened(output.tokenizer.donor)
            companions = companions.with_tokenizer_of(donor.companions)
        template = output.chat_template
        if template == "auto":
            template = self._commonest_template()
        template = TEMPLATES.get(template, template) if template else None
        merged = merged.beside(companions.with_chat_template(template) if template else companions)
        return merged.noted(notes) if isinstance(merged, Composed) else merged

    def _share(self, asked: TokenizerBody) -> tuple[str, ...]:
        """Bring all models to the vocabulary that is asked for; give what a user should know of it."""
        from .vocabulary.shared import Shared

        recipe, document = self._recipe, self._recipe.document
        keys: list[Reference | None] = [*dict.fromkeys(self._leaves(recipe.merge))]
        keys = [None] if _keeps_vocabularies(recipe.merge) else keys
        models = [self._opened(key, own=True) if key else self._composed(recipe.merge, own=True) for key in keys]
        if not all(isinstance(one, Checkpoint) and one.companions.form.is_model for one in models):
            return ()
        base = asked.base or recipe.merge.arguments.get("base")
        donor = self._leaf(asked.donor) if asked.donor is not None else None
        try:
            shared = Shared(
                tuple(models),
                "union" if donor is None else self._opened(donor, own=True),
                self._opened(self._leaf(base), own=True) if type(base) is Reference else None,
                {token: self._rule(rule) for token, rule in asked.tokens.items()},
                asked.pad_to_multiple_of,
            )
            self._shared = dict(zip(keys, shared.models, strict=True))
            if donor is not None:
                self._shared.setdefault(donor, shared.donor)
            return shared.notes
        except PortmanteauError as error:
            raise RecipeError.of(
                Mistake(_place(document, mistake.where), mistake.what, mistake.hint) for mistake in error.mistakes
            ) from error

    def _leaves(self, body: Body, inside: tuple[str, ...] = ()) -> Iterator[Reference]:
        """Go through the models that a body is made of, those of its steps too."""
        for _, reference in references(body.arguments, body.path):
            step = self._recipe.steps.get(reference.path) if not reference.lora else None
            if type(reference) is not Reference or reference.path in inside:
                continue
            if step is None or _keeps_vocabularies(step):
                yield reference
            else:
                yield from self._leaves(step, (*inside, reference.path))

    def _leaf(self, reference: Reference) -> Reference:
        """Give a model, or the first of those that a step is made of."""
        step = self._recipe.steps.get(reference.path)
        if step is None or _keeps_vocabularies(step):
            return reference
        return next(self._leaves(step, (reference.path,)), reference)

    def _rule(self, rule: RuleBody) -> TokenRule:
        """Open the model that a token's row is taken from."""
        from .vocabulary.row_maps import RowOf, TokenRule

        source = rule.source
        if isinstance(source, RowBody):
            row = RowOf(self._opened(self._leaf(source.model), own=True), source.token, source.id)
            return TokenRule(row, rule.force)
        if source is None or rule.is_zero:
            return TokenRule("zero" if rule.is_zero else None, rule.force)
        return TokenRule(self._opened(self._leaf(source), own=True), rule.force)

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
        if recipe.output.tokenizer is not None:
            used += recipe.output.tokenizer.references(("output", "tokenizer"))
        named += [(path, found) for path, found in used if found.path not in recipe.models]
        for path, reference in named:
            if reference.path not in recipe.steps:
                try:
                    self._opened(reference, own=True)
                except PortmanteauError as error:
                    where = recipe.document.where(path)
                    mistakes += [Mistake(f"{where}: {m.where}", m.what, m.hint) for m in error.mistakes]
        if mistakes:
            raise RecipeError.of({m.where.partition(": ")[2] + m.what: m for m in mistakes}.values())

    def _compose_steps(self) -> None:
        """Compose every step, and report all that do not fit together."""
        mistakes: list[Mistake] = []
        for name in self._recipe.steps:
            try:
                self._opened(Reference(path=name))
            except PortmanteauError as error:
                mistakes += error.mistakes
        if mistakes:
            raise RecipeError.of(mistakes)

    def _opened(self, reference: Reference, *, own: bool = False) -> Any:
        """Give what a reference stands for: a step's result, or what its kind of reference opens; once for each.

        Models have the result's vocabulary, or with `own` the one that they have on disk.
        """
        if not own and reference in self._shared:
            return self._shared[reference]
        key = (reference, own or not self._shared or reference.path not in self._recipe.steps)
        if key not in self._made:
            self._made[key] = self._opening(reference, own=key[1])
        return self._made[key]

    def _opening(self, reference: Reference, *, own: bool) -> Any:
        name, folder = reference.path, self._recipe.folder
        if reference.lora:
            return self._folded(self._opened(reference.model_copy(update={"lora": ()}), own=True), reference)
        if name in self._recipe.steps:
            return self._step(name, own=own)
        meant = self._recipe.models.get(name, reference)
        place = meant.path if meant.is_on_hub(folder) else meant.local(folder)
        opened = reference.opener()(place, revision=meant.revision, label=name, weights=self._weights)
        return self._folded(opened, meant) if meant.lora else opened

    def _folded(self, base: Any, reference: Reference) -> Composed:
        """Fold the adapters of a reference into its model."""
        from .lora import lora

        if not isinstance(base, Checkpoint):
            raise CheckpointError(reference.path, "only a model takes a lora")
        adapters = {self._opened(adapter): weight for adapter, weight in reference.lora}
        if len(adapters) < len(reference.lora):
            raise CheckpointError("lora", "an adapter is named twice", "give it a weight instead")
        return lora(base=base, adapters=adapters).called(base.label)

    def _step(self, name: str, *, own: bool) -> Composed:
        body = self._recipe.steps[name]
        if name in self._under_way:
            where = self._recipe.document.where(body.path)
            raise RecipeError(where, f"steps need each other: {' → '.join([*self._under_way, name])}")
        if (name, own) in self._failed:
            raise self._failed[name, own]
        self._under_way.append(name)
        try:
            made = self._composed(body, own=own or _keeps_vocabularies(body))
        except PortmanteauError as error:
            self._failed[name, own] = error
            raise
        finally:
            self._under_way.pop()
        if isinstance(made, Surveyed):
            where = self._recipe.document.where(body.path)
            raise RecipeError(where, f"{body.name} makes no model", "build it first, by a recipe of its own")
        return made.called(name)

    def _composed(self, body: Body, *, own: bool = False) -> Composed | Surveyed:
        document = self._recipe.document
        arguments = replaced(body.arguments, partial(self._opened, own=own))
        try:
            composition = find(body.name)
            made = composition.compose(**arguments) if composition else tensorwise(body.name, **arguments)
        except MergeError as error:
            raise RecipeError.of(
                Mistake(document.where((*body.path, *_keys(m.where))), f"{body.name}: {m.what}", m.hint)
                for m in error.mistakes
            ) from error
        return made.because(document.where(body.path))


def _keeps_vocabularies(body: Body) -> bool:
    """Tell whether adapters or sparse fine-tunes are added to its models, whose rows they know by their numbers."""
    found = references(body.arguments, body.path)
    return any(type(one) is not Reference and "lora" not in path[len(body.path) + 1 :] for path, one in found)


def _place(document: Document, where: str) -> str:
    """Give the line of a key of the tokenizer, `tokens.<s>`, or the line of the tokenizer and a file."""
    key, _, token = where.partition(".")
    if key in ("", "source", "tokens"):
        return document.where(("output", "tokenizer", *filter(None, (key, token))))
    return f"{document.where(('output', 'tokenizer'))}: {where}"


def _keys(dotted: str) -> Iterator[str | int]:
    """Turn `rules.0.density` back into keys."""
    for part in filter(None, dotted.split(".")):
        yield int(part) if part.isdigit() else part
