"""The cheapest paths of every head when tokens have prices, by exact dynamic programming over targets.

A path says at which level one head holds each source for every target; levels only fall. Arrays: P heads of the model
(L x H), T targets, S sources, K combinations of levels, V levels with NONE last, N paths or heads to extend; costs are
those of LevelStatistics.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from heatkv.core.level_statistics import LevelStatistics
from heatkv.core.levels import NONE
from heatkv.core.schema import BoolArray, FloatArray, IntArray
from heatkv.errors import StatisticsError

ToGo = dict[tuple[int, ...], FloatArray]
"""Least cost from a target to the last one, (P, K), by the sources of the choice that the target makes."""

_BLOCK = 2_000_000  # numbers at once


@dataclass(frozen=True, eq=False)
class Paths:
    """One path a row: levels (N, T, S), cost (N,), tokens held for every target (N, T)."""

    level: NDArray[np.int8]
    cost: FloatArray
    tokens: IntArray

    def __getitem__(self, which: IntArray) -> Paths:
        return Paths(self.level[which], self.cost[which], self.tokens[which])


def concatenated(paths: Sequence[Paths]) -> Paths:
    """All paths one after another."""
    return Paths(*(np.concatenate([getattr(one, name) for one in paths]) for name in ("level", "cost", "tokens")))


@dataclass(frozen=True, eq=False)
class Choice:
    """What a target chooses for some sources together: levels (K, sources), cost (P, K), and tokens held, (K,)."""

    sources: tuple[int, ...]
    table: IntArray
    cost: FloatArray
    tokens: IntArray

    def possible(self, target: int, level_NTS: NDArray[np.int8]) -> BoolArray:
        """Which combinations let no level rise, (N, K)."""
        possible = np.ones((len(level_NTS), len(self.table)), dtype=bool)
        for axis, source in enumerate(self.sources):
            if source < target - 1:  # the newest source starts at any level
                possible &= self.table[:, axis] >= level_NTS[:, target - 1, source, None]
        return possible

    def extend(self, target: int, paths: Paths, head_N: IntArray, chosen_N: IntArray) -> Paths:
        """The paths, which are of these heads, with this choice made."""
        paths.level[:, target, list(self.sources)] = self.table[chosen_N]
        paths.tokens[:, target] += self.tokens[chosen_N]
        return Paths(paths.level, paths.cost + self.cost[head_N, chosen_N], paths.tokens)


class Pricing:
    """Prices the paths of all heads at once that use `levels` (indices into LEVELS, 0 among them).

    The first `sink_scales` scales stay whole: as many as the costs were measured with (default), or more. Raises
    StatisticsError for fewer.
    """

    def __init__(self, statistics: LevelStatistics, levels: tuple[int, ...], sink_scales: int | None = None) -> None:
        self.choices = choices = statistics.choices
        measured = choices.sink_scales
        if sink_scales is not None and sink_scales < measured:
            raise StatisticsError(f"the level costs hold for {measured} sink scales or more, not for {sink_scales}")
        self.sinks = measured if sink_scales is None else sink_scales
        self.first, self.scales = self.sinks + 1, len(choices.schedule)
        self.heads = statistics.layers * statistics.heads
        self.tokens_SV = np.stack([choices.tokens(source) for source in range(self.scales)])
        self._allowed_SV = np.zeros(self.tokens_SV.shape, dtype=bool)
        self._allowed_SV[:, [*levels, NONE]] = True
        self._allowed_SV[: self.sinks, 1:] = False
        every_level = np.arange(NONE + 1)
        self.targets: list[list[Choice]] = []
        for target in range(self.scales):
            joint, table = choices.joint_sources(target), choices.combinations(target)
            made = [self._choice(joint, table, statistics.joint[target])]
            for source in choices.other_sources(target):
                known = np.isin(every_level, choices.of_other(source))
                cost = np.where(known, statistics.single[:, :, target, source], np.inf)
                made.append(self._choice((source,), every_level[:, None], cost))
            self.targets.append(made)

    def _choice(self, sources: tuple[int, ...], table: IntArray, cost_LHK: FloatArray) -> Choice:
        at = np.array(sources, dtype=np.int64), table
        cost_PK = np.where(self._allowed_SV[at].all(axis=1), cost_LHK, np.inf).reshape(self.heads, -1)
        return Choice(sources, table, cost_PK, self.tokens_SV[at].sum(axis=1))

    @property
    def prohibitive(self) -> float:
        """A price per token that no saving is worth."""
        costs = [choice.cost for made in self.targets for choice in made]
        return 1.0 + 2.0 * float(sum(np.where(np.isfinite(cost), cost, 0).max() for cost in costs))

    def best(self, price_PT: FloatArray) -> tuple[Paths, FloatArray]:
        """The paths that are cheapest with tokens at these prices, and their cost with the tokens, (P,)."""
        to_go, heads = self._to_go(price_PT), np.arange(self.heads)
        paths = self._nothing_held()
        for target in range(self.first, self.scales):
            for choice in self.targets[target]:
                cost = np.where(choice.possible(target, paths.level), to_go[target][choice.sources], np.inf)
                paths = choice.extend(target, paths, heads, cost.argmin(axis=1))
        return paths, paths.cost + (paths.tokens * price_PT).sum(axis=1)

    def near(self, price_PT: FloatArray, most_regret: float, most_paths: int) -> tuple[IntArray, Paths] | None:
        """Every path whose cost with tokens at these prices exceeds its head's cheapest by at most `most_regret`, and
        its head; None when there are too many."""
        to_go = self._to_go(price_PT)
        head, regret, paths = np.arange(self.heads), np.zeros(self.heads), self._nothing_held()
        for target in range(self.first, self.scales):
            for choice in self.targets[target]:
                kept, count, step = [], 0, max(1, _BLOCK // len(choice.table))
                for begin in range(0, len(head), step):
                    block = slice(begin, begin + step)
                    possible = choice.possible(target, paths.level[block])
                    cost = np.where(possible, to_go[target][choice.sources][head[block]], np.inf)
                    more = regret[block, None] + cost - cost.min(axis=1, keepdims=True)
                    row, chosen = np.nonzero(more <= most_regret)
                    count += len(row)  # every one of them is the beginning of at least one path
                    if count > most_paths:
                        return None
                    kept.append((begin + row, chosen, more[row, chosen]))
                parent, chosen, regret = (np.concatenate(parts) for parts in zip(*kept, strict=True))
                head = head[parent]
                paths = choice.extend(target, paths[parent], head, chosen)
        return head, paths

    def _to_go(self, price_PT: FloatArray) -> list[ToGo]:
        """For every target the least cost from each of its combinations on, tokens at these prices."""
        to_go: list[ToGo] = [{} for _ in range(self.scales)]
        for target in range(self.scales - 1, self.first - 1, -1):
            for index, choice in enumerate(self.targets[target]):
                cost = choice.cost + price_PT[:, target, None] * choice.tokens
                if target + 1 < self.scales and index == 0:
                    cost = cost + self._continued(target, to_go[target + 1])
                elif target + 1 < self.scales:
                    cost = cost + _after_falling(to_go[target + 1][choice.sources])
                to_go[target][choice.sources] = cost
        return to_go

    def _continued(self, target: int, to_go: ToGo) -> FloatArray:
        """Least cost from the next target on after every joint combination of `target`, (P, K)."""
        choices = self.choices
        now, then = choices.joint_sources(target), choices.joint_sources(target + 1)
        value = to_go[then].reshape(self.heads, *choices.shape(target + 1))
        if target in then:  # the new source starts at any level
            value, newest = value.min(axis=1 + then.index(target)), np.zeros((self.heads, 1))
        else:
            newest = to_go[(target,)].min(axis=1, keepdims=True)
        for axis in range(1, value.ndim):  # the others may only fall
            value = np.flip(np.minimum.accumulate(np.flip(value, axis), axis=axis), axis)
        for axis, source in enumerate(now, start=1):
            if source not in then:
                levels = list(choices.of_source(source))
                leaving = _after_falling(to_go[(source,)])[:, levels]
                shape = [1] * (len(now) + 1)
                shape[0], shape[axis] = self.heads, len(levels)
                value = np.expand_dims(value, axis) + leaving.reshape(shape)
        return np.broadcast_to(value, (self.heads, *choices.shape(target))).reshape(self.heads, -1) + newest

    def _nothing_held(self) -> Paths:
        """Paths of all heads that hold nothing but the sinks, at no cost."""
        offsets, measured = self.choices.schedule.offsets, self.choices.sink_scales
        level = np.full((self.heads, self.scales, self.scales), NONE, dtype=np.int8)
        for target in range(self.scales):
            level[:, target, : min(self.sinks, target)] = 0
        # sinks beyond those of the costs are sources that targets choose for
        tokens = [offsets[target if target < self.first else measured] for target in range(self.scales)]
        return Paths(level, np.zeros(self.heads), np.tile(np.array(tokens, dtype=np.int64), (self.heads, 1)))


def _after_falling(to_go_PV: FloatArray) -> FloatArray:
    """Least cost from a level on when it may first fall."""
    return np.minimum.accumulate(to_go_PV[:, ::-1], axis=1)[:, ::-1]
