"""Builds that were ended: what is kept of them, what is not, and that nothing is lost whatever ends them."""

from __future__ import annotations

import errno
import importlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import blake3
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from portmanteau import compositions, merge
from portmanteau.merge import Checkpoint, Composed, MergeError, OutputError, Progress
from portmanteau.merge.files.storage import PositionalFile
from portmanteau.merge.results import exclusive, journal, output
from portmanteau.merge.results.journal import Finished, Journal
from portmanteau.merge.results.output import Work

SaveTensors = Callable[[str, Mapping[str, Tensor]], Path]


class Ended(Exception):
    """Ends a build, as something unforeseen does."""


class EndingAfter(Progress):
    """Ends a build once so many tensors are finished, and remembers what it was told."""

    def __init__(self, tensors: int) -> None:
        self.left, self.told = tensors, list[str]()
        self._title = ""

    def begin(self, title: str, nbytes: int, tensors: int) -> None:
        self._title = title

    def advance(self, nbytes: int, tensors: int = 0) -> None:
        if self._title == "merge" and tensors:
            self.left -= tensors
            if self.left <= 0:
                raise Ended

    def tell(self, text: str) -> None:
        self.told.append(text)


class Telling(Progress):
    """Remembers what it was told."""

    def __init__(self) -> None:
        self.told = list[str]()

    def tell(self, text: str) -> None:
        self.told.append(text)


def five(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {f"model.layers.{i}.w.weight": torch.randn(40, 50 - i, generator=generator) for i in range(5)}


@pytest.fixture
def two(save_tensors: SaveTensors) -> dict[str, Path]:
    return {name: save_tensors(name, five(seed)) for seed, name in enumerate("ab")}


def mean(two: Mapping[str, Path], *weights: float) -> Composed:
    models: dict[str, Checkpoint] = {name: merge.open(path, label=name) for name, path in two.items()}
    return compositions.tensorwise("linear", models=models, settings={"weight": weights or (0.5, 0.5)})


def end(two: Mapping[str, Path], out: Path, tensors: int = 3, **options: Any) -> None:
    """Build until so many tensors are finished."""
    with pytest.raises(Ended):
        merge.build(mean(two), out, threads=1, progress=EndingAfter(tensors), **options)
    assert not out.exists()


def weights(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.glob("*.safetensors")}


# ------------------------------------------------------------------------------------------------------------ continued


def test_the_same_call_makes_only_what_is_not_finished(two: dict[str, Path], tmp_path: Path) -> None:
    merge.build(mean(two), tmp_path / "whole")
    end(two, tmp_path / "out", 3)
    told = Telling()
    receipt = merge.build(mean(two), tmp_path / "out", progress=told)
    assert told.told == ["continuing: 3 of 5 tensors were finished before"]
    assert (receipt.outcome, weights(tmp_path / "out")) == ("continued", weights(tmp_path / "whole"))
    assert not Work.of(tmp_path / "out").home.exists()


def test_a_note_says_what_is_kept_and_how_to_go_on(two: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(Ended) as caught:
        merge.build(mean(two), tmp_path / "out", threads=1, progress=EndingAfter(2))
    kept = tmp_path / ".out.portmanteau-partial"
    what = f"2 finished tensors are kept in {kept}: the same command continues, with --fresh it starts anew"
    assert caught.value.__notes__ == [what]


def test_nothing_stays_of_a_build_that_finished_nothing(two: dict[str, Path], tmp_path: Path) -> None:
    class Impatient(Progress):
        def advance(self, nbytes: int, tensors: int = 0) -> None:
            raise Ended

    with pytest.raises(Ended):
        merge.build(mean(two), tmp_path / "out", threads=1, progress=Impatient())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_fresh_keeps_nothing(two: dict[str, Path], tmp_path: Path) -> None:
    end(two, tmp_path / "out")
    assert merge.build(mean(two), tmp_path / "out", fresh=True).outcome == "built"


def test_finished_bytes_that_changed_are_made_again(two: dict[str, Path], tmp_path: Path) -> None:
    merge.build(mean(two), tmp_path / "whole")
    end(two, tmp_path / "out", 3)
    file = Work.of(tmp_path / "out").result / "model.safetensors"
    raw = bytearray(file.read_bytes())
    (length,) = (int.from_bytes(raw[:8], "little"),)
    raw[8 + length + 5] ^= 4  # in the first tensor, which is the largest and was made first
    file.write_bytes(raw)
    told = Telling()
    merge.build(mean(two), tmp_path / "out", progress=told)
    assert told.told == ["continuing: 2 of 5 tensors were finished before"]
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")


def test_a_weight_file_of_another_size_is_not_continued(two: dict[str, Path], tmp_path: Path) -> None:
    end(two, tmp_path / "out", 3)
    with (Work.of(tmp_path / "out").result / "model.safetensors").open("r+b") as file:
        file.truncate(100)
    told = Telling()
    merge.build(mean(two), tmp_path / "out", progress=told)
    assert told.told == ["continuing: 0 of 5 tensors were finished before"]
    assert not merge.verify(tmp_path / "out").damaged


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda two: {"dtype": "float16"}, "the dtype changed"),
        (lambda two: {"shard_size": 9000}, "the size of shards changed"),
        (lambda two: {"recipe": "merge: {}"}, "the recipe changed"),
        (lambda two: os.utime(two["a"] / "model.safetensors", (1, 1)) or {}, "the input a: model.safetensors changed"),
        (
            lambda two: save_file(five(7), two["b"] / "model.safetensors") or {},
            "the input b: model.safetensors changed",
        ),
    ],
)
def test_what_has_changed_starts_anew_and_says_so(
    change: Callable[[Mapping[str, Path]], dict[str, Any]], said: str, two: dict[str, Path], tmp_path: Path
) -> None:
    end(two, tmp_path / "out")
    options, told = change(two), Telling()
    receipt = merge.build(mean(two), tmp_path / "out", progress=told, **options)
    assert told.told == [f"starting anew, not continuing the build that was ended: {said}"]
    assert receipt.outcome == "built"
    assert not merge.verify(tmp_path / "out").damaged


