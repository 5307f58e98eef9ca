"""A callback that trains gates under the sparsity loss with any transformers Trainer."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from deadhead.errors import InputError, typed
from deadhead.gates.budget import BudgetTarget
from deadhead.gates.gates import HeadGates
from deadhead.gates.optimizer import GateOptimizer, default_rate
from deadhead.gates.penalty import SparsityTarget, Weighting, linear_warmup, penalty_gradient
from deadhead.gates.sharding import share_out
from deadhead.plans.kinds import Ranking
from deadhead.training.callbacks.logs import add_to_log
from deadhead.training.processes import require_supported


class SparsityCallback(TrainerCallback, ExportableState):
    """Trains gates under the sparsity loss, beside the Trainer's own optimizer, and draws their noise from the step.

    The sparsity loss does not depend on the batch, so the language-modelling loss stays as it is: reported losses are
    pure, clipping sees the language model's gradient only, and gradient accumulation counts the penalty once. Gates
    are kept out of weight decay without any change to the Trainer's optimizer.

    Args:
        gates: what `deadhead.attach` returned for the model being trained.
        l0: λ, what an open head costs, in nats a token. Not used with `sparsity`.
        warmup_steps: λ rises linearly from 0 over so many steps (paper, warm-up); 0 switches it off.
        sparsity: close this share of the gates, along a ramp, instead of paying λ for the open ones.
        ramp_steps: steps until the ramp reaches `sparsity`.
        budget: hold what the gates cost at a share of what the dense model costs (see `BudgetTarget`), instead.
        weighting: "plain" L0, or "output_difference": heads whose removal changes their layer's output least are
            pushed hardest.
        gate_lr: the rate of the gates' own optimizer (see `GateOptimizer`); None chooses it by the number of steps.
            0: they learn in the Trainer's, at `GateConfig.lr_scale` times the model's rate, as in the paper.
        ranking: with `sparsity`, "global" closes that share of all gates, "layer" of each layer's.
        exact: with `sparsity`, every draw leaves out exactly that share: differentiable subset pruning.
        track_difference: measure output differences also where they do not weight the loss (`gates.difference()`).

    Raises:
        InputError: an argument is out of range; at the start of training: the gates are not among the parameters that
            the optimizer trains, or DeepSpeed steps inside backward, where no gradient can be added.
    """

    @typed
    def __init__(
        self,
        gates: HeadGates,
        *,
        l0: float = 0.01,
        warmup_steps: int = 1000,
        sparsity: float | None = None,
        ramp_steps: int = 1000,
        budget: BudgetTarget | None = None,
        weighting: Weighting = "plain",
        gate_lr: float | None = None,
        ranking: Ranking = "global",
        exact: bool = False,
        track_difference: bool = False,
    ) -> None:
        if not 0 <= l0 < math.inf:
            raise InputError(f"l0 (λ of the sparsity loss) must be a number that is not negative, but it is {l0}.")
        if weighting not in ("plain", "output_difference"):
            raise InputError(f"weighting must be 'plain' or 'output_difference', but it is {weighting!r}.")
        if gate_lr is not None and not 0 <= gate_lr < math.inf:
            raise InputError(f"gate_lr must be a number that is not negative, or None, but it is {gate_lr}.")
        if exact and not gates.config.hard:
            raise InputError("exact draws need hard gates, which are open or closed; soft ones are partly open.")
        if exact and sparsity is None:
            raise InputError("exact draws leave out a share of the heads, so they need a target sparsity.")
        self.gates = gates
        self.l0 = l0
        self.warmup_steps = warmup_steps
        self.weighting: Weighting = weighting
        if sparsity is not None and budget is not None:
            raise InputError("sparsity and budget both say how much is to go; give one of the two.")
        self.target: SparsityTarget | BudgetTarget | None = budget
        if sparsity is not None:
            self.target = SparsityTarget(sparsity, ramp_steps=ramp_steps, ranking=ranking, exact=exact)
        self.gate_lr = gate_lr
        self.optimizer = None if gate_lr == 0 else GateOptimizer(gates, gate_lr or default_rate(1))
        self.strength = 0.0
        self.last_l0 = float("nan")
        if track_difference or weighting == "output_difference":
            gates.track_difference()

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint must hold; transformers writes it into trainer_state.json.

        The gates are in it too: PEFT's checkpoints hold adapters only. JSON keeps every bit of a float32.
        """
        values = {
            str(layer): {"log_alpha_bias": gate.stored.tolist(), "difference": gate.difference.tolist()}
            for layer, gate in self.gates
        }
        parts = {"target": self.target, "optimizer": self.optimizer}
        states = {name: None if part is None else part.state() for name, part in parts.items()}
        return {"args": {}, "attributes": {"gates": values, **states}}

    def metrics(self) -> dict[str, float]:
        """Return the last step's numbers: λ, L0, shares of closed gates, share of the budget, units open a layer."""
        values = {"lambda": self.strength, "l0": self.last_l0, "sparsity": self.gates.sparsity}
        if self.gates.block_size is not None:
            values["block_sparsity"] = self.gates.block_sparsity
        if isinstance(self.target, BudgetTarget):
            values["budget"] = self.target.expected(self.gates) / self.target.costs.total
        for key, gate in self.gates:
            values[f"{key.kind}s/layer_{key.layer}"] = float(gate.is_open.sum())
        return values

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, *_: Any, **kwargs: Any) -> None:
        """Check that the gates will learn, and go on where a checkpoint left off."""
        require_supported(args)
        if self.optimizer is not None and self.gate_lr is None:
            self.optimizer.lr = default_rate(state.max_steps)
        self.restore(state)
        if self.target is None or not self.target.exact:
            # What an earlier phase may have left.
            self.gates.draw_exactly(())
        trained = {id(parameter) for group in kwargs["optimizer"].param_groups for parameter in group["params"]}
        for layer, gate in self.gates:
            if id(gate.log_alpha_bias) not in trained:
                raise InputError(
                    f"The gates of layer {layer} are not among the parameters that the optimizer trains; attach the "
                    "gates to the very model that the Trainer gets, after PEFT has wrapped it and before the Trainer "
                    "makes its optimizer."
                )

    def restore(self, state: TrainerState) -> None:
        """Go on where the checkpoint that `state` was read from left off; a fresh state changes nothing."""
        # A dictionary when it was read from a checkpoint; declared as the list it is made of.
        saved = cast(dict[str, Any], state.stateful_callbacks or {}).get(type(self).__name__)
        if not state.global_step or not saved:
            return
        attributes = saved["attributes"]
        for part, name in ((self.target, "target"), (self.optimizer, "optimizer")):
            if part is not None and attributes.get(name):
                part.load_state(attributes[name])
        with torch.no_grad():
            for layer, gate in self.gates:
                if values := attributes.get("gates", {}).get(str(layer)):
                    gate.set_stored(torch.tensor(values["log_alpha_bias"]))
                    gate.difference.copy_(torch.tensor(values["difference"]))

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, *_: Any, **kwargs: Any) -> None:
        """Let the noise of this step depend on its number alone."""
        self.gates.begin_step(state.global_step)
        if self.target is not None:
            self.target.prepare(self.gates, state.global_step)

    def on_pre_optimizer_step(self, args: TrainingArguments, state: TrainerState, *_: Any, **kwargs: Any) -> None:
        """Add λ(t) · ∂L0 to the gates' gradients, after clipping, and let their optimizer step."""
        if state.global_step == 0 and all(gate.log_alpha_bias.grad is None for _, gate in self.gates):
            raise InputError(
                "No gradient of the loss reached the gates; train the model they were attached to, not a copy."
            )
        self.strength = self.l0 * linear_warmup(state.global_step, self.warmup_steps) if self.target is None else 0.0
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
        """Hold the target."""
        if self.optimizer is None:
            self.gates.gather()
        else:
            self.optimizer.hold()
        if self.target is not None:
            is_last = state.global_step >= state.max_steps
            self.target.project(self.gates, state.global_step, self.weighting, is_last=is_last)

    def on_train_end(self, *_: Any, **kwargs: Any) -> None:
        """Let each gate decide alone again."""
        self.gates.draw_exactly(())

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Add the gates' numbers to training logs."""
        if "loss" in kwargs["logs"]:
            add_to_log(state, kwargs["logs"], self.metrics())
