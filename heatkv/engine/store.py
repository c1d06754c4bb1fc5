"""Where keys and values lie: the slots of the arena, in the compute type or as 8-bit codes with their scales.

Slots count through: first the uncoded ones, then the coded ones. A coded key or value is code * scale, with one scale
per slot and row, so that a token can be read, moved and dropped by itself.
Shapes: R rows, F parts of the rows (a conditional and an unconditional half), B images, P uncoded slots, Q coded slots,
M tokens that are read or written, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from heatkv.core.schema import IntArray, shown
from heatkv.core.storage_type import CODES, torch_dtype
from heatkv.engine.turns import Rows
from heatkv.errors import PlanError

LARGEST_CODE = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


def encode(x_RMD: Tensor, code: torch.dtype) -> tuple[Tensor, Tensor]:
    """Codes, (..., M, D) of type `code`, and scales, (..., M) bfloat16.

    The largest number of a token becomes the largest code.
    """
    x_RMD, largest = x_RMD.float(), LARGEST_CODE[code]
    scales = (x_RMD.abs().amax(dim=-1) / largest).to(torch.bfloat16)
    scales = scales.masked_fill(scales == 0, 1)
    codes = x_RMD / scales.float()[..., None]
    codes = codes.round_() if code is torch.int8 else codes
    return codes.clamp_(-largest, largest).to(code), scales


def decode(codes_RMD: Tensor, scales_RM: Tensor, dtype: torch.dtype) -> Tensor:
    """What codes stand for, (..., M, D)."""
    x_RMD = codes_RMD.float() * scales_RM.float()[..., None]
    if dtype is torch.float16:  # a scale that was rounded up may lead beyond its largest number
        largest = torch.finfo(dtype).max
        x_RMD = x_RMD.clamp_(-largest, largest)
    return x_RMD.to(dtype)


@dataclass(frozen=True)
class Places:
    """Slots to read or write in an order of their own: which of the M tokens are in which part, and where there.

    A part that holds none of them is None; `at` is None where a part holds all of them.
    """

    count: int
    uncoded: Tensor | None
    coded: Tensor | None
    uncoded_at: Tensor | None = None
    coded_at: Tensor | None = None

    @property
    def slots(self) -> Tensor:
        """Where there are any and all are in one part: their slots there."""
        slots = self.uncoded if self.coded is None else self.coded
        assert slots is not None
        return slots


class Store:
    """The buffers of one cache for all layers: keys at index 0 and values at 1, for `rows` rows.

    `arena_2RPD` is of the compute type. `code` is "int8" or "fp8" for codes in all slots but the first
    `uncoded_slots`; without one, `codes_2RQD` and `scales_2RQ` have no slots. What is read and written are the rows at
    work: all, until `serve` says which.
    """

    def __init__(
        self,
        rows: int,
        slots: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        code: str | None = None,
        uncoded_slots: int = 0,
    ) -> None:
        self.dtype, self.device, self.head_dim = dtype, device, head_dim
        self.code = None if code is None else torch_dtype(code)
        self.uncoded_slots = slots if code is None else uncoded_slots
        coded_slots = slots - self.uncoded_slots
        self.arena_2RPD = torch.empty((2, rows, self.uncoded_slots, head_dim), dtype=dtype, device=device)
        self.codes_2RQD = torch.empty(
            (2, rows, coded_slots, head_dim), dtype=torch.int8 if self.code is None else self.code, device=device
        )
        self.scales_2RQ = torch.empty((2, rows, coded_slots), dtype=torch.bfloat16, device=device)
        self.serve(Rows(1, 0, rows))

    def serve(self, rows: Rows) -> None:
        """Read and write these rows from now on."""
        self.rows = rows
        self.arena_2FBPD, self.codes_2FBQD, self.scales_2FBQ = (rows.of(x, 1) for x in self.buffers)

    def row_numbers(self) -> Tensor:
        """Which of all rows are at work."""
        return self.rows.of(torch.arange(self.arena_2RPD.shape[1], device=self.device), 0).flatten()

    @property
    def buffers(self) -> tuple[Tensor, ...]:
        """All that is held."""
        return self.arena_2RPD, self.codes_2RQD, self.scales_2RQ

    def spoil(self) -> None:
        """Fill everything with what is no number: what is read before it is written shows."""
        self.arena_2RPD.fill_(torch.nan)
        _bits(self.codes_2RQD).fill_(1)
        self.scales_2RQ.fill_(torch.nan)

    def places(self, slots: IntArray, writing: bool = False) -> Places:
        """These slots, in this order, to read, or to write: torch wants wider numbers for that."""
        kind, first = np.int64 if writing else np.int32, slots < self.uncoded_slots

        def part(chosen: NDArray[np.bool_], offset: int) -> tuple[Tensor | None, Tensor | None]:
            if not chosen.any():
                return None, None
            within, at = (slots[chosen] - offset).astype(kind), np.flatnonzero(chosen)
            return torch.from_numpy(within).to(self.device), (
                None if chosen.all() else torch.from_numpy(at).to(self.device)
            )

        (uncoded, uncoded_at), (coded, coded_at) = part(first, 0), part(~first, self.uncoded_slots)
        return Places(len(slots), uncoded, coded, uncoded_at, coded_at)

    def read(self, places: Places) -> Tensor:
        """Keys and values at `places`, (2, R, M, D) of the compute type, a copy."""
        parts = []
        if places.uncoded is not None:
            parts.append((self.arena_2FBPD.index_select(3, places.uncoded).flatten(1, 2), places.uncoded_at))
        if places.coded is not None:
            codes = _bits(self.codes_2FBQD).index_select(3, places.coded).view(self.codes_2RQD.dtype)
            scales = self.scales_2FBQ.index_select(3, places.coded)
            parts.append((decode(codes, scales, self.dtype).flatten(1, 2), places.coded_at))
        if len(parts) == 1:
            return parts[0][0]
        out = self.arena_2RPD.new_empty((2, len(self.rows), places.count, self.head_dim))
        for x, at in parts:
            assert at is not None
            out.index_copy_(2, at, x)
        return out

    def read_rows(self, slots_RM: Tensor) -> Tensor:
        """As `read`, where every row has its own slots, and all slots of the store are coded, or none is."""
        slots_BM, rows_R = slots_RM.repeat(2, 1), self.row_numbers()
        rows_B = torch.cat([rows_R, rows_R + self.arena_2RPD.shape[1]])
        if self.code is None:
            k_or_v_BMD = rows_at(self.arena_2RPD.flatten(0, 1), slots_BM, rows_B)
            return k_or_v_BMD.view(2, *slots_RM.shape, self.head_dim)
        codes = rows_at(_bits(self.codes_2RQD).flatten(0, 1), slots_BM, rows_B).view(self.code)
        scales = rows_at(self.scales_2RQ.flatten(0, 1)[..., None], slots_BM, rows_B)[..., 0]
        return decode(codes, scales, self.dtype).view(2, *slots_RM.shape, self.head_dim)

    def write(self, places: Places, k_RMD: Tensor, v_RMD: Tensor) -> None:
        """Put keys and values, coded where that part of the arena is."""
        for index, x_RMD in enumerate((k_RMD, v_RMD)):
            if places.uncoded is not None:
                x = x_RMD if places.uncoded_at is None else x_RMD.index_select(1, places.uncoded_at)
                x_FBMD = x.to(self.dtype).unflatten(0, (self.rows.parts, -1))
                self.arena_2FBPD[index].index_copy_(2, places.uncoded, x_FBMD)
            if places.coded is not None:
                x = x_RMD if places.coded_at is None else x_RMD.index_select(1, places.coded_at)
                codes, scales = encode(x.unflatten(0, (self.rows.parts, -1)), self.codes_2RQD.dtype)
                _bits(self.codes_2FBQD[index]).index_copy_(2, places.coded, _bits(codes))
                self.scales_2FBQ[index].index_copy_(2, places.coded, scales)


def rows_at(x_ACX: Tensor, at_BM: Tensor, rows_B: Tensor | None = None) -> Tensor:
    """x[rows[b], at[b, m]], (B, M, X), where rows are 0, 1, ... by default; whole rows are copied, which `gather`
    would do number by number."""
    number, count, width = x_ACX.shape
    rows_B = torch.arange(number, device=at_BM.device) if rows_B is None else rows_B
    flat = at_BM + count * rows_B[:, None]
    return x_ACX.reshape(number * count, width).index_select(0, flat.flatten()).view(*at_BM.shape, width)


def _bits(codes: Tensor) -> Tensor:
    """As a type that can be indexed everywhere."""
    return codes.view(torch.int8)


def available_codes(device: torch.device) -> tuple[str, ...]:
    """The codes that the device has."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        return ("int8",)
    return ("int8",) if device.type == "mps" else tuple(CODES)


def check_code(code: str | None, device: torch.device) -> None:
    """Raise PlanError for an unknown code, or one that the device does not have."""
    if code is not None and code not in CODES:
        raise PlanError(f"unknown storage {shown(code)}; known: {', '.join(CODES)}, or none for the compute type")
    if code is not None and code not in available_codes(device):
        raise PlanError(f"storage {code} needs a CPU, or a GPU of compute capability 8.9; use int8 on {device}")
