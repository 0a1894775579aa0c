"""The key `tokenizer` of a recipe's output: whose vocabulary the result has, and where the rows of tokens come from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

from .lines import KeyPath
from .reference import Reference

UNION, ZERO = "union", "zero"


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class RowBody(_Strict):
    """The row of a token of a model: `{model: NAME, token: T}` or `{model: NAME, id: N}`."""

    model: Reference
    token: str | None = None
    id: Annotated[int, Field(ge=0)] | None = None

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.token is None) == (self.id is None):
            raise ValueError("name one of token and id")
        return self


def _kind(value: Any) -> str:
    """Tell a row of a model from a model; begins large, as what is no key does in pydantic's locations."""
    return "Row" if isinstance(value, RowBody) or (isinstance(value, dict) and "model" in value) else "Model"


class RuleBody(_Strict):
    """Where the row of a token comes from: a model, a row of it, `zero`; alone, or with `force`."""

    source: (
        Annotated[Annotated[RowBody, Tag("Row")] | Annotated[Reference, Tag("Model")], Discriminator(_kind)] | None
    ) = None
    force: bool = False

    @model_validator(mode="before")
    @classmethod
    def _from_short(cls, value: Any) -> Any:
        return {"source": value} if isinstance(value, str) or _kind(value) == "Row" else value

    @property
    def is_zero(self) -> bool:
        """Tell whether the row is one of zeros."""
        return isinstance(self.source, Reference) and self.source.path == ZERO


class TokenizerBody(_Strict):
    """The tokenizer of the result: a model's, alone, or the long form."""

    source: Reference = Reference(path=UNION)
    base: Reference | None = None
    tokens: dict[str, RuleBody] = {}
    pad_to_multiple_of: Annotated[int, Field(ge=1)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _from_short(cls, value: Any) -> Any:
        is_reference = isinstance(value, str) or (isinstance(value, dict) and "path" in value)
        return {"source": value} if is_reference else value

    @property
    def donor(self) -> Reference | None:
        """The model whose tokenizer it is; None for a union."""
        return None if self.source.path == UNION else self.source

    def with_models(self, changed: Callable[[Reference], Reference]) -> TokenizerBody:
        """Put other references in the place of the models that it names."""
        tokens = {}
        for token, rule in self.tokens.items():
            source = rule.source
            if isinstance(source, RowBody):
                source = source.model_copy(update={"model": changed(source.model)})
            elif source is not None and not rule.is_zero:
                source = changed(source)
            tokens[token] = rule.model_copy(update={"source": source})
        source = changed(self.source) if self.donor is not None else self.source
        base = changed(self.base) if self.base is not None else None
        return self.model_copy(update={"source": source, "base": base, "tokens": tokens})

    def references(self, path: KeyPath) -> Iterator[tuple[KeyPath, Reference]]:
        """Go through the models that it names, and their places."""
        if self.donor is not None:
            yield (*path, "source"), self.donor
        if self.base is not None:
            yield (*path, "base"), self.base
        for token, rule in self.tokens.items():
            if isinstance(rule.source, RowBody):
                yield (*path, "tokens", token, "source", "model"), rule.source.model
            elif rule.source is not None and not rule.is_zero:
                yield (*path, "tokens", token, "source"), rule.source
