"""The speed benchmarks compare like with like: the textbook computes what we do, and the floor has as many FLOPs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.vllm_python import VLLM_PYTHON, needs_vllm

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]

_CODE = """
import json, sys
from dataclasses import replace
import torch
import _all_attention, attention, generation, training
import deadhead

shape = replace(_all_attention.DEMO, width=32, persistent=24, length=8, batch=3, heads=(8, 3, 8))
model = _all_attention.build(shape)
evaluation = attention.Evaluation(shape, torch.float32)
ours, textbook = evaluation.ours(), evaluation.plainly()
layers = training.Layers(replace(shape, attention_dropout=0.2, hidden_dropout=0.1), torch.float32)
floors = {
    name: _all_attention.Floor(shape, torch.float32, cached=cached, backward=backward)
    for name, cached, backward in (("evaluation", True, False), ("forward", False, False), ("training", False, True))
}
for floor in floors.values():
    floor()
dense = replace(shape, heads=(8, 8))
steps = training.measure_step(dense, 1)["seconds"]
generation.COPIED_BYTES = 2**20
tokens = generation.measure(dense, 2, 1)
print(json.dumps({
    "evaluation": float((ours - textbook).abs().max() / textbook.abs().max()),
    "training": layers.difference(),
    "floors": {name: floor.flops for name, floor in floors.items()},
    "cost": deadhead.model_cost(model, length=shape.length).attention_flops_per_token * shape.batch * shape.length,
    "steps": list(steps),
    "read": [row["megabytes"] for row in tokens],
    "parameters": sum(p.nbytes for p in _all_attention.build(dense).parameters()) / 1e6,
}))
"""


@pytest.fixture(scope="module")
def found() -> Any:
    done = subprocess.run([sys.executable, "-c", _CODE], cwd=ROOT / "benchmarks", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_textbook_computes_the_same(found: Any) -> None:
    assert found["evaluation"] <= 1e-5
    assert found["training"] <= 1e-5


def test_the_floor_has_the_flops_of_the_layers(found: Any) -> None:
    floors = found["floors"]
    # Content scores and their values are multiplied for all of the context, of which a query sees half plus one.
    extra = 4.0 * (2 * 8 - 9) * 4 * (8 + 3 + 8) * 3 * 8
    assert floors["evaluation"] == pytest.approx(found["cost"] + extra)
    assert floors["training"] == pytest.approx(3 * floors["forward"])
    assert floors["forward"] > floors["evaluation"]


def test_everything_is_timed(found: Any) -> None:
    assert found["steps"][:3] == ["dense", "0% closed", "25% closed"]
    assert len(found["steps"]) == 8


def test_a_token_reads_less_than_all_parameters(found: Any) -> None:
    whole, half, quarter = found["read"]
    assert quarter < half < whole < found["parameters"]


def test_the_page_benchmark_runs() -> None:
    done = subprocess.run(
        [sys.executable, "benchmarks/page.py", "--quick"], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "500 steps of 16 × 16 heads" in done.stdout
    assert "\npage 0." in done.stdout


def test_a_step_of_gates_is_set_against_its_floor() -> None:
    done = subprocess.run(
        [sys.executable, "benchmarks/frozen_step.py", "--quick"], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    for row in ("floor", "gates, all open", "gates, half shut", "the dense model alone"):
        assert f"│ {row} " in done.stdout
    assert "Memory beyond the loaded model: " in done.stdout


@pytest.mark.full
def test_two_processes_send_what_they_learn(tmp_path: Path) -> None:
    """The gates are a part of the gradients that is there, and hardly one; the plan is that of one process."""
    found = tmp_path / "scaling.json"
    done = subprocess.run(
        [sys.executable, "benchmarks/scaling.py", "--quick", "--json", str(found)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    one, two = json.loads(found.read_text())["measured"]
    assert one["sent"] == {"gradients": 0, "gates": 0, "all else": 0}
    assert two["sent"]["gradients"] == 4 * two["parameters"]
    assert two["sent"]["gates"] == 4 * two["gates"] > 0
    assert 0 < two["sent"]["all else"] < 100
    assert two["same plan"] and two["apart"]["weights"] < 1e-4
    paper, llama = json.loads(found.read_text())["paper"]
    assert paper["gate bytes"] < 1e-5 * paper["gradient bytes"] and llama["gate bytes"] < 1e-6 * llama["gradient bytes"]


@pytest.mark.full
def test_two_processes_share_a_text_out(tmp_path: Path) -> None:
    """Each has less to do than one alone, but for what reads no text."""
    found = tmp_path / "sharing.json"
    command = [sys.executable, "benchmarks/sharing.py", "--quick", "--json", str(found)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (alone,), both = json.loads(found.read_text()).values()
    for name in ("taylor", "compensation"):
        assert f"│ {name} " in done.stdout
        assert max(each[name]["cpu"] for each in both) < alone[name]["cpu"]


@needs_vllm
def test_serving_is_timed_dense_and_cut() -> None:
    command = [sys.executable, "benchmarks/serving.py", "--quick", "--python", str(VLLM_PYTHON)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    for row in ("dense, vLLM’s", "dense, transformers’", "cut, transformers’"):
        assert f"│ {row} " in done.stdout
    assert "FLOPs allow ×" in done.stdout
