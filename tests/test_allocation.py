"""The allocator against brute force over every plan, a plainly written linear program, and the design's formulas."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog
from strategies import SEEDS, geometries, live_table, shares, statistics_of

from heatkv.core.budget import Budget
from heatkv.core.geometry import CacheGeometry
from heatkv.core.plan import Plan, held_for_targets, keep_first
from heatkv.core.plan_file import plan_from_json
from heatkv.core.schedule import ScaleSchedule
from heatkv.core.schema import BoolArray, FloatArray, IntArray
from heatkv.core.statistics import Provenance, Statistics
from heatkv.errors import BudgetError, PolicyError, StatisticsError
from heatkv.policies.base import PlanningProblem, make_policy
from heatkv.policies.heatkv import HeatKV
from heatkv.policies.lp import HeatKVLP
from heatkv.solve import allocation, cells
from heatkv.solve.allocation import Allocation, allocate, allocate_greedily, price_bound
from heatkv.solve.checkpoints import Capacity, fill, fit_checkpoints
from heatkv.testing.material import made_up_mass

SOLVERS = pytest.mark.parametrize("solve", [allocate, allocate_greedily])

# ---------------------------------------------------------------------- what the words mean, plainly


def held_by_layer(last_read: IntArray, tokens: tuple[int, ...]) -> list[list[int]]:
    """held[l][t]: past token-heads of layer l while target t runs."""
    return [
        [sum(n * int((layer[:, s] >= t).sum()) for s, n in enumerate(tokens[:t])) for t in range(len(tokens))]
        for layer in last_read
    ]


def fits(last_read: IntArray, capacity: Capacity) -> bool:
    return max(map(max, live_table(last_read.tolist(), capacity.tokens))) <= capacity.room and (
        capacity.layer_room is None or max(map(max, held_by_layer(last_read, capacity.tokens))) <= capacity.layer_room
    )


def worth(last_read: IntArray, values: FloatArray) -> float:
    """Sum of value[l, h, t, s] over s < t <= last_read[l, h, s]."""
    return math.fsum(
        values[l, h, t, s] for (l, h, s), last in np.ndenumerate(last_read) for t in range(s + 1, int(last) + 1)
    )


# ---------------------------------------------------------------------- instances


@dataclass(frozen=True)
class Instance:
    values: FloatArray
    capacity: Capacity
    sinks: int

    @property
    def size(self) -> float:
        """What all cells together are worth, for tolerances."""
        return float(np.abs(self.values).sum()) or 1.0

    def solve(self, solver: Any, *candidates: IntArray) -> Allocation:
        found: Allocation = solver(self.values, self.capacity, self.sinks, *((candidates,) if candidates else ()))
        return found


def drawn_values(shape: tuple[int, ...], kind: str, rng: np.random.Generator) -> FloatArray:
    if kind == "ties":
        return rng.integers(0, 9, shape).astype(np.float64)
    return np.exp(rng.normal(0, 3 if kind == "heavy" else 0.5, shape))


@st.composite
def instances(draw: st.DrawFn, shapes: tuple[tuple[int, int, int], ...]) -> Instance:
    """With or without a cap on layers; the sinks always fit."""
    layers, heads, scales = draw(st.sampled_from(shapes))
    kind, sinks = draw(st.sampled_from(["mild", "heavy", "ties"])), draw(st.integers(0, scales - 1))
    capped = draw(st.booleans())
    # numbers from a generator of their own, as hypothesis likes small and equal ones, which leave little to decide
    rng = np.random.default_rng(draw(SEEDS))
    tokens = tuple(int(n) for n in rng.integers(1, 10, scales))
    values = drawn_values((layers, heads, scales, scales), kind, rng)
    least, full = sum(tokens[:sinks]), sum(tokens[:-1])
    room = int(rng.integers(least * layers * heads, full * layers * heads + 1))
    cap = int(rng.integers(least * heads, full * heads + 1)) if capped else None
    return Instance(values, Capacity(layers, heads, tokens, room, cap), sinks)


TINY = ((1, 1, 5), (1, 2, 4), (2, 1, 4), (1, 3, 3), (3, 1, 3), (2, 2, 3))
SMALL = ((2, 3, 6), (3, 2, 5), (4, 4, 4))


def every_plan(instance: Instance) -> IntArray:
    """All of them, (plans, L, H, T), feasible or not."""
    capacity = instance.capacity
    scales = capacity.scales
    of_cell = [[scales - 1] if s < instance.sinks else list(range(s, scales)) for s in range(scales)]
    pairs = capacity.layers * capacity.heads
    plans = np.array(list(itertools.product(*(of_cell * pairs))))
    return plans.reshape(-1, capacity.layers, capacity.heads, scales)


def which_fit(plans: IntArray, capacity: Capacity) -> BoolArray:
    """`fits` for many plans at once, in the words of the design."""
    _, layers, _, scales = plans.shape
    tokens = np.array(capacity.tokens)
    scale = np.arange(scales)
    good = np.ones(len(plans), dtype=bool)
    for t in range(scales):
        done = ((plans > t) & (scale <= t)) @ tokens  # (plans, L, H)
        waiting = ((plans >= t) & (scale < t)) @ tokens
        if capacity.layer_room is not None:
            good &= (waiting.sum(2) <= capacity.layer_room).all(1)
        for l in range(layers):
            live = done[:, : l + 1].sum((1, 2)) + waiting[:, l + 1 :].sum((1, 2))
            good &= live <= capacity.room
    return good


def fits_alone(instance: Instance) -> BoolArray:
    """Whether each cell [l, h, s] fits beside the sinks while it is held until target t, [l, h, s, t]."""
    shape = (instance.capacity.layers, instance.capacity.heads, instance.capacity.scales)
    alone = np.broadcast_to(keep_first(shape, instance.sinks), (*shape, shape[2], *shape)).copy()
    for l, h, s, t in np.ndindex(*shape, shape[2]):
        alone[l, h, s, t, l, h, s] = max(t, alone[l, h, s, t, l, h, s])
    return which_fit(alone.reshape(-1, *shape), instance.capacity).reshape(*shape, shape[2])


def best_by_force(instance: Instance) -> tuple[float, IntArray]:
    plans = every_plan(instance)
    plans = plans[which_fit(plans, instance.capacity)]
    total = np.zeros(len(plans))
    for (l, h, t, s), value in np.ndenumerate(instance.values):
        if s < t:
            total += value * (plans[:, l, h, s] >= t)
    return float(total.max()), plans[total.argmax()]


def plain_program(instance: Instance) -> float:
    """Optimum of the relaxation: a dense program written down from its definition, one x[l, h, s, t] at a time, 0 for
    those that never fit."""
    fits_LHST = fits_alone(instance)
    capacity, values = instance.capacity, instance.values
    tokens, layers, heads, scales = capacity.tokens, capacity.layers, capacity.heads, capacity.scales
    variables = [
        (l, h, s, t) for l in range(layers) for h in range(heads) for s in range(scales) for t in range(s + 1, scales)
    ]
    at = {variable: index for index, variable in enumerate(variables)}
    rows, limits = [], []

    def add(row: dict[int, float], limit: float) -> None:
        rows.append([row.get(index, 0.0) for index in range(len(variables))])
        limits.append(limit)

    for l, h, s, t in variables:
        if t > s + 1:
            add({at[l, h, s, t]: 1.0, at[l, h, s, t - 1]: -1.0}, 0)
    for t, l in np.ndindex(scales, layers):
        row = {index: tokens[s] for (k, _, s, target), index in at.items() if target == (t + 1 if k <= l else t)}
        add(row, capacity.room)
        if capacity.layer_room is not None:
            row = {index: tokens[s] for (k, _, s, target), index in at.items() if (k, target) == (l, t)}
            add(row, capacity.layer_room)
    solved = linprog(
        [-values[l, h, t, s] for l, h, s, t in variables],
        A_ub=np.array(rows),
        b_ub=limits,
        bounds=[(int(s < instance.sinks), int(fits_LHST[l, h, s, t])) for l, h, s, t in variables],
    )
    return -float(solved.fun)


def drawn_plan(instance: Instance, rng: np.random.Generator) -> IntArray:
    """Any feasible plan: as many random cells as there is room for, then perhaps fewer."""
    capacity = instance.capacity
    shape = (capacity.layers, capacity.heads, capacity.scales)
    last_read = keep_first(shape, instance.sinks)
    free = [(l, h, s) for l, h, s in np.ndindex(shape) if instance.sinks <= s < capacity.scales - 1]
    rng.shuffle(free)
    for cell in free[: int(rng.integers(1, len(free) + 1))] if free else []:
        for target in range(int(rng.integers(cell[2], capacity.scales)), cell[2], -1):
            tried = last_read.copy()
            tried[tuple(cell)] = target
            if which_fit(tried[None], capacity)[0]:
                last_read = tried
                break
    assert fits(last_read, capacity)
    return last_read


def check(found: Allocation, instance: Instance) -> None:
    """A valid plan within the room that is worth what it says, and a gap as defined."""
    scales = np.arange(instance.capacity.scales)
    assert ((found.last_read >= scales) & (found.last_read <= scales[-1])).all()
    assert (found.last_read[:, :, : instance.sinks] == scales[-1]).all()
    assert fits(found.last_read, instance.capacity)
    assert found.value == pytest.approx(worth(found.last_read, instance.values), rel=1e-12)
    assert found.bound >= found.value
    gap = (found.bound - found.value) / found.bound if found.bound else 0
    assert found.gap == (gap if gap > 1e-9 else 0)  # below is rounding
    assert (found.row_prices >= 0).all()


# ---------------------------------------------------------------------- the best plan


@settings(max_examples=80)
@given(
    instance=instances(TINY),
    sizes=st.sampled_from([(1.0,), (0, 1e-30, 1, 1e30), tuple(10.0 ** np.arange(-12, 13)), (0, 1, 5e-324), "one"]),
    seed=SEEDS,
)
def test_best_of_every_plan(instance: Instance, sizes: Any, seed: int) -> None:
    """Also with values of very different size, and with one value alone."""
    rng = np.random.default_rng(seed)
    values = instance.values * rng.choice((1.0,) if sizes == "one" else sizes, instance.values.shape)
    if sizes == "one":
        values = np.where(np.arange(values.size).reshape(values.shape) == rng.integers(values.size), values, 0)
    instance = Instance(values, instance.capacity, instance.sinks)
    best, plan = best_by_force(instance)
    exact, greedy = instance.solve(allocate), instance.solve(allocate_greedily)
    for found in (exact, greedy):
        check(found, instance)
        assert found.bound >= best
        assert found.value <= best * (1 + 1e-12)
    assert exact.value == pytest.approx(best, abs=1e-8 * instance.size)  # the solver's own tolerance
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(allocation, "EXACT_VARIABLES", 0)  # rounding alone often misses the best plan
        given_plan = instance.solve(allocate, plan)
    check(given_plan, instance)
    assert given_plan.value >= best * (1 - 1e-12)
    rng, count = np.random.default_rng(seed), len(instance.capacity.row_room)
    for size in (0.0, 1e-3, 0.1, 1.0, 100.0):  # any prices give a bound
        prices = rng.exponential(size, count) * rng.integers(0, 2, count)
        bound = price_bound(instance.values, instance.capacity, instance.sinks, prices)
        assert bound >= best - 1e-12 * instance.size
        if size == 0.0:
            everything = np.tril(values, -1).transpose(0, 1, 3, 2)[fits_alone(instance)].sum()
            assert bound == pytest.approx(everything, rel=1e-12)


@settings(max_examples=40)
@given(instance=instances(SMALL), seed=SEEDS)
def test_bound_of_the_plain_program(instance: Instance, seed: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(allocation, "EXACT_VARIABLES", 0)
        found = instance.solve(allocate)
    greedy = instance.solve(allocate_greedily)
    for solved in (found, greedy):
        check(solved, instance)
    assert found.bound == pytest.approx(plain_program(instance), abs=1e-7 * instance.size)
    rng = np.random.default_rng(seed)
    for plan in (greedy.last_read, *(drawn_plan(instance, rng) for _ in range(5))):
        assert worth(plan, instance.values) <= min(found.bound, greedy.bound) + 1e-12 * instance.size
    again = price_bound(instance.values, instance.capacity, instance.sinks, found.row_prices)
    assert found.bound == pytest.approx(max(again, found.value), rel=1e-12)


@pytest.mark.parametrize("share", [0.1, 0.4])
def test_gap_of_large_instances(share: float) -> None:
    """On heavy-tailed values rounding stays within 0.5 % of the bound, as promised; greedy too, and its own bound is
    within 1 %."""
    rng = np.random.default_rng(0)
    tokens = tuple(side**2 for side in range(1, 9))
    values = np.exp(rng.normal(0, 2.5, (8, 4, 1, 1)) + rng.normal(0, 1.5, (8, 4, 8, 8)))
    instance = Instance(values, Capacity(8, 4, tokens, math.floor(share * sum(tokens[:-1]) * 32)), 1)
    found, greedy = instance.solve(allocate), instance.solve(allocate_greedily)
    check(found, instance)
    check(greedy, instance)
    assert min(found.value, greedy.value) >= 0.995 * found.bound
    assert greedy.bound <= 1.01 * found.bound


def test_searches_that_would_not_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hundreds of plans that nearly tie: the best so far comes with its gap, after so many programs or seconds."""
    tokens = (1115, 1139, 1301, 1243)
    values = np.broadcast_to(np.array([2, 3, 3, 2.0])[:, None] * tokens, (21, 1, 4, 4)).copy()
    instance = Instance(values, Capacity(21, 1, tokens, 49745), 0)
    programs: list[object] = []
    relax = cells.Plans.relax
    monkeypatch.setattr(cells.Plans, "relax", lambda plans: programs.append(plans) or relax(plans))
    found = instance.solve(allocate)
    check(found, instance)
    assert 0 < found.gap < 1e-3
    assert len(programs) == 1 + 2 * allocation.MOST_NODES
    programs.clear()
    check(allocate(values, instance.capacity, 0, seconds=0), instance)
    assert len(programs) == 1


