"""One phase of training: memory, accumulation, precision, divergence, checkpoints, and going on from them."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]
from transformers import LlamaConfig, LlamaForCausalLM

import deadhead
from deadhead import InputError
from deadhead.data import TokenStream
from deadhead.errors import DivergenceError
from deadhead.models import AllAttentionForCausalLM
from deadhead.training import PhaseRecipe, PhaseRun, train
from deadhead.training.phases.checkpoints import last_checkpoint
from deadhead.training.phases.choosing import gate_config
from deadhead.training.phases.ranking import rank
from tests.random_models import tiny_config, tiny_model
from tests.small_phase import BATCH, TEXT, phase_recipe, prune_recipe, run_phase
from tests.small_runs import assert_same_tensors, metrics, stream


def _segments(index: int, *, first: int = 0) -> tuple[torch.Tensor, torch.Tensor, bool]:
    """Return inputs and next tokens of batch `index`, written down without the dataset, and whether the text begins."""
    length, tokens = 6, torch.from_numpy(TEXT.tokens.astype("int64"))
    per_row = (len(tokens) - 1) // (BATCH * length)
    segment = (index + first) % per_row
    starts = [(row * per_row + segment) * length for row in range(BATCH)]
    inputs = torch.stack([tokens[start : start + length] for start in starts])
    labels = torch.stack([tokens[start + 1 : start + length + 1] for start in starts])
    return inputs, labels, segment == 0


def _by_hand(
    model: AllAttentionForCausalLM, steps: int, *, accumulation: int = 1, first: int = 0, memory: bool = True
) -> list[float]:
    """Train with a plain loop and return the loss of each step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0, fused=True)
    model.train()
    losses: list[float] = []
    states: Any = None
    batch = 0
    for _ in range(steps):
        total = 0.0
        for _ in range(accumulation):
            inputs, labels, begins = _segments(batch, first=first)
            given = None if begins or not memory else states
            output = model(input_ids=inputs, labels=labels, shift_labels=labels, memory=given, use_cache=False)
            (output.loss / accumulation).backward()
            total += float(output.loss.detach()) / accumulation
            states, batch = output.memory, batch + 1
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses


def _losses(folder: Path) -> list[float]:
    return [line["loss"] for line in metrics(folder)]


@pytest.mark.parametrize("accumulation", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_memory_is_the_text_before(accumulation: int, tmp_path: Path) -> None:
    """Training equals a plain loop that carries memory, over the end of the text and on from its beginning."""
    model, by_hand = tiny_model(), tiny_model()
    steps = 10 if accumulation == 1 else 6
    recipe = phase_recipe(steps=steps, gradient_accumulation=accumulation)
    train(model, TEXT, recipe, PhaseRun(metrics=tmp_path / "metrics.jsonl", first_segment=3))
    expected = _by_hand(by_hand, steps, accumulation=accumulation, first=3)
    assert _losses(tmp_path) == pytest.approx(expected, rel=1e-6)
    for name, value in by_hand.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-4, atol=1e-6)
    assert not model.training
    forgetful = _by_hand(tiny_model(), steps, accumulation=accumulation, first=3, memory=False)
    assert max(abs(a - b) for a, b in zip(expected, forgetful, strict=True)) > 1e-3


@pytest.mark.parametrize(("batch_size", "accumulation"), [pytest.param(1, 4, marks=pytest.mark.slow), (2, 2)])
@pytest.mark.parametrize("distill", [0.0, 0.5])
def test_each_token_of_an_answer_counts_alike(
    batch_size: int, accumulation: int, distill: float, tmp_path: Path
) -> None:
    """However a step's rows are divided in batches, its loss is the mean over all tokens that count."""

    def llama(seed: int) -> LlamaForCausalLM:
        torch.manual_seed(seed)
        sizes: dict[str, Any] = {
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 16,
        }
        return LlamaForCausalLM(LlamaConfig(vocab_size=29, **sizes))

    marks = np.random.default_rng(0).random(320) < np.repeat(np.linspace(0.05, 1, 40), 8)
    text = TokenStream(tokens=stream(320).tokens, num_bytes=320, num_words=50, prefix=(1,), scored=marks)

    def trained(name: str, **rows: int) -> tuple[list[float], dict[str, torch.Tensor]]:
        model, teacher = llama(0), llama(1) if distill else None
        recipe = phase_recipe(steps=3, sequence_length=9, distill=distill, **rows)
        train(model, text, recipe, PhaseRun(teacher=teacher, metrics=tmp_path / name / "metrics.jsonl"))
        return _losses(tmp_path / name), model.state_dict()

    whole, weights = trained("whole", batch_size=4)
    parts, other = trained("parts", batch_size=batch_size, gradient_accumulation=accumulation)
    assert parts == pytest.approx(whole, rel=1e-5)
    for name, value in weights.items():
        torch.testing.assert_close(other[name], value, rtol=1e-4, atol=1e-6)


