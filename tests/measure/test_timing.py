"""The stopwatch: what it runs, what it leaves behind, and what it says of wrong numbers."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from transformers import PreTrainedModel

import deadhead
from deadhead import HeadPlan, InputError
from deadhead.errors import UnsupportedModel
from deadhead.measure.evaluation import evaluate
from deadhead.measure.timing import WORKLOADS, Workload, bench, efficiency
from tests.layouts.test_inputs import reader
from tests.random_models import assert_unchanged, snapshot, tiny_model
from tests.small_phase import stream


@pytest.mark.parametrize("workload", WORKLOADS)
def test_each_workload_runs_every_model_in_turn(workload: Workload) -> None:
    dense = tiny_model()
    pruned = deadhead.cut(tiny_model(), HeadPlan(kept={0: (1,), 1: ()}, total=dict.fromkeys(range(3), 4)))
    before = snapshot(dense)
    seen: list[tuple[str, tuple[int, ...]]] = []
    for name, model in (("dense", dense), ("pruned", pruned)):

        def look(_: Any, __: Any, kwargs: Any, name: str = name) -> None:
            seen.append((name, tuple(kwargs["input_ids"].shape)))

        model.register_forward_pre_hook(look, with_kwargs=True)
    timings = bench(
        {"dense": dense, "pruned": pruned}, workload=workload, batch_size=2, length=7, new_tokens=3, repeats=2
    )
    shapes = [(2, 7)] + [(2, 1)] * (3 if workload == "decode" else 0)
    assert seen == [(name, shape) for _ in range(3) for name in ("dense", "pruned") for shape in shapes]
    assert list(timings) == ["dense", "pruned"]
    tokens = 2 * (3 if workload == "decode" else 7)
    for timing in timings.values():
        assert timing.workload == workload
        assert timing.seconds > 0
        assert timing.tokens_per_second == pytest.approx(tokens / timing.seconds)
    # No gradient, mode or weight is left changed.
    assert all(parameter.grad is None for parameter in dense.parameters())
    assert not dense.training
    for module in dense.modules():
        module._forward_pre_hooks.clear()
    assert_unchanged(dense, before)


def test_the_median_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first repetition is warm-up; one slow one among the others does not count."""
    times = iter([99.0, 0.0, 1.0, 0.0, 50.0, 0.0, 2.0])
    # By the module's name in full: `deadhead.bench` is the function.
    clock = SimpleNamespace(perf_counter=lambda: next(times))
    monkeypatch.setattr(sys.modules["deadhead.measure.timing"], "time", clock)
    timing = bench({"model": tiny_model()}, batch_size=1, length=4, repeats=3)["model"]
    assert (timing.seconds, timing.tokens_per_second) == (2.0, 2.0)


def test_training_mode_is_restored() -> None:
    model = tiny_model().train()
    for workload in WORKLOADS:
        bench({"model": model}, workload=workload, batch_size=1, length=4, new_tokens=1, repeats=1)
        assert model.training


@pytest.mark.parametrize(
    ("name", "positions"),
    [
        ("ViTForImageClassification", 5),
        ("CLIPVisionModel", 5),
        ("ASTForAudioClassification", 4),
        ("Wav2Vec2ForCTC", 30),
        ("HubertForSequenceClassification", 30),
        ("WhisperForAudioClassification", 12),
    ],
)
def test_what_reads_images_or_sound_is_timed_on_such(name: str, positions: int) -> None:
    timing = bench({"model": reader(name)}, batch_size=2, length=7, repeats=1)["model"]
    assert timing.tokens_per_second * timing.seconds == pytest.approx(2 * positions)
    with pytest.raises(UnsupportedModel, match="The workload decode needs a model that predicts the next token"):
        bench({"model": reader(name)}, workload="decode")


