"""The split of heads into groups: the cheapest under the cost model, and no split changes what attention gives."""

from __future__ import annotations

from collections.abc import Iterator
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import SEEDS, level_plans
from support.attention import ROWS, check_close, dense, images_of, run

from heatkv.core.plan import Plan
from heatkv.engine.arena_cache import KVCache
from heatkv.engine.attention import grouped
from heatkv.engine.attention.base import CallShape
from heatkv.engine.attention.grouped import AttentionCost, RaggedAttention, split_heads
from heatkv.engine.store import Store

SHAPE = CallShape(rows=2, tokens=16, head_dim=8, itemsize=4)
NUMBERS = st.floats(0, 1000, allow_nan=False)
COSTS = st.builds(AttentionCost, NUMBERS, NUMBERS, st.one_of(st.just(1.0), st.floats(1, 5)), NUMBERS)


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
@given(heads=st.lists(st.tuples(st.integers(0, 40), st.booleans()), min_size=1, max_size=6), cost=COSTS)
def test_no_split_is_cheaper(heads: list[tuple[int, bool]], cost: AttentionCost) -> None:
    """Of all, where a mask costs nothing; otherwise of heads alone and all heads at once."""
    counts, biased = [count for count, _ in heads], [count > 0 and with_bias for count, with_bias in heads]
    found = [list(heads) for heads in split_heads(counts, biased, SHAPE, cost)]
    everyone = list(range(len(counts)))
    assert sorted(head for heads in found for head in heads) == everyone
    others = partitions(everyone) if cost.masked == 1 else iter([[[head] for head in everyone], [everyone]])
    least = min(price(split, counts, biased, cost) for split in others)
    assert price(found, counts, biased, cost) <= least * (1 + 1e-9) + 1e-9


def test_groups_stay_within_their_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    one = 2 * SHAPE.rows * (10 + SHAPE.tokens) * SHAPE.head_dim * SHAPE.itemsize
    monkeypatch.setattr(grouped, "GROUP_BYTES", 3 * one)
    cost = AttentionCost(1e6, 1.0, 1.0, 1.0)
    assert [len(heads) for heads in split_heads([10] * 7, [False] * 7, SHAPE, cost)] == [3, 3, 1]
    monkeypatch.setattr(grouped, "GROUP_BYTES", 1)
    assert [len(heads) for heads in split_heads([10] * 3, [False] * 3, SHAPE, cost)] == [1, 1, 1]
    assert [len(heads) for heads in split_heads([0] * 3, [False] * 3, SHAPE, cost)] == [3]  # nothing is gathered


@settings(max_examples=40)
@given(plan=level_plans(), rows=ROWS, seed=SEEDS, cost=COSTS)
def test_attention_under_any_split(plan: Plan, rows: int, seed: int, cost: AttentionCost) -> None:
    with patch("heatkv.engine.arena_cache.choose_kernel", lambda _, store: RaggedAttention(store, cost)):
        cache = KVCache(plan, rows)
    assert cache.kernel.cost is cost
    images = images_of(plan, rows, seed)
    check_close(run(cache, images), dense(plan, images), 1e-4)


def test_the_measured_costs_are_costs() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        cost = AttentionCost.measured(dtype)
        assert min(cost.call_us, cost.us_per_megaflop, cost.us_per_kilobyte) > 0
        assert cost.masked >= 1


def test_a_pad_repeats_what_its_own_group_holds() -> None:
    """Heads padded to the longest read no slot that none of them was given: it may never have been written."""
    store = Store(1, 12, 8, torch.float32, torch.device("cpu"))
    store.spoil()
    lists = [np.array([5, 6, 7]), np.array([9]), np.zeros(0, dtype=np.int64)]
    written = np.concatenate(lists)
    k, v = torch.randn((2, 1, len(written), 8), generator=torch.Generator().manual_seed(0))
    store.write(store.places(written, writing=True), k, v)
    kernel = RaggedAttention(store, AttentionCost(1e12, 1.0, 1.0, 0.0))
    prepared = kernel.prepare(lists, None, CallShape(1, 2, 8, 4))
    assert len(prepared) == 1
    q, new_k, new_v = torch.randn((3, 1, 3, 2, 8), generator=torch.Generator().manual_seed(1))
    out, at = kernel.attend(q, new_k, new_v, prepared), 0
    for head, slots in enumerate(lists):
        mine = slice(at, at + len(slots))
        keys, values = (torch.cat([x[0, mine], new[0, head]]) for x, new in ((k, new_k), (v, new_v)))
        expected = torch.softmax(q[0, head].double() @ keys.double().T, dim=-1) @ values.double()
        assert (out[0, head] - expected).abs().max() <= 1e-5
        at += len(slots)
