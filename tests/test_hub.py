"""Hub references, against a small Hub on this machine: what is downloaded, which revision, and what happens offline."""

from __future__ import annotations

import hashlib
import json
import re
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save

from tests.local_hub import Answers, serving, surroundings

MAIN, OLD = "a" * 40, "b" * 40  # commits
Files = Mapping[str, bytes]

NO_CONFIG = "the result has no config.json, since the models have none: transformers will not load it"


def weights(**values: float) -> bytes:
    return save({name: torch.tensor([float(value)]) for name, value in values.items()})


def index(**places: str) -> bytes:
    return json.dumps({"weight_map": places}).encode()


CARD = {"README.md": b"---\nlicense: mit\n---\n"}
COMPANIONS = {
    "config.json": b'{"model_type": "llama"}',
    "tokenizer.json": b"{}",
    "tokenizer.model": b"sentencepiece",
    "chat_template.jinja": b"{{ messages }}",
    "additional_chat_templates/tool.jinja": b"{{ tools }}",
    "modeling_own.py": b"pass",
    "LICENSE": b"free",
}
BALLAST = {
    "original/consolidated.00.pth": b"huge",
    "original/params.json": b"{}",
    "original/tokenizer.model": b"huge",
    "consolidated.safetensors": b"huge",
    "onnx/model.onnx": b"huge",
    "onnx/config.json": b"{}",
    "tf_model.h5": b"huge",
    "optimizer.pt": b"huge",
    ".gitattributes": b"",
}
BOTTLENECK = Path(__file__).parent / "oracles" / "fixtures" / "adapters_1_3_0" / "task"
REPOSITORIES: dict[str, dict[str, Files]] = {
    "org/both": {
        MAIN: {**COMPANIONS, **CARD, **BALLAST, "model.safetensors": weights(x=1), "pytorch_model.bin": b"huge"}
    },
    "org/shards": {
        MAIN: {
            **COMPANIONS,
            "model.safetensors.index.json": index(x="model-00001-of-00002.safetensors", y="rest.safetensors"),
            "model-00001-of-00002.safetensors": weights(x=1),
            "rest.safetensors": weights(y=2),
            "model-00001-of-00002.fp16.safetensors": b"huge",
            "pytorch_model.bin.index.json": index(x="pytorch_model-00001-of-00001.bin"),
            "pytorch_model-00001-of-00001.bin": b"huge",
        }
    },
    "org/versions": {MAIN: {"model.safetensors": weights(x=2)}, OLD: {"model.safetensors": weights(x=1)}},
    "org/odd-name": {
        MAIN: {"weights.safetensors": weights(x=3), "training_args.bin": b"huge", "optimizer.pt": b"huge"}
    },
    "org/adapter": {MAIN: {"adapter_config.json": b"{}", "adapter_model.safetensors": weights(x=1)}},
    "org/lora": {
        MAIN: {
            "adapter_config.json": b'{"peft_type": "LORA", "r": 1, "lora_alpha": 2}',
            "adapter_model.safetensors": weights(**{"q.lora_A.weight": 1, "q.lora_B.weight": 2}),
            "adapter_model.bin": b"huge",
            "model.safetensors": b"huge",
            "tokenizer.json": b"{}",
        }
    },
    "org/bottleneck": {
        MAIN: {
            **{path.name: path.read_bytes() for path in BOTTLENECK.iterdir()},
            "pytorch_model.bin": b"huge",
        }
    },
    "org/long": {MAIN: {**COMPANIONS, "model.safetensors": weights(**{f"{'x' * 90}.{i}": i for i in range(900)})}},
    "org/no-ranges": {MAIN: {**COMPANIONS, "model.safetensors": weights(x=4)}},
    "org/cut": {
        MAIN: {
            "model.safetensors.index.json": index(x="one.safetensors", y="two.safetensors"),
            "one.safetensors": weights(x=1)[:-1],
            "two.safetensors": weights(y=1)[:-2],
        }
    },
    "org/empty": {MAIN: {"README.md": b"# nothing"}},
}
REFERENCES = {"main": MAIN, "old": OLD}  # branches and tags


