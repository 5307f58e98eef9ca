"""Two processes: gates learn the same on all ranks, though each measures output differences of its own batches."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.small import write_prose

_PROGRAM = """
import json, os, sys
import torch
import deadhead

text, tokenizer = deadhead.load_text(sys.argv[1])
torch.manual_seed(0)
if sys.argv[3] == "all_attention":
    config = deadhead.AllAttentionConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_persistent=8,
        memory_length=8, segment_length=8,
    )
    model = deadhead.AllAttentionForCausalLM(config)
else:
    from transformers import LlamaConfig, LlamaForCausalLM
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=4, max_position_embeddings=64, bos_token_id=0, eos_token_id=1,
    ))
recipe = deadhead.PruneRecipe(
    steps=6, batch_size=2, weighting="output_difference", sparsity=0.5, gate_lr_scale=50.0, learning_rate=2e-3,
    output_scale=True, **({} if sys.argv[3] == "all_attention" else {"sequence_length": 8}),
)
gates = deadhead.attach(model, config=deadhead.gate_config(recipe, model))
deadhead.train(model, text.splits["train"], recipe, gates=gates)
values = {str(layer): row.tolist() for layer, row in gates.log_alpha().items()}
values["weights"] = sum(float(p.double().sum()) for p in model.parameters())
rank = os.environ["RANK"]
with open(os.path.join(sys.argv[2], f"rank{rank}.json"), "w") as file:
    json.dump(values, file)
"""


@pytest.mark.parametrize("kind", ["all_attention", "llama"])
def test_ranks_agree(kind: str, tmp_path: Path) -> None:
    """After a few steps of two gloo processes all gates and weights are equal, to the bit."""
    text = write_prose(tmp_path)
    program = tmp_path / "program.py"
    program.write_text(_PROGRAM)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    result = subprocess.run(
        [*launch, str(program), str(text), str(tmp_path), kind], capture_output=True, text=True, timeout=240
    )
    assert result.returncode == 0, result.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2))
    assert first == second
    assert any(abs(value - 2.0) > 0.1 for value in first["0"])


def test_a_run_is_for_one_process(tmp_path: Path) -> None:
    """Whole runs and single phases write folders; they say that under torchrun `deadhead.train` is meant."""
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(f'[data]\nsource = "{write_prose(tmp_path)}"\n')
    code = "from deadhead.cli import main; main()"
    result = subprocess.run(
        [sys.executable, "-c", code, "run", str(recipe), "--out", str(tmp_path / "run")],
        capture_output=True,
        text=True,
        env={**os.environ, "WORLD_SIZE": "2", "RANK": "0"},
    )
    assert result.returncode == 2
    assert "under torchrun train with deadhead.train" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
