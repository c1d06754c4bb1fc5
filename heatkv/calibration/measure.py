"""Measuring on a model how much every head looks back at every earlier scale.

The attention mass comes from the log-sum-exp of every source scale's logits, query block by query block and scale by
scale; a full query-by-key matrix never exists.
Shapes: R rows, B images (the conditional rows, which come first), H heads, N queries, M keys, D head size, S sources.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor
from torch.nn import functional as F

from heatkv.core.io import versions
from heatkv.core.plan import Plan
from heatkv.core.schema import FloatArray
from heatkv.core.statistics import Provenance, Statistics
from heatkv.engine.arena_cache import KVCache
from heatkv.engine.attention.grouped import HeadGroup
from heatkv.engine.steps import LayerStep
from heatkv.engine.watch import naming_samples
from heatkv.errors import NumericsError, PlanError
from heatkv.generation.loop import run_scales
from heatkv.models.base import ImageModel
from heatkv.models.sampling import CommonRandomSampler, Settings

MAX_BLOCK_NUMBERS = 1 << 22
"""Most numbers of one kind, such as logits, that exist at a time (16 MiB in fp32)."""

CONCENTRATION_QUERIES = 64
"""Queries of a scale, evenly spaced, that the concentration is measured on, at most."""

_FAR = 40.0  # in logits: e^-40 of a number does not show in its fp32 sum with it, and is far from underflow itself


@dataclass(frozen=True)
class SourceReads:
    """What a scale's queries read from every source, (B, H, S): sums over its queries, float64.

    `mass` is the share of the softmax. `drop_error`, measured where there is a factor F, is |F d|^2 with d the change
    of the head's output when that source alone is dropped; 0 for the running scale, which never is.
    """

    mass: Tensor
    drop_error: Tensor | None


def read_sources(
    q_BHND: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor] = (),
    factor_HDD: Tensor | None = None,
) -> SourceReads:
    """What each query reads from each source, measured block by block and source by source.

    `keys[s]` and `values[s]` are (B, H, M_s, D), the running scale last; q includes the softmax scale. Dropping source
    s moves a head's output from o to o_rest, the attention over the rest, so d = p_s (o_s - o_rest), p_s its mass.
    """
    batch, heads, queries, dim = q_BHND.shape
    count = len(keys)
    widest = max(max(k.shape[2] for k in keys), count * dim if factor_HDD is not None else 1)
    block = max(1, MAX_BLOCK_NUMBERS // (batch * heads * widest))
    mass = torch.zeros(batch, heads, count, dtype=torch.float64, device=q_BHND.device)
    error = torch.zeros_like(mass) if factor_HDD is not None else None
    with torch.autocast(q_BHND.device.type, enabled=False):  # it would round the logits
        transposed = [k.float().transpose(2, 3) for k in keys]
        # |F (V p)| = |(F V) p|: the factor is cheapest on the values
        whitened = [v.float() @ factor_HDD.transpose(1, 2) for v in values] if factor_HDD is not None else []
        for first in range(0, queries, block):
            q = q_BHND[:, :, first : first + block].float()
            highest, weights, sums = [], [], []
            for source, k in enumerate(transposed):
                logits = q @ k
                highest.append(logits.amax(dim=-1))
                scores = logits.sub_(highest[-1][..., None]).exp_()
                weights.append(scores.sum(dim=-1))
                if whitened:
                    sums.append(scores @ whitened[source])
            lse_BHNS = torch.stack(highest, dim=-1) + torch.stack(weights, dim=-1).log()
            p_BHNS = lse_BHNS.softmax(dim=-1)
            mass += p_BHNS.sum(dim=2, dtype=torch.float64)
            if error is not None and count > 1:
                outputs = [total.div_(weight[..., None]) for total, weight in zip(sums, weights, strict=True)]
                error += _drop_errors(lse_BHNS, p_BHNS, outputs)
    return SourceReads(mass, error)


def _drop_errors(lse_BHNS: Tensor, p_BHNS: Tensor, outputs: Sequence[Tensor]) -> Tensor:
    """Squared change of the output when one source is dropped, summed over queries, (B, H, S) float64.

    `outputs[s]` is the attention over source s alone, (B, H, N, D). What is left is added up from both sides of s
    and not taken as a difference, which would lose all digits where nearly all mass is on s.
    """
    # one source may lead by so much that the others' shares would be 0 in fp32; e^-_FAR is as good as 0 beside it
    second = lse_BHNS.topk(2, dim=-1).values[..., 1:]
    near = torch.minimum(lse_BHNS, second + _FAR)
    shares = (near - near.amax(dim=-1, keepdim=True)).exp()
    scaled = [output * share[..., None] for output, share in zip(outputs, shares.unbind(-1), strict=True)]
    after: list[tuple[Tensor, Tensor]] = [(scaled[-1], shares[..., -1])]
    for source in range(len(outputs) - 2, 0, -1):
        after.append((after[-1][0] + scaled[source], after[-1][1] + shares[..., source]))
    errors = []
    before: tuple[Tensor, Tensor] | None = None
    for source, output in enumerate(outputs[:-1]):
        rest, weight = after.pop()
        own = (scaled[source], shares[..., source])
        if before is not None:
            rest, weight = rest + before[0], weight + before[1]
            own = (before[0] + own[0], before[1] + own[1])
        before = own
        change = (output - rest / weight[..., None]).square_().sum(-1) * p_BHNS[..., source].square()
        errors.append(change.sum(2, dtype=torch.float64))
    return torch.stack([*errors, torch.zeros_like(errors[0])], dim=-1)


def concentration(q_BHND: Tensor, k_BHMD: Tensor) -> Tensor:
    """Variance over keys of the mean probability they receive, relative to the square of its mean, (B, H) float64.

    The mean is over at most CONCENTRATION_QUERIES queries, evenly spaced.
    """
    batch, heads, keys, _ = k_BHMD.shape
    q_BHND = q_BHND[:, :, :: -(-q_BHND.shape[2] // CONCENTRATION_QUERIES)]
    block = max(1, MAX_BLOCK_NUMBERS // (batch * heads * keys))
    received_BHM = torch.zeros(batch, heads, keys, dtype=torch.float64, device=k_BHMD.device)
    with torch.autocast(q_BHND.device.type, enabled=False):
        k_BHDM = k_BHMD.float().transpose(2, 3)
        for q in q_BHND.split(block, dim=2):
            received_BHM += (q.float() @ k_BHDM).softmax(dim=-1).sum(dim=2, dtype=torch.float64)
    received_BHM /= q_BHND.shape[2]
    return (received_BHM.square().sum(dim=-1) * k_BHMD.shape[2] - 1).clamp(min=0)


def similarity(
    before_BHMD: Tensor, now_BHND: Tensor, before: tuple[int, int, int], now: tuple[int, int, int]
) -> Tensor:
    """Cosine between the keys (or values) of a scale and those of the scale before, resized to its grid, (B, H)."""
    batch, heads, _, dim = now_BHND.shape
    frames, height, width = before
    grid = before_BHMD.float().transpose(2, 3).reshape(batch * heads * dim, frames, height, width)
    resized = F.interpolate(grid, size=now[1:], mode="bilinear", align_corners=False)
    if frames != now[0]:
        resized = resized.mean(dim=1, keepdim=True).expand(-1, now[0], -1, -1)
    resized_BHX = resized.reshape(batch, heads, -1)
    return F.cosine_similarity(resized_BHX, now_BHND.float().transpose(2, 3).reshape(batch, heads, -1), dim=-1)


class ObservingCache(KVCache):
    """A full cache that shows a subclass, before every attention, the keys and values of every source.

    The first `images` rows are the conditional ones. With `output_weights` (W_o of every head, one (H, C, D) per
    layer) `see` must be called for every layer before it attends. Raises PlanError when the plan drops anything, or for
    rows that are not whole images.
    """

    def __init__(
        self,
        plan: Plan,
        rows: int,
        images: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        key_angles: Sequence[Tensor] | None = None,
        *,
        output_weights: Sequence[Tensor] = (),
    ) -> None:
        self._check_plan(plan)
        if not 1 <= images <= rows or rows % images:
            raise PlanError(f"{images} images cannot be measured in {rows} rows")
        self.images = images
        # |W d| = |R d| with W = QR, and R is small
        self.factors = [torch.linalg.qr(weight.double()).R.float().to(device) for weight in output_weights]
        super().__init__(plan, rows, dtype, device, key_angles, attention="ragged")

    def _check_plan(self, plan: Plan) -> None:
        if not plan.had_no_effect():
            raise PlanError(f"the plan of policy {plan.policy!r} drops cells; attention is measured on the full cache")

    def reset(self) -> None:
        super().reset()
        self._relative_R: Tensor | None = None

    def see(self, layer: int, residual_RNC: Tensor, gate_R1C: Tensor) -> None:
        """Take the residual stream that enters the running layer, and its gate."""
        del layer
        size_R = residual_RNC.double().square().sum(-1).mean(-1)
        self._relative_R = gate_R1C.double().square().flatten(1).mean(-1) / size_R

    def relative(self) -> Tensor:
        """mean(gate^2) / mean |x|^2 of every row in the running layer, (R,) float64."""
        if self._relative_R is None:
            raise PlanError("the residual stream was not seen before attention; call see() for every layer")
        return self._relative_R

    def sources(self, target: int, layer: int, k_RHND: Tensor, v_RHND: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Keys and values of every source of `target`, those of the target itself last."""
        sizes = self.plan.schedule.tokens[:target]
        if not sizes:
            return [k_RHND], [v_RHND]
        # a full cache holds the same in every head, and groups of heads that are alike follow each other
        groups: Sequence[HeadGroup] = self._steps[target][layer].reads
        held = [self.store.read(group.places) for group in groups if group.places is not None]
        past_k, past_v = torch.cat(
            [x.unflatten(2, (group.size, -1)) for x, group in zip(held, groups, strict=True)], dim=2
        )
        return [*past_k.split(sizes, dim=2), k_RHND], [*past_v.split(sizes, dim=2), v_RHND]

    def sums(self) -> dict[str, FloatArray]:
        """Sums over the images since the last reset, by the names that statistics have for them."""
        raise NotImplementedError

    def observe(self, layer: int, q_RHND: Tensor, keys: list[Tensor], values: list[Tensor]) -> None:
        """Measure on the queries, and the keys and values (R, H, M, D) of every source, the running scale last."""
        raise NotImplementedError

    def _attention(self, layer: int, q_RHND: Tensor, k_RHND: Tensor, v_RHND: Tensor, step: LayerStep) -> Tensor:
        keys, values = self.sources(self.turn.target, layer, k_RHND, v_RHND)
        self.observe(layer, q_RHND, keys, values)
        self._relative_R = None
        return super()._attention(layer, q_RHND, k_RHND, v_RHND, step)


