"""Plans: the live count against a slow loop, what is refused, and files that were changed by hand."""

from __future__ import annotations

import copy
import dataclasses
import json
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from strategies import live_table, plans

from heatkv.core.budget import Budget
from heatkv.core.capacity_plan import CapacityPlan
from heatkv.core.geometry import CacheGeometry
from heatkv.core.plan import CoarseCells, Plan, held_for_targets, keep_first, live_of_held
from heatkv.core.plan_file import load_plan, plan_from_json
from heatkv.core.schedule import ScaleSchedule
from heatkv.errors import FormatError, HeatKVError, PlanError, ScheduleError
from heatkv.policies.base import PlanningProblem
from heatkv.policies.snapkv import SnapKV

GEOMETRY = CacheGeometry(2, 2, 4, ScaleSchedule.of([(1, 1), (2, 1), (2, 3)]))  # N = 3, 12 token-heads in all
LAST_READ = [[[2, 2, 2], [2, 1, 2]], [[2, 2, 2], [2, 2, 2]]]


def plan(**changes: Any) -> Plan:
    usual: dict[str, Any] = {
        "policy": "by-hand", "geometry": GEOMETRY, "last_read": np.array(LAST_READ), "budget": 11 / 12,
        "budget_token_heads": 11, "sink_scales": 1, "model": "tiny", "settings": {"ratios": [1, 0.5], "name": "ä"},
        "value": 0.75, "gap": 0.0,
    }  # fmt: skip
    return Plan(**{**usual, **changes})


def capacity_plan(**changes: Any) -> CapacityPlan:
    capacity = np.broadcast_to([0, 1, 2], (2, 2, 3))
    usual: dict[str, Any] = {"policy": "by-hand", "geometry": GEOMETRY, "capacity": capacity, "budget": 0.75}
    return CapacityPlan(**{**usual, "budget_token_heads": 9, **changes})


# ---------------------------------------------------------------------- what follows from last_read


def live_token_heads(last_read: Any, tokens: tuple[int, ...]) -> Any:
    return live_of_held(held_for_targets([last_read], [tokens]).sum(axis=1))


def test_live_token_heads_by_hand() -> None:
    """One head, two layers, scales of 1, 2 and 6 tokens; layer 1 drops scale 0 and never keeps scale 1."""
    last_read = np.array([[[2, 2, 2]], [[1, 1, 2]]])
    # after (0,0): 1; (0,1): 1+1; (1,0): layer 0 has 3, layer 1 still 1; (1,1): 3; at the end layer by layer nothing
    assert live_token_heads(last_read, (1, 2, 6)).tolist() == [[1, 2], [4, 3], [0, 0]]


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(plan=plans())
def test_live_peak_reads_and_files(plan: Plan, tmp_path: Path) -> None:
    table = live_table(plan.last_read.tolist(), plan.schedule.tokens)
    assert live_token_heads(plan.last_read, plan.schedule.tokens).tolist() == plan.live.tolist() == table
    flat = [(live, -target, -layer) for target, row in enumerate(table) for layer, live in enumerate(row)]
    peak, target, layer = max(flat)
    assert plan.peak_token_heads == peak <= plan.budget_token_heads
    assert plan.peak_checkpoint == (-target, -layer)
    assert plan.bytes(rows=3, storage="float32") == peak * 3 * 8 * plan.geometry.head_dim
    scales = len(plan.schedule)
    for target in range(scales):
        assert np.array_equal((plan.level_read(target) < len(plan.levels)), plan.last_read[..., :target] >= target)
    assert plan.had_no_effect() == (set(plan.last_read.flat) == {scales - 1})
    plan.save(tmp_path / "plan.json")
    again = load_plan(tmp_path / "plan.json")
    again.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "plan.json").read_bytes()
    assert (again, again.budget.hex()) == (plan, plan.budget.hex())


