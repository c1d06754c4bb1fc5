"""Measuring what coarser cells cost: first the logit biases of pooled keys, then all combinations of levels under them.

Both passes draw with the full cache and work block by block of queries; a full query-by-key matrix never exists.
Shapes: B rows, H heads, N queries, M keys, D head size, V levels, I items, K combinations of levels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from heatkv.calibration.measure import MAX_BLOCK_NUMBERS, ObservingCache, output_weights, sample_names
from heatkv.core.level_statistics import LevelStatistics, calibrated_bias
from heatkv.core.levels import LEVELS, NONE, LevelChoices
from heatkv.core.schedule import ScaleSchedule
from heatkv.core.schema import FloatArray, float_array, whole
from heatkv.engine.attention.pooling import pooled_cells
from heatkv.engine.watch import naming_samples
from heatkv.errors import NumericsError, StatisticsError
from heatkv.generation.loop import run_scales
from heatkv.models.base import ImageModel
from heatkv.models.sampling import CommonRandomSampler, Settings

Cell = tuple[Tensor, Tensor, Tensor]
"""Keys and values of a source at a level, (B, H, M, D) fp32, and the bias of its logits, (H,)."""

_FAR = 30.0
"""In logits: e^-30 of a number does not show in its fp32 sum with it, and its square is far from underflow."""

_LEAST = 1e-15
"""The least weight of what is always held: where all else is dropped, its square must not be 0 in fp32."""


class LevelCache(ObservingCache):
    """What both passes share: the cells of every source, pooled to every level it may be held at."""

    def __init__(self, choices: LevelChoices, *arguments: Any, **options: Any) -> None:
        self.choices = choices
        super().__init__(*arguments, **options)

    def pooled(self, source: int, k_BHMD: Tensor, v_BHMD: Tensor) -> dict[int, tuple[Tensor, Tensor]]:
        """Keys and values of a source at its levels, by level index, fp32; NONE is left out."""
        angles = None if self.key_angles is None else self.key_angles[source]
        return {
            level: pooled_cells(k_BHMD, v_BHMD, self.plan.schedule.scales[source], LEVELS[level], angles)
            for level in self.choices.of_source(source)
            if level != NONE
        }

    def checked_sums(self, samples: Sequence[str]) -> dict[str, FloatArray]:
        """The sums over these samples. Raises NumericsError with the place of one that is not finite."""
        self.check(self.images)
        for name, array in self.sums().items():
            if broken := np.argwhere(~np.isfinite(array)).tolist():
                layer, head, *rest = broken[0]
                raise NumericsError(
                    f"level costs: {name} of layer {layer}, head {head} at {rest} is not finite, though q, k and v "
                    f"are, in one of the samples {samples[0]} to {samples[-1]}; the residual stream or the weights of "
                    "the layer may not be, or overflowed: calibrate in float32"
                )
        return self.sums()


class BiasCache(LevelCache):
    """First pass: attention mass on whole cells, and on their pooled keys without a bias, over all later queries.

    `whole` is (L, H, T) and `pooled_mass` (L, H, T, V), float64 sums over queries and rows, both relative to the full
    attention's denominator.
    """

    def reset(self) -> None:
        super().reset()
        shape = self.plan.geometry.shape
        self.whole: FloatArray = np.zeros(shape)
        self.pooled_mass: FloatArray = np.zeros((*shape, len(LEVELS)))

    def sums(self) -> dict[str, FloatArray]:
        return {"whole": self.whole, "pooled_mass": self.pooled_mass}

    def observe(self, layer: int, q_RHND: Tensor, keys: list[Tensor], values: list[Tensor]) -> None:
        target = self.turn.target
        levels = [self.pooled(source, keys[source], values[source]) for source in range(target)]
        widest = max(k.shape[2] for k in keys)
        for q in query_blocks(q_RHND, widest):
            lse_BHNS = torch.stack([torch.logsumexp(q @ k.float().transpose(2, 3), -1) for k in keys], dim=-1)
            total_BHN = torch.logsumexp(lse_BHNS, dim=-1)
            # in float64, since a rotated mean may lead by more than fp32 can hold
            shares = (lse_BHNS - total_BHN[..., None]).double().exp().sum(dim=(0, 2))
            self.whole[layer, :, :target] += shares[:, :target].cpu().numpy()
            for source, cells in enumerate(levels):
                for level, (k, _) in cells.items():
                    lse_BHN = torch.logsumexp(q @ k.transpose(2, 3), -1)
                    share = (lse_BHN - total_BHN).double().exp().sum(dim=(0, 2))
                    self.pooled_mass[layer, :, source, level] += share.cpu().numpy()


def query_blocks(q_RHND: Tensor, numbers_per_query: int) -> Iterator[Tensor]:
    """The queries in fp32, in blocks whose results have at most MAX_BLOCK_NUMBERS numbers."""
    rows, heads, queries, _ = q_RHND.shape
    block = max(1, MAX_BLOCK_NUMBERS // (rows * heads * numbers_per_query))
    with torch.autocast(q_RHND.device.type, enabled=False):  # it would round the logits
        for first in range(0, queries, block):
            yield q_RHND[:, :, first : first + block].float()


@dataclass(frozen=True)
class Items:
    """What a query may read, relative to the full attention with output o: for every source at every level its softmax
    weight w, (B, H, N, I), and moment n - w o, (B, H, N, I, D), with n the weighted sum of values.

    Item 0 is what is always whole. A combination changes the output by the sum of its items' moments over the sum of
    their weights.
    """

    weight: Tensor
    moment: Tensor


def _attention(q_BHND: Tensor, k_BHMD: Tensor, v_BHMD: Tensor) -> tuple[Tensor, Tensor]:
    """Log-sum-exp of the logits, (B, H, N), and the attention over these keys alone, (B, H, N, D)."""
    logits = q_BHND @ k_BHMD.transpose(2, 3)
    lse = torch.logsumexp(logits, dim=-1)
    return lse, logits.sub_(lse[..., None]).exp_() @ v_BHMD


def source_items(
    q_BHND: Tensor, cells: Sequence[Mapping[int, Cell]], chosen: Sequence[tuple[int, int]], fixed: Sequence[int]
) -> Items:
    """One item for the sources `fixed` together, then those of the (source, level) in `chosen`; `cells[s]` are the
    cells of source s by level."""
    wholes = [_attention(q_BHND, *levels[0][:2]) for levels in cells]
    lse, outputs = [lse for lse, _ in wholes], [output for _, output in wholes]
    # one source may lead by so much that the weights of all others would be 0
    far_BHN = torch.stack(lse).topk(2, dim=0).values[1] + _FAR
    lse = [torch.minimum(source, far_BHN) for source in lse]
    total_BHN = torch.logsumexp(torch.stack(lse), dim=0)
    weights = [(source - total_BHN).exp() for source in lse]
    out_BHND = torch.zeros_like(outputs[0])
    for weight, output in zip(weights, outputs, strict=True):
        out_BHND.addcmul_(weight[..., None], output)
    fixed_lse_BHN = torch.logsumexp(torch.stack([lse[source] for source in fixed]), dim=0)
    fixed_BHND = torch.zeros_like(out_BHND)
    for source in fixed:
        fixed_BHND.addcmul_((lse[source] - fixed_lse_BHN).exp_()[..., None], outputs[source])
    item_weights = [(fixed_lse_BHN - total_BHN).exp_().clamp_(min=_LEAST)]
    moments = [item_weights[0][..., None] * (fixed_BHND - out_BHND)]
    for source, level in chosen:
        weight, output = weights[source], outputs[source]
        if level != 0:
            k, v, bias_H = cells[source][level]
            of_level, output = _attention(q_BHND, k, v)
            shift = bias_H[None, :, None] - total_BHN
            weight = (of_level + shift).clamp_(max=_FAR).exp_()  # a mean may lead by even more
        item_weights.append(weight)
        moments.append(weight[..., None] * (output - out_BHND))
    return Items(torch.stack(item_weights, dim=-1), torch.stack(moments, dim=-2))


@dataclass(frozen=True)
class Combinations:
    """The items of a target, and which of them each combination holds: `holds` is (items, K) of 0 and 1.

    `pairs` maps the products of items i <= j to the squared sum of every combination, (pairs, K).
    """

    chosen: tuple[tuple[int, int], ...]
    fixed: tuple[int, ...]
    holds: Tensor
    pairs: Tensor

    @classmethod
    def for_target(cls, choices: LevelChoices, target: int, device: torch.device) -> Combinations:
        joint = choices.joint_sources(target)
        table = choices.combinations(target)
        chosen = tuple((source, level) for source in joint for level in choices.of_source(source) if level != NONE)
        held = [np.ones(len(table)), *(table[:, joint.index(source)] == level for source, level in chosen)]
        holds = torch.from_numpy(np.stack(held).astype(np.float32)).to(device)
        first, second = torch.triu_indices(len(holds), len(holds), device=device)
        twice = torch.where(first == second, 1.0, 2.0)[:, None]
        fixed = tuple(source for source in range(target + 1) if source not in joint)
        return cls(chosen, fixed, holds, holds[first] * holds[second] * twice)

    def items(self, q_BHND: Tensor, cells: Sequence[Mapping[int, Cell]]) -> Items:
        """The items of the target, for some of its queries."""
        return source_items(q_BHND, cells, self.chosen, self.fixed)

    def squared_changes(self, items: Items) -> Tensor:
        """|change of the output|^2 of every combination, summed over queries, (B, H, K) float64."""
        first, second = torch.triu_indices(len(self.holds), len(self.holds), device=items.weight.device)
        products_BHNI = (items.moment @ items.moment.transpose(-1, -2))[..., first, second]
        weight_BHNK = items.weight @ self.holds
        change = (products_BHNI @ self.pairs).div_(weight_BHNK.square_())
        change[..., 0] = 0  # all is whole; rounding may give another number
        return change.sum(dim=2).double().clamp_(min=0)

    def blocks(self, q_RHND: Tensor, cells: Sequence[Mapping[int, Cell]]) -> Iterator[Tensor]:
        """The queries in blocks, sized by the largest result of one query: its logits, its combinations, or the moments
        or products of its items, those of single changes included."""
        items, count = self.holds.shape
        items = max(items, len(cells) + len(LEVELS) * (len(self.fixed) - 1))
        widest = max(of_source[0][0].shape[2] for of_source in cells)
        return query_blocks(q_RHND, max(widest, count, items * max(items, cells[0][0][1].shape[-1])))


class LevelCostCache(LevelCache):
    """What second passes share: costs of every combination of levels under `log_bias`, summed over images.

    `joint[t]` is (L, H, combinations), `single` (L, H, T, T, V + 1).
    """

    def __init__(self, choices: LevelChoices, log_bias: FloatArray, *arguments: Any, **options: Any) -> None:
        self.log_bias = log_bias
        self._combinations: dict[int, Combinations] = {}
        super().__init__(choices, *arguments, **options)

    def reset(self) -> None:
        super().reset()
        layers, heads, scales = self.plan.geometry.shape
        targets = range(scales)
        self.joint = [np.zeros((layers, heads, int(np.prod(self.choices.shape(target))))) for target in targets]
        self.single: FloatArray = np.zeros((layers, heads, scales, scales, NONE + 1))

    def sums(self) -> dict[str, FloatArray]:
        return {"single_sum": self.single} | {f"joint_sum.{target}": joint for target, joint in enumerate(self.joint)}

    def combinations(self, target: int) -> Combinations:
        """The combinations of a target, made once."""
        if target not in self._combinations:
            self._combinations[target] = Combinations.for_target(self.choices, target, self.store.device)
        return self._combinations[target]

    def alone(self, target: int) -> list[tuple[int, int]]:
        """Every (source, level) of the sources that are not combined."""
        others = self.choices.other_sources(target)
        return [(source, level) for source in others for level in self.choices.of_other(source)]

    def cells(self, target: int, layer: int, keys: Sequence[Tensor], values: Sequence[Tensor]) -> list[dict[int, Cell]]:
        """Every source at its levels; sinks and the running scale only whole."""
        cells = []
        for source, (k, v) in enumerate(zip(keys, values, strict=True)):
            free = self.choices.sink_scales <= source < target
            pooled = self.pooled(source, k, v) if free else {0: (k.float(), v.float())}
            bias_HV = torch.tensor(self.log_bias[layer, :, source], dtype=torch.float32, device=k.device)
            cells.append({level: (*pair, bias_HV[:, level]) for level, pair in pooled.items()})
        return cells


CostCache = TypeVar("CostCache", bound=LevelCache)


class ErrorCostCache(LevelCostCache):
    """Second pass: the squared output error relative to the residual stream, summed over queries, mean over rows."""

    def observe(self, layer: int, q_RHND: Tensor, keys: list[Tensor], values: list[Tensor]) -> None:
        target, halves = self.turn.target, self.rows // self.images
        if target <= self.choices.sink_scales:
            return
        relative_R, factor = self.relative(), self.factors[layer]
        # |F (V p)| = |(F V) p|: the factor is cheapest on the values
        with torch.autocast(q_RHND.device.type, enabled=False):
            whitened = [v.float() @ factor.transpose(1, 2) for v in values]
        cells = self.cells(target, layer, keys, whitened)
        combinations, alone = self.combinations(target), self.alone(target)
        for q in combinations.blocks(q_RHND, cells):
            changes = combinations.squared_changes(combinations.items(q, cells))
            self.joint[target][layer] += _weighted(changes, relative_R) / halves
            for (source, level), change in single_changes(q, cells, alone):
                squared = change.square().sum(-1).sum(2, dtype=torch.float64)[..., None]
                self.single[layer, :, target, source, level] += _weighted(squared, relative_R)[:, 0] / halves


def single_changes(
    q_BHND: Tensor, cells: Sequence[Mapping[int, Cell]], alone: Sequence[tuple[int, int]]
) -> Iterator[tuple[tuple[int, int], Tensor]]:
    """Change of the output, (B, H, N, D), when one source is held at one level and all else whole, for the (source,
    level) in `alone`."""
    if not alone:
        return
    target = len(cells) - 1
    coarse = [cell for cell in alone if cell[1] not in (0, NONE)]
    items = source_items(q_BHND, cells, [*((source, 0) for source in range(target)), *coarse], (target,))
    sources = sorted({source for source, _ in alone})
    # what is left is added up and not taken as a difference, which would lose all digits where the source leads
    others = torch.ones(len(sources), target + 1, device=q_BHND.device)
    others[range(len(sources)), [1 + source for source in sources]] = 0
    weight_BHNS = items.weight[..., : target + 1] @ others.mT
    moment_BHNSD = others @ items.moment[..., : target + 1, :]
    for source, level in alone:
        if level == 0:
            continue
        weight, moment = weight_BHNS[..., sources.index(source)], moment_BHNSD[..., sources.index(source), :]
        if level != NONE:
            item = target + 1 + coarse.index((source, level))
            weight, moment = weight + items.weight[..., item], moment + items.moment[..., item, :]
        yield (source, level), moment / weight[..., None]


def _weighted(costs_BHK: Tensor, relative_B: Tensor) -> FloatArray:
    """Sum over rows, each with its weight, (H, K)."""
    return np.asarray((costs_BHK.double() * relative_B[:, None, None]).sum(dim=0).cpu().numpy())


@dataclass(frozen=True)
class LevelBatch:
    """Images that are drawn together with the full cache, to measure their levels."""

    model: ImageModel[Any]
    choices: LevelChoices
    samples: range
    seed: int
    settings: Settings

    @property
    def labels(self) -> Any:
        return self.model.labels(len(self.samples), self.samples.start)

    @property
    def names(self) -> list[str]:
        return sample_names(self.model, self.seed, self.labels, self.samples.start)

    @property
    def sampler(self) -> CommonRandomSampler:
        return CommonRandomSampler(self.seed, self.samples, self.settings)

    def cache(self, kind: type[CostCache], *log_bias: FloatArray, **options: Any) -> CostCache:
        """A full cache of this kind for these images."""
        model, count = self.model, len(self.samples)
        return kind(
            self.choices, *log_bias, model.full_plan(), count * self.settings.rows_per_image, count,
            model.compute_dtype, model.device, model.key_angles, **options,
        )  # fmt: skip

    def draw(self, cache: LevelCache) -> None:
        """Draw the images through the cache."""
        with self.model.adapter.watching(cache.see):
            run_scales(self.model, self.labels, cache, self.sampler, self.settings)


def measure_biases(
    model: ImageModel[Any], choices: LevelChoices, samples: range, *, seed: int = 0, settings: Settings | None = None
) -> FloatArray:
    """The logit bias of every pooled cell, (L, H, T, levels), from these samples of the seed, drawn together."""
    batch = LevelBatch(model, choices, samples, seed, model.sampling if settings is None else settings)
    cache = batch.cache(BiasCache)
    with naming_samples(batch.names):
        batch.draw(cache)
        sums = cache.checked_sums(batch.names)
    return calibrated_bias(choices.schedule, sums["whole"], sums["pooled_mass"])


def level_choices(schedule: ScaleSchedule, sink_scales: int) -> LevelChoices:
    """What plans may choose from when the first `sink_scales` scales stay whole. Raises StatisticsError."""
    return LevelChoices(schedule, whole(sink_scales, "sink_scales", StatisticsError, 0, len(schedule) - 1))


@dataclass(frozen=True)
class LevelMeasurement:
    """Measures one kind of level costs. `draw` returns the cache that has seen a batch under the biases; a batch has
    at most `batch` images in calibrations."""

    cost: str
    batch: int
    draw: Callable[[LevelBatch, FloatArray], LevelCostCache]

    def __call__(
        self,
        model: ImageModel[Any],
        choices: LevelChoices,
        log_bias: FloatArray,
        samples: range,
        *,
        seed: int = 0,
        settings: Settings | None = None,
    ) -> LevelStatistics:
        """Level costs of these samples of the seed, drawn together with the full cache, under the biases.

        Costs of disjoint samples under the same biases can be merged. Raises StatisticsError for biases of another
        shape, NumericsError for numbers that are not finite.
        """
        log_bias = float_array(log_bias, (*model.geometry.shape, len(LEVELS)), "log_bias", StatisticsError)
        batch = LevelBatch(model, choices, samples, seed, model.sampling if settings is None else settings)
        with naming_samples(batch.names):
            sums = self.draw(batch, log_bias).checked_sums(batch.names)
        joint = tuple(sums[f"joint_sum.{target}"] for target in range(len(choices.schedule)))
        return LevelStatistics(choices, self.cost, log_bias, joint, sums["single_sum"], tuple(batch.names), ())


def _draw_for_errors(batch: LevelBatch, log_bias: FloatArray) -> ErrorCostCache:
    cache = batch.cache(ErrorCostCache, log_bias, output_weights=output_weights(batch.model))
    batch.draw(cache)
    return cache


measure_errors = LevelMeasurement("error", 16, _draw_for_errors)
"""Measures squared output errors relative to the residual stream."""
