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

and it is listed, profiled, tested and documented by that alone. A name is lower-case letters, digits and hyphens.
Policies that choose tokens while images are drawn are in `policies/dynamic.py`.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from heatkv.core.budget import Budget
from heatkv.core.geometry import CacheGeometry
from heatkv.core.plan import CachePlan, CoarseCells, Plan, keep_first
from heatkv.core.rankings import HeadRankings
from heatkv.core.schedule import ScaleSchedule
from heatkv.core.schema import as_whole, seed_of, shown, whole
from heatkv.core.statistics import Statistics
from heatkv.core.storage_type import UNCODED_SCALES, StorageType
from heatkv.errors import BudgetError, HeatKVError, PolicyError, StatisticsError
from heatkv.registry import find_policy

IntArray = NDArray[np.int64]


@dataclass(frozen=True)
class PlanningProblem:
    """What a policy may know: the cache's geometry, the budget, and measured statistics or published rankings.

    `rows` and `storage` turn a budget in bytes into token-heads, and so do the first `uncoded_scales` where the storage
    is coded, which a policy sets itself; `seed` is for policies that draw at random. Raises
    PolicyError for what is of the wrong kind, BudgetError for an unknown storage type, and StatisticsError for
    statistics or rankings of another geometry.
    """

    geometry: CacheGeometry
    budget: Budget
    statistics: Statistics | None = None
    rankings: HeadRankings | None = None
    seed: int = 0
    rows: int = 1
    storage: str = "bfloat16"
    model: str = ""
    uncoded_scales: int = UNCODED_SCALES

    def __post_init__(self) -> None:
        StorageType.parse(self.storage).token_head_bytes(self.geometry.head_dim)
        object.__setattr__(self, "seed", seed_of(self.seed, PolicyError))
        object.__setattr__(self, "rows", whole(self.rows, "rows", BudgetError, 1))
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
        return self.budget.share(self.geometry, self.rows, self.storage, self.uncoded_scales)

    @property
    def budget_token_heads(self) -> int:
        """floor(b*N*L*H)."""
        return self.budget.token_heads(self.geometry, self.rows, self.storage, self.uncoded_scales)


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

    def plans_from(self) -> str:
        """What it needs with the options that it has."""
        return self.needs

    @property
    def level_cost(self) -> str | None:
        """The kind of level costs that the statistics must have for it, if any."""
        return None

    @abstractmethod
    def plan(self, problem: PlanningProblem) -> CachePlan:
        """A validated plan within the budget. Raises BudgetError, PolicyError or PlanError."""

    def check(self, problem: PlanningProblem) -> None:  # noqa: B027 - most policies have nothing to add
        """Raise for options that do not fit each other or the problem; needs nothing that is measured."""

    def check_options(self, problem: PlanningProblem) -> None:
        """`check`, in which options of another type than it expects may fail in any way. Raises what it raises."""
        try:
            self.check(problem)
        except HeatKVError:
            raise
        except Exception as error:
            told = ", ".join(f"{field.name}={shown(getattr(self, field.name))}" for field in dataclasses.fields(self))
            raise PolicyError(f"policy {self.name!r} cannot use {told}: {error}") from error

    def check_measured(self, problem: PlanningProblem) -> None:  # noqa: B027
        """Raise when what it plans from is missing, or was measured for something else."""

    def check_sinks(self, problem: PlanningProblem) -> None:  # noqa: B027
        """Raise when the budget is below the scales that the policy must keep."""

    @property
    def uncoded_scales(self) -> int:
        """The first scales that a coded cache of its plans holds in the compute type: sinks alone have such places."""
        return 0

    def checked(self, problem: PlanningProblem) -> PlanningProblem:
        """The problem as this policy has it, after all that can be told before planning. Raises what is wrong."""
        self.check_options(problem)
        problem = dataclasses.replace(problem, uncoded_scales=self.uncoded_scales)
        self.check_measured(problem)
        self.check_sinks(problem)
        return problem

    def settings(self, problem: PlanningProblem) -> dict[str, Any]:
        """Everything that decided the plan beside geometry and budget."""
        settings = {
            # as JSON gives it back, which knows no tuples and no integers of numpy
            name: list(value) if isinstance(value, tuple) else value if (number := as_whole(value)) is None else number
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

    `sink_scales` is how many of the first scales are never dropped (HeatKV's paper: 3). A subclass gives `last_read`;
    `plan` raises PolicyError for options that are wrong, BudgetError for a budget that cannot be kept, and PlanError
    for a `last_read` that is no plan.
    """

    kind: ClassVar[Literal["static", "dynamic"]] = "static"

    sink_scales: int = 3

    @property
    def uncoded_scales(self) -> int:
        return max(0, min(UNCODED_SCALES, as_whole(self.sink_scales) or 0))  # what is no number is refused later

    @abstractmethod
    def last_read(self, problem: PlanningProblem) -> IntArray:
        """`last_read[l, h, s]` of the plan; the base class checks it against the budget."""

    def plan(self, problem: PlanningProblem) -> Plan:
        """A validated plan. Raises BudgetError when the budget cannot hold the sinks, PlanError when it is exceeded."""
        problem = self.checked(problem)
        try:
            last_read = self.last_read(problem)
        except HeatKVError:
            raise
        except Exception as error:  # a third party's policy may fail in any way
            raise PolicyError(f"policy {self.name!r} failed: {type(error).__name__}: {error}") from error
        plan = self.finish(problem, last_read)
        plan.check()
        return plan

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

    def check_sinks(self, problem: PlanningProblem) -> None:
        """Raise when the sinks alone exceed the budget, or their number does not fit the schedule."""
        schedule, sinks = problem.geometry.schedule, as_whole(self.sink_scales)
        if sinks is None or not 0 <= sinks < len(schedule):
            raise PolicyError(
                f"sink_scales={shown(self.sink_scales)} does not fit a schedule of {len(schedule)} scales: "
                f"0 to {len(schedule) - 1}"
            )
        if problem.share * schedule.cached_tokens < schedule.offsets[sinks]:
            raise below_sinks(f"budget {float(problem.share):.3g} ({problem.budget})", schedule, sinks)

    def never_cached(self, problem: PlanningProblem) -> IntArray:
        """The plan that caches the sink scales only, to start from."""
        return keep_first(problem.geometry.shape, self.sink_scales)


def below_sinks(limit: str, schedule: ScaleSchedule, sinks: int) -> BudgetError:
    """The error of a limit that the sink scales alone exceed."""
    tokens, cached = schedule.offsets[sinks], schedule.cached_tokens
    percent = math.ceil(Fraction(10000 * tokens, cached)) / 100  # rounded up, so that it is enough
    return BudgetError(
        f"{limit} is below {tokens}/{cached} = {percent:g}%, the {sinks} sink scales; raise it or lower sink_scales"
    )


def make_policy(name: str, **options: Any) -> EvictionPolicy:
    """The named policy with these options, the fields of its class, such as sink_scales.

    Raises PolicyError for an unknown name or option; what an option may be, the policy checks when it plans.
    """
    cls = find_policy(name)
    known = [field.name for field in dataclasses.fields(cls) if field.init] if dataclasses.is_dataclass(cls) else []
    unknown = [option for option in options if option not in known]
    if known and unknown:
        raise PolicyError(f"policy {name!r} has no option {unknown[0]!r}; its options are {', '.join(known)}")
    try:
        policy = cls(**options)
    except HeatKVError:
        raise
    except Exception as error:  # a third party's policy may fail in any way
        raise PolicyError(f"policy {name!r}: {error}") from error
    if not isinstance(policy, EvictionPolicy):
        raise PolicyError(f"policy {name!r} is no EvictionPolicy")
    return policy
