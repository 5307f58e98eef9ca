"""Sizes of memory as text: "4GiB" in options, "3.971 GiB" in reports."""

from __future__ import annotations

import re

_UNITS = {"B": 1}
_UNITS |= {f"{prefix}B": 1000**power for power, prefix in enumerate("kMGT", 1)}
_UNITS |= {f"{prefix}iB": 1024**power for power, prefix in enumerate("kMGT", 1)}
_SIZE = re.compile(r"(\d{1,20}(?:\.\d{1,6})?) ?([kKMGT]?B|[kKMGT]iB)?")


def in_bytes(size: str) -> int:
    """Return the bytes of a size such as "4GiB"; without a unit it is in bytes.

    Raises:
        ValueError: it is not a size, or it is 0.
    """
    found = _SIZE.fullmatch(size.strip())
    count = 0 if found is None else round(float(found[1]) * _UNITS[(found[2] or "B").replace("K", "k")])
    if count < 1:
        raise ValueError("a size such as 4GiB or 500MB was expected")
    return count


def size_text(count: float) -> str:
    """Return a number of bytes as text."""
    return f"{count / 2**30:.3f} GiB" if count >= 2**30 else f"{count / 2**20:.3f} MiB"