def test_another_setting_starts_anew(two: dict[str, Path], tmp_path: Path) -> None:
    end(two, tmp_path / "out")
    told = Telling()
    merge.build(mean(two, 0.9, 0.1), tmp_path / "out", progress=told)
    assert told.told == ["starting anew, not continuing the build that was ended: the plan changed"]
    merge.build(mean(two, 0.9, 0.1), tmp_path / "whole")
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")


def test_other_code_starts_anew(two: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from portmanteau.merge.results import identity

    end(two, tmp_path / "out")
    monkeypatch.setattr(identity, "_code", lambda: "edited")
    told = Telling()
    merge.build(mean(two), tmp_path / "out", progress=told)
    assert "the code of portmanteau changed" in told.told[0]


def test_companions_of_an_earlier_attempt_do_not_stay(two: dict[str, Path], tmp_path: Path) -> None:
    end(two, tmp_path / "out")
    (Work.of(tmp_path / "out").result / "tokenizer.json").write_text("of before")
    merge.build(mean(two), tmp_path / "out")
    assert not (tmp_path / "out" / "tokenizer.json").exists()


def test_tensors_in_memory_are_not_continued(tmp_path: Path) -> None:
    memory = merge.InMemory("memory", five(0))
    with pytest.raises(Ended):
        merge.build(memory, tmp_path / "out", threads=1, progress=EndingAfter(3))
    assert not list(tmp_path.iterdir())


def test_what_a_decomposition_learned_is_not_lost(save_tensors: SaveTensors, tmp_path: Path) -> None:
    """The table beside an extracted adapter holds numbers that come up while its factors are made."""
    base = {f"model.layers.{i}.mlp.up_proj.weight": torch.randn(12, 8) for i in range(4)}
    for name, change in (("base", 0.0), ("tuned", 0.1)):
        folder = save_tensors(name, {key: one + change * torch.randn(12, 8) for key, one in base.items()})
        (folder / "config.json").write_text('{"model_type": "llama"}')
    models = {name: merge.open(tmp_path / name, label=name) for name in ("base", "tuned")}

    def made() -> Any:
        return compositions.extract_lora(rank=2, **models)

    text = "merge: {extract_lora: {base: base, tuned: tuned, rank: 2}}"
    merge.build(made(), tmp_path / "whole", recipe=text)
    with pytest.raises(Ended):
        merge.build(made(), tmp_path / "out", threads=1, progress=EndingAfter(5), recipe=text)
    assert merge.build(made(), tmp_path / "out", recipe=text).outcome == "continued"
    tables = [(tmp_path / name / "energy.csv").read_text() for name in ("whole", "out")]
    assert tables[0] == tables[1]
    assert tables[0].count("\n") == 5


def test_an_error_of_the_disk_itself_keeps_nothing(two: dict[str, Path], tmp_path: Path) -> None:
    class Failing(EndingAfter):
        def advance(self, nbytes: int, tensors: int = 0) -> None:
            try:
                super().advance(nbytes, tensors)
            except Ended:
                raise OSError(errno.EIO, "Input/output error") from None

    with pytest.raises(OutputError, match="Input/output error"):
        merge.build(mean(two), tmp_path / "out", threads=1, progress=Failing(3))
    assert not Work.of(tmp_path / "out").home.exists()


def test_the_space_that_an_ended_build_holds_counts_as_free(
    two: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    end(two, tmp_path / "out")
    held = Work.of(tmp_path / "out").nbytes
    assert held >= sum(path.stat().st_size for path in Work.of(tmp_path / "out").result.glob("*"))
    needed = mean(two).nbytes + (64 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=needed - held - 1))
    with pytest.raises(OutputError, match="needs"):
        merge.build(mean(two), tmp_path / "out")
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=needed - held))
    merge.build(mean(two), tmp_path / "out")


