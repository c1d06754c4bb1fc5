"""The one interface every eviction policy implements: numbers in, plan out.

A policy never touches a model, a device or a file. To add one, write a file in `policies/`, or a package with an entry
point in the group `heatkv.policies`, with a frozen dataclass such as

    from dataclasses import dataclass

    import numpy as np
    from heatkv.policies import PlanningProblem, ScoredCells, register

    @register
    @dataclass(frozen=True)
    class MassPerToken(ScoredCells):
        '''Keeps the cells that get most attention for their size.'''

        name = "mass-per-token"
        needs = frozenset({"statistics"})

        def value(self, problem: PlanningProblem) -> np.ndarray:
            return problem.measured.scas

and it is listed, profiled, tested and documented by that alone. Its fields are its options. What a class gives:

    every policy     name         lower-case letters, digits and hyphens; the docstring's first line is its summary
                     source       the paper or rule it implements (default: own)
                     needs        what it plans from, a set of NEEDS (default: nothing)
                     random       True when the plan depends on the problem's seed (default: False)
                     check        raises for options that do not fit the problem (call super().check)
    ScoredCells      value        what every cell is worth; the budget is filled with the best (must)
    StaticPolicy     last_read    the whole plan, for policies that are no ScoredCells (must)
    DynamicPolicy    score        what every token is worth while images are drawn (must); for more see `dynamic`
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Set
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, ClassVar, Literal

import numpy as np

from heatkv.core.budget import Budget
from heatkv.core.geometry import CacheGeometry
from heatkv.core.plan import CachePlan, CoarseCells, Plan, keep_first
from heatkv.core.rankings import HeadRankings
from heatkv.core.schedule import ScaleSchedule
from heatkv.core.schema import FloatArray, IntArray, suggest
from heatkv.core.statistics import Statistics
from heatkv.core.storage_type import UNCODED_SCALES, StorageType
from heatkv.errors import BudgetError, HeatKVError, PolicyError, StatisticsError
from heatkv.policies.options import options_of
from heatkv.registry import find_policy
from heatkv.solve.checkpoints import Capacity, fill

NEEDS = ("statistics", "statistics or rankings", "level costs: error", "level costs: fisher")
"""What policies may plan from; all of it comes from calibrating a model, but for published rankings of heads."""


@dataclass(frozen=True)
class PlanningProblem:
    """What a policy may know: the cache's geometry, the budget, and measured statistics or published rankings.

    `rows` and `storage` turn a budget in bytes into token-heads, and so do the first `uncoded_scales` where the storage
    is coded, which a policy sets itself; `seed` is for policies that draw at random. Raises BudgetError for an unknown
    storage type, and StatisticsError for statistics or rankings of another geometry.
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
        if self.rows < 1:
            raise BudgetError(f"rows is {self.rows}; it must be at least 1")
        if self.statistics is not None:
            self.statistics.check_geometry(self.geometry)
        ranked, geometry = self.rankings, self.geometry
        if ranked is not None and (ranked.layers, ranked.heads) != (geometry.layers, geometry.heads):
            raise StatisticsError(
                f"the rankings are of {ranked.layers} layers x {ranked.heads} heads, the model has {geometry.layers} x "
                f"{geometry.heads}"
            )

    @property
    def measured(self) -> Statistics:
        """The statistics, for policies that need them. Raises PolicyError when there are none."""
        if self.statistics is None:
            raise PolicyError("the policy needs statistics; calibrate the model")
        return self.statistics

    @property
    def share(self) -> Fraction:
        """b, exactly."""
        return self.budget.share(self.geometry, self.rows, self.storage, self.uncoded_scales)

    @property
    def budget_token_heads(self) -> int:
        """floor(b*N*L*H)."""
        return self.budget.token_heads(self.geometry, self.rows, self.storage, self.uncoded_scales)


