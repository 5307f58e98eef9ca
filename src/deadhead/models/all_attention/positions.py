"""Relative positions: the sinusoidal table, and rotary angles."""

from __future__ import annotations

import torch
from torch import Tensor

_BASE = 10000.0


def sinusoidal_table(window: int, width: int) -> Tensor:
    """Return p of the distances window − 1 … 0, oldest first, as in Transformer-XL (Dai et al. 2019), (W, D)."""
    distance_W = torch.arange(window - 1, -1, -1, dtype=torch.float32)
    frequency = _BASE ** -(torch.arange(0, width, 2, dtype=torch.float32) / width)
    angle = distance_W[:, None] * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=-1)


def rotate(x_BHTE: Tensor, start: int) -> Tensor:
    """Turn queries or keys at positions start, start + 1, … by their rotary angles, same shape."""
    position = torch.arange(start, start + x_BHTE.shape[-2], dtype=torch.float32, device=x_BHTE.device)
    return rotate_at(x_BHTE, position)


def rotate_at(x_BHTE: Tensor, position: Tensor) -> Tensor:
    """Turn queries or keys at given positions, (T,) or (B, 1, T), by their rotary angles (Su et al. 2021)."""
    width = x_BHTE.shape[-1]
    frequency = _BASE ** -(torch.arange(0, width, 2, dtype=torch.float32, device=x_BHTE.device) / width)
    angle = position[..., None] * frequency
    cos, sin = angle.cos().to(x_BHTE.dtype), angle.sin().to(x_BHTE.dtype)
    first, second = x_BHTE.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)