def test_seeded_loss_does_not_change(tmp_path: Path) -> None:
    """The losses of a short run with gates, to the digits that machines agree on. A change of meaning changes them."""
    torch.manual_seed(0)
    model = AllAttentionForCausalLM(tiny_config())
    gates = deadhead.attach(model, config=gate_config(prune_recipe(), model, seed=0))
    train(
        model,
        stream(400),
        prune_recipe(steps=8),
        PhaseRun(gates=gates, metrics=tmp_path / "metrics.jsonl"),
    )
    lines = metrics(tmp_path)
    assert [line["loss"] for line in lines] == pytest.approx(_SEEDED_LOSSES, abs=1e-3)
    assert [line["l0"] for line in lines] == pytest.approx(_SEEDED_L0, abs=1e-3)


_SEEDED_LOSSES = [4.0891, 3.9889, 4.2282, 3.7976, 3.8383, 4.3916, 3.6699, 3.8414]
_SEEDED_L0 = [11.3117, 11.0891, 10.8277, 10.4963, 10.0796, 9.5686, 8.9553, 8.2397]


@pytest.mark.parametrize(
    "recipe",
    [
        phase_recipe(steps=8, save_every=2, schedule="cosine", warmup_steps=2, weight_decay=0.1),
        # Logs and checkpoints at different steps: the mean that was being taken must go on too.
        pytest.param(phase_recipe(steps=8, save_every=4, log_every=3, gradient_accumulation=2), marks=pytest.mark.slow),
        pytest.param(prune_recipe(steps=8, save_every=4, log_every=3, l0_warmup_steps=10), marks=pytest.mark.slow),
        prune_recipe(steps=8, save_every=4, sparsity=0.5, weighting="output_difference", gradient_accumulation=2),
        pytest.param(
            prune_recipe(steps=8, save_every=4, sparsity=0.5, gate_lr=None, start_from="taylor", start_batches=2),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            prune_recipe(steps=8, save_every=4, sparsity=0.5, gate_lr=None, criterion="topk"), marks=pytest.mark.slow
        ),
        pytest.param(phase_recipe(steps=8, save_every=4, bf16=True), marks=pytest.mark.slow),
    ],
    ids=["train", "train-log-between", "prune", "prune-target", "prune-leaning", "prune-topk", "bf16"],
)
def test_killed_and_resumed_is_as_if_never_stopped(recipe: PhaseRecipe, tmp_path: Path) -> None:
    whole, whole_gates = run_phase(tmp_path / "whole", recipe)
    run_phase(tmp_path / "killed", recipe, kill=5)
    assert last_checkpoint(tmp_path / "killed" / "checkpoints") == tmp_path / "killed" / "checkpoints" / "checkpoint-4"
    resumed, gates = run_phase(tmp_path / "killed", recipe, resume=True)
    assert_same_tensors(resumed.state_dict(), whole.state_dict())
    assert metrics(tmp_path / "killed") == metrics(tmp_path / "whole")
    if gates is not None and whole_gates is not None:
        assert_same_tensors(gates.state_dict(), whole_gates.state_dict())
        assert gates.plan() == whole_gates.plan()


