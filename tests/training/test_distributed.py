"""Two processes: they learn the same, each from its own batches, and a run's folder is written by one of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import deadhead
from deadhead import InputError
from deadhead.training import Run, load_recipe
from deadhead.training.recipe import to_toml
from tests.small import assert_same_tensors, metrics, small_recipe, weights, write_prose

_PROGRAM = """
import json, os, sys
import torch
import deadhead

from transformers import LlamaConfig, LlamaForCausalLM

text, tokenizer = deadhead.load_text(sys.argv[1])
torch.manual_seed(0)
models = {
    "all_attention": deadhead.AllAttentionForCausalLM(deadhead.AllAttentionConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_persistent=8,
        memory_length=8, segment_length=8,
    )),
    "llama": LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=4, max_position_embeddings=64, bos_token_id=0, eos_token_id=1,
    )),
}
found = {}
for kind, model in models.items():
    recipe = deadhead.PruneRecipe(
        steps=6, batch_size=2, weighting="output_difference", sparsity=0.5, gate_lr_scale=50.0, learning_rate=2e-3,
        output_scale=True, **({} if kind == "all_attention" else {"sequence_length": 8}),
    )
    gates = deadhead.attach(model, config=deadhead.gate_config(recipe, model))
    deadhead.train(model, text.splits["train"], recipe, gates=gates)
    values = found[kind] = {str(layer): row.tolist() for layer, row in gates.log_alpha().items()}
    values["weights"] = sum(float(p.double().sum()) for p in model.parameters())
rank = os.environ["RANK"]
with open(os.path.join(sys.argv[2], f"rank{rank}.json"), "w") as file:
    json.dump(found, file)
"""


def _launch(place: Path, *program: str) -> subprocess.CompletedProcess[str]:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([*launch, *program], cwd=place, env=environment, capture_output=True, text=True, timeout=240)


def test_ranks_agree(tmp_path: Path) -> None:
    """After a few steps of two gloo processes all gates and weights are equal, to the bit."""
    text = write_prose(tmp_path)
    (tmp_path / "program.py").write_text(_PROGRAM)
    result = _launch(tmp_path, "program.py", str(text), str(tmp_path))
    assert result.returncode == 0, result.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2))
    assert first == second
    for gates in first.values():
        assert any(abs(value - 2.0) > 0.1 for value in gates["0"])


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
    return _launch(place, "-m", "deadhead", "run", "whole.toml", "--out", "whole")


def test_a_run_of_two_processes(place: Path, whole: subprocess.CompletedProcess[str]) -> None:
    """Its folder is complete, and the result is printed once."""
    assert whole.returncode == 0, whole.stderr[-3000:]
    assert whole.stdout.count("What was cut, and what it cost") == 1
    assert whole.stdout.count("The pruned model:") == 1
    assert "Traceback" not in whole.stderr
    summary = json.loads((place / "whole" / "summary.json").read_text())
    assert set(summary) == {
        *("dense", "gated", "cut", "finetuned", "budget", "data", "processes", "versions", "samples")
    }
    assert summary["processes"] == 2
    assert sum(summary["finetuned"]["heads"]) == 4
    expected = ("dense", "gated", "pruned", "head_plan.json", "metrics.jsonl", "head_map.png", "recipe.toml")
    assert {*expected} <= {path.name for path in (place / "whole").iterdir()}
    assert not (place / "whole" / "checkpoints").exists()
    steps = [(line["phase"], line["step"]) for line in metrics(place / "whole")]
    assert steps == [(phase, step + 1) for phase, count in _STEPS.items() for step in range(count)]


_STEPS = {"train": 3, "prune": 5, "finetune": 3}

# Stops all processes after a step, as a kill would, goes on, and notes the weights that each process ends with.
_STOPPED = """
import json, os, sys
from pathlib import Path
from deadhead.training import Run, load_recipe
from deadhead.training.logs import StepReporter
from deadhead.training.recipe import DataRecipe
from deadhead.training.single import run_single

recipe, ends = load_recipe("whole.toml"), {}
goes_on = StepReporter.on_step_end

class Stopped(Exception):
    pass

def stops(self, args, state, control, **kwargs):
    if (state.max_steps, state.global_step) == (5, 3):
        raise Stopped
    goes_on(self, args, state, control, **kwargs)

finish = Run._finish

def notes(self, model, name, *rest, **named):
    ends[f"{self.folder} {name}"] = sum(float(p.detach().double().sum()) for p in model.parameters())
    finish(self, model, name, *rest, **named)

Run._finish = notes
StepReporter.on_step_end = stops
try:
    Run.start(recipe, "stopped").execute()
    raise AssertionError("It was to be stopped.")
except Stopped:
    StepReporter.on_step_end = goes_on
Run.start(recipe, "stopped", resume=True).execute()
Run.start(load_recipe("ranked.toml"), "ranked").execute()
data = DataRecipe(source=recipe.data.source)
ends["single"] = run_single("prune", recipe.prune, Path("single"), model=Path("whole/dense"), data=data)
Path(f"ends{os.environ['RANK']}.json").write_text(json.dumps(ends))
"""


def test_two_processes_stop_and_go_on(place: Path, whole: subprocess.CompletedProcess[str]) -> None:
    """They end with the weights of a run that was not stopped, bit for bit, and with the same in both processes.

    The dense model of one run is where another begins, whose heads are ranked; and a phase runs on its own.
    """
    (place / "stopped.py").write_text(_STOPPED)
    result = _launch(place, "stopped.py")
    assert result.returncode == 0, result.stderr[-3000:]
    for name in ("dense", "gated", "pruned"):
        assert_same_tensors(weights(place / "stopped" / name), weights(place / "whole" / name))
    assert metrics(place / "stopped") == metrics(place / "whole")
    ends = [json.loads((place / f"ends{rank}.json").read_text()) for rank in range(2)]
    assert ends[0] == ends[1] and len(ends[0]) == 7
    assert_same_tensors(weights(place / "ranked" / "dense"), weights(place / "whole" / "dense"))
    assert len(json.loads((place / "ranked" / "summary.json").read_text())["cut"]["heads"]) == 2
    assert deadhead.model_cost(deadhead.load(place / "single")).heads == ends[0]["single"]["heads"]
    with pytest.raises(InputError, match="began with a number of processes of 2, and goes on with as many, but now"):
        Run.start(load_recipe(place / "whole.toml"), place / "stopped", resume=True).execute()


def test_bad_input_ends_all_processes(place: Path) -> None:
    """With one sentence, and the code for bad input."""
    result = _launch(place, "-m", "deadhead", "run", "missing.toml", "--out", "missing")
    said = [line for line in result.stderr.splitlines() if line.startswith("deadhead: ")]
    assert len(said) == 1 and "there is no" in said[0] and "missing.txt" in said[0]
    # The launcher's own code says only that a process failed.
    assert result.returncode == 1
    assert "failed (exitcode: 2)" in result.stderr
    assert not (place / "missing").exists()


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
