"""Numbers that go elsewhere: TensorBoard, trackers, and validation on the way; none of it changes the training."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from deadhead import InputError
from deadhead.checkpoints import checkpoint
from deadhead.data import load_text
from deadhead.measure.evaluation import evaluate
from deadhead.plans.picture import head_map_image
from deadhead.training import PhaseRun
from deadhead.training.phases.choosing import attach_gates
from deadhead.training.phases.phase import train
from deadhead.training.recipes.reading import to_toml
from deadhead.training.runs.run import Run
from tests.small_runs import assert_same_tensors, metrics, save_small_model, small_recipe, weights, write_prose


def _events(folder: Path) -> EventAccumulator:
    found = EventAccumulator(str(folder), size_guidance={"images": 0, "scalars": 0})
    found.Reload()
    return found


@pytest.mark.slow
def test_validation_changes_nothing_and_says_what_evaluation_says(tmp_path: Path) -> None:
    text = write_prose(tmp_path)
    plain = small_recipe(text, control=True)
    measured: dict[str, Any] = {name: {"eval_every": 2, "eval_tokens": 60} for name in ("train", "prune", "finetune")}
    for name, recipe in (("plain", plain), ("measured", small_recipe(text, control=True, **measured))):
        Run.start(recipe, tmp_path / name).execute()
    for folder in ("dense", "gated", "pruned", "control"):
        assert_same_tensors(weights(tmp_path / "plain" / folder), weights(tmp_path / "measured" / folder))
    lines = [line for line in metrics(tmp_path / "measured") if "eval_perplexity" in line]
    assert [(line["phase"], line["step"]) for line in lines if line["phase"] in ("train", "prune")] == [
        *(("train", step) for step in (2, 3)),
        *(("prune", step) for step in (2, 4, 5)),
    ]
    corpus, _ = load_text(str(text), tokenizer="byte")
    model = checkpoint.load(tmp_path / "measured" / "dense")
    last = next(line for line in lines if (line["phase"], line["step"]) == ("train", 3))
    assert last["eval_perplexity"] == pytest.approx(evaluate(model, corpus.splits["valid"], limit=60).perplexity)
    assert not any("eval_perplexity" in line for line in metrics(tmp_path / "plain"))


def test_tensorboard_gets_the_scalars_and_the_head_map(tmp_path: Path) -> None:
    text = write_prose(tmp_path)
    recipe = small_recipe(text, prune={"eval_every": 2, "eval_tokens": 50})
    Run.start(recipe, tmp_path / "run").execute()
    events = _events(tmp_path / "run" / "tensorboard" / "prune")
    lines = [line for line in metrics(tmp_path / "run") if line["phase"] == "prune"]
    for tag, name in (("loss", "loss"), ("l0", "l0"), ("sparsity", "sparsity"), ("lambda", "lambda")):
        found = {event.step: event.value for event in events.Scalars(f"train/{tag}")}
        assert found == pytest.approx({line["step"]: line[name] for line in lines}, rel=1e-6)
    found = {event.step: event.value for event in events.Scalars("eval/perplexity")}
    logged = {line["step"]: line["eval_perplexity"] for line in lines if "eval_perplexity" in line}
    assert found == pytest.approx(logged, rel=1e-6)
    images = events.Images("head map")
    assert [image.step for image in images] == [1, 2, 3, 4, 5]
    assert (images[0].height, images[0].width) == (2 * 16, 4 * 16)
    assert not _events(tmp_path / "run" / "tensorboard" / "train").Tags()["images"]


def test_the_image_shows_each_gate() -> None:
    image = head_map_image([[1.0, 0.0], [0.5]], side=10)
    assert image.shape == (20, 20, 3)
    assert image[5, 5].tolist() == image[0, 0].tolist() == [0, 0x72, 0xB2]
    assert image[5, 15].tolist() == [255, 255, 255]
    assert image[0, 10].tolist() != image[0, 0].tolist(), "a shut gate has a frame of another colour"
    assert np.all(image[10:, 10:] == 255), "there is no second head in the second layer"


@pytest.mark.parametrize(
    ("name", "sentence"),
    [("nonsense", "transformers reports to was expected .*, but got 'nonsense'"), ("comet_ml", "pip install comet_ml")],
)
def test_trackers_that_are_not_there(name: str, sentence: str, tmp_path: Path) -> None:
    recipe = small_recipe(write_prose(tmp_path))
    with pytest.raises(InputError, match=sentence):
        Run.start(recipe, tmp_path / "run", report_to=[name])
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_weights_and_biases_gets_each_phase_as_a_run(tmp_path: Path) -> None:
    """Offline, in a process of its own: the real package writes its own files."""
    pytest.importorskip("wandb")
    recipe = small_recipe(write_prose(tmp_path))
    (tmp_path / "recipe.toml").write_text(to_toml(recipe), encoding="utf-8")
    environment = os.environ | {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "WANDB_SILENT": "true"}
    command = [
        sys.executable,
        "-m",
        "deadhead",
        "run",
        "recipe.toml",
        "--out",
        "run",
        "--report-to",
        "wandb",
        "--quiet",
    ]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    written = sorted((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(written) == 3, "dense training, gates, fine-tuning"
    everything = b"".join(path.read_bytes() for path in written)
    for word in (b"small train", b"small prune", b"small finetune", b"train/l0", b"train/sparsity", b"train/loss"):
        assert word in everything


def test_a_validation_text_is_needed(tmp_path: Path) -> None:
    text = write_prose(tmp_path)
    save_small_model(tmp_path / "model", text)
    model = checkpoint.load(tmp_path / "model")
    corpus, _ = load_text(str(text), tokenizer="byte")
    recipe = small_recipe(text, prune={"eval_every": 1, "eval_tokens": 20}).prune
    gates = attach_gates(model, recipe)
    with pytest.raises(InputError, match="eval_every asks for a validation text"):
        train(model, corpus.splits["train"], recipe, PhaseRun(gates=gates))
    train(model, corpus.splits["train"], recipe, PhaseRun(gates=gates, valid=corpus.splits["valid"]))
