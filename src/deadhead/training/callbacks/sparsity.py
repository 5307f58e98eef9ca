"""A callback that trains gates under the sparsity loss with any transformers Trainer."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from deadhead.attaching import gates_of
from deadhead.checkpoints.gate_files import save_gates
from deadhead.errors import InputError, RunWarning, require_type, typed
from deadhead.gates.budget import BudgetTarget
from deadhead.gates.gates import HeadGates
from deadhead.gates.hard_concrete import GateConfig
from deadhead.gates.optimizer import GateOptimizer, default_rate
from deadhead.gates.penalty import (
    SparsityTarget,
    Weighting,
    linear_warmup,
    penalty_gradient,
    require_steps,
    steps_within,
)
from deadhead.gates.sharding import share_out
from deadhead.layouts.refusals import require_gradients
from deadhead.plans.choices import Choices
from deadhead.plans.kinds import Ranking
from deadhead.training.callbacks.logs import add_to_log
from deadhead.training.callbacks.resuming import SameGates
from deadhead.training.processes import require_supported

# What a Trainer's state is marked with once a callback has begun.
_HAS_BEGUN = "_deadhead_gates_begun"


class SparsityCallback(TrainerCallback, ExportableState):
    """Trains gates under the sparsity loss, next to the Trainer's own optimizer, with noise that depends on the step.

    The sparsity loss does not depend on the batch, so it is not added to the language-modelling loss: reported losses
    are those of the language model, clipping sees only its gradient, and gradient accumulation counts the penalty once.
    Gates get no weight decay, without any change to the Trainer's optimizer.

    After the Trainer's last step, exactly what was asked for is closed: `gates.plan()` equals `gates.plan(sparsity=…)`,
    or is within the budget. Every checkpoint of the Trainer contains the gates, and `deadhead.load_gated` can open it.
    Gates are restored from the checkpoint that is resumed or, with `load_best_model_at_end`, from the best one.

    Args:
        gates: the gates that `deadhead.attach` returned for the model to train; None: those that the Trainer's model
            has when training begins, because a `model_init` has to attach them.
        l0: λ, the cost of an open head, in nats a token; None is 0.01. Not with `sparsity` or `budget`.
        warmup_steps: steps in which λ rises linearly from 0 (paper, warm-up); 0 switches the warm-up off, None takes
            two thirds of the training's steps, at most 1,000. For `l0` only.
        sparsity: close this share of the gates, along a ramp, instead of paying λ for open gates.
        ramp_steps: steps until the ramp reaches `sparsity`; None takes two thirds of the training's steps. A ramp ends
            with the training at the latest.
        budget: instead, hold the cost of the open gates at a share of the dense model's cost (see `BudgetTarget`).
        weighting: "plain" L0, or "output_difference", which pushes those heads hardest whose removal changes the
            output of their layer least.
        gate_lr: the learning rate of the gates' own optimizer (see `GateOptimizer`); None chooses it by the number of
            steps. 0: the Trainer's optimizer trains the gates, at `GateConfig.lr_scale` times the model's rate, as in
            the paper.
        ranking: with `sparsity`, "global" closes that share of all gates, "layer" that share of each layer's gates.
        exact: with `sparsity`, every draw closes exactly that share: differentiable subset pruning.
        track_difference: measure output differences even if they do not weight the loss (`gates.difference()`).

    Raises:
        InputError: an argument is out of range; at the start of training: the model has no gates, the optimizer does
            not train the gates, DeepSpeed is used (it steps inside backward, where no gradient can be added), or only
            one of the model and the resumed checkpoint has gates.

    Warns:
        RunWarning: fewer gates are closed than was asked for, because training ended before its last step or the best
            model is that of an earlier step.
    """

    @typed
    def __init__(
        self,
        gates: HeadGates | None = None,
        *,
        l0: float | None = None,
        warmup_steps: int | None = None,
        sparsity: float | None = None,
        ramp_steps: int | None = None,
        budget: BudgetTarget | Any = None,
        weighting: Weighting = "plain",
        gate_lr: float | None = None,
        ranking: Ranking = "global",
        exact: bool = False,
        track_difference: bool = False,
    ) -> None:
        # What transformers makes this object anew from, with restore_callback_states_from_checkpoint.
        given = {name: value for name, value in locals().items() if name not in ("self", "gates", "budget")}
        self.given = {name: value.item() if hasattr(value, "item") else value for name, value in given.items()}
        if isinstance(budget, str) and budget == BudgetTarget.__name__:
            raise InputError(
                "budget must be a BudgetTarget, which restore_callback_states_from_checkpoint cannot rebuild; leave "
                "that argument out: SparsityCallback resumes from a checkpoint without it."
            )
        require_type(budget, BudgetTarget | None, "SparsityCallback takes budget as")
        if l0 is not None and not 0 <= l0 < math.inf:
            raise InputError(f"l0 (λ of the sparsity loss) must be a number that is not negative, but got {l0}.")
        if gate_lr is not None and not 0 <= gate_lr < math.inf:
            raise InputError(f"gate_lr must be a number that is not negative, or None, but got {gate_lr}.")
        require_steps("warmup_steps", warmup_steps)
        if sparsity is not None and budget is not None:
            raise InputError("sparsity and budget both say how much to close; give one of the two.")
        given |= {"ranking": None if ranking == "global" else ranking, "exact": exact or None}
        for name in ("l0", "warmup_steps"):
            if given[name] is not None and (sparsity is not None or budget is not None):
                what = "budget" if sparsity is None else "sparsity"
                raise InputError(
                    f"{name} is for training that finds how much to close, but {what} says it; give one of them."
                )
        for name in ("ramp_steps", "ranking", "exact"):
            if given[name] is not None and sparsity is None:
                raise InputError(
                    f"{name} says how a target sparsity is reached; give sparsity too, or leave {name} out."
                )
        self.l0 = 0.01 if l0 is None else l0
        self.warmup_steps = warmup_steps
        self.weighting: Weighting = weighting
        self.target: SparsityTarget | BudgetTarget | None = budget
        if sparsity is not None:
            self.target = SparsityTarget(sparsity, ramp_steps=ramp_steps, ranking=ranking, exact=exact)
        self.gate_lr = gate_lr
        self.tracks_difference = track_difference or weighting == "output_difference"
        self.strength = 0.0
        self.last_l0 = float("nan")
        self.finds_gates = gates is None
        self.same_gates: SameGates | None = None
        nothing = Choices(unit="head", members={}, total={})
        self._take(HeadGates({}, choices=nothing, config=GateConfig()) if gates is None else gates)

    def _take(self, gates: HeadGates, steps: int = 1) -> None:
        """Start to train these gates for a number of steps."""
        if self.target is not None and self.target.exact and not gates.config.hard:
            raise InputError(
                "exact draws need hard gates, which are open or closed, but got soft ones, which are partly open; "
                "leave exact out."
            )
        self.gates = gates
        self.optimizer = None if self.gate_lr == 0 else GateOptimizer(gates, self.gate_lr or default_rate(steps))
        if self.tracks_difference:
            gates.track_difference()

    def state(self) -> dict[str, Any]:
        """Return the state that a checkpoint must hold; transformers writes it into trainer_state.json.

        It includes the gates, because PEFT's checkpoints hold adapters only. JSON keeps every bit of a float32.
        """
        # The gates are also in files beside it (see `on_save`): a Trainer that resumes, or loads its best model, gives
        # callbacks no folder, only this state; `load_gated` needs constants, unit and blocks as well, and no Trainer.
        values = {
            str(layer): {"log_alpha_bias": gate.stored.tolist(), "difference": gate.difference.tolist()}
            for layer, gate in self.gates
        }
        parts = {"target": self.target, "optimizer": self.optimizer}
        states = {name: None if part is None else part.state() for name, part in parts.items()}
        budget = {"budget": BudgetTarget.__name__} if isinstance(self.target, BudgetTarget) else {}
        return {"args": {**self.given, **budget}, "attributes": {"saved": {"gates": values, **states}}}

    def metrics(self) -> dict[str, float]:
        """Return the last step's numbers: λ, L0, shares of closed gates, share of the budget, open units per layer."""
        values = {"lambda": self.strength, "l0": self.last_l0, "sparsity": self.gates.sparsity}
        if self.gates.choices.has_blocks:
            values["block_sparsity"] = self.gates.block_sparsity
        if isinstance(self.target, BudgetTarget):
            values["budget"] = self.target.expected(self.gates) / self.target.costs.total
        for key, gate in self.gates:
            values[f"{key.kind}s/layer_{key.layer}"] = float(gate.is_open.sum())
        return values

    def on_init_end(self, *_: Any, **kwargs: Any) -> None:
        """Install the check of weights to resume from, because the Trainer loads them before its other callbacks."""
        if self.same_gates is not None:
            self.same_gates.remove()
        self.same_gates = SameGates(kwargs["model"])

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, *_: Any, **kwargs: Any) -> None:
        """Check that the gates will learn, and continue from a checkpoint if there is one."""
        if self.same_gates is not None:
            self.same_gates.remove()
        require_supported(args)
        require_gradients(kwargs["model"], "SparsityCallback's gates")
        # A training has one state for all callbacks, and the next has another.
        if hasattr(state, _HAS_BEGUN):
            raise InputError(
                "One SparsityCallback was expected, but the Trainer has two, which would both move its gates; give it "
                "one."
            )
        setattr(state, _HAS_BEGUN, True)
        self._take(self._gates_in(kwargs["model"]), state.max_steps)
        if self.target is not None:
            self.target.begin(self.gates, state.max_steps)
        self.restore(state)
        if self.target is None or not self.target.exact:
            # What an earlier phase may have left.
            self.gates.draw_exactly(())
        trained = {id(parameter) for group in kwargs["optimizer"].param_groups for parameter in group["params"]}
        held = set(kwargs["model"].modules())
        for layer, gate in self.gates:
            if not gate.log_alpha_bias.requires_grad:
                raise InputError(
                    f"The gates of layer {layer} are frozen (requires_grad is False); freeze weights, or wrap the "
                    "model with PEFT, before deadhead.attach, and make the Trainer afterwards."
                )
            if id(gate.log_alpha_bias) not in trained or gate not in held:
                raise InputError(
                    f"The gates of layer {layer} are not among the parameters that the optimizer trains; attach the "
                    "gates to the same model that the Trainer gets, after PEFT has wrapped it and before the Trainer "
                    "makes its optimizer (with model_init: inside it, and give SparsityCallback no gates)."
                )

    def _gates_in(self, model: nn.Module) -> HeadGates:
        """Return the gates to train in the Trainer's model, which may be wrapped."""
        found, modules = gates_of(model), set(model.modules())
        if found is None and not any(gate in modules for _, gate in self.gates):
            if getattr(getattr(model, "config", None), "head_plan", None) is not None:
                raise InputError(
                    "The Trainer's model was cut, and deadhead.cut removes the gates; to train it further, make a new "
                    "Trainer without SparsityCallback; to prune more, attach gates to it first."
                )
            raise InputError(
                "The Trainer's model has no gates; attach them with deadhead.attach before you make the Trainer, or "
                "in its model_init."
            )
        return found if self.finds_gates and found is not None else self.gates

    def restore(self, state: TrainerState) -> None:
        """Continue from the checkpoint that `state` was read from; a new state changes nothing."""
        # A dictionary when it was read from a checkpoint; declared as the list it is made of.
        saved = cast(dict[str, Any], state.stateful_callbacks or {}).get(type(self).__name__)
        if not state.global_step or not saved:
            return
        attributes = saved["attributes"]
        attributes = attributes.get("saved", attributes)
        for part, name in ((self.target, "target"), (self.optimizer, "optimizer")):
            if part is not None and attributes.get(name):
                part.load_state(attributes[name])
        with torch.no_grad():
            for layer, gate in self.gates:
                if values := attributes.get("gates", {}).get(str(layer)):
                    if (count := len(values["log_alpha_bias"])) != gate.num_heads:
                        raise InputError(
                            f"The checkpoint has {count} gates of layer {layer}, but the model has {gate.num_heads}; "
                            "attach them as they were attached before, with the same unit and blocks."
                        )
                    gate.set_stored(torch.tensor(values["log_alpha_bias"]))
                    gate.difference.copy_(torch.tensor(values["difference"]))

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, *_: Any, **kwargs: Any) -> None:
        """Make the noise of this step depend on its number only."""
        self.gates.begin_step(state.global_step)
        if self.target is not None:
            self.target.prepare(self.gates, state.global_step)

    def on_pre_optimizer_step(self, args: TrainingArguments, state: TrainerState, *_: Any, **kwargs: Any) -> None:
        """Add λ(t) · ∂L0 to the gates' gradients after clipping, and run a step of their optimizer."""
        if state.global_step == 0 and all(gate.log_alpha_bias.grad is None for _, gate in self.gates):
            raise InputError(
                "No gradient of the loss reached the gates; train the model that they are attached to, not a copy."
            )
        warmup = min(1000, steps_within(None, state.max_steps)) if self.warmup_steps is None else self.warmup_steps
        self.strength = self.l0 * linear_warmup(state.global_step, warmup) if self.target is None else 0.0
        self.gates.average_difference()
        self.last_l0 = float(self.gates.l0().detach())
        penalty = penalty_gradient(self.gates, self.strength, self.weighting)
        if self.optimizer is not None:
            self.optimizer.step(penalty)
            return
        for (_, gate), gradient in zip(self.gates, penalty, strict=True):
            found = gate.log_alpha_bias.grad
            gradient = share_out(gradient, gate.log_alpha_bias)
            gate.log_alpha_bias.grad = gradient if found is None else found + gradient

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Move the gates towards the target."""
        if self.optimizer is None:
            self.gates.gather()
        else:
            self.optimizer.hold()
        if self.target is not None:
            is_last = state.global_step >= state.max_steps
            self.target.project(self.gates, state.global_step, self.weighting, is_last=is_last)

    def on_save(self, args: TrainingArguments, state: TrainerState, *_: Any, **kwargs: Any) -> None:
        """Write the gates' files next to the files that the Trainer saved."""
        name = f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        # In a search of hyperparameters each trial has a folder of its own.
        found = list(Path(str(args.output_dir)).glob(f"*/{name}" if state.is_hyper_param_search else name))
        if found and args.should_save:
            save_gates(self.gates, max(found, key=lambda folder: folder.stat().st_mtime))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop exact draws; restore the gates of the best model, if it was loaded."""
        self.gates.draw_exactly(())
        is_main = state.is_world_process_zero
        best = Path(state.best_model_checkpoint or "") / TRAINER_STATE_NAME
        is_best, end, hint = args.load_best_model_at_end and best.is_file(), "Training ended at", ""
        if is_best:
            # The weights are loaded, but adapters come without gates, and FSDP2's gates have been copied before.
            state = TrainerState.load_from_json(str(best))
            self.restore(state)
            end, hint = "The best model is that of", "; with eval_delay only later models are compared"
        if self.target is None:
            return
        if is_best and state.global_step >= self.target.ramp_steps:
            self.gates.settle(self.target.plan(self.gates))
        if (shortfall := self.target.shortfall(self.gates)) and is_main:
            warnings.warn(
                f"{end} step {state.global_step} of {state.max_steps}, where the gates {shortfall}{hint}.",
                RunWarning,
                stacklevel=2,
            )

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Add the gates' numbers to training logs."""
        if "loss" in kwargs["logs"]:
            add_to_log(state, kwargs["logs"], self.metrics())
