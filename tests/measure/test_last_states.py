"""Losses from last hidden states, chunk by chunk, are those of the model's own logits, and so are all gradients."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForMaskedLM, BertConfig

import deadhead
from benchmarks._tiny_models import VOCABULARY, scramble, tiny_model
from deadhead.measure import chunks
from deadhead.measure.last_states import StateReader
from deadhead.measure.losses import SegmentLoss
from deadhead.training.phases.learning import lora
from tests.random_models import tiny_config as all_attention_config
from tests.random_models import tiny_model as all_attention

# Not a divisor of the tokens below.
_TOKENS_AT_ONCE = 7

# What stands between states and logits: nothing, a tied table, a cap, scales, a transform with biases.
TYPES = ("llama", "gpt2", "gemma2", "cohere", "granite", "bert")


@pytest.fixture(autouse=True)
def few_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let few logits be too many."""
    monkeypatch.setattr(chunks, "AT_ONCE", VOCABULARY * _TOKENS_AT_ONCE)


def build(kind: str, dtype: torch.dtype) -> Any:
    """Return a model whose scales and caps show."""
    if kind == "all_attention":
        return all_attention(vocab_size=VOCABULARY, lm_head_bias=True).to(dtype)
    model: Any = tiny_model(kind, dtype=dtype)
    if kind == "gemma2":
        model.config.final_logit_softcapping = 2.0
    elif kind == "cohere":
        model.logit_scale = 0.3
    elif kind == "granite":
        model.config.logits_scaling = 3.0
    return model


def ids_of(rows: int = 3, length: int = 11) -> Tensor:
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(1))


def gradients(loss: Tensor, model: nn.Module) -> dict[str, Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return {name: gradient for name, gradient in zip(names, found, strict=True) if gradient is not None}


def assert_same_gradients(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in expected.items():
        assert float((found[name] - gradient).abs().max()) <= tolerance * largest, name


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("kind", TYPES)
def test_the_loss_is_that_of_the_logits(kind: str, dtype: torch.dtype, tolerance: float) -> None:
    model, ids = build(kind, dtype), ids_of()
    wanted = ids.clone()
    wanted[0, :5] = wanted[2] = -100
    logits = model(input_ids=ids, use_cache=False).logits
    expected = cross_entropy(logits.flatten(0, 1), wanted.flatten(), ignore_index=-100, reduction="sum")
    reader = StateReader(model)
    assert reader.is_apart(model, ids)
    read = reader(model, input_ids=ids, use_cache=False)
    loss = read.nll(wanted)
    assert loss.dtype == dtype
    assert loss.item() == pytest.approx(expected.item(), rel=tolerance)
    # Whatever the loss is multiplied by.
    assert_same_gradients(gradients(loss * 0.3, model), gradients(expected * 0.3, model), tolerance)


@pytest.mark.parametrize("answers", [False, True])
@pytest.mark.parametrize("kind", ["llama", "cohere", "gpt2"])
def test_the_loss_of_a_batch_is_the_model_s_own(kind: str, answers: bool) -> None:
    model, inputs = build(kind, torch.float32), {"input_ids": ids_of()}
    if answers:
        inputs["scored"] = torch.rand(ids_of().shape, generator=torch.Generator().manual_seed(2)) < 0.8
    labels = inputs["input_ids"].masked_fill(~inputs["scored"], -100) if answers else inputs["input_ids"]
    expected = model(input_ids=inputs["input_ids"], labels=labels, use_cache=False).loss
    found = SegmentLoss(model)(model, inputs)
    assert found.own_loss is None
    loss = found.loss
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert_same_gradients(gradients(loss, model), gradients(expected, model), 1e-5)


@pytest.mark.parametrize("cutoffs", [None, [20, 50]])
def test_our_own_model_with_its_memory(cutoffs: list[int] | None) -> None:
    config = all_attention_config(vocab_size=VOCABULARY, adaptive_cutoffs=cutoffs, lm_head_bias=True)
    model = deadhead.models.AllAttentionForCausalLM(config)
    scramble(model, 0)
    if cutoffs:
        chunks.AT_ONCE = cutoffs[0] * _TOKENS_AT_ONCE
    losses, memory = SegmentLoss(model), None
    for step in range(2):
        ids, wanted = ids_of(), ids_of().roll(step + 1)
        wanted[0, 3] = -100
        inputs = {"input_ids": ids, "labels": wanted, "is_first": torch.tensor([step == 0] * 3)}
        whole = model(input_ids=ids, shift_labels=wanted, labels=wanted, use_cache=False, memory=memory)
        memory = whole.memory
        found = losses(model, inputs)
        assert found.own_loss is None
        loss = found.loss
        assert loss.item() == pytest.approx(whole.loss.item(), rel=1e-6)
        assert_same_gradients(gradients(loss, model), gradients(whole.loss, model), 1e-5)
        assert losses.memory is not None
        assert all(map(torch.equal, losses.memory, memory))


def test_masked_language_models_too() -> None:
    """Their labels are where the tokens are, which is for the caller to say."""
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32
    )
    model = AutoModelForMaskedLM.from_config(config).double().eval()
    scramble(model, 0)
    ids = ids_of()
    labels = ids.masked_fill(torch.rand(ids.shape, generator=torch.Generator().manual_seed(0)) < 0.5, -100)
    logits = model(input_ids=ids).logits
    expected = cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    reader = StateReader(model)
    assert reader.is_apart(model, ids)
    loss = reader(model, input_ids=ids).nll(labels)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-10)
    assert_same_gradients(gradients(loss, model), gradients(expected, model), 1e-10)


