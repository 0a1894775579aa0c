"""Which checkpoint this is, told from a few samples of every tensor: cheap enough to be asked before a merge."""

from __future__ import annotations

import blake3

from ..stored import StoredCheckpoint

_SAMPLES = 16  # runs in each tensor, evenly spread: even a change of 1 % of its entries meets some of them
_RUN = 256  # bytes in a run


def fingerprint(checkpoint: StoredCheckpoint) -> str:
    """Give a digest (BLAKE3) of all names, dtypes and shapes, and of 4 KiB of every tensor, in runs spread over it.

    It does not depend on how the tensors are spread over files. Two checkpoints that differ only in a few entries can
    have the same one: it tells models apart, it does not prove that files are whole. Of a checkpoint whose bytes are
    still on the Hub it is empty.
    """
    if checkpoint.bytes_to_download:
        return ""
    hasher = blake3.blake3()
    for name in sorted(checkpoint.specs):
        spec = checkpoint.specs[name]
        hasher.update(f"{name}\0{spec.dtype}\0{list(spec.shape)}\0".encode())
        step = max(_RUN, spec.nbytes // _SAMPLES // _RUN * _RUN)
        for at in range(0, spec.nbytes, step):
            run = min(_RUN, spec.nbytes - at)
            buffer = bytearray(run)
            checkpoint.read_into(name, memoryview(buffer), at)
            hasher.update(buffer)
    return hasher.hexdigest()
