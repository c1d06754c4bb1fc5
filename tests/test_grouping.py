"""The split of heads into groups: the cheapest under the cost model, and no split changes what attention gives."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import SEEDS, level_plans
from test_cache import ROWS, check_close, images_of
from test_level_cache import dense

from heatkv.attention import grouping
from heatkv.attention.grouping import AttentionCost, CallShape, split_heads
from heatkv.attention.kernels import RaggedAttention
from heatkv.cache import KVCache
from heatkv.plan import Plan

SHAPE = CallShape(rows=2, tokens=16, head_dim=8, itemsize=4)
NUMBERS = st.floats(0, 1000, allow_nan=False)
COSTS = st.builds(AttentionCost, NUMBERS, NUMBERS, st.floats(1, 5), NUMBERS)


def partitions(items: list[int]) -> Iterator[list[list[int]]]:
    """Every way to put the items into groups."""
    if not items:
        yield []
        return
    first, *rest = items
    for split in partitions(rest):
        yield [[first], *split]
        for at in range(len(split)):
            yield [*split[:at], [first, *split[at]], *split[at + 1 :]]


def price(split: list[list[int]], counts: list[int], biased: list[bool], cost: AttentionCost) -> float:
    """What a split costs, call by call: every head of a group is padded to the longest."""
    total = 0.0
    for heads in split:
        held = max(counts[head] for head in heads)
        masked = any(biased[head] for head in heads) or any(counts[head] != held for head in heads)
        flops = 4 * SHAPE.rows * len(heads) * SHAPE.tokens * (held + SHAPE.tokens) * SHAPE.head_dim
        copied = 2 * SHAPE.rows * len(heads) * (held + SHAPE.tokens) * SHAPE.head_dim * SHAPE.itemsize if held else 0
        arithmetic = flops / 1e6 * cost.us_per_megaflop * (cost.masked if masked else 1)
        total += cost.call_us + arithmetic + copied / 1e3 * cost.us_per_kilobyte
    return total


@settings(max_examples=150)
@given(
    counts=st.lists(st.integers(0, 40), min_size=1, max_size=6),
    with_bias=st.booleans(),
    seed=SEEDS,
    cost=COSTS,
)
def test_no_split_of_unbiased_heads_is_cheaper(
    counts: list[int], with_bias: bool, seed: int, cost: AttentionCost
) -> None:
    """Where all heads are biased, or none is; a mixture is only searched in the order of counts."""
    del seed
    biased = [with_bias and count > 0 for count in counts]
    found = [list(heads) for heads in split_heads(counts, biased, SHAPE, cost)]
    assert sorted(head for heads in found for head in heads) == list(range(len(counts)))
    if len(set(biased)) == 1:
        least = min(price(split, counts, biased, cost) for split in partitions(list(range(len(counts)))))
        assert price(found, counts, biased, cost) <= least * (1 + 1e-9) + 1e-9


@settings(max_examples=100)
@given(counts=st.lists(st.integers(0, 40), min_size=1, max_size=12), seed=SEEDS, cost=COSTS)
def test_a_split_is_never_dearer_than_heads_alone_or_all_at_once(
    counts: list[int], seed: int, cost: AttentionCost
) -> None:
    biased = [bool(seed >> i & 1) and count > 0 for i, count in enumerate(counts)]
    found = price([list(heads) for heads in split_heads(counts, biased, SHAPE, cost)], counts, biased, cost)
    everyone = list(range(len(counts)))
    for other in ([[head] for head in everyone], [everyone]):
        assert found <= price(other, counts, biased, cost) * (1 + 1e-9) + 1e-9


def test_groups_stay_within_their_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    one = 2 * SHAPE.rows * (10 + SHAPE.tokens) * SHAPE.head_dim * SHAPE.itemsize
    monkeypatch.setattr(grouping, "GROUP_BYTES", 3 * one)
    cost = AttentionCost(1e6, 1.0, 1.0, 1.0)
    assert [len(heads) for heads in split_heads([10] * 7, [False] * 7, SHAPE, cost)] == [3, 3, 1]
    monkeypatch.setattr(grouping, "GROUP_BYTES", 1)
    assert [len(heads) for heads in split_heads([10] * 3, [False] * 3, SHAPE, cost)] == [1, 1, 1]
    assert [len(heads) for heads in split_heads([0] * 3, [False] * 3, SHAPE, cost)] == [3]  # nothing is gathered


@settings(max_examples=40)
@given(plan=level_plans(), rows=ROWS, seed=SEEDS, cost=COSTS)
def test_no_split_changes_what_attention_gives(plan: Plan, rows: int, seed: int, cost: AttentionCost) -> None:
    class Priced(KVCache):
        def _prepare(self) -> list:  # type: ignore[type-arg]
            self.kernel = RaggedAttention(self.store, cost)
            return super()._prepare()

    images = images_of(plan, rows, seed)
    cache = Priced(plan, rows)
    cache.store.spoil()
    got = [cache.attend(layer, *qkv) for scale in images for layer, qkv in enumerate(scale)]
    check_close(got, dense(plan, images), 1e-4)


def test_the_measured_costs_are_costs() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        cost = AttentionCost.measured(dtype)
        assert min(cost.call_us, cost.us_per_megaflop, cost.us_per_kilobyte) > 0
        assert cost.masked >= 1
