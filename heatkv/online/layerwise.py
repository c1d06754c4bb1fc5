"""Measuring images that are drawn already, layer by layer, so that only one layer's keys and values are ever held.

What the full attention of one layer reads are the keys and values of that layer alone. So the forwards of all scales,
shown the codes that were drawn, run side by side: all of them through the first layer's attention, scale by scale, then
all through the second's. Each is the model's own, in a thread that goes on only when it is told to, and up to its next
attention, so one thread runs at a time and the order is always the same.
Shapes: R rows, B images, H heads, N tokens of the running scale, D head size, C width.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from heatkv.calibration.level_costs import ErrorCostCache
from heatkv.calibration.measure import MeasuringCache, ObservingCache, told_settings
from heatkv.core.geometry import CacheGeometry
from heatkv.core.io import versions
from heatkv.core.plan import Plan, keep_first
from heatkv.core.statistics import LevelStatistics, Provenance, Statistics
from heatkv.engine.arena_cache import LayerStep, storage_bytes
from heatkv.errors import ModelError
from heatkv.models.base import ImageModel
from heatkv.models.sampling import Settings
from heatkv.models.var import Attend


def nothing_cached(geometry: CacheGeometry) -> Plan:
    """The plan whose arena is empty."""
    return Plan("layer-by-layer", geometry, keep_first(geometry.shape, 0), 1.0, geometry.full_token_heads, 0)


class LayerByLayer(ObservingCache):
    """An observing cache without an arena, called for all scales of a layer before the next layer.

    It refers to the keys and values that the model gave it for one layer, which the waiting forwards hold anyway.
    `peak_bytes` is the most that all scales held between attentions: their input, which the calls around the blocks
    refer to, the residual stream, queries, keys, values and outputs.
    """

    def reset(self) -> None:
        super().reset()
        self._held: list[tuple[Tensor, Tensor]] = []
        self._inputs: dict[int, int] = {}
        self._bytes: dict[int, int] = {}
        self.peak_bytes = 0

    def _check_plan(self, plan: Plan) -> None:
        """What it holds does not depend on a plan."""

    def _advance(self) -> None:
        self._target += 1
        if self._target == len(self.geometry.schedule):
            self._target, self._next_layer = 0, self._next_layer + 1

    def see(self, layer: int, residual_RNC: Tensor, gate_R1C: Tensor) -> None:
        super().see(layer, residual_RNC, gate_R1C)
        self._residual = residual_RNC

    def sources(self, target: int, layer: int, k_RHND: Tensor, v_RHND: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        past = self._held[:target]
        return [*(k for k, _ in past), k_RHND], [*(v for _, v in past), v_RHND]

    def _attention(self, layer: int, q_RHND: Tensor, k_RHND: Tensor, v_RHND: Tensor, step: LayerStep) -> Tensor:
        keys, values = self.sources(self._target, layer, k_RHND, v_RHND)
        self.observe(layer, q_RHND, keys, values)
        self._relative_R = None
        out_RHND = F.scaled_dot_product_attention(q_RHND, torch.cat(keys, dim=2), torch.cat(values, dim=2), scale=1.0)
        held = storage_bytes((self._residual, q_RHND, k_RHND, v_RHND, out_RHND))
        if layer == 0:
            self._inputs[self._target] = storage_bytes([self._residual])
            self._bytes[self._target] = held
        else:
            self._bytes[self._target] = held + self._inputs[self._target]
        self.peak_bytes = max(self.peak_bytes, sum(self._bytes.values()))
        del self._residual
        return out_RHND

    def _keep(self, k_RHND: Tensor, v_RHND: Tensor, step: LayerStep) -> None:
        self._held[self._target : self._target + 1] = [(k_RHND, v_RHND)]


class LayerMeasuringCache(LayerByLayer, MeasuringCache):
    """Adds up what MeasuringCache does."""


class LayerCostCache(LayerByLayer, ErrorCostCache):
    """Adds up what ErrorCostCache does."""


class _Stopped(BaseException):
    """Ends a forward at its attention; nothing in a model may take it for an error to handle."""


class _Forward:
    """A forward in a thread of its own, which runs only inside `resume`, up to its next attention."""

    def __init__(self, cache: Attend, run: Callable[[Attend], Any]) -> None:
        self._cache, self._run = cache, run
        self._go_on, self._paused = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._main, name="heatkv-forward", daemon=True)
        self._error: BaseException | None = None
        self._stopping = False

    def attend(self, layer: int, q_RHND: Tensor, k_RHND: Tensor, v_RHND: Tensor) -> Tensor:
        """What the model calls, in the thread."""
        out_RHND = self._cache.attend(layer, q_RHND, k_RHND, v_RHND)
        self._paused.release()
        self._go_on.acquire()
        if self._stopping:
            raise _Stopped
        return out_RHND

    def resume(self) -> None:
        """Run through the next attention. Raises what the forward raised, ModelError when it has ended."""
        if self._thread.ident is None:
            self._thread.start()
        else:
            self._go_on.release()
        self._paused.acquire()
        if self._error is not None:
            raise self._error

    def stop(self) -> None:
        """End it where it waits."""
        if self._thread.ident is not None:
            self._stopping = True
            self._go_on.release()
            self._thread.join()

    def _main(self) -> None:
        try:
            self._run(self)
            raise ModelError("a forward ended before all layers had called attend; the model has fewer than it says")
        except _Stopped:
            pass
        except BaseException as error:
            self._error = error
        finally:
            self._paused.release()


def _contexts(device: torch.device) -> Callable[[], ExitStack]:
    """What the calling thread draws in, to be entered by others: no gradients, and its autocast and CUDA stream."""
    kind = device.type
    cast = (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
    stream = torch.cuda.current_stream(device) if kind == "cuda" else None

    def entered() -> ExitStack:
        stack = ExitStack()
        stack.enter_context(torch.inference_mode())
        stack.enter_context(torch.autocast(cast[0], dtype=cast[1], enabled=cast[2]))
        if stream is not None:
            stack.enter_context(torch.cuda.stream(stream))
        return stack

    return entered


@contextmanager
def _stopped_at_the_end(forwards: Sequence[_Forward]) -> Iterator[None]:
    try:
        yield
    finally:
        for forward in forwards:
            forward.stop()


def run_layers(
    model: ImageModel[Any], labels: Sequence[Any], tokens: Sequence[Tensor], settings: Settings, cache: LayerByLayer
) -> None:
    """Show `cache` the attention of images with these codes, (B, N) per scale, up to the last layer's.

    Nothing behind the last attention is run. Raises what the model raises.
    """
    contexts, layers = _contexts(model.device), range(model.geometry.layers)
    with contexts(), model.adapter.watching(cache.see):
        drawing = model.begin(labels, settings)

        def run(attend: Attend) -> None:
            with contexts():
                drawing.logits(attend)

        forwards = [_Forward(cache, run) for _ in model.geometry.schedule.tokens]
        with _stopped_at_the_end(forwards):
            for layer in layers:
                for scale, forward in enumerate(forwards):
                    forward.resume()
                    if layer == 0 and scale < len(forwards) - 1:
                        drawing.accept(tokens[scale])  # which is what the next scale begins with
                    if layer == layers[-1]:
                        forward.stop()


def held_bytes(model: ImageModel[Any], settings: Settings) -> int:
    """The most that measuring one image holds between attentions, whatever the plan.

    Of all tokens: what entered the first layer and the residual stream of one, both in fp32, and of one layer, in the
    compute type, the joint projection to queries, keys and values, queries and keys once rotated, queries once scaled,
    and the attention's output.
    """
    geometry, width = model.geometry, model.adapter.output_weight(0).shape[1]
    per_token = 2 * 4 * width + 7 * geometry.heads * geometry.head_dim * model.compute_dtype.itemsize
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
    geometry, adapter = model.geometry, model.adapter
    weights = [adapter.output_weight(layer) for layer in range(geometry.layers)]
    given = (
        nothing_cached(geometry), len(labels) * settings.rows_per_image, len(labels), model.compute_dtype,
        model.device, model.key_angles,
    )  # fmt: skip
    cache = LayerMeasuringCache(*given, output_weights=weights)
    run_layers(model, labels, tokens, settings, cache)
    costs = None
    if levels is not None:
        pricing = LayerCostCache(levels.choices, levels.log_bias, *given, output_weights=weights)
        run_layers(model, labels, tokens, settings, pricing)
        costs = LevelStatistics(
            levels.choices, levels.cost, levels.log_bias, tuple(pricing.joint), pricing.single, tuple(names),
            levels.bias_samples,
        )  # fmt: skip
    cfg, told = told_settings(settings, model)
    provenance = Provenance(model.name, model.fingerprint, cfg, told, tuple(names), versions())
    return Statistics(geometry.schedule, provenance=provenance, levels=costs, **cache.sums()), cache.peak_bytes
