"""The sections of a report that are made of rows of results. They choose and order figures; the words are in templates.

A section is a function of the report that gives its blocks, or None where it has nothing to show.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from heatkv.core.schedule import ScaleSchedule
from heatkv.engine.spans import PHASES as TIME_PHASES
from heatkv.profiling.measure.latency import outliers_of
from heatkv.profiling.report import charts, tables
from heatkv.profiling.report.charts import Line, Panel, Part, Track, stacked
from heatkv.profiling.report.pools import Cell, Entry, Pool, Report, mib, shade
from heatkv.profiling.report.tables import ARENA, KL, MEDIAN, TOP1, Column, look_up
from heatkv.profiling.results.comparable import REFERENCE
from heatkv.profiling.results.ledgers import PHASES, AllocatorPeaks, Ledgers
from heatkv.profiling.results.merging import leaders, pareto_front, ranked

Blocks = list[Markup] | None


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
    facts = {
        name: sorted({getattr(row, name) for row in rows} - {None})
        for name in ("seed", "rows", "storage", "images", "pictures")
    }

    def tile(budget: str, entries: list[Entry]) -> dict[str, Any]:
        best = leaders(entries, _kl)
        others = [e for e in ranked(entries, _kl) if e.result.policy not in {entry.result.policy for entry in best}]
        broken = [text for entry in best for text in tables.broken_promises(entry.result)]
        return {"budget": budget, "best": best, "next": others[0] if others else None, "broken": broken}

    tiles = [(pool.title, [tile(*item) for item in pool.budgets.items()]) for pool in report.fidelity]
    return [report.ui.summary(report.merged.model, facts, list(report.merged.machines.values()), tiles, KL, TOP1)]


def _against_memory(name: str, entries: Sequence[Entry], column: Column, log: bool) -> tuple[Markup, list[Entry]]:
    """A chart of a figure against the bytes held, and its Pareto front."""

    def point(entry: Entry) -> tuple[float, float]:
        return (entry.mean(ARENA) or 0) / 2**20, entry.mean(column) or 0

    drawn = [entry for entry in entries if entry.mean(ARENA) and ((entry.mean(column) or 0) > 0 or not log)]
    lines = []
    for label in dict.fromkeys(entry.name for entry in drawn):
        members = sorted((entry for entry in drawn if entry.name == label), key=point)
        xs, ys = np.array([point(entry) for entry in members]).T
        ranges = [_range(entry, column) or (y, y) for entry, y in zip(members, ys, strict=True)]
        lines.append(Line(members[0].style, ys, xs, ranges))
    front = pareto_front(drawn, lambda entry: entry.mean(ARENA), lambda entry: entry.mean(column))
    budgets = {entry.result.budget_bytes / 2**20: entry.result.budget for entry in drawn}
    title = "KL, nats per token" if column is KL else "ms per batch"
    label = f"{title}, against memory; the table has the figures"
    return charts.line_chart(name, label, lines, [point(entry) for entry in front], budgets, title, log), front


def _range(entry: Entry, column: Column) -> tuple[float, float] | None:
    """Over seeds or plans; of a time at one seed, as long as the distance of its quartiles."""
    time = entry.result.latency_ms
    if column is not MEDIAN or len(entry.rows) > 1 or time is None or time.iqr is None:
        return entry.range(column)
    return time.median - time.iqr / 2, time.median + time.iqr / 2


def fidelity(report: Report) -> Blocks:
    """KL against memory, and by policy and budget."""

    def make(index: int, pool: Pool) -> list[Markup]:
        table, entries = _kl_table(report, pool), pool.compared
        if not any(entry.mean(KL) for entry in entries):
            return [table]
        svg, front = _against_memory(f"fidelity-{index}", entries, KL, log=True)
        return [report.ui.fidelity(svg, table, front, entries, any(entry.range(KL) for entry in entries))]

    return report.each(report.fidelity, make) if report.fidelity else None


def _kl_table(report: Report, pool: Pool) -> Markup:
    """KL by policy and budget, from the least at the smallest budget on; the least of every budget is bold."""
    best = [entry for of_budget in pool.budgets.values() for entry in leaders(of_budget, _kl)]
    by_name: dict[str, dict[str, Entry]] = {}
    for budget, entries in reversed(pool.budgets.items()):
        for entry in ranked(entries, _kl):
            by_name.setdefault(entry.name, {})[budget] = entry
    lines = [
        [
            of[budget].cell(KL)._replace(kind="best" if of[budget] in best else "") if budget in of else Cell("-")
            for budget in pool.budgets
        ]
        for of in by_name.values()
    ]
    heads = [next(iter(of.values())).heads[0] for of in by_name.values()]
    images = f"{pool.compared[0].result.images} images"
    images += f" at each of {len(best[0].rows)} seeds" if len(best[0].rows) > 1 else ""
    caption = f"KL in nats per token by budget, over {images}; the least is bold"
    lines = [[head, *line] for head, line in zip(heads, shade(lines), strict=True)]
    return report.cells(caption, ["policy", *pool.budgets], lines)


DIFFERENCE = Column("difference", "nats per token", "versus.difference", "+.4f")


def paired(report: Report) -> Blocks:
    """How far every policy's KL is from that of the base at the same budget, on the same images."""
    groups = [(g.title, [row for row in g.rows if row.result.versus]) for g in report.merged.fidelity_groups]
    pools = [report.pool(rows, title if len(groups) > 1 else "", over_seeds=False) for title, rows in groups if rows]

    def make(index: int, pool: Pool) -> list[Markup]:
        groups = {
            budget: [
                _difference(entry) for entry in sorted(entries, key=lambda e: look_up(e.result, "versus.difference"))
            ]
            for budget, entries in pool.budgets.items()
        }
        at = charts.percent_scale(track for tracks in groups.values() for track in tracks)
        return [report.ui.paired(groups, at, pool.compared[0].result.versus)]

    return report.each(pools, make) if pools else None


