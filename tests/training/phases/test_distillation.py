"""Distillation: the loss is the formula, the student moves to its teacher, and a resumed phase is the same phase."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM, TrainerCallback

import deadhead
from benchmarks._tiny_models import VOCABULARY, scramble, tiny_config, tiny_model
from deadhead import InputError
from deadhead.measure import chunks
from deadhead.measure.last_states import whole_logits
from deadhead.measure.losses import SegmentLoss, SegmentOutputs
from deadhead.training import PhaseRecipe, PhaseRun, train
from deadhead.training.phases.distillation import Distillation
from tests.random_models import tiny_config as all_attention_config
from tests.random_models import tiny_model as all_attention
from tests.small_runs import assert_same_tensors, metrics, stream

_TEXT = stream(600, vocab_size=VOCABULARY)


def _recipe(**changes: Any) -> PhaseRecipe:
    values: dict[str, Any] = {"steps": 6, "batch_size": 2, "log_every": 1, "save_every": 3, "learning_rate": 3e-3}
    return PhaseRecipe(**{**values, "distill": 0.7, **changes})


def _made_of(outputs: Any, loss: float) -> SegmentOutputs:
    """What a model made of a batch, whose own loss is as it may be."""
    wanted = torch.zeros(outputs.logits.shape[:2], dtype=torch.long)
    return SegmentOutputs(read=whole_logits(outputs), wanted_BT=wanted, own_loss=torch.tensor(loss))


@pytest.mark.parametrize(("weight", "temperature"), [(0.3, 2.0), (1.0, 1.0), (0.5, 4.0)])
def test_the_loss_is_the_formula(weight: float, temperature: float) -> None:
    """Written down anew, with probabilities and a plain sum over the vocabulary."""
    teacher, student = tiny_model("llama", seed=1), tiny_model("llama", seed=2)
    ids = torch.randint(3, VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        said, outputs = teacher(input_ids=ids).logits.double(), student(input_ids=ids)
        p, q = (torch.softmax(values / temperature, dim=-1) for values in (said, outputs.logits.double()))
        divergence = float((p * (p / q).log()).sum(-1).mean())
    distillation = Distillation(teacher, weight=weight, temperature=temperature)
    loss = float(distillation.loss(_made_of(outputs, 3.0), {"input_ids": ids}))
    assert loss == pytest.approx((1 - weight) * 3.0 + weight * temperature**2 * divergence, rel=1e-5)
    assert distillation.mean_divergence() == pytest.approx(divergence, rel=1e-5)
    assert distillation.mean_divergence() == 0.0


def test_what_does_not_count_is_not_compared() -> None:
    teacher, student = tiny_model("llama", seed=1), tiny_model("llama", seed=2)
    ids = torch.randint(3, VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(0))
    scored = torch.tensor(
        [[False, False, True, True, False, False, False], [True, True, False, False, False, True, True]]
    )
    with torch.no_grad():
        outputs = student(input_ids=ids)
        p, q = (torch.softmax(model(input_ids=ids).logits.double() / 2, dim=-1) for model in (teacher, student))
    # A token is told at the position before it.
    each = (p * (p / q).log()).sum(-1)[:, :-1][scored[:, 1:]]
    inputs = {"input_ids": ids, "scored": scored}
    loss = Distillation(teacher, weight=1.0, temperature=2.0).loss(_made_of(outputs, 3.0), inputs)
    assert float(loss) == pytest.approx(4 * float(each.mean()), rel=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "memory"])
@pytest.mark.parametrize("answers", [False, True])
def test_in_chunks_it_is_the_same(kind: str, answers: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With all gradients; the teacher's logits come in chunks too, and the divergence is noted."""
    if kind == "memory":
        teacher, student = (all_attention(seed=seed).double() for seed in (1, 2))
    else:
        teacher, student = (tiny_model(kind, seed=seed, dtype=torch.float64) for seed in (1, 2))
    words, generator = student.config.vocab_size, torch.Generator().manual_seed(0)
    inputs = {"input_ids": torch.randint(3, words, (3, 11), generator=generator)}
    if kind == "memory":
        inputs |= {"labels": inputs["input_ids"].roll(-1, 1), "is_first": torch.tensor([True] * 3)}
    elif answers:
        inputs["scored"] = torch.rand((3, 11), generator=generator) < 0.7
    found = []
    for at_once in (words * 7, 2**24):
        monkeypatch.setattr(chunks, "AT_ONCE", at_once)
        distillation = Distillation(teacher, weight=0.3, temperature=2.0)
        batch = SegmentLoss(student)(student, inputs)
        assert (batch.own_loss is None) == (at_once < 2**24)
        loss = distillation.loss(batch, inputs)
        learns = [parameter for parameter in student.parameters() if parameter.requires_grad]
        found.append((loss, distillation.mean_divergence(), torch.autograd.grad(loss, learns)))
    (loss, divergence, gradients), (whole, expected, whole_gradients) = found
    # Models compute their own losses in float32.
    assert loss.item() == pytest.approx(whole.item(), rel=1e-6)
    assert divergence == pytest.approx(expected, rel=1e-10)
    largest = max(float(gradient.abs().max()) for gradient in whole_gradients)
    for gradient, other in zip(gradients, whole_gradients, strict=True):
        assert float((gradient - other).abs().max()) <= 1e-6 * largest


