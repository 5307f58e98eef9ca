"""What attach and cut refuse, each for its own reason, in one sentence, and with nothing changed."""

from __future__ import annotations

import copy
import operator
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from transformers import (
    AlbertConfig,
    AlbertForMaskedLM,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
    WhisperConfig,
    WhisperModel,
    Zamba2Config,
    Zamba2ForCausalLM,
)

from benchmarks._tiny_models import tiny_model
from deadhead.attaching import attach, detach, gates_of
from deadhead.checkpoints.checkpoint import save
from deadhead.cutting import cut
from deadhead.errors import InputError, UnsupportedModel
from deadhead.measure.cost import model_cost
from deadhead.plans.plan import HeadPlan
from tests.random_models import assert_unchanged, snapshot
from tests.random_models import tiny_model as own_model


class Around(nn.Module):
    """What other libraries put around a model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.auto_model = model


class Mine(GPT2LMHeadModel):
    """A user's own."""


class Packed(nn.Linear):
    """A layer whose weight lies in another tensor, as GPTQ's and AWQ's do."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=False)
        self.register_buffer("qweight", torch.zeros(4, dtype=torch.int32))


class Wrapped(torch.Tensor):
    """A tensor that is not what it seems, as torchao's and bitsandbytes' are."""


def llama() -> Any:
    return tiny_model("llama")


def with_projection(make: Callable[[nn.Linear], nn.Module]) -> Any:
    model = llama()
    for layer in model.model.layers:
        layer.self_attn.o_proj = make(layer.self_attn.o_proj)
    return model


def with_weight(make: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    def put(layer: nn.Linear) -> nn.Linear:
        layer.weight = nn.Parameter(make(layer.weight.detach()), requires_grad=False)
        return layer

    return with_projection(put)


def with_attribute(owner: str, name: str, value: Any) -> Any:
    model = llama()
    setattr(model.get_submodule("") if not owner else model.config, name, value)
    return model


def offloaded(path: str) -> Any:
    from accelerate import cpu_offload

    model = llama()
    cpu_offload(model.get_submodule(path))
    return model


def prompt_tuned(kind: str = "PromptTuning") -> Any:
    import peft

    config = getattr(peft, f"{kind}Config")(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with warnings.catch_warnings():
        # PEFT asks transformers for activation checkpointing by its old name.
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        return peft.get_peft_model(llama(), config)


def compiled(module: nn.Module) -> Any:
    return torch.compile(module, backend="eager")


def with_a_compiled_layer() -> Any:
    model = llama()
    model.model.layers[0] = compiled(model.model.layers[0])
    return model


def shared(path: str) -> Any:
    """Return a model whose second layer has at `path` what the first one has there."""
    model = llama()
    owner, _, name = f"model.layers.1{path}".rpartition(".")
    setattr(model.get_submodule(owner), name, operator.attrgetter(f"model.layers.0{path}")(model))
    return model


def with_its_ends_shared() -> Any:
    model = llama()
    model.lm_head.weight = model.model.embed_tokens.weight
    return model


_SHARED_WEIGHTS = (".self_attn.o_proj.weight", ".self_attn.k_proj.weight", ".mlp.up_proj.weight")
_NARROW = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4, "vocab_size": 32}
# Its class declares that two layers share their weights.
_ZAMBA2: dict[str, Any] = {
    **_NARROW,
    "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
    **dict.fromkeys(("num_hidden_layers", "n_mamba_heads"), 4),
    **dict.fromkeys(("mamba_headdim", "mamba_d_state"), 16),
    "num_mem_blocks": 1,
}


class Dynamic(nn.Module):
    """A layer that torch has quantised, whose weight is a method."""

    __module__ = "torch.ao.nn.quantized.dynamic"

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()

    def weight(self) -> None:
        """Return the packed weight."""


_SIZES = {"d_model": 16, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 32}
_SPEECH: dict[str, Any] = {
    "vocab_size": 32,
    "d_model": 16,
    **dict.fromkeys(("encoder_layers", "decoder_layers"), 1),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 2),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 16),
    **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"), 0),
    "begin_suppress_tokens": None,
}

# What is given, and what is said of it. `cut` says the same as `attach` but for PEFT's wrapper, which `attach` takes.
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "a path": (lambda: "some/folder", r"got a path or name \('some/folder'\); load it first"),
    "a Path": (lambda: Path("folder"), "got a path or name .* load it first"),
    "nothing": (lambda: None, "got a NoneType that contains none"),
    "a class": (lambda: GPT2LMHeadModel, "got a type"),
    "a model of torch": (lambda: nn.Linear(2, 2), "got a Linear that contains none"),
    "torch.compile": (
        lambda: compiled(llama()),
        r"wrapped by torch.compile.*'_orig_mod'\), and compile",
    ),
    "DataParallel": (lambda: nn.DataParallel(llama()), r"got a DataParallel.* its get_submodule\('module'\)"),
    "prefix tuning": (lambda: prompt_tuned("PrefixTuning"), r"\(PREFIX_TUNING\) has keys and values for every head"),
    "a cartridge": (lambda: prompt_tuned("Cartridge"), r"\(CARTRIDGE\) has keys and values for every head"),
    "two wrappers": (lambda: Around(Around(llama())), r"get_submodule\('auto_model.auto_model'\)"),
    "a compiled wrapper": (
        lambda: compiled(nn.DataParallel(llama())),
        r"'_orig_mod.module'\), and compile",
    ),
    "a compiled layer": (with_a_compiled_layer, "model.layers.0 is wrapped by torch.compile.*put its _orig_mod back"),
    "integers": (lambda: with_weight(lambda weight: weight.to(torch.int8)), "o_proj.weight is torch.int8.*quantise it"),
    "bytes": (lambda: with_weight(lambda weight: weight.to(torch.uint8)), "is quantised .*torch.uint8"),
    "float8": (lambda: with_weight(lambda weight: weight.to(torch.float8_e4m3fn)), "is quantised .*float8_e4m3fn"),
    "a tensor's subclass": (
        lambda: with_weight(lambda weight: weight.as_subclass(Wrapped)),
        "is quantised .*o_proj.weight is a Wrapped",
    ),
    "packed layers": (lambda: with_projection(Packed), "is quantised .*o_proj is a Packed"),  # type: ignore[arg-type]
    "dynamic quantisation": (lambda: with_projection(Dynamic), "is quantised .*o_proj is a Dynamic"),
    "a quantiser": (lambda: with_attribute("", "hf_quantizer", object()), r"is quantised \(by transformers\)"),
    "a declared quantisation": (
        lambda: with_attribute("config", "quantization_config", {"quant_method": "gptq"}),
        r"is quantised \(gptq\)",
    ),
    "offloaded layers": (lambda: offloaded("model.layers.1"), r"not all in memory \(model.layers.1.*is offloaded"),
    "all of it offloaded": (lambda: offloaded(""), r"not all in memory \(model.embed_tokens.weight"),
    "a weight norm": (
        lambda: with_projection(nn.utils.parametrizations.weight_norm),
        "o_proj.weight is no parameter, but computed from others",
    ),
    "a user's class": (lambda: Mine(tiny_model("gpt2").config), "The class Mine is not one .* offers by name"),
    "an encoder and a decoder": (lambda: T5ForConditionalGeneration(T5Config(**_SIZES)), "'t5' has an encoder and a"),
    "a speech encoder and a decoder": (lambda: WhisperModel(WhisperConfig(**_SPEECH)), "'whisper' has an encoder and"),
    "an encoder taken out": (
        lambda: WhisperModel(WhisperConfig(**_SPEECH)).get_encoder(),
        "The class WhisperEncoder is not one of those that transformers offers by name",
    ),
    **{
        f"{path or 'layer'} twice": (
            partial(shared, path),
            r"layers.0\S* and model.layers.1\S* are one tensor.*deepcopy",
        )
        for path in ("", ".self_attn", ".mlp", ".input_layernorm", ".self_attn.o_proj", *_SHARED_WEIGHTS)
    },
    "layers that a class ties": (lambda: Zamba2ForCausalLM(Zamba2Config(**_ZAMBA2)), "are one tensor, but a cut"),
    "layers that run often": (lambda: AlbertForMaskedLM(AlbertConfig(**_NARROW)), "'albert' has 1 for all its 12"),
    "ends that share unsaid": (with_its_ends_shared, "lm_head.weight are one .*set its tie_word_embeddings"),
    "no attention": (lambda: tiny_model("mamba"), "no attention with query, key, value and output projections"),
}


def sentence(caught: pytest.ExceptionInfo[InputError]) -> str:
    text = str(caught.value)
    assert len(text) <= 300 and "\n" not in text and text.endswith("."), text
    return text


@pytest.mark.parametrize(("make", "reason"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_cut_is_refused_at_the_door(make: Callable[[], Any], reason: str) -> None:
    model = make()
    names = [(name, type(module)) for name, module in model.named_modules()] if isinstance(model, nn.Module) else []
    for change in (attach, lambda given: cut(given, HeadPlan.keep_all({0: 2}))):
        with pytest.raises(UnsupportedModel, match=reason) as caught:
            change(model)
        sentence(caught)
    if isinstance(model, nn.Module):
        assert [(name, type(module)) for name, module in model.named_modules()] == names
        assert not any(module._forward_pre_hooks for module in model.modules() if not hasattr(module, "_hf_hook"))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["PromptTuning", "PromptEncoder"])
def test_a_prompt_tuned_model_has_gates_and_is_cut_as_the_refusal_of_its_wrapper_says(kind: str) -> None:
    model, ids = prompt_tuned(kind).eval(), torch.arange(8)[None]
    gates = attach(model)
    gates.set_plan(gates.plan(sparsity=0.5))
    expected = model(input_ids=ids).logits
    with pytest.raises(UnsupportedModel, match=r"but got a .*, which holds one.*its get_submodule\('base_model'\)"):
        cut(model, gates.plan())
    cut(model.get_submodule("base_model"), gates.plan())
    torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-5)
    assert gates_of(model) is None


@pytest.mark.parametrize("make", [lambda: shared(".mlp"), with_its_ends_shared])
def test_what_a_checkpoint_would_lose_is_refused_before_one_is_written(make: Callable[[], Any], tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match="are one tensor, but") as caught:
        save(make(), tmp_path / "model")
    sentence(caught)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "wrapped",
    [
        {"target_modules": ["lm_head"]},
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        {"trainable_token_indices": [1, 2]},
        None,
    ],
)
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated", "ignore:Model has `tie_word_embeddings")
def test_ends_that_share_by_the_configuration_are_no_reason(wrapped: dict[str, Any] | None) -> None:
    import peft

    model = with_its_ends_shared()
    model.config.tie_word_embeddings = True
    if wrapped is not None:
        peft.get_peft_model(model, peft.LoraConfig(**{"target_modules": ["q_proj"], **wrapped}))
    assert len(dict(model.named_parameters(remove_duplicate=False))) > len(list(model.parameters()))
    attach(model)


def test_a_prompt_tuned_model_has_gates_but_is_not_cut_in_its_wrapper() -> None:
    model = prompt_tuned()
    plan = attach(model).plan()
    with pytest.raises(UnsupportedModel, match=r"got a PeftModelForCausalLM, which holds one.*base_model"):
        cut(model, plan)
    assert gates_of(model.get_base_model()) is not None


@pytest.mark.parametrize("plan", [{0: [1]}, None, "plan.json"])
def test_what_is_no_plan_is_refused(plan: Any) -> None:
    with pytest.raises(InputError, match=r"A deadhead.HeadPlan was expected, but got a \w+") as caught:
        cut(own_model(), plan)
    sentence(caught)


def _spoiled(value: float, dtype: torch.dtype = torch.float32) -> Any:
    model = tiny_model("llama", dtype=dtype)
    with torch.no_grad():
        model.get_parameter("model.layers.1.mlp.up_proj.weight")[0, 0] = value
    return model


def _overflowing(dtype: torch.dtype, factor: float) -> Any:
    model: Any = tiny_model("gpt2", dtype=dtype)
    with torch.no_grad():
        for layer in model.transformer.h:
            layer.mlp.c_proj.weight.mul_(factor)
    return model


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: _spoiled(float("nan")), "not finite, before anything is cut: model.layers.1.mlp.up_proj.weight holds"),
        (
            lambda: _spoiled(float("inf"), torch.bfloat16),
            "model.layers.1.mlp.up_proj.weight holds values that are not finite",
        ),
        (lambda: _overflowing(torch.float16, 6e4), "too large for float16; load the model in bfloat16 or float32"),
        (lambda: _overflowing(torch.float32, 1e38), "its weights are finite, but so large"),
    ],
)
def test_a_model_whose_own_outputs_are_not_finite_is_told_as_that(make: Callable[[], Any], reason: str) -> None:
    model = make()
    gates = attach(model)
    detach(model)
    before = snapshot(model)
    with pytest.raises(InputError, match=reason) as caught:
        cut(model, gates.choices.plan_of({**gates.choices.units, next(iter(gates.choices.units)): ()}))
    sentence(caught)
    torch.testing.assert_close(model.state_dict(), before["tensors"], equal_nan=True, rtol=0, atol=0)


def test_a_model_without_weights_has_gates_but_is_not_cut() -> None:
    model = llama().to("meta")
    with pytest.raises(UnsupportedModel, match="not all in memory"):
        cut(model, attach(llama()).plan())
    assert len(attach(model)) == 12


def test_gates_that_are_on_do_not_hide_that_the_model_was_quantised_since() -> None:
    model = llama()
    plan = attach(model).plan()
    other = copy.deepcopy(model)
    other.model.layers[0].self_attn.q_proj.weight = nn.Parameter(
        torch.zeros(64, 64, dtype=torch.int8), requires_grad=False
    )
    with pytest.raises(UnsupportedModel, match="q_proj.weight is torch.int8"):
        cut(other, plan)
    before = snapshot(model)
    assert_unchanged(model, before)


@pytest.mark.parametrize(("kind", "inner"), [("llama", "model"), ("gpt2", "transformer"), ("bert", "bert")])
def test_a_cut_of_the_inner_model_alone_is_told_wherever_the_outer_one_is_used(
    kind: str, inner: str, tmp_path: Path
) -> None:
    model = tiny_model(kind)
    gates = attach(model.get_submodule(inner))
    plan = gates.choices.plan_of({**gates.choices.units, next(iter(gates.choices.units)): ()})
    cut(model.get_submodule(inner), plan)  # type: ignore[arg-type]
    for use in (lambda: save(model, tmp_path / "outer"), lambda: attach(model), lambda: model_cost(model)):
        with pytest.raises(InputError, match=rf"A part of the model \({inner}\) was cut by itself") as caught:
            use()
        sentence(caught)
    assert not list(tmp_path.iterdir())
    save(model.get_submodule(inner), tmp_path / "inner")  # type: ignore[arg-type]
    cut(whole := tiny_model(kind), plan)
    save(whole, tmp_path / "whole")


@pytest.fixture
def world() -> Iterator[None]:
    """A world of one process."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def _flattened(module: nn.Module, *, names: bool) -> nn.Module:
    return FullyShardedDataParallel(module, device_id=torch.device("cpu"), use_orig_params=names)


