"""A cut model whose layers are alike is one of transformers' own, wherever that one's configuration can say it."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForSequenceClassification

import deadhead
from benchmarks._tiny_models import VOCABULARY, scramble, tiny_config, tiny_model
from deadhead import HeadPlan, InputError
from deadhead.checkpoints.folder_cost import folder_cost
from deadhead.cli import execute
from deadhead.layouts.stock import NotStock, why_not_stock
from deadhead.plans.unit_plan import UnitPlan
from tests.fresh_process import stock_logits
from tests.random_models import assert_unchanged, difference, snapshot

IDS = torch.randint(3, VOCABULARY, (2, 13), generator=torch.Generator().manual_seed(1))
# Of 8 query and 4 key/value heads, and 64 hidden units, in each of 3 layers.
HEADS = {"head": ((0, 2, 5, 6), (1, 3, 4, 7), (0, 3, 4, 6)), "kv_group": ((0, 2), (1, 3), (2, 3))}


def plan_of(model: Any, heads: Any = None, units: Any = None, unit: Any = "kv_group") -> HeadPlan:
    """Return the plan that keeps some heads, and some hidden units, of each layer; all where nothing is given."""
    every = deadhead.attach(model, unit=unit, blocks=units is not None and 1).plan()
    deadhead.detach(model)
    kept = every.kept if heads is None else dict(zip(every.kept, heads, strict=True))
    hidden = None
    if units is not None:
        total: Any = every.hidden_units.total  # type: ignore[union-attr]
        hidden = UnitPlan(kept=dict(zip(total, units, strict=True)), total=total)
    return HeadPlan(kept=kept, total=every.total, unit=unit, hidden_units=hidden)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS)[0]


UNITS = (tuple(range(40)), tuple(range(10, 50)), (*range(20), *range(44, 64)))
CUTS: dict[str, dict[str, Any]] = {
    "heads": {"heads": HEADS["kv_group"]},
    "single heads": {"heads": HEADS["head"], "unit": "head"},
    "hidden units": {"units": UNITS},
    "both": {"heads": HEADS["kv_group"], "units": UNITS},
}


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize(
    "kind", ["llama", "qwen2", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("mistral", "gemma2", "phi3"))]
)
@pytest.mark.filterwarnings("ignore:The key/value cache grows")
def test_layers_alike_make_a_stock_model(kind: str, cut: str, tmp_path: Path) -> None:
    dense: Any = tiny_model(kind, seed=7)
    stock = type(dense)
    plan = plan_of(dense, **CUTS[cut])
    model = copy.deepcopy(dense)
    gates = deadhead.attach(model, unit=plan.unit, blocks=plan.hidden_units is not None and 1)
    gates.set_plan(plan)
    expected = logits(model)
    assert type(deadhead.cut(model, plan)) is stock and difference(logits(model), expected) <= 1e-5
    dense.save_pretrained(tmp_path / "dense")
    deadhead.save(model, tmp_path / "saved")
    deadhead.cut_checkpoint(tmp_path / "dense", plan, tmp_path / "streamed", stream=True)
    for name in ("saved", "streamed"):
        folder = tmp_path / name
        config = json.loads((folder / "config.json").read_text())
        assert (config["model_type"], config["architectures"]) == (kind, [stock.__name__])
        assert "auto_map" not in config and not list(folder.glob("*.py"))
        assert HeadPlan.from_json(folder / "head_plan.json") == plan
        assert "trust_remote_code" not in (folder / "README.md").read_text()
        for again in (AutoModelForCausalLM.from_pretrained(folder), deadhead.load(folder)):
            assert type(again) is stock and torch.equal(logits(again), logits(model))
            assert deadhead.model_cost(again) == deadhead.model_cost(model)
        assert deadhead.attach(again).plan().kept == plan.kept
    assert (tmp_path / "saved" / "config.json").read_text() == (tmp_path / "streamed" / "config.json").read_text()
    if kind in ("llama", "qwen2"):
        assert folder_cost(folder) == (deadhead.model_cost(again), plan)


@pytest.mark.parametrize("unit", HEADS)
@pytest.mark.parametrize("reloads", [False, True])
@pytest.mark.parametrize("kind", ["llama", pytest.param("phi3", marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore:The key/value cache grows")
def test_further_cuts_compose(kind: str, reloads: bool, unit: str, tmp_path: Path) -> None:
    """Alike, then not, then alike again: each as if it were cut at once, in the dense model's numbering."""
    dense: Any = tiny_model(kind, seed=7)
    stock, heads = type(dense), HEADS[unit]
    halves = [kept[1::2] for kept in heads]
    cuts = {
        "alike": (heads, UNITS, True),
        "different": ((halves[0], *heads[1:]), (UNITS[0][:8], *UNITS[1:]), False),
        "alike again": (halves, [units[:8] for units in UNITS], True),
    }
    model = copy.deepcopy(dense)
    for name, (kept, units, is_stock) in cuts.items():
        plan = plan_of(dense, kept, units, unit)
        deadhead.cut(model, plan)
        assert (type(model) is stock) == is_stock
        at_once = deadhead.cut(copy.deepcopy(dense), plan)
        assert torch.equal(logits(model), logits(at_once))
        found, expected = ({**each.config.to_dict(), "head_dim": 8} for each in (model, at_once))
        of_files = ("_name_or_path", "dtype", "architectures")
        assert found == expected | {name: found[name] for name in of_files}
        deadhead.save(model, tmp_path / name)
        again = deadhead.load(tmp_path / name)
        assert type(again) is type(model) and torch.equal(logits(again), logits(model))
        model = again if reloads else model


