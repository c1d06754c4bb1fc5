"""Deciding from statistics that keep coming whether another plan is worth having: numbers in, decisions out.

Statistics are forgotten exponentially. A plan is replaced only when another is worth more by a stated share of what the
old one loses to the full cache, both valued exactly by the same statistics; where the solver's prices prove that no
plan can gain as much, nothing is solved.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

import numpy as np

from heatkv.core.level_statistics import LevelStatistics
from heatkv.core.plan import Plan
from heatkv.core.sample_sums import SampleSums
from heatkv.core.schema import FloatArray, number
from heatkv.core.statistics import Statistics
from heatkv.errors import PolicyError, StatisticsError
from heatkv.levels.costs import level_cost, levels_of_plan
from heatkv.policies.base import EvictionPolicy, PlanningProblem, StaticPolicy
from heatkv.policies.heatkv import HeatKV
from heatkv.policies.lp import HeatKVLP, SolvedPolicy
from heatkv.solve.cells import read_value

Sums = TypeVar("Sums", bound=SampleSums)

_NAMED = 10
"""Half-lives after which a sample's name is forgotten; by then it weighs less than a thousandth of a new one."""

_MOST_NAMES = 1_000_000


class _Fading(Generic[Sums]):
    """Sums in which what came before an addition is scaled down; the initial ones weigh `most` samples at most."""

    def __init__(self, initial: Sums, most: float) -> None:
        self.initial = initial
        self._weight = min(float(initial.count), most)
        self._squares = self._weight**2 / initial.count
        self._sums = {name: array * (self._weight / initial.count) for name, array in initial.sums().items()}

    def add(self, measured: Sums, keep: float) -> None:
        """Add sums of the same arrays, what was there times `keep`."""
        added, count = measured.sums(), measured.count
        self._sums = {name: array * keep + added[name] for name, array in self._sums.items()}
        self._weight = self._weight * keep + count
        self._squares = self._squares * keep**2 + count

    def means(self, samples: tuple[str, ...]) -> Sums:
        """The weighted means, as sums over samples of these names."""
        factor = len(samples) / self._weight
        return self.initial.with_sums({name: array * factor for name, array in self._sums.items()}, samples)

    @property
    def effective_count(self) -> float:
        """How many equally weighted samples would be as certain: (sum of weights)^2 / sum of their squares."""
        return self._weight**2 / self._squares


class FadingStatistics:
    """Statistics in which a sample weighs half as much when `half_life` more have been measured.

    The initial ones count as what was measured before, so at most as much as all samples of an endless past would:
    1 / (1 - 2^(-1/half_life)). Raises StatisticsError for a half-life that is no number above 0.
    """

    def __init__(self, initial: Statistics, half_life: float) -> None:
        self.half_life = number(half_life, "half_life", StatisticsError)
        if self.half_life <= 0:
            raise StatisticsError(f"half_life is {half_life}; it is a number of measured images above 0")
        self._keep = 2 ** (-1 / self.half_life)
        past = -1 / math.expm1(-math.log(2) / self.half_life)
        self._cells = _Fading(initial, past)
        self._levels = None if initial.levels is None else _Fading(initial.levels, past)
        self._names = deque(initial.samples, maxlen=math.ceil(min(_NAMED * self.half_life, _MOST_NAMES)))

    def add(self, measured: Statistics) -> None:
        """Take in what was measured alike; its samples weigh the same. Raises StatisticsError for other statistics."""
        for name in ("model", "fingerprint", "cfg"):
            mine, theirs = getattr(self._cells.initial.provenance, name), getattr(measured.provenance, name)
            if mine != theirs:
                raise StatisticsError(f"{name} of the statistics is {mine!r}, of what was measured {theirs!r}")
        keep = self._keep**measured.count
        if self._levels is not None:
            if measured.levels is None:
                raise StatisticsError("what was measured lacks level costs")
            self._levels.initial.check_alike(measured.levels)
            self._levels.add(measured.levels, keep)
        self._cells.add(measured, keep)
        self._names.extend(measured.samples)

    @property
    def effective_count(self) -> float:
        """How many equally weighted samples would be as certain."""
        return self._cells.effective_count

    def statistics(self) -> Statistics:
        """The weighted means as statistics; their provenance tells how they were weighted, so that they cannot be
        merged with others as if all weighed the same."""
        names = tuple(dict.fromkeys(self._names))
        means = self._cells.means(names)
        weighting = {"half_life": self.half_life, "effective_count": round(self.effective_count, 6)}
        settings = {**means.provenance.settings, "forgetting": weighting}
        levels = None if self._levels is None else self._levels.means(names)
        return replace(means, levels=levels, provenance=replace(means.provenance, settings=settings))


