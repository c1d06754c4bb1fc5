"""Attention over held tokens and the writing of new ones as one Triton kernel each, for CUDA devices.

Triton is imported when a kernel is first needed. While images are drawn, nothing here reads a tensor's numbers on the
host or lets a shape depend on them, and nothing but the output is allocated, so that calls can be recorded in a CUDA
graph.
Shapes: R rows, H heads, N tokens of the running scale, D head size, P slots of a store, X slots of all lists of a
layer, K heads that keep their new tokens.
"""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from heatkv.core.schema import IntArray
from heatkv.engine.attention.base import AttentionKernel, CallShape, FloatArrays, IntArrays
from heatkv.errors import PlanError

LARGEST_HEAD = 128
COMPUTE_TYPES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}
"""The types that products are taken in, by Triton's names."""
# Writing only moves bytes: enough rows of a few hundred bytes each that every thread has several 16-byte pieces.
APPEND_TOKENS, APPEND_WARPS = 32, 4


@dataclass(frozen=True)
class HeldTokens:
    """Slots that every head of one layer reads for one target.

    Head h of row r reads slots_X[begins[r, h] : begins[r, h] + counts[r, h]]; both are int32, (R, H), or (1, H) when
    all rows read alike. `bias_X`, fp32, beside the slots, is added to the logits; None where no held token stands for
    several.
    """

    slots_X: Tensor
    begins_RH: Tensor
    counts_RH: Tensor
    bias_X: Tensor | None = None


