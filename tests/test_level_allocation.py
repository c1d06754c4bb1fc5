"""The solver for levels against all paths of small instances: what it costs, what it proves, what it may hold.

Arrays: L layers, H heads, T targets, S = T sources, K paths of one head.
"""

from __future__ import annotations

import ctypes
import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from strategies import SEEDS, tokens_at

from heatkv.core.levels import LEVELS, NONE, LevelChoices
from heatkv.core.schedule import ScaleSchedule
from heatkv.core.statistics import LevelStatistics
from heatkv.errors import BudgetError, PlanError, StatisticsError
from heatkv.levels import columns as level_allocation
from heatkv.levels.columns import (
    LevelAllocation,
    _Paths,
    _Pricing,
    _undominated,
    allocate_levels,
    capacity_prices,
    cost_bound,
    level_cost,
    level_price_bound,
)
from heatkv.solve.cells import Capacity

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]

# ---------------------------------------------------------------------- the oracle


def statistics(
    schedule: ScaleSchedule, layers: int, heads: int, seed: int, sinks: int = 1, joint: int = 5, kind: str = "falling"
) -> LevelStatistics:
    """Random costs: "any" at all, or "falling", as measured ones are, where more tokens mostly cost less."""
    choices, rng = LevelChoices(schedule, sinks, joint), np.random.default_rng(seed)
    scales = len(schedule)
    lost = np.array([0, 0.3, 0.6, 1.0])
    sums, single = [], np.zeros((layers, heads, scales, scales, NONE + 1))
    for target in range(scales):
        table = choices.combinations(target)
        costs = rng.random((layers, heads, len(table)))
        if kind == "falling":
            weight = rng.random((layers, heads, 1, table.shape[1])) ** 3
            costs = (weight * lost[table]).sum(-1) ** 2 * (0.8 + 0.4 * costs)
        costs[..., 0] = 0
        sums.append(costs)
        for source in choices.other_sources(target):
            alone = rng.random((layers, heads, NONE + 1)) * (lost if kind == "falling" else 1)
            alone[..., 0] = 0
            single[:, :, target, source] = alone
    bias = np.zeros((layers, heads, scales, len(LEVELS)))
    return LevelStatistics(choices, "error", bias, tuple(sums), single, ("a",), ())


def all_paths(choices: LevelChoices, levels: Sequence[int] = (0, 1, 2), sinks: int = 0) -> IntArray:
    """Every path of a head, level[k, t, s]: what is held only gets coarser, only the joint sources are pooled, and
    the first `sinks` scales are whole, however few are by the choices."""
    scales = len(choices.schedule)
    of_source = []
    for s in range(choices.sink_scales, scales - 1):
        allowed = []
        for t in range(s + 1, scales):
            possible = choices.of_source(s) if s in choices.joint_sources(t) else choices.of_other(s)
            allowed.append([level for level in possible if level in (*levels, NONE)])
        runs = [run for run in itertools.product(*allowed) if list(run) == sorted(run) and (s >= sinks or not any(run))]
        of_source.append(np.array(runs))
    count = int(np.prod([len(runs) for runs in of_source]))
    level = np.full((count, scales, scales), NONE)
    for t in range(scales):
        level[:, t, : min(t, choices.sink_scales)] = 0
    picked = np.meshgrid(*(np.arange(len(runs)) for runs in of_source), indexing="ij")
    for s, runs, pick in zip(range(choices.sink_scales, scales - 1), of_source, picked, strict=True):
        level[:, s + 1 :, s] = runs[pick.ravel()]
    return level


def costs_of(stats: LevelStatistics, level_KTS: IntArray, layer: int, head: int) -> FloatArray:
    """Looked up combination by combination."""
    choices = stats.choices
    cost = np.zeros(len(level_KTS))
    for t in range(choices.sink_scales + 1, len(choices.schedule)):
        joint = choices.joint_sources(t)
        at = {tuple(row): i for i, row in enumerate(choices.combinations(t).tolist())}
        index = [at[tuple(row)] for row in level_KTS[:, t, list(joint)].tolist()]
        cost += stats.joint[t][layer, head, index]
        for s in choices.other_sources(t):
            cost += stats.single[layer, head, t, s, level_KTS[:, t, s]]
    return cost


