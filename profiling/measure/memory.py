"""Three ledgers of what drawing under a plan takes: planned, held by the arena, seen by the device; and how each leads
to the next (docs/memory.md).

Every figure says whose it is. `requested`, `allocated` and `reserved` are those of torch's CUDA allocator: asked for;
given out, rounded up; and kept from the driver, given out or not. Those of the driver come from NVML. On the CPU they
are the bytes of tensors, counted at every operation, and what the system holds resident for the process.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import numpy as np
import torch
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
from heatkv.profiling.measure.ledger import TensorLedger

Open = Callable[[bool], Generator[Any]]
"""Opens a cache and what draws with it; told whether with CUDA graphs."""

T = TypeVar("T")
M = TypeVar("M", bound=ImageModel[Any])


# ------------------------------------------------------------------------------------------------ the ledgers


@dataclass(frozen=True)
class PlannedMemory:
    """`cache_bytes`: the plan's peak; `budget_bytes`: what it may be at most."""

    cache_bytes: int
    budget_bytes: int


@dataclass(frozen=True)
class ArenaMemory:
    """Real storage: `cache_bytes` of all that is cached, scales of 8-bit codes with it, `index_bytes` of the tables
    that say what is where, `workspace_bytes` of what attention gathers into."""

    cache_bytes: int
    index_bytes: int
    workspace_bytes: int


@dataclass(frozen=True)
class Phases(Generic[T]):
    """A figure of opening the cache, of drawing all scales, and of decoding them to pictures; each starts anew."""

    opened: T
    drawing: T
    decode: T


@dataclass(frozen=True)
class TensorMemory:
    """Most bytes of tensors alive at once in every phase, on the model's device, without the model's own.

    `arena_bytes`: those of the arena among them. Counted in a run of its own, at every operation of torch: memory that
    a library takes inside of one is not seen.
    """

    peak_bytes: Phases[int]
    arena_bytes: int


@dataclass(frozen=True)
class HostMemory:
    """Resident memory of the process, all of it: Python, libraries, weights, and pages that were touched.

    `before_bytes`: before the model was loaded, `loading_peak_bytes`: the peak of that, `loaded_bytes`: after it; None
    in a process that has done other things. `peak_bytes` of every phase, None where the system cannot start a peak
    anew; `most_bytes` is the largest of them or, there, that of the process so far. `source`: what was read.
    """

    source: str
    before_bytes: int | None
    loading_peak_bytes: int | None
    loaded_bytes: int | None
    peak_bytes: Phases[int] | None
    most_bytes: int


@dataclass(frozen=True)
class AllocatorPeaks:
    """Most bytes at once by torch's CUDA allocator: requested (None where it does not tell), allocated, reserved."""

    requested_bytes: int | None
    allocated_bytes: int
    reserved_bytes: int


@dataclass(frozen=True)
class AllocatorMemory:
    """The allocator's peaks while the model was loaded (None in a process that has done other things) and in every
    phase; everything is in them, weights too. `weights_bytes`: allocated before the cache was opened."""

    weights_bytes: int
    loading: AllocatorPeaks | None
    peaks: Phases[AllocatorPeaks]


@dataclass(frozen=True)
class GraphMemory:
    """Drawing with CUDA graphs: what their private pool has reserved, which is part of what the allocator has reserved,
    and the allocator's peaks; or for which `reason` there are no graphs."""

    pool_bytes: int | None
    peaks: AllocatorPeaks | None
    reason: str | None = None


@dataclass(frozen=True)
class DriverMemory:
    """NVML after drawing: what this process has, its CUDA context with it; and of the whole device how much there is,
    the driver keeps to itself, all processes use, and is free. Version 2 of the figure: `used` is without `reserved`.
    None is what NVML does not tell here."""

    process_bytes: int | None
    total_bytes: int | None
    reserved_bytes: int | None
    used_bytes: int | None
    free_bytes: int | None


@dataclass(frozen=True)
class Step:
    """From one figure to the next, each of which has a name: `parts` are what the second holds beside the first, in
    bytes, and add up to the difference. What nothing accounts for is called `unexplained`."""

    source: str
    source_bytes: int
    target: str
    target_bytes: int
    parts: Mapping[str, int]

    @classmethod
    def of(cls, source: tuple[str, int], target: tuple[str, int], known: Mapping[str, int], rest: str) -> Step:
        """With what the known parts leave under the name `rest`."""
        left = target[1] - source[1] - sum(known.values())
        return cls(*source, *target, {**known, rest: left})


