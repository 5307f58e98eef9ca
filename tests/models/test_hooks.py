"""Models whose modules have accelerate's hooks, as device_map puts them on, with all weights in memory."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_submodules
from transformers import PreTrainedModel

from benchmarks._tiny_models import tiny_model
from deadhead.attaching import attach
from deadhead.checkpoints.checkpoint import load, save
from deadhead.compensation.compensating import compensate
from deadhead.criteria.scoring import score_heads
from deadhead.cutting import cut
from deadhead.modes import moved
from tests.random_models import difference, randomise


def spread(model: PreTrainedModel) -> PreTrainedModel:
    for module in model.modules():
        add_hook_to_module(module, AlignDevicesHook("cpu", io_same_device=True))
    return model


def pair(kind: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    plain = tiny_model(kind).eval()
    randomise(plain, seed=1)
    return plain, spread(copy.deepcopy(plain))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("criterion", ["magnitude", "wanda", "flap", "taylor", "second-order"])
def test_a_model_with_hooks_is_scored_and_cut_as_one_without(kind: str, criterion: Any) -> None:
    plain, hooked = pair(kind)
    ids = torch.randint(plain.config.vocab_size, (4, 12), generator=torch.Generator().manual_seed(0))
    scores = [score_heads(model, criterion, [{"input_ids": ids}], blocks=True) for model in (plain, hooked)]
    plans = [each.plan(0.5) for each in scores]
    assert plans[0] == plans[1]
    plain_cut, hooked_cut = cut(plain, plans[0]), cut(hooked, plans[1])
    expected = dict(plain_cut.named_parameters())
    for name, parameter in hooked_cut.named_parameters():
        assert torch.equal(parameter, expected.pop(name)), name
    assert not expected
    assert difference(hooked_cut(ids).logits, plain_cut(ids).logits) == 0


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_an_emptied_layer_keeps_its_hook_and_computes_the_same_without_it(kind: str) -> None:
    _, hooked = pair(kind)
    ids = torch.randint(hooked.config.vocab_size, (2, 12), generator=torch.Generator().manual_seed(0))
    gates = attach(hooked)
    _, first = next(iter(gates))
    first.set_log_alpha(torch.full((first.num_heads,), -5.0))
    expected = hooked(ids).logits
    model = cut(hooked, gates.plan())
    (empty,) = [module for module in model.modules() if getattr(module, "is_emptied", False)]
    assert isinstance(empty._hf_hook, AlignDevicesHook)
    assert difference(model(ids).logits, expected) <= 1e-5
    assert difference(copy.deepcopy(model)(ids).logits, expected) <= 1e-5
    remove_hook_from_submodules(model)
    assert difference(model(ids).logits, expected) <= 1e-5


def test_a_model_with_hooks_is_compensated_and_saved_as_one_without(tmp_path: Path) -> None:
    plain, hooked = pair("llama")
    rows = torch.randint(plain.config.vocab_size, (16, 12), generator=torch.Generator().manual_seed(0))
    plan = score_heads(plain, "magnitude", blocks=True).plan(0.5)
    dense = copy.deepcopy(plain), copy.deepcopy(hooked)
    models = cut(plain, plan), cut(hooked, plan)
    found = [compensate(model, whole, [{"input_ids": rows}]) for model, whole in zip(models, dense, strict=True)]
    assert any(layer.fitted for layer in found[0].layers)
    assert found[0] == found[1]
    save(models[1], tmp_path / "cut")
    assert difference(load(tmp_path / "cut")(rows).logits, models[0](rows).logits) <= 1e-6


def test_a_model_with_hooks_is_not_moved() -> None:
    plain, hooked = pair("llama")
    assert not any(parameter.is_meta for parameter in moved(hooked, torch.device("meta")).parameters())
    assert all(parameter.is_meta for parameter in moved(plain, torch.device("meta")).parameters())
