"""Our All-attention model with the weights of the paper authors' released code reproduces its numbers (design, §5)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from deadhead.attaching import attach
from deadhead.cutting import cut
from deadhead.gates.gates import HeadGates
from deadhead.gates.hard_concrete import GateConfig, gate_values, l0_probability
from deadhead.gates.head_gate import HeadGate
from deadhead.gates.penalty import penalty_gradient
from deadhead.models import AllAttentionConfig, AllAttentionForCausalLM
from tests.random_models import cached_logits, difference

ALLOWED = 1e-5
SEGMENT = 16
LAYERS, HEADS, WIDTH = 3, 4, 16
GATES = GateConfig(beta=0.333)

# The largest difference met so far in this process, for whoever wants to quote it.
largest = 0.0

Reference = dict[str, Tensor]
Build = Callable[[], AllAttentionForCausalLM]


@pytest.fixture(scope="module")
def reference(reference_dir: Path) -> Reference:
    with np.load(reference_dir / "peer_tiny.npz") as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files}


@pytest.fixture(params=["eager", "sdpa"])
def model(request: pytest.FixtureRequest, reference: Reference) -> AllAttentionForCausalLM:
    make: Any = AllAttentionConfig
    config = make(
        vocab_size=100,
        hidden_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_persistent=32,
        memory_length=SEGMENT,
        segment_length=SEGMENT,
        attend_initial_memory=True,
        final_layer_norm=False,
        lm_head_bias=True,
        tie_word_embeddings=False,
        attn_implementation=request.param,
    )
    built = AllAttentionForCausalLM(config)
    # Norm weights are stored as w − 1, persistent vectors with a batch dimension, u and v flat.
    state = {
        ours: convert(reference[f"sd/{theirs}.data"]) + (1 if ours.endswith("norm.weight") else 0)
        for ours, (theirs, convert) in NAMES.items()
    }
    built.load_state_dict(state, strict=True)
    return built.eval()


def reproduces(values: Tensor, reference: Tensor, what: object = "") -> None:
    """Assert that `values` are the reference's to 1e-5."""
    global largest
    found = difference(values, reference)
    largest = max(largest, found)
    assert found <= ALLOWED, what


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _names() -> dict[str, tuple[str, Callable[[Tensor], Tensor]]]:
    """Map our names to theirs, with what turns their tensor, or its gradient, into ours."""
    names: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
        "model.embed_tokens.weight": ("word_emb.weight", _same),
        "model.position_table": ("pos_emb", lambda table: table[0, -(SEGMENT + 1) :]),
        "lm_head.weight": ("criterion.project.weight", _same),
        "lm_head.bias": ("criterion.project.bias", _same),
    }
    for layer in range(LAYERS):
        ours, theirs = f"model.layers.{layer}", f"layers.{layer}"
        for part in ("weight", "bias"):
            names[f"{ours}.norm.{part}"] = (f"{theirs}.norm.{part}", _same)
            names[f"{ours}.attention.o_proj.{part}"] = (f"{theirs}.projection.linear.{part}", _same)
        for letter in "qkvr":
            names[f"{ours}.attention.{letter}_proj.weight"] = (f"{theirs}.attn.{letter}_proj.weight", _same)
        for bias, name in (("content_bias", "r_query_bias"), ("position_bias", "r_pos_bias")):
            names[f"{ours}.attention.{bias}"] = (f"{theirs}.attn.{name}", lambda flat: flat.view(HEADS, WIDTH))
        for letter in "kv":
            names[f"{ours}.attention.persistent_{letter}"] = (f"{theirs}.attn.mem_{letter}", lambda value: value[0])
    return names


NAMES = _names()


def _attach(model: AllAttentionForCausalLM, gate_params: Tensor) -> HeadGates:
    gates = attach(model, config=GATES)
    for (_, gate), log_alpha_H in zip(gates, gate_params, strict=True):
        gate.set_log_alpha(log_alpha_H)
    return gates


def _assert_gradients(model: AllAttentionForCausalLM, reference: Reference, case: str) -> None:
    compared = 0
    for ours, (theirs, convert) in NAMES.items():
        gradient = model.get_parameter(ours).grad
        assert gradient is not None, ours
        reproduces(gradient, convert(reference[f"{case}/grad/{theirs}.data"]), ours)
        compared += 1
    for layer in range(LAYERS):
        name = f"{case}/grad/layers.{layer}.attn.gate.gate.data"
        if name in reference:
            gate = model.model.layers[layer].attention.head_gate
            assert isinstance(gate, HeadGate) and gate.log_alpha_bias.grad is not None
            # The parameter is log_alpha / lr_scale, so its gradient is lr_scale times log_alpha's.
            reproduces(gate.log_alpha_bias.grad / GATES.lr_scale, reference[name], layer)
            compared += 1
    assert compared == sum(name.startswith(f"{case}/grad/") for name in reference), "a gradient was not compared"
    beyond = reference[f"{case}/grad/pos_emb.data"][0, : -(SEGMENT + 1)]
    assert not beyond.any(), "their code must not use more of the position table than ours has"