UNEXPLAINED = "unexplained"


@dataclass(frozen=True)
class MemoryReport:
    """All that was measured of one plan; `process` tells whether in a process of its own or in one that has done other
    things, whose figures are coloured by them."""

    process: Literal["own", "shared"]
    weights_bytes: int
    planned: PlannedMemory
    arena: ArenaMemory
    tensors: TensorMemory
    host: HostMemory | None
    allocator: AllocatorMemory | None
    graphs: GraphMemory | None
    driver: DriverMemory | None

    @property
    def steps(self) -> tuple[Step, ...]:
        """From the planned bytes to what the device shows, as far as they were measured."""
        planned, arena = ("planned cache", self.planned.cache_bytes), ("arena", self.arena.cache_bytes)
        peaks = self.tensors.peak_bytes
        tensors = ("tensors", max(peaks.opened, peaks.drawing, peaks.decode))
        beside = {"index tables": self.arena.index_bytes, "workspace": self.arena.workspace_bytes}
        seen = {UNEXPLAINED: self.tensors.arena_bytes - self.arena.cache_bytes}  # storage that no operation made
        steps = [Step.of(planned, arena, {}, UNEXPLAINED), Step.of(arena, tensors, {**seen, **beside}, "activations")]
        model = {"weights": self.weights_bytes}
        if self.allocator is not None:
            steps += self._allocator_steps(self.allocator, tensors, model)
        elif self.host is not None and self.host.before_bytes is not None and self.host.loaded_bytes is not None:
            before, loaded = self.host.before_bytes, self.host.loaded_bytes
            known = {"Python and libraries": before, "left by loading": loaded - before - self.weights_bytes}
            steps.append(Step.of(tensors, ("resident", self.host.most_bytes), model | known, UNEXPLAINED))
        return tuple(steps)

    def _allocator_steps(
        self, allocator: AllocatorMemory, tensors: tuple[str, int], model: dict[str, int]
    ) -> list[Step]:
        phases = vars(allocator.peaks).values()
        requested = [p.requested_bytes for p in phases if p.requested_bytes is not None]
        allocated = ("allocated", max(peaks.allocated_bytes for peaks in phases))
        reserved = ("reserved", max(peaks.reserved_bytes for peaks in phases))
        steps = []
        if requested:
            asked = ("requested", max(requested))
            steps.append(Step.of(tensors, asked, model, UNEXPLAINED))
            steps.append(Step.of(asked, allocated, {}, "rounding"))
        else:
            steps.append(Step.of(tensors, allocated, model, UNEXPLAINED))
        steps.append(Step.of(allocated, reserved, {}, "kept by the allocator"))
        if self.driver is not None and self.driver.process_bytes is not None:
            process = ("process", self.driver.process_bytes)
            steps.append(Step.of(reserved, process, {}, "driver context"))
            if self.driver.used_bytes is not None and self.driver.reserved_bytes is not None:
                device = ("device", self.driver.used_bytes + self.driver.reserved_bytes)
                steps.append(
                    Step.of(process, device, {"reserved by the driver": self.driver.reserved_bytes}, "other processes")
                )
        return steps

    @property
    def device_peak_bytes(self) -> int | None:
        """The CUDA allocator's peak of allocated bytes above what was allocated before the cache was opened."""
        if self.allocator is None:
            return None
        phases: list[AllocatorPeaks] = list(vars(self.allocator.peaks).values())
        return max(peaks.allocated_bytes for peaks in phases) - self.allocator.weights_bytes

    def to_json(self) -> dict[str, Any]:
        """As a row of results has it."""
        return asdict(self) | {"steps": [asdict(step) for step in self.steps]}


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
        told = torch.cuda.memory_stats(self._device)
        requested = told.get("requested_bytes.all.peak")
        return AllocatorPeaks(
            None if requested is None else int(requested),
            torch.cuda.max_memory_allocated(self._device),
            torch.cuda.max_memory_reserved(self._device),
        )


def driver_memory(device: torch.device) -> DriverMemory | None:
    """What NVML tells of this process and the device; None without a GPU, without pynvml or without access."""
    if device.type != "cuda":
        return None
    try:
        import pynvml
    except ImportError:
        return None
    process = total = reserved = used = free = None
    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
    except pynvml.NVMLError:
        return None
    try:
        mine = [p for p in pynvml.nvmlDeviceGetComputeRunningProcesses(handle) if p.pid == os.getpid()]
        told = mine[0].usedGpuMemory if mine else None  # None in containers that hide processes
        process = None if told is None else int(told)
    except pynvml.NVMLError:
        pass
    try:
        info = pynvml.nvmlDeviceGetMemoryInfo(handle, version=pynvml.nvmlMemory_v2)
        total, reserved, used, free = int(info.total), int(info.reserved), int(info.used), int(info.free)
    except (pynvml.NVMLError, AttributeError, TypeError):  # an older driver, or an older pynvml
        pass
    return DriverMemory(process, total, reserved, used, free)


