"""Files from strangers: none makes us hang, run code, use up memory, print raw what it says, or leave its folder.

What is refused is refused by our own error, before weights are read; what is unusual and legal works.
"""

from __future__ import annotations

import ast
import io
import json
import os
import pickle
import resource
import struct
import time
import zipfile
from array import array
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save, save_file
from torch import Tensor

from portmanteau import merge
from portmanteau.cli import main
from portmanteau.compositions import compose, extract_lora, load
from portmanteau.merge import describe
from portmanteau.merge.adapters.folder import CONFIG
from portmanteau.merge.adapters.module_pattern import ModulePatterns
from portmanteau.merge.cards import model_card
from portmanteau.merge.companions import Companions, vocabulary
from portmanteau.merge.errors import Mistake
from portmanteau.merge.files.json_file import TABLE_BYTES, read_json
from portmanteau.merge.files.pickled import unpickle
from portmanteau.merge.names import align, layers_up_to

Save = Callable[[str, Mapping[str, Tensor]], Path]
F32 = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


@pytest.fixture(autouse=True)
def quick() -> Iterator[None]:
    """Hold every test here to a few seconds of processor time: what is hostile must not cost more than what is not."""
    begun = time.process_time()
    yield
    assert time.process_time() - begun < 5.0


def refusal(act: Callable[[], object]) -> str:
    with pytest.raises(merge.PortmanteauError) as caught:
        act()
    return str(caught.value)


def write_header(path: Path, header: str | bytes, data: bytes = b"") -> Path:
    raw = header if isinstance(header, bytes) else header.encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)
    return path


# ---- safetensors


def test_a_name_given_twice_in_a_header_is_refused(tmp_path: Path) -> None:
    one = json.dumps(F32)
    path = write_header(tmp_path / "x.safetensors", f'{{"x": {one}, "x": {one}}}', bytes(4))
    assert "the key 'x' is given twice" in refusal(lambda: merge.open(path))


@pytest.mark.parametrize(
    ("header", "size", "found"),
    [
        (
            {"a": F32, "b": {**F32, "data_offsets": [2, 6]}},
            6,
            "tensor b: not a whole safetensors file (its data overlaps",
        ),
        (
            {"a": F32, "b": {**F32, "data_offsets": [5, 9]}},
            9,
            "tensor b: not a whole safetensors file (its data leaves",
        ),
        ({"a": {**F32, "data_offsets": [0, 1 << 62]}}, 4, "does not take the bytes"),
        ({"a": {**F32, "data_offsets": [-4, 0]}}, 4, "data_offsets are [-4, 0]"),
        ({"a": {**F32, "shape": [2]}}, 4, "F32 [2] does not take the bytes [0, 4]"),
        ({"a": {**F32, "shape": [1 << 62, 4, 0], "data_offsets": [0, 0]}}, 0, "too many entries"),
        ({"a": {**F32, "shape": [1] * 65}}, 4, "shape is"),
        ({"a": {**F32, "dtype": ["F32"]}}, 4, "unknown dtype ['F32']"),
        ({"a": {**F32, "dtype": "F4", "shape": [1], "data_offsets": [0, 1]}}, 1, "does not take the bytes"),
        ({"a": F32}, 5, "4 bytes of data promised, 5 are there"),
        ({"x" * 1001: F32}, 4, "its name has 1001 characters"),
    ],
)
def test_what_a_header_says_against_itself_is_named(
    header: dict[str, Any], size: int, found: str, tmp_path: Path
) -> None:
    path = write_header(tmp_path / "x.safetensors", json.dumps(header), bytes(size))
    assert found in refusal(lambda: merge.open(path))


def test_every_mistake_of_a_header_is_said_at_once(tmp_path: Path) -> None:
    header = {"a": {**F32, "shape": [3]}, "b": {**F32, "dtype": "F3"}, "c\x07": F32}
    message = refusal(lambda: merge.open(write_header(tmp_path / "x.safetensors", json.dumps(header), bytes(4))))
    assert ["tensor a" in message, "tensor b" in message, "tensor c\\x07" in message] == [True] * 3