def test_a_cut_that_fails_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = tiny_model("llama", seed=7)
    deadhead.cut(model, plan_of(model, **CUTS["both"]))
    before, config, values = snapshot(model), model.config, model.config.to_dict()
    for heads in ([(0,), (1, 3), (2, 3)], [(0,), (1,), (2,)]):
        plan = plan_of(model, heads)
        with monkeypatch.context() as patch:
            patch.setattr("deadhead.cutting.require_same_function", Mock(side_effect=MemoryError))
            with pytest.raises(MemoryError):
                deadhead.cut(model, plan)
        assert_unchanged(model, before)
        assert type(model) is transformers.LlamaForCausalLM
        assert model.config is config and config.to_dict() == values


def test_a_plan_that_cuts_nothing_leaves_the_class(tmp_path: Path) -> None:
    model: Any = tiny_model("gpt2")
    before = logits(model)
    deadhead.cut(model, plan_of(model, unit="head"))
    deadhead.save(model, tmp_path / "cut")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "cut")
    assert type(again) is transformers.GPT2LMHeadModel and torch.equal(logits(again), before)


def test_classifiers_and_models_that_see(tmp_path: Path) -> None:
    config: Any = tiny_config("llama")
    config.num_labels = 3
    text = {"num_key_value_heads": 2, **dict.fromkeys(("num_attention_heads", "num_hidden_layers"), 4)}
    text |= {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 48}
    vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    seeing = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**text),
        vision_config=transformers.CLIPVisionConfig(**vision, image_size=8, patch_size=4),
        image_token_index=98,
    )
    models: dict[Any, Any] = {
        AutoModelForSequenceClassification: transformers.LlamaForSequenceClassification(config),
        AutoModelForImageTextToText: transformers.LlavaForConditionalGeneration(seeing),
    }
    for auto, model in models.items():
        scramble(model.eval(), 0)
        stock, layers = type(model), model.config.get_text_config().num_hidden_layers
        for count in (24, 16):
            deadhead.cut(model, plan_of(model, [(1,)] * layers, [range(count)] * layers))
            assert type(model) is stock
            folder = tmp_path / f"{stock.__name__}-{count}"
            deadhead.save(model, folder)
            assert f"import {auto.__name__}\n" in (folder / "README.md").read_text()
            again = auto.from_pretrained(folder)
            assert type(again) is stock and torch.equal(logits(again), logits(model))
            # What is cut next is what was loaded.
            model = deadhead.load(folder)