@dataclass(frozen=True)
class Tile:
    """How attention is cut: queries and keys of a tile, warps of a program, stages of the pipeline of loads."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


@cache
def tile_table() -> dict[str, Any]:
    """`tiles.json`: entries of every device that was tuned by its name, and of `default`, which is for all others."""
    table: dict[str, Any] = json.loads(Path(__file__).with_name("tiles.json").read_text("utf-8"))
    return table


@cache
def tile_for(device_name: str, head_dim: int, bits: int, coded: bool) -> Tile:
    """The tile of a device for a head size, the bits of the compute type, and with or without a coded store.

    It is that of the next larger head size in the table; `default` stands in for devices and cases that are not there.
    """
    for name in (device_name, "default"):
        entries = tile_table().get(name, {"entries": []})["entries"]
        fitting = [x for x in entries if x["head_dim"] >= head_dim and (x["bits"], x["coded"]) == (bits, coded)]
        if fitting:
            best = min(fitting, key=lambda entry: int(entry["head_dim"]))
            return Tile(best["block_m"], best["block_n"], best["num_warps"], best["num_stages"])
    raise ValueError(f"no tile for heads of {head_dim} channels; the kernels take up to {LARGEST_HEAD}")


def missing(
    device: torch.device | str, dtype: torch.dtype, head_dim: int, code: torch.dtype | None = None
) -> str | None:
    """What the kernels lack to run here, in words; None where they can.

    `dtype` is that of queries, `code` that of the coded store, None without one. On a CPU, only Triton's interpreter
    runs them (TRITON_INTERPRET=1, set before Triton is imported); it is for tests, and far slower than PyTorch.
    """
    device = torch.device(device)
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; pip install heatkv[triton]"
    if dtype not in COMPUTE_TYPES:
        return f"the kernels compute in {', '.join(COMPUTE_TYPES.values())}, not in {dtype}"
    if not 1 <= head_dim <= LARGEST_HEAD:
        return f"heads have {head_dim} channels; the kernels take 1 to {LARGEST_HEAD}"
    if device.type == "cpu":
        if not _interpreted():
            return "Triton runs on a CPU only in its interpreter: TRITON_INTERPRET=1, before Triton is imported"
    elif device.type != "cuda":
        return f"the kernels run on CUDA devices, not on {device.type}"
    elif not torch.cuda.is_available():
        return "there is no CUDA device"
    else:
        least = (8, 9) if code == torch.float8_e4m3fn else (8, 0)
        capability = torch.cuda.get_device_capability(device)
        if capability < least:
            return f"compute capability {least[0]}.{least[1]} is needed; the device has {capability[0]}.{capability[1]}"
    return None


def fused_attention(
    q_RHND: Tensor,
    k_RHND: Tensor,
    v_RHND: Tensor,
    plain: tuple[Tensor, HeldTokens] | None,
    coded: tuple[Tensor, Tensor, HeldTokens] | None,
    out: Tensor | None = None,
    tile: Tile | None = None,
) -> Tensor:
    """softmax(q [held, k]^T + bias) [held, v] per row and head, over held tokens and the whole current scale; scale 1.

    Args:
        q_RHND, k_RHND, v_RHND: one dtype, any strides; q is already scaled, k rotated and normalised. N is 1 or more.
        plain: the store of tokens as they are, arena_2RPD (keys, then values), and who reads what of it.
        coded: codes_2RPD, int8 or float8_e4m3fn, scales_2RP, bfloat16, and who reads what; a token is code * scale.
            A store's rows may also be some of each of several parts, 2FB instead of 2R.
        out: where to write; made like q if None.
        tile: in place of the table's.

    Either store may be None. Sums are in fp32, and fp32 inputs are multiplied in fp32. Slots that no list names are
    never read. Call it only where nothing is `missing`. A kernel is compiled at its first call, which therefore cannot
    be recorded; a last dimension that is not contiguous is copied.
    """
    rows, heads, tokens, head_dim = q_RHND.shape
    q_RHND, k_RHND, v_RHND = (_channels_together(x) for x in (q_RHND, k_RHND, v_RHND))
    if out is None:
        out = torch.empty_like(q_RHND)
    if tile is None:
        tile = tile_for(_device_name(q_RHND.device), head_dim, 8 * q_RHND.element_size(), coded is not None)
    arena, listed = plain or (None, None)
    codes, scales, codes_listed = coded or (None, None, None)
    arguments = [part for x in (out, q_RHND, k_RHND, v_RHND, arena) for part in _strided(x, 3)]
    arguments += [*_lists(listed), *_strided(codes, 3), *_strided(scales, 2), *_lists(codes_listed)]
    arguments += [*_rows_of(arena if codes is None else codes, rows), heads, tokens]
    with torch.cuda.device_of(q_RHND):
        _jit().attention_kernel[(-(-tokens // tile.block_m) * rows * heads,)](
            *arguments,
            PLAIN=listed is not None,
            PLAIN_BIASED=listed is not None and listed.bias_X is not None,
            CODED=codes_listed is not None,
            CODED_BIASED=codes_listed is not None and codes_listed.bias_X is not None,
            FLOAT8=_is_float8(codes),
            COMPUTE=_compute_type(q_RHND.dtype),
            D=head_dim,
            BLOCK_D=_padded(head_dim),
            BLOCK_M=tile.block_m,
            BLOCK_C=tile.block_n,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
    return out


def append_kept(
    k_RHND: Tensor,
    v_RHND: Tensor,
    heads_K: Tensor,
    slots_KN: Tensor,
    store_2RPD: Tensor,
    scales_2RP: Tensor | None = None,
) -> None:
    """Write the new tokens of the heads in `heads_K` to `slots_KN`, the same in all rows; both int32.

    Without scales they go into the store as they are, rounded where its type is narrower. In codes, int8 or
    float8_e4m3fn, the key or value x of a token becomes a scale, bfloat16(max|x| / 127), for float8 / 448, or 1 where
    that is 0, and codes x / scale: whole numbers, half to even, cut to +-127, or float8 of what is cut to +-448.
    """
    kept, tokens = slots_KN.shape
    if not kept:
        return
    rows, head_dim = k_RHND.shape[0], k_RHND.shape[3]
    k_RHND, v_RHND, slots_KN = (_channels_together(x) for x in (k_RHND, v_RHND, slots_KN))
    arguments = [part for x in (k_RHND, v_RHND, store_2RPD) for part in _strided(x, 3)]
    arguments += [*_strided(scales_2RP, 2), heads_K, slots_KN, slots_KN.stride(0), *_rows_of(store_2RPD, rows)]
    arguments += [kept, tokens]
    with torch.cuda.device_of(k_RHND):
        _jit().append_kernel[(-(-tokens // APPEND_TOKENS) * rows * kept,)](
            *arguments,
            CODED=scales_2RP is not None,
            FLOAT8=_is_float8(store_2RPD),
            D=head_dim,
            BLOCK_D=_padded(head_dim),
            BLOCK_C=APPEND_TOKENS,
            num_warps=APPEND_WARPS,
        )


def _jit() -> ModuleType:
    """The kernels, with which Triton is imported."""
    from heatkv.engine.attention import triton_jit

    return triton_jit


@cache
def _interpreted() -> bool:
    """Whether Triton was imported to interpret kernels, and these were too: both were asked for before the import."""
    if "TRITON_INTERPRET" not in os.environ:
        return False
    import triton

    return not any(isinstance(x, triton.runtime.JITFunction) for x in (triton.language.max, _jit().attention_kernel))


def _compute_type(dtype: torch.dtype) -> Any:
    """Triton's name of the type that products are taken in; its interpreter has no products of bfloat16."""
    import triton.language as tl

    return tl.float32 if dtype == torch.bfloat16 and _interpreted() else getattr(tl, COMPUTE_TYPES[dtype])


