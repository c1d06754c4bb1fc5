"""The sections of a report that are made of rows of results. They choose and order figures; the words are in templates.

A section is a function of the report that gives its blocks, or None where it has nothing to show.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from heatkv.core.schedule import ScaleSchedule
from heatkv.engine.spans import PHASES as TIME_PHASES
from heatkv.profiling.measure.latency import outliers_of
from heatkv.profiling.report import charts, tables
from heatkv.profiling.report.charts import Chart, Line, Style
from heatkv.profiling.report.pools import Blocks, Cell, Entry, Pool, Report, scale_names
from heatkv.profiling.report.tables import ARENA, KL, MEDIAN, Column
from heatkv.profiling.results.comparable import REFERENCE
from heatkv.profiling.results.ledgers import PHASES, Ledgers, figure_at
from heatkv.profiling.results.merging import leaders, pareto_front, ranked
from heatkv.profiling.results.row import ResultRow

# ----------------------------------------------------------------------------------------------------- fidelity


def _kl(entry: Entry) -> float | None:
    return entry.mean(KL)


def answer(report: Report) -> dict[str, Any]:
    """The main result: what stays closest to the full cache at the smallest budget."""
    pool = max(report.fidelity, key=lambda pool: len(pool.entries), default=None)
    if pool is None:
        return {"policies": len({row.result.policy for row in report.merged.rows} - {REFERENCE})}
    budget, entries = list(pool.budgets.items())[-1]
    folder = " of {}" if report.several else ""
    best = [e.result.policy + folder.format(e.rows[0].source.label) for e in leaders(entries, _kl)]
    return {"budget": budget, "best": best}


def summary(report: Report) -> Blocks:
    """The best policy at every budget, all that tie with it, and the next one."""
    rows = [row.result for row in report.merged.rows]
    fields = ("seed", "rows", "storage", "images", "pictures")
    facts = {name: sorted({getattr(row, name) for row in rows} - {None}) for name in fields}

    def tile(budget: str, entries: list[Entry]) -> dict[str, Any]:
        best = leaders(entries, _kl)
        others = [e for e in ranked(entries, _kl) if e.result.policy not in {entry.result.policy for entry in best}]
        return {"budget": budget, "best": best, "next": others[0] if others else None}

    tiles = [(pool.title, [tile(*item) for item in pool.budgets.items()]) for pool in report.fidelity]
    return [report.ui.summary(report.merged.model, facts, list(report.merged.machines.values()), tiles)]


def _against_memory(entries: Sequence[Entry], column: Column, log: bool) -> tuple[Chart | None, list[Entry]]:
    """A chart of a figure against the bytes held, and its Pareto front."""

    def point(entry: Entry) -> tuple[float, float]:
        return (entry.mean(ARENA) or 0) / 2**20, entry.mean(column) or 0

    series: dict[str, list[Entry]] = {}
    for entry in sorted(entries, key=point):
        if all(point(entry)) or (point(entry)[0] and not log):
            series.setdefault(entry.name, []).append(entry)
    drawn = [entry for members in series.values() for entry in members]
    if not drawn:
        return None, []
    lines = []
    for members in series.values():
        points = [point(entry) for entry in members]
        ends = [entry.range(column) or (y, y) for entry, (_, y) in zip(members, points, strict=True)]
        ranges = [((x, low), (x, high)) for (x, _), (low, high) in zip(points, ends, strict=True)]
        lines.append(Line(members[0].style, points, ranges))
    front = pareto_front(drawn, lambda entry: entry.mean(ARENA), lambda entry: entry.mean(column))
    budgets = {entry.result.budget_bytes / 2**20: entry.result.budget for entry in drawn}
    ticks = {size: f"{budgets[size]}\n{size:.3g}" for size in charts.spaced(budgets)}
    x = charts.axis([*budgets, *(point(entry)[0] for entry in drawn)], True, ticks)
    y = charts.axis([y for line in lines for ends in line.ranges for _, y in ends], log)
    return Chart("", x, y, lines, [point(entry) for entry in front], size=(380, 275)), front


def fidelity(report: Report) -> Blocks:
    """KL against memory, and by policy and budget."""

    def make(pool: Pool) -> list[Markup]:
        chart, front = _against_memory(pool.compared, KL, log=True)
        return [report.ui.fidelity(chart, _kl_table(report, pool), front, pool.compared)]

    return report.each(report.fidelity, make)


def _kl_table(report: Report, pool: Pool) -> Markup:
    """KL by policy and budget, from the least at the smallest budget on; the least of every budget is bold."""
    best = [entry for of_budget in pool.budgets.values() for entry in leaders(of_budget, _kl)]
    by_name: dict[str, dict[str, Entry]] = {}
    for budget, entries in reversed(pool.budgets.items()):
        for entry in ranked(entries, _kl):
            by_name.setdefault(entry.name, {})[budget] = entry
    lines = []
    for name, found in by_name.items():
        cells = [found[budget].cell(KL, found[budget] in best) if budget in found else Cell("-")
                 for budget in pool.budgets]  # fmt: skip
        lines.append([Cell(name, name, next(iter(found.values())).style), *cells])
    seeds = f" at each of {len(best[0].rows)} seeds" if len(best[0].rows) > 1 else ""
    caption = f"KL in nats per token by budget, over {best[0].result.images} images{seeds}; the least is bold"
    return report.cells(caption, ["policy", *pool.budgets], lines, shaded=True)


def paired(report: Report) -> Blocks:
    """How far every policy's KL is from that of the base at the same budget, on the same images."""
    groups = [(g.title, [row for row in g.rows if row.result.versus]) for g in report.merged.fidelity_groups]
    pools = [report.pool(rows, title if len(groups) > 1 else "", over_seeds=False) for title, rows in groups if rows]

    def make(pool: Pool) -> list[Markup]:
        differences = [entry.result.versus for entry in pool.compared if entry.result.versus]
        axis = charts.bar_axis(end for versus in differences for end in versus.interval)
        groups = {budget: sorted(entries, key=lambda entry: figure_at(entry.result, "versus.difference"))
                  for budget, entries in pool.budgets.items()}  # fmt: skip
        return [report.ui.paired(groups, axis, differences[0])]

    return report.each(pools, make)


