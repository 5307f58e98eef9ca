"""The gates of one layer: a hard-concrete variable for each of its heads, or its blocks (see `hard_concrete`)."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from deadhead.errors import InputError
from deadhead.gates.hard_concrete import GateConfig, gate_values, soft_values
from deadhead.gates.sharding import is_sharded, share_out, whole

# The weight of the newest measurement in the running average.
_RATE = 0.4


class HeadGate(nn.Module):
    """The gates of one layer's heads, or of blocks of its hidden units. What is said of heads here applies to blocks.

    The only parameter is stored as log_alpha / lr_scale, so that an Adam-like optimizer with one learning rate moves
    log_alpha lr_scale times as fast. "bias" in its name keeps transformers' Trainer from decaying it. It stays float32
    when the model is cast. Under FSDP2 each process holds a slice of the parameter, and a copy of the whole after
    `gather`.

    - The buffer `owner`, (F,), is the gate of each hidden unit; None for heads.
    - The buffer `difference`, (H,), is the running average of the heads' output differences (see
      `relative_difference`), measured in some training forward passes; 0 before the first. If there are several
      processes, each measures its own batches, and `HeadGates.average_difference` sets the mean.
    - `cost` is the cost of an open gate in the sparsity loss; a head costs 1.
    - `settings` holds what all gates of a model share besides the constants, and the key of these gates.
    """

    noise: Tensor
    difference: Tensor
    owner: Tensor | None

    def __init__(self, num_heads: int, config: GateConfig, cost: float = 1.0, owner_F: Tensor | None = None) -> None:
        super().__init__()
        self.config = config
        self.cost = cost
        self.settings: dict[str, Any] = {}
        self.log_alpha_bias = nn.Parameter(torch.full((num_heads,), config.init / config.lr_scale))
        self.register_buffer("noise", torch.full((num_heads,), 0.5), persistent=False)
        self.register_buffer("difference", torch.zeros(num_heads))
        self.register_buffer("owner", owner_F, persistent=False)
        self.tracks_difference = False
        # Whether the next forward pass measures.
        self.is_due = False
        # With several processes: what this process measured in this step, and the average at the step's start.
        self.measured: list[Tensor] = []
        self.before = self.difference
        self._computes_all = True
        # The whole of a sharded parameter.
        self._gathered: Tensor | None = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> HeadGate:
        def keep_float32(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if tensor.is_meta else tensor.to(moved.device)

        super()._apply(keep_float32, recurse)
        return self

    def get_extra_state(self) -> Tensor:
        """Return, as bytes of JSON, what a file of weights must hold so that gates can be attached again."""
        text = json.dumps({**asdict(self.config), **self.settings})
        return torch.tensor(list(text.encode()), dtype=torch.uint8, device="cpu")

    def set_extra_state(self, state: Any) -> None:
        """Do nothing: gates keep the constants that they were attached with."""

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        found = state_dict.get(f"{prefix}log_alpha_bias")
        if found is not None and found.numel() != self.num_heads:
            raise InputError(
                f"The checkpoint has {found.numel()} gates at {prefix[:-1]}, but the model has {self.num_heads}; "
                "attach them as they were attached before, with the same unit and blocks."
            )
        super()._load_from_state_dict(state_dict, prefix, *args)

    @property
    def num_heads(self) -> int:
        """H, the number of gates."""
        return self.log_alpha_bias.shape[0]

    @property
    def is_whole(self) -> bool:
        """Whether the parameter is whole or sharded by FSDP2, rather than flattened by FSDP1."""
        return "log_alpha_bias" in self._parameters and self.num_heads == len(self.noise)

    def gather(self) -> None:
        """Copy all of a sharded parameter, for use until an optimizer changes it; all processes must call this."""
        if is_sharded(self.log_alpha_bias):
            self._gathered = whole(self.log_alpha_bias).requires_grad_()

    @property
    def stored(self) -> Tensor:
        """The parameter as it is stored, log_alpha / lr_scale, shape (H,), for taking gradients.

        Outside the layer's forward pass a sharded parameter is a slice; then this is the copy that `gather` made.
        """
        if not is_sharded(self.log_alpha_bias):
            return self.log_alpha_bias
        if self._gathered is None:
            raise InputError(
                "This process has only a slice of the gates, which FSDP2 shards; call gates.gather() in all processes "
                "before you read them."
            )
        return self._gathered

    @property
    def log_alpha(self) -> Tensor:
        """The gates' parameters at full scale, shape (H,)."""
        return self.stored * self.config.lr_scale

    @property
    def open_probability(self) -> Tensor:
        """Probability that a head is open in a training draw, (H,): σ(log_alpha) if hard, P(z > 0) if soft."""
        return torch.sigmoid(self.log_alpha.detach() - self.config.beta * self.config.open_threshold)

    @property
    def is_open(self) -> Tensor:
        """Which heads are open in evaluation, bool, shape (H,)."""
        # From the value itself, so that rounding at the threshold cannot make the plan differ from the forward pass.
        return gate_values(self.log_alpha.detach(), self.config) > 0

    @property
    def idle(self) -> tuple[int, ...]:
        """The heads that this forward pass need not compute: in this training draw their z is 0 and has no gradient."""
        if not self.training or self.noise.is_meta or self._computes_all:
            return ()
        z_H = soft_values(self.log_alpha.detach(), self.config, self.noise)
        return tuple((z_H == 0).nonzero().flatten().tolist())

    def draw(self, noise: Tensor, *, measure: bool) -> None:
        """Set the noise of a training draw, uniform in (0, 1), shape (H,).

        If `measure` is set, the forward pass updates the output differences, provided they are tracked. It computes
        every head in either case: skipping heads changes rounding, and tracking must not change a bit of the training.
        """
        self.noise.copy_(noise)
        self._computes_all = measure
        self.is_due = measure and self.tracks_difference

    @torch.no_grad()
    def measure(self, alone_H: Tensor, together: Tensor) -> None:
        """Update output differences from Σ ‖W_O^h a_h‖², (H,), and Σ ‖Σ_open W_O a‖², over this process's tokens."""
        # Gradient checkpointing repeats the forward pass in the backward pass; one measurement a draw is enough.
        self.is_due = False
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if distributed and torch.distributed.get_world_size() > 1:
            if not self.measured:
                self.before = self.difference.clone()
            self.measured.append(torch.cat([alone_H, together[None]]))
        self.add_difference(alone_H, together)

    def add_difference(self, alone_H: Tensor, together: Tensor) -> None:
        """Add sums, as those of `measure`, to the running average."""
        first = not bool(self.difference.any())
        self.difference.lerp_(relative_difference(alone_H, together), 1.0 if first else _RATE)

    @torch.no_grad()
    def set_log_alpha(self, values: Tensor) -> None:
        """Overwrite log_alpha, shape (H,); all processes must write the same values."""
        self.set_stored(values / self.config.lr_scale)

    @torch.no_grad()
    def set_stored(self, values: Tensor) -> None:
        """Overwrite the stored parameter, shape (H,); all processes must write the same values."""
        parameter = self.log_alpha_bias
        parameter.copy_(share_out(values.to(parameter.device, parameter.dtype), parameter))
        if is_sharded(self.log_alpha_bias):
            self._gathered = values.detach().to(self.log_alpha_bias.device, copy=True).requires_grad_()

    def forward(self) -> tuple[Tensor, Tensor]:
        """Return the gate values z, shape (H,), and the output scale.

        The output scale is H / (open gates), 0-dimensional, a constant for the backward pass; 1 where it is off.
        """
        z_H = gate_values(self.log_alpha, self.config, self.noise if self.training else None)
        if not self.config.output_scale:
            return z_H, z_H.new_ones(())
        num_open = (z_H.detach() > 0).sum().clamp(min=1)
        return z_H, self.num_heads / num_open.to(z_H.dtype)


@torch.no_grad()
def relative_difference(alone_H: Tensor, together: Tensor) -> Tensor:
    """Return d_h = ‖W_O^h a_h‖ / ‖Σ_open W_O a‖, (H,), root mean squares over tokens, from sums of squares."""
    return (alone_H / together.clamp(min=1e-12)).clamp(min=0).sqrt().clamp(max=1e3)
