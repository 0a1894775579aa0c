"""Publishing on the Hub, against a small Hub on this machine: what is checked, what goes up, what the card says."""

from __future__ import annotations

import base64
import hashlib
import json
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.numpy import load_file
from torch import Tensor

from portmanteau import compositions, merge
from portmanteau.merge import receipt
from tests.local_hub import Answers, serving, surroundings

Save = Callable[[str, Mapping[str, Tensor]], Path]
COMMIT = "c" * 40
ME: dict[str, Any] = {
    "type": "user",
    "name": "me",
    "orgs": [{"name": "lab", "roleInOrg": "write"}, {"name": "others", "roleInOrg": "read"}],
    "auth": {"accessToken": {"role": "write"}},
}
WARNINGS = ("-W", "error", "-W", "ignore:Use 'content:DeprecationWarning")  # httpx2 at huggingface_hub 2.4's uploads
PROGRAM = "from portmanteau.cli import main; main()"


@dataclass
class Repository:
    private: bool
    files: dict[str, bytes] = field(default_factory=dict)


@dataclass
class Hub:
    """A server with repositories, and what it was asked for."""

    home: Path
    endpoint: str = ""
    me: dict[str, Any] = field(default_factory=lambda: ME)
    repositories: dict[str, Repository] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    refuses: bool = False

    def run(self, *words: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run the command line in a process of its own, as a user would, with a token."""
        return subprocess.run(
            [sys.executable, *WARNINGS, "-c", PROGRAM, *map(str, words)],
            env={**surroundings(self.endpoint, self.home), "HF_TOKEN": "hf_good", **environment},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
            cwd=cwd,
        )


class Handler(Answers):
    """The part of the Hub's protocol that an upload needs."""

    def do_GET(self) -> None:
        self._answer(b"")

    def do_POST(self) -> None:
        self._answer(self.rfile.read(int(self.headers.get("Content-Length") or 0)))

    def do_PUT(self) -> None:
        self._answer(self.rfile.read(int(self.headers["Content-Length"])))

    def _answer(self, content: bytes) -> None:
        hub: Hub = self.server.hub  # type: ignore[attr-defined]
        path = self.path.partition("?")[0]
        hub.requests.append(f"{self.command} {path}")
        if self.headers.get("Authorization") == "Bearer hf_bad":
            return self._send(401, {"error": "Invalid credentials in Authorization header"})
        if path == "/api/whoami-v2":
            return self._send(200, hub.me)
        if path == "/api/repos/create":
            return self._create(hub, json.loads(content))
        if path == "/api/validate-yaml":  # the model card's front matter
            return self._send(200, {"errors": [], "warnings": []})
        if path.startswith("/objects/"):
            hub.objects[path.removeprefix("/objects/")] = content
            return self._send(200, {})
        if path.endswith("/info/lfs/objects/batch"):
            return self._batch(hub, json.loads(content))
        name = "/".join(path.removeprefix("/api/models/").split("/")[:2])
        repository = hub.repositories.get(name)
        if repository is None:
            return self._send(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        rest = path.removeprefix(f"/api/models/{name}")
        if rest.startswith("/preupload/"):
            return self._preupload(json.loads(content))
        if rest.startswith("/commit/"):
            return self._commit(hub, name, [json.loads(line) for line in content.splitlines()])
        if rest.startswith("/tree/"):
            files = [{"type": "file", "path": n, "size": len(b), "oid": "0"} for n, b in repository.files.items()]
            return self._send(200, files)
        siblings = [{"rfilename": file} for file in repository.files]
        self._send(200, {"id": name, "sha": COMMIT, "private": repository.private, "siblings": siblings})

    def _create(self, hub: Hub, asked: Mapping[str, Any]) -> None:
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        private = asked.get("private", asked.get("visibility") == "private")
        status = 409 if name in hub.repositories else 200
        hub.repositories.setdefault(name, Repository(private))
        self._send(status, {"url": f"{hub.endpoint}/{name}", "id": name})

    def _preupload(self, asked: Mapping[str, Any]) -> None:
        modes = {file["path"]: "lfs" if file["path"].endswith(".safetensors") else "regular" for file in asked["files"]}
        self._send(200, {"files": [{"path": n, "uploadMode": m, "shouldIgnore": False} for n, m in modes.items()]})

    def _batch(self, hub: Hub, asked: Mapping[str, Any]) -> None:
        objects = [
            {**one, "actions": {"upload": {"href": f"{hub.endpoint}/objects/{one['oid']}"}}} for one in asked["objects"]
        ]
        self._send(200, {"transfer": "basic", "objects": objects})

    def _commit(self, hub: Hub, name: str, lines: list[dict[str, Any]]) -> None:
        repository = hub.repositories[name]
        if hub.refuses:
            return self._send(403, {"error": "You have read access but not the required permissions"})
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                repository.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                repository.files[value["path"]] = hub.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del repository.files[value["path"]]
        self._send(200, {"commitUrl": f"{hub.endpoint}/{name}/commit/{COMMIT}", "commitOid": COMMIT, "success": True})

    def _send(self, status: int, value: object, headers: Mapping[str, str] | None = None) -> None:
        self.send(status, json.dumps(value).encode(), headers or {})


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    """A Hub on 127.0.0.1."""
    with serving(Handler, lambda address: Hub(tmp_path / "hf", address)) as found:
        yield found


@pytest.fixture
def recipe(tmp_path: Path, save_tensors: Callable[[str, Mapping[str, Tensor]], Path]) -> Path:
    """The mean of two models."""
    for name, value in (("math", 1.0), ("swahili", 2.0)):
        save_tensors(name, {"weight": torch.full((2,), value)})
    path = tmp_path / "mean.yaml"
    path.write_text("merge: {linear: {models: [./math, ./swahili]}}\n")
    return path


def test_build_publishes_privately_all_that_it_made(hub: Hub, recipe: Path) -> None:
    done = hub.run("build", recipe, "out", "--push", "lab/mean", cwd=recipe.parent)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert done.stderr.splitlines()[-1] == f"published: {hub.endpoint}/lab/mean"
    found, out = hub.repositories["lab/mean"], recipe.parent / "out"
    assert found.private
    assert found.files == {path.name: path.read_bytes() for path in out.iterdir()}
    assert set(found.files) == {"model.safetensors", "README.md", "portmanteau.json"}
    assert set(hub.objects) == {hashlib.sha256(found.files["model.safetensors"]).hexdigest()}


def test_push_publishes_what_was_built_before_and_public_only_if_told(hub: Hub, recipe: Path) -> None:
    assert hub.run("build", recipe, "out", cwd=recipe.parent).returncode == 0
    assert hub.requests == []
    assert hub.run("push", "out", "me/mean", "--public", cwd=recipe.parent).returncode == 0
    assert not hub.repositories["me/mean"].private


def test_publishing_again_leaves_nothing_of_the_earlier_result(hub: Hub, recipe: Path) -> None:
    earlier = {"portmanteau.json": b"{}", "model-00001-of-00002.safetensors": b"old", ".gitattributes": b"lfs"}
    hub.repositories["me/mean"] = Repository(True, dict(earlier))
    assert hub.run("build", recipe, "out", "--push", "me/mean", cwd=recipe.parent).returncode == 0
    names = {"model.safetensors", "README.md", "portmanteau.json", ".gitattributes"}
    assert set(hub.repositories["me/mean"].files) == names


def closed_port() -> str:
    """Give an endpoint where nobody listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


LOG_IN = "`hf auth login`, or the variable HF_TOKEN; https://huggingface.co/settings/tokens makes one that may write"


@pytest.mark.parametrize(
    ("repository", "environment", "said"),
    [
        ("lab/mean", {"HF_TOKEN": ""}, f"lab/mean: there is no token for the Hub\n  hint: log in first: {LOG_IN}\n"),
        (
            "lab/mean",
            {"HF_TOKEN": "hf_bad"},
            f"lab/mean: the Hub does not accept the token\n  hint: log in anew: {LOG_IN}\n",
        ),
        (
            "others/mean",
            {},
            "others/mean: the token has no right to write in others\n  hint: it may write in: me, lab\n",
        ),
        (
            "strangers/mean",
            {},
            "strangers/mean: the token has no right to write in strangers\n  hint: it may write in: me, lab\n",
        ),
        (
            "mean",
            {},
            "mean: is no name of a repository\n  hint: write ORG/NAME, such as my-name/swahili-math\n",
        ),
        (
            "lab/mean",
            {"HF_HUB_OFFLINE": "1"},
            "lab/mean: cannot be published offline\n  hint: unset HF_HUB_OFFLINE\n",
        ),
        (
            "lab/taken",
            {},
            "lab/taken: holds what portmanteau did not build\n"
            "  hint: choose another name, or replace its files with --force; the Hub's history keeps them\n",
        ),
        (
            "lab/open",
            {},
            "lab/open: is public already\n  hint: add --public if the result is to be, or choose another name\n",
        ),
    ],
)
def test_what_stands_in_the_way_is_said_before_any_work(
    repository: str, environment: dict[str, str], said: str, hub: Hub, recipe: Path
) -> None:
    hub.repositories |= {"lab/taken": Repository(True, {"thesis.tex": b"years"}), "lab/open": Repository(False)}
    done = hub.run("build", recipe, "out", "--push", repository, cwd=recipe.parent, **environment)
    assert (done.returncode, done.stderr) == (1, said)
    assert not (recipe.parent / "out").exists()
    assert [request for request in hub.requests if not request.startswith("GET")] == []


def test_a_token_that_may_only_read_and_a_hub_out_of_reach_are_named(hub: Hub, recipe: Path) -> None:
    hub.me = {**ME, "auth": {"accessToken": {"role": "read"}}}
    done = hub.run("build", recipe, "out", "--push", "lab/mean", cwd=recipe.parent)
    assert done.stderr.startswith("lab/mean: the token may only read\n")
    done = hub.run("build", recipe, "out", "--push", "lab/mean", cwd=recipe.parent, HF_ENDPOINT=closed_port())
    assert done.stderr.startswith("lab/mean: the Hub cannot be reached (")
    assert not (recipe.parent / "out").exists()


def test_a_refusal_that_comes_late_leaves_the_result_on_disk_and_says_how_to_go_on(hub: Hub, recipe: Path) -> None:
    hub.refuses = True
    done = hub.run("build", recipe, "out", "--push", "lab/mean", cwd=recipe.parent)
    assert done.returncode == 1
    assert "lab/mean: the Hub refuses: You have read access but not the required permissions" in done.stderr
    assert (recipe.parent / "out" / "model.safetensors").exists()
    hub.refuses = False
    assert hub.run("push", "out", "lab/mean", cwd=recipe.parent).returncode == 0


def test_only_what_was_built_is_published(hub: Hub, recipe: Path) -> None:
    done = hub.run("push", "math", "lab/mean", cwd=recipe.parent)
    assert (done.returncode, done.stderr) == (
        1,
        "math: was not built by portmanteau\n  hint: a folder that `build` made holds portmanteau.json\n",
    )
    assert "lab/mean" not in hub.repositories


# ------------------------------------------------------------------------------------------------------ the model card


def front(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((folder / "README.md").read_text().split("---")[1])
    return found


def build(recipe: Path) -> dict[str, Any]:
    receipt = merge.build(compositions.compose(compositions.load(recipe)), recipe.parent / "out")
    return {"front": front(recipe.parent / "out"), "notes": receipt.notes}


def test_licence_and_task_of_parents_that_agree_are_carried(recipe: Path) -> None:
    card = "---\nlicense: other\nlicense_name: llama3\nlicense_link: LICENSE\npipeline_tag: text-generation\n---\n# x\n"
    for name in ("math", "swahili"):
        (recipe.parent / name / "README.md").write_text(card)
    made = build(recipe)
    assert made["front"] == {
        "license": "other",
        "license_name": "llama3",
        "license_link": "LICENSE",
        "pipeline_tag": "text-generation",
        "library_name": "transformers",
        "tags": ["merge", "portmanteau"],
    }
    assert made["notes"] == ()


@pytest.mark.parametrize(
    ("other", "shown"),
    [
        ("---\nlicense: mit\n---\n", "mit"),
        ("# no front matter\n", "not stated"),
        (None, "not stated"),
        ("---\nlicense: [1, 2]\n---\n", "not stated"),
        ("---\nlicense: 'mit | <script>'\n---\n", "not stated"),
        ("---\nlicense: &a [*a, *a]\n---\n", "not stated"),
        ("---\n" + "[" * 50_000 + "\n---\n", "not stated"),
        ("---\nlicense: !!python/object/apply:os.system ['touch hacked']\n---\n", "not stated"),
        ("---\nlicense: mit\n" + "x" * 100_000, "not stated"),
    ],
    ids=["another", "none", "no card", "a list", "markup", "aliases", "deep", "a tag", "endless"],
)
def test_licences_that_differ_are_noted_and_none_is_stated(other: str | None, shown: str, recipe: Path) -> None:
    (recipe.parent / "math" / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    if other is not None:
        (recipe.parent / "swahili" / "README.md").write_text(other)
    made = build(recipe)
    rest = "the result states none: look what each of them asks for"
    note = f"licences differ: ./math apache-2.0, ./swahili {shown}; {rest}"
    assert made["notes"] == (note,)
    assert "license" not in made["front"]
    assert note in (recipe.parent / "out" / "README.md").read_text()


def test_parents_on_the_hub_are_named_as_the_merge_widgets_read_them(recipe: Path) -> None:
    opened = [merge.open(recipe.parent / name) for name in ("math", "swahili")]
    parents = [
        merge.StoredCheckpoint(f"org/{one.folder.name}", one.files, one.companions, "c0ffee", f"org/{one.folder.name}")
        for one in opened
    ]
    merge.build(compositions.average(models=parents), recipe.parent / "out", recipe="merge: {average: …}")
    assert front(recipe.parent / "out") == {
        "base_model": ["org/math", "org/swahili"],
        "base_model_relation": "merge",
        "library_name": "transformers",
        "tags": ["merge", "portmanteau"],
    }
    text = (recipe.parent / "out" / "README.md").read_text()
    assert "| linear | org/math, org/swahili | 1 |" in text
    assert "````yaml\nmerge: {average: …}\n````" in text


# ----------------------------------------------------------------------------------------- the change from each parent


def card(hub: Hub, name: str = "me/mean") -> str:
    return hub.repositories[name].files["README.md"].decode()


def test_the_published_card_tells_the_change_from_each_parent(hub: Hub, recipe: Path) -> None:
    done = hub.run("build", recipe, "out", "--push", "me/mean", cwd=recipe.parent)
    assert done.returncode == 0, done.stderr
    # the mean of ones and twos: 0.5 from either, which is a half of the norm of the ones and a quarter of the twos'
    assert [line for line in card(hub).splitlines() if line.startswith("| ./")] == [
        "| ./math | 50 % | 100 % | 0.5 | 1 |",
        "| ./swahili | 25 % | 100 % | 0.5 | 1 |",
    ]
    assert "| parent | relative norm | entries changed | mean \\|δ\\| | tensors |\n" in card(hub)
    told = hub.run("build", recipe, "out", "--push", "me/mean", "--force", "--json", cwd=recipe.parent)
    assert json.loads(told.stdout)["changes"]["parents"][0]["relative_norm"] == 0.5
    assert card(hub).splitlines()[-1].startswith("`portmanteau.json` is the receipt")


def test_a_published_result_is_whole_up_to_date_and_made_again_with_its_card(hub: Hub, recipe: Path) -> None:
    assert hub.run("build", recipe, "out", "--push", "me/mean", cwd=recipe.parent).returncode == 0
    done = hub.run("verify", "out", "--rebuild", cwd=recipe.parent)
    assert (done.returncode, done.stdout.split(":")[1]) == (0, " whole, and the recipe gives these bits")
    assert "out: up to date" in hub.run("build", recipe, "out", cwd=recipe.parent).stderr
    first = card(hub)
    assert hub.run("push", "out", "me/mean", cwd=recipe.parent).returncode == 0
    assert card(hub) == first
    assert sorted(path.name for path in recipe.parent.iterdir() if path.name.startswith(".")) == []


def test_the_change_by_module_is_that_of_numpy(hub: Hub, save_tensors: Save, tmp_path: Path) -> None:
    drawn = np.random.default_rng(5)
    names = [f"model.layers.{i}.{module}.weight" for i in range(2) for module in ("attn.q", "mlp.experts.0.up")]
    names += ["model.layers.0.mlp.experts.1.up.weight", "model.layers.1.mlp.experts.1.up.weight", "model.norm.weight"]
    models = [{name: drawn.standard_normal((4, 6)).astype("float32") for name in names} for _ in range(2)]
    for label, model in zip("ab", models, strict=True):
        save_tensors(label, {name: torch.from_numpy(array) for name, array in model.items()})
    (tmp_path / "mean.yaml").write_text("merge: {linear: {models: {./a: 3, ./b: 1}}}\n")
    assert hub.run("build", "mean.yaml", "out", "--push", "me/mean", cwd=tmp_path).returncode == 0
    rows = [line.strip("| ").split(" | ") for line in card(hub).splitlines() if line.startswith("| ")]
    found = {cells[0].replace("\\", ""): [float(cell.split()[0]) for cell in cells[1:]] for cells in rows[-3:]}
    result = load_file(tmp_path / "out" / "model.safetensors")
    for module, inside in {"attn.q": "attn.q", "mlp.experts.*.up": "experts", "outside the layers": "norm"}.items():
        group = [name for name in names if inside in name]
        merged = np.concatenate([result[name].ravel() for name in group]).astype("float64")
        parents = [np.concatenate([model[name].ravel() for name in group]).astype("float64") for model in models]
        expected = [100 * np.linalg.norm(merged - one) / np.linalg.norm(one) for one in parents]
        assert found[module] == pytest.approx(expected, rel=1e-3)
    assert len(rows) == 1 + 1 + 1 + 2 + 1 + 3  # steps with their title, parents with theirs, modules with theirs


def test_a_parent_that_is_gone_is_named_in_a_note_and_has_no_row(hub: Hub, recipe: Path) -> None:
    assert hub.run("build", recipe, "out", cwd=recipe.parent).returncode == 0
    (recipe.parent / "math").rename(recipe.parent / "elsewhere")
    done = hub.run("push", "out", "me/mean", cwd=recipe.parent)
    said = "not compared with ./math: is no longer at ../math, seen from the result"
    assert (done.returncode, f"note: {said}\n" in done.stderr) == (0, True)
    assert f"- {said}\n" in card(hub)
    assert "| ./math |" not in card(hub)
    assert "| ./swahili | 25 % | 100 % | 0.5 | 1 |" in card(hub)


def test_what_is_no_model_of_the_same_tensors_is_named_and_published_all_the_same(
    hub: Hub, recipe: Path, save_tensors: Save
) -> None:
    here = recipe.parent
    (here / "extract.yaml").write_text("merge: {extract_sparse: {base: ./math, tuned: ./swahili, count: 1}}\n")
    assert hub.run("build", "extract.yaml", "diff", "--push", "me/diff", cwd=here).returncode == 0
    assert "- not compared with ./swahili: diff has no tensor in common with ./swahili: " in card(hub, "me/diff")
    (here / "add.yaml").write_text("merge: {sparse_fine_tune: {base: ./math, diffs: [./diff]}}\n")
    assert hub.run("build", "add.yaml", "added", "--push", "me/added", cwd=here).returncode == 0
    # of two ones one became 2: a change of 1 beside a norm of √2, half of the entries, 0.5 in the mean
    assert "| ./math | 70.71 % | 50 % | 0.5 | 1 |" in card(hub, "me/added")
    assert "- not compared with ./diff: " in card(hub, "me/added")
    save_tensors("wide", {"weight": torch.ones(3), "other": torch.ones(3)})
    assert hub.run("build", recipe, "out", cwd=here).returncode == 0
    (here / "math" / "model.safetensors").write_bytes((here / "wide" / "model.safetensors").read_bytes())
    assert hub.run("push", "out", "me/mean", cwd=here).returncode == 0
    assert "- not compared with ./math: tensor weight: shapes differ: " in card(hub).replace("\\", "")


def test_a_receipt_whose_changes_cannot_be_read_is_published_without_a_table(hub: Hub, recipe: Path) -> None:
    assert hub.run("build", recipe, "out", cwd=recipe.parent).returncode == 0
    out = recipe.parent / "out"
    strange = {"parents": [{"parent": "./math", "relative_norm": "much"}]}
    replace(receipt.read(out), changes=strange).write(out)
    done = hub.run("push", "out", "me/mean", cwd=recipe.parent)
    said = "note: the card has no table of changes: tells changes that cannot be read: parents.0.tensors\n"
    assert (done.returncode, said in done.stderr) == (0, True)
    assert "## Changes" not in card(hub)
    done = hub.run("verify", "out", "--rebuild", cwd=recipe.parent)
    assert (done.returncode, "Traceback" in done.stderr) == (1, False)


def test_a_card_that_was_edited_keeps_the_edits_and_one_without_changes_stays_as_it_is(hub: Hub, recipe: Path) -> None:
    assert hub.run("build", recipe, "out", cwd=recipe.parent).returncode == 0
    own = recipe.parent / "out" / "README.md"
    built = own.read_text()
    assert hub.run("push", "out", "me/mean", "--no-changes", cwd=recipe.parent).returncode == 0
    assert card(hub) == own.read_text() == built
    assert hub.run("build", recipe, "again", "--push", "me/again", "--no-changes", cwd=recipe.parent).returncode == 0
    assert card(hub, "me/again") == built
    own.write_text(built.replace("# A merged model", "# My model"))
    assert hub.run("push", "out", "me/mean", cwd=recipe.parent).returncode == 0
    assert "# My model\n" in card(hub)
    assert "| ./math | 50 % | 100 % | 0.5 | 1 |" in card(hub)
    assert "README.md: is damaged" in hub.run("verify", "out", cwd=recipe.parent).stderr  # it is not what was built