@dataclass
class Hub:
    """A server that knows a few repositories, and what it was asked for."""

    endpoint: str
    home: Path
    requests: list[str] = field(default_factory=list)
    ranges: list[str] = field(default_factory=list)

    @property
    def downloaded(self) -> set[str]:
        """The files whose content was asked for."""
        found = [request.removeprefix("GET ") for request in self.requests if request.startswith("GET /org/")]
        files = [path.split("/resolve/")[1].partition("/")[2] for path in found]
        for ranged in (request.partition(" ")[0] for request in self.ranges):
            files.remove(ranged)
        return set(files)

    def open(
        self, reference: str, *, revision: str | None = None, client: str = "", **environment: str
    ) -> dict[str, Any]:
        """Open a reference in a process of its own, as a user would: huggingface_hub reads its settings once."""
        run = [sys.executable, "-W", "error", "-c", client or CLIENT, reference, *([revision] if revision else [])]
        found: dict[str, Any] = json.loads(self.run(run, **environment))
        return found

    def run(self, command: list[str], *, status: int = 0, **environment: str) -> str:
        """Run a command against this Hub; give its stdout, or the stderr of one that is to fail."""
        around = {**surroundings(self.endpoint, self.home), **environment}
        done = subprocess.run(command, env=around, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == status, done.stderr
        return done.stderr if status else done.stdout


CLIENT = """
import json, struct, sys
from portmanteau import merge
try:
    opened = merge.open(sys.argv[1], revision=sys.argv[2] if len(sys.argv) > 2 else None)
except merge.CheckpointError as error:
    print(json.dumps({"error": str(error)}))
else:
    values = {}
    for name in opened:
        raw = bytearray(4)
        opened.read_into(name, memoryview(raw))
        values[name] = struct.unpack("<f", raw)[0]
    files = sorted(opened.companions.files)
    print(json.dumps({"values": values, "revision": opened.revision, "companions": files}))
"""


ADAPTER_CLIENT = """
import json, sys
from portmanteau import merge
found = merge.open_adapter(sys.argv[1])
print(json.dumps({"label": found.label, "repository": found.stored.repository, "revision": found.stored.revision}))
"""

BOTTLENECK_CLIENT = """
import json, sys
from portmanteau import merge
found = merge.open_bottleneck(sys.argv[1])
about = {"label": found.label, "repository": found.stored.repository, "revision": found.stored.revision}
print(json.dumps(about | {"tensors": len(found.tensors), "head": sorted(found.head)}))
"""


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    """A Hub on 127.0.0.1, with an empty cache."""
    with serving(Handler, lambda address: Hub(address, tmp_path / "hf")) as found:
        yield found


class Handler(Answers):
    """The part of the Hub's protocol that a download needs."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = self.path.partition("?")[0]
        self.server.hub.requests.append(f"{self.command} {path}")  # type: ignore[attr-defined]
        parts = path.removeprefix("/api/models").strip("/").split("/")
        versions = REPOSITORIES.get("/".join(parts[:2]))
        if versions is None:
            return self.send(404, b"{}", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
        commit = REFERENCES.get(parts[3], parts[3]) if len(parts) > 3 else MAIN
        files = versions.get(commit)
        if files is None:
            return self.send(404, b"{}", {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "Invalid rev id"})
        if path.startswith("/api/models/"):
            listing = [{"type": "file", "path": n, "size": len(b), "oid": _oid(b)} for n, b in files.items()]
            info = {"id": "/".join(parts[:2]), "sha": commit, "siblings": [{"rfilename": n} for n in files]}
            is_tree = len(parts) > 2 and parts[2] == "tree"
            return self.send(200, json.dumps(listing if is_tree else info).encode(), {})
        content = files.get("/".join(parts[4:]))
        if content is None:
            return self.send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        about = {"ETag": f'"{_oid(content)}"', "X-Repo-Commit": commit}
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if asked is None or "org/no-ranges" in path:
            return self.send(200, content, about)
        part = content[int(asked[1]) : int(asked[2]) + 1]
        self.server.hub.ranges.append(f"{path.rpartition('/')[2]} {asked[0]}")  # type: ignore[attr-defined]
        about["Content-Range"] = f"bytes {asked[1]}-{int(asked[1]) + len(part) - 1}/{len(content)}"
        return self.send(206, part, about)


def _oid(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


def test_only_the_files_that_a_merge_needs_are_downloaded(hub: Hub) -> None:
    found = hub.open("org/both")
    assert found["values"] == {"x": 1.0}
    assert hub.downloaded == {"model.safetensors", *COMPANIONS, *CARD}
    assert found["companions"] == sorted(set(COMPANIONS) - {"config.json"})


def test_the_shards_are_those_that_the_index_names(hub: Hub) -> None:
    assert hub.open("org/shards")["values"] == {"x": 1.0, "y": 2.0}
    shards = {"model-00001-of-00002.safetensors", "rest.safetensors", "model.safetensors.index.json"}
    assert hub.downloaded == {*shards, *COMPANIONS}


def test_a_lone_file_of_any_name_is_downloaded_without_a_trainers_files(hub: Hub) -> None:
    assert hub.open("org/odd-name")["values"] == {"x": 3.0}
    assert hub.downloaded == {"weights.safetensors"}


@pytest.mark.parametrize("written", [("org/versions@old", None), ("org/versions", OLD)])
def test_the_revision_is_honoured_and_kept_as_a_commit(written: tuple[str, str | None], hub: Hub) -> None:
    found = hub.open(written[0], revision=written[1])
    assert (found["values"], found["revision"]) == ({"x": 1.0}, OLD)
    assert hub.open("org/versions")["values"] == {"x": 2.0}


@pytest.mark.parametrize("reference", ["org/both", "org/shards"])
def test_what_is_cached_opens_offline_without_a_request(reference: str, hub: Hub) -> None:
    first = hub.open(reference)
    hub.requests.clear()
    assert hub.open(reference, HF_HUB_OFFLINE="1") == first
    assert hub.requests == []


def test_what_is_cached_opens_when_the_hub_cannot_be_reached(hub: Hub) -> None:
    first = hub.open("org/both")
    assert hub.open("org/both", HF_ENDPOINT=closed_port()) == first


@pytest.mark.skipif(
    not hasattr(huggingface_hub, "get_cached_repo_tree"), reason="an older huggingface_hub keeps no list of files"
)
def test_a_download_that_was_cut_short_is_noticed_offline(hub: Hub) -> None:
    hub.open("org/shards")
    for path in (hub.home / "hub").rglob("snapshots/*/tokenizer.json"):
        path.unlink()
    message = hub.open("org/shards", HF_HUB_OFFLINE="1")["error"]
    assert "org/shards: not in the local cache" in message


def test_what_is_not_cached_says_so_offline(hub: Hub) -> None:
    message = hub.open("org/both", HF_HUB_OFFLINE="1")["error"]
    assert message.startswith("org/both: not in the local cache, and the Hub cannot be reached")
    assert "hint: check the network, or download it first on a machine that has one: hf download org/both" in message
    assert hub.requests == []


def test_an_unknown_repository_is_named(hub: Hub) -> None:
    message = hub.open("org/nothing")["error"]
    assert message.startswith("org/nothing: no such model on the Hub, or no right to read it")
    assert "hint: check the spelling" in message


def test_an_unknown_revision_is_named(hub: Hub) -> None:
    message = hub.open("org/versions@nowhere")["error"]
    assert message.startswith("org/versions@nowhere: the model has no revision 'nowhere'")


def test_no_network_is_a_clear_message(hub: Hub) -> None:
    message = hub.open("org/both", HF_ENDPOINT=closed_port())["error"]
    assert message.startswith("org/both: not in the local cache, and the Hub cannot be reached")


def test_a_repository_without_weights_is_named(hub: Hub) -> None:
    assert "holds no weights" in hub.open("org/empty")["error"]


def test_an_adapter_is_no_model(hub: Hub) -> None:
    assert "holds an adapter, not a model" in hub.open("org/adapter")["error"]


def closed_port() -> str:
    """Give an endpoint where nobody listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


def test_of_an_adapter_only_config_and_weights_are_downloaded(hub: Hub) -> None:
    found = hub.open("org/lora", client=ADAPTER_CLIENT)
    assert found == {"label": "org/lora", "repository": "org/lora", "revision": MAIN}
    assert hub.downloaded == {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"}
    assert hub.open("org/lora", client=ADAPTER_CLIENT, HF_HUB_OFFLINE="1") == found


def test_of_a_bottleneck_adapter_the_head_is_downloaded_too(hub: Hub) -> None:
    found = hub.open("org/bottleneck@main", client=BOTTLENECK_CLIENT)
    head = ["head_config.json", "pytorch_model_head.bin"]
    about = {"label": "org/bottleneck@main", "repository": "org/bottleneck", "revision": MAIN}
    assert found == about | {"tensors": 16, "head": head}
    assert hub.downloaded == {"adapter_config.json", "pytorch_adapter.bin", *head}
    assert hub.open("org/bottleneck@main", client=BOTTLENECK_CLIENT, HF_HUB_OFFLINE="1") == found


GLANCE = """
import json, sys
from portmanteau import merge
try:
    found = merge.open(sys.argv[1], weights=False)
    try:
        found.read_into(next(iter(found)), memoryview(bytearray(4)))
        read = "read"
    except merge.CheckpointError as error:
        read = str(error)
    shapes = {name: [spec.dtype, *spec.shape] for name, spec in found.specs.items()}
    beside = found.companions
    about = {"revision": found.revision, "companions": sorted(beside.files), "config": beside.config}
    print(json.dumps({"specs": shapes, "read": read, "bytes": found.bytes_to_download, **about}, default=dict))
except merge.CheckpointError as error:
    print(json.dumps({"error": str(error)}))
"""


def test_headers_alone_are_fetched_by_range_and_tell_all_that_a_plan_needs(hub: Hub) -> None:
    found = hub.open("org/shards", client=GLANCE)
    assert found["specs"] == {"x": ["F32", 1], "y": ["F32", 1]}
    assert found["config"] == {"model_type": "llama"}
    assert found["companions"] == sorted(set(COMPANIONS) - {"config.json"})
    assert found["revision"] == MAIN
    assert found["bytes"] == len(weights(x=1)) + len(weights(y=2))
    assert "x: is on the Hub: only the header was read" in found["read"]
    assert hub.downloaded == {"model.safetensors.index.json", *COMPANIONS}
    assert sorted(hub.ranges) == [
        f"{n} bytes=0-99999" for n in ("model-00001-of-00002.safetensors", "rest.safetensors")
    ]


def test_a_header_longer_than_the_first_range_takes_a_second_one(hub: Hub) -> None:
    raw = REPOSITORIES["org/long"][MAIN]["model.safetensors"]
    length = int.from_bytes(raw[:8], "little")
    assert length > 100_000
    assert len(hub.open("org/long", client=GLANCE)["specs"]) == 900
    assert hub.ranges == ["model.safetensors bytes=0-99999", f"model.safetensors bytes=100000-{length + 7}"]


def test_a_server_without_ranges_is_cut_short_and_serves(hub: Hub) -> None:
    found = hub.open("org/no-ranges", client=GLANCE)
    assert (found["specs"], found["bytes"]) == ({"x": ["F32", 1]}, len(weights(x=4)))


def test_what_is_cached_is_opened_from_the_cache(hub: Hub) -> None:
    hub.open("org/shards")
    hub.requests.clear()
    found = hub.open("org/shards", client=GLANCE)
    assert (found["read"], found["bytes"], hub.ranges) == ("read", 0, [])
    assert hub.downloaded == set()
    assert hub.open("org/shards", client=GLANCE, HF_HUB_OFFLINE="1") == found


def test_every_shard_on_the_hub_whose_size_its_header_contradicts_is_named(hub: Hub) -> None:
    message = hub.open("org/cut", client=GLANCE)["error"]
    assert "org/cut/one.safetensors: not a whole safetensors file (4 bytes of data promised, 3 are there)" in message
    assert "org/cut/two.safetensors: not a whole safetensors file (4 bytes of data promised, 2 are there)" in message


def command(*arguments: str | Path) -> list[str]:
    code = "import sys; from portmanteau.cli import main; sys.argv[0] = 'portmanteau'; main()"
    return [sys.executable, "-W", "error", "-c", code, *map(str, arguments)]


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """Write a recipe over two models of the Hub."""
    path = tmp_path / "recipe.yaml"
    path.write_text("merge: {linear: {models: [org/versions, org/versions@old]}}\n")
    return path


def test_check_and_plan_of_hub_models_download_no_weights_and_build_does(
    hub: Hub, recipe: Path, tmp_path: Path
) -> None:
    size = len(weights(x=1)) + len(weights(x=2))
    found = json.loads(hub.run(command("check", recipe, tmp_path / "out", "--json")))
    assert found == {"tensors": 1, "bytes": 4, "bytes_to_download": size, "notes": [NO_CONFIG]}
    assert f"downloads {size} B first" in hub.run(command("plan", recipe))
    assert hub.downloaded == set()
    assert "1 tensors, 1 entries" in hub.run(command("inspect", "org/versions"))
    assert hub.downloaded == set()
    hub.run(command("build", recipe, tmp_path / "out"))
    assert hub.downloaded == {"model.safetensors"}
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as made:
        assert made.get_tensor("x").tolist() == [1.5]


def test_what_is_wrong_with_hub_models_is_said_before_anything_is_downloaded(hub: Hub, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("merge: {linear: {models: [org/cut, org/nothing, org/versions]}}\n")
    (tmp_path / "out").mkdir()
    message = hub.run(command("build", path, tmp_path / "out"), status=1)
    for part in ("one.safetensors: not a whole", "two.safetensors: not a whole", "no such model", "exists already"):
        assert part in message
    assert "one.safetensors" not in hub.downloaded


def test_of_an_adapter_on_the_hub_only_the_header_is_fetched_to_plan(
    hub: Hub, save_tensors: Any, tmp_path: Path
) -> None:
    save_tensors("base", {"q.weight": torch.ones(1, 1)})
    path = tmp_path / "recipe.yaml"
    path.write_text("merge: {lora: {base: base, adapters: [org/lora]}}\n")
    message = hub.run(command("check", path), status=1)  # its factors are vectors here: what matters is what was asked
    assert "shape" in message or "lora" in message
    assert hub.downloaded == {"adapter_config.json", "tokenizer.json"}


def test_nothing_is_asked_of_a_network_where_no_reference_names_the_hub(
    hub: Hub, save_tensors: Any, tmp_path: Path
) -> None:
    for name in ("a", "b"):
        save_tensors(name, {"x": torch.ones(2)})
    path = tmp_path / "recipe.yaml"
    path.write_text("merge: {linear: {models: [a, ./b]}}\n")
    blocked = "import socket\ndef refuse(*_): raise AssertionError('a connection')\nsocket.socket.connect = refuse\n"
    for words in (["check", path], ["build", path, tmp_path / "out"], ["inspect", tmp_path / "a"]):
        run = command(*words)
        run[run.index("-c") + 1] = blocked + run[run.index("-c") + 1]
        hub.run(run)
    assert hub.requests == []


def test_the_cache_must_have_room_for_what_is_to_be_downloaded(hub: Hub, recipe: Path) -> None:
    run = command("check", recipe)
    full = "import shutil, types\nshutil.disk_usage = lambda _: types.SimpleNamespace(free=10)\n"
    run[run.index("-c") + 1] = full + run[run.index("-c") + 1]
    size = len(weights(x=1)) + len(weights(x=2))
    assert f"the Hub's cache needs {size} B more, and has 10 B free" in hub.run(run, status=1)
