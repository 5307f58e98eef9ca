"""Heads cut while training goes on: same numbers as without, the optimizer included, and going on after a kill."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

import deadhead
from benchmarks import _tiny_models
from deadhead import HeadPlan, InputError, PruneRecipe
from deadhead.cutting import trim
from deadhead.errors import CutError
from deadhead.gates import HeadGates
from deadhead.layouts.all_attention import AllAttentionLayout
from deadhead.training.choosing import gate_config
from deadhead.training.run import Run
from tests.helpers import tiny_model
from tests.small import KillAt, Killed, assert_same_tensors, metrics, small_recipe, stream, write_prose

_TEXT = stream(300)
# Of three layers with four heads: some heads of two layers, and all of the last.
_SHUT = {0: [1, 3], 1: [2], 2: [0, 1, 2, 3]}


def _recipe(kind: str = "all_attention", **changes: Any) -> PruneRecipe:
    values: dict[str, Any] = {
        "steps": 12,
        "batch_size": 2,
        "learning_rate": 3e-3,
        "log_every": 1,
        "l0": 0.05,
        "weight_decay": 0.1,
    }
    if kind != "all_attention":
        values["sequence_length"] = 10
    return PruneRecipe(**{**values, **changes})


def _model(recipe: PruneRecipe, kind: str = "all_attention") -> tuple[PreTrainedModel, HeadGates]:
    """Return a model with gates, of which those in `_SHUT` never open again and the others stay open."""
    model = tiny_model(hidden_dropout=0.1) if kind == "all_attention" else _tiny_models.tiny_model(kind)
    gates = deadhead.attach(model, config=gate_config(recipe, model, seed=4))
    for layer, gate in gates:
        shut = [head for head in _SHUT[int(layer)] if head < gate.num_heads]
        gate.set_log_alpha(torch.full((gate.num_heads,), 6.0).index_fill(0, torch.tensor(shut), -20.0))
    return model, gates


def _train(model: PreTrainedModel, gates: HeadGates, recipe: PruneRecipe, **options: Any) -> None:
    deadhead.train(model, _TEXT, recipe, gates=gates, seed=7, **options)


@pytest.mark.parametrize("kind", ["all_attention", "llama"])
def test_heads_that_never_open_are_cut_in_training_and_nothing_else_changes(kind: str, tmp_path: Path) -> None:
    found = {}
    for cut_settled in (0, 5):
        recipe = _recipe(kind, cut_settled=cut_settled)
        model, gates = _model(recipe, kind)
        before = sum(parameter.numel() for parameter in model.parameters())
        _train(model, gates, recipe, metrics=tmp_path / str(cut_settled) / "metrics.jsonl")
        after = sum(parameter.numel() for parameter in model.parameters())
        assert (after < before) == bool(cut_settled)
        found[cut_settled] = deadhead.cut(model, gates.plan()), gates.plan()
    (whole, plan), (trimmed, trimmed_plan) = found[0], found[5]
    assert trimmed_plan == plan
    assert min(plan.heads) == 0 < max(plan.heads)
    for line, other in zip(metrics(tmp_path / "0"), metrics(tmp_path / "5"), strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert line["heads"] == other["heads"]
    assert whole.config.head_plan == trimmed.config.head_plan
    expected, weights = whole.state_dict(), trimmed.state_dict()
    assert expected.keys() == weights.keys()
    for name, value in expected.items():
        torch.testing.assert_close(weights[name], value, rtol=1e-3, atol=1e-5, msg=lambda text, name=name: name + text)


def test_a_layer_keeps_its_likeliest_head_until_the_end_of_training() -> None:
    recipe = _recipe(cut_settled=3)
    model, gates = _model(recipe)
    gates.gates[2].set_log_alpha(torch.tensor([-20.0, -19.0, -15.0, -19.0]))
    _train(model, gates, recipe)
    assert gates.present == {0: (0, 2), 1: (0, 1, 3), 2: (2,)}
    assert gates.plan().kept == {0: (0, 2), 1: (0, 1, 3), 2: ()}
    assert gates.sparsity == pytest.approx(7 / 12)


def test_a_gate_that_was_ajar_begins_to_count_anew() -> None:
    recipe = _recipe(cut_settled=8)
    model, gates = _model(recipe)

    class Ajar(TrainerCallback):
        def on_step_begin(
            self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
        ) -> None:
            values = gates.gates[0].log_alpha.detach().clone()
            values[1] = -3.0 if state.global_step == 5 else -20.0
            gates.gates[0].set_log_alpha(values)

    _train(model, gates, recipe, callbacks=[Ajar()])
    assert gates.present[0] == (0, 1, 2)


@pytest.mark.parametrize("kind", ["all_attention", "llama"])
@pytest.mark.parametrize("killed", [4, 8])
def test_a_run_killed_before_or_after_heads_were_cut_goes_on_to_the_same_bits(
    kind: str, killed: int, tmp_path: Path
) -> None:
    recipe = _recipe(kind, cut_settled=5, save_every=3, sparsity=0.5)
    model, gates = _model(recipe, kind)
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    _train(model, gates, recipe, folder=whole, metrics=whole / "metrics.jsonl")
    begun, begun_gates = _model(recipe, kind)
    with pytest.raises(Killed):
        settings = {"folder": stopped, "metrics": stopped / "metrics.jsonl"}
        _train(begun, begun_gates, recipe, callbacks=[KillAt(killed)], **settings)
    resumed, resumed_gates = _model(recipe, kind)
    _train(resumed, resumed_gates, recipe, resume=True, **settings)
    assert_same_tensors(model.state_dict(), resumed.state_dict())
    assert metrics(whole) == metrics(stopped)
    assert resumed_gates.present == gates.present
    assert resumed_gates.plan() == gates.plan()


def _trimmable() -> tuple[Any, HeadGates, HeadPlan]:
    model, gates = _model(_recipe())
    kept = {0: [0, 2], 1: [0, 1, 3], 2: [1]}
    return model, gates, HeadPlan(kept=kept, total=dict.fromkeys(range(3), 4))


def test_the_optimizer_remembers_of_the_rest_what_it_did() -> None:
    model, gates, plan = _trimmable()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    ids = torch.randint(29, (2, 6))
    gates.begin_step(0)
    model.train()(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    layer = model.model.layers[0].attention
    states = {
        name: copy.deepcopy(optimizer.state[layer.get_parameter(name)])
        for name in ("q_proj.weight", "o_proj.weight", "persistent_k")
    }
    trim(model, plan, optimizer)
    now = {name: optimizer.state[layer.get_parameter(name)] for name in states}
    width = model.config.head_dim
    wide = [head * width + place for head in (0, 2) for place in range(width)]
    for moment in ("exp_avg", "exp_avg_sq"):
        assert states["q_proj.weight"][moment].any()
        assert torch.equal(now["q_proj.weight"][moment], states["q_proj.weight"][moment][wide])
        assert torch.equal(now["o_proj.weight"][moment], states["o_proj.weight"][moment][:, wide])
        assert torch.equal(now["persistent_k"][moment], states["persistent_k"][moment][[0, 2]])
    assert now["q_proj.weight"]["step"] == states["q_proj.weight"]["step"]
    trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert trained == {id(parameter) for parameter in model.parameters()} == {id(key) for key in optimizer.state}


def test_the_output_scale_still_counts_the_heads_that_were_cut() -> None:
    model, gates, plan = _trimmable()
    ids = torch.randint(29, (2, 6))
    with torch.no_grad():
        before = model.eval()(input_ids=ids).logits
        trim(model, plan)
        assert torch.allclose(model(input_ids=ids).logits, before, atol=1e-5)
        _, scale = gates.gates[0]()
        assert scale == 2.0
        assert torch.allclose(deadhead.cut(model, gates.plan())(input_ids=ids).logits, before, atol=1e-5)


def test_plans_count_heads_cut_in_training_as_closed() -> None:
    model, gates, plan = _trimmable()
    trim(model, plan)
    gates.gates[0].set_log_alpha(torch.full((4,), 6.0))
    assert gates.plan().kept[0] == (0, 2)
    assert gates.plan(sparsity=0.0).kept == plan.kept
    assert gates.plan(sparsity=0.75).heads != plan.heads
    with pytest.raises(InputError, match="keeps head 1 of layer 0, but that head was cut before"):
        gates.set_plan(HeadPlan.keep_all(dict.fromkeys(range(3), 4)))


def test_heads_that_are_still_open_are_put_back() -> None:
    model, gates, _ = _trimmable()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CutError, match="nothing was cut"):
        trim(model, HeadPlan(kept={0: [0]}, total=dict.fromkeys(range(3), 4)))
    assert_same_tensors(model.state_dict(), before)
    assert gates.present[0] == (0, 1, 2, 3)
    assert AllAttentionLayout().recorded_plan(model) is None


def test_a_gated_checkpoint_of_a_model_cut_in_training_goes_on_as_it_is(tmp_path: Path) -> None:
    model, gates, plan = _trimmable()
    ids = torch.randint(29, (2, 6))
    trim(model, plan)
    deadhead.save(model, tmp_path / "gated")
    loaded, loaded_gates = deadhead.load_gated(tmp_path / "gated")
    assert loaded_gates.plan() == gates.plan()
    assert loaded_gates.present == gates.present
    assert loaded_gates.sparsity == gates.sparsity
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, model.eval()(input_ids=ids).logits)
    assert deadhead.cut(loaded, loaded_gates.plan()).config.head_plan == gates.plan().to_dict()


def test_a_whole_run_with_heads_cut_in_training(tmp_path: Path) -> None:
    prune = {"steps": 6, "cut_settled": 3, "init": -8.0}
    recipe = small_recipe(write_prose(tmp_path), prune=prune)
    summary = Run.start(recipe, tmp_path / "run").execute()
    # Every gate is shut from the first step; a layer's last head stays until the cut.
    assert summary["gated"]["parameters"] < summary["dense"]["parameters"]
    assert summary["cut"]["perplexity"] == pytest.approx(summary["gated"]["perplexity"], rel=1e-4)
    _, gates = deadhead.load_gated(tmp_path / "run" / "gated")
    assert [len(heads) for heads in gates.present.values()] == [1, 1]


def test_soft_gates_settle_too() -> None:
    """A soft gate opens more often than a hard one of the same log_alpha, and not only above 0.5."""
    recipe = _recipe(cut_settled=3, hard=False)
    model, gates = _model(recipe)
    gates.gates[0].set_log_alpha(torch.tensor([6.0, -4.0, 6.0, -20.0]))
    gates.gates[1].set_log_alpha(torch.full((4,), 6.0))
    _train(model, gates, recipe)
    assert gates.present[0] == (0, 1, 2)


def test_a_model_that_was_cut_since_cannot_go_on_from_before(tmp_path: Path) -> None:
    recipe = _recipe(cut_settled=5, save_every=3)
    model, gates = _model(recipe)
    with pytest.raises(Killed):
        _train(model, gates, recipe, folder=tmp_path, callbacks=[KillAt(5)])
    with pytest.raises(InputError, match="has heads that training has cut off this model since; load the model anew"):
        _train(model, gates, recipe, folder=tmp_path, resume=True)


def test_training_goes_on_where_a_cut_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise CutError("it computed something else.")

    monkeypatch.setattr("deadhead.training.settled.trim", fail)
    recipe = _recipe(cut_settled=5)
    model, gates = _model(recipe)
    with pytest.warns(UserWarning, match="Heads stay until the end of the training: it computed something else."):
        _train(model, gates, recipe)
    assert gates.present == gates.heads


def test_what_cannot_be_cut_in_training_is_refused() -> None:
    model, _, plan = _trimmable()
    with pytest.raises(InputError, match="A layer keeps at least one head while it trains, but the plan leaves 2 none"):
        trim(model, HeadPlan(kept={2: []}, total=plan.total))
    with pytest.raises(InputError, match="this one has none"):
        trim(deadhead.detach(model), plan)
    recipe = _recipe("llama", cut_settled=5, unit="head")
    llama = _tiny_models.tiny_model("llama")
    gates = deadhead.attach(llama, config=gate_config(recipe, llama, seed=4), unit="head")
    with pytest.raises(InputError, match='use unit = "kv_group", or leave cut_settled out'):
        _train(llama, gates, recipe)
    recipe = _recipe("llama", cut_settled=5, lora_rank=2)
    with pytest.raises(InputError, match="leave out one of the two"):
        _train(*_model(recipe, "llama"), recipe)
