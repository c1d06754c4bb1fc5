"""The report of result folders: every figure, read back by another reader; what is compared; its looks."""

from __future__ import annotations

import base64
import io
import itertools
import json
import re
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from browser import CHROMIUM, browser
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from rich.console import Console

from heatkv.cli import run
from heatkv.core.budget import Budget
from heatkv.core.geometry import CacheGeometry
from heatkv.core.schedule import ScaleSchedule
from heatkv.engine.spans import PHASES
from heatkv.errors import FormatError
from heatkv.generation.images import GAP
from heatkv.policies.base import PlanningProblem
from heatkv.policies.windows import Streaming
from heatkv.profiling.report import charts, tables
from heatkv.profiling.report.page import NAME, SECTIONS, render, write_report
from heatkv.profiling.results.artefacts import file_digest
from heatkv.profiling.results.merging import Merged, Source
from heatkv.profiling.results.row import ResultRow, Results, write_results
from heatkv.registry import registered_policies

MIB = 2**20
POLICIES, BUDGETS = ("heatkv", "streaming", "h2o"), ("30%", "10%")
SCHEDULE = ((1, 1, 1), (1, 2, 2), (1, 3, 3))
DIFFERENCES = {
    ("streaming", "30%"): (-0.0123, -0.0234, -0.0045), ("h2o", "30%"): (0.0321, 0.0234, 0.0432),
    ("streaming", "10%"): (0.0456, -0.0078, 0.0567),
}  # fmt: skip