def tokens_of(schedule: ScaleSchedule, level_KTS: IntArray) -> IntArray:
    """Past tokens held for every target, (K, T)."""
    sizes = np.array([[*(tokens_at(level, scale) for level in LEVELS), 0] for scale in schedule.scales])
    held = np.stack([sizes[s][level_KTS[:, :, s]] for s in range(len(schedule))], axis=-1)
    tokens: IntArray = held.sum(axis=-1)
    return tokens


def undominated(tokens_KX: IntArray, cost_K: FloatArray) -> IntArray:
    """Indices of what no other beats in everything."""
    order = np.lexsort((*tokens_KX.T, cost_K))
    kept, count = np.empty_like(tokens_KX), 0
    indices = []
    for i in order:  # by cost, so that what comes later is at best lighter
        if not (kept[:count] <= tokens_KX[i]).all(axis=1).any():
            kept[count], count = tokens_KX[i], count + 1
            indices.append(i)
    return np.array(indices)


def optimum(stats: LevelStatistics, capacity: Capacity, levels: Sequence[int] = (0, 1, 2), sinks: int = 0) -> float:
    """The least cost of any plan within the capacity: heads are added one by one, keeping what is not dominated."""
    paths = all_paths(stats.choices, levels, sinks)
    tokens = tokens_of(stats.choices.schedule, paths)
    layers, scales = capacity.layers, capacity.scales
    held = np.zeros((1, layers, scales), dtype=np.int64)
    cost = np.zeros(1)
    for layer, head in np.ndindex(layers, capacity.heads):
        of_head = costs_of(stats, paths, layer, head)
        best = undominated(tokens, of_head)
        more = np.zeros((len(best), layers, scales), dtype=np.int64)
        more[:, layer] = tokens[best]
        held = (held[:, None] + more[None]).reshape(-1, layers, scales)
        cost = (cost[:, None] + of_head[best]).reshape(-1)
        fits = feasible(held, capacity)  # what does not fit by now never will
        held, cost = held[fits], cost[fits]
        best = undominated(held.reshape(len(held), -1), cost)
        held, cost = held[best], cost[best]
    return float(cost.min())


def feasible(held_KLT: IntArray, capacity: Capacity) -> NDArray[np.bool_]:
    """Checkpoint by checkpoint: layers up to l hold what the next target reads, the others what this one reads."""
    fits = np.ones(len(held_KLT), dtype=bool)
    layers, scales = capacity.layers, capacity.scales
    for t, l in np.ndindex(scales, layers):
        live = held_KLT[:, l + 1 :, t].sum(axis=1)
        if t + 1 < scales:
            live = live + held_KLT[:, : l + 1, t + 1].sum(axis=1)
        fits &= live <= capacity.room
    if capacity.layer_room is not None:
        fits &= (held_KLT <= capacity.layer_room).all(axis=(1, 2))
    return fits


