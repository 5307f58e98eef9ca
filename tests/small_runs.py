"""Texts, recipes, checkpoints and child processes small enough to train, kill and resume for real in a test."""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from tokenizers.processors import TemplateProcessing
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from benchmarks._tiny_models import scramble
from deadhead.checkpoints import checkpoint
from deadhead.data import TokenStream, load_text
from deadhead.data.tokenizer import byte_tokenizer
from deadhead.training.recipes.recipe import Recipe
from deadhead.training.runs.inputs import build_model

_WORDS = [
    "the",
    "a",
    "cat",
    "dog",
    "bird",
    "sees",
    "hears",
    "likes",
    "runs",
    "sleeps",
    "over",
    "under",
    "near",
    "old",
    "small",
    "red",
    "and",
    "then",
]


def prose(num_bytes: int = 8000, seed: int = 0) -> str:
    """Return text of a small vocabulary in short lines, always the same."""
    draw = random.Random(seed)
    lines: list[str] = []
    while sum(len(line) + 1 for line in lines) < num_bytes:
        lines.append(" ".join(draw.choice(_WORDS) for _ in range(draw.randint(3, 9))) + ".")
    return "\n".join(lines) + "\n"


def write_prose(folder: Path, num_bytes: int = 8000) -> Path:
    """Write `prose` to a file in `folder` and return its path."""
    path = folder / "prose.txt"
    path.write_text(prose(num_bytes), encoding="utf-8")
    return path


def stream(num_tokens: int, *, vocab_size: int = 29, seed: int = 0) -> TokenStream:
    """Return random tokens that stand for 2 bytes each, and a third of a word."""
    tokens = np.random.default_rng(seed).integers(vocab_size, size=num_tokens).astype(np.uint16)
    return TokenStream(tokens=tokens, num_bytes=2 * num_tokens, num_words=num_tokens // 3)


def small_recipe(text: Path, **sections: dict[str, Any] | Any) -> Recipe:
    """Return a recipe of 2 layers × 4 heads and a few steps a phase, with values of its sections changed."""
    phase = {"batch_size": 2, "learning_rate": 2e-3, "save_every": 2, "log_every": 1}
    values: dict[str, Any] = {
        "name": "small",
        "evaluation_tokens": 100,
        "model": {
            "layers": 2,
            "width": 32,
            "heads": 4,
            "persistent": 8,
            "memory_length": 8,
            "segment_length": 8,
            "hidden_dropout": 0.1,
        },
        "data": {"source": str(text)},
        "train": {"steps": 3, **phase},
        "prune": {"steps": 5, **phase, "l0": 0.1, "gate_lr": 0.0, "gate_lr_scale": 300.0, "init": 1.0},
        "finetune": {"steps": 3, **phase},
    }
    for name, changes in sections.items():
        values[name] = {**values[name], **changes} if isinstance(changes, dict) else changes
    return Recipe.model_validate(values)


def save_small_model(folder: Path, text: Path, *, seed: int = 0, **model: Any) -> Path:
    """Write an untrained checkpoint with its tokenizer to `folder`."""
    recipe = small_recipe(text, model=model)
    _, tokenizer = load_text(str(text), tokenizer="byte")
    checkpoint.save(build_model(recipe.model, tokenizer, seed=seed), folder, tokenizer=tokenizer)
    return folder


def save_small_llama(folder: Path, text: Path, tokenizer: Any = None) -> Any:
    """Write a Llama of 3 layers × 4 heads in 2 groups, all of it random, with a byte tokenizer; return both."""
    tokenizer = tokenizer or load_text(str(text), tokenizer="byte")[1]
    config: Any = LlamaConfig
    model = LlamaForCausalLM(
        config(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
            bos_token_id=0,
            eos_token_id=0,
        )
    )
    scramble(model, 0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(str(folder))
    return model.eval(), tokenizer


FRAMES = {"bos": "<bos> $A", "cls and sep": "<cls> $A <sep>", "none": "$A"}
"""How tokenizers of each sort frame a text."""


def framed_tokenizer(frame: str, *, eos: bool = True) -> PreTrainedTokenizerFast:
    """Return a tokenizer of bytes that puts around a text what `FRAMES` says."""
    backend = byte_tokenizer().backend_tokenizer
    special = {
        "bos_token": "<bos>",
        "cls_token": "<cls>",
        "sep_token": "<sep>",
        **({"eos_token": "<end>"} if eos else {}),
    }
    backend.add_special_tokens(list(special.values()))
    numbers = [(token, backend.token_to_id(token)) for token in special.values()]
    backend.post_processor = TemplateProcessing(single=FRAMES[frame], special_tokens=numbers)
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def tree(folder: Path) -> dict[str, str]:
    """Return the hash of every file below `folder`, and a mark for every folder, by relative path."""
    return {
        str(path.relative_to(folder)): "folder" if path.is_dir() else hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
    }


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Return all tensors of a checkpoint folder."""
    return {name: value for path in sorted(folder.glob("*.safetensors")) for name, value in load_file(path).items()}


def assert_same_tensors(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Assert that two sets of tensors agree bit for bit."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


class Killed(Exception):
    """The process is gone."""


class KillAt(TrainerCallback):
    """Stops after a step as a killed process would: nothing more is saved."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step == self.step:
            raise Killed


def without_times(value: Any) -> Any:
    """Return JSON values without the fields that two runs of one recipe need not share."""
    if isinstance(value, dict):
        return {key: without_times(item) for key, item in value.items() if key not in ("seconds", "tokens_per_second")}
    return [without_times(item) for item in value] if isinstance(value, list) else value


def metrics(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's metrics.jsonl, without timing fields; every line must be whole."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [without_times(json.loads(line)) for line in lines]


def child(code: str, *arguments: str, cwd: Path | None = None) -> subprocess.Popen[str]:
    """Start a Python process that runs `code` with this process's packages, threads and warnings as errors."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "HF_HUB_OFFLINE": "1",
    }
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        cwd=cwd,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
