"""Dynamic policies of every kind on a small geometry, with statistics, inputs and query weights made up for it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from heatkv.core.budget import Budget
from heatkv.core.geometry import CacheGeometry
from heatkv.core.schedule import ScaleSchedule
from heatkv.core.statistics import Provenance, Statistics
from heatkv.engine.arena_cache import ArenaCache
from heatkv.policies.ams_kv_like import AmsKvLike
from heatkv.policies.base import PlanningProblem
from heatkv.policies.composition import AdaKV, PerLayer, Protected
from heatkv.policies.dynamic import DynamicPolicy
from heatkv.policies.h2o import H2O
from heatkv.policies.hack_like import HackLike
from heatkv.policies.scalekv import ScaleKV, ScaleKVFixed
from heatkv.policies.snapkv import PyramidKV, SnapKV
from heatkv.policies.windows import SlidingWindowTokens, StreamingTokens
from heatkv.testing.material import AttentionInput, made_up_inputs

SIDES = (1, 2, 3, 5, 4, 6)
GEOMETRY = CacheGeometry(3, 4, 8, ScaleSchedule.square(SIDES))
POLICIES: dict[str, DynamicPolicy] = {
    "sliding-window-tokens": SlidingWindowTokens(),
    "streaming-tokens": StreamingTokens(),
    "streaming-tokens of 2": StreamingTokens(sink_tokens=2),
    "snapkv": SnapKV(window=4, kernel=3),
    "snapkv, a window of all": SnapKV(),
    "pyramidkv": PyramidKV(window=4, beta=4),
    "h2o": H2O(),
    "h2o, all sums": H2O(recent=0, mean_per_scale=False),
    "scalekv": ScaleKV(drafters="1"),
    "scalekv-fixed": ScaleKVFixed(drafters="0,2"),
    "adakv": AdaKV(base="snapkv:window=2"),
    "adakv over h2o": AdaKV(base="h2o:recent=0.2", alpha=0.5),
    "hack-like": HackLike(),
    "ams-kv-like": AmsKvLike(),
    "per-layer": PerLayer(base="h2o", weights="3,1"),
    "protected": Protected(base="snapkv:window=2", scales="0,1"),
    "protected later": Protected(base="h2o", scales="2"),
    "protected, shared": Protected(base="adakv:base=sliding-window-tokens", scales="0,1"),
}


def made_up_statistics() -> Statistics:
    rng = np.random.default_rng(0)
    layers, heads, scales = GEOMETRY.layers, GEOMETRY.heads, len(SIDES)
    mass = np.tril(rng.random((layers, heads, scales, scales)))
    mass /= mass.sum(axis=3, keepdims=True)
    return Statistics(
        GEOMETRY.schedule,
        mass,
        mass**2,
        Provenance("random", "0" * 16, None, {}, ("0:0:0",)),
        concentration_sum=rng.random((layers, heads, scales)),
        similarity_sum=rng.uniform(-1, 1, (layers, scales)),
    )


STATISTICS = made_up_statistics()


def problem(budget: str, rows: int = 2, statistics: Statistics | None = STATISTICS) -> PlanningProblem:
    return PlanningProblem(GEOMETRY, Budget.parse(budget), statistics, rows=rows, storage="float32", model="random")


def inputs(rows: int, seed: int) -> list[list[AttentionInput]]:
    return made_up_inputs(GEOMETRY, rows, seed)


def query_weight(layer: int) -> Tensor:
    generator = torch.Generator().manual_seed(layer)
    heads, dim = GEOMETRY.heads, GEOMETRY.head_dim
    return torch.randn((heads, dim, heads * dim), generator=generator)


def run(cache: ArenaCache, images: Sequence[Sequence[AttentionInput]]) -> list[Tensor]:
    """What attention gives, scale by scale and layer by layer."""
    cache.reset()
    outs = []
    for of_scale in images:
        for layer, x in enumerate(of_scale):
            cache.see_input(layer, x.input_RNW)
            outs.append(cache.attend(layer, x.q_RHND, x.k_RHND, x.v_RHND))
    return outs
