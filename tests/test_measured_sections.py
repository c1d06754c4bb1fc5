"""The sections of memory, phases and paired comparisons: every figure of results.json is under its name, none is made
up, and what was not measured, or on another machine, is kept apart."""

from __future__ import annotations

import copy
import itertools
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from browser import CHROMIUM, browser
from hypothesis import given
from hypothesis import strategies as st
from test_report import OVERLAPS, Page, Told, column, page_of

from heatkv.cli import run
from heatkv.profiling.report.bar_figures import Bar, BarGroup, Difference, Part, bar_chart, coarser, forest
from heatkv.profiling.report.figures import Style

MIB = 1 << 20
PHASES = ("attention", "feed-forward", "cache update", "sampling", "decode", "other")
DIFFERENCES = {
    ("streaming", "30%"): (-0.0123, -0.0234, -0.0012),
    ("h2o", "30%"): (0.0321, 0.0234, 0.0432),
    ("streaming", "10%"): (0.0456, -0.0078, 0.0567),
    ("h2o", "10%"): (-0.0089, -0.0091, -0.0083),
}


def numbers() -> Iterator[int]:
    """Bytes that occur once each."""
    return itertools.count(3 * MIB + 11, MIB // 7)


def memory_of(cuda: bool, count: Iterator[int]) -> Told:
    """The field `memory`, no two figures alike."""
    phases = ("opened", "drawing", "decode")

    def peaks() -> Told:
        return {f"{kind}_bytes": next(count) for kind in ("requested", "allocated", "reserved")}

    weights = next(count)
    planned = {"cache_bytes": next(count), "budget_bytes": next(count)}
    arena = {f"{name}_bytes": next(count) for name in ("cache", "index", "workspace")}
    tensors = {"peak_bytes": {phase: next(count) for phase in phases}, "arena_bytes": next(count)}
    told: Told = {
        "process": "own", "weights_bytes": weights, "planned": planned,
        "arena": arena, "tensors": tensors, "host": None, "allocator": None, "graphs": None, "driver": None,
        "steps": [
            {"source": "planned cache", "target": "arena", "parts": {"unexplained": 7}},
            {"source": "arena", "target": "tensors", "parts": {"unexplained": -next(count), "activations": 1}},
        ],
    }  # fmt: skip
    if cuda:
        told["allocator"] = {
            "weights_bytes": next(count), "loading": peaks(), "peaks": {phase: peaks() for phase in phases}
        }  # fmt: skip
        told["graphs"] = {"pool_bytes": next(count), "peaks": peaks(), "reason": None}
        told["driver"] = {f"{n}_bytes": next(count) for n in ("process", "total", "reserved", "used", "free")}
    else:
        told["host"] = {"source": "VmHWM", **{f"{n}_bytes": next(count) for n in ("before", "loading_peak", "loaded")}}
        told["host"] |= {"peak_bytes": {phase: next(count) for phase in phases}, "most_bytes": next(count)}
    return told


def time_of(place: int, phases: bool = True) -> Told:
    """A time with one outlier, far out."""
    runs = [100.5 + place, 101.5 + place, 102.5 + place, 103.5 + place, 104.5 + place, 180.25 + place]
    told: Told = {
        "median": 103.0 + place, "iqr": 2.5, "runs": 6, "interval": [100.5 + place, 180.25 + place],
        "confidence": 0.9688, "outliers": 1, "all": runs, "scales": [10.25 + place, 20.5 + place, 30.75 + place],
    }  # fmt: skip
    told["phases"] = {name: 3.0 * i + place + 0.125 for i, name in enumerate(PHASES)} if phases else None
    return told


def results(cuda: bool = False) -> Told:
    """Five rows of a made-up model of two layers and three scales."""
    rows, count = [], numbers()
    named = [("full", "100%"), *itertools.product(("heatkv", "streaming", "h2o"), ("30%", "10%"))]
    for place, (policy, budget) in enumerate(sorted(named, key=lambda pair: -float(pair[1][:-1]))):
        room = {"100%": 40, "30%": 12, "10%": 4}[budget] * MIB
        versus = DIFFERENCES.get((policy, budget))
        held = [[0, room // 4], [room // 2 + place, room - place], [room // 3, 0]]
        rows.append({
            "model": "toy", "model_fingerprint": "0", "policy": policy, "budget": budget, "settings": {}, "rows": 2,
            "batch": 1, "seed": 0, "dtype": "float32", "schedule": [[1, 1, 1], [1, 2, 2], [1, 3, 3]], "draws": 1,
            "budget_bytes": room, "planned_bytes": room - place, "allocated_bytes": room - place,
            "full_bytes": 40 * MIB, "comparison": f"c{place}", "images": 16, "pictures": 0, "kl": 0.01 * place,
            "top1_agreement": 0.9, "timeline_bytes": held, "memory": memory_of(cuda, count),
            "latency_ms": time_of(place + 200 * cuda),
            "graph_latency_ms": time_of(place + 50, phases=False) if cuda else None,
            "versus": versus and {"policy": "heatkv", "difference": versus[0], "interval": list(versus[1:]),
                                  "confidence": 0.95, "images": 16},
        })  # fmt: skip
    device = "A GPU" if cuda else "A CPU"
    environment = {
        "device": "cuda" if cuda else "cpu", "device_name": device, "threads": 1, "versions": {"torch": "2"},
        "system": "s",
    }  # fmt: skip
    return {
        "format": "heatkv-results", "version": 1, "environment": environment, "sampling": {"cfg": 1.5},
        "request": {"seed": 0, "samples_digest": "x"}, "rows": rows,
    }  # fmt: skip


def saved(told: Told, folder: Path) -> Path:
    folder.mkdir()
    (folder / "results.json").write_text(json.dumps(told))
    return folder


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, tuple[Told, Page, Path]]:
    """Results, their page and its folder: without a GPU, and with one."""
    made = {}
    for cuda in (False, True):
        told, folder = results(cuda), tmp_path_factory.mktemp("pages")
        made[cuda] = told, page_of(saved(told, folder / "one"), out=folder / "out")[0], folder / "out"
    return made


def ids(page: Page) -> list[str]:
    return [str(told["id"]) for told in page.of("section")]


def cells(table: Told, heads: int = 1) -> dict[tuple[str, ...], dict[str, tuple[str, str | None]]]:
    """Texts and values of a table by (policy, budget) and column."""
    names = table["rows"][heads - 1]
    return {
        (texts[0], texts[1], *([texts[2]] if names[2] == "drawn" else [])): dict(
            zip(names, zip(texts, values, strict=True), strict=True)
        )
        for texts, values in zip(table["rows"][heads:], table["numbers"][heads:], strict=True)
    }


def leaves(told: Any, at: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], float]]:
    for name, value in told.items():
        if isinstance(value, dict):
            yield from leaves(value, (*at, name))
        elif isinstance(value, int | float):
            yield (*at, name), value


