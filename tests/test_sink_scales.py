"""Numbers of sink scales: what level costs of fewer sinks give to plans with more, and what is refused."""

from __future__ import annotations

import dataclasses
import re
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from strategies import SEEDS, level_live_table, statistics_of
from support.command_line import refused

from heatkv.cli import run
from heatkv.core.budget import Budget
from heatkv.core.geometry import CacheGeometry
from heatkv.core.schedule import ScaleSchedule
from heatkv.core.statistics import Statistics
from heatkv.errors import BudgetError, PolicyError
from heatkv.policies.base import PlanningProblem, make_policy
from heatkv.testing.material import made_up_mass

SCHEDULE = ScaleSchedule.square((1, 2, 3, 4, 5))
GEOMETRY = CacheGeometry(2, 2, 4, SCHEDULE)  # N = 30

FloatArray = NDArray[np.float64]


def measured(sinks: int | None, cost: str = "error", seed: int = 0) -> Statistics:
    found = statistics_of(GEOMETRY, made_up_mass(GEOMETRY, 2, seed), sink_scales=sinks)
    if found.levels is None:
        return found
    return dataclasses.replace(found, levels=dataclasses.replace(found.levels, cost=cost))


# ---------------------------------------------------------------------- more sinks than were measured with


@pytest.mark.parametrize("policy", ["heatkv-lp", "heatkv-mr"])
@pytest.mark.parametrize("sinks", [0, 1, 2, 3, 4])
@settings(max_examples=3)
@given(share=st.fractions(Fraction(1, 100), 1, max_denominator=100), seed=SEEDS)
def test_plans_from_costs_of_fewer_sinks(policy: str, sinks: int, share: Fraction, seed: int) -> None:
    least = Fraction(SCHEDULE.offsets[sinks], SCHEDULE.cached_tokens)
    budget = Budget("share", max(share, least))
    plans = [
        make_policy(policy, sink_scales=sinks).plan(PlanningProblem(GEOMETRY, budget, measured(n, seed=seed)))
        for n in range(sinks + 1)
    ]
    own = plans[-1]
    for plan in plans:
        assert plan.sink_scales == plan.settings["sink_scales"] == sinks
        assert (plan.last_read[:, :, :sinks] == 4).all()
        assert max(map(max, level_live_table(plan))) <= plan.budget_token_heads
        assert plan.value is not None
        assert own.value is not None
        assert own.value_bound is not None
        assert own.value_bound >= plan.value - 1e-9
        assert plan.value == pytest.approx(own.value, rel=0.01, abs=1e-9)


def test_budget_by_kl_with_more_sinks() -> None:
    problem = PlanningProblem(GEOMETRY, Budget.parse("auto"), measured(1, "fisher"))
    plan = make_policy("heatkv-mr", cost="fisher", max_kl=1e9, sink_scales=3).plan(problem)
    assert plan.budget == 0.467  # three sinks are 14 of 30 tokens
    plan = make_policy("heatkv-mr", cost="fisher", max_kl=0.01, sink_scales=3).plan(problem)
    assert plan.settings["predicted_kl"] <= 0.01
    assert (plan.last_read[:, :, :3] == 4).all()


@pytest.mark.parametrize(("policy", "cost"), [("heatkv-lp", "error"), ("heatkv-mr", "error"), ("heatkv-mr", "fisher")])
def test_fewer_sinks_than_measured(policy: str, cost: str) -> None:
    options = {"cost": cost} if policy == "heatkv-mr" else {}
    problem = PlanningProblem(GEOMETRY, Budget.parse("50%"), measured(2, cost))
    with pytest.raises(PolicyError, match="sink_scales=1 is below the 2 that the level costs were measured with"):
        make_policy(policy, sink_scales=1, **options).plan(problem)
    with pytest.raises(PolicyError, match=f"level costs of the kind '{cost}'.* for 1 sink scales or fewer"):
        make_policy(policy, sink_scales=1, **options).plan(dataclasses.replace(problem, statistics=measured(None)))
    if policy == "heatkv-lp":
        make_policy(policy, sink_scales=1, value="error").plan(problem)


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
        make_policy(policy, **options).plan(PlanningProblem(GEOMETRY, Budget.parse(budget), measured(2)))


# ---------------------------------------------------------------------- the command line


def never(*_: Any, **__: Any) -> Any:
    raise AssertionError("nothing may be measured")


def test_calibrate_with_a_number_of_sinks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("heatkv.calibration.run.BIAS_SAMPLES", 1)
    path = tmp_path / "s.safetensors"
    measure = ["calibrate", "--samples", "1", "--out", str(path), "--levels"]
    assert run([*measure, "error,samples=1,sink-scales=1"]) == 0
    assert run([*measure, "error,samples=1", "--append"]) == 0  # with the file's own number
    levels = Statistics.load(path).levels
    assert levels is not None
    assert (levels.choices.sink_scales, levels.samples) == (1, ("0:0:0", "0:1:1"))
    solve = ["solve", "--policy", "heatkv-mr", "--statistics", str(path), "--budget"]
    for sinks, budget in (("1", "1%"), ("3", "20%")):
        assert run([*solve, budget, "--sink-scales", sinks]) == 0
    assert "sink_scales=0 is below the 1 that" in refused(capsys, *solve, "1%", "--sink-scales", "0")
    monkeypatch.setattr("heatkv.calibration.run.measure_samples", never)
    for levels, said in (("error,sink-scales=3", "'error' with 3"), ("fisher", "level costs of the kind 'error'")):
        assert said in refused(capsys, *measure, levels, "--append")


def test_compare_measures_with_the_sinks_of_its_policies(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("BIAS_SAMPLES", "LEVEL_SAMPLES"):
        monkeypatch.setattr(f"heatkv.calibration.run.{name}", 1)
    few = ["--samples", "1", "--images", "1", "--pictures", "1", "--repeats", "1"]
    command = ["compare", "--policies", "heatkv-lp", "--budgets", "20%", *few]

    def sinks_of_costs(folder: Path, sinks: str) -> int:
        assert run([*command, "--set", f"sink-scales={sinks}", "--out", str(folder)]) == 0
        levels = Statistics.load(folder / "statistics.safetensors").levels
        assert levels is not None
        return levels.choices.sink_scales

    assert sinks_of_costs(tmp_path / "few", "0") == 0
    assert sinks_of_costs(tmp_path / "few", "3") == 0  # they hold for more
    assert sinks_of_costs(tmp_path / "many", "3") == 2
    # costs that do not fit are not replaced, and nothing is measured beside them
    path = tmp_path / "many" / "statistics.safetensors"
    before = path.read_bytes()
    monkeypatch.setattr("heatkv.calibration.run.measure_samples", never)
    for arguments, said in (
        (["--set", "sink-scales=1"], "'error' with sink_scales=2, not 'error' with 1"),
        (["--policies", "heatkv-mr", "--set", "cost=fisher"], "'error' with sink_scales=2, not 'fisher'"),
    ):
        # more samples are asked for, which would be measured first
        line = refused(capsys, *command, "--samples", "2", *arguments, "--out", str(path.parent))
        assert f"{path}: has level costs of the kind {said}" in line
        assert path.read_bytes() == before
