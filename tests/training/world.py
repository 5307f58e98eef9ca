"""What each of one or several processes runs in the tests of several: small trainings, and what became of them.

    torchrun --nproc-per-node 2 -m tests.training.world FOLDER [few]

Each writes a file of tensors: by case, log_alpha, output differences, weights and the noise of every forward. A batch
over all processes is of four rows, whatever their number. There is no dropout, which each process draws for itself.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

import deadhead
from deadhead.checkpoints.declared import GATES_FILE
from deadhead.gates.gates import HeadGates
from deadhead.gates.sharding import whole
from deadhead.training import PhaseRecipe, PhaseRun, PruneRecipe, attach_gates, train
from tests.small_runs import stream

RANK, COUNT = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
ROWS, STEPS = 4, 12
# With gates: how each case trains them. Those named "llama" read shuffled texts, more than once.
CASES: dict[str, dict[str, Any]] = {
    "all_attention difference": {"weighting": "output_difference", "sparsity": 0.5, "output_scale": True},
    "all_attention accumulated": {"weighting": "output_difference", "l0": 0.5, "gradient_accumulation": 2},
    "all_attention exact": {"criterion": "topk", "sparsity": 0.5, "blocks": True, "block_size": 4},
    "all_attention leans": {"sparsity": 0.5, "start_from": "magnitude"},
    "llama Trainer's optimizer": {"l0": 0.5, "gate_lr": 0.0, "gate_lr_scale": 50.0},
    "llama accumulated": {
        "weighting": "output_difference",
        "sparsity": 0.5,
        "gradient_accumulation": 2,
        "blocks": True,
        "block_size": 4,
    },
    "llama heads": {"unit": "head", "sparsity": 0.5, "ranking": "layer"},
}


# With transformers' own Trainer: what the callback is asked for; whole models are DDP's, others FSDP2's.
WHOLE: dict[str, Any] = {"sparsity": 0.5, "ramp_steps": 6, "weighting": "output_difference"}
SHARDED: dict[str, dict[str, Any]] = {
    "sharded exact": {"sparsity": 0.5, "ramp_steps": 6, "exact": True},
    "sharded Trainer's optimizer": {"l0": 0.5, "warmup_steps": 2, "gate_lr": 0.0},
    "sharded": WHOLE,
}
FEW = ("all_attention difference", "llama accumulated")


def _model(kind: str) -> Any:
    set_seed(0)
    if kind == "llama":
        config: Any = LlamaConfig
        return LlamaForCausalLM(
            config(
                vocab_size=29,
                hidden_size=32,
                intermediate_size=32,
                num_hidden_layers=2,
                num_attention_heads=8,
                num_key_value_heads=4,
                max_position_embeddings=64,
                bos_token_id=0,
                eos_token_id=1,
            )
        )
    own = deadhead.models.AllAttentionConfig(
        vocab_size=29,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_persistent=8,
        memory_length=8,
        segment_length=8,
    )
    return deadhead.models.AllAttentionForCausalLM(own)


@contextmanager
def _noted_noise(gates: HeadGates) -> Iterator[list[Tensor]]:
    """Note all gates' noise at every draw."""
    noted: list[Tensor] = []
    draw = gates.draw

    def noting() -> None:
        draw()
        noted.append(torch.cat([gate.noise for _, gate in gates]).clone())

    gates.draw = noting  # type: ignore[method-assign]
    yield noted
    del gates.draw


def _state(name: str, model: Any, gates: HeadGates | None, noise: list[Tensor]) -> dict[str, Tensor]:
    found = {f"{name}/weights/{key}": whole(value.detach()).clone() for key, value in model.named_parameters()}
    found = {key: value for key, value in found.items() if "gate" not in key}
    if gates is not None:
        for layer, gate in gates:
            found[f"{name}/gates/{layer}"] = gate.log_alpha.detach().clone()
            found[f"{name}/difference/{layer}"] = gate.difference.clone()
            found[f"{name}/open/{layer}"] = gate.is_open.clone()
        found[f"{name}/noise"] = torch.stack(noise)
    return found


