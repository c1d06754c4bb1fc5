"""The three ledgers of memory against counts by hand, and the processes that measure it."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from msgspec import structs
from support import processes
from support.nvml import fake_nvml, no_access
from torch import Tensor

from heatkv.calibration.run import calibrate
from heatkv.core.budget import Budget
from heatkv.core.geometry import CacheGeometry
from heatkv.core.plan import Plan
from heatkv.core.schedule import ScaleSchedule
from heatkv.core.storage_type import UNCODED_SCALES
from heatkv.errors import HeatKVError
from heatkv.models.class_conditional import ClassConditionalModel
from heatkv.models.sampling import SamplingSettings
from heatkv.policies.base import PlanningProblem, make_policy
from heatkv.profiling.measure import memory, runner, worker
from heatkv.profiling.measure.ledger import TensorLedger
from heatkv.profiling.measure.memory import (
    Loading,
    ResidentMemory,
    cache_timeline,
    check_snapshots,
    driver_memory,
    steps,
)
from heatkv.profiling.measure.runner import first_row, subject_memory
from heatkv.profiling.measure.subjects import Subject, images_of_rows, plan_subjects
from heatkv.profiling.results.ledgers import (
    AllocatorMemory,
    AllocatorPeaks,
    ArenaMemory,
    DriverMemory,
    HostMemory,
    Ledgers,
    Phases,
    PlannedMemory,
    TensorMemory,
)
from heatkv.profiling.results.row import Memory

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
GEOMETRY = CacheGeometry(2, 3, 32, ScaleSchedule.square((1, 2, 3, 4, 5)))


def steps_of(ledgers: Ledgers) -> dict[tuple[str, str], dict[str, int]]:
    """The parts by the figures that they lead from and to; every step adds up."""
    found = steps(ledgers)
    for step in found:
        assert step.source_bytes + sum(step.parts.values()) == step.target_bytes
    for one, next_one in itertools.pairwise(found):
        assert (one.target, one.target_bytes) == (next_one.source, next_one.source_bytes)
    return {(step.source, step.target): dict(step.parts) for step in found}


def ledgers_of(memory: Memory) -> Ledgers:
    assert memory.memory is not None
    assert memory.memory.steps == steps(memory.memory)
    return memory.memory


def driver_of(*sizes: int | None) -> DriverMemory:
    names = ("process_bytes", "total_bytes", "reserved_bytes", "used_bytes", "free_bytes")
    return DriverMemory(**dict(zip(names, sizes, strict=True)))


# ------------------------------------------------------------------------------------------------ counting


def test_the_ledger_counts_what_it_is_told_of() -> None:
    from_numpy = torch.from_numpy(np.zeros(100, dtype=np.int32))
    with TensorLedger(CPU) as ledger:
        kept = torch.zeros(1000)
        torch.zeros(500)
        assert (ledger.peak, ledger.live) == (6000, 4000)
        ledger.reset_peak()
        assert (ledger.peak, ledger.bytes_seen([kept, kept[10:], from_numpy])) == (4000, 4000)
        ledger.follow([from_numpy, from_numpy[1:]])
        assert (ledger.peak, ledger.live) == (4400, 4400)
        assert ledger.bytes_seen([kept, from_numpy]) == 4400
    with TensorLedger(torch.device("meta")) as ledger:
        torch.zeros(1000)
        elsewhere = torch.zeros(10, device="meta")
        assert ledger.live == elsewhere.numel() * 4


class Counted:
    """What draws with tensors of known sizes: 4000 bytes of a cache, 400 of tables, 8000 while it draws, 12000
    and then 8000 while it decodes, without the cache."""

    def __init__(self) -> None:
        self.arena, self.table = torch.zeros(1000), torch.from_numpy(np.zeros(100, dtype=np.int32))
        self.cache = SimpleNamespace(
            held=(self.arena,), tables=[self.table], allocated_bytes=4000, index_bytes=400, workspace_bytes=0, rows=2
        )

    def draw(self, labels: list[int], seed: int, decode: bool) -> Tensor:
        assert (labels, seed, decode) == ([0], 5, False)
        drawn = torch.zeros(2000)
        return drawn[:250].clone()

    def give_back(self) -> None:
        del self.arena, self.table, self.cache

    def pictures(self, drawn: Tensor) -> Iterator[Tensor]:
        yield torch.zeros(3000)
        yield torch.zeros(2000)


def test_every_phase_of_tensors_counted_by_hand() -> None:
    plan = make_policy("streaming").plan(PlanningProblem(GEOMETRY, Budget.parse("100%")))
    model: Any = SimpleNamespace(device=CPU, geometry=GEOMETRY, labels=lambda batch: list(range(batch)))
    subject: Any = SimpleNamespace(plans=(plan,), storage="float32", generator=lambda *_: Counted())
    report = ledgers_of(subject_memory(model, subject, 1, None, seed=5))  # type: ignore[arg-type]
    # 30 cached tokens of 6 heads, 2 rows, 32 channels of 4 bytes for key and value each
    cache = 30 * 6 * 2 * 32 * 2 * 4
    assert report.planned == PlannedMemory(cache_bytes=cache, budget_bytes=cache)
    assert report.arena == ArenaMemory(cache_bytes=4000, index_bytes=400, workspace_bytes=0)
    peaks = Phases(4400, 4400 + 8000 + 1000, 400 + 1000 + 12000)  # numpy's table counts to the end
    assert report.tensors == TensorMemory(peak_bytes=peaks, arena_bytes=4000)
    assert report.weights_bytes == 0
    parts = {"unexplained": 0, "index tables": 400, "workspace": 0, "activations": 9000}
    assert list(steps_of(report).values()) == [{"unexplained": 4000 - cache}, parts]


def test_the_embedded_model(emoji: ClassConditionalModel) -> None:
    plan = emoji.plan("streaming", "20%")
    measured = subject_memory(emoji, Subject("streaming", "20%", (plan,), "float32"), 2, emoji.sampling)
    report, peak = ledgers_of(measured), plan.peak_token_heads
    assert report.planned.cache_bytes == report.arena.cache_bytes == peak * 4 * 32 * 2 * 4  # four rows
    assert report.planned.budget_bytes == int(0.2 * 230 * 72) * 4 * 32 * 2 * 4
    modules = (emoji.transformer, emoji.vqvae)
    weights = [x for module in modules for x in (*module.parameters(), *module.buffers())]
    assert report.weights_bytes == sum({x.data_ptr(): x.numel() * x.element_size() for x in weights}.values())
    parts = steps_of(report)
    assert parts["planned cache", "arena"] == {"unexplained": 0}
    assert parts["arena", "tensors"]["unexplained"] == 0
    # two images of 48 x 48 x 3 in fp32 at least
    assert report.tensors.peak_bytes.decode >= report.arena.cache_bytes + 2 * 48 * 48 * 3 * 4
    assert report.tensors.peak_bytes.opened >= sum(structs.astuple(report.arena))
    # what a CPU cannot tell
    assert (measured.device_peak_bytes, measured.nvml_bytes, measured.error) == (None, None, None)
    assert (report.process, report.allocator, report.graphs, report.driver) == ("shared", None, None, None)
    assert report.host is not None
    assert (report.host.before_bytes, report.host.loading_peak_bytes, report.host.loaded_bytes) == (None, None, None)
    assert ("tensors", "resident") not in parts
    assert driver_memory(CPU) is None


def test_snapshots_need_a_gpu() -> None:
    with pytest.raises(HeatKVError, match="a snapshot is one of the CUDA allocator, and the model is on cpu"):
        check_snapshots(CPU)
    check_snapshots(GPU)


def test_bytes_are_read_from_the_storage(emoji: ClassConditionalModel) -> None:
    policies, budgets = [make_policy("streaming"), make_policy("random")], [Budget.parse("30%"), Budget.parse("2MiB")]
    subjects = plan_subjects(emoji, policies, budgets, statistics=None, rows=4, storage="float32", draws=2)
    assert [(s.policy, s.budget, len(s.plans)) for s in subjects] == [
        ("full", "100%", 1), ("streaming", "30%", 1), ("random", "30%", 2),
        ("streaming", "2097152B", 1), ("random", "2097152B", 2),
    ]  # fmt: skip
    assert subjects[2].plans[0] != subjects[2].plans[1]
    for subject in subjects:
        row = first_row(emoji, subject, batch=2, rows=4, seed=0)
        peak = max(plan.peak_token_heads for plan in subject.plans)
        assert row.allocated_bytes == row.planned_bytes == peak * 4 * 2 * 4 * 32
        assert row.allocated_bytes <= row.budget_bytes <= row.full_bytes
        planned = first_row(emoji, subject, batch=2, rows=4, seed=0, allocate=False)
        assert (planned.allocated_bytes, planned.planned_bytes) == (None, row.planned_bytes)


@pytest.mark.parametrize(
    ("policy", "budget", "under_used", "had_no_effect"),
    [("ams-kv-like", "58%", True, False), ("snapkv", "58%", False, False), ("streaming", "100%", False, True)],
)
def test_a_budget_that_cannot_be_used_is_flagged(
    emoji: ClassConditionalModel, policy: str, budget: str, under_used: bool, had_no_effect: bool
) -> None:
    # ams-kv-like: whole scales only, in every layer alike
    plan = emoji.plan(policy, budget, statistics=calibrate(emoji, 1) if under_used else None)
    row = first_row(emoji, Subject(policy, budget, (plan,), "float32"), batch=1, rows=2, seed=0)
    assert (row.under_used, row.had_no_effect) == (under_used, had_no_effect)
    assert row.under_used == (row.planned_bytes < 0.95 * row.budget_bytes)


def test_rows_are_whole_images() -> None:
    assert (images_of_rows(3, SamplingSettings(cfg=0)), images_of_rows(4, SamplingSettings(cfg=1))) == (3, 2)
    with pytest.raises(HeatKVError, match="rows=3 is no positive multiple of 2"):
        images_of_rows(3, SamplingSettings(cfg=1))


# ---------------------------------------------------------------------------------------- the system, the device


def test_resident_memory_of_the_system() -> None:
    resident = ResidentMemory()
    before, now = resident.peak_bytes(), resident.now_bytes()
    assert now is None or 0 < now <= before
    touched = np.ones(128 << 20, dtype=np.uint8)
    assert resident.peak_bytes() >= (now or 0) + 0.9 * touched.nbytes
    if resident.resets:
        del touched
        resident.reset()
        assert resident.peak_bytes() < before + (64 << 20)
        assert resident.source == "VmHWM"


def test_where_the_peak_of_resident_memory_is_read(tmp_path: Path) -> None:
    resident = ResidentMemory(tmp_path / "none")
    assert (resident.source, resident.now_bytes()) == ("ru_maxrss of the whole process", None)
    assert resident.peak_bytes() > 10 << 20
    (tmp_path / "status").write_text("Name:\tx\nVmHWM:\t    2180 kB\nVmRSS:\t    2000 kB\n")
    (tmp_path / "clear_refs").mkdir()  # cannot be written
    resident = ResidentMemory(tmp_path)
    assert (resident.resets, resident.source) == (False, "VmHWM of the whole process")
    assert (resident.peak_bytes(), resident.now_bytes()) == (2180 << 10, 2000 << 10)
    (tmp_path / "clear_refs").rmdir()
    resident = ResidentMemory(tmp_path)
    assert (resident.resets, (tmp_path / "clear_refs").read_text()) == (True, "5")


def test_the_driver_separates_what_it_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="u"))
    for nvml, expected in (
        (fake_nvml(400), driver_of(400, 1000, 100, 600, 300)),
        (fake_nvml(None), driver_of(None, 1000, 100, 600, 300)),
        (fake_nvml(400, pids=(os.getpid() + 1,)), driver_of(None, 1000, 100, 600, 300)),
        (fake_nvml(400, nvmlDeviceGetMemoryInfo=no_access), driver_of(400, None, None, None, None)),
        (None, None),
    ):
        monkeypatch.setitem(sys.modules, "pynvml", nvml)
        assert driver_memory(GPU) == expected


def ledgers(**more: Any) -> Ledgers:
    return Ledgers(
        process="own",
        weights_bytes=310,
        planned=PlannedMemory(cache_bytes=100, budget_bytes=110),
        arena=ArenaMemory(cache_bytes=100, index_bytes=7, workspace_bytes=20),
        tensors=TensorMemory(peak_bytes=Phases(130, 190, 160), arena_bytes=100),
        **more,
    )


def test_the_way_from_the_plan_to_the_device() -> None:
    peaks = [
        AllocatorPeaks(requested_bytes=requested, allocated_bytes=allocated, reserved_bytes=reserved)
        for requested, allocated, reserved in ((450, 460, 810), (520, 540, 820), (500, 545, 815))
    ]
    allocator = AllocatorMemory(weights_bytes=320, peaks=Phases(*peaks))
    assert steps_of(ledgers(allocator=allocator, driver=driver_of(1200, 9000, 300, 1500, 7200))) == {
        ("planned cache", "arena"): {"unexplained": 0},
        ("arena", "tensors"): {"unexplained": 0, "index tables": 7, "workspace": 20, "activations": 63},
        ("tensors", "requested"): {"weights": 310, "unexplained": 20},
        ("requested", "allocated"): {"rounding": 25},
        ("allocated", "reserved"): {"kept by the allocator": 275},
        ("reserved", "process"): {"driver context": 380},
        ("process", "device"): {"reserved by the driver": 300, "other processes": 300},
    }
    for hidden in (None, driver_of(None, 9000, 300, 1500, 7200)):
        assert list(steps_of(ledgers(allocator=allocator, driver=hidden)))[-1] == ("allocated", "reserved")


def test_resident_memory_of_an_own_process_is_explained() -> None:
    host = HostMemory(
        source="VmHWM", before_bytes=1000, loading_peak_bytes=1500, loaded_bytes=1400,
        peak_bytes=Phases(1500, 1800, 1700), most_bytes=1800,
    )  # fmt: skip
    assert steps_of(ledgers(host=host))["tensors", "resident"] == {
        "weights": 310, "Python and libraries": 1000, "left by loading": 90, "unexplained": 210,
    }  # fmt: skip


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_allocator_sees_the_arena(tmp_path: Path) -> None:
    from heatkv.models.catalogue import load_model

    model = load_model("emoji", device="cuda")
    subject = Subject("streaming", "20%", (model.plan("streaming", "20%"),), "float32")
    memory.record_snapshots()
    found = subject_memory(model, subject, 1, model.sampling)
    memory.save_snapshot(tmp_path / "snapshot.pickle")
    assert (tmp_path / "snapshot.pickle").stat().st_size > 1000
    report = ledgers_of(found)
    assert found.device_peak_bytes is not None
    assert report.allocator is not None
    assert report.host is None
    for peaks in report.allocator.peaks.each:
        assert report.weights_bytes + report.arena.cache_bytes <= peaks.allocated_bytes <= peaks.reserved_bytes
    assert report.graphs is not None
    assert report.graphs.pool_bytes is None or report.graphs.pool_bytes > 0


# ------------------------------------------------------------------------------------------------ over time


def held_cells(plan: Plan, target: int, layer: int) -> list[tuple[int, int]]:
    """(source scale, tokens) of all that is held after a layer has run a target, cell by cell."""
    found = []
    for at, head, source in np.ndindex(plan.last_read.shape):
        reader = target + 1 if at <= layer else target  # the next target that reads what is there
        if source < reader < len(plan.schedule) and plan.last_read[at, head, source] >= reader:
            found.append((source, plan.schedule.tokens[source]))
    return found


@pytest.mark.parametrize("storage", ["float32", "int8/bfloat16"])
@pytest.mark.parametrize("name", ["streaming", "random", "full"])
def test_the_cache_over_time_cell_by_cell(name: str, storage: str) -> None:
    budget = Budget.parse("100%" if name == "full" else "60%")
    plan = make_policy(name).plan(PlanningProblem(GEOMETRY, budget, seed=3, rows=2, storage=storage))
    assert isinstance(plan, Plan)
    sinks = min(UNCODED_SCALES, plan.sink_scales)
    # a key and a value of 32 channels for two rows: in 4 bytes; in codes of one byte with a scale of two, sinks in two
    first, others = (512, 512) if storage == "float32" else (256, 2 * 2 * (32 + 2))
    timeline = cache_timeline(plan, 2, storage)
    assert timeline.shape == (5, 2)
    for (target, layer), count in np.ndenumerate(timeline):
        cells = held_cells(plan, target, layer)
        assert count == sum(tokens * (first if source < sinks else others) for source, tokens in cells)
    assert (
        timeline.max() == plan.bytes(2, storage) if storage == "float32" else timeline.max() <= plan.bytes(2, storage)
    )


@pytest.mark.parametrize("name", ["snapkv", "h2o", "adakv"])
def test_dynamic_policies_over_time(name: str) -> None:
    plan = make_policy(name).plan(PlanningProblem(GEOMETRY, Budget.parse("60%"), rows=2, storage="float32"))
    timeline = cache_timeline(plan, 2, "float32")
    assert timeline.max() == plan.bytes(2, "float32")
    # after the last layer of a scale, all layers hold what the next one reads
    carried = 4 * 2 * getattr(plan, "carried", 0)
    counts = 4 * 2 * 2 * 3 if getattr(plan, "shared", False) else 0
    after = plan.held.sum(axis=(0, 1))[1:]
    assert timeline[:-1, -1].tolist() == (after * (512 + carried) + counts).tolist()


# ------------------------------------------------------------------------------------------------ own processes


def job_of(model: ClassConditionalModel, **more: Any) -> worker.Job:
    arguments: dict[str, Any] = {
        "model": {"name": "emoji", "device": "cpu"}, "fingerprint": model.fingerprint, "settings": model.sampling,
        "plan": model.plan("streaming", "20%").to_json(), "storage": "float32", "attention": "auto", "batch": 1,
        "seed": 0,
    }  # fmt: skip
    return worker.Job(**arguments | more)


def test_a_process_of_its_own(emoji: ClassConditionalModel, capfd: pytest.CaptureFixture[str]) -> None:
    found = worker.measure_in_new_process(job_of(emoji))
    assert (found.error, found.device_peak_bytes, found.nvml_bytes) == (None, None, None)
    report = ledgers_of(found)
    assert report.process == "own"
    assert report.arena.cache_bytes == emoji.plan("streaming", "20%").peak_token_heads * 2 * 32 * 2 * 4
    assert report.host is not None
    if report.host.before_bytes is not None:  # the system tells
        assert report.steps[-1].parts["Python and libraries"] > 50 << 20
        assert report.host.most_bytes > report.host.before_bytes + report.weights_bytes
    assert capfd.readouterr().out == ""


def test_the_weights_must_be_the_same(emoji: ClassConditionalModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "load_model", lambda **given: emoji)
    with pytest.raises(HeatKVError, match=r"the weights of emoji are .* now, and were other when the run began"):
        worker.measure_job(job_of(emoji, fingerprint="other"))


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError("no\nmore"), "out of memory: no more"),
        (torch.OutOfMemoryError("Tried to allocate 5 GiB"), "out of memory: Tried to allocate 5 GiB"),
        (HeatKVError("bad"), "bad"),
        (ZeroDivisionError("by zero"), "ZeroDivisionError: by zero"),
    ],
)
def test_what_fails_is_told(error: Exception, said: str) -> None:
    assert runner.why_failed(error) == said


@pytest.mark.parametrize(
    ("does", "said"),
    [
        (processes.killed, "the process that measured was ended by SIGKILL, as the system does when memory runs out"),
        (processes.failing, "the process that measured ended with code 3"),
    ],
)
def test_a_process_that_breaks_is_told(does: Any, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "_run", does)
    assert worker.measure_in_new_process(None) == Memory(error=said)  # type: ignore[arg-type]


def test_an_interrupt_ends_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "_run", processes.waiting)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have had it ignored
    try:
        with pytest.raises(KeyboardInterrupt):
            worker.measure_in_new_process(str(tmp_path / "number"))  # type: ignore[arg-type]
    finally:
        signal.signal(signal.SIGINT, before)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "number").read_text()), 0)


PARENT = """
import os, signal, sys
from heatkv.profiling.measure import worker
from support import processes
from support.nvml import fake_nvml, no_access
if __name__ == "__main__":
    signal.signal(signal.SIGINT, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    worker._run = processes.waiting
    worker.measure_in_new_process(sys.argv[1])
"""


def test_the_process_ends_with_its_parent(tmp_path: Path) -> None:
    (tmp_path / "parent.py").write_text(PARENT)
    paths = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])])
    command = [sys.executable, str(tmp_path / "parent.py"), str(tmp_path / "number")]
    # the process shares the output, so that this returns only when it has ended too
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": paths}, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert (tmp_path / "number").exists()


def test_loading_is_watched(emoji: ClassConditionalModel) -> None:
    model, loading = Loading.watch(lambda: emoji, CPU)
    assert (model, loading.allocator) == (emoji, None)
    if loading.before_bytes is not None and loading.peak_bytes is not None:
        assert 0 < loading.before_bytes <= loading.peak_bytes
