"""Ctrl-C and SIGTERM: the step is finished and saved, the signal takes effect, and the run goes on bit for bit."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from deadhead import HeadPlan
from deadhead.cli import execute
from deadhead.training import PhaseRecipe
from deadhead.training.callbacks import stopping
from deadhead.training.phases.checkpoints import checkpoint_step, last_checkpoint
from deadhead.training.recipes.reading import to_toml
from tests.small_phase import At, phase_recipe, prune_recipe, run_phase
from tests.small_runs import assert_same_tensors, child, metrics, small_recipe, weights, write_prose

_MAIN = "from deadhead.cli import main; main()"


def _raising(number: int) -> Callable[[Any], None]:
    return lambda _: signal.raise_signal(number)


class _Terminated(Exception):
    """What the test's own handler of SIGTERM raises."""


def _terminate(*_: object) -> None:
    raise _Terminated


@pytest.fixture
def handling() -> Iterator[None]:
    """Handle SIGTERM, which would end the tests, and SIGINT, which what a shell runs in the background ignores."""
    handlers = {signal.SIGTERM: _terminate, signal.SIGINT: signal.default_int_handler}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    yield
    found = {number: signal.signal(number, handler) for number, handler in before.items()}
    assert found == handlers


@pytest.mark.parametrize(
    "recipe",
    [
        # Neither logged nor saved at that step: means and checkpoints must not tell that it was stopped there.
        pytest.param(
            phase_recipe(steps=8, save_every=100, log_every=3, gradient_accumulation=2, schedule="cosine"),
            marks=pytest.mark.slow,
        ),
        prune_recipe(steps=8, save_every=4, log_every=5, sparsity=0.5, gate_lr=None, weighting="output_difference"),
    ],
    ids=["train", "prune"],
)
@pytest.mark.parametrize(
    ("number", "raised"),
    [pytest.param(signal.SIGINT, KeyboardInterrupt, marks=pytest.mark.slow), (signal.SIGTERM, _Terminated)],
)
def test_the_step_is_finished_and_saved(
    number: int, raised: type[BaseException], recipe: PhaseRecipe, tmp_path: Path, handling: None
) -> None:
    whole, _ = run_phase(tmp_path / "whole", recipe)
    with pytest.raises(raised):
        run_phase(tmp_path / "stopped", recipe, callbacks=(At(5, _raising(number)),))
    assert (
        last_checkpoint(tmp_path / "stopped" / "checkpoints") == tmp_path / "stopped" / "checkpoints" / "checkpoint-5"
    )
    resumed, _ = run_phase(tmp_path / "stopped", recipe, resume=True)
    assert_same_tensors(resumed.state_dict(), whole.state_dict())
    assert metrics(tmp_path / "stopped") == metrics(tmp_path / "whole")


