"""All gates of a model: their noise, their sparsity loss, and the plan that they represent."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from deadhead.errors import InputError, typed
from deadhead.gates.hard_concrete import GateConfig, l0_probability
from deadhead.gates.head_gate import HeadGate
from deadhead.plans.choices import Choices
from deadhead.plans.kinds import Ranking
from deadhead.plans.plan import HeadPlan, Unit, UnitKey
from deadhead.plans.scores import HeadScores

# Output differences are measured once in this many forward passes.
_MEASURE_EVERY = 10
# How far `settle` keeps log_alpha from the threshold of evaluation, where rounding could decide.
_CLEAR = 0.01


@dataclass(eq=False, repr=False)
class HeadGates:
    """All gates of one model, in the order of its layers. `deadhead.attach` makes them.

    `len(gates)` is the number of gates; iteration yields pairs of a `UnitKey` and the `HeadGate` of that layer.

    Args:
        gates: the gates of each layer's heads or blocks of hidden units, by key.
        choices: what each gate opens and closes.
        config: the gates' constants.
    """

    gates: Mapping[UnitKey, HeadGate]
    _: KW_ONLY
    choices: Choices
    config: GateConfig
    _step: int = field(default=0, init=False)
    _micro_batch: int = field(default=0, init=False)
    _exactly: Sequence[tuple[list[HeadGate], int]] = field(default=(), init=False)

    def __post_init__(self) -> None:
        blocks = self.choices.blocks
        for key, gate in self.gates.items():
            gate.settings = {"key": str(key), "unit": self.unit}
            if key.kind == "block":
                gate.settings["blocks"] = {str(key.layer): blocks[key.layer]}

    def __iter__(self) -> Iterator[tuple[UnitKey, HeadGate]]:
        return iter(self.gates.items())

    def __len__(self) -> int:
        """Return the number of gates."""
        return sum(gate.num_heads for gate in self.gates.values())

    @property
    def unit(self) -> Unit:
        """What a head's gate opens and closes: a query "head" or a "kv_group"."""
        return self.choices.unit

    def begin_step(self, step: int) -> None:
        """Begin an optimizer step. Noise is a function of seed, step and forward pass within the step.

        All processes must call this together, because it gathers sharded gates.

        Args:
            step: number of the step.
        """
        self._step, self._micro_batch = step, 0
        for gate in self.gates.values():
            gate.measured = []
        self.gather()

    def draw(self) -> None:
        """Draw fresh noise for every gate, the same in all processes. Each forward pass in training mode calls this."""
        # torch's CPU generator takes 32 bits of a seed, so the three numbers are hashed into 32 bits.
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
        self._micro_batch += 1

    def draw_exactly(self, groups: Sequence[tuple[list[HeadGate], int]]) -> None:
        """Make draws open exactly a given number of gates in each group, until the next call.

        Args:
            groups: pairs of gates and the number of heads that stay open in them. With () each gate is drawn alone.
        """
        self._exactly = groups

    @typed
    def track_difference(self, on: bool = True) -> None:
        """Switch the measurement of each head's output difference on or off.

        It is measured in one of ten training forward passes. A measurement takes as long as a projection and does not
        change the training.
        """
        for gate in self.gates.values():
            gate.tracks_difference = on

    @property
    def tracks_difference(self) -> bool:
        """Whether training measures output differences."""
        return any(gate.tracks_difference for gate in self.gates.values())

    @torch.no_grad()
    def average_difference(self) -> None:
        """Compute this step's output differences from the tokens of all processes, as one process with all rows would.

        All processes must call this together, before the step ends.
        """
        measuring = [gate for gate in self.gates.values() if gate.measured]
        if not measuring:
            return
        measured = [sums for gate in measuring for sums in gate.measured]
        summed = torch.cat(measured)
        torch.distributed.all_reduce(summed)
        parts = iter(summed.split([len(sums) for sums in measured]))
        for gate in measuring:
            gate.difference.copy_(gate.before)
            for sums in [next(parts) for _ in gate.measured]:
                gate.add_difference(sums[:-1], sums[-1])
            gate.measured = []

    def gather(self) -> None:
        """Gather sharded gates, so that each process can read them until an optimizer changes them.

        All processes must call this together.
        """
        for gate in self.gates.values():
            gate.gather()

    def log_alpha(self) -> dict[UnitKey, Tensor]:
        """Return log_alpha of each gate, (H,) by key, detached, on the CPU."""
        self._require_values()
        return {key: gate.log_alpha.detach().cpu() for key, gate in self}

    def open_probability(self) -> dict[UnitKey, Tensor]:
        """Return the probability that each gate is open in a training draw, (H,) by key, on the CPU."""
        self._require_values()
        return {key: gate.open_probability.cpu() for key, gate in self}

    def difference(self) -> dict[UnitKey, Tensor]:
        """Return the running relative output difference d_h of each unit, (H,) by key, on the CPU; 0 if unmeasured."""
        self._require_values()
        return {key: gate.difference.cpu() for key, gate in self}

    def l0(self) -> Tensor:
        """Return the L0 sparsity loss, the sum of P(z > 0) over layers and heads, with gradient (0-dimensional).

        A block is weighted by its parameters over those of the mean head.
        """
        self._require_whole()
        summands = [l0_probability(gate.log_alpha, self.config).sum() * gate.cost for _, gate in self]
        return torch.stack(summands).sum() if summands else torch.zeros(())

    @property
    def sparsity(self) -> float:
        """The share of the heads' gates that are closed in evaluation, in [0, 1]."""
        self._require_values()
        return _closed_share([gate for key, gate in self if key.kind == "head"])

    @property
    def block_sparsity(self) -> float:
        """The share of the blocks' gates that are closed in evaluation, in [0, 1]."""
        self._require_values()
        return _closed_share([gate for key, gate in self if key.kind == "block"])

    def _require_values(self) -> None:
        """Check that the gates have values; those of a model on the meta device have none."""
        if any(gate.log_alpha_bias.is_meta for _, gate in self):
            raise InputError(
                "The gates have no values because their model is on the meta device, without weights; attach gates to "
                "a model whose weights are loaded."
            )
        self._require_whole()

    def _require_whole(self) -> None:
        """Check that FSDP1 has not flattened the gates: outside a forward pass they would be pieces, or outdated."""
        if not all(gate.is_whole for _, gate in self):
            raise InputError(
                "FSDP1 has flattened the gates into one parameter with other weights, so that they cannot learn "
                "sparsity; use FSDP2 (fully_shard), or read the gates in FSDP.summon_full_params(model)."
            )

    @typed
    def plan(self, *, sparsity: float | None = None, ranking: Ranking = "global") -> HeadPlan:
        """Return the head plan that keeps the heads whose gates are open now.

        Args:
            sparsity: drops exactly this share of the heads, in [0, 1], instead: those with the smallest log_alpha.
            ranking: with `sparsity`, "global" compares the gates of all layers; "layer" drops the same share of each.

        Raises:
            InputError: `sparsity` is out of range, `ranking` is set without it, or the gates cannot be read here.
        """
        if sparsity is not None:
            return self.scores().plan(sparsity, ranking=ranking)
        if ranking != "global":
            raise InputError("ranking says how a share of the gates is chosen; set sparsity too, or leave ranking out.")
        self._require_values()
        kept = {key: gate.is_open.nonzero().flatten().tolist() for key, gate in self}
        return self.choices.plan(kept, output_scale=self.config.output_scale)

    def scores(self) -> HeadScores:
        """Return log_alpha as the scores of heads and blocks."""
        return HeadScores(scores=self.log_alpha(), choices=self.choices, output_scale=self.config.output_scale)

    @typed
    def lean(self, scores: HeadScores, *, spread: float) -> None:
        """Spread log_alpha in even steps, in the order of the units' scores.

        Training then begins from the order of the scores and may change it; draws vary most for the units whose
        log_alpha is nearest to 0.

        Args:
            scores: a score for every unit.
            spread: standard deviation that the steps give log_alpha.

        Raises:
            InputError: a score is not a number, or `spread` is negative or not finite.
        """
        if not len(self):
            return
        values = torch.cat([scores.scores[key] for key in self.gates])
        if bool(values.isnan().any()):
            raise InputError("Some heads have a score that is not a number, so gates cannot be ordered by it.")
        if not 0 <= spread < math.inf:
            raise InputError(f"The spread of log_alpha must be a number that is not negative, but it is {spread}.")
        ranks = values.argsort(stable=True).argsort().float()
        ranks = (ranks - ranks.mean()) / ranks.std(correction=0).clamp(min=1e-6)
        for (_, gate), part in zip(self, ranks.split([gate.num_heads for _, gate in self]), strict=True):
            gate.set_log_alpha(gate.log_alpha + spread * part.to(gate.log_alpha_bias.device))

    @typed
    @torch.no_grad()
    def settle(self, plan: HeadPlan) -> None:
        """Move log_alpha so that evaluation closes exactly the units that `plan` drops.

        The units that go and those that stay move as two groups, and a group moves only if one of its units is on the
        wrong side. So the order of all units is kept if the plan drops those with the smallest log_alpha.
        """
        kept = self.choices.kept(plan)
        stays = torch.cat([torch.empty(0, dtype=torch.bool), *(kept[key] for key in self.gates)])
        values = torch.cat([torch.empty(0), *self.log_alpha().values()])
        threshold, before = self.config.open_threshold, values.clone()
        if bool(stays.any()):
            values[stays] += (threshold + _CLEAR - values[stays].min()).clamp(min=0)
        if not bool(stays.all()):
            values[~stays] -= (values[~stays].max() - threshold + _CLEAR).clamp(min=0)
        if not torch.equal(values, before):
            for (_, gate), part in zip(self, values.split([gate.num_heads for _, gate in self]), strict=True):
                gate.set_log_alpha(part)

    @typed
    def set_plan(self, plan: HeadPlan) -> None:
        """Close the gates of the units that `plan` drops, open the others, and use the plan's output scale.

        If the plan says nothing of hidden units, their gates are opened.

        Raises:
            InputError: the plan is for another model or unit, keeps a head that was cut before, or keeps only a part
                of a block.
        """
        kept = self.choices.kept(plan)
        self.config = config = replace(self.config, output_scale=plan.output_scale)
        for key, gate in self:
            # Beyond saturation soft gates are exactly 0 or 1 too, so the plan is exact for both kinds.
            strength = max(abs(config.init), 3.0, config.saturation + 0.5)
            values_H = torch.where(kept[key], strength, -strength)
            gate.config = config.for_gate(of_blocks=key.kind == "block")
            gate.set_log_alpha(values_H.to(gate.log_alpha_bias.device))

    def state_dict(self) -> dict[str, Tensor]:
        """Return log_alpha and the measured output differences, (H,) each, of every layer, for saving."""
        self._require_values()
        return {
            f"{key}.{name}": value.detach().cpu().clone()
            for key, gate in self
            for name, value in (("log_alpha", gate.log_alpha), ("difference", gate.difference))
        }

    @typed
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load what `state_dict` returned.

        Raises:
            InputError: the state has other layers or numbers of heads, or values that are not finite.
        """
        expected: dict[str, Any] = {name: value.shape for name, value in self.state_dict().items()}
        if {name: value.shape for name, value in state.items()} != expected:
            counts = [*self.choices.total.values()]
            raise InputError(f"The saved gates do not fit this model, which has {counts} heads a layer.")
        for name, value in state.items():
            if not value.is_floating_point() or not bool(value.isfinite().all()):
                raise InputError(f"The saved gates have values in {name} that are not finite numbers.")
        for key, gate in self:
            gate.set_log_alpha(state[f"{key}.log_alpha"].to(gate.log_alpha_bias.device))
            gate.difference.copy_(state[f"{key}.difference"])


def _subset_noise(noise: Mapping[HeadGate, Tensor], count: int, config: GateConfig) -> dict[HeadGate, Tensor]:
    """Return noise u that opens exactly `count` gates: those with the largest log_alpha + Gumbel noise.

    A hard gate is open if ln u − ln(1 − u) + log_alpha is above a constant, 0 by default. So u is σ(Gumbel noise −
    threshold), with the threshold between the last gate that opens and the first that does not. The gradient is that of
    the hard-concrete gate with this noise (relaxed subset sampling with a straight-through estimator).
    """
    gumbel = torch.cat([-(-u_H.log()).log() for u_H in noise.values()])
    values = torch.cat([gate.log_alpha.detach().cpu() for gate in noise])
    ordered = (values + gumbel).sort(descending=True).values
    ordered = torch.cat([ordered[:1] + 2, ordered, torch.full((1,), -math.inf)])
    upper, lower = float(ordered[count]), float(ordered[count + 1])
    threshold = (upper + lower) / 2 if lower > -math.inf else upper - 1
    shifted = torch.sigmoid(gumbel - threshold + config.beta * config.open_threshold)
    shifted = shifted.clamp(config.epsilon, 1 - config.epsilon)
    return dict(zip(noise, shifted.split([gate.num_heads for gate in noise]), strict=True))


def _closed_share(gates: Sequence[HeadGate]) -> float:
    return 1.0 - sum(int(gate.is_open.sum()) for gate in gates) / max(sum(gate.num_heads for gate in gates), 1)