# -------------------------------------------------------------------------------------------------------- memory

CACHE_TITLES = {
    "plan: budget, MiB": ("planned", "budget_bytes"), "plan: cache, MiB": ("planned", "cache_bytes"),
    "arena: cache, MiB": ("arena", "cache_bytes"), "arena: index tables, MiB": ("arena", "index_bytes"),
    "arena: workspace, MiB": ("arena", "workspace_bytes"),
}  # fmt: skip
DEVICE_TITLES = {
    "model: weights, MiB": ("weights_bytes",), "tensors: opening, MiB": ("tensors", "peak_bytes", "opened"),
    "tensors: drawing, MiB": ("tensors", "peak_bytes", "drawing"),
    "tensors: decode, MiB": ("tensors", "peak_bytes", "decode"),
    "tensors: arena among them, MiB": ("tensors", "arena_bytes"),
}  # fmt: skip
CPU_TITLES = {
    "resident: before loading, MiB": ("host", "before_bytes"),
    "resident: peak of loading, MiB": ("host", "loading_peak_bytes"),
    "resident: after loading, MiB": ("host", "loaded_bytes"),
    "resident: peak of opening, MiB": ("host", "peak_bytes", "opened"),
    "resident: peak of drawing, MiB": ("host", "peak_bytes", "drawing"),
    "resident: peak of decode, MiB": ("host", "peak_bytes", "decode"),
    "resident: largest peak, MiB": ("host", "most_bytes"),
}  # fmt: skip
GPU_TITLES = {
    "allocator, allocated: before opening, MiB": ("allocator", "weights_bytes"),
    **{
        f"allocator, {kind}: {called}, MiB": (*path, f"{kind}_bytes")
        for kind in ("requested", "allocated", "reserved")
        for called, path in {
            "loading": ("allocator", "loading"), "opening": ("allocator", "peaks", "opened"),
            "drawing": ("allocator", "peaks", "drawing"), "decode": ("allocator", "peaks", "decode"),
            "with CUDA graphs": ("graphs", "peaks"),
        }.items()
    },
    "allocator, reserved: pool of CUDA graphs, MiB": ("graphs", "pool_bytes"),
    "NVML: process, MiB": ("driver", "process_bytes"), "NVML: device, used by all, MiB": ("driver", "used_bytes"),
    "NVML: device, kept by the driver, MiB": ("driver", "reserved_bytes"),
    "NVML: device, free, MiB": ("driver", "free_bytes"), "NVML: device, in all, MiB": ("driver", "total_bytes"),
}  # fmt: skip


