"""The contract over everything registered, with other options and drawn models too; and what breaks it is found."""

from __future__ import annotations

import dataclasses
import textwrap
import types
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import SEEDS, geometries
from torch import Tensor

from heatkv import registry
from heatkv.core.geometry import CacheGeometry
from heatkv.core.plan import CachePlan
from heatkv.core.schedule import ScaleSchedule
from heatkv.core.schema import FloatArray, IntArray
from heatkv.errors import BudgetError, PlanError, PolicyError
from heatkv.policies import base
from heatkv.policies.base import EvictionPolicy, PlanningProblem, ScoredCells, StaticPolicy
from heatkv.policies.composition import AdaKV, PerLayer, Protected, Wrapper
from heatkv.policies.dynamic import Candidates, DynamicPolicy
from heatkv.policies.h2o import H2O
from heatkv.policies.heatkv_mr import HeatKVMR
from heatkv.policies.lp import HeatKVLP
from heatkv.policies.snapkv import SnapKV
from heatkv.policies.windows import Streaming
from heatkv.testing.contract import check_policy, contract_checks
from heatkv.testing.material import made_up_statistics, small_geometries

CHECKS = dict(contract_checks())
REGISTERED = registry.registered_policies()
SOLVED = ("heatkv-lp", "heatkv-mr")  # plans of these take long on drawn models
GEOMETRY = CacheGeometry(2, 2, 4, ScaleSchedule.square((1, 2, 3, 4, 5)))

OTHERS: dict[str, EvictionPolicy] = {
    "adakv over h2o": AdaKV(base="h2o:recent=0.2", alpha=0.5),
    "adakv over what needs statistics": AdaKV(base="hack-like:contextual_share=0.3"),
    "adakv over an object": AdaKV(base=SnapKV(window=4)),
    "per-layer over h2o": PerLayer(base="h2o", weights="3,1"),
    "protected over scalekv": Protected(base="scalekv", scales="1"),
    "protected over h2o": Protected(base="h2o", scales="2"),
    "protected over a composed object": Protected(base=AdaKV(base=H2O(recent=0.25)), scales="0,1"),
    "streaming, one sink": Streaming(sink_scales=1),
    "lp by mass": HeatKVLP(value="mass"),
    "lp, greedy": HeatKVLP(value="error", solver="greedy"),
    "levels by Fisher costs": HeatKVMR(cost="fisher"),
    "levels, dropping only": HeatKVMR(levels="full", sink_scales=1),
}


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("name", REGISTERED)
def test_contract_of_registered_policies(name: str, check: str) -> None:
    CHECKS[check](name, geometries=small_geometries())


@pytest.mark.parametrize("name", OTHERS)
def test_contract_with_other_options(name: str) -> None:
    check_policy(OTHERS[name], geometries=[GEOMETRY], seed=1)


@pytest.mark.parametrize("name", [name for name in REGISTERED if name not in SOLVED])
@settings(max_examples=15)
@given(geometry=geometries(min_scales=4), seed=SEEDS, sinks=st.integers(0, 3))
def test_contract_on_drawn_models(name: str, geometry: CacheGeometry, seed: int, sinks: int) -> None:
    policy = REGISTERED[name].policy()
    if isinstance(policy, StaticPolicy):
        policy = dataclasses.replace(policy, sink_scales=sinks)
    for check in ("budget", "memory", "full-budget"):
        CHECKS[check](policy, geometries=[geometry], seed=seed)