@pytest.mark.parametrize(
    ("second", "count", "step"),
    [(signal.SIGINT, 1, 2), (signal.SIGINT, 2, 3), (signal.SIGTERM, 2, 2)],
    ids=["twice", "passed on by a launcher", "another"],
)
def test_a_second_signal_takes_effect_at_once(
    second: int, count: int, step: int, tmp_path: Path, handling: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for the same one within seconds, where a launcher started several processes: a scheduler signals them too."""

    def twice(_: Any) -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(second)

    monkeypatch.setattr(stopping, "processes", SimpleNamespace(count=lambda: count))
    with pytest.raises(KeyboardInterrupt if second == signal.SIGINT else _Terminated):
        run_phase(tmp_path, phase_recipe(save_every=2), callbacks=(At(3, twice),))
    assert last_checkpoint(tmp_path / "checkpoints") == tmp_path / "checkpoints" / f"checkpoint-{step}"


def test_in_the_last_step_training_comes_to_its_end(tmp_path: Path, handling: None) -> None:
    with pytest.raises(KeyboardInterrupt):
        run_phase(tmp_path, phase_recipe(save_every=4), callbacks=(At(6, _raising(signal.SIGINT)),))
    assert last_checkpoint(tmp_path / "checkpoints") == tmp_path / "checkpoints" / "checkpoint-6"


def test_without_checkpoints_nothing_is_saved(tmp_path: Path, handling: None) -> None:
    with pytest.raises(KeyboardInterrupt):
        run_phase(tmp_path, phase_recipe(save_every=0), callbacks=(At(3, _raising(signal.SIGINT)),))
    assert not list((tmp_path / "checkpoints").glob("*"))


def test_a_handler_that_lets_it_pass_does_not_make_half_a_training_whole(tmp_path: Path, handling: None) -> None:
    told: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: told.append(number))
    try:
        with pytest.raises(KeyboardInterrupt):
            run_phase(tmp_path, phase_recipe(save_every=2), callbacks=(At(3, _raising(signal.SIGTERM)),))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert told == [signal.SIGTERM]


def test_ignored_signals_stay_ignored(tmp_path: Path, handling: None) -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        run_phase(tmp_path, phase_recipe(save_every=2), callbacks=(At(3, _raising(signal.SIGINT)),))
    finally:
        signal.signal(signal.SIGINT, before)
    assert last_checkpoint(tmp_path / "checkpoints") == tmp_path / "checkpoints" / "checkpoint-6"


def test_outside_of_the_main_thread_signals_are_left_alone(tmp_path: Path) -> None:
    thread = threading.Thread(target=run_phase, args=(tmp_path, phase_recipe(steps=2, save_every=2)))
    thread.start()
    thread.join()
    assert last_checkpoint(tmp_path / "checkpoints") == tmp_path / "checkpoints" / "checkpoint-2"


@pytest.mark.slow
def test_a_run_is_stopped_and_resumed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From the command line, by each signal: one sentence, its exit code, and the same weights in the end."""
    recipe = small_recipe(write_prose(tmp_path), train={"steps": 450, "save_every": 400, "log_every": 7})
    (tmp_path / "r.toml").write_text(to_toml(recipe))
    # What a shell runs in the background ignores Ctrl-C, and so do its children.
    heeding = f"import signal; signal.signal(signal.SIGINT, signal.default_int_handler); {_MAIN}"
    signals = {signal.SIGINT: (130, "Interrupted"), signal.SIGTERM: (143, "Terminated")}
    command = ("run", str(tmp_path / "r.toml"), "--out")
    processes = {}
    for number in signals:
        # One after the other: a second one would run ahead while the first is waited for.
        process = processes[number] = child(heeding, *command, str(tmp_path / number.name))
        lines = tmp_path / number.name / "metrics.jsonl"
        deadline = time.monotonic() + 120
        while not lines.exists() or lines.read_text().count("\n") < 2:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.002)
        os.kill(process.pid, number)
    assert execute([*command, str(tmp_path / "whole"), "--quiet"]) == 0
    for number, process in processes.items():
        code, word = signals[number]
        output, errors = process.communicate(timeout=60)
        assert process.returncode == code, errors
        assert errors == f"deadhead: {word}; complete checkpoints are kept, and --resume continues from the last one.\n"
        assert output == ""
        run = tmp_path / number.name
        checkpoint = last_checkpoint(run / "checkpoints" / "train")
        # A step of its own: there is no other reason for a checkpoint before step 400.
        assert checkpoint is not None and 14 <= checkpoint_step(checkpoint) < 400
        assert json.loads((checkpoint / "trainer_state.json").read_text())["global_step"] == checkpoint_step(checkpoint)
        assert not list(run.rglob(".*"))

        assert execute([*command, str(run), "--resume", "--quiet"]) == 0
        for name in ("dense", "gated", "pruned"):
            assert_same_tensors(weights(run / name), weights(tmp_path / "whole" / name))
        assert metrics(run) == metrics(tmp_path / "whole")
        assert HeadPlan.from_json(run / "head_plan.json") == HeadPlan.from_json(tmp_path / "whole" / "head_plan.json")
    capsys.readouterr()
