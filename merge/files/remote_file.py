"""A `.safetensors` file on the Hub of which only the header is here: enough to plan with, read by byte ranges."""

from __future__ import annotations

from pathlib import Path

from ..errors import CheckpointError
from .safetensors_header import PREFIX, header_length, parse_header
from .weight_file import WeightFile

_FIRST = 100_000  # bytes of the first request: most headers are shorter
_SECONDS = 30.0  # without an answer


class RemoteFile(WeightFile):
    """The specs of a file's tensors; their bytes are not here."""

    def __init__(self, path: Path, where: str, url: str) -> None:
        """Fetch the header.

        Args:
            path: where the file would be, if it were downloaded.
            where: what messages call it.
            url: where the Hub has it.

        Raises CheckpointError for a file that is not whole, or the Hub client's own errors.

        """
        self.path, self._where = path, where
        begin, self.size = _ranged(url, 0, _FIRST)
        length = header_length(begin[:PREFIX], where)
        raw = begin[PREFIX : PREFIX + length]
        if len(raw) < length and len(begin) == _FIRST:
            raw += _ranged(url, _FIRST, PREFIX + length)[0]
        if self.size < 0:
            raise CheckpointError(where, "the Hub does not say how large it is", "try again later")
        found = parse_header(raw, self.size, where)
        self.specs, self.metadata, self.digest = found.specs, found.metadata, found.digest

    def read_into(self, name: str, buffer: memoryview, at: int = 0) -> None:
        """Refuse: the bytes are not here."""
        raise CheckpointError(f"{self._where}: tensor {name}", "is on the Hub: only the header was read")


def _ranged(url: str, begin: int, end: int) -> tuple[bytes, int]:
    """Fetch some bytes of a file, and tell how many it has. A server that sends all of it is cut short."""
    from huggingface_hub import get_session
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status  # type: ignore[attr-defined]

    headers = {**build_hf_headers(), "Range": f"bytes={begin}-{end - 1}", "Accept-Encoding": "identity"}
    with get_session().stream("GET", url, headers=headers, timeout=_SECONDS) as response:
        hf_raise_for_status(response)
        whole = response.status_code != 206
        skip, found = begin if whole else 0, b""
        for chunk in response.iter_bytes():
            found += chunk
            if len(found) >= skip + end - begin:
                break
        size = response.headers.get("Content-Length" if whole else "Content-Range", "").rpartition("/")[2]
    return found[skip : skip + end - begin], int(size) if size.isdecimal() else -1