@pytest.mark.parametrize("cuda", [False, True], ids=["cpu", "gpu"])
def test_every_figure_of_memory_is_under_its_ledger(cuda: bool, pages: dict[bool, tuple[Told, Page, Path]]) -> None:
    told, page, _ = pages[cuda]
    cache, device, held = page.in_section("memory")
    for table, titles in ((cache, CACHE_TITLES), (device, DEVICE_TITLES | (GPU_TITLES if cuda else CPU_TITLES))):
        shown = cells(table)
        assert len(shown) == len(told["rows"])
        for row in told["rows"]:
            found = shown[row["policy"], row["budget"]]
            assert [title for title in found if title.endswith("MiB") and "unexplained" not in title] == [
                title for title in found if title in titles
            ]
            for title, path in titles.items():
                value = dict(leaves(row["memory"]))[path]
                assert float(found[title][1] or "nan") == value, title
                assert float(found[title][0].replace(",", "")) == pytest.approx(value / MIB, abs=0.051)
    # all that the rows hold is in one of them, and nothing is left for the section of unplaced figures
    placed = {path for titles in (CACHE_TITLES, DEVICE_TITLES, GPU_TITLES, CPU_TITLES) for path in titles.values()}
    assert {path for row in told["rows"] for path, _ in leaves(row["memory"])} <= placed
    assert "further" not in ids(page)
    for row in told["rows"]:
        found = cells(device)[row["policy"], row["budget"]]
        for step in row["memory"]["steps"]:
            title = f"unexplained, {step['source']} to {step['target']}, MiB"
            assert found[title][1] == str(step["parts"]["unexplained"])
    assert any("negative, the parts are more than the step" in text for text in page.texts)
    for row in told["rows"]:
        of_row = cells(held)[row["policy"], row["budget"]]
        assert [of_row[f"scale {s} ({s + 1}), MiB"][1] for s in range(3)] == [
            str(max(layers)) for layers in row["timeline_bytes"]
        ]


def test_what_no_row_measured_is_no_column_and_what_one_lacks_is_said(tmp_path: Path) -> None:
    told = results()
    for row in told["rows"]:
        row["memory"]["host"]["before_bytes"] = None
        row["memory"]["later"] = {"figure_bytes": 5}
    lost = told["rows"][1]
    lost["memory"]["tensors"], lost["memory"]["steps"] = None, []
    page, _ = page_of(saved(told, tmp_path / "one"), out=tmp_path / "out")
    _, device, _ = page.in_section("memory")
    assert "resident: before loading, MiB" not in device["rows"][0]
    assert not any(title.startswith(("allocator", "NVML")) for title in device["rows"][0])
    of_lost = cells(device)[lost["policy"], lost["budget"]]
    for title in ("tensors: drawing, MiB", "unexplained, arena to tensors, MiB"):
        assert of_lost[title] == ("not measured", None)
    assert "0.000" not in [text for text, _ in of_lost.values()]
    # a figure of a later release is told under its name
    (further,) = page.in_section("further")
    assert further["rows"][0] == ["policy", "budget", "memory later figure_bytes"]
    assert {row[2] for row in further["rows"][1:]} == {"5"}


