"""Which heads of a layer go through attention together: a measured cost model and the cheapest split under it.

Heads hold different numbers of tokens. One call per head does no needless work but costs a call each; one call for
all pads every head to the longest and masks the rest. The cheapest split into groups lies between the two.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch

_TABLE = Path(__file__).with_name("costs.json")

GROUP_BYTES = 1 << 25
"""Most bytes of keys and values that a group of several heads gathers; more would leave the caches anyway."""


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
        return _measured("float32" if dtype is torch.float32 else "bfloat16")

    def of(self, heads: int, held: int, masked: bool, rows: int, tokens: int, head_dim: int, itemsize: int) -> float:
        """Attention of `tokens` queries of every head and row over `held` tokens and themselves."""
        work = 4e-6 * rows * heads * tokens * (held + tokens) * head_dim * self.us_per_megaflop
        moved = 2e-3 * rows * heads * (held + tokens) * head_dim * itemsize * self.us_per_kilobyte if held else 0.0
        return self.call_us + work * (self.masked if masked else 1.0) + moved


@cache
def _measured(dtype: str) -> AttentionCost:
    return AttentionCost(**json.loads(_TABLE.read_text())[dtype])


@dataclass(frozen=True)
class CallShape:
    """What all heads of a layer have in common for one target: rows, queries, head size, and bytes of a channel."""

    rows: int
    tokens: int
    head_dim: int
    itemsize: int


def split_heads(
    counts: Sequence[int], biased: Sequence[bool], shape: CallShape, cost: AttentionCost
) -> list[tuple[int, ...]]:
    """The cheapest split of the heads, who hold `counts` tokens, into groups that are padded to their longest.

    Heads with biases need a mask anyway. Groups are of heads that follow each other by count: any other split is no
    cheaper, as exchanging heads shows. No group of several heads gathers more than GROUP_BYTES.
    """
    order = sorted(range(len(counts)), key=lambda head: (counts[head], biased[head], head))
    # heads alike are never parted but by GROUP_BYTES
    classes: list[list[int]] = []
    for head in order:
        last = classes[-1][-1] if classes else None
        if last is not None and (counts[last], biased[last]) == (counts[head], biased[head]):
            classes[-1].append(head)
        else:
            classes.append([head])
    ends = np.cumsum([0, *(len(members) for members in classes)])
    best = [0.0] + [np.inf] * len(classes)
    come_from = [0] * (len(classes) + 1)
    for end in range(1, len(classes) + 1):
        held, with_bias = counts[classes[end - 1][0]], False
        for start in range(end - 1, -1, -1):
            first = classes[start][0]
            with_bias = with_bias or biased[first]
            masked = with_bias or counts[first] != held
            heads = int(ends[end] - ends[start])
            if best[start] + cost.call_us >= best[end]:
                continue
            total = best[start] + cost.of(heads, held, masked, shape.rows, shape.tokens, shape.head_dim, shape.itemsize)
            if total < best[end]:
                best[end], come_from[end] = total, start
    groups: list[tuple[int, ...]] = []
    end = len(classes)
    while end:
        start = come_from[end]
        heads_of_group = sorted(head for members in classes[start:end] for head in members)
        longest = max(counts[head] for head in heads_of_group)
        each = 2 * shape.rows * (longest + shape.tokens) * shape.head_dim * shape.itemsize
        most = max(1, GROUP_BYTES // each) if longest else len(heads_of_group)
        groups += [tuple(heads_of_group[i : i + most]) for i in range(0, len(heads_of_group), most)]
        end = start
    return sorted(groups)
