"""Compensation as a whole: it helps, never harms, is exact where it can be, and leaves alone what it cannot better."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import deadhead
from deadhead.attaching import attach
from deadhead.compensation import fitting, solving
from deadhead.compensation.calibration import divided, held_out_loss
from deadhead.compensation.compensating import compensate_from
from deadhead.errors import InputError, UnsupportedModel
from deadhead.layouts import find_layout
from tests.compensation.small_pairs import KINDS, cut_by_hand, dense_model, text_of
from tests.random_models import assert_unchanged, difference, snapshot


def losses(model: Any, batches: list[dict[str, Tensor]]) -> float:
    with torch.no_grad():
        return held_out_loss(model, divided(model, batches))


@pytest.mark.parametrize("kind", KINDS)
def test_a_cut_model_comes_nearer_to_the_dense_one(kind: str) -> None:
    dense = dense_model(kind)
    model = cut_by_hand(dense, emptied=kind != "all-attention")
    dense_before, flags = snapshot(dense), [p.requires_grad for p in model.parameters()]
    model.train()
    found = deadhead.compensate(model, dense, text_of(dense), text="its own")
    assert found.kept and found.after < found.before
    assert found.measure == ("distance" if kind == "bert" else "loss")
    assert any(layer.fitted for layer in found.layers)
    assert model.training and all(module.training for module in model.modules())
    assert [p.requires_grad for p in model.parameters()] == flags
    assert_unchanged(dense, dense_before)
    model.eval()
    if kind != "bert":
        assert losses(model, text_of(dense)) == pytest.approx(found.after, rel=1e-5)
        # On text that no one has seen.
        other, cut = text_of(dense, seed=1), cut_by_hand(dense, emptied=kind != "all-attention")
        assert losses(model, other) < losses(cut, other)
    assert model.config.compensation["text"] == "its own"
    assert model.config.compensation["fitted"] == sum(layer.fitted for layer in found.layers)


def test_what_is_a_sum_of_what_stays_comes_back_exactly() -> None:
    dense = dense_model("llama", torch.float64)
    with torch.no_grad():
        for layer in dense.model.layers:
            # Hidden units 0 and 1 are the same but for a factor, and so are both groups of heads.
            layer.mlp.gate_proj.weight[0] = layer.mlp.gate_proj.weight[1]
            layer.mlp.up_proj.weight[0] = 3 * layer.mlp.up_proj.weight[1]
            for part in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
                part.weight[: len(part.weight) // 2] = part.weight[len(part.weight) // 2 :]
    gates = attach(copy.deepcopy(dense), blocks=1)
    model = copy.deepcopy(dense)
    plan = gates.plan()
    with torch.no_grad():
        for _, gate in gates:
            gate.log_alpha_bias[0] = -1e4
    plan = gates.plan()
    deadhead.cut(model, plan)
    batches = text_of(dense)
    ids = batches[0]["input_ids"]
    with torch.no_grad():
        wanted = dense(ids).logits
        assert difference(model(ids).logits, wanted) > 1e-2
        found = deadhead.compensate(model, dense, batches)
        assert found.kept
        assert difference(model(ids).logits, wanted) < 1e-3


def test_layers_that_gain_nothing_are_left_alone_to_the_bit(monkeypatch: Any) -> None:
    dense = dense_model("llama")
    model = cut_by_hand(dense)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    choose = fitting.best_fit
    calls = iter(range(100))
    monkeypatch.setattr(fitting, "best_fit", lambda *args: choose(*args) if next(calls) % 2 else None)
    found = deadhead.compensate(model, dense, text_of(dense))
    assert found.kept
    fitted = {f"{layer.path}.weight" for layer in found.layers if layer.fitted}
    assert 0 < len(fitted) < len(found.layers)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) == (name not in fitted), name
    assert all(layer.reason for layer in found.layers if not layer.fitted)


def test_a_model_that_would_be_worse_is_left_alone_to_the_bit(monkeypatch: Any) -> None:
    dense = dense_model("gpt2")
    model = cut_by_hand(dense)
    before, config = snapshot(model), model.config.to_dict()
    parameters = dict(model.named_parameters())
    install = fitting.install
    monkeypatch.setattr(fitting, "install", lambda output, weight: install(output, -3 * weight))
    found = deadhead.compensate(model, dense, text_of(dense))
    assert not found.kept and found.after > found.before
    assert not any(layer.fitted for layer in found.layers) and all(layer.reason for layer in found.layers)
    assert_unchanged(model, before)
    assert model.config.to_dict() == config
    # The parameters themselves, which an optimizer may know.
    assert all(value is parameters[name] for name, value in model.named_parameters())


def test_an_uncut_model_has_nothing_to_gain() -> None:
    dense = dense_model("llama")
    model = copy.deepcopy(dense)
    before = snapshot(model)
    found = deadhead.compensate(model, dense, text_of(dense, rows=16))
    assert not found.kept and found.after == found.before
    assert_unchanged(model, before)


def massive() -> tuple[Any, list[dict[str, Tensor]]]:
    """Return a model in whose first tokens a hidden unit is massive, as in pretrained models, and text for it."""
    dense = dense_model("llama")
    with torch.no_grad():
        # Token 0 alone has anything in the last number, which one unit of the first layer reads.
        dense.model.embed_tokens.weight[:, -1] = 0
        dense.model.embed_tokens.weight[0, -1] = 8
        first = dense.model.layers[0]
        first.self_attn.o_proj.weight[-1] = 0
        for projection in (first.mlp.gate_proj, first.mlp.up_proj):
            projection.weight[0] = 0
            projection.weight[0, -1] = 12
        first.mlp.down_proj.weight[:, 0] *= 20
    batches = text_of(dense, rows=64)
    for batch in batches:
        batch["input_ids"][batch["input_ids"] == 0] = 1
        batch["input_ids"][:, 0] = 0
    return dense, batches


def test_massive_activations_do_not_ruin_a_model(monkeypatch: Any) -> None:
    dense, batches = massive()
    model = cut_by_hand(dense)
    cut_loss = losses(model, batches)
    naive = copy.deepcopy(model)
    found = deadhead.compensate(model, dense, batches)
    assert found.kept and found.after < cut_loss

    # The trap: in plain least squares, every token alike and hardly a ridge, a few of them outweigh all others.
    def plain_fit(fitted: solving.Moments, held: solving.Moments, weight: Tensor) -> solving.Fit:
        fits = solving.ridge_fits(fitted, weight, 1e-5)
        assert fits is not None
        return solving.Fit(weight_DN=fits[0], ridge=1e-5, share=0.0, before=1.0, after=0.0)

    add = solving.Moments.add
    monkeypatch.setattr(fitting, "best_fit", plain_fit)
    monkeypatch.setattr(
        solving.Moments, "add", lambda self, x, targets, weight: add(self, x, targets, torch.ones_like(weight))
    )
    plain = deadhead.compensate(naive, dense, batches)
    assert plain.after > 1.05 * cut_loss and not plain.kept
    assert losses(naive, batches) == cut_loss


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_a_failure_leaves_the_model_as_it_was(kind: str, monkeypatch: Any) -> None:
    dense = dense_model(kind)
    model = cut_by_hand(dense)
    states, before = (snapshot(model), snapshot(dense)), model.config.to_dict()
    calls = iter(range(100))

    def fail(*args: Any) -> Any:
        if next(calls) == 3:
            raise KeyboardInterrupt
        return solving.best_fit(*args)

    monkeypatch.setattr(fitting, "best_fit", fail)
    with pytest.raises(KeyboardInterrupt):
        deadhead.compensate(model, dense, text_of(dense))
    assert_unchanged(model, states[0])
    assert_unchanged(dense, states[1])
    assert model.config.to_dict() == before


def test_layers_of_the_dense_model_can_be_freed_on_the_way() -> None:
    dense = dense_model("llama")
    model, batches = cut_by_hand(dense), text_of(dense)
    other = copy.deepcopy(model)
    deadhead.compensate(model, dense, batches)
    seen: list[int] = []
    compensate_from(
        other,
        dense,
        batches,
        progress=lambda done, total: seen.append(sum(p.numel() for p in dense.model.layers.parameters())),
        consume=True,
    )
    assert seen[-1] < seen[0] / 2
    assert sum(p.numel() for p in dense.model.layers.parameters()) == 0
    for name, value in other.state_dict().items():
        assert torch.equal(value, model.state_dict()[name])


def test_half_precision_stays_half() -> None:
    dense = dense_model("llama", torch.bfloat16)
    model = cut_by_hand(dense_model("llama")).to(torch.bfloat16)
    found = deadhead.compensate(model, dense, text_of(dense_model("llama")))
    assert found.kept
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_what_was_done_is_known_after_a_reload(tmp_path: Any) -> None:
    dense = dense_model("llama")
    model = cut_by_hand(dense)
    found = deadhead.compensate(model, dense, text_of(dense), text="wiki")
    deadhead.save(model, tmp_path / "cut")
    loaded = deadhead.load(tmp_path / "cut")
    assert loaded.config.compensation == {**found.to_dict(), "text": "wiki"}
    card = (tmp_path / "cut" / "README.md").read_text()
    assert f"{found.before:.4g} → {found.after:.4g}" in card and "wiki" in card
    assert dense.config.to_dict().get("compensation") is None


def test_what_cannot_be_compensated_is_refused_in_a_sentence() -> None:
    dense = dense_model("llama")
    model = cut_by_hand(dense)
    batches = text_of(dense, rows=4)

    def refused(kind: type[Exception], words: str, *args: Any) -> None:
        states = [snapshot(each) for each in args[:2] if isinstance(each, torch.nn.Module)]
        with pytest.raises(kind, match=words):
            deadhead.compensate(*args)
        for each, state in zip(args[:2], states, strict=False):
            assert_unchanged(each, state)

    refused(InputError, "got one model for both", model, model, batches)
    refused(InputError, "at least 2", model, dense, [])
    refused(InputError, "at least 2", model, dense, [{"input_ids": batches[0]["input_ids"][:1]}])
    refused(InputError, "dtype", model, copy.deepcopy(dense).double(), batches)
    with pytest.raises(UnsupportedModel, match="load it first"):
        deadhead.compensate("folder", dense, batches)  # type: ignore[arg-type]
    refused(InputError, "as it was before the cut", model, dense_model("gpt2"), batches)
    gated = copy.deepcopy(model)
    attach(gated)
    refused(InputError, "without gates", gated, dense, batches)
    gated = copy.deepcopy(dense)
    attach(gated)
    refused(InputError, "without gates", model, gated, batches)
    assert find_layout(model).recorded_plan(model) is not None