def _difference(entry: Entry) -> Track:
    """The interval of a difference, around the difference, and the line at 0."""
    versus = entry.result.versus
    assert versus is not None
    (low, high), text, colour = versus.interval, tables.difference_text(versus), entry.style.css
    verdict = "closer" if high < 0 else "further" if low > 0 else "not separated"
    point = Part(versus.difference, versus.difference, text, kind="point")
    zero = Part(0, 0, versus.policy, kind="zero")
    return Track(entry.name, entry.style, f"{text} {verdict}", ((zero, Part(low, high, text, colour), point),))


def per_scale(report: Report) -> Blocks:
    """KL by target scale."""

    def make(index: int, pool: Pool) -> list[Markup]:
        arrays = {entry: found for entry in pool.entries if (found := entry.array("kl_per_scale")) is not None}
        panels = {budget: [e for e in entries if e in arrays] for budget, entries in pool.budgets.items()}
        lines = [Panel(budget, [Line(e.style, arrays[e]) for e in entries]) for budget, entries in panels.items()]
        svg = charts.scale_chart(f"scales-{index}", "KL by target scale", lines, pool.scales, "KL, nats per token")
        lossy = {budget: np.any([arrays[e] > 1e-6 for e in entries], axis=0) for budget, entries in panels.items()}
        first = {budget: int(found.argmax()) if found.any() else None for budget, found in lossy.items()}
        columns = tables.scale_columns("kl_per_scale", pool.scales, "", ".4f")
        table = report.table("KL in nats per token by target scale", list(arrays), columns, shaded=True)
        return [report.ui.per_scale(svg, report.legend(pool.compared), first), table]

    pools = [pool for pool in report.fidelity if any(entry.result.kl_per_scale for entry in pool.compared)]
    return report.each(pools, make) if pools else None


# ------------------------------------------------------------------------------------------------------ latency


def latency(report: Report) -> Blocks:
    """Time against memory, and by phase and scale, of what was timed in turns."""
    groups = report.merged.timing_groups
    shares: dict[int, float] = {}
    for group in groups:
        full = [MEDIAN.value(row.result) for row in group.rows if row.result.policy == REFERENCE]
        shares |= {id(row.result): MEDIAN.value(row.result) / full[0] for row in group.rows if full}
    columns = (MEDIAN, tables.IQR, Column("of full cache", "", lambda row: shares.get(id(row)), ".2f"), ARENA)

    def make(index: int, pool: Pool) -> list[Markup]:
        entries = ranked(pool.entries, lambda entry: entry.mean(MEDIAN))
        machines = [r.result.timing_machine or r.source.results.environment for e in entries for r in e.rows]
        busy = dict.fromkeys(reason for machine in machines if machine.load for reason in machine.load.reasons)
        svg, front = _against_memory(f"latency-{index}", entries, MEDIAN, log=False)
        ranking = report.table("Time of one batch, the fastest first; the front is bold", entries, columns, front)
        blocks = [report.ui.latency(list(busy), svg, report.legend(pool.entries), front), ranking]
        phases = _phases(report, pool)
        table = report.table("Time of one batch, and by phase", pool.entries, tables.LATENCY)
        return [*blocks, *phases, table, *_time_by_scale(report, pool, f"time-{index}")]

    return report.each(report.pools(groups), make) if groups else None


PHASE_COLOURS = dict(zip((*TIME_PHASES, "other"), (f"var(--series-{i})" for i in (0, 1, 2, 3, 4, 7)), strict=True))


