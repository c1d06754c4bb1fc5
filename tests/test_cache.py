"""The arena cache against dense attention, in an arena that is poisoned before every image.

Shapes: R rows, H heads, N tokens of a scale, D head size.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from strategies import SEEDS, live_table, plans
from support.attention import ROWS, check_close, dense, images_of, run
from torch import Tensor

from heatkv.core.geometry import CacheGeometry
from heatkv.core.plan import Plan
from heatkv.core.schedule import ScaleSchedule
from heatkv.engine.arena_cache import KVCache
from heatkv.engine.layout import slots_in
from heatkv.engine.turns import Turn
from heatkv.errors import PlanError


def by_hand(head_dim: int = 4) -> Plan:
    """Two layers and two heads with every kind of cell: never cached, dropped in between, kept to the end."""
    geometry = CacheGeometry(2, 2, head_dim, ScaleSchedule.of([(1, 1), (2, 1), (1, 2, 2), (2, 3)]))
    last_read = np.array([[[3, 1, 2, 3], [3, 3, 2, 3]], [[3, 2, 3, 3], [0, 3, 3, 3]]])
    return Plan("by-hand", geometry, last_read, budget=1.0, budget_token_heads=28, sink_scales=0)


# ---------------------------------------------------------------------- what attention sees


@settings(max_examples=150)
@given(plan=plans(max_side=3), rows=ROWS, seed=SEEDS)
def test_dense_attention(plan: Plan, rows: int, seed: int) -> None:
    images = images_of(plan, rows, seed)
    check_close(run(KVCache(plan, rows), images), dense(plan, images), 1e-5)


def test_longer_heads_and_sharp_attention() -> None:
    plan = by_hand(head_dim=64)
    images = images_of(plan, 2, 0)  # logits of some 8 standard deviations: one key takes nearly all
    check_close(run(KVCache(plan, 2), images), dense(plan, images), 1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype: torch.dtype) -> None:
    plan = by_hand()
    images = images_of(plan, 2, 0, dtype)
    outputs = run(KVCache(plan, 2, dtype), images)
    assert {output.dtype for output in outputs} == {dtype}
    check_close(outputs, dense(plan, images), 16 * torch.finfo(dtype).eps)


def test_half_storage_rounds_the_past_only() -> None:
    plan = by_hand()
    images = images_of(plan, 2, 0)
    outputs = run(KVCache(plan, 2, torch.bfloat16), images)
    assert {output.dtype for output in outputs} == {torch.float32}
    for t in range(len(images)):
        # as target t sees it: earlier scales rounded, its own not
        past = [[(q, k.bfloat16().float(), v.bfloat16().float()) for q, k, v in scale] for scale in images[:t]]
        check_close(outputs[2 * t : 2 * t + 2], dense(plan, [*past, images[t]])[2 * t :], 1e-5)


@settings(max_examples=50)
@given(plan=plans(max_side=3), seed=SEEDS)
def test_rows_apart(plan: Plan, seed: int) -> None:
    images, others = images_of(plan, 3, seed), images_of(plan, 3, seed + 1)
    changed = [
        [[torch.cat([y[:1], x[1:2], y[2:]]) for x, y in zip(*qkvs, strict=True)] for qkvs in zip(*scales, strict=True)]
        for scales in zip(images, others, strict=True)
    ]
    cache = KVCache(plan, 3)
    for one, other in zip(run(cache, images), run(cache, changed), strict=True):
        assert torch.equal(one[1], other[1])
        assert not torch.equal(one[0], other[0])


@settings(max_examples=50)
@given(plan=plans(max_side=3), rows=ROWS, seed=SEEDS)
def test_leftovers_of_other_images(plan: Plan, rows: int, seed: int) -> None:
    first, second = images_of(plan, rows, seed), images_of(plan, rows, seed + 1)
    cache = KVCache(plan, rows)
    expected = run(cache, first)
    run(cache, second, poison=False)
    # over the leftovers of other images, whole or broken off, the same bits come out
    for _ in range(2):
        for one, other in zip(run(cache, first, poison=False), expected, strict=True):
            assert torch.equal(one, other)
        cache.reset()
        cache.attend(0, *second[0][0])


def test_gradients_reach_keys_and_values() -> None:
    """What is gathered for one head must still be there when another's gradient is taken."""
    plan = by_hand()
    images = images_of(plan, 2, 3)
    leaves = [[[x.clone().requires_grad_() for x in qkv] for qkv in scale] for scale in images]
    run(KVCache(plan, 2), leaves)[-1].sum().backward()
    doubles = [[[x.detach().double().requires_grad_() for x in qkv] for qkv in scale] for scale in images]
    dense(plan, doubles)[-1].sum().backward()
    for x, expected in zip(leaves[-1][-1], doubles[-1][-1], strict=True):
        assert x.grad is not None
        assert (x.grad - expected.grad).abs().max() <= 1e-5