def check_plan(
    stats: LevelStatistics,
    capacity: Capacity,
    found: LevelAllocation,
    levels: Sequence[int] = (0, 1, 2),
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
                assert path[t, s] in allowed
                assert path[t, s] in (*levels, NONE)
                assert t == s + 1 or path[t, s] >= path[t - 1, s]  # levels never rise
        cost += costs_of(stats, path[None], layer, head)[0]
        held[0, layer] += tokens_of(schedule, path[None])[0]
    assert feasible(held, capacity).all()
    assert found.cost == pytest.approx(cost, rel=1e-9, abs=1e-12)
    assert found.bound <= found.cost * (1 + 1e-12)
    assert found.gap == (max(0.0, (found.cost - found.bound) / found.cost) if found.cost > 0 else 0.0)
    last_reads = found.last_reads()
    assert len(last_reads) == len(LEVELS)
    for index, last_read in enumerate(last_reads):
        for layer, head, s in np.ndindex(last_read.shape):
            reading = [t for t in range(s + 1, scales) if found.level[layer, head, t, s] <= index]
            assert last_read[layer, head, s] == max(reading, default=s)
            assert reading == list(range(s + 1, s + 1 + len(reading)))


def full(schedule: ScaleSchedule, layers: int, heads: int) -> int:
    return sum(schedule.tokens[:-1]) * layers * heads


def shared(stats: LevelStatistics, room: int) -> Capacity:
    return Capacity(stats.layers, stats.heads, stats.choices.schedule.tokens, room)


# every kind of source: 1 token, 2 tokens, a grid that can be pooled, one that shrinks
FEW = ScaleSchedule.of([(1, 1), (1, 2), (4, 4), (2, 2)])
MORE = ScaleSchedule.of([(1, 1), (1, 1), (1, 2), (4, 5), (3, 3)])


@st.composite
def problems(draw: st.DrawFn) -> tuple[LevelStatistics, Capacity]:
    schedule, layers, heads = draw(st.sampled_from([(FEW, 2, 2), (FEW, 1, 3), (MORE, 2, 1), (MORE, 1, 2)]))
    joint = draw(st.sampled_from([5, 1, 2, 0]))
    kind = draw(st.sampled_from(["falling", "any"]))
    stats = statistics(schedule, layers, heads, draw(SEEDS), 1, joint, kind)
    sinks = stats.layers * stats.heads  # one token each
    room = draw(st.integers(sinks, full(schedule, layers, heads)))
    return stats, shared(stats, room)


# ---------------------------------------------------------------------- against all plans


@settings(max_examples=30)
@given(problem=problems())
def test_between_the_bound_and_the_best_of_all_plans(problem: tuple[LevelStatistics, Capacity]) -> None:
    stats, capacity = problem
    found, best = allocate_levels(stats, capacity), optimum(stats, capacity)
    check_plan(stats, capacity, found)
    assert found.bound <= best + 1e-9
    assert best <= found.cost + 1e-9
    assert cost_bound(stats, capacity) <= best + 1e-9
    assert (found.row_prices >= 0).all()


def test_at_least_half_of_small_instances_are_solved_to_the_optimum() -> None:
    solved = 0
    for seed in range(16):
        schedule, layers, heads = [(FEW, 2, 2), (FEW, 1, 3), (MORE, 2, 1), (MORE, 1, 2)][seed % 4]
        stats = statistics(schedule, layers, heads, seed, 1, (5, 1, 2, 0)[seed // 4 % 4])
        room = int(np.random.default_rng(seed).integers(layers * heads, full(schedule, layers, heads)))
        best = optimum(stats, shared(stats, room))
        solved += allocate_levels(stats, shared(stats, room)).cost <= best * (1 + 1e-9) + 1e-12
    assert solved >= 8


@settings(max_examples=20)
@given(problem=problems(), share=st.sampled_from([0.0, 1e-3, 4.9e-3, 0.1]))
def test_a_closer_bound_is_below_the_best_of_all_plans(problem: tuple[LevelStatistics, Capacity], share: float) -> None:
    """From the plan without any cells, whose gap is largest."""
    stats, capacity = problem
    pricing = _Pricing(stats, (0, 1, 2), stats.choices.sink_scales)
    scales = len(stats.choices.schedule)
    start, _ = pricing.best(np.full((pricing.heads, scales), pricing.prohibitive))
    bound, prices = cost_bound(stats, capacity), allocate_levels(stats, capacity).row_prices
    assume(bound < (1 - share) * start.cost.sum())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(level_allocation, "PROVEN", share)
        plan, closer = level_allocation._closer(pricing, capacity, bound, prices, start)
    level = plan.level.reshape(stats.layers, stats.heads, scales, scales).astype(int)
    cost = float(plan.cost.sum())
    check_plan(stats, capacity, LevelAllocation(level, cost, min(closer, cost), prices))
    assert bound <= closer <= optimum(stats, capacity) + 1e-9
    assert cost <= start.cost.sum()


# few heads, of which each holds a large part of the budget: the best mix is far below the best plan
LUMPY = ScaleSchedule.square((1, 2, 3, 4, 6, 8))


@pytest.mark.parametrize("seed", [2, 7])  # plans of the first program break further rows
@pytest.mark.parametrize("levels", [(0, 1, 2), (0,)])
def test_few_heads_are_proven_to_half_a_percent(
    levels: tuple[int, ...], seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    stats = statistics(LUMPY, 3, 2, seed, 2)
    capacity = shared(stats, int(0.2 * full(LUMPY, 3, 2)))
    found = allocate_levels(stats, capacity, levels)
    check_plan(stats, capacity, found, levels)
    assert found.gap <= 0.005
    for limit in ("MAX_NEAR", "MAX_PROGRAM"):
        with monkeypatch.context() as patch:
            patch.setattr(level_allocation, limit, 0)
            without = allocate_levels(stats, capacity, levels)
        check_plan(stats, capacity, without, levels)
        assert without.gap > 0.05
        assert found.cost <= without.cost


def test_the_solver_prints_nothing(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """Not even below Python, where it waits in a buffer of its own; what others print around it stays."""
    libc, original, calls = ctypes.CDLL(None), level_allocation.milp, []

    def talkative(*arguments: Any, **options: Any) -> Any:
        calls.append(libc.puts(b"tmpSolver.run();"))
        return original(*arguments, **options)

    monkeypatch.setattr(level_allocation, "milp", talkative)
    stats = statistics(LUMPY, 3, 2, 2, 2)
    libc.puts(b"before")
    allocate_levels(stats, shared(stats, int(0.2 * full(LUMPY, 3, 2))))
    libc.puts(b"after")
    libc.fflush(None)
    assert len(calls) >= 2  # both programs in whole numbers
    assert capfd.readouterr() == ("before\nafter\n", "")


def test_costs_far_below_that_of_holding_nothing_are_solved_as_well() -> None:
    """Costs of the optimum must not drown in the solver's tolerance."""
    stats = statistics(LUMPY, 12, 6, 11, 2)
    far = tuple(np.where(joint > np.quantile(joint, 0.9), joint * 1e6, joint) for joint in stats.joint_sum)
    stats = dataclasses.replace(stats, joint_sum=far)
    capacity = shared(stats, int(0.5 * full(LUMPY, 12, 6)))
    found = allocate_levels(stats, capacity)
    check_plan(stats, capacity, found)
    assert found.gap <= 0.005


@settings(max_examples=20)
@given(problem=problems())
def test_more_levels_never_cost_more_than_dropping(problem: tuple[LevelStatistics, Capacity]) -> None:
    stats, capacity = problem
    dropped = allocate_levels(stats, capacity, (0,))
    check_plan(stats, capacity, dropped, (0,))
    best = optimum(stats, capacity, (0,))
    assert dropped.bound - 1e-9 <= best <= dropped.cost + 1e-9
    assert allocate_levels(stats, capacity).cost <= dropped.cost
    without = allocate_levels(stats, capacity, (0, 2))
    check_plan(stats, capacity, without, (0, 2))
    assert without.cost <= dropped.cost


def test_a_poor_plan_gives_way_to_one_that_only_drops(monkeypatch: pytest.MonkeyPatch) -> None:
    stats = statistics(MORE, 2, 2, 4)
    capacity, original = shared(stats, 30), level_allocation._allocate
    dropping = allocate_levels(stats, capacity, (0,))

    def poor(pricing: _Pricing, capacity: Capacity) -> LevelAllocation:
        found = original(pricing, capacity)
        only_drops = set(found.level.flat) <= {0, NONE}
        return found if only_drops else dataclasses.replace(found, cost=dropping.cost * (1 + 1e-9))

    monkeypatch.setattr(level_allocation, "_allocate", poor)
    found = allocate_levels(stats, capacity)
    assert np.array_equal(found.level, dropping.level)
    assert found.bound < found.cost == dropping.cost  # the bound is still that of all levels


@settings(max_examples=40)
@given(problem=problems(), more=st.integers(0, 3), levels=st.sampled_from([(0, 1, 2), (0,)]))
def test_more_sinks_than_the_costs_have(
    problem: tuple[LevelStatistics, Capacity], more: int, levels: tuple[int, ...]
) -> None:
    """The choices are those that hold the further sinks whole, of costs that also know the others."""
    stats, capacity = problem
    schedule = stats.choices.schedule
    sinks = min(stats.choices.sink_scales + more, len(schedule) - 1)
    least = stats.layers * stats.heads * schedule.offsets[sinks]
    capacity = dataclasses.replace(capacity, room=max(capacity.room, least))
    found, best = allocate_levels(stats, capacity, levels, sinks), optimum(stats, capacity, levels, sinks)
    check_plan(stats, capacity, found, levels, sinks)
    assert found.bound - 1e-9 <= best <= found.cost + 1e-9
    bound = cost_bound(stats, capacity, levels, sinks)
    assert bound <= best + 1e-9
    assert level_cost(stats, found.level) == pytest.approx(found.cost, rel=1e-9, abs=1e-12)
    prices = capacity_prices(stats, capacity, levels, sinks)
    assert level_price_bound(stats, capacity, levels, prices, sinks) == pytest.approx(bound, rel=1e-9, abs=1e-12)
    too_little = dataclasses.replace(capacity, room=least - 1)
    said = f"the {sinks} sink scales alone hold 1 token-heads more than the budget's room of {least - 1};"
    for call in (allocate_levels, capacity_prices):
        with pytest.raises(BudgetError, match=said):
            call(stats, too_little, levels, sinks)


def test_fewer_sinks_than_the_costs_have() -> None:
    stats = statistics(MORE, 2, 2, 4, 2)
    for call in (allocate_levels, cost_bound, capacity_prices):
        with pytest.raises(StatisticsError, match="hold for 2 sink scales or more, not for 1"):
            call(stats, shared(stats, 30), sink_scales=1)


@settings(max_examples=20)
@given(problem=problems(), data=st.data())
def test_layers_keep_to_their_room(problem: tuple[LevelStatistics, Capacity], data: st.DataObject) -> None:
    stats, whole = problem
    layers, heads = stats.layers, stats.heads
    layer_room = data.draw(st.none() | st.integers(heads, full(stats.choices.schedule, 1, heads)))
    capacity = Capacity(layers, heads, whole.tokens, max(whole.room, layers * heads), layer_room)
    found, best = allocate_levels(stats, capacity), optimum(stats, capacity)
    check_plan(stats, capacity, found)
    assert found.bound - 1e-9 <= best <= found.cost + 1e-9


@pytest.mark.parametrize("share", [0.1, 0.5])
@pytest.mark.parametrize("joint", [5, 2])
def test_larger_instances_are_solved_to_half_a_percent(share: float, joint: int) -> None:
    schedule = ScaleSchedule.square((1, 2, 3, 4, 6, 8))
    stats = statistics(schedule, 12, 6, 11, 2, joint)
    capacity = shared(stats, int(share * full(schedule, 12, 6)))
    found = allocate_levels(stats, capacity)
    check_plan(stats, capacity, found)
    assert found.gap <= 0.005
    assert found.cost <= allocate_levels(stats, capacity, (0,)).cost


# ---------------------------------------------------------------------- pricing

PRICED = [
    (FEW, 1, 5), (FEW, 0, 5), (MORE, 1, 5), (MORE, 1, 2), (MORE, 1, 1), (MORE, 0, 2), (MORE, 1, 0), (MORE, 4, 5),
    # more sources than the five of a target: scale 1, then scale 2, leave them
    (ScaleSchedule.of([(1, 1)] * 9), 1, 5),
    (ScaleSchedule.of([(1, 1), (1, 2), (4, 4), (1, 1), (2, 2), (1, 1)]), 1, 2),
    (ScaleSchedule.of([(1, 1), (4, 4), (4, 4), (4, 4), (5, 5)]), 1, 2),
]  # fmt: skip


@pytest.mark.parametrize(("schedule", "measured", "joint"), PRICED)
@pytest.mark.parametrize("more", [0, 1, 2])
@pytest.mark.parametrize("levels", [(0, 1, 2), (0,), (0, 2), (0, 1)])
def test_pricing_finds_the_cheapest_of_all_paths(
    schedule: ScaleSchedule, measured: int, joint: int, more: int, levels: tuple[int, ...]
) -> None:
    sinks = min(measured + more, len(schedule) - 1)
    stats = statistics(schedule, 1, 3, 2, measured, joint, "any")
    pricing, paths = _Pricing(stats, levels, sinks), all_paths(stats.choices, levels, sinks)
    tokens, rng = tokens_of(schedule, paths), np.random.default_rng(3)
    costs = [costs_of(stats, paths, 0, head) for head in range(3)]
    for scale in (0.0, 0.01, 0.1, 0.3, 1.0, 100.0):
        prices = rng.random((3, len(schedule))) * scale
        found, reduced = pricing.best(prices)
        for head in range(3):
            best = (costs[head] + tokens @ prices[head]).min()
            assert reduced[head] == pytest.approx(best, rel=1e-9, abs=1e-12)
            level = found.level[head].astype(int)
            assert (paths == level).all(axis=(1, 2)).any()
            assert found.tokens[head].tolist() == tokens_of(schedule, level[None])[0].tolist()
            assert found.cost[head] == pytest.approx(costs_of(stats, level[None], 0, head)[0])


@pytest.mark.parametrize(("schedule", "sinks", "joint"), PRICED)
def test_the_cost_of_any_plan(schedule: ScaleSchedule, sinks: int, joint: int) -> None:
    stats = statistics(schedule, 2, 2, 2, sinks, joint, "any")
    paths, rng = all_paths(stats.choices), np.random.default_rng(4)
    for _ in range(20):
        chosen = rng.integers(len(paths), size=(2, 2))
        expected = sum(costs_of(stats, paths[chosen[l, h], None], l, h)[0] for l, h in np.ndindex(2, 2))
        assert level_cost(stats, paths[chosen]) == pytest.approx(expected, rel=1e-12)


def test_levels_of_as_many_tokens_cost_the_same_and_others_are_refused() -> None:
    stats = statistics(FEW, 1, 1, 2, 1, 1, "any")  # the last target combines the 16 tokens only
    level = all_paths(stats.choices)[:1].copy()[None]
    level[..., 2:, 1], level[..., 3, 2] = LEVELS.index("mean"), NONE
    pooled = level.copy()
    pooled[..., 2:, 1] = LEVELS.index("pool2")  # of 1 x 2 tokens
    assert level_cost(stats, pooled) == level_cost(stats, level)
    stats = statistics(MORE, 1, 1, 2, 0, 1, "any")
    single = all_paths(stats.choices)[:1].copy()[None]
    assert (single[..., 2, :2] == 0).all()
    mean = single.copy()
    mean[..., 2:, 1] = LEVELS.index("mean")  # of 1 token
    assert level_cost(stats, mean) == level_cost(stats, single)
    schedule = ScaleSchedule.of([(1, 1), (4, 4), (4, 4), (4, 4), (5, 5)])
    stats = statistics(schedule, 1, 1, 1, 1, 1)
    alone = all_paths(stats.choices)[:1].copy()[None]
    alone[..., 2:, 1] = LEVELS.index("pool2")
    phrase = "layer 0, head 0 holds source 1 at level pool2 for target 3, which .* known there: full, mean"
    with pytest.raises(PlanError, match=phrase):
        level_cost(stats, alone)


@settings(max_examples=20)
@given(problem=problems(), seed=SEEDS)
def test_no_plan_is_below_the_bound_of_any_prices(problem: tuple[LevelStatistics, Capacity], seed: int) -> None:
    stats, capacity = problem
    rng = np.random.default_rng(seed)
    count = len(capacity.row_room)
    prices = rng.random(count) * (rng.random(count) < 0.3) * 10.0 ** rng.integers(-3, 1)
    for levels in ((0, 1, 2), (0,)):
        assert level_price_bound(stats, capacity, levels, prices) <= optimum(stats, capacity, levels) + 1e-9
        best = level_price_bound(stats, capacity, levels, capacity_prices(stats, capacity, levels))
        assert best == pytest.approx(cost_bound(stats, capacity, levels), rel=1e-9, abs=1e-12)


def test_paths_of_the_oracle() -> None:
    """One source of 16 tokens for one target, and one of 2 for two: 4 levels, and 6 falling pairs of 3."""
    assert len(all_paths(LevelChoices(FEW, 1))) == 4 * 6
    assert len(all_paths(LevelChoices(ScaleSchedule.of([(1, 1)] * 9), 1))) == 8 * 7 * 6 * 5 * 4 * 3 * 2


@pytest.mark.parametrize(("schedule", "sinks", "joint"), PRICED)
@pytest.mark.parametrize("levels", [(0, 1, 2), (0,)])
def test_near_finds_every_path_of_little_regret(
    schedule: ScaleSchedule, sinks: int, joint: int, levels: tuple[int, ...]
) -> None:
    stats = statistics(schedule, 1, 2, 2, sinks, joint, "any")
    pricing, paths = _Pricing(stats, levels, stats.choices.sink_scales), all_paths(stats.choices, levels)
    tokens = tokens_of(schedule, paths)
    prices = np.random.default_rng(3).random((2, len(schedule))) * 0.05
    regrets = []
    for head in range(2):
        priced = costs_of(stats, paths, 0, head) + tokens @ prices[head]
        regrets.append(priced - priced.min())
    limit = float(np.sort(np.concatenate(regrets))[: 40 + 2][-1]) + 1e-9
    expected = [{paths[i].tobytes() for i in np.flatnonzero(regret <= limit)} for regret in regrets]
    count = sum(map(len, expected))
    found = pricing.near(prices, limit, count)
    assert found is not None
    heads, near = found
    assert len(heads) == count
    for head in range(2):
        assert {path.astype(int).tobytes() for path in near.level[heads == head]} == expected[head]
        of_head = near.level[heads == head].astype(int)
        assert near.cost[heads == head] == pytest.approx(costs_of(stats, of_head, 0, head))
        assert np.array_equal(near.tokens[heads == head], tokens_of(schedule, of_head))
    assert count == 2 or pricing.near(prices, limit, count - 1) is None  # where nothing is free there is one path each


def test_paths_that_another_beats_are_left_out() -> None:
    tokens = np.array([[0, 4], [0, 4], [0, 3], [9, 5], [0, 4], [0, 9]])
    cost = np.array([1.0, 1.0, 2.0, 1.5, 0.5, 0.9])
    head = np.array([0, 0, 0, 0, 1, 1])
    paths = _Paths(np.zeros((6, 2, 2), dtype=np.int8), cost, tokens)
    both, second = np.ones((2, 2), dtype=bool), np.array([[False, True]] * 2)
    assert sorted(_undominated(head, paths, both)) == [0, 2, 4]
    assert sorted(_undominated(head, paths, ~second)) == [0, 4]


# ---------------------------------------------------------------------- edges


@pytest.mark.parametrize("kind", ["falling", "any"])
@pytest.mark.parametrize("joint", [5, 1, 0])
def test_the_full_budget_holds_everything_whole(kind: str, joint: int) -> None:
    stats = statistics(MORE, 2, 2, 4, 1, joint, kind)
    found = allocate_levels(stats, shared(stats, full(MORE, 2, 2)))
    assert (found.last_reads()[0] == len(MORE) - 1).all()
    assert (found.cost, found.bound, found.gap) == (0, 0, 0)


@pytest.mark.parametrize("joint", [5, 1, 0])
@pytest.mark.parametrize("room", [4, 30, 60])
def test_costs_of_zero(room: int, joint: int) -> None:
    stats = statistics(MORE, 2, 2, 4, 1, joint)
    stats = dataclasses.replace(stats, joint_sum=tuple(x * 0 for x in stats.joint_sum), single_sum=stats.single_sum * 0)
    found = allocate_levels(stats, shared(stats, room))
    check_plan(stats, shared(stats, room), found)
    assert (found.cost, found.bound, found.gap) == (0, 0, 0)


@pytest.mark.parametrize("size", [1e-30, 1e30])
@pytest.mark.parametrize("joint", [5, 0])
def test_the_size_of_costs_does_not_matter(size: float, joint: int) -> None:
    stats = statistics(MORE, 2, 2, 4, 1, joint)
    scaled = dataclasses.replace(
        stats, joint_sum=tuple(x * size for x in stats.joint_sum), single_sum=stats.single_sum * size
    )
    capacity = shared(stats, 30)
    one, other = allocate_levels(stats, capacity), allocate_levels(scaled, capacity)
    check_plan(stats, capacity, one)
    assert other.cost == pytest.approx(one.cost * size, rel=0.01)
    assert other.bound == pytest.approx(one.bound * size, rel=0.01)


def test_sinks_that_do_not_fit() -> None:
    stats = statistics(MORE, 2, 2, 4, 2)
    for capacity, room in (
        (shared(stats, 7), "than the budget's room of 7"),  # two sinks in four heads are 8
        (Capacity(2, 2, MORE.tokens, 100, 3), "than a layer's cap of 3"),
    ):
        for call in (allocate_levels, cost_bound, capacity_prices):
            with pytest.raises(BudgetError, match=f"the 2 sink scales alone hold 1 token-heads more {room}"):
                call(stats, capacity)
    found = allocate_levels(stats, shared(stats, 8))
    assert (found.last_reads()[2][:, :, 2:] == np.arange(2, 5)).all()  # nothing but the sinks fits


def test_nothing_is_free_to_choose() -> None:
    stats = statistics(MORE, 2, 2, 4, 4)
    found = allocate_levels(stats, shared(stats, full(MORE, 2, 2)))
    assert found.cost == 0
    assert (found.last_reads()[0] == 4).all()


def test_the_same_problem_has_the_same_answer() -> None:
    stats = statistics(ScaleSchedule.square((1, 2, 3, 4, 6)), 4, 3, 9, 2)
    capacity = shared(stats, 100)
    one, other = (allocate_levels(stats, capacity) for _ in range(2))
    assert np.array_equal(one.level, other.level)
    assert (one.cost, one.bound) == (other.cost, other.bound)
    assert np.array_equal(one.row_prices, other.row_prices)


def test_a_source_that_leaves_the_joint_ones_may_be_pooled_no_more() -> None:
    """Pooled is by far the cheapest, but only as long as the source is one of two."""
    schedule = ScaleSchedule.of([(1, 1), (4, 4), (4, 4), (4, 4), (5, 5)])
    stats = statistics(schedule, 1, 1, 1, 1, 2)
    joint: list[Any] = [np.where((stats.choices.combinations(t) == 1).all(-1), 1e-6, 1.0)[None, None] for t in range(5)]
    for costs in joint:
        costs[..., 0] = 0
    single = stats.single_sum * 0 + [0.0, 9.0, 0.5, 0.7]
    stats = dataclasses.replace(stats, joint_sum=tuple(joint), single_sum=single)
    found = allocate_levels(stats, shared(stats, 10))
    check_plan(stats, shared(stats, 10), found)
    assert found.level[0, 0, :, 1].tolist() == [NONE, NONE, 1, 1, 2]
    assert found.level[0, 0, 4, 1:4].tolist() == [2, 1, 1]