@contextmanager
def third_party(what: str) -> Iterator[None]:
    """Errors that are not ours inside the block as a PolicyError: a third party's policy may fail in any way."""
    try:
        yield
    except HeatKVError:
        raise
    except Exception as error:
        raise PolicyError(f"{what}: {type(error).__name__}: {error}") from error


@dataclass(frozen=True)
class EvictionPolicy(ABC):
    """What every policy is: a frozen dataclass with a name that turns a problem into a plan."""

    name: ClassVar[str]
    kind: ClassVar[Literal["static", "dynamic"]]
    source: ClassVar[str] = "own"
    random: ClassVar[bool] = False

    @property
    def needs(self) -> Set[str]:
        """What it plans from with the options that it has, of NEEDS."""
        return frozenset()

    @property
    def level_cost(self) -> str | None:
        """The kind of level costs that the statistics must have for it, if any."""
        return next((cost for cost in ("error", "fisher") if f"level costs: {cost}" in self.needs), None)

    @property
    def uncoded_scales(self) -> int:
        """The first scales that a coded cache of its plans holds in the compute type: sinks alone have such places."""
        return 0

    @abstractmethod
    def plan(self, problem: PlanningProblem) -> CachePlan:
        """A checked plan within the budget. Raises BudgetError, PolicyError or PlanError."""

    def check(self, problem: PlanningProblem) -> None:  # noqa: B027 - most policies have nothing to add
        """Raise PolicyError for options that do not fit the problem, BudgetError for a budget that cannot be kept;
        works without anything that is measured."""

    def check_measured(self, problem: PlanningProblem) -> None:
        """Raise PolicyError when what it plans from is missing."""
        ranked = "statistics or rankings" in self.needs and problem.rankings is not None
        if self.needs and problem.statistics is None and not ranked:
            raise PolicyError(f"policy {self.name!r} needs {' and '.join(sorted(self.needs))}; calibrate the model")

    def checked(self, problem: PlanningProblem) -> PlanningProblem:
        """The problem as this policy has it, after all that can be said before planning. Raises what is wrong."""
        problem = dataclasses.replace(problem, uncoded_scales=self.uncoded_scales)
        self.check(problem)
        self.check_measured(problem)
        return problem

    def settings(self, problem: PlanningProblem) -> dict[str, Any]:
        """Everything that decided the plan beside geometry and budget, as JSON gives it back."""
        options = ((field.name, getattr(self, field.name)) for field in dataclasses.fields(self))
        settings = {name: list(value) if isinstance(value, tuple) else value for name, value in options}
        return settings | {"budget": str(problem.budget)} | ({"seed": problem.seed} if self.random else {})

    def common(self, problem: PlanningProblem) -> dict[str, Any]:
        """What plans of both kinds are made with."""
        ranked = "statistics or rankings" in self.needs and problem.rankings is not None
        measured = problem.statistics if self.needs and not ranked else None
        return {
            "policy": self.name, "geometry": problem.geometry, "model": problem.model,
            "budget": float(problem.share), "budget_token_heads": problem.budget_token_heads,
            "settings": self.settings(problem),
            "weights": "" if measured is None else measured.provenance.fingerprint,
        }  # fmt: skip

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

    @property
    def uncoded_scales(self) -> int:
        return max(0, min(UNCODED_SCALES, self.sink_scales))

    @abstractmethod
    def last_read(self, problem: PlanningProblem) -> IntArray:
        """`last_read[l, h, s]` of the plan: the last target scale that reads the cell, s itself where it is never
        cached. It is refused when a checkpoint holds more than the budget; it is not asked for the full budget."""

    def plan(self, problem: PlanningProblem) -> Plan:
        """A checked plan. Raises BudgetError when the budget cannot hold the sinks, PolicyError for options that are
        wrong, and PlanError for a `last_read` that is no plan or exceeds the budget."""
        problem = self.checked(problem)
        if problem.share == 1:
            return self.finish(problem, keep_first(problem.geometry.shape, len(problem.geometry.schedule)))
        with third_party(f"policy {self.name!r} failed"):
            last_read = self.last_read(problem)
        return self.finish(problem, last_read)

    def finish(
        self, problem: PlanningProblem, last_read: IntArray, coarse: tuple[CoarseCells, ...] = (), **certificate: float
    ) -> Plan:
        """The checked plan with all that it was made for; `certificate` is value, value_bound and gap where they are
        known. Raises PlanError."""
        stated = self.common(problem) | certificate
        return Plan(**stated, last_read=last_read, sink_scales=self.sink_scales, coarse=coarse)

    def check(self, problem: PlanningProblem) -> None:
        """Raise when the number of sinks does not fit the schedule, or the sinks alone exceed the budget."""
        schedule = problem.geometry.schedule
        if not 0 <= self.sink_scales < len(schedule):
            raise PolicyError(f"sink_scales={self.sink_scales}; {len(schedule)} scales allow 0 to {len(schedule) - 1}")
        if problem.share * schedule.cached_tokens < schedule.offsets[self.sink_scales]:
            raise below_sinks(f"budget {float(problem.share):.3g} ({problem.budget})", schedule, self.sink_scales)

    def sinks_only(self, problem: PlanningProblem) -> IntArray:
        """`last_read` that caches the sink scales only, to start from."""
        return keep_first(problem.geometry.shape, self.sink_scales)