def _by_scale(pool: Pool, lines: Mapping[str, Sequence[Line]]) -> list[Chart]:
    """Charts along the target scales, on the same axes."""
    x = charts.scale_axis(pool.scales)
    y = charts.axis([0.0, *(y for of_chart in lines.values() for line in of_chart for _, y in line.points)])
    return [
        Chart(title, x, y, of_chart, size=(190 if len(lines) > 1 else 380, 165)) for title, of_chart in lines.items()
    ]


def per_scale(report: Report) -> Blocks:
    """KL by target scale."""

    def make(pool: Pool) -> list[Markup]:
        arrays = {entry: found for entry in pool.entries if (found := entry.array("kl_per_scale")) is not None}
        lines = {budget: [Line(e.style, list(enumerate(arrays[e].tolist()))) for e in entries if e in arrays]
                 for budget, entries in pool.budgets.items()}  # fmt: skip
        columns = tables.scale_columns("kl_per_scale", pool.scales, "", ".4f")
        table = report.table("KL in nats per token by target scale", list(arrays), columns, shaded=True)
        return [report.ui.per_scale(_by_scale(pool, lines), pool.compared), table]

    return report.each([p for p in report.fidelity if any(e.result.kl_per_scale for e in p.compared)], make)


# ------------------------------------------------------------------------------------------------------ latency


