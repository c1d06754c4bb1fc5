"""Attention over cells scattered in the arena, in plain PyTorch: runs everywhere.

Groups of heads are gathered and handed to `scaled_dot_product_attention`, see `grouping`.
Shapes: R rows, H heads, N tokens of the running scale, D head size, G heads of a group, M held tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from heatkv.engine.attention.grouping import AttentionCost, CallShape, split_heads
from heatkv.engine.store import Places, Store


@dataclass(frozen=True)
class HeadGroup:
    """Heads of one layer that go through attention together, and what each of them reads.

    `heads` is a slice where they follow each other, else their indices. All read `held` tokens, those of `places` head
    after head; None where they hold none. `bias_GM` is added to the logits of held tokens: of those that stand for
    several, and minus infinity where a shorter head was padded; None where there is neither.
    """

    heads: slice | Tensor
    size: int
    held: int
    places: Places | None
    bias_GM: Tensor | None = None

    def of(self, x_RHND: Tensor) -> Tensor:
        """These heads of a tensor: a view where they follow each other."""
        return x_RHND[:, self.heads] if isinstance(self.heads, slice) else x_RHND.index_select(1, self.heads)

    def put(self, out_RHND: Tensor, x_RGND: Tensor) -> None:
        """Write what these heads gave."""
        if isinstance(self.heads, slice):
            out_RHND[:, self.heads] = x_RGND
        else:
            out_RHND.index_copy_(1, self.heads, x_RGND)


def group_heads(
    store: Store,
    slots_of_head: Sequence[NDArray[np.int64]],
    bias_of_head: Sequence[NDArray[np.float64]] | None,
    shape: CallShape,
    cost: AttentionCost,
) -> tuple[HeadGroup, ...]:
    """Split the heads of a layer by `cost`; `slots_of_head[h]` has the slots of head h in token order."""
    counts = [len(slots) for slots in slots_of_head]
    biased = [bias_of_head is not None and bool(bias_of_head[head].any()) for head in range(len(counts))]
    groups = []
    for heads in split_heads(counts, biased, shape, cost):
        held = max(counts[head] for head in heads)
        filler = next(slots_of_head[head][:1] for head in heads if counts[head] == held)
        slots_GM = np.zeros((len(heads), held), dtype=np.int64)
        bias_GM = np.full((len(heads), held), -np.inf)
        for at, head in enumerate(heads):
            # a pad repeats a token that is held: what was never written may be no number
            slots_GM[at] = np.concatenate([slots_of_head[head], np.repeat(filler, held - counts[head])])
            bias_GM[at, : counts[head]] = 0.0 if bias_of_head is None else bias_of_head[head]
        groups.append(
            HeadGroup(
                head_indices(heads, store.device),
                len(heads),
                held,
                store.places(slots_GM.ravel()) if held else None,
                torch.from_numpy(bias_GM).float().to(store.device) if bias_GM.any() else None,
            )
        )
    return tuple(groups)


def head_indices(heads: tuple[int, ...], device: torch.device) -> slice | Tensor:
    """Heads in ascending order: a slice where they follow each other, else their indices."""
    if heads == tuple(range(heads[0], heads[-1] + 1)):
        return slice(heads[0], heads[-1] + 1)
    return torch.tensor(heads, device=device)


class Workspace:
    """Memory that the groups of a cache gather into, one after the other: made once, as large as the largest."""

    def __init__(self) -> None:
        self._flat: Tensor | None = None

    @property
    def nbytes(self) -> int:
        return 0 if self._flat is None else self._flat.untyped_storage().nbytes()

    def reserve(self, numbers: int, dtype: torch.dtype, device: torch.device) -> None:
        """Room for at least so many numbers of this type."""
        if numbers and (self._flat is None or self._flat.numel() < numbers):
            self._flat = torch.empty(numbers, dtype=dtype, device=device)

    def room(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """A tensor of this shape, and of the type of `like`, whose contents last until the next call."""
        if self._flat is None or self._flat.dtype != like.dtype or self._flat.numel() < prod(shape):
            return like.new_empty(shape)
        return self._flat[: prod(shape)].view(shape)


def group_numbers(groups: Sequence[HeadGroup], shape: CallShape) -> int:
    """Numbers that the largest of the groups gathers."""
    return max(
        (2 * shape.rows * g.size * (g.held + shape.tokens) * shape.head_dim for g in groups if g.held), default=0
    )


def ragged_attention(
    q_RHND: Tensor,
    k_RHND: Tensor,
    v_RHND: Tensor,
    store: Store,
    groups: Sequence[HeadGroup],
    workspace: Workspace,
) -> Tensor:
    """softmax(q [held, k]^T + bias) [held, v] per head, over the held tokens and the whole current scale; scale 1."""
    out_RHND = torch.empty_like(q_RHND) if len(groups) > 1 else None
    tokens = q_RHND.shape[2]
    for group in groups:
        q, k, v = with_held(group, q_RHND, k_RHND, v_RHND, store, workspace)
        mask = None
        if group.bias_GM is not None:
            mask = F.pad(group.bias_GM, (0, tokens))[None, :, None].to(q.dtype).expand(len(q), -1, tokens, -1)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.0)
        if out_RHND is None:
            return out
        group.put(out_RHND, out)
    if out_RHND is None:
        raise ValueError("attention over no head")
    return out_RHND


def with_held(
    group: HeadGroup, q_RHND: Tensor, k_RHND: Tensor, v_RHND: Tensor, store: Store, workspace: Workspace | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The queries of a group's heads, and their keys and values with what they hold in front."""
    q, k, v = (group.of(x) for x in (q_RHND, k_RHND, v_RHND))
    if group.places is None:
        return q, k, v
    rows, heads, tokens, dim = q.shape
    past = store.read(group.places).view(2, rows, heads, group.held, dim)
    parts = [(held.to(new.dtype), new) for held, new in zip(past, (k, v), strict=True)]
    # gradients need what they were made from, which the next group would write over
    if workspace is None or (torch.is_grad_enabled() and any(x.requires_grad for pair in parts for x in pair)):
        k, v = (torch.cat(pair, dim=2) for pair in parts)
        return q, k, v
    joint = workspace.room((2, rows, heads, group.held + tokens, dim), q)
    for into, pair in zip(joint, parts, strict=True):
        torch.cat(pair, dim=2, out=into)
    return q, joint[0], joint[1]
