"""heatkv-mr: budgets chosen by the KL they predict, its options, and what its plans hold."""

from __future__ import annotations

import dataclasses
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import SEEDS, level_live_table, statistics_of

from heatkv.core.budget import Budget
from heatkv.core.geometry import CacheGeometry
from heatkv.core.plan import Plan
from heatkv.core.schedule import ScaleSchedule
from heatkv.core.statistics import Statistics
from heatkv.errors import PolicyError
from heatkv.policies.base import PlanningProblem, make_policy
from heatkv.testing.material import made_up_mass

SCHEDULE = ScaleSchedule.square((1, 2, 3, 4, 5))
GEOMETRY = CacheGeometry(3, 4, 4, SCHEDULE)  # N = 30, 55 tokens in all; two sinks are 5 tokens


def measured(seed: int = 0, cost: str = "fisher", sinks: int = 2) -> Statistics:
    found = statistics_of(GEOMETRY, made_up_mass(GEOMETRY, 2, seed), sink_scales=sinks)
    assert found.levels is not None
    bias = np.random.default_rng(seed).normal(size=found.levels.log_bias.shape)
    return dataclasses.replace(found, levels=dataclasses.replace(found.levels, cost=cost, log_bias=bias))


def plan(budget: Any, statistics: Statistics, **options: Any) -> Plan:
    kind = statistics.levels.cost if statistics.levels is not None else "error"
    problem = PlanningProblem(GEOMETRY, Budget.parse(budget), statistics)
    return make_policy("heatkv-mr", **{"cost": kind, **options}).plan(problem)


# ---------------------------------------------------------------------- budgets chosen by their KL


def predicted_kl(made: Plan) -> float:
    """Half the costs per token, as a share of 0.7 of the KL."""
    assert made.value is not None
    return -made.value / 2 / 55 / 0.7


@settings(max_examples=12)
@given(max_kl=st.floats(1e-4, 0.3), seed=SEEDS)
def test_auto_is_the_smallest_budget_within_the_kl(max_kl: float, seed: int) -> None:
    statistics = measured(seed)
    made = plan("auto", statistics, max_kl=max_kl)
    assert made.settings["predicted_kl"] == pytest.approx(predicted_kl(made), rel=1e-12)
    assert made.settings["predicted_kl"] <= max_kl
    assert (made.settings["budget"], made.settings["max_kl"]) == ("auto", max_kl)
    steps = Fraction(made.budget).limit_denominator(1000) * 1000
    assert steps.denominator == 1
    assert made.budget_token_heads == steps * 360 // 1000
    assert max(map(max, level_live_table(made))) <= made.budget_token_heads
    if Fraction(int(steps) - 1, 1000) >= Fraction(5, 30):
        below = plan(Fraction(int(steps) - 1, 1000), statistics)
        assert below.settings["predicted_kl"] > max_kl
        assert below.settings["predicted_kl"] == pytest.approx(predicted_kl(below), rel=1e-12)
    else:  # the sinks need that much
        assert steps == 167
    again = plan(Fraction(int(steps), 1000), statistics)
    assert again.last_read.tolist() == made.last_read.tolist()
    assert again.settings["predicted_kl"] == made.settings["predicted_kl"]


def test_the_ends_of_auto() -> None:
    assert plan("auto", measured(), max_kl=1e9).budget == 0.167
    assert plan("auto", measured(), max_kl=1e-300).had_no_effect()
    without_sinks = plan("auto", measured(sinks=0), max_kl=1e9, sink_scales=0)
    assert without_sinks.budget == 0.001
    assert without_sinks.peak_token_heads == 0


def test_a_cap_on_layers_can_make_a_kl_unreachable() -> None:
    with pytest.raises(PolicyError, match=r"max_kl=1e-06: under layer_cap=30% the largest has 0\.\d+; raise"):
        plan("auto", measured(), max_kl=1e-6, layer_cap="30%")


@pytest.mark.parametrize(
    ("budget", "options", "phrase"),
    [
        ("auto", {"cost": "error", "max_kl": 0.1}, "budget auto needs cost=fisher, .* and max_kl"),
        ("auto", {}, "budget auto needs cost=fisher, .* and max_kl"),
        ("30%", {"max_kl": 0.1}, "max_kl chooses the budget; .* not with 30%"),
        ("30%", {"levels": "pool2"}, "levels='pool2'"),
        ("30%", {"levels": ""}, "levels=''"),
        ("30%", {"levels": "full+mean+mean"}, r"levels='full\+mean\+mean'"),
        ("30%", {"levels": "full+pool3"}, r"levels='full\+pool3'"),
        ("30%", {"cost": "error"}, "level costs of the kind 'error', not 'fisher'"),
        ("30%", {"sink_scales": 1}, "sink_scales=1 is below the 2 that the level costs were measured with"),
    ],
)
def test_options_that_do_not_fit(budget: str, options: dict[str, Any], phrase: str) -> None:
    with pytest.raises(PolicyError, match=phrase):
        plan(budget, measured(), **options)


def test_missing_level_costs() -> None:
    statistics = measured()
    for lacking in (None, dataclasses.replace(statistics, levels=None)):
        problem = PlanningProblem(GEOMETRY, Budget.parse("30%"), lacking)
        with pytest.raises(PolicyError, match="needs statistics with level costs of the kind 'fisher'"):
            make_policy("heatkv-mr", cost="fisher").plan(problem)


# ---------------------------------------------------------------------- plans


@settings(max_examples=10)
@given(budget=st.fractions(Fraction(1, 5), 1, max_denominator=50), seed=SEEDS)
def test_more_levels_are_worth_more(budget: Fraction, seed: int) -> None:
    statistics = measured(seed, "error")
    dropping = plan(budget, statistics, levels="full")
    assert dropping.coarse == ()
    assert "predicted_kl" not in dropping.settings
    only = make_policy("heatkv-lp").plan(PlanningProblem(GEOMETRY, Budget("share", budget), statistics))
    assert only.last_read.tolist() == dropping.last_read.tolist()
    assert only.value == dropping.value
    assert statistics.levels is not None
    for levels, known in (("full+mean", ["mean"]), ("full+mean+pool2", ["pool2", "mean"])):
        made = plan(budget, statistics, levels=levels)
        assert made.value is not None
        assert made.value_bound is not None
        assert dropping.value is not None
        assert dropping.value <= made.value <= made.value_bound <= 0
        assert [cells.level for cells in made.coarse] == [level for level in known if level in dict(made.levels)]
        finer = made.last_read
        for cells in made.coarse:
            index = {"pool2": 1, "mean": 2}[cells.level]
            assert np.array_equal(cells.log_bias, statistics.levels.log_bias[..., index])
            assert (cells.last_read > finer).any()  # a level that no cell is held at is left out
            finer = cells.last_read
        assert max(map(max, level_live_table(made))) <= int(budget * 360)


def test_no_layer_holds_more_than_its_cap() -> None:
    made = plan("50%", measured(), layer_cap="40%")
    assert made.held.sum(axis=1).max() <= 48 < plan("50%", measured()).held.sum(axis=1).max()
