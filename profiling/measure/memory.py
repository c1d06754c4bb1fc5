"""Three ledgers of what drawing under a plan takes: planned, held by the arena, seen by the device; and how each leads
to the next (docs/memory.md). What every figure is stands beside its type, in heatkv.profiling.results.ledgers."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from msgspec import structs
from torch import Tensor, nn

from heatkv.core.capacity_plan import CapacityPlan
from heatkv.core.io import replacing
from heatkv.core.levels import level_tokens
from heatkv.core.plan import CachePlan, Plan, held_for_targets, live_of_held
from heatkv.core.schema import IntArray
from heatkv.engine.arena_cache import storage_bytes
from heatkv.errors import GraphError, HeatKVError
from heatkv.generation.loop import Generator
from heatkv.models.base import ImageModel
from heatkv.profiling.measure.environment import nvml_device
from heatkv.profiling.measure.ledger import TensorLedger
from heatkv.profiling.results.ledgers import (
    UNEXPLAINED,
    AllocatorMemory,
    AllocatorPeaks,
    ArenaMemory,
    DriverMemory,
    GraphMemory,
    HostMemory,
    Ledgers,
    Phases,
    PlannedMemory,
    Step,
    TensorMemory,
)
from heatkv.profiling.results.row import Memory

Open = Callable[[bool], Generator[Any]]
"""Opens a cache and what draws with it, with CUDA graphs or without."""

T = TypeVar("T")
M = TypeVar("M", bound=ImageModel[Any])


# ------------------------------------------------------------------------------------- from ledger to ledger

Figure = tuple[str, int]


def _step(source: Figure, target: Figure, known: Mapping[str, int], rest: str) -> Step:
    """With what the known parts leave under the name `rest`."""
    left = target[1] - source[1] - sum(known.values())
    return Step(*source, *target, {**known, rest: left})


def steps(ledgers: Ledgers) -> tuple[Step, ...]:
    """From the planned bytes to what the device shows, as far as they were measured."""
    arena, host = ledgers.arena, ledgers.host
    tensors = ("tensors", max(ledgers.tensors.peak_bytes.each))
    seen = {UNEXPLAINED: ledgers.tensors.arena_bytes - arena.cache_bytes}  # storage that no operation made
    beside = {"index tables": arena.index_bytes, "workspace": arena.workspace_bytes}
    figures = ("planned cache", ledgers.planned.cache_bytes), ("arena", arena.cache_bytes)
    found = [_step(*figures, {}, UNEXPLAINED), _step(figures[1], tensors, seen | beside, "activations")]
    weights = {"weights": ledgers.weights_bytes}
    if ledgers.allocator is not None:
        found += _allocator_steps(ledgers.allocator, ledgers.driver, tensors, weights)
    elif host is not None and host.before_bytes is not None and host.loaded_bytes is not None:
        left = host.loaded_bytes - host.before_bytes - ledgers.weights_bytes
        known = weights | {"Python and libraries": host.before_bytes, "left by loading": left}
        found.append(_step(tensors, ("resident", host.most_bytes), known, UNEXPLAINED))
    return tuple(found)


def _allocator_steps(
    allocator: AllocatorMemory, driver: DriverMemory | None, tensors: Figure, weights: dict[str, int]
) -> list[Step]:
    phases = allocator.peaks.each
    requested = [peaks.requested_bytes for peaks in phases if peaks.requested_bytes is not None]
    allocated = ("allocated", max(peaks.allocated_bytes for peaks in phases))
    reserved = ("reserved", max(peaks.reserved_bytes for peaks in phases))
    if requested:
        asked = ("requested", max(requested))
        found = [_step(tensors, asked, weights, UNEXPLAINED), _step(asked, allocated, {}, "rounding")]
    else:
        found = [_step(tensors, allocated, weights, UNEXPLAINED)]
    found.append(_step(allocated, reserved, {}, "kept by the allocator"))
    if driver is not None and driver.process_bytes is not None:
        process = ("process", driver.process_bytes)
        found.append(_step(reserved, process, {}, "driver context"))
        if driver.used_bytes is not None and driver.reserved_bytes is not None:
            device = ("device", driver.used_bytes + driver.reserved_bytes)
            found.append(_step(process, device, {"reserved by the driver": driver.reserved_bytes}, "other processes"))
    return found


# ------------------------------------------------------------------------------------------------ the instruments


class ResidentMemory:
    """This process's resident memory, and its peak since `reset`, where the system can start one anew.

    Linux keeps the peak of a process in VmHWM, and starts it anew when 5 is written to clear_refs. `ru_maxrss`, the
    stand-in elsewhere, is none there: a child begins with the peak of the process that started it.
    """

    def __init__(self, proc: Path = Path("/proc/self")) -> None:
        self._proc = proc
        self.resets = self.reset()

    @property
    def source(self) -> str:
        """What `peak_bytes` gives: VmHWM, or ru_maxrss; of the whole process where it cannot be reset."""
        name = "ru_maxrss" if self._status("VmHWM") is None else "VmHWM"
        return name if self.resets else f"{name} of the whole process"

    def reset(self) -> bool:
        """Let the peak begin with what is resident now; false where that cannot be."""
        try:
            (self._proc / "clear_refs").write_text("5")
        except OSError:
            return False
        return self._status("VmHWM") is not None

    def now_bytes(self) -> int | None:
        return self._status("VmRSS")

    def peak_bytes(self) -> int:
        found = self._status("VmHWM")
        if found is not None:
            return found
        import resource  # Windows has none

        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == "darwin" else most << 10

    def _status(self, name: str) -> int | None:
        try:
            lines = (self._proc / "status").read_text().splitlines()
        except OSError:
            return None
        found = [line.split()[1] for line in lines if line.startswith(f"{name}:")]
        return int(found[0]) << 10 if found else None  # in KiB, though it says kB


class AllocatorMeter:
    """Peaks of torch's CUDA allocator since `reset`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def reset(self) -> None:
        torch.cuda.synchronize(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)

    def peaks(self) -> AllocatorPeaks:
        torch.cuda.synchronize(self._device)
        requested = torch.cuda.memory_stats(self._device).get("requested_bytes.all.peak")
        return AllocatorPeaks(
            requested_bytes=None if requested is None else int(requested),
            allocated_bytes=torch.cuda.max_memory_allocated(self._device),
            reserved_bytes=torch.cuda.max_memory_reserved(self._device),
        )


