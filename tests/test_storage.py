"""Bytes at known places, with everything a system may lack switched off."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from portmanteau import merge
from portmanteau.compositions import tensorwise
from portmanteau.merge.files import storage
from portmanteau.merge.files.storage import PositionalFile, sync_folder

OPTIONAL = ("preadv", "pwrite", "posix_fallocate", "posix_fadvise", "sync_file_range")


def lacking(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    for name in names:
        if name == "sync_file_range":  # Python's library lacks it everywhere
            monkeypatch.setattr(storage, "_sync_file_range", lambda: None)
        monkeypatch.delattr(os, name, raising=False)


@pytest.fixture(params=[(), *((name,) for name in OPTIONAL), OPTIONAL], ids=lambda names: "-".join(names) or "all")
def system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A system that has everything, lacks one thing, lacks all."""
    lacking(monkeypatch, *request.param)


@pytest.mark.usefixtures("system")
def test_what_is_written_in_any_order_is_read_back(tmp_path: Path) -> None:
    file = PositionalFile(tmp_path / "x", size=10)
    file.write(b"67", 6)
    file.write(memoryview(b"0123"), 0)
    file.write(b"", 5)
    file.sync()
    file.close()
    assert (tmp_path / "x").read_bytes() == b"0123\0\0" + b"67" + b"\0\0"
    buffer = bytearray(4)
    PositionalFile(tmp_path / "x").read_into(memoryview(buffer), 2)
    assert buffer == b"23\0\0"


@pytest.mark.usefixtures("system")
def test_reading_past_the_end_is_an_error_that_says_where(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc")
    with pytest.raises(EOFError, match="ends at byte 3"):
        PositionalFile(tmp_path / "x").read_into(memoryview(bytearray(2)), 2)


@pytest.mark.usefixtures("system")
def test_a_file_that_is_made_has_its_full_size_at_once(tmp_path: Path) -> None:
    PositionalFile(tmp_path / "x", size=12345)
    PositionalFile(tmp_path / "empty", size=0)
    assert [(tmp_path / name).stat().st_size for name in ("x", "empty")] == [12345, 0]


def test_space_is_reserved_and_not_only_promised(tmp_path: Path) -> None:
    PositionalFile(tmp_path / "x", size=1 << 20)
    assert (tmp_path / "x").stat().st_blocks * 512 >= 1 << 20


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.EINVAL])
def test_a_file_system_that_cannot_reserve_gets_a_file_of_that_size(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    PositionalFile(tmp_path / "x", size=77)
    assert (tmp_path / "x").stat().st_size == 77


def test_a_file_is_never_made_over_another(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"mine")
    with pytest.raises(FileExistsError):
        PositionalFile(tmp_path / "x", size=4)
    assert (tmp_path / "x").read_bytes() == b"mine"


@pytest.mark.usefixtures("system")
def test_short_reads_and_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system may take or give fewer bytes than asked for: here at most three at a time."""
    read, write = os.read, os.write
    monkeypatch.setattr(os, "read", lambda d, n: read(d, min(n, 3)))
    monkeypatch.setattr(os, "write", lambda d, b: write(d, b[:3]))
    if hasattr(os, "pwrite"):
        pwrite = os.pwrite
        monkeypatch.setattr(os, "pwrite", lambda d, b, at: pwrite(d, b[:3], at))
    if hasattr(os, "preadv"):
        preadv = os.preadv
        monkeypatch.setattr(os, "preadv", lambda d, buffers, at: preadv(d, [buffers[0][:3]], at))
    PositionalFile(tmp_path / "x", size=11).write(b"hello world", 0)
    buffer = bytearray(11)
    PositionalFile(tmp_path / "x").read_into(memoryview(buffer), 0)
    assert buffer == b"hello world"


@pytest.mark.usefixtures("system")
def test_threads_do_not_disturb_each_other(tmp_path: Path) -> None:
    file, wrong = PositionalFile(tmp_path / "x", size=8 * 4096), list[int]()

    def work(own: int) -> None:
        block, buffer = bytes([own]) * 4096, bytearray(4096)
        for _ in range(50):
            file.write(block, own * 4096)
            file.read_into(memoryview(buffer), own * 4096)
            if buffer != block:
                wrong.append(own)

    threads = [threading.Thread(target=work, args=(own,)) for own in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert (tmp_path / "x").read_bytes() == b"".join(bytes([own]) * 4096 for own in range(8))


def test_a_folder_that_cannot_be_opened_is_not_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise PermissionError(errno.EACCES, "as on Windows")

    sync_folder(tmp_path)
    monkeypatch.setattr(os, "open", refuse)
    sync_folder(tmp_path)


def test_a_system_that_lacks_everything_builds_the_same_bytes(
    save_llama: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = {name: merge.open(save_llama(name, seed)) for seed, name in enumerate("ab")}
    merged = tensorwise("linear", models=models)

    def built(name: str) -> dict[str, bytes]:
        merge.build(merged, tmp_path / name, dtype="bfloat16", shard_size=10_000, threads=4)
        return {path.name: path.read_bytes() for path in (tmp_path / name).glob("*.safetensors*")}

    expected = built("all")
    lacking(monkeypatch, *OPTIONAL)
    assert built("none") == expected
    assert len(expected) > 3


@pytest.mark.usefixtures("system")
def test_what_is_forgotten_is_still_there(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"0123456789")
    file = PositionalFile(tmp_path / "x")
    file.forget(2, 4)
    file.forget()
    buffer = bytearray(10)
    file.read_into(memoryview(buffer), 0)
    assert buffer == b"0123456789"


def test_a_file_that_cannot_be_forgotten_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ESPIPE, os.strerror(errno.ESPIPE))

    (tmp_path / "x").write_bytes(b"x")
    monkeypatch.setattr(os, "posix_fadvise", refuse, raising=False)
    PositionalFile(tmp_path / "x").forget()


def test_the_memory_of_the_machine_is_what_the_kernel_says(monkeypatch: pytest.MonkeyPatch) -> None:
    table = Path("/proc/meminfo")
    if table.exists():
        total = int(table.read_text().split()[1]) * 1024
        assert storage.physical_memory() == total
    monkeypatch.delattr(os, "sysconf", raising=False)
    assert storage.physical_memory() is None


def test_written_stretches_are_sent_to_the_disk_as_soon_as_they_are_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[tuple[int, int]] = []
    monkeypatch.setattr(storage, "_STRETCH", 100)
    monkeypatch.setattr(storage, "_sync_file_range", lambda: lambda _, offset, count, how: sent.append((offset, count)))
    file = PositionalFile(tmp_path / "x", size=1000)
    for offset, count in ((0, 99), (99, 1), (100, 350), (450, 10)):
        file.write(bytes(count), offset)
    assert sent == [(0, 100), (100, 300)]
