"""The arena cache against dense attention with a mask, in an arena that is poisoned before every image.

Shapes: R rows, H heads, N tokens of a scale, D head size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import SEEDS, live_table, plans
from torch import Tensor

from heatkv.core.geometry import CacheGeometry
from heatkv.core.plan import Plan
from heatkv.core.schedule import ScaleSchedule
from heatkv.core.storage_type import STORAGE_BYTES
from heatkv.engine.arena_cache import KVCache
from heatkv.errors import PlanError

Images = list[list[tuple[Tensor, Tensor, Tensor]]]
"""images[t][l]: q, k and v of target t in layer l."""

ROWS = st.integers(1, 3)


def images_of(plan: Plan, rows: int, seed: int, dtype: torch.dtype = torch.float32) -> Images:
    generator = torch.Generator().manual_seed(seed)
    geometry = plan.geometry

    def draw(tokens: int) -> Tensor:
        shape = (rows, geometry.heads, tokens, geometry.head_dim)
        return torch.randn(shape, generator=generator, dtype=torch.float32).to(dtype)

    return [[(draw(n), draw(n), draw(n)) for _ in range(geometry.layers)] for n in plan.schedule.tokens]


def run(cache: KVCache, images: Images, poison: bool = True) -> list[Tensor]:
    """All outputs in order. A slot that is read before these images wrote it gives NaN."""
    if poison:
        cache.store.arena_2RPD.fill_(float("nan"))
    cache.reset()
    return [cache.attend(layer, *qkv) for scale in images for layer, qkv in enumerate(scale)]


def dense(plan: Plan, images: Images) -> list[Tensor]:
    """Every key and value kept, and a mask made cell by cell from `last_read`; in float64."""
    outputs = []
    offsets = plan.schedule.offsets
    for t, scale in enumerate(images):
        for layer, (q, _, _) in enumerate(scale):
            k = torch.cat([images[s][layer][1] for s in range(t + 1)], dim=2).double()
            v = torch.cat([images[s][layer][2] for s in range(t + 1)], dim=2).double()
            hidden = torch.zeros(k.shape[1], k.shape[2], dtype=torch.bool)
            for head in range(plan.geometry.heads):
                for s in range(t):
                    if plan.last_read[layer, head, s] < t:
                        hidden[head, offsets[s] : offsets[s + 1]] = True
            logits = (q.double() @ k.transpose(2, 3)).masked_fill(hidden[None, :, None], float("-inf"))
            outputs.append(torch.softmax(logits, dim=-1) @ v)
    return outputs


def check_close(got: list[Tensor], expected: list[Tensor], limit: float) -> None:
    for one, other in zip(got, expected, strict=True):
        assert one.shape == other.shape
        assert (one.double() - other.double()).abs().max() <= limit  # false for NaN as well


def by_hand(head_dim: int = 4) -> Plan:
    """Two layers and two heads with every kind of cell: never cached, dropped in between, kept to the end."""
    geometry = CacheGeometry(2, 2, head_dim, ScaleSchedule.of([(1, 1), (2, 1), (1, 2, 2), (2, 3)]))
    last_read = np.array([[[3, 1, 2, 3], [3, 3, 2, 3]], [[3, 2, 3, 3], [0, 3, 3, 3]]])
    return Plan("by-hand", geometry, last_read, budget=1.0, budget_token_heads=28, sink_scales=0)


# ---------------------------------------------------------------------- what attention sees


@settings(max_examples=150)
@given(plan=plans(max_side=3), rows=ROWS, seed=SEEDS)
def test_attention_is_dense_attention_with_a_mask(plan: Plan, rows: int, seed: int) -> None:
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
    exact = dense(plan, images)
    check_close(outputs[:2], exact[:2], 1e-5)  # the first scale has no past
    for t in range(1, len(images)):
        # as target t sees it: earlier scales rounded, its own not
        mixed = [
            [(q, k.bfloat16().float(), v.bfloat16().float()) if s < t else (q, k, v) for q, k, v in images[s]]
            for s in range(t + 1)
        ]
        check_close(outputs[2 * t : 2 * t + 2], dense(plan, mixed)[2 * t :], 1e-5)


@settings(max_examples=50)
@given(plan=plans(max_side=3), seed=SEEDS)
def test_rows_do_not_see_each_other(plan: Plan, seed: int) -> None:
    images = images_of(plan, 3, seed)
    other = images_of(plan, 3, seed + 1)
    changed = [
        [
            tuple(torch.cat([y[:1], x[1:2], y[2:]]) for x, y in zip(qkv, qkv_other, strict=True))
            for qkv, qkv_other in zip(scale, scale_other, strict=True)
        ]
        for scale, scale_other in zip(images, other, strict=True)
    ]
    cache = KVCache(plan, 3)
    first, second = run(cache, images), run(cache, changed)  # type: ignore[arg-type]
    for one, other_one in zip(first, second, strict=True):
        assert torch.equal(one[1], other_one[1])
        assert not torch.equal(one[0], other_one[0])


@settings(max_examples=50)
@given(plan=plans(max_side=3), rows=ROWS, seed=SEEDS)
def test_reset_starts_afresh(plan: Plan, rows: int, seed: int) -> None:
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


# ---------------------------------------------------------------------- what it holds


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@settings(max_examples=50)
@given(plan=plans(), rows=ROWS)
def test_the_arena_takes_what_was_planned(dtype: torch.dtype, plan: Plan, rows: int) -> None:
    cache = KVCache(plan, rows, dtype)
    storage = str(dtype).removeprefix("torch.")
    peak = max(map(max, live_table(plan.last_read.tolist(), plan.schedule.tokens)))
    expected = peak * rows * plan.geometry.head_dim * sum(STORAGE_BYTES[storage])
    assert cache.allocated_bytes == expected == plan.bytes(rows, storage)
    assert cache.allocated_bytes == cache.store.arena_2RPD.untyped_storage().nbytes()
    assert cache.allocated_bytes <= plan.geometry.bytes(plan.budget_token_heads, rows, storage)


@settings(max_examples=50)
@given(plan=plans(max_side=3), seed=SEEDS)
def test_nothing_moves(plan: Plan, seed: int) -> None:
    """Every live cell lies where its layout says, bit for bit, from its write to its last read; no other is written."""
    images = images_of(plan, 2, seed)
    cache = KVCache(plan, 2)
    address, storage = cache.store.arena_2RPD.data_ptr(), cache.store.arena_2RPD.untyped_storage().data_ptr()
    cache.store.arena_2RPD.fill_(float("nan"))
    live: dict[tuple[int, int, int], Tensor] = {}
    for t, scale in enumerate(images):
        for layer, (q, k, v) in enumerate(scale):
            before = cache.store.arena_2RPD.clone()
            cache.attend(layer, q, k, v)
            live = {cell: x for cell, x in live.items() if cell[0] != layer or plan.last_read[cell] > t}
            for head in range(plan.geometry.heads):
                if plan.last_read[layer, head, t] > t:
                    live[layer, head, t] = torch.stack([k[:, head], v[:, head]])
            untouched = torch.ones(cache.layout.slots, dtype=torch.bool)
            for (l, h, s), x in live.items():
                slots = [slot for first, size in cache.layout.runs[l][h][s] for slot in range(first, first + size)]
                assert torch.equal(cache.store.arena_2RPD[:, :, slots], x)
                if (l, s) == (layer, t):
                    untouched[slots] = False
            rest = (x[:, :, untouched] for x in (cache.store.arena_2RPD, before))
            assert torch.equal(*(x.nan_to_num(nan=-123.0) for x in rest))
            assert (cache.store.arena_2RPD.data_ptr(), cache.store.arena_2RPD.untyped_storage().data_ptr()) == (
                address,
                storage,
            )
    assert not live


def test_the_last_scale_is_never_stored() -> None:
    plan = by_hand()
    images = images_of(plan, 1, 0)
    cache = KVCache(plan, 1)
    run(cache, images)
    held = cache.store.arena_2RPD.clone()
    images[-1] = images_of(plan, 1, 1)[-1]
    run(cache, images)
    assert torch.equal(cache.store.arena_2RPD.nan_to_num(), held.nan_to_num())
    assert all(cells[-1] == () for heads in cache.layout.runs for cells in heads)


def test_the_inputs_are_left_alone() -> None:
    plan = by_hand()
    images = images_of(plan, 2, 0)
    kept = [[tuple(x.clone() for x in qkv) for qkv in scale] for scale in images]
    cache = KVCache(plan, 2)
    outputs = run(cache, images)
    for scale, scale_kept in zip(images, kept, strict=True):
        for qkv, qkv_kept in zip(scale, scale_kept, strict=True):
            for x, y in zip(qkv, qkv_kept, strict=True):
                assert torch.equal(x, y)
                x.fill_(float("nan"))  # nor does the cache keep a reference to them
    check_close(outputs, dense(plan, kept), 1e-5)  # type: ignore[arg-type]


def test_inputs_may_be_views() -> None:
    """As models make them: (R, N, 3, H, D) from one projection, seen as three (R, H, N, D)."""
    plan = by_hand()
    images = images_of(plan, 2, 0)
    views = [
        [tuple(torch.stack([x.transpose(1, 2) for x in qkv], dim=2).permute(2, 0, 3, 1, 4)) for qkv in scale]
        for scale in images
    ]
    assert not views[-1][0][0].is_contiguous()
    check_close(run(KVCache(plan, 2), views), dense(plan, images), 1e-5)  # type: ignore[arg-type]


# ---------------------------------------------------------------------- wrong use


def test_layers_and_scales_come_in_order() -> None:
    plan = by_hand()
    images = images_of(plan, 1, 0)
    cache = KVCache(plan, 1)
    with pytest.raises(PlanError, match=r"called for layer 1 when layer 0 of scale 0 was due; call reset\(\)"):
        cache.attend(1, *images[0][1])
    cache.attend(0, *images[0][0])
    for wrong in (0, 2, -1):
        with pytest.raises(PlanError, match=f"layer {wrong} when layer 1 of scale 0 was due"):
            cache.attend(wrong, *images[0][1])
    cache.attend(1, *images[0][1])  # a refused call changes nothing
    with pytest.raises(PlanError, match="layer 1 when layer 0 of scale 1 was due"):
        cache.attend(1, *images[1][1])
    check_close(run(cache, images), dense(plan, images), 1e-5)
    with pytest.raises(PlanError, match=r"scale 4 was due; call reset\(\) before new images"):
        cache.attend(0, *images[0][0])


@pytest.mark.parametrize(("position", "name"), list(enumerate("qkv")))
@pytest.mark.parametrize(
    "wrong",
    [
        lambda x: x[:1],
        lambda x: x.repeat(2, 1, 1, 1),
        lambda x: x[:, :1],
        lambda x: x.repeat(1, 1, 2, 1),
        lambda x: x[..., :2],
        lambda x: x[0],
        lambda x: x.transpose(1, 3),
    ],
)
def test_wrong_shapes_are_refused(position: int, name: str, wrong: Callable[[Tensor], Tensor]) -> None:
    plan = by_hand()
    images = images_of(plan, 2, 0)
    cache = KVCache(plan, 2)
    cache.store.arena_2RPD.fill_(float("nan"))
    qkv: list[Any] = list(images[0][0])
    qkv[position] = wrong(qkv[position])
    with pytest.raises(PlanError, match=rf"^{name} of layer 0, scale 0 is \(.*\); the plan needs .* = \(2, 2, 1, 4\)"):
        cache.attend(0, *qkv)
    assert cache.store.arena_2RPD.isnan().all()
    cache.attend(0, *images[0][0])


@pytest.mark.parametrize("rows", [0, -1])
def test_a_cache_has_rows(rows: int) -> None:
    with pytest.raises(PlanError, match=f"rows is {rows}; it must be a whole number of at least 1"):
        KVCache(by_hand(), rows)


def test_gradients_reach_keys_and_values_through_the_cache() -> None:
    """What is gathered for one head must still be there when another's gradient is taken."""
    plan = by_hand()
    images = images_of(plan, 2, 3)
    leaves = [[[x.clone().requires_grad_() for x in qkv] for qkv in scale] for scale in images]
    cache = KVCache(plan, 2)
    outs = [cache.attend(layer, *qkv) for scale in leaves for layer, qkv in enumerate(scale)]
    outs[-1].sum().backward()
    doubles = [[tuple(x.detach().double().requires_grad_() for x in qkv) for qkv in scale] for scale in images]
    dense(plan, doubles)[-1].sum().backward()  # type: ignore[arg-type]
    for x, expected in zip(leaves[-1][-1], doubles[-1][-1], strict=True):
        assert x.grad is not None
        assert (x.grad - expected.grad).abs().max() <= 1e-5
