"""Making the tokens of a coarser level: averages of keys and values over blocks, keys at the mean position.

Rotation is linear, so the mean of unrotated keys, turned to the mean position, is the mean of keys that are each turned
by the difference. Shapes: R rows, I members (tokens that are averaged), O tokens that come out, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from heatkv.core.levels import FULL, blocks
from heatkv.engine.attention.rotary import rotate, rotation_of


@dataclass(frozen=True)
class Reduction:
    """Which members make which token: `out[block[i]] += weight[i] * x[i]`; keys are turned first where they rotate."""

    block_I: Tensor
    weight_I1: Tensor
    rotation_2IP: Tensor | None
    count: int

    @classmethod
    def of(
        cls, scale: tuple[int, int, int], held: str, wanted: str, device: torch.device, angles_NP: Tensor | None = None
    ) -> Reduction:
        """From a cell of `scale` at level `held` to the coarser level `wanted`; `angles_NP` are those of its tokens."""
        before, after = blocks(scale, held), blocks(scale, wanted)
        # every block of a level lies within one block of the coarser one
        within = np.zeros(before.count, dtype=np.int64)
        within[np.asarray(before.of)] = after.of
        weight = before.sizes / after.sizes[within]
        rotation = None
        if angles_NP is not None:
            mean_before = _block_means(angles_NP, before.of, before.count)
            mean_after = _block_means(angles_NP, after.of, after.count)
            rotation = rotation_of(mean_after[torch.from_numpy(within)] - mean_before).to(device)
        return cls(
            torch.from_numpy(within).to(device),
            torch.from_numpy(weight).float()[:, None].to(device),
            rotation,
            after.count,
        )

    @classmethod
    def together(cls, parts: Sequence[Reduction]) -> Reduction:
        """Several side by side: members and tokens follow each other."""
        firsts = np.cumsum([0, *(part.count for part in parts)])
        rotations = [part.rotation_2IP for part in parts if part.rotation_2IP is not None]
        return cls(
            torch.cat([part.block_I + int(first) for part, first in zip(parts, firsts, strict=False)]),
            torch.cat([part.weight_I1 for part in parts]),
            torch.cat(rotations, dim=1) if rotations else None,
            int(firsts[-1]),
        )

    def keys(self, k_RID: Tensor) -> Tensor:
        """(R, I, D) members to (R, O, D) in fp32."""
        k_RID = k_RID.float()
        return self.values(k_RID if self.rotation_2IP is None else rotate(k_RID, self.rotation_2IP))

    def values(self, v_RID: Tensor) -> Tensor:
        """(R, I, D) members to (R, O, D) in fp32."""
        out = torch.zeros((v_RID.shape[0], self.count, v_RID.shape[2]), device=v_RID.device)
        return out.index_add_(1, self.block_I, v_RID.float() * self.weight_I1)


def _block_means(angles_NP: Tensor, of: Sequence[int], count: int) -> Tensor:
    index = torch.tensor(of)
    total = torch.zeros(count, angles_NP.shape[1], dtype=torch.float64).index_add_(0, index, angles_NP.double().cpu())
    return total / torch.bincount(index, minlength=count)[:, None]


def pooled_cells(
    k_BHND: Tensor, v_BHND: Tensor, scale: tuple[int, int, int], level: str, angles_NP: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Keys and values of whole cells at a level, (B, H, O, D) in fp32."""
    if level == FULL:
        return k_BHND.float(), v_BHND.float()
    reduction = Reduction.of(scale, FULL, level, k_BHND.device, angles_NP)
    batch, heads = k_BHND.shape[:2]
    k, v = reduction.keys(k_BHND.flatten(0, 1)), reduction.values(v_BHND.flatten(0, 1))
    return k.unflatten(0, (batch, heads)), v.unflatten(0, (batch, heads))