@cache
def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _is_float8(codes: Tensor | None) -> bool:
    return codes is not None and codes.dtype == torch.float8_e4m3fn


def _channels_together(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _strided(x: Tensor | None, count: int) -> tuple[Any, ...]:
    """A tensor and its first strides, but for that over parts of rows; float8 as bytes, since Triton then needs no
    float8 to move them."""
    if x is None:
        return (None, *[0] * count)
    strides = x.stride() if x.dim() <= count + 1 else x.stride()[:1] + x.stride()[2:]
    return (x.view(torch.uint8) if _is_float8(x) else x, *strides[:count])


def _rows_of(store: Tensor | None, rows: int) -> tuple[int, int]:
    """How many rows of each part of a store are at work, and how many rows a part has."""
    if store is None or store.dim() < 5:
        return rows, rows
    return store.shape[2], store.stride(1) // max(store.stride(2), 1)


def _lists(held: HeldTokens | None) -> tuple[Any, ...]:
    """Begins and counts with their strides, 0 where all rows read alike, the slots, and the biases."""
    if held is None:
        return None, 0, None, 0, None, None
    strides = [0 if len(held.begins_RH) == 1 else x.stride(0) for x in (held.begins_RH, held.counts_RH)]
    return held.begins_RH, strides[0], held.counts_RH, strides[1], held.slots_X, held.bias_X


def _padded(head_dim: int) -> int:
    """A power of two, and at least what products of Triton need."""
    return max(16, 1 << (head_dim - 1).bit_length())


class TritonAttention(AttentionKernel):
    """One fused kernel for all heads, which reads the arena where it is: for GPUs, and in the interpreter for tests."""

    name = "triton"

    def prepare(
        self, slots_of_head: IntArrays, bias_of_head: FloatArrays | None, shape: CallShape
    ) -> tuple[HeldTokens | None, HeldTokens | None]:
        """Lists of the uncoded slots and of the coded ones, None where no head reads any."""
        biases = bias_of_head or [np.zeros(len(slots)) for slots in slots_of_head]
        first, lists = self.store.uncoded_slots, []
        for coded in (False, True):
            chosen = [(slots >= first) == coded for slots in slots_of_head]
            counts = np.array([mine.sum() for mine in chosen])
            slots = np.concatenate([slots[mine] for slots, mine in zip(slots_of_head, chosen, strict=True)])
            bias = np.concatenate([x[mine] for x, mine in zip(biases, chosen, strict=True)])
            held = HeldTokens(
                self._on_device(slots - first * coded),
                self._on_device((counts.cumsum() - counts)[None]),
                self._on_device(counts[None]),
                self._on_device(bias, np.float32) if bias.any() else None,
            )
            lists.append(held if len(slots) else None)
        return lists[0], lists[1]

    def _on_device(self, array: NDArray[Any], kind: type[np.generic] = np.int32) -> Tensor:
        return torch.from_numpy(array.astype(kind)).to(self.store.device)

    def attend(
        self, q_RHND: Tensor, k_RHND: Tensor, v_RHND: Tensor, prepared: tuple[HeldTokens | None, HeldTokens | None]
    ) -> Tensor:
        if torch.is_grad_enabled() and any(x.requires_grad for x in (q_RHND, k_RHND, v_RHND)):
            raise PlanError(
                "attention kernel triton gives no gradients; draw under torch.inference_mode() or torch.no_grad(), or "
                'use attention="ragged"'
            )
        uncoded, coded = prepared
        return fused_attention(
            q_RHND,
            k_RHND,
            v_RHND,
            None if uncoded is None else (self.store.arena_2FBPD, uncoded),
            None if coded is None else (self.store.codes_2FBQD, self.store.scales_2FBQ, coded),
        )

    def prepare_kept(self, heads: Sequence[int], slots_KN: IntArray) -> tuple[Tensor, Tensor, bool]:
        coded = bool((slots_KN >= self.store.uncoded_slots).all())  # all are of one scale
        within = slots_KN - self.store.uncoded_slots * coded
        return self._on_device(np.array(heads)), self._on_device(within), coded

    def keep(self, k_RHND: Tensor, v_RHND: Tensor, prepared: tuple[Tensor, Tensor, bool]) -> None:
        heads_K, slots_KN, coded = prepared
        into = (self.store.codes_2FBQD, self.store.scales_2FBQ) if coded else (self.store.arena_2FBPD,)
        append_kept(k_RHND, v_RHND, heads_K, slots_KN, *into)
