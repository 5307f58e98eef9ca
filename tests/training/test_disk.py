"""A disk that is full at any write of a run, or that cannot be written: one sentence, nothing lost, and it goes on."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks._kills import fill_disk, small_disk
from deadhead.cli import execute
from deadhead.training.recipes.reading import to_toml
from tests.small_runs import child, small_recipe, tree, write_prose

pytestmark = pytest.mark.slow

_PROGRAM = """
import random, shutil, sys
from pathlib import Path
from transformers.utils import logging
from benchmarks._kills import attempt, differences, kills_recipe, seconds_of, small_disk

logging.disable_progress_bar()
logging.set_verbosity_error()
place, seed, times = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
recipe, draw = kills_recipe(place), random.Random(seed)
seconds_of(recipe, place / "whole")
changes = int((place / "whole.changes").read_text())
with small_disk(place / "disk") as disk:
    run, ballast, refused = disk / "run", disk / "ballast", 0
    for index in range(times):
        # One in each equal share of the changes; at the last ones nothing more is written.
        change = draw.randrange(index * changes // times, (index + 1) * changes // times) + 1
        code = attempt(recipe, run, at_change=change, fill=ballast)
        assert code in (0, 2), (change, code)
        refused += code == 2
        ballast.unlink(missing_ok=True)
        assert not run.exists() or not list(run.rglob(".*")), change
        assert attempt(recipe, run) == 0, change
        found = differences(run, place / "whole")
        assert not found, (change, found)
        shutil.rmtree(run)
assert refused >= 0.9 * times, refused
"""


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk") as folder:
        if folder is None:
            pytest.skip("A file system can be mounted by root only.")
        yield folder


@pytest.mark.parametrize(("seed", "times"), [(0, 3), pytest.param(1, 30, marks=pytest.mark.full)])
def test_full_at_a_random_write(seed: int, times: int, disk: Path, tmp_path: Path) -> None:
    """Each time of another run, which then goes on to what it would have come to."""
    (tmp_path / "here").mkdir()
    process = child(_PROGRAM, str(tmp_path / "here"), str(seed), str(times))
    output, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors[-3000:]
    assert output == ""
    said = errors.splitlines()
    assert len(said) >= 0.9 * times
    for line in said:
        assert line.startswith("No space is left on the device while writing ")
        assert line.endswith("; free some and try again.")
        assert "/." not in line


def test_a_disk_that_cannot_be_written(disk: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Neither at the beginning, nor in the middle of a run, nor for its page; what there is stays as it is."""
    recipe = tmp_path / "r.toml"
    recipe.write_text(to_toml(small_recipe(write_prose(tmp_path))))
    run = ["run", str(recipe), "--out", str(disk / "run"), "--quiet"]

    def refused(arguments: list[str], sentence: str) -> None:
        before = tree(disk)
        capfd.readouterr()
        assert execute(arguments) == 2
        output, errors = capfd.readouterr()
        assert output == ""
        assert sentence in errors and errors.count("\n") == 1, errors
        assert tree(disk) == before

    def remount(mode: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{mode}", str(disk)], check=True)

    remount("ro")
    refused(run, "cannot be written: Read-only file system; choose another place.")
    remount("rw")
    assert execute(run) == 0
    for name in ("pruned", "report.html"):
        subprocess.run(["rm", "-r", str(disk / "run" / name)], check=True)
    remount("ro")
    refused([*run, "--resume"], "cannot be written: Read-only file system; choose another place.")
    refused(["report", str(disk / "run")], "cannot be written: Read-only file system; choose another place.")
    remount("rw")
    fill_disk(disk / "ballast")
    refused([*run, "--resume"], "No space is left on the device while writing")
    refused(["report", str(disk / "run")], "No space is left on the device while writing")
    (disk / "ballast").unlink()
    assert execute([*run, "--resume"]) == 0
    assert (disk / "run" / "pruned" / "config.json").exists()
    capfd.readouterr()
