"""Putting HeatKV under a VAR or Infinity from somebody else's repository, without importing it.

The self-attention modules are found by their attributes. While attached, each module's `forward` hands its queries,
keys and values to one KVCache, and its `kv_caching` says where an image starts and ends; its own `cached_k` and
`cached_v` stay empty. The original methods come back when the block ends, also after an error.

Shapes: R rows (images, doubled by guidance), N tokens of the running scale, C width, H heads, D head size.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from types import TracebackType
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from heatkv.calibration.level_costs import BiasCache, ErrorCostCache, level_choices
from heatkv.calibration.measure import MeasuringCache, ObservingCache, add_sums
from heatkv.core.budget import Budget
from heatkv.core.geometry import CacheGeometry
from heatkv.core.io import versions
from heatkv.core.levels import LEVELS, SINK_SCALES
from heatkv.core.plan import CachePlan, Plan
from heatkv.core.schedule import ScaleSchedule
from heatkv.core.schema import shown, whole
from heatkv.core.statistics import LevelStatistics, Provenance, Statistics, calibrated_bias
from heatkv.core.storage_type import StorageType
from heatkv.engine.arena_cache import ArenaCache
from heatkv.engine.attention.rotary import rotate, rotation_of
from heatkv.engine.open_cache import check_cache, open_cache
from heatkv.engine.store import check_code
from heatkv.errors import BudgetError, ModelError, PlanError, PolicyError, ScheduleError, StatisticsError
from heatkv.models.adapter import BlockView, ModelAdapter
from heatkv.models.base import fingerprint
from heatkv.models.infinity import rotation_angles
from heatkv.policies.base import PlanningProblem, make_policy

FloatArray = NDArray[np.float64]
Measured = Literal["mass", "biases", "levels"]

_PLACES = "model.unregistered_blocks[i], model.block_chunks[a].module[b] and model.blocks[i]"
_NEEDED = (
    "num_heads", "head_dim", "scale", "mat_qkv", "q_bias", "v_bias", "zero_k_bias", "proj", "proj_drop", "kv_caching",
)  # fmt: skip
_NORM_FLAGS = ("attn_l2_norm", "cos_attn")
_NORM_NEEDED = ("scale_mul_1H11", "max_scale_mul")
_KNOWN_TENSORS = {"q_bias", "v_bias", "zero_k_bias", "scale_mul_1H11"}
_KNOWN_PARTS = {"mat_qkv", "proj", "proj_drop"}
_KNOWN_ARGUMENTS = {"attn_fn", "scale_schedule", "rope2d_freqs_grid", "scale_ind"}


# ------------------------------------------------------------------------------------------- finding the modules


def _listed(value: Any) -> list[Any]:
    """The items of a list or ModuleList, none for anything else."""
    return list(value) if isinstance(value, list | tuple | nn.ModuleList | nn.Sequential) else []


def _blocks(model: Any) -> Iterator[tuple[str, Any]]:
    """Every block in order, with the name to tell the user."""
    if blocks := _listed(getattr(model, "unregistered_blocks", None)):
        yield from ((f"unregistered_blocks[{i}]", block) for i, block in enumerate(blocks))
    elif chunks := _listed(getattr(model, "block_chunks", None)):
        for a, chunk in enumerate(chunks):
            inside = _listed(getattr(chunk, "module", None))
            if not inside:
                raise ModelError(f"block_chunks[{a}] of {type(model).__name__} has no list of blocks named `module`")
            yield from ((f"block_chunks[{a}].module[{b}]", block) for b, block in enumerate(inside))
    else:
        yield from ((f"blocks[{i}]", block) for i, block in enumerate(_listed(getattr(model, "blocks", None))))


def _self_attention(where: str, block: Any) -> tuple[str, Any]:
    for name in ("sa", "attn"):
        if isinstance(found := getattr(block, name, None), nn.Module):
            return f"{where}.{name}", found
    raise ModelError(f"{where} ({type(block).__name__}) has no self-attention named `sa` or `attn`")


def _refuse_attached(where: str, module: Any) -> None:
    if isinstance(getattr(vars(module).get("forward"), "__self__", None), _Layer):
        raise ModelError(f"{where} is attached already; leave the other `with heatkv.attach(...)` block first")


def _check_module(where: str, module: Any) -> None:
    """Raise ModelError unless HeatKV can compute what this self-attention computes."""
    _refuse_attached(where, module)
    flags = [flag for flag in _NORM_FLAGS if hasattr(module, flag)]
    normalised = any(getattr(module, flag) for flag in flags)
    missing = [name for name in (*_NEEDED, *(_NORM_NEEDED if normalised else ())) if not hasattr(module, name)]
    if not flags:
        missing.append(" or ".join(_NORM_FLAGS))
    name = f"{where} ({type(module).__name__})"
    if missing:
        raise ModelError(f"{name} is no self-attention of VAR or Infinity: it has no {', '.join(missing)}")
    # whatever else takes part in the computation would be left out in silence
    tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    foreign = {part for part, _ in tensors} - _KNOWN_TENSORS
    foreign |= {
        part
        for part, child in module.named_children()
        if part not in _KNOWN_PARTS and not isinstance(child, nn.Identity | nn.Dropout)
    }
    if foreign:
        raise ModelError(f"{name} also has {', '.join(sorted(foreign))}, of which HeatKV does not know what they do")
    width = module.num_heads * module.head_dim
    weight = getattr(module.mat_qkv, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2 or weight.shape[0] != 3 * width:
        raise ModelError(f"mat_qkv of {name} is no linear layer with 3 x {width} outputs, queries, keys and values")
    if getattr(module.mat_qkv, "bias", None) is not None:
        raise ModelError(f"mat_qkv of {name} has a bias beside q_bias and v_bias, which HeatKV does not know")
    parameters = list(inspect.signature(module.forward).parameters.values())
    if len(parameters) < 2 or any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters):
        raise ModelError(f"the forward of {name} is not forward(x, attn_bias, ...) with named arguments")


def _gate_of(where: str, block: Any) -> Callable[[Sequence[Any]], Tensor] | None:
    """How to find the AdaLN factor on the attention branch, (R, 1, C), among the arguments of a block; None when the
    block has neither `ada_lin` nor `ada_gss`."""
    shared, own = getattr(block, "ada_gss", None), getattr(block, "ada_lin", None)
    if not isinstance(shared, Tensor) and not isinstance(own, nn.Module):
        return None

    def gate(given: Sequence[Any]) -> Tensor:
        for value in given[1:]:
            if isinstance(shared, Tensor) and isinstance(value, Tensor) and value.ndim == 4 and value.shape[2] == 6:
                return (value + shared)[:, :, 0]
            if isinstance(own, nn.Module) and isinstance(value, Tensor) and value.ndim == 2:
                vectors: Tensor = own(value)
                return vectors.view(len(value), 1, 6, -1)[:, :, 0]
        raise ModelError(f"{where} was called without the condition that its AdaLN is made from; HeatKV looks for it")

    return gate


def _adapter(found: Sequence[tuple[str, Any]], blocks: Sequence[tuple[str, Any]], heads: int) -> ModelAdapter | None:
    """The view of the blocks, None when one of them does not show its gate or its projection."""
    gates = [_gate_of(where, block) for where, block in blocks]
    views = [
        BlockView(block, module, module.proj, gate)
        for (_, block), (_, module), gate in zip(blocks, found, gates, strict=True)
        if gate is not None and isinstance(module.proj, nn.Linear) and isinstance(block, nn.Module)
    ]
    return ModelAdapter(tuple(views), heads) if len(views) == len(found) else None


def _schedule_of(model: Any) -> ScaleSchedule | None:
    """The schedule that VAR keeps in `patch_nums` or `lvl_1L`, None when there is neither."""
    if (sides := getattr(model, "patch_nums", None)) is not None:
        return ScaleSchedule.of((side, side) if isinstance(side, int) else side for side in sides)
    levels = getattr(model, "lvl_1L", None)
    if not isinstance(levels, Tensor):
        return None
    counts = torch.bincount(levels.flatten().long()).tolist()
    sides = [math.isqrt(count) for count in counts]
    if [side * side for side in sides] != counts:
        raise ScheduleError(f"lvl_1L has {counts} tokens per scale, which are not all squares; pass schedule=")
    return ScaleSchedule.square(sides)


# ------------------------------------------------------------------------------------------- one self-attention


@dataclass(frozen=True)
class _Call:
    """What a block handed to its self-attention; all but x are Infinity's, None for VAR."""

    x_RNC: Tensor
    scale_ind: int | None
    schedule: ScaleSchedule | None
    rotary_key: str
    rotary_tables: Mapping[str, Tensor] | None


