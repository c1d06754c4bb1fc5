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

SMALLEST_HALF = 4
"""Samples in the smallest halves; the others are twice as large each."""

ENOUGH_LOSS = 0.01
"""Samples are enough when planning on them loses less than this share of the value."""


@dataclass(frozen=True)
class PlanAgreement:
    """Plans of one policy and budget, made from either half.

    `overlap`: of the token-time that either plan keeps beyond the sinks, the share that both keep. `loss`: the share of
    value that a plan of one half misses on the other half, where that half's own plan has it all; mean of both ways.
    Both halves are noisy, so this is rather more than what is lost on the truth. It can fall below 0, as no plan is
    made by its value alone.
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
        def numbers(values: FloatArray) -> list[float | None]:
            return [None if math.isnan(value) else value for value in values.tolist()]

        return {
            "samples_per_half": self.samples,
            "scas_rank_correlation": numbers(self.scas),
            "error_rank_correlation": None if self.error is None else numbers(self.error),
            "plans": [vars(plan) for plan in self.plans],
        }


def batch_sizes(samples: int, largest: int) -> list[int]:
    """Batches of at most `largest` samples; every second ones make halves that grow to 4, 8, 16, ... samples // 2."""
    half, sizes, done = samples // 2, list[int](), 0
    for goal in (count for count in range(1, half + 1) if _doubled(count) or count == half):
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
    return [pair for pair in halves if _doubled(pair[0].count) or pair is halves[-1]]


def _doubled(count: int) -> bool:
    """Whether it is the smallest half, doubled any number of times."""
    times, rest = divmod(count, SMALLEST_HALF)
    return times.bit_count() == 1 and not rest


def compare_halves(
    one: Statistics, other: Statistics, policies: Sequence[StaticPolicy], problems: Sequence[PlanningProblem]
) -> Agreement:
    """What two sets of as many samples agree on: rankings, and the plans of every policy for every problem."""
    error = None
    if one.error_sum is not None and other.error_sum is not None:
        error = rank_correlation(mean_over_targets(one.drop_error), mean_over_targets(other.drop_error))
    plans = []
    for policy in policies:
        measure, my_values, their_values = _values(policy, one, other)
        for problem in problems:
            mine, theirs = (policy.plan(replace(problem, statistics=half)).last_read for half in (one, other))
            loss = (_loss(theirs, mine, my_values) + _loss(mine, theirs, their_values)) / 2
            shared = overlap(mine, theirs, problem.geometry.schedule.tokens, policy.sink_scales)
            plans.append(PlanAgreement(policy.name, str(problem.budget), measure, shared, loss))
    return Agreement(one.count, rank_correlation(one.scas, other.scas), error, tuple(plans))


def _values(policy: StaticPolicy, one: Statistics, other: Statistics) -> tuple[str, FloatArray, FloatArray]:
    """What the policy plans by, and that of every cell for every target on either half."""
    if isinstance(policy, HeatKVLP):
        measure = "mass of all rows" if policy.value == "mass" else "drop error"
        return measure, policy.values(one), policy.values(other)
    return "mass", one.mass, other.mass


def _loss(given_LHT: IntArray, own_LHT: IntArray, value_LHTT: FloatArray) -> float:
    own = read_value(own_LHT, value_LHTT)
    return 1 - read_value(given_LHT, value_LHTT) / own if own > 0 else 0.0


def overlap(one_LHT: IntArray, other_LHT: IntArray, tokens: tuple[int, ...], sink_scales: int) -> float:
    """Of the token-time that either plan keeps beyond the sinks, the share that both keep; 1 where there is none."""
    scales = np.arange(len(tokens))
    sizes = np.where(scales < sink_scales, 0, tokens)
    both = ((np.minimum(one_LHT, other_LHT) - scales) * sizes).sum()
    either = ((np.maximum(one_LHT, other_LHT) - scales) * sizes).sum()
    return float(both / either) if either else 1.0


def enough(agreements: Sequence[Agreement], limit: float = ENOUGH_LOSS) -> int | None:
    """The fewest samples from which on no plan loses `limit` of its value or more; None when there are none."""
    found = None
    for agreement in sorted(agreements, key=lambda a: a.samples, reverse=True):
        if any(plan.loss >= limit for plan in agreement.plans):
            break
        found = agreement.samples
    return found


def verdict(agreements: Sequence[Agreement], limit: float = ENOUGH_LOSS) -> str:
    """Whether the samples are enough, in a sentence that says by which rule."""
    found = enough(agreements, limit)
    count = max(a.samples for a in agreements) if found is None else found
    worst = max((plan for a in agreements if a.samples == count for plan in a.plans), key=lambda plan: plan.loss)
    samples, others = ("1 sample is", "another one") if count == 1 else (f"{count} samples are", f"{count} others")
    return (
        f"{samples} {'not enough' if found is None else 'enough'}: a plan made on {count} loses "
        f"{'' if found is None else 'at most '}{worst.loss:.2%} of the value on {others} ({worst.policy} at "
        f"{worst.budget}); the rule is less than {limit:.0%} with every policy and budget, from there on"
    )
