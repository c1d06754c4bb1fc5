"""What a plan keeps, counted cell by cell; what room is worth, against solving again; and the command that tells it."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from strategies import SEEDS, geometries, last_reads, plans, statistics_of
from support.levels import FEW, MORE, optimum, random_levels
from test_cli import ORDERS, refused

from heatkv.cli import run
from heatkv.core.budget import Budget
from heatkv.core.geometry import CacheGeometry
from heatkv.core.levels import level_tokens
from heatkv.core.plan import CoarseCells, Plan
from heatkv.core.plan_file import load_plan
from heatkv.core.schedule import ScaleSchedule
from heatkv.core.statistics import Statistics
from heatkv.errors import PlanError, PolicyError, StatisticsError
from heatkv.policies.base import PlanningProblem, make_policy
from heatkv.profiling.analysis import plan_report
from heatkv.profiling.analysis.explain import (
    ends_of_cells,
    full_use,
    kept_of_heads,
    kept_of_scales,
    reads_of_scales,
    worth_of,
)
from heatkv.profiling.analysis.plan_report import bar, whole_ticks, worth_lines
from heatkv.solve.checkpoints import Capacity
from heatkv.testing.contract import level_costs_of, made_up_mass

SQUARE = ScaleSchedule.square((1, 2, 3, 4, 5, 6))


# ------------------------------------------------------------------------------------------------ what is kept


@given(plan=plans(), data=st.data())
def test_kept_shares_count_every_read(plan: Plan, data: st.DataObject) -> None:
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


def test_a_bar_is_empty_for_nothing_only() -> None:
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
def test_prices_bound_what_another_budget_is_worth(geometry: CacheGeometry, seed: int, share: float, more: int) -> None:
    """The bound is concave in the budget, so that solving again gives no more than its tangent says, either way."""
    statistics = statistics_of(geometry, made_up_mass(geometry, 2, seed))
    sinks = geometry.layers * geometry.heads * geometry.schedule.tokens[0]
    less = max(round(share * geometry.full_token_heads), sinks)
    held = [less, min(less + more, geometry.full_token_heads)]
    worths = []
    for token_heads in held:
        rule, best = judged(geometry, token_heads, statistics)
        rule = replace(rule, policy="another")  # one that measures nothing is judged by the same errors
        of_rule, of_best = worth_of(rule, statistics), worth_of(best, statistics)
        assert of_rule.bound == of_best.bound  # the budget and the sinks are the same
        assert of_best.value == pytest.approx(best.value)
        assert of_rule.value <= of_rule.bound * (1 + 1e-9)
        assert of_best.value <= of_best.bound * (1 + 1e-9)
        assert best.value_bound is not None
        assert best.value_bound <= of_best.bound * (1 + 1e-9)
        worths.append(of_best)
    step = held[1] - held[0]
    # the first tangent is above the second bound, the second above the first
    for here, there, way in ((*worths, step), (*worths[::-1], -step)):
        told = here.bound * (1 + here.change(way / here.budget_token_heads))
        assert there.bound <= told * (1 + 1e-6)
        assert told == pytest.approx(here.bound + way * here.price)


@pytest.mark.parametrize("value", ["error", "mass"])
def test_prices_of_capped_layers(value: str) -> None:
    geometry = CacheGeometry(3, 4, 4, SQUARE)
    statistics = statistics_of(geometry, made_up_mass(geometry, 2, 1))
    options = {"value": value, "layer_cap": "50%"}
    held = [300, 304]
    less, more = (worth_of(judged(geometry, h, statistics, **options)[1], statistics) for h in held)
    assert less.measure == value
    assert less.price_TL.shape == (5, 3)
    assert less.cap_price_LT.any()
    assert less.price > 0
    assert (less.price_TL >= 0).all()
    assert more.price * 4 <= (more.bound - less.bound) * (1 + 1e-6)
    assert more.bound - less.bound <= less.price * 4 * (1 + 1e-6)
    capped = worth_of(judged(geometry, 300, statistics, **options | {"layer_cap": "40%"})[1], statistics)
    assert capped.price == 0
    assert "only the cap on single layers binds" in worth_lines(capped)[1]


def test_a_full_cache_has_all_value_and_no_price() -> None:
    geometry = CacheGeometry(2, 2, 4, SQUARE)
    statistics = statistics_of(geometry, made_up_mass(geometry, 2, 0))
    worth = worth_of(make_policy("full").plan(PlanningProblem(geometry, Budget.parse("100%"))), statistics)
    assert worth.value == pytest.approx(worth.full)
    assert worth.bound == pytest.approx(worth.full)
    assert worth.price == worth.change(0.01) == 0
    assert "no checkpoint binds" in worth_lines(worth)[1]


def test_what_cannot_be_judged_is_said() -> None:
    geometry = CacheGeometry(2, 2, 4, SQUARE)
    statistics = statistics_of(geometry, made_up_mass(geometry, 2, 0))
    _, best = judged(geometry, 150, statistics)
    capped = replace(best, settings={**best.settings, "layer_cap": "2MiB"})
    with pytest.raises(PolicyError, match="layer_cap=2MiB depends on rows and storage type"):
        worth_of(capped, statistics)
    with pytest.raises(PolicyError, match="value='loss' is unknown to policy 'heatkv-lp'"):
        worth_of(replace(best, settings={"value": "loss"}), statistics)
    with pytest.raises(StatisticsError, match="the model has 2 x 2"):
        worth_of(
            best, statistics_of(CacheGeometry(2, 3, 4, SQUARE), made_up_mass(CacheGeometry(2, 3, 4, SQUARE), 2, 0))
        )
    greedy = replace(best, settings={**best.settings, "solver": "greedy"})
    assert worth_of(greedy, statistics).bound == worth_of(best, statistics).bound


# ------------------------------------------------------------------------------------------------ by which measure

GRIDS = ScaleSchedule.square((1, 2, 3, 4, 5))
CELLS = CacheGeometry(3, 4, 4, GRIDS)


def measured(cost: str = "error", sinks: int = 2, seed: int = 0) -> Statistics:
    """Statistics whose every measure ranks plans differently."""
    found = statistics_of(CELLS, made_up_mass(CELLS, 2, seed), sink_scales=sinks)
    assert found.levels is not None
    return found.with_levels(replace(found.levels, cost=cost))


def made(policy: str, statistics: Statistics, budget: str = "40%", **options: Any) -> Plan:
    return make_policy(policy, **options).plan(PlanningProblem(CELLS, Budget.parse(budget), statistics))


@pytest.mark.parametrize(
    ("policy", "options", "measure"),
    [
        ("heatkv-lp", {}, "joint"),
        ("heatkv-lp", {"value": "error"}, "error"),
        ("heatkv-lp", {"value": "mass"}, "mass"),
        ("heatkv-lp", {"layer_cap": "50%"}, "joint"),
        ("heatkv-mr", {"cost": "error"}, "joint"),
        ("heatkv-mr", {"cost": "fisher"}, "fisher"),
        ("heatkv-mr", {"cost": "fisher", "levels": "full"}, "fisher"),
        ("heatkv-mr", {"levels": "full+mean"}, "joint"),
        ("heatkv-mr", {"layer_cap": "45%"}, "joint"),
        ("heatkv-mr", {"cost": "fisher", "max_kl": 0.02}, "fisher"),
    ],
)
def test_a_plan_is_judged_by_the_measure_it_was_made_by(policy: str, options: dict[str, Any], measure: str) -> None:
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
        assert f"cost: {-plan.value:.6g} (" in worth_lines(worth)[0]
        assert "less cost, 1 % less adds" in worth_lines(worth)[1]


@pytest.mark.parametrize("policy", ["heatkv-lp", "heatkv-mr"])
@pytest.mark.parametrize("sinks", [1, 2, 3])
@pytest.mark.parametrize("more", [0, 1, 2])
def test_a_plan_with_more_sinks_than_its_costs_is_judged_by_them(policy: str, sinks: int, more: int) -> None:
    statistics = measured(sinks=sinks)
    plan = made(policy, statistics, "65%" if sinks + more < 4 else "100%", sink_scales=min(sinks + more, 4))
    worth = worth_of(plan, statistics)
    assert (worth.measure, worth.instead) == ("joint", "")
    assert plan.value is not None
    assert plan.value_bound is not None
    assert worth.value == pytest.approx(plan.value, rel=1e-12)
    assert worth.value <= worth.bound <= 0 == worth.full
    assert worth.bound >= plan.value_bound - 1e-6 * abs(plan.value_bound)
    assert worth.best == pytest.approx(plan.value_bound, rel=1e-6)
    if more:  # sinks that the costs do not know are no choice: with fewer, the same budget is worth as much or more
        less = worth_of(made(policy, statistics, "65%" if sinks + more < 4 else "100%", sink_scales=sinks), statistics)
        assert less.bound >= worth.bound - 1e-6 * abs(worth.bound)


def test_the_rule_is_judged_by_the_mass_that_it_ranks() -> None:
    statistics = replace(measured(), all_mass_sum=None)
    plan = made("heatkv", statistics, "60%")
    worth = worth_of(plan, statistics)
    assert (worth.measure, worth.instead) == ("conditional-mass", "")
    later = np.arange(5)[:, None] > np.arange(5)
    reads = (plan.last_read[:, :, None, :] >= np.arange(5)[:, None]) & later
    assert worth.value == pytest.approx(statistics.mass[reads].sum())
    assert worth.full == pytest.approx((statistics.mass * later).sum())


def test_what_a_plan_is_judged_by_instead_is_said() -> None:
    statistics = measured()
    joint, single, mass = (made("heatkv-lp", statistics, value=value) for value in ("joint", "error", "mass"))
    fisher = made("heatkv-mr", measured("fisher"), cost="fisher", levels="full")
    without = statistics.with_levels(None)
    for plan, other, measure, why in (
        (joint, without, "error", "lack level costs; measure them with heatkv calibrate --levels error"),
        (joint, measured("fisher"), "error", "hold level costs of the kind 'fisher', not 'error'; measure them"),
        (joint, measured(sinks=3), "error", "hold level costs for sink_scales=3 or more, the plan has 2; measure them"),
        (joint, replace(without, error_sum=None), "mass", "lack level costs"),
        (fisher, statistics, "error", "not 'fisher'; measure them with heatkv calibrate --levels fisher"),
        (single, replace(statistics, error_sum=None), "mass", "lack error_sum"),
        (mass, replace(statistics, all_mass_sum=None), "error", "lack all_mass_sum"),
        (single, replace(statistics, error_sum=None, all_mass_sum=None), "conditional-mass", "lack error_sum"),
    ):
        worth = worth_of(plan, other)
        assert worth.measure == measure
        assert why in worth.instead
        assert worth_lines(worth)[0] == worth.instead
    streaming = made("streaming", statistics, "60%")
    assert worth_of(streaming, statistics).measure == "error"
    worth = worth_of(streaming, replace(statistics, error_sum=None))
    assert (worth.measure, worth.instead) == ("mass", "")


def test_levels_without_their_costs_are_not_judged() -> None:
    statistics = measured()
    plan = made("heatkv-mr", statistics)
    assert plan.coarse
    with pytest.raises(PolicyError, match=r"\(tiny\) lack level costs; measure them with .*calibrate --levels error"):
        worth_of(plan, statistics.with_levels(None))
    with pytest.raises(PolicyError, match="of the kind 'fisher', not 'error'; measure them"):
        worth_of(plan, measured("fisher"))
    with pytest.raises(PolicyError, match="for sink_scales=3 or more, the plan has 2; measure them with heatkv"):
        worth_of(plan, measured(sinks=3))
    fewer = made("heatkv-mr", measured(sinks=1), sink_scales=1)
    with pytest.raises(PolicyError, match=r"has 1; measure them with .* --levels error --sink-scales 1$"):
        worth_of(fewer, statistics)
    # a policy that is not known here is judged by the costs that there are
    for cost, measure in (("error", "joint"), ("fisher", "fisher")):
        for policy in ("another", "heatkv", "heatkv-lp"):
            other = worth_of(replace(plan, policy=policy), measured(cost))
            assert (other.measure, other.value) == (measure, pytest.approx(plan.value))
    unknown = replace(plan, policy="another")
    with pytest.raises(PolicyError, match="lack level costs; measure them with heatkv calibrate --levels error"):
        worth_of(unknown, statistics.with_levels(None))
    levels = dict(unknown.levels)
    pooled = CoarseCells.uncalibrated("pool2", np.full_like(plan.last_read, 4), GRIDS)
    small = replace(unknown, last_read=levels["full"], coarse=(pooled,), budget=1.0, budget_token_heads=360)
    with pytest.raises(PlanError, match=r"holds source 2 at level pool2 for target .*, which the level costs do not"):
        worth_of(small, statistics)


def test_a_budget_of_no_token_heads_is_judged() -> None:
    statistics = measured("fisher", sinks=0)
    plan = made("heatkv-mr", statistics, "auto", cost="fisher", max_kl=1e9, sink_scales=0)
    assert plan.budget_token_heads == 0
    worth = worth_of(plan, statistics)
    assert worth.value == pytest.approx(plan.value)
    assert worth.change(0.01) == 0


@settings(max_examples=8)
@given(seed=SEEDS, data=st.data())
def test_prices_of_levels_bound_what_any_budget_is_worth(seed: int, data: st.DataObject) -> None:
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
def test_prices_of_levels_are_slopes(cost: str, options: dict[str, Any]) -> None:
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


# ------------------------------------------------------------------------------------------------ charts


@pytest.mark.parametrize("count", [*range(1, 70), 99, 100, 101, 1000, 12345])
def test_ticks_are_indices(count: int) -> None:
    ticks = whole_ticks(count)
    assert ticks[0] == 0
    assert count <= 10 * ticks.step
    assert len(ticks) <= 10
    assert ticks[-1] < count
    assert count - ticks[-1] <= ticks.step


@pytest.mark.parametrize(("layers", "heads"), [(1, 1), (2, 3), (12, 6), (32, 16), (33, 10)])
def test_no_chart_marks_what_is_not_there(layers: int, heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    figures: dict[str, Any] = {}
    monkeypatch.setattr(plan_report, "_save", lambda figure, path: figures.update({path.name: figure}))
    geometry = CacheGeometry(layers, heads, 4, SQUARE)
    plan = make_policy("streaming", sink_scales=1).plan(PlanningProblem(geometry, Budget.parse("40%")))
    names = [f"{s}x{s}" for s in range(1, 7)]
    plan_report.save_last_read(Path("last_read"), plan.last_read, names, "")
    kept = kept_of_scales([plan.last_read], [SQUARE.tokens]), kept_of_heads(plan.held, SQUARE.tokens)
    plan_report.save_kept(Path("kept"), *kept, names, "")
    plan_report.save_use(Path("use"), plan.live, full_use(plan), plan.budget_token_heads, names, "")

    def shown(axis: Any) -> list[float]:
        low, high = sorted(axis.get_view_interval())
        return [tick for tick in axis.get_majorticklocs() if low <= tick <= high]

    def whole(axis: Any, count: float) -> bool:
        return bool(shown(axis)) and all(tick == int(tick) and 0 <= tick < count for tick in shown(axis))

    for figure in figures.values():
        figure.canvas.draw()
    *maps, colours = figures["last_read"].axes
    for ax in maps[:5]:
        assert whole(ax.xaxis, heads)
        assert whole(ax.yaxis, layers)
    assert shown(colours.yaxis) == list(range(6))
    by_scale, by_layer = figures["kept"].axes
    assert whole(by_scale.xaxis, 5)
    assert whole(by_layer.xaxis, layers)
    (use,) = figures["use"].axes
    assert shown(use.xaxis) == [t * layers for t in range(6)]
    assert whole(use.yaxis, 1.25 * plan.budget_token_heads + 1)


# ------------------------------------------------------------------------------------------------ the command


@pytest.fixture(scope="module")
def emoji_statistics(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("statistics") / "s.safetensors"
    assert run(["calibrate", "--samples", "2", "--out", str(path)]) == 0
    return path


def solved(folder: Path, *arguments: str) -> Path:
    budget = [] if "--budget" in arguments else ["--budget", "20%"]
    assert run(["solve", *budget, *arguments, "--out", str(folder / "plan.json")]) == 0
    return folder / "plan.json"


def test_explain_tells_and_draws(tmp_path: Path, emoji_statistics: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = solved(tmp_path, "--policy", "heatkv-lp", "--set", "value=error", "--statistics", str(emoji_statistics))
    plan = load_plan(path)
    capsys.readouterr()
    out = tmp_path / "new" / "charts"
    arguments = ["explain", str(path), "--statistics", str(emoji_statistics), "--out", str(out)]
    assert run([*arguments, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["policy"] == "heatkv-lp"
    assert told["slack_token_heads"] == plan.budget_token_heads - plan.peak_token_heads
    assert told["live_token_heads"] == plan.live.tolist()
    assert told["source_scales"][0]["kept_token_time"] == 1
    assert len(told["layers"]) == 12
    assert all(len(layer["of_heads"]) == 6 for layer in told["layers"])
    worth = told["worth"]
    assert worth["value"] == pytest.approx(plan.value)
    assert worth["value"] <= worth["value_bound"] <= worth["full_value"]
    prices = sum(checkpoint["price"] for checkpoint in worth["binding_checkpoints"])
    assert worth["value_per_token_head"] == pytest.approx(prices)
    assert worth["change_of_bound_by_one_percent_of_budget"] == pytest.approx(
        0.01 * plan.budget_token_heads * prices / worth["value_bound"]
    )
    assert sorted(told["files"]) == sorted(str(file) for file in out.iterdir())
    for name in ("last_read.png", "kept.png", "cache_use.png"):
        with Image.open(out / name) as picture:
            assert picture.size[0] > 300

    assert run(arguments) == 0
    shown = capsys.readouterr().out
    assert "settings" in shown
    for text in ("kept per source scale", "kept per layer", "cache use", "what binds", "1 % more budget (33.12 token"):
        assert text in shown


@pytest.mark.parametrize("policy", ["heatkv", "random", "streaming", "sliding-window"])
def test_plans_of_every_policy_are_explained(
    policy: str, tmp_path: Path, emoji_statistics: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    needs = ["--statistics", str(emoji_statistics)]
    path = solved(tmp_path, "--policy", policy, *(needs if policy == "heatkv" else []))
    capsys.readouterr()
    assert run(["explain", str(path), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["worth"] is None
    assert told["files"] == []
    assert run(["explain", str(path), *needs, "--json"]) == 0
    worth = json.loads(capsys.readouterr().out)["worth"]
    assert worth["measure"] == ("conditional-mass" if policy == "heatkv" else "error")
    assert worth["instead"] is None
    assert worth["value"] < worth["value_bound"]


def test_levels_are_judged_where_their_costs_are_known(
    tmp_path: Path, emoji_statistics: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    statistics, costs = Statistics.load(emoji_statistics), tmp_path / "costs.safetensors"
    geometry = CacheGeometry(12, 6, 32, statistics.schedule)
    levels = level_costs_of(geometry, made_up_mass(geometry, 1, 0), ("0:0:0",))
    statistics.with_levels(levels).save(costs)
    paths = {}
    for policy in ("heatkv-mr", "heatkv-lp"):
        (tmp_path / policy).mkdir()
        path = paths[policy] = solved(tmp_path / policy, "--policy", policy, "--statistics", str(costs))
        plan = load_plan(path)
        assert plan.value is not None
        capsys.readouterr()
        assert run(["explain", str(path), "--statistics", str(costs), "--json"]) == 0
        told = json.loads(capsys.readouterr().out)
        assert told["not_judged"] is None
        assert (told["worth"]["measure"], told["worth"]["instead"]) == ("joint", None)
        assert told["worth"]["value"] == pytest.approx(plan.value)
        assert told["worth"]["value_bound"] == pytest.approx(plan.value_bound)
        assert told["worth"]["gap"] == pytest.approx(plan.gap)
        assert run(["explain", str(path), "--statistics", str(costs)]) == 0
        shown = capsys.readouterr().out
        for text in ("what binds", f"cost: {-plan.value:.6g} (output error of all cells", "less cost, 1 % less adds"):
            assert text in shown
    assert run(["explain", str(paths["heatkv-lp"]), "--statistics", str(emoji_statistics), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["worth"]["measure"] == "error"
    assert "lack level costs; measure them with heatkv calibrate --levels error" in told["worth"]["instead"]
    path = paths["heatkv-mr"]
    out = tmp_path / "charts"
    assert run(["explain", str(path), "--statistics", str(emoji_statistics), "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    for text in ("kept per source scale", "kept per layer", "cache use", "certified gap"):
        assert text in shown
    assert "not judged: these statistics (emoji) lack level costs; measure them with heatkv calibrate" in shown
    assert "what binds" not in shown
    assert (out / "last_read_mean.png").exists()
    assert run(["explain", str(path), "--statistics", str(emoji_statistics), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["worth"] is None
    assert "lack level costs" in told["not_judged"]


def test_a_plan_with_levels_is_explained_level_by_level(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = solved(tmp_path, "--policy", "streaming", "--budget", "40%", "--sink-scales", "1")
    plan = load_plan(path)
    longer = np.minimum(plan.last_read + 1, len(plan.schedule) - 1)
    mean = np.where(plan.last_read == np.arange(8), plan.last_read, longer)
    levels = replace(
        plan, budget=1.0, budget_token_heads=plan.geometry.full_token_heads,
        coarse=(CoarseCells.uncalibrated("mean", mean, plan.schedule),),
    )  # fmt: skip
    levels.save(path)
    capsys.readouterr()
    assert run(["explain", str(path), "--out", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert "read full" in shown
    assert "read mean" in shown
    names = {"last_read.png", "last_read_mean.png", "kept.png", "cache_use.png"}
    assert {file.name for file in (tmp_path / "out").iterdir()} == names
    assert run(["explain", str(path), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert set(told["reads_of_source_scales"]) == {"full", "mean"}
    assert "coarse" not in told


def test_a_plan_need_not_tell_its_head_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = solved(tmp_path, "--model", "infinity-2b", "--policy", "heatkv", "--orders", str(ORDERS))
    told = json.loads(path.read_text())
    del told["head_dim"]
    path.write_text(json.dumps(told))
    capsys.readouterr()
    assert run(["explain", str(path), "--out", str(tmp_path)]) == 0
    assert "infinity-2b, 32 layers x 16 heads" in capsys.readouterr().out


def test_explain_refuses(tmp_path: Path, emoji_statistics: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = solved(tmp_path, "--policy", "streaming")
    told = json.loads(path.read_text())
    other = tmp_path / "other.json"
    for change, said in (
        ({"format": "heatkv-results"}, "'heatkv-results', not 'heatkv-plan'"),
        ({"last_read": [[1]]}, "'last_read' must be [layers][heads][scales]"),
        ({"peak_token_heads": 1}, "the file was changed by hand"),
        ({"capacity": []}, "holds both 'last_read' and 'capacity'"),
    ):
        other.write_text(json.dumps(told | change))
        assert said in refused(capsys, "explain", str(other))
    other.write_text(path.read_text()[:-100])
    assert "is not JSON" in refused(capsys, "explain", str(other))
    assert "cannot read absent.json" in refused(capsys, "explain", "absent.json")
    assert "Missing argument 'plan'" in refused(capsys, "explain")
    assert "not a whole statistics file" in refused(capsys, "explain", str(path), "--statistics", str(path))
    assert "cannot create the folder" in refused(capsys, "explain", str(path), "--out", "/proc/charts")
    assert "cannot write in the folder /proc" in refused(capsys, "explain", str(path), "--out", "/proc")
    taken = tmp_path / "charts"
    taken.touch()
    assert f"--out {taken} cannot be a folder: {taken} is a file; name another folder" in refused(
        capsys, "explain", str(path), "--out", str(taken)
    )
    assert f"{taken} is a file; name another folder" in refused(capsys, "explain", str(path), "--out", f"{taken}/new")
    for picture in (tmp_path / "new" / "kept.png", taken / "kept.png"):
        assert f"--out {picture} names a file, but takes a folder for several; write --out {picture.parent}" in (
            refused(capsys, "explain", str(path), "--out", str(picture))
        )
    assert not (tmp_path / "new").exists()
    statistics = ["--statistics", str(emoji_statistics)]
    elsewhere = json.loads(solved(tmp_path, "--policy", "streaming", "--model", "var-d16").read_text())
    other.write_text(json.dumps(elsewhere | {"model": "mine"}))
    assert "the model has 16 x 16" in refused(capsys, "explain", str(other), *statistics)
    # the same shapes under the name of another model
    other.write_text(json.dumps(told | {"model": "var-d16"}))
    assert "was measured on emoji, the plan is for var-d16" in refused(capsys, "explain", str(other), *statistics)
    weights = replace(
        Statistics.load(emoji_statistics),
        provenance=replace(Statistics.load(emoji_statistics).provenance, fingerprint="0" * 16),
    )
    weights.save(tmp_path / "weights.safetensors")
    other.write_text(json.dumps(told))
    wrong = ["--statistics", str(tmp_path / "weights.safetensors"), "--out", str(tmp_path / "out")]
    assert "measured on other weights" in refused(capsys, "explain", str(other), *wrong)
    assert not (tmp_path / "out").exists()