@pytest.mark.parametrize("case", ["off", "gateA", "gateB"])
def test_evaluation(model: AllAttentionForCausalLM, reference: Reference, case: str) -> None:
    ids = reference["input"]
    if case != "off":
        gates = _attach(model, reference[f"{case}/gate_params"])
        reproduces(gates.l0(), reference[f"{case}/l0"])
        assert round(gates.sparsity * len(gates)) == int(reference[f"{case}/closed_heads"])
        assert sum(len(gates.plan().cut(layer)) for layer in range(LAYERS)) == int(reference[f"{case}/closed_heads"])
    memory = None
    with torch.no_grad():
        for segment in range(2):
            start, stop = SEGMENT * segment, SEGMENT * (segment + 1)
            output = model(
                input_ids=ids[:, start:stop],
                shift_labels=ids[:, start + 1 : stop + 1],
                memory=memory,
                use_cache=False,
                output_hidden_states=True,
            )
            memory = output.memory
            reproduces(output.logits, reference[f"{case}/logits{segment}"])
            log_probability = output.logits.log_softmax(-1)
            reproduces(log_probability, reference[f"{case}/logprob{segment}"])
            reproduces(output.loss, reference[f"{case}/ce{segment}"])
            # Theirs holds the embeddings and every layer's output; ours leaves out the last, which nobody reads.
            memory_after = reference[f"{case}/mem_after{segment}"]
            assert len(memory) == LAYERS and len(output.hidden_states) == len(memory_after) == LAYERS + 1
            for ours, theirs in zip([*memory, output.hidden_states[-1]], memory_after, strict=True):
                reproduces(ours, theirs)
        both = torch.cat([reference[f"{case}/logits{segment}"] for segment in range(2)], dim=1)
        reproduces(model(input_ids=ids[:, :32], use_cache=False).logits, both)
        reproduces(cached_logits(model, ids[:, :32], [7, 1, 16, 8]), both)


@pytest.mark.parametrize("case", ["gateA", "gateB"])
def test_the_cut_model_is_still_theirs(model: AllAttentionForCausalLM, reference: Reference, case: str) -> None:
    plan = _attach(model, reference[f"{case}/gate_params"]).plan()
    assert (plan.heads[1] == 0) == (case == "gateB")
    cut(model, plan)
    both = torch.cat([reference[f"{case}/logits{segment}"] for segment in range(2)], dim=1)
    with torch.no_grad():
        reproduces(model(input_ids=reference["input"][:, :32]).logits, both)


def test_l0_with_gates_as_they_start(model: AllAttentionForCausalLM, reference: Reference) -> None:
    gates = attach(model, config=GATES)
    reproduces(gates.l0(), reference["off/l0"])
    assert gates.sparsity == 0 == int(reference["off/closed_heads"])


def test_training_without_gates(model: AllAttentionForCausalLM, reference: Reference) -> None:
    ids = reference["input"]
    output = model.train()(
        input_ids=ids[:, SEGMENT : 2 * SEGMENT],
        shift_labels=ids[:, SEGMENT + 1 :],
        memory=tuple(reference["off/mem_after0"][:-1]),
    )
    output.loss.backward()
    reproduces(output.loss, reference["train_off/ce1"])
    _assert_gradients(model, reference, "train_off")


@pytest.mark.parametrize("penalty", ["in the loss", "added to the gradient"])
def test_training_with_gates_and_given_noise(
    model: AllAttentionForCausalLM, reference: Reference, penalty: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = reference["input"]
    gates = _attach(model, reference["gateA/gate_params"])
    # The forward asks for a draw; here it gets theirs.
    monkeypatch.setattr(
        gates,
        "draw",
        lambda: [gate.noise.copy_(u) for (_, gate), u in zip(gates, reference["train_gateA/u"], strict=True)],
    )
    output = model.train()(
        input_ids=ids[:, SEGMENT : 2 * SEGMENT],
        shift_labels=ids[:, SEGMENT + 1 :],
        memory=tuple(reference["train_gateA/mem_in"][:-1]),
    )
    if penalty == "in the loss":
        (output.loss + 0.02 * gates.l0()).backward()
    else:
        output.loss.backward()
        for (_, gate), gradient in zip(gates, penalty_gradient(gates, 0.02), strict=True):
            assert gate.log_alpha_bias.grad is not None
            gate.log_alpha_bias.grad += gradient
    reproduces(output.loss, reference["train_gateA/ce1"])
    reproduces(gates.l0(), reference["train_gateA/l0"])
    assert sum(int((gate()[0] == 0).sum()) for _, gate in gates) == int(reference["train_gateA/closed_heads"])
    _assert_gradients(model, reference, "train_gateA")


def test_one_unit_of_gates(reference: Reference) -> None:
    log_alpha = reference["gateunit/params"].clone().requires_grad_()
    assert torch.equal(gate_values(log_alpha, GATES), reference["gateunit/eval_out"])
    values = gate_values(log_alpha, GATES, reference["gateunit/u"])
    assert torch.equal(values, reference["gateunit/train_out"])
    assert 0 < values.sum() < len(values), "the case must hold open and closed gates"
    values.sum().backward()
    assert log_alpha.grad is not None
    reproduces(log_alpha.grad, reference["gateunit/dout_dparam"])
    reproduces(l0_probability(log_alpha, GATES).sum(), reference["gateunit/l0"])
