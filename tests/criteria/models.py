"""Tiny models that criteria are tried on, a text, and plain runs that note what each sublayer does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from benchmarks._tiny_models import scramble
from deadhead.layouts import Site, find_layout, head_columns
from deadhead.plans.plan import Unit
from tests.random_models import tiny_model

IDS = torch.randint(29, (3, 9), generator=torch.Generator().manual_seed(0))


def gpt2() -> Any:
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=29, n_embd=32, n_layer=2, n_head=4, n_positions=32, bos_token_id=0, eos_token_id=0)
    )
    scramble(model, 0)
    return model.eval()


def llama() -> Any:
    config: Any = LlamaConfig
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(config(vocab_size=29, num_key_value_heads=2, **sizes, bos_token_id=0, eos_token_id=0))
    scramble(model, 0)
    return model.eval()


MODELS: dict[str, tuple[Callable[[], Any], Unit]] = {
    "all-attention": (tiny_model, "head"),
    "gpt2": (gpt2, "head"),
    "llama, groups": (llama, "kv_group"),
    "llama, heads": (llama, "head"),
}
# Those of transformers, in float64, with single hidden units.
STOCK = {name: MODELS[name] for name in ("gpt2", "llama, groups", "llama, heads")}


def batches(count: int = 1) -> list[dict[str, Tensor]]:
    return [
        {"input_ids": IDS[:, :-1], "labels": IDS[:, 1:], "is_first": torch.tensor([True, True, True])}
        for _ in range(count)
    ]


def scored_batches() -> list[dict[str, Tensor]]:
    """Two batches of different length, in which some tokens do not count."""
    counts = torch.rand(IDS.shape, generator=torch.Generator().manual_seed(1)) < 0.7
    return [
        {"input_ids": IDS, "scored": counts},
        {"input_ids": IDS[:2, :5], "scored": counts[:2, :5]},
    ]


def counted(batch: dict[str, Tensor]) -> Tensor:
    """The positions whose next token counts, one by one."""
    rows, length = batch["input_ids"].shape
    found = torch.zeros(rows, length, dtype=torch.bool)
    for row in range(rows):
        for place in range(length - 1):
            found[row, place] = bool(batch["scored"][row, place + 1])
    return found


def sites_of(model: Any, unit: Unit) -> list[Site]:
    return find_layout(model).all_sites(model, unit, hidden=True)


def seen(model: Any, site: Site, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What an output projection got, its output with a gradient to be had, and the loss and logits of a batch."""
    noted: list[Tensor] = []

    def note(module: Any, args: Any, output: Tensor) -> None:
        noted.extend((args[0].detach(), output.requires_grad_() if not output.requires_grad else output))

    with site.output.register_forward_hook(note):
        result = model(input_ids=batch["input_ids"], labels=labels(batch), use_cache=False)
    return noted[0], noted[1], result.loss, result.logits


def labels(batch: dict[str, Tensor]) -> Tensor:
    return batch["input_ids"].masked_fill(~batch["scored"], -100)


def streams(model: Any, batch: dict[str, Tensor]) -> list[Tensor]:
    """The residual stream, (B, T, D), before the first sublayer and behind each, attention and feed-forward in turn.

    By norms: each sublayer of these models begins with one, and so does what follows the last layer.
    """
    found: list[Tensor] = []
    if model.config.model_type == "gpt2":
        norms = [norm for layer in model.transformer.h for norm in (layer.ln_1, layer.ln_2)] + [model.transformer.ln_f]
    else:
        layers = model.model.layers
        norms = [norm for layer in layers for norm in (layer.input_layernorm, layer.post_attention_layernorm)]
        norms.append(model.model.norm)
    hooks = [norm.register_forward_pre_hook(lambda module, args: found.append(args[0].detach())) for norm in norms]
    model(input_ids=batch["input_ids"], use_cache=False)
    for hook in hooks:
        hook.remove()
    return found


def sublayer(site: Site) -> int:
    """The place of a site's sublayer among those of `streams`."""
    assert isinstance(site.layer, int)
    return 2 * site.layer + site.is_hidden


def columns(site: Site, unit: int) -> list[int]:
    return list(range(unit * site.unit_dim, (unit + 1) * site.unit_dim))


def weight_of(site: Site) -> Tensor:
    return head_columns(site.output).detach().double()
