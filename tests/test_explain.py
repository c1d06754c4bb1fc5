"""What a plan keeps, counted cell by cell; what room is worth, against solving again; and the command that tells it."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import SEEDS, geometries, last_reads, plans, statistics_of
from support.levels import FEW, MORE, optimum, random_levels

from heatkv.cli import run
from heatkv.core.budget import Budget
from heatkv.core.geometry import CacheGeometry
from heatkv.core.levels import level_tokens
from heatkv.core.plan import CoarseCells, Plan
from heatkv.core.plan_file import load_plan
from heatkv.core.schedule import ScaleSchedule
from heatkv.core.statistics import Statistics
from heatkv.errors import HeatKVError, PlanError, PolicyError, StatisticsError
from heatkv.policies.base import PlanningProblem, make_policy
from heatkv.profiling.analysis.explain import (
    ends_of_cells,
    full_use,
    kept_of_heads,
    kept_of_scales,
    reads_of_scales,
    worth_of,
)
from heatkv.profiling.analysis.plan_view import bar, worth_lines
from heatkv.solve.checkpoints import Capacity
from heatkv.testing.material import level_costs_of, made_up_mass

SQUARE = ScaleSchedule.square((1, 2, 3, 4, 5, 6))


# ------------------------------------------------------------------------------------------------ what is kept


@given(plan=plans(), data=st.data())
def test_kept_shares_against_every_read(plan: Plan, data: st.DataObject) -> None:
    """Cell by cell and target by target, with no level, one or two beside the whole cells."""
    coarse, finer = [], plan.last_read
    for level in data.draw(st.sampled_from([[], ["pool2"], ["mean"], ["pool2", "mean"]])):
        finer = np.maximum(finer, data.draw(last_reads(plan.geometry)))
        coarse.append(CoarseCells.uncalibrated(level, finer, plan.schedule))
    full = plan.geometry.full_token_heads
    # levels take room, of which these figures know nothing
    plan = replace(plan, budget=1.0, budget_token_heads=full, coarse=tuple(coarse))
    layers, heads, targets = plan.geometry.layers, plan.geometry.heads, range(len(plan.schedule))
    tokens = [level_tokens(plan.schedule, level) for level, _ in plan.levels]
    arrays = [last_read for _, last_read in plan.levels]

    def level_of(l: int, h: int, s: int, t: int) -> int | None:
        return next((i for i, last_read in enumerate(arrays) if last_read[l, h, s] >= t), None)

    read = {
        (l, h, s, t): level_of(l, h, s, t)
        for l in range(layers) for h in range(heads) for t in targets for s in range(t)
    }  # fmt: skip
    served, kept = reads_of_scales(arrays), kept_of_scales(arrays, tokens)
    for source in targets[:-1]:
        levels = [level for (_, _, s, _), level in read.items() if s == source]
        for index in range(len(arrays)):
            assert served[index, source] == pytest.approx(levels.count(index) / len(levels))
        held = sum(tokens[level][source] for level in levels if level is not None)
        assert kept[source] == pytest.approx(held / len(levels) / tokens[0][source])
    for layer in range(layers):
        for head in range(heads):
            mine = [(s, level) for (l, h, s, _), level in read.items() if (l, h) == (layer, head)]
            held = sum(tokens[level][s] for s, level in mine if level is not None)
            expected = held / sum(tokens[0][s] for s, _ in mine)
            assert kept_of_heads(plan.held, tokens[0])[layer, head] == pytest.approx(expected)
    ends = ends_of_cells(arrays[-1])
    assert ends.shape == (len(targets) - 1, 3)
    assert ends.sum(axis=1) == pytest.approx(np.ones(len(targets) - 1))
    assert ends[:, 0] == pytest.approx([(arrays[-1][:, :, s] == s).mean() for s in targets[:-1]])
    assert ends[:, 2] == pytest.approx([(arrays[-1][:, :, s] == targets[-1]).mean() for s in targets[:-1]])
    assert (full_use(plan) >= plan.live).all()
    assert full_use(plan).max() == full


def test_bar() -> None:
    assert [bar(share, 4) for share in (0, 1e-9, 0.5, 1, 1.2)] == ["░░░░", "█░░░", "██░░", "████", "████"]


# ------------------------------------------------------------------------------------------------ what room is worth


def judged(geometry: CacheGeometry, held: int, statistics: Statistics, **options: Any) -> tuple[Plan, Plan]:
    """Plans of the rule and of the program with so many token-heads."""
    problem = PlanningProblem(geometry, Budget("share", Fraction(held, geometry.full_token_heads)), statistics)
    rule, best = (
        make_policy("heatkv", sink_scales=1),
        make_policy("heatkv-lp", **{"value": "error", "sink_scales": 1, **options}),
    )
    return rule.plan(problem), best.plan(problem)


@settings(max_examples=40)
@given(geometry=geometries(min_scales=4), seed=SEEDS, share=st.floats(0.3, 0.9), more=st.integers(1, 20))
def test_bounds_of_other_budgets(geometry: CacheGeometry, seed: int, share: float, more: int) -> None:
    """The bound is concave in budgets that every cell fits, so that solving again gives no more than its tangent says,
    either way."""
    statistics = statistics_of(geometry, made_up_mass(geometry, 2, seed))
    sinks = geometry.layers * geometry.heads * geometry.schedule.tokens[0]
    less = max(round(share * geometry.full_token_heads), sinks + max(geometry.schedule.tokens[:-1]))
    less = min(less, geometry.full_token_heads)
    held = [less, min(less + more, geometry.full_token_heads)]
    worths = []
    for token_heads in held:
        rule, best = judged(geometry, token_heads, statistics)
        # a rule that measures nothing is judged by the same errors
        of_rule, of_best = worth_of(replace(rule, policy="another"), statistics), worth_of(best, statistics)
        assert of_rule.bound == of_best.bound  # the budget and the sinks are the same
        assert of_best.value == pytest.approx(best.value)
        assert max(of_rule.value, of_best.value, best.value_bound or math.inf) <= of_best.bound * (1 + 1e-9)
        worths.append(of_best)
    # the first tangent is above the second bound, the second above the first
    step = held[1] - held[0]
    for here, there, way in ((*worths, step), (*worths[::-1], -step)):
        tangent = here.bound * (1 + here.change(way / here.budget_token_heads))
        assert there.bound <= tangent * (1 + 1e-6)
        assert tangent == pytest.approx(here.bound + way * here.price)


@pytest.mark.parametrize("value", ["error", "mass"])
def test_prices_of_capped_layers(value: str) -> None:
    geometry = CacheGeometry(3, 4, 4, SQUARE)
    statistics = statistics_of(geometry, made_up_mass(geometry, 2, 1))
    less, more, capped = (
        worth_of(judged(geometry, held, statistics, value=value, layer_cap=cap)[1], statistics)
        for held, cap in ((300, "50%"), (304, "50%"), (300, "40%"))
    )
    assert less.measure == value
    assert less.cap_price_LT.any()
    assert (less.price_TL >= 0).all()
    assert more.price * 4 * (1 - 1e-6) <= more.bound - less.bound <= less.price * 4 * (1 + 1e-6)
    assert capped.price == 0
    assert "only the cap on single layers binds" in worth_lines(capped)[1]


def test_full_cache() -> None:
    geometry = CacheGeometry(2, 2, 4, SQUARE)
    statistics = statistics_of(geometry, made_up_mass(geometry, 2, 0))
    worth = worth_of(make_policy("full").plan(PlanningProblem(geometry, Budget.parse("100%"))), statistics)
    assert worth.value == pytest.approx(worth.full)
    assert worth.bound == pytest.approx(worth.full)
    assert worth.price == worth.change(0.01) == 0
    assert "no checkpoint binds" in worth_lines(worth)[1]


# ------------------------------------------------------------------------------------------------ by which measure

GRIDS = ScaleSchedule.square((1, 2, 3, 4, 5))
CELLS = CacheGeometry(3, 4, 4, GRIDS)


def measured(cost: str = "error", sinks: int = 2, **changes: Any) -> Statistics:
    """Statistics whose every measure ranks plans differently."""
    statistics = statistics_of(CELLS, made_up_mass(CELLS, 2, 0), sink_scales=sinks)
    assert statistics.levels is not None
    return replace(statistics, **{"levels": replace(statistics.levels, cost=cost), **changes})


def made(policy: str, statistics: Statistics, budget: str = "40%", **options: Any) -> Plan:
    return make_policy(policy, **options).plan(PlanningProblem(CELLS, Budget.parse(budget), statistics))


@pytest.mark.parametrize(
    ("policy", "options", "measure"),
    [
        ("heatkv-lp", {}, "joint"),
        ("heatkv-lp", {"value": "error"}, "error"),
        ("heatkv-lp", {"value": "mass"}, "mass"),
        ("heatkv-lp", {"layer_cap": "50%"}, "joint"),
        ("heatkv-mr", {"cost": "fisher"}, "fisher"),
        ("heatkv-mr", {"levels": "full+mean"}, "joint"),
        ("heatkv-mr", {"layer_cap": "45%"}, "joint"),
        ("heatkv-mr", {"cost": "fisher", "max_kl": 0.02}, "fisher"),
    ],
)
def test_worth_by_the_own_measure(policy: str, options: dict[str, Any], measure: str) -> None:
    statistics = measured(options.get("cost", "error"))
    plan = made(policy, statistics, "auto" if "max_kl" in options else "40%", **options)
    worth = worth_of(plan, statistics)
    assert (worth.measure, worth.instead) == (measure, "")
    assert plan.value is not None
    assert plan.value_bound is not None
    assert plan.gap is not None
    assert worth.value == pytest.approx(plan.value, rel=1e-12)
    # where cells are solved in whole numbers, their own bound may be tighter than that of prices
    assert worth.bound >= plan.value_bound - 1e-6 * abs(plan.value_bound)
    if measure in ("joint", "fisher"):
        assert worth.value <= worth.bound <= 0 == worth.full
        assert worth.best == pytest.approx(plan.value_bound, rel=1e-6)
        assert worth.gap == pytest.approx(plan.gap, abs=1e-6)
        # a certificate of other numbers says nothing of these: only the prices do, which may prove less
        for other in (replace(plan, value=None), replace(plan, value=plan.value * 1.1)):
            assert worth_of(other, statistics).best == worth.bound
        assert f": {-plan.value:.6g}; no plan" in worth_lines(worth)[0]


@pytest.mark.parametrize("policy", ["heatkv-lp", "heatkv-mr"])
@pytest.mark.parametrize(("sinks", "more"), [(1, 0), (1, 1), (2, 1), (1, 2)])
def test_worth_with_more_sinks_than_measured(policy: str, sinks: int, more: int) -> None:
    statistics = measured(sinks=sinks)
    plan = made(policy, statistics, "65%", sink_scales=sinks + more)
    worth = worth_of(plan, statistics)
    assert (worth.measure, worth.instead) == ("joint", "")
    assert plan.value_bound is not None
    assert worth.value == pytest.approx(plan.value, rel=1e-12)
    assert worth.value <= worth.bound <= 0 == worth.full
    assert worth.best == pytest.approx(plan.value_bound, rel=1e-6)
    if more:  # sinks that the costs do not know are no choice: with fewer, the same budget is worth as much or more
        less = worth_of(made(policy, statistics, "65%", sink_scales=sinks), statistics)
        assert less.bound >= worth.bound - 1e-6 * abs(worth.bound)


def test_worth_of_the_rule() -> None:
    statistics = measured(all_mass_sum=None)
    plan = made("heatkv", statistics, "60%")
    worth = worth_of(plan, statistics)
    assert (worth.measure, worth.instead) == ("conditional-mass", "")
    later = np.arange(5)[:, None] > np.arange(5)
    reads = (plan.last_read[:, :, None, :] >= np.arange(5)[:, None]) & later
    assert worth.value == pytest.approx(statistics.mass[reads].sum())
    assert worth.full == pytest.approx((statistics.mass * later).sum())


def test_worth_by_another_measure() -> None:
    joint, single, mass = (made("heatkv-lp", measured(), value=value) for value in ("joint", "error", "mass"))
    fisher = made("heatkv-mr", measured("fisher"), cost="fisher", levels="full")
    for plan, statistics, measure, lacking in (
        (joint, measured(levels=None), "error", "lack level costs"),
        (joint, measured("fisher"), "error", "the kind 'error'"),
        (joint, measured(sinks=3), "error", "for 2 sink scales"),
        (joint, measured(levels=None, error_sum=None), "mass", "lack level costs"),
        (fisher, measured(), "error", "the kind 'fisher'"),
        (single, measured(error_sum=None), "mass", "lack error_sum"),
        (mass, measured(all_mass_sum=None), "error", "lack all_mass_sum"),
        (single, measured(error_sum=None, all_mass_sum=None), "conditional-mass", "lack error_sum"),
    ):
        worth = worth_of(plan, statistics)
        assert worth.measure == measure
        assert lacking in worth.instead
        assert worth_lines(worth)[0] == worth.instead
    streaming = made("streaming", measured(), "60%")
    for statistics, measure in ((measured(), "error"), (measured(error_sum=None), "mass")):
        worth = worth_of(streaming, statistics)
        assert (worth.measure, worth.instead) == (measure, "")


def test_worth_of_levels_of_unknown_policies() -> None:
    """They are judged by the costs that there are."""
    plan = made("heatkv-mr", measured())
    assert plan.coarse
    for cost, measure in (("error", "joint"), ("fisher", "fisher")):
        for policy in ("another", "heatkv", "heatkv-lp"):
            worth = worth_of(replace(plan, policy=policy), measured(cost))
            assert (worth.measure, worth.value) == (measure, pytest.approx(plan.value))


def test_plans_that_cannot_be_judged() -> None:
    levels = made("heatkv-mr", measured())
    cells = made("heatkv-lp", measured())
    pooled = CoarseCells.uncalibrated("pool2", np.full_like(levels.last_read, 4), GRIDS)
    small = replace(levels, policy="another", coarse=(pooled,), budget=1.0, budget_token_heads=360)
    three_heads = CacheGeometry(2, 3, 4, GRIDS)
    refusals: list[tuple[Plan, Statistics, type[HeatKVError], str]] = [
        (levels, measured(levels=None), PolicyError, "lack level costs of the kind 'error'"),
        (levels, measured("fisher"), PolicyError, "'error'"),
        (levels, measured(sinks=3), PolicyError, "2 sink scales"),
        (small, measured(), PlanError, "pool2"),
        (replace(cells, settings={"layer_cap": "2MiB"}), measured(), PolicyError, "2MiB"),
        (replace(cells, settings={"value": "loss"}), measured(), PolicyError, "'loss'"),
        (cells, statistics_of(three_heads, made_up_mass(three_heads, 2, 0)), StatisticsError, "3 x 4"),
    ]
    for plan, statistics, error, value in refusals:
        with pytest.raises(error, match=value):
            worth_of(plan, statistics)


def test_worth_of_a_budget_of_no_token_heads() -> None:
    statistics = measured("fisher", sinks=0)
    plan = made("heatkv-mr", statistics, "auto", cost="fisher", max_kl=1e9, sink_scales=0)
    assert plan.budget_token_heads == 0
    worth = worth_of(plan, statistics)
    assert worth.value == pytest.approx(plan.value)
    assert worth.change(0.01) == 0


@settings(max_examples=8)
@given(seed=SEEDS, data=st.data())
def test_bounds_of_levels_against_the_best_plan_of_any_budget(seed: int, data: st.DataObject) -> None:
    """Against the best of all plans at other budgets, at every one of them; the bound is concave in the budget."""
    schedule, layers, heads = data.draw(st.sampled_from([(FEW, 2, 2), (FEW, 1, 3), (MORE, 2, 1)]))
    geometry = CacheGeometry(layers, heads, 4, schedule)
    levels = random_levels(schedule, layers, heads, seed)
    statistics = statistics_of(geometry, made_up_mass(geometry, 1, 0), sink_scales=None).with_levels(levels)
    sinks, most = layers * heads, geometry.full_token_heads
    policy, allowed = data.draw(st.sampled_from([("heatkv-mr", (0, 1, 2)), ("heatkv-lp", (0,))]))
    here = data.draw(st.integers(sinks, most))
    problem = PlanningProblem(geometry, Budget("share", Fraction(here, most)), statistics)
    plan = make_policy(policy, sink_scales=1).plan(problem)
    worth = worth_of(plan, statistics)
    assert worth.measure == "joint"
    assert worth.value == pytest.approx(plan.value, rel=1e-12)
    for there in {here, *data.draw(st.lists(st.integers(sinks, most), max_size=3))}:
        best = -optimum(levels, Capacity(layers, heads, schedule.tokens, there), allowed)
        assert best <= worth.bound + (there - here) * worth.price + 1e-9
        told = worth.bound + abs(worth.bound) * worth.change((there - here) / here)
        assert told == pytest.approx(worth.bound + (there - here) * worth.price)


@pytest.mark.parametrize("cost", ["error", "fisher"])
@pytest.mark.parametrize("options", [{}, {"levels": "full"}, {"layer_cap": "70%"}])
def test_prices_of_levels(cost: str, options: dict[str, Any]) -> None:
    """Concave: the step to the next budget is between the slopes at both ends, to the solver's tolerance."""
    statistics = measured(cost)
    worths = [
        worth_of(made("heatkv-mr", statistics, f"{held / 12}tokens", cost=cost, **options), statistics)
        for held in (120, 180, 240)
    ]
    assert worths[0].price > worths[-1].price >= 0
    for less, more in itertools.pairwise(worths):
        rounding = 1e-3 * abs(less.bound)
        assert 60 * more.price - rounding <= more.bound - less.bound <= 60 * less.price + rounding