def _phases(report: Report, pool: Pool) -> list[Markup]:
    """Bars by phase, with the median and its interval."""
    entries = [entry for entry in pool.entries if look_up(entry.result, "latency_ms.phases")]
    if not entries:
        return []
    groups = {title: [_time_track(e) for e in of if e in entries] for title, of in pool.titled.items()}
    at = charts.percent_scale(track for tracks in groups.values() for track in tracks)
    outliers = sum(look_up(e.result, f"{name}.outliers") or 0 for e in entries for name in tables.TIMES)
    return [
        report.ui.phases(
            groups, at, [(colour, name) for name, colour in PHASE_COLOURS.items()], outliers, len(entries[0].rows) > 1
        )
    ]


def _time_track(entry: Entry) -> Track:
    lanes, texts = [], []
    for time, note in ((entry.result.latency_ms, ""), (entry.result.graph_latency_ms, " with CUDA graphs")):
        if time is not None:
            phases = time.phases or {}
            lengths = {name: (phases[name], colour) for name, colour in PHASE_COLOURS.items() if name in phases}
            bars = stacked(lengths, "ms") or (Part(0, time.median, f"median{note}", charts.pale(7, 40)),)
            low, high = time.interval or (time.median, time.median)
            text = f"median {time.median:.1f} ms, interval {low:.1f} to {high:.1f} ms"
            marks = [Part(low, high, text, kind="span"), Part(time.median, time.median, text, kind="point")]
            marks += [Part(far, far, f"outlier: {far:.1f} ms", kind="outlier") for far in outliers_of(list(time.all))]
            lanes.append((*bars, *marks))
            texts.append(f"{time.median:.1f} ms{note}")
    return Track(entry.name, entry.style, ", ".join(texts), tuple(lanes))


def _time_by_scale(report: Report, pool: Pool, name: str) -> list[Markup]:
    """Lines by target scale, those with CUDA graphs dashed, and the same in a table."""
    panels = []
    for title, entries in (pool.budgets or {"full cache": []}).items():
        shown = [(entry, field, entry.array(f"{field}.scales")) for entry in [*pool.reference, *entries]
                 for field in tables.TIMES]  # fmt: skip
        lines = [Line(e.style, y, dashed=field == "graph_latency_ms") for e, field, y in shown if y is not None]
        panels.append(Panel(title, lines))
    if not any(panel.lines for panel in panels):
        return []
    svg = charts.scale_chart(name, "Time of one batch by target scale", panels, pool.scales, "ms per batch")
    scales = [f"scale {scale}" for scale in pool.scales]
    columns = [c for field, ledger in tables.TIMES.items()
               for c in tables.scale_columns(f"{field}.scales", scales, "ms", ".1f", ledger)]  # fmt: skip
    dashed = any(line.dashed for panel in panels for line in panel.lines)
    table = report.table("Time of one batch by target scale", pool.entries, columns)
    return [report.ui.time_by_scale(svg, report.legend(pool.entries), dashed), table]


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

    def make(index: int, pool: Pool) -> list[Markup]:
        entries, blocks = [entry for entry in pool.entries if entry.result.memory], []
        if entries:
            groups = {title: [_memory_track(e) for e in of if e in entries] for title, of in pool.titled.items()}
            tracks = [track for of_budget in groups.values() for track in of_budget]
            keys = {part.colour: part.title.rpartition(": ")[0] for t in tracks for lane in t.lanes for part in lane}
            keys.pop("", None)
            weights = sorted({mib(look_up(entry.result, "memory.weights_bytes")) for entry in entries})
            shared = any(look_up(entry.result, "memory.process") == "shared" for entry in entries)
            blocks = [report.ui.ledgers(groups, charts.percent_scale(tracks), keys.items(), weights, shared)]
        blocks += _over_time(report, pool, f"memory-{index}")
        if entries:
            blocks.append(report.table("Cache: planned, and allocated in the arena", entries, tables.PLANNED))
            blocks.append(report.table("Device: what was counted, and by whom", entries, tables.DEVICE))
        return blocks

    return [*report.each(pools, make), report.ui.ledger_words()]


def _lanes(ledgers: Ledgers) -> list[dict[str, tuple[int, str]]]:
    """The bars of a row, one under the other: the bytes of every part, and its colour."""
    allocator, arena, graphs = ledgers.allocator, ledgers.arena, ledgers.graphs

    def allocated(name: str, peaks: AllocatorPeaks, colour: str) -> dict[str, tuple[int, str]]:
        """What was given out beside the model's weights, and kept from the driver beside that."""
        given = max(0, peaks.allocated_bytes - (allocator.weights_bytes if allocator else 0))
        kept = max(0, peaks.reserved_bytes - peaks.allocated_bytes)
        return {f"allocator: {name}": (given, colour), "allocator: reserved beyond": (kept, charts.pale(0, 20))}

    cache = {"cache": (arena.cache_bytes, 1), "index tables": (arena.index_bytes, 4)}
    cache["workspace"] = (arena.workspace_bytes, 5)
    lanes = [{"plan: cache": (ledgers.planned.cache_bytes, "var(--series-6)")}]
    lanes.append({f"arena: {name}": (size, f"var(--series-{colour})") for name, (size, colour) in cache.items()})
    for (phase, name), colour in zip(PHASES.items(), map(charts.pale, (0, 0, 0), (40, 100, 65)), strict=True):
        if allocator is not None:
            lanes.append(allocated(name, getattr(allocator.peaks, phase), colour))
        else:
            lanes.append({f"tensors: {name}": (getattr(ledgers.tensors.peak_bytes, phase), colour)})
    return lanes + ([allocated("with CUDA graphs", graphs.peaks, "var(--series-3)")] if graphs and graphs.peaks else [])


