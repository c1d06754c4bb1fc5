"""Plans: the live count against a slow loop, what is refused, and files that were damaged or changed by hand."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from strategies import geometries, last_reads, live_table, plans

from heatkv.core.geometry import CacheGeometry
from heatkv.core.plan import Plan, live_token_heads
from heatkv.core.plan_file import load_plan, plan_from_json
from heatkv.core.schedule import ScaleSchedule
from heatkv.errors import FormatError, PlanError, ScheduleError

SHARED_FOLDER = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])

GEOMETRY = CacheGeometry(2, 2, 4, ScaleSchedule.of([(1, 1), (2, 1), (2, 3)]))  # N = 3, 12 token-heads in all
LAST_READ = [[[2, 2, 2], [2, 1, 2]], [[2, 2, 2], [2, 2, 2]]]


def plan(**changes: Any) -> Plan:
    told: dict[str, Any] = {
        "policy": "by-hand",
        "geometry": GEOMETRY,
        "last_read": np.array(LAST_READ),
        "budget": 11 / 12,
        "budget_token_heads": 11,
        "sink_scales": 1,
        "model": "tiny",
        "settings": {"ratios": [1, 0.5], "name": "ä"},
        "value": 0.75,
        "gap": 0.0,
    }
    return Plan(**{**told, **changes})


# ---------------------------------------------------------------------- what follows from last_read


@given(data=st.data(), geometry=geometries())
def test_live_token_heads(data: st.DataObject, geometry: CacheGeometry) -> None:
    last_read = data.draw(last_reads(geometry))
    tokens = geometry.schedule.tokens
    assert live_token_heads(last_read, tokens).tolist() == live_table(last_read.tolist(), tokens)


def test_live_token_heads_by_hand() -> None:
    """One head, two layers, scales of 1, 2 and 6 tokens; layer 1 drops scale 0 and never keeps scale 1."""
    last_read = np.array([[[2, 2, 2]], [[1, 1, 2]]])
    # after (0,0): 1; (0,1): 1+1; (1,0): layer 0 has 3, layer 1 still 1; (1,1): 3; at the end layer by layer nothing
    assert live_token_heads(last_read, (1, 2, 6)).tolist() == [[1, 2], [4, 3], [0, 0]]


@given(plan=plans())
def test_peak_and_reads(plan: Plan) -> None:
    table = live_table(plan.last_read.tolist(), plan.schedule.tokens)
    flat = [(live, -target, -layer) for target, row in enumerate(table) for layer, live in enumerate(row)]
    peak, target, layer = max(flat)
    assert plan.peak_token_heads == peak <= plan.budget_token_heads
    assert plan.peak_checkpoint == (-target, -layer)
    assert plan.bytes(rows=3, storage="float32") == peak * 3 * 8 * plan.geometry.head_dim
    scales = len(plan.schedule)
    for target in range(scales):
        reads = plan.reads(target)
        assert reads.shape == (plan.geometry.layers, plan.geometry.heads, target)
        for (l, h, s), read in np.ndenumerate(reads):
            assert read == (plan.last_read[l, h, s] >= target)
    kept = [last for heads in plan.last_read.tolist() for cells in heads for last in cells]
    assert plan.had_no_effect() == all(last == scales - 1 for last in kept)


# ---------------------------------------------------------------------- validation


@pytest.mark.parametrize(
    ("changes", "phrase"),
    [
        ({"last_read": np.array(LAST_READ)[:1]}, r"last_read has shape \(1, 2, 3\); 2 layers, 2 heads, 3 scales"),
        ({"last_read": np.array(LAST_READ)[:, :, :2]}, r"shape \(2, 2, 2\)"),
        ({"last_read": np.array(LAST_READ, dtype=float)}, "float64 values; it must hold whole numbers"),
        ({"last_read": np.ones((2, 2, 3), dtype=bool)}, "bool values; it must hold whole numbers"),
        ({"sink_scales": -1}, "sink_scales is -1; 3 scales allow 0 to 2"),
        ({"sink_scales": 3}, "sink_scales is 3; 3 scales allow 0 to 2"),
        ({"sink_scales": 2}, "first 2 scales, the sinks, is dropped before the end"),
        ({"budget": 0.0}, r"budget is 0\.0; it must be a share above 0 and at most 1"),
        ({"budget": 1.01}, r"budget is 1\.01"),
        ({"budget": float("nan")}, "budget is nan"),
        ({"budget_token_heads": -1}, "budget_token_heads is -1; it must be from 0 to the full cache of 12"),
        ({"budget_token_heads": 13}, "budget_token_heads is 13"),
        # the drop is of layer 0, which has dropped before layer 1 writes: 10 after (1, 1), 8 after (1, 0)
        ({"budget_token_heads": 9}, "holds 10 token-heads after layer 1 of scale 1; the budget is 9"),
    ],
)
def test_a_wrong_plan_is_refused(changes: dict[str, Any], phrase: str) -> None:
    with pytest.raises(PlanError, match=phrase):
        plan(**changes)


@pytest.mark.parametrize(("source", "value"), [(0, -1), (1, 0), (2, 1), (0, 3), (2, 3)])
def test_a_cell_outside_its_range_is_named(source: int, value: int) -> None:
    last_read = np.array(LAST_READ)
    last_read[1, 0, source] = value
    phrase = rf"last_read\[1\]\[0\]\[{source}\] is {value}; it must be from {source} \(never cached\) to 2"
    with pytest.raises(PlanError, match=phrase):
        plan(last_read=last_read, sink_scales=0)


def test_a_plan_for_another_model_is_refused() -> None:
    schedule = GEOMETRY.schedule
    plan().check_geometry(CacheGeometry(2, 2, 64, schedule))  # the head size is no part of a plan's decisions
    with pytest.raises(PlanError, match="for 2 layers x 2 heads, the model has 2 x 4; solve a plan for this model"):
        plan().check_geometry(CacheGeometry(2, 4, 4, schedule))
    with pytest.raises(PlanError, match="for 2 layers x 2 heads, the model has 4 x 1"):
        plan().check_geometry(CacheGeometry(4, 1, 4, schedule))
    with pytest.raises(PlanError, match=r"for the schedule 1x1,2x1,2x3, the model runs 1x1,1x2,2x3; solve a plan"):
        plan().check_geometry(CacheGeometry(2, 2, 4, ScaleSchedule.of([(1, 1), (1, 2), (2, 3)])))


def test_a_plan_cannot_be_changed() -> None:
    array, told = np.array(LAST_READ), {"a": 1}
    made = plan(last_read=array, settings=told)
    before = made.to_json()
    array[:], told["a"] = 0, 2  # what it was made from is not what it holds
    assert made.to_json() == before
    for held in (made.last_read, made.live):
        with pytest.raises(ValueError, match="read-only"):
            held[0, 0] = 0
    with pytest.raises(TypeError):
        made.settings["a"] = 2  # type: ignore[index]
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.budget = 1.0  # type: ignore[misc]
    made.to_json()["last_read"][0][0][0] = 7
    assert made.to_json() == before


def test_equality() -> None:
    assert plan() == plan()
    assert hash(plan()) == hash(plan())
    last_read = np.array(LAST_READ)
    last_read[0, 1, 1] = 2
    for changes in (
        {"last_read": last_read, "budget": 1.0, "budget_token_heads": 12},
        {"model": "other"},
        {"budget": 1.0, "budget_token_heads": 12},
        {"settings": {}},
        {"value": None},
    ):
        assert plan(**changes) != plan()
    assert plan() != plan().to_json()


# ---------------------------------------------------------------------- files


@SHARED_FOLDER
@given(made=plans())
def test_files_round_trip_bit_for_bit(made: Plan, tmp_path: Path) -> None:
    made.save(tmp_path / "plan.json")
    first = (tmp_path / "plan.json").read_bytes()
    again = load_plan(tmp_path / "plan.json")
    again.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == first
    assert again == made
    assert again.geometry == made.geometry
    assert again.budget.hex() == made.budget.hex()
    assert again.last_read.dtype == made.last_read.dtype
    assert np.array_equal(again.last_read, made.last_read)


def test_the_documented_keys() -> None:
    told = json.loads(json.dumps(plan().to_json()))
    assert told == {
        "format": "heatkv-plan",
        "version": 1,
        "policy": "by-hand",
        "settings": {"ratios": [1, 0.5], "name": "ä"},
        "model": "tiny",
        "schedule": [[1, 1, 1], [1, 2, 1], [1, 2, 3]],
        "layers": 2,
        "heads": 2,
        "head_dim": 4,
        "sink_scales": 1,
        "budget": 11 / 12,
        "budget_token_heads": 11,
        "peak_token_heads": 10,
        "value": 0.75,
        "gap": 0.0,
        "last_read": LAST_READ,
    }


def test_saving_replaces_a_file_whole_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text("old" * 10_000)
    plan().save(path)
    assert load_plan(path) == plan()
    assert [found.name for found in tmp_path.iterdir()] == ["plan.json"]
    with pytest.raises(FormatError, match=r"cannot write .*no-folder"):
        plan().save(tmp_path / "no-folder" / "plan.json")


def at(value: Any, *path: str | int) -> dict[str, Any]:
    """The valid plan as JSON with `value` at `path`."""
    told = copy.deepcopy(plan().to_json())
    place: Any = told
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    return told


def mean_level(bias: Any) -> dict[str, Any]:
    """The valid plan with a coarser level, whose first bias is `bias`."""
    biases: list[Any] = [[[0.5] * 3 for _ in range(2)] for _ in range(2)]
    biases[0][0][0] = bias
    return at([{"level": "mean", "last_read": LAST_READ, "log_bias": biases}], "coarse")


@pytest.mark.parametrize(
    ("told", "error", "phrase"),
    [
        ([], FormatError, "holds no JSON object"),
        (at("heatkv-statistics", "format"), FormatError, "format 'heatkv-statistics', not 'heatkv-plan'"),
        (at(2, "version"), FormatError, "version 2; this release reads version 1"),
        (at(True, "version"), FormatError, "version True"),
        (at("1", "version"), FormatError, "version '1'"),
        (at([{"level": "mean"}], "coarse"), FormatError, "'last_read of coarse' must be"),
        (mean_level("0.5"), FormatError, "'log_bias' must be .* numbers, not"),
        (mean_level(True), FormatError, "'log_bias' must be .* numbers, not"),
        (mean_level(None), FormatError, "'log_bias' must be .* numbers, not"),
        (mean_level([0.5]), FormatError, r"'log_bias' must be \[layers\]\[heads\]\[scales\] numbers"),
        (mean_level(10**400), FormatError, "'log_bias' must be .* numbers, not"),
        (mean_level(float("nan")), PlanError, "log_bias of level mean .* finite numbers"),
        (at([[[0]]], "capacity"), FormatError, "'capacity': it is of a dynamic policy"),
        (at(2.0, "last_read", 0, 0, 0), FormatError, "'last_read' must be .* whole numbers"),
        (at(True, "last_read", 0, 1, 1), FormatError, "'last_read'"),
        (at(None, "last_read", 0, 1, 1), FormatError, "'last_read'"),
        (at("2", "last_read", 0, 1, 1), FormatError, "'last_read'"),
        (at(2**63, "last_read", 0, 1, 1), FormatError, "'last_read'"),
        (at(10**400, "last_read", 0, 1, 1), FormatError, "'last_read'"),
        (at([2, 2], "last_read", 0, 1), FormatError, r"'last_read' must be \[layers\]\[heads\]\[scales\] whole"),
        (at([], "last_read"), FormatError, "'last_read'"),
        (at("x" * 10_000, "last_read"), FormatError, "'last_read'"),
        (at(2**62, "last_read", 0, 1, 1), PlanError, r"last_read\[0\]\[1\]\[1\] is 4611686018427387904"),
        (at(2, "last_read", 0, 1, 1), PlanError, "peak|holds 12 token-heads"),
        (at(9, "peak_token_heads"), PlanError, "peak_token_heads says 9, last_read gives 10; .*changed by hand"),
        (at(9, "budget_token_heads"), PlanError, "holds 10 token-heads after layer 1 of scale 1; the budget is 9"),
        (at(2.0, "layers"), FormatError, r"'layers' is 2\.0"),
        (at(True, "sink_scales"), FormatError, "'sink_scales' is True"),
        (at("0.5", "budget"), FormatError, "'budget' is '0.5'"),
        (at(10**400, "budget"), FormatError, "'budget'"),
        (at(-(10**400), "gap"), FormatError, "'gap'"),
        (at(float("inf"), "value"), FormatError, "'value'"),
        (at(float("nan"), "value_bound"), FormatError, "'value_bound'"),
        (at(False, "value"), FormatError, "'value' is False"),
        (at([], "settings"), FormatError, r"'settings' is \[\]"),
        (at(None, "model"), FormatError, "'model' is missing"),
        (at(10**400, "heads"), PlanError, "heads is 10"),
        (at([[1, 1, 1]], "schedule"), ScheduleError, "at least 2 scales"),
        (at([1, 2, 2.5], "schedule", 1), ScheduleError, "scale 1 is"),
        (at({}, "schedule", 1), ScheduleError, "scale 1 is"),
        (at("112", "schedule", 1), ScheduleError, "scale 1 is"),
    ],
)
def test_a_file_changed_by_hand_is_refused(told: Any, error: type[Exception], phrase: str) -> None:
    with pytest.raises(error, match=phrase):
        plan_from_json(told)


@pytest.mark.parametrize("name", [name for name in plan().to_json() if name not in ("value", "gap")])
def test_every_key_is_needed(name: str) -> None:
    told = plan().to_json()
    del told[name]
    with pytest.raises((FormatError, PlanError), match=re.escape(name)):
        plan_from_json(told, "given.json")


def test_messages_name_the_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    for text in (json.dumps(at(3, "last_read", 0, 0, 0)), json.dumps(at(1, "peak_token_heads")), "{", "[]"):
        path.write_text(text)
        with pytest.raises((FormatError, PlanError), match=r"mine\.json"):
            load_plan(path)


@pytest.mark.parametrize(
    ("content", "phrase"),
    [
        (b"", "is not JSON"),
        (b"\xff\xfe{}", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (json.dumps(plan().to_json()).replace("0.75", "NaN").encode(), "NaN is not a number"),
        (json.dumps(plan().to_json()).replace("0.75", "-Infinity").encode(), "-Infinity is not a number"),
        (json.dumps(plan().to_json()).replace("0.75", "1e999").encode(), "1e999 is beyond every float"),
        (json.dumps(plan().to_json()).replace("0.75", "1" + "0" * 5000).encode(), "is not JSON"),
    ],
    ids=["empty", "utf-16", "deep", "nan", "infinity", "overflow", "digits"],
)
def test_what_is_no_json(content: bytes, phrase: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_bytes(content)
    with pytest.raises(FormatError, match=phrase):
        load_plan(path)


def test_what_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"cannot read .*missing\.json: No such file"):
        load_plan(tmp_path / "missing.json")
    with pytest.raises(FormatError, match=r"cannot read .*: Is a directory"):
        load_plan(tmp_path)


def test_a_truncated_file_is_refused_wherever_it_is_cut(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    whole = json.dumps(plan().to_json()).encode()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(FormatError, match="is not JSON"):
            load_plan(path)


HOSTILE = st.one_of(
    st.sampled_from([None, True, False, "", "x", [], {}, [[]], [[[]]], -1, 0, 1, 2, 3, 10**19, 10**400]),
    st.sampled_from([0.0, 1.0, 2.0, 2.5, -0.0, 1e308, float("inf"), float("nan")]),
    st.integers(),
    st.recursive(st.integers(0, 3), lambda inner: st.lists(inner, max_size=3), max_leaves=8),
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value inside `value`."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(found for key, inner in items for found in places(inner, (*path, key)))]


def same(first: Any, second: Any) -> bool:
    """Equal, and no boolean taken for a number."""
    if isinstance(first, dict) and isinstance(second, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, list) and isinstance(second, list):
        return len(first) == len(second) and all(map(same, first, second))
    return bool(first == second) and isinstance(first, bool) == isinstance(second, bool)


@settings(max_examples=400)
@given(data=st.data())
def test_a_changed_file_is_refused_or_means_what_it_says(data: st.DataObject) -> None:
    """Up to three values replaced or taken away: a typed error, or a plan that says exactly what the file says."""
    told: Any = copy.deepcopy(plan().to_json())
    for _ in range(data.draw(st.integers(1, 3))):
        path = data.draw(st.sampled_from(places(told)[1:]))
        place = told
        for step in path[:-1]:
            place = place[step]
        if data.draw(st.booleans()):
            place[path[-1]] = data.draw(HOSTILE)
        else:
            del place[path[-1]]
    try:
        made = plan_from_json(copy.deepcopy(told))
    except (FormatError, PlanError, ScheduleError) as error:
        message = str(error)
    else:
        message = ""
        optional = {name: told[name] for name in ("value", "value_bound", "gap") if told.get(name) is not None}
        kept = {name: value for name, value in told.items() if name not in ("value", "value_bound", "gap")}
        kept["schedule"] = [scale if len(scale) == 3 else [1, *scale] for scale in told["schedule"]]
        assert same(made.to_json(), {**kept, **optional})
    # one line that a person can read, whatever was in the file
    assert "\n" not in message
    assert len(message) < 1000


@settings(SHARED_FOLDER, max_examples=300)
@given(data=st.data())
def test_a_damaged_file_gives_a_typed_error(data: st.DataObject, tmp_path: Path) -> None:
    content = bytearray(json.dumps(plan().to_json()).encode())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "plan.json"
    path.write_bytes(content)
    try:
        made = load_plan(path)
    except (FormatError, PlanError, ScheduleError):
        return
    made.save(path)  # what was accepted can be kept
    assert load_plan(path) == made


def test_a_budget_in_token_heads_above_its_share_is_refused() -> None:
    with pytest.raises(PlanError, match=r"budget_token_heads is 12, more than 0\.5 of the full cache"):
        plan(budget=0.5, budget_token_heads=12)