# ------------------------------------------------------------------------------------------------ the command


@pytest.fixture(scope="module")
def emoji_statistics(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Statistics of the embedded model with made-up level costs."""
    path = tmp_path_factory.mktemp("statistics") / "s.safetensors"
    assert run(["calibrate", "--samples", "2", "--out", str(path)]) == 0
    statistics = Statistics.load(path)
    geometry = CacheGeometry(12, 6, 32, statistics.schedule)
    statistics.with_levels(level_costs_of(geometry, made_up_mass(geometry, 1, 0), ("0:0:0",))).save(path)
    return path


def solved(folder: Path, *arguments: str) -> Path:
    assert run(["solve", "--budget", "20%", *arguments, "--out", str(folder / "plan.json")]) == 0
    return folder / "plan.json"


def explained(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[dict[str, Any], str]:
    """The facts as JSON, and the screen."""
    capsys.readouterr()
    assert run(["explain", *arguments, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert run(["explain", *arguments]) == 0
    return facts, capsys.readouterr().out


def test_facts_and_charts(tmp_path: Path, emoji_statistics: Path, capsys: pytest.CaptureFixture[str]) -> None:
    statistics, out = str(emoji_statistics), tmp_path / "new" / "charts"
    path = solved(tmp_path, "--policy", "heatkv-lp", "--set", "value=error", "--statistics", statistics)
    plan = load_plan(path)
    facts, screen = explained(capsys, str(path), "--statistics", statistics, "--out", str(out))
    assert facts["slack_token_heads"] == plan.budget_token_heads - plan.peak_token_heads
    assert facts["live_token_heads"] == plan.live.tolist()
    assert facts["source_scales"][0]["kept_token_time"] == 1
    assert [len(layer["of_heads"]) for layer in facts["layers"]] == [6] * 12
    worth = facts["worth"]
    assert worth["value"] == pytest.approx(plan.value)
    assert worth["value"] <= worth["value_bound"] <= worth["full_value"]
    prices = sum(checkpoint["price"] for checkpoint in worth["binding_checkpoints"])
    assert worth["value_per_token_head"] == pytest.approx(prices)
    change = 0.01 * plan.budget_token_heads * prices / worth["value_bound"]
    assert worth["change_of_bound_by_one_percent_of_budget"] == pytest.approx(change)
    assert sorted(facts["files"]) == sorted(str(file) for file in out.iterdir())
    assert {file.name for file in out.iterdir()} == {"last_read.png", "cache_use.png"}
    for text in ("settings", "kept per source scale", "kept per layer", "cache use", "what binds", "33.12 token"):
        assert text in screen


def test_plan_with_levels(tmp_path: Path, emoji_statistics: Path, capsys: pytest.CaptureFixture[str]) -> None:
    statistics, bare = ["--statistics", str(emoji_statistics)], tmp_path / "bare.safetensors"
    path = solved(tmp_path, "--policy", "heatkv-mr", *statistics)
    plan = load_plan(path)
    facts, screen = explained(capsys, str(path), *statistics)
    assert facts["worth"]["measure"] == "joint"
    assert [facts["worth"][name] for name in ("value", "value_bound", "gap")] == pytest.approx(
        [plan.value, plan.value_bound, plan.gap]
    )
    assert set(facts["reads_of_source_scales"]) == {level for level, _ in plan.levels}
    assert "read mean" in screen
    Statistics.load(emoji_statistics).with_levels(None).save(bare)
    facts, screen = explained(capsys, str(path), "--statistics", str(bare), "--out", str(tmp_path / "charts"))
    assert facts["worth"] is None
    assert "not judged: these statistics (emoji) lack level costs" in screen
    assert (tmp_path / "charts" / "last_read_mean.png").exists()


def test_bad_files_and_options(tmp_path: Path, emoji_statistics: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, other = solved(tmp_path, "--policy", "streaming"), tmp_path / "other.json"
    data, statistics = json.loads(path.read_text()), ["--statistics", str(emoji_statistics)]
    foreign = tmp_path / "foreign.safetensors"
    measured = Statistics.load(emoji_statistics)
    replace(measured, provenance=replace(measured.provenance, fingerprint="0" * 16)).save(foreign)
    (tmp_path / "taken").touch()
    for changes, arguments, value in (
        ({"format": "heatkv-results"}, [], "heatkv-results"),
        ({"last_read": [[1]]}, [], "last_read"),
        ({"peak_token_heads": 1}, [], "peak"),
        ({}, ["--statistics", str(path)], "statistics file"),
        ({"model": "var-d16"}, statistics, "var-d16"),  # the same shapes under the name of another model
        ({}, ["--statistics", str(foreign)], "other weights"),
        ({}, ["--out", str(tmp_path / "taken")], "taken"),
        ({}, ["--out", str(tmp_path / "new" / "map.png")], "map.png"),
    ):
        other.write_text(json.dumps(data | changes))
        assert run(["explain", str(other), *arguments]) == 2
        assert value in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "new").exists()
