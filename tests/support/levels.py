"""Random level costs, and the best plan with levels from a list of all paths of every head.

Arrays: L layers, H heads, T targets, S = T sources, K paths of one head.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from strategies import tokens_at

from heatkv.core.level_statistics import LevelStatistics
from heatkv.core.levels import LEVELS, NONE, LevelChoices
from heatkv.core.schedule import ScaleSchedule
from heatkv.core.schema import BoolArray, FloatArray, IntArray
from heatkv.solve.checkpoints import Capacity

# every kind of source: 1 token, 2 tokens, a grid that can be pooled, one that shrinks
FEW = ScaleSchedule.of([(1, 1), (1, 2), (4, 4), (2, 2)])
MORE = ScaleSchedule.of([(1, 1), (1, 1), (1, 2), (4, 5), (3, 3)])


def random_levels(
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


def _best(tokens_KX: IntArray, cost_K: FloatArray) -> IntArray:
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
        best = _best(tokens, of_head)
        more = np.zeros((len(best), layers, scales), dtype=np.int64)
        more[:, layer] = tokens[best]
        held = (held[:, None] + more[None]).reshape(-1, layers, scales)
        cost = (cost[:, None] + of_head[best]).reshape(-1)
        fits = feasible(held, capacity)  # what does not fit by now never will
        held, cost = held[fits], cost[fits]
        best = _best(held.reshape(len(held), -1), cost)
        held, cost = held[best], cost[best]
    return float(cost.min())


def feasible(held_KLT: IntArray, capacity: Capacity) -> BoolArray:
    """Checkpoint by checkpoint: layers up to l hold what the next target reads, the others what this one reads."""
    fits: NDArray[np.bool_] = np.ones(len(held_KLT), dtype=bool)
    for t, l in np.ndindex(capacity.scales, capacity.layers):
        live = held_KLT[:, l + 1 :, t].sum(axis=1)
        if t + 1 < capacity.scales:
            live = live + held_KLT[:, : l + 1, t + 1].sum(axis=1)
        fits &= live <= capacity.room
    if capacity.layer_room is not None:
        fits &= (held_KLT <= capacity.layer_room).all(axis=(1, 2))
    return fits


def full(schedule: ScaleSchedule, layers: int, heads: int) -> int:
    return sum(schedule.tokens[:-1]) * layers * heads


def with_room(stats: LevelStatistics, room: int, layer_room: int | None = None) -> Capacity:
    return Capacity(stats.layers, stats.heads, stats.choices.schedule.tokens, room, layer_room)