@pytest.mark.parametrize("cuda", [False, True], ids=["cpu", "gpu"])
def test_bars_tell_planned_arena_and_device(cuda: bool, pages: dict[bool, tuple[Told, Page, Path]]) -> None:
    told, page, _ = pages[cuda]
    row = told["rows"][1]
    memory, name = row["memory"], f"{row['policy']} at {row['budget']}"
    arena = [f"{memory['arena'][f'{part}_bytes'] / MIB:.3f}" for part in ("cache", "index", "workspace")]
    wanted = [
        f"{name}, planned: cache {memory['planned']['cache_bytes'] / MIB:.3f} MiB",
        f"{name}, arena: cache {arena[0]}, index tables {arena[1]}, workspace {arena[2]} MiB",
    ]
    if cuda:  # above the weights
        peaks = memory["allocator"]["peaks"]["drawing"]
        above = peaks["allocated_bytes"] - memory["allocator"]["weights_bytes"]
        beyond = peaks["reserved_bytes"] - peaks["allocated_bytes"]
        wanted.append(f"{name}, drawing: allocated {above / MIB:.3f}, reserved beyond it {beyond / MIB:.3f} MiB")
    else:
        wanted.append(f"{name}, drawing: tensors {memory['tensors']['peak_bytes']['drawing'] / MIB:.3f} MiB")
    for text in wanted:
        assert text in page.texts
    assert any("with CUDA graphs" in text for text in page.texts) == cuda


def test_bars_are_as_long_as_they_say() -> None:
    """From the drawing itself: lengths of parts, the limit, the median, and outliers at the edge."""
    parts = (Part(0, 2.0), Part(1, 3.0, 0.5))
    groups = [
        BarGroup("one", (Bar(parts, "a", 4.0, (3.5, 4.5), (5.5, 99.0)), Bar((Part(2, 8.0),), "b")), 6.0),
        BarGroup("two", (Bar((Part(3, 4.0),), "c"),)),
    ]
    text = bar_chart("test", "what it shows", groups, "MiB", 8)
    root = ElementTree.fromstring(text)
    widths = []
    for path in root.iter("path"):
        if "fill: var(--series" in path.get("style", ""):
            xs = [float(x) for x in re.findall(r"[ML] (-?[\d.]+) ", path.get("d", ""))]
            widths.append(max(xs) - min(xs))
    unit = widths[2] / 8
    assert [width / unit for width in widths] == pytest.approx([2, 3, 8, 4], rel=1e-3)
    # a tip is told over its own bar alone: its group holds nothing else
    tips = [
        (group.findtext("title"), len(list(group.iter("path"))))
        for group in root.iter("g")
        if group.find("title") is not None
    ]
    assert tips == [("a", 1), ("a", 1), ("b", 1), ("c", 1)]
    assert len(list(root.iter("title"))) == 4
    (limit,) = [
        path for path in root.iter("path") if "var(--limit)" in path.get("style", "")
    ]  # fmt: skip
    left = min(
        float(x)
        for path in root.iter("path")
        for x in re.findall(r"M (-?[\d.]+) ", path.get("d", ""))
        if "series-0" in path.get("style", "")
    )
    at = float(re.findall(r"M (-?[\d.]+) ", limit.get("d", ""))[0])
    assert (at - left) / unit == pytest.approx(6, rel=1e-3)


@given(
    values=st.integers(1, 40).flatmap(
        lambda layers: st.lists(st.lists(st.integers(0, 99), min_size=layers, max_size=layers), min_size=1, max_size=20)
    )
)
def test_coarser_lines_keep_the_fullest_of_every_scale(values: list[list[int]]) -> None:
    found = coarser(values)
    assert found.max(axis=1).tolist() == [max(layers) for layers in values]
    assert found.size <= max(160, len(values))
    if len(values) * len(values[0]) <= 160:
        assert np.array_equal(found, np.array(values))


# -------------------------------------------------------------------------------------------------------- phases


