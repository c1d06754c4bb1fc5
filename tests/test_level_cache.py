"""Plans with cells at coarser levels: validation and files, and the cache against dense attention over plain means.

Shapes: R rows, H heads, N tokens of a scale, D head size, P = D/2 rotated pairs.
"""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from strategies import SEEDS, level_live_table, level_plans, plans, pooled, tokens_at
from test_cache import ROWS, Images, check_close, images_of, run
from torch import Tensor

from heatkv.core.geometry import CacheGeometry
from heatkv.core.plan import CoarseCells, Plan
from heatkv.core.plan_file import load_plan, plan_from_json
from heatkv.core.schedule import ScaleSchedule
from heatkv.core.storage_type import STORAGE_BYTES
from heatkv.engine.arena_cache import KVCache
from heatkv.engine.store import Places
from heatkv.errors import FormatError, HeatKVError, PlanError

SHARED_FOLDER = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


def angles_of(plan: Plan, seed: int) -> list[Tensor]:
    """Some angles for every token, (N, P)."""
    generator = torch.Generator().manual_seed(seed)
    pairs = plan.geometry.head_dim // 2
    return [torch.rand(n, pairs, generator=generator, dtype=torch.float64) * 20 - 10 for n in plan.schedule.tokens]


def dense(plan: Plan, images: Images, angles: list[Tensor] | None = None) -> list[Tensor]:
    """Every head by itself in float64: its own scale, and of every earlier one the means it reads, with their bias."""
    ends = [(level, last_read.tolist()) for level, last_read in plan.levels]
    biases: list[Any] = [None, *(cells.log_bias for cells in plan.coarse)]
    outputs = []
    for t, scale in enumerate(images):
        for layer, (q, k, v) in enumerate(scale):
            out = torch.zeros(q.shape, dtype=torch.float64)
            for h in range(plan.geometry.heads):
                logits, values = [q[:, h].double() @ k[:, h].double().mT], [v[:, h].double()]
                for s in range(t):
                    reading = [i for i, (_, last_read) in enumerate(ends) if last_read[layer][h][s] >= t]
                    if not reading:
                        continue
                    level, of_scale = ends[reading[0]][0], plan.schedule.scales[s]
                    _, past_k, past_v = images[s][layer]
                    keys = pooled(past_k[:, h], of_scale, level, None if angles is None else angles[s])
                    bias = biases[reading[0]][layer, h, s] if reading[0] else 0.0
                    logits.append(q[:, h].double() @ keys.mT + bias)
                    values.append(pooled(past_v[:, h], of_scale, level))
                out[:, h] = torch.cat(logits, dim=-1).softmax(-1) @ torch.cat(values, dim=-2)
            outputs.append(out)
    return outputs


# ---------------------------------------------------------------------- what attention sees


