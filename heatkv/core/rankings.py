"""Rankings of heads: for every source scale all heads of the model, the least important first."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from heatkv.core.geometry import CacheGeometry
from heatkv.core.io import in_file, read_json
from heatkv.core.schema import EqualByContents, FloatArray, IntArray, convert, fixed, integer_array
from heatkv.errors import StatisticsError

PUBLISHED_SINKS = 3
"""First scales that published rankings leave out, as the paper never drops them."""


@dataclass(frozen=True, eq=False)
class HeadRankings(EqualByContents):
    """For consecutive source scales, every (layer, head) pair from least to most important.

    `order[i]`, of (scales, L*H), belongs to source scale `first_scale + i` and lists flat pair indices l*H + h, first
    dropped first. Rankings are equal when all they hold is.
    """

    layers: int
    heads: int
    first_scale: int
    order: IntArray

    def __post_init__(self) -> None:
        object.__setattr__(self, "order", fixed(np.array(self.order, dtype=np.int64)))

    def __hash__(self) -> int:
        return hash((self.layers, self.heads, self.first_scale, self.order.tobytes()))

    @cached_property
    def ranks(self) -> IntArray:
        """Position of every pair in its ranking, shape (scales, L, H)."""
        return np.argsort(self.order, axis=1).reshape(-1, self.layers, self.heads)

    def for_scales(self, first: int, stop: int) -> IntArray:
        """Ranks (stop - first, L, H) of the source scales from `first` up to `stop`, not included.

        Raises StatisticsError for scales that are not ranked.
        """
        last = self.first_scale + len(self.order)
        if first < self.first_scale or stop > last:
            raise StatisticsError(
                f"the rankings cover the source scales {self.first_scale} to {last - 1}; {first} to {stop - 1} are "
                "needed"
            )
        return self.ranks[first - self.first_scale : stop - self.first_scale]

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
    def load_orders(
        cls, path: str | Path, geometry: CacheGeometry, sink_scales: Collection[int] = (PUBLISHED_SINKS,)
    ) -> HeadRankings:
        """Read a ranking file as published with HeatKV: a list of rankings, each a list of [head, layer] pairs.

        Such a file has one ranking for every cached scale but the sinks, and does not tell what it was measured on.
        Their number is three, or one of `sink_scales`, those that plans are made with. Raises FormatError, and
        StatisticsError for a schedule of another number of scales.
        """
        with in_file(path):
            rankings = cls.from_pairs(read_json(path), geometry)
            count, scales = len(rankings.order), len(geometry.schedule)
            if rankings.first_scale not in {PUBLISHED_SINKS, *sink_scales}:
                raise StatisticsError(
                    f"{count} rankings are those of a schedule of {count + PUBLISHED_SINKS + 1} scales (all cached "
                    f"but {PUBLISHED_SINKS}); this one has {scales}: plan from statistics of it, or with "
                    f"sink_scales={rankings.first_scale}, if they were made so"
                )
        return rankings

    @classmethod
    def from_pairs(cls, value: Any, geometry: CacheGeometry) -> HeadRankings:
        """From such a list of any number of rankings; the last one is that of the last cached scale, T-2.

        Raises FormatError or StatisticsError.
        """
        layers, heads, cached = geometry.layers, geometry.heads, len(geometry.schedule) - 1
        pairs = layers * heads
        rankings = convert(value, list[list[list[int]]], "a list of rankings of [head, layer] pairs")
        array = integer_array(rankings, (len(rankings), pairs, 2), "a list of rankings", StatisticsError)
        if not 1 <= len(array) <= cached:
            raise StatisticsError(f"{len(array)} rankings; the schedule caches {cached} scales")
        head, layer = array[..., 0], array[..., 1]
        order = layer * heads + head
        inside = (head >= 0) & (head < heads) & (layer >= 0) & (layer < layers)
        if not inside.all() or (np.sort(order, axis=1) != np.arange(pairs)).any():
            raise StatisticsError(f"a ranking must list each of {heads} heads in each of {layers} layers exactly once")
        return cls(layers, heads, cached - len(array), order)