def _memory_track(entry: Entry) -> Track:
    ledgers = entry.result.memory
    assert ledgers is not None
    cache, arena, *device = [
        stacked({name: (size / 2**20, colour) for name, (size, colour) in parts.items()}, "MiB")
        for parts in _lanes(ledgers)
    ]
    limit = ledgers.planned.budget_bytes / 2**20
    budget = Part(limit, limit, f"budget: {limit:.3f} MiB", kind="limit")
    text = f"{arena[0].end:,.3f} MiB in the arena, {device[1][0].end:,.3f} on the device"
    return Track(entry.name, entry.style, text, ((*cache, budget), (*arena, budget), *device))


def _over_time(report: Report, pool: Pool, name: str) -> list[Markup]:
    """What every policy's cache holds after every layer of every scale, a panel for every budget."""
    if not pool.budgets:
        return []
    panels = []
    for title, entries in pool.titled.items():
        if entries is not pool.reference:
            lines = [Line(e.style, coarser(np.array(e.result.timeline_bytes) / 2**20)) for e in entries]
            panels.append(Panel(title, lines, entries[0].result.budget_bytes / 2**20))
    svg = charts.scale_chart(name, "The cache over time against the budget", panels, pool.scales, "MiB held")
    fullest = {panel.title: max(line.y.max() for line in panel.lines) / (panel.limit or 1) for panel in panels}
    return [report.ui.over_time(svg, report.legend(pool.compared), fullest)]


def coarser(values_TL: NDArray[np.float64], most: int = 160) -> NDArray[np.float64]:
    """The same by scale and groups of layers, the fullest of each, as few that a line stays drawable: (T, groups)."""
    scales, layers = values_TL.shape
    groups = min(layers, max(1, most // scales))
    return np.maximum.reduceat(values_TL, [layers * group // groups for group in range(groups)], axis=1)


# ------------------------------------------------------------------------------------------------- all of it


def all_figures(report: Report) -> Blocks:
    """Every row of every folder."""
    blocks = []
    for source in report.merged.sources:
        pool = report.pool(source.rows, over_seeds=False)
        caption = f"{source.label}, {report.merged.machines[source.machine]}"
        blocks.append(report.table(caption, pool.entries, (*tables.RESULTS, tables.REMARK)))
    return [*blocks, report.ui.figure_words()]


def environment(report: Report) -> Blocks:
    """Where and how all was measured, and the settings of every policy, folder by folder."""
    facts: dict[str, dict[str, str]] = {}
    for source in report.merged.sources:
        told, first = msgspec.to_builtins(source.results), source.results.rows[0]
        found: dict[str, Any] = {
            "model": first.model,
            "weights": first.model_fingerprint,
            "schedule": ScaleSchedule(first.schedule),
        }
        found |= told["environment"] | (told["sampling"] or {}) | told["request"]
        if found.get("statistics"):
            found["statistics"] = f"{len(found['statistics']['samples'])} samples of {found['statistics']['model']}"
        for row in source.results.rows:
            settings = in_words({name: value for name, value in row.settings.items() if name != "budget"})
            of_policy = found.setdefault(f"settings of {row.policy}", [])
            of_policy += [] if settings in of_policy else [settings]
        facts[source.label] = {name: in_words(value) for name, value in found.items() if value is not None}
    names = dict.fromkeys(name for found in facts.values() for name in found)
    lines = [[Cell(name.replace("_", " ")), *(Cell(of.get(name, "-")) for of in facts.values())] for name in names]
    return [report.cells("Machine, sampling, request and settings", ["", *facts], lines, sort=False)]


def in_words(value: Any) -> str:
    """A value of JSON in one line."""
    if isinstance(value, dict):
        return (
            ", ".join(
                f"{name.replace('_', ' ')} {in_words(inner)}" for name, inner in value.items() if inner is not None
            )
            or "none"
        )
    if isinstance(value, list | tuple):
        return ", ".join(map(in_words, value[:8])) + (f" and {len(value) - 8} more" if len(value) > 8 else "")
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.6g}" if isinstance(value, float) else str(value)