@settings(max_examples=80)
@given(plan=level_plans(max_side=4), rows=ROWS, rotates=st.booleans(), seed=SEEDS)
def test_attention_is_dense_attention_over_means(plan: Plan, rows: int, rotates: bool, seed: int) -> None:
    images, angles = images_of(plan, rows, seed), angles_of(plan, seed) if rotates else None
    cache = KVCache(plan, rows, key_angles=angles)
    check_close(run(cache, images), dense(plan, images, angles), 3e-5)
    check_close(run(cache, images), dense(plan, images, angles), 3e-5)  # again, over what is left of the first time


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@settings(max_examples=30)
@given(plan=level_plans(max_side=4), rotates=st.booleans(), seed=SEEDS)
def test_half_precision(dtype: torch.dtype, plan: Plan, rotates: bool, seed: int) -> None:
    images, angles = images_of(plan, 2, seed, dtype), angles_of(plan, seed) if rotates else None
    outputs = run(KVCache(plan, 2, dtype, key_angles=angles), images)
    assert {output.dtype for output in outputs} == {dtype}
    check_close(outputs, dense(plan, images, angles), 32 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("rotates", [False, True])
def test_every_kind_of_fall(rotates: bool) -> None:
    """Six heads that hold scale 1 (3x3) whole, pooled and as a mean for all kinds of spans, scale 2 likewise."""
    schedule = ScaleSchedule.of([(1, 1), (3, 3), (2, 4, 3), (1, 2), (2, 1), (1, 1)])
    geometry = CacheGeometry(1, 6, 6, schedule)
    ends = {  # for scale 1: last target of the whole cell, the pooled one, the mean
        "whole, pooled, mean, none": (2, 3, 4),
        "whole, mean": (3, 3, 5),
        "pooled, mean": (1, 2, 5),
        "mean": (1, 1, 4),
        "whole, pooled": (2, 5, 5),
        "never": (1, 1, 1),
    }
    levels = np.full((3, 1, 6, 6), 5)
    for level in range(3):
        levels[level, 0, :, 1] = [spans[level] for spans in ends.values()]
        levels[level, 0, :, 2] = np.roll([max(2, spans[level]) for spans in ends.values()], 1)
    rng = np.random.default_rng(2)
    coarse = [CoarseCells(x, levels[i], rng.normal(size=(1, 6, 6))) for i, x in ((1, "pool2"), (2, "mean"))]
    plan = Plan("by-hand", geometry, levels[0], 1.0, geometry.full_token_heads, 0, coarse=tuple(coarse))
    images, angles = images_of(plan, 2, 5), angles_of(plan, 5) if rotates else None
    check_close(run(KVCache(plan, 2, key_angles=angles), images), dense(plan, images, angles), 3e-5)


@settings(max_examples=60)
@given(plan=plans(max_side=3), seed=SEEDS)
def test_coarser_levels_that_no_cell_is_held_at_change_nothing(plan: Plan, seed: int) -> None:
    images = images_of(plan, 2, seed)
    rng = np.random.default_rng(seed)
    coarse = tuple(
        CoarseCells(level, plan.last_read, rng.normal(size=plan.last_read.shape)) for level in ("pool2", "mean")
    )
    same = replace(plan, coarse=coarse)
    assert same.live.tolist() == plan.live.tolist()
    for one, other in zip(run(KVCache(same, 2), images), run(KVCache(plan, 2), images), strict=True):
        assert torch.equal(one, other)


def test_the_bias_of_a_mean_of_equal_tokens() -> None:
    """Nine tokens that are all alike are read as well through one or four that together count as nine."""
    schedule = ScaleSchedule.of([(1, 1), (3, 3), (2, 2)])
    geometry = CacheGeometry(1, 1, 4, schedule)
    whole = np.array([[[2, 2, 2]]])
    images = images_of(Plan("w", geometry, whole, 1.0, 10, 0), 2, 3)
    for x in images[1][0][1:]:
        x[:] = x[:, :, :1]
    plan = Plan("w", geometry, whole, 1.0, 10, 0)
    for level in ("pool2", "mean"):
        pooled_plan = Plan(
            "m", geometry, np.array([[[2, 1, 2]]]), 1.0, 10, 0,
            coarse=(CoarseCells.uncalibrated(level, whole, schedule),),
        )  # fmt: skip
        got, expected = (run(KVCache(p, 2), images)[-1] for p in (pooled_plan, plan))
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)


def slots_of(places: Places | Tensor | None) -> set[int]:
    """The slots of an arena that is not coded."""
    assert isinstance(places, Places)
    assert places.uncoded is not None
    return set(places.uncoded.tolist())


