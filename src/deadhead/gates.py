"""The gates of a model: one hard-concrete variable for each unit, a head or a block (see `hard_concrete`)."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from deadhead.errors import InputError
from deadhead.hard_concrete import GateConfig, gate_values, l0_probability, soft_values
from deadhead.plan import BlockPlan, HeadPlan, Layer, Unit, is_block_key, plain_key
from deadhead.ranking import HeadScores, Ranking
from deadhead.sharding import is_sharded, overwrite, whole

# Forwards from one measurement of the output differences to the next: measuring takes as long as a projection.
_MEASURE_EVERY = 10
# Weight of the newest measurement in the running output differences.
_DIFFERENCE_RATE = 0.4


class HeadGate(nn.Module):
    """The gates of one layer's heads, or of its blocks, to which all that is said of heads applies.

    The one parameter is stored as log_alpha / lr_scale, so that an Adam-like optimizer with one learning rate would
    move log_alpha lr_scale times as fast; "bias" in its name keeps it out of weight decay in transformers' Trainer. It
    stays float32 whatever the model is cast to.

    Where heads are cut while training goes on, their gates stay here, shut for good: noise, output scale and the
    optimizer's state of the others do not change.

    Under FSDP2 the parameter is a slice for each process, and every process has a copy of the whole (see `stored`).

    Args:
        num_heads: H, heads this layer has now.
        config: the gates' constants.
        cost: what an open gate costs in the sparsity loss; a head costs 1.
    """

    noise: Tensor
    difference: Tensor
    kept: Tensor

    def __init__(self, num_heads: int, config: GateConfig, cost: float = 1.0) -> None:
        super().__init__()
        self.config = config
        self.cost = cost
        self.log_alpha_bias = nn.Parameter(torch.full((num_heads,), config.init / config.lr_scale))
        self.register_buffer("noise", torch.full((num_heads,), 0.5), persistent=False)
        self.register_buffer("difference", torch.zeros(num_heads))
        self.register_buffer("kept", torch.arange(num_heads), persistent=False)
        self.track_difference = False
        self.measures_now = False
        self._idle: tuple[int, ...] | None = ()
        # With several processes: what this one measured in this step, and the average that the step began with.
        self.measured: list[Tensor] = []
        self._average_before: Tensor | None = None
        # All of a sharded parameter, if it is known. (Its version would not tell: optimizers do not count it up.)
        self._gathered: Tensor | None = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> HeadGate:
        def keep_float32(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if tensor.is_meta else tensor.to(moved.device)

        super()._apply(keep_float32, recurse)
        return self

    @property
    def num_heads(self) -> int:
        """H, the number of gates."""
        return self.log_alpha_bias.shape[0]

    @property
    def is_whole(self) -> bool:
        """Whether all of the heads are still in the module."""
        return len(self.kept) == self.num_heads

    @property
    def stored(self) -> Tensor:
        """The parameter as it is stored, log_alpha / lr_scale, shape (H,); gradients can be taken by it.

        Outside the layer's forward FSDP2 leaves each process a slice. Then this is a copy of the whole. It is gathered
        the first time it is read after a forward in training mode, by all processes together; after that each may read
        it on its own.
        """
        parameter = self.log_alpha_bias
        if not is_sharded(parameter):
            return parameter
        if self._gathered is None:
            self._gathered = whole(parameter).requires_grad_()
        return self._gathered

    def forget_gathered(self) -> None:
        """Take note that an optimizer may have changed a sharded parameter."""
        self._gathered = None

    @property
    def log_alpha(self) -> Tensor:
        """The gates' parameters at full scale, shape (H,)."""
        return self.stored * self.config.lr_scale

    @property
    def open_probability(self) -> Tensor:
        """Chance that a head is open in a training draw, shape (H,): σ(log_alpha) for hard gates, P(z > 0) for soft."""
        return torch.sigmoid(self.log_alpha.detach() - self.config.beta * self.config.open_threshold)

    @property
    def is_open(self) -> Tensor:
        """Which heads are open in evaluation, bool, shape (H,)."""
        # By the value itself, so that rounding at the threshold cannot make the plan differ from the forward pass.
        return self.is_kept & (gate_values(self.log_alpha.detach(), self.config) > 0)

    @property
    def is_kept(self) -> Tensor:
        """Which heads are still in the module, bool, shape (H,)."""
        return torch.zeros_like(self.difference, dtype=torch.bool).index_fill(0, self.kept, True)

    @property
    def idle(self) -> tuple[int, ...]:
        """Heads that need not be computed in this forward, by their place among those in the module.

        In this training draw their z is 0 and has no gradient.
        """
        if not self.training or self.noise.is_meta:
            return ()
        if self._idle is None:
            z_H = soft_values(self.log_alpha.detach(), self.config, self.noise)
            self._idle = tuple((z_H[self.kept] == 0).nonzero().flatten().tolist())
        return self._idle

    def keep(self, kept: Sequence[int]) -> None:
        """Take note that only these of the H heads are left in the module, ascending."""
        self.kept = torch.tensor(kept, dtype=torch.long, device=self.kept.device)
        self._idle = None

    def draw(self, noise: Tensor, *, measure: bool) -> None:
        """Take over the noise of a training draw, uniform in (0, 1), shape (H,).

        Args:
            noise: u.
            measure: whether this forward updates the output differences, for which every head is computed.
        """
        self.noise.copy_(noise)
        self.measures_now = measure and self.track_difference
        self._idle = () if self.measures_now else None

    def set_log_alpha(self, values: Tensor) -> None:
        """Overwrite log_alpha, shape (H,); all processes write the same."""
        with torch.no_grad():
            self.set_stored(values / self.config.lr_scale)

    def set_stored(self, values: Tensor) -> None:
        """Overwrite the parameter as it is stored, shape (H,); all processes write the same."""
        overwrite(self.log_alpha_bias, values)
        if is_sharded(self.log_alpha_bias):
            self._gathered = values.detach().to(self.log_alpha_bias.device, copy=True).requires_grad_()

    @torch.no_grad()
    def measure(self, alone_H: Tensor, together: Tensor) -> None:
        """Update the running average of the output differences by one batch of this process.

        Args:
            alone_H: Σ ‖W_O^h a_h‖² over the batch's tokens, of the heads in the module.
            together: Σ ‖Σ_open W_O a‖² over them, 0-dimensional.
        """
        # Gradient checkpointing runs the forward again in the backward pass; one measurement a draw is enough.
        self.measures_now = False
        if _processes() > 1:
            if not self.measured:
                self._average_before = self.difference.clone()
            self.measured.append(torch.cat([alone_H, together[None]]))
        self._average(alone_H, together)

    def _average(self, alone_H: Tensor, together: Tensor) -> None:
        difference_H = relative_difference(alone_H, together)
        first = not bool(self.difference.any())
        average_H = self.difference[self.kept].lerp(difference_H, 1.0 if first else _DIFFERENCE_RATE)
        self.difference.index_copy_(0, self.kept, average_H)

    @torch.no_grad()
    def measured_by_all(self, sums: Sequence[Tensor]) -> None:
        """Put in place of what this process measured in this step what all of them did, in the form of `measured`."""
        if self._average_before is not None:
            self.difference.copy_(self._average_before)
            for summed in sums:
                self._average(summed[:-1], summed[-1])
        self.forget_measured()

    def forget_measured(self) -> None:
        """Begin a step."""
        self.measured, self._average_before = [], None

    def forward(self) -> tuple[Tensor, Tensor]:
        """Return the gate values z of the heads in the module, and the output scale.

        Returns:
            z (H,), or of fewer heads where some were cut in training; H / (open gates), a constant for the backward
            pass (0-dimensional), where H counts those that were cut too.
        """
        z_H = gate_values(self.log_alpha, self.config, self.noise if self.training else None)
        if not self.is_whole:
            z_H = z_H[self.kept]
        if not self.config.output_scale:
            return z_H, z_H.new_ones(())
        num_open = (z_H.detach() > 0).sum().clamp(min=1)
        return z_H, self.num_heads / num_open.to(z_H.dtype)