def with_gates(name: str, settings: dict[str, Any]) -> dict[str, Tensor]:
    """Train gates by deadhead's own phase."""
    kind = name.split()[0]
    # A text of 21 rows: 4 at a time do not come out even.
    text = stream(21 * 8 + 1 if kind == "llama" else 8 * 8 * ROWS + 1)
    model = _model(kind)
    length = {"sequence_length": 8} if kind == "llama" else {}
    settings = {"ramp_steps": 6, "l0_warmup_steps": 2, "track_difference": True, **length, **settings}
    recipe = PruneRecipe(steps=STEPS, batch_size=ROWS // COUNT, learning_rate=2e-3, **settings)
    gates = attach_gates(model, recipe)
    with _noted_noise(gates) as noise:
        train(model, text, recipe, PhaseRun(gates=gates))
    return _state(name, model, gates, noise)


def without_gates(name: str, accumulation: int) -> dict[str, Tensor]:
    """Train weights alone, where a batch in several parts is the same batch."""
    model, text = _model("llama"), stream(21 * 8 + 1)
    recipe = PhaseRecipe(
        steps=STEPS,
        batch_size=ROWS // COUNT // accumulation,
        gradient_accumulation=accumulation,
        learning_rate=2e-3,
        sequence_length=8,
    )
    train(model, text, recipe)
    return _state(name, model, None, [])


class _FirstIsBest(Trainer):
    """A Trainer to whom the first model that it evaluates is the best."""

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        metrics = {"eval_rank": -float(self.state.global_step)}
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


def trained(
    name: str, folder: Path, *, resume: bool = False, best: bool = False, shards: bool = True, **settings: Any
) -> dict[str, Tensor]:
    """Train gates with the callback in a Trainer of transformers, of several processes under FSDP2, or else DDP.

    accelerate takes FSDP only where there is an accelerator: here it is told of one, and everything from there on is
    its own and the Trainer's way, with gloo.
    """
    shards = shards and COUNT > 1
    environment = dict(os.environ)
    often = {"eval_strategy": "steps", "eval_steps": 6, "load_best_model_at_end": True, "metric_for_best_model": "rank"}
    fsdp: dict[str, Any] = {"fsdp": True, "fsdp_config": {"version": 2, "reshard_after_forward": True}}
    args = TrainingArguments(
        str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=ROWS // COUNT,
        gradient_accumulation_steps=2,
        learning_rate=2e-3,
        weight_decay=0.1,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        save_strategy="steps",
        save_steps=6,
        **(fsdp if shards else {}),
        **(often if best else {}),
    )
    assert args.device.type == "cpu"
    if shards:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    model = _model("llama")
    examples = [{"input_ids": ids, "labels": ids} for ids in torch.arange(24 * 8).mul(7).remainder(29).view(24, 8)]
    gates = deadhead.attach(model)
    callback = deadhead.SparsityCallback(gates, track_difference=True, **settings)
    trainer = _FirstIsBest(model, args, train_dataset=examples, eval_dataset=examples, callbacks=[callback])
    with _noted_noise(gates) as noise:
        trainer.train(resume_from_checkpoint=str(folder / "checkpoint-6") if resume else None)
    if COUNT > 1:
        assert trainer.accelerator.is_fsdp2 == shards
        expected = "FSDPLlamaForCausalLM" if shards else "DistributedDataParallel"
        assert type(trainer.model_wrapped).__name__ == expected
    if RANK == 0:
        # Every process has all gates, so that one alone can read them.
        gates.plan().to_json(folder / "plan.json")
        _ = callback.state(), callback.metrics(), gates.scores(), gates.state_dict()
    trainer.save_model(str(folder / "saved"))
    if best:
        saved = load_file(folder / "checkpoint-6" / GATES_FILE)
        assert saved.keys() == gates.state_dict().keys()
        assert all(torch.equal(value, gates.state_dict()[key]) for key, value in saved.items())
    found = _state(name, model, gates, noise)
    if shards:
        # TrainingArguments tells accelerate by environment variables, which would tell the next case too.
        for variable in os.environ.keys() - environment.keys():
            del os.environ[variable]
        os.environ.update(environment)
        AcceleratorState._reset_state()
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_CPU
    return found


def run(folder: Path, *, few: bool) -> Path:
    """Run all cases, or the few that differ most, and write what came of them; return the file."""
    found: dict[str, Tensor] = {}
    for name in FEW if few else CASES:
        found |= with_gates(name, CASES[name])
    for name in ["sharded"] if few else SHARDED:
        found |= trained(name, folder / f"{name} of {COUNT}", **SHARDED[name])
    found |= trained("resumed", folder / f"sharded of {COUNT}", resume=True, **SHARDED["sharded"])
    for name, resume in {"whole": False, "whole resumed": True}.items():
        found |= trained(name, folder / f"whole of {COUNT}", resume=resume, shards=False, **WHOLE)
    # The best is of a step on the ramp, which is warned of.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", deadhead.errors.RunWarning)
        found |= trained("best", folder / f"best of {COUNT}", best=True, sparsity=0.5)
    if not few:
        found |= without_gates("dense", 1)
        if COUNT <= 2:
            found |= without_gates("dense in parts", 2)
    path = folder / f"rank{RANK} of {COUNT}.safetensors"
    save_file({key: value.contiguous() for key, value in found.items()}, path)
    return path


if __name__ == "__main__":
    run(Path(sys.argv[1]), few="few" in sys.argv[2:])
