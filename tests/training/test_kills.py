"""A run that is killed again and again, before changes to files drawn at random, ends as if it never was."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.small_runs import child

pytestmark = pytest.mark.slow

_PROGRAM = """
import random, signal, sys
from pathlib import Path
from transformers.utils import logging
from benchmarks._kills import attempt, differences, kills_recipe, seconds_of

logging.disable_progress_bar()
logging.set_verbosity_error()
place, seed, kills = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
recipe, draw = kills_recipe(place), random.Random(seed)
seconds_of(recipe, place / "whole")
changes = int((place / "whole.changes").read_text())
assert changes > 500, changes
folder = place / "killed"
for _ in range(kills):
    # Somewhere in an equal share of what is left of the run.
    change = draw.randrange(1, 2 * changes // (kills + 1))
    code = attempt(recipe, folder, at_change=change)
    assert code == -signal.SIGKILL, (change, code)
assert attempt(recipe, folder) == 0
found = differences(folder, place / "whole")
assert not found, found
print("survived")
"""


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.full) for seed in range(1, 5))])
def test_killed_before_random_changes(seed: int, tmp_path: Path) -> None:
    process = child(_PROGRAM, str(tmp_path), str(seed), "5")
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors[-3000:]
    assert output == "survived\n"