def test_plan_by_hand() -> None:
    """Two heads, scales of 1, 2 and 4 tokens, room for 4: the sinks take 2, and one head's scale 1 the rest."""
    values = np.zeros((1, 2, 3, 3))
    values[0, 0, 2, 1], values[0, 1, 2, 1] = 3, 5
    values[0, :, 1:, 0] = 1
    for room in (4, 5):  # for 5 the program takes half of the other head, the plan cannot; the exact solution knows
        found = allocate(values, Capacity(1, 2, (1, 2, 4), room), 1)
        assert found.last_read.tolist() == [[[2, 1, 2], [2, 2, 2]]]
        assert (found.value, found.bound) == (2 * 2 + 5, pytest.approx(9))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(allocation, "EXACT_VARIABLES", 0)
        found = allocate(values, Capacity(1, 2, (1, 2, 4), 5), 1)
    assert (found.value, found.bound, found.gap) == (9, pytest.approx(10.5), pytest.approx(1 / 7))

    # two layers of one head that both read scale 0 (4 tokens) last at target 1, and room for one scale 1 (6) after it:
    # layer 0 would write it while layer 1 still holds scale 0
    values = np.zeros((2, 1, 3, 3))
    values[:, 0, 1, 0], values[:, 0, 2, 1] = 10, 1
    tight = allocate(values, Capacity(2, 1, (4, 6, 9), 9), 0)
    assert (tight.value, tight.last_read[:, 0, 1].tolist()) == (21, [1, 2])


