"""How many calibration samples are enough: what two disjoint halves of them agree on, for growing halves.

Arrays: L layers, H heads, T scales, S = T-1 source scales that are cached.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from heatkv.calibration.measure import rank_correlation
from heatkv.core.statistics import Statistics, mean_over_targets
from heatkv.policies.base import PlanningProblem, StaticPolicy
from heatkv.policies.lp import HeatKVLP
from heatkv.solve.cells import read_value

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]

ENOUGH_LOSS = 0.01
"""Samples are enough when planning on them loses less than this share of the value."""


@dataclass(frozen=True)
class PlanAgreement:
    """Plans of one policy and budget, made from either half.

    `overlap`: of the token-time that either plan keeps beyond the sinks, the share that both keep. `loss`: the share of
    value that a plan of one half misses on the other half, where that half's own plan has it all; mean of both ways.
    Both halves are noisy, so this is more than what is lost on the truth; no plan is made by its value alone, so it can
    fall below 0.
    """

    policy: str
    budget: str
    measure: str
    overlap: float
    loss: float


@dataclass(frozen=True, eq=False)
class Agreement:
    """Two disjoint halves of `samples` each: Spearman correlations per source scale, (S,), and plans.

    `error` is of the drop error, mean over later targets, None where it was not measured.
    """

    samples: int
    scas: FloatArray
    error: FloatArray | None
    plans: tuple[PlanAgreement, ...]

    def to_json(self) -> dict[str, Any]:
        scas, error = (
            None if values is None else [None if math.isnan(value) else value for value in values.tolist()]
            for values in (self.scas, self.error)
        )
        plans = [vars(plan) for plan in self.plans]
        return {
            "samples_per_half": self.samples, "scas_rank_correlation": scas, "error_rank_correlation": error,
            "plans": plans,
        }  # fmt: skip


def _growing(half: int) -> list[int]:
    """4, 8, 16, ... as long as they are below `half`, and `half` itself."""
    return [*(4 << times for times in range(half.bit_length()) if 4 << times < half), half]


def batch_sizes(samples: int, largest: int) -> list[int]:
    """Batches of at most `largest` samples; every second ones make halves that grow to 4, 8, 16, ... samples // 2."""
    sizes, done = list[int](), 0
    for goal in _growing(samples // 2):
        while done < goal:
            size = min(largest, goal - done)
            sizes += [size, size]
            done += size
    return sizes + [1] * (samples % 2)


def growing_halves(parts: Sequence[Statistics]) -> list[tuple[Statistics, Statistics]]:
    """Disjoint halves of 4, 8, 16, ... samples, as far as parts of equal sizes, in pairs, reach; and the largest."""
    halves: list[tuple[Statistics, Statistics]] = []
    for one, other in zip(parts[::2], parts[1::2], strict=False):  # an odd last part has no partner
        if one.count != other.count:
            break
        halves.append((halves[-1][0].merge(one), halves[-1][1].merge(other)) if halves else (one, other))
    return [pair for pair in halves if pair[0].count in _growing(halves[-1][0].count)]


def compare_halves(
    one: Statistics, other: Statistics, policies: Sequence[StaticPolicy], problems: Sequence[PlanningProblem]
) -> Agreement:
    """What two sets of as many samples agree on: rankings, and the plans of every policy for every problem."""
    measured, plans = one.error_sum is not None and other.error_sum is not None, []
    errors = [mean_over_targets(half.drop_error) for half in (one, other)] if measured else []
    for policy in policies:
        measure, values = "mass", (one.mass, other.mass)
        if isinstance(policy, HeatKVLP):
            measure = "mass of all rows" if policy.value == "mass" else "drop error"
            values = policy.values(one), policy.values(other)
        for problem in problems:
            mine, theirs = (policy.plan(replace(problem, statistics=half)).last_read for half in (one, other))
            loss = (_loss(theirs, mine, values[0]) + _loss(mine, theirs, values[1])) / 2
            shared = overlap(mine, theirs, problem.geometry.schedule.tokens, policy.sink_scales)
            plans.append(PlanAgreement(policy.name, str(problem.budget), measure, shared, loss))
    scas, error = rank_correlation(one.scas, other.scas), rank_correlation(*errors) if errors else None
    return Agreement(one.count, scas, error, tuple(plans))


def _loss(plan_LHT: IntArray, own_LHT: IntArray, value_LHTT: FloatArray) -> float:
    """Share of the value of one's own plan that a plan misses."""
    own = read_value(own_LHT, value_LHTT)
    return 1 - read_value(plan_LHT, value_LHTT) / own if own > 0 else 0.0


def overlap(one_LHT: IntArray, other_LHT: IntArray, tokens: tuple[int, ...], sink_scales: int) -> float:
    """Of the token-time that either plan keeps beyond the sinks, the share that both keep; 1 where there is none."""
    scales = np.arange(len(tokens))
    sizes = np.where(scales < sink_scales, 0, tokens)
    both, either = (((of(one_LHT, other_LHT) - scales) * sizes).sum() for of in (np.minimum, np.maximum))
    return float(both / either) if either else 1.0


def enough(agreements: Sequence[Agreement]) -> int | None:
    """The fewest samples from which on no plan loses ENOUGH_LOSS of its value or more; None when there are none."""
    lossy = [a.samples for a in agreements if any(plan.loss >= ENOUGH_LOSS for plan in a.plans)]
    return min((a.samples for a in agreements if a.samples > max(lossy, default=0)), default=None)


def verdict(agreements: Sequence[Agreement]) -> str:
    """Whether the samples are enough, in a sentence that says by which rule."""
    fewest = enough(agreements)
    count = max(agreement.samples for agreement in agreements) if fewest is None else fewest
    plans = [plan for agreement in agreements if agreement.samples == count for plan in agreement.plans]
    worst = max(plans, key=lambda plan: plan.loss)
    answer = f"not enough with {count} samples" if fewest is None else f"enough from {count} samples on"
    return (
        f"{answer}: a plan made on one half loses up to {worst.loss:.2%} of the value on the other ({worst.policy} at "
        f"{worst.budget}); less than {ENOUGH_LOSS:.0%} is to be lost with every policy and budget"
    )
