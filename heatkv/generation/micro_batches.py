"""How many images of a batch run through a scale at once, so that only these take memory beside the cache."""

from __future__ import annotations

from typing import Any

import torch

from heatkv.core.schedule import ScaleSchedule
from heatkv.models.base import ImageModel

BUSY_TOKENS = {"cpu": 512, "cuda": 8192}
"""Tokens of all rows that keep a device busy; more at once are hardly faster. That of CUDA devices was not measured."""
SHARE_OF_CACHE = 8
"""A step may take this part of the cache's bytes without being what memory goes to."""


def images_at_once(schedule: ScaleSchedule, batch: int, micro_batch: int) -> list[int]:
    """Images that run at once in every scale, so that none has more tokens than `micro_batch` images in the largest."""
    most = micro_batch * max(schedule.tokens)
    return [min(batch, most // tokens) for tokens in schedule.tokens]


def choose_micro_batch(model: ImageModel[Any], batch: int, rows_per_image: int, cache_bytes: int) -> int:
    """As many images as keep the device busy or take little beside the cache, and fit in free memory; at least 1."""
    tokens = rows_per_image * max(model.geometry.schedule.tokens)
    busy = -(-BUSY_TOKENS.get(model.device.type, BUSY_TOKENS["cpu"]) // tokens)
    each = step_bytes(model, rows_per_image)
    chosen = max(busy, cache_bytes // SHARE_OF_CACHE // each)
    if model.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(model.device)
        chosen = min(chosen, (free - cache_bytes) // 2 // each)
    return max(1, min(batch, chosen))


def step_bytes(model: ImageModel[Any], rows: int) -> int:
    """About what a step of the largest scale takes beside the cache: the residual stream, q, k and v, the widest layer
    and the logits, with what is made of each."""
    transformer, (choices, codes) = model.transformer, model.choices
    block = next(transformer.layers())
    width, hidden = block.attention.proj.out_features, block.ffn.fc1.out_features
    numbers = 8 * width + hidden + 3 * choices * codes
    return rows * max(model.geometry.schedule.tokens) * numbers * 4
