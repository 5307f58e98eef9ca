"""The table of quantised models runs through, where llm-compressor is missing too."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from torch import nn

from benchmarks.quantised import PLAIN, SCHEMES, group_size_of
from deadhead.errors import is_installed

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_every_checkpoint_has_its_rows() -> None:
    command = [sys.executable, "benchmarks/quantised.py", "--quick", "--threads", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    cells = [line.split("│")[1:3] for line in done.stdout.splitlines() if line.startswith("│")]
    has_library = is_installed("llmcompressor")
    assert ("so nothing is quantised" in done.stdout) != has_library
    wanted = (PLAIN, *SCHEMES) if has_library else (PLAIN,)
    found = [(name.strip(), weights.strip().partition(",")[0]) for name, weights in cells]
    assert found == [(name, scheme) for name in ("dense", "cut") for scheme in wanted]


@pytest.mark.parametrize(("widths", "size"), [((256, 128), 128), ((576, 1536), 64), ((576, 96, 160), 32), ((37,), 128)])
def test_groups_are_as_large_as_fits_most(widths: tuple[int, ...], size: int) -> None:
    assert group_size_of(nn.ModuleList(nn.Linear(width, 8) for width in widths)) == size