def latency(report: Report) -> Blocks:
    """Time against memory, and by phase and scale, of what was timed in turns."""
    groups = report.merged.timing_groups
    shares: dict[int, float] = {}
    for group in groups:
        full = [MEDIAN.value(row.result) for row in group.rows if row.result.policy == REFERENCE]
        shares |= {id(row.result): MEDIAN.value(row.result) / full[0] for row in group.rows if full}
    of_full = Column("of full cache", "", lambda row: shares.get(id(row)), ".2f")

    def make(pool: Pool) -> list[Markup]:
        entries = ranked(pool.entries, lambda entry: entry.mean(MEDIAN))
        machines = [r.result.timing_machine or r.source.results.environment for e in entries for r in e.rows]
        busy = dict.fromkeys(reason for machine in machines if machine.load for reason in machine.load.reasons)
        chart, front = _against_memory(entries, MEDIAN, log=False)
        scales = [f"scale {scale}" for scale in pool.scales]
        by_scale = [c for field, ledger in tables.TIMES.items()
                    for c in tables.scale_columns(f"{field}.scales", scales, "ms", ".1f", ledger)]  # fmt: skip
        columns = (MEDIAN, of_full, tables.IQR, ARENA, *tables.LATENCY[1:], *by_scale)
        table = report.table("Time of one batch, the fastest first; the front is bold", entries, columns, front)
        blocks = [report.ui.latency(list(busy), chart, pool.entries, front)]
        return [*blocks, *_phases(report, pool), *_time_by_scale(report, pool), table]

    return report.each(report.pools(groups), make)


def _phases(report: Report, pool: Pool) -> list[Markup]:
    """Bars by phase, with the median and its interval."""
    entries = [entry for entry in pool.entries if figure_at(entry.result, "latency_ms.phases")]
    groups = {title: [e for e in of if e in entries] for title, of in pool.titled.items()}
    times = [time for e in entries for time in (e.result.latency_ms, e.result.graph_latency_ms) if time]
    far = [outliers_of(list(time.all)) for time in times]
    ends = [max(time.median, *(time.interval or ()), sum((time.phases or {}).values())) for time in times]
    axis = charts.bar_axis([*ends, *(outlier for outliers in far for outlier in outliers)])
    return [report.ui.phases(groups, axis, TIME_PHASES, outliers_of, sum(map(len, far)))] if entries else []


def _time_by_scale(report: Report, pool: Pool) -> list[Markup]:
    """Lines by target scale, those with CUDA graphs dashed."""
    lines: dict[str, list[Line]] = {}
    for title, entries in (pool.budgets or {"full cache": []}).items():
        for entry in [*pool.reference, *entries]:
            for field in tables.TIMES:
                if (times := entry.array(f"{field}.scales")) is not None:
                    line = Line(entry.style, list(enumerate(times.tolist())), dashed=field == "graph_latency_ms")
                    lines.setdefault(title, []).append(line)
    dashed = any(line.dashed for of_chart in lines.values() for line in of_chart)
    return [report.ui.time_by_scale(_by_scale(pool, lines), pool.entries, dashed)] if lines else []


# ------------------------------------------------------------------------------------------------------- memory


def memory(report: Report) -> Blocks:
    """Every ledger of every row, and the cache over time, folder by folder."""
    pools = []
    for source in report.merged.sources:
        batches = sorted({row.result.batch for row in source.rows})
        for batch in batches:
            parts = [source.label] if report.several else []
            title = ", ".join([*parts, *([f"batch {batch}"] if len(batches) > 1 else [])])
            pools.append(report.pool((row for row in source.rows if row.result.batch == batch), title))

    def make(pool: Pool) -> list[Markup]:
        entries, blocks = [entry for entry in pool.entries if entry.result.memory], []
        if entries:
            groups = {title: [e for e in of if e in entries] for title, of in pool.titled.items()}
            axis = charts.bar_axis(size / 2**20 for e in entries for size in _ends(e.result.memory))
            blocks.append(report.ui.ledgers(groups, axis, PHASES))
        if pool.budgets:
            panels = []
            for title, of_budget in pool.titled.items():
                if of_budget is not pool.reference:
                    held = [(entry.style, np.array(entry.result.timeline_bytes)) for entry in of_budget]
                    panels.append(
                        held_chart(title, held, of_budget[0].result, (190 if len(pool.budgets) > 1 else 380, 165))
                    )
            blocks.append(report.ui.over_time(panels, pool.compared))
        if entries:
            blocks.append(report.table("Memory by ledger", entries, (*tables.PLANNED, *tables.DEVICE)))
        return blocks

    return [*(report.each(pools, make) or ()), report.ui.ledger_words()]


