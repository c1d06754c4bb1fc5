"""8-bit storage: what codes lose, that reading and writing find their slots, and that caches keep their bytes."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import SEEDS, geometries, level_plans, plans
from support.attention import ROWS, Images, dense, images_of, run
from torch import Tensor

from heatkv.core.budget import Budget
from heatkv.core.geometry import CacheGeometry
from heatkv.core.plan import Plan
from heatkv.core.schedule import ScaleSchedule
from heatkv.core.storage_type import CODES, DTYPES, STORAGE_BYTES, torch_dtype
from heatkv.engine.arena_cache import KVCache
from heatkv.engine.layout import ArenaLayout, slots_in
from heatkv.engine.store import Store, decode, encode
from heatkv.errors import BudgetError
from heatkv.policies.base import make_policy
from heatkv.testing.material import made_up_problem

CPU = torch.device("cpu")
LARGEST = {"int8": 127, "fp8": 448}
STEP = {"int8": 1 / 127, "fp8": 1 / 8}
"""Largest distance between neighbouring codes, of the largest number (int8) or of a number itself (e4m3: 3 bits)."""


def rounded(x: Tensor, coding: str) -> Tensor:
    """What an 8-bit store gives back, written down anew in float64, number by number."""
    flat = x.double().flatten(0, -2)
    out = torch.empty_like(flat)
    for at, row in enumerate(flat):
        scale = float(torch.tensor(float(row.abs().max()) / LARGEST[coding], dtype=torch.float32).bfloat16()) or 1.0
        for channel, number in enumerate(row.tolist()):
            if coding == "int8":
                code = float(min(max(round(number / scale), -127), 127))
            else:
                held = min(max(number / scale, -448.0), 448.0)
                # e4m3: 3 bits behind the leading one, from 2^-6 on; below, steps of 2^-9
                exponent = max(math.floor(math.log2(abs(held))) if held else -6, -6)
                code = round(held / 2.0 ** (exponent - 3)) * 2.0 ** (exponent - 3)
            out[at, channel] = code * scale
    return out.view(x.shape)


@pytest.mark.parametrize("coding", sorted(CODES))
@settings(max_examples=50)
@given(seed=SEEDS, exponent=st.integers(-30, 30), dim=st.sampled_from([1, 4, 33]))
def test_codes_are_the_nearest(coding: str, seed: int, exponent: int, dim: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn((2, 3, dim), generator=generator) * 2.0**exponent
    codes, scales = encode(x, torch_dtype(coding))
    got, expected = decode(codes, scales, torch.float32).double(), rounded(x, coding)
    largest = x.double().abs().amax(dim=-1, keepdim=True)
    # fp32 against float64: a number half-way between two codes may go to either
    step = largest * STEP["int8"] if coding == "int8" else x.double().abs() * STEP["fp8"] + largest * 2.0**-15
    assert ((got - expected).abs() <= 1.01 * step).all()
    assert ((got - expected).abs() <= 1e-5 * largest).double().mean() > 0.9
    assert ((got - x.double()).abs() <= 0.51 * step + largest * 2.0**-9).all()


@pytest.mark.parametrize("coding", sorted(CODES))
def test_zeros_signs_and_the_largest_number(coding: str) -> None:
    largest = torch.full((1, 1, 32), torch.finfo(torch.float16).max, dtype=torch.float16)
    got = decode(*encode(largest, torch_dtype(coding)), torch.float16)  # with a scale that was rounded up
    assert got.isfinite().all()
    assert (got.double() / largest.double() - 1).abs().max() < 0.005
    x = torch.tensor([[[0.0, 0.0], [-3.0, 3.0], [1e-38, 0.0], [0.0, -1e30]]])
    codes, scales = encode(x, torch_dtype(coding))
    got = decode(codes, scales, torch.float32)
    assert got[0, 0].tolist() == [0.0, 0.0]
    assert got[0, 1].tolist() == pytest.approx([-3.0, 3.0], rel=0.005)
    assert got[0, 3].tolist() == pytest.approx([0.0, -1e30], rel=0.005)
    assert got.isfinite().all()


@pytest.mark.parametrize("code", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_was_read_is_written_back_without_loss(code: torch.dtype, dtype: torch.dtype) -> None:
    """Dynamic policies move tokens at every scale: they must not decay."""
    x = torch.randn((10, 50, 32), generator=torch.Generator().manual_seed(0)).to(dtype)
    once = decode(*encode(x, code), dtype)
    assert torch.equal(once, decode(*encode(once, code), dtype))


@settings(max_examples=60)
@given(seed=SEEDS, rows=ROWS, coding=st.sampled_from([None, "int8", "fp8"]))
def test_slots_are_read_as_they_were_written(seed: int, rows: int, coding: str | None) -> None:
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    store = Store(rows, 12, 8, torch.float32, CPU, coding, 5)
    store.spoil()
    slots = rng.permutation(12)[: int(rng.integers(1, 13))]
    k, v = torch.randn((2, rows, len(slots), 8), generator=generator)
    store.write(store.places(slots, writing=True), k, v)
    order = rng.permutation(len(slots))
    got = store.read(store.places(slots[order]))
    for x, expected in zip(got, (k, v), strict=True):
        for at, token in enumerate(order):
            coded = coding is not None and slots[token] >= 5
            wanted = rounded(expected[:, token], coding or "") if coded else expected[:, token].double()
            # fp32 against float64 may round a number half-way to the other side
            assert ((x[:, at] - wanted).abs() <= wanted.abs().amax() * (0.13 if coded else 0)).all()
    rest = sorted(set(range(12)) - set(slots.tolist()))
    if rest:
        assert store.read(store.places(np.array(rest))).isnan().all()


def kept_as(plan: Plan, images: Images, coding: str) -> Images:
    """Keys and values as later targets read them: those of all but the uncoded sinks rounded."""
    first = min(2, plan.sink_scales)
    coded = [[(q, *(rounded(x, coding).to(x.dtype) for x in (k, v))) for q, k, v in scale] for scale in images[first:]]
    return [*images[:first], *coded]


def with_held(plan: Plan, images: Images, held: Images) -> list[Tensor]:
    """Attention target by target: past scales as they are held, the running one as it is."""
    outs = []
    for t in range(len(images)):
        mixed = [*held[:t], images[t], *images[t + 1 :]]
        outs += dense(plan, mixed)[t * plan.geometry.layers : (t + 1) * plan.geometry.layers]
    return outs


@pytest.mark.parametrize("coding", sorted(CODES))
@settings(max_examples=25)
@given(plan=plans(max_side=3), rows=ROWS, seed=SEEDS)
def test_attention_reads_what_the_codes_say(coding: str, plan: Plan, rows: int, seed: int) -> None:
    images = images_of(plan, rows, seed)
    expected = with_held(plan, images, kept_as(plan, images, coding))
    got = run(KVCache(plan, rows, code=coding), images)
    for one, other in zip(got, expected, strict=True):
        assert one.isfinite().all()
        # fp32 against float64: a number half-way between codes may round to the other
        assert (one.double() - other).abs().max() <= 0.1
    error = torch.cat([(one.double() - other).abs().flatten() for one, other in zip(got, expected, strict=True)])
    assert error.median() <= 1e-5


@settings(max_examples=25)
@given(plan=level_plans(max_side=4, head_dim=8), rows=ROWS, seed=SEEDS)
def test_coarse_cells_are_coded_too(plan: Plan, rows: int, seed: int) -> None:
    images = images_of(plan, rows, seed)
    uncoded, got = dense(plan, images), run(KVCache(plan, rows, code="int8"), images)
    scale = max(float(v.abs().max()) for of_scale in images for _, _, v in of_scale)
    for one, other in zip(got, uncoded, strict=True):
        assert one.isfinite().all()
        assert (one.double() - other).abs().max() <= 0.12 * scale  # some steps of 1/127, through the softmax


@settings(max_examples=150)
@given(plan=plans(), rows=ROWS, storage=st.sampled_from(DTYPES), coding=st.sampled_from(sorted(CODES)))
def test_bytes_are_those_promised(plan: Plan, rows: int, storage: str, coding: str) -> None:
    """Counted cell by cell: the first two scales, when they are sinks, in the compute type, a byte a channel and a
    2-byte scale for all other keys and values."""
    name, dim = f"{coding}/{storage}", plan.geometry.head_dim
    with pytest.raises(BudgetError, match="no less"):  # a channel and its scale
        replace(plan.geometry, head_dim=1).bytes(1, rows, f"{coding}/bfloat16")
    cache = KVCache(plan, rows, getattr(torch, storage), code=coding)
    sinks = plan.schedule.tokens[: min(2, plan.sink_scales)] if len(plan.schedule) > 1 else ()
    first = sum(sinks) * plan.geometry.layers * plan.geometry.heads
    expected = first * dim * sum(STORAGE_BYTES[storage]) + (plan.peak_token_heads - first) * 2 * (dim + 2)
    assert cache.allocated_bytes == sum(x.untyped_storage().nbytes() for x in cache.store.buffers)
    assert cache.allocated_bytes == rows * expected == plan.bytes(rows, name)
    assert plan.bytes(rows, name) <= plan.geometry.bytes(plan.budget_token_heads, rows, name)
    layout = ArenaLayout.for_plan(plan, coded=True)
    for (*_, source), runs in layout.runs.items():
        inside = (slots_in(runs) < layout.uncoded_slots).tolist()
        assert all(inside) if source < min(2, plan.sink_scales) else not any(inside)


@settings(max_examples=200)
@given(geometry=geometries(), rows=ROWS, share=st.fractions(Fraction(1, 50), 1, max_denominator=50))
def test_a_budget_in_bytes_counts_scales_and_sinks(geometry: CacheGeometry, rows: int, share: Fraction) -> None:
    storage = "int8/float32"
    amount = max(1, math.floor(share * geometry.full_bytes(rows, storage)))
    held = Budget("bytes", Fraction(amount)).token_heads(geometry, rows, storage)
    assert geometry.bytes(held, rows, storage) <= amount
    assert held == geometry.full_token_heads or geometry.bytes(held + 1, rows, storage) > amount


def test_infinity_takes_half_of_bf16() -> None:
    """2 x 128 codes and two 2-byte scales a token-head instead of 512 bytes; 5 tokens of 6,425 are not coded."""
    geometry = CacheGeometry(32, 16, 128, ScaleSchedule.square((1, 2, 4, 6, 8, 12, 16, 20, 24, 32, 40, 48, 64)))
    full, coded = geometry.full_bytes(2, "bfloat16"), geometry.full_bytes(2, "int8/bfloat16")
    assert full == 6425 * 512 * 512 * 2
    assert coded == (6420 * 260 + 5 * 512) * 512 * 2


@pytest.mark.parametrize("policy", ["snapkv", "sliding-window", "heatkv", "streaming-tokens"])
def test_equal_bytes_for_policies_of_every_kind(policy: str) -> None:
    """The embedded model's geometry: what a policy leaves uncoded, and nothing else, is paid for."""
    geometry, most = CacheGeometry(12, 6, 32, ScaleSchedule.square((1, 2, 3, 4, 6, 8, 10, 12))), 600_000
    chosen = make_policy(policy, **({"sink_scales": 1} if policy == "heatkv" else {}))
    problem = made_up_problem(chosen, geometry, Budget("bytes", Fraction(most)), 0, storage="int8/float32", rows=2)
    taken = chosen.plan(problem).bytes(2, "int8/float32")
    least = 0.6 if policy == "sliding-window" else 0.93  # whole scales of all heads
    assert least * most <= taken <= most
