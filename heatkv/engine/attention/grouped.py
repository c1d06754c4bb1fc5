"""Attention over cells scattered in the arena, in plain PyTorch: runs everywhere.

Heads hold different numbers of tokens. One call per head does no needless work but costs a call each; one call for
all pads every head to the longest and masks the rest. Between the two lies the cheapest split into groups, under a
measured cost model; every group is gathered and handed to `scaled_dot_product_attention`.
Shapes: R rows, H heads, N tokens of the running scale, D head size, G heads of a group, M held tokens.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from math import prod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from heatkv.engine.attention.base import AttentionKernel, CallShape, FloatArrays, IntArrays
from heatkv.engine.store import Places, Store

GROUP_BYTES = 1 << 25
"""Most bytes of keys and values that a group of several heads gathers; a larger one does not fit a CPU's caches."""


@dataclass(frozen=True)
class AttentionCost:
    """What attention of a group of heads takes on a CPU core, in microseconds.

    Every call costs `call_us`; arithmetic `us_per_megaflop`, `masked` times that where a mask is needed; gathering
    `us_per_kilobyte` of what is copied.
    """

    call_us: float
    us_per_megaflop: float
    masked: float
    us_per_kilobyte: float

    @classmethod
    def measured(cls, dtype: torch.dtype) -> AttentionCost:
        """The measured numbers of a type; those of bfloat16 for float16."""
        table = json.loads(Path(__file__).with_name("costs.json").read_text())
        return cls(**table["float32" if dtype is torch.float32 else "bfloat16"])

    def microseconds(self, heads: int, held: int, masked: bool, shape: CallShape) -> float:
        """Attention of the queries of every head and row over `held` tokens and themselves."""
        numbers = heads * shape.gathered(held)
        work = 2e-6 * numbers * shape.tokens * self.us_per_megaflop
        moved = 1e-3 * numbers * shape.itemsize * self.us_per_kilobyte if held else 0.0
        return self.call_us + work * (self.masked if masked else 1.0) + moved