class _Largest(TorchDispatchMode):
    """Notes the most numbers of a tensor that has the vocabulary as one of its sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor) and VOCABULARY in tensor.shape:
                self.numbers = max(self.numbers, tensor.numel())
        return result


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_logits_of_all_tokens_are_never_there(kind: str) -> None:
    """Neither forward nor backward, while the plain way is seen to have them."""
    model, ids = build(kind, torch.float32), ids_of(4, 40)
    everything = ids.numel() * VOCABULARY
    assert everything > VOCABULARY * 64, "or a weight would be as large"
    with _Largest() as plain:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    assert plain.numbers >= everything
    losses = SegmentLoss(model)
    with _Largest() as chunked:
        losses(model, {"input_ids": ids}).loss.backward()
        with torch.no_grad():
            float(losses(model, {"input_ids": ids}).loss)
    assert chunked.numbers == VOCABULARY * 64


def test_frozen_weights_get_no_gradient() -> None:
    model, ids = build("gemma2", torch.float32), ids_of()
    model.requires_grad_(False)
    model.model.norm.weight.requires_grad_()
    expected = model(input_ids=ids, labels=ids, use_cache=False).loss
    expected.backward()
    wanted, model.model.norm.weight.grad = model.model.norm.weight.grad, None
    SegmentLoss(model)(model, {"input_ids": ids}).loss.backward()
    assert torch.allclose(model.model.norm.weight.grad, wanted, rtol=1e-4, atol=1e-7)
    assert model.lm_head.weight.grad is None


def test_hooks_of_the_layers_are_called_once() -> None:
    """Gates draw their noise in one of them; a chunk runs no layer."""
    model, ids, calls = build("llama", torch.float32), ids_of(), []
    losses = SegmentLoss(model)
    losses(model, {"input_ids": ids})
    model.model.register_forward_pre_hook(lambda *_: calls.append(1))
    losses(model, {"input_ids": ids}).loss.backward()
    assert calls == [1]
    assert type(model.model).__name__ == "LlamaModel"


@pytest.mark.parametrize("learning", ["everything", "gates"])
def test_gates_learn_the_same(learning: str) -> None:
    model, ids = build("llama", torch.float32), ids_of()
    gates = deadhead.attach(model)
    if learning == "gates":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("log_alpha" in name)
    model.train()
    found = []
    for at_once in (VOCABULARY * _TOKENS_AT_ONCE, 2**24):
        chunks.AT_ONCE = at_once
        gates.begin_step(3)
        batch = SegmentLoss(model)(model, {"input_ids": ids})
        assert (batch.own_loss is None) == (at_once < 2**24)
        learns = {name: p for name, p in model.named_parameters() if p.requires_grad}
        values = torch.autograd.grad(batch.loss, list(learns.values()), allow_unused=True)
        found.append({name: value for name, value in zip(learns, values, strict=True) if value is not None})
    assert any("log_alpha" in name for name in found[0])
    assert_same_gradients(found[0], found[1], 1e-5)


class _Aside(nn.Module):
    """An output layer that looks at the token before."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, states: Tensor) -> Tensor:
        logits: Tensor = self.layer(states)
        return logits + 0.1 * logits.roll(1, dims=1)


def test_what_does_not_fit_is_run_as_it_is() -> None:
    """Output layers that mix tokens, losses with something added, wrappers of another kind, compiled models."""
    ids = ids_of()
    model = build("llama", torch.float32)
    model.lm_head = _Aside(model.lm_head)
    assert not StateReader(model).is_apart(model, ids)

    model = build("mixtral", torch.float32)
    assert SegmentLoss(model)(model, {"input_ids": ids}).own_loss is None
    model.config.output_router_logits = True
    expected = model(input_ids=ids, labels=ids, use_cache=False).loss
    found = SegmentLoss(model)(model, {"input_ids": ids})
    assert found.own_loss is not None
    assert torch.equal(found.loss, expected)

    model = build("llama", torch.float32)
    assert not StateReader(model).is_apart(nn.Sequential(model), ids)
    model.model._compiled_call_impl = model.model._call_impl
    assert not StateReader(model).is_apart(model, ids)


def test_peft_s_wrapper() -> None:
    pytest.importorskip("peft")
    model, ids = build("llama", torch.float32), ids_of()
    with lora(model, 2) as wrapped:
        expected = wrapped(input_ids=ids, labels=ids, use_cache=False).loss
        found = SegmentLoss(wrapped)(wrapped, {"input_ids": ids})
        assert found.own_loss is None
        loss = found.loss
        assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
        parameters = [p for p in wrapped.parameters() if p.requires_grad]
        assert parameters
        pairs = zip(torch.autograd.grad(loss, parameters), torch.autograd.grad(expected, parameters), strict=True)
        assert all(torch.allclose(one, other, rtol=1e-4, atol=1e-6) for one, other in pairs)


@pytest.fixture
def one_process() -> Iterator[None]:
    """A group of this process alone."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("unused", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_ddp_s_wrapper(kind: str, unused: bool, one_process: None) -> None:
    model, ids = build(kind, torch.float32), ids_of()
    expected = gradients(model(input_ids=ids, labels=ids, use_cache=False).loss, model)
    wrapped = nn.parallel.DistributedDataParallel(model, find_unused_parameters=unused)
    losses = SegmentLoss(model)
    for _ in range(2):
        model.zero_grad()
        found = losses(wrapped, {"input_ids": ids})
        assert found.own_loss is None
        found.loss.backward()
        assert_same_gradients({name: p.grad for name, p in model.named_parameters()}, expected, 1e-5)
