"""A run's folder that somebody changed runs no code when the run goes on."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from deadhead.disk.checksums import write_checksums
from deadhead.errors import InputError
from tests.hostile_files import write_pickle
from tests.small_phase import phase_recipe, run_phase

_RECIPE = phase_recipe(steps=4, save_every=2)


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("killed")
    run_phase(folder, _RECIPE, kill=3)
    return folder


@pytest.mark.parametrize("plainly", [False, True])
@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "pytorch_model.bin", "scaler.pt"])
def test_a_pickle_is_named_and_not_run(name: str, plainly: bool, killed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(killed, folder)
    (checkpoint,) = (folder / "checkpoints").iterdir()
    write_pickle(checkpoint / name, tmp_path / "touched", plainly=plainly)
    # Whoever changes a file can write its hash anew.
    write_checksums(checkpoint)
    with pytest.raises(InputError, match=f"{name} is damaged or holds more than tensors and plain values") as caught:
        run_phase(folder, _RECIPE, resume=True)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "touched").exists()


def test_what_nobody_reads_is_not_run(killed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(killed, folder)
    (checkpoint,) = (folder / "checkpoints").iterdir()
    assert (checkpoint / "training_args.bin").exists()
    write_pickle(checkpoint / "training_args.bin", tmp_path / "touched")
    write_checksums(checkpoint)
    run_phase(folder, _RECIPE, resume=True)
    assert not (tmp_path / "touched").exists()


def test_the_bomb_is_one(tmp_path: Path) -> None:
    """What the other tests find harmless would do harm to who reads it without care."""
    import torch

    write_pickle(tmp_path / "optimizer.pt", tmp_path / "touched")
    torch.load(tmp_path / "optimizer.pt", weights_only=False)
    assert (tmp_path / "touched").exists()