def test_example_of_the_interface(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_registered", dict(REGISTERED))
    assert base.__doc__ is not None
    indented = [line for line in base.__doc__.splitlines() if line.startswith("    ") or not line]
    code = textwrap.dedent("\n".join(indented)).split("every policy")[0]
    module = types.ModuleType("example")
    monkeypatch.setitem(__import__("sys").modules, "example", module)
    exec(code, vars(module))
    check_policy("mass-per-token")


def test_made_up_material() -> None:
    for geometry in small_geometries(3):
        statistics = made_up_statistics(geometry, 3, sink_scales=1, cost="fisher")
        statistics.check_geometry(geometry)
        assert statistics.levels is not None
        assert (statistics.levels.cost, statistics.levels.choices.sink_scales) == ("fisher", 1)
    assert small_geometries(3) == small_geometries(3) != small_geometries(4)


# ---------------------------------------------------------------------- scored cells


@dataclass(frozen=True)
class Drawn(ScoredCells):
    """Values drawn from the problem's seed, per target or not."""

    name = "drawn"

    targets: bool = False

    def value(self, problem: PlanningProblem) -> FloatArray:
        shape = problem.geometry.shape
        return np.random.default_rng(problem.seed).random((*shape, shape[2]) if self.targets else shape)


@settings(max_examples=40)
@given(geometry=geometries(min_scales=3), seed=SEEDS, percent=st.integers(1, 99), targets=st.booleans())
def test_scored_cells_leave_no_room_for_another_cell(
    geometry: CacheGeometry, seed: int, percent: int, targets: bool
) -> None:
    """Whatever cell is read for one more target, its plan breaks the budget."""
    problem = PlanningProblem(geometry, base.Budget("share", Fraction(percent, 100)), seed=seed)
    plan = Drawn(sink_scales=0, targets=targets).plan(problem)
    scales = len(geometry.schedule)
    for place in np.argwhere(plan.last_read < scales - 1):
        longer = plan.last_read.copy()
        longer[tuple(place)] += 1
        with pytest.raises(PlanError, match="the budget is"):
            dataclasses.replace(plan, last_read=longer)


def test_scored_cells_take_the_most_valuable() -> None:
    geometry = CacheGeometry(1, 2, 4, ScaleSchedule.square((1, 2, 2, 2)))
    policy = Drawn(sink_scales=0)
    value = np.zeros(geometry.shape)
    value[0, 0, 1], value[0, 1, 2], value[0, 1, 0] = 3, 5, 0.1
    object.__setattr__(policy, "value", lambda problem: value)
    plan = policy.plan(PlanningProblem(geometry, base.Budget.parse("4tokens")))  # 8 token-heads of 18
    assert plan.last_read[0].tolist()[0][1] == 3
    assert plan.last_read[0].tolist()[1][2] == 3


@pytest.mark.parametrize("bad", [np.full((2, 2, 5), -1.0), np.full((2, 2, 5), np.nan), np.zeros((2, 5))], ids=str)
def test_values_that_no_plan_is_made_of(bad: FloatArray) -> None:
    policy = Drawn()
    object.__setattr__(policy, "value", lambda problem: bad)
    with pytest.raises(PolicyError, match="finite numbers of at least 0"):
        policy.plan(PlanningProblem(GEOMETRY, base.Budget.parse("60%")))


# ---------------------------------------------------------------------- what breaks it is found


@dataclass(frozen=True)
class Static(StaticPolicy):
    """Keeps the sink scales only, but for what the tests change."""

    name: ClassVar[str] = "made-for-a-test"

    def last_read(self, problem: PlanningProblem) -> IntArray:
        return self.sinks_only(problem)


@dataclass(frozen=True)
class Dynamic(DynamicPolicy):
    """Keeps the tokens with the largest first key channel, but for what the tests change."""

    name: ClassVar[str] = "made-for-a-test"

    def score(self, seen: Candidates) -> Tensor:
        return seen.k_RHCD[..., 0].clone()


def changed(base: type[EvictionPolicy], **methods: Any) -> EvictionPolicy:
    """A policy with these methods or attributes instead of the base's."""
    made = dataclass(frozen=True)(type("Changed", (base,), {"__doc__": "Changed.", **methods}))
    return made()


def too_much(self: Static, problem: PlanningProblem) -> IntArray:
    return np.full_like(self.sinks_only(problem), len(problem.geometry.schedule) - 1)


def promise_more(self: Static, problem: PlanningProblem) -> CachePlan:
    plan = StaticPolicy.plan(self, problem)
    most = problem.geometry.full_token_heads
    return dataclasses.replace(plan, last_read=too_much(self, problem), budget=1.0, budget_token_heads=most)


def refuse(self: Any, problem: PlanningProblem) -> None:
    if problem.share < 1:
        raise BudgetError("too small")


def refuse_some(self: Any, problem: PlanningProblem) -> None:
    StaticPolicy.check(self, problem)
    if problem.share == Fraction(1, 2):
        raise BudgetError("not this one")


def forget(self: Any, problem: PlanningProblem) -> dict[str, Any]:
    return {"budget": str(problem.budget)}


def in_place(self: Any, seen: Candidates) -> Tensor:
    return seen.k_RHCD.mul_(2)[..., 0]


def whole_numbers(self: Any, seen: Candidates) -> Tensor:
    return seen.k_RHCD[..., 0].long()


def wrong_shape(self: Any, seen: Candidates) -> Tensor:
    return seen.k_RHCD[..., :2]


def by_chance(self: Any, seen: Candidates) -> Tensor:
    return torch.rand(seen.k_RHCD.shape[:3])


def over_the_batch(self: Any, seen: Candidates) -> Tensor:
    return seen.k_RHCD[..., 0].mean(dim=0, keepdim=True).expand(len(seen.k_RHCD), -1, -1).clone()


def newest_first(self: Any, seen: Candidates) -> Tensor:
    score = self.inner.score(seen)
    score[..., -seen.capacity :] = torch.inf
    return score


def remember(self: Any, seen: Candidates) -> Tensor:
    kept = self.__dict__.setdefault("kept", [])
    kept.append(seen.k_RHCD.clone())
    return seen.k_RHCD[..., 0].clone()


def by_the_seed(self: Static, problem: PlanningProblem) -> IntArray:
    found = Static.last_read(self, problem)
    found[0, 0, 3] += problem.seed % 2 if problem.share < 1 else 0
    return found


def by_a_global_generator(self: Dynamic, problem: PlanningProblem, mean: int) -> IntArray:
    return DynamicPolicy.capacities(self, problem, max(1, mean - int(np.random.randint(3))))


def by_statistics(self: Dynamic, problem: PlanningProblem, mean: int) -> IntArray:
    return DynamicPolicy.capacities(self, problem, mean if problem.statistics is None else max(1, mean // 2))


def at_once(self: Any, problem: PlanningProblem) -> None:
    if problem.statistics is None:
        raise PolicyError("needs statistics")


def without(self: Any, problem: PlanningProblem) -> Any:
    at_once(self, problem)
    return self


def never_full(self: Static, problem: PlanningProblem) -> CachePlan:
    return self.finish(self.checked(problem), self.sinks_only(problem))


def with_a_tuple(self: Any, problem: PlanningProblem) -> dict[str, Any]:
    return EvictionPolicy.settings(self, problem) | {"scales": (0, 1)}


def no_budget_at_all(self: Any, problem: PlanningProblem) -> CachePlan:
    return None  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("check", "policy", "said"),
    [
        ("introduction", Static(), "it is not registered"),
        ("introduction", changed(Static, name="Mine"), "lower-case letters"),
        ("introduction", changed(Static, name="heatkv"), "its name belongs to"),
        ("options", type("Bare", (Static,), {})(), "put @dataclass"),
        ("options", changed(Static, settings=forget), "settings lack sink_scales"),
        ("budget", changed(Static, last_read=too_much), "PlanError: the plan holds"),
        ("budget", changed(Static, plan=promise_more), "budget_token_heads of its plan"),
        ("budget", changed(Static, check=refuse), "every budget below the full cache"),
        ("budget", changed(Static, check=refuse_some), "refuses 50%, but not the smaller"),
        ("budget", changed(Static, kind="dynamic"), "a dynamic policy made a Plan"),
        ("budget", changed(Static, plan=no_budget_at_all), "gave NoneType, no plan"),
        ("memory", changed(Dynamic, score=in_place), "changed k_RHCD"),
        ("memory", changed(Dynamic, score=whole_numbers), "gave torch.int64"),
        ("memory", changed(Dynamic, score=wrong_shape), "scored"),
        ("memory", changed(Dynamic, score=remember), "keeps tensors in kept"),
        ("determinism", changed(Dynamic, score=by_chance), "after other images"),
        ("determinism", changed(Dynamic, capacities=by_a_global_generator), "different plans"),
        ("determinism", changed(Static, last_read=by_the_seed), "the seed changes its plan"),
        ("determinism", changed(Static, random=True), "the seed changes nothing"),
        ("rows", changed(Dynamic, score=over_the_batch), "the first row changes"),
        ("protection", changed(Wrapper, name="made-for-a-test", score=newest_first), "tokens of scale 1"),
        ("full-budget", changed(Static, plan=never_full), "drops something"),
        ("plan-file", changed(Static, settings=with_a_tuple), "comes back as another"),
        ("plan-file", Dynamic(), "unknown policy 'made-for-a-test'"),
        ("statistics", changed(Dynamic, capacities=by_statistics), "silently makes another plan"),
        ("statistics", changed(Dynamic, check=at_once), "PolicyError: needs statistics"),
        ("statistics", changed(Dynamic, resolved=without), "`needs` is empty"),
    ],
)
def test_broken_promises(check: str, policy: EvictionPolicy, said: str) -> None:
    with pytest.raises(AssertionError) as caught:
        CHECKS[check](policy)
    for part in (f"policy {policy.name!r} breaks the contract, {check} (", said, "seed 0]"):
        assert part in str(caught.value)
