"""Statistics that are forgotten, and plans that follow them: against plain weighted means and solving every time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import statistics_of

from heatkv.core.budget import Budget
from heatkv.core.geometry import CacheGeometry
from heatkv.core.rankings import HeadRankings
from heatkv.core.schedule import ScaleSchedule
from heatkv.core.schema import FloatArray
from heatkv.core.statistics import Statistics
from heatkv.errors import PolicyError, StatisticsError
from heatkv.online.adoption import FadingStatistics, OnlinePlanner, check_can_follow, plan_value
from heatkv.policies.base import PlanningProblem, make_policy
from heatkv.profiling.analysis.explain import worth_of
from heatkv.solve.cells import read_value
from heatkv.testing.material import made_up_mass

GEOMETRY = CacheGeometry(2, 3, 4, ScaleSchedule.square((1, 2, 3, 4, 5, 6)))
FOLLOWERS = pytest.mark.parametrize(
    ("name", "options"),
    [("heatkv", {}), *(("heatkv-lp", {"value": x}) for x in ("mass", "error", "joint")), ("heatkv-mr", {})],
)


def sharpened(count: int, seed: int, power: float = 3.0) -> FloatArray:
    """Masses of samples that differ a lot from seed to seed."""
    raw = made_up_mass(GEOMETRY, 1, seed) ** power
    mixed = np.repeat(raw, count, axis=0) + 0.02 * made_up_mass(GEOMETRY, count, seed + 1)
    normal: FloatArray = mixed / mixed.sum(axis=-1, keepdims=True)
    return normal


def made(mass: FloatArray, first: int = 0, **options: Any) -> Statistics:
    return statistics_of(GEOMETRY, mass, first_sample=first, **options)


# ------------------------------------------------------------------------------------------------ forgetting


@pytest.mark.parametrize(("parts", "half_life"), [([3, *[1] * 6], 5.0), ([20, *[1] * 4], 2.5), ([2, 4], 4.0)])
def test_forgetting_is_a_plain_weighted_mean(parts: Sequence[int], half_life: float) -> None:
    """Samples that are added together weigh the same."""
    masses, keep = made_up_mass(GEOMETRY, sum(parts), 0), 0.5 ** (1 / half_life)
    fading, first = FadingStatistics(made(masses[: parts[0]]), half_life), parts[0]
    # an endless past would weigh 1 + keep + keep^2 + ...
    weights = np.full(first, min(first, sum(keep**n for n in range(5000))) / first)
    for count in parts[1:]:
        fading.add(made(masses[first : first + count], first=first))
        weights, first = np.append(weights * keep**count, np.ones(count)), first + count
    found, singly = fading.statistics(), [made(masses[i : i + 1], first=i) for i in range(len(masses))]
    assert fading.effective_count == pytest.approx(weights.sum() ** 2 / (weights**2).sum(), rel=1e-9)
    for name in ("mass", "all_mass", "drop_error"):
        expected = np.average([getattr(one, name) for one in singly], axis=0, weights=weights)
        np.testing.assert_allclose(getattr(found, name), expected, rtol=1e-9)
    for name, array in found.levels.sums().items():
        expected = np.average([one.levels.sums()[name] for one in singly], axis=0, weights=weights)
        np.testing.assert_allclose(array / found.levels.count, expected, rtol=1e-9)


@pytest.mark.parametrize("half_life", [1e-300, 1e300])
def test_all_or_nothing_is_forgotten(half_life: float) -> None:
    old, new = sharpened(3, 0), sharpened(1, 1)
    fading = FadingStatistics(made(old), half_life)
    fading.add(made(new, first=3))
    expected = new if half_life < 1 else [*old, *new]
    np.testing.assert_allclose(fading.statistics().mass, np.mean(expected, axis=0), rtol=1e-12)


def test_names_and_files(tmp_path: Path) -> None:
    """The last 10 half-lives are named; files tell of the weights, so that nothing is merged with them."""
    masses = made_up_mass(GEOMETRY, 60, 4)
    fading = FadingStatistics(made(masses[:20]), 2.0)
    for index in range(20, 60):
        fading.add(made(masses[index : index + 1], first=index))
    found = fading.statistics()
    assert found.samples == tuple(f"7:{index}:3" for index in range(40, 60))
    # weights 1, k, k^2, ... sum to 1 / (1 - k), their squares to 1 / (1 - k^2)
    keep = 0.5**0.5
    effective = pytest.approx((1 + keep) / (1 - keep), rel=1e-4)
    assert found.provenance.settings["forgetting"] == {"half_life": 2.0, "effective_count": effective}
    found.save(tmp_path / "s.safetensors")
    assert Statistics.load(tmp_path / "s.safetensors") == found
    with pytest.raises(StatisticsError, match="cannot merge statistics with settings"):
        found.merge(made(masses[:1]))


def test_other_statistics() -> None:
    masses = made_up_mass(GEOMETRY, 2, 5)
    for name, value, said in (("fingerprint", "1e", "'1e'"), ("cfg", 3.0, "3.0"), ("sink_scales", None, "level")):
        with pytest.raises(StatisticsError, match=said):
            FadingStatistics(made(masses[:1]), 2.0).add(made(masses[1:], 1, **{name: value}))
    with pytest.raises(StatisticsError, match="sink_scales=1"):
        FadingStatistics(made(masses[:1]), 2.0).add(made(masses[1:], 1, sink_scales=1))


# ------------------------------------------------------------------------------------------------ deciding


def problem_of(statistics: Statistics, budget: str = "45%") -> PlanningProblem:
    return PlanningProblem(GEOMETRY, Budget.parse(budget), statistics, model="tiny")


@FOLLOWERS
@settings(max_examples=4)
@given(seed=st.integers(0, 1000), threshold=st.sampled_from([0.0, 0.02, 0.1, 0.3]))
def test_adoption(name: str, options: dict[str, str], seed: int, threshold: float) -> None:
    """Above the threshold, at every step against solving anew and valuing both plans by the same statistics."""
    policy = make_policy(name, **options)
    planner = OnlinePlanner(policy, problem_of(made(sharpened(4, seed))), half_life=2.0, threshold=threshold)
    assert planner.plan == policy.plan(problem_of(made(sharpened(4, seed))))
    for step in (1, 2):
        before = planner.plan
        decision = planner.follow(made(sharpened(2, seed + step), first=10 * step))
        now = planner.statistics
        value, full = plan_value(before, policy, now)
        best = plan_value(policy.plan(problem_of(now)), policy, now)[0]
        assert decision.loss == pytest.approx(full - value)
        gain = (best - value) / decision.loss
        assert decision.adopted == (gain > threshold) or abs(gain - threshold) < 1e-9
        assert gain <= (np.inf if decision.possible is None else decision.possible) + 1e-9
        assert decision.gain == pytest.approx(gain) if decision.solved else decision.possible <= threshold
        assert (planner.plan is before) == (not decision.adopted)
        assert plan_value(planner.plan, policy, now)[0] >= value
        assert planner.plan.peak_token_heads <= problem_of(now).budget_token_heads


def test_ways_out() -> None:
    """Some steps are settled by the bound alone, some are solved and not adopted, some are adopted; a plan that loses
    nothing stays."""
    seen = set()
    for name, threshold in (("heatkv-lp", 0.02), ("heatkv-lp", 0.6), ("heatkv", 0.02), ("heatkv", 0.6)):
        policy = make_policy(name, **({"value": "error"} if name == "heatkv-lp" else {}))
        planner = OnlinePlanner(policy, problem_of(made(sharpened(4, 1))), half_life=2.0, threshold=threshold)
        for step in range(4):
            found = planner.follow(made(sharpened(3, 50 + step), first=10 + 10 * step))
            seen.add((found.solved, found.adopted))
    assert seen == {(False, False), (True, False), (True, True)}
    planner = OnlinePlanner(make_policy("heatkv"), problem_of(made(sharpened(3, 8)), "100%"), threshold=0.0)
    decision = planner.follow(made(sharpened(1, 9), first=5))
    assert (decision.loss, decision.gain, decision.adopted) == (0, None, False)


@FOLLOWERS
def test_values_that_plans_and_explain_tell(name: str, options: dict[str, str]) -> None:
    policy, statistics = make_policy(name, **options), made(sharpened(3, 8))
    plan = policy.plan(problem_of(statistics))
    worth = worth_of(plan, statistics)
    assert plan_value(plan, policy, statistics) == (pytest.approx(worth.value), pytest.approx(worth.full))
    assert plan.value is None or worth.value == pytest.approx(plan.value)
    # of a policy that is not known, the drop error decides
    expected = pytest.approx(read_value(plan.last_read, statistics.drop_error))
    assert plan_value(plan, make_policy("streaming"), statistics)[0] == expected


def test_level_costs_that_nobody_plans_by() -> None:
    planner = OnlinePlanner(make_policy("heatkv"), problem_of(made(sharpened(3, 8))))
    assert planner.levels is None
    planner.follow(made(sharpened(1, 9), 5, sink_scales=None))
    assert planner.statistics.levels is None
    assert OnlinePlanner(make_policy("heatkv-mr"), problem_of(made(sharpened(3, 8)))).levels is not None


def test_what_cannot_begin() -> None:
    for policy, named in (("snapkv", "snapkv"), ("streaming", "streaming"), ("heatkv-mr:fisher", "cost=error")):
        with pytest.raises(PolicyError, match=named):
            check_can_follow(make_policy("heatkv-mr", cost="fisher") if ":" in policy else make_policy(policy))
    ranked = PlanningProblem(GEOMETRY, Budget.parse("45%"), rankings=HeadRankings.random(GEOMETRY, 0))
    plain = problem_of(made(sharpened(1, 1), sink_scales=None))
    for name, problem, options, error in (
        ("heatkv", ranked, {}, PolicyError),
        ("heatkv-mr", plain, {}, PolicyError),
        ("heatkv", plain, {"threshold": -0.1}, PolicyError),
        ("heatkv", plain, {"half_life": 0}, StatisticsError),
        ("heatkv", plain, {"half_life": float("nan")}, StatisticsError),
    ):
        with pytest.raises(error, match="|".join(["statistics", *options])):
            OnlinePlanner(make_policy(name), problem, **options)
