"""Made-up material for tests of policies: small models, statistics, problems and attention inputs, from a seed.

Shapes: L layers, H heads, T scales, R rows, N tokens of the running scale, D head size, W width of the model.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor

from heatkv.core.budget import Budget
from heatkv.core.geometry import CacheGeometry
from heatkv.core.level_statistics import LevelStatistics
from heatkv.core.levels import LEVELS, LevelChoices, log_counts
from heatkv.core.schedule import ScaleSchedule
from heatkv.core.schema import FloatArray
from heatkv.core.statistics import Provenance, Statistics
from heatkv.policies.base import EvictionPolicy, PlanningProblem, StaticPolicy


def small_geometries(seed: int = 0) -> tuple[CacheGeometry, ...]:
    """Models to check on: an ordinary one, a single head, and drawn ones whose scales need not be square or grow."""
    draw = random.Random(seed)
    drawn = []
    for frames in (1, 3):
        scales = tuple(
            (draw.randint(1, frames), draw.randint(1, 5), draw.randint(1, 5)) for _ in range(draw.randint(4, 6))
        )
        drawn.append(CacheGeometry(draw.randint(2, 4), draw.randint(1, 3), 4, ScaleSchedule(scales)))
    return (
        CacheGeometry(3, 4, 8, ScaleSchedule.square((1, 2, 3, 4, 5, 6))),
        CacheGeometry(1, 1, 4, ScaleSchedule.square((1, 2, 3, 4, 5))),
        *drawn,
    )


def made_up_mass(geometry: CacheGeometry, count: int, seed: int) -> FloatArray:
    """Attention mass of `count` samples, (samples, L, H, T, T): rows sum to one, nothing beyond the target scale."""
    scales = len(geometry.schedule)
    raw = np.random.default_rng(seed).random((count, geometry.layers, geometry.heads, scales, scales)) + 1e-3
    raw = np.where(np.tril(np.ones((scales, scales), dtype=bool)), raw, 0)
    normal: FloatArray = raw / raw.sum(axis=-1, keepdims=True)
    return normal


def level_costs_of(
    geometry: CacheGeometry,
    mass: FloatArray,
    samples: tuple[str, ...],
    sink_scales: int = 2,
    joint: int = 5,
    cost: str = "error",
) -> LevelStatistics:
    """Level costs that follow from the mass of samples: what combinations lose of it adds up before it is squared."""
    choices = LevelChoices(geometry.schedule, sink_scales, joint)
    scales = len(geometry.schedule)
    lost = mass[..., None] * np.array([0.0, 0.3, 0.6, 1.0])  # per sample, layer, head, target, source and level
    sums = []
    for target in range(scales):
        table = choices.combinations(target)
        parts = [lost[:, :, :, target, s][..., table[:, i]] for i, s in enumerate(choices.joint_sources(target))]
        of_samples = sum(parts, np.zeros((*mass.shape[:3], len(table)))) ** 2
        sums.append(of_samples.sum(axis=0))
    bias = np.stack([log_counts(geometry.schedule, level) for level in LEVELS], axis=-1)
    single = (lost**2).sum(axis=0)
    log_bias = np.broadcast_to(bias, (geometry.layers, geometry.heads, *bias.shape)).copy()
    return LevelStatistics(choices, cost, log_bias, tuple(sums), single, samples, samples[:1])


def made_up_statistics(
    geometry: CacheGeometry, seed: int = 0, *, sink_scales: int = 2, cost: str = "error"
) -> Statistics:
    """Statistics with all that any policy may plan from; level costs are for so many sink scales, of that kind."""
    rng = np.random.default_rng(seed)
    mass = made_up_mass(geometry, 2, seed)
    layers, heads, scales = geometry.layers, geometry.heads, len(geometry.schedule)
    samples = tuple(f"{seed}:{index}:0" for index in range(len(mass)))
    return Statistics(
        geometry.schedule,
        mass.sum(axis=0),
        (mass**2).sum(axis=0),
        Provenance("made-up", "", None, {}, samples),
        all_mass_sum=made_up_mass(geometry, 2, seed + 1).sum(axis=0),
        error_sum=np.tril(rng.random((layers, heads, scales, scales)), -1),
        levels=level_costs_of(geometry, mass, samples, sink_scales, cost=cost),
        concentration_sum=rng.random((layers, heads, scales)),
        similarity_sum=rng.uniform(-1, 1, (layers, scales)),
    )


def made_up_problem(
    policy: EvictionPolicy, geometry: CacheGeometry, budget: Budget | Fraction | str, seed: int = 0, **changes: Any
) -> PlanningProblem:
    """A problem with the statistics this policy needs; `changes` are other fields of it."""
    sinks = policy.sink_scales if isinstance(policy, StaticPolicy) else 2
    statistics = made_up_statistics(geometry, seed, sink_scales=sinks, cost=policy.level_cost or "error")
    fields: dict[str, Any] = {"seed": seed, "rows": 2, "storage": "float32", "model": "made-up", **changes}
    return PlanningProblem(geometry, Budget.parse(budget), **{"statistics": statistics, **fields})


@dataclass(frozen=True)
class AttentionInput:
    """What one layer is given at one scale: the attention's input (R, N, W), and q, k, v (R, H, N, D)."""

    input_RNW: Tensor
    q_RHND: Tensor
    k_RHND: Tensor
    v_RHND: Tensor


def made_up_inputs(geometry: CacheGeometry, rows: int, seed: int) -> list[list[AttentionInput]]:
    """Attention inputs of every scale and layer."""
    generator = torch.Generator().manual_seed(seed)
    width = geometry.heads * geometry.head_dim
    return [
        [
            AttentionInput(
                torch.randn((rows, tokens, width), generator=generator),
                *torch.randn((3, rows, geometry.heads, tokens, geometry.head_dim), generator=generator).unbind(0),
            )
            for _ in range(geometry.layers)
        ]
        for tokens in geometry.schedule.tokens
    ]