@pytest.mark.slow
def test_gates_begin_as_a_one_shot_criterion_ranks_heads(tmp_path: Path) -> None:
    leaning = prune_recipe(steps=1, sparsity=0.5, gate_lr=1e-6, start_from="taylor", start_batches=2)
    _, gates = run_phase(tmp_path / "leaning", leaning)
    ranked = rank(tiny_model(), TEXT, prune_recipe(steps=2, sparsity=0.5, criterion="taylor"))
    assert gates is not None
    found = gates.plan(sparsity=0.5)
    assert found.kept == ranked.kept
    _, alike = run_phase(tmp_path / "alike", leaning.model_copy(update={"start_from": None}))
    assert alike is not None and alike.plan(sparsity=0.5).kept != found.kept


def test_a_one_shot_criterion_trains_no_gates(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="ranks heads and trains no gates"):
        run_phase(tmp_path, prune_recipe(criterion="magnitude", sparsity=0.5))
    with pytest.raises(InputError, match="trains gates; use deadhead.train"):
        rank(tiny_model(), TEXT, prune_recipe(sparsity=0.5))


@pytest.mark.slow
def test_resumed_after_its_last_step_does_nothing_more(tmp_path: Path) -> None:
    recipe = prune_recipe(steps=4, save_every=4)
    whole, _ = run_phase(tmp_path, recipe)
    lines = metrics(tmp_path)
    resumed, _ = run_phase(tmp_path, recipe, resume=True)
    assert_same_tensors(resumed.state_dict(), whole.state_dict())
    assert metrics(tmp_path) == lines


@pytest.mark.slow
def test_a_line_cut_short_in_the_metrics_is_written_anew(tmp_path: Path) -> None:
    recipe = phase_recipe(steps=4, save_every=2)
    run_phase(tmp_path / "whole", recipe)
    run_phase(tmp_path / "killed", recipe, kill=3)
    with (tmp_path / "killed" / "metrics.jsonl").open("a") as file:
        file.write('{"phase": "train", "st')
    run_phase(tmp_path / "killed", recipe, resume=True)
    assert metrics(tmp_path / "killed") == metrics(tmp_path / "whole")


def test_a_learning_rate_far_too_high_stops_training(tmp_path: Path) -> None:
    with pytest.raises(
        DivergenceError, match=r"stopped at step [23]: the .*; no checkpoint had been written yet\. Try"
    ):
        run_phase(tmp_path, phase_recipe().model_copy(update={"learning_rate": 1e30}))
    assert not list((tmp_path / "checkpoints").glob("*"))


def test_a_gradient_that_is_not_finite_stops_training_before_the_step(tmp_path: Path) -> None:
    model = tiny_model()
    before = copy.deepcopy(model.state_dict())
    model.model.norm.weight.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(DivergenceError, match="stopped at step 1: the gradient norm is nan|inf"):
        train(model, TEXT, phase_recipe(), PhaseRun(folder=tmp_path))
    assert_same_tensors(model.state_dict(), before)


@pytest.mark.slow
def test_bf16_trains_float32_weights(tmp_path: Path) -> None:
    full, _ = run_phase(tmp_path / "full", phase_recipe())
    half, _ = run_phase(tmp_path / "half", phase_recipe(bf16=True))
    assert half.dtype == torch.float32
    assert _losses(tmp_path / "half") != _losses(tmp_path / "full")
    assert _losses(tmp_path / "half") == pytest.approx(_losses(tmp_path / "full"), rel=0.05)
    assert not torch.equal(half.model.norm.weight, full.model.norm.weight)


@pytest.mark.slow
def test_gradient_checkpointing_changes_nothing_but_memory(tmp_path: Path) -> None:
    """With dropout and gate noise, which must be the same when the forward pass is run again."""
    recipe = prune_recipe(steps=4)
    plain, plain_gates = run_phase(tmp_path / "plain", recipe)
    sparing, gates = run_phase(tmp_path / "sparing", recipe.model_copy(update={"gradient_checkpointing": True}))
    assert _losses(tmp_path / "sparing") == pytest.approx(_losses(tmp_path / "plain"), rel=1e-6)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(sparing.state_dict()[name], value, rtol=1e-4, atol=1e-6)
    assert gates is not None and plain_gates is not None
    assert not sparing.model.gradient_checkpointing
    assert deadhead.evaluate(sparing, TEXT).loss == pytest.approx(deadhead.evaluate(plain, TEXT).loss, rel=1e-5)