# ----------------------------------------------------------------------------------------------------------- up to date


def test_a_result_that_is_what_is_asked_for_is_left_as_it_is(two: dict[str, Path], tmp_path: Path) -> None:
    merge.build(mean(two), tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert merge.build(mean(two), tmp_path / "out").outcome == "up to date"
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before
    assert merge.build(mean(two), tmp_path / "out", force=True).outcome == "built"


@pytest.mark.parametrize("damage", ["a byte", "a file too many", "a file too few"])
def test_a_result_that_is_not_whole_is_not_up_to_date(damage: str, two: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    merge.build(mean(two), out)
    if damage == "a byte":
        raw = bytearray((out / "model.safetensors").read_bytes())
        raw[-1] ^= 1
        (out / "model.safetensors").write_bytes(raw)
    elif damage == "a file too many":
        (out / "tokenizer.json").write_text("{}")
    else:
        (out / "README.md").unlink()
    with pytest.raises(OutputError, match="exists already, and is not what is asked for: its files changed"):
        merge.build(mean(two), out)


def test_a_copy_of_a_result_is_read_and_then_up_to_date(two: dict[str, Path], tmp_path: Path) -> None:
    merge.build(mean(two), tmp_path / "out")
    for path in sorted((tmp_path / "out").iterdir(), reverse=True):
        os.utime(path)  # now the receipt is the oldest or not: who knows
    assert merge.build(mean(two), tmp_path / "out").outcome == "up to date"


# ------------------------------------------------------------------------------------------------- two at once, renames


def test_a_second_build_of_the_same_result_is_refused(two: dict[str, Path], tmp_path: Path) -> None:
    begun, go = threading.Event(), threading.Event()

    class Waiting(Progress):
        def advance(self, nbytes: int, tensors: int = 0) -> None:
            begun.set()
            go.wait(60)

    first = threading.Thread(target=lambda: merge.build(mean(two), tmp_path / "out", progress=Waiting()))
    first.start()
    assert begun.wait(60)
    with pytest.raises(OutputError, match=rf"is being built by another process \(process {os.getpid()}\)"):
        merge.build(mean(two), tmp_path / "out")
    go.set()
    first.join()
    assert merge.build(mean(two), tmp_path / "out").outcome == "up to date"


class Meanwhile(Progress):
    """Does something once, while tensors are made."""

    def __init__(self, act: Callable[[], object]) -> None:
        self._act: Callable[[], object] | None = act

    def advance(self, nbytes: int, tensors: int = 0) -> None:
        act, self._act = self._act, None
        if act is not None:
            act()


@pytest.mark.parametrize("force", [False, True])
def test_what_came_to_stand_there_during_a_build_is_not_removed(
    force: bool, two: dict[str, Path], tmp_path: Path
) -> None:
    def put() -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "thesis.tex").write_text("years of work")

    with pytest.raises(OutputError, match="exists") as caught:
        merge.build(mean(two), tmp_path / "out", threads=1, progress=Meanwhile(put), force=force)
    assert "5 finished tensors are kept" in caught.value.__notes__[0]
    assert (tmp_path / "out" / "thesis.tex").read_text() == "years of work"
    (tmp_path / "out").rename(tmp_path / "elsewhere")
    assert merge.build(mean(two), tmp_path / "out").outcome == "continued"


def test_an_input_that_changes_while_it_is_read_is_refused_and_named(two: dict[str, Path], tmp_path: Path) -> None:
    merge.build(mean(two), tmp_path / "before")
    file = two["b"] / "model.safetensors"

    def touch() -> None:
        status = file.stat()
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns + 1_000_000_000))

    with pytest.raises(MergeError, match=r"the input b: model\.safetensors changed while it was read"):
        merge.build(mean(two), tmp_path / "out", threads=1, progress=Meanwhile(touch))
    assert not (tmp_path / "out").exists()
    told = Telling()
    assert merge.build(mean(two), tmp_path / "out", progress=told).outcome == "built"  # nothing old is mixed in
    assert "the input b: model.safetensors changed" in told.told[0]
    assert weights(tmp_path / "out") == weights(tmp_path / "before")