def _ends(ledgers: Ledgers | None) -> list[int]:
    """Bytes where the longest bars of a row may end."""
    assert ledgers is not None
    arena, allocator, graphs = ledgers.arena, ledgers.allocator, ledgers.graphs
    ends = [ledgers.planned.budget_bytes, ledgers.planned.cache_bytes]
    ends.append(arena.cache_bytes + arena.index_bytes + arena.workspace_bytes)
    if allocator is None:
        return [*ends, *ledgers.tensors.peak_bytes.each]
    peaks = [*allocator.peaks.each, *([graphs.peaks] if graphs and graphs.peaks else [])]
    return [*ends, *(max(peak.allocated_bytes, peak.reserved_bytes) - allocator.weights_bytes for peak in peaks)]


def held_chart(
    title: str, held: Sequence[tuple[Style, NDArray[np.int64]]], row: ResultRow, size: tuple[int, int]
) -> Chart:
    """The bytes that caches hold after every layer of every scale, (T, L), in MiB, against the budget of the row."""
    lines, limit = [Line(style, charts.steps(held_TL / 2**20)) for style, held_TL in held], row.budget_bytes / 2**20
    y = charts.axis([0.0, limit, *(y for line in lines for _, y in line.points)])
    return Chart(title, charts.scale_axis(scale_names(row)), y, lines, limit=limit, size=size)


# ------------------------------------------------------------------------------------------------- all of it


def all_figures(report: Report) -> Blocks:
    """Every row of every folder."""
    blocks = []
    for source in report.merged.sources:
        entries = report.pool(source.rows, over_seeds=False).entries
        caption = f"{source.label}, {report.merged.machines[source.machine]}"
        blocks.append(report.table(caption, entries, (*tables.RESULTS, tables.REMARK)))
    return [*blocks, report.ui.figure_words()]


def environment(report: Report) -> Blocks:
    """Where and how all was measured, and the settings of every policy, folder by folder."""
    facts: dict[str, dict[str, str]] = {}
    for source in report.merged.sources:
        run, first = msgspec.to_builtins(source.results), source.results.rows[0]
        found = {"model": first.model, "weights": first.model_fingerprint, "schedule": ScaleSchedule(first.schedule)}
        found |= run["environment"] | (run["sampling"] or {}) | run["request"]
        settings: dict[str, dict[str, None]] = {}
        for row in source.results.rows:
            text = in_words({name: value for name, value in row.settings.items() if name != "budget"}) or "none"
            settings.setdefault(f"settings of {row.policy}", {})[text] = None
        found |= {name: ", ".join(texts) for name, texts in settings.items()}
        facts[source.label] = {name: in_words(value) for name, value in found.items() if value is not None}
    names = dict.fromkeys(name for found in facts.values() for name in found)
    lines = [[Cell(name.replace("_", " ")), *(Cell(of.get(name, "-")) for of in facts.values())] for name in names]
    return [report.cells("Machine, sampling, request and settings", ["", *facts], lines, sortable=False)]


def in_words(value: Any) -> str:
    """A value of JSON in one line."""
    if isinstance(value, dict):
        texts = [f"{name.replace('_', ' ')} {in_words(inner)}" for name, inner in value.items() if inner is not None]
        return ", ".join(texts)
    if isinstance(value, list | tuple):
        return ", ".join(map(in_words, value[:8])) + (f" and {len(value) - 8} more" if len(value) > 8 else "")
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.6g}" if isinstance(value, float) else str(value)