def test_a_slot_is_read_before_its_next_owner_writes() -> None:
    """Two heads whose 16 slots are all taken fall to means while new cells move into the slots they leave."""
    schedule = ScaleSchedule.of([(1, 1), (2, 4), (2, 4), (1, 1)])
    geometry = CacheGeometry(1, 2, 4, schedule)
    last_read = np.array([[[0, 2, 3, 3], [0, 2, 2, 3]]])
    mean = np.array([[[0, 3, 3, 3], [0, 3, 3, 3]]])
    coarse = (CoarseCells.uncalibrated("mean", mean, schedule),)
    plan = Plan("by-hand", geometry, last_read, 1.0, geometry.full_token_heads, 0, coarse=coarse)
    cache = KVCache(plan, 2)
    step = cache._steps[2][0]
    assert step.pooled_held is not None
    assert step.pooled_new is not None
    members = slots_of(step.pooled_held.members)
    assert len(members) == cache.layout.slots == 16
    assert members >= slots_of(step.pooled_held.slots) | slots_of(step.pooled_new.slots) | slots_of(step.kept[1])
    images = images_of(plan, 2, 7)
    check_close(run(cache, images), dense(plan, images), 1e-5)


# ---------------------------------------------------------------------- what it holds


@settings(max_examples=100)
@given(plan=level_plans())
def test_live_is_counted_cell_by_cell(plan: Plan) -> None:
    table = level_live_table(plan)
    assert plan.live.tolist() == table
    assert plan.peak_token_heads == max(map(max, table)) <= plan.budget_token_heads
    ends = [last_read.tolist() for _, last_read in plan.levels]
    scales = len(plan.schedule)
    for t in range(scales):
        levels, reads = plan.level_read(t), plan.reads(t)
        for l, h, s in np.ndindex(levels.shape):
            expected = next((i for i, last_read in enumerate(ends) if last_read[l][h][s] >= t), len(ends))
            assert levels[l, h, s] == expected
            assert reads[l, h, s] == (expected < len(ends))
            held = [
                tokens_at(plan.levels[i][0], plan.schedule.scales[z])
                for z, i in enumerate(levels[l, h])
                if i < len(ends)
            ]
            assert plan.held[l, h, t] == sum(held)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@settings(max_examples=40)
@given(plan=level_plans(), rows=ROWS)
def test_the_arena_takes_what_was_planned(dtype: torch.dtype, plan: Plan, rows: int) -> None:
    cache = KVCache(plan, rows, dtype)
    storage = str(dtype).removeprefix("torch.")
    expected = max(map(max, level_live_table(plan))) * rows * plan.geometry.head_dim * sum(STORAGE_BYTES[storage])
    assert cache.allocated_bytes == expected == plan.bytes(rows, storage)
    assert cache.allocated_bytes <= plan.geometry.bytes(plan.budget_token_heads, rows, storage)


# ---------------------------------------------------------------------- validation and files

SCHEDULE = ScaleSchedule.of([(1, 1), (4, 4), (2, 3)])
GEOMETRY = CacheGeometry(2, 2, 4, SCHEDULE)  # N = 17, 68 token-heads in all
LAST_READ = np.array([[[2, 1, 2], [2, 1, 2]], [[2, 2, 2], [2, 1, 2]]])
POOL2 = np.array([[[2, 2, 2], [2, 1, 2]], [[2, 2, 2], [2, 1, 2]]])
MEAN = np.array([[[2, 2, 2], [2, 2, 2]], [[2, 2, 2], [2, 1, 2]]])
BIAS = np.arange(12).reshape(2, 2, 3) / 7 - 0.5


def plan(*coarse: CoarseCells, **changes: Any) -> Plan:
    told: dict[str, Any] = {"budget": 26 / 68, "budget_token_heads": 26, "sink_scales": 1, "last_read": LAST_READ}
    return Plan(policy="by-hand", geometry=GEOMETRY, coarse=coarse, **{**told, **changes})


def both(**changes: Any) -> tuple[CoarseCells, CoarseCells]:
    told: dict[str, Any] = {"pool2": POOL2, "mean": MEAN, "bias": BIAS, **changes}
    return CoarseCells("pool2", told["pool2"], told["bias"]), CoarseCells("mean", told["mean"], told["bias"])