@pytest.mark.parametrize("moment", ["between the renames", "before the old one was removed"])
def test_a_process_that_died_while_publishing_loses_nothing(
    moment: str, two: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, work = tmp_path / "out", Work.of(tmp_path / "out")
    merge.build(mean(two), out)
    end_of_it = "out.rename" if moment == "between the renames" else "gone"
    code = (
        "import os, sys; from pathlib import Path; from portmanteau import merge, compositions\n"
        "rename = Path.rename\n"
        "def dying(path, target):\n"
        "    if (path.name, Path(target).name) == DIE: os._exit(9)\n"
        "    return rename(path, target)\n"
        "Path.rename = dying\n"
        "models = {n: merge.open(n, label=n) for n in 'ab'}\n"
        "made = compositions.tensorwise('linear', models=models, settings={'weight': (0.25, 0.75)})\n"
        "merge.build(made, 'out', force=True)\n"
    )
    die = ("result", "out") if end_of_it == "out.rename" else ("replaced", "gone")
    done = subprocess.run([sys.executable, "-c", code.replace("DIE", repr(die))], cwd=tmp_path, check=False, timeout=60)
    assert done.returncode == 9
    assert out.exists() == (moment != "between the renames")
    assert work.replaced.exists()
    if moment == "between the renames":
        assert merge.build(mean(two), out).outcome == "up to date"  # the earlier result is back
    else:
        assert merge.build(mean(two, 0.25, 0.75), out).outcome == "up to date"
    assert not work.replaced.exists()


# --------------------------------------------------------------------------------------------------------- the journal


IDENTITY = {"the recipe": "abc"}


def kept(path: Path, count: int = 3) -> None:
    with Journal(path, IDENTITY, (), lambda: None) as log:
        for i in range(count):
            log.add(Finished(f"tensor {i}", "0" * 64, clean=True))


def test_a_journal_gives_back_what_was_added(tmp_path: Path) -> None:
    kept(tmp_path / "journal")
    read = journal.read(tmp_path / "journal")
    assert read is not None
    assert read.identity == IDENTITY
    assert read.finished == {f"tensor {i}": Finished(f"tensor {i}", "0" * 64, clean=True) for i in range(3)}


def test_a_journal_cut_anywhere_gives_whole_lines_only(tmp_path: Path) -> None:
    kept(tmp_path / "journal")
    raw = (tmp_path / "journal").read_bytes()
    ends = [i for i, byte in enumerate(raw) if byte == ord("\n")]
    for size in range(len(raw)):
        (tmp_path / "cut").write_bytes(raw[:size])
        read = journal.read(tmp_path / "cut")
        whole = sum(size >= end for end in ends)  # the line end itself may be lacking
        assert (len(read.finished) + 1 if read else 0) == whole


def test_a_journal_with_any_byte_flipped_gives_nothing_that_was_not_in_it(tmp_path: Path) -> None:
    kept(tmp_path / "journal")
    raw = (tmp_path / "journal").read_bytes()
    for at in range(len(raw)):
        (tmp_path / "flipped").write_bytes(raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :])
        read = journal.read(tmp_path / "flipped")
        assert read is None or (read.identity == IDENTITY and set(read.finished) < {f"tensor {i}" for i in range(3)})


