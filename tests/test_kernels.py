"""The kernels behind a cache: the fused one, in Triton's interpreter, against dense attention and the plain one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import SEEDS, level_plans, plans
from test_cache import ROWS, Images, check_close, dense, images_of
from test_level_cache import dense as dense_levels
from torch import Tensor

from heatkv.core.geometry import CacheGeometry
from heatkv.core.plan import Plan
from heatkv.core.schedule import ScaleSchedule
from heatkv.engine.arena_cache import KVCache
from heatkv.engine.attention import triton_kernels
from heatkv.engine.attention.kernels import RaggedAttention, TritonAttention, choose_kernel
from heatkv.engine.store import Store
from heatkv.errors import PlanError

MISSING = triton_kernels.supports("cpu", torch.float32, 8)
needs_triton = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))


def outputs(plan: Plan, images: Images, rows: int, **given: str) -> list[Tensor]:
    cache = KVCache(plan, rows, **given)  # type: ignore[arg-type]
    outs = []
    for _ in range(2):  # the second images find what the first ones left
        cache.store.spoil()
        cache.reset()
        outs = [cache.attend(layer, *qkv) for scale in images for layer, qkv in enumerate(scale)]
    return outs


@needs_triton
@settings(max_examples=4)
@given(plan=plans(max_side=3), rows=ROWS, seed=SEEDS)
def test_the_fused_kernel_reads_and_writes_what_a_plan_holds(plan: Plan, rows: int, seed: int) -> None:
    images = images_of(plan, rows, seed)
    check_close(outputs(plan, images, rows, attention="triton"), dense(plan, images), 1e-5)


@needs_triton
@settings(max_examples=3)
@given(plan=level_plans(max_side=4, head_dim=8), rows=ROWS, seed=SEEDS)
def test_the_fused_kernel_reads_coarse_cells(plan: Plan, rows: int, seed: int) -> None:
    images = images_of(plan, rows, seed)
    check_close(outputs(plan, images, rows, attention="triton"), dense_levels(plan, images), 1e-5)


@needs_triton
@pytest.mark.slow
@settings(max_examples=3)
@given(plan=level_plans(max_side=4, head_dim=8), rows=ROWS, seed=SEEDS, coding=st.sampled_from(["int8", "fp8"]))
def test_both_kernels_agree_about_codes(plan: Plan, rows: int, seed: int, coding: str) -> None:
    images = images_of(plan, rows, seed)
    fused, plain = (outputs(plan, images, rows, attention=name, storage=coding) for name in ("triton", "ragged"))
    for one, other in zip(fused, plain, strict=True):
        # the same codes; the plain one rounds what they stand for to fp32 before it multiplies
        assert (one - other).abs().max() <= 1e-4


@needs_triton
def test_the_fused_kernel_does_not_lose_gradients_in_silence() -> None:
    plan = Plan("by-hand", CacheGeometry(1, 1, 8, ScaleSchedule.square((1, 2))), np.array([[[1, 1]]]), 1.0, 1, 0)
    cache, q = KVCache(plan, 1, attention="triton"), torch.randn(1, 1, 1, 8, requires_grad=True)
    with pytest.raises(PlanError, match=r"no gradients.*ragged"):
        cache.attend(0, q, q, q)
    with torch.no_grad():
        assert not cache.attend(0, q, q, q).requires_grad


@pytest.mark.parametrize("name", ["auto", "ragged"])
def test_a_cpu_takes_the_plain_kernel(name: str) -> None:
    store = Store(1, 4, 8, torch.float32, torch.device("cpu"))
    assert isinstance(choose_kernel(name, store), RaggedAttention)


@needs_triton
def test_a_kernel_that_is_named_is_taken() -> None:
    store = Store(1, 4, 8, torch.float32, torch.device("cpu"))
    assert isinstance(choose_kernel("triton", store), TritonAttention)


def test_a_kernel_that_cannot_run_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = Plan("by-hand", CacheGeometry(1, 1, 256, ScaleSchedule.square((1, 2))), np.array([[[1, 1]]]), 1.0, 1, 0)
    with pytest.raises(PlanError, match=r"256 channels.*use ragged"):
        KVCache(plan, 1, attention="triton")
    monkeypatch.setattr(triton_kernels, "supports", lambda *_: "no reason")
    with pytest.raises(PlanError, match="cannot run here: no reason"):
        choose_kernel("triton", Store(1, 4, 8, torch.float32, torch.device("cpu")))
    KVCache(plan, 1)