def model_tensors(model: ImageModel[Any]) -> list[Tensor]:
    """Weights, and all other tensors that the model holds from one image to the next, on its device."""
    found: list[Tensor] = []
    seen: set[int] = set()
    todo: list[Any] = [model]
    while todo:
        one = todo.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        if isinstance(one, Tensor):
            found.append(one)
        elif isinstance(one, dict):
            todo += one.values()
        elif isinstance(one, list | tuple | set):
            todo += one
        elif isinstance(one, nn.Module) or type(one).__module__.startswith("heatkv"):
            todo.append(getattr(one, "__dict__", {}))
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
) -> MemoryReport:
    """All ledgers of drawing `batch` images with what `open_` opens, under `plan`.

    It is drawn twice: as it is, for the system's, the allocator's and the driver's figures, then under the ledger of
    tensors; on a CUDA device also with graphs. `loading`, of a process that has done nothing but load the model, makes
    the figures those of a process of its own.
    """
    device = model.device
    host = allocator = graphs = driver = None
    labels = model.labels(batch)
    if device.type == "cuda":
        meter = AllocatorMeter(device)
        held = torch.cuda.memory_allocated(device)
        generator, peaks = in_phases(lambda: open_(False), labels, seed, meter.reset, meter.peaks)
        allocator = AllocatorMemory(held, None if loading is None else loading.allocator, peaks)
        driver = driver_memory(device)
        del generator
        graphs = _graph_memory(open_, labels, seed, meter)
    else:
        host = _host_memory(open_, labels, seed, loading)
    with TensorLedger(device) as ledger:

        def opened() -> Generator[Any]:
            made = open_(False)
            ledger.follow(made.cache.tables)  # many come from numpy
            return made

        generator, tensors = in_phases(opened, labels, seed, ledger.reset_peak, lambda: ledger.peak)
        cache = generator.cache
        arena = ArenaMemory(cache.allocated_bytes, cache.index_bytes, cache.workspace_bytes)
        seen = ledger.bytes_seen(cache.held)
    rows = cache.rows
    return MemoryReport(
        process="shared" if loading is None else "own",
        weights_bytes=storage_bytes(model_tensors(model)),
        planned=PlannedMemory(plan.bytes(rows, storage), plan.budget_bytes(rows, storage)),
        arena=arena,
        tensors=TensorMemory(tensors, seen),
        host=host,
        allocator=allocator,
        graphs=graphs,
        driver=driver,
    )


def _host_memory(open_: Open, labels: list[Any], seed: int, loading: Loading | None) -> HostMemory:
    resident = ResidentMemory()
    _, peaks = in_phases(lambda: open_(False), labels, seed, resident.reset, resident.peak_bytes)
    return HostMemory(
        resident.source,
        None if loading is None else loading.before_bytes,
        None if loading is None else loading.resident_peak_bytes,
        None if loading is None else loading.loaded_bytes,
        peaks if resident.resets else None,
        max(vars(peaks).values()),
    )


def _graph_memory(open_: Open, labels: list[Any], seed: int, meter: AllocatorMeter) -> GraphMemory:
    meter.reset()
    generator = open_(True)
    try:
        for _ in range(3):  # warms up, records, replays
            generator.draw(labels, seed)
    except GraphError as error:
        return GraphMemory(None, None, str(error))
    runner: Any = generator.runner
    return GraphMemory(runner.pool_bytes, meter.peaks())


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
            f"a snapshot is one of the CUDA allocator; the model is on {device}: leave --snapshot out, or take a GPU "
            "(--device cuda)"
        )


def record_snapshots() -> None:
    """Let the CUDA allocator note from now on what is taken where, for `save_snapshot`."""
    torch.cuda.memory._record_memory_history(max_entries=1_000_000)


def save_snapshot(path: Path) -> None:
    """The allocator's state and history as a pickle, for https://pytorch.org/memory_viz; ends the recording."""
    with replacing(path) as temporary:
        torch.cuda.memory._dump_snapshot(str(temporary))
    torch.cuda.memory._record_memory_history(enabled=None)
