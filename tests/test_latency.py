"""Times and traces: intervals against scipy, clocks of our own, ranges in a written trace, a machine made up."""

from __future__ import annotations

import itertools
import json
import re
import sys
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from support.nvml import fake_nvml, no_access

import heatkv
from heatkv.engine.spans import PHASES, layer_name, listening, scale_name, span
from heatkv.generation.loop import Generator
from heatkv.models.class_conditional import ClassConditionalModel
from heatkv.profiling.measure import environment, latency
from heatkv.profiling.measure.environment import load_of, timing_machine
from heatkv.profiling.measure.latency import latency_of, measure_breakdown, measure_interleaved, median_interval, turns
from heatkv.profiling.measure.runner import _that_fit, measure_latency
from heatkv.profiling.measure.subjects import Subject, plan_subjects
from heatkv.profiling.measure.trace import save_trace
from heatkv.profiling.results.row import Latency, Load

CPU = torch.device("cpu")


@pytest.mark.parametrize("count", [1, 2, 5, 6, 7, 9, 20, 101])
def test_median_interval_is_the_binomials(count: int) -> None:
    values = list(np.random.default_rng(count).permutation(count))
    low, high, confidence = median_interval(values)
    # the median lies between if neither too few nor too many values are below it
    inside = stats.binom(count, 0.5)
    assert confidence == pytest.approx(inside.cdf(high) - inside.cdf(low), abs=1e-12)
    expected = stats.quantile_test(values, p=0.5).confidence_interval(0.95)
    if count >= 6:
        assert (low, high) == (expected.low, expected.high)
    else:  # too few for any interval of 95 %
        assert np.isnan(expected.low)
        assert (low, high) == (0, count - 1)


def test_latency_by_hand() -> None:
    assert latency_of([1, 2, 3, 4, 100]) == Latency(
        median=3, iqr=2, runs=5, interval=(1, 100), confidence=0.9375, outliers=1, all=(1, 2, 3, 4, 100)
    )
    assert latency_of([10.0, 10.1, 10.2, 10.1, 10.0, 10.2, 55.0, 1.0]).outliers == 2
    assert latency_of([3.0], [1.0004, 2.0], {"attention": 1.23456}) == Latency(
        median=3, iqr=0, runs=1, interval=(3, 3), confidence=0, outliers=0, all=(3,), scales=(1, 2),
        phases={"attention": 1.235},
    )  # fmt: skip


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_everyone_has_every_turn_equally_often(count: int) -> None:
    orders = turns(count, 2 * count)
    assert all(sorted(order) == list(range(count)) for order in orders)
    for place in range(count):
        assert Counter(order[place] for order in orders) == dict.fromkeys(range(count), 2)
    if count > 1:
        assert all(one != other for one, other in itertools.pairwise(orders[:2]))


def test_latency_takes_turns_and_drops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    now, calls = 0.0, []

    def call(name: str, seconds: float) -> None:
        nonlocal now
        now += seconds
        calls.append(name)

    monkeypatch.setattr(latency.time, "perf_counter", lambda: now)
    times = measure_interleaved({"a": lambda: call("a", 0.001), "b": lambda: call("b", 0.003)}, CPU, repeats=3)
    assert "".join(calls) == "ab" + "ab" + "ba" + "ba"  # one warm-up, then turns that change
    assert times == {"a": pytest.approx([1, 1, 1]), "b": pytest.approx([3, 3, 3])}


def test_a_breakdown_adds_up(emoji: ClassConditionalModel) -> None:
    generator = Generator(emoji, emoji.plan("streaming", "30%"), 1)
    scales, phases = measure_breakdown(lambda: generator.draw([0]), CPU, len(emoji.geometry.schedule), 1)
    assert list(phases) == [*PHASES, "other"]
    assert all(value > 0 for value in (*scales, *phases.values()))
    # all but preparations and the decoder happens in scales
    assert sum(scales) + phases["decode"] <= sum(phases.values())


