"""Measuring images that are drawn already, layer by layer, so that only one layer's keys and values are ever held.

The codes of all scales are known, so all scales go through the blocks side by side, as in training, and the full
attention of a layer reads nothing but the keys and values of that layer.
Shapes: R rows, B images, H heads, N tokens of all scales, D head size, C width.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from heatkv.calibration.level_costs import ErrorCostCache
from heatkv.calibration.measure import MeasuringCache, ObservingCache, provenance
from heatkv.core.level_statistics import LevelStatistics
from heatkv.core.plan import Plan, keep_first
from heatkv.core.statistics import Statistics
from heatkv.engine.arena_cache import storage_bytes
from heatkv.models.base import ImageModel
from heatkv.models.sampling import Settings


class LayerByLayer(ObservingCache):
    """An observing cache without an arena that a layer calls once, with all scales one after another.

    `peak_bytes` is the most that was held at an attention: the residual stream, queries, keys, values and outputs.
    """

    def reset(self) -> None:
        super().reset()
        self.peak_bytes = 0

    def _check_plan(self, plan: Plan) -> None:
        """What is measured does not depend on the plan."""

    def see(self, layer: int, residual_RNC: Tensor, gate_R1C: Tensor) -> None:
        self._seen = residual_RNC, gate_R1C

    def attend(self, layer: int, q_RHND: Tensor, k_RHND: Tensor, v_RHND: Tensor) -> Tensor:
        """Attention of every scale over itself and all before it."""
        schedule, (residual_RNC, gate_R1C) = self.geometry.schedule, self._seen
        out_RHND = torch.empty_like(q_RHND)
        for target, (first, end) in enumerate(pairwise(schedule.offsets)):
            self.turn.target, sizes = target, schedule.tokens[: target + 1]
            q, k, v = q_RHND[:, :, first:end], k_RHND[:, :, :end], v_RHND[:, :, :end]
            self.watch.see(target, layer, q, k[:, :, first:], v[:, :, first:])
            super().see(layer, residual_RNC[:, first:end], gate_R1C)
            self.observe(layer, q, list(k.split(sizes, dim=2)), list(v.split(sizes, dim=2)))
            out_RHND[:, :, first:end] = F.scaled_dot_product_attention(q, k, v, scale=1.0)
        self.peak_bytes = max(self.peak_bytes, storage_bytes((residual_RNC, q_RHND, k_RHND, v_RHND, out_RHND)))
        del self._seen
        return out_RHND


class LayerMeasuringCache(LayerByLayer, MeasuringCache):
    """Adds up what MeasuringCache does."""


class LayerCostCache(LayerByLayer, ErrorCostCache):
    """Adds up what ErrorCostCache does."""


def run_layers(
    model: ImageModel[Any], labels: Sequence[Any], tokens: Sequence[Tensor], settings: Settings, cache: LayerByLayer
) -> None:
    """Show `cache` the attention of images with these codes, (B, N) per scale."""
    with torch.inference_mode(), model.adapter.watching(cache.see):
        model.begin(labels, settings).show(tokens, cache)


def held_bytes(model: ImageModel[Any], settings: Settings) -> int:
    """The most that measuring one image holds at an attention, whatever the plan.

    Of all tokens of one layer: the residual stream in fp32, and in the compute type the joint projection to queries,
    keys and values, queries and keys once rotated, queries once scaled, and the attention's output.
    """
    geometry, width = model.geometry, model.adapter.output_weight(0).shape[1]
    per_token = 4 * width + 7 * geometry.heads * geometry.head_dim * model.compute_dtype.itemsize
    return settings.rows_per_image * geometry.schedule.total_tokens * per_token


def measure_drawn(
    model: ImageModel[Any],
    labels: Sequence[Any],
    tokens: Sequence[Tensor],
    names: Sequence[str],
    settings: Settings | None = None,
    levels: LevelStatistics | None = None,
) -> tuple[Statistics, int]:
    """Statistics of images that were drawn with these codes, (B, N) per scale, and the most bytes held meanwhile.

    They are what `calibrate` measures where the full cache draws the same codes, up to rounding. `names` are what the
    samples are called; with `levels` the costs of the same choices are measured too, under the same biases, in a second
    pass. Those must be output errors: Fisher costs need gradients through all layers at once.
    """
    settings = model.sampling if settings is None else settings
    geometry, images = model.geometry, len(labels)
    weights = [model.adapter.output_weight(layer) for layer in range(geometry.layers)]
    empty = Plan("layer-by-layer", geometry, keep_first(geometry.shape, 0), 1.0, geometry.full_token_heads, 0)
    shape = (
        empty, images * settings.rows_per_image, images, model.compute_dtype, model.device, model.key_angles
    )  # fmt: skip
    cache = LayerMeasuringCache(*shape, output_weights=weights)
    run_layers(model, labels, tokens, settings, cache)
    costs = None
    if levels is not None:
        pricing = LayerCostCache(levels.choices, levels.log_bias, *shape, output_weights=weights)
        run_layers(model, labels, tokens, settings, pricing)
        costs = levels.with_sums(pricing.sums(), tuple(names))
    where = provenance(model, settings, names)
    return Statistics(geometry.schedule, provenance=where, levels=costs, **cache.sums()), cache.peak_bytes
