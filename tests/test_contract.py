"""The contract over everything registered, with other options and drawn models too; and what breaks it is found."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from strategies import SEEDS, geometries
from support.dynamic import GEOMETRY, POLICIES
from torch import Tensor

from heatkv.core.geometry import CacheGeometry
from heatkv.core.plan import CachePlan
from heatkv.errors import BudgetError, PolicyError
from heatkv.policies.base import EvictionPolicy, PlanningProblem, StaticPolicy
from heatkv.policies.composition import AdaKV, Protected
from heatkv.policies.dynamic import Candidates, DynamicPolicy
from heatkv.policies.heatkv_mr import HeatKVMR
from heatkv.policies.lp import HeatKVLP
from heatkv.policies.windows import Streaming
from heatkv.registry import registered_policies
from heatkv.testing.contract import contract_checks
from heatkv.testing.material import made_up_statistics, small_geometries

CHECKS = dict(contract_checks())
REGISTERED = registered_policies()
SOLVED = ("heatkv-lp", "heatkv-mr")  # plans of these take long on drawn models

OTHERS: dict[str, EvictionPolicy] = {
    **POLICIES,
    "adakv over what needs statistics": AdaKV(base="hack-like:contextual_share=0.3"),
    "protected over scalekv": Protected(base="scalekv", scales="1"),
    "streaming, one sink": Streaming(sink_scales=1),
    "lp by mass": HeatKVLP(value="mass"),
    "lp, greedy": HeatKVLP(value="error", solver="greedy"),
    "levels by Fisher costs": HeatKVMR(cost="fisher"),
    "levels, dropping only": HeatKVMR(levels="full", sink_scales=1),
}

every_check = pytest.mark.parametrize("check", CHECKS)


@every_check
@pytest.mark.parametrize("name", REGISTERED)
def test_every_policy_keeps_the_contract(name: str, check: str) -> None:
    CHECKS[check](name)


@every_check
@pytest.mark.parametrize("name", OTHERS)
def test_so_it_does_with_other_options(name: str, check: str) -> None:
    CHECKS[check](OTHERS[name], geometries=[GEOMETRY], seed=1)


@pytest.mark.parametrize("name", [name for name in REGISTERED if name not in SOLVED])
@settings(max_examples=15)
@given(geometry=geometries(min_scales=4), seed=SEEDS, sinks=st.integers(0, 3))
def test_so_it_does_on_any_model(name: str, geometry: CacheGeometry, seed: int, sinks: int) -> None:
    policy = REGISTERED[name].policy()
    if isinstance(policy, StaticPolicy):
        policy = dataclasses.replace(policy, sink_scales=sinks)
    for check in ("budget", "memory", "full-budget"):
        CHECKS[check](policy, geometries=[geometry], seed=seed)


def test_the_material_is_as_it_says() -> None:
    for geometry in small_geometries(3):
        statistics = made_up_statistics(geometry, 3, sink_scales=1, cost="fisher")
        statistics.check_geometry(geometry)
        assert statistics.levels is not None
        assert (statistics.levels.cost, statistics.levels.choices.sink_scales) == ("fisher", 1)
    assert small_geometries(3) == small_geometries(3) != small_geometries(4)


# ---------------------------------------------------------------------- what breaks it is found


@dataclass(frozen=True)
class Static(StaticPolicy):
    """Keeps the sink scales only, but for what the tests change."""

    name: ClassVar[str] = "made-for-a-test"
    source: ClassVar[str] = "a test"

    def last_read(self, problem: PlanningProblem) -> NDArray[np.int64]:
        if problem.share == 1:
            return np.full_like(self.sinks_only(problem), len(problem.geometry.schedule) - 1)
        return self.sinks_only(problem)


@dataclass(frozen=True)
class Dynamic(DynamicPolicy):
    """Keeps the tokens with the largest first key channel, but for what the tests change."""

    name: ClassVar[str] = "made-for-a-test"
    source: ClassVar[str] = "a test"

    def score(self, seen: Candidates) -> Tensor:
        return seen.k_RHCD[..., 0].clone()


def changed(base: type[EvictionPolicy], **methods: Any) -> EvictionPolicy:
    """A policy with these methods or attributes instead of the base's."""
    made = dataclass(frozen=True)(type("Changed", (base,), {"__doc__": "Changed.", **methods}))
    return made()


def too_much(self: Static, problem: PlanningProblem) -> NDArray[np.int64]:
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


def remember(self: Any, seen: Candidates) -> Tensor:
    kept = self.__dict__.setdefault("kept", [])
    kept.append(seen.k_RHCD.clone())
    return seen.k_RHCD[..., 0].clone()


def by_the_seed(self: Static, problem: PlanningProblem) -> NDArray[np.int64]:
    found = Static.last_read(self, problem)
    found[0, 0, 3] += problem.seed % 2 if problem.share < 1 else 0
    return found


def by_a_global_generator(self: Dynamic, problem: PlanningProblem, mean: int) -> NDArray[np.int64]:
    return DynamicPolicy.capacities(self, problem, max(1, mean - int(np.random.randint(3))))


def by_statistics(self: Dynamic, problem: PlanningProblem, mean: int) -> NDArray[np.int64]:
    return DynamicPolicy.capacities(self, problem, mean if problem.statistics is None else max(1, mean // 2))


def at_once(self: Any, problem: PlanningProblem) -> None:
    if problem.statistics is None:
        raise PolicyError("needs statistics")


def without(self: Any, problem: PlanningProblem) -> Any:
    at_once(self, problem)
    return self


def never_full(self: Static, problem: PlanningProblem) -> NDArray[np.int64]:
    return self.sinks_only(problem)


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
        ("budget", changed(Static, plan=promise_more), "its plan promises"),
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
        ("full-budget", changed(Static, last_read=never_full), "drops something"),
        ("plan-file", changed(Static, settings=with_a_tuple), "comes back as another"),
        ("plan-file", Dynamic(), "unknown policy 'made-for-a-test'"),
        ("statistics", changed(Dynamic, capacities=by_statistics), "silently makes another plan"),
        ("statistics", changed(Dynamic, check=at_once), "PolicyError: needs statistics"),
        ("statistics", changed(Dynamic, resolved=without), "`needs` is 'nothing'"),
    ],
)
def test_broken_promises_are_found(check: str, policy: EvictionPolicy, said: str) -> None:
    with pytest.raises(AssertionError) as caught:
        CHECKS[check](policy)
    for part in (f"policy {policy.name!r} breaks the contract, {check} (", said, "seed 0]"):
        assert part in str(caught.value)
