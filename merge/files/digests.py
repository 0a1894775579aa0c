"""Digests of files and of runs of their bytes, in bounded memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import blake3

from .storage import BLOCK, PositionalFile


def digest(data: bytes) -> str:
    """Give the BLAKE3 digest in hexadecimal."""
    return blake3.blake3(data).hexdigest()


def digest_of_run(
    file: PositionalFile, start: int, size: int, advance: Callable[[int], None] = lambda count: None
) -> str:
    """Give the digest of a run of a file's bytes, telling `advance` what is done. EOFError where the file ends."""
    hasher, buffer = blake3.blake3(), memoryview(bytearray(min(BLOCK, size)))
    for at in range(start, start + size, BLOCK):
        block = buffer[: min(BLOCK, start + size - at)]
        file.read_into(block, at)
        hasher.update(block)
        advance(len(block))
    return hasher.hexdigest()


def digest_of_file(path: Path, advance: Callable[[int], None] = lambda count: None) -> str:
    """Give the digest of a whole file."""
    file = PositionalFile(path)
    try:
        return digest_of_run(file, 0, path.stat().st_size, advance)
    finally:
        file.close()