@pytest.mark.parametrize(
    "header",
    [b"[" * 100_000, b'{"a":' * 50_000, b'{"a": 1e}', b"\xff\xfe{}", '{"a": {}}'.encode("utf-16"), b'{"a": NaN}'],
)
def test_a_header_that_is_no_json_is_refused(header: bytes, tmp_path: Path) -> None:
    path = write_header(tmp_path / "x.safetensors", header)
    assert str(path) in refusal(lambda: merge.open(path))


def test_a_header_is_bounded_before_it_is_parsed(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 90_000_000))
        file.truncate(90_000_008)
    assert "a header of 90,000,000 bytes" in refusal(lambda: merge.open(path))
    write_header(path, b"[" + b"1," * 500_001 + b"1]")
    assert "more than 500,000 values" in refusal(lambda: merge.open(path))


def test_tensors_of_no_entries_and_of_no_dimensions_go_through_a_merge(save_tensors: Save, tmp_path: Path) -> None:
    odd = {"empty": torch.ones(0, 3), "scalar": torch.tensor(2.0), "zeros": torch.ones(2, 0, 0), "x": torch.ones(2)}
    for name in ("a", "b"):
        save_tensors(name, odd)
    (tmp_path / "r.yaml").write_text("merge: {linear: {models: [a, b]}}\n")
    merge.build(compose(load(tmp_path / "r.yaml")), tmp_path / "out")
    made = load_file(tmp_path / "out" / "model.safetensors")
    assert {name: (tensor.shape, tensor.tolist()) for name, tensor in made.items()} == {
        name: (tensor.shape, tensor.tolist()) for name, tensor in odd.items()
    }


# ---- text of strangers


ESCAPE = "\x1b]0;owned\x07\x1b[31mred\u202egnp.exe"
SHOWN = r"\x1b]0;owned\x07\x1b[31mred\u202egnp.exe"


