"""Measuring what coarser cells cost: first the logit biases of pooled keys, then all combinations of levels under them.

Both passes draw with the full cache and work block by block of queries; a full query-by-key matrix never exists.
Shapes: B rows, H heads, N queries, D head size, V levels, A and C combinations of two groups of sources.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from heatkv.attention.pooling import pooled_cells
from heatkv.calibration import MAX_BLOCK_NUMBERS, ObservingCache, sample_names
from heatkv.errors import StatisticsError
from heatkv.generation import run_scales
from heatkv.level_statistics import LevelStatistics, calibrated_bias
from heatkv.levels import LEVELS, NONE, LevelChoices
from heatkv.models.base import ImageModel
from heatkv.sampling import CommonRandomSampler, Settings

FloatArray = NDArray[np.float64]


class LevelCache(ObservingCache):
    """What both passes need: the cells of every source, pooled to every level it may be held at."""

    def __init__(self, choices: LevelChoices, *arguments: Any, **named: Any) -> None:
        self.choices = choices
        super().__init__(*arguments, **named)

    def pooled(self, source: int, k_BHMD: Tensor, v_BHMD: Tensor) -> dict[int, tuple[Tensor, Tensor]]:
        """Keys and values of a source at its levels, by level index, fp32; NONE is left out."""
        angles = None if self.key_angles is None else self.key_angles[source]
        return {
            level: pooled_cells(k_BHMD, v_BHMD, self.plan.schedule.scales[source], LEVELS[level], angles)
            for level in self.choices.of_source(source)
            if level != NONE
        }


class BiasCache(LevelCache):
    """First pass: attention mass on whole cells, and on their pooled keys without a bias, over all later queries.

    `whole` is (L, H, T) and `pooled_mass` (L, H, T, V), float64 sums over queries and rows, both relative to the full
    attention's denominator.
    """

    def reset(self) -> None:
        super().reset()
        geometry = self.plan.geometry
        shape = (geometry.layers, geometry.heads, len(geometry.schedule))
        self.whole: FloatArray = np.zeros(shape)
        self.pooled_mass: FloatArray = np.zeros((*shape, len(LEVELS)))

    def observe(self, layer: int, q_RHND: Tensor, keys: list[Tensor], values: list[Tensor]) -> None:
        target = self._target
        levels = [self.pooled(source, keys[source], values[source]) for source in range(target)]
        widest = max(k.shape[2] for k in keys)
        for q in query_blocks(q_RHND, widest):
            lse_BHNS = torch.stack([torch.logsumexp(q @ k.float().transpose(2, 3), -1) for k in keys], dim=-1)
            total_BHN = torch.logsumexp(lse_BHNS, dim=-1)
            shares = (lse_BHNS - total_BHN[..., None]).exp().sum(dim=(0, 2), dtype=torch.float64)
            self.whole[layer, :, :target] += shares[:, :target].cpu().numpy()
            for source, cells in enumerate(levels):
                for level, (k, _) in cells.items():
                    lse_BHN = torch.logsumexp(q @ k.transpose(2, 3), -1)
                    share = (lse_BHN - total_BHN).exp().sum(dim=(0, 2), dtype=torch.float64)
                    self.pooled_mass[layer, :, source, level] += share.cpu().numpy()


def query_blocks(q_RHND: Tensor, numbers_per_query: int) -> Iterator[Tensor]:
    """The queries in fp32, so many at a time that none of their results is large."""
    rows, heads, queries, _ = q_RHND.shape
    block = max(1, MAX_BLOCK_NUMBERS // (rows * heads * numbers_per_query))
    with torch.autocast(q_RHND.device.type, enabled=False):  # it would round the logits
        for first in range(0, queries, block):
            yield q_RHND[:, :, first : first + block].float()


@dataclass(frozen=True)
class Item:
    """A source at one level as one query sees it: softmax weight w (B, H, N) and N - w o (B, H, N, D), relative to the
    full attention with output o. Sums of items over a combination give the change of the output: sum / sum of w."""

    weight: Tensor
    moment: Tensor


def source_items(
    q_BHND: Tensor, cells: Sequence[dict[int, tuple[Tensor, Tensor]]], biases: Sequence[dict[int, Tensor]]
) -> list[dict[int, Item]]:
    """The items of every source and level, the running scale last; `biases[s][level]` is (H,)."""
    lse, outputs = [], []
    for levels in cells:
        k, v = levels[0]
        logits = q_BHND @ k.transpose(2, 3)
        lse.append(torch.logsumexp(logits, dim=-1))
        outputs.append(logits.sub_(lse[-1][..., None]).exp_() @ v)
    total_BHN = torch.logsumexp(torch.stack(lse), dim=0)
    weights = [(source - total_BHN).exp() for source in lse]
    out_BHND = torch.stack([w[..., None] * o for w, o in zip(weights, outputs, strict=True)]).sum(0)
    items = []
    for levels, bias, weight, output in zip(cells, biases, weights, outputs, strict=True):
        found = {0: Item(weight, weight[..., None] * (output - out_BHND))}
        for level, (k, v) in levels.items():
            if level == 0:
                continue
            scores = (q_BHND @ k.transpose(2, 3)).add_(bias[level][None, :, None, None] - total_BHN[..., None]).exp_()
            mass = scores.sum(dim=-1)
            found[level] = Item(mass, scores @ v - mass[..., None] * out_BHND)
        items.append(found)
    return items


def combine(groups: Sequence[Sequence[Item]], base: Item | None = None) -> Item:
    """All combinations of one item from every group, added up: weight (B, H, N, A), moment (B, H, N, A, D); the last
    group's changes fastest."""
    weight = None if base is None else base.weight[..., None]
    moment = None if base is None else base.moment[..., None, :]
    for group in groups:
        w = torch.stack([item.weight for item in group], dim=-1)
        m = torch.stack([item.moment for item in group], dim=-2)
        weight = w if weight is None else (weight[..., :, None] + w[..., None, :]).flatten(-2)
        moment = m if moment is None else (moment[..., :, None, :] + m[..., None, :, :]).flatten(-3, -2)
    assert weight is not None
    assert moment is not None
    return Item(weight, moment)