# ---------------------------------------------------------------------- checkpoints


@settings(max_examples=60)
@given(instance=instances(SMALL), seed=SEEDS)
def test_filling_leaves_no_room_for_any_cell(instance: Instance, seed: int) -> None:
    capacity, before = instance.capacity, drawn_plan(instance, np.random.default_rng(seed))
    kept = before.copy()
    filled = fill(before, instance.values, capacity)
    assert np.array_equal(before, kept)
    assert (filled >= before).all()
    assert fits(filled, capacity)
    places = np.argwhere(filled < capacity.scales - 1)
    more = np.repeat(filled[None], len(places), axis=0)
    more[(np.arange(len(places)), *places.T)] += 1
    assert not which_fit(more, capacity).any()


def test_order_of_filling() -> None:
    """One head and four scales: by value per token and target scale 1 comes first, then 2; 0 no longer fits."""
    values = np.zeros((1, 1, 4, 4))
    values[0, 0, 3, 0] = 2.0  # 3 tokens: nothing at first, all of it for the last target
    values[0, 0, 2:, 1] = 2.0  # 2 tokens, two targets
    values[0, 0, 3, 2] = 2.5  # 3 tokens, one target
    start = np.array([[[0, 1, 2, 3]]])
    assert fill(start, values, Capacity(1, 1, (3, 2, 3, 9), 5)).tolist() == [[[2, 3, 3, 3]]]
    assert fill(start, values, Capacity(1, 1, (3, 2, 3, 9), 3)).tolist() == [[[1, 3, 2, 3]]]


