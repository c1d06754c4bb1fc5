"""Plan files that contradict themselves, and files that are no files: one line each, and nothing is lost."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from heatkv.calibration.level_costs import calibrate_levels
from heatkv.cli import run
from heatkv.core.capacity_plan import CapacityPlan
from heatkv.core.geometry import CacheGeometry
from heatkv.core.io import read_json, write_json
from heatkv.core.plan import Plan
from heatkv.core.plan_file import plan_from_json
from heatkv.core.schedule import ScaleSchedule
from heatkv.engine.token_cache import open_cache, policy_of
from heatkv.errors import FormatError, PlanError, PolicyError
from heatkv.models.class_conditional import ClassConditionalModel
from heatkv.policies.base import PlanningProblem, make_policy
from heatkv.policies.composition import inner_policy
from heatkv.policies.h2o import H2O
from heatkv.policies.levels import HeatKVLevels
from heatkv.profiling.analysis.explain import worth_of
from heatkv.testing.contract import made_up_statistics

GEOMETRY = CacheGeometry(3, 4, 8, ScaleSchedule.square((1, 2, 3, 4, 5, 6)))


def made(cost: str = "error", **options: Any) -> Plan:
    from heatkv.core.budget import Budget

    statistics = made_up_statistics(GEOMETRY, cost=cost)
    return HeatKVLevels(cost=cost, **options).plan(PlanningProblem(GEOMETRY, Budget.parse("30%"), statistics))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"value": 5.0}, "value is 5.0, more than its bound"),
        ({"gap": -5.0}, "gap is -5.0"),
        ({"budget": 0.9}, "budget_token_heads says"),
        ({"model": "\ud800"}, "'model' is .* cannot be printed"),
        ({"settings": {"predicted_kl": "lots"}}, "predicted_kl is 'lots'"),
        ({"settings": {"predicted_kl": -3}}, "predicted_kl is -3"),
    ],
)
def test_contradictions_are_refused(changed: dict[str, Any], said: str) -> None:
    with pytest.raises((PlanError, FormatError), match=said):
        _ = plan_from_json(made().to_json() | changed).predicted_kl


def test_biases_beyond_every_logit_are_refused() -> None:
    told = made().to_json()
    told["coarse"][0]["log_bias"][0][0][0] = 1e308
    with pytest.raises(PlanError, match="numbers from -1000 to 1000"):
        plan_from_json(told)


def test_levels_that_settings_do_not_allow_are_not_judged() -> None:
    plan, statistics = made(), made_up_statistics(GEOMETRY)
    assert plan.coarse
    told = plan.to_json()
    told["settings"]["levels"] = "full"
    with pytest.raises(PlanError, match="which its settings do not allow"):
        worth_of(plan_from_json(told), statistics)


def test_other_biases_than_those_of_the_costs_are_told() -> None:
    plan, statistics = made(), made_up_statistics(GEOMETRY)
    assert worth_of(plan, statistics).instead == ""
    told = plan.to_json()
    told["coarse"][0]["log_bias"][0][0][3] += 0.5
    assert "other log-biases" in worth_of(plan_from_json(told), statistics).instead


def test_biases_of_another_shape_are_refused_before_drawing(emoji: ClassConditionalModel) -> None:
    from heatkv.errors import StatisticsError

    for wrong in (np.zeros((3, 6, 8, 3)), np.full((12, 6, 8, 3), np.nan)):
        with pytest.raises(StatisticsError, match="log_bias has shape"):
            calibrate_levels(emoji, 1, log_bias=wrong)


# ---------------------------------------------------------------------------------------------- files that are none


def test_a_link_stays_and_what_it_leads_to_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "real.json").write_text("{}")
    (tmp_path / "link.json").symlink_to(tmp_path / "real.json")
    write_json(tmp_path / "link.json", [1])
    assert (tmp_path / "link.json").is_symlink()
    assert read_json(tmp_path / "real.json") == [1]


def test_pipes_and_folders_are_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "folder"):
        with pytest.raises(FormatError, match="a folder, a device or a pipe"):
            write_json(tmp_path / name, [1])
    assert (tmp_path / "pipe").is_fifo()


def test_devices_and_pipes_are_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (Path("/dev/zero"), tmp_path / "pipe"):
        with pytest.raises(FormatError, match="a device or a pipe"):
            read_json(path)


def test_a_file_that_is_too_large_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("heatkv.core.io.MAX_JSON_BYTES", 1000)
    (tmp_path / "large.json").write_text("[" + "1," * 1000 + "1]")
    with pytest.raises(FormatError, match="more than the 1000 bytes"):
        read_json(tmp_path / "large.json")


def test_solve_replaces_plans_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine, plan = tmp_path / "mine.json", tmp_path / "plan.json"
    mine.write_text("{}")
    arguments = ["solve", "--policy", "streaming", "--budget", "20%", "--out"]
    assert run([*arguments, str(mine)]) == 2
    assert f"{mine} exists and is no plan" in capsys.readouterr().err
    assert mine.read_text() == "{}"
    assert run([*arguments, str(plan)]) == run([*arguments, str(plan)]) == 0


def test_a_plan_in_bytes_for_another_type_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = tmp_path / "plan.json"
    assert run(["solve", "--policy", "streaming", "--budget", "1MiB", "--out", str(plan)]) == 0
    given = ["profile", "--plan", str(plan), "--repeats", "1", "--in-process", "--json", "--out", str(tmp_path / "out")]
    assert run([*given, "--dtype", "bfloat16"]) == 0
    out, error = capsys.readouterr()
    assert "was made for" not in error
    # a plan alone is measured beside the full cache only
    rows = json.loads(out[out.index("{\n") :])["rows"]
    assert [row["policy"] for row in rows] == ["full", "streaming (plan.json)"]
    assert run(given) == 0
    assert "was made for 1.00 MiB with other rows or another type; with 2 rows in float32" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["fit", "--memory", "1e400GiB"], "more than any machine has"),
        (["generate", "--label", "pizza", "--count", "1000000000", "--out", "x"], "at most 1000000"),
        (["calibrate", "--samples", "1000000000", "--out", "x"], "at most 1000000"),
        (["compare", "--policies", "heatkv,streaming", "--budgets", "auto", "--out", "x"], "'heatkv' cannot choose"),
        (["solve", "--policy", "streaming", "--set", "levels=full", "--budget", "9%"], "no option 'levels'"),
    ],
)
def test_what_cannot_be_is_refused(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(arguments) == 2
    assert said in " ".join(capsys.readouterr().err.split())
    assert list(tmp_path.iterdir()) == []


# -------------------------------------------------------------------------------------------- dynamic policies


def dynamic_plan(policy: str, **options: Any) -> CapacityPlan:
    from heatkv.core.budget import Budget

    problem = PlanningProblem(GEOMETRY, Budget.parse("30%"), made_up_statistics(GEOMETRY), rows=2, storage="float32")
    plan = make_policy(policy, **options).plan(problem)
    assert isinstance(plan, CapacityPlan)
    return plan


@pytest.mark.parametrize(
    ("policy", "changed", "said"),
    [
        ("h2o", {"carried": 0}, "shared=False and carried=0, the policy False and 1"),
        ("snapkv", {"shared": True}, "shared=True and carried=0"),
        ("adakv", {"shared": False}, "shared=False and carried=0, the policy True"),
        ("snapkv", {"policy": "h2o"}, "settings are kernel, window; those of policy 'h2o' are"),
        ("snapkv", {"settings": {}}, "settings are none"),
        ("snapkv", {"settings": {"window": -1, "kernel": 5}}, "window=-1"),
        ("snapkv", {"settings": {"window": "a", "kernel": 5}}, "window='a'"),
        ("adakv", {"settings": {"base": "snapkv", "alpha": "nan"}}, "cannot use base='snapkv', alpha='nan'"),
    ],
)
def test_plans_of_another_policy_are_refused(policy: str, changed: dict[str, Any], said: str) -> None:
    told = dynamic_plan(policy).to_json()
    given = {"capacity": told["capacity"], "shared": told["shared"], "carried": told["carried"], **changed}
    plan = CapacityPlan(
        changed.get("policy", policy), GEOMETRY, np.array(given["capacity"]), told["budget"],
        told["budget_token_heads"], settings=changed.get("settings", told["settings"]), shared=given["shared"],
        carried=given["carried"],
    )  # fmt: skip
    with pytest.raises((PlanError, PolicyError), match=said):
        policy_of(plan)


def test_what_is_carried_does_not_shrink_with_the_type() -> None:
    plan = dynamic_plan("h2o")
    open_cache(plan, 2, torch.float32)
    plan.check_bytes(2, "float32")
    with pytest.raises(PlanError, match="made for another type: with 2 rows in bfloat16"):
        open_cache(plan, 2, torch.bfloat16)


def test_options_of_a_base_are_read_by_their_type() -> None:
    assert inner_policy("h2o:mean_per_scale=false:recent=0.25") == H2O(recent=0.25, mean_per_scale=False)
    assert inner_policy("per-layer:weights=3,1") == make_policy("per-layer", weights="3,1")
    assert inner_policy("scalekv:drafters=0,1") == make_policy("scalekv", drafters="0,1")
    for text, said in (
        ("h2o:recent=abc", "recent of policy 'h2o' is a number, not 'abc'"),
        ("h2o:recent=0.3,mean_per_scale=false", "is a number, not '0.3,mean_per_scale=false'"),
        ("protected:window=8", "policy 'protected' has no option 'window'"),
    ):
        with pytest.raises(PolicyError, match=said):
            inner_policy(text)
    with pytest.raises(PolicyError, match="mean_per_scale=3"):
        dynamic_plan("h2o", mean_per_scale=3)
    with pytest.raises(PolicyError, match="cannot use recent='a'"):
        dynamic_plan("h2o", recent="a")


def test_the_published_tables_are_for_their_budget_only() -> None:
    from heatkv.core.budget import Budget

    geometry = CacheGeometry(40, 28, 128, ScaleSchedule.infinity("1M", 1.0))
    for share, tabled in (("10%", True), ("30%", False)):
        plan = make_policy("scalekv").plan(PlanningProblem(geometry, Budget.parse(share)))
        assert isinstance(plan, CapacityPlan)
        assert plan.settings["drafters"] == "0,1,2"
        last = plan.capacity[:, 0, -1]
        assert set(np.argsort(-last)[:3]) == {0, 1, 2}
        # by the table refiners lose more towards the end, by the rule what is left is theirs
        assert (last.mean() > 0.9 * float(share[:-1]) / 100 * 6425) == (not tabled)
        assert plan.peak_token_heads > 0.95 * plan.budget_token_heads
