"""Numbers of sink scales: what level costs of fewer sinks give to plans with more, and what is refused."""

from __future__ import annotations

import re
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import SEEDS, level_live_table, statistics_of
from support.command_line import refused

from heatkv.calibration import run as calibration_run
from heatkv.calibration.measure import sample_names
from heatkv.cli import run
from heatkv.core.budget import Budget
from heatkv.core.geometry import CacheGeometry
from heatkv.core.level_statistics import LevelStatistics
from heatkv.core.levels import LEVELS, LevelChoices
from heatkv.core.schedule import ScaleSchedule
from heatkv.core.schema import FloatArray
from heatkv.core.statistics import Statistics
from heatkv.errors import BudgetError, HeatKVError, PolicyError
from heatkv.policies.base import PlanningProblem, make_policy
from heatkv.policies.lp import HeatKVLP
from heatkv.testing.material import level_costs_of, made_up_mass

SCHEDULE = ScaleSchedule.square((1, 2, 3, 4, 5))
GEOMETRY = CacheGeometry(2, 2, 4, SCHEDULE)  # N = 30


def problem(budget: str | Fraction, sinks: int | None, cost: str = "error", seed: int = 0) -> PlanningProblem:
    found = statistics_of(GEOMETRY, made_up_mass(GEOMETRY, 2, seed), sink_scales=sinks)
    if found.levels is not None:
        found = replace(found, levels=replace(found.levels, cost=cost))
    return PlanningProblem(GEOMETRY, Budget.parse(budget), found)


@pytest.mark.parametrize("policy", ["heatkv-lp", "heatkv-mr"])
@settings(max_examples=6)
@given(sinks=st.integers(0, 4), share=st.fractions(Fraction(1, 100), 1, max_denominator=100), seed=SEEDS)
def test_plans_from_costs_of_fewer_sinks(policy: str, sinks: int, share: Fraction, seed: int) -> None:
    budget = max(share, Fraction(SCHEDULE.offsets[sinks], SCHEDULE.cached_tokens))
    plans = [make_policy(policy, sink_scales=sinks).plan(problem(budget, n, seed=seed)) for n in range(sinks + 1)]
    own = plans[-1]
    for plan in plans:
        assert plan.sink_scales == plan.settings["sink_scales"] == sinks
        assert (plan.last_read[:, :, :sinks] == 4).all()
        assert max(map(max, level_live_table(plan))) <= plan.budget_token_heads
        assert own.value_bound >= plan.value - 1e-9
        assert plan.value == pytest.approx(own.value, rel=0.01, abs=1e-9)


def test_budget_by_kl_with_more_sinks() -> None:
    auto = problem("auto", 1, "fisher")
    plan = make_policy("heatkv-mr", cost="fisher", max_kl=1e9, sink_scales=3).plan(auto)
    assert plan.budget == 0.467  # three sinks are 14 of 30 tokens
    plan = make_policy("heatkv-mr", cost="fisher", max_kl=0.01, sink_scales=3).plan(auto)
    assert plan.settings["predicted_kl"] <= 0.01
    assert (plan.last_read[:, :, :3] == 4).all()


@pytest.mark.parametrize(("policy", "cost"), [("heatkv-lp", "error"), ("heatkv-mr", "error"), ("heatkv-mr", "fisher")])
def test_fewer_sinks_than_measured(policy: str, cost: str) -> None:
    options = {"cost": cost} if policy == "heatkv-mr" else {}
    with pytest.raises(PolicyError, match="sink_scales=1 is below the 2 that the level costs were measured with"):
        make_policy(policy, sink_scales=1, **options).plan(problem("50%", 2, cost))
    with pytest.raises(PolicyError, match=f"level costs of the kind '{cost}'.* for 1 sink scales or fewer"):
        make_policy(policy, sink_scales=1, **options).plan(problem("50%", None))
    if policy == "heatkv-lp":
        make_policy(policy, sink_scales=1, value="error").plan(problem("50%", 2))