class Page(HTMLParser):
    """A parsed page: elements, tables of (text, data-v) by section and heading, texts by section."""

    EMPTY = frozenset({"meta", "link", "img", "br"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.tables: list[dict[str, Any]] = []
        self.texts: dict[str, str] = {"": ""}
        self.open: list[str] = []
        self._section = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in self.EMPTY:
            self.open.append(tag)
        if tag == "section":
            self._section = str(dict(attrs)["id"])
            self.texts[self._section] = ""
        elif tag == "table":
            self.tables.append({"section": self._section, "rows": []})
        elif tag == "tr":
            self.tables[-1]["rows"].append([])
        elif tag in ("td", "th"):
            self.tables[-1]["rows"][-1].append(["", dict(attrs).get("data-v")])

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts[self._section] += data
        if {"td", "th"} & set(self.open):
            self.tables[-1]["rows"][-1][-1][0] += data

    def of(self, tag: str, kind: str = "") -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.elements if name == tag and (attrs.get("class") or "").startswith(kind)]

    def said(self, section: str) -> str:
        return " ".join(self.texts[section].split())

    def columns(self, section: str, number: int = 0) -> dict[tuple[str, str], dict[str, list[Any]]]:
        """The fields of a table by policy and budget, and by the title of their column."""
        heads, *rows = [table["rows"] for table in self.tables if table["section"] == section][number]
        titles = [text for text, _ in heads]
        return {(row[0][0], row[1][0]): dict(zip(titles, row, strict=True)) for row in rows}


def numbers() -> Iterator[int]:
    """Bytes that occur once each."""
    return itertools.count(3 * MIB + 11, MIB // 7)


def ledgers(count: Iterator[int], cuda: bool) -> dict[str, Any]:
    """The field `memory`, no two figures alike."""
    phases = ("opened", "drawing", "decode")

    def sizes(*names: str) -> dict[str, int]:
        return {f"{name}_bytes": next(count) for name in names}

    def peaks() -> dict[str, int]:
        return sizes("requested", "allocated", "reserved")

    memory = {
        "process": "own", "weights_bytes": next(count), "planned": sizes("cache", "budget"),
        "arena": sizes("cache", "index", "workspace"),
        "tensors": {"peak_bytes": {phase: next(count) for phase in phases}, "arena_bytes": next(count)},
        "steps": [{"source": "planned cache", "source_bytes": 1, "target": "arena", "target_bytes": 8,
                   "parts": {"unexplained": 7}}],
    }  # fmt: skip
    if cuda:
        memory["allocator"] = {"weights_bytes": 5, "loading": peaks(), "peaks": {phase: peaks() for phase in phases}}
        memory["graphs"] = {"pool_bytes": next(count), "peaks": peaks()}
        memory["driver"] = sizes("process", "total", "reserved", "used", "free")
    else:
        host = sizes("before", "loading_peak", "loaded", "most")
        memory["host"] = {"source": "VmHWM", **host, "peak_bytes": {phase: next(count) for phase in phases}}
    return memory


def time_of(place: int, phases: bool = True) -> dict[str, Any]:
    """A time with one outlier, far out."""
    runs = [100.5 + place, 101.5 + place, 102.5 + place, 103.5 + place, 104.5 + place, 180.25 + place]
    return {
        "median": 103.0 + place, "iqr": 2.5, "runs": 6, "interval": [100.5 + place, 180.25 + place],
        "confidence": 0.9688, "outliers": 1, "all": runs, "scales": [10.25 + place, 20.5 + place, 30.75 + place],
        "phases": {name: 3.0 * i + place + 0.125 for i, name in enumerate(PHASES)} if phases else None,
    }  # fmt: skip


def results(cuda: bool = False, seed: int = 0, batch: int = 1, **changes: Any) -> Results:
    """Seven rows of a made-up model of two layers and three scales; `changes` are of every row."""
    rows, count = [], numbers()
    for place, (budget, policy) in enumerate([("100%", "full"), *itertools.product(BUDGETS, POLICIES)]):
        room = {"100%": 40, "30%": 12, "10%": 4}[budget] * MIB * batch
        versus = DIFFERENCES.get((policy, budget))
        rows.append({
            "model": "toy", "model_fingerprint": "0", "policy": policy, "budget": budget, "settings": {}, "seed": seed,
            "rows": 2 * batch, "batch": batch, "dtype": "float32", "storage": "float32", "attention": "ragged",
            "schedule": SCHEDULE, "draws": 1, "comparison": f"c{place} {seed}", "measurement": f"m{place}",
            "budget_bytes": room, "planned_bytes": room - place, "allocated_bytes": room - place,
            "full_bytes": 40 * MIB * batch, "current_bytes": next(count), "index_bytes": next(count),
            "workspace_bytes": next(count), "under_used": False, "had_no_effect": False,
            "timeline_bytes": [[0, room // 4], [room // 2 + place, room - place], [room // 3, 0]],
            "memory": ledgers(count, cuda), "latency_ms": time_of(place),
            "timed": f"2026-01-0{1 + seed}T10:00:0{batch}",
            "graph_latency_ms": time_of(place + 50, phases=False) if cuda else None,
            "images": 16, "pictures": 0, "kl": 0.01 * place + 0.013 * seed**2 * (place > 0), "top1_agreement": 0.9,
            "kl_per_scale": [0.0, 0.001 * place, 0.03 * place], "psnr_db": 30.125 - place, "ssim": 0.75,
            "versus": versus and {"policy": "heatkv", "difference": versus[0], "interval": versus[1:],
                                  "confidence": 0.95, "images": 16},
        } | changes)  # fmt: skip
    return msgspec.convert(
        {
            "environment": {"device": "cpu", "device_name": "A CPU", "threads": 1, "system": "s",
                            "versions": {"torch": "2"}, "load": {"load_average": 0.5, "cores": 2}},
            "sampling": {"cfg": 1.5}, "request": {"seed": seed, "samples_digest": "x"}, "rows": rows,
        },
        Results,
    )  # fmt: skip


def joined(*parts: Results) -> Results:
    return msgspec.structs.replace(parts[0], rows=tuple(row for part in parts for row in part.rows))


def changed(made: Results, change: Callable[[ResultRow], dict[str, Any]]) -> Results:
    return msgspec.structs.replace(made, rows=tuple(replace(row, **change(row)) for row in made.rows))


def merged(tmp_path: Path, **folders: Results) -> Merged:
    return Merged(tuple(Source(label, tmp_path, made) for label, made in folders.items()))


def page_of(tmp_path: Path, **folders: Results) -> Page:
    return Page(render(merged(tmp_path, **folders)))


@cache
def plain(cuda: bool = False) -> tuple[Results, Page]:
    """The results as they are, and their page."""
    return results(cuda), page_of(Path("nowhere"), one=results(cuda))


# ------------------------------------------------------------------------------------------------------- figures

FIGURES = {
    "allowed, MiB": "budget_bytes", "planned, MiB": "planned_bytes", "arena, MiB": "allocated_bytes",
    "index tables, MiB": "index_bytes", "workspace, MiB": "workspace_bytes", "running layer, MiB": "current_bytes",
    "full cache, MiB": "full_bytes", "KL, nats": "kl", "top-1": "top1_agreement", "PSNR, dB": "psnr_db", "SSIM": "ssim",
    "images": "images", "pictures": "pictures",
}  # fmt: skip
LEDGERS = {
    "plan: budget": "planned.budget", "arena: index tables": "arena.index", "model: weights": "weights",
    "tensors: drawing": "tensors.peak.drawing", "tensors: arena among them": "tensors.arena",
}  # fmt: skip
CPU_LEDGERS = {"resident: peak of loading": "host.loading_peak", "resident: decode": "host.peak.decode"}
GPU_LEDGERS = {
    "allocator, allocated: before opening": "allocator.weights", "NVML: device, free": "driver.free",
    "allocator, requested: loading": "allocator.loading.requested",
    "allocator, reserved: pool of CUDA graphs": "graphs.pool",
    "allocator, allocated: drawing": "allocator.peaks.drawing.allocated",
    "allocator, reserved: with CUDA graphs": "graphs.peaks.reserved",
}  # fmt: skip


def check(field: Sequence[Any], value: float | None, unit: float) -> None:
    """A field of a table has this figure: in full for the sorting, and rounded for the reader."""
    text, full = field
    if value is None:
        assert (text, full) == ("not measured", None)
    else:
        assert float(full) == value
        digits = text.strip("%").partition(".")[2]
        assert float(text.strip("%").replace(",", "")) == pytest.approx(value / unit, abs=0.51 * 10 ** -len(digits))


def test_all_figures_are_in_the_table_and_none_is_not_measured(tmp_path: Path) -> None:
    made = changed(results(), lambda row: {"ssim": None} if row.policy == "h2o" else {})
    fields = page_of(tmp_path, one=made).columns("rows")
    assert len(fields) == len(made.rows) == 7
    for row in made.rows:
        for title, name in FIGURES.items():
            unit = MIB if "MiB" in title else 0.01 if title == "top-1" else 1
            check(fields[row.policy, row.budget][title], getattr(row, name), unit)
        check(fields[row.policy, row.budget]["time, ms"], row.latency_ms and row.latency_ms.median, 1)
    assert "CUDA graphs" not in str(fields)  # which no row has


def leaves(value: Any) -> list[int]:
    """All whole numbers within."""
    if isinstance(value, dict):
        return [leaf for inner in value.values() for leaf in leaves(inner)]
    return [value] if isinstance(value, int) else []


@pytest.mark.parametrize("cuda", [False, True], ids=["cpu", "gpu"])
def test_every_figure_of_memory_is_under_its_ledger(cuda: bool) -> None:
    made, page = plain(cuda)
    columns = page.columns("memory")
    paths = LEDGERS | (GPU_LEDGERS if cuda else CPU_LEDGERS)
    for row in made.rows:
        fields = columns[row.policy, row.budget]
        memory = msgspec.to_builtins(row.memory)
        for title, path in paths.items():
            value = memory
            for name in path.split("."):
                value = value[name] if name in value else value[f"{name}_bytes"]
            check(fields[f"{title}, MiB"], value, MIB)
        # all that was measured stands under some ledger, once
        shown = sorted(int(full) for title, (_, full) in fields.items() if title.endswith("MiB"))
        assert shown == sorted([7, *leaves({name: part for name, part in memory.items() if name != "steps"})])
        check(fields["unexplained, MiB"], 7, MIB)


@pytest.mark.parametrize("cuda", [False, True], ids=["cpu", "gpu"])
def test_every_time_is_under_its_phase_and_scale(cuda: bool) -> None:
    made, page = plain(cuda)
    columns = page.columns("latency")
    for row in made.rows:
        for time, ledger, median in (
            (row.latency_ms, "", "time, ms"), (row.graph_latency_ms, "CUDA graphs: ", "CUDA graphs: median, ms"),
        ):  # fmt: skip
            fields = columns[row.policy, row.budget]
            if time is None:
                assert not any(title.startswith("CUDA graphs") for title in fields)
                continue
            check(fields[median], time.median, 1)
            assert fields[f"{ledger}interval, ms"][0] == f"{time.interval[0]:.1f} - {time.interval[1]:.1f}"
            for name in PHASES if time.phases else ():
                check(fields[f"{ledger}{name}, ms"], time.phases[name], 1)
            for scale, side in enumerate((1, 2, 3)):
                check(fields[f"{ledger}scale {side}, ms"], time.scales[scale], 1)
    assert f"Circles are outliers ({14 if cuda else 7})" in page.said("latency")


def test_kl_by_budget_and_scale() -> None:
    made, page = plain()
    heads, *lines = page.tables[0]["rows"]
    assert [text for text, _ in heads] == ["policy", "30%", "10%"]
    assert [line[0][0] for line in lines] == list(POLICIES)
    kls = {(row.policy, row.budget): row.kl for row in made.rows}
    for policy, *fields in lines:
        for budget, field in zip(BUDGETS, fields, strict=True):
            check(field, kls[policy[0], budget], 1)
    for key, fields in page.columns("scales").items():
        (row,) = [row for row in made.rows if (row.policy, row.budget) == key]
        for scale, side in enumerate("123"):
            check(fields[side], row.kl_per_scale[scale], 1)


COLUMNS = {"results": tables.RESULTS, "memory": (*tables.PLANNED, *tables.DEVICE), "latency": tables.LATENCY[1:]}


@pytest.mark.parametrize("columns", COLUMNS.values(), ids=COLUMNS)
def test_the_terminal_has_the_columns_of_the_page(columns: Sequence[tables.Column], tmp_path: Path) -> None:
    made = changed(results(), lambda row: {"latency_ms": None} if row.budget == "30%" else {})
    console = Console(width=400, markup=False)
    with console.capture() as captured:
        console.print(tables.terminal_table(made.rows, columns, "a title"))
    heads, lines = (
        [line.strip("┃│").replace("│", "┃").split("┃") for line in captured.get().splitlines() if line.startswith(sign)]
        for sign in "┃│"
    )
    titles = [" ".join(part.strip() for part in parts if part.strip()) for parts in zip(*heads, strict=True)]
    page = page_of(tmp_path, one=made)
    shown = [page.columns("rows"), page.columns("memory"), page.columns("latency")]
    for row, line in zip(made.rows, lines, strict=True):
        texts = dict(zip(titles, (text.strip() for text in line), strict=True))
        assert (texts["policy"], texts["budget"]) == (row.policy, row.budget)
        for title, text in texts.items():
            on_page = [of[row.policy, row.budget][title][0] for of in shown
                       if title in of.get((row.policy, row.budget), {})]  # fmt: skip
            assert text in on_page or (text == "-" and "not measured" in (*on_page, "not measured"))
    assert ("▂█▃" in captured.get()) == (columns is COLUMNS["memory"])


# ------------------------------------------------------------------------------------------------------ what compares


def test_the_best_policy_comes_first_and_ties_are_named(tmp_path: Path) -> None:
    _, page = plain()
    assert page.said("summary").startswith("With 10% of the cache, heatkv stays closest to the full cache")
    assert "next is streaming with 0.050" in page.said("summary")
    two = page_of(tmp_path, a=results(), b=results())
    assert "With 10% of the cache, heatkv of a and heatkv of b tie as closest" in two.said("summary")
    assert "2 tie" in two.said("summary")
    assert sum("best" in str(attrs.get("class")) for attrs in two.of("td")) >= 4
    without = page_of(tmp_path, one=changed(results(), lambda _: {"kl": None, "kl_per_scale": None, "versus": None}))
    assert "Memory and time of 3 cache policies of toy" in without.said("summary")
    assert "Fidelity was not measured" in without.said("summary")


def test_other_samples_are_ranked_apart(tmp_path: Path) -> None:
    other = changed(results(), lambda row: {"images": 8})
    page = page_of(tmp_path, a=results(), b=other)
    assert "Only what was measured alike is ranked together" in page.said("summary")
    assert "images 16 (a)" in page.said("fidelity")
    assert "images 8 (b)" in page.said("fidelity")


def test_seeds_are_means_with_deviations(tmp_path: Path) -> None:
    seeds = (0, 1, 2)
    page = page_of(tmp_path, one=joined(*(results(seed=seed) for seed in seeds)))
    kls = [0.01 * 4 + 0.013 * seed**2 for seed in seeds]
    text, value = next(row for row in page.tables[0]["rows"] if row[0][0] == "heatkv")[2]
    assert float(value) == pytest.approx(statistics.fmean(kls))
    assert text == f"{statistics.fmean(kls):.4f} ± {statistics.stdev(kls):.4f}"
    assert f"{min(kls):.3f} to {max(kls):.3f} over seeds" in page.said("summary")
    # every seed was timed in turns of its own: shares are means over theirs
    shares = page.columns("latency")
    assert shares["streaming", "10%"]["of full cache"][0].startswith(f"{108 / 103:.2f}")
    assert len(page.columns("rows")) == 21


def test_what_lacks_a_seed_is_in_no_mean(tmp_path: Path) -> None:
    made = joined(results(), results(seed=1))
    made = msgspec.structs.replace(
        made, rows=tuple(row for row in made.rows if (row.policy, row.seed) != ("heatkv", 1))
    )
    page = page_of(tmp_path, one=made)
    assert "With 10% of the cache, streaming stays closest" in page.said("summary")
    assert "Left out, as they lack a seed: heatkv at 30%, heatkv at 10%" in page.said("fidelity")


def test_times_are_ranked_within_their_turns(tmp_path: Path) -> None:
    later = changed(results(), lambda row: {"timed": "2026-02-02T00:00:00"} if row.policy == "h2o" else {})
    page = page_of(tmp_path, one=later)
    assert "timed 2026-01-01 10:00:01" in page.said("latency")
    first, added = page.columns("latency", 0), page.columns("latency", 1)
    assert list(first) == [("full", "100%"), ("heatkv", "30%"), ("streaming", "30%"), ("heatkv", "10%"),
                           ("streaming", "10%")]  # fmt: skip
    check(first["heatkv", "10%"]["of full cache"], 107 / 103, 1)
    assert list(added) == [("h2o", "30%"), ("h2o", "10%")]
    assert "of full cache" not in added["h2o", "10%"]  # no full cache was timed beside it


def test_a_busy_machine_is_said(tmp_path: Path) -> None:
    load = {"load": {"load_average": 7.5, "cores": 2}}
    busy = page_of(tmp_path, one=results(timing_machine=load))
    assert "The machine was busy before this run (a load average of 7.5 on 2 cores)" in busy.said("latency")
    assert "was busy" not in plain()[1].said("latency")


def parts_of(page: Page, kind: str) -> list[tuple[float, float, str]]:
    """From where to where parts of tracks reach, in per cent, and what they are."""
    found = []
    for attrs in page.of("i"):
        if attrs.get("class") == kind:
            left, right = re.findall(r"left:([\d.]+)%;right:calc\(100% - ([\d.]+)%\)", str(attrs["style"]))[0]
            found.append((float(left), float(right), str(attrs["title"])))
    return found


def test_paired_differences_are_drawn_to_scale(tmp_path: Path) -> None:
    _, page = plain()
    low, high = -0.0234, 0.0567
    for (left, right, title), (value, *ends) in zip(parts_of(page, "bar"), DIFFERENCES.values(), strict=False):
        wanted = [100 * (end - low) / (high - low) for end in ends]
        assert [left, right] == pytest.approx(wanted, abs=0.01)
        assert title == f"{value:+.4f} [{ends[0]:+.4f}, {ends[1]:+.4f}]"
    for left, _, _ in parts_of(page, "zero"):
        assert left == pytest.approx(100 * -low / (high - low), abs=0.01)
    said = page.said("paired")
    assert "The line at 0 is the base, heatkv. Points are means over 16 images" in said
    verdicts = ["-0.0045] closer", "+0.0432] further", "+0.0567] not separated"]
    assert [verdict in said for verdict in verdicts] == [True] * 3


@pytest.mark.parametrize("cuda", [False, True], ids=["cpu", "gpu"])
def test_bars_are_as_long_as_their_ledgers(cuda: bool) -> None:
    made, page = plain(cuda)
    lengths = [(right - left, title) for left, right, title in parts_of(page, "bar") if title.endswith("MiB")]
    unit = next(length / float(title.split()[-2]) for length, title in lengths if title.startswith("arena: cache"))
    for length, title in lengths:
        assert length == pytest.approx(unit * float(title.split()[-2]), abs=0.02), title
    memory = made.rows[0].memory
    assert memory is not None
    titles = {title for _, title in lengths}
    assert f"plan: cache: {memory.planned.cache_bytes / MIB:.4g} MiB" in titles
    if memory.allocator is None:
        assert f"tensors: drawing: {memory.tensors.peak_bytes.drawing / MIB:.4g} MiB" in titles
    else:
        above = memory.allocator.peaks.drawing.allocated_bytes - memory.allocator.weights_bytes
        assert f"allocator: drawing: {above / MIB:.4g} MiB" in titles
        assert any(title.startswith("allocator: with CUDA graphs") for title in titles)


SECTIONS_OF = {
    "all": ({}, set()), "memory": ({"memory": None}, set()), "pairs": ({"versus": None}, {"paired"}),
    "times": ({"latency_ms": None, "graph_latency_ms": None}, {"latency"}),
    "kl": ({"kl": None, "kl_per_scale": None, "versus": None}, {"fidelity", "paired", "scales"}),
}  # fmt: skip


@pytest.mark.parametrize(("lost", "absent"), SECTIONS_OF.values(), ids=SECTIONS_OF)
def test_sections_are_there_with_their_figures(lost: dict[str, Any], absent: set[str], tmp_path: Path) -> None:
    page = page_of(tmp_path, one=changed(results(), lambda _: lost))
    assert [attrs["id"] for attrs in page.of("section")] == [name for name in SECTIONS if name not in absent]


# --------------------------------------------------------------------------------------------------------- charts


def test_points_lie_at_their_bytes_and_figures() -> None:
    points = [(1.0, 0.1), (10.0, 0.4), (100.0, 0.2)]
    x, y = charts.axis([1.0, 100.0], log=True), charts.axis([0.1, 0.4])
    chart = charts.Chart("", x, y, [charts.Line(charts.Style(0, ""), points)])
    (x0, y0), (x1, y1), (x2, y2) = (chart.place(*point) for point in points)
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.11)  # bytes are on a logarithmic axis
    assert (y0 - y1) / (y0 - y2) == pytest.approx(0.3 / 0.1, rel=0.01)
    assert chart.path(points) == f"M{x0} {y0}L{x1} {y1}L{x2} {y2}"


@given(ends=st.lists(st.floats(1e-6, 1e9), min_size=1, max_size=5), log=st.booleans())
def test_axes_hold_their_figures_and_round_marks(ends: list[float], log: bool) -> None:
    axis = charts.axis(ends, log)
    assert all(0 <= axis.at(value) <= 1 for value in ends)
    assert all(axis.low <= mark <= axis.high for mark in axis.ticks)
    assert len(axis.ticks) >= 2
    assert [float(text) for text in axis.ticks.values()] == pytest.approx(list(axis.ticks), rel=1e-5)


@given(
    values=st.integers(1, 40).flatmap(
        lambda layers: st.lists(st.lists(st.integers(0, 99), min_size=layers, max_size=layers), min_size=1, max_size=20)
    )
)
def test_steps_keep_the_fullest_of_every_scale(values: list[list[int]]) -> None:
    points = charts.steps(np.array(values))
    middles = [((begin + end) / 2, y) for (begin, y), (end, _) in zip(points[::2], points[1::2], strict=True)]
    assert len(middles) <= max(160, len(values))
    for scale, layers in enumerate(values):
        assert max(y for x, y in middles if round(x) == scale) == max(layers)


def pixels_of(uri: str) -> np.ndarray[Any, Any]:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).convert("RGBA"))


def test_heat_maps_and_strips_have_the_colours_of_their_figures() -> None:
    colours = [(1, 2, 3, 255), (4, 5, 6, 255)]
    colours = np.array([(1, 2, 3, 255), (4, 5, 6, 99)], np.uint8)
    pixels = pixels_of(charts.strip([colours[[[0, 1]]], colours[[[1, 0]]]], 1))
    assert pixels[0].tolist() == [*colours.tolist(), [0, 0, 0, 0], *colours[::-1].tolist()]
    images = [np.zeros((1, 1, 3), np.uint8), np.full((1, 1, 3), 255, np.uint8)]
    assert pixels_of(charts.strip(images, 4))[0, [0, -1]].tolist() == [[0, 0, 0, 255], [255, 255, 255, 255]]
    assert charts.difference_colour(np.array([0.0, 0.1, 0.3]))[:, 3].tolist() == [0, 102, 255]


# ------------------------------------------------------------------------------------------------- beside the rows


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of results with plans and pictures of every row."""
    folder = tmp_path / "laptop"
    (folder / "plans").mkdir(parents=True)
    (folder / "pictures").mkdir()
    geometry = CacheGeometry(2, 2, 4, ScaleSchedule(SCHEDULE))
    problem = PlanningProblem(geometry, Budget.parse("60%"), rows=2, storage="float32")
    dynamic = registered_policies()["snapkv"]

    def complete(row: ResultRow) -> dict[str, Any]:
        name = f"{row.policy}_{row.budget[:-1]}"
        plan = (dynamic.policy() if row.policy == "h2o" else Streaming(sink_scales=1)).plan(problem)
        plan.save(folder / "plans" / f"{name}.json")
        info = PngInfo()
        info.add_text("heatkv", row.comparison)
        image = np.full((4, 2 * 4 + GAP, 3), 10 * len(row.policy), np.uint8)
        Image.fromarray(image).save(folder / "pictures" / f"{name}.png", pnginfo=info)
        plans = {f"{name}.json": file_digest(folder / "plans" / f"{name}.json")}
        return {"plans": plans, "pictures": 2, "kl_per_scale": None}

    write_results(folder / "results.json", changed(results(), complete))
    return folder


def test_plans_and_pictures_are_shown_if_they_are_of_the_run(folder: Path) -> None:
    page = Page(write_report([folder], folder).read_text(encoding="utf-8"))
    assert len(page.of("article", "card")) == 6
    assert [attrs["alt"] for attrs in page.of("img") if "difference" in str(attrs.get("class"))] == [
        f"Where the pictures of {policy} differ from the full cache's" for policy in POLICIES * 2
    ]
    assert "No S-CAS" in page.said("scas")
    (folder / "plans" / "h2o_10.json").write_text((folder / "plans" / "heatkv_10.json").read_text())
    (folder / "pictures" / "h2o_10.png").unlink()
    page = Page(write_report([folder], folder).read_text(encoding="utf-8"))
    assert len(page.of("article", "card")) == 5
    assert "No plan of h2o 10%" in page.said("plans")
    assert "No pictures of h2o 10%" in page.said("pictures")


def test_scas_is_a_heat_map(tmp_path: Path) -> None:
    provenance = {"samples": ["a", "b"], "fingerprint": "f"}
    scas = {"format": "heatkv-scas", "version": 1, "schedule": SCHEDULE, "provenance": provenance}
    scas["scas"] = [[[0.1, 0.5], [0.2, 0.4]], [[0.8, 0.3], [0.4, 0.25]]]
    (tmp_path / "scas.json").write_text(json.dumps(scas))
    page = page_of(tmp_path, one=results())
    (image,) = [attrs for attrs in page.of("img") if "S-CAS" in str(attrs["alt"])]
    assert str(image["alt"]).endswith("in % by scale: 80, 50")
    pixels = pixels_of(str(image["src"]))
    assert pixels.shape == (2, 5, 4)
    brightest = pixels[..., :3].sum(axis=2).argmax(axis=0)  # of every column
    assert (brightest[0], brightest[3]) == (1, 0)


def test_the_command_writes_one_page(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "a" / "both"
    assert run(["report", str(folder), "--out", str(out), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["laptop"]["rows"]) == 7
    assert [path.name for path in out.iterdir()] == [NAME]
    (folder / NAME).write_text("mine")
    with pytest.raises(FormatError, match="is no report of HeatKV"):
        write_report([folder], folder)
    assert (folder / NAME).read_text() == "mine"
    assert run(["report", str(tmp_path / "absent")]) == 2
    assert run(["report", str(folder), str(folder)]) == 2


# ----------------------------------------------------------------------------------------------------------- looks

HOSTILE = ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "</style><b>", "{{ 7 * 7 }}", "`*|x|"]


def test_hostile_texts_do_nothing(tmp_path: Path) -> None:
    texts = dict(zip(POLICIES, HOSTILE, strict=False))
    made = changed(results(), lambda row: {"policy": texts.get(row.policy, row.policy), "settings": {"x": HOSTILE[3]}})
    page = page_of(tmp_path, one=made)
    assert len(page.of("script")) == 1
    assert len(page.of("img")) == len(plain()[1].of("img"))
    assert not page.of("b")
    for text in (*texts.values(), HOSTILE[3]):
        assert text in "".join(page.texts.values())


def test_the_page_needs_nothing_else_and_can_be_read_by_all(folder: Path) -> None:
    text = write_report([folder], folder).read_text(encoding="utf-8")
    assert write_report([folder], folder).read_text(encoding="utf-8") == text
    page = Page(text)
    for _, attrs in page.elements:
        for name in {"src", "href", "xlink:href"} & attrs.keys():
            assert str(attrs[name]).startswith(("#", "data:"))
    assert not {"iframe", "object", "embed", "form"} & {tag for tag, _ in page.elements}
    assert "@import" not in text
    ids = [attrs["id"] for _, attrs in page.elements if "id" in attrs]
    assert len(ids) == len(set(ids))
    links = {str(attrs[name]) for _, attrs in page.elements for name in ("href", "xlink:href") if name in attrs}
    assert {link[1:] for link in links if link.startswith("#")} <= set(ids)
    assert all(attrs.get("alt") for attrs in page.of("img"))
    assert all(attrs["role"] == "img" and attrs["aria-label"] for attrs in page.of("svg", "chart"))
    assert len(page.of("h1")) == len(page.of("main")) == 1


def luminance(colour: str) -> float:
    """Of sRGB, as WCAG 2 defines it."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_texts_and_lines_stand_out(scheme: int) -> None:
    css = files("heatkv.profiling.report").joinpath("templates/report.css").read_text()
    colours = dict(re.findall(r"--([\w-]+): (#\w{6});", css.split("prefers-color-scheme: dark")[scheme]))
    for name in ("ink", "soft", "muted", "accent"):
        assert min(contrast(colours[name], colours[ground]) for ground in ("paper", "surface", "sunken")) >= 4.5, name
    for name in ("limit", *(f"series-{index}" for index in range(8))):
        assert contrast(colours[name], colours["surface"]) >= 3, name


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium to look at the page with")
def test_the_page_in_a_browser(folder: Path, tmp_path: Path) -> None:
    """No error in its console, no request, nothing wider than the window, and tables that are sorted by a click."""
    many = joined(*(changed(results(True), lambda row, i=i: {"policy": f"{row.policy}{i or ''}"}) for i in range(5)))
    (tmp_path / "many.html").write_text(render(merged(tmp_path, a=results(), **{"x" * 60: many})), encoding="utf-8")
    pages = write_report([folder], folder), tmp_path / "many.html"
    with browser(tmp_path / "profile") as page:
        for path, width, dark in itertools.product(pages, (360, 1280), (False, True)):
            page.requests.clear()
            page.open(path, width, 900, dark=dark)
            page.evaluate("document.querySelectorAll('details').forEach(fold => fold.open = true)")
            assert page.errors == []
            assert [url for url in page.requests if not url.startswith(("data:", path.as_uri()))] == []
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
            assert ground == ("rgb(19, 21, 24)" if dark else "rgb(251, 250, 247)")
        assert page.evaluate(SORTED) == [True, True]


SORTED = """
(() => {
  const table = document.querySelector('#fidelity table');
  const button = table.tHead.querySelectorAll('button')[1];
  const values = () => [...table.tBodies[0].rows].map(row => Number(row.cells[1].dataset.v)).filter(v => !isNaN(v));
  const inOrder = sign => values().every((value, i, all) => i === 0 || sign * (value - all[i - 1]) >= 0);
  button.click();
  const up = inOrder(1);
  button.click();
  return [up, inOrder(-1)];
})()
"""
