"""Sizes of memory, as they are asked for and told."""

from __future__ import annotations

import pytest

from deadhead.plans.memory_sizes import in_bytes, size_text


@pytest.mark.parametrize(
    ("size", "count"),
    [
        ("4GiB", 4 * 2**30),
        ("500MB", 500_000_000),
        ("1.5 kB", 1500),
        ("12", 12),
        ("7B", 7),
        ("2KB", 2000),
        ("1 TiB", 2**40),
        (" 3MiB ", 3 * 2**20),
        ("5000000000000000B", 5000 * 10**12),
    ],
)
def test_sizes_are_read(size: str, count: int) -> None:
    assert in_bytes(size) == count


@pytest.mark.parametrize("size", ["", "GiB", "-1GB", "0", "0.4B", "4 gigabytes", "1e9", "nan", "4GiBB", "4,5GB"])
def test_what_is_no_size_is_refused(size: str) -> None:
    with pytest.raises(ValueError, match="a size such as 4GiB or 500MB was expected"):
        in_bytes(size)


def test_sizes_are_told() -> None:
    assert size_text(4.5 * 2**30) == "4.500 GiB"
    assert size_text(1.25 * 2**20) == "1.250 MiB"