@settings(max_examples=30)
@given(instance=instances(SMALL), seed=SEEDS)
def test_early_drops(instance: Instance, seed: int) -> None:
    """They make a plan that holds too much between layers keep the budget, one target early each, or it is refused."""
    capacity, rng = instance.capacity, np.random.default_rng(seed)
    last_read = rng.integers(np.arange(capacity.scales), capacity.scales, instance.values.shape[:3])
    order = rng.permutation(last_read.size).reshape(last_read.shape)
    budget = max(max(map(sum, zip(*held_by_layer(last_read, capacity.tokens), strict=True))), capacity.room)
    try:
        fitted = fit_checkpoints(last_read, capacity.tokens, budget, order)
    except BudgetError:
        return
    assert max(map(max, live_table(fitted.tolist(), capacity.tokens))) <= budget
    assert np.isin(last_read - fitted, range(capacity.scales)).all()
    if max(map(max, live_table(last_read.tolist(), capacity.tokens))) <= budget:
        assert np.array_equal(fitted, last_read)


@settings(max_examples=60)
@given(instance=instances(SMALL + TINY), seed=SEEDS)
def test_capacity_rows(instance: Instance, seed: int) -> None:
    """The formula of the design, for any plan, within the room or not."""
    capacity = instance.capacity
    layers, heads, scales = capacity.layers, capacity.heads, capacity.scales
    rng = np.random.default_rng(seed)
    last_read = rng.integers(np.arange(scales), scales, (layers, heads, scales))
    held_LHT = held_for_targets([last_read], [capacity.tokens])
    for (l, h, t), held in np.ndenumerate(held_LHT):
        assert held == sum(n for s, n in enumerate(capacity.tokens[:t]) if last_read[l, h, s] >= t)
    expected = [capacity.room - live for row in live_table(last_read.tolist(), capacity.tokens)[:-1] for live in row]
    if capacity.layer_room is not None:
        expected += [
            capacity.layer_room - held for layer in held_by_layer(last_read, capacity.tokens) for held in layer
        ]
    assert capacity.slack(held_LHT).tolist() == expected
    # prices of rows come down to tokens: what a plan holds costs the same either way
    prices = rng.random(len(capacity.row_room))
    held_costs = (capacity.token_prices(prices) * held_LHT).sum()
    assert held_costs == pytest.approx(prices @ (capacity.row_room - capacity.slack(held_LHT)), rel=1e-9)


