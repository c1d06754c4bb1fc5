"""Repairing what a plan costs without keeping more: small corrections of attention outputs, fitted under the plan.

For every (layer, head, target) that reads a reduced cell, a constant, or a linear map of [o, q, 1], o being the output
under the plan, is added to o. It is fitted by ridge regression to the full cache's output, in the order in which layers
run, so that later ones see what earlier ones repaired. Parameters take memory like a cache does, once per model.
Shapes: R rows, H heads, N queries, D head size, F features (1, or 2 D + 1).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor

from heatkv.core.plan import CachePlan, Plan
from heatkv.core.schema import of_kind, shown, whole
from heatkv.core.storage_type import StorageType
from heatkv.engine.arena_cache import KVCache, LayerStep
from heatkv.errors import PlanError, PolicyError
from heatkv.models.base import ImageModel, checked_run
from heatkv.models.sampling import CommonRandomSampler, Settings

KINDS = ("constant", "linear")
RIDGE = 0.01
"""Of the mean diagonal of the features' covariance."""


@dataclass(frozen=True)
class Correction:
    """The correction of some heads of one layer for one target: weight (heads, F, D)."""

    heads: Tensor
    weight_HFD: Tensor

    def apply(self, kind: str, q_RHND: Tensor, out_RHND: Tensor) -> Tensor:
        """The corrected output."""
        features = _features(kind, q_RHND.index_select(1, self.heads), out_RHND.index_select(1, self.heads))
        change = features @ self.weight_HFD.to(features.dtype)
        return out_RHND.index_add(1, self.heads, change.expand(-1, -1, out_RHND.shape[2], -1).to(out_RHND.dtype))


@dataclass(frozen=True)
class Compensation:
    """Corrections by (target, layer); what is not listed reads whole cells only."""

    kind: Literal["constant", "linear"]
    corrections: dict[tuple[int, int], Correction]

    @property
    def parameters(self) -> int:
        return sum(correction.weight_HFD.numel() for correction in self.corrections.values())

    @property
    def bytes(self) -> int:
        """What the parameters take, whatever the number of images."""
        return sum(c.weight_HFD.numel() * c.weight_HFD.element_size() for c in self.corrections.values())

    def apply(self, target: int, layer: int, q_RHND: Tensor, out_RHND: Tensor) -> Tensor:
        found = self.corrections.get((target, layer))
        return out_RHND if found is None else found.apply(self.kind, q_RHND, out_RHND)


def _features(kind: str, q_RHND: Tensor, out_RHND: Tensor) -> Tensor:
    """(R, H, N, F), or (R, H, 1, 1) for a constant, which is the same for every query."""
    if kind == "constant":
        return torch.ones_like(out_RHND[:, :, :1, :1])
    return torch.cat([out_RHND, q_RHND, torch.ones_like(out_RHND[..., :1])], dim=-1)


def fit_correction(kind: str, q_RHND: Tensor, out_RHND: Tensor, wanted_RHND: Tensor, heads: Tensor) -> Correction:
    """Ridge regression of what is missing in these heads, in float64, over all rows and queries."""
    q, out, wanted = (x.index_select(1, heads).double() for x in (q_RHND, out_RHND, wanted_RHND))
    missing_HMD = (wanted - out).transpose(0, 1).flatten(1, 2)
    if kind == "constant":
        return Correction(heads, missing_HMD.mean(dim=1, keepdim=True).to(out_RHND.dtype))
    features_HMF = _features(kind, q, out).transpose(0, 1).flatten(1, 2)
    count = features_HMF.shape[1]
    covariance_HFF = features_HMF.transpose(1, 2) @ features_HMF / count
    diagonal = covariance_HFF.diagonal(dim1=1, dim2=2).mean(dim=1)
    ridge = torch.eye(covariance_HFF.shape[1], dtype=torch.float64, device=q.device) * (RIDGE * diagonal)[:, None, None]
    products_HFD = features_HMF.transpose(1, 2) @ missing_HMD / count
    return Correction(heads, torch.linalg.solve(covariance_HFF + ridge, products_HFD).to(out_RHND.dtype))


class _Recording(KVCache):
    """A full cache that keeps the attention outputs of the running scale."""

    outputs: list[Tensor]

    def _attention(self, layer: int, q_RHND: Tensor, k_RHND: Tensor, v_RHND: Tensor, step: LayerStep) -> Tensor:
        out = super()._attention(layer, q_RHND, k_RHND, v_RHND, step)
        if layer == 0:
            self.outputs = []
        self.outputs.append(out)
        return out


