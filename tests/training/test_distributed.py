"""A run of two processes: its folder is written by one of them, and it survives that one is killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

import deadhead
from deadhead import InputError
from deadhead.training import Run
from deadhead.training.recipes.reading import load_recipe, to_toml
from tests.small_runs import assert_same_tensors, metrics, small_recipe, weights, write_prose
from tests.training.launching import launch

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a text and recipes."""
    folder = tmp_path_factory.mktemp("processes")
    text = write_prose(folder)
    whole = small_recipe(text, prune={"sparsity": 0.5, "start_from": "taylor", "start_batches": 2})
    (folder / "whole.toml").write_text(to_toml(whole))
    ranked = small_recipe(text, prune={"criterion": "taylor", "sparsity": 0.5}, dense=str(folder / "whole" / "dense"))
    (folder / "ranked.toml").write_text(to_toml(ranked))
    (folder / "missing.toml").write_text(to_toml(small_recipe(folder / "missing.txt")))
    return folder


@pytest.fixture(scope="module")
def whole(place: Path) -> subprocess.CompletedProcess[str]:
    """Return what `torchrun -m deadhead run` said."""
    return launch(place, "-m", "deadhead", "run", "whole.toml", "--out", "whole")


def test_a_run_of_two_processes(place: Path, whole: subprocess.CompletedProcess[str]) -> None:
    """Its folder is complete, and the result is printed once."""
    assert whole.returncode == 0, whole.stderr[-3000:]
    assert whole.stdout.count("What was cut, and what it cost") == 1
    assert whole.stdout.count("The pruned model:") == 1
    assert "Traceback" not in whole.stderr
    summary = json.loads((place / "whole" / "summary.json").read_text())
    assert set(summary) == {
        *("dense", "gated", "cut", "finetuned", "budget", "data", "processes", "versions", "samples", "checksum")
    }
    assert summary["processes"] == 2
    assert sum(summary["finetuned"]["heads"]) == 4
    expected = ("dense", "gated", "pruned", "head_plan.json", "metrics.jsonl", "head_map.png", "recipe.toml")
    assert {*expected} <= {path.name for path in (place / "whole").iterdir()}
    assert not (place / "whole" / "checkpoints").exists()
    steps = [(line["phase"], line["step"]) for line in metrics(place / "whole")]
    assert steps == [(phase, step + 1) for phase, count in _STEPS.items() for step in range(count)]


_STEPS = {"train": 3, "prune": 5, "finetune": 3}

# One of two processes is killed after a step, of a command that could be started anew as it stands.
_KILLED = """
import os, signal, sys, time
from pathlib import Path
from deadhead import cli
from deadhead.training.callbacks.logs import StepReporter

goes_on = StepReporter.on_step_end

def dies(self, args, state, control, **kwargs):
    if (state.max_steps, state.global_step, os.environ["RANK"]) == (5, 3, "1"):
        Path("killed.at").write_text(str(time.time()))
        os.kill(os.getpid(), signal.SIGKILL)
    goes_on(self, args, state, control, **kwargs)

StepReporter.on_step_end = dies
sys.argv = ["deadhead", *"run whole.toml --out stopped --resume --quiet".split()]
cli.main()
"""

# Both go on, and note the weights that each ends with.
_STOPPED = """
import json, os
from pathlib import Path
from deadhead.training.recipes.reading import load_recipe
from deadhead.training.runs.run import Run
from deadhead.training.recipes.recipe import DataRecipe
from deadhead.training.runs.options import Options
from deadhead.training.runs.single import run_single

recipe, ends = load_recipe("whole.toml"), {}
finish = Run._finish

def notes(self, model, name, *rest, **named):
    ends[f"{self.folder} {name}"] = sum(float(p.detach().double().sum()) for p in model.parameters())
    finish(self, model, name, *rest, **named)

Run._finish = notes
Run.start(recipe, "stopped", resume=True).execute()
Run.start(load_recipe("ranked.toml"), "ranked").execute()
data = DataRecipe(source=recipe.data.source)
ends["single"] = run_single("prune", recipe.prune, "whole/dense", data, Options(out="single")).to_dict()
Path(f"ends{os.environ['RANK']}.json").write_text(json.dumps(ends))
"""