@pytest.mark.parametrize(
    "line", ['{"tensor": "x", "digest": "0", "clean": true, "also": 1}', '{"name": "x"}', "[1]", '"x"']
)
def test_a_journal_of_another_version_is_not_continued(line: str, two: dict[str, Path], tmp_path: Path) -> None:
    end(two, tmp_path / "out")
    place = Work.of(tmp_path / "out").journal
    head = json.dumps({"the version of portmanteau or torch": "portmanteau 0.0.1"})
    seal = blake3.blake3(head.encode()).digest()
    lines = ((b"", head), (seal, line))
    place.write_text("".join(f"{blake3.blake3(key + text.encode()).hexdigest()[:32]} {text}\n" for key, text in lines))
    assert merge.build(mean(two), tmp_path / "out").outcome == "built"


def test_lines_of_another_build_do_not_pass(tmp_path: Path) -> None:
    kept(tmp_path / "one")
    with Journal(tmp_path / "other", {"the recipe": "xyz"}, (), lambda: None):
        pass
    line = (tmp_path / "one").read_bytes().split(b"\n")[1]
    with (tmp_path / "other").open("ab") as file:
        file.write(line + b"\n")
    read = journal.read(tmp_path / "other")
    assert read is not None
    assert not read.finished


def test_data_is_synced_before_the_journal_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    monkeypatch.setattr(journal, "SYNC_EVERY", 0.0)
    with Journal(tmp_path / "journal", IDENTITY, (), lambda: done.append("weights")) as log:
        monkeypatch.setattr(os, "fsync", lambda descriptor: done.append("journal"))
        log.add(Finished("tensor", "0" * 64, clean=True))
    assert done == ["weights", "journal"]


