"""The weighted mean of bottleneck adapters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated

from pydantic import Field

from portmanteau.merge import Bottleneck, Composed, MergeError, Step
from portmanteau.merge.adapters.bottleneck import LIBRARY, WEIGHTS
from portmanteau.merge.adapters.bottleneck_config import differences
from portmanteau.merge.adapters.folder import CONFIG
from portmanteau.merge.companions import Companions
from portmanteau.merge.errors import Mistake
from portmanteau.merge.form import Form
from portmanteau.merge.node import Inputs
from portmanteau.merge.registry import find

from .composition import composition
from .matching import match
from .same_model import other_models, other_paths

Weight = Annotated[float, Field(allow_inf_nan=False)]
_LOAD = "it loads with model.load_adapter(FOLDER, use_safetensors=True)"
_FORM = Form(WEIGHTS, library=LIBRARY, title="A merged bottleneck adapter")


@composition(
    source="AdapterHub's adapters 1.3.0, `average_adapter`, combine_strategy linear",
    example="average_adapters: {adapters: {./ner-1: 3, ./ner-2: 1}, name: ner}",
)
def average_adapters(
    *,
    adapters: Annotated[
        Mapping[Bottleneck, Weight] | Sequence[Bottleneck],
        Field(description="AdapterHub folders or Hub ids with their weights, or a list, all at the same weight"),
    ],
    name: Annotated[str, Field(description="what the result is called", pattern=r"^[^./\\]+$")],
    normalize: Annotated[bool, Field(description="divide by the sum of the weights")] = True,
) -> Composed:
    """Take the weighted mean of bottleneck adapters, in the space of their weights.

    Formula: Σ wᵢ xᵢ / Σ wᵢ over every tensor, invertible adapters included, in fp32. The adapters must have one
    architecture; dropout and initialisation may differ. Prediction heads are not averaged, and stay out. The mean of
    one adapter is that adapter under another name.

    >>> from portmanteau import merge
    >>> first, second = (merge.open_bottleneck(f"examples/adapters/bert-{name}") for name in ("first", "second"))
    >>> mean = average_adapters(adapters={first: 3, second: 1}, name="mean")
    >>> name = "bert.encoder.layer.0.output.adapters.mean.adapter_up.bias"
    >>> [round(one[name][0].item(), 4) for one in (first.called("mean"), second.called("mean"), mean)]
    [0.4359, 0.3045, 0.4031]

    Raises MergeError, with every mistake found, for adapters of another architecture, model or shape.
    """
    weights = dict(adapters) if isinstance(adapters, Mapping) else dict.fromkeys(adapters, 1.0)
    mistakes = [*_other_architectures(list(weights)), *other_models(list(weights), "adapters")]
    if not weights:
        mistakes.append(Mistake("adapters", "names no adapter"))
    if len(weights) < len(adapters):
        mistakes.append(Mistake("adapters", "an adapter is named twice", "give it a weight instead"))
    if mistakes:
        raise MergeError.of(mistakes)
    labels = tuple(adapter.label for adapter in weights)
    first = next(iter(weights))
    matching = match({adapter.label: adapter.called(name) for adapter in weights}, first.label)
    settings = {"weight": tuple(map(float, weights.values())), "normalize": normalize}
    nodes = {
        key: Step(met.spec, find("linear"), settings, Inputs(tuple(met.nodes.values())), labels)
        for key, met in matching.tensors.items()
    }
    heads = [f"{adapter.label}: its prediction head is not averaged" for adapter in weights if adapter.head]
    notes = (*matching.notes, *other_paths(list(weights)), *heads, _LOAD)
    companions = Companions(texts={CONFIG: first.config_text(name)}, form=_FORM)
    return Composed("average_adapters", nodes, companions, notes)


def _other_architectures(adapters: Sequence[Bottleneck]) -> Iterator[Mistake]:
    """Compare every architecture with the first."""
    for other in adapters[1:]:
        one, two = adapters[0].architecture, other.architecture
        keys = differences(one, two)
        if keys:
            shown = "; ".join(f"{key} is {two.get(key)!r}, in {adapters[0].label} {one.get(key)!r}" for key in keys)
            hint = "only adapters of one architecture have tensors that mean the same"
            yield Mistake("adapters", f"{other.label} has another architecture: {shown}", hint)
