"""Measures any policy on any model: plan, bytes, latency, fidelity, one result row each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from heatkv.core.budget import Budget
from heatkv.core.plan import CachePlan
from heatkv.core.rankings import HeadRankings
from heatkv.core.schema import seed_after
from heatkv.core.statistics import Statistics
from heatkv.core.storage_type import StorageType
from heatkv.engine.token_cache import open_cache
from heatkv.errors import GraphError, HeatKVError
from heatkv.generation.graphs import GraphRunner
from heatkv.generation.loop import Generator
from heatkv.models.base import ImageModel
from heatkv.models.sampling import Settings
from heatkv.policies.base import PlanningProblem, make_policy
from heatkv.profiling.measure.fidelity import Fidelity, FidelityBench, paired_bootstrap, spread
from heatkv.profiling.measure.latency import Latency, measure_breakdown, measure_interleaved
from heatkv.profiling.measure.memory import Loading, MemoryReport, cache_timeline, measure_memory

BREAKDOWN_RUNS = 3
"""Drawings that are watched, scale by scale and phase by phase."""
LEAST_USED = 0.95
"""Of the budget: a policy that uses less could not spend what the others may, and its row says so."""


@dataclass(frozen=True)
class Subject:
    """One line of a comparison: a policy at a budget, with several plans when the policy draws at random.

    `storage` is how its cache is held, see StorageType; `attention` names the kernel.
    """

    policy: str
    budget: str
    plans: tuple[CachePlan, ...]
    storage: str
    attention: str = "auto"

    def generator(
        self, model: ImageModel[Any], settings: Settings, plan: int, batch: int, graphs: bool = False
    ) -> Generator[Any]:
        """What draws `batch` images under one of the plans."""
        coding = StorageType.parse(self.storage).code
        return Generator(
            model, self.plans[plan], batch, settings, storage=coding, attention=self.attention, graphs=graphs
        )

    @property
    def name(self) -> str:
        return f"{self.policy} {self.budget}"


def plan_subjects(
    model: ImageModel[Any],
    policies: Sequence[str],
    budgets: Sequence[Budget],
    *,
    statistics: Statistics | None,
    rankings: HeadRankings | None = None,
    rows: int,
    storage: str,
    seed: int = 0,
    draws: int = 1,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    attention: str = "auto",
) -> list[Subject]:
    """A subject for every budget and policy; `full`, whatever the budgets, comes once and first.

    `options` are what each policy is made with, by its name.
    """

    def problem(budget: Budget, draw: int = 0) -> PlanningProblem:
        return PlanningProblem(
            model.geometry, budget, statistics, rankings, seed_after(seed, draw), rows, storage, model.name
        )

    everything = Budget.parse("100%")
    full = make_policy("full").plan(problem(everything))
    subjects = [Subject("full", str(everything), (full,), storage, attention=attention)]
    for budget in budgets:
        for name in policies:
            if name == "full":
                continue
            policy = make_policy(name, **(options or {}).get(name, {}))
            count = draws if policy.random else 1
            plans = tuple(policy.plan(problem(budget, draw)) for draw in range(count))
            subjects.append(Subject(name, str(budget), plans, storage, attention))
    return subjects


def bytes_row(model: ImageModel[Any], subject: Subject, rows: int, allocate: bool = True) -> dict[str, Any]:
    """Planned, allocated and full bytes; allocated is read from the storage of a real arena, null unless `allocate`.

    What is there beside the arena is told as well: tables, memory to work in, and the running layer's own keys and
    values.
    """
    geometry, plans, storage = model.geometry, subject.plans, subject.storage
    held = StorageType.parse(storage)
    caches = [
        open_cache(
            plan, rows, model.compute_dtype, model.device if allocate else "meta", model.key_angles,
            storage=held.code, attention=subject.attention,
        )
        for plan in plans
    ]  # fmt: skip
    row: dict[str, Any] = {
        "model": model.name,
        "model_fingerprint": model.fingerprint,
        "policy": subject.policy,
        "settings": dict(plans[0].settings),
        "budget": subject.budget,
        "rows": rows,
        "dtype": held.compute,
        "storage": storage,
        "attention": caches[0].attention,
        "schedule": geometry.schedule.to_json(),
        "budget_bytes": plans[0].budget_bytes(rows, storage),
        "planned_bytes": max(plan.bytes(rows, storage) for plan in plans),
        "allocated_bytes": max(cache.allocated_bytes for cache in caches) if allocate else None,
        "full_bytes": geometry.full_bytes(rows, held.compute),
        "current_bytes": max(cache.current_bytes for cache in caches),
        "index_bytes": max(cache.index_bytes for cache in caches),
        "workspace_bytes": max(cache.workspace_bytes for cache in caches),
        "predicted_kl": plans[0].predicted_kl,
        "timeline_bytes": cache_timeline(plans[0], rows, storage).tolist(),
        "under_used": max(plan.bytes(rows, storage) for plan in plans)
        < LEAST_USED * plans[0].budget_bytes(rows, storage),
        "had_no_effect": subject.policy != "full" and all(plan.had_no_effect() for plan in plans),
        "draws": len(plans),
    }
    if allocate and row["allocated_bytes"] > row["budget_bytes"]:
        raise HeatKVError(
            f"{subject.name}: the arena takes {row['allocated_bytes']} bytes, more than the budget of "
            f"{row['budget_bytes']}; this is a fault of HeatKV, please report it"
        )
    return row


@dataclass(frozen=True)
class Timing:
    """Latency of drawing as Python runs it, and with graphs, with what these hold on the device.

    Without a CUDA device there is nothing of graphs; nor where they could not be had, for the reason `no_graphs`.
    """

    eager: Latency
    graph: Latency | None = None
    graph_pool_bytes: int | None = None
    no_graphs: str | None = None


def measure_latency(
    model: ImageModel[Any],
    subjects: Sequence[Subject],
    *,
    rows: int,
    settings: Settings,
    repeats: int,
    seed: int = 0,
    progress: Callable[[], None] | None = None,
) -> dict[str, Timing]:
    """Time of drawing `rows` rows of images, decode included, for every subject in turns; its first plan is taken.
    Then, in at most BREAKDOWN_RUNS further runs each, where the time goes.

    On CUDA devices then with graphs, one subject after another, since every one's graphs hold memory. `progress` is
    told of every run.
    """
    batch = images_of_rows(rows, settings)
    labels = model.labels(batch)

    def drawing(by: Generator[Any]) -> Callable[[], object]:
        return lambda: by.draw(labels, seed)

    calls = {subject.name: drawing(subject.generator(model, settings, 0, batch)) for subject in subjects}
    times = measure_interleaved(calls, model.device, repeats, progress)
    scales, watched = len(model.geometry.schedule), min(repeats, BREAKDOWN_RUNS)
    measured = {
        name: Timing(replace(times[name], breakdown=measure_breakdown(call, model.device, scales, watched)))
        for name, call in calls.items()
    }
    if model.device.type == "cuda":
        calls.clear()
        for subject in subjects:
            made = subject.generator(model, settings, 0, batch, graphs=True)
            measured[subject.name] = timed_with_graphs(measured[subject.name], made, drawing(made), repeats, progress)
    return measured


def timed_with_graphs(
    timing: Timing,
    generator: Generator[Any],
    draw: Callable[[], object],
    repeats: int,
    progress: Callable[[], None] | None = None,
) -> Timing:
    """The timing with that of `draw`, which draws by a generator with graphs that has drawn nothing yet."""
    assert isinstance(generator.runner, GraphRunner)
    try:
        draw()  # warms up; the next one, which is not timed either, records
        graph = measure_interleaved({"": draw}, generator.model.device, repeats, progress)[""]
        scales, watched = len(generator.model.geometry.schedule), min(repeats, BREAKDOWN_RUNS)
        within = measure_breakdown(draw, generator.model.device, scales, watched, phases=False)
        graph = replace(graph, breakdown=within)
    except GraphError as error:
        return replace(timing, no_graphs=str(error))
    return replace(timing, graph=graph, graph_pool_bytes=generator.runner.pool_bytes)


def images_of_rows(rows: int, settings: Settings) -> int:
    """How many images have so many cache rows. Raises HeatKVError when guidance needs an even number."""
    images, rest = divmod(rows, settings.rows_per_image)
    if rest or images < 1:
        raise HeatKVError(f"rows={rows} is no positive multiple of {settings.rows_per_image}, the rows of one image")
    return images


FIDELITY = (
    "images", "kl", "kl_per_scale", "kl_of_draws", "kl_of_images", "top1_agreement", "top1_per_scale", "top1_of_images",
    "pictures", "psnr_db", "psnr_of_pictures", "ssim", "ssim_of_pictures", "lpips", "lpips_of_pictures", "fid",
    "spread", "not_measured",
)  # fmt: skip
"""What `fidelity_row` measures."""
REFERENCE_POLICY = "heatkv"
"""Whom every policy is compared with at the same budget, on the same samples."""
SAME_PLACE = ("budget", "rows", "storage", "seed", "batch")
"""What a row shares with the one it is compared with, where it is told."""


class BatchComparison:
    """Compares subjects batch by batch; the generator stays for the next batch of the same plan."""

    def __init__(self, bench: FidelityBench) -> None:
        self.bench = bench
        self._last: tuple[tuple[int, int, int], Generator[Any]] | None = None

    def of(self, subject: Subject, index: int) -> list[Fidelity]:
        """What every plan of the subject gives over the images of a batch."""
        if not self.bench.has(index):
            self._last = None  # two caches at once may be too many
            self.bench.reference(index)
        return [
            self.bench.compare_batch(self._generator(subject, plan, len(self.bench.batches[index])), index)
            for plan in range(len(subject.plans))
        ]

    def _generator(self, subject: Subject, plan: int, batch: int) -> Generator[Any]:
        key = (id(subject), plan, batch)
        if self._last is None or self._last[0] != key:
            self._last = None  # frees its cache first
            self._last = key, subject.generator(self.bench.model, self.bench.settings, plan, batch)
        return self._last[1]


def fidelity_row(
    bench: FidelityBench, subject: Subject, compared: Sequence[Fidelity] | None = None
) -> tuple[dict[str, Any], Fidelity]:
    """Fidelity figures of a subject, means over its plans, and the details of its first plan; from what was `compared`
    of every plan, or compared now.

    Figures of single images and pictures are kept, so that any two rows of equal samples can be compared in pairs
    later; where a subject has several plans they are means over those.
    """
    results = (
        list(compared)
        if compared is not None
        else [
            bench.compare(partial(subject.generator, bench.model, bench.settings, plan))
            for plan in range(len(subject.plans))
        ]
    )
    kl, top1 = _mean([r.kl_of_images() for r in results]), _mean([r.top1_of_images() for r in results])
    assert kl is not None
    assert top1 is not None
    drawn = {
        "psnr_db": _mean([r.of_pictures("psnr_db") for r in results]),
        "ssim": _mean([r.of_pictures("ssim") for r in results]),
        "lpips": _mean([r.of_pictures("lpips") for r in results]),
    }
    of_samples = {"kl": kl, "top1_agreement": top1, **{k: v for k, v in drawn.items() if v is not None}}
    distances = [result.fid for result in results if result.fid is not None]
    row: dict[str, Any] = {
        "images": len(kl),
        "kl": float(np.mean([result.kl() for result in results])),
        "kl_per_scale": np.mean([result.kl_per_scale() for result in results], axis=0).tolist(),
        "kl_of_draws": [result.kl() for result in results],
        "kl_of_images": kl.tolist(),
        "top1_agreement": float(np.mean([result.top1_agreement() for result in results])),
        "top1_per_scale": np.mean([result.top1_per_scale() for result in results], axis=0).tolist(),
        "top1_of_images": top1.tolist(),
        "pictures": bench.pictures,
        "fid": float(np.mean(distances)) if distances else None,
        "spread": {name: spread(values) for name, values in of_samples.items()},
        "not_measured": results[0].reasons,
    }
    for name, values in drawn.items():
        row[name] = None if values is None else float(values.mean())
        row[f"{name.removesuffix('_db')}_of_pictures"] = None if values is None else values.tolist()
    return row, results[0]


def _mean(values: Sequence[NDArray[np.float64] | None]) -> NDArray[np.float64] | None:
    """Of every sample, over plans."""
    present = [value for value in values if value is not None]
    return np.mean(present, axis=0) if len(present) == len(values) else None


def versus(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any] | None]:
    """How every row's KL differs from its reference's on the same samples, with a paired bootstrap interval.

    The reference is `heatkv` at the row's budget, or, where no row has that policy, the first policy named. None for
    the full cache, for the reference itself, and where there is none.
    """
    policies = [str(row["policy"]) for row in rows if row["policy"] != "full" and row.get("kl_of_images")]
    wanted = REFERENCE_POLICY if REFERENCE_POLICY in policies else next(iter(policies), None)
    told: list[dict[str, Any] | None] = []
    for row in rows:
        place = [row.get(name) for name in SAME_PLACE]
        others = [
            other
            for other in rows
            if other["policy"] == wanted and other.get("kl_of_images")
            and [other.get(name) for name in SAME_PLACE] == place
        ]  # fmt: skip
        if row["policy"] in ("full", wanted) or not row.get("kl_of_images") or len(others) != 1:
            told.append(None)
            continue
        found = paired_bootstrap(row["kl_of_images"], others[0]["kl_of_images"])
        told.append({"policy": wanted, **found.to_json()})
    return told


def latency_row(timing: Timing) -> dict[str, Any]:
    """Latency as fields of a result row."""
    return {
        "latency_ms": timing.eager.to_json(),
        "graph_latency_ms": None if timing.graph is None else timing.graph.to_json(),
        "graph_pool_bytes": timing.graph_pool_bytes,
    }


def subject_memory(
    model: ImageModel[Any],
    subject: Subject,
    batch: int,
    settings: Settings,
    *,
    seed: int = 0,
    loading: Loading | None = None,
) -> MemoryReport:
    """All ledgers of drawing `batch` images under the first plan of a subject; `loading` is told of a process of its
    own."""
    return measure_memory(
        model, subject.plans[0], lambda graphs: subject.generator(model, settings, 0, batch, graphs), batch,
        subject.storage, seed=seed, loading=loading,
    )  # fmt: skip


def memory_row(report: MemoryReport) -> dict[str, Any]:
    """Measured memory as fields of a result row."""
    return {
        "memory": report.to_json(),
        "device_peak_bytes": report.device_peak_bytes,
        "nvml_bytes": None if report.driver is None else report.driver.process_bytes,
    }