@SOLVERS
def test_sinks_and_rooms(solve: Any) -> None:
    values, tokens = np.ones((2, 2, 4, 4)), (1, 4, 9, 16)  # two sink scales are 5 tokens in 4 heads
    for room, cap, over, said in (
        (19, None, 1, "budget's room of 19"),
        (20, 9, 1, "layer's cap of 9"),
        (0, 10, 20, "budget's room of 0"),
    ):
        with pytest.raises(BudgetError, match=f"the 2 sink scales alone hold {over} token-heads more than .* {said}"):
            solve(values, Capacity(2, 2, tokens, room, cap), 2)
    found = solve(values, Capacity(2, 2, tokens, 20, 10), 2)
    assert found.last_read.tolist() == [[[3, 3, 2, 3]] * 2] * 2
    assert found.value == 4 * (3 + 2)


@SOLVERS
def test_room_for_everything(solve: Any) -> None:
    """Or nothing to decide, with sinks only, or worth: the gap is 0."""
    for kind, sinks in (("mild", 1), ("heavy", 1), ("ties", 4)):
        values = drawn_values((2, 3, 5, 5), kind, np.random.default_rng(1))
        found = solve(values, Capacity(2, 3, (1, 4, 9, 16, 25), 30 * 6), sinks)
        assert (found.last_read == 4).all()
        assert found.gap == pytest.approx(0, abs=1e-12)


