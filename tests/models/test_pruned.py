"""Transformers' models with heads cut off, saved: they reload bit for bit, anywhere, however transformers loads."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM

from benchmarks._tiny_models import VOCABULARY, scramble, tiny_config, tiny_model
from deadhead.attaching import attach, detach
from deadhead.cutting import cut
from deadhead.models.pruned.modeling_pruned import PrunedModel, auto_map, pruned_class, pruned_config_class, stock_class
from deadhead.models.pruned.shrinking import Heads, LayerConfig, heads_of
from deadhead.models.pruned.structure import find_attentions, head_order, layer_keys
from deadhead.plans.plan import HeadPlan, Unit
from tests.fresh_process import WAYS, in_a_fresh_process
from tests.random_models import difference
from tests.small_runs import assert_same_tensors

IDS = torch.randint(3, VOCABULARY, (2, 13), generator=torch.Generator().manual_seed(1))
_UNITS: dict[str, Unit] = {"qwen3": "head"}
TYPES = (
    *("llama", "qwen2", "qwen3", "gemma2", "gpt_oss", "opt", "gpt2", "gpt_neox", "phi3", "falcon", "gpt_bigcode"),
    *("bert", "deepseek_v3", "internlm3", "mllama"),
)


def small_plan(model: Any, unit: Unit | None = None, *, first_empty: bool = True) -> HeadPlan:
    """Return a plan that keeps about half of the heads, whole groups where they are cut as groups."""
    gates = attach(model, unit=unit)
    detach(model)
    draw = random.Random(0)
    # An odd number, so that single query heads leave groups of different sizes.
    kept = {key: tuple(draw.sample(heads, max(1, len(heads) // 2 + 1))) for key, heads in gates.choices.units.items()}
    if first_empty:
        kept[next(iter(kept))] = ()
    return gates.choices.plan_of(kept)


def small_model(model_type: str, *, first_empty: bool = True, **options: Any) -> Any:
    """Return a cut model."""
    model: Any = tiny_model(model_type, seed=7, **options)
    return cut(model, small_plan(model, _UNITS.get(model_type), first_empty=first_empty))


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    folder = tmp_path_factory.mktemp("checkpoints")
    expected = {}
    for model_type in TYPES:
        model = small_model(model_type)
        model.save_pretrained(folder / model_type)
        expected[f"{model_type}.logits"] = logits(model).contiguous()
        expected[f"{model_type}.tokens"] = model.generate(input_ids=IDS, max_new_tokens=12, do_sample=False)
    torch.save(IDS, folder / "ids.pt")
    return folder, expected


@pytest.mark.slow
@pytest.mark.parametrize("how", WAYS)
def test_checkpoints_reload_in_a_fresh_process_bit_for_bit(how: str, checkpoints: Any, tmp_path: Path) -> None:
    folder, expected = checkpoints
    assert_same_tensors(in_a_fresh_process(folder, how, tmp_path), expected)


def test_a_checkpoint_holds_safetensors_a_plan_and_its_code(checkpoints: Any) -> None:
    folder, _ = checkpoints
    for model_type in TYPES:
        files = {path.name for path in (folder / model_type).iterdir()}
        assert files >= {"config.json", "model.safetensors", "modeling_pruned.py", "shrinking.py", "structure.py"}
        assert not [file for file in files if file.endswith((".bin", ".pt", ".pkl"))]
        config = json.loads((folder / model_type / "config.json").read_text())
        assert config["model_type"].startswith("deadhead_")
        assert config["head_plan"]["version"] == 1 and "AutoConfig" in config["auto_map"]
        for file in (folder / model_type).glob("*.py"):
            assert "import deadhead" not in file.read_text() and "from deadhead" not in file.read_text()


def test_a_sharded_checkpoint_reloads(tmp_path: Path) -> None:
    model = small_model("llama")
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))


def test_device_map_dtype_and_meta_loading(checkpoints: Any) -> None:
    folder, expected = checkpoints
    load: Any = AutoModelForCausalLM.from_pretrained
    for options in ({"device_map": "cpu"}, {"device_map": {"": "cpu"}}, {"attn_implementation": "eager"}):
        model = load(folder / "llama", **options)
        assert difference(logits(model), expected["llama.logits"]) <= 1e-6
    half = load(folder / "llama", dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    assert difference(logits(half).float(), expected["llama.logits"]) < 0.1
    with torch.device("meta"):
        empty: Any = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder / "llama"))
    shapes = {name: value.shape for name, value in load(folder / "llama").state_dict().items()}
    assert {name: value.shape for name, value in empty.state_dict().items()} == shapes
    assert all(value.is_meta for value in empty.parameters())


def test_switching_the_attention_implementation_reaches_cut_layers(checkpoints: Any) -> None:
    """A cut layer has a view of the configuration of its own; it must read through to the shared one."""
    folder, expected = checkpoints
    model: Any = AutoModelForCausalLM.from_pretrained(folder / "llama")
    model.set_attn_implementation("eager")
    layer = model.model.layers[1].self_attn
    assert isinstance(layer.config, LayerConfig) and layer.config._attn_implementation == "eager"
    assert layer.config.num_attention_heads != model.config.num_attention_heads
    assert difference(logits(model), expected["llama.logits"]) <= 1e-5


@pytest.mark.parametrize(
    ("auto", "name"),
    [
        ("AutoModel", "BertModel"),
        ("AutoModelForMaskedLM", "BertForMaskedLM"),
        ("AutoModelForSequenceClassification", "BertForSequenceClassification"),
        ("AutoModelForTokenClassification", "BertForTokenClassification"),
        ("AutoModelForQuestionAnswering", "BertForQuestionAnswering"),
        ("AutoModel", "LlamaModel"),
        ("AutoModelForSequenceClassification", "LlamaForSequenceClassification"),
        ("AutoModelForSequenceClassification", "GPT2ForSequenceClassification"),
    ],
)
def test_every_class_a_user_may_hold(auto: str, name: str, tmp_path: Path) -> None:
    config: Any = tiny_config({"B": "bert", "L": "llama", "G": "gpt2"}[name[0]])
    config.is_decoder = config.model_type != "bert"
    config.num_labels = 2 if "Question" in name else 3
    model = getattr(transformers, name)(config).eval()
    scramble(model, 0)
    plan = small_plan(model)
    gated = copy.deepcopy(model)
    attach(gated).set_plan(plan)
    cut(model, plan)
    model.save_pretrained(tmp_path)
    again = getattr(transformers, auto).from_pretrained(tmp_path)
    assert isinstance(again, PrunedModel) and type(again).__name__ == f"Deadhead{name}"
    with torch.no_grad():
        outputs = [m(input_ids=IDS)[0] for m in (model, again, gated)]
    assert torch.equal(outputs[0], outputs[1])
    assert difference(outputs[0], outputs[2]) <= 1e-5


def test_a_base_model_s_checkpoint_gets_a_head_and_the_other_way_round(tmp_path: Path) -> None:
    model = small_model("llama")
    model.save_pretrained(tmp_path / "whole")
    base: Any = AutoModel.from_pretrained(tmp_path / "whole")
    with torch.no_grad():
        assert torch.equal(base(input_ids=IDS)[0], model.model(input_ids=IDS)[0])
    encoder = small_model("bert")
    encoder.save_pretrained(tmp_path / "encoder")
    masked: Any = AutoModelForMaskedLM.from_pretrained(tmp_path / "encoder")
    assert type(masked).__name__ == "DeadheadBertForMaskedLM"


def test_a_reloaded_model_is_cut_further_and_saved_again(checkpoints: Any, tmp_path: Path) -> None:
    folder, _ = checkpoints
    model: Any = AutoModelForCausalLM.from_pretrained(folder / "llama")
    gates = attach(model)
    plan = gates.plan()
    layer = max(plan.kept)
    further = HeadPlan(kept={**plan.kept, layer: plan.kept[layer][:1]}, total=plan.total, unit=plan.unit)
    cut(model, further)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config.head_plan == further.to_dict()
    assert torch.equal(logits(again), logits(model))


def test_the_file_holds_only_what_is_left(checkpoints: Any) -> None:
    folder, _ = checkpoints
    dense, small = tiny_model("llama"), load_file(folder / "llama" / "model.safetensors")
    assert not [name for name in small if ".layers.0.self_attn." in name]
    whole = dense.state_dict()["model.layers.1.self_attn.k_proj.weight"]
    assert small["model.layers.1.self_attn.k_proj.weight"].shape == (whole.shape[0] * 3 // 4, whole.shape[1])


def test_a_plan_in_the_configuration_that_does_not_fit_is_named(checkpoints: Any) -> None:
    folder, _ = checkpoints
    config: Any = AutoConfig.from_pretrained(folder / "llama")
    config.head_plan = {**config.head_plan, "total": {**config.head_plan["total"], "9": 4}}
    with pytest.raises(ValueError, match="names layer 9, which the model does not have"):
        AutoModelForCausalLM.from_config(config)
    config.head_plan["total"] = {"0": 4, "1": 5, "2": 4}
    with pytest.raises(ValueError, match="gives layer 1 5 heads, not its 4"):
        AutoModelForCausalLM.from_config(config)


def test_classes_of_ours_and_theirs() -> None:
    config = pruned_config_class(transformers.LlamaConfig)
    assert pruned_config_class(config) is config and stock_class(config) is transformers.LlamaConfig
    model = pruned_class(transformers.LlamaForCausalLM)
    assert pruned_class(model) is model and stock_class(model) is transformers.LlamaForCausalLM
    assert issubclass(model, transformers.LlamaForCausalLM) and model.config_class is config
    assert stock_class(nn.Linear) is nn.Linear
    assert auto_map(transformers.LlamaConfig)["AutoModelForCausalLM"] == "modeling_pruned.DeadheadLlamaForCausalLM"
    module = transformers.__dict__  # the package itself must not have been touched
    assert not [name for name in module if name.startswith("Deadhead")]


def test_keys_and_values_are_repeated_as_few_times_as_even_groups_need() -> None:
    assert heads_of("kv_group", (1, 3), 8, 4) == Heads((2, 3, 6, 7), (1, 3))
    assert heads_of("head", (0, 1, 4, 5), 8, 4) == Heads((0, 1, 4, 5), (0, 2))
    assert heads_of("head", (0, 1, 4), 8, 4) == Heads((0, 1, 4), (0, 0, 2))
    assert heads_of("head", (0, 1, 2, 3, 4, 5), 12, 2) == Heads((0, 1, 2, 3, 4, 5), (0,))
    assert heads_of("head", (0, 1, 2, 3, 6, 7), 12, 2) == Heads((0, 1, 2, 3, 6, 7), (0, 0, 1))
    assert heads_of("head", (), 8, 4) == Heads((), ())


def test_orders_of_heads_in_fused_tensors() -> None:
    assert head_order("blocks", 2, 1) == [("q", 0), ("q", 1), ("k", 0), ("v", 0)]
    groups = [("q", 0), ("q", 1), ("k", 0), ("v", 0), ("q", 2), ("q", 3), ("k", 1), ("v", 1)]
    assert head_order("groups", 4, 2) == groups


def test_layers_are_named_by_index_where_that_is_enough() -> None:
    assert layer_keys(["layers.0.attn", "layers.2.attn"]) == {"layers.0.attn": 0, "layers.2.attn": 2}
    two_stacks = ["text.layers.0.attn", "image.layers.0.attn"]
    assert layer_keys(two_stacks) == {path: path for path in two_stacks}


def test_reasons_are_given_for_what_is_left_alone() -> None:
    found, refused = find_attentions(tiny_model("olmo2"))
    assert not found
    assert len(refused) == 3 and "runs over all heads at once" in next(iter(refused.values()))


def test_copies_of_a_key_head_that_learnt_different_things_stay_with_their_queries() -> None:
    """Of two groups, one loses a query head: its rest and each of the other get a copy, which training then changes."""
    model: Any = tiny_model("llama", seed=7)
    total = dict.fromkeys(range(3), 8)
    cut(model, HeadPlan(kept={0: [0, 1, 2]}, total=total, unit="head"))
    attention = model.model.layers[0].self_attn
    assert attention.k_proj.out_features == 3 * attention.head_dim
    scramble(model, 3)
    cut(model, HeadPlan(kept={0: [1, 2], 1: [0, 2, 4]}, total=total, unit="head"))
    assert attention.k_proj.out_features == 2 * attention.head_dim