@pytest.mark.usefixtures("world")
@pytest.mark.parametrize("how", ["FSDP2", "FSDP1", "FSDP1 under names", "a layer by FSDP1"])
@pytest.mark.filterwarnings("ignore:FSDP")
def test_weights_that_are_shared_out_are_told_before_anything_is_written(how: str, tmp_path: Path) -> None:
    model = llama()
    if how == "FSDP2":
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    elif how == "a layer by FSDP1":
        model.model.layers[0] = _flattened(model.model.layers[0], names=True)
    else:
        wrapper = _flattened(model, names="names" in how)
        with pytest.raises(UnsupportedModel, match="FullyShardedDataParallel, which shares") as refused:
            attach(wrapper)
        sentence(refused)
    for use, remedy in (
        (lambda: attach(model), "attach gates before"),
        (lambda: save(model, tmp_path / "a"), "gather"),
    ):
        with pytest.raises(InputError, match=f"needs whole tensors, but .*by FSDP .*: {remedy}") as caught:
            use()
        sentence(caught)
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("world")
@pytest.mark.filterwarnings("ignore:FSDP")
@pytest.mark.parametrize("names", [False, True])
def test_gates_in_flat_parameters_are_not_read_but_when_they_are_whole(names: bool) -> None:
    model = llama()
    gates = attach(model)
    expected = gates.plan(sparsity=0.5)
    wrapper = _flattened(model, names=names)
    if names:
        # As where there are several processes.
        next(iter(gates))[1].log_alpha_bias.data = torch.empty(0)
    for read in (gates.plan, gates.l0, gates.state_dict, lambda: gates.sparsity, gates.scores):
        with pytest.raises(InputError, match="FSDP1 has flattened the gates") as caught:
            read()
        sentence(caught)
    if not names:
        with FullyShardedDataParallel.summon_full_params(wrapper):
            assert gates.plan(sparsity=0.5) == expected
