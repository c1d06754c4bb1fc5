"""Rotary positions: keys turned by angles, and pooled keys turned to the mean position of what they stand for.

Shapes: N tokens, D head size, P = D/2 rotated pairs, which are neighbouring channels.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rotate(x_ND: Tensor, rotation_2NP: Tensor) -> Tensor:
    """Turn each pair of neighbouring channels by the token's angle, given as cosines and sines; x is (..., N, D)."""
    cos_NP, sin_NP = rotation_2NP
    even, odd = x_ND.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos_NP - odd * sin_NP, even * sin_NP + odd * cos_NP], dim=-1).flatten(-2)


def rotation_of(angles_NP: Tensor) -> Tensor:
    """Cosines and sines, (2, N, P) fp32, of angles in float64."""
    return torch.stack([angles_NP.cos(), angles_NP.sin()]).float()