def split_heads(
    counts: Sequence[int], biased: Sequence[bool], shape: CallShape, cost: AttentionCost
) -> list[tuple[int, ...]]:
    """The cheapest split of the heads, who hold `counts` tokens, into groups that are padded to their longest.

    Heads with biases need a mask anyway. Groups are of heads that follow each other by count: exchanging heads shows
    that no other split is cheaper where masks cost nothing, and they cost little. No group of several heads gathers
    more than GROUP_BYTES.
    """
    order = sorted(range(len(counts)), key=lambda head: (counts[head], biased[head], head))
    # heads alike are never parted but by GROUP_BYTES
    alike = [list(heads) for _, heads in groupby(order, key=lambda head: (counts[head], biased[head]))]
    # the least cost of the first classes of heads that are alike, and where the last group of that split starts
    best, start_of = [0.0] + [np.inf] * len(alike), [0] * (len(alike) + 1)
    for end in range(1, len(alike) + 1):
        longest, heads, any_bias = counts[alike[end - 1][0]], 0, False
        for start in range(end - 1, -1, -1):
            first = alike[start][0]
            heads, any_bias = heads + len(alike[start]), any_bias or biased[first]
            if best[start] + cost.call_us < best[end]:
                total = best[start] + cost.microseconds(heads, longest, any_bias or counts[first] != longest, shape)
                if total < best[end]:
                    best[end], start_of[end] = total, start
    groups: list[tuple[int, ...]] = []
    end = len(alike)
    while end:
        start = start_of[end]
        group = sorted(head for heads in alike[start:end] for head in heads)
        longest = max(counts[head] for head in group)
        most = max(1, GROUP_BYTES // (shape.gathered(longest) * shape.itemsize)) if longest else len(group)
        groups += [tuple(group[i : i + most]) for i in range(0, len(group), most)]
        end = start
    return sorted(groups)


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
        """Write the output of these heads into that of all."""
        if isinstance(self.heads, slice):
            out_RHND[:, self.heads] = x_RGND
        else:
            out_RHND.index_copy_(1, self.heads, x_RGND)


def head_indices(heads: tuple[int, ...], device: torch.device) -> slice | Tensor:
    """Heads in ascending order: a slice where they follow each other, else their indices."""
    if heads == tuple(range(heads[0], heads[-1] + 1)):
        return slice(heads[0], heads[-1] + 1)
    return torch.tensor(heads, device=device)


class Workspace:
    """Memory that the groups of a cache gather into, one after the other: made once, as large as the largest."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self._flat = torch.empty(0, dtype=dtype, device=device)

    @property
    def nbytes(self) -> int:
        return self._flat.untyped_storage().nbytes()

    def reserve(self, groups: Sequence[HeadGroup], shape: CallShape) -> None:
        """Room for what each of the groups gathers."""
        numbers = max((group.size * shape.gathered(group.held) for group in groups if group.held), default=0)
        if numbers > len(self._flat):
            self._flat = self._flat.new_empty(numbers)

    def room(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """A tensor of this shape, and of the type of `like`, whose contents last until the next call."""
        if self._flat.dtype != like.dtype or len(self._flat) < prod(shape):
            return like.new_empty(shape)
        return self._flat[: prod(shape)].view(shape)


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


class RaggedAttention(AttentionKernel):
    """Heads in groups through `scaled_dot_product_attention`: plain PyTorch, on every device."""

    name = "ragged"

    def __init__(self, store: Store, cost: AttentionCost | None = None) -> None:
        super().__init__(store)
        self.cost = cost if cost is not None else AttentionCost.measured(store.dtype)
        self.workspace = Workspace(store.dtype, store.device)

    def prepare(
        self, slots_of_head: IntArrays, bias_of_head: FloatArrays | None, shape: CallShape
    ) -> tuple[HeadGroup, ...]:
        """The groups of heads that are cheapest together."""
        counts = [len(slots) for slots in slots_of_head]
        biased = [bias_of_head is not None and bool(bias_of_head[head].any()) for head in range(len(counts))]
        groups = []
        for heads in split_heads(counts, biased, shape, self.cost):
            held = max(counts[head] for head in heads)
            filler = next(slots_of_head[head][:1] for head in heads if counts[head] == held)
            slots_GM = np.zeros((len(heads), held), dtype=np.int64)
            bias_GM = np.full((len(heads), held), -np.inf)
            for at, head in enumerate(heads):
                # a pad repeats a token that is held: what was never written may be no number
                slots_GM[at] = np.concatenate([slots_of_head[head], np.repeat(filler, held - counts[head])])
                bias_GM[at, : counts[head]] = 0.0 if bias_of_head is None else bias_of_head[head]
            places = self.store.places(slots_GM.ravel()) if held else None
            bias = torch.from_numpy(bias_GM).float().to(self.store.device) if bias_GM.any() else None
            groups.append(HeadGroup(head_indices(heads, self.store.device), len(heads), held, places, bias))
        self.workspace.reserve(groups, shape)
        return tuple(groups)

    def attend(self, q_RHND: Tensor, k_RHND: Tensor, v_RHND: Tensor, prepared: tuple[HeadGroup, ...]) -> Tensor:
        out_RHND = torch.empty_like(q_RHND)
        tokens = q_RHND.shape[2]
        for group in prepared:
            q, k, v = with_held(group, q_RHND, k_RHND, v_RHND, self.store, self.workspace)
            mask = None
            if group.bias_GM is not None:
                # CPUs add biases in fp32; kernels of other devices want them in the type of the queries
                bias_GC = F.pad(group.bias_GM, (0, tokens)).to(torch.float32 if q.is_cpu else q.dtype)
                mask = bias_GC[None, :, None].expand(len(q), -1, tokens, -1)
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.0)
            if len(prepared) == 1:
                return out
            group.put(out_RHND, out)
        return out_RHND

    @property
    def workspace_bytes(self) -> int:
        return self.workspace.nbytes