class HeadGates:
    """All gates of one model, in the order of its layers. Made by `deadhead.attach`.

    Args:
        gates: the gates by layer.
        heads: by layer, the index in the original dense model of each head there is now.
        total: heads of each layer of the original dense model; layers that have lost all heads are in it too.
        unit: what a gate opens and closes.
        config: the gates' constants.
        block_size: size of the blocks that have gates too, or None. All mappings then have their keys as well.
        headless: keys of blocks that went with the last head of their layer; what a plan says of them means nothing.
    """

    def __init__(
        self,
        gates: Mapping[Layer, HeadGate],
        *,
        heads: Mapping[Layer, tuple[int, ...]],
        total: Mapping[Layer, int],
        unit: Unit,
        config: GateConfig,
        block_size: int | None = None,
        headless: Sequence[Layer] = (),
    ) -> None:
        self.gates = dict(gates)
        self.heads = dict(heads)
        self.total = dict(total)
        self.unit = unit
        self.config = config
        self.block_size = block_size
        self.headless = frozenset(headless)
        self._step = 0
        self._micro_batch = 0
        self._exactly: list[tuple[list[HeadGate], int]] = []

    @property
    def present(self) -> dict[Layer, tuple[int, ...]]:
        """By layer, the heads that are in the model now, which training may have cut some of, as in `heads`."""
        return {
            layer: tuple(heads[place] for place in self.gates[layer].kept.tolist()) if layer in self.gates else ()
            for layer, heads in self.heads.items()
        }

    def __iter__(self) -> Iterator[tuple[Layer, HeadGate]]:
        return iter(self.gates.items())

    def __len__(self) -> int:
        """Return the number of gates."""
        return sum(gate.num_heads for gate in self.gates.values())

    def begin_step(self, step: int) -> None:
        """Tell which optimizer step comes next: noise is a function of seed, step and forward within the step."""
        self._step, self._micro_batch = step, 0
        for gate in self.gates.values():
            gate.forget_measured()

    def draw(self) -> None:
        """Draw fresh noise for every gate, equal on all ranks. Every forward in training mode begins with it."""
        # torch's CPU generator takes 32 bits of a seed, so the three numbers are hashed into as many.
        key = f"{self.config.seed} {self._step} {self._micro_batch}".encode()
        seed = int.from_bytes(hashlib.blake2b(key, digest_size=4).digest(), "little")
        generator = torch.Generator().manual_seed(seed)
        epsilon = self.config.epsilon
        noise = {
            gate: torch.rand(gate.num_heads, generator=generator) * (1 - 2 * epsilon) + epsilon
            for gate in self.gates.values()
        }
        for group, count in self._exactly:
            noise |= _subset_noise({gate: noise[gate] for gate in group}, count, self.config)
        for gate, u_H in noise.items():
            gate.draw(u_H, measure=(self._step + self._micro_batch) % _MEASURE_EVERY == 0)
            gate.forget_gathered()
        self._micro_batch += 1

    def draw_exactly(self, groups: Sequence[tuple[list[HeadGate], int]]) -> None:
        """Let draws open exactly so many gates of each group, until told otherwise; () lets each gate decide alone."""
        self._exactly = list(groups)

    def track_difference(self, on: bool = True) -> None:
        """Measure each head's output difference in one training forward of ten (see `HeadGate.difference`)."""
        for gate in self.gates.values():
            gate.track_difference = on

    def average_difference(self) -> None:
        """Take the output differences of this step over the tokens of all processes, as one with all rows would.

        Each process measured its own batches. All must call this, before the step ends.
        """
        measured = [sums for gate in self.gates.values() for sums in gate.measured]
        if _processes() == 1 or not measured:
            return
        summed = torch.cat(measured)
        torch.distributed.all_reduce(summed)
        parts = iter(summed.split([len(sums) for sums in measured]))
        for gate in self.gates.values():
            gate.measured_by_all([next(parts) for _ in gate.measured])

    def gather(self) -> None:
        """Bring the copies of sharded gates up to date, in all processes together; without FSDP2 nothing is done.

        Afterwards each process may read gates on its own, until the next forward in training mode.
        """
        for gate in self.gates.values():
            gate.forget_gathered()
            _ = gate.stored

    def log_alpha(self) -> dict[Layer, Tensor]:
        """Return log_alpha by layer, detached, on the CPU."""
        return {layer: gate.log_alpha.detach().cpu() for layer, gate in self}

    def open_probability(self) -> dict[Layer, Tensor]:
        """Return by layer the chance that a head is open in a training draw, on the CPU."""
        return {layer: gate.open_probability.cpu() for layer, gate in self}

    def difference(self) -> dict[Layer, Tensor]:
        """Return by layer the running relative output difference d_h of each head, on the CPU; 0 if never measured."""
        return {layer: gate.difference.cpu() for layer, gate in self}

    def l0(self) -> Tensor:
        """Return the L0 sparsity loss, Σ over layers and heads of P(z > 0), with gradient (0-dimensional).

        A block counts as much as its share of a head's parameters.
        """
        summands = [l0_probability(gate.log_alpha, self.config).sum() * gate.cost for _, gate in self]
        return torch.stack(summands).sum() if summands else torch.zeros(())

    @property
    def sparsity(self) -> float:
        """Share of the heads' gates that are closed in evaluation, in [0, 1]."""
        return _closed_share([gate for key, gate in self if not is_block_key(key)])

    @property
    def block_sparsity(self) -> float:
        """Share of the blocks' gates that are closed in evaluation, in [0, 1]."""
        return _closed_share([gate for key, gate in self if is_block_key(key)])

    def plan(self, *, sparsity: float | None = None, ranking: Ranking = "global") -> HeadPlan:
        """Return the plan that keeps the heads open now.

        Args:
            sparsity: close exactly this share of the gates instead, those with the smallest log_alpha. Heads that
                training has cut already are among them, even if they are more.
            ranking: with `sparsity`, "global" compares the gates of all layers; "layer" closes the same share of each.
        """
        if sparsity is not None:
            return self.scores().plan(sparsity, ranking=ranking)
        is_open = {layer: gate.is_open.cpu() for layer, gate in self}
        kept = {
            layer: tuple(head for head, opened in zip(heads, is_open[layer].tolist(), strict=True) if opened)
            if layer in is_open
            else ()
            for layer, heads in self.heads.items()
        }
        return self.plan_of(kept)

    def plan_of(self, kept: Mapping[Layer, Sequence[int]]) -> HeadPlan:
        """Return the plan that keeps some units, given by key."""
        return HeadPlan.of_units(
            kept,
            self.total,
            unit=self.unit,
            output_scale=self.config.output_scale,
            block_size=self.block_size,
        )

    def scores(self) -> HeadScores:
        """Return log_alpha as scores; units that training has cut already must go."""
        return HeadScores(
            scores={layer: torch.where(gate.is_kept, gate.log_alpha.detach(), -math.inf).cpu() for layer, gate in self},
            heads=self.heads,
            total=self.total,
            unit=self.unit,
            output_scale=self.config.output_scale,
            block_size=self.block_size,
        )

    def lean(self, scores: HeadScores, *, spread: float) -> None:
        """Move log_alpha apart, in even steps in the order of the heads' scores.

        Gates then begin with an opinion, which training may change; draws differ where it is weakest.

        Args:
            scores: of the heads there are.
            spread: standard deviation of what is added to log_alpha.
        """
        if not len(self):
            return
        if not all(gate.is_whole for _, gate in self):
            raise InputError("Gates of heads that training has cut cannot begin anew to lean; attach fresh ones.")
        values = torch.cat([scores.scores[layer] for layer in self.gates])
        if bool(values.isnan().any()):
            raise InputError("Some heads have a score that is not a number, so gates cannot lean by it.")
        ranks = values.argsort(stable=True).argsort().float()
        ranks = (ranks - ranks.mean()) / ranks.std(correction=0).clamp(min=1e-6)
        for (_, gate), part in zip(self, ranks.split([gate.num_heads for _, gate in self]), strict=True):
            gate.set_log_alpha(gate.log_alpha + spread * part.to(gate.log_alpha_bias.device))

    def set_plan(self, plan: HeadPlan) -> None:
        """Close the gates of the units that `plan` drops and open the others; take over its output scale.

        Blocks of which the plan says nothing stay.

        Raises:
            InputError: the plan is of another model or unit, or keeps a head that was cut before.
        """
        units = self.require_plan(plan)
        config = replace(self.config, output_scale=plan.output_scale)
        self.config = config
        for layer, gate in self:
            kept = set(units[layer])
            # Beyond saturation soft gates are exactly 0 or 1 too, so the plan holds exactly for both kinds.
            strength = max(abs(config.init), 3.0, config.saturation + 0.5)
            values = [strength if head in kept else -strength for head in self.heads[layer]]
            gate.config = config.for_gate(of_blocks=is_block_key(layer))
            gate.set_log_alpha(torch.tensor(values, device=gate.log_alpha_bias.device))

    def require_plan(self, plan: HeadPlan) -> dict[Layer, tuple[int, ...]]:
        """Check that `plan` is one for this model.

        Returns:
            The units that stay, by key; blocks of which the plan says nothing are among them, and none that went with
            the heads of their layer.

        Raises:
            InputError: its unit, layers or numbers differ, or it keeps a head that was cut before.
        """
        if plan.unit != self.unit:
            raise InputError(
                f"The head plan counts in {plan.unit}s, but this model's gates open and close {self.unit}s."
            )
        total = {layer: count for layer, count in self.total.items() if not is_block_key(layer)}
        if dict(plan.total) != total:
            raise InputError(
                f"The head plan is for {_counts(plan.total)} heads a layer, but this model had {_counts(total)}."
            )
        kept = plan.units
        units = {
            layer: () if layer in self.headless else kept.get(layer, heads) for layer, heads in self.present.items()
        }
        if plan.blocks is not None:
            self._require_blocks(plan.blocks)
        for layer, heads in self.present.items():
            gone = sorted(set(units[layer]) - set(heads))
            if gone:
                what = "block" if is_block_key(layer) else "head"
                raise InputError(
                    f"The head plan keeps {what} {gone[0]} of layer {plain_key(layer)}, but that {what} was cut before."
                )
        return units

    def _require_blocks(self, blocks: BlockPlan) -> None:
        if self.block_size is None:
            raise InputError(
                "The head plan also names blocks, but this model's gates are on heads alone; attach them with "
                f"deadhead.attach(model, blocks={blocks.size})."
            )
        total = {plain_key(key): count for key, count in self.total.items() if is_block_key(key)}
        if blocks.size != self.block_size or dict(blocks.total) != total:
            raise InputError(
                f"The head plan is for {_counts(blocks.total)} blocks of {blocks.size} a layer, but this model had "
                f"{_counts(total)} of {self.block_size}."
            )

    def state_dict(self) -> dict[str, Tensor]:
        """Return log_alpha and the measured output differences of every layer, for saving."""
        return {
            f"{layer}.{name}": value.detach().cpu().clone()
            for layer, gate in self
            for name, value in (("log_alpha", gate.log_alpha), ("difference", gate.difference))
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state_dict` returned.

        Raises:
            InputError: the state is of other layers or numbers of heads, or has values that are not finite.
        """
        expected: dict[str, Any] = {name: value.shape for name, value in self.state_dict().items()}
        if {name: value.shape for name, value in state.items()} != expected:
            raise InputError(f"The saved gates do not fit this model, which has {_counts(self.total)} heads a layer.")
        for name, value in state.items():
            if not value.is_floating_point() or not bool(value.isfinite().all()):
                raise InputError(f"The saved gates have values in {name} that are not finite numbers.")
        for layer, gate in self:
            gate.set_log_alpha(state[f"{layer}.log_alpha"].to(gate.log_alpha_bias.device))
            gate.difference.copy_(state[f"{layer}.difference"])


def relative_difference(alone_H: Tensor, together: Tensor) -> Tensor:
    """Return d_h = ‖W_O^h a_h‖ / ‖Σ_open W_O a‖, root mean squares over tokens, from the sums of squares, (H,)."""
    return (alone_H / together.clamp(min=1e-12)).clamp(min=0).sqrt().clamp(max=1e3)


def _processes() -> int:
    """Return how many processes train together."""
    ready = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if ready else 1


def _subset_noise(noise: Mapping[HeadGate, Tensor], count: int, config: GateConfig) -> dict[HeadGate, Tensor]:
    """Return noise u with which `count` of the gates are open: those with the largest log_alpha + Gumbel noise.

    A hard gate is open where ln u − ln(1 − u) + log_alpha is above a constant, 0 by default, so u is σ of the Gumbel
    noise minus a threshold between the last that is open and the first that is not; the gradient is that of the
    hard-concrete gate with this noise (relaxed subset sampling with a straight-through estimator).
    """
    gumbel = torch.cat([-(-u_H.log()).log() for u_H in noise.values()])
    values = torch.cat([gate.log_alpha.detach().cpu() for gate in noise])
    # Heads that training has cut are never open.
    values = torch.where(torch.cat([gate.is_kept.cpu() for gate in noise]), values, -math.inf)
    ordered = (values + gumbel).sort(descending=True).values
    ordered = torch.cat([ordered[:1] + 2, ordered, torch.full((1,), -math.inf)])
    upper, lower = float(ordered[count]), float(ordered[count + 1])
    threshold = (upper + lower) / 2 if lower > -math.inf else upper - 1
    shifted = torch.sigmoid(gumbel - threshold + config.beta * config.open_threshold)
    shifted = shifted.clamp(config.epsilon, 1 - config.epsilon)
    return dict(zip(noise, shifted.split([gate.num_heads for gate in noise]), strict=True))


def _closed_share(gates: Sequence[HeadGate]) -> float:
    return 1.0 - sum(int(gate.is_open.sum()) for gate in gates) / max(sum(gate.num_heads for gate in gates), 1)


def _counts(total: Mapping[Layer, int]) -> str:
    return "[" + ", ".join(str(count) for count in total.values()) + "]"
