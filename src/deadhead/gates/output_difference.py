"""The output difference of a layer's heads: how large each head's share of the layer's output is."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

# Weight of the newest measurement in the running average.
_RATE = 0.4


class OutputDifference:
    """The running average of one layer's output differences, measured in some training forwards.

    With several processes each measures its own batches, and `average_over_processes` puts their mean in place.

    Args:
        gate: the module whose buffer `difference`, shape (H,), is the average; it is moved, saved and loaded with it.
    """

    def __init__(self, gate: nn.Module) -> None:
        self._gate = gate
        self.is_tracked = False
        # Whether the next forward measures.
        self.is_due = False
        # With several processes: what this one measured in this step, and the average that the step began with.
        self._measured: list[Tensor] = []
        self._before: Tensor | None = None

    @property
    def average(self) -> Tensor:
        """The running average of d_h, shape (H,); 0 if nothing was measured yet."""
        return self._gate.get_buffer("difference")

    def begin_step(self) -> None:
        """Forget what this process measured in the last step."""
        self._measured, self._before = [], None

    @torch.no_grad()
    def measure(self, alone_H: Tensor, together: Tensor) -> None:
        """Update the running average by one batch of this process.

        Args:
            alone_H: Σ ‖W_O^h a_h‖² over the batch's tokens, shape (H,).
            together: Σ ‖Σ_open W_O a‖² over them, 0-dimensional.
        """
        # Gradient checkpointing runs the forward again in the backward pass; one measurement a draw is enough.
        self.is_due = False
        if _processes() > 1:
            if not self._measured:
                self._before = self.average.clone()
            self._measured.append(torch.cat([alone_H, together[None]]))
        self._add(alone_H, together)

    def _add(self, alone_H: Tensor, together: Tensor) -> None:
        first = not bool(self.average.any())
        self.average.lerp_(relative_difference(alone_H, together), 1.0 if first else _RATE)


@torch.no_grad()
def average_over_processes(differences: Iterable[OutputDifference]) -> None:
    """Take the output differences of this step over the tokens of all processes, as one process with all rows would.

    All processes must call this together, before the step ends.
    """
    measuring = [difference for difference in differences if difference._measured]
    if _processes() == 1 or not measuring:
        return
    measured = [sums for difference in measuring for sums in difference._measured]
    summed = torch.cat(measured)
    torch.distributed.all_reduce(summed)
    parts = iter(summed.split([len(sums) for sums in measured]))
    for difference in measuring:
        if difference._before is not None:
            difference.average.copy_(difference._before)
        for sums in [next(parts) for _ in difference._measured]:
            difference._add(sums[:-1], sums[-1])
        difference.begin_step()


def relative_difference(alone_H: Tensor, together: Tensor) -> Tensor:
    """Return d_h = ‖W_O^h a_h‖ / ‖Σ_open W_O a‖, root mean squares over tokens, from the sums of squares, (H,)."""
    return (alone_H / together.clamp(min=1e-12)).clamp(min=0).sqrt().clamp(max=1e3)


def _processes() -> int:
    """Return how many processes train together."""
    ready = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if ready else 1