def driver_memory(device: torch.device) -> DriverMemory | None:
    """What NVML tells of this process and the device; None without a GPU, without pynvml or without access."""
    device_ = nvml_device(device) if device.type == "cuda" else None
    if device_ is None:
        return None
    (nvml, handle), found = device_, DriverMemory()
    with suppress(nvml.NVMLError):
        mine = [p for p in nvml.nvmlDeviceGetComputeRunningProcesses(handle) if p.pid == os.getpid()]
        used = mine[0].usedGpuMemory if mine else None  # None in containers that hide processes
        found = structs.replace(found, process_bytes=None if used is None else int(used))
    with suppress(nvml.NVMLError, AttributeError, TypeError):  # an older driver, or an older pynvml
        info = nvml.nvmlDeviceGetMemoryInfo(handle, version=nvml.nvmlMemory_v2)
        sizes = {f"{name}_bytes": int(getattr(info, name)) for name in ("total", "reserved", "used", "free")}
        found = structs.replace(found, **sizes)
    return found


def model_tensors(model: ImageModel[Any]) -> list[Tensor]:
    """Weights, and all other tensors that the model holds from one image to the next, on its device."""
    found: list[Tensor] = []
    seen: set[int] = set()
    todo: list[Any] = [model]
    while todo:
        value = todo.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, dict):
            todo += value.values()
        elif isinstance(value, list | tuple | set):
            todo += value
        elif isinstance(value, nn.Module) or type(value).__module__.startswith("heatkv"):
            todo.append(getattr(value, "__dict__", {}))
    return [tensor for tensor in found if tensor.device == model.device]


# ------------------------------------------------------------------------------------------------ measuring


@dataclass(frozen=True)
class Loading:
    """What loading the model took, in a process that had done nothing else."""

    before_bytes: int | None
    resident_peak_bytes: int | None
    loaded_bytes: int | None
    allocator: AllocatorPeaks | None

    @classmethod
    def watch(cls, load: Callable[[], M], device: torch.device) -> tuple[M, Loading]:
        """What `load` gives, on `device`, and what it took."""
        resident = ResidentMemory()
        before = resident.now_bytes()
        model = load()
        peaks = AllocatorMeter(device).peaks() if device.type == "cuda" else None
        return model, cls(before, resident.peak_bytes() if resident.resets else None, resident.now_bytes(), peaks)


def in_phases(
    open_: Callable[[], Generator[Any]],
    labels: list[Any],
    seed: int,
    reset: Callable[[], object],
    read: Callable[[], T],
) -> tuple[Generator[Any], Phases[T]]:
    """Open, draw and decode once, and read a figure of every phase."""
    reset()
    generator = open_()
    opened = read()
    reset()
    drawn: list[T] = []

    def drawing_done() -> None:
        drawn.append(read())
        reset()

    images = generator.draw(labels, seed, before_decode=drawing_done)
    decode = read()
    del images
    return generator, Phases(opened, drawn[0], decode)