# ---------------------------------------------------------------------- odd values


@SOLVERS
def test_values_of_nothing_fill_the_room(solve: Any) -> None:
    instance = Instance(np.zeros((2, 2, 4, 4)), Capacity(2, 2, (1, 4, 9, 16), 20), 1)
    found = instance.solve(solve)
    check(found, instance)
    assert (found.value, found.bound, found.gap) == (0, 0, 0)
    assert np.array_equal(found.last_read, fill(found.last_read, instance.values, instance.capacity))


@SOLVERS
@settings(max_examples=25)
@given(instance=instances(SMALL))
def test_unit_of_values(solve: Any, instance: Instance) -> None:
    """It does not matter, and the same problem has the same answer."""
    plain = instance.solve(solve)
    for power in (-100, 0, 100):  # powers of two, which round nothing
        scaled = solve(instance.values * 2.0**power, instance.capacity, instance.sinks)
        assert np.array_equal(scaled.last_read, plain.last_read)
        assert scaled.value == plain.value * 2.0**power
        assert scaled.bound == pytest.approx(plain.bound * 2.0**power, rel=1e-9)
    whole = np.round(instance.values)
    plain = solve(whole, instance.capacity, instance.sinks)
    tiny = solve(whole * 5e-324, instance.capacity, instance.sinks)
    assert np.array_equal(tiny.last_read, plain.last_read)
    plain = instance.solve(solve)
    assert solve(instance.values, instance.capacity, instance.sinks).row_prices.tobytes() == plain.row_prices.tobytes()
    for factor in (1e-30, 1e30):
        scaled = solve(instance.values * factor, instance.capacity, instance.sinks)
        check(scaled, Instance(instance.values * factor, instance.capacity, instance.sinks))
        assert scaled.bound >= plain.value * factor * (1 - 1e-9)
        assert scaled.value <= plain.bound * factor * (1 + 1e-9)


