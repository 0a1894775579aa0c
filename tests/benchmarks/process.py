"""One process measured from outside: wall time, processor time, and peak memory of its whole tree."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

_BIN = Path(sys.executable).parent
_RSS_UNIT = 1 if sys.platform == "darwin" else 1024
_EVERY = 0.02  # seconds between two looks at the memory of a tree
_FOREIGN = ("PYTHONDONTWRITEBYTECODE", "OMP_NUM_THREADS", "MKL_NUM_THREADS")  # a developer's; no user has them


@dataclass(frozen=True)
class Cost:
    """What one process took: wall seconds, processor seconds (user and system), and peak resident bytes."""

    seconds: float
    processor: float
    peak: int


def measure(command: Sequence[str | Path], log: Path) -> Cost:
    """Run a command to its end, its output in a log file. Raises SystemExit with the log where it fails.

    Everything written before is synced first, so that nobody pays for another's writes. The peak is the kernel's
    `ru_maxrss`, which counts the pages of mapped files too, of the largest process; where there are several at once,
    the sum that was seen, looking fifty times a second.
    """
    os.sync()
    with log.open("wb") as output:
        begun = time.perf_counter()
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=_environment()
        )
        with _Watch(child.pid) as watch:
            _, status, usage = os.wait4(child.pid, 0)
            seconds = time.perf_counter() - begun
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}: status {child.returncode}\n{log.read_text(errors='replace')}")
    return Cost(seconds, usage.ru_utime + usage.ru_stime, max(usage.ru_maxrss * _RSS_UNIT, watch.peak))


def _environment() -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if key not in _FOREIGN}
    return {**kept, "HF_HUB_OFFLINE": "1", "PATH": f"{_BIN}{os.pathsep}{os.environ['PATH']}"}


class _Watch(threading.Thread):
    """Looks at what a process and its descendants hold together, as long as there are descendants."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.peak = 0
        self._pid, self._over = pid, threading.Event()

    def __enter__(self) -> _Watch:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self.join()

    def run(self) -> None:
        while not self._over.wait(_EVERY):
            tree = list(_tree(self._pid))
            if len(tree) > 1:
                self.peak = max(self.peak, sum(map(_resident, tree)))


def _tree(pid: int) -> Iterator[int]:
    """Go through a process and its descendants, as far as this system tells."""
    yield pid
    for children in _lists_of_children(pid):
        try:
            found = children.read_text().split()
        except OSError:  # it has just ended
            continue
        for child in found:
            yield from _tree(int(child))


def _lists_of_children(pid: int) -> Sequence[Path]:
    try:
        return [*Path(f"/proc/{pid}/task").glob("*/children")]
    except OSError:  # it has just ended
        return ()


def _resident(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def machine() -> str:
    """Say what was measured on, when, and how busy it was."""
    cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [line.partition(":")[2].strip() for line in cpuinfo.splitlines() if line.startswith("model name")]
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    load = os.getloadavg()[0]
    busy = f"; load {load:.1f} at the beginning, so the machine was busy" if load > 0.5 else ""
    date = time.strftime("%Y-%m-%d")
    return f"{date}, {names[0] if names else platform.machine()}, {os.cpu_count()} processors, {memory:.0f} GiB{busy}"
