"""The linear program over whole cells, and what its prices prove.

Its variables say whether target t still reads cell (l, h, s), non-increasing in t, with one capacity row per
checkpoint. Its prices bound what any plan is worth, in plain float64 sums that trust no solver. Arrays: L layers, H
heads, T scales; value[l, h, t, s] is what it is worth that target t reads source s, which is finite and not negative.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from scipy import sparse

from heatkv.core.plan import held_for_targets, keep_first
from heatkv.core.schema import BoolArray, FloatArray, IntArray
from heatkv.solve.checkpoints import Capacity, cumulative_value, fill
from heatkv.solve.highs import LinearProgram

ROUNDING = 1e-13
"""Sums in another order differ by no more than this share of what is summed; bounds are larger by it."""


def read_value(last_read_LHT: IntArray, value_LHTT: FloatArray) -> float:
    """What a plan is worth: the sum of value[l, h, t, s] over all cells that targets read."""
    targets = np.arange(last_read_LHT.shape[2])
    reads = (last_read_LHT[:, :, None, :] >= targets[:, None]) & (targets[:, None] > targets)
    return float(value_LHTT[reads].sum())


@dataclass(frozen=True, eq=False)
class Plans:
    """All plans within the capacity that read every cell at least as long as `least` and at most as long as `most`."""

    value_LHTT: FloatArray
    capacity: Capacity
    least: IntArray
    most: IntArray

    def narrowed(self, least: IntArray, most: IntArray) -> Plans | None:
        """Those between these two, without reads that never fit beside `least`; None where that does not fit itself."""
        capacity = self.capacity
        slack = capacity.slack(held_for_targets([least], [capacity.tokens]))
        if slack.min() < 0:
            return None
        fits_LHST = capacity.least_room(slack)[:, None, None] >= np.asarray(capacity.tokens)[:, None]
        reached = fits_LHST | (np.arange(capacity.scales) <= least[..., None])
        ends = np.logical_and.accumulate(reached, axis=3).sum(axis=3) - 1
        return Plans(self.value_LHTT, capacity, least, np.minimum(most, ends))

    def open_reads(self) -> BoolArray:
        """The reads [l, h, s, t] that some of them have and others lack."""
        target = np.arange(self.capacity.scales)
        return (target > self.least[..., None]) & (target <= self.most[..., None])

    @property
    def variables(self) -> int:
        return int((self.most - self.least).sum())

    def scaled(self) -> tuple[float, Plans]:
        """A power of two, and the same with values divided by it, of which the largest is about 1; what never fits is
        worth nothing then, and tiny values keep their digits."""
        scale = np.arange(self.capacity.scales)
        read_LHTS = (scale[:, None] > scale) & (scale[:, None] <= self.most[:, :, None])
        values = np.where(read_LHTS, self.value_LHTT, 0)
        _, exponent = np.frexp(values.max())
        return float(np.ldexp(1.0, exponent)), replace(self, value_LHTT=np.ldexp(values, -exponent))

    def worth(self, last_read: IntArray) -> float:
        return read_value(last_read, self.value_LHTT)

    def fill(self, last_read: IntArray) -> IntArray:
        """The plan filled up. What a solver's tolerance let in too much is taken out before."""
        capacity = self.capacity
        if capacity.slack(held_for_targets([last_read], [capacity.tokens])).min() < 0:
            reads_LHTS = last_read[:, :, None, :] >= np.arange(capacity.scales)[:, None]
            last_read = np.minimum(fill(self.least, self.value_LHTT * reads_LHTS, capacity), last_read)
        return fill(last_read, self.value_LHTT, capacity)

    def bound(self, row_prices: FloatArray) -> float:
        """None of them is worth more, whatever the prices (>= 0): every cell takes what pays, and room costs its
        price. Rounding is allowed for."""
        capacity, scale = self.capacity, np.arange(self.capacity.scales)
        tokens = np.asarray(capacity.tokens, dtype=np.float64)
        paid = capacity.token_prices(row_prices).cumsum(axis=2)  # for targets up to k
        cost_LHSK = (paid[:, :, None, :] - paid[:, :, :, None]) * tokens[:, None]
        worth_LHSK, room = cumulative_value(self.value_LHTT), float(row_prices @ capacity.row_room)
        possible = (scale >= self.least[..., None]) & (scale <= self.most[..., None])
        best = np.where(possible, worth_LHSK - cost_LHSK, -np.inf).max(axis=3)
        summed = float(np.take_along_axis(worth_LHSK, self.most[..., None], axis=3).sum()) + 2 * room
        return float(best.sum()) + room + ROUNDING * summed

    def relax(self) -> tuple[IntArray, FloatArray, tuple[int, ...] | None]:
        """The plan that reads only what the linear program's optimum holds whole, the prices of the capacity's rows,
        and the read (l, h, s, t) worth most of those that it leaves open.

        Over x[l, h, s, t] in [0, 1] for every open read, and held[l, t], their sums.
        """
        capacity, scales = self.capacity, self.capacity.scales
        layer, head, source, target = reads = np.nonzero(self.open_reads())
        count, sums = len(layer), capacity.layers * scales
        if not count:
            return self.least, np.zeros(len(capacity.row_room)), None
        begins = target == self.least[layer, head, source] + 1  # where each cell's variables begin
        unit = float(max(capacity.tokens))  # rows of similar size are kinder to the solver
        tokens = np.asarray(capacity.tokens, dtype=np.float64)[source] / unit
        added = sparse.csr_array((-tokens, (layer * scales + target, np.arange(count))), shape=(sums, count))
        later, identity = np.flatnonzero(~begins), sparse.eye_array(count, format="csr")
        left = capacity.slack(held_for_targets([self.least], [capacity.tokens]))
        worth = self.value_LHTT[layer, head, target, source]
        worth_unit = float(worth.max()) / 100 or 1.0
        program = LinearProgram(
            cost=np.concatenate([-worth / worth_unit, np.zeros(sums)]),
            equal=sparse.csr_array(sparse.hstack([added, sparse.eye_array(sums)])),
            right=np.zeros(sums),
            limits=sparse.csr_array(sparse.block_diag([identity[later] - identity[later - 1], capacity.rows])),
            most=np.concatenate([np.zeros(len(later)), left / unit]),
            upper=np.where(np.arange(count + sums) < count, 1.0, np.inf),
        )
        solved = program.solve()
        if solved is None:  # not in time: nothing is known
            return self.least, np.zeros(len(left)), None
        x = solved.x[:count]
        last_read, first = self.least.copy(), np.flatnonzero(begins)
        last_read[layer[first], head[first], source[first]] += np.add.reduceat((x > 1 - 1e-6).astype(np.int64), first)
        left_open = worth * np.where(np.abs(x - 0.5) < 0.5 - 1e-6, np.minimum(x, 1 - x), -1)
        branch = tuple(int(index[left_open.argmax()]) for index in reads) if left_open.max() > 0 else None
        return last_read, solved.prices[-len(left) :] * worth_unit / unit, branch

    def split(self, branch: tuple[int, ...]) -> tuple[Plans | None, Plans | None]:
        """Those that have the read (l, h, s, t), and those that do not."""
        cell, target = branch[:3], branch[3]
        least, most = self.least.copy(), self.most.copy()
        least[cell], most[cell] = target, target - 1
        return self.narrowed(least, self.most), self.narrowed(self.least, most)


def all_plans(value_LHTT: FloatArray, capacity: Capacity, sink_scales: int) -> Plans:
    """Those with these sinks. Raises BudgetError when the sinks do not fit."""
    shape = capacity.layers, capacity.heads, capacity.scales
    sinks, full = keep_first(shape, sink_scales), keep_first(shape, capacity.scales)
    capacity.check_sinks(held_for_targets([sinks], [capacity.tokens]), sink_scales)
    plans = Plans(value_LHTT, capacity, sinks, full).narrowed(sinks, full)
    assert plans is not None
    return plans