def test_a_killed_process(place: Path, whole: subprocess.CompletedProcess[str]) -> None:
    """The other says so, and ends; both end with the weights of a run of which none was killed, bit for bit.

    `--resume` is no error in a folder that is not there yet, so one command does for both. The
    dense model of one run is where another begins, whose heads are ranked; and a phase runs on its own.
    """
    (place / "killed.py").write_text(_KILLED)
    result = launch(place, "killed.py")
    # The launcher would wait half a minute for one that does not end, and gloo for hours.
    assert result.returncode == 1 and time.time() - float((place / "killed.at").read_text()) < 25
    said = [line for line in result.stderr.splitlines() if line.startswith("deadhead: ")]
    assert len(said) == 1
    assert said[0].endswith("; complete checkpoints are kept, and --resume continues from the last one.")
    assert "Error: [" not in result.stderr  # gloo's, in a traceback of ours
    (place / "stopped.py").write_text(_STOPPED)
    result = launch(place, "stopped.py")
    assert result.returncode == 0, result.stderr[-3000:]
    for name in ("dense", "gated", "pruned"):
        assert_same_tensors(weights(place / "stopped" / name), weights(place / "whole" / name))
    assert metrics(place / "stopped") == metrics(place / "whole")
    ends = [json.loads((place / f"ends{rank}.json").read_text()) for rank in range(2)]
    assert ends[0] == ends[1] and len(ends[0]) == 6
    assert_same_tensors(weights(place / "ranked" / "dense"), weights(place / "whole" / "dense"))
    assert len(json.loads((place / "ranked" / "summary.json").read_text())["cut"]["heads"]) == 2
    assert deadhead.model_cost(deadhead.load(place / "single")).heads == ends[0]["single"]["heads"]
    with pytest.raises(InputError, match=r"was started with 2 process\(es\), but resumed with 1"):
        Run.start(load_recipe(place / "whole.toml"), place / "stopped", resume=True).execute()


@pytest.mark.parametrize(
    ("program", "sentence"),
    [
        # Found by the main process while the other waits for it, and by each as it begins.
        (("run", "missing.toml", "--out", "missing"), "missing.txt does not exist; did you mean"),
        pytest.param(("run", "whole.toml", "--nosuch"), "No such option: --nosuch", marks=pytest.mark.full),
    ],
    ids=["in the recipe", "an option"],
)
def test_bad_input_ends_all_processes(place: Path, program: tuple[str, ...], sentence: str) -> None:
    """At once, with one sentence, and the code for bad input."""
    result = launch(place, "-m", "deadhead", *program)
    # The launcher waits half a minute for one that does not heed SIGTERM.
    assert "forcefully" not in result.stderr and "exitcode  : -9" not in result.stderr
    said = [line for line in result.stderr.splitlines() if line.startswith("deadhead: ")]
    assert len(said) == 1 and sentence in said[0]
    # The launcher's own code says only that a process failed.
    assert result.returncode == 1
    assert "failed (exitcode: 2)" in result.stderr
    assert not (place / "missing").exists()


# Only the second process is given a wrong recipe, while the first waits to be connected with it.
_ALONE = """
import os, sys
from deadhead import cli

sys.argv = ["deadhead", "run", "whole.toml" if os.environ["RANK"] == "0" else "nosuch.toml", "--out", "alone"]
cli.main()
"""


def test_bad_input_of_one_process_ends_the_other(place: Path) -> None:
    (place / "alone.py").write_text(_ALONE)
    result = launch(place, "alone.py")
    said = [line for line in result.stderr.splitlines() if line.startswith("deadhead: ")]
    assert len(said) == 1 and "nosuch.toml" in said[0]
    assert "failed (exitcode: 2) local_rank: 1" in result.stderr
    assert "(SIGKILL)" not in result.stderr
    assert not (place / "alone").exists()


def test_processes_that_cannot_be_connected(place: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MASTER_")}
    result = subprocess.run(
        [sys.executable, "-m", "deadhead", "run", "whole.toml", "--out", "alone"],
        cwd=place,
        capture_output=True,
        text=True,
        env={**environment, "WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"},
    )
    assert result.returncode == 2
    assert "WORLD_SIZE says that 2 processes train together, but they cannot be connected" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