class MeasuringCache(ObservingCache):
    """Adds up what every head reads of every source scale.

    Sums over the images since the last reset, float64 (L, H, T, T): `mass_sum` and `mass_square_sum` of the conditional
    rows' mean attention mass, `all_mass_sum` of the mean over all rows, and, with output weights, `error_sum` of the
    squared output error of dropping the cell, relative to the residual stream that enters the layer: summed over
    queries, mean over rows. `concentration_sum` (L, H, T) and `similarity_sum` (L, T) are of the conditional rows.
    """

    def reset(self) -> None:
        super().reset()
        layers, heads, scales = self.plan.geometry.shape
        cells = ["mass_sum", "mass_square_sum", "all_mass_sum", *(["error_sum"] if self.factors else [])]
        self._sums: dict[str, FloatArray] = {name: np.zeros((layers, heads, scales, scales)) for name in cells}
        self._sums["concentration_sum"] = np.zeros((layers, heads, scales))
        self._sums["similarity_sum"] = np.zeros((layers, scales))

    def sums(self) -> dict[str, FloatArray]:
        return self._sums

    def _checked(self, what: str, layer: int, numbers_RHX: Tensor) -> Tensor:
        """Numbers measured on rows of the running layer, (rows, heads, ...), on the host.

        Raises NumericsError with the place of the first that is not finite.
        """
        numbers_RHX = numbers_RHX.cpu()
        if broken := (~numbers_RHX.isfinite()).nonzero().tolist():
            self.check(self.images)  # what it was measured from comes first
            row, head, *source = broken[0]
            of_source = f", source {source[0]}" if source else ""
            raise NumericsError(
                f"{what} of layer {layer}, head {head}, target scale {self.turn.target}{of_source}, image "
                f"{row % self.images} is not finite, though q, k and v are; the residual stream or the weights of the "
                "layer may not be, or overflowed: calibrate in float32",
                row % self.images,
            )
        return numbers_RHX

    def observe(self, layer: int, q_RHND: Tensor, keys: list[Tensor], values: list[Tensor]) -> None:
        halves, target, conditional = self.rows // self.images, self.turn.target, slice(self.images)
        reads = read_sources(q_RHND, keys, values, self.factors[layer] if self.factors else None)
        mass_RHS = self._checked("the attention mass", layer, reads.mass / q_RHND.shape[2])
        mass_IBHS = mass_RHS.unflatten(0, (halves, self.images)).numpy()
        k_BHMD = torch.cat([k[conditional] for k in keys], dim=2)
        uneven_BH = self._checked("the concentration", layer, concentration(q_RHND[conditional], k_BHMD))
        self._sums["concentration_sum"][layer, :, target] += uneven_BH.sum(dim=0).numpy()
        if target:
            sides = self.plan.schedule.scales[target - 1], self.plan.schedule.scales[target]
            pairs = [(x[target - 1][conditional], x[target][conditional]) for x in (keys, values)]
            alike = [self._checked("the similarity", layer, similarity(*pair, *sides)) for pair in pairs]
            self._sums["similarity_sum"][layer, target] += float(torch.stack(alike).mean(dim=(0, 2)).sum())
        cells = (layer, slice(None), target, slice(target + 1))
        self._sums["mass_sum"][cells] += mass_IBHS[0].sum(axis=0)
        self._sums["mass_square_sum"][cells] += (mass_IBHS[0] ** 2).sum(axis=0)
        self._sums["all_mass_sum"][cells] += mass_IBHS.mean(axis=0).sum(axis=0)
        if reads.drop_error is not None:
            error_RHS = self._checked("the drop error", layer, reads.drop_error * self.relative()[:, None, None])
            self._sums["error_sum"][cells] += error_RHS.sum(dim=0).numpy() / halves