def test_live_by_hand() -> None:
    """Scale 1 is kept as 4 and as 1 token in layer 0, as 16 and not at all in layer 1; scale 0 always."""
    # after (0, 0): layer 0 holds scale 0; after (1, 0): 2 + 4 + 1 in layer 0, scale 0 in layer 1; then 2 + 16 there
    assert plan(*both()).live.tolist() == [[2, 4], [9, 25], [18, 0]]


@pytest.mark.parametrize(
    ("coarse", "phrase"),
    [
        (both()[::-1], r"the coarse levels are \['mean', 'pool2'\]; known, and in this order, are \['pool2', 'mean'\]"),
        ((both()[0], both()[0]), r"the coarse levels are \['pool2', 'pool2'\]"),
        ((CoarseCells("full", POOL2, BIAS),), r"the coarse levels are \['full'\]"),
        ((CoarseCells("pool3", POOL2, BIAS),), r"the coarse levels are \['pool3'\]"),
        (both(pool2=LAST_READ - 1), r"last_read of level pool2\[0\]\[0\]\[1\] is 0; it must be from 1"),
        (
            both(pool2=np.minimum(POOL2, [2, 1, 2])),
            r"pool2\[1\]\[0\]\[1\] is 1, less than that of last_read, 2; it counts",
        ),
        (both(mean=LAST_READ), r"mean\[0\]\[0\]\[1\] is 1, less than that of level pool2, 2; it counts the finer"),
        (both(pool2=POOL2[:1]), r"last_read of level pool2 has shape \(1, 2, 3\); 2 layers, 2 heads, 3 scales need it"),
        (both(mean=MEAN.astype(float)), "last_read of level mean holds float64 values"),
        (both(bias=BIAS[:, :1]), r"log_bias of level pool2 is of shape \(2, 1, 3\); it must be finite"),
        (both(bias=BIAS * np.nan), "log_bias of level pool2 .* must be finite numbers"),
        (both(bias=BIAS + np.inf), "log_bias of level pool2 .* must be finite numbers"),
        (both(bias=[[1], [2, 3]]), "log_bias of level pool2 is no regular array of numbers"),
        ((CoarseCells("pool2", np.maximum(POOL2, [2, 2, 2]), BIAS),), "holds 32 token-heads after layer 1 of scale 1"),
    ],
)
def test_wrong_coarse_cells_are_refused(coarse: tuple[CoarseCells, ...], phrase: str) -> None:
    with pytest.raises(PlanError, match=phrase):
        plan(*coarse, **{"budget_token_heads": 25})


def test_sinks_are_whole() -> None:
    dropped = np.array(LAST_READ)
    dropped[0, 0, 0] = 1
    with pytest.raises(PlanError, match="first 1 scales, the sinks, is dropped before the end"):
        plan(*both(), last_read=dropped)
    assert plan(*both(), last_read=dropped, sink_scales=0).live[0].tolist() == [2, 4]  # by its mean it is still held


def test_the_default_bias_is_the_log_of_the_count() -> None:
    made = CoarseCells.uncalibrated("pool2", POOL2, SCHEDULE)
    assert made.log_bias[1, 0].tolist() == pytest.approx([0, math.log(4), math.log(6 / 2)])
    for level in ("full", "pool3"):
        with pytest.raises(PlanError, match=f"unknown coarse level '{level}'; known: pool2, mean"):
            CoarseCells.uncalibrated(level, POOL2, SCHEDULE)
    with pytest.raises(PlanError, match=r"level 'mean' has shape \(2, 2, 2\); the schedule has 3 scales"):
        CoarseCells.uncalibrated("mean", POOL2[:, :, :2], SCHEDULE)