@pytest.mark.parametrize("cuda", [False, True], ids=["cpu", "gpu"])
def test_every_time_is_under_its_phase_and_scale(cuda: bool, pages: dict[bool, tuple[Told, Page, Path]]) -> None:
    told, page, _ = pages[cuda]
    phases, scales = page.in_section("phases")
    by_phase, by_scale = cells(phases, 2), cells(scales)
    fields = {"eager": "latency_ms"} | ({"CUDA graphs": "graph_latency_ms"} if cuda else {})
    assert len(by_phase) == len(by_scale) == len(fields) * len(told["rows"])
    for row, (how, field) in itertools.product(told["rows"], fields.items()):
        time = row[field]
        found = by_phase[row["policy"], row["budget"], how]
        assert [float(str(found[title][1])) for title in ("median, ms", "from, ms", "to, ms")] == [
            time["median"], *time["interval"],
        ]  # fmt: skip
        assert [found[title][0] for title in ("confidence", "runs", "outliers")] == ["96.9%", "6", "1"]
        for name in PHASES:
            wanted = str(time["phases"][name]) if time["phases"] else None
            assert found[f"{name}, ms"][1] == wanted
            assert (found[f"{name}, ms"][0] == "not measured") == (wanted is None)
        shown = by_scale[row["policy"], row["budget"], how]
        assert [shown[f"scale {s} ({s + 1}), ms"][1] for s in range(3)] == [str(one) for one in time["scales"]]
    texts = "".join(page.texts)
    assert f"({len(by_phase)} in all; an arrow at the edge" in texts
    assert ("dashed ones replay CUDA graphs" in texts) == cuda


def test_phases_of_two_machines_are_apart(tmp_path: Path) -> None:
    folders = [saved(results(cuda), tmp_path / name) for cuda, name in ((False, "laptop"), (True, "server"))]
    page, _ = page_of(*folders, out=tmp_path / "out")
    tables = page.in_section("phases")
    assert [table["heading"].partition(":")[0] for table in tables] == [f"machine {m}" for m in "AABB"]
    assert [table["heading"].rpartition(" ")[2] for table in tables] == ["(laptop)"] * 2 + ["(server)"] * 2
    charts = [str(told["aria-label"]) for told in page.of("svg") if told.get("class") == "chart"]
    assert len([label for label in charts if label.startswith(("Time of one batch", "Time of every"))]) == 4
    # tips stand over bars of their own machine alone
    tips = list(dict.fromkeys(text for text in page.texts if ": median " in text))
    medians = [float(re.findall(r": median ([\d.]+) ms", tip)[0]) for tip in tips]
    assert [median < 150 for median in medians] == [True] * 7 + [False] * 14
    # what the devices saw is apart too, and each has the columns of its own
    device = [table for table in page.in_section("memory") if "model: weights, MiB" in table["rows"][0]]
    assert ["NVML: process, MiB" in table["rows"][0] for table in device] == [False, True]
    assert [set(column(table, 0)) for table in device] == [{"laptop"}, {"server"}]


# ------------------------------------------------------------------------------------------------------- in pairs


def test_differences_are_told_with_base_units_and_samples(pages: dict[bool, tuple[Told, Page, Path]]) -> None:
    told, page, _ = pages[False]
    (table,) = page.in_section("paired")
    shown = cells(table)
    verdicts = {
        ("streaming", "30%"): "closer than heatkv", ("h2o", "30%"): "further than heatkv",
        ("h2o", "10%"): "closer than heatkv", ("streaming", "10%"): "not told apart",
    }  # fmt: skip
    assert list(shown) == list(verdicts)  # the least difference of every budget first
    for place, (difference, low, high) in DIFFERENCES.items():
        found = shown[place]
        (kl,) = [row["kl"] for row in told["rows"] if (row["policy"], row["budget"]) == place]
        assert [found[name][1] for name in ("its KL, nats", "less the base's, nats", "from, nats", "to, nats")] == [
            str(number) for number in (kl, difference, low, high)
        ]
        assert [found[name][0] for name in ("base", "confidence", "images", "on these images")] == [
            "heatkv", "95%", "16", verdicts[place],
        ]  # fmt: skip
        assert f"{place[0]}: {difference:+.4f} [{low:+.4f}, {high:+.4f}]" in page.texts
    texts = "".join(page.texts)
    assert "means over 16 images" in texts
    assert "nats per token" in texts
    assert "30%, against heatkv" in texts


def test_batches_share_a_comparison_and_seeds_do_not(tmp_path: Path) -> None:
    told = results()
    rows, told["rows"] = told["rows"], []
    for seed, batch in itertools.product((0, 1), (1, 2)):
        for row in rows:
            more = {"seed": seed, "batch": batch, "rows": 2 * batch, "comparison": f"{row['comparison']} {seed}"}
            told["rows"].append(copy.deepcopy(row) | more)
    told["request"]["samples_digest"] = {"0": "a", "1": "b"}
    page, _ = page_of(saved(told, tmp_path / "one"), out=tmp_path / "out")
    tables = page.in_section("paired")
    assert [table["heading"] for table in tables] == ["seed 0", "seed 1"]
    assert [len(table["rows"]) for table in tables] == [5, 5]
    assert {row[0] for table in tables for row in table["rows"][1:]} == {"streaming", "h2o"}