def test_an_error_shows_control_characters_spelled_out() -> None:
    text = str(Mistake(f"a/{ESCAPE}", f"names {ESCAPE}\nline 2", ESCAPE))
    assert text == f"a/{SHOWN}: names {SHOWN}\\nline 2\n  hint: {SHOWN}"


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_a_tensor_whose_name_holds_an_escape_is_refused_and_shown_spelled_out(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"x.{suffix}"
    save_file({ESCAPE: torch.ones(1)}, path) if suffix == "safetensors" else torch.save({ESCAPE: torch.ones(1)}, path)
    message = refusal(lambda: merge.open(path))
    assert f"{SHOWN}: its name holds control characters" in message


@pytest.mark.parametrize("name", ["../../x", "/etc/passwd", "a/b", "..", "-rf", "", "a b", "ö"])
def test_a_tensor_may_be_called_what_it_likes_for_its_name_is_no_path(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "in" / "model"
    folder.mkdir(parents=True)
    save_file({name: torch.ones(3)}, folder / "model.safetensors")
    merge.build(merge.open(folder), tmp_path / "in" / "out", shard_size=4)
    assert list(merge.open(tmp_path / "in" / "out")) == [name]
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == sorted(
        ["model.safetensors", "model.safetensors", "README.md", "portmanteau.json"]
    )


def run(arguments: list[str | Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> str:
    """Run the command line; give all that it printed."""
    monkeypatch.setattr("sys.argv", ["portmanteau", *map(str, arguments)])
    with pytest.raises(SystemExit):
        main()
    found = capsys.readouterr()
    return found.out + found.err


def test_nothing_of_a_recipe_or_a_folder_is_printed_raw(
    save_tensors: Save, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tensors("a", {"x": torch.ones(1)})
    (tmp_path / ESCAPE).symlink_to(tmp_path / "a")
    quoted = json.dumps(ESCAPE)
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"models: {{{quoted}: a}}\nmerge: {{linear: {{models: [{quoted}, a]}}}}\n")
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(f"{quoted}: 1\nmerge: {{linear: {{models: [{quoted}], {quoted}: 1}}}}\n")
    places = (["plan", recipe], ["plan", recipe, "--json"], ["check", recipe], ["check", wrong], ["convert", recipe])
    for arguments in (*places, ["inspect", tmp_path / ESCAPE], ["build", recipe, tmp_path / "out"], ["show", ESCAPE]):
        printed = run([*arguments], capsys, monkeypatch)
        assert printed
        assert all(sign.isprintable() or sign == "\n" for sign in printed), (arguments, printed)
    for name in ("portmanteau.json", "README.md"):
        written = (tmp_path / "out" / name).read_text()
        assert all(sign.isprintable() or sign == "\n" for sign in written), written
    receipt = json.loads((tmp_path / "out" / "portmanteau.json").read_text())
    assert receipt["recipe"]["text"] == recipe.read_text()
    assert ESCAPE in [one["checkpoint"] for one in receipt["inputs"]]


def test_only_functions_that_escape_print() -> None:
    root = Path(__file__).parents[1]
    printing = set()
    for path in (root / "cli.py", *root.glob("merge/**/*.py"), *root.glob("compositions/**/*.py")):
        for function in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(function, ast.FunctionDef):
                called = {ast.unparse(node.func) for node in ast.walk(function) if isinstance(node, ast.Call)}
                prints = {"print", "typer.echo", "sys.stdout.write", "sys.stderr.write"}
                if called & prints or any(name.endswith("console.print") for name in called):
                    printing.add(f"{path.stem}.{function.name}")
    assert printing == {"bars.tell", *(f"printing.{name}" for name in ("say", "put", "put_json", "put_table", "_draw"))}


def test_a_model_card_holds_no_markup_of_strangers(save_tensors: Save, tmp_path: Path) -> None:
    label = "`x`|<script>alert(1)</script>\n---\nbase_model: evil\n# [a](http://b)"
    save_tensors("a", {"x": torch.ones(1)})
    opened = [merge.open(tmp_path / "a", label=label), merge.open(tmp_path / "a", label="a")]
    made = merge.make_plan(merge.Composed("c", {"x": merge.Step(*_linear(opened))}, opened[0].companions, (label,)))
    card = model_card.text(made, "merge: x\n````\n# broken out\n`````\n<b>\n")
    front, body = card.removeprefix("---\n").split("\n---\n", 1)
    assert yaml.safe_load(front) == {"library_name": "transformers", "tags": ["merge", "portmanteau"]}
    prose, recipe = body.split("## Recipe")
    assert recipe.startswith("\n\n``````yaml\nmerge: x\n````\n# broken out\n`````\n<b>\n``````\n")
    assert not [line for line in prose.splitlines() if line.startswith(("---", "# [", "base_model"))]
    lines = [line for line in prose.splitlines() if "script" in line]
    assert lines[0].startswith("- `` `x`")
    assert lines[0].endswith("``")  # all of it is code
    assert all("<script" not in line and "](" not in line.replace("\\]", "") for line in lines[1:])
    assert lines[1].count(" | ") == 2  # a row of three cells


def _linear(opened: list[merge.StoredCheckpoint]) -> tuple[Any, ...]:
    from portmanteau.merge.node import Inputs
    from portmanteau.merge.registry import find

    nodes = Inputs(tuple(one.node("x") for one in opened))
    labels = tuple(one.label for one in opened)
    return opened[0].specs["x"], find("linear"), {"weight": (1.0, 1.0), "normalize": True}, nodes, labels


# ---- folders


def test_a_link_out_of_a_folder_is_refused_wherever_it_stands(save_tensors: Save, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "key").write_text("private")
    for name in ("tokenizer.json", "config.json", "LICENSE"):
        folder = save_tensors(f"m-{name}", {"x": torch.ones(1)})
        (folder / name).symlink_to(secret / "key")
        assert f"{name}: is a link that leads out of its folder, to {secret / 'key'}" in refusal(
            lambda folder=folder: merge.open(folder)
        )
    folder = save_tensors("through-a-folder", {"x": torch.ones(1)})
    (folder / "additional_chat_templates").symlink_to(secret)
    assert "leads out of its folder" in refusal(lambda: merge.open(folder))


def test_weights_and_index_that_are_links_out_of_the_folder_are_refused(save_tensors: Save, tmp_path: Path) -> None:
    other = save_tensors("other", {"x": torch.ones(1)})
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "model.safetensors").symlink_to(other / "model.safetensors")
    assert "leads out of its folder" in refusal(lambda: merge.open(folder))
    (folder / "model.safetensors").rename(folder / "one.safetensors")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"x": "one.safetensors"}}')
    assert "one.safetensors: is a link that leads out" in refusal(lambda: merge.open(folder))


def test_links_within_a_folder_to_the_hubs_blobs_and_of_whole_folders_work(save_tensors: Save, tmp_path: Path) -> None:
    folder = save_tensors("m", {"x": torch.ones(1)})
    (folder / "model.safetensors").rename(folder / "real")
    (folder / "model.safetensors").symlink_to("real")
    (tmp_path / "link").symlink_to(folder)
    assert list(merge.open(tmp_path / "link")) == ["x"]
    cache = tmp_path / "hub" / "models--org--name"
    (cache / "blobs").mkdir(parents=True)
    (cache / "snapshots" / "abc").mkdir(parents=True)
    (folder / "real").rename(cache / "blobs" / "f00")
    (cache / "snapshots" / "abc" / "model.safetensors").symlink_to("../../blobs/f00")
    assert list(merge.open(cache / "snapshots" / "abc")) == ["x"]


def test_pipes_devices_and_loops_of_links_are_not_opened(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    os.mkfifo(folder / "model.safetensors")
    assert "holds no weights" in refusal(lambda: merge.open(folder))
    assert "neither a file nor a folder" in refusal(lambda: merge.open(folder / "model.safetensors"))
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert str(tmp_path / "loop") in refusal(lambda: merge.open(tmp_path / "loop"))


@pytest.mark.parametrize("reference", ["a\0b", "x" * 5000, "~nobody-of-this-name/x", "\ud800"])
def test_paths_that_are_none_are_refused(reference: str, tmp_path: Path) -> None:
    assert refusal(lambda: merge.open(reference))
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"merge: {{linear: {{models: [{json.dumps(reference)}, b]}}}}\n")
    assert refusal(lambda: load(recipe))


def test_an_index_is_bounded_and_says_nothing_twice(save_tensors: Save, tmp_path: Path) -> None:
    folder = save_tensors("m", {"x": torch.ones(1)})
    (folder / "model.safetensors").rename(folder / "one.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"x": "one.safetensors", "x": "one.safetensors"}}')
    assert "the key 'x' is given twice" in refusal(lambda: merge.open(folder))
    with index.open("wb") as file:
        file.truncate(1 << 30)
    assert "larger than" in refusal(lambda: merge.open(folder))


@pytest.mark.parametrize(
    ("name", "text", "found"),
    [
        ("config.json", "[" * 100_000, "nested too deeply"),
        ("config.json", '{"a":' * 80 + "1" + "}" * 80, "nested too deeply"),
        ("config.json", '{"a": "\\ud800"}', "surrogates not allowed"),
        ("config.json", '{"a": 1, "a": 2}', "given twice"),
        ("config.json", '{"a": ' + "9" * 5000 + "}", "not valid JSON"),
        ("config.json", json.dumps(dict.fromkeys(range(500_001), 0)), "more than 500,000 keys"),
        ("tokenizer.json", '{"a": [' + "0," * 2_500_000 + "0]}", "more than 2,500,000 values"),
        ("tokenizer.json", '{"a": "' + "x" * (40 << 20) + '"}', "larger than 41,943,040 bytes"),
        ("tokenizer.json", '{"model": {"vocab": {"a": "1"}}}', "no mapping from tokens to numbers"),
        ("tokenizer.json", '{"model": [], "added_tokens": [{"content": "a", "id": []}]}', "no mapping from tokens"),
    ],
)
def test_companions_that_are_not_what_they_should_be_are_refused(
    name: str, text: str, found: str, save_tensors: Save
) -> None:
    folder = save_tensors("m", {"x": torch.ones(1)})
    (folder / name).write_text(text)
    assert found in refusal(lambda: vocabulary(merge.open(folder).companions))


@pytest.mark.parametrize("named", [[5], [None, ["x"]], "LlamaForCausalLM", 7, {"a": 1}, []])
def test_a_config_may_name_what_it_likes_as_its_architecture(named: object) -> None:
    weights = {"model.embed_tokens.weight": torch.zeros(4, 2), "model.layers.0.mlp.up_proj.weight": torch.ones(2, 2)}
    beside = Companions({"architectures": named})
    base, tuned = (merge.InMemory(x, {n: t + i for n, t in weights.items()}, beside) for i, x in enumerate("bt"))
    assert describe.checkpoint(base)["vocabulary"]["head"] == "none"
    made = extract_lora(base=base, tuned=tuned, rank=1)
    config = json.loads(made.settle({"model.embed_tokens.weight": {"change": 0.0}}).companions.texts[CONFIG])
    assert config["task_type"] is None


@pytest.mark.parametrize(
    "text", ['{"model": 3}', '{"model": {"vocab": [[], 3]}, "added_tokens": 7}', '{"added_tokens": [3, {"id": 1}]}']
)
def test_a_tokenizer_of_another_make_has_no_words(text: str, save_tensors: Save) -> None:
    folder = save_tensors("m", {"x": torch.ones(1)})
    (folder / "tokenizer.json").write_text(text)
    assert set(vocabulary(merge.open(folder).companions) or {}) <= {"None"}


# ---- pickles


def zipped(pickled: bytes, compression: int = zipfile.ZIP_STORED) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", compression) as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/data/0", bytes(16))
        archive.writestr("archive/version", b"3\n")
    return made.getvalue()


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


STORAGE = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + b"K\x04tQ"


def a_tensor(size: bytes, stride: bytes, storage: bytes = STORAGE) -> bytes:
    """Pickle {"x": tensor} over a storage of four entries."""
    call = (
        b"ctorch._utils\n_rebuild_tensor_v2\n("
        + storage
        + b"K\0"
        + size
        + stride
        + b"\x89ccollections\nOrderedDict\n)RtR"
    )
    return b"\x80\x02}" + text("x") + call + b"s."


@pytest.mark.parametrize(
    ("pickled", "found"),
    [
        (b"\x80\x02cbuiltins\nbytearray\n\x8a\x05\0\0\0\0\x10\x85R.", "asks for builtins.bytearray"),
        (b"\x80\x02cos\nsystem\n" + text("true") + b"\x85R.", "asks for os.system"),
        (b"\x80\x04" + text("os") + text("system") + b"\x93" + text("true") + b"\x85R.", "asks for os.system"),
        (b"\x80\x02cbuiltins\neval\n.", "asks for builtins.eval"),
        (b"\x80\x02(ios\nsystem\n.", "the opcode b'i'"),
        (b"\x80\x02]r\xff\xff\xff\xff}" + text("a") + b"N" + b"s.", "expected"),
        (b"\x80\x02\x8a\xff" + b"\xff" * 255 + b".", "an integer of 255 bytes"),
        (b"\x80\x02X\xff\xff\xff\xffa.", "ends too early"),
        (b"\x80\x02" + b"}" * 1_000_001 + b".", "more than 1,000,000 values"),
        (b"\x80\x02" + b"(" * 2_000_001, "more than 2,000,000 steps"),
        (b"\x80\x02(" + b"M\0\2" * 1_000_001 + b"t.", "more than 1,000,000 values"),
        (b"\x80\x02}" + b")\x85\x86\x86" + b"N" + b"s.", "its stack is empty"),
        (b"\x80\x02})" + b"2\x86" * 60 + b"Ns.", "the opcode b'2'"),
        (b"\x80\x02})q\x00" + b"h\x00\x86q\x00" * 60 + b"Ns.", "a tuple as the key of a mapping"),
        (a_tensor(b"K\x05\x85", b"K\x01\x85"), "a tensor of [5] in a storage of 4 entries"),
        (a_tensor(b"\x8a\x05\0\0\0\0\x10\x85", b"K\0\x85"), "in a storage of 4 entries"),
        (a_tensor(b"J\xff\xff\xff\xff\x85", b"K\x01\x85"), "no list of sizes"),
        (a_tensor(b"K\x02\x85", b"K\x01\x85", STORAGE.replace(b"K\x04t", b"K\x05t")), "it lacks bytes of a tensor"),
    ],
)
def test_a_pickle_that_wants_more_than_tensors_is_refused(pickled: bytes, found: str, tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    path.write_bytes(zipped(pickled))
    assert found in refusal(lambda: merge.open(path))


def test_the_tensor_of_these_pickles_is_read_where_it_is_right(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    path.write_bytes(zipped(a_tensor(b"K\x02K\x02\x86", b"K\x01K\x02\x86")))
    assert merge.open(path)["x"].tolist() == [[0.0, 0.0], [0.0, 0.0]]
    assert torch.load(io.BytesIO(path.read_bytes()), weights_only=True)["x"].shape == (2, 2)


def test_zips_that_are_bombs_or_say_a_thing_twice_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    path.write_bytes(zipped(b"\x80\x02}" * 1_000_000, zipfile.ZIP_DEFLATED))
    assert "compressed entries" in refusal(lambda: merge.open(path))
    raw = bytearray(zipped(b"\x80\x02}."))
    at = raw.rfind(b"PK\x05\x06")
    raw[at + 12 : at + 16] = struct.pack("<I", 100 << 20)
    path.write_bytes(raw)
    assert "a zip whose list of entries has 104,857,600 bytes" in refusal(lambda: merge.open(path))


def test_views_transposed_shared_and_of_bytes_are_read_as_torch_reads_them(tmp_path: Path) -> None:
    whole = torch.arange(24, dtype=torch.float32).reshape(2, 3, 4)
    tensors = {
        "turned": whole.permute(2, 0, 1),
        "part": whole[1, 1:],
        "gaps": whole[:, :, ::2],
        "scalar": whole[0, 1, 2],
        "none": whole[:0],
        "half": torch.ones(3).half().t(),
        "f8": torch.ones(3).to(torch.float8_e4m3fn),
        "u16": torch.ones(2, dtype=torch.uint16),
        "parameter": torch.nn.Parameter(whole.mT),
    }
    for zip_format in (True, False):
        path = tmp_path / f"{zip_format}.bin"
        torch.save(tensors, path, _use_new_zipfile_serialization=zip_format)
        opened = merge.open(path)
        assert list(opened) == list(tensors)
        for name, tensor in tensors.items():
            assert opened[name].dtype == tensor.dtype
            assert torch.equal(opened[name].float(), tensor.detach().float()), name
            flat = tensor.detach().reshape(-1).float()
            assert torch.equal(opened.read(name, slice(1, 5)).float(), flat[1:5]), name


def test_pickles_of_later_protocols_are_read(tmp_path: Path) -> None:
    for protocol in (2, 3, 4, 5):
        torch.save({"x": torch.ones(2)}, tmp_path / "x.pt", pickle_protocol=protocol)
        assert merge.open(tmp_path / "x.pt")["x"].tolist() == [1.0, 1.0]
    (tmp_path / "y.pt").write_bytes(pickle.dumps({"x": 1}))
    assert "not a PyTorch file" in refusal(lambda: merge.open(tmp_path / "y.pt"))


# ---- recipes


@pytest.mark.parametrize(
    ("recipe", "found"),
    [
        (
            "a: &a [x, x]\n"
            + "".join(f"a{i}: &a{i} [{', '.join(['*a' + str(i - 1) * (i > 0)] * 9)}]\n" for i in range(9)),
            "",
        ),
        ("merge: " + "[" * 60 + "]" * 60, "nested too deeply"),
        ("merge: " + "[" * 5000, "nested too deeply"),
        ("merge: &m {linear: *m}", "nested too deeply"),
        ("merge: !!python/object/apply:os.system [echo]", "tags such as"),
        ("merge: !!int ''", "tags such as"),
        ("merge: !!set {a}", "tags such as"),
        ("merge: !!binary aGk=", "tags such as"),
        ("merge: 2001-01-01", "tags such as"),
        ("merge: " + "9" * 5000, "a number of 5000 signs"),
        ("merge: {linear: {models: [a], weight: 0x" + "f" * 9000 + "}}", "a number of 9002 signs"),
        ("merge: 0x" + "f" * 90, "must name one composition"),
        ("merge: 0b", "must name one"),
        ("merge: 1" + ":59" * 400 + ".5", "a number of 1203 signs"),
        ('merge: "\\ud800"', ""),
        ("merge: \x1b", "not valid YAML"),
        ("x: 1\n" * 30_000, "larger than"),
        ("output: {shard_size: " + "9" * 400 + "GB}", "is no size"),
        ("merge: {average: {models: ['/*/*/*/*/*']}}", "looks through too many folders"),
    ],
)
def test_a_recipe_that_is_a_bomb_is_refused(recipe: str, found: str, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(recipe)
    assert found in refusal(lambda: load(path))


def test_a_recipe_that_is_no_text_or_has_no_end_is_refused(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_bytes(b"\xff\xfe\x00merge")
    assert "is no text" in refusal(lambda: load(tmp_path / "r.yaml"))
    assert "is no text" in refusal(lambda: load("/dev/zero"))


# ---- adapters and names


LORA = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}


@pytest.mark.parametrize(
    "more",
    [
        {"rank_pattern": {"(a+)+$": 2}, "r": "2"},
        {"rank_pattern": {"(?=a)": 2}},
        {"rank_pattern": {"(": 2}},
        {"rank_pattern": {"a{99999}": 2}},
        {"rank_pattern": [1]},
        {"alpha_pattern": {"a": 10**400}},
        {"r": 10**400},
        {"r": True},
        {"init_lora_weights": [[]]},
        {"peft_type": {}},
        {"config": {"architecture": []}, "peft_type": None},
    ],
)
def test_an_adapters_config_of_odd_values_is_refused(more: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps(LORA | more))
    (tmp_path / "adapter_model.safetensors").write_bytes(save({"q.lora_A.weight": torch.ones(2, 2)}))
    assert refusal(lambda: merge.open_adapter(tmp_path))
    assert refusal(lambda: merge.open_bottleneck(tmp_path))


def test_patterns_of_modules_that_would_take_years_take_no_time() -> None:
    path = "a" * 300 + "!"
    assert ModulePatterns({"(a+)+$": 1, "(a|aa)*b": 2, ".*.*.*.*.*x": 3, ".*!": 4}).of(path, 0) == 4


@pytest.mark.parametrize(
    ("pattern", "path"),
    [
        ("q_proj", "model.layers.0.q_proj"),
        (r"layers\.(0|1)\.q", "model.layers.1.q"),
        (r"^model\.layers\.\d+\.q$", "model.layers.12.q"),
        (r".*[0-3]\.q", "m.layers.2.q"),
        ("(?:a|b)+c?", "x.abab"),
        ("proj", "q_proj"),
        ("a|b", "x.b"),
        (".*", ""),
    ],
)
def test_a_pattern_fits_where_pefts_regular_expression_fits(pattern: str, path: str) -> None:
    import re

    expected = re.match(rf"(.*\.)?({pattern})$", path) is not None  # as peft has it
    assert ModulePatterns({pattern: True}).of(path, False) is expected


def test_layer_numbers_of_adapters_make_no_lists_without_end() -> None:
    assert layers_up_to(["h.999999999.attn.weight", "g.1.attn.weight"]).find("g") is not None


def test_names_of_many_prefixes_are_aligned_quickly() -> None:
    own = [f"a{i}.b{i}.c" for i in range(20_000)]
    assert align(own, [f"x.{name}" for name in own]) is not None
    assert align(own, [f"y{i}.c" for i in range(20_000)]) is None


# ---- inputs as large as they may be


@pytest.mark.parametrize("one", [7, 256, 70_000, -3, 1 << 40])
@pytest.mark.parametrize("count", [1, 8, 9, 64, 65, 1000, 2500])
def test_integers_in_a_row_are_read_as_python_reads_them(count: int, one: int) -> None:
    mixed = [one, 5, 300, -70_000, *([one] * count), 6, one]
    for value in (mixed, tuple(mixed), dict(enumerate(mixed)), [tuple(mixed[-3:]), mixed, "x", one]):
        found, end = unpickle(raw := pickle.dumps(value, protocol=2), {}, lambda _: None)
        assert end == len(raw)
        assert _single(found) == value


def _single(value: Any) -> Any:
    """Give the integers of runs one by one, as far as lists go."""
    if isinstance(value, list):
        return [inner for one in value for inner in (one if isinstance(one, array) else [_single(one)])]
    return value


def test_a_file_that_names_the_same_bytes_again_and_again_is_refused(tmp_path: Path) -> None:
    torch.save({"diffs": {}, "abs": {"a": (one := torch.ones(1000)), "b": one}}, tmp_path / "pytorch_diff.bin")
    assert set(merge.open_sparse(tmp_path).dense) == {"a", "b"}  # tied tensors
    torch.save({"diffs": {}, "abs": {f"n{i}": one for i in range(300)}}, tmp_path / "pytorch_diff.bin")
    assert "they lie over each other" in refusal(lambda: merge.open_sparse(tmp_path))
    torch.save({"diffs": dict.fromkeys(map(str, range(20_001))), "abs": {}}, tmp_path / "pytorch_diff.bin")
    assert "more than 20,000 tensors" in refusal(lambda: merge.open_sparse(tmp_path))


def _a_tokenizer_of_every_script(folder: Path) -> Callable[[], object]:
    """Write one as large as Gemma 3's: 262,144 words, 514,906 merges, 6,415 added tokens."""
    words = [f"\u2581{i:x}\u4e2d" for i in range(262_144)]
    merges = [[words[i % 262_144], words[7 * i % 262_144]] for i in range(514_906)]
    about = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    added = [{"id": i, "content": words[i], **about} for i in range(6_415)]
    made = {"added_tokens": added, "model": {"vocab": {word: i for i, word in enumerate(words)}, "merges": merges}}
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(made, indent=2, ensure_ascii=False), encoding="utf-8")
    return lambda: read_json(path, TABLE_BYTES)["model"]["vocab"][words[-1]]


def _many_keys(folder: Path) -> Callable[[], object]:
    path = folder / "tokenizer.json"
    path.write_text("{" + ",".join(f'"{i:x}":[[]]' for i in range(499_000)) + "}")
    return lambda: read_json(path, TABLE_BYTES)


def _many_integers(folder: Path) -> Callable[[], object]:
    steps = b"](" + b"K\1" * 5_000_000 + b"e"
    diff = b"}" + text("size") + b"N" + b"s" + text("index_steps") + steps + b"s"
    pickled = b"\x80\x02}" + text("abs") + b"}s" + text("diffs") + b"}" + text("w") + diff + b"ss."
    (folder / "pytorch_diff.bin").write_bytes(zipped(pickled))
    return lambda: refusal(lambda: merge.open_sparse(folder))


def _many_tensors(folder: Path) -> Callable[[], object]:
    entries = {f"t{i}": {"dtype": "U8", "shape": [1], "data_offsets": [i, i + 1]} for i in range(60_000)}
    path = write_header(folder / "x.safetensors", json.dumps(entries), bytes(60_000))
    return lambda: merge.open(path)


def _a_long_index(folder: Path) -> Callable[[], object]:
    save_file({"x": torch.ones(1)}, folder / "one.safetensors")
    places = {f"model.layers.{i}.weight": "one.safetensors" for i in range(249_000)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return lambda: refusal(lambda: merge.open(folder))


def _nested_tuples(folder: Path) -> Callable[[], object]:
    (folder / "x.bin").write_bytes(zipped(b"\x80\x02N" + b"\x85" * 1_000_001 + b"."))
    return lambda: refusal(lambda: merge.open(folder / "x.bin"))


def _many_lists(folder: Path) -> Callable[[], object]:
    (folder / "r.yaml").write_text("merge: [" + "[]," * 32_000 + "]")
    return lambda: refusal(lambda: load(folder / "r.yaml"))


@pytest.mark.parametrize(
    "made",
    [
        *(_many_tensors, _a_long_index, _nested_tuples, _many_lists),
        *(_a_tokenizer_of_every_script, _many_keys, _many_integers),
    ],
)
def test_what_reaches_the_bounds_takes_about_a_second_and_little_memory(
    made: Callable[[Path], Callable[[], object]], tmp_path: Path
) -> None:
    act = made(tmp_path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begun = time.process_time()
    act()
    assert time.process_time() - begun < 5.0  # a second where nothing else runs
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 << 10  # kB