# ---------------------------------------------------------------------- what it holds


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@settings(max_examples=50)
@given(plan=plans(), rows=ROWS)
def test_bytes_of_the_arena(dtype: torch.dtype, plan: Plan, rows: int) -> None:
    cache = KVCache(plan, rows, dtype)
    storage = str(dtype).removeprefix("torch.")
    peak = max(map(max, live_table(plan.last_read.tolist(), plan.schedule.tokens)))
    assert cache.allocated_bytes == peak * rows * plan.geometry.head_dim * 2 * dtype.itemsize
    assert cache.allocated_bytes == cache.store.arena_2RPD.untyped_storage().nbytes() == plan.bytes(rows, storage)
    assert cache.allocated_bytes <= plan.geometry.bytes(plan.budget_token_heads, rows, storage)


@settings(max_examples=50)
@given(plan=plans(max_side=3), seed=SEEDS)
def test_nothing_moves(plan: Plan, seed: int) -> None:
    """Every live cell lies where its layout says, bit for bit, from its write to its last read; no other is written."""
    images, cache = images_of(plan, 2, seed), KVCache(plan, 2)
    arena = cache.store.arena_2RPD
    cache.store.spoil()
    live: dict[tuple[int, int, int], Tensor] = {}
    for t, scale in enumerate(images):
        for layer, (q, k, v) in enumerate(scale):
            before = arena.clone()
            cache.attend(layer, q, k, v)
            live = {cell: x for cell, x in live.items() if cell[0] != layer or plan.last_read[cell] > t}
            for head in range(plan.geometry.heads):
                if plan.last_read[layer, head, t] > t:
                    live[layer, head, t] = torch.stack([k[:, head], v[:, head]])
            untouched = torch.ones(cache.layout.slots, dtype=torch.bool)
            for cell, x in live.items():
                slots = slots_in(cache.layout.runs[0, *cell])
                assert torch.equal(arena[:, :, slots], x)
                if cell[::2] == (layer, t):
                    untouched[slots] = False
            assert torch.equal(*(x[:, :, untouched].nan_to_num(nan=-123.0) for x in (arena, before)))
            assert cache.store.arena_2RPD.data_ptr() == arena.data_ptr()
    assert not live


def test_inputs_that_are_views_and_change_afterwards() -> None:
    """As models make them: (R, N, 3, H, D) from one projection, seen as three (R, H, N, D)."""
    plan = by_hand()
    images = images_of(plan, 2, 0)
    views = [
        [torch.stack([x.transpose(1, 2) for x in qkv], dim=2).permute(2, 0, 3, 1, 4) for qkv in scale]
        for scale in images
    ]
    assert not views[-1][0][0].is_contiguous()
    outputs = run(KVCache(plan, 2), views)
    for scale, viewed in zip(images, views, strict=True):
        for qkv, x in zip(scale, viewed, strict=True):
            assert torch.equal(torch.stack(qkv), x)
            x.fill_(torch.nan)  # the cache keeps no reference to them
    check_close(outputs, dense(plan, images), 1e-5)


# ---------------------------------------------------------------------- wrong use


def test_the_order_of_calls() -> None:
    plan = by_hand()
    images, cache = images_of(plan, 1, 0), KVCache(plan, 1)
    cache.attend(0, *images[0][0])
    for wrong in (0, 2, -1):
        with pytest.raises(PlanError, match=f"layer {wrong} when layer 1 of scale 0 was due"):
            cache.attend(wrong, *images[0][1])
    for rows, shape in ((2, "2 rows of 1 tokens"), (1, "1 rows of 2 tokens")):
        x = torch.zeros(rows, 2, 1 if rows == 2 else 2, 4)
        with pytest.raises(PlanError, match=f"{shape} .* need 1 of 1"):
            cache.attend(1, x, x, x)
    cache.attend(1, *images[0][1])  # a refused call changes nothing
    check_close(run(cache, images), dense(plan, images), 1e-5)
    with pytest.raises(PlanError, match=r"scale 4 was due; call reset\(\) before new images"):
        cache.attend(0, *images[0][0])


def test_turns_of_unknown_rows() -> None:
    turn = Turn(by_hand().geometry)
    for tokens in (1, 2, 4, 6):
        for layer in (0, 1):
            assert not turn.done
            turn.check(layer, 7, tokens)
            turn.advance()
    assert turn.done


@pytest.mark.parametrize(
    ("arguments", "phrase"),
    [
        ({"rows": 0}, "rows is 0"),
        ({"dtype": torch.int8}, r"dtype torch.int8"),
        ({"code": "int4"}, "'int4'"),
        ({"attention": "flash"}, "'flash'"),
    ],
)
def test_caches_that_cannot_be(arguments: dict[str, object], phrase: str) -> None:
    with pytest.raises(PlanError, match=phrase):
        KVCache(by_hand(), **{"rows": 1, **arguments})  # type: ignore[arg-type]