def check_can_follow(policy: EvictionPolicy) -> StaticPolicy:
    """The policy, when its plans can follow statistics that are measured while images are drawn. Raises PolicyError."""
    if not isinstance(policy, StaticPolicy):
        reason = "chooses tokens while it draws"
    elif not policy.needs:
        reason = "plans from nothing measured"
    elif policy.level_cost == "fisher":
        reason = "plans by Fisher costs, which are not measured layer by layer (set cost=error)"
    else:
        return policy
    raise PolicyError(f"policy {policy.name!r} cannot follow: it {reason}")


def plan_value(plan: Plan, policy: StaticPolicy, statistics: Statistics) -> tuple[float, float]:
    """What a plan, and what the full cache, is worth by what the policy plans by: minus the joint costs, or the values
    of whole cells (attention mass for `heatkv`, the drop error for a policy that measures nothing known)."""
    if policy.level_cost is not None:
        assert statistics.levels is not None
        return -level_cost(statistics.levels, levels_of_plan(plan)), 0.0
    if isinstance(policy, HeatKVLP):
        values = policy.values(statistics)
    else:
        values = statistics.mass if isinstance(policy, HeatKV) else statistics.drop_error
    full = np.full_like(plan.last_read, len(plan.schedule) - 1)
    return read_value(plan.last_read, values), read_value(full, values)


@dataclass(frozen=True)
class Decision:
    """What new statistics led to.

    `loss` is what the plan that was in force is worth less than the full cache. `possible` is the share of it that any
    plan could gain at most, where the policy can prove that; `gain` the share that the solved plan gains, None where
    nothing was solved.
    """

    loss: float
    possible: float | None
    gain: float | None
    adopted: bool

    @property
    def solved(self) -> bool:
        return self.gain is not None


class OnlinePlanner:
    """A plan and the statistics it follows.

    A new plan is adopted when it gains more than `threshold` of what the old one loses to the full cache. Raises
    PolicyError for a policy that cannot follow, or a problem without statistics, StatisticsError for a bad half-life.
    """

    def __init__(
        self, policy: EvictionPolicy, problem: PlanningProblem, *, half_life: float = 32.0, threshold: float = 0.05
    ) -> None:
        self.policy = check_can_follow(policy)
        self.threshold = number(threshold, "threshold", PolicyError, 0)
        policy.check_measured(problem)
        initial = problem.statistics
        if initial is None:
            raise PolicyError("a plan that follows begins with statistics; rankings do not suffice")
        if policy.level_cost is None:
            initial = initial.with_levels(None)  # nobody would measure them again
        self.levels: LevelStatistics | None = initial.levels
        """Choices and biases of the level costs that must be measured, if any."""
        self._problem = replace(problem, statistics=initial, rankings=None)
        self.fading = FadingStatistics(initial, half_life)
        self._row_prices: FloatArray | None = None
        self.plan = self._solve(self._problem)

    @property
    def statistics(self) -> Statistics:
        """What the plan follows now."""
        return self.fading.statistics()

    def follow(self, measured: Statistics) -> Decision:
        """Take in what was measured; afterwards `plan` is the one to draw under. Raises StatisticsError for statistics
        measured in another way."""
        self.fading.add(measured)
        statistics = self.statistics
        problem = replace(self._problem, statistics=statistics)
        value, full = plan_value(self.plan, self.policy, statistics)
        loss = full - value
        if loss <= 0:
            return Decision(0.0, 0.0, None, False)
        possible = None
        if isinstance(self.policy, SolvedPolicy) and self._row_prices is not None:
            # the full cache is a bound, too
            most = min(self.policy.bound(self.policy.checked(problem), self._row_prices), full)
            possible = max(most - value, 0.0) / loss
            if possible <= self.threshold:
                return Decision(loss, possible, None, False)
        plan = self._solve(problem)
        gain = (plan_value(plan, self.policy, statistics)[0] - value) / loss
        adopted = gain > self.threshold
        if adopted:
            self.plan = plan
        return Decision(loss, possible, gain, adopted)

    def _solve(self, problem: PlanningProblem) -> Plan:
        if isinstance(self.policy, SolvedPolicy):
            plan, self._row_prices = self.policy.solve(problem)
            return plan
        return self.policy.plan(problem)
