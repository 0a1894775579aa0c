"""The components of a model, by its tensors' names: text decoder, vision tower, what joins them, encoder, decoder.

Nothing is known of any architecture. A component is what its modules are called in front of the layers' numbers; the
text decoder is where the table of tokens is.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache
from itertools import takewhile

from portmanteau.merge import Checkpoint, Composed, MergeError
from portmanteau.merge.companions import INPUT_EMBEDDINGS
from portmanteau.merge.names import Layers, Stack, matches

REST = "default"  # what mergekit calls the tensors of no other component
_SHARED = "shared"  # of an encoder and a decoder
_TEXT, _VISION, _JOINING = "text_decoder", "vision_tower", "multi_modal_projector"
_ROLES = {_TEXT: _TEXT, _VISION: _VISION, "vision_model": _VISION, _JOINING: _JOINING}  # the word → what it means
_OF_VISION = re.compile(r"vision|visual|image_(encoder|tower)", re.IGNORECASE)
_JOINS = re.compile(r"projector|connector|merger|resampler|aligner|abstractor|perceiver|q_?former|newline|query_tokens")
_ALSO_JOINS = re.compile(r"projection")  # where no vision tower has one of its own
_HEADS = "*lm_head.*|*embed_out.*|*output_projection.*|*proj_out.*"


def component(word: str, names: Iterable[str]) -> list[str]:
    """Give the tensors of one component of a model that has these tensors; none where it has no such component.

    `text_decoder`, `vision_tower` and `multi_modal_projector` are found by what they are, `shared` is what belongs to
    neither encoder nor decoder, `default` is everything; any other word is a part of the names.

    >>> names = ["model.embed_tokens.weight", "model.layers.0.mlp.up.weight", "visual.blocks.0.mlp.up.weight",
    ...          "visual.merger.weight", "lm_head.weight"]
    >>> component("vision_tower", names), component("multi_modal_projector", names)
    (['visual.blocks.0.mlp.up.weight'], ['visual.merger.weight'])
    >>> component("visual.merger", names)
    ['visual.merger.weight']
    """
    names = tuple(names)
    layers = _layers(names)
    if word == REST:
        return list(names)
    if word in _ROLES:
        root = _text_root(names)
        return [name for name in names if _role(_front(name, layers), name, root) == _ROLES[word]]
    if word == _SHARED:
        outside = [name for name in names if layers.place(name) is None]
        return [name for name in outside if not {"encoder", "decoder"} & set(name.split("."))]
    found = [name for name in names if _holds(_front(name, layers), word)]
    return found or _moved(word, names, layers)


def part_of(model: Checkpoint, word: str) -> Composed:
    """Give a model that is one component of another. Raises MergeError where it has none of that name."""
    own = component(word, model.specs)
    if not own:
        what, hint = f"{model.label} has no component {word!r}", f"there are: {', '.join(known(model.specs))}"
        raise MergeError("only", what, hint)
    nodes = {name: model.node(name) for name in own}
    return Composed(model.label, nodes, model.companions, model.notes)


def stack_of(word: str, layers: Layers, names: Iterable[str]) -> Stack | None:
    """Give the one stack of layers that a component has."""
    own = component(word, names)
    stacks = dict.fromkeys(place.stack for name in own if (place := layers.place(name)))
    return next(iter(stacks)) if len(stacks) == 1 else None


def is_of_vision(name: str) -> bool:
    """Tell whether a tensor, or a stack of layers, belongs to what sees images.

    >>> is_of_vision("visual.blocks"), is_of_vision("model.language_model.layers")
    (True, False)
    """
    return _OF_VISION.search(name) is not None


def known(names: Iterable[str]) -> list[str]:
    """Give the components that a model has, as messages name them."""
    names = tuple(names)
    found = [word for word in (_TEXT, _VISION, _JOINING) if component(word, names)]
    sides = [word for word in ("encoder", "decoder") if component(word, names)]
    return (found if len(found) > 1 else [*sides, _SHARED] if len(sides) > 1 else []) + [REST]


@lru_cache(maxsize=32)
def _layers(names: tuple[str, ...]) -> Layers:
    return Layers(names)


def _front(name: str, layers: Layers) -> str:
    """Give the part of a name in front of the layer's number, or all of it outside the layers."""
    place = layers.place(name)
    return place.stack.prefix if place else name


def _holds(front: str, word: str) -> bool:
    """Tell whether a word, or several with dots between them, is a run of a name's components."""
    return f".{word}." in f".{front}."


def _role(front: str, name: str, text_root: str) -> str:
    """Tell which of text decoder, vision tower and what joins them a tensor belongs to; nothing: to none of them."""
    if _JOINS.search(front):
        return _JOINING
    if is_of_vision(front):
        return _VISION
    if name.startswith(text_root) or matches(_HEADS, name):
        return _TEXT
    return _JOINING if _ALSO_JOINS.search(front) else ""


@lru_cache(maxsize=32)
def _text_root(names: tuple[str, ...]) -> str:
    """Find the prefix of all that belongs to the text decoder: what the table of tokens shares with its layers."""
    tables = [name for name in names if matches(INPUT_EMBEDDINGS, name) and not is_of_vision(name)]
    if not tables:
        return ""
    shared = [_common(table, stack.prefix) for table in tables for stack in _layers(names).stacks]
    return max(shared, key=len, default="")


def _common(one: str, other: str) -> str:
    """Give the components that two names begin with, and a dot behind them."""
    pairs = takewhile(lambda pair: pair[0] == pair[1], zip(one.split("."), other.split("."), strict=False))
    return "".join(f"{part}." for part, _ in pairs)


def _moved(word: str, names: tuple[str, ...], layers: Layers) -> list[str]:
    """Find a stack by a name with its components in another order: `language_model.model` for `model.language_model`.

    transformers calls the modules of some models otherwise than their checkpoints do.
    """
    wanted = set(word.split(".")) - {"model"}
    stacks = [stack for stack in layers.stacks if wanted <= set(stack.prefix.split("."))]
    if "." not in word or len(stacks) != 1:
        return []
    return [name for name in names if (place := layers.place(name)) and place.stack == stacks[0]]
