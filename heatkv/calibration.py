"""Measuring on a model how much every head looks back at every earlier scale.

The attention mass comes from the log-sum-exp of every source scale's logits, query block by query block and scale by
scale; a full query-by-key matrix never exists.
Shapes: R rows, B images (the conditional rows, which come first), H heads, N queries, M keys, D head size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

from heatkv.cache import KVCache, LayerStep
from heatkv.errors import PlanError, StatisticsError
from heatkv.generation import run_scales
from heatkv.models.base import ImageModel
from heatkv.plan import Plan
from heatkv.sampling import CommonRandomSampler, Settings
from heatkv.statistics import Provenance, Statistics
from heatkv.versions import versions

MAX_BLOCK_LOGITS = 1 << 22
"""Most logits that exist at a time (16 MiB in fp32)."""


def scale_masses(q_BHND: Tensor, keys: list[Tensor]) -> Tensor:
    """Share of every query's softmax that falls on each source, mean over queries: (B, H, sources), float64.

    `keys[s]` is (B, H, M_s, D) and q carries the softmax scale; each query's shares sum to one.
    """
    batch, heads, queries, _ = q_BHND.shape
    widest = max(k.shape[2] for k in keys)
    block = max(1, MAX_BLOCK_LOGITS // (batch * heads * widest))
    total = torch.zeros(batch, heads, len(keys), dtype=torch.float64, device=q_BHND.device)
    transposed = [k.float().transpose(2, 3) for k in keys]
    with torch.autocast(q_BHND.device.type, enabled=False):  # it would round the logits
        for first in range(0, queries, block):
            q = q_BHND[:, :, first : first + block].float()
            lse_BHNS = torch.stack([torch.logsumexp(q @ k, dim=-1) for k in transposed], dim=-1)
            total += lse_BHNS.softmax(dim=-1).sum(dim=2, dtype=torch.float64)
    return total / queries


class MeasuringCache(KVCache):
    """A full cache that also adds up the attention mass of its first `images` rows, the conditional ones.

    `mass_sum` and `mass_square_sum` are float64 (L, H, T, T) sums over the images drawn since the last reset.
    Raises PlanError when the plan drops anything, or for more images than rows.
    """

    def __init__(
        self,
        plan: Plan,
        rows: int,
        images: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        if not plan.had_no_effect():
            raise PlanError(f"the plan of policy {plan.policy!r} drops cells; attention is measured on the full cache")
        if not 1 <= images <= rows:
            raise PlanError(f"{images} images cannot be measured in {rows} rows")
        self.images = images
        super().__init__(plan, rows, dtype, device)

    def reset(self) -> None:
        super().reset()
        geometry = self.plan.geometry
        shape = (geometry.layers, geometry.heads, len(geometry.schedule), len(geometry.schedule))
        self.mass_sum: NDArray[np.float64] = np.zeros(shape)
        self.mass_square_sum: NDArray[np.float64] = np.zeros(shape)

    def _attention(self, layer: int, q_RHND: Tensor, k_RHND: Tensor, v_RHND: Tensor, step: LayerStep) -> Tensor:
        (group,) = step.groups  # a full cache holds the same in every head
        target, images = self._target, self.images
        sizes = self.plan.schedule.tokens[:target]
        held = self.arena_2RPD[0, :images].index_select(1, group.slots_GM.flatten())
        past = held.view(images, k_RHND.shape[1], -1, k_RHND.shape[3]).split(sizes, dim=2) if sizes else ()
        mass_BHS = scale_masses(q_RHND[:images], [*past, k_RHND[:images]]).cpu().numpy()
        self.mass_sum[layer, :, target, : target + 1] += mass_BHS.sum(axis=0)
        self.mass_square_sum[layer, :, target, : target + 1] += (mass_BHS**2).sum(axis=0)
        return super()._attention(layer, q_RHND, k_RHND, v_RHND, step)


def calibrate(
    model: ImageModel[Any],
    samples: int,
    *,
    seed: int = 0,
    first_sample: int = 0,
    batch: int = 16,
    settings: Settings | None = None,
    progress: Callable[[int], None] | None = None,
) -> Statistics:
    """Statistics over `samples` images of all classes in turn, drawn with the full cache.

    `first_sample` numbers the first one, so that disjoint sets can be measured and merged. Raises StatisticsError
    for fewer than one sample.
    """
    if samples < 1:
        raise StatisticsError(f"{samples} samples say nothing; calibrate with at least 1")
    settings = settings if settings is not None else model.sampling
    mass_sum, mass_square_sum = None, None
    names: list[str] = []
    for start in range(first_sample, first_sample + samples, batch):
        count = min(batch, first_sample + samples - start)
        labels = model.labels(count, start)
        rows = count * settings.rows_per_image
        cache = MeasuringCache(model.plan(), rows, count, model.compute_dtype, model.device)
        sampler = CommonRandomSampler(seed, range(start, start + count), settings)
        run_scales(model, labels, cache, sampler, settings, decode=False)
        mass_sum = cache.mass_sum if mass_sum is None else mass_sum + cache.mass_sum
        mass_square_sum = cache.mass_square_sum if mass_square_sum is None else mass_square_sum + cache.mass_square_sum
        names += sample_names(model, seed, labels, start)
        if progress is not None:
            progress(len(names))
    assert mass_sum is not None
    assert mass_square_sum is not None
    cfg, told = told_settings(settings, model)
    provenance = Provenance(
        model=model.name,
        fingerprint=model.fingerprint,
        cfg=cfg,
        settings=told,
        samples=tuple(names),
        versions=versions(),
    )
    return Statistics(model.geometry.schedule, mass_sum, mass_square_sum, provenance)


def told_settings(settings: Settings, model: ImageModel[Any]) -> tuple[float | None, dict[str, Any]]:
    """Guidance and what else was measured with, as statistics state it; guidance per scale stays among the others."""
    told = settings.to_json() | {"dtype": str(model.compute_dtype).removeprefix("torch.")}
    return (None if isinstance(told["cfg"], list) else told.pop("cfg")), told


def sample_names(model: ImageModel[Any], seed: int, labels: Sequence[Any], first: int) -> list[str]:
    """Names of the samples first, first + 1, ... drawn from `labels`: seed:index:label."""
    return [f"{seed}:{first + i}:{model.label_name(label)}" for i, label in enumerate(labels)]


def ranking_agreement(one: Statistics, other: Statistics) -> NDArray[np.float64]:
    """Spearman correlation of the two S-CAS rankings of all heads, per source scale but the last."""
    pairs = one.layers * one.heads
    first, second = one.scas.reshape(pairs, -1), other.scas.reshape(pairs, -1)
    return np.array([stats.spearmanr(first[:, s], second[:, s]).statistic for s in range(first.shape[1] - 1)])
