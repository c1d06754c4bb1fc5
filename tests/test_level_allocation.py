"""The solver for levels against all paths of small instances: what it costs, what it proves, what it may hold."""

from __future__ import annotations

import ctypes
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from strategies import SEEDS
from support.levels import (
    FEW,
    MORE,
    all_paths,
    costs_of,
    feasible,
    full,
    optimum,
    random_levels,
    tokens_of,
    with_room,
)

from heatkv.core.level_statistics import LevelStatistics
from heatkv.core.levels import LEVELS, NONE, LevelChoices
from heatkv.core.schedule import ScaleSchedule
from heatkv.errors import BudgetError, PlanError, StatisticsError
from heatkv.levels import columns, rounding
from heatkv.levels.columns import LevelAllocation, allocate_levels, level_bound, level_price_bound
from heatkv.levels.costs import level_cost
from heatkv.levels.pricing import Paths, Pricing
from heatkv.levels.rounding import closer, undominated
from heatkv.solve.checkpoints import Capacity

Problem = tuple[LevelStatistics, Capacity]
ALL, WHOLE = (0, 1, 2), (0,)
NEAR = {"rel": 1e-9, "abs": 1e-12}


def check_plan(
    stats: LevelStatistics,
    capacity: Capacity,
    found: LevelAllocation,
    levels: Sequence[int] = ALL,
    sinks: int = 0,
) -> None:
    """It is a plan, fits at every checkpoint, and costs what it says."""
    choices, schedule = stats.choices, stats.choices.schedule
    scales, held = len(schedule), np.zeros((1, capacity.layers, len(schedule)), dtype=np.int64)
    cost = 0.0
    for layer, head in np.ndindex(capacity.layers, capacity.heads):
        path = found.level[layer, head]
        for t, s in np.ndindex(scales, scales):
            if s >= t:
                assert path[t, s] == NONE
            elif s < max(sinks, choices.sink_scales):
                assert path[t, s] == 0
            else:
                allowed = choices.of_source(s) if s in choices.joint_sources(t) else choices.of_other(s)
                assert path[t, s] in {*levels, NONE} & set(allowed)
                assert t == s + 1 or path[t, s] >= path[t - 1, s]  # levels never rise
        cost += costs_of(stats, path[None], layer, head)[0]
        held[0, layer] += tokens_of(schedule, path[None])[0]
    assert feasible(held, capacity).all()
    assert found.cost == pytest.approx(cost, **NEAR)
    assert found.bound <= found.cost * (1 + 1e-12)
    gap = (found.cost - found.bound) / found.cost if found.cost > 0 else 0
    assert found.gap == (gap if gap > 1e-9 else 0)  # below is rounding
    assert (found.row_prices >= 0).all()
    for index, last_read in enumerate(found.last_reads()):
        for layer, head, s in np.ndindex(last_read.shape):
            reading = [t for t in range(s + 1, scales) if found.level[layer, head, t, s] <= index]
            assert reading == list(range(s + 1, last_read[layer, head, s] + 1))


SMALL = [(FEW, 2, 2), (FEW, 1, 3), (MORE, 2, 1), (MORE, 1, 2)]


@st.composite
def problems(draw: st.DrawFn, capped: bool = False) -> Problem:
    schedule, layers, heads = draw(st.sampled_from(SMALL))
    stats = random_levels(
        schedule, layers, heads, draw(SEEDS), 1, draw(st.sampled_from([5, 1, 2, 0])),
        draw(st.sampled_from(["falling", "any"])),
    )  # fmt: skip
    room = draw(st.integers(layers * heads, full(schedule, layers, heads)))  # the sinks are one token each
    cap = draw(st.integers(heads, full(schedule, 1, heads))) if capped and draw(st.booleans()) else None
    return stats, with_room(stats, room, cap)


# ---------------------------------------------------------------------- against all plans


