"""Attention over cells scattered in the arena, in plain PyTorch: runs everywhere.

Heads that hold equally many tokens are gathered and handed to `scaled_dot_product_attention` together.
Shapes: R rows, H heads, N tokens of the running scale, D head size, P arena slots, G heads of a group, M held tokens.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class HeadGroup:
    """Heads of one layer that hold the same number of tokens for one target, and the slots they are in.

    `bias_GM` is added to the logits of held tokens that stand for several; None where all of them are whole.
    """

    heads: Tensor
    slots_GM: Tensor
    all_heads: bool
    bias_GM: Tensor | None = None


def group_heads(
    slots_of_head: Sequence[NDArray[np.int64]],
    device: torch.device,
    bias_of_head: Sequence[NDArray[np.float64]] | None = None,
) -> tuple[HeadGroup, ...]:
    """Group heads by how many tokens they hold; `slots_of_head[h]` has the slots of head h in token order.

    Heads with and without biases are kept apart, so that whole cells are read as if there were no others.
    """
    by_count: dict[tuple[int, bool], list[int]] = defaultdict(list)
    for head, slots in enumerate(slots_of_head):
        by_count[len(slots), bias_of_head is not None and bool(bias_of_head[head].any())].append(head)
    groups = []
    for (_, biased), heads in sorted(by_count.items()):
        bias = None
        if biased:
            assert bias_of_head is not None
            bias = torch.from_numpy(np.stack([bias_of_head[head] for head in heads])).float().to(device)
        slots_GM = torch.from_numpy(np.stack([slots_of_head[head] for head in heads])).to(device)
        groups.append(HeadGroup(torch.tensor(heads, device=device), slots_GM, len(heads) == len(slots_of_head), bias))
    return tuple(groups)


def ragged_attention(
    q_RHND: Tensor, k_RHND: Tensor, v_RHND: Tensor, arena_2RPD: Tensor, groups: Sequence[HeadGroup]
) -> Tensor:
    """softmax(q [held, k]^T + bias) [held, v] per head, over the held tokens and the whole current scale; scale 1."""
    out_RHND = torch.empty_like(q_RHND) if len(groups) > 1 else None
    tokens = q_RHND.shape[2]
    for group in groups:
        q, k, v = with_held(group, q_RHND, k_RHND, v_RHND, arena_2RPD)
        mask = None
        if group.bias_GM is not None:
            mask = F.pad(group.bias_GM, (0, tokens))[None, :, None].to(q.dtype).expand(len(q), -1, tokens, -1)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.0)
        if out_RHND is None:
            return out
        out_RHND.index_copy_(1, group.heads, out)
    if out_RHND is None:
        raise ValueError("attention over no head")
    return out_RHND


def with_held(
    group: HeadGroup, q_RHND: Tensor, k_RHND: Tensor, v_RHND: Tensor, arena_2RPD: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The queries of a group's heads, and their keys and values with what they hold in front."""
    q, k, v = q_RHND, k_RHND, v_RHND
    if not group.all_heads:
        q, k, v = (x.index_select(1, group.heads) for x in (q, k, v))
    count, held = group.slots_GM.shape
    if held:
        past = arena_2RPD.index_select(2, group.slots_GM.flatten()).view(2, len(q), count, held, q.shape[3])
        k, v = torch.cat([past[0].to(k.dtype), k], dim=2), torch.cat([past[1].to(v.dtype), v], dim=2)
    return q, k, v
