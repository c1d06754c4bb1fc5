"""Statistics that are forgotten, and plans that follow them: against plain weighted means and solving every time."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from strategies import statistics_of

from heatkv.core.budget import Budget
from heatkv.core.geometry import CacheGeometry
from heatkv.core.plan import Plan
from heatkv.core.rankings import HeadRankings
from heatkv.core.schedule import ScaleSchedule
from heatkv.core.statistics import Statistics
from heatkv.errors import PolicyError, StatisticsError
from heatkv.online.adoption import FadingStatistics, OnlinePlanner, check_can_follow, plan_value
from heatkv.policies.base import PlanningProblem, StaticPolicy, make_policy
from heatkv.profiling.analysis.explain import worth_of
from heatkv.solve.cells import read_value
from heatkv.testing.material import made_up_mass

GEOMETRY = CacheGeometry(2, 3, 4, ScaleSchedule.square((1, 2, 3, 4, 5, 6)))
FOLLOWERS = (
    ("heatkv", {}),
    ("heatkv-lp", {"value": "mass"}),
    ("heatkv-lp", {"value": "error"}),
    ("heatkv-lp", {"value": "joint"}),
    ("heatkv-mr", {}),
)


def sharpened(count: int, seed: int, power: float = 3.0) -> NDArray[np.float64]:
    """Masses of samples that differ a lot from seed to seed."""
    raw = made_up_mass(GEOMETRY, 1, seed) ** power
    mixed = np.repeat(raw, count, axis=0) + 0.02 * made_up_mass(GEOMETRY, count, seed + 1)
    normal: NDArray[np.float64] = mixed / mixed.sum(axis=-1, keepdims=True)
    return normal


def made(mass: NDArray[np.float64], first: int = 0) -> Statistics:
    return statistics_of(GEOMETRY, mass, first_sample=first)


# ------------------------------------------------------------------------------------------------ forgetting


@pytest.mark.parametrize(("initial", "half_life"), [(3, 5.0), (40, 2.5), (1, 0.5)])
def test_forgetting_is_a_plain_weighted_mean(initial: int, half_life: float) -> None:
    masses = made_up_mass(GEOMETRY, initial + 12, 0)
    fading = FadingStatistics(made(masses[:initial]), half_life)
    for index in range(initial, initial + 12):
        fading.add(made(masses[index : index + 1], first=index))
    found = fading.statistics()
    # an endless past would weigh 1 + keep + keep^2 + ...
    keep = 0.5 ** (1 / half_life)
    endless = sum(keep**n for n in range(5000))
    weights = np.array([keep**12 * min(initial, endless) / initial] * initial + [keep**n for n in reversed(range(12))])

    def mean(of_samples: NDArray[np.float64]) -> NDArray[np.float64]:
        result: NDArray[np.float64] = np.average(of_samples, axis=0, weights=weights)
        return result

    later = np.tril(np.ones(masses.shape[-2:]), -1)
    np.testing.assert_allclose(found.mass, mean(masses), rtol=1e-9)
    np.testing.assert_allclose(found.all_mass, mean(masses), rtol=1e-9)
    np.testing.assert_allclose(found.drop_error, mean(masses**3 * later), rtol=1e-9)
    np.testing.assert_allclose(fading.effective_count, weights.sum() ** 2 / (weights**2).sum(), rtol=1e-9)
    assert found.levels is not None
    one_by_one = [made(masses[i : i + 1], first=i).levels for i in range(len(masses))]
    for target in range(len(GEOMETRY.schedule)):
        costs = np.stack([levels.joint[target] for levels in one_by_one if levels is not None])
        np.testing.assert_allclose(found.levels.joint[target], mean(costs), rtol=1e-9)
    singles = np.stack([levels.single for levels in one_by_one if levels is not None])
    np.testing.assert_allclose(found.levels.single, mean(singles), rtol=1e-9)


@pytest.mark.parametrize("half_life", [1e-300, 1e16, 1e300])
def test_all_or_nothing_is_forgotten(half_life: float) -> None:
    old, new = sharpened(3, 0), sharpened(1, 1)
    fading = FadingStatistics(made(old), half_life)
    fading.add(made(new, first=3))
    expected = new if half_life < 1 else [*old, *new]
    np.testing.assert_allclose(fading.statistics().mass, np.mean(expected, axis=0), rtol=1e-12)


def test_half_of_the_weight_is_gone_after_the_half_life() -> None:
    old, new = made_up_mass(GEOMETRY, 400, 1), made_up_mass(GEOMETRY, 10, 2)
    fading = FadingStatistics(made(old), 10.0)
    for index in range(10):
        fading.add(made(new[index : index + 1], first=400 + index))
    keep = 0.5**0.1
    of_new = np.average(new, axis=0, weights=[keep**n for n in reversed(range(10))])
    np.testing.assert_allclose(fading.statistics().mass, (old.mean(axis=0) + of_new) / 2, rtol=1e-9)


def test_samples_that_are_added_together_weigh_the_same() -> None:
    masses = made_up_mass(GEOMETRY, 6, 3)
    fading = FadingStatistics(made(masses[:2]), 4.0)
    fading.add(made(masses[2:], first=2))
    weights = [0.5] * 2 + [1.0] * 4  # four more were measured
    np.testing.assert_allclose(fading.statistics().mass, np.average(masses, axis=0, weights=weights), rtol=1e-9)


def test_names_are_bounded_and_files_tell_of_the_weights(tmp_path: Path) -> None:
    masses = made_up_mass(GEOMETRY, 60, 4)
    fading = FadingStatistics(made(masses[:20]), 2.0)
    for index in range(20, 60):
        fading.add(made(masses[index : index + 1], first=index))
    found = fading.statistics()
    assert found.provenance.samples == tuple(f"7:{index}:3" for index in range(40, 60))
    assert found.provenance.settings["forgetting"]["half_life"] == 2.0
    # weights 1, k, k^2, ... sum to 1 / (1 - k), their squares to 1 / (1 - k^2)
    keep = 0.5**0.5
    assert found.provenance.settings["forgetting"]["effective_count"] == pytest.approx(
        (1 + keep) / (1 - keep), rel=1e-4
    )
    found.save(tmp_path / "s.safetensors")
    assert Statistics.load(tmp_path / "s.safetensors") == found
    with pytest.raises(StatisticsError, match="cannot merge statistics with settings"):
        found.merge(made(masses[:1]))


def test_what_was_measured_otherwise_is_refused() -> None:
    masses = made_up_mass(GEOMETRY, 2, 5)
    fading = FadingStatistics(made(masses[:1]), 2.0)
    for other, said in (
        ({"fingerprint": "1e"}, "fingerprint of the statistics is '0f', of what was measured '1e'"),
        ({"cfg": 3.0}, "cfg of the statistics is 1.5, of what was measured 3.0"),
        ({"sink_scales": None}, "what was measured lacks level costs"),
        ({"sink_scales": 1}, "cannot merge level costs with sink_scales=2"),
    ):
        with pytest.raises(StatisticsError, match=said):
            fading.add(statistics_of(GEOMETRY, masses[1:], 1, **other))  # type: ignore[arg-type]
    with pytest.raises(StatisticsError, match="what was measured lacks error_sum"):
        fading.add(replace(made(masses[1:], 1), error_sum=None))
    for half_life in (0, -1, float("nan"), "2"):
        with pytest.raises(StatisticsError, match="half_life is"):
            FadingStatistics(made(masses), half_life)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------ deciding


def problem_of(statistics: Statistics, budget: str = "45%") -> PlanningProblem:
    return PlanningProblem(GEOMETRY, Budget.parse(budget), statistics, model="tiny")


def solved(policy: StaticPolicy, problem: PlanningProblem) -> Plan:
    plan = policy.plan(problem)
    assert isinstance(plan, Plan)
    return plan


@pytest.mark.parametrize(("name", "options"), FOLLOWERS)
@settings(max_examples=4)
@given(seed=st.integers(0, 1000), threshold=st.sampled_from([0.0, 0.02, 0.1, 0.3]))
def test_a_plan_is_adopted_when_it_gains_more_than_the_threshold(
    name: str, options: dict[str, str], seed: int, threshold: float
) -> None:
    """At every step against solving anew and valuing both plans by the same statistics."""
    policy = make_policy(name, **options)
    assert isinstance(policy, StaticPolicy)
    planner = OnlinePlanner(policy, problem_of(made(sharpened(4, seed))), half_life=2.0, threshold=threshold)
    assert planner.plan == solved(policy, problem_of(made(sharpened(4, seed))))
    for step in (1, 2):
        before = planner.plan
        decision = planner.follow(made(sharpened(2, seed + step), first=10 * step))
        now = planner.statistics
        value, full = plan_value(before, policy, now)
        best = plan_value(solved(policy, problem_of(now)), policy, now)[0]
        assert decision.loss == pytest.approx(full - value)
        gain = (best - value) / decision.loss
        assert decision.adopted == (gain > threshold) or abs(gain - threshold) < 1e-9
        if decision.possible is not None:
            assert gain <= decision.possible + 1e-9
        if decision.solved:
            assert decision.gain == pytest.approx(gain)
        else:
            assert decision.possible is not None
            assert decision.possible <= threshold
        assert (planner.plan is before) == (not decision.adopted)
        if decision.adopted:
            assert plan_value(planner.plan, policy, now)[0] > value
        assert planner.plan.peak_token_heads <= problem_of(now).budget_token_heads


def test_both_ways_out_are_taken() -> None:
    """Some steps are settled by the bound alone, some are solved and not adopted, some are adopted."""
    seen = set()
    for name, threshold in (("heatkv-lp", 0.02), ("heatkv-lp", 0.6), ("heatkv", 0.02), ("heatkv", 0.6)):
        options = {"value": "error"} if name == "heatkv-lp" else {}
        planner = OnlinePlanner(
            make_policy(name, **options), problem_of(made(sharpened(4, 1))), half_life=2.0, threshold=threshold
        )
        for step in range(4):
            found = planner.follow(made(sharpened(3, 50 + step), first=10 + 10 * step))
            seen.add((found.solved, found.adopted))
    assert seen == {(False, False), (True, False), (True, True)}


@pytest.mark.parametrize(("name", "options"), FOLLOWERS)
def test_values_are_those_that_plans_and_explain_tell(name: str, options: dict[str, str]) -> None:
    policy, statistics = make_policy(name, **options), made(sharpened(3, 8))
    assert isinstance(policy, StaticPolicy)
    plan = solved(policy, problem_of(statistics))
    value, full = plan_value(plan, policy, statistics)
    worth = worth_of(plan, statistics)
    assert value == pytest.approx(worth.value)
    assert full == pytest.approx(worth.full)
    if plan.value is not None:
        assert value == pytest.approx(plan.value)
    other = make_policy("streaming")  # of a policy that is not known, the drop error decides
    assert isinstance(other, StaticPolicy)
    assert plan_value(plan, other, statistics)[0] == pytest.approx(read_value(plan.last_read, statistics.drop_error))


def test_level_costs_that_nobody_plans_by_are_left_out() -> None:
    planner = OnlinePlanner(make_policy("heatkv"), problem_of(made(sharpened(3, 8))))
    assert planner.levels is None
    planner.follow(statistics_of(GEOMETRY, sharpened(1, 9), 5, sink_scales=None))
    assert planner.statistics.levels is None
    assert OnlinePlanner(make_policy("heatkv-mr"), problem_of(made(sharpened(3, 8)))).levels is not None


def test_a_plan_that_loses_nothing_stays() -> None:
    planner = OnlinePlanner(make_policy("heatkv"), problem_of(made(sharpened(3, 8)), "100%"), threshold=0.0)
    decision = planner.follow(made(sharpened(1, 9), first=5))
    assert (decision.loss, decision.gain, decision.adopted) == (0, None, False)


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("snapkv", {}, "chooses tokens while it draws and has no value to follow; heatkv, heatkv-lp and heatkv-mr do"),
        ("streaming", {}, "plans from nothing measured"),
        ("random", {}, "plans from nothing measured"),
        ("heatkv-mr", {"cost": "fisher"}, "by fisher costs, which cannot be measured layer by layer; set cost=error"),
    ],
)
def test_policies_that_cannot_follow_are_refused(name: str, options: dict[str, str], said: str) -> None:
    with pytest.raises(PolicyError, match=said):
        check_can_follow(make_policy(name, **options))


def test_what_cannot_begin_is_refused() -> None:
    rankings = HeadRankings.random(GEOMETRY, 0)
    ranked = PlanningProblem(GEOMETRY, Budget.parse("45%"), rankings=rankings)
    with pytest.raises(PolicyError, match="begins with statistics"):
        OnlinePlanner(make_policy("heatkv"), ranked)
    with pytest.raises(PolicyError, match="needs statistics with level costs"):
        OnlinePlanner(make_policy("heatkv-mr"), problem_of(statistics_of(GEOMETRY, sharpened(1, 1), sink_scales=None)))
    for threshold in (-0.1, float("nan"), "5%"):
        with pytest.raises(PolicyError, match="threshold is"):
            OnlinePlanner(make_policy("heatkv"), problem_of(made(sharpened(1, 1))), threshold=threshold)  # type: ignore[arg-type]
