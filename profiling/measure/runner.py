"""Measures any policy on any model: a row of results is begun with its bytes, and its parts are filled one by one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from typing import Any, TypeVar

import torch
from msgspec import structs

from heatkv.core.storage_type import StorageType
from heatkv.engine.arena_cache import ArenaCache, storage_bytes
from heatkv.engine.open_cache import open_cache
from heatkv.errors import GraphError, HeatKVError, out_of_memory
from heatkv.generation.graphs import GraphRunner
from heatkv.generation.loop import Generator
from heatkv.generation.micro_batches import free_bytes
from heatkv.models.base import ImageModel
from heatkv.models.sampling import Settings
from heatkv.profiling.measure.fidelity import paired_difference
from heatkv.profiling.measure.latency import CONFIDENCE, latency_of, measure_breakdown, measure_interleaved
from heatkv.profiling.measure.ledger import TensorLedger
from heatkv.profiling.measure.memory import (
    Loading,
    ResidentMemory,
    allocator_peaks,
    cache_timeline,
    driver_memory,
    model_tensors,
    steps,
)
from heatkv.profiling.measure.subjects import Subject
from heatkv.profiling.results import ledgers
from heatkv.profiling.results.comparable import PLACE, REFERENCE, subject_key
from heatkv.profiling.results.row import Latency, Memory, ResultRow, Times, TimingMachine, Versus

S = TypeVar("S")
T = TypeVar("T")
Open = Callable[..., Generator[Any]]
"""Opens a cache and what draws with it; with CUDA graphs when `graphs`."""

BREAKDOWN_RUNS = 3
"""Drawings that are watched, scale by scale and phase by phase."""
LEAST_USED = 0.95
"""Of the budget: a policy that uses less could not spend what the others may, and its row says so."""
PAIRED_WITH = "heatkv"
"""The policy that every other one is compared with at the same budget, on the same samples."""


def first_row(
    model: ImageModel[Any],
    subject: Subject,
    *,
    batch: int,
    rows: int,
    seed: int,
    comparison: str = "",
    measurement: str = "",
    allocate: bool = True,
) -> ResultRow:
    """A row with planned, allocated and full bytes, and nothing else measured yet.

    Allocated bytes are read from the storage of a real arena, and None unless `allocate`.
    """
    geometry, plans, storage = model.geometry, subject.plans, subject.storage
    held = StorageType.parse(storage)
    caches = [
        open_cache(
            plan, rows, model.compute_dtype, model.device if allocate else "meta", model.key_angles,
            code=held.code, attention=subject.attention,
        )
        for plan in plans
    ]  # fmt: skip
    budget_bytes, planned = plans[0].budget_bytes(rows, storage), max(plan.bytes(rows, storage) for plan in plans)
    allocated = max(cache.allocated_bytes for cache in caches) if allocate else None
    if allocated is not None and allocated > budget_bytes:
        raise HeatKVError(
            f"{subject.name}: the arena takes {allocated} bytes, more than the budget of {budget_bytes}; this is a "
            "fault of HeatKV, please report it"
        )
    return ResultRow(
        model=model.name,
        model_fingerprint=model.fingerprint,
        policy=subject.policy,
        settings=dict(plans[0].settings),
        budget=subject.budget,
        rows=rows,
        batch=batch,
        seed=seed,
        dtype=held.compute,
        storage=storage,
        attention=caches[0].attention,
        schedule=geometry.schedule.scales,
        draws=len(plans),
        comparison=comparison,
        measurement=measurement,
        budget_bytes=budget_bytes,
        planned_bytes=planned,
        allocated_bytes=allocated,
        full_bytes=geometry.full_bytes(rows, held.compute),
        current_bytes=max(cache.current_bytes for cache in caches),
        index_bytes=max(cache.index_bytes for cache in caches),
        workspace_bytes=max(cache.workspace_bytes for cache in caches),
        timeline_bytes=tuple(map(tuple, cache_timeline(plans[0], rows, storage).tolist())),
        predicted_kl=plans[0].predicted_kl,
        under_used=planned < LEAST_USED * budget_bytes,
        had_no_effect=subject.policy != REFERENCE and all(plan.had_no_effect() for plan in plans),
    )


def in_phases(
    open_: Open,
    labels: list[Any],
    seed: int,
    reset: Callable[[], object],
    read: Callable[[], T],
    look: Callable[[ArenaCache], S] = lambda _: None,  # type: ignore[assignment, return-value]
) -> tuple[S, ledgers.Phases[T]]:
    """A figure of opening what `open_` opens, of drawing and of decoding once, as `generate` does: the cache, at which
    `look` looks, is given back before pictures are decoded, and those are handed out in slices."""

    def figure() -> T:
        value = read()
        reset()
        return value

    reset()
    generator = open_()
    figures = [figure()]
    drawn, seen = generator.draw(labels, seed, decode=False), look(generator.cache)
    figures.append(figure())
    generator.give_back()
    for images in generator.pictures(drawn):
        del images
    figures.append(figure())
    return seen, ledgers.Phases(*figures)


def subject_memory(
    model: ImageModel[Any],
    subject: Subject,
    batch: int,
    settings: Settings,
    *,
    seed: int = 0,
    loading: Loading | None = None,
) -> Memory:
    """All ledgers of drawing `batch` images under the first plan of a subject.

    It is drawn twice: as it is, for the system's, the allocator's and the driver's figures, then under the ledger of
    tensors; on a CUDA device also with graphs. `loading`, of a process that has done nothing but load the model, makes
    the figures those of a process of its own.
    """
    device, plan, storage = model.device, subject.plans[0], subject.storage
    labels, open_ = model.labels(batch), partial(subject.generator, model, settings, 0, batch)
    measure = _gpu_ledgers if device.type == "cuda" else _host_ledger
    of_device = measure(open_, labels, seed, device, loading or Loading())
    with TensorLedger(device) as ledger:

        def opened() -> Generator[Any]:
            generator = open_()
            ledger.follow(generator.cache.tables)  # many come from numpy
            return generator

        def look(cache: ArenaCache) -> tuple[int, ledgers.ArenaMemory, ledgers.PlannedMemory]:
            arena = ledgers.ArenaMemory(
                cache_bytes=cache.allocated_bytes, index_bytes=cache.index_bytes, workspace_bytes=cache.workspace_bytes
            )
            planned_bytes, budget_bytes = plan.bytes(cache.rows, storage), plan.budget_bytes(cache.rows, storage)
            planned = ledgers.PlannedMemory(cache_bytes=planned_bytes, budget_bytes=budget_bytes)
            return ledger.bytes_seen(cache.held), arena, planned

        (arena_bytes, arena, planned), tensors = in_phases(
            opened, labels, seed, ledger.reset_peak, lambda: ledger.peak, look
        )
    found = ledgers.Ledgers(
        process="shared" if loading is None else "own",
        weights_bytes=storage_bytes(model_tensors(model)),
        planned=planned,
        arena=arena,
        tensors=ledgers.TensorMemory(peak_bytes=tensors, arena_bytes=arena_bytes),
        **of_device,
    )
    allocator, driver = found.allocator, found.driver
    most = None if allocator is None else max(peaks.allocated_bytes for peaks in allocator.peaks.each)
    return Memory(
        memory=structs.replace(found, steps=steps(found)),
        device_peak_bytes=None if allocator is None or most is None else most - allocator.weights_bytes,
        nvml_bytes=None if driver is None else driver.process_bytes,
    )


def _host_ledger(open_: Open, labels: list[Any], seed: int, device: torch.device, took: Loading) -> dict[str, Any]:
    resident = ResidentMemory()
    _, most = in_phases(open_, labels, seed, resident.reset, resident.peak_bytes)
    host = ledgers.HostMemory(
        source=resident.source, before_bytes=took.before_bytes, loading_peak_bytes=took.peak_bytes,
        loaded_bytes=took.loaded_bytes, peak_bytes=most if resident.resets else None, most_bytes=max(most.each),
    )  # fmt: skip
    return {"host": host}


def _gpu_ledgers(open_: Open, labels: list[Any], seed: int, device: torch.device, took: Loading) -> dict[str, Any]:
    reset, read = partial(torch.cuda.reset_peak_memory_stats, device), partial(allocator_peaks, device)
    weights_bytes = torch.cuda.memory_allocated(device)
    driver, peaks = in_phases(open_, labels, seed, reset, read, lambda _: driver_memory(device))
    allocator = ledgers.AllocatorMemory(weights_bytes=weights_bytes, loading=took.allocator, peaks=peaks)
    reset()
    generator = open_(graphs=True)
    try:
        for _ in range(3):  # warms up, records, replays
            generator.draw(labels, seed)
    except GraphError as error:
        graphs = ledgers.GraphMemory(reason=str(error))
    else:
        assert isinstance(generator.runner, GraphRunner)
        graphs = ledgers.GraphMemory(pool_bytes=generator.runner.pool_bytes, peaks=read())
    return {"allocator": allocator, "driver": driver, "graphs": graphs}


def measure_latency(
    model: ImageModel[Any],
    subjects: Sequence[Subject],
    *,
    batch: int,
    settings: Settings,
    repeats: int,
    machine: TimingMachine,
    seed: int = 0,
    progress: Callable[[], object] = lambda: None,
) -> tuple[dict[str, Times], dict[str, str]]:
    """Times of drawing `batch` images, decode included, by the names of the subjects, and why some have none with
    graphs. Subjects are timed in turns, each with its first plan, as many together as half of the free memory has room
    for; then, in at most BREAKDOWN_RUNS further runs each, it is watched where the time goes.

    On CUDA devices then with graphs, one subject after another, since every one's graphs hold memory. `machine` is
    what the times are to be read with; `progress` is called after every run.
    """
    labels, scales, watched = model.labels(batch), len(model.geometry.schedule), min(repeats, BREAKDOWN_RUNS)

    def drawing(generator: Generator[Any]) -> Callable[[], object]:
        return lambda: generator.draw(labels, seed)

    times: dict[str, Times] = {}
    for together in _that_fit(subjects, batch * settings.rows_per_image, free_bytes(model.device) // 2):
        timed = datetime.now(UTC).isoformat(timespec="milliseconds")
        calls = {subject.name: drawing(subject.generator(model, settings, 0, batch)) for subject in together}
        runs = measure_interleaved(calls, model.device, repeats, progress)
        for name, call in calls.items():
            latency = latency_of(runs[name], *measure_breakdown(call, model.device, scales, watched))
            times[name] = Times(latency_ms=latency, timed=timed, timing_machine=machine)
        del call
        calls.clear()  # frees their caches
    no_graphs = {}
    for subject in subjects if model.device.type == "cuda" else ():
        generator = subject.generator(model, settings, 0, batch, graphs=True)
        try:
            latency, pool_bytes = graph_latency(generator, drawing(generator), repeats, progress)
        except GraphError as error:
            no_graphs[subject.name] = str(error)
        else:
            with_graphs = replace(times[subject.name], graph_latency_ms=latency, graph_pool_bytes=pool_bytes)
            times[subject.name] = with_graphs
    return times, no_graphs


def _that_fit(subjects: Sequence[Subject], rows: int, memory: int) -> list[list[Subject]]:
    """The subjects in groups whose caches take no more than the memory together, or of one."""
    groups, left = list[list[Subject]](), 0
    for subject in subjects:
        taken = subject.plans[0].bytes(rows, subject.storage)
        if not groups or taken > left:
            groups.append([])
            left = memory
        groups[-1].append(subject)
        left -= taken
    return groups


def graph_latency(
    generator: Generator[Any], draw: Callable[[], object], repeats: int, progress: Callable[[], object] = lambda: None
) -> tuple[Latency, int | None]:
    """Time of `draw`, which draws by a generator with graphs that has drawn nothing yet, and what its graphs hold.

    Raises GraphError where there can be no graphs.
    """
    assert isinstance(generator.runner, GraphRunner)
    draw()  # warms up; the next one, which is not timed either, records
    device, scales = generator.model.device, len(generator.model.geometry.schedule)
    runs = measure_interleaved({"": draw}, device, repeats, progress)[""]
    by_scale, _ = measure_breakdown(draw, device, scales, min(repeats, BREAKDOWN_RUNS))
    return latency_of(runs, by_scale), generator.runner.pool_bytes


def with_versus(rows: Sequence[ResultRow]) -> list[ResultRow]:
    """The rows with how every one's KL differs from another policy's on the same samples, with a paired interval.

    The other is `heatkv` at the row's budget or, where no row has that policy, the first policy named. There is no
    difference for the full cache and for the other itself.
    """
    with_kl = [row for row in rows if row.kl_of_images and row.policy != REFERENCE]
    policies = [row.policy for row in with_kl]
    wanted = PAIRED_WITH if PAIRED_WITH in policies else next(iter(policies), None)
    others = {subject_key(row, PLACE): row for row in with_kl if row.policy == wanted}

    def versus(row: ResultRow) -> Versus | None:
        other = others.get(subject_key(row, PLACE))
        if other is None or not other.kl_of_images or not row.kl_of_images or row.policy in (REFERENCE, wanted):
            return None
        if len(row.kl_of_images) < 2:  # one image has no interval
            return None
        found = paired_difference(row.kl_of_images, other.kl_of_images)
        return Versus(
            policy=other.policy, difference=found.mean, interval=(found.low, found.high), confidence=CONFIDENCE,
            images=len(row.kl_of_images),
        )  # fmt: skip

    return [replace(row, versus=versus(row)) for row in rows]


def why_failed(error: Exception) -> str:
    """One line for a row of results."""
    line = " ".join(str(error).split())
    if isinstance(error, HeatKVError):
        return line
    return f"{'out of memory' if out_of_memory(error) else type(error).__name__}: {line}"
