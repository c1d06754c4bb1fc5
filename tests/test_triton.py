"""The fused Triton kernels: in Triton's interpreter on a CPU, compiled where there is a CUDA device.

Shapes: R rows, H heads, N tokens of the running scale, D head size, P slots of a store, X slots of all lists,
K kept heads.
"""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from strategies import SEEDS
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from heatkv.engine.attention import triton_launch
from heatkv.engine.attention.triton_launch import (
    LARGEST_HEAD,
    HeldTokens,
    Tile,
    append_kept,
    fused_attention,
    missing,
    tile_for,
    tile_table,
)

triton = pytest.importorskip("triton", reason="Triton is not installed: there are no builds for this system")

ROOT = Path(__file__).resolve().parents[1]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

TYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
CODES = {"int8": torch.int8, "float8": torch.float8_e4m3fn}
HEAD_DIMS = (32, 64, 80, 96, 128)
TILES = (Tile(16, 16, 4, 2), Tile(32, 16, 4, 2), Tile(16, 32, 4, 2))
# Shared memory that every device from compute capability 8.0 on gives to a program.
SHARED_MEMORY = 99 << 10

Lists = list[list[tuple[list[int], list[float]]]]
"""[row][head]: the slots that are read, and their biases."""


def needs_gpu(test: Any) -> Any:
    return pytest.mark.gpu(pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")(test))


def lacking(codes: str | None) -> str | None:
    return missing(DEVICE, torch.float32, 64, None if codes is None else CODES[codes])


def test_that_kernels_run_here() -> None:
    assert lacking(None) is None
    assert DEVICE == "cuda" or not any(map(lacking, CODES))


# --- attention ------------------------------------------------------------------------------------------------------


def held_tokens(
    rng: np.random.Generator, rows: int, heads: int, slots: int, most: int, *, alike: bool, biased: bool, run: int
) -> tuple[HeldTokens, Lists]:
    """Lists of 0 to `most` of all slots but the first, in runs, with gaps between the lists, which name the first slot.

    So nobody may read the first slot, which a masked load that is not masked would.
    """
    named, biases, begins = [], [], []
    lists: Lists = []
    for _ in range(1 if alike else rows):
        lists.append([])
        for _ in range(heads):
            gap = int(rng.integers(3))
            count = int(rng.integers(most + 1)) if rng.random() < 0.8 else 0
            starts = rng.permutation(np.arange(1, slots, run))
            chosen = [slot for start in starts for slot in range(start, min(start + run, slots))][:count]
            bias = rng.normal(size=count).astype(np.float32).tolist()
            begins.append(len(named) + gap)
            lists[-1].append((chosen, bias if biased else [0.0] * count))
            named += [0] * gap + chosen
            biases += [np.nan] * gap + bias
    counts = [[len(chosen) for chosen, _ in of_row] for of_row in lists]
    held = HeldTokens(
        *(torch.tensor(x).int().to(DEVICE) for x in (named, np.reshape(begins, (-1, heads)), counts)),
        torch.tensor(biases, dtype=torch.float32, device=DEVICE) if biased else None,
    )
    return held, lists * rows if alike else lists


def normal(rng: np.random.Generator, *shape: int) -> Tensor:
    return torch.from_numpy(rng.normal(size=shape))


def listed_by(lists: Lists, slots: int) -> Tensor:
    """(R, P): whether any head of the row reads the slot."""
    listed_RP = torch.zeros(len(lists), slots, dtype=torch.bool)
    for row, of_heads in enumerate(lists):
        for chosen, _ in of_heads:
            listed_RP[row, chosen] = True
    return listed_RP


def plain_store(rng: np.random.Generator, lists: Lists, slots: int, head_dim: int, dtype: torch.dtype) -> Tensor:
    """With slots that no head of the row reads, which are not numbers."""
    arena_2RPD = normal(rng, 2, len(lists), slots, head_dim)
    arena_2RPD[:, ~listed_by(lists, slots)] = torch.nan
    return arena_2RPD.to(dtype)


def coded_store(
    rng: np.random.Generator, lists: Lists, slots: int, head_dim: int, codes: str, size: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Codes and scales; slots that no head of the row reads have the largest code or none, and no scale."""
    shape = (2, len(lists), slots, head_dim)
    listed_RP = listed_by(lists, slots)
    if codes == "int8":
        codes_2RPD = torch.from_numpy(rng.integers(-127, 128, shape)).to(torch.int8)
        codes_2RPD[:, ~listed_RP] = -128
        largest = 127
    else:
        bits = torch.from_numpy(rng.integers(0, 256, shape)).to(torch.uint8)
        bits[(bits & 0x7F) == 0x7F] = 0
        bits[:, ~listed_RP] = 0x7F
        codes_2RPD = bits.view(torch.float8_e4m3fn)
        largest = 448
    scales_2RP = torch.from_numpy(rng.uniform(0.5, 2, shape[:3]) * size / largest)
    scales_2RP[:, ~listed_RP] = torch.nan
    return codes_2RPD, scales_2RP.to(torch.bfloat16)


def projected(rng: np.random.Generator, rows: int, heads: int, tokens: int, head_dim: int, dtype: torch.dtype) -> Any:
    """q, k and v as views of one projection, which has channels of somebody else beside."""
    buffer = normal(rng, rows, tokens, 3, heads, head_dim + 16).to(dtype).to(DEVICE)
    return buffer[..., :head_dim].permute(2, 0, 3, 1, 4).unbind(0)


@dataclass
class Oracle:
    """What attention must give, in float64, and what bounds the error: the largest sum of |q| |k|, value, and count."""

    out_RHND: Tensor
    products: float = 0.0
    values: float = 0.0
    count: int = 0

    def tolerance(self, dtype: torch.dtype) -> float:
        """How far a right result may be off.

        A logit is a sum of products in fp32, off by a few roundings of the size of sum |q| |k|, which changes a weight
        by that share. Weights and outputs are rounded to the type once each, by up to half of eps. In half precision,
        weights below 6e-5 are rounded to multiples of 6e-8.
        """
        share = 2**-21 * (8 + self.products)
        if dtype != torch.float32:
            share += torch.finfo(dtype).eps
        if dtype == torch.float16:
            share += self.count * 2**-24
        return self.values * share


def decoded(codes_2RPD: Tensor, scales_2RP: Tensor) -> Tensor:
    return codes_2RPD.double() * scales_2RP.double()[..., None]


def attention_oracle(q_RHND: Tensor, k_RHND: Tensor, v_RHND: Tensor, stores: list[tuple[Tensor, Lists]]) -> Oracle:
    """Dense attention over gathered tokens, head by head."""
    q_RHND, k_RHND, v_RHND = (x.double().cpu() for x in (q_RHND, k_RHND, v_RHND))
    oracle = Oracle(torch.empty_like(q_RHND))
    for row in range(len(q_RHND)):
        for head in range(q_RHND.shape[1]):
            k, v, bias = [], [], []
            for store_2RPD, lists in stores:
                chosen, of_chosen = lists[row][head]
                k.append(store_2RPD[0, row, chosen].double())
                v.append(store_2RPD[1, row, chosen].double())
                bias.append(torch.tensor(of_chosen, dtype=torch.float64))
            k_CD, v_CD = torch.cat([*k, k_RHND[row, head]]), torch.cat([*v, v_RHND[row, head]])
            bias_C = torch.cat([*bias, torch.zeros(k_RHND.shape[2], dtype=torch.float64)])
            q_ND = q_RHND[row, head]
            oracle.out_RHND[row, head] = (q_ND @ k_CD.T + bias_C).softmax(-1) @ v_CD
            oracle.products = max(oracle.products, float((q_ND.abs() @ k_CD.abs().T).max()))
            oracle.values = max(oracle.values, float(v_CD.abs().max()))
            oracle.count = max(oracle.count, len(k_CD))
    return oracle


def on_device(*stores: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.to(DEVICE) for x in stores)


def check_attention(
    seed: int,
    rows: int,
    heads: int,
    tokens: int,
    head_dim: int,
    dtype: str,
    *,
    plain: bool = False,
    codes: str | None = None,
    most: int = 40,
    alike: bool = True,
    biased: bool = False,
    run: int = 1,
    sharpness: float = 1.0,
    tile: Tile | None = TILES[0],
    arena_type: str | None = None,
) -> None:
    """Attention over random stores against the oracle; the logits' spread is `sharpness`."""
    if codes is not None and lacking(codes):
        pytest.skip(str(lacking(codes)))
    rng = np.random.default_rng(seed)
    slots = most + 9
    q_RHND, k_RHND, v_RHND = projected(rng, rows, heads, tokens, head_dim, TYPES[dtype])
    q_RHND.mul_(sharpness * head_dim**-0.5)
    stores = []
    plain_given = coded_given = None
    if plain:
        held, lists = held_tokens(rng, rows, heads, slots, most, alike=alike, biased=biased, run=run)
        arena_2RPD = plain_store(rng, lists, slots, head_dim, TYPES[arena_type or dtype])
        stores.append((arena_2RPD, lists))
        plain_given = (arena_2RPD.to(DEVICE), held)
    if codes:
        held, lists = held_tokens(rng, rows, heads, slots, most, alike=alike, biased=biased, run=run)
        codes_2RPD, scales_2RP = coded_store(rng, lists, slots, head_dim, codes)
        stores.append((decoded(codes_2RPD, scales_2RP), lists))
        coded_given = (codes_2RPD.to(DEVICE), scales_2RP.to(DEVICE), held)
    oracle = attention_oracle(q_RHND, k_RHND, v_RHND, stores)
    out_RHND = fused_attention(q_RHND, k_RHND, v_RHND, plain_given, coded_given, tile=tile)
    assert out_RHND.dtype == TYPES[dtype]
    assert out_RHND.shape == q_RHND.shape
    off = (out_RHND.double().cpu() - oracle.out_RHND).abs().max()
    assert off <= oracle.tolerance(TYPES[dtype])  # false for NaN, too


def case(dtype: str, head_dim: int = 64, tokens: int = 5, **more: Any) -> dict[str, Any]:
    return {"seed": 7, "rows": 1, "heads": 2, "tokens": tokens, "head_dim": head_dim, "dtype": dtype, **more}


BOTH = {"rows": 2, "plain": True, "biased": True, "alike": False, "most": 30}


@settings(max_examples=60)
@example(case("bfloat16", tokens=1, plain=True, most=0))
@example(case("float32", 32, 19, codes="int8", **BOTH))
@example(case("bfloat16", 128, 19, codes="float8", **BOTH))
# a store of another type than the queries
@example(case("float32", plain=True, arena_type="bfloat16"))
@example(case("float32", plain=True, arena_type="float16"))
@example(case("float16", plain=True, arena_type="bfloat16"))
@given(
    st.fixed_dictionaries(
        {
            "seed": SEEDS,
            "rows": st.integers(1, 3),
            "heads": st.integers(1, 3),
            "tokens": st.sampled_from((1, 2, 5, 16, 17, 33)),
            "head_dim": st.sampled_from((*HEAD_DIMS, 8, 20)),
            "dtype": st.sampled_from(sorted(TYPES)),
            "plain": st.booleans(),
            "codes": st.sampled_from((None, *CODES)),
            "alike": st.booleans(),
            "biased": st.booleans(),
            "run": st.integers(1, 9),
            "most": st.sampled_from((0, 1, 16, 50)),
            "sharpness": st.sampled_from((0.1, 1.0, 30.0)),
            "tile": st.sampled_from(TILES),
        }
    )
)
def test_attention_against_float64(case: dict[str, Any]) -> None:
    check_attention(**case)


@pytest.mark.parametrize("falling", [False, True])
def test_large_logits(falling: bool) -> None:
    # Cosine attention, from minus to plus the temperature, with the largest logit in the first tile or the last.
    temperature, rng = 3000.0, np.random.default_rng(3)
    q_RHND, k_RHND, v_RHND = (normal(rng, 1, 1, 8, 32).float() for _ in range(3))
    q_RHND = torch.nn.functional.normalize(q_RHND, dim=-1)
    cosines_P = torch.linspace(-1, 1, 64).flip(0) if falling else torch.linspace(-1, 1, 64)
    aside_D = torch.nn.functional.normalize(normal(rng, 32).float(), dim=0)
    aside_D = torch.nn.functional.normalize(aside_D - (aside_D @ q_RHND[0, 0, 0]) * q_RHND[0, 0, 0], dim=0)
    arena_2RPD = normal(rng, 2, 1, 64, 32).float()
    arena_2RPD[0, 0] = cosines_P[:, None] * q_RHND[0, 0, 0] + (1 - cosines_P[:, None] ** 2).sqrt() * aside_D
    lists: Lists = [[(list(range(64)), [0.0] * 64)]]
    held = HeldTokens(*on_device(torch.arange(64).int(), torch.zeros(1, 1).int(), torch.full((1, 1), 64).int()))
    q_RHND, k_RHND = temperature * q_RHND, torch.nn.functional.normalize(k_RHND, dim=-1)
    oracle = attention_oracle(q_RHND, k_RHND, v_RHND, [(arena_2RPD, lists)])
    given_qkv = on_device(q_RHND, k_RHND, v_RHND)
    out_RHND = fused_attention(*given_qkv, (arena_2RPD.to(DEVICE), held), None, tile=TILES[0])
    assert (out_RHND.double().cpu() - oracle.out_RHND).abs().max() <= oracle.tolerance(torch.float32)
    assert oracle.products >= temperature * 0.99


@pytest.mark.parametrize("codes", CODES)
def test_small_values_in_half_precision_are_not_lost(codes: str) -> None:
    # One token takes most of the weight, and many small ones together as much; values, and so the products of weights
    # and scales, are far below what half precision can tell apart.
    if lacking(codes):
        pytest.skip(str(lacking(codes)))
    rng = np.random.default_rng(5)
    slots = 300
    lists: Lists = [[(list(range(slots)), [0.0] + [-5.7] * (slots - 1))]]
    codes_2RPD, scales_2RP = coded_store(rng, lists, slots, 32, codes, size=1e-3)
    # Values alike, so that they do not average out, but for some tiles of much smaller ones.
    codes_2RPD[1].view(torch.uint8)[:] = codes_2RPD[1, :, :1].view(torch.uint8)
    scales_2RP[1, 0, 50:150] *= 1e-3
    held = HeldTokens(
        *on_device(torch.arange(slots).int(), torch.zeros(1, 1).int(), torch.full((1, 1), slots).int()),
        torch.tensor(lists[0][0][1]).to(DEVICE),
    )
    q_RHND, k_RHND, v_RHND = (torch.zeros(1, 1, 3, 32, dtype=torch.float16) for _ in range(3))
    k_RHND[..., 0], q_RHND[..., 0] = -20, 1  # the running scale gets nothing
    oracle = attention_oracle(q_RHND, k_RHND, v_RHND, [(decoded(codes_2RPD, scales_2RP), lists)])
    out_RHND = fused_attention(
        *on_device(q_RHND, k_RHND, v_RHND), None, (*on_device(codes_2RPD, scales_2RP), held), tile=TILES[0]
    )
    # Both roundings, and of outputs this small that of half precision to multiples of 6e-8.
    allowed = oracle.values * 2 * torch.finfo(torch.float16).eps + 2**-25
    assert (out_RHND.double().cpu() - oracle.out_RHND).abs().max() <= allowed


def test_output_goes_where_it_is_asked_to_and_nowhere_else() -> None:
    # and channels need not lie together
    rng = np.random.default_rng(8)
    q_RHND, k_RHND, v_RHND = (normal(rng, 2, 3, 20, 21).float().to(DEVICE).transpose(2, 3) for _ in range(3))
    expected = attention_oracle(q_RHND, k_RHND, v_RHND, [])
    buffer = torch.full((2, 25, 3, 28), 7.0, device=DEVICE)
    out_RHND = buffer[:, 2:23, :, 4:24].transpose(1, 2)
    assert fused_attention(q_RHND, k_RHND, v_RHND, None, None, out_RHND, TILES[0]) is out_RHND
    torch.testing.assert_close(
        out_RHND.double().cpu(), expected.out_RHND, rtol=0, atol=expected.tolerance(torch.float32)
    )
    out_RHND.fill_(7.0)
    assert (buffer == 7.0).all()


def test_offsets_beyond_32_bits() -> None:
    # 6 GiB of codes, of which only a few pages are ever touched; the first 2, so that wrong offsets lead there.
    head_dim, far = 64, (1 << 25) + 5
    buffer = torch.empty(2**31 + 2 * (far + 8) * head_dim, dtype=torch.int8, device=DEVICE)
    codes_2RPD = buffer[2**31 :].view(2, 1, far + 8, head_dim)
    scales_2RP = torch.empty(2, 1, far + 8, dtype=torch.bfloat16, device=DEVICE)
    assert far * codes_2RPD.stride(2) > 2**31
    rng = np.random.default_rng(11)
    q_RHND, k_RHND, v_RHND = projected(rng, 1, 1, 4, head_dim, torch.float32)
    slots_KN = torch.arange(far, far + 4).int()[None].to(DEVICE)
    append_kept(k_RHND, v_RHND, torch.zeros(1).int().to(DEVICE), slots_KN, codes_2RPD, scales_2RP)
    for part, x_RHND in enumerate((k_RHND, v_RHND)):
        expected_codes, expected_scales = coded_by_formula(x_RHND[0, 0].cpu(), torch.int8)
        assert torch.equal(codes_2RPD[part, 0, far : far + 4].cpu(), expected_codes)
        assert torch.equal(scales_2RP[part, 0, far : far + 4].cpu(), expected_scales)
    held = HeldTokens(slots_KN[0], *on_device(torch.zeros(1, 1).int(), torch.full((1, 1), 4).int()))
    near_2RPD = decoded(codes_2RPD[:, :, far : far + 4].cpu(), scales_2RP[:, :, far : far + 4].cpu())
    oracle = attention_oracle(q_RHND, k_RHND, v_RHND, [(near_2RPD, [[([0, 1, 2, 3], [0.0] * 4)]])])
    out_RHND = fused_attention(q_RHND, k_RHND, v_RHND, None, (codes_2RPD, scales_2RP, held), tile=TILES[0])
    assert (out_RHND.double().cpu() - oracle.out_RHND).abs().max() <= oracle.tolerance(torch.float32)


# --- writing --------------------------------------------------------------------------------------------------------


def coded_by_formula(x_ND: Tensor, codes: torch.dtype) -> tuple[Tensor, Tensor]:
    """Codes and scales of tokens, (..., N, D) and (..., N)."""
    x_ND = x_ND.float()
    largest = 127.0 if codes == torch.int8 else 448.0
    scale_N = (x_ND.abs().amax(-1) / largest).to(torch.bfloat16)
    scale_N = torch.where(scale_N == 0, torch.ones_like(scale_N), scale_N)
    ratio_ND = x_ND / scale_N.float()[..., None]
    if codes == torch.int8:
        return ratio_ND.round().clamp(-127, 127).to(torch.int8), scale_N
    return ratio_ND.clamp(-448, 448).to(codes), scale_N


def same_bits(one: Tensor, other: Tensor) -> bool:
    as_ints = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[one.element_size()]
    return torch.equal(one.cpu().view(as_ints), other.cpu().view(as_ints))


def random_bits(rng: np.random.Generator, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    size = torch.empty(0, dtype=dtype).element_size()
    return torch.from_numpy(rng.integers(0, 256, (*shape, size), dtype=np.uint8)).view(dtype)[..., 0]


def check_append(
    k_RHND: Tensor, v_RHND: Tensor, heads_K: Tensor, slots_KN: Tensor, slots: int, store: torch.dtype
) -> None:
    """Into a store of leftovers, against the formula: every bit, of what is written and of what is not."""
    rows, head_dim = k_RHND.shape[0], k_RHND.shape[3]
    rng = np.random.default_rng(0)
    store_2RPD = random_bits(rng, (2, rows, slots, head_dim), store)
    scales_2RP = random_bits(rng, (2, rows, slots), torch.bfloat16)
    expected_2RPD, expected_2RP = store_2RPD.clone(), scales_2RP.clone()
    coded = store in CODES.values()
    for part, x_RHND in enumerate((k_RHND, v_RHND)):
        for head, slots_N in zip(heads_K.tolist(), slots_KN.long(), strict=True):
            x_RND = x_RHND[:, head].cpu()
            if coded:
                codes_RND, scales_RN = coded_by_formula(x_RND, store)
                expected_2RPD[part].view(torch.uint8)[:, slots_N] = codes_RND.view(torch.uint8)
                expected_2RP[part, :, slots_N] = scales_RN
            else:
                expected_2RPD[part, :, slots_N] = x_RND.to(store)
    store_2RPD, scales_2RP = store_2RPD.to(DEVICE), scales_2RP.to(DEVICE)
    heads_K, slots_KN = on_device(heads_K, slots_KN)
    append_kept(k_RHND, v_RHND, heads_K, slots_KN, store_2RPD, scales_2RP if coded else None)
    assert same_bits(store_2RPD, expected_2RPD)
    assert same_bits(scales_2RP, expected_2RP)


@settings(max_examples=60)
@given(
    seed=SEEDS,
    rows=st.integers(1, 3),
    heads=st.integers(1, 4),
    tokens=st.sampled_from((1, 7, 32, 45)),
    head_dim=st.sampled_from(HEAD_DIMS),
    dtype=st.sampled_from(sorted(TYPES)),
    store=st.sampled_from((*TYPES, *CODES)),
    data=st.data(),
)
def test_writing_is_the_formula_bit_for_bit(
    seed: int, rows: int, heads: int, tokens: int, head_dim: int, dtype: str, store: str, data: st.DataObject
) -> None:
    rng = np.random.default_rng(seed)
    _, k_RHND, v_RHND = projected(rng, rows, heads, tokens, head_dim, TYPES[dtype])
    # Tokens of very different sizes, down to where scales are no normal numbers, and some that are all zero.
    lowest = -24 if dtype == "float16" else -140
    for x_RHND in (k_RHND, v_RHND):
        sizes = rng.integers(lowest, 10, (rows, heads, tokens, 1)) * (rng.random((rows, heads, tokens, 1)) < 0.5)
        x_RHND.mul_(torch.from_numpy(2.0**sizes * (rng.random(sizes.shape) < 0.9)).to(DEVICE))
    kept = data.draw(st.lists(st.integers(0, heads - 1), unique=True))
    heads_K = torch.tensor(kept, dtype=torch.int32)
    slots = heads * tokens + 5
    slots_KN = torch.from_numpy(rng.permutation(slots)[: len(kept) * tokens].reshape(len(kept), tokens)).int()
    check_append(k_RHND, v_RHND, heads_K, slots_KN, slots, (TYPES | CODES)[store])


def with_neighbours(values: Tensor) -> Tensor:
    """fp32 values with the next smaller and larger ones."""
    return torch.cat([values, *(torch.nextafter(values, torch.tensor(to)) for to in (torch.inf, -torch.inf))])


def tokens_of(values: Tensor, largest: float | None) -> Tensor:
    """The values, and their negatives, as (1, 1, N, 128); every token has `largest` in it, so that its scale is 1."""
    values = torch.cat([values, -values])
    channels = 128 if largest is None else 127
    padded = torch.nn.functional.pad(values, (0, -len(values) % channels)).view(-1, channels)
    if largest is not None:
        padded = torch.nn.functional.pad(padded, (0, 1), value=largest)
    return padded[None, None].to(DEVICE)


@pytest.mark.parametrize("store", ["int8", "float8", "bfloat16", "float16"])
def test_writing_rounds_every_tie_to_even(store: str) -> None:
    # Every number that the type has, every middle between neighbours, and what is next to them.
    largest = {"int8": 127.0, "float8": 448.0}.get(store)
    if store == "int8":
        numbers = torch.arange(0, 128).float()
    elif store == "float8":
        numbers = torch.arange(0, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    else:  # those between 1/16 and 8, the smallest, and the largest
        bits = torch.arange(0, 0x7F80 if store == "bfloat16" else 0x7C00, dtype=torch.int32).to(torch.int16)
        numbers = bits.view((TYPES)[store]).float()
        numbers = torch.cat([numbers[:50], numbers[(numbers > 1 / 16) & (numbers < 8)], numbers[-2:]])
    middles = numbers[:-1] + (numbers[1:] - numbers[:-1]) / 2
    x_RHND = tokens_of(with_neighbours(torch.cat([numbers[:-1], middles])), largest)
    tokens = x_RHND.shape[2]
    slots_KN = torch.arange(tokens).flip(0).int()[None]
    check_append(x_RHND, x_RHND, torch.zeros(1).int(), slots_KN, tokens, (TYPES | CODES)[store])


def test_writing_keeps_what_is_no_number() -> None:
    # As torch.Tensor.to does; bits are compared by value here, since there are many NaN.
    odd = torch.tensor([torch.inf, -torch.inf, torch.nan, -0.0])
    bits = torch.tensor([0x7FFFFFFF, -1, 0x7F800001], dtype=torch.int32).view(torch.float32)
    x_RHND = torch.cat([odd, bits])[None, None, None].to(DEVICE)
    arena_2RPD = torch.zeros(2, 1, 1, 7, dtype=torch.bfloat16, device=DEVICE)
    append_kept(x_RHND, x_RHND, *on_device(torch.zeros(1).int(), torch.zeros(1, 1).int()), arena_2RPD)
    for x_D in arena_2RPD[:, 0, 0].cpu():
        assert x_D[:2].tolist() == [torch.inf, -torch.inf]
        assert x_D.isnan().tolist() == [False, False, True, False, True, True, True]
        assert torch.signbit(x_D[3])


# --- launching ------------------------------------------------------------------------------------------------------


class Operations(TorchDispatchMode):
    """Notes every operation of PyTorch."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_wrappers_neither_read_tensors_nor_allocate_more_than_the_output(monkeypatch: pytest.MonkeyPatch) -> None:
    # Tensors without numbers cannot be read; the kernels themselves are left out.
    grids = []

    class Kernel:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            grids.append(grid)
            return lambda *args, **options: None

    def meta(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    monkeypatch.setattr(
        triton_launch, "_jit", lambda: SimpleNamespace(attention_kernel=Kernel(), append_kernel=Kernel())
    )
    x_RHND = meta(2, 100, 3, 64, dtype=torch.float16).transpose(1, 2)
    arena_2RPD, scales_2RP = meta(2, 2, 50, 64, dtype=torch.float16), meta(2, 2, 50, dtype=torch.bfloat16)
    codes_2RPD = meta(2, 2, 50, 64, dtype=torch.float8_e4m3fn)
    lists = HeldTokens(meta(9, dtype=torch.int32), *(meta(1, 3, dtype=torch.int32) for _ in range(2)))
    heads_K, slots_KN = meta(2, dtype=torch.int32), meta(2, 100, dtype=torch.int32)
    plain, coded = (arena_2RPD, lists), (codes_2RPD, scales_2RP, lists)
    with Operations() as operations:
        fused_attention(x_RHND, x_RHND, x_RHND, plain, coded, tile=Tile(64, 64, 4, 2))
        append_kept(x_RHND, x_RHND, heads_K, slots_KN, arena_2RPD)
        append_kept(x_RHND, x_RHND, heads_K, slots_KN, codes_2RPD, scales_2RP)
    # beside the output, float8 seen as bytes
    assert [name for name in operations.names if name not in ("view", "detach")] == ["empty_like"]
    assert grids == [(2 * 2 * 3,), (4 * 2 * 2,), (4 * 2 * 2,)]
    append_kept(x_RHND, x_RHND, heads_K[:0], slots_KN[:0], arena_2RPD)
    assert len(grids) == 3


WITHOUT = """
import sys, json, runpy
import heatkv, torch
import heatkv.engine.attention.triton_launch as kernels
print("triton" in sys.modules)
print(kernels.missing("cpu", torch.float32, 64))
sys.modules["triton"] = None
print(kernels.missing("cpu", torch.float32, 64))
del sys.modules["triton"]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def without_interpreter(cases: list[list[Any]], cache: Path) -> tuple[list[str], list[dict[str, int]]]:
    """What a process without Triton's interpreter says of a CPU, and the kernels that it compiles."""
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(cache)}
    code = WITHOUT.replace("sys.argv[0]", repr(str(ROOT / "tests/compile_triton.py")))
    command = [sys.executable, "-c", code, json.dumps(cases)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *said, compiled = done.stdout.splitlines()
    return said, json.loads(compiled)


def test_processes_without_the_interpreter(tmp_path: Path) -> None:
    # Importing needs no Triton, a CPU needs the interpreter, and kernels compile for devices that are not here.
    cases = [
        [80, "attention", "bfloat16", 64, True, None],
        [90, "attention", "float16", 80, True, "float8_e4m3fn"],
        [80, "append", "float32", 96, True, None],
        [80, "append", "float16", 64, False, "int8"],
        [80, "append", "bfloat16", 128, False, "float8_e4m3fn"],
    ]
    said, compiled = without_interpreter(cases, tmp_path)
    assert said == [
        "False",
        "Triton runs on a CPU only in its interpreter: TRITON_INTERPRET=1, before Triton is imported",
        "Triton is not installed; pip install heatkv[triton]",
    ]
    assert all(case["shared"] <= SHARED_MEMORY for case in compiled)


@pytest.mark.slow
def test_default_tiles_fit_into_shared_memory_and_registers(tmp_path: Path) -> None:
    cases = [
        [capability, "attention", dtype, head_dim, codes is None or both, codes]
        for capability in (80, 90)
        for dtype in TYPES
        for head_dim in (32, 64, 128)
        for codes, both in ((None, False), ("int8", False), ("int8", True))
    ]
    for case, told in zip(cases, without_interpreter(cases, tmp_path)[1], strict=True):
        assert told["shared"] <= SHARED_MEMORY, case
        assert told["stack"] <= 64, case  # bytes of spilled registers


# --- where they run, and in which tiles -----------------------------------------------------------------------------


def test_what_the_kernels_lack(monkeypatch: pytest.MonkeyPatch) -> None:
    for arguments, phrase in (
        ((DEVICE, torch.float64, 64), "torch.float64"),
        ((DEVICE, torch.float32, 129), "129 channels"),
        (("mps", torch.float32, 64), "not on mps"),
    ):
        assert phrase in str(missing(*arguments))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert missing("cuda", torch.float32, 64) == "there is no CUDA device"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for capability, code, needed in (
        ((7, 5), None, "8.0"), ((8, 6), torch.int8, None), ((8, 6), torch.float8_e4m3fn, "8.9"),
        ((8, 9), torch.float8_e4m3fn, None),
    ):  # fmt: skip
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, found=capability: found)
        reason = missing("cuda", torch.float16, 64, code)
        assert reason is None if needed is None else f"capability {needed} is needed" in str(reason)


def test_shipped_table_has_a_tile_for_everything_and_claims_no_measurement() -> None:
    assert tile_table()["default"]["tuned"] is False
    for head_dim in range(1, LARGEST_HEAD + 1):
        for bits in (16, 32):
            for coded in (False, True):
                tile = tile_for("default", head_dim, bits, coded)
                assert min(tile.block_m, tile.block_n) >= 16
                assert all(x & (x - 1) == 0 for x in (tile.block_m, tile.block_n, tile.num_warps))


def test_tiles_of_the_device_and_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    def entries(*cases: tuple[int, bool, int]) -> dict[str, Any]:
        names, rest = ("head_dim", "coded", "block_m"), {"bits": 16, "block_n": 16, "num_warps": 4, "num_stages": 2}
        return {"entries": [dict(zip(names, case, strict=True)) | rest for case in cases]}

    table = {
        "default": entries((64, False, 1), (128, False, 2), (128, True, 3)),
        "GPU": entries((96, False, 4), (64, False, 5)),
    }
    monkeypatch.setattr(triton_launch, "tile_table", lambda: table)
    find = tile_for.__wrapped__
    cases = {
        ("GPU", 64, False): 5,
        ("GPU", 80, False): 4,
        ("GPU", 128, False): 2,
        ("GPU", 64, True): 3,
        ("?", 32, False): 1,
    }
    assert {case: find(case[0], case[1], 16, case[2]).block_m for case in cases} == cases
    with pytest.raises(ValueError, match="64 channels"):
        find("GPU", 64, 32, False)


def test_what_tuning_times() -> None:
    # Heads hold 0, 20 and 40 tokens.
    tuning = runpy.run_path(str(ROOT / "benchmarks/tune_triton.py"))
    out_RHND = tuning["workload"](32, torch.float32, ("coded", "plain"), True, 3, 5, 20, DEVICE)(TILES[0])
    assert out_RHND.shape == (tuning["ROWS"], 3, 5, 32)
    assert out_RHND.isfinite().all()


# --- on a CUDA device -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codes", [None, *CODES])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@needs_gpu
def test_attention_in_real_tiles(head_dim: int, dtype: str, codes: str | None) -> None:
    how = {"plain": True, "codes": codes, "biased": True, "alike": False, "most": 700, "run": 5, "tile": None}
    check_attention(head_dim, 2, 4, 300, head_dim, dtype, **how)  # type: ignore[arg-type]


@needs_gpu
def test_recorded_in_a_graph_they_give_the_same() -> None:
    rng = np.random.default_rng(12)
    rows, heads, tokens, head_dim, slots = 2, 4, 200, 64, 900
    held, lists = held_tokens(rng, rows, heads, slots, 600, alike=True, biased=True, run=4)
    arena_2RPD = plain_store(rng, lists, slots, head_dim, torch.bfloat16).to(DEVICE)
    codes_2RPD, scales_2RP = on_device(*coded_store(rng, lists, slots, head_dim, "int8"))
    qkv = projected(rng, rows, heads, tokens, head_dim, torch.bfloat16)
    out_RHND = torch.empty_like(qkv[0])
    heads_K = torch.tensor([2, 0], dtype=torch.int32, device=DEVICE)
    slots_KN = torch.from_numpy(rng.permutation(slots)[: 2 * tokens].reshape(2, tokens)).int().to(DEVICE)

    def step() -> None:
        fused_attention(*qkv, (arena_2RPD, held), (codes_2RPD, scales_2RP, held), out_RHND)
        append_kept(qkv[1], qkv[2], heads_K, slots_KN, arena_2RPD)
        append_kept(qkv[1], qkv[2], heads_K, slots_KN, codes_2RPD, scales_2RP)

    stores = (arena_2RPD, codes_2RPD, scales_2RP)
    before = [x.clone() for x in stores]
    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for x in qkv:
        x.copy_(torch.randn_like(x))
    results = []
    for run in (step, graph.replay):
        for x, of_before in zip(stores, before, strict=True):
            x.copy_(of_before)
        run()
        results.append([x.clone() for x in (out_RHND, *stores)])
    assert all(same_bits(*pair) for pair in zip(*results, strict=True))