class _Fitting(KVCache):
    """A cache under the plan that fits every correction just before it applies it."""

    wanted: list[Tensor]

    def __init__(self, kind: str, *arguments: Any) -> None:
        self.kind, self.corrections = kind, dict[tuple[int, int], Correction]()
        super().__init__(*arguments)

    def _attention(self, layer: int, q_RHND: Tensor, k_RHND: Tensor, v_RHND: Tensor, step: LayerStep) -> Tensor:
        out = super()._attention(layer, q_RHND, k_RHND, v_RHND, step)
        reduced = (self.plan.level_read(self._target)[layer] > 0).any(axis=1)
        if not reduced.any():
            return out
        heads = torch.from_numpy(reduced.nonzero()[0]).to(out.device)
        found = fit_correction(self.kind, q_RHND, out, self.wanted[layer], heads)
        self.corrections[self._target, layer] = found
        return found.apply(self.kind, q_RHND, out)


def fit_compensation(
    model: ImageModel[Any],
    plan: Plan,
    kind: Literal["constant", "linear"],
    samples: int = 32,
    *,
    seed: int = 0,
    settings: Settings | None = None,
    progress: Callable[[int], None] | None = None,
) -> Compensation:
    """Fit the corrections of a plan on images that the full cache draws; all of them run at once, scale by scale.

    `progress` is told of every scale that is done. Raises PolicyError for an unknown kind or fewer than one sample,
    PlanError for a plan of another model.
    """
    seed, _, _, settings = checked_run(model, seed, 0, 1, settings, progress)
    of_kind(plan, Plan, "plan", PlanError, "make one with model.plan, or load one with Plan.load")
    plan.check_geometry(model.geometry)
    samples = whole(samples, "samples", PolicyError, 1)
    if kind not in KINDS:
        raise PolicyError(f"compensation={kind!r} is unknown; known: {', '.join(KINDS)}")
    labels, rows = model.labels(samples), samples * settings.rows_per_image
    full = _Recording(model.full_plan(), rows, model.compute_dtype, model.device, model.key_angles)
    fitting = _Fitting(kind, plan, rows, model.compute_dtype, model.device, model.key_angles)
    sampler = CommonRandomSampler(seed, range(samples), settings)
    with torch.inference_mode():
        drawing, repaired = model.begin(labels, settings), model.begin(labels, settings)
        for scale in range(len(model.geometry.schedule)):
            chosen = sampler.choose(scale, drawing.logits(full))
            fitting.wanted = full.outputs
            repaired.logits(fitting)
            drawing.accept(chosen)
            repaired.accept(chosen)  # teacher-forced
            if progress is not None:
                progress(1)
    return Compensation(kind, fitting.corrections)


def kind_of(plan: CachePlan) -> Literal["constant", "linear"] | None:
    """The kind of corrections that the plan's settings ask for. Raises PolicyError for an unknown one, PlanError for
    what is no plan."""
    of_kind(plan, CachePlan, "plan", PlanError, "make one with model.plan, or load one with load_plan")
    kind = plan.settings.get("compensation")
    if kind in (None, "none") or not isinstance(plan, Plan):  # only static plans are corrected
        return None
    if kind not in KINDS:
        raise PolicyError(f"compensation={shown(kind)} in the plan's settings is unknown; known: {', '.join(KINDS)}")
    return cast(Literal["constant", "linear"], kind)


def compensation_bytes(plan: CachePlan, storage: str) -> int:
    """What the parameters of the plan's corrections take in this storage type; 0 for a plan without."""
    kind = kind_of(plan)
    if kind is None:
        return 0
    assert isinstance(plan, Plan)
    dim = plan.geometry.head_dim
    corrected = sum(int((plan.level_read(t) > 0).any(axis=2).sum()) for t in range(len(plan.schedule)))
    return corrected * dim * (1 if kind == "constant" else 2 * dim + 1) * StorageType.parse(storage).compute_bytes // 2


def compensation_of(
    model: ImageModel[Any],
    plan: CachePlan,
    *,
    seed: int = 0,
    settings: Settings | None = None,
    progress: Callable[[int], None] | None = None,
) -> Compensation | None:
    """The corrections that the plan's settings ask for, fitted now; None for a plan without."""
    kind = kind_of(plan)
    if kind is None:
        return None
    assert isinstance(plan, Plan)
    return fit_compensation(model, plan, kind, seed=seed, settings=settings, progress=progress)
