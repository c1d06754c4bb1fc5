"""What is measured of memory: the instruments, and how the ledgers lead from one to the next (docs/memory.md).

What every figure is stands beside its type, in heatkv.profiling.results.ledgers.
"""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from msgspec import structs
from torch import Tensor, nn

from heatkv.core.capacity_plan import CapacityPlan
from heatkv.core.io import replacing
from heatkv.core.levels import level_tokens
from heatkv.core.plan import CachePlan, Plan, held_for_targets, live_of_held
from heatkv.core.schema import IntArray
from heatkv.errors import HeatKVError
from heatkv.models.base import ImageModel
from heatkv.profiling.measure.environment import nvml_device
from heatkv.profiling.results.ledgers import UNEXPLAINED, AllocatorPeaks, DriverMemory, Ledgers, Step

M = TypeVar("M", bound=ImageModel[Any])


def steps(ledgers: Ledgers) -> tuple[Step, ...]:
    """From the planned bytes to what the device shows, as far as they were measured."""
    arena, tensors, host, driver = ledgers.arena, ledgers.tensors, ledgers.host, ledgers.driver
    beside = {
        UNEXPLAINED: tensors.arena_bytes - arena.cache_bytes,  # storage that no operation made
        "index tables": arena.index_bytes,
        "workspace": arena.workspace_bytes,
    }
    weights = {"weights": ledgers.weights_bytes}
    # each figure, what it is known to hold beside the one before, and what the rest of the difference is called
    figures: list[tuple[str, int, dict[str, int], str]] = [
        ("planned cache", ledgers.planned.cache_bytes, {}, ""),
        ("arena", arena.cache_bytes, {}, UNEXPLAINED),
        ("tensors", max(tensors.peak_bytes.each), beside, "activations"),
    ]
    if ledgers.allocator is not None:
        peaks = ledgers.allocator.peaks.each
        figures += [
            ("requested", max(peak.requested_bytes for peak in peaks), weights, UNEXPLAINED),
            ("allocated", max(peak.allocated_bytes for peak in peaks), {}, "rounding"),
            ("reserved", max(peak.reserved_bytes for peak in peaks), {}, "kept by the allocator"),
        ]
        if driver is not None and driver.process_bytes is not None:
            figures.append(("process", driver.process_bytes, {}, "driver context"))
            if driver.used_bytes is not None and driver.reserved_bytes is not None:
                kept = {"reserved by the driver": driver.reserved_bytes}
                figures.append(("device", driver.used_bytes + driver.reserved_bytes, kept, "other processes"))
    elif host is not None and host.before_bytes is not None and host.loaded_bytes is not None:
        left = host.loaded_bytes - host.before_bytes - ledgers.weights_bytes
        known = weights | {"Python and libraries": host.before_bytes, "left by loading": left}
        figures.append(("resident", host.most_bytes, known, UNEXPLAINED))
    return tuple(
        Step(source, source_bytes, name, size, known | {rest: size - source_bytes - sum(known.values())})
        for (source, source_bytes, *_), (name, size, known, rest) in itertools.pairwise(figures)
    )


# ------------------------------------------------------------------------------------------------ the instruments


class ResidentMemory:
    """This process's resident memory, and its peak since `reset`, where the system can start one anew.

    Linux keeps the peak of a process in VmHWM, and starts it anew when 5 is written to clear_refs. `ru_maxrss`, the
    stand-in elsewhere, is none there: a child begins with the peak of the process that started it.
    """

    def __init__(self, proc: Path = Path("/proc/self")) -> None:
        self._proc = proc
        self.resets = self.reset()
        name = "ru_maxrss" if self._status("VmHWM") is None else "VmHWM"
        self.source = name if self.resets else f"{name} of the whole process"

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
        peak = self._status("VmHWM")
        if peak is not None:
            return peak
        import resource  # Windows has none

        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == "darwin" else most << 10

    def _status(self, name: str) -> int | None:
        with suppress(OSError):
            for line in (self._proc / "status").read_text().splitlines():
                if line.startswith(f"{name}:"):
                    return int(line.split()[1]) << 10  # in KiB, though it says kB
        return None


def allocator_peaks(device: torch.device) -> AllocatorPeaks:
    """Peaks of torch's CUDA allocator since it last started them anew."""
    torch.cuda.synchronize(device)
    return AllocatorPeaks(
        requested_bytes=torch.cuda.memory_stats(device)["requested_bytes.all.peak"],
        allocated_bytes=torch.cuda.max_memory_allocated(device),
        reserved_bytes=torch.cuda.max_memory_reserved(device),
    )


def driver_memory(device: torch.device) -> DriverMemory | None:
    """What NVML tells of this process and the device; None without a GPU, without pynvml or without access."""
    access = nvml_device(device) if device.type == "cuda" else None
    if access is None:
        return None
    (nvml, handle), found = access, DriverMemory()
    with suppress(nvml.NVMLError):
        mine = [p for p in nvml.nvmlDeviceGetComputeRunningProcesses(handle) if p.pid == os.getpid()]
        # None in containers that hide processes
        found = structs.replace(found, process_bytes=mine[0].usedGpuMemory if mine else None)
    with suppress(nvml.NVMLError, AttributeError, TypeError):  # an older driver, or an older pynvml
        info = nvml.nvmlDeviceGetMemoryInfo(handle, version=nvml.nvmlMemory_v2)
        sizes = {f"{name}_bytes": int(getattr(info, name)) for name in ("total", "reserved", "used", "free")}
        found = structs.replace(found, **sizes)
    return found


def model_tensors(model: ImageModel[Any]) -> list[Tensor]:
    """Weights, and all other tensors that the model holds from one image to the next, on its device."""
    seen: dict[int, Any] = {}
    todo: list[Any] = [model]
    while todo:
        value = todo.pop()
        if id(value) in seen:
            continue
        seen[id(value)] = value
        if isinstance(value, dict):
            todo += value.values()
        elif isinstance(value, list | tuple | set):
            todo += value
        elif isinstance(value, nn.Module) or type(value).__module__.startswith("heatkv"):
            todo.append(getattr(value, "__dict__", {}))
    return [value for value in seen.values() if isinstance(value, Tensor) and value.device == model.device]


class Loading(NamedTuple):
    """What loading the model took, in a process that had done nothing else; None in others."""

    before_bytes: int | None = None
    peak_bytes: int | None = None
    loaded_bytes: int | None = None
    allocator: AllocatorPeaks | None = None

    @classmethod
    def watch(cls, load: Callable[[], M], device: torch.device) -> tuple[M, Loading]:
        """What `load` gives, on `device`, and what it took."""
        resident = ResidentMemory()
        before = resident.now_bytes()
        model = load()
        peaks = allocator_peaks(device) if device.type == "cuda" else None
        return model, cls(before, resident.peak_bytes() if resident.resets else None, resident.now_bytes(), peaks)


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
