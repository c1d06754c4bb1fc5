"""A model of another repository with HeatKV under it: drawing under a plan, or measuring on the full cache.

While attached, each self-attention hands its queries, keys and values to one cache, and `kv_caching` says where an
image starts and ends; the module's own `cached_k` and `cached_v` stay empty. Shapes as in `heatkv.attachment.layer`.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Literal, Self

import torch
from torch import Tensor

from heatkv.attachment.discover import FoundModel
from heatkv.attachment.layer import Layer
from heatkv.calibration.level_costs import BiasCache, ErrorCostCache, level_choices
from heatkv.calibration.measure import MeasuringCache, ObservingCache, add_sums
from heatkv.core.io import versions
from heatkv.core.level_statistics import LevelStatistics, calibrated_bias
from heatkv.core.plan import CachePlan, Plan
from heatkv.core.schema import FloatArray
from heatkv.core.statistics import Provenance, Statistics
from heatkv.engine.arena_cache import ArenaCache
from heatkv.engine.open_cache import open_cache
from heatkv.engine.turns import Turn
from heatkv.errors import ModelError, StatisticsError
from heatkv.models.infinity import rotation_angles

Kind = Literal["mass", "biases", "levels"]


class Attached:
    """A model with HeatKV under it, inside the `with` block of `attach`.

    `plan` is what is kept. `cache` holds it from the first image on, for as long as this object lives; its
    `allocated_bytes` are real. The model's calls raise ModelError for what HeatKV cannot compute, and PlanError for
    another schedule, order or number of rows than the plan's, and NumericsError when their images are done, or as the
    block ends with an error, where these were made of numbers that are not finite.
    """

    def __init__(
        self, found: FoundModel, plan: CachePlan, guided: bool, code: str | None = None, attention: str = "auto",
    ) -> None:  # fmt: skip
        self.plan, self._found, self._guided = plan, found, guided
        self._code, self._attention = code, attention
        self._layers = [Layer(self, i, where, module) for i, (where, module) in enumerate(found.attentions)]
        self.key_angles: tuple[Tensor, ...] | None = None
        if self._layers[0].brings_schedule:  # Infinity, which rotates its keys
            scales, head_dim = range(len(plan.schedule)), plan.geometry.head_dim
            self.key_angles = tuple(rotation_angles(plan.schedule, scale, head_dim) for scale in scales)
        self.pooled_angles = self.key_angles if isinstance(plan, Plan) and plan.coarse else None
        self._cache: ArenaCache | None = None
        self._undo: ExitStack | None = None
        self.begin()

    @property
    def cache(self) -> ArenaCache:
        """The cache of the latest images. Raises ModelError before the first ones."""
        if self._cache is None:
            raise ModelError("there is no cache before the model has drawn its first scale; draw an image first")
        return self._cache

    def __enter__(self) -> Self:
        if self._undo is not None:
            raise ModelError("this attachment is in use already; attach again for another one")
        with ExitStack() as undo:
            for layer in self._layers:
                layer.put_on(undo)
            self._watch(undo)
            self._undo = undo.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._undo is not None
        self._undo.close()
        self._undo = None
        if isinstance(error, RuntimeError | ValueError):  # such as a sampler's, which does not know why
            self._check_numbers()

    # ------------------------------------------------------------------ what the layers call

    def begin(self) -> None:
        """Expect new images; their rows are known when the first scale arrives."""
        self.turn = Turn(self.plan.geometry)

    def attend(self, layer: int, x_RNC: Tensor, q_RHND: Tensor, k_RHND: Tensor, v_RHND: Tensor) -> Tensor:
        """Attention over what the plan keeps, (R, H, N, D)."""
        if not self.turn.rows:
            self._prepare(v_RHND.shape[0], v_RHND.dtype, v_RHND.device)
        self._see_input(layer, x_RNC)
        out_RHND = self.cache.attend(layer, q_RHND, k_RHND, v_RHND)
        if self.turn.done:
            self._finish()
        return out_RHND

    def _prepare(self, rows: int, dtype: torch.dtype, device: torch.device) -> None:
        """A cache at its start for the rows that arrived, the same as before where it fits."""
        old = self._cache
        if old is None or (old.rows, old.store.dtype, old.store.device) != (rows, dtype, device):
            self._cache = old = None  # frees the old arena first
            # a tensor made in inference mode could not be written to outside of it, by the next image
            with torch.inference_mode(False):
                self._cache = self._open(rows, dtype, device)
        self.cache.reset()
        self.turn = self.cache.turn

    def _open(self, rows: int, dtype: torch.dtype, device: torch.device) -> ArenaCache:
        query_weight = self._found.adapter.query_weight
        return open_cache(self.plan, rows, dtype, device, self.key_angles, query_weight, self._code, self._attention)

    def _watch(self, undo: ExitStack) -> None:
        """Look at more of the model than its self-attention, until `undo` closes."""

    def _see_input(self, layer: int, x_RNC: Tensor) -> None:
        """Tell the cache what the coming queries, keys and values are made from."""
        self.cache.see_input(layer, x_RNC)

    def _finish(self) -> None:
        """All scales of some images are drawn."""
        self._check_numbers()

    def _check_numbers(self) -> None:
        """Raise NumericsError when queries, keys or values of these images were not finite; it waits for the device."""
        if rows := self.turn.rows:
            self.cache.check(rows // 2 if self._guided and rows % 2 == 0 else rows)


class Measurement(Attached):
    """A model that draws with the full cache, inside the `with` block of `measure`, and what was measured meanwhile.

    Everything is over all images drawn to their last scale so far. `plan` is the full one, and `cache` as in Attached.
    `numbering` is the seed that names the samples, and the number of the first one.
    """

    def __init__(
        self, found: FoundModel, plan: Plan, guided: bool, kind: Kind, log_bias: FloatArray | None, sink_scales: int,
        numbering: tuple[int, int],
    ) -> None:  # fmt: skip
        super().__init__(found, plan, guided)
        self._full_plan, self._kind, self._log_bias = plan, kind, log_bias
        self._choices = level_choices(plan.schedule, sink_scales)
        self._numbering, self._images = numbering, 0
        self._fingerprint = found.fingerprint()
        self._sums: dict[str, FloatArray] = {}

    def statistics(self, *, cfg: float | None = None, settings: Mapping[str, Any] | None = None) -> Statistics:
        """What `heatkv.calibrate` returns, for kind "mass".

        `cfg` and `settings` (such as top_k) say how the images were drawn; HeatKV cannot see that, but statistics
        that differ in it are not merged. Samples are named seed:index:- with the index from `first_sample` on.
        Raises StatisticsError when nothing was measured.
        """
        sums, samples = self._measured("mass")
        drawn = {"guided": self._guided, **(settings or {})}
        provenance = Provenance(self._found.name, self._fingerprint, cfg, drawn, samples, versions())
        return Statistics(self.plan.schedule, provenance=provenance, levels=None, **sums)

    def log_bias(self) -> FloatArray:
        """Logit biases of pooled cells, (L, H, T, levels), for kind "biases": what level costs are measured under.

        Raises StatisticsError when nothing was measured.
        """
        sums, _ = self._measured("biases")
        return calibrated_bias(self.plan.schedule, sums["whole"], sums["pooled_mass"])

    def level_statistics(self) -> LevelStatistics:
        """Level costs, for kind "levels", to be put beside the statistics with `statistics.with_levels(...)`.

        Raises StatisticsError when nothing was measured.
        """
        sums, samples = self._measured("levels")
        assert self._log_bias is not None
        joint = tuple(sums[f"joint_sum.{target}"] for target in range(len(self.plan.schedule)))
        return LevelStatistics(self._choices, "error", self._log_bias, joint, sums["single_sum"], samples, ())

    def _measured(self, kind: Kind) -> tuple[dict[str, FloatArray], tuple[str, ...]]:
        """The sums and the names of the samples."""
        if self._kind != kind:
            raise StatisticsError(f"{self._kind} is measured here; for this, use heatkv.measure(model, {kind!r})")
        if not self._sums:
            raise StatisticsError("no image was drawn to its last scale yet; draw at least 1")
        seed, first = self._numbering
        return self._sums, tuple(f"{seed}:{index}:-" for index in range(first, first + self._images))

    # ------------------------------------------------------------------ what is other than under a plan

    def _open(self, rows: int, dtype: torch.dtype, device: torch.device) -> ObservingCache:
        if self._guided and rows % 2:
            raise StatisticsError(f"{rows} rows are not two halves, conditional first; measure with guided=False")
        images = rows // 2 if self._guided else rows
        shape = (self._full_plan, rows, images, dtype, device, self.key_angles)
        if self._kind == "biases":
            return BiasCache(self._choices, *shape)
        adapter = self._found.adapter
        weights = [adapter.output_weight(layer) for layer in range(len(self._layers))] if self._found.gated else []
        if self._log_bias is not None:
            return ErrorCostCache(self._choices, self._log_bias, *shape, output_weights=weights)
        return MeasuringCache(*shape, output_weights=weights)

    def _watch(self, undo: ExitStack) -> None:
        if self._found.gated:
            undo.enter_context(self._found.adapter.watching(self._see_block))

    def _see_block(self, layer: int, residual_RNC: Tensor, gate_R1C: Tensor) -> None:
        """Keep what enters a block until its attention comes to the cache, which may only be made then. Raises
        StatisticsError for halves that are not those of VAR's guidance, whose second one has a single condition; that
        of Infinity follows from the length of each prompt."""
        self._entering = layer, residual_RNC, gate_R1C
        other_R1C = gate_R1C[len(gate_R1C) // 2 :]
        single = self._guided and not self._layers[0].brings_schedule
        if single and layer == self.turn.target == 0 and not torch.allclose(other_R1C, other_R1C[:1], rtol=1e-2):
            raise StatisticsError(
                "the second half of the rows has several conditions, where guidance has one; measure with guided=False"
            )

    def _see_input(self, layer: int, x_RNC: Tensor) -> None:
        if self._found.gated:
            assert isinstance(self.cache, ObservingCache)
            self.cache.see(*self._entering)

    def _finish(self) -> None:
        super()._finish()
        assert isinstance(self.cache, ObservingCache)
        self._images += self.cache.images
        self._sums = add_sums(self._sums, self.cache.sums())
