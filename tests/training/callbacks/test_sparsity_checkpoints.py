"""What a Trainer's end leaves closed, and gates in every checkpoint that it writes: plain, PEFT, best, searched."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import (
    EarlyStoppingCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.hyperparameter_search import ALL_HYPERPARAMETER_SEARCH_BACKENDS, HyperParamSearchBackendBase
from transformers.trainer_utils import BestRun, HPSearchBackend

import deadhead
from benchmarks._tiny_models import VOCABULARY, tiny_model
from deadhead.checkpoints.gate_files import load_gates
from deadhead.errors import InputError, RunWarning
from deadhead.gates.budget import BudgetTarget
from deadhead.gates.gates import HeadGates
from deadhead.measure.cost import counted_costs, model_cost
from tests.small_runs import assert_same_tensors

_STEPS = 8
_IDS = torch.randint(3, VOCABULARY, (32, 8), generator=torch.Generator().manual_seed(1))
_ROWS: Any = [{"input_ids": ids, "labels": ids} for ids in _IDS]
# PEFT asks transformers for activation checkpointing by its old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")


def _arguments(folder: Path, **changes: Any) -> TrainingArguments:
    values: dict[str, Any] = {"max_steps": _STEPS, "per_device_train_batch_size": 2, "learning_rate": 2e-3}
    values |= {"report_to": [], "disable_tqdm": True, "use_cpu": True, "dataloader_pin_memory": False}
    return TrainingArguments(output_dir=str(folder), **{**values, "save_strategy": "no", **changes})


def _best(**changes: Any) -> dict[str, Any]:
    """Return arguments by which a model is evaluated and saved at every second step, and the best is loaded."""
    often = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    return {**often, "load_best_model_at_end": True, "metric_for_best_model": "rank", **changes}


class _BestAt(Trainer):
    """A Trainer to whom the model of one step is the best."""

    best = 0

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        metrics = {"eval_rank": float(self.state.global_step == self.best)}
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


class _StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        control.should_training_stop = state.global_step >= self.step


class _ShortenTo(_StopAt):
    def on_step_begin(self, args: TrainingArguments, state: TrainerState, *_: Any, **__: Any) -> None:
        state.max_steps = self.step


def _model(adapters: bool) -> Any:
    model: Any = tiny_model("llama")
    torch.manual_seed(0)
    return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear")) if adapters else model


def _gated(*, adapters: bool = False, blocks: bool | int = False) -> tuple[Any, HeadGates]:
    model = _model(adapters)
    return model, deadhead.attach(model, blocks=blocks)


def _train(
    folder: Path,
    *callbacks: Any,
    best: int | None = None,
    resume: int | None = None,
    adapters: bool = False,
    arguments: dict[str, Any] | None = None,
    blocks: bool | int = False,
    **options: Any,
) -> tuple[Any, HeadGates, Any]:
    model, gates = _gated(adapters=adapters, blocks=blocks)
    trainer = _BestAt(
        model,
        _arguments(folder, **(arguments or {})),
        train_dataset=_ROWS,
        eval_dataset=_ROWS[:2],
        callbacks=[deadhead.SparsityCallback(gates, **options), *callbacks],
    )
    trainer.best = best or 0
    trainer.train(resume_from_checkpoint=None if resume is None else str(folder / f"checkpoint-{resume}"))
    return model, gates, trainer


@pytest.mark.parametrize(
    ("options", "arguments"),
    [
        ({"sparsity": 0.5}, {}),
        ({"sparsity": 0.4}, {"max_steps": 3}),
        ({"sparsity": 0.5, "ramp_steps": 1000}, {}),
        ({"sparsity": 0.25, "ramp_steps": 0}, {}),
        ({"sparsity": 0.5, "exact": True}, {}),
        ({"sparsity": 0.4, "ranking": "layer"}, {}),
        ({"sparsity": 0.4, "gate_lr": 0, "weighting": "output_difference"}, {}),
        ({"sparsity": 0.75, "blocks": 8}, {"gradient_accumulation_steps": 2}),
        ({"sparsity": 0.5}, {"max_steps": -1, "num_train_epochs": 1, "per_device_train_batch_size": 8}),
    ],
)
def test_a_training_ends_with_the_share_that_was_asked_for(
    options: dict[str, Any], arguments: dict[str, Any], tmp_path: Path
) -> None:
    """Without a warning, which would be an error here; and cut, the model computes what it did."""
    model, gates, _ = _train(tmp_path, arguments=arguments, **options)
    plan = gates.plan(sparsity=options["sparsity"], ranking=options.get("ranking", "global"))
    assert gates.plan() == plan
    model.eval()
    with torch.no_grad():
        expected = model(input_ids=_IDS[:1]).logits
        found = deadhead.cut(model, gates.plan())(input_ids=_IDS[:1]).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["params", "kv_cache"])
def test_a_training_ends_within_its_budget(kind: Any, tmp_path: Path) -> None:
    model, gates = _gated(blocks=8)
    dense = model_cost(model)
    costs = counted_costs(model, kind, unit=gates.unit, hidden=gates.choices.has_blocks)
    callback = deadhead.SparsityCallback(gates, budget=BudgetTarget(costs, 0.7))
    Trainer(model, _arguments(tmp_path), train_dataset=_ROWS, callbacks=[callback]).train()
    left = model_cost(model, gates.plan())
    if kind == "params":
        assert 0.6 * dense.parameters < left.parameters <= 0.7 * dense.parameters
    else:
        assert 0.6 * dense.kv_cache_bytes < left.kv_cache_bytes <= 0.7 * dense.kv_cache_bytes


def test_a_lambda_rises_in_two_thirds_of_the_training(tmp_path: Path) -> None:
    _, _, trainer = _train(tmp_path, l0=0.5, arguments={"max_steps": 9, "logging_steps": 1})
    found = [entry["lambda"] for entry in trainer.state.log_history if "lambda" in entry]
    assert found == pytest.approx([0.5 * min(1.0, step / 6) for step in range(9)])


@pytest.mark.parametrize("options", [{"sparsity": 0.5}, {"sparsity": 0.5, "exact": True}, {"budget": True}])
def test_a_training_that_stops_earlier_says_what_was_reached(options: dict[str, Any], tmp_path: Path) -> None:
    asked = "but 0.5 was asked for; gates.plan\\(sparsity=0.5\\) closes that"
    if "budget" in options:
        model, gates = _gated()
        costs = counted_costs(model, "kv_cache", unit=gates.unit)
        options, asked = {"budget": BudgetTarget(costs, 0.5)}, "but 0.5 was asked for; callback.target.plan"
    with pytest.warns(RunWarning, match=f"Training ended at step 2 of 8, where the gates .*, {asked}") as caught:
        _, gates, _ = _train(tmp_path, _StopAt(2), **options)
    assert len(caught) == 1 and len(str(caught[0].message)) <= 300
    assert gates.sparsity < 0.5


def test_a_training_that_is_made_shorter_still_reaches_the_share(tmp_path: Path) -> None:
    _, gates, trainer = _train(tmp_path, _ShortenTo(3), sparsity=0.5)
    assert trainer.state.global_step == 3 and gates.sparsity == 0.5


@pytest.mark.parametrize("adapters", [False, True])
def test_gates_of_the_best_model_come_back_with_it(adapters: bool, tmp_path: Path) -> None:
    """Within the ramp they close less than was asked for, which is said; after it, exactly what was."""
    with pytest.warns(
        RunWarning, match="The best model is that of step 2 of 8, where the gates close .* but 0.5 .*eval_delay"
    ):
        _, gates, trainer = _train(tmp_path, best=2, adapters=adapters, arguments=_best(), sparsity=0.5)
    saved = load_gates(_model(adapters), tmp_path / "checkpoint-2")
    assert_same_tensors(gates.state_dict(), saved.state_dict())
    assert gates.plan() != gates.plan(sparsity=0.5)
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")

    _, gates, _ = _train(tmp_path / "later", best=6, adapters=adapters, arguments=_best(eval_delay=5), sparsity=0.5)
    saved = load_gates(_model(adapters), tmp_path / "later" / "checkpoint-6")
    assert gates.plan() == saved.plan(sparsity=0.5)


def test_a_training_that_stops_early_on_its_ramp_says_so(tmp_path: Path) -> None:
    arguments = _best(save_total_limit=1)
    with pytest.warns(RunWarning, match="The best model is that of step 2 of 8, where the gates close"):
        _train(tmp_path, EarlyStoppingCallback(1), best=2, arguments=arguments, sparsity=0.5)


@pytest.mark.parametrize("blocks", [False, 8])
def test_a_trainers_checkpoint_opens_with_its_gates(blocks: Any, tmp_path: Path) -> None:
    _train(tmp_path, arguments={"save_strategy": "steps", "save_steps": 4}, sparsity=0.5, blocks=blocks)
    folder = tmp_path / "checkpoint-8"
    model, gates = deadhead.load_gated(folder)
    again, trained, _ = _train(tmp_path / "again", sparsity=0.5, blocks=blocks)
    assert_same_tensors(gates.state_dict(), trained.state_dict())
    assert_same_tensors(model.state_dict(), again.state_dict())
    assert gates.plan() == trained.plan() and gates.config == trained.config
    deadhead.cut(model, gates.plan())
    with pytest.raises(InputError, match="was saved with gates on, .*; open it with deadhead.load_gated"):
        deadhead.load(folder)


def test_adapters_have_their_gates_beside_them(tmp_path: Path) -> None:
    arguments = {"save_strategy": "steps", "save_steps": 4}
    _, trained, _ = _train(tmp_path, adapters=True, arguments=arguments, sparsity=0.5)
    for load in (deadhead.load, deadhead.load_gated):
        with pytest.raises(InputError, match="holds gates without the model .*load_gates"):
            load(tmp_path / "checkpoint-8")
    wrapped = peft.PeftModel.from_pretrained(tiny_model("llama"), str(tmp_path / "checkpoint-8"))
    assert_same_tensors(load_gates(wrapped, tmp_path / "checkpoint-8").state_dict(), trained.state_dict())


@pytest.mark.parametrize("adapters", [False, True])
@pytest.mark.parametrize("options", [{"sparsity": 0.5}, {"l0": 0.5, "exact": False, "gate_lr": 0.1}])
def test_a_callback_that_transformers_makes_anew_goes_on(
    options: dict[str, Any], adapters: bool, tmp_path: Path
) -> None:
    arguments = {"save_strategy": "steps", "save_steps": 4}
    whole, whole_gates, _ = _train(tmp_path, adapters=adapters, arguments=arguments, **options)
    arguments["restore_callback_states_from_checkpoint"] = True
    model, gates, trainer = _train(tmp_path, resume=4, adapters=adapters, arguments=arguments, **options)
    assert_same_tensors(gates.state_dict(), whole_gates.state_dict())
    assert_same_tensors(model.state_dict(), whole.state_dict())
    anew = next(c for c in trainer.callback_handler.callbacks if isinstance(c, deadhead.SparsityCallback))
    assert anew.finds_gates and anew.gates is gates


def test_a_budget_is_not_made_anew(tmp_path: Path) -> None:
    model, gates = _gated()
    target = BudgetTarget(counted_costs(model, "kv_cache", unit=gates.unit), 0.5)
    arguments = {"save_strategy": "steps", "save_steps": 4}
    _train(tmp_path, arguments=arguments, budget=target)
    with pytest.raises(
        InputError, match="restore_callback_states_from_checkpoint cannot rebuild; leave that argument out"
    ):
        arguments["restore_callback_states_from_checkpoint"] = True
        _train(tmp_path, resume=4, arguments=arguments, budget=target)


def test_a_checkpoint_of_other_gates_is_refused(tmp_path: Path) -> None:
    arguments = {"save_strategy": "steps", "save_steps": 4}
    _train(tmp_path, adapters=True, arguments=arguments, sparsity=0.5)
    model = _model(True)
    callback = deadhead.SparsityCallback(deadhead.attach(model, unit="head"), sparsity=0.5)
    trainer = Trainer(model, _arguments(tmp_path, **arguments), train_dataset=_ROWS, callbacks=[callback])
    with pytest.raises(InputError, match="has 4 gates of layer 0, but the model has 8; attach them as they were"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


@pytest.mark.parametrize(
    ("before", "now"), [({}, {"unit": "head"}), ({"blocks": 8}, {"blocks": 16}), ({"unit": "head"}, {})], ids=str
)
def test_weights_with_other_gates_are_refused(before: dict[str, Any], now: dict[str, Any], tmp_path: Path) -> None:
    saved, model = _model(False), _model(False)
    deadhead.attach(saved, **before)
    deadhead.attach(model, **now)
    with pytest.raises(InputError, match="The checkpoint has .* gates at .*, but the model has .* attach them as they"):
        model.load_state_dict(saved.state_dict(), strict=False)


def _made() -> Any:
    return _gated()[0]


class _Trial(dict[str, Any]):
    """What a backend of a search gives a Trainer: a number, and the values to be tried."""

    def __init__(self, number: int) -> None:
        super().__init__(seed=1, learning_rate=2e-3)
        self.params, self.number = self, number


class _Sweep(HyperParamSearchBackendBase):
    """Trains for one trial after the other, as optuna does, which is not installed for tests."""

    @staticmethod
    def is_available() -> bool:
        return True

    def run(self, trainer: Trainer, n_trials: int, direction: str, **kwargs: Any) -> BestRun:
        objectives = []
        for number in range(n_trials):
            trainer.train(trial=_Trial(number))
            objectives.append(kwargs["tell"](trainer))
        return BestRun("0", min(objectives), {})


def _made_for(trial: Any) -> Any:
    model = _model(False)
    deadhead.attach(model, unit="head" if trial is not None and trial.number else None)
    return model


@pytest.mark.parametrize(
    ("init", "space", "options", "alike"),
    [
        (_made, {}, {"sparsity": 0.5}, True),
        pytest.param(_made, {}, {"sparsity": 0.5, "exact": True}, True, marks=pytest.mark.slow),
        pytest.param(
            _made, {"learning_rate": (2e-3, 5e-2)}, {"sparsity": 0.5, "gate_lr": 0}, False, marks=pytest.mark.slow
        ),
        pytest.param(_made, {"max_steps": (_STEPS, 4)}, {"sparsity": 0.5}, False, marks=pytest.mark.slow),
        (_made_for, {}, {"sparsity": 0.5}, False),
    ],
    ids=["twice the same", "exact", "rates", "steps", "units"],
)
def test_a_search_of_hyperparameters_trains_the_gates_of_each_model_that_it_makes(
    init: Any,
    space: dict[str, Any],
    options: dict[str, Any],
    alike: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each trial in a folder of its own, to its own end; what one leaves in the callback is nothing to the next."""
    monkeypatch.setitem(ALL_HYPERPARAMETER_SEARCH_BACKENDS, HPSearchBackend.OPTUNA, _Sweep)
    callback = deadhead.SparsityCallback(**options)
    arguments = _arguments(tmp_path, save_strategy="steps", save_steps=4)
    trainer: Any = Trainer(args=arguments, model_init=init, train_dataset=_ROWS, callbacks=[callback])
    found = []

    def tell(trainer: Any) -> float:
        gates = deadhead.gates_of(trainer.model)
        assert gates is not None and gates is callback.gates and gates.sparsity == 0.5
        assert gates.plan() == gates.plan(sparsity=0.5)
        found.append(gates.state_dict())
        _, saved = deadhead.load_gated(tmp_path / f"run-{len(found) - 1}" / f"checkpoint-{trainer.state.max_steps}")
        assert_same_tensors(saved.state_dict(), gates.state_dict())
        return 0.0

    def chosen(trial: _Trial) -> dict[str, Any]:
        return {name: values[trial.number] for name, values in space.items()}

    trainer.hyperparameter_search(chosen, n_trials=2, backend="optuna", tell=tell)
    assert len(found) == 2
    if alike:
        assert_same_tensors(found[0], found[1])
    else:
        assert {name: value.tolist() for name, value in found[0].items()} != {
            name: value.tolist() for name, value in found[1].items()
        }


