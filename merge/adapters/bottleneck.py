"""A bottleneck adapter on disk, as AdapterHub's library adapters 1.3.0 writes it: config, tensors, prediction head."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..companions import Companions
from ..composed import Composed
from ..errors import CheckpointError, Mistake, some
from ..files import hub, places
from ..files.json_file import read_json
from ..form import Form
from ..stored import StoredCheckpoint
from .bottleneck_config import current, is_invertible, refusals, width
from .folder import CONFIG, locate

VERSION = "adapters.1.3.0"  # of the format; it tells adapters that nothing is to be converted
WEIGHTS = "adapter.safetensors"
SETUP = "adapter_setup.json"  # of a composition, whose adapters lie in sub-folders of their names
LIBRARY = "adapter-transformers"  # what the Hub calls it
_HEAD_CONFIG = "head_config.json"
_HEAD = (_HEAD_CONFIG, "model_head.safetensors", "pytorch_model_head.bin")
_MODEL = ("hidden_size", "model_class", "model_name", "model_type")
_AGAIN = "download or save the adapter again"
_SPELLINGS = {  # of adapter-transformers 1, in the order in which adapters replaces them
    **dict.fromkeys(("attention_text_task_adapters", "attention_text_lang_adapters"), "adapters"),
    **dict.fromkeys(("layer_text_task_adapters", "layer_text_lang_adapters"), "adapters"),
    "invertible_lang_adapters": "invertible_adapters",
}
_OWN = re.compile(r"((?:^|[._])adapters|(?:^|\.)shared_parameters)\.([^.]+)\.")
_INVERTIBLE = re.compile(r"(?:^|\.)invertible_adapters\.")
_DOWN = re.compile(r"\.adapter_down\.\d\.weight$")


@dataclass(frozen=True, eq=False)
class Bottleneck:
    """A bottleneck adapter: its architecture, the model that it was trained on, and its tensors.

    Attributes:
        label: what messages and receipts call it.
        name: its own name, a part of the names of its tensors.
        architecture: its config as adapters 1.3.0 writes it, every option included.
        model: hidden_size, model_class, model_name and model_type of the model.
        stored: its weight file.
        tensors: name as adapters 1.3.0 spells it → name in the file.
        head: the files of the prediction head that lies beside it, by name; mostly none.

    """

    label: str
    name: str
    architecture: Mapping[str, Any]
    model: Mapping[str, Any]
    stored: StoredCheckpoint
    tensors: Mapping[str, str]
    head: Mapping[str, Path]

    @property
    def is_invertible(self) -> bool:
        """Tell whether it has an invertible adapter behind the embeddings, as language adapters of MAD-X have."""
        return is_invertible(self.architecture)

    def called(self, name: str) -> Composed:
        """Give its tensors as a checkpoint, under the names that they have in an adapter of this name."""
        nodes = {_named(key, name): self.stored.node(own) for key, own in self.tensors.items()}
        return Composed(self.label, nodes, Companions(form=Form(WEIGHTS, library=LIBRARY)))

    def config_text(self, name: str) -> str:
        """Write its adapter_config.json, for an adapter of this name."""
        found = {**self.model, "config": dict(self.architecture), "name": name, "version": VERSION}
        return json.dumps(found, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def open_bottleneck(
    reference: str | Path, *, revision: str | None = None, label: str | None = None, weights: bool = True
) -> Bottleneck:
    """Open a folder, or a Hub id `ORG/NAME[@REVISION]`, with a bottleneck adapter, by config and header alone.

    With `weights=False` only the header of what is on the Hub is fetched, where its file has one.

    >>> swahili = open_bottleneck("examples/adapters/bert-swahili")
    >>> swahili.name, swahili.is_invertible, swahili.architecture["reduction_factor"], swahili.model["hidden_size"]
    ('swahili', True, 2, 16)

    Raises CheckpointError, with every mistake found, where there is none, or where config and weights do not agree.
    """
    found = locate(reference, revision, hub.BOTTLENECK, "save_adapter of the library adapters", _HEAD, weights=weights)
    label, path = label or str(reference), found.path
    config = read_json(path / CONFIG)
    mistakes = [Mistake(str(path / CONFIG), what, hint) for what, hint in refusals(config)]
    file = None if mistakes else found.weights(hub.BOTTLENECK)
    if not mistakes and file is None:
        names = " or ".join(name for name, _ in hub.BOTTLENECK)
        mistakes.append(Mistake(str(path), f"holds no {names}", _AGAIN))
    if mistakes or file is None:
        raise CheckpointError.of(mistakes)
    stored = StoredCheckpoint(label, [file], Companions(), found.revision, found.repository)
    tensors = {_current_spelling(own): own for own in stored.specs}
    architecture = current(config, has_invertible=any(map(_INVERTIBLE.search, tensors)))
    mistakes = [Mistake(str(file.path), *one) for one in _disagreements(config, architecture, stored, tensors)]
    if mistakes:
        raise CheckpointError.of(mistakes)
    has_head = (path / _HEAD_CONFIG).is_file()
    head = {n: places.refuse_link(path / n, path) for n in _HEAD if has_head and (path / n).is_file()}
    model = {key: config.get(key) for key in _MODEL}
    return Bottleneck(label, config["name"], architecture, model, stored, tensors, head)


def _current_spelling(name: str) -> str:
    """Spell a name as adapters does today.

    >>> _current_spelling("bert.encoder.layer.0.output.layer_text_task_adapters.sst.adapter_up.weight")
    'bert.encoder.layer.0.output.adapters.sst.adapter_up.weight'
    """
    for old, new in _SPELLINGS.items():
        name = name.replace(old, new)
    return name


def _named(key: str, name: str) -> str:
    """Put another adapter's name into the name of a tensor.

    >>> _named("invertible_adapters.swahili.F.0.weight", "quechua")
    'invertible_adapters.quechua.F.0.weight'
    """
    return _OWN.sub(lambda found: f"{found[1]}.{name}.", key, count=1)


def module_of(key: str) -> str:
    """Give the module that an adapter stands at: what precedes its own part of a tensor's name.

    >>> module_of("encoder.layer.3.output.adapters.sst.adapter_up.weight"), module_of("invertible_adapters.sw.F.0.bias")
    ('encoder.layer.3.output', 'invertible_adapters')
    """
    found = _OWN.search(key)
    assert found is not None, key
    start = found.start() if found[1] == ".adapters" else found.end(1)
    return key[:start]


def _disagreements(
    config: Mapping[str, Any], architecture: Mapping[str, Any], stored: StoredCheckpoint, tensors: Mapping[str, str]
) -> Iterator[tuple[str, str]]:
    """Compare the weight file with the config: what is wrong, and a hint."""
    name = config["name"]
    holders = {key: found[2] if (found := _OWN.search(key)) else None for key in tensors}
    others = sorted({holder for holder in holders.values() if holder not in (None, name)})
    if len(tensors) < len(stored.specs):
        yield "holds tensors whose names fall together as adapters 1.3.0 spells them", "save it again with adapters"
    if others:
        yield f"holds the tensors of {some(others)}, its config is that of {name!r}", "they come from different saves"
    strangers = [key for key, holder in holders.items() if holder is None]
    if strangers:
        yield f"{len(strangers)} tensors belong to no bottleneck adapter: {some(strangers)}", _AGAIN
    own = [key for key, holder in holders.items() if holder == name]
    if not own and not others:
        yield f"holds no tensors of the adapter {name!r}", _AGAIN
    yield from _incomplete(own, architecture)
    if not architecture["phm_layer"]:
        yield from _of_other_width({key: stored.specs[tensors[key]].shape for key in own}, config, architecture)


def _incomplete(own: Sequence[str], architecture: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Find adapters with one projection, and what the config promises."""
    halves: dict[str, set[str]] = {}
    for key in own:
        for half in ("adapter_down", "adapter_up"):
            if f".{half}." in key:
                halves.setdefault(module_of(key), set()).add(half)
    for module, found in halves.items():
        if len(found) < len(("down", "up")):
            yield f"the adapter at {module} has only its {next(iter(found))}", _AGAIN
    has = any(map(_INVERTIBLE.search, own))
    if own and has != is_invertible(architecture):
        yield f"has {'an' if has else 'no'} invertible adapter, and its config says otherwise", _AGAIN


def _of_other_width(
    shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any], architecture: Mapping[str, Any]
) -> Iterator[tuple[str, str]]:
    """Compare the projections with reduction factor and hidden size."""
    hidden = config.get("hidden_size")
    for key, shape in shapes.items():
        if not _DOWN.search(key) or len(shape) != 2 or type(hidden) is not int or not 0 <= hidden < 1 << 31:
            continue
        expected = [(width(hidden, factor), hidden) for factor in _factors(architecture["reduction_factor"])]
        if shape not in expected:
            what = f"{key} is {list(shape)}; hidden_size {hidden} and reduction_factor make it {list(expected[0])}"
            yield what, "config and weights come from different saves"
            return


def _factors(reduction: Any) -> list[float]:
    return list(reduction.values()) if isinstance(reduction, Mapping) else [reduction]