def test_nothing_is_to_be_learnt_from_oneself() -> None:
    teacher = tiny_model("gpt2")
    ids = torch.arange(3, 10)[None]
    outputs = teacher(input_ids=ids)
    loss = Distillation(teacher, weight=1.0, temperature=2.0).loss(_made_of(outputs, 5.0), {"input_ids": ids})
    assert abs(loss.item()) < 1e-6
    loss.backward()
    assert max(float(p.grad.abs().max()) for p in teacher.parameters() if p.grad is not None) < 1e-5


def test_a_cut_student_moves_to_its_teacher(tmp_path: Path) -> None:
    """The divergence falls, and the teacher stays as it was, bit for bit."""
    teacher: Any = tiny_model("llama")
    before = copy.deepcopy(teacher.state_dict())
    plan = deadhead.HeadPlan(kept={0: (0,), 1: (1, 2), 2: (3,)}, total={0: 4, 1: 4, 2: 4}, unit="kv_group")
    student = deadhead.cut(copy.deepcopy(teacher), plan)
    recipe = _recipe(steps=40, distill=1.0, sequence_length=12)
    train(student, _TEXT, recipe, PhaseRun(teacher=teacher, metrics=tmp_path / "metrics.jsonl"))
    divergences = [line["teacher_divergence"] for line in metrics(tmp_path)]
    assert len(divergences) == 40
    assert sum(divergences[-5:]) < 0.6 * sum(divergences[:5])
    assert_same_tensors(teacher.state_dict(), before)


class _Killed(Exception):
    """The process is gone."""


class _Kill(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 4:
            raise _Killed


@pytest.mark.parametrize("kind", ["memory", pytest.param("plain", marks=pytest.mark.slow)])
def test_killed_and_resumed_is_as_if_never_stopped(kind: str, tmp_path: Path) -> None:
    """The teacher's memory of the segment before is part of the checkpoint, and not mistaken for the student's."""

    def run(folder: Path, *, kill: bool = False, resume: bool = False) -> Any:
        teacher: Any = all_attention(seed=1) if kind == "memory" else tiny_model("llama", seed=1)
        student: Any = all_attention(seed=2, hidden_dropout=0.1) if kind == "memory" else tiny_model("llama", seed=2)
        text = stream(200) if kind == "memory" else _TEXT
        settings: dict[str, Any] = {"folder": folder / "checkpoints", "metrics": folder / "metrics.jsonl"}
        try:
            callbacks = (_Kill(),) if kill else ()
            train(
                student,
                text,
                _recipe(log_every=2),
                PhaseRun(teacher=teacher, resume=resume, callbacks=callbacks, **settings),
            )
        except _Killed:
            assert kill
        return student

    whole = run(tmp_path / "whole")
    run(tmp_path / "killed", kill=True)
    resumed = run(tmp_path / "killed", resume=True)
    assert_same_tensors(resumed.state_dict(), whole.state_dict())
    assert metrics(tmp_path / "killed") == metrics(tmp_path / "whole")
    assert all(math.isfinite(line["teacher_divergence"]) for line in metrics(tmp_path / "whole"))


def test_a_teacher_of_another_vocabulary_is_refused() -> None:
    config: Any = tiny_config("llama")
    config.vocab_size = VOCABULARY + 1
    teacher = LlamaForCausalLM(config)
    scramble(teacher, 0)
    with pytest.raises(InputError, match="the model has 99 tokens and the teacher 100"):
        train(tiny_model("llama"), _TEXT, _recipe(), PhaseRun(teacher=teacher))


def test_an_adaptive_softmax_has_no_distribution_to_teach() -> None:
    config = all_attention_config(adaptive_cutoffs=[5], adaptive_factor=2)
    teacher, student = (deadhead.models.AllAttentionForCausalLM(config) for _ in range(2))
    with pytest.raises(InputError, match="adaptive softmax"):
        train(student, stream(200), _recipe(), PhaseRun(teacher=teacher))


def test_a_teacher_without_weight_is_refused() -> None:
    with pytest.raises(InputError, match="its weight in the loss, distill, is 0"):
        train(tiny_model("llama"), _TEXT, _recipe(distill=0.0), PhaseRun(teacher=tiny_model("llama")))