def _of_another_model(folder: Path) -> Trainer:
    callback = deadhead.SparsityCallback(_gated()[1], sparsity=0.5)
    return Trainer(args=_arguments(folder), model_init=_made, train_dataset=_ROWS, callbacks=[callback])


def _after_the_cut(folder: Path) -> Trainer:
    model, gates, trainer = _train(folder, sparsity=0.5)
    deadhead.cut(model, gates.plan())
    return trainer


def _after_the_cut_of_adapters(folder: Path) -> Trainer:
    model, gates, trainer = _train(folder, sparsity=0.5, adapters=True)
    trainer.model = trainer.model_wrapped = deadhead.cut(model.merge_and_unload(), gates.plan())
    return trainer


def _with_other_gates(folder: Path) -> Trainer:
    """The Trainer's optimizer still has the parameters from before the cut."""
    model, gates, trainer = _train(folder, sparsity=0.5)
    deadhead.attach(deadhead.cut(model, gates.plan()))
    return trainer


def _after_detaching(folder: Path) -> Trainer:
    model, _, trainer = _train(folder, l0=0.1)
    deadhead.detach(model)
    return trainer


def _without_gates(folder: Path) -> Trainer:
    callback = deadhead.SparsityCallback(l0=0.1)
    return Trainer(tiny_model("llama"), _arguments(folder), train_dataset=_ROWS, callbacks=[callback])


@pytest.mark.parametrize(
    ("trainer", "message"),
    [
        (_of_another_model, "attach the gates to the same model .* give SparsityCallback no gates"),
        (_after_the_cut, "model was cut, and deadhead.cut removes the gates; to train it further, make a new Trainer"),
        (_after_the_cut_of_adapters, "model was cut, and deadhead.cut removes the gates"),
        (_with_other_gates, "attach the gates to the same model .* before the Trainer makes its optimizer"),
        (_after_detaching, "The Trainer's model has no gates; attach them with deadhead.attach"),
        (_without_gates, "The Trainer's model has no gates; attach them with deadhead.attach"),
    ],
)
def test_a_model_without_these_gates_is_refused_with_the_reason(
    trainer: Callable[[Path], Trainer], message: str, tmp_path: Path
) -> None:
    made = trainer(tmp_path)
    with pytest.raises(InputError, match=message) as caught, warnings.catch_warnings():
        warnings.simplefilter("error")
        made.train()
    assert len(str(caught.value)) <= 300
