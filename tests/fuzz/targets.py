"""What is fuzzed: each target takes bytes, has the real code read them, and lets nothing pass but our own error.

A target gives whether the input was taken. Everything that it makes, messages too, must be showable text.
"""

from __future__ import annotations

import io
import json
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from portmanteau import merge
from portmanteau.compositions import compose, load, slices
from portmanteau.compositions.matching import is_tied
from portmanteau.compositions.slices import Slice
from portmanteau.merge import describe
from portmanteau.merge.companions import true_config, vocabulary
from portmanteau.merge.files import hub
from portmanteau.merge.shown import json_text

Target = Callable[[bytes], None]
_MOST_READ = 1 << 20


class World:
    """A folder in which targets write their input, beside models that recipes may name; no network behind it."""

    def __init__(self, folder: Path) -> None:
        """Write the models."""
        self.folder = folder
        (folder / "alone").mkdir()
        names = [f"model.layers.{i}.mlp.up_proj.weight" for i in range(4)]
        for name in ("a", "b", "base"):
            _write_model(folder / name, {**{one: [2, 2] for one in names}, "lm_head.weight": [4, 2]})
        _write_model(folder / "shards", {"x": [2]}, "one.safetensors")
        _write_model(folder / "shards", {"y": [3]}, "two.safetensors")
        _write_model(folder / "config", {**{one: [2, 2] for one in names}, "model.embed_tokens.weight": [4, 2]})
        factors = {
            f"base_model.model.model.layers.{i}.q_proj.lora_{end}.weight": [2, 2] for i in (0, 1) for end in "AB"
        }
        _write_model(folder / "adapter", factors, "adapter_model.safetensors")
        ends = ("down.0.weight", "down.0.bias", "up.weight", "up.bias")
        halves = {f"encoder.layer.0.output.adapters.task.adapter_{end}": [2] for end in ends}
        _write_model(folder / "bottleneck", halves, "adapter.safetensors")
        hub.download = _offline  # type: ignore[assignment]

    @property
    def targets(self) -> dict[str, Target]:
        """Every target by its name."""
        return {
            "header": self.header,
            "index": self.index,
            "recipe": self.recipe,
            "mergekit": self.recipe,
            "adapter": self.adapter,
            "config": self.config,
            "diff": self.diff,
        }

    def header(self, raw: bytes) -> None:
        """Read a safetensors file: the bytes as they are, or as a header in front of data of the right size."""
        path = self.folder / "alone" / "x.safetensors"
        path.write_bytes(raw[1:] if raw[:1] == b"\0" else _with_data(raw[1:]))
        opened = _only_ours(lambda: merge.open(path))
        if opened is None:
            return
        for name, spec in opened.specs.items():
            if spec.nbytes <= _MOST_READ:
                opened.read_into(name, memoryview(bytearray(spec.nbytes)))
        _shown(describe.checkpoint(opened, tensors=True))
        _only_ours(lambda: merge.open_sparse(path))

    def index(self, raw: bytes) -> None:
        """Read a folder of shards with this index."""
        (self.folder / "shards" / "model.safetensors.index.json").write_bytes(raw)
        _only_ours(lambda: merge.open(self.folder / "shards"))

    def recipe(self, raw: bytes) -> None:
        """Plan a recipe, native or mergekit's."""
        path = self.folder / "recipe.yaml"
        path.write_bytes(raw)
        recipe = _only_ours(lambda: load(path))
        if recipe is not None:
            made = _only_ours(lambda: merge.make_plan(compose(recipe), recipe.output.dtype))
            if made is not None:
                _shown(describe.plan(made, 0))

    def adapter(self, raw: bytes) -> None:
        """Open a LoRA and a bottleneck adapter with this config."""
        for name, opener in (("adapter", merge.open_adapter), ("bottleneck", merge.open_bottleneck)):
            (self.folder / name / "adapter_config.json").write_bytes(raw)
            _only_ours(lambda name=name, opener=opener: opener(self.folder / name))

    def config(self, raw: bytes) -> None:
        """Open a model with this config and this tokenizer, and do what compositions do with them."""
        for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
            (self.folder / "config" / name).write_bytes(raw)
        opened = _only_ours(lambda: merge.open(self.folder / "config"))
        if opened is None:
            return
        beside = opened.companions
        _shown(true_config(beside.config or {}, opened.specs.values()))
        _only_ours(lambda: is_tied(opened))
        _only_ours(lambda: vocabulary(beside))
        _only_ours(lambda: beside.chat_template)
        _only_ours(lambda: slices(parts=[Slice({"m": opened}, layers=(0, 2))]))

    def diff(self, raw: bytes) -> None:
        """Read a PyTorch file, as weights and as a sparse fine-tune: the bytes as they are, or as a zip's pickle."""
        path = self.folder / "alone" / "pytorch_diff.bin"
        path.write_bytes(raw[1:] if raw[:1] == b"\0" else _zipped(raw[1:]))
        opened = _only_ours(lambda: merge.open(path))
        for name, spec in opened.specs.items() if opened is not None else ():
            if spec.nbytes <= _MOST_READ:
                opened.read_into(name, memoryview(bytearray(spec.nbytes)))
        found = _only_ours(lambda: merge.open_sparse(path))
        if found is not None:
            for name in found.shapes:
                positions = found.indices(name).output.entries
                assert positions == found.values(name).output.entries


def _only_ours(act: Callable[[], Any]) -> Any:
    """Do something; where it fails with our own error, look at its message and give None."""
    try:
        return act()
    except merge.PortmanteauError as error:
        text = str(error)
    assert text
    assert all(sign.isprintable() or sign == "\n" for sign in text), repr(text)
    return None


def _shown(value: Any) -> None:
    text = json_text(value, indent=1, default=str)
    assert all(sign.isprintable() or sign == "\n" for sign in text), repr(text)
    text.encode()


def _offline(repository: str, *_: Any) -> Path:
    raise merge.CheckpointError(repository, "not in the local cache, and the Hub cannot be reached")


def _with_data(header: bytes) -> bytes:
    try:
        ends = [int(entry["data_offsets"][1]) for entry in json.loads(header).values() if "data_offsets" in entry]
    except Exception:  # no header: then nothing follows it
        ends = []
    return struct.pack("<Q", len(header)) + header + bytes(max(0, min(max(ends, default=0), _MOST_READ)))


def _zipped(pickle: bytes) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        archive.writestr("archive/data.pkl", pickle)
        archive.writestr("archive/byteorder", b"little")
        for key in range(4):
            archive.writestr(f"archive/data/{key}", bytes(64))
    return made.getvalue()


def _write_model(folder: Path, shapes: dict[str, list[int]], name: str = "model.safetensors") -> None:
    folder.mkdir(exist_ok=True)
    header: dict[str, Any] = {}
    end = 0
    for tensor, shape in shapes.items():
        begin, end = end, end + 4 * shape[0] * (shape[1] if len(shape) > 1 else 1)
        header[tensor] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}
    raw = json.dumps(header).encode()
    (folder / name).write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(end))
