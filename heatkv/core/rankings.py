"""Rankings of heads: for every source scale all heads of the model, the least important first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from heatkv.core.geometry import CacheGeometry
from heatkv.core.io import read_json
from heatkv.core.schema import EqualByContents, FloatArray, IntArray, regular_array, shown, whole
from heatkv.errors import FormatError, StatisticsError

PUBLISHED_SINKS = 3
"""First scales that published rankings leave out, as the paper never drops them."""

_MEASURE_INSTEAD = "plan from statistics of it (heatkv calibrate, then --statistics FILE)"


@dataclass(frozen=True, eq=False)
class HeadRankings(EqualByContents):
    """For consecutive source scales, every (layer, head) pair from least to most important.

    `order[i]`, of (scales, L*H), belongs to source scale `first_scale + i` and lists flat pair indices l*H + h, first
    dropped first. Rankings are equal when all they hold is. Raises StatisticsError for what is no such array.
    """

    layers: int
    heads: int
    first_scale: int
    order: IntArray

    def __post_init__(self) -> None:
        for name, least in (("layers", 1), ("heads", 1), ("first_scale", 0)):
            object.__setattr__(self, name, whole(getattr(self, name), name, StatisticsError, least))
        try:
            given = np.asarray(self.order)
        except ValueError:
            raise StatisticsError("the rankings are not all of the same length") from None
        if not np.issubdtype(given.dtype, np.integer):
            raise StatisticsError(f"rankings list whole numbers l*H + h, not {shown(self.order)}")
        order = given.astype(np.int64)
        pairs = self.layers * self.heads
        if order.ndim != 2 or order.shape[1] != pairs:
            raise StatisticsError(f"a ranking must list all {pairs} (layer, head) pairs; got an array {order.shape}")
        if (np.sort(order, axis=1) != np.arange(pairs)).any():
            raise StatisticsError("a ranking must list every (layer, head) pair exactly once")
        order.setflags(write=False)
        object.__setattr__(self, "order", order)

    def __hash__(self) -> int:
        return hash((self.layers, self.heads, self.first_scale, self.order.tobytes()))

    @cached_property
    def ranks(self) -> IntArray:
        """Position of every pair in its ranking, shape (scales, L, H)."""
        ranks = np.empty_like(self.order)
        np.put_along_axis(ranks, self.order, np.arange(self.order.shape[1])[None], axis=1)
        return ranks.reshape(-1, self.layers, self.heads)

    def for_scales(self, first: int, stop: int) -> IntArray:
        """Ranks (stop - first, L, H) of the source scales from `first` up to `stop`, not included."""
        last = self.first_scale + len(self.order)
        if first < self.first_scale or stop > last:
            raise StatisticsError(
                f"the rankings cover the source scales {self.first_scale} to {last - 1}; {first} to {stop - 1} are "
                "needed: change the schedule or the number of sink scales"
            )
        return self.ranks[first - self.first_scale : stop - self.first_scale]

    def of_heads(self, heads_LH: IntArray) -> HeadRankings:
        """The rankings of these heads of every layer alone, renumbered in this order; (L, heads to take) indices."""
        ranks_SP = self.ranks[:, np.arange(self.layers)[:, None], heads_LH].reshape(len(self.order), -1)
        return HeadRankings(self.layers, heads_LH.shape[1], self.first_scale, np.argsort(ranks_SP, axis=1))

    @classmethod
    def from_scores(cls, scores_LHS: FloatArray) -> HeadRankings:
        """Rank ascending by score, ties by head, then layer (HeatKV, section 3)."""
        layers, heads, _ = scores_LHS.shape
        by_head = scores_LHS.transpose(2, 1, 0).reshape(scores_LHS.shape[2], -1)
        order = np.argsort(by_head, axis=1, kind="stable")
        return cls(layers, heads, 0, (order % layers) * heads + order // layers)

    @classmethod
    def random(cls, geometry: CacheGeometry, seed: int) -> HeadRankings:
        """An independent uniformly random ranking for every source scale."""
        generator = np.random.default_rng(seed % (1 << 64))  # a negative seed is a seed too
        pairs = geometry.layers * geometry.heads
        order = np.stack([generator.permutation(pairs) for _ in range(len(geometry.schedule))])
        return cls(geometry.layers, geometry.heads, 0, order)

    @classmethod
    def load_orders(cls, path: str | Path, geometry: CacheGeometry) -> HeadRankings:
        """Read a ranking file as published with HeatKV: a list of rankings, each a list of [head, layer] pairs.

        Such a file has one ranking for every cached scale but the first three, and is refused for a schedule of
        another number of scales. What else it was measured on it does not tell. Raises FormatError or StatisticsError.
        """
        rankings, scales = cls.from_pairs(read_json(path), geometry, path), len(geometry.schedule)
        count = len(rankings.order)
        if rankings.first_scale != PUBLISHED_SINKS:
            raise StatisticsError(
                f"{path} has {count} rankings, which are those of a schedule of {count + PUBLISHED_SINKS + 1} scales "
                f"(all cached ones but the first {PUBLISHED_SINKS}); this one has {scales} scales: {_MEASURE_INSTEAD}"
            )
        return rankings

    @classmethod
    def from_pairs(cls, value: Sequence[Any], geometry: CacheGeometry, source: str | Path) -> HeadRankings:
        """From such a list of any number of rankings; the last one is that of the last cached scale, T-2."""
        layers, heads, scales = geometry.layers, geometry.heads, len(geometry.schedule)
        if not isinstance(value, list) or not value:
            raise FormatError(f"{source} is no list of rankings")
        pairs = regular_array(value, 3)
        if pairs is None or pairs.shape[2] != 2:
            raise FormatError(
                f"{source} must be a list of rankings, all of the same length, of [head, layer] pairs of whole numbers"
            )
        if pairs.shape[1] != layers * heads:
            raise StatisticsError(
                f"{source} ranks {pairs.shape[1]} (head, layer) pairs; the model has {layers} layers x {heads} heads = "
                f"{layers * heads}"
            )
        if pairs.shape[0] > scales - 1:
            raise StatisticsError(
                f"{source} has {pairs.shape[0]} rankings; the schedule caches {scales - 1} scales: {_MEASURE_INSTEAD}"
            )
        head, layer = pairs[..., 0], pairs[..., 1]
        if (head < 0).any() or (head >= heads).any() or (layer < 0).any() or (layer >= layers).any():
            raise StatisticsError(f"{source} names a head or layer outside {heads} heads and {layers} layers")
        return cls(layers, heads, scales - 1 - pairs.shape[0], layer * heads + head)