def test_a_forest_has_its_zero_where_differences_end() -> None:
    lines = [Difference("a", Style(0, 0), -2.0, -3.0, -1.0, "x"), Difference("b", Style(1, 1), 1.0, 0.0, 2.0, "y")]
    root = ElementTree.fromstring(forest("test", "what it shows", {"p": lines}, "nats"))
    whiskers = {}
    for path in root.iter("path"):
        if found := re.search(r"stroke: var\(--(series-\d|muted)\); stroke-width: (2\.2|1\.1)", path.get("style", "")):
            whiskers[found[1]] = [float(x) for x in re.findall(r"[ML] (-?[\d.]+) ", path.get("d", ""))]
    (zero,) = set(whiskers["muted"])
    assert whiskers["series-1"][0] == pytest.approx(zero, abs=0.02)
    lengths = {name: abs(ends[1] - ends[0]) for name, ends in whiskers.items()}
    assert lengths["series-0"] == pytest.approx(lengths["series-1"], abs=0.03)
    assert zero - whiskers["series-0"][1] == pytest.approx(lengths["series-0"] / 2, abs=0.03)


# ----------------------------------------------------------------------------------------- all three, and what lacks


def without(*names: str) -> Told:
    told = results()
    for row in told["rows"]:
        for name in names:
            row[name] = None
    return told


LACKING: dict[str, tuple[Callable[[], Told], set[str]]] = {
    "nothing": (lambda: results(), set()),
    "memory": (lambda: without("memory", "timeline_bytes"), {"memory"}),
    "times": (lambda: without("latency_ms", "graph_latency_ms"), {"latency", "phases"}),
    "pairs": (lambda: without("versus"), {"paired"}),
    "all": (
        lambda: without("versus", "memory", "timeline_bytes", "latency_ms"), {"memory", "phases", "paired", "latency"}
    ),
}  # fmt: skip


@pytest.mark.parametrize(("made", "absent"), LACKING.values(), ids=LACKING)
def test_sections_are_there_only_with_figures(made: Callable[[], Told], absent: set[str], tmp_path: Path) -> None:
    page, _ = page_of(saved(made(), tmp_path / "one"), out=tmp_path / "out")
    assert {"paired", "latency", "phases", "memory"} - set(ids(page)) == absent


def test_times_without_phases_have_no_section_of_them(tmp_path: Path) -> None:
    told = results()
    for row in told["rows"]:
        row["latency_ms"] = {"median": 5.5, "iqr": 0.5, "runs": 3}
    page, _ = page_of(saved(told, tmp_path / "one"), out=tmp_path / "out")
    assert "latency" in ids(page)
    assert "phases" not in ids(page)


def test_a_timeline_alone_has_the_section(tmp_path: Path) -> None:
    page, _ = page_of(saved(without("memory"), tmp_path / "one"), out=tmp_path / "out")
    (table,) = page.in_section("memory")
    assert table["rows"][0][2] == "budget, MiB"
    (chart,) = [told for told in page.of("svg") if "Bytes of the cache after" in str(told.get("aria-label"))]
    assert chart["role"] == "img"


