"""How many images run at once: through a scale, so that only these take memory beside the cache, and in a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from heatkv.core.schedule import ScaleSchedule
from heatkv.core.schema import whole
from heatkv.core.storage_type import StorageType
from heatkv.engine.spans import DECODE, span
from heatkv.engine.watch import is_deterministic
from heatkv.errors import ModelError
from heatkv.models.base import ImageModel

BUSY_TOKENS = {"cpu": 512, "cuda": 8192}
"""Tokens of all rows that keep a device busy; more at once are hardly faster. That of CUDA devices was not measured."""


def images_at_once(schedule: ScaleSchedule, batch: int, micro_batch: int) -> list[int]:
    """Images that run at once in every scale, so that none has more tokens than `micro_batch` images in the largest."""
    most = micro_batch * max(schedule.tokens)
    return [min(batch, most // tokens) for tokens in schedule.tokens]


def choose_micro_batch(model: ImageModel[Any], batch: int, rows_per_image: int, cache_bytes: int) -> int:
    """As many images as keep the device busy, or as free memory has room for beside the cache; at least 1."""
    tokens = rows_per_image * max(model.geometry.schedule.tokens)
    busy = -(-BUSY_TOKENS.get(model.device.type, BUSY_TOKENS["cpu"]) // tokens)
    return max(1, min(batch, busy, (free_bytes(model.device) - cache_bytes) // 2 // step_bytes(model, rows_per_image)))


def images_that_fit(model: ImageModel[Any], rows_per_image: int, most: int, cache_bytes: int | None = None) -> int:
    """How many images half of the device's memory has room for at once, from 1 to `most`, the same at any time: with
    caches of so many bytes each, or with the full cache, all through every scale together, as measuring draws them."""
    if cache_bytes is None:
        storage = str(StorageType.for_dtype(model.compute_dtype))
        cache_bytes = model.geometry.full_bytes(rows_per_image, storage) + step_bytes(model, rows_per_image)
    return max(1, min(most, _memory(model.device, "MemTotal") // 2 // max(cache_bytes, 1)))


def free_bytes(device: torch.device) -> int:
    """What is free on a device now; all that it has where the same bits are wanted every time."""
    return _memory(device, "MemTotal" if is_deterministic() else "MemAvailable")


def _memory(device: torch.device, name: str) -> int:
    """Bytes by Linux's name for them; on hosts that do not tell, as many as any model wants."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[name == "MemTotal"])
    with suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) << 10
    return 1 << 50


def step_bytes(model: ImageModel[Any], rows: int) -> int:
    """About what a step of the largest scale takes: residual stream, q, k, v, the widest layer and logits."""
    block, (choices, codes) = next(model.transformer.layers()), model.choices
    numbers: int = 8 * block.attention.proj.out_features + block.ffn.fc1.out_features + 3 * choices * codes
    return rows * max(model.geometry.schedule.tokens) * numbers * 4


def slices(decoder: Callable[[Tensor], Tensor], codes: Tensor, at_once: int) -> Iterator[Tensor]:
    """What a decoder makes of codes, `at_once` images at a time."""
    for first in range(0, len(codes), whole(at_once, "at_once", ModelError, 1)):
        with span(DECODE), torch.no_grad():
            pictures = decoder(codes[first : first + at_once])
        yield pictures


def joined(parts: Iterable[Tensor], count: int, progress: Callable[[int], object] | None = None) -> Tensor:
    """Parts of `count` images as they come, in one tensor from the first on, so that there is no second copy of all."""
    whole_BX, done = torch.empty(0), 0
    for part_BX in parts:
        if not done:
            whole_BX = part_BX.new_empty((count, *part_BX.shape[1:]))
        whole_BX[done : done + len(part_BX)] = part_BX
        done += len(part_BX)
        if progress is not None:
            progress(done)
    return whole_BX


def decode_in_slices(decoder: Callable[[Tensor], Tensor], codes: Tensor, at_once: int = 1) -> Tensor:
    """What a decoder makes of codes, `at_once` images at a time: with one image's maps in memory, not a batch's.

    `codes` are whatever the decoder takes, (B, ...). Raises ModelError for an `at_once` below 1.
    """
    return joined(slices(decoder, codes, at_once), len(codes))