def measure_memory(
    model: ImageModel[Any],
    plan: CachePlan,
    open_: Open,
    batch: int,
    storage: str,
    *,
    seed: int = 0,
    loading: Loading | None = None,
) -> Memory:
    """All ledgers of drawing `batch` images with what `open_` opens, under `plan`.

    It is drawn twice: as it is, for the system's, the allocator's and the driver's figures, then under the ledger of
    tensors; on a CUDA device also with graphs. `loading`, of a process that has done nothing but load the model, makes
    the figures those of a process of its own.
    """
    device = model.device
    host = allocator = graphs = driver = device_peak = None
    labels = model.labels(batch)
    if device.type == "cuda":
        meter = AllocatorMeter(device)
        held = torch.cuda.memory_allocated(device)
        generator, peaks = in_phases(lambda: open_(False), labels, seed, meter.reset, meter.peaks)
        loaded = None if loading is None else loading.allocator
        allocator = AllocatorMemory(weights_bytes=held, loading=loaded, peaks=peaks)
        device_peak = max(peak.allocated_bytes for peak in peaks.each) - held
        driver = driver_memory(device)
        del generator
        graphs = _graph_memory(open_, labels, seed, meter)
    else:
        host = _host_memory(open_, labels, seed, loading)
    with TensorLedger(device) as ledger:

        def opened() -> Generator[Any]:
            generator = open_(False)
            ledger.follow(generator.cache.tables)  # many come from numpy
            return generator

        generator, tensors = in_phases(opened, labels, seed, ledger.reset_peak, lambda: ledger.peak)
        cache = generator.cache
        arena_bytes = ledger.bytes_seen(cache.held)
    rows = cache.rows
    ledgers = Ledgers(
        process="shared" if loading is None else "own",
        weights_bytes=storage_bytes(model_tensors(model)),
        planned=PlannedMemory(cache_bytes=plan.bytes(rows, storage), budget_bytes=plan.budget_bytes(rows, storage)),
        arena=ArenaMemory(
            cache_bytes=cache.allocated_bytes, index_bytes=cache.index_bytes, workspace_bytes=cache.workspace_bytes
        ),
        tensors=TensorMemory(peak_bytes=tensors, arena_bytes=arena_bytes),
        host=host,
        allocator=allocator,
        graphs=graphs,
        driver=driver,
    )
    return Memory(
        memory=structs.replace(ledgers, steps=steps(ledgers)),
        device_peak_bytes=device_peak,
        nvml_bytes=None if driver is None else driver.process_bytes,
    )


def _host_memory(open_: Open, labels: list[Any], seed: int, loading: Loading | None) -> HostMemory:
    resident = ResidentMemory()
    _, peaks = in_phases(lambda: open_(False), labels, seed, resident.reset, resident.peak_bytes)
    return HostMemory(
        source=resident.source,
        before_bytes=None if loading is None else loading.before_bytes,
        loading_peak_bytes=None if loading is None else loading.resident_peak_bytes,
        loaded_bytes=None if loading is None else loading.loaded_bytes,
        peak_bytes=peaks if resident.resets else None,
        most_bytes=max(peaks.each),
    )


def _graph_memory(open_: Open, labels: list[Any], seed: int, meter: AllocatorMeter) -> GraphMemory:
    meter.reset()
    generator = open_(True)
    try:
        for _ in range(3):  # warms up, records, replays
            generator.draw(labels, seed)
    except GraphError as error:
        return GraphMemory(reason=str(error))
    runner: Any = generator.runner
    return GraphMemory(pool_bytes=runner.pool_bytes, peaks=meter.peaks())


# ------------------------------------------------------------------------------------------------ over time


def cache_timeline(plan: CachePlan, rows: int, storage: str) -> IntArray:
    """Bytes of the cache at every checkpoint, (T, L): after layer l has run target scale t."""
    uncoded, others = plan.geometry.token_head_bytes(rows, storage)
    if isinstance(plan, CapacityPlan):
        counts = 4 * rows * plan.geometry.layers * plan.geometry.heads if plan.shared else 0
        return plan.live * (others + 4 * rows * plan.carried) + counts
    assert isinstance(plan, Plan)
    sinks = np.arange(len(plan.schedule)) < plan.uncoded_scales
    sizes = [np.where(sinks, level_tokens(plan.schedule, level), 0).tolist() for level, _ in plan.levels]
    live = live_of_held(held_for_targets([last_read for _, last_read in plan.levels], sizes).sum(axis=1))
    return plan.live * others + live * (uncoded - others)


def check_snapshots(device: torch.device) -> None:
    """Raise HeatKVError where there is no allocator whose state could be written."""
    if device.type != "cuda":
        raise HeatKVError(
            f"a snapshot is one of the CUDA allocator, and the model is on {device}; leave it out, or take a GPU"
        )


def record_snapshots() -> None:
    """Let the CUDA allocator note from now on what is taken where, for `save_snapshot`."""
    torch.cuda.memory._record_memory_history(max_entries=1_000_000)


def save_snapshot(path: Path) -> None:
    """The allocator's state and history as a pickle, for https://pytorch.org/memory_viz; ends the recording."""
    with replacing(path) as temporary:
        torch.cuda.memory._dump_snapshot(str(temporary))
    torch.cuda.memory._record_memory_history(enabled=None)