def test_the_markdown_has_the_same_tables(pages: dict[bool, tuple[Told, Page, Path]]) -> None:
    _, page, out = pages[True]
    lines = [
        [re.sub(r"\\(.)", r"\1", cell).strip(" *") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        for line in (out / "report.md").read_text().splitlines() if line.startswith("|")
    ]  # fmt: skip
    for section, heads in (("memory", (0, 0, 0)), ("phases", (1, 0)), ("paired", (0,))):
        for table, skipped in zip(page.in_section(section), heads, strict=True):
            for row in table["rows"][skipped:]:
                assert row in lines, (section, row)


def test_many_rows_are_folded_by_budget(tmp_path: Path) -> None:
    told = results()
    full, *others = told["rows"]
    told["rows"] = [full]
    for number in range(5):
        for row in others:
            told["rows"].append(copy.deepcopy(row) | {"policy": f"{row['policy']}-{number}"})
    page, _ = page_of(saved(told, tmp_path / "one"), out=tmp_path / "out")
    titles = [text for text in page.texts if text.startswith("At ")]
    assert titles == ["At 30%, beside the full cache", "At 10%, beside the full cache"] * 2
    planned = [text for text in page.texts if ", planned: cache " in text]
    assert len(planned) == len(told["rows"]) + 1  # the full cache in both


DAMAGED: dict[str, tuple[Callable[[Told], object], str]] = {
    "memory": (lambda row: row.update(memory=3), "'memory' is 3; it must be an object of ledgers"),
    "ledger": (lambda row: row["memory"].update(arena=[]), "it must be an object of ledgers"),
    "negative": (lambda row: row["memory"]["arena"].update(cache_bytes=-1), "numbers of at least 0"),
    "text": (lambda row: row["memory"]["tensors"].update(peak_bytes="1"), "it must be an object of ledgers"),
    "steps": (lambda row: row["memory"].update(steps=[{"parts": {"unexplained": None}}]), "an object of ledgers"),
    "timeline": (lambda row: row.update(timeline_bytes=[[1], [1, 2], [1]]), "bytes of every layer for every scale"),
    "short timeline": (lambda row: row.update(timeline_bytes=[[1, 2]]), "one list for every scale"),
    "scales": (lambda row: row["latency_ms"].update(scales=[1.0]), "one number for every scale, in scales"),
    "phases": (lambda row: row["latency_ms"].update(phases={"decode": "1"}), "it must be an object with the median"),
    "interval": (lambda row: row["latency_ms"].update(interval=[1]), "it must be an object with the median"),
    "versus": (lambda row: row["versus"].update(interval=None), "it must be an object with policy, difference"),
    "base": (lambda row: row["versus"].update(policy=None), "it must be an object with policy, difference and"),
}


@pytest.mark.parametrize(("change", "said"), DAMAGED.values(), ids=DAMAGED)
def test_damaged_figures_are_refused_in_a_line(
    change: Callable[[Told], object], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = results()
    change(next(row for row in told["rows"] if row["versus"]))
    assert run(["report", str(saved(told, tmp_path / "one"))]) == 2
    out, error = capsys.readouterr()
    assert out == ""
    (line,) = error.strip().splitlines()
    assert said in line
    assert "results.json, row" in line


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium to look at the page with")
def test_the_sections_in_a_browser(tmp_path: Path) -> None:
    """Nothing is wider than the window, on a phone too, no text is over another or outside, and all of it is inked."""
    folders = [saved(results(cuda), tmp_path / name) for cuda, name in ((False, "laptop"), (True, "a-long-name" * 4))]
    page_of(folders[0], out=tmp_path / "one")
    page_of(*folders, out=tmp_path / "two")
    with browser(tmp_path / "profile") as page:
        for name, (width, height), dark in itertools.product(("one", "two"), ((390, 844), (1280, 900)), (False, True)):
            page.open(tmp_path / name / "report.html", width, height, dark=dark)
            page.evaluate("document.querySelectorAll('details').forEach(fold => fold.open = true)")
            assert page.errors == []
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            sections = ("memory", "phases", "paired")
            assert (
                page.evaluate(
                    OVERLAPS.replace(":is(section, section > details) > .plot", ":is(#memory, #phases, #paired) .plot")
                )
                == []
            )
            for section in sections:
                charts = f"document.querySelectorAll('#{section} svg.chart')"
                assert page.evaluate(f"{charts}.length") > 0
                widest = page.evaluate(f"Math.max(...[...{charts}].map(c => c.getBoundingClientRect().right))")
                assert widest <= width
            # the stand-ins of colours are all replaced by those of the scheme
            ink = page.evaluate("getComputedStyle(document.querySelector('#memory svg.chart text')).fill")
            assert ink == ("rgb(236, 234, 229)" if dark else "rgb(29, 31, 35)")
            assert page.evaluate(BARS)


BARS = """
[...document.querySelectorAll('#memory svg.chart path, #phases svg.chart path')]
  .filter(path => path.getAttribute('style')?.includes('--series'))
  .every(path => !['none', 'rgb(0, 0, 0)'].includes(getComputedStyle(path).fill)
    || !['none', 'rgb(0, 0, 0)'].includes(getComputedStyle(path).stroke))
"""
