"""Steps of a pass over layers: what is kept is found again, and what was not finished does not count."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from deadhead.errors import InputError
from deadhead.streaming import steps as module
from deadhead.streaming.steps import Steps


def _states(value: float) -> dict[str, list[torch.Tensor]]:
    return {"dense": [torch.full((2, 3), value + batch) for batch in range(12)], "cut": [torch.zeros(1)]}


def test_what_is_kept_is_found_again_in_its_order(tmp_path: Path) -> None:
    steps = Steps(tmp_path / "pass")
    assert steps.done == 0
    for step in range(3):
        steps.keep(step, {"a": torch.tensor([float(step)])}, {"word": str(step)}, _states(100.0 * step))
    again = Steps(tmp_path / "pass")
    assert again.done == 3
    found, words = again.found(1)
    assert found["a"].tolist() == [1.0] and words["word"] == "1"
    states = again.states(3)
    assert [float(state[0, 0]) for state in states["dense"]] == [200.0 + batch for batch in range(12)]
    assert len(states["cut"]) == 1
    # Only those before the next step take room.
    assert [path.name for path in sorted((tmp_path / "pass").glob("states-*"))] == ["states-00003.safetensors"]


def test_states_before_every_step_stay_where_they_are_needed(tmp_path: Path) -> None:
    steps = Steps(tmp_path, keeps_states=True)
    for step in range(3):
        steps.keep(step, {}, {}, _states(float(step)))
    assert [float(steps.states(step + 1)["dense"][0][0, 0]) for step in range(3)] == [0.0, 1.0, 2.0]


def test_a_step_that_was_stopped_while_it_was_kept_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = Steps(tmp_path)
    steps.keep(0, {}, {}, _states(1.0))
    save = module.save_file

    def stop(tensors: dict[str, torch.Tensor], path: str, **how: object) -> None:
        if "layer-" in path:
            raise KeyboardInterrupt
        save(tensors, path, **how)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "save_file", stop)
    with pytest.raises(KeyboardInterrupt):
        steps.keep(1, {}, {}, _states(2.0))
    assert steps.done == 1
    assert float(steps.states(1)["dense"][0][0, 0]) == 1.0
    assert not list(tmp_path.glob(".*"))


def test_a_damaged_file_is_told_of(tmp_path: Path) -> None:
    steps = Steps(tmp_path / "out.work" / "pass")
    steps.keep(0, {"a": torch.ones(3)}, {}, _states(1.0))
    steps.path(0).write_bytes(b"x")
    with pytest.raises(InputError, match="left, is damaged .*; delete .*out.work and start again"):
        steps.found(0)
