"""The promise of a plan: at no checkpoint is more held than there is room for.

Checkpoint (t, l) comes after layer l has run target scale t: layers up to l hold what target t+1 reads, the others what
target t reads. Arrays: L layers, H heads, T scales; last_read[l, h, s] is the last target that reads a cell, s itself
where it is never cached.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy import sparse

from heatkv.core.plan import held_for_targets
from heatkv.core.schema import FloatArray, IntArray
from heatkv.errors import BudgetError


@dataclass(frozen=True, eq=False)
class Capacity:
    """The room at every checkpoint: `room` token-heads in the whole cache, `layer_room` in any single layer."""

    layers: int
    heads: int
    tokens: tuple[int, ...]
    room: int
    layer_room: int | None = None

    @property
    def scales(self) -> int:
        return len(self.tokens)

    @property
    def checkpoints(self) -> int:
        """How many of `rows` are of the whole cache; those of layers follow."""
        return (self.scales - 1) * self.layers

    @cached_property
    def rows(self) -> sparse.csr_array:
        """Capacity rows over the variables held[l, t]: (checkpoint t, checkpoint l), then layers (L, T)."""
        layers, scales = self.layers, self.scales
        target, at, layer = np.indices((scales - 1, layers, layers))
        reads = np.where(layer <= at, target + 1, target)
        rows = sparse.csr_array(
            (np.ones(reads.size), ((target * layers + at).ravel(), (layer * scales + reads).ravel())),
            shape=(self.checkpoints, layers * scales),
        )
        if self.layer_room is None:
            return rows
        return sparse.csr_array(sparse.vstack([rows, sparse.eye_array(layers * scales)]))

    @cached_property
    def row_room(self) -> FloatArray:
        """Right-hand side of `rows`."""
        room = np.full(self.checkpoints, float(self.room))
        if self.layer_room is None:
            return room
        return np.concatenate([room, np.full(self.layers * self.scales, float(self.layer_room))])

    def slack(self, held_LHT: IntArray) -> FloatArray:
        """Room left in every row by the tokens that heads hold for every target, (L, H, T) or (L * H, T); negative
        where the promise is broken."""
        held_LT = held_LHT.reshape(self.layers, self.heads, self.scales).sum(axis=1)
        slack: FloatArray = self.row_room - self.rows @ held_LT.reshape(-1)
        return slack

    def least_room(self, slack: FloatArray) -> FloatArray:
        """Room left for tokens of a layer that are held for a target, (L, T): the least of all rows that count them."""
        row, column = self.rows.nonzero()
        room = np.full(self.rows.shape[1], np.inf)
        np.minimum.at(room, column, slack[row])
        return room.reshape(self.layers, self.scales)

    def check_sinks(self, held_LHT: IntArray, sink_scales: int) -> None:
        """Raise BudgetError when what the sinks alone hold exceeds a room, naming that of the budget or of a layer."""
        slack = self.slack(held_LHT)
        for part, room in (
            (slack[: self.checkpoints], f"the budget's room of {self.room}"),
            (slack[self.checkpoints :], f"a layer's cap of {self.layer_room}"),
        ):
            if part.min(initial=0) < 0:
                raise BudgetError(
                    f"the {sink_scales} sink scales alone hold {-part.min():.0f} token-heads more than {room}; raise "
                    "it or keep fewer sink scales"
                )

    def token_prices(self, row_prices: FloatArray) -> FloatArray:
        """What one token costs a head for every target it is held for, (L, H, T), under prices of the rows."""
        prices_LT = (self.rows.T @ row_prices).reshape(self.layers, self.scales)
        return np.repeat(prices_LT[:, None], self.heads, axis=1)

    @cached_property
    def scarcity(self) -> FloatArray:
        """1 for every target before which a full cache would not fit, a little for the others, (T,)."""
        before = np.concatenate([[0], np.cumsum(self.tokens)[:-1]]) * self.layers * self.heads
        return np.where(before > self.room, 1.0, 1e-3)


def cumulative_value(value_LHTT: FloatArray) -> FloatArray:
    """What cell (l, h, s) is worth when k is the last target that reads it, [l, h, s, k]; 0 for k <= s."""
    return np.tril(value_LHTT, -1).transpose(0, 1, 3, 2).cumsum(axis=3)


def fill(last_read_LHT: IntArray, value_LHTT: FloatArray, capacity: Capacity) -> IntArray:
    """Keep cells longer, in the order of value per token and target, while every checkpoint has room.

    `value[l, h, t, s]` is what it is worth that target t reads source s. Returns a new `last_read`. A step of several
    targets that does not fit whole is taken target by target.
    """
    layers, heads, scales = last_read_LHT.shape
    last_read = last_read_LHT.copy()
    end_of_cell = last_read.reshape(-1)
    slack = capacity.slack(held_for_targets([last_read], [capacity.tokens]))
    room, layer_room = slack[: capacity.checkpoints], np.full((layers, scales), np.inf)
    if capacity.layer_room is not None:
        layer_room = slack[capacity.checkpoints :].reshape(layers, scales)
    for cell, to in _steps(last_read, value_LHTT, capacity):
        layer, size = cell // (scales * heads), capacity.tokens[cell % scales]
        for target in range(int(end_of_cell[cell]) + 1, to + 1):
            # held from the end of the layer's own run of the target before to the end of the layer before it
            held = room[(target - 1) * layers + layer : target * layers + layer]
            if held.min() < size or layer_room[layer, target] < size:
                break
            held -= size
            layer_room[layer, target] -= size
            end_of_cell[cell] = target
    return last_read


def _steps(last_read_LHT: IntArray, value_LHTT: FloatArray, capacity: Capacity) -> Iterator[tuple[int, int]]:
    """(flat index of a cell, last target to keep it for), best value per token first.

    Values of one cell are grouped over targets (upper concave hull), so that its steps are in order: from where it ends
    now to the target with the steepest mean value, and on from there.
    """
    layers, heads, scales = last_read_LHT.shape
    worth = cumulative_value(value_LHTT).reshape(-1, scales)
    weight, sizes = capacity.scarcity.cumsum(), np.asarray(capacity.tokens, dtype=np.float64)
    source = np.tile(np.arange(scales), layers * heads)
    cells = np.flatnonzero((last_read_LHT.reshape(-1) < scales - 1) & (source < scales - 1))
    ends = last_read_LHT.reshape(-1)[cells]
    steps: list[tuple[IntArray, IntArray, FloatArray]] = [(cells[:0], ends[:0], np.zeros(0))]
    while len(cells):
        later = np.arange(scales) > ends[:, None]
        gain = worth[cells] - np.take_along_axis(worth[cells], ends[:, None], axis=1)
        cost = (weight - weight[ends][:, None]) * sizes[source[cells]][:, None]
        slope = np.where(later, gain / np.where(later, cost, 1), -np.inf)
        to = scales - 1 - slope[:, ::-1].argmax(axis=1)  # of equal ones the longest
        steps.append((cells, to, np.take_along_axis(slope, to[:, None], axis=1)[:, 0]))
        cells, ends = cells[to < scales - 1], to[to < scales - 1]
    cell_of, to_of, slope_of = (np.concatenate(parts) for parts in zip(*steps, strict=True))
    order = np.lexsort((to_of, -slope_of))
    return zip(cell_of[order].tolist(), to_of[order].tolist(), strict=True)


def fit_checkpoints(
    last_read_LHT: IntArray, tokens: tuple[int, ...], budget_token_heads: int, order_LHT: IntArray
) -> IntArray:
    """Make drops early where a checkpoint would exceed the budget (HeatKV's rule, section 3); a new `last_read`.

    A checkpoint (t, l) that exceeds the budget takes cells which are read for the last time by t in later layers and
    drops them before t runs: last layer first, within a layer in ascending `order`, only until that checkpoint fits.
    Raises BudgetError when that is not enough.
    """
    last_read = last_read_LHT.copy()
    layers, heads, scales = last_read.shape
    of_pair, sizes = last_read.reshape(layers * heads, scales), np.asarray(tokens, dtype=np.int64)
    held_LT = np.pad(held_for_targets([last_read], [tokens]).sum(axis=1), ((0, 0), (0, 1)))  # nothing after the last
    for target in range(scales):
        waiting = held_LT[:, target].sum() - held_LT[:, target].cumsum()
        excess_L = held_LT[:, target + 1].cumsum() + waiting - budget_token_heads
        if excess_L.max() <= 0:
            continue
        pair, source = np.nonzero(of_pair[:, :target] == target)
        order = np.lexsort((order_LHT.reshape(layers * heads, scales)[pair, source], -(pair // heads)))
        pair, source = pair[order], source[order]
        layer = pair // heads
        cumulative = np.concatenate([[0], sizes[source].cumsum()])
        # candidates come last layer first, so those in layers after l are a prefix
        available = np.searchsorted(-layer, -np.arange(layers), side="left")
        dropped = 0
        for at in np.flatnonzero(excess_L > 0):
            needed = int(np.searchsorted(cumulative, excess_L[at], side="left"))
            if needed > available[at]:
                raise BudgetError(
                    f"after layer {at} of scale {target} the plan holds {excess_L[at] - cumulative[available[at]]} "
                    f"token-heads more than the budget of {budget_token_heads}, and no later layer can drop enough"
                )
            dropped = max(dropped, needed)
        of_pair[pair[:dropped], source[:dropped]] = target - 1
        np.subtract.at(held_LT[:, target], layer[:dropped], sizes[source[:dropped]])
    return last_read