@pytest.mark.parametrize(
    ("policy", "options", "budget", "limit"),
    [
        ("heatkv-mr", {}, "5%", "budget 0.05 (5%) is below 5/30 = 16.67%, the 2 sink scales"),
        ("heatkv-lp", {"value": "error"}, "1%", "budget 0.01 (1%) is below 5/30 = 16.67%, the 2 sink scales"),
        ("heatkv-mr", {"layer_cap": "10%"}, "20%", "layer_cap=10% is below 5/30 = 16.67%, the 2 sink scales"),
    ],
)
def test_limits_below_the_sinks(policy: str, options: dict[str, str], budget: str, limit: str) -> None:
    with pytest.raises(BudgetError, match=re.escape(limit)):
        make_policy(policy, **options).plan(problem(budget, 2))


# ---------------------------------------------------------------------- the command line, with costs made up


class MadeUpCosts:
    """Stands in for a measurement of level costs."""

    batch = 4

    def __call__(
        self, model: Any, choices: LevelChoices, log_bias: FloatArray, images: range, *, seed: int, settings: Any
    ) -> LevelStatistics:
        names = sample_names(model, seed, model.labels(len(images), images.start), images.start)
        mass = made_up_mass(model.geometry, len(images), images.start)
        return replace(level_costs_of(model.geometry, mass, tuple(names), choices.sink_scales), log_bias=log_bias)


def made_up_biases(model: Any, choices: LevelChoices, *_: Any, **__: Any) -> FloatArray:
    return np.zeros((model.geometry.layers, model.geometry.heads, len(choices.schedule), len(LEVELS)))


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setitem(calibration_run._LEVEL_COSTS, "error", MadeUpCosts())
    monkeypatch.setattr(calibration_run, "measure_biases", made_up_biases)
    for name in ("BIAS_SAMPLES", "LEVEL_SAMPLES"):
        monkeypatch.setattr(calibration_run, name, 1)
    return monkeypatch


def costs_in(path: Path) -> LevelStatistics:
    levels = Statistics.load(path).levels
    assert levels is not None
    return levels


def never(*_: Any, **__: Any) -> Any:
    raise AssertionError("nothing may be measured")


def test_calibrate_with_a_number_of_sinks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], made_up: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "s.safetensors"
    measure = ["calibrate", "--samples", "1", "--out", str(path), "--levels"]
    assert run([*measure, "error,samples=1,sink-scales=1"]) == 0
    assert run([*measure, "error,samples=1", "--append"]) == 0  # with the file's own number
    assert (costs_in(path).choices.sink_scales, costs_in(path).samples) == (1, ("0:0:0", "0:1:1"))
    solve = ["solve", "--policy", "heatkv-mr", "--statistics", str(path), "--budget", "1%", "--sink-scales", "0"]
    assert "sink_scales=0 is below the 1 that" in refused(capsys, *solve)
    made_up.setattr(calibration_run, "measure_samples", never)
    for levels, said in (("error,sink-scales=3", "'error' with 3"), ("fisher", "level costs of the kind 'error'")):
        assert said in refused(capsys, *measure, levels, "--append")


def test_compare_measures_with_the_sinks_of_its_policies(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], made_up: pytest.MonkeyPatch
) -> None:
    def enough(*_: Any, **__: Any) -> Any:
        raise HeatKVError("planning has begun")

    made_up.setattr(HeatKVLP, "plan", enough)
    command = ["compare", "--policies", "heatkv-lp", "--budgets", "20%", "--samples", "1", "--images", "1"]
    for folder, asked, sinks in (("few", "0", 0), ("few", "3", 0), ("many", "3", 2)):  # costs hold for more sinks
        assert run([*command, "--set", f"sink-scales={asked}", "--out", str(tmp_path / folder)]) == 2
        assert "planning has begun" in capsys.readouterr().err
        assert costs_in(tmp_path / folder / "statistics.safetensors").choices.sink_scales == sinks
    # costs that do not fit are not replaced, and nothing is measured beside them
    path = tmp_path / "many" / "statistics.safetensors"
    before = path.read_bytes()
    made_up.setattr(calibration_run, "measure_samples", never)
    for arguments, said in (
        (["--set", "sink-scales=1"], "'error' with sink_scales=2, not 'error' with 1"),
        (["--policies", "heatkv-mr", "--set", "cost=fisher"], "'error' with sink_scales=2, not 'fisher'"),
    ):
        # more samples are asked for, which would be measured first
        line = refused(capsys, *command, "--samples", "2", *arguments, "--out", str(path.parent))
        assert f"{path}: has level costs of the kind {said}" in line
        assert path.read_bytes() == before
