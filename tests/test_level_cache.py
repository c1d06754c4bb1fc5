"""Plans with cells at coarser levels: the cache against dense attention over plain means, and their validation.

Shapes: R rows, H heads, N tokens of a scale, D head size.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import SEEDS, level_live_table, level_plans, plans, tokens_at
from support.attention import ROWS, angles_of, check_close, dense, images_of, run

from heatkv.core.geometry import CacheGeometry
from heatkv.core.plan import CoarseCells, Plan
from heatkv.core.plan_file import plan_from_json
from heatkv.core.schedule import ScaleSchedule
from heatkv.engine.arena_cache import KVCache
from heatkv.errors import FormatError, PlanError

# ---------------------------------------------------------------------- what attention sees


@settings(max_examples=80)
@given(
    plan=level_plans(max_side=4),
    rows=ROWS,
    dtype=st.sampled_from([torch.float32, torch.float32, torch.bfloat16, torch.float16]),
    rotates=st.booleans(),
    seed=SEEDS,
)
def test_dense_attention_over_means(plan: Plan, rows: int, dtype: torch.dtype, rotates: bool, seed: int) -> None:
    images, angles = images_of(plan, rows, seed, dtype), angles_of(plan, seed) if rotates else None
    cache = KVCache(plan, rows, dtype, key_angles=angles)
    expected, limit = dense(plan, images, angles), 3e-5 if dtype == torch.float32 else 32 * torch.finfo(dtype).eps
    for poison in (True, False):  # then over what is left of the first time
        outputs = run(cache, images, poison)
        assert {output.dtype for output in outputs} == {dtype}
        check_close(outputs, expected, limit)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("side", [2, 7, 16])
def test_biases_are_not_rounded(dtype: torch.dtype, side: int) -> None:
    """A mean of n tokens beside n own tokens, under queries of 0, has exactly half of the attention; log n is no 16-bit
    number."""
    geometry = CacheGeometry(1, 1, 32, ScaleSchedule.square([side, side]))
    whole, mean = np.array([[[0, 1]]]), np.array([[[1, 1]]])
    cells = CoarseCells.uncalibrated("mean", mean, geometry.schedule)
    cache = KVCache(Plan("mean", geometry, whole, 1 / side**2, 1, 0, coarse=(cells,)), 1, dtype)
    zeros, ones = (torch.full((1, 1, side**2, 32), value, dtype=dtype) for value in (0.0, 1.0))
    cache.attend(0, zeros, zeros, ones)
    share = cache.attend(0, zeros, zeros, zeros)
    assert (share - 0.5).abs().max() <= 2e-6 if dtype == torch.float32 else torch.equal(share, ones / 2)


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
def test_coarser_levels_without_cells(plan: Plan, seed: int) -> None:
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


def test_slots_read_before_their_next_owner_writes() -> None:
    """Two heads whose 16 slots are all taken fall to means while new cells move into the slots they leave."""
    schedule = ScaleSchedule.of([(1, 1), (2, 4), (2, 4), (1, 1)])
    geometry = CacheGeometry(1, 2, 4, schedule)
    last_read = np.array([[[0, 2, 3, 3], [0, 2, 2, 3]]])
    mean = np.array([[[0, 3, 3, 3], [0, 3, 3, 3]]])
    coarse = (CoarseCells.uncalibrated("mean", mean, schedule),)
    plan = Plan("by-hand", geometry, last_read, 1.0, geometry.full_token_heads, 0, coarse=coarse)
    cache = KVCache(plan, 2)
    step = cache._steps[2][0]
    places = (step.pooled_held.members, step.pooled_held.slots, step.pooled_new.slots, step.kept[1])
    members, *others = ({*x.slots.tolist()} for x in places)
    assert len(members) == cache.layout.slots == 16
    assert members >= set().union(*others)
    images = images_of(plan, 2, 7)
    check_close(run(cache, images), dense(plan, images), 1e-5)


# ---------------------------------------------------------------------- what it holds


@settings(max_examples=100)
@given(plan=level_plans(), rows=ROWS)
def test_live_bytes_and_files(plan: Plan, rows: int) -> None:
    table = level_live_table(plan)
    assert plan.live.tolist() == table
    taken = plan.peak_token_heads * rows * plan.geometry.head_dim * 4
    assert KVCache(plan, rows, torch.bfloat16).allocated_bytes == taken == plan.bytes(rows, "bfloat16")
    again = plan_from_json(json.loads(json.dumps(plan.to_json())))
    assert again == plan
    assert again.to_json() == plan.to_json()
    for cells, others in zip(again.coarse, plan.coarse, strict=True):
        assert cells.level == others.level
        assert cells.last_read.tobytes() == others.last_read.tobytes()
        assert cells.log_bias.tobytes() == others.log_bias.tobytes()
    assert plan.peak_token_heads == max(map(max, table)) <= plan.budget_token_heads
    ends = [last_read.tolist() for _, last_read in plan.levels]
    scales = len(plan.schedule)
    for t in range(scales):
        levels, reads = plan.level_read(t), plan.levels[-1][1][:, :, :t] >= t
        for l, h, s in np.ndindex(levels.shape):
            expected = next((i for i, last_read in enumerate(ends) if last_read[l][h][s] >= t), len(ends))
            assert levels[l, h, s] == expected
            assert reads[l, h, s] == (expected < len(ends))
        for l, h in np.ndindex(levels.shape[:2]):
            held = zip(plan.schedule.scales, levels[l, h].tolist(), strict=False)
            assert plan.held[l, h, t] == sum(tokens_at(plan.levels[i][0], z) for z, i in held if i < len(ends))


# ---------------------------------------------------------------------- validation

SCHEDULE = ScaleSchedule.of([(1, 1), (4, 4), (2, 3)])
GEOMETRY = CacheGeometry(2, 2, 4, SCHEDULE)  # N = 17, 68 token-heads in all
LAST_READ = np.array([[[2, 1, 2], [2, 1, 2]], [[2, 2, 2], [2, 1, 2]]])
POOL2 = np.array([[[2, 2, 2], [2, 1, 2]], [[2, 2, 2], [2, 1, 2]]])
MEAN = np.array([[[2, 2, 2], [2, 2, 2]], [[2, 2, 2], [2, 1, 2]]])
BIAS = np.arange(12).reshape(2, 2, 3) / 7 - 0.5


def plan(*coarse: CoarseCells, **changes: Any) -> Plan:
    settings = {"budget": 26 / 68, "budget_token_heads": 26, "sink_scales": 1, "last_read": LAST_READ, **changes}
    return Plan(policy="by-hand", geometry=GEOMETRY, coarse=coarse, **settings)


def both(pool2: Any = POOL2, mean: Any = MEAN, bias: Any = BIAS) -> tuple[CoarseCells, CoarseCells]:
    return CoarseCells("pool2", pool2, bias), CoarseCells("mean", mean, bias)


def test_live_by_hand() -> None:
    """Scale 1 is kept as 4 and as 1 token in layer 0, as 16 and not at all in layer 1; scale 0 always."""
    # after (0, 0): layer 0 holds scale 0; after (1, 0): 2 + 4 + 1 in layer 0, scale 0 in layer 1; then 2 + 16 there
    assert plan(*both()).live.tolist() == [[2, 4], [9, 25], [18, 0]]


def test_sinks_are_whole() -> None:
    dropped = np.array(LAST_READ)
    dropped[0, 0, 0] = 1
    with pytest.raises(PlanError, match="sinks"):
        plan(*both(), last_read=dropped)
    assert plan(*both(), last_read=dropped, sink_scales=0).live[0].tolist() == [2, 4]  # by its mean it is still held


def test_default_bias_is_the_log_of_the_count() -> None:
    cells = CoarseCells.uncalibrated("pool2", POOL2, SCHEDULE)
    assert cells.log_bias[1, 0].tolist() == pytest.approx([0, math.log(4), math.log(6 / 2)])


def test_equality_sees_the_levels() -> None:
    one = plan(*both())
    assert one == plan(*both())
    for other in (plan(), plan(both()[0]), plan(*both(bias=BIAS + 1e-15)), plan(*both(mean=np.maximum(MEAN, 2)))):
        assert one != other
    assert "coarse" not in plan().to_json()


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"level": "pool9"}, FormatError),
        ({"level": 2}, FormatError),
        ({"last_read": MEAN[:, :, :2].tolist()}, PlanError),
        ({"last_read": MEAN.astype(float).tolist()}, FormatError),
        ({"log_bias": BIAS[:, :, :2].tolist()}, PlanError),
        ({"last_read": np.maximum(MEAN, 2).tolist()}, PlanError),  # a pooled cell more is seen in the peak alone
    ],
)
def test_files_changed_by_hand(changes: dict[str, Any], error: type[Exception]) -> None:
    record = plan(*both()).to_json()
    record["coarse"][1].update(changes)
    with pytest.raises(error, match=r"p\.json"):
        plan_from_json(json.loads(json.dumps(record)), "p.json")
