"""The one interface every eviction policy implements: numbers in, plan out.

A policy never touches a model, a device or a file. To add one, write a file in `policies/` (or a package, as
`heatkv new-policy` does, with an entry point in the group `heatkv.policies`) with a dataclass like

    @register
    @dataclass(frozen=True)
    class KeepNothing(StaticPolicy):
        '''Only the sink scales are cached.'''

        name: ClassVar[str] = "keep-nothing"

        def last_read(self, problem: PlanningProblem) -> IntArray:
            return self.never_cached(problem)

and it is listed, profiled, tested and documented by that alone. Policies that choose tokens while images are drawn
are in `policies/dynamic.py`.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from heatkv.errors import BudgetError, HeatKVError, PolicyError, StatisticsError
from heatkv.geometry import Budget, CacheGeometry
from heatkv.plan import CachePlan, CoarseCells, Plan
from heatkv.registry import find_policy
from heatkv.statistics import HeadRankings, Statistics

IntArray = NDArray[np.int64]


@dataclass(frozen=True)
class PlanningProblem:
    """What a policy may know: the cache's geometry, the budget, and measured statistics or published rankings.

    `rows` and `storage` turn a budget in bytes into token-heads; `seed` is for policies that draw at random.
    """

    geometry: CacheGeometry
    budget: Budget
    statistics: Statistics | None = None
    rankings: HeadRankings | None = None
    seed: int = 0
    rows: int = 1
    storage: str = "bfloat16"
    model: str = ""

    def __post_init__(self) -> None:
        if self.statistics is not None:
            self.statistics.check_geometry(self.geometry)
        if self.rankings is not None and (self.rankings.layers, self.rankings.heads) != (
            self.geometry.layers,
            self.geometry.heads,
        ):
            raise StatisticsError(
                f"the rankings are of {self.rankings.layers} layers x {self.rankings.heads} heads, the model has "
                f"{self.geometry.layers} x {self.geometry.heads}"
            )

    @property
    def share(self) -> Fraction:
        """b, exactly."""
        return self.budget.share(self.geometry, self.rows, self.storage)

    @property
    def budget_token_heads(self) -> int:
        """floor(b*N*L*H)."""
        return self.budget.token_heads(self.geometry, self.rows, self.storage)


@dataclass(frozen=True)
class EvictionPolicy(ABC):
    """What every policy is: a frozen dataclass with a name that turns a problem into a plan."""

    name: ClassVar[str]
    kind: ClassVar[Literal["static", "dynamic"]]
    needs: ClassVar[str] = "nothing"
    """What it plans from, for the table of policies: nothing, or statistics or rankings."""
    source: ClassVar[str] = ""
    """The paper or rule it implements."""
    random: ClassVar[bool] = False
    """True when the plan depends on the seed, so that a comparison must average several draws."""

    @property
    def level_cost(self) -> str | None:
        """The kind of level costs that the statistics must have for it, if any."""
        return None

    @property
    def wants_statistics(self) -> bool:
        """Whether it plans from statistics, so that a comparison measures them where none are given."""
        return "statistics" in self.needs

    @abstractmethod
    def plan(self, problem: PlanningProblem) -> CachePlan:
        """A validated plan within the budget. Raises BudgetError, PolicyError or PlanError."""

    def check(self, problem: PlanningProblem) -> None:  # noqa: B027 - most have nothing to refuse
        """Raise when the budget or an option cannot be, before anything is measured for it: statistics may be missing
        here even where `plan` needs them."""

    def settings(self, problem: PlanningProblem) -> dict[str, Any]:
        """Everything that decided the plan beside geometry and budget."""
        settings = {
            name: list(value) if isinstance(value, tuple) else value  # as JSON gives it back
            for name, value in dataclasses.asdict(self).items()
        }
        settings["budget"] = str(problem.budget)
        if self.random:
            settings["seed"] = problem.seed
        return settings

    @classmethod
    def summary(cls) -> str:
        """The first line of the docstring."""
        return (cls.__doc__ or "").strip().split("\n")[0]


@dataclass(frozen=True)
class StaticPolicy(EvictionPolicy):
    """A policy that decides before the first image which cell lives until when.

    `sink_scales` is how many of the first scales are never dropped (HeatKV's paper: 3).
    """

    kind: ClassVar[Literal["static", "dynamic"]] = "static"

    sink_scales: int = 3

    @abstractmethod
    def last_read(self, problem: PlanningProblem) -> IntArray:
        """`last_read[l, h, s]` of the plan; the base class checks it against the budget."""

    def plan(self, problem: PlanningProblem) -> Plan:
        """A validated plan. Raises BudgetError when the budget cannot hold the sinks, PlanError when it is exceeded."""
        self.check(problem)
        try:
            last_read = self.last_read(problem)
        except HeatKVError:
            raise
        except Exception as error:  # a third party's policy may fail in any way
            raise PolicyError(f"policy {self.name!r} failed: {type(error).__name__}: {error}") from error
        return self.finish(problem, last_read)

    def finish(
        self,
        problem: PlanningProblem,
        last_read: IntArray,
        coarse: tuple[CoarseCells, ...] = (),
        **certificate: float,
    ) -> Plan:
        """The plan with all that it was made for; `certificate` is value, value_bound and gap where they are known."""
        return Plan(
            policy=self.name,
            geometry=problem.geometry,
            last_read=last_read,
            budget=float(problem.share),
            budget_token_heads=problem.budget_token_heads,
            sink_scales=self.sink_scales,
            model=problem.model,
            settings=self.settings(problem),
            coarse=coarse,
            **certificate,
        )

    def check(self, problem: PlanningProblem) -> None:
        """Raise when the sinks alone exceed the budget, or their number does not fit the schedule."""
        schedule = problem.geometry.schedule
        most = len(schedule) - 1
        if not isinstance(self.sink_scales, int) or not 0 <= self.sink_scales <= most:
            raise PolicyError(
                f"sink_scales={self.sink_scales} does not fit a schedule of {len(schedule)} scales: 0 to {most}"
            )
        sinks, share = schedule.offsets[self.sink_scales], problem.share
        if share * schedule.cached_tokens < sinks:
            enough = next(
                (
                    n
                    for n in range(self.sink_scales - 1, -1, -1)
                    if schedule.offsets[n] <= share * schedule.cached_tokens
                ),
                0,
            )
            raise BudgetError(
                f"budget {float(share):.3g} ({problem.budget}) is below {sinks}/{schedule.cached_tokens} = "
                f"{sinks / schedule.cached_tokens:.2%}, the {self.sink_scales} sink scales; raise it or set "
                f"sink_scales={enough}"
            )

    def never_cached(self, problem: PlanningProblem) -> IntArray:
        """The plan that caches the sink scales only, to start from."""
        geometry = problem.geometry
        scales = len(geometry.schedule)
        last_read = np.broadcast_to(np.arange(scales), (geometry.layers, geometry.heads, scales)).copy()
        last_read[:, :, : self.sink_scales] = scales - 1
        return last_read


def make_policy(name: str, **options: Any) -> EvictionPolicy:
    """The named policy with these options. Raises PolicyError for an unknown name or option."""
    cls = find_policy(name)
    try:
        policy = cls(**options)
    except TypeError as error:
        raise PolicyError(f"policy {name!r}: {error}") from error
    if not isinstance(policy, EvictionPolicy):
        raise PolicyError(f"policy {name!r} is no EvictionPolicy")
    return policy