@dataclass(frozen=True)
class ScoredCells(StaticPolicy):
    """A static policy that says what cells are worth; those worth most for their size fill the budget.

    Cells are kept longer one after another, in the order of value per token and target, while every checkpoint has
    room.
    """

    @abstractmethod
    def value(self, problem: PlanningProblem) -> FloatArray:
        """What it is worth to read source scale s, (L, H, T), or that target t reads it, [l, h, t, s] of shape
        (L, H, T, T): finite numbers of at least 0."""

    def last_read(self, problem: PlanningProblem) -> IntArray:
        """The sinks, and the cells that are worth most. Raises PolicyError for values that are no such numbers."""
        layers, heads, scales = problem.geometry.shape
        value = np.asarray(self.value(problem), dtype=np.float64)
        if value.shape not in ((layers, heads, scales), (layers, heads, scales, scales)) or not (
            np.isfinite(value).all() and (value >= 0).all()
        ):
            raise PolicyError(
                f"value() of policy {self.name!r} has shape {value.shape}, least {value.min(initial=0):g}; it must be "
                f"({layers}, {heads}, {scales}) or ({layers}, {heads}, {scales}, {scales}) finite numbers of at least 0"
            )
        value_LHTT = np.broadcast_to(value[:, :, None] if value.ndim == 3 else value, (layers, heads, scales, scales))
        capacity = Capacity(layers, heads, problem.geometry.schedule.tokens, problem.budget_token_heads)
        return fill(self.sinks_only(problem), value_LHTT, capacity)


def below_sinks(limit: str, schedule: ScaleSchedule, sinks: int) -> BudgetError:
    """The error of a limit that the sink scales alone exceed."""
    tokens, cached = schedule.offsets[sinks], schedule.cached_tokens
    percent = math.ceil(Fraction(10000 * tokens, cached)) / 100  # rounded up, so that it is enough
    return BudgetError(
        f"{limit} is below {tokens}/{cached} = {percent:g}%, the {sinks} sink scales; raise it or lower sink_scales"
    )


def make_policy(name: str, **options: Any) -> EvictionPolicy:
    """The policy of this name with these options, the fields of its class, such as sink_scales.

    Raises PolicyError for an unknown name or option, and for a value that is not of the option's type.
    """
    cls, known = find_policy(name), options_of(find_policy(name))
    for option, value in options.items():
        if option not in known:
            raise PolicyError(f"policy {name!r} has no option {option!r}{suggest(option, known)}")
        known[option].check(value, name)
    with third_party(f"policy {name!r} cannot be made"):
        policy: EvictionPolicy = cls(**options)
    return policy