def add_sums(sums: Mapping[str, FloatArray], more: Mapping[str, FloatArray]) -> dict[str, FloatArray]:
    """Entry by entry; nothing measured yet is an empty mapping."""
    return {name: array + sums[name] if sums else array for name, array in more.items()}


def measure_samples(
    model: ImageModel[Any], samples: range, *, seed: int = 0, settings: Settings | None = None
) -> Statistics:
    """Statistics of these samples of the seed, drawn together with the full cache.

    Raises ModelError for what the model cannot draw, NumericsError for numbers that are not finite, with their place.
    """
    settings = model.sampling if settings is None else settings
    labels = model.labels(len(samples), samples.start)
    names = sample_names(model, seed, labels, samples.start)
    cache = MeasuringCache(
        model.full_plan(), len(samples) * settings.rows_per_image, len(samples), model.compute_dtype, model.device,
        output_weights=output_weights(model),
    )  # fmt: skip
    with naming_samples(names), model.adapter.watching(cache.see):
        run_scales(model, labels, cache, CommonRandomSampler(seed, samples, settings), settings)
    return Statistics(
        model.geometry.schedule, provenance=provenance(model, settings, names), levels=None, **cache.sums()
    )


def output_weights(model: ImageModel[Any]) -> list[Tensor]:
    """W_o of every head, one (H, C, D) per layer."""
    return [model.adapter.output_weight(layer) for layer in range(model.geometry.layers)]