def test_accumulated_batches_count_alike(tmp_path: Path) -> None:
    """Without memory to tell them apart, two batches of one row are one batch of two."""
    text = stream(2 * 6 + 1)
    losses = []
    for rows, accumulation in ((2, 1), (1, 2)):
        folder = tmp_path / str(rows)
        folder.mkdir()
        model = tiny_model(memory_length=1)
        # One step; row 1 of the batch is the second batch of one row, whose memory of one position is taken away.
        recipe = phase_recipe(steps=1, batch_size=rows, gradient_accumulation=accumulation)
        if rows == 1:
            _forget(model)
        train(model, text, recipe, PhaseRun(metrics=folder / "metrics.jsonl"))
        losses.append((_losses(folder)[0], model.state_dict()))
    assert losses[0][0] == pytest.approx(losses[1][0], rel=1e-6)
    for name, value in losses[0][1].items():
        torch.testing.assert_close(losses[1][1][name], value, rtol=1e-3, atol=1e-5)


def _forget(model: AllAttentionForCausalLM) -> None:
    def without_memory(_: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, {**kwargs, "memory": None}

    model.register_forward_pre_hook(without_memory, with_kwargs=True)


def test_metrics_and_tensorboard_hold_the_same_numbers(tmp_path: Path) -> None:
    run_phase(tmp_path, prune_recipe(steps=3, track_difference=True))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    for line in lines:
        assert line["phase"] == "train"
        assert set(line) == {
            *("phase", "step", "loss", "grad_norm", "learning_rate", "clipped", "epoch", "lambda", "l0", "sparsity"),
            *("heads", "open_probability", "output_difference", "seconds"),
        }
        assert len(line["heads"]) == 3
        assert [len(line["open_probability"][str(layer)]) for layer in range(3)] == [4, 4, 4]
        assert all(value > 0 for values in line["output_difference"].values() for value in values)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert {"train/loss", "train/l0", "train/lambda", "train/heads/layer_0"} <= set(events.Tags()["scalars"])
    scalars = events.Scalars("train/loss")
    assert [event.step for event in scalars] == [1, 2, 3]
    assert [event.value for event in scalars] == pytest.approx([line["loss"] for line in lines])


def test_output_differences_are_measured_where_asked_for_and_change_no_bit_of_the_training(tmp_path: Path) -> None:
    found = []
    for track in (False, True):
        folder = tmp_path / str(track)
        # One of the draws that measure has gates that are closed.
        recipe = prune_recipe(steps=12, l0=1.0, track_difference=track)
        model, gates = run_phase(folder, recipe)
        assert gates is not None
        weights = {name: value for name, value in model.state_dict().items() if not name.endswith(".difference")}
        found.append((weights, metrics(folder)))
        assert gates.sparsity > 0
        assert all(bool(row.all()) == track == bool(row.any()) for row in gates.difference().values())
        assert all(("output_difference" in line) == track for line in found[-1][1])
    (plain, lines), (tracked, tracked_lines) = found
    assert_same_tensors(plain, tracked)
    for line, other in zip(lines, tracked_lines, strict=True):
        assert line == {name: value for name, value in other.items() if name != "output_difference"}


@pytest.mark.slow
def test_progress_is_told_of_every_step(tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    train(
        tiny_model(),
        TEXT,
        phase_recipe(steps=3, log_every=2),
        PhaseRun(progress=lambda name, done, total, _: told.append((name, done, total))),
    )
    assert told == [("train", 1, 3), ("train", 2, 3), ("train", 3, 3)]


def test_gates_need_aprune_recipe() -> None:
    model = tiny_model()
    gates = deadhead.attach(model)
    with pytest.raises(InputError, match="A phase with gates needs a PruneRecipe"):
        train(model, TEXT, phase_recipe(), PhaseRun(gates=gates))


def test_a_text_too_short_is_refused() -> None:
    with pytest.raises(InputError, match="At least 13 tokens were expected for 2 rows of segments of 6, but .* has 12"):
        train(tiny_model(), stream(12), phase_recipe())