def _added(items: Sequence[Item]) -> Item:
    return Item(
        torch.stack([item.weight for item in items]).sum(0), torch.stack([item.moment for item in items]).sum(0)
    )


class ErrorCostCache(LevelCache):
    """Second pass: the relative squared output error of every combination of levels, under the given biases.

    `joint[t]` is (L, H, combinations), `single` (L, H, T, T, V + 1): sums over queries and images, mean over rows.
    """

    def __init__(self, choices: LevelChoices, log_bias: FloatArray, *arguments: Any, **named: Any) -> None:
        self.log_bias = log_bias
        super().__init__(choices, *arguments, **named)

    def reset(self) -> None:
        super().reset()
        geometry = self.plan.geometry
        self.joint, self.single = empty_costs(geometry.layers, geometry.heads, self.choices)

    def observe(self, layer: int, q_RHND: Tensor, keys: list[Tensor], values: list[Tensor]) -> None:
        target, halves = self._target, self.rows // self.images
        if target <= self.choices.sink_scales:
            return
        relative_R, factor = self.relative(), self.factors[layer]
        # |F (V p)| = |(F V) p|: the factor is cheapest on the values
        whitened = [v.float() @ factor.transpose(1, 2) for v in values]
        cells, biases = self.cells_and_biases(layer, keys, whitened)
        others = self.choices.other_sources(target)
        for q in query_blocks(q_RHND, numbers_per_query(self.choices, target, cells)):
            items = source_items(q, cells, biases)
            costs = _squared_changes(*two_groups(self.choices, target, items))
            self.joint[target][layer] += _weighted(costs, relative_R) / halves
            for source in others:
                whole = items[source][0]
                for level in self.choices.of_other(source)[1:]:
                    held = items[source].get(level)
                    weight = -whole.weight if held is None else held.weight - whole.weight
                    moment = -whole.moment if held is None else held.moment - whole.moment
                    change = moment.square().sum(-1) / (1 + weight).clamp(min=1e-6).square()
                    self.single[layer, :, target, source, level] += (
                        _weighted(change.sum(2, dtype=torch.float64)[..., None], relative_R)[:, 0] / halves
                    )

    def cells_and_biases(
        self, layer: int, keys: Sequence[Tensor], values: Sequence[Tensor]
    ) -> tuple[list[dict[int, tuple[Tensor, Tensor]]], list[dict[int, Tensor]]]:
        """Every source at its levels, sinks and the running scale whole, with the bias of every level, (H,)."""
        cells, biases = [], []
        for source, (k, v) in enumerate(zip(keys, values, strict=True)):
            free = self.choices.sink_scales <= source < self._target
            cells.append(self.pooled(source, k, v) if free else {0: (k.float(), v.float())})
            bias = self.log_bias[layer, :, source]
            biases.append({level: torch.from_numpy(bias[:, level]).to(k.device).float() for level in cells[-1]})
        return cells, biases


