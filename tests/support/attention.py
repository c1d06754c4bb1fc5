"""Random images through a cache, and the oracle: every head by itself in float64, over what the plan says it reads.

Shapes: R rows, H heads, N tokens of a scale, D head size, P = D/2 rotated pairs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from hypothesis import strategies as st
from strategies import pooled
from torch import Tensor

from heatkv.core.plan import Plan
from heatkv.engine.arena_cache import ArenaCache
from heatkv.engine.turns import Rows

Images = Sequence[Sequence[Sequence[Tensor]]]
"""images[t][l]: q, k and v of target t in layer l."""

ROWS = st.integers(1, 3)


def images_of(plan: Plan, rows: int, seed: int, dtype: torch.dtype = torch.float32) -> list[list[list[Tensor]]]:
    generator = torch.Generator().manual_seed(seed)
    geometry = plan.geometry
    return [
        [
            [torch.randn(rows, geometry.heads, n, geometry.head_dim, generator=generator).to(dtype) for _ in range(3)]
            for _ in range(geometry.layers)
        ]
        for n in plan.schedule.tokens
    ]


def angles_of(plan: Plan, seed: int) -> list[Tensor]:
    """Some angles for every token, (N, P)."""
    generator = torch.Generator().manual_seed(seed)
    pairs = plan.geometry.head_dim // 2
    return [torch.rand(n, pairs, generator=generator, dtype=torch.float64) * 20 - 10 for n in plan.schedule.tokens]


def run(cache: ArenaCache, images: Images, poison: bool = True) -> list[Tensor]:
    """All outputs in order. A slot that is read before these images wrote it makes them NaN."""
    if poison:
        cache.store.spoil()
    cache.reset()
    return [cache.attend(layer, *qkv) for scale in images for layer, qkv in enumerate(scale)]


def run_in_parts(cache: ArenaCache, images: Images, halves: int, at_once: Sequence[int]) -> list[Tensor]:
    """The same, where `at_once` images of a scale go through all layers before others do; each has a row per half."""
    cache.store.spoil()
    cache.reset()
    outputs = []
    for scale, count in zip(images, at_once, strict=True):
        parts = []
        for first in range(0, cache.rows // halves, count):
            rows = Rows(halves, first, min(count, cache.rows // halves - first))
            cache.serve(rows)
            mine = [[rows.of(x, 0).flatten(0, 1) for x in qkv] for qkv in scale]
            parts.append([cache.attend(layer, *qkv).unflatten(0, (halves, -1)) for layer, qkv in enumerate(mine)])
        outputs += [torch.cat(of_layer, dim=1).flatten(0, 1) for of_layer in zip(*parts, strict=True)]
    return outputs


def dense(plan: Plan, images: Images, angles: list[Tensor] | None = None) -> list[Tensor]:
    """Every head's own scale, and of every earlier one the tokens or the means it reads, these with their bias."""
    ends = [(level, last_read.tolist()) for level, last_read in plan.levels]
    biases = [cells.log_bias for cells in plan.coarse]
    outputs = []
    for t, scale in enumerate(images):
        for layer, (q, k, v) in enumerate(scale):
            heads = []
            for h in range(plan.geometry.heads):
                logits, values = [q[:, h].double() @ k[:, h].double().mT], [v[:, h].double()]
                for s in range(t):
                    reading = [i for i, (_, last_read) in enumerate(ends) if last_read[layer][h][s] >= t]
                    if not reading:
                        continue
                    level, of_scale = ends[reading[0]][0], plan.schedule.scales[s]
                    _, past_k, past_v = images[s][layer]
                    keys = pooled(past_k[:, h], of_scale, level, None if angles is None else angles[s])
                    bias = biases[reading[0] - 1][layer, h, s] if reading[0] else 0.0
                    logits.append(q[:, h].double() @ keys.mT + bias)
                    values.append(pooled(past_v[:, h], of_scale, level))
                heads.append(torch.cat(logits, dim=-1).softmax(-1) @ torch.cat(values, dim=-2))
            outputs.append(torch.stack(heads, dim=1))
    return outputs


def check_close(got: list[Tensor], expected: list[Tensor], limit: float) -> None:
    for one, other in zip(got, expected, strict=True):
        assert one.shape == other.shape
        assert (one.double() - other.double()).abs().max() <= limit  # false for NaN as well