def test_empty_and_full_caches() -> None:
    full = plan(last_read=keep_first(GEOMETRY.shape, 3), budget=1.0, budget_token_heads=12)
    empty = plan(last_read=keep_first(GEOMETRY.shape, 0), sink_scales=0)
    assert (full.peak_token_heads, full.had_no_effect()) == (12, True)
    assert (empty.peak_token_heads, empty.had_no_effect()) == (0, False)
    assert plan(last_read=keep_first(GEOMETRY.shape, 1)).peak_token_heads == 4


# ---------------------------------------------------------------------- what no cache can follow


def array_with(value: int, *place: int) -> Any:
    last_read = np.array(LAST_READ)
    last_read[place] = value
    return last_read


WHOLE, ZEROS = np.full((2, 2, 3), 2), np.zeros((2, 2, 3))


def capacities(*targets: int) -> dict[str, Any]:
    return {"capacity": np.broadcast_to(targets, (2, 2, len(targets)))}


@pytest.mark.parametrize(
    ("make", "changes", "said"),
    [
        (plan, {"last_read": np.array(LAST_READ)[:1]}, r"\(1, 2, 3\)"),
        (plan, {"last_read": np.array(LAST_READ, dtype=float)}, "float64"),
        (plan, {"last_read": array_with(-1, 1, 0, 0), "sink_scales": 0}, r"\[1, 0, 0\] .* is -1; it must be from 0"),
        (plan, {"last_read": array_with(0, 1, 0, 1), "sink_scales": 0}, r"\[1, 0, 1\] .* is 0; it must be from 1"),
        (plan, {"last_read": array_with(3, 1, 0, 2), "sink_scales": 0}, r"\[1, 0, 2\] .* is 3; it must be from 2"),
        (plan, {"sink_scales": -1}, "-1"),
        (plan, {"sink_scales": 3}, "3 scales allow 0 to 2"),
        (plan, {"sink_scales": 2}, "dropped before the end"),
        # the drop is of layer 0, which has dropped before layer 1 writes: 10 after (1, 1), 8 after (1, 0)
        (plan, {"budget_token_heads": 9}, "holds 10 token-heads after layer 1 of scale 1; the budget is 9"),
        (plan, {"coarse": (CoarseCells("mean", WHOLE, ZEROS), CoarseCells("pool2", WHOLE, ZEROS))}, "in this order"),
        (plan, {"coarse": (CoarseCells("pool3", WHOLE, ZEROS),)}, r"\['pool3'\]"),
        (plan, {"coarse": (CoarseCells("mean", np.array(LAST_READ) - 1, ZEROS),)}, "of level mean is 1"),
        (plan, {"coarse": (CoarseCells("mean", WHOLE, ZEROS + 1001),)}, "-1000 to 1000"),
        (plan, {"coarse": (CoarseCells("mean", WHOLE, ZEROS * np.nan),)}, "-1000 to 1000"),
        (plan, {"coarse": (CoarseCells("mean", WHOLE, np.zeros(3)),)}, r"\(3,\)"),
        (capacity_plan, capacities(0, 0), r"\(2, 2, 2\)"),
        (capacity_plan, capacities(1, 1, 2), "target 0 is 1; it must be from 0 to 0"),
        (capacity_plan, capacities(0, 1, 4), "target 2 is 4; it must be from 0 to 3"),
        (capacity_plan, capacities(0, 0, 3), "target 2 is 3; it must be from 0 to 2"),
        (capacity_plan, capacities(0, -1, 1), "target 1 is -1"),
        (
            capacity_plan,
            {"capacity": [[[0, 0, 4], [0, 1, 2]]] * 2, "shared": True},
            "all heads, target 2 is 6; .* to 5",
        ),
        (capacity_plan, {"carried": -1}, "carried is -1"),
        (capacity_plan, {"budget_token_heads": 7}, "holds 8 token-heads after layer 1 of scale 1"),
    ],
)
def test_plans_that_no_cache_can_follow(make: Any, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(PlanError, match=said):
        make(**changes)
    make()


def test_plans_for_other_models_types_and_predictions() -> None:
    schedule = GEOMETRY.schedule
    plan().check_geometry(CacheGeometry(2, 2, 64, schedule))  # the head size is no part of a plan's decisions
    other = ScaleSchedule.of([(1, 1), (1, 2), (2, 3)])
    for wrong in (CacheGeometry(2, 4, 4, schedule), CacheGeometry(4, 1, 4, schedule), CacheGeometry(2, 2, 4, other)):
        with pytest.raises(PlanError, match=r"solve a plan"):
            plan().check_geometry(wrong)
    carrying = capacity_plan(carried=1, budget_token_heads=9)
    carrying.check_bytes(2, "float32")  # 8 token-heads with a number each fit where 9 without would
    with pytest.raises(PlanError, match=r"with 2 rows in bfloat16 .* 320 bytes, the budget .* is 288"):
        carrying.check_bytes(2, "bfloat16")
    assert plan().predicted_kl is None
    assert plan(settings={"predicted_kl": 0.25}).predicted_kl == 0.25
    for kl in ("lots", -3, float("nan")):
        with pytest.raises(PlanError, match="predicted_kl"):
            _ = plan(settings={"predicted_kl": kl}).predicted_kl


def test_a_plan_cannot_be_changed() -> None:
    array, settings_of_plan = np.array(LAST_READ), {"a": 1}
    frozen = plan(last_read=array, settings=settings_of_plan)
    before = frozen.to_json()
    array[:], settings_of_plan["a"] = 0, 2  # what it was made from is not what it holds
    assert frozen.to_json() == before
    for held in (frozen.last_read, frozen.live, capacity_plan().capacity):
        with pytest.raises(ValueError, match="read-only"):
            held[0, 0] = 0
    with pytest.raises(TypeError):
        frozen.settings["a"] = 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        frozen.budget = 1.0


def test_equality() -> None:
    bias = np.full((2, 2, 3), 0.5)
    made = [
        plan(), plan(last_read=keep_first(GEOMETRY.shape, 1)), plan(model="other"), plan(settings={}), plan(value=None),
        plan(coarse=(CoarseCells("mean", WHOLE, bias),)), plan(coarse=(CoarseCells("mean", WHOLE, bias * 1.0001),)),
        plan(geometry=replace(GEOMETRY, head_dim=8)), plan(budget=1.0, budget_token_heads=12),
        capacity_plan(), capacity_plan(shared=True), plan().to_json(),
    ]  # fmt: skip
    again = [dict(one) if isinstance(one, dict) else replace(one) for one in made]
    for i, one in enumerate(made):
        assert [one == other for other in again] == [i == j for j in range(len(made))]
    assert len({*made[:-1], *again[:-1]}) == len(made) - 1


# ---------------------------------------------------------------------- files


def test_plans_of_billions_of_token_heads(tmp_path: Path) -> None:
    geometry = CacheGeometry(40, 32, 64, ScaleSchedule.square((1, 500, 1000, 1000)))
    made = SnapKV().plan(PlanningProblem(geometry, Budget("share", Fraction(997, 1000))))
    huge = replace(made, geometry=replace(geometry, heads=64), capacity=np.repeat(made.capacity, 2, axis=1),
                   budget_token_heads=2 * made.budget_token_heads)  # fmt: skip
    assert huge.budget_token_heads > 2e9
    for one in (made, huge):
        one.save(tmp_path / "plan.json")
        assert load_plan(tmp_path / "plan.json") == one


def test_the_documented_keys() -> None:
    assert list(plan().to_json().items()) == [
        ("format", "heatkv-plan"), ("version", 1), ("policy", "by-hand"),
        ("settings", {"ratios": [1, 0.5], "name": "ä"}), ("model", "tiny"),
        ("schedule", [[1, 1, 1], [1, 2, 1], [1, 2, 3]]), ("layers", 2), ("heads", 2), ("head_dim", 4),
        ("budget", 11 / 12), ("budget_token_heads", 11), ("peak_token_heads", 10), ("sink_scales", 1),
        ("value", 0.75), ("gap", 0.0), ("last_read", LAST_READ),
    ]  # fmt: skip


def at(value: Any, *path: str | int) -> dict[str, Any]:
    """The valid plan as JSON with `value` at `path`."""
    data = copy.deepcopy(plan().to_json())
    place: Any = data
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    return data


def mean_level(bias: Any) -> dict[str, Any]:
    """The valid plan with a coarser level, whose first bias is `bias`."""
    biases: list[Any] = [[[0.5] * 3 for _ in range(2)] for _ in range(2)]
    biases[0][0][0] = bias
    return at([{"level": "mean", "last_read": LAST_READ, "log_bias": biases}], "coarse")


@pytest.mark.parametrize(
    ("data", "error", "said"),
    [
        ([], FormatError, "no JSON object"),
        (at("heatkv-statistics", "format"), FormatError, "'heatkv-statistics'"),
        (at(2, "version"), FormatError, "version 2"),
        (at([[[0]]], "capacity"), FormatError, "both 'last_read' and 'capacity'"),
        (at([{"level": "mean"}], "coarse"), FormatError, "last_read"),
        (at([{"level": "full", "last_read": LAST_READ}], "coarse"), FormatError, "level"),
        (at([{"level": "mean", "last_read": [[[2]]]}], "coarse"), PlanError, r"\(1, 1, 1\)"),
        *((mean_level(bias), FormatError, "log_bias") for bias in ("0.5", True, None, [0.5])),
        (mean_level(1e308), PlanError, "-1000 to 1000"),
        *((at(x, "last_read", 0, 0, 0), FormatError, "last_read") for x in (2.0, True, None, "2", [2])),
        (at(2**63, "last_read", 0, 1, 1), PlanError, "last_read"),
        (at([2, 2], "last_read", 0, 1), PlanError, "last_read is no regular array"),
        (at([], "last_read"), PlanError, "last_read"),
        (at(2, "last_read", 0, 1, 1), PlanError, "holds 12 token-heads"),
        (at(9, "peak_token_heads"), PlanError, "says 9, the plan holds 10; .*changed by hand"),
        (at(9, "budget_token_heads"), PlanError, "the budget is 9"),
        (at(0.5, "budget"), PlanError, "budget of 0.5 gives 6; .*changed by hand"),
        *((at(x, "budget"), FormatError, "budget") for x in ("0.5", 0, 1.01)),
        (at(-0.5, "gap"), FormatError, "gap"),
        (at(False, "value"), FormatError, "value"),
        (at(2.0, "layers"), FormatError, "layers"),
        (at(2**40, "layers"), PlanError, "layers is 1099511627776"),
        (at(True, "sink_scales"), FormatError, "sink_scales"),
        (at([], "settings"), FormatError, "settings"),
        (at([[1, 1, 1]], "schedule"), ScheduleError, "2 to 1024 scales"),
        (at([1, 2, 2.5], "schedule", 1), FormatError, "schedule"),
        (at([1], "schedule", 1), ScheduleError, "scale 1 is"),
        (at([1, 2, 0], "schedule", 1), ScheduleError, "scale 1 is"),
    ],
)
def test_files_changed_by_hand(data: Any, error: type[HeatKVError], said: str) -> None:
    with pytest.raises(error, match=rf"mine\.json.*{said}"):
        plan_from_json(json.loads(json.dumps(data)), "mine.json")


def test_every_key_is_needed() -> None:
    for name in plan().to_json().keys() - {"value", "gap"}:
        data = plan().to_json()
        del data[name]
        with pytest.raises(FormatError, match=name):
            plan_from_json(data)
        if name == "head_dim":
            assert plan_from_json(data, head_dim=4) == plan()
