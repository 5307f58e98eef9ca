"""Checkpoints on a phase's way: damaged ones are named and passed over, and the run ends in the same weights."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from deadhead import InputError
from deadhead.checkpoints.gate_files import GATES_CONFIG_FILE, GATES_FILE
from deadhead.errors import RunWarning
from deadhead.training.phases.checkpoints import checkpoints, last_checkpoint, newest_finished
from tests.small_phase import phase_recipe, prune_recipe, run_phase
from tests.small_runs import assert_same_tensors, metrics, weights

_RECIPE = phase_recipe(steps=6, save_every=2)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    run_phase(folder, _RECIPE)
    return folder


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a phase that was killed after checkpoints at its steps 2 and 4."""
    folder = tmp_path_factory.mktemp("killed")
    run_phase(folder, _RECIPE, kill=5)
    return folder


def test_the_newest_two_stay(whole: Path, killed: Path, tmp_path: Path) -> None:
    assert [path.name for path in checkpoints(killed / "checkpoints")] == ["checkpoint-2", "checkpoint-4"]
    assert [path.name for path in checkpoints(whole / "checkpoints")] == ["checkpoint-4", "checkpoint-6"]
    run_phase(tmp_path, _RECIPE.model_copy(update={"save_total_limit": 1}))
    assert [path.name for path in checkpoints(tmp_path / "checkpoints")] == ["checkpoint-6"]


def _unlink(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def _cut_short(name: str, keep: int) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:keep])


def _flip(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        content = bytearray((folder / name).read_bytes())
        draw = random.Random(name)
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        (folder / name).write_bytes(content)

    return damage


_FILES = (
    *("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "config.json"),
    "deadhead_rank0.safetensors",
)
_DAMAGES = {
    **{f"{name} missing": (_unlink(name), name) for name in _FILES},
    **{f"{name} flipped": (_flip(name), name) for name in _FILES},
    **{f"{name} cut at {keep}": (_cut_short(name, keep), name) for name in _FILES for keep in (0, 1, 100, -1)},
    # What was being written when the process was killed has no list yet, and needs no word.
    "list missing": (_unlink("SHA256SUMS"), None),
    "list empty in the middle": (_cut_short("SHA256SUMS", 30), "SHA256SUMS"),
}


@pytest.mark.parametrize("name", _DAMAGES)
def test_damage_is_found_and_named(name: str, killed: Path, tmp_path: Path) -> None:
    damage, file = _DAMAGES[name]
    folder = tmp_path / "checkpoints"
    shutil.copytree(killed / "checkpoints", folder)
    damage(folder / "checkpoint-4")
    if file is None:
        assert last_checkpoint(folder) == newest_finished(folder) == folder / "checkpoint-2"
    else:
        with pytest.warns(
            RunWarning, match=f"The checkpoint .*checkpoint-4 is damaged: {file} is not what was"
        ) as said:
            assert last_checkpoint(folder) == folder / "checkpoint-2"
        assert len(said) == 1


@pytest.mark.parametrize("name", ["optimizer.pt flipped", "model.safetensors cut at 100", "list missing"])
def test_an_older_one_is_taken_instead(name: str, killed: Path, whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(killed, folder)
    damage, file = _DAMAGES[name]
    damage(folder / "checkpoints" / "checkpoint-4")
    if file is None:
        run_phase(folder, _RECIPE, resume=True)
    else:
        with pytest.warns(RunWarning, match="is skipped"):
            run_phase(folder, _RECIPE, resume=True)
    for step in (4, 6):
        place = f"checkpoints/checkpoint-{step}"
        assert_same_tensors(weights(folder / place), weights(whole / place))
    assert metrics(folder) == metrics(whole)


def test_without_a_good_one_the_phase_begins_anew(killed: Path, whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(killed, folder)
    for step in (2, 4):
        _flip("model.safetensors")(folder / "checkpoints" / f"checkpoint-{step}")
    with pytest.warns(RunWarning, match="is skipped") as said:
        run_phase(folder, _RECIPE, resume=True)
    assert len(said) == 2
    last = "checkpoints/checkpoint-6"
    assert_same_tensors(weights(folder / last), weights(whole / last))
    assert metrics(folder) == metrics(whole)


@pytest.fixture(scope="module")
def gated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gated")
    run_phase(folder, prune_recipe(steps=2, save_every=1))
    return folder / "checkpoints"


@pytest.mark.parametrize("name", [GATES_FILE, GATES_CONFIG_FILE])
@pytest.mark.parametrize("damage", [_unlink, _flip])
def test_gates_are_among_what_is_known_to_be_whole(
    name: str, damage: Callable[[str], Callable[[Path], None]], gated: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "checkpoints"
    shutil.copytree(gated, folder)
    assert last_checkpoint(folder) == folder / "checkpoint-2"
    damage(name)(folder / "checkpoint-2")
    with pytest.warns(RunWarning, match=f"checkpoint-2 is damaged: {name} is not what was written"):
        assert last_checkpoint(folder) == folder / "checkpoint-1"


def test_checkpoints_of_an_earlier_training_are_not_written_over(killed: Path) -> None:
    before = [path.stat().st_mtime_ns for path in checkpoints(killed / "checkpoints")]
    with pytest.raises(InputError, match="holds checkpoints of an earlier training; continue it with resume=True"):
        run_phase(killed, _RECIPE)
    assert [path.stat().st_mtime_ns for path in checkpoints(killed / "checkpoints")] == before