@pytest.mark.parametrize(("workload", "length"), [("prefill", 9), ("train", 9), ("decode", 7)])
def test_a_text_is_not_longer_than_the_models_positions(workload: Workload, length: int) -> None:
    config = transformers.GPT2Config(vocab_size=9, n_embd=8, n_layer=1, n_head=2, n_positions=8)
    models = {"model": transformers.GPT2LMHeadModel(config)}
    bench(models, workload=workload, batch_size=1, length=length - 1, new_tokens=2, repeats=1)
    with pytest.raises(InputError, match=f"A text of the {workload} would have 9 tokens, .* has 8 positions"):
        bench(models, workload=workload, length=length, new_tokens=2)


def test_a_model_that_does_not_run_on_made_inputs_is_told() -> None:
    with pytest.raises(UnsupportedModel, match="does not run on the input_ids, use_cache that deadhead makes up"):
        bench({"model": _t5()}, batch_size=1, length=4, repeats=1)


@pytest.mark.parametrize(
    ("models", "message"),
    [
        ({}, "models must be given by name, as in {'dense': model}, but got none"),
        (tiny_model(), "models must be given by name, .* but got an object of type AllAttentionForCausalLM"),
        ({"a": None}, "A PreTrainedModel of transformers was expected, but got a NoneType"),
        ({"a": "gpt2"}, "got a path or name"),
        ({"a": tiny_model(), "b": torch.nn.Sequential(tiny_model())}, "but got a Sequential, which holds one"),
        ({"a": tiny_model().to("meta")}, "A benchmark needs a model with its weights"),
    ],
    ids=["none", "no mapping", "nothing", "name", "wrapped", "no weights"],
)
def test_what_is_no_model(models: Any, message: str) -> None:
    with pytest.raises((InputError, UnsupportedModel), match=message):
        bench(models)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "A benchmark's batch size must be at least 1, but it is 0"),
        ({"length": -1}, "A benchmark's length must be at least 1, but it is -1"),
        ({"new_tokens": 0}, "A benchmark's new tokens must be at least 1, but it is 0"),
        ({"repeats": 0}, "A benchmark's repeats must be at least 1, but it is 0"),
        ({"workload": "sleep"}, "takes workload as .*'prefill', 'decode', 'train'.*, but got 'sleep'"),
    ],
)
def test_wrong_numbers(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        bench({"model": tiny_model()}, **options)


def test_efficiency() -> None:
    assert efficiency(dense_seconds=3.0, pruned_seconds=1.5, dense_flops=8.0, pruned_flops=2.0) == 0.5
    assert efficiency(2.0, 1.0, 2.0, 1.0) == 1.0


def test_the_process_random_state_is_left_alone() -> None:
    model = tiny_model()
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    bench({"model": model}, batch_size=1, length=4, repeats=1)
    assert torch.equal(torch.rand(3), expected)


def _t5() -> PreTrainedModel:
    config = transformers.T5Config(vocab_size=32, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=4)
    return transformers.T5ForConditionalGeneration(config)


def _bart() -> PreTrainedModel:
    layers = {f"{part}_layers": 1 for part in ("encoder", "decoder")}
    heads = {f"{part}_attention_heads": 4 for part in ("encoder", "decoder")}
    config = transformers.BartConfig(vocab_size=32, d_model=16, **layers, **heads)
    return transformers.BartForConditionalGeneration(config)


@pytest.mark.parametrize("make", [_t5, _bart])
def test_an_encoder_with_a_decoder_is_told_in_one_sentence(make: Callable[[], PreTrainedModel]) -> None:
    """Of one text such a model predicts nothing."""
    model = make()
    text = stream(99, vocab_size=29)
    calls: dict[str, Callable[[], object]] = {
        "decode": lambda: bench({"model": model}, workload="decode", batch_size=2, length=8, repeats=1),
        "train": lambda: bench({"model": model}, workload="train", batch_size=2, length=8, repeats=1),
        "Perplexity": lambda: evaluate(model, text, batch_size=2, window=8),
    }
    for what, call in calls.items():
        with pytest.raises(UnsupportedModel, match=rf"{what} needs .* has an encoder and a decoder") as caught:
            call()
        assert "\n" not in str(caught.value)