def empty_costs(layers: int, heads: int, choices: LevelChoices) -> tuple[list[FloatArray], FloatArray]:
    """Zeros for the joint costs of every target, and for single costs."""
    scales = len(choices.schedule)
    joint = [np.zeros((layers, heads, int(np.prod(choices.shape(target))))) for target in range(scales)]
    return joint, np.zeros((layers, heads, scales, scales, NONE + 1))


def numbers_per_query(choices: LevelChoices, target: int, cells: Sequence[dict[int, tuple[Tensor, Tensor]]]) -> int:
    """The largest result of one query: its logits, or its combinations, or the moments of half of them."""
    shape, dim = choices.shape(target), cells[0][0][1].shape[-1]
    cut = (len(shape) + 1) // 2
    widest = max(levels[0][0].shape[2] for levels in cells)
    halves = max(int(np.prod(shape[:cut])), int(np.prod(shape[cut:])))
    return max(widest, int(np.prod(shape)), halves * dim, sum(map(len, cells)) * dim)


def two_groups(choices: LevelChoices, target: int, items: Sequence[dict[int, Item]]) -> tuple[Item, Item]:
    """The combinations of the first half of the joint sources, with all that is whole, and of the second half."""
    joint = choices.joint_sources(target)
    fixed = [items[source][0] for source in range(len(items)) if source not in joint]
    dropped = Item(torch.zeros_like(fixed[0].weight), torch.zeros_like(fixed[0].moment))
    groups = [[items[source].get(level, dropped) for level in choices.of_source(source)] for source in joint]
    cut = (len(groups) + 1) // 2
    second = combine(groups[cut:]) if groups[cut:] else combine([[dropped]])
    return combine(groups[:cut], base=_added(fixed)), second


def _squared_changes(first: Item, second: Item) -> Tensor:
    """|change|^2 of the output for all combinations of both groups, summed over queries, (B, H, A * C) float64."""
    # |a + c|^2 as one product: (2a, |a|^2, 1) . (c, 1, |c|^2)
    ones_A, ones_C = torch.ones_like(first.weight), torch.ones_like(second.weight)
    squares_A, squares_C = first.moment.square().sum(-1), second.moment.square().sum(-1)
    left = torch.cat([2 * first.moment, squares_A[..., None], ones_A[..., None]], dim=-1)
    right = torch.cat([second.moment, ones_C[..., None], squares_C[..., None]], dim=-1)
    change = left @ right.transpose(-1, -2)
    weight = first.weight[..., :, None] + second.weight[..., None, :]
    return change.div_(weight.square_()).sum(dim=2, dtype=torch.float64).clamp_(min=0).flatten(-2)


