"""Adaptive input and softmax (Baevski, Auli 2019; Grave et al. 2017): rare words get narrow vectors.

The vocabulary, ordered by falling frequency, is cut into a shortlist of width D and tails of width D / factor,
D / factor², …; each tail's logits are conditional on one extra logit of the shortlist. Dimensions: B, T, D, V; R rows.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from .configuration import AllAttentionConfig


def _bands_and_widths(config: AllAttentionConfig) -> tuple[list[tuple[int, int]], list[int]]:
    bands = list(pairwise([0, *(config.adaptive_cutoffs or ()), config.vocab_size]))
    return bands, [config.hidden_size // config.adaptive_factor**rank for rank in range(len(bands))]


class AdaptiveEmbedding(nn.Module):
    """Embeddings whose width falls with the rank of the word. (B, T) ids → (B, T, D)."""

    def __init__(self, config: AllAttentionConfig) -> None:
        super().__init__()
        self.bands, widths = _bands_and_widths(config)
        self.tables = nn.ModuleList(
            nn.Embedding(stop - start, width) for width, (start, stop) in zip(widths, self.bands, strict=True)
        )
        self.projections = nn.ModuleList(nn.Linear(width, config.hidden_size, bias=False) for width in widths)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Look up and project each band's words."""
        flat = input_ids.reshape(-1)
        weight = self.projections[0].get_parameter("weight")
        hidden = weight.new_zeros((len(flat), weight.shape[0]))
        for (start, stop), table, projection in zip(self.bands, self.tables, self.projections, strict=True):
            rows = ((flat >= start) & (flat < stop)).nonzero().squeeze(-1)
            if len(rows):
                hidden = hidden.index_add(0, rows, projection(table(flat[rows] - start)).to(hidden.dtype))
        return hidden.unflatten(0, input_ids.shape)


class AdaptiveSoftmax(nn.Module):
    """Output layer over the same bands; tables and tail projections may be tied to an `AdaptiveEmbedding`."""

    def __init__(self, config: AllAttentionConfig) -> None:
        super().__init__()
        self.bands, widths = _bands_and_widths(config)
        hidden_size, bias = config.hidden_size, config.lm_head_bias
        # Stored D_tail → D, like the embedding's, so that tying is sharing a tensor; used transposed.
        self.projections = nn.ModuleList(nn.Linear(width, hidden_size, bias=False) for width in widths)
        self.tables = nn.ModuleList(
            nn.Linear(width, stop - start, bias=bias) for width, (start, stop) in zip(widths, self.bands, strict=True)
        )
        self.cluster = nn.Linear(hidden_size, len(self.bands) - 1, bias=bias)

    def _head(self, hidden: Tensor) -> Tensor:
        shortlist = self.tables[0](functional.linear(hidden, self.projections[0].get_parameter("weight")))
        return torch.cat([shortlist, self.cluster(hidden)], dim=-1).float().log_softmax(-1)

    def _tail(self, hidden: Tensor, rank: int) -> Tensor:
        narrow = functional.linear(hidden, self.projections[rank].get_parameter("weight").T)
        return self.tables[rank](narrow).float().log_softmax(-1)

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        """Return log-probabilities of all words, (B, T, V), float32."""
        head = self._head(hidden_BTD)
        shortlist = self.bands[0][1]
        ranks = range(1, len(self.bands))
        tails = [head[..., shortlist + rank - 1, None] + self._tail(hidden_BTD, rank) for rank in ranks]
        return torch.cat([head[..., :shortlist], *tails], dim=-1)

    def loss(self, hidden_BTD: Tensor, targets_BT: Tensor) -> Tensor:
        """Return the negative log-likelihood of each target, (B, T), without scoring bands it is not in."""
        hidden, targets = hidden_BTD.flatten(0, 1), targets_BT.reshape(-1)
        head = self._head(hidden)
        shortlist = self.bands[0][1]
        slot = targets.clamp(max=shortlist - 1)
        for rank, (start, stop) in enumerate(self.bands[1:]):
            slot = torch.where((targets >= start) & (targets < stop), shortlist + rank, slot)
        log_probability = head.gather(-1, slot[:, None]).squeeze(-1)
        for rank, (start, stop) in enumerate(self.bands[1:], start=1):
            rows = ((targets >= start) & (targets < stop)).nonzero().squeeze(-1)
            if len(rows):
                tail = self._tail(hidden[rows], rank).gather(-1, (targets[rows] - start)[:, None]).squeeze(-1)
                log_probability = log_probability.index_add(0, rows, tail)
        return -log_probability.unflatten(0, targets_BT.shape)
