"""What a plan keeps, counted cell by cell; what room is worth, against solving again; and the command that tells it."""

from __future__ import annotations

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
from test_cli import ORDERS, refused

from heatkv.cli import run
from heatkv.errors import PolicyError, StatisticsError
from heatkv.geometry import Budget, CacheGeometry
from heatkv.levels import level_tokens
from heatkv.plan import CoarseCells, Plan
from heatkv.policies.base import PlanningProblem, make_policy
from heatkv.profiling.explain import (
    ends_of_cells,
    full_use,
    kept_of_heads,
    kept_of_scales,
    reads_of_scales,
    worth_of,
)
from heatkv.profiling.plan_report import bar, worth_lines
from heatkv.schedule import ScaleSchedule
from heatkv.statistics import Statistics
from heatkv.testing import made_up_mass

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
def test_prices_of_ranks_and_capped_layers(value: str) -> None:
    geometry = CacheGeometry(3, 4, 4, SQUARE)
    statistics = statistics_of(geometry, made_up_mass(geometry, 2, 1))
    options = {"value": value, "ranks": 2, "layer_cap": "50%"}
    held = [300, 304]
    less, more = (worth_of(judged(geometry, h, statistics, **options)[1], statistics) for h in held)
    assert less.measure == value
    assert less.price_GTL.shape == (2, 5, 3)
    assert less.cap_price_LT.any()
    assert less.price > 0
    assert (less.price_GTL >= 0).all()
    # a token-head is half one for either rank
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
    with pytest.raises(StatisticsError, match="lack error_sum"):
        worth_of(best, replace(statistics, error_sum=None))
    rule, _ = judged(geometry, 150, statistics)
    assert worth_of(rule, statistics).measure == "error"
    assert worth_of(rule, replace(statistics, error_sum=None)).measure == "mass"
    levels = replace(rule, coarse=(CoarseCells.uncalibrated("mean", rule.last_read, SQUARE),))
    with pytest.raises(PolicyError, match="this plan has coarser levels"):
        worth_of(levels, statistics)
    greedy = replace(best, settings={**best.settings, "solver": "greedy"})
    assert worth_of(greedy, statistics).bound == worth_of(best, statistics).bound


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
    plan = Plan.load(path)
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
    assert worth["measure"] == "error"
    assert worth["value"] < worth["value_bound"]


def test_a_plan_with_levels_is_explained_level_by_level(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = solved(tmp_path, "--policy", "streaming", "--budget", "40%", "--sink-scales", "1")
    plan = Plan.load(path)
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
        ({"capacity": []}, "holds 'capacity', which this release cannot run"),
    ):
        other.write_text(json.dumps(told | change))
        assert said in refused(capsys, "explain", str(other))
    other.write_text(path.read_text()[:-100])
    assert "is not JSON" in refused(capsys, "explain", str(other))
    assert "cannot read absent.json" in refused(capsys, "explain", "absent.json")
    assert "Missing argument 'plan'" in refused(capsys, "explain")
    assert "not a whole statistics file" in refused(capsys, "explain", str(path), "--statistics", str(path))
    assert "cannot create the folder" in refused(capsys, "explain", str(path), "--out", "/proc/charts")
    assert "cannot write /proc/last_read.png" in refused(capsys, "explain", str(path), "--out", "/proc")
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