def _weighted(costs_BHK: Tensor, relative_B: Tensor) -> FloatArray:
    """Sum over rows, each with its weight, (H, K)."""
    return np.asarray((costs_BHK.double() * relative_B[:, None, None]).sum(dim=0).cpu().numpy())


def _batches(first: int, samples: int, batch: int) -> Iterator[range]:
    for start in range(first, first + samples, batch):
        yield range(start, min(start + batch, first + samples))


def calibrate_biases(
    model: ImageModel[Any],
    choices: LevelChoices,
    samples: int = 16,
    *,
    seed: int = 0,
    batch: int = 16,
    settings: Settings | None = None,
    progress: Callable[[int], None] | None = None,
) -> FloatArray:
    """The logit bias of every pooled cell, (L, H, T, levels), from samples 0, 1, ... of the seed."""
    settings = settings if settings is not None else model.sampling
    whole: FloatArray | None = None
    pooled: FloatArray | None = None
    for indices in _batches(0, samples, batch):
        rows = len(indices) * settings.rows_per_image
        cache = BiasCache(
            choices, model.plan(), rows, len(indices), model.compute_dtype, model.device, model.key_angles
        )
        labels, sampler = model.labels(len(indices), indices.start), CommonRandomSampler(seed, indices, settings)
        run_scales(model, labels, cache, sampler, settings, decode=False)
        whole = cache.whole if whole is None else whole + cache.whole
        pooled = cache.pooled_mass if pooled is None else pooled + cache.pooled_mass
        if progress is not None:
            progress(len(indices))
    if whole is None or pooled is None:
        raise StatisticsError(f"{samples} samples say nothing; calibrate with at least 1")
    return calibrated_bias(choices.schedule, whole, pooled)


def calibrate_levels(
    model: ImageModel[Any],
    samples: int = 32,
    *,
    log_bias: FloatArray | None = None,
    bias_samples: int = 16,
    sink_scales: int = 2,
    seed: int = 0,
    first_sample: int = 0,
    batch: int = 16,
    settings: Settings | None = None,
    progress: Callable[[int], None] | None = None,
) -> LevelStatistics:
    """Level costs over `samples` images drawn with the full cache, under `log_bias` or biases measured first.

    `first_sample` numbers the first one, so that disjoint sets can be measured under the same biases and merged.
    """
    settings = settings if settings is not None else model.sampling
    if samples < 1:
        raise StatisticsError(f"{samples} samples say nothing; calibrate with at least 1")
    geometry = model.geometry
    choices = LevelChoices(geometry.schedule, sink_scales)
    of_bias: tuple[str, ...] = ()
    if log_bias is None:
        log_bias = calibrate_biases(
            model, choices, bias_samples, seed=seed, batch=batch, settings=settings, progress=progress
        )
        of_bias = tuple(sample_names(model, seed, model.labels(bias_samples, 0), 0))
    weights = [model.adapter.output_weight(layer) for layer in range(geometry.layers)]
    joint, single = empty_costs(geometry.layers, geometry.heads, choices)
    names: list[str] = []
    for indices in _batches(first_sample, samples, batch):
        count = len(indices)
        cache = ErrorCostCache(
            choices, log_bias, model.plan(), count * settings.rows_per_image, count, model.compute_dtype, model.device,
            model.key_angles, output_weights=weights,
        )  # fmt: skip
        labels, sampler = model.labels(count, indices.start), CommonRandomSampler(seed, indices, settings)
        with model.adapter.watching(cache.see):
            run_scales(model, labels, cache, sampler, settings, decode=False)
        joint = [total + part for total, part in zip(joint, cache.joint, strict=True)]
        single = single + cache.single
        names += sample_names(model, seed, labels, indices.start)
        if progress is not None:
            progress(count)
    return LevelStatistics(choices, "error", log_bias, tuple(joint), single, tuple(names), of_bias)