def test_coarse_cells_cannot_be_changed() -> None:
    last_read, bias = POOL2.copy(), BIAS.copy()
    made = plan(CoarseCells("pool2", last_read, bias))
    before = made.to_json()
    last_read[:], bias[:] = 0, 7
    assert made.to_json() == before
    for array in (made.coarse[0].last_read, made.coarse[0].log_bias, made.held):
        with pytest.raises(ValueError, match="read-only"):
            array[0, 0, 0] = 0


def test_equality_sees_the_levels() -> None:
    made = plan(*both())
    assert made == plan(*both())
    assert hash(made) == hash(plan(*both()))
    for other in (plan(), plan(both()[0]), plan(*both(bias=BIAS + 1e-15)), plan(*both(mean=np.maximum(MEAN, 2)))):
        assert made != other


@SHARED_FOLDER
@given(made=level_plans())
def test_files_round_trip_bit_for_bit(made: Plan, tmp_path: Path) -> None:
    made.save(tmp_path / "plan.json")
    first = (tmp_path / "plan.json").read_bytes()
    again = load_plan(tmp_path / "plan.json")
    again.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == first
    assert again == made
    for one, other in zip(again.coarse, made.coarse, strict=True):
        assert one.level == other.level
        assert one.last_read.tobytes() == other.last_read.tobytes()
        assert one.log_bias.tobytes() == other.log_bias.tobytes()


def test_a_file_without_biases_has_the_log_of_the_count() -> None:
    told = plan(*both()).to_json()
    for entry in told["coarse"]:
        del entry["log_bias"]
    read = plan_from_json(told)
    assert read == plan(*(CoarseCells.uncalibrated(x.level, x.last_read, SCHEDULE) for x in both()))
    assert "coarse" not in plan().to_json()  # files of plans without levels are as they were


def changed(at: int, **entries: Any) -> dict[str, Any]:
    told = copy.deepcopy(plan(*both()).to_json())
    told["coarse"][at].update(entries)
    return told


@pytest.mark.parametrize(
    ("told", "error", "phrase"),
    [
        (changed(0, level="mean"), PlanError, "p.json: the coarse levels are"),
        (changed(0, level="pool9"), PlanError, "p.json: the coarse levels are"),
        (changed(0, level="pool9", log_bias=None), PlanError, "p.json: unknown coarse level 'pool9'"),
        (changed(0, level=2), FormatError, "p.json: 'level' is 2"),
        (
            changed(1, last_read=MEAN[:, :, :2].tolist()),
            PlanError,
            "p.json: last_read of level 'mean' has 2 scales, the schedule 3",
        ),
        (changed(1, last_read=MEAN[:, :, :2].tolist(), log_bias=None), PlanError, "p.json: last_read of level 'mean'"),
        (changed(1, last_read=MEAN.astype(float).tolist()), FormatError, "'last_read of coarse' must be"),
        (changed(1, log_bias=BIAS[:, :, :2].tolist()), PlanError, r"log_bias of level mean is of shape \(2, 2, 2\)"),
        (changed(1, log_bias=(BIAS * np.nan).tolist()), PlanError, "log_bias of level mean"),
        # a pooled cell more is not seen in `last_read`, but in the peak
        (
            changed(1, last_read=np.maximum(MEAN, 2).tolist()),
            PlanError,
            "peak_token_heads says 25, .* gives 26; the file",
        ),
        ({**plan(*both()).to_json(), "peak_token_heads": 24}, PlanError, "peak_token_heads says 24"),
        ({**plan(*both()).to_json(), "coarse": {}}, FormatError, "'coarse' is {}"),
        ({**plan(*both()).to_json(), "coarse": [[]]}, FormatError, r"an entry of 'coarse' is \[\], not an object"),
        ({**plan(*both()).to_json(), "coarse": None}, FormatError, "'coarse' is missing"),
    ],
)
def test_files_changed_by_hand_are_refused(told: dict[str, Any], error: type[HeatKVError], phrase: str) -> None:
    with pytest.raises(error, match=phrase):
        plan_from_json(json.loads(json.dumps(told)), "p.json")
