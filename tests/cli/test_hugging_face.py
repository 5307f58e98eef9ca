"""The commands on one of transformers' own models, as on deadhead's."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import deadhead
from deadhead import HeadPlan
from tests.cli.conftest import Command
from tests.cli.test_commands import _STEPS
from tests.small_runs import assert_same_tensors, metrics, weights


def test_pruned_recovered_measured_and_served(given: Path, tmp_path: Path, command: Command) -> None:
    """LoRA and the dense model as teacher while gates close groups; then a fine-tuning; then every other command."""
    text, llama = given / "prose.txt", tmp_path / "llama"
    shutil.copytree(given / "llama", llama)
    (llama / "LICENSE").write_text("You may.\n")
    (llama / "README.md").write_text("---\nlicense: mit\nlanguage: en\n---\n# A Llama\n")
    recovery = ("--lora-rank", 2, "--distill", 0.5, "--sequence-length", 24)
    pruned = command.json(
        *("prune", "--model", llama, "--data", text, "--out", tmp_path / "pruned", "--sparsity", 0.5),
        *(*_STEPS, *recovery),
    )
    assert sum(pruned["heads"]) == 3  # of the 6 groups, of 2 query heads each
    plan = HeadPlan.from_json(tmp_path / "pruned" / "head_plan.json")
    assert (plan.unit, sum(plan.heads)) == ("kv_group", 3)
    assert metrics(tmp_path / "pruned")[-1]["teacher_divergence"] > 0

    tuned = command.json(
        *("finetune", "--model", tmp_path / "pruned", "--teacher", llama, "--data", text, "--out", tmp_path / "tuned"),
        *(*_STEPS, *recovery, "--gradient-checkpointing"),
    )
    assert tuned["heads"] == pruned["heads"]
    card = (tmp_path / "tuned" / "README.md").read_text(encoding="utf-8")
    assert 'license: "mit"' in card.split("---")[1]
    assert (tmp_path / "tuned" / "LICENSE").read_text() == "You may.\n"

    measured = command.json("eval", tmp_path / "tuned", "--data", text)
    assert measured["perplexity"] == pytest.approx(tuned["perplexity"], rel=1e-5)
    inspected = command.json("inspect", tmp_path / "tuned")
    assert (inspected["heads"], inspected["total_heads"]) == (tuned["heads"], [2, 2, 2])
    timed = command.json("bench", tmp_path / "tuned", "--dense", llama, "--repeats", 1, "--length", 16)
    assert timed["speedup_the_flops_allow"] > 1
    words = command.json("generate", tmp_path / "tuned", "--prompt", "the cat", "--max-new-tokens", 5)
    assert words["text"].startswith("the cat")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "tuned")
    assert_same_tensors(loaded.state_dict(), deadhead.load(tmp_path / "tuned").state_dict())


def test_a_probe_leaves_the_weights_and_its_gates_are_cut_later(given: Path, tmp_path: Path, command: Command) -> None:
    text = given / "prose.txt"
    result = command.json(
        *("prune", "--model", given / "llama", "--data", text, "--out", tmp_path / "probe", "--freeze-weights"),
        *("--unit", "head", "--sparsity", 0.25, "--no-cut", "--sequence-length", 24, *_STEPS),
    )
    assert sum(result["heads"]) == 9
    probed = {name: value for name, value in weights(tmp_path / "probe").items() if "log_alpha" not in name}
    assert {name: value for name, value in probed.items() if "difference" not in name}.keys() == (
        weights(given / "llama").keys()
    )
    for name, value in weights(given / "llama").items():
        assert torch.equal(probed[name], value), name
    gates = deadhead.checkpoints.gate_files.load_gates(deadhead.load(given / "llama"), tmp_path / "probe")
    assert gates.unit == "head"
    gates.plan().to_json(tmp_path / "plan.json")
    assert json.loads((tmp_path / "plan.json").read_text())["unit"] == "head"
    cut = command.json("cut", given / "llama", "--plan", tmp_path / "plan.json", "--out", tmp_path / "cut")
    assert (cut["before"]["heads"], sum(cut["after"]["heads"])) == ([4, 4, 4], 9)
