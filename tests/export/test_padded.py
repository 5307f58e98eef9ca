"""Padded checkpoints: plain transformers, without deadhead, loads and computes what the cut model does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import deadhead
from deadhead.export.padded import pad_to_stock
from tests.export.small import cut_by, cut_model, dense_model
from tests.fresh_process import stock_logits
from tests.random_models import difference, tiny_model

_KINDS = ("llama", "mistral", "qwen2", "qwen3", "gpt2", "gpt_neox", "opt", "phi3", "falcon")


@torch.no_grad()
def _logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=torch.arange(20)[None] * 7 % 300).logits
    return found


@pytest.mark.parametrize(
    "seed",
    [
        1,
        pytest.param(2, marks=pytest.mark.slow),
        *(pytest.param(seed, marks=pytest.mark.full) for seed in range(3, 12)),
    ],
)
@pytest.mark.parametrize("unit", ["kv_group", "head"])
@pytest.mark.parametrize("kind", _KINDS)
def test_any_plan_computes_the_same(kind: str, unit: str, seed: int) -> None:
    """Uneven groups, empty layers and other numbers of hidden units included; zeros change nothing but the rounding."""
    if unit == "kv_group" and kind in ("gpt2", "gpt_neox", "opt", "falcon"):
        pytest.skip("these have a key/value head for each query head, or one for all")
    model = cut_model(kind, seed, unit=unit)
    stock = pad_to_stock(model)
    assert type(stock).__module__.startswith("transformers.models.")
    assert difference(_logits(stock), _logits(model)) <= 1e-5
    assert difference(_logits(stock), _logits(dense_model(kind, seed))) > 1e-2


@pytest.mark.slow
def test_they_load_where_deadhead_is_not(tmp_path: Path) -> None:
    """Bit for bit as they were padded, in a process that cannot import deadhead and trusts no code of theirs."""
    models = {
        "heads that divide the width": cut_by("llama", [2, 1, 0, 2], head_dim=32),
        "heads that do not": cut_by("llama", [3, 1, 0, 3]),
        "qwen2": cut_by("qwen2", [3, 1, 0, 2]),
        "gpt2": cut_model("gpt2", 3),
    }
    paths = {name: tmp_path / name for name in models}
    for name, model in models.items():
        found = deadhead.export_model(model, paths[name], to="padded")
        assert found.agreements[0].logit_difference <= 1e-5
        assert not list(paths[name].glob("*.py"))
    loaded = stock_logits(paths.values(), torch.arange(20)[None] * 7 % 300, tmp_path)
    for name, model in models.items():
        assert torch.equal(loaded[str(paths[name])], _logits(pad_to_stock(model))), name


def test_a_llama_whose_heads_do_not_divide_its_width_goes_out_as_a_mistral() -> None:
    config: Any = pad_to_stock(cut_by("llama", [3, 1, 0, 2])).config
    assert (config.model_type, config.sliding_window) == ("mistral", None)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (6, 3, 32)
    config = pad_to_stock(cut_by("llama", [2, 1, 0, 2])).config
    assert (config.model_type, config.num_attention_heads) == ("llama", 4)
    # With biases it is no Mistral; then it keeps more heads than the widest layer has.
    config = pad_to_stock(cut_by("llama", [3, 1, 0, 2], attention_bias=True)).config
    assert (config.model_type, config.num_attention_heads) == ("llama", 8)


def test_a_configuration_that_knows_no_fewer_heads_stays_dense() -> None:
    model = cut_model("gpt2", 3)
    assert deadhead.model_cost(model).heads[1] < 8
    assert pad_to_stock(model).config.n_head == 8


def test_weights_keep_their_precision() -> None:
    model = cut_by("llama", [3, 1, 0, 2]).to(torch.bfloat16)
    assert {parameter.dtype for parameter in pad_to_stock(model).parameters()} == {torch.bfloat16}


def test_what_has_no_stock_architecture_is_refused(tmp_path: Path) -> None:
    with pytest.raises(deadhead.UnsupportedModel, match="has no stock architecture"):
        deadhead.export_model(tiny_model(), tmp_path / "out", to="padded")
    with pytest.raises(deadhead.UnsupportedModel, match="its checkpoint loads in every server as it is"):
        deadhead.export_model(dense_model("llama"), tmp_path / "out", to="padded")
    assert not list(tmp_path.iterdir())