@SOLVERS
@pytest.mark.parametrize("seed", range(5))
def test_scales_of_millions_of_tokens(solve: Any, seed: int) -> None:
    """The solver's tolerance is a share of a scale, and lets in no token-head too much."""
    rng = np.random.default_rng(seed)
    tokens = tuple(int(n) for n in rng.integers(3_000_000, 5_000_000, 4))
    instance = Instance(np.exp(rng.normal(0, 1, (3, 4, 4, 4))), Capacity(3, 4, tokens, 12 * 7_000_000 + seed), 1)
    check(instance.solve(solve), instance)


# ---------------------------------------------------------------------- the policy

SQUARE = ScaleSchedule.square((1, 2, 3, 4, 5, 6))
GEOMETRY = CacheGeometry(2, 4, 4, SQUARE)


def lp(**options: Any) -> HeatKVLP:
    """The policy by values of single cells, with one sink scale unless told."""
    return HeatKVLP(**{"value": "error", "sink_scales": 1, **options})


def heavy_statistics(geometry: CacheGeometry, seed: int) -> Statistics:
    """Heads that look back very differently, as trained ones do."""
    mass = made_up_mass(geometry, 2, seed) ** 6
    return statistics_of(geometry, mass / mass.sum(axis=-1, keepdims=True))


def problem(budget: str, geometry: CacheGeometry = GEOMETRY, seed: int = 0, **more: Any) -> PlanningProblem:
    return PlanningProblem(geometry, Budget.parse(budget), heavy_statistics(geometry, seed), **more)


def value_of(plan: Plan, statistics: Statistics, value: str) -> float:
    """What policy heatkv-lp says that `value` counts, from the sums over samples."""
    sums = statistics.error_sum if value == "error" else statistics.all_mass_sum
    assert sums is not None
    return worth(plan.last_read, sums / statistics.count)


@pytest.mark.parametrize("value", ["mass", "error"])
@settings(max_examples=40)
@given(data=st.data())
def test_policy_against_heatkvs_rule(value: Any, data: st.DataObject) -> None:
    """Never worth less, and within each other's bounds; files keep the proof."""
    geometry = data.draw(geometries(min_scales=3))
    tokens = geometry.schedule.tokens
    sinks = data.draw(st.integers(0, len(tokens) - 1))
    share = data.draw(shares(max(Fraction(sum(tokens[:sinks]), sum(tokens[:-1])), Fraction(1, 200))))
    statistics = heavy_statistics(geometry, data.draw(SEEDS))
    drawn = PlanningProblem(geometry, Budget("share", share), statistics)
    with pytest.MonkeyPatch.context() as patch:
        if data.draw(st.booleans()):
            patch.setattr(allocation, "EXACT_VARIABLES", 0)
        ours = lp(sink_scales=sinks, value=value).plan(drawn)
    rule = HeatKV(sink_scales=sinks).plan(drawn)
    assert ours.value == pytest.approx(value_of(ours, statistics, value), rel=1e-12)
    assert ours.value >= value_of(rule, statistics, value) * (1 - 1e-12)
    # a budget too small for any cell leaves nothing to gain
    assert ours.gap == pytest.approx(1 - ours.value / ours.value_bound if ours.value_bound else 0, abs=1e-9)
    greedy = lp(sink_scales=sinks, value=value, solver="greedy").plan(drawn)
    assert greedy.value <= ours.value_bound * (1 + 1e-9)
    assert ours.value <= greedy.value_bound * (1 + 1e-9)
    for plan in (ours, greedy):
        assert plan_from_json(json.loads(json.dumps(plan.to_json()))) == plan