def test_a_breakdown_takes_medians_of_each_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that only moves when told to."""
    now = 0.0
    monkeypatch.setattr(latency.time, "perf_counter", lambda: now)
    runs = iter([(1, 5, 2), (2, 4, 2), (9, 3, 2)])

    def call() -> None:
        nonlocal now
        first, second, outside = next(runs)
        for scale, lasts in ((0, first), (1, second)):
            with span(scale_name(scale)), span("attention"):
                now += lasts / 1e3
        with span("decode"):
            now += 0.5 / 1e3
        now += outside / 1e3

    scales, phases = measure_breakdown(call, CPU, 2, 3)
    assert scales == pytest.approx([2, 4])
    assert phases == pytest.approx(
        {"attention": 6, "feed-forward": 0, "cache update": 0, "sampling": 0, "decode": 0.5, "other": 2}
    )


def test_spans_are_silent_unless_somebody_listens(emoji: ClassConditionalModel) -> None:
    heard: list[str] = []

    def listener(name: str) -> Any:
        heard.append(name)
        return nullcontext()

    assert span("a") is span("b")
    with listening(listener), span("a"), span("b"):
        assert heard == ["a", "b"]
    assert span("a") is span("b")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        heatkv.generate(emoji, [0], emoji.full_plan())
    assert {*PHASES, "scale 0", "layer 3"} <= {event.key for event in profiler.key_averages()}


@pytest.fixture(scope="module")
def trace(emoji: ClassConditionalModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("traces") / "new"
    subject = Subject("adakv", "30%", (emoji.plan("adakv", "30%"),), "float32")
    path = save_trace(folder, emoji, subject, 1, emoji.sampling)
    # the pattern by which torch-tb-profiler finds a worker and its span
    assert re.match(r"^adakv_30percent_batch_1\.\d+\.pt\.trace\.json$", path.name)
    assert list(folder.iterdir()) == [path]
    return path


def test_trace_names_scales_layers_and_phases_inside_each_other(emoji: ClassConditionalModel, trace: Path) -> None:
    told = json.loads(trace.read_text())
    spans: dict[str, list[tuple[float, float]]] = {}
    for event in told["traceEvents"]:
        if event.get("cat") == "user_annotation":
            spans.setdefault(event["name"], []).append((event["ts"], event["ts"] + event["dur"]))
    scales, layers = range(len(emoji.geometry.schedule)), range(emoji.geometry.layers)
    assert all(len(spans[scale_name(scale)]) == 1 for scale in scales)  # one drawing: the warm-up is not in it
    assert all(len(spans[layer_name(layer)]) == len(scales) for layer in layers)
    assert len(spans["feed-forward"]) == len(scales) * len(layers)
    assert len(spans["decode"]) == 1

    def within(inner: str, outer: list[str]) -> bool:
        around = [place for name in outer for place in spans[name]]
        return all(any(low <= a and b <= high for low, high in around) for a, b in spans[inner])

    in_scales, in_layers = [scale_name(scale) for scale in scales], [layer_name(layer) for layer in layers]
    assert all(within(name, in_scales) for name in (*in_layers, "sampling"))
    assert all(within(phase, in_layers) for phase in ("attention", "cache update", "feed-forward"))


def test_subjects_that_fit_together() -> None:
    def subject(size: int) -> Any:
        return SimpleNamespace(plans=[SimpleNamespace(bytes=lambda rows, storage: size * rows)], storage="float32")

    subjects = [subject(size) for size in (4, 3, 2, 9, 1)]
    for memory, sizes in ((14, [2, 1, 1, 1]), (38, [5]), (0, [1] * 5)):
        groups = _that_fit(subjects, 2, memory)
        assert [len(group) for group in groups] == sizes
        assert list(itertools.chain(*groups)) == subjects


def test_viewers_open_a_trace(trace: Path, tmp_path: Path) -> None:
    # Perfetto leaves out what overlaps an earlier slice of its thread without lying in it
    slices: dict[Any, list[tuple[float, float]]] = {}
    for event in json.loads(trace.read_text())["traceEvents"]:
        if event["ph"] == "X" and event.get("cat") != "Trace":  # the profiler's own, on a line of its own
            slices.setdefault((event["pid"], event["tid"]), []).append((event["ts"], -event["ts"] - event["dur"]))
    assert max(map(len, slices.values())) > 1000
    rounding = 0.002  # us: times are written in thousandths
    for places in slices.values():
        around: list[float] = []
        for start, end in sorted(places):
            while around and around[-1] <= start + rounding:
                around.pop()
            assert not around or -end <= around[-1] + rounding
            around.append(-end)

    # TensorBoard's plug-in, read by what it reads with
    from torch_tb_profiler.profiler.data import RunProfileData

    seen = RunProfileData.parse("worker", "1", str(trace), str(tmp_path))
    seen.process()
    seen.analyze()
    assert seen.steps_names == ["1"]  # the one that is recorded
    assert seen.op_list_groupby_name


def test_being_watched_changes_no_picture(emoji: ClassConditionalModel) -> None:
    for policy in ("streaming", "adakv"):
        generator = Generator(emoji, emoji.plan(policy, "20%"), 1)
        alone = generator.draw([5], seed=2).images
        with listening(latency.SpanClock(CPU).span):
            watched = generator.draw([5], seed=2).images
        assert alone is not None
        assert watched is not None
        assert torch.equal(alone, watched)


def test_times_are_parts_of_a_row(emoji: ClassConditionalModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment.os, "getloadavg", lambda: (7.26, 1.0, 1.0))
    monkeypatch.setattr(environment.os, "cpu_count", lambda: 4)
    machine = timing_machine(CPU)
    assert machine.load == Load(7.26, 4, busy=True)
    (full,) = plan_subjects(emoji, [], [], statistics=None, rows=2, storage="float32")
    times, no_graphs = measure_latency(emoji, [full], batch=1, settings=emoji.sampling, repeats=1, machine=machine)
    found = times["full 100%"]
    assert (no_graphs, found.graph_latency_ms, found.timing_machine) == ({}, None, machine)
    assert found.latency_ms is not None
    assert (found.latency_ms.runs, len(found.latency_ms.scales or ())) == (1, 8)
    monkeypatch.setattr(environment.os, "getloadavg", lambda: (4.0, 1.0, 1.0))
    assert not load_of(CPU).busy


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="events and graphs need a CUDA device, and there is none")
def test_a_breakdown_on_a_cuda_device() -> None:
    model = heatkv.load_model("emoji", device="cuda")
    (full,) = plan_subjects(model, [], [], statistics=None, rows=2, storage="float32")
    times, _ = measure_latency(
        model, [full], batch=1, settings=model.sampling, repeats=2, machine=timing_machine(model.device)
    )
    eager, graph = times["full 100%"].latency_ms, times["full 100%"].graph_latency_ms
    assert eager is not None
    assert all(value > 0 for value in (eager.phases or {}).values())
    assert graph is not None
    assert graph.phases is None
    assert all(scale > 0 for scale in graph.scales or ())


@pytest.mark.parametrize(
    ("used", "processes", "told"),
    [(5, 1, []), (60, 1, ["the GPU is used 60% of the time by others"]), (0, 3, ["2 other processes on the GPU"])],
)
def test_a_busy_gpu_is_told(monkeypatch: pytest.MonkeyPatch, used: int, processes: int, told: list[str]) -> None:
    waits: list[float] = []
    rates = {"nvmlDeviceGetUtilizationRates": lambda handle: SimpleNamespace(gpu=used)}
    nvml = fake_nvml(pids=tuple(range(processes)), **rates)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(environment.time, "sleep", waits.append)
    monkeypatch.setattr(environment.os, "getloadavg", lambda: (0.0, 0.0, 0.0))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="1"))
    found = load_of(torch.device("cuda", 0))
    assert found == Load(0.0, found.cores, used, processes - 1, busy=bool(told))
    assert found.reasons == told
    assert waits == [1.0]
    monkeypatch.setattr(nvml, "nvmlDeviceGetUtilizationRates", no_access)
    assert load_of(torch.device("cuda", 0)).gpu_utilisation is None