@pytest.mark.parametrize(
    ("kind", "cut", "why"),
    [
        ("llama", {"heads": [(0,), (0, 1), (0, 1)]}, "its layers have different numbers of heads"),
        ("llama", {"heads": [(), (0, 1), (0, 1)]}, "a layer has no heads left"),
        ("llama", {"units": [(0,), (0, 1), (0, 1)]}, "its layers have different numbers of hidden units"),
        ("llama", {"units": [(), (), ()]}, "a layer has no hidden units left"),
        (
            "llama",
            {"heads": [(0, 1, 2)] * 3},
            "LlamaConfig cannot say that every layer has 6 heads, each 8 wide (The hid",
        ),
        ("gpt2", {"heads": HEADS["head"], "unit": "head"}, "GPT2Config cannot say that every layer has 4 heads"),
    ],
)
def test_the_card_and_the_command_say_why_others_are_of_our_classes(
    kind: str, cut: dict[str, Any], why: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dense = tiny_model(kind)
    plan = plan_of(dense, **cut)
    dense.save_pretrained(tmp_path / "dense")
    plan.to_json(tmp_path / "plan.json")
    command = ["cut", str(tmp_path / "dense"), "--plan", str(tmp_path / "plan.json"), "--out", str(tmp_path / "out")]
    assert execute(command) == 0
    sentence = f"It has modelling code of its own, because {why}"
    assert sentence in " ".join(capsys.readouterr().out.split())
    assert sentence in (tmp_path / "out" / "README.md").read_text()
    assert type(deadhead.load(tmp_path / "out")).__name__.startswith("Deadhead")


def test_checkpoints_of_our_classes_whose_layers_are_alike_load_and_become_stock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As they were written before there were stock ones."""
    model: Any = tiny_model("llama", seed=7)
    plan = plan_of(model, **CUTS["both"])

    def refuse(*_: object) -> None:
        raise NotStock

    with monkeypatch.context() as patch:
        patch.setattr("deadhead.layouts.hugging_face.stock_sizes", refuse)
        deadhead.cut(model, plan)
    deadhead.save(model, tmp_path / "ours")
    again = deadhead.load(tmp_path / "ours")
    assert type(again).__name__ == "DeadheadLlamaForCausalLM" and why_not_stock(again) is None
    assert torch.equal(logits(again), logits(model))
    deadhead.cut(again, plan)
    assert type(again) is transformers.LlamaForCausalLM and torch.equal(logits(again), logits(model))


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("head_plan", "kept", "1"), [0], "keeps 1 of 4 heads of layer 1, but there are 2 of 4"),
        (("head_plan", "total", "2"), 9, "keeps 2 of 9 heads of layer 2, but there are 2 of 4"),
        (("head_plan", "hidden_units", "kept", "0"), "0-6", "keeps 7 of 64 hidden units of layer 0, but there are 40"),
        (("dense_sizes",), {"num_attention_heads": 10}, "keeps 2 of 4 heads of layer 0, but there are 2 of"),
        (("dense_sizes",), "none", "keeps 2 of 4 heads of layer 0, but there are 2 of 2"),
        (("dense_sizes", "num_key_value_heads"), 3, "keeps 2 of 4 heads of layer 0, but there are 2 of 2"),
    ],
)
def test_a_plan_that_is_not_the_stock_model_s_is_refused(path: Any, value: Any, message: str, tmp_path: Path) -> None:
    model: Any = tiny_model("llama", seed=7)
    deadhead.cut(model, plan_of(model, **CUTS["both"])).save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    place = values
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(InputError, match=message):
        deadhead.attach(deadhead.load(tmp_path), blocks=1)
    assert folder_cost(tmp_path) is None


@pytest.mark.slow
def test_they_load_where_deadhead_is_not_and_no_code_is_trusted(tmp_path: Path) -> None:
    models = {kind: tiny_model(kind, seed=7) for kind in ("llama", "qwen3", "gemma2", "mixtral")}
    for kind, model in models.items():
        heads = [(1, 2)] * len(plan_of(model).kept)
        deadhead.save(deadhead.cut(model, plan_of(model, heads)), tmp_path / kind)
    found = stock_logits([tmp_path / kind for kind in models], IDS, tmp_path)
    for kind, model in models.items():
        assert torch.equal(found[str(tmp_path / kind)], logits(model)), kind
