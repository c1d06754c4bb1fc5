"""The kernels behind a cache: the fused one, in Triton's interpreter, against dense attention and the plain one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import SEEDS, level_plans, plans
from support.attention import ROWS, check_close, dense, images_of, run, run_in_parts

from heatkv.core.geometry import CacheGeometry
from heatkv.core.plan import Plan
from heatkv.core.schedule import ScaleSchedule
from heatkv.engine.arena_cache import KVCache
from heatkv.engine.attention import triton_launch
from heatkv.engine.attention.kernels import choose_kernel
from heatkv.engine.store import Store
from heatkv.errors import PlanError

MISSING = triton_launch.missing("cpu", torch.float32, 8)
needs_triton = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))


@needs_triton
@settings(max_examples=7)
@given(plan=st.one_of(plans(max_side=3), level_plans(max_side=4, head_dim=8)), rows=ROWS, seed=SEEDS)
def test_fused_kernel_against_dense_attention(plan: Plan, rows: int, seed: int) -> None:
    images, cache = images_of(plan, rows, seed), KVCache(plan, rows, attention="triton")
    expected = dense(plan, images)
    check_close(run(cache, images), expected, 1e-5)
    check_close(run(cache, images, poison=False), expected, 1e-5)


@needs_triton
@pytest.mark.slow
@settings(max_examples=3)
@given(plan=level_plans(max_side=4, head_dim=8), rows=ROWS, seed=SEEDS, code=st.sampled_from(["int8", "fp8"]))
def test_both_kernels_agree_about_codes(plan: Plan, rows: int, seed: int, code: str) -> None:
    images = images_of(plan, rows, seed)
    fused, plain = (run(KVCache(plan, rows, attention=name, code=code), images) for name in ("triton", "ragged"))
    check_close(fused, plain, 1e-4)  # the plain one rounds what codes stand for to fp32 before it multiplies


@settings(max_examples=25)
@given(plan=level_plans(max_side=4, head_dim=8), halves=st.integers(1, 2), seed=SEEDS, data=st.data())
def test_images_that_run_a_few_at_a_time(plan: Plan, halves: int, seed: int, data: st.DataObject) -> None:
    kernels = ["ragged"] if MISSING is not None else ["ragged", "triton"]
    attention, code = data.draw(st.sampled_from(kernels)), data.draw(st.sampled_from([None, "int8", "fp8"]))
    at_once = data.draw(st.lists(st.integers(1, 3), min_size=len(plan.schedule), max_size=len(plan.schedule)))
    images, rows = images_of(plan, 3 * halves, seed), [halves * count for count in at_once]
    cache = KVCache(plan, 3 * halves, attention=attention, code=code, rows_at_once=rows)
    whole = run(KVCache(plan, 3 * halves, attention=attention, code=code), images)
    check_close(run_in_parts(cache, images, halves, at_once), whole, 1e-5)
    assert cache.allocated_bytes == KVCache(plan, 3 * halves, code=code).allocated_bytes


@needs_triton
def test_fused_kernel_refuses_gradients() -> None:
    plan = Plan("by-hand", CacheGeometry(1, 1, 8, ScaleSchedule.square((1, 2))), np.array([[[1, 1]]]), 1.0, 1, 0)
    cache, q = KVCache(plan, 1, attention="triton"), torch.randn(1, 1, 1, 8, requires_grad=True)
    with pytest.raises(PlanError, match="gradients"):
        cache.attend(0, q, q, q)
    with torch.no_grad():
        assert not cache.attend(0, q, q, q).requires_grad


def test_choice_of_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(1, 4, 8, torch.float32, torch.device("cpu"))
    assert [choose_kernel(name, store).name for name in ("auto", "ragged")] == ["ragged", "ragged"]
    monkeypatch.setattr(triton_launch, "missing", lambda *_: None)
    assert choose_kernel("triton", store).name == "triton"
    monkeypatch.setattr(triton_launch, "missing", lambda *_: "no reason")
    with pytest.raises(PlanError, match="no reason"):
        choose_kernel("triton", store)
