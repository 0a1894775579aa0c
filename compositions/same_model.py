"""Whether bottleneck adapters were trained on one model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from portmanteau.merge import Bottleneck
from portmanteau.merge.errors import Mistake

_HINT = "adapters work together only on the model that both were trained on"


def other_models(adapters: Sequence[Bottleneck], where: str) -> Iterator[Mistake]:
    """Compare the kind and the width of every adapter's model with the first's."""
    for other in adapters[1:]:
        for key in ("model_type", "hidden_size"):
            one, two = adapters[0].model[key], other.model[key]
            if one != two:
                yield Mistake(where, f"{other.label}: {key} is {two!r}, in {adapters[0].label} {one!r}", _HINT)


def other_paths(adapters: Sequence[Bottleneck]) -> Iterator[str]:
    """Say where configs name models differently: the same model may have two paths."""
    names = {adapter.label: adapter.model["model_name"] for adapter in adapters}
    if len(set(names.values())) > 1:
        shown = ", ".join(f"{label} {name!r}" for label, name in names.items())
        yield f"the configs name the model differently, make sure that it is one: {shown}"
