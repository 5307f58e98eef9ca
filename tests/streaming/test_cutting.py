"""Cut shard by shard: the same tensors, configuration and plan as a cut in memory, bit for bit; resumed; refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

import deadhead
from benchmarks._tiny_models import scramble
from deadhead import HeadPlan, InputError
from deadhead.cli import execute
from deadhead.streaming import cutting
from deadhead.streaming.cutting import cut_checkpoint
from tests.small_runs import assert_same_tensors, tree, weights

_SIZES: Any = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
_GROUPED: Any = {**_SIZES, "num_attention_heads": 8, "num_key_value_heads": 4}
_MODELS: dict[str, Any] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**_GROUPED)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**_GROUPED)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=3, n_head=4, n_positions=64)),
}


def _saved(folder: Path, model: PreTrainedModel, shard: str) -> Path:
    scramble(model, 0)
    model.save_pretrained(folder, max_shard_size=shard)
    return folder


@pytest.mark.parametrize("shard", ["10KB", "40KB", "5GB"])
@pytest.mark.parametrize("output_scale", [False, True])
@pytest.mark.parametrize(
    ("kind", "unit"), [("llama", "kv_group"), ("llama", "head"), ("qwen2", "kv_group"), ("gpt2", "head")]
)
@pytest.mark.filterwarnings("ignore:The key/value cache grows")
def test_as_in_memory(kind: str, unit: Any, output_scale: bool, shard: str, tmp_path: Path) -> None:
    source = _saved(tmp_path / "source", _MODELS[kind](), shard)
    heads = 8 if (kind, unit) == ("llama", "head") else 4
    plan = HeadPlan(kept={0: [0, 3], 1: []}, total=dict.fromkeys(range(3), heads), unit=unit, output_scale=output_scale)
    streamed = cut_checkpoint(source, plan, tmp_path / "streamed", stream=True)
    in_memory = cut_checkpoint(source, plan, tmp_path / "in_memory", stream=False)
    assert streamed.streamed and not in_memory.streamed
    assert (streamed.before, streamed.after) == (in_memory.before, in_memory.after)
    assert_same_tensors(weights(tmp_path / "streamed"), weights(tmp_path / "in_memory"))
    for name in ("config.json", "head_plan.json"):
        assert (tmp_path / "streamed" / name).read_text() == (tmp_path / "in_memory" / name).read_text()
    # The same function, after a check of its checksums.
    ids = torch.arange(20).view(2, 10)
    with torch.no_grad():
        logits = [deadhead.load(tmp_path / name)(input_ids=ids).logits for name in ("streamed", "in_memory")]
    assert torch.equal(*logits)
    assert {path.name for path in tmp_path.iterdir()} == {"source", "streamed", "in_memory"}


def test_stopped_and_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped when all shards are there but the folder is not; the next cut needs --resume, and ends in the same."""
    source = _saved(tmp_path / "source", _MODELS["llama"](), "10KB")
    plan = HeadPlan(kept={0: [1]}, total=dict.fromkeys(range(3), 4), unit="kv_group")
    cut_checkpoint(source, plan, tmp_path / "whole", stream=True)

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(cutting, "_publish", stop)
        with pytest.raises(KeyboardInterrupt):
            cut_checkpoint(source, plan, tmp_path / "out", stream=True)
    assert not (tmp_path / "out").exists()
    with pytest.raises(
        InputError, match="is left from a stopped cut; continue it with resume \\(--resume\\), or delete it"
    ):
        cut_checkpoint(source, plan, tmp_path / "out", stream=True)
    # A damaged shard of those that were done is found by its hash and made anew.
    shard = next((tmp_path / "out.work").rglob("model-00002*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    cut_checkpoint(source, plan, tmp_path / "out", stream=True, resume=True)
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")
    assert not (tmp_path / "out.work").exists()


def test_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = _saved(tmp_path / "source", _MODELS["llama"](), "10KB")
    HeadPlan(kept={0: [1]}, total=dict.fromkeys(range(3), 4), unit="kv_group").to_json(tmp_path / "plan.json")
    command = ["cut", str(source), "--plan", str(tmp_path / "plan.json"), "--out", str(tmp_path / "out")]
    assert execute([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["streamed"] is True
    assert execute([*command, "--resume"]) == 2
    assert "There is nothing to resume" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["missing", "cut short", "outside"])
def test_a_damaged_source_is_refused_and_nothing_is_left(damage: str, tmp_path: Path) -> None:
    source = _saved(tmp_path / "source", _MODELS["llama"](), "10KB")
    shard = sorted(source.glob("model-00003*"))[0]
    if damage == "missing":
        shard.unlink()
    elif damage == "cut short":
        shard.write_bytes(shard.read_bytes()[:-3])
    else:
        index = source / "model.safetensors.index.json"
        shard.rename(tmp_path / "x.safetensors")
        index.write_text(index.read_text().replace(shard.name, "../x.safetensors"))
    before = tree(tmp_path)
    with pytest.raises(InputError) as caught:
        cut_checkpoint(
            source, HeadPlan.keep_all(dict.fromkeys(range(3), 4), unit="kv_group"), tmp_path / "out", stream=True
        )
    assert "\n" not in str(caught.value)
    assert tree(tmp_path) == before