class _Layer:
    """One self-attention of the model, and HeatKV's stand-ins for its `forward` and `kv_caching`."""

    def __init__(self, attached: Attached, index: int, where: str, module: Any) -> None:
        self.attached, self.index, self.where, self.module = attached, index, where, module
        self.caching = False
        self._signature = inspect.signature(module.forward)
        self._x, self._mask = list(self._signature.parameters)[:2]
        self.passes_schedule = "scale_schedule" in self._signature.parameters

    def put_on(self, undo: ExitStack) -> None:
        """Replace the two methods; `undo` will bring them back."""
        _refuse_attached(self.where, self.module)
        own = vars(self.module)  # a method of the class is hidden by an entry here, and seen again without it
        self._module_kv_caching = self.module.kv_caching
        self.caching = False
        for name in ("forward", "kv_caching"):
            if name in own:
                undo.callback(own.__setitem__, name, own[name])
            else:
                undo.callback(own.pop, name, None)
            own[name] = getattr(self, name)

    def kv_caching(self, enable: bool) -> None:
        """Start (True) or end (False) an image, for the module as well: its own cache is emptied and stays so."""
        self._module_kv_caching(enable)
        self.caching = bool(enable)
        if enable:
            self.attached._begin()

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        call = self._read(self._signature.bind(*args, **kwargs).arguments)
        self.attached._check(self, call)
        q, k, v = self._qkv(call)
        if v.requires_grad and torch.is_grad_enabled():
            raise ModelError("an attached model only draws; call it under torch.no_grad() or torch.inference_mode()")
        out_RHND = self.attached._attend(self, call.x_RNC, q, k, v)
        out: Tensor = self.module.proj(out_RHND.transpose(1, 2).flatten(2))
        dropped: Tensor = self.module.proj_drop(out)
        return dropped

    def _read(self, given: Mapping[str, Any]) -> _Call:
        """The arguments of a call, when HeatKV can do what they ask for."""
        if self.module.training:
            raise ModelError(f"{self.where} is in training mode; HeatKV only draws: call model.eval() first")
        if given.get(self._mask) is not None:
            raise ModelError(
                f"{self.where} was given a mask ({self._mask}), as in training; HeatKV only draws, scale by scale"
            )
        if given.get("attn_fn") is not None:
            raise ModelError(f"{self.where} was given its own attn_fn; HeatKV replaces the attention, so leave it out")
        for name, value in given.items():
            default = self._signature.parameters[name].default
            if name not in (self._x, self._mask, *_KNOWN_ARGUMENTS) and value is not None and value is not default:
                raise ModelError(f"{self.where} was given {name}, which HeatKV does not know")
        if not self.passes_schedule:
            return _Call(given[self._x], None, None, "", None)
        if given.get("scale_schedule") is None or given.get("scale_ind") is None:
            raise ModelError(
                f"{self.where} was called without scale_ind or scale_schedule. Infinity's blocks leave them out when "
                "fused_norm is off, and then rotate every scale like the first one; build the model with fused_norm on"
            )
        told = given["scale_schedule"]
        tables = given.get("rope2d_freqs_grid")
        return _Call(given[self._x], int(given["scale_ind"]), ScaleSchedule.of(told), str(tuple(told)), tables)

    def _qkv(self, call: _Call) -> tuple[Tensor, Tensor, Tensor]:
        """(R, H, N, D) each: queries for a softmax of scale 1, keys as they are cached, and values, in one type."""
        module, (rows, tokens, _) = self.module, call.x_RNC.shape
        weight = module.mat_qkv.weight
        bias = torch.cat([module.q_bias, module.zero_k_bias, module.v_bias]).to(weight.dtype)
        qkv = F.linear(call.x_RNC, weight, bias).view(rows, tokens, 3, module.num_heads, module.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        if any(getattr(module, flag, False) for flag in _NORM_FLAGS):
            # (1, H, 1, 1), or (1, 1, H, 1) in models made for a flash kernel
            log_scale = module.scale_mul_1H11.float().view(1, -1, 1, 1)
            q = F.normalize(q.float(), dim=-1) * log_scale.clamp(max=float(module.max_scale_mul)).exp()
            k = F.normalize(k.float(), dim=-1)
        if call.rotary_tables is not None:
            rotation_2NP = self._rotation(call.rotary_tables, call.rotary_key, tokens, q.device)
            q, k = rotate(q.float(), rotation_2NP), rotate(k.float(), rotation_2NP)
        return (q * module.scale).to(v.dtype), k.to(v.dtype), v

    def _rotation(self, tables: Mapping[str, Tensor], key: str, tokens: int, device: torch.device) -> Tensor:
        """(2, N, D/2): cos and sin of the running scale, from a table (2, 1, 1, 1, tokens of all scales, D/2)."""
        if key not in tables:
            raise ModelError(f"rope2d_freqs_grid has no table for the schedule {key}")
        table, first = tables[key], self.attached.plan.schedule.offsets[self.attached._target]
        if table.ndim != 6 or table.shape[4] < first + tokens or table[..., 0, :].numel() != self.module.head_dim:
            raise ModelError(
                f"the rotary table is {tuple(table.shape)}; (2, 1, 1, 1, at least {first + tokens} tokens, "
                f"{self.module.head_dim // 2}) is needed"
            )
        rotation_2NP = table[:, 0, 0, 0, first : first + tokens].to(device, torch.float32)
        angles = self.attached.key_angles
        plan = self.attached.plan
        if isinstance(plan, Plan) and plan.coarse and angles is not None:
            known = rotation_of(angles[self.attached._target]).to(device)
            if not torch.allclose(rotation_2NP, known, atol=0.02):  # room for a table in 16 bits
                raise ModelError(
                    "the rotary table is not that of the published Infinity models, so that keys cannot be pooled; "
                    "attach a plan without coarse levels"
                )
        return rotation_2NP


# ------------------------------------------------------------------------------------------- all of them


class Attached:
    """A model with HeatKV under it, inside the `with` block of `attach`.

    `plan` is what is kept. `cache` holds it from the first image on, for as long as this object lives; its
    `allocated_bytes` are real. The model's calls raise ModelError for what HeatKV cannot compute, and PlanError for
    another schedule, order or number of rows than the plan's, and NumericsError when their images are done, or as the
    block ends with an error, where these were made of numbers that are not finite.
    """

    def __init__(
        self,
        model: Any,
        found: list[tuple[str, Any]],
        plan: CachePlan,
        *,
        guided: bool,
        measure: Measured | None,
        adapter: ModelAdapter | None,
        log_bias: FloatArray | None,
        most_bytes: int | None,
        seed: int,
        first_sample: int,
        level_sinks: int,
        storage: str | None,
        attention: str,
    ) -> None:
        self.plan = plan
        self._storage, self._attention = storage, attention
        self._name = type(model).__name__
        self._layers = [_Layer(self, index, where, module) for index, (where, module) in enumerate(found)]
        self._guided, self._measure, self._most_bytes = guided, measure, most_bytes
        self._adapter, self._log_bias = adapter, log_bias
        self._choices = level_choices(plan.schedule, level_sinks)
        self._seed, self._first_sample = seed, first_sample
        self._fingerprint = _attention_fingerprint(found) if measure else ""
        self._cache: ArenaCache | None = None
        self._undo: ExitStack | None = None
        self._measured_images = 0
        self._sums: dict[str, FloatArray] = {}
        self._begin()

    @property
    def cache(self) -> ArenaCache:
        """The cache of the latest images. Raises ModelError before the first ones."""
        if self._cache is None:
            raise ModelError("there is no cache before the model has drawn its first scale; draw an image first")
        return self._cache

    def __enter__(self) -> Attached:
        if self._undo is not None:
            raise ModelError("this attachment is in use already; call heatkv.attach again for another one")
        with ExitStack() as undo:
            for layer in self._layers:
                layer.put_on(undo)
            if self._measure is not None and self._adapter is not None:
                undo.enter_context(self._adapter.watching(self._see))
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

    def _begin(self) -> None:
        """New images: the rows are known when their first scale arrives."""
        self._target, self._next_layer, self._rows = 0, 0, 0
        self._seen: tuple[int, Tensor, Tensor] | None = None

    def _check(self, layer: _Layer, call: _Call) -> None:
        """Raise unless this call is the next one of the plan."""
        schedule = self.plan.schedule
        if not layer.caching:
            raise ModelError(
                f"{layer.where} runs without kv_caching(True); the model must switch it on, inside the `with` block, "
                "before the first scale"
            )
        if self._target == len(schedule):
            raise PlanError(f"all {len(schedule)} scales of the plan are drawn; kv_caching(True) starts the next image")
        if layer.index != self._next_layer:
            raise PlanError(
                f"{layer.where} was called when {self._layers[self._next_layer].where} was due at scale "
                f"{self._target}; every layer runs once per scale, and kv_caching(True) starts an image anew"
            )
        if call.schedule is not None:
            if call.schedule != schedule:
                raise PlanError(
                    f"the model runs the schedule {call.schedule}, the plan is for {schedule}; solve a plan for it"
                )
            if call.scale_ind != self._target:
                raise PlanError(f"the model runs scale {call.scale_ind} when scale {self._target} is due")
        rows, tokens, _ = call.x_RNC.shape
        if tokens != schedule.tokens[self._target]:
            raise PlanError(
                f"{tokens} tokens arrived for scale {self._target}, which has {schedule.tokens[self._target]} in the "
                f"plan's schedule {schedule}; attach with a plan or schedule= of the schedule the model runs"
            )
        if self._rows and rows != self._rows:
            raise PlanError(f"{rows} rows arrived at scale {self._target}; these images began with {self._rows}")

    def _attend(self, layer: _Layer, x_RNC: Tensor, q_RHND: Tensor, k_RHND: Tensor, v_RHND: Tensor) -> Tensor:
        if not self._rows:
            self._prepare(v_RHND)
        cache = self.cache
        cache.see_input(layer.index, x_RNC)
        out_RHND = cache.attend(layer.index, q_RHND, k_RHND, v_RHND)
        self._next_layer += 1
        if self._next_layer == len(self._layers):
            self._target, self._next_layer = self._target + 1, 0
            if self._target == len(self.plan.schedule):
                self._finish(cache)
        return out_RHND

    def _prepare(self, v_RHND: Tensor) -> None:
        """A cache at its start for the rows that arrived, the same as before where it fits."""
        rows, dtype, device = v_RHND.shape[0], v_RHND.dtype, v_RHND.device
        images = rows // 2 if self._guided else rows
        if self._measure and self._guided and rows % 2:
            raise StatisticsError(
                f"{rows} rows are not two halves, conditional and unconditional; attach with guided=False"
            )
        old = self._cache
        if old is not None and (old.rows, old.store.dtype, old.store.device) == (rows, dtype, device):
            old.reset()
        else:
            held_as = str(StorageType.for_dtype(dtype, self._storage))
            needed = self.plan.bytes(rows, held_as)
            if self._most_bytes is not None and needed > self._most_bytes:
                raise BudgetError(
                    f"{rows} rows in {dtype if self._storage is None else held_as} need {needed} bytes, the budget is "
                    f"{self._most_bytes}; attach with rows={rows} so that the plan counts them all"
                )
            self._cache = old = None  # frees the old arena first
            # a tensor made in inference mode could not be written to outside of it, by the next image
            with torch.inference_mode(False):
                if self._measure is not None:
                    self._cache = self._observing(self._measure, rows, images, dtype, device)
                else:
                    self._cache = open_cache(
                        self.plan, rows, dtype, device, self.key_angles, query_weight=self._query_weight,
                        code=self._storage, attention=self._attention,
                    )  # fmt: skip
        if isinstance(self._cache, ObservingCache) and self._seen is not None:
            self._cache.see(*self._seen)  # the first layer was told of before the cache was at its start
        self._rows = rows

    def _query_weight(self, layer: int) -> Tensor:
        """W_q of every head of a layer, (H, D, C)."""
        weight: Tensor = self._layers[layer].module.mat_qkv.weight.detach()
        of_heads: Tensor = weight[: len(weight) // 3].unflatten(0, (self.plan.geometry.heads, -1))
        return of_heads

    def _see(self, layer: int, residual_RNC: Tensor, gate_R1C: Tensor) -> None:
        """Pass on what a block was given, to the cache once there is one."""
        self._seen = (layer, residual_RNC.detach(), gate_R1C.detach())
        if isinstance(self._cache, ObservingCache) and self._cache.rows == len(residual_RNC):
            self._cache.see(*self._seen)

    def _observing(
        self, measure: Measured, rows: int, images: int, dtype: torch.dtype, device: torch.device
    ) -> ObservingCache:
        """The cache that measures what was asked for."""
        assert isinstance(self.plan, Plan)
        given = (self.plan, rows, images, dtype, device, self.key_angles)
        weights = [] if self._adapter is None else list(map(self._adapter.output_weight, range(len(self._layers))))
        if measure == "biases":
            return BiasCache(self._choices, *given)
        if measure == "levels":
            assert self._log_bias is not None
            return ErrorCostCache(self._choices, self._log_bias, *given, output_weights=weights)
        return MeasuringCache(*given, output_weights=weights)

    @cached_property
    def key_angles(self) -> tuple[Tensor, ...] | None:
        """By which keys are rotated, for pooling them; Infinity's published angles, which its tables are checked by."""
        if not self._layers[0].passes_schedule:
            return None
        schedule, head_dim = self.plan.schedule, self.plan.geometry.head_dim
        return tuple(rotation_angles(schedule, scale, head_dim) for scale in range(len(schedule)))

    def _check_numbers(self) -> None:
        """Raise NumericsError when queries, keys or values of these images were not finite; it waits for the device."""
        if self._cache is not None and self._rows:
            self._cache.check(self._rows // 2 if self._guided and self._rows % 2 == 0 else self._rows)

    def _finish(self, cache: ArenaCache) -> None:
        self._check_numbers()
        if isinstance(cache, ObservingCache):  # an image that was broken off is not counted
            self._measured_images += cache.images
            self._sums = add_sums(self._sums, cache.sums())

    # ------------------------------------------------------------------ what was measured

    def statistics(self, *, cfg: float | None = None, settings: Mapping[str, Any] | None = None) -> Statistics:
        """Statistics over all images drawn to their last scale so far, for `attach(..., measure=True)`.

        `cfg` and `settings` (such as top_k) say how the images were drawn; HeatKV cannot see that, but statistics
        that differ in it are not merged. Samples are named seed:index:- with the index from `first_sample` on.
        Raises StatisticsError when nothing was measured, or for settings that are no dictionary.
        """
        sums, samples = self._measured("mass")
        provenance = Provenance(
            model=self._name,
            fingerprint=self._fingerprint,
            cfg=cfg,
            settings={"guided": self._guided, **(settings or {})},
            samples=samples,
            versions=versions(),
        )
        return Statistics(self.plan.schedule, provenance=provenance, levels=None, **sums)

    def log_bias(self) -> FloatArray:
        """Logit biases of pooled cells over all images so far, for `attach(..., measure="biases")`: what
        `attach(..., measure="levels", log_bias=...)` measures costs under. Raises StatisticsError when nothing was
        measured."""
        sums, _ = self._measured("biases")
        return calibrated_bias(self.plan.schedule, sums["whole"], sums["pooled_mass"])

    def level_statistics(self) -> LevelStatistics:
        """Level costs over all images so far, for `attach(..., measure="levels", log_bias=...)`, to be put beside the
        statistics with `statistics.with_levels(...)`. Raises StatisticsError when nothing was measured."""
        sums, samples = self._measured("levels")
        assert self._log_bias is not None
        joint = tuple(sums[f"joint_sum.{target}"] for target in range(len(self.plan.schedule)))
        return LevelStatistics(self._choices, "error", self._log_bias, joint, sums["single_sum"], samples, ())

    def _measured(self, what: Measured) -> tuple[dict[str, FloatArray], tuple[str, ...]]:
        """The sums and the names of the samples."""
        if self._measure != what:
            wanted = {"mass": "True"}.get(what, repr(what))
            raise StatisticsError(
                f"nothing of this kind is measured; attach with measure={wanted} instead of a policy or a plan"
            )
        if not self._sums:
            raise StatisticsError("no image was drawn to its last scale yet; draw at least 1")
        indices = range(self._first_sample, self._first_sample + self._measured_images)
        return self._sums, tuple(f"{self._seed}:{index}:-" for index in indices)


def _attention_fingerprint(found: Iterable[tuple[str, Any]]) -> str:
    """The fingerprint of all self-attention parameters, the same for both layouts of the scales per head."""
    return fingerprint(
        (f"{index}.{name}", tensor.view(1, -1, 1, 1) if name == "scale_mul_1H11" else tensor)
        for index, (_, module) in enumerate(found)
        for name, tensor in module.named_parameters()
    )


def attach(
    model: Any,
    policy: str | None = None,
    budget: str | float | Budget | None = None,
    *,
    plan: CachePlan | None = None,
    measure: bool | Measured = False,
    log_bias: FloatArray | None = None,
    statistics: Statistics | None = None,
    schedule: ScaleSchedule | None = None,
    guided: bool = True,
    rows: int | None = None,
    seed: int = 0,
    first_sample: int = 0,
    storage: str | None = None,
    attention: str = "auto",
    **options: Any,
) -> Attached:
    """A context manager that puts HeatKV under the self-attention of `model` and restores it at the end.

    What is kept: a `policy` with its `budget`, `statistics` and `options` (such as sink_scales), as in `model.plan`;
    or a finished `plan`; or, with `measure`, everything, while `Attached.statistics` is measured as `calibrate` does
    ("mass", or True), or `Attached.log_bias` ("biases"), or `Attached.level_statistics` under that bias ("levels"),
    for plans with `sink_scales` or more.
    `schedule` is needed where the model does not tell it: VAR does, in `patch_nums` or `lvl_1L`; Infinity needs it
    unless the plan or the statistics bring it. `guided` says that rows are doubled, conditional half first. `rows`
    (default: those of one image) only matters for a budget in bytes; `seed` and `first_sample` name the samples.
    `storage` is "int8" or "fp8" for a cache of 8-bit codes, and `attention` names the kernel, as in `heatkv.generate`;
    what is measured is measured on the full cache as it is.

    Raises ModelError for a model that is not recognised, PlanError, StatisticsError, PolicyError, BudgetError or
    ScheduleError for what does not fit it, or is of the wrong kind.
    """
    if not isinstance(measure, bool | str):
        raise PolicyError(f"measure={shown(measure)} is unknown; known: True, 'mass', 'biases', 'levels'")
    seed, first_sample = whole(seed, "seed", ModelError), whole(first_sample, "first_sample", ModelError)
    blocks = list(_blocks(model))
    found = [_self_attention(where, block) for where, block in blocks]
    name = type(model).__name__
    if not found:
        raise ModelError(
            f"no blocks were found in {name}: HeatKV looks at {_PLACES}; pass the transformer itself, not a wrapper"
        )
    for where, module in found:
        _check_module(where, module)
    sizes = {(module.num_heads, module.head_dim) for _, module in found}
    if len(sizes) > 1:
        raise ModelError(f"the blocks of {name} differ in (heads, head size): {sorted(sizes)}")
    ((heads, head_dim),) = sizes

    if measure and (storage is not None or attention != "auto"):
        raise PolicyError("storage= and attention= only go with policy= or plan=; what is measured is the full cache")
    ways = [way for way, chosen in (("policy", policy), ("plan", plan), ("measure", measure)) if chosen]
    if len(ways) != 1:
        raise PolicyError(
            "say what to keep, one of: policy= with budget=, plan=, or measure=True"
            + (f"; not {' and '.join(ways)} together" if ways else "")
        )
    measured: Measured | None = "mass" if measure is True else (measure or None)
    if measured not in (None, "mass", "biases", "levels"):
        raise PolicyError(f"measure={measure!r} is unknown; known: True, 'mass', 'biases', 'levels'")
    adapter = _adapter(found, blocks, found[0][1].num_heads) if measured is not None else None
    if measured == "levels" and adapter is None:
        raise ModelError(f"the blocks of {name} have no ada_lin or ada_gss, or no linear proj; level costs need them")
    if (measured == "levels") != (log_bias is not None):
        raise PolicyError('measure="levels" and log_bias= go together; measure="biases" gives log_bias()')
    level_sinks = options.pop("sink_scales", SINK_SCALES) if measured == "levels" else 0  # biases need none
    if policy is None and (budget is not None or statistics is not None or options):
        extra = [*(["budget"] if budget is not None else []), *(["statistics"] if statistics is not None else [])]
        raise PolicyError(f"{', '.join([*extra, *options])} only go with policy=, not with {ways[0]}=")

    if schedule is None and "scale_schedule" not in inspect.signature(found[0][1].forward).parameters:
        schedule = _schedule_of(model)
    known = plan.schedule if plan is not None else statistics.schedule if statistics is not None else None
    schedule = schedule if schedule is not None else known
    if schedule is None:
        raise ScheduleError(
            f"{name} does not tell its schedule; pass schedule=, for instance ScaleSchedule.var(256) or "
            'ScaleSchedule.infinity("1M", 1.0)'
        )
    geometry = CacheGeometry(len(found), heads, head_dim, schedule)
    if log_bias is not None:
        shape = (geometry.layers, geometry.heads, len(schedule), len(LEVELS))
        if not isinstance(log_bias, np.ndarray) or log_bias.shape != shape or log_bias.dtype.kind != "f":
            raise StatisticsError(f"log_bias is {shown(log_bias)}; it must be an array {shape}, as log_bias() gives it")

    parsed = None if budget is None else Budget.parse(budget)
    if plan is not None:
        plan.check_geometry(geometry)
        if plan.geometry.head_dim != head_dim:
            raise PlanError(f"the plan is for a head size of {plan.geometry.head_dim}, the model has {head_dim}")
    elif measure:
        plan = make_policy("full").plan(PlanningProblem(geometry, Budget.parse("100%"), model=name))
    else:
        assert policy is not None
        if storage is not None:
            check_code(storage, found[0][1].mat_qkv.weight.device)
        if parsed is None:
            raise BudgetError(f"policy {policy!r} needs a budget; write it as 10%, 0.1, 600MiB, 2GB or 650tokens")
        # statistics of this package's own model with the same weights name all of them, those measured here the
        # attention's only
        all_weights = fingerprint(model) if isinstance(model, nn.Module) else None
        if statistics is not None and statistics.provenance.fingerprint != all_weights:
            statistics.check_fingerprint(_attention_fingerprint(found))
        held_as = str(StorageType.for_dtype(found[0][1].mat_qkv.weight.dtype, storage))
        rows = rows if rows is not None else (2 if guided else 1)
        problem = PlanningProblem(geometry, parsed, statistics, seed=seed, rows=rows, storage=held_as, model=name)
        plan = make_policy(policy, **options).plan(problem)
    weight = found[0][1].mat_qkv.weight
    check_cache(plan, weight.dtype, weight.device, storage, attention)
    return Attached(
        model,
        found,
        plan,
        guided=guided,
        measure=measured,
        adapter=adapter,
        log_bias=log_bias,
        most_bytes=math.floor(parsed.amount) if parsed is not None and parsed.kind == "bytes" else None,
        seed=seed,
        first_sample=first_sample,
        level_sinks=level_sinks,
        storage=storage,
        attention=attention,
    )
