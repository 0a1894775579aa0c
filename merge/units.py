"""Sizes as people write and read them."""

from __future__ import annotations

import re

_LONGEST = 40  # signs of a size
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([kmgt]?)(i?)b?", re.IGNORECASE)


def byte_count(text: str | int) -> int:
    """Read a number of bytes: `5GB`, `512MiB`, `1000`.

    >>> byte_count("5GB"), byte_count("1MiB")
    (5000000000, 1048576)
    """
    written = str(text).strip()
    match = _SIZE.fullmatch(written) if len(written) <= _LONGEST else None
    if match is None or not float(match[1]):
        raise ValueError(f"{text!r} is no size: write 5GB, 512MiB or a number of bytes")
    power = " kmgt".index(match[2].lower() or " ")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** power)


def readable(nbytes: float) -> str:
    """Write a number of bytes for people, in powers of 1000.

    >>> readable(2_200_000_000), readable(512)
    ('2.2 GB', '512 B')
    """
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} B" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.1f} TB"