@pytest.mark.parametrize("solver", ["lp", "greedy"])
@settings(max_examples=25)
@given(data=st.data())
def test_layer_cap(solver: Any, data: st.DataObject) -> None:
    geometry = data.draw(geometries(min_scales=3))
    tokens = geometry.schedule.tokens
    least = Fraction(tokens[0], sum(tokens[:-1]))
    share, cap = data.draw(shares(least)), data.draw(st.integers(math.ceil(least * 100), 100))
    statistics = heavy_statistics(geometry, data.draw(SEEDS))
    plan = lp(layer_cap=f"{cap}%", solver=solver).plan(PlanningProblem(geometry, Budget("share", share), statistics))
    most = Fraction(cap, 100) * sum(tokens[:-1]) * geometry.heads
    assert max(map(max, held_by_layer(plan.last_read, tokens))) <= most
    assert plan.settings["layer_cap"] == f"{cap}%"


def test_layer_cap_in_bytes() -> None:
    """It counts rows and storage."""
    geometry = CacheGeometry(2, 2, 4, SQUARE)  # a token-head is 16 bytes a row in bfloat16; a layer holds 110 at most
    for rows, storage, most in ((1, "bfloat16", 44), (2, "bfloat16", 22), (2, "float32", 11)):
        plan = lp(layer_cap=f"{44 * 16}B").plan(problem("60%", geometry, rows=rows, storage=storage))
        held = max(map(max, held_by_layer(plan.last_read, SQUARE.tokens)))
        assert most - min(SQUARE.tokens) * 3 < held <= most


def test_cost_of_layer_caps() -> None:
    """They can cost value and never help."""
    posed = problem("30%", CacheGeometry(4, 2, 4, SQUARE), 3)
    found = [lp(layer_cap=cap).allocation(posed) for cap in (None, "100%", "60%", "40%", "20%")]
    assert found[0].bound == pytest.approx(found[1].bound)
    for looser, tighter in itertools.pairwise(found[1:]):
        assert tighter.bound <= looser.bound * (1 + 1e-9)
    assert found[-1].bound < found[0].value  # a fifth of a layer is tight


@pytest.mark.parametrize("solver", ["lp", "greedy"])
def test_sinks_against_budgets_and_caps(solver: Any) -> None:
    """Three sink scales are 14 of 55 tokens."""
    plan = lp(sink_scales=3, solver=solver, layer_cap="14tokens").plan(problem("14tokens"))
    assert plan.peak_token_heads == 8 * 14
    with pytest.raises(BudgetError, match=r"is below 14/55 = 25\.46%, the 3 sink scales"):
        lp(sink_scales=3, solver=solver).plan(problem("13.9tokens"))
    with pytest.raises(BudgetError, match=r"layer_cap=13\.9tokens is below 14/55 = 25\.46%, the 3 sink scales"):
        lp(sink_scales=3, solver=solver, layer_cap="13.9tokens").plan(problem("14tokens"))


@pytest.mark.parametrize(
    ("options", "error", "named"),
    [
        ({"value": "loss"}, PolicyError, "'loss'"),
        ({"solver": "exact"}, PolicyError, "'exact'"),
        ({"value": "joint", "solver": "greedy"}, PolicyError, "greedy"),
        *(
            ({"layer_cap": text}, BudgetError, f"layer_cap '?{text}")
            for text in ("much", "120%", "10parsec", "56tokens")
        ),
        ({"layer_cap": "1GB"}, BudgetError, "layer_cap 1000000000B"),
        ({"layer_cap": "auto"}, BudgetError, "layer_cap 'auto'"),
    ],
)
def test_refused_options(options: dict[str, Any], error: type[Exception], named: str) -> None:
    with pytest.raises(error, match=named):
        make_policy("heatkv-lp", **{"value": "error", "sink_scales": 1, **options}).plan(problem("50%"))


def test_statistics_without_errors() -> None:
    mass = made_up_mass(GEOMETRY, 1, 0)[0]
    old = Statistics(SQUARE, mass, mass**2, Provenance("tiny", "0f", 1.0, {}, ("0:0:0",)))
    for value, missing in (("error", "error_sum"), ("mass", "all_mass_sum")):
        with pytest.raises(StatisticsError, match=missing):
            lp(value=value).plan(PlanningProblem(GEOMETRY, Budget.parse("50%"), old))