def provenance(model: ImageModel[Any], settings: Settings, samples: Iterable[str]) -> Provenance:
    """Where these samples are measured: the model, how it draws, and the versions on this machine."""
    cfg, others = measured_settings(settings, model)
    return Provenance(model.name, model.fingerprint, cfg, others, tuple(samples), versions())


def measured_settings(settings: Settings, model: ImageModel[Any]) -> tuple[float | None, dict[str, Any]]:
    """Guidance and all other settings, as statistics state them; guidance per scale stays among the others."""
    values = settings.to_json() | {"dtype": str(model.compute_dtype).removeprefix("torch.")}
    return (None if isinstance(values["cfg"], list) else values.pop("cfg")), values


def sample_names(model: ImageModel[Any], seed: int, labels: Sequence[Any], first: int) -> list[str]:
    """Names of the samples first, first + 1, ... drawn from `labels`: seed:index:label."""
    return [f"{seed}:{first + i}:{model.label_name(label)}" for i, label in enumerate(labels)]


def ranking_agreement(one: Statistics, other: Statistics) -> FloatArray:
    """Spearman correlation of the two S-CAS rankings of all heads, per source scale but the last."""
    return rank_correlation(one.scas, other.scas)


def rank_correlation(one_LHS: FloatArray, other_LHS: FloatArray) -> FloatArray:
    """Spearman correlation of two scores over all heads, per source scale but the last; NaN where one is constant."""
    correlations = []
    for scale in range(one_LHS.shape[2] - 1):
        one, other = one_LHS[:, :, scale].ravel(), other_LHS[:, :, scale].ravel()
        constant = np.ptp(one) == 0 or np.ptp(other) == 0
        correlations.append(np.nan if constant else stats.spearmanr(one, other).statistic)
    return np.array(correlations)