@settings(max_examples=30)
@given(problem=problems(capped=True), levels=st.sampled_from([ALL, WHOLE, (0, 2)]), more=st.sampled_from([0, 0, 1, 3]))
def test_best_of_all_plans(problem: Problem, levels: tuple[int, ...], more: int) -> None:
    """Between cost and bound, with these levels and further sinks that the costs also know otherwise."""
    stats, capacity = problem
    schedule = stats.choices.schedule
    sinks = min(stats.choices.sink_scales + more, len(schedule) - 1)
    least = stats.layers * stats.heads * schedule.offsets[sinks]
    cap = None if capacity.layer_room is None else max(capacity.layer_room, least // stats.layers)
    capacity = dataclasses.replace(capacity, room=max(capacity.room, least), layer_room=cap)
    found, best = allocate_levels(stats, capacity, levels, sinks), optimum(stats, capacity, levels, sinks)
    check_plan(stats, capacity, found, levels, sinks)
    assert found.bound - 1e-9 <= best <= found.cost + 1e-9
    assert level_cost(stats, found.level) == pytest.approx(found.cost, **NEAR)
    bound, prices = level_bound(stats, capacity, levels, sinks)
    assert bound <= best + 1e-9
    assert level_price_bound(stats, capacity, levels, prices, sinks) == pytest.approx(bound, **NEAR)
    rng = np.random.default_rng(capacity.room)
    anything = rng.random(len(prices)) * (rng.random(len(prices)) < 0.3) * 10.0 ** (capacity.room % 4 - 3)
    assert level_price_bound(stats, capacity, levels, anything, sinks) <= best + 1e-9
    if levels != WHOLE:  # dropping alone never costs less
        assert found.cost <= allocate_levels(stats, capacity, WHOLE, sinks).cost
    too_little = dataclasses.replace(capacity, room=least - 1)
    for call in (allocate_levels, level_bound):
        with pytest.raises(BudgetError, match=f"{sinks} sink scales alone hold 1 token-heads more .* {least - 1};"):
            call(stats, too_little, levels, sinks)


@settings(max_examples=30)
@given(
    problem=problems(capped=True),
    sizes=st.sampled_from([(0, 1, 1e30), tuple(10.0 ** np.arange(-12, 13)), (0, 1, 5e-324), (1e-310,)]),
)
def test_bounds_of_costs_of_any_size(problem: Problem, sizes: tuple[float, ...]) -> None:
    stats, capacity = problem
    rng = np.random.default_rng(capacity.room)
    joint, single = ([x * rng.choice(sizes, x.shape) for x in xs] for xs in (stats.joint_sum, [stats.single_sum]))
    stats = dataclasses.replace(stats, joint_sum=tuple(joint), single_sum=single[0])
    best = optimum(stats, capacity)
    found, (bound, prices) = allocate_levels(stats, capacity), level_bound(stats, capacity)
    check_plan(stats, capacity, found)
    assert max(found.bound, bound, level_price_bound(stats, capacity, ALL, prices)) <= best <= found.cost * (1 + 1e-12)


def test_optimum_of_half_of_small_instances() -> None:
    solved = 0
    for seed in range(8):
        schedule, layers, heads = SMALL[2 + seed % 2]
        stats = random_levels(schedule, layers, heads, seed, 1, (5, 1, 2, 0)[seed // 2])
        room = int(np.random.default_rng(seed).integers(layers * heads, full(schedule, layers, heads)))
        best = optimum(stats, with_room(stats, room))
        solved += allocate_levels(stats, with_room(stats, room)).cost <= best * (1 + 1e-9) + 1e-12
    assert solved >= 4


@settings(max_examples=20)
@given(problem=problems(), share=st.sampled_from([0.0, 1e-3, 4.9e-3, 0.1]))
def test_closer_bound(problem: Problem, share: float) -> None:
    """Below the best of all plans, from the plan without any cells, whose gap is largest."""
    stats, capacity = problem
    pricing = Pricing(stats, ALL)
    scales = len(stats.choices.schedule)
    start, _ = pricing.best(np.full((pricing.heads, scales), pricing.prohibitive))
    bound, prices = level_bound(stats, capacity)
    assume(bound < (1 - share) * start.cost.sum())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rounding, "PROVEN", share)
        plan, closer_bound = closer(pricing, capacity, bound, prices, start)
    level = plan.level.reshape(stats.layers, stats.heads, scales, scales).astype(int)
    cost = float(plan.cost.sum())
    check_plan(stats, capacity, LevelAllocation(level, cost, min(closer_bound, cost), prices))
    assert bound <= closer_bound <= optimum(stats, capacity) + 1e-9
    assert cost <= start.cost.sum()


# few heads, of which each holds a large part of the budget: the best mix is far below the best plan
LUMPY = ScaleSchedule.square((1, 2, 3, 4, 6, 8))


@pytest.mark.parametrize(("levels", "seed"), [(ALL, 2), (WHOLE, 7)])  # first plans break further rows
def test_gap_of_few_heads(
    levels: tuple[int, ...], seed: int, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Half a percent, by programs in whole numbers, which print nothing, not even below Python."""
    stats = random_levels(LUMPY, 3, 2, seed, 2)
    capacity = with_room(stats, int(0.2 * full(LUMPY, 3, 2)))
    found = allocate_levels(stats, capacity, levels)
    check_plan(stats, capacity, found, levels)
    assert found.gap <= 0.005
    for limit in ("MAX_NEAR", "MAX_PROGRAM"):
        with monkeypatch.context() as patch:
            patch.setattr(rounding, limit, 0)
            without = allocate_levels(stats, capacity, levels)
        check_plan(stats, capacity, without, levels)
        assert without.gap > 0.05
        assert found.cost <= without.cost
    ctypes.CDLL(None).fflush(None)  # what C programs print waits in a buffer of its own
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(("share", "joint", "far"), [(0.1, 2, False), (0.5, 5, True)])
def test_gap_of_larger_instances(share: float, joint: int, far: bool) -> None:
    """Half a percent, also where costs are far below that of holding nothing: they must not drown in tolerances."""
    stats = random_levels(LUMPY, 12, 6, 11, 2, joint)
    if far:
        sums = tuple(np.where(joint > np.quantile(joint, 0.9), joint * 1e6, joint) for joint in stats.joint_sum)
        stats = dataclasses.replace(stats, joint_sum=sums)
    capacity = with_room(stats, int(share * full(LUMPY, 12, 6)))
    found = allocate_levels(stats, capacity)
    check_plan(stats, capacity, found)
    assert found.gap <= 0.005
    assert found.cost <= allocate_levels(stats, capacity, WHOLE).cost


def test_dropping_instead_of_a_poor_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    stats = random_levels(MORE, 2, 2, 4)
    capacity, original = with_room(stats, 30), columns._allocate
    dropping = allocate_levels(stats, capacity, WHOLE)

    def poor(pricing: Pricing, capacity: Capacity, ends: float) -> LevelAllocation:
        found = original(pricing, capacity, ends)
        only_drops = set(found.level.flat) <= {0, NONE}
        return found if only_drops else dataclasses.replace(found, cost=dropping.cost * (1 + 1e-9))

    monkeypatch.setattr(columns, "_allocate", poor)
    found = allocate_levels(stats, capacity)
    assert np.array_equal(found.level, dropping.level)
    assert found.bound < found.cost == dropping.cost  # the bound is still that of all levels


# ---------------------------------------------------------------------- pricing

PRICED = [
    (FEW, 1, 5), (FEW, 0, 5), (MORE, 1, 5), (MORE, 1, 2), (MORE, 1, 1), (MORE, 0, 2), (MORE, 1, 0), (MORE, 4, 5),
    # more sources than the five of a target: scale 1 leaves them
    (ScaleSchedule.of([(1, 1)] * 8), 1, 5),
    (ScaleSchedule.of([(1, 1), (1, 2), (4, 4), (1, 1), (2, 2), (1, 1)]), 1, 2),
    (ScaleSchedule.of([(1, 1), (4, 4), (4, 4), (4, 4), (5, 5)]), 1, 2),
]  # fmt: skip


@pytest.mark.parametrize(("schedule", "measured", "joint"), PRICED)
@pytest.mark.parametrize(("levels", "more"), [(ALL, 0), (ALL, 1), (WHOLE, 2), ((0, 2), 0), ((0, 1), 2)])
def test_cheapest_of_all_paths(
    schedule: ScaleSchedule, measured: int, joint: int, more: int, levels: tuple[int, ...]
) -> None:
    sinks = min(measured + more, len(schedule) - 1)
    stats = random_levels(schedule, 1, 3, 2, measured, joint, "any")
    pricing, paths = Pricing(stats, levels, sinks), all_paths(stats.choices, levels, sinks)
    tokens, rng = tokens_of(schedule, paths), np.random.default_rng(3)
    costs = [costs_of(stats, paths, 0, head) for head in range(3)]
    for scale in (0.0, 0.01, 0.1, 1.0, 100.0):
        prices = rng.random((3, len(schedule))) * scale
        found, reduced = pricing.best(prices)
        for head in range(3):
            best = (costs[head] + tokens @ prices[head]).min()
            assert reduced[head] == pytest.approx(best, **NEAR)
            level = found.level[head].astype(int)
            assert (paths == level).all(axis=(1, 2)).any()
            assert found.tokens[head].tolist() == tokens_of(schedule, level[None])[0].tolist()
            assert found.cost[head] == pytest.approx(costs_of(stats, level[None], 0, head)[0])


@pytest.mark.parametrize(("schedule", "sinks", "joint"), PRICED)
@pytest.mark.parametrize("levels", [ALL, WHOLE])
def test_paths_of_little_regret(schedule: ScaleSchedule, sinks: int, joint: int, levels: tuple[int, ...]) -> None:
    stats = random_levels(schedule, 1, 2, 2, sinks, joint, "any")
    pricing, paths = Pricing(stats, levels), all_paths(stats.choices, levels)
    tokens = tokens_of(schedule, paths)
    prices = np.random.default_rng(3).random((2, len(schedule))) * 0.05
    priced = [costs_of(stats, paths, 0, head) + tokens @ prices[head] for head in range(2)]
    regrets = [cost - cost.min() for cost in priced]
    limit = float(np.sort(np.concatenate(regrets))[: 40 + 2][-1]) + 1e-9
    expected = [{paths[i].tobytes() for i in np.flatnonzero(regret <= limit)} for regret in regrets]
    count = sum(map(len, expected))
    found = pricing.near(prices, limit, count)
    assert found is not None
    heads, near = found
    assert len(heads) == count
    for head in range(2):
        of_head = near.level[heads == head].astype(int)
        assert {path.tobytes() for path in of_head} == expected[head]
        assert near.cost[heads == head] == pytest.approx(costs_of(stats, of_head, 0, head))
        assert np.array_equal(near.tokens[heads == head], tokens_of(schedule, of_head))
    assert count == 2 or pricing.near(prices, limit, count - 1) is None  # where nothing is free there is one path each


def test_paths_of_the_oracle() -> None:
    """One source of 16 tokens for one target, and one of 2 for two: 4 levels, and 6 falling pairs of 3."""
    assert len(all_paths(LevelChoices(FEW, 1))) == 4 * 6
    assert len(all_paths(LevelChoices(ScaleSchedule.of([(1, 1)] * 8), 1))) == 7 * 6 * 5 * 4 * 3 * 2


def test_undominated_paths() -> None:
    tokens, head = np.array([[0, 4], [0, 4], [0, 3], [9, 5], [0, 4], [0, 9]]), np.array([0, 0, 0, 0, 1, 1])
    cost = np.array([1.0, 1.0, 2.0, 1.5, 0.5, 0.9])
    paths = Paths(np.zeros((6, 2, 2), dtype=np.int8), cost, tokens)
    both, second = np.ones((2, 2), dtype=bool), np.array([[False, True]] * 2)
    assert sorted(undominated(head, paths, both)) == [0, 2, 4]
    assert sorted(undominated(head, paths, ~second)) == [0, 4]


@pytest.mark.parametrize(("schedule", "sinks", "joint"), PRICED)
def test_cost_of_any_plan(schedule: ScaleSchedule, sinks: int, joint: int) -> None:
    stats = random_levels(schedule, 2, 2, 2, sinks, joint, "any")
    paths, rng = all_paths(stats.choices), np.random.default_rng(4)
    for _ in range(10):
        chosen = rng.integers(len(paths), size=(2, 2))
        expected = sum(costs_of(stats, paths[chosen[l, h], None], l, h)[0] for l, h in np.ndindex(2, 2))
        assert level_cost(stats, paths[chosen]) == pytest.approx(expected, rel=1e-12)


def test_cost_of_levels_of_as_many_tokens() -> None:
    stats = random_levels(FEW, 1, 1, 2, 1, 1, "any")  # the last target combines the 16 tokens only
    level = all_paths(stats.choices)[:1].copy()[None]
    level[..., 2:, 1], level[..., 3, 2] = LEVELS.index("mean"), NONE
    pooled = level.copy()
    pooled[..., 2:, 1] = LEVELS.index("pool2")  # of 1 x 2 tokens
    assert level_cost(stats, pooled) == level_cost(stats, level)
    schedule = ScaleSchedule.of([(1, 1), (4, 4), (4, 4), (4, 4), (5, 5)])
    stats = random_levels(schedule, 1, 1, 1, 1, 1)
    alone = all_paths(stats.choices)[:1].copy()[None]
    alone[..., 2:, 1] = LEVELS.index("pool2")
    with pytest.raises(PlanError, match=r"source 1 at level pool2 for target 3, .* known there: full, mean"):
        level_cost(stats, alone)


# ---------------------------------------------------------------------- edges


@pytest.mark.parametrize("joint", [5, 1, 0])
def test_nothing_to_lose(joint: int) -> None:
    """At the full budget, and where all costs are 0."""
    stats = random_levels(MORE, 2, 2, 4, 1, joint, "any")
    found = allocate_levels(stats, with_room(stats, full(MORE, 2, 2)))
    assert (found.last_reads()[0] == len(MORE) - 1).all()
    assert (found.cost, found.bound, found.gap) == (0, 0, 0)
    free = stats.with_sums({name: array * 0 for name, array in stats.sums().items()}, stats.samples)
    for room in (4, 30):
        found = allocate_levels(free, with_room(free, room))
        check_plan(free, with_room(free, room), found)
        assert (found.cost, found.bound, found.gap) == (0, 0, 0)


def test_size_of_costs_and_same_answer_twice() -> None:
    stats = random_levels(MORE, 2, 2, 4, 1)
    answers = [
        allocate_levels(
            stats.with_sums({name: x * size for name, x in stats.sums().items()}, ("a",)), with_room(stats, 30)
        )
        for size in (1, 1, 1e-30, 1e30)
    ]
    one, again = answers[:2]
    assert np.array_equal(one.level, again.level)
    assert (one.cost, one.bound, one.row_prices.tobytes()) == (again.cost, again.bound, again.row_prices.tobytes())
    for size, other in zip((1e-30, 1e30), answers[2:], strict=True):
        assert other.cost == pytest.approx(one.cost * size, rel=0.01)
        assert other.bound == pytest.approx(one.bound * size, rel=0.01)


def test_sinks() -> None:
    stats = random_levels(MORE, 2, 2, 4, 2)  # two sinks in four heads are 8
    call: Callable[..., Any]
    for call in (allocate_levels, level_bound):
        for capacity in (with_room(stats, 7), with_room(stats, 100, 3)):
            with pytest.raises(BudgetError, match="the 2 sink scales alone hold 1 token-heads more than"):
                call(stats, capacity)
        with pytest.raises(StatisticsError, match="hold for 2 sink scales or more, not for 1"):
            call(stats, with_room(stats, 30), sink_scales=1)
    found = allocate_levels(stats, with_room(stats, 8))
    assert (found.last_reads()[2][:, :, 2:] == np.arange(2, 5)).all()  # nothing but the sinks fits
    found = allocate_levels(stats, with_room(stats, full(MORE, 2, 2)), sink_scales=4)
    assert (found.last_reads()[0] == 4).all()


def test_pooled_source_that_leaves_the_joint_ones() -> None:
    """Pooled is by far the cheapest, but only as long as the source is one of two."""
    schedule = ScaleSchedule.of([(1, 1), (4, 4), (4, 4), (4, 4), (5, 5)])
    stats = random_levels(schedule, 1, 1, 1, 1, 2)
    joint: list[Any] = [np.where((stats.choices.combinations(t) == 1).all(-1), 1e-6, 1.0)[None, None] for t in range(5)]
    for costs in joint:
        costs[..., 0] = 0
    single = stats.single_sum * 0 + [0.0, 9.0, 0.5, 0.7]
    stats = dataclasses.replace(stats, joint_sum=tuple(joint), single_sum=single)
    found = allocate_levels(stats, with_room(stats, 10))
    check_plan(stats, with_room(stats, 10), found)
    assert found.level[0, 0, :, 1].tolist() == [NONE, NONE, 1, 1, 2]
    assert found.level[0, 0, 4, 1:4].tolist() == [2, 1, 1]