def test_the_names_of_new_folders_above_a_result_are_synced_too(
    two: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced, sync_folder = list[Path](), output.sync_folder

    def syncing(folder: Path) -> None:
        synced.append(folder)
        sync_folder(folder)

    monkeypatch.setattr(output, "sync_folder", syncing)
    merge.build(mean(two), tmp_path / "new" / "deep" / "out")
    assert {tmp_path, tmp_path / "new", tmp_path / "new" / "deep"} <= set(synced)


def test_everything_is_synced_before_the_result_takes_its_name(
    two: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync, rename, events = os.fsync, Path.rename, list[str]()

    def noting(descriptor: int) -> None:
        events.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        fsync(descriptor)

    def renaming(path: Path, target: Path) -> Path:
        events.append(f"rename {path.name}")
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", noting)
    monkeypatch.setattr(Path, "rename", renaming)
    merge.build(mean(two), tmp_path / "out")
    at = events.index("rename result")
    assert {"model.safetensors", "README.md", "portmanteau.json"} <= set(events[:at])
    assert events[at - 1] == "result"  # the names in it, last of all
    assert tmp_path.name in events[at:]


# ------------------------------------------------------------------------------------------------------------- the lock


@pytest.fixture(params=["flock", "msvcrt", "numbers", "a file system that cannot lock"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every way to lock: that of this system, Windows' (by a double), and a file that holds a number."""
    found = importlib.import_module
    fcntl = found("fcntl")
    held: set[int] = set()

    def locking(descriptor: int, mode: int, count: int) -> None:
        mark = os.fstat(descriptor).st_ino
        if mark in held:
            raise PermissionError
        held.add(mark)

    def unable(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    doubles = {
        "flock": {},
        "msvcrt": {"fcntl": None, "msvcrt": SimpleNamespace(locking=locking, LK_NBLCK=1)},
        "numbers": {"fcntl": None, "msvcrt": None},
        "a file system that cannot lock": {
            "fcntl": SimpleNamespace(flock=unable, LOCK_EX=fcntl.LOCK_EX, LOCK_NB=fcntl.LOCK_NB)
        },
    }[request.param]

    def imported(name: str) -> Any:
        if name in doubles and doubles[name] is None:
            raise ImportError(name)
        return doubles.get(name) or found(name)

    monkeypatch.setattr(importlib, "import_module", imported)
    return str(request.param)


@pytest.mark.usefixtures("way")
def test_a_lock_is_held_by_one_and_free_again_afterwards(tmp_path: Path) -> None:
    release = exclusive.take(tmp_path / "lock")
    assert release is not None
    assert exclusive.take(tmp_path / "lock") is None
    assert exclusive.holder(tmp_path / "lock") == os.getpid()
    release()
    assert not (tmp_path / "lock").exists()


@pytest.mark.usefixtures("way")
def test_a_lock_that_a_dead_process_left_is_free(tmp_path: Path) -> None:
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    (tmp_path / "lock").write_bytes(dead.stdout.strip())
    release = exclusive.take(tmp_path / "lock")
    assert release is not None
    release()


def test_of_two_that_find_a_dead_lock_at_once_one_gets_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock, lives, first = tmp_path / "lock", exclusive._lives, list[Any]()
    monkeypatch.setattr(exclusive, "_way", lambda: None)
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    lock.write_bytes(dead.stdout.strip())

    def slow(number: int) -> bool:  # while one looks whether the process lives, the other takes the lock
        if not first:
            first.append(None)
            first[0] = exclusive.take(lock)
            return False
        return lives(number)

    monkeypatch.setattr(exclusive, "_lives", slow)
    assert exclusive.take(lock) is None
    assert first[0] is not None
    assert exclusive.holder(lock) == os.getpid()
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


def test_a_lock_without_its_number_is_that_of_one_who_is_just_writing_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exclusive, "_way", lambda: None)
    (tmp_path / "lock").touch()
    assert exclusive.take(tmp_path / "lock") is None
    os.utime(tmp_path / "lock", (0, 0))  # one that ended before it wrote
    release = exclusive.take(tmp_path / "lock")
    assert release is not None
    release()


# -------------------------------------------------------------------------------------------------------------- storage


def test_a_file_that_is_continued_keeps_what_it_holds(tmp_path: Path) -> None:
    PositionalFile(tmp_path / "x", size=8).write(b"01234567", 0)
    PositionalFile(tmp_path / "x", size=8, again=True).write(b"ab", 2)
    assert (tmp_path / "x").read_bytes() == b"01ab4567"


def test_the_receipt_of_a_continued_build_is_that_of_an_undisturbed_one(two: dict[str, Path], tmp_path: Path) -> None:
    merge.build(mean(two), tmp_path / "whole")
    end(two, tmp_path / "out")
    merge.build(mean(two), tmp_path / "out")
    receipts = [json.loads((tmp_path / name / "portmanteau.json").read_text()) for name in ("whole", "out")]
    for receipt in receipts:
        del receipt["seconds"], receipt["seal"]
    assert receipts[0] == receipts[1]
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == set(receipts[0]["outputs"])
