"""The sections of a report that are made of rows of results. They choose and order figures; the words are in templates.

A section is a function of the report that gives its blocks, or None where it has nothing to show.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import msgspec
import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from heatkv.core.schedule import ScaleSchedule
from heatkv.engine.spans import PHASES as TIME_PHASES
from heatkv.profiling.measure.latency import outliers_of
from heatkv.profiling.report import charts, tables
from heatkv.profiling.report.charts import Line, Panel, Part, Style, Track, stacked
from heatkv.profiling.report.tables import Column, look_up
from heatkv.profiling.results.comparable import REFERENCE
from heatkv.profiling.results.ledgers import PHASES
from heatkv.profiling.results.merging import SEPARATOR, Group, Merged, Row, budgets_of, leaders, pareto_front, ranked
from heatkv.profiling.results.row import Latency, ResultRow

KL, TOP1, HELD, MEDIAN = tables.KL, tables.TOP1, tables.ARENA, tables.MEDIAN
Blocks = list[Markup] | None


class Cell(NamedTuple):
    """A field of a table. `value` is the figure in full, which the page sorts by; `shade`, from 0 to 1, tints it."""

    text: str
    value: float | str | None = None
    style: Style | None = None
    shade: float | None = None
    kind: str = ""


@dataclass(frozen=True, eq=False)
class Entry:
    """Rows of one policy at one budget that differ in their seed alone; its figures are means over them."""

    rows: tuple[Row, ...]
    name: str
    style: Style

    @property
    def result(self) -> ResultRow:
        """That of its first row."""
        return self.rows[0].result

    def values(self, column: Column) -> list[Any]:
        """The figure of every row; none unless all have it, as means over other seeds do not compare."""
        found = [column.value(row.result) for row in self.rows]
        return [] if None in found else found

    def mean(self, column: Column) -> float | None:
        return statistics.fmean(values) if (values := self.values(column)) else None

    def array(self, path: str) -> NDArray[np.float64] | None:
        """The mean of a list of figures, such as one for every scale."""
        found = [look_up(row.result, path) for row in self.rows]
        return np.mean(found, axis=0) if all(found) else None

    def range(self, column: Column) -> tuple[float, float] | None:
        """The least and the most over seeds, or over the plans of a policy that draws at random."""
        values = self.values(column) if len(self.rows) > 1 else column is KL and self.result.kl_of_draws or ()
        return (min(values), max(values)) if len(values) > 1 else None

    def cell(self, column: Column) -> Cell:
        """The mean of a figure, with its deviation over seeds."""
        values = self.values(column)
        if not values:
            return Cell(tables.NOT_MEASURED, kind="missing")
        if isinstance(values[0], str):
            return Cell("; ".join(dict.fromkeys(values)), values[0])
        several = len(values) > 1 and column.form.endswith("f")
        mean = statistics.fmean(values) if several else values[0]
        return Cell(column.text(mean) + (f" ± {column.text(statistics.stdev(values))}" if several else ""), mean)

    @property
    def heads(self) -> list[Cell]:
        """The first fields of its line in a table: policy and budget."""
        return [Cell(self.name, self.name, self.style), Cell(self.result.budget, self.result.budget_bytes)]


@dataclass(frozen=True, eq=False)
class Pool:
    """Entries whose figures compare: those of the full cache, and all others by budget, the largest first. `title` says
    what sets them apart from other pools; `left_out` names what lacks a seed that others have."""

    title: str
    reference: list[Entry]
    budgets: dict[str, list[Entry]]
    left_out: list[str]

    @property
    def compared(self) -> list[Entry]:
        return [entry for entries in self.budgets.values() for entry in entries]

    @property
    def entries(self) -> list[Entry]:
        return [*self.reference, *self.compared]

    @property
    def titled(self) -> dict[str, list[Entry]]:
        """Entries by budget, under titles that say its size; the full cache comes first."""
        sized = {f"{text}, {mib(of[0].result.budget_bytes)}": of for text, of in self.budgets.items()}
        return {"full cache": self.reference, **sized} if self.reference else sized

    @property
    def scales(self) -> list[str]:
        return scale_names(self.entries[0].result)


@dataclass(frozen=True, eq=False)
class Report:
    """What sections are made of: merged results, and `ui`, the macros of the templates."""

    merged: Merged
    ui: Any

    @cached_property
    def styles(self) -> dict[str, Style]:
        """By label without batch and seed."""
        families: dict[str, dict[str, None]] = {}
        for row in sorted(self.merged.rows, key=lambda row: row.result.policy == REFERENCE):
            families.setdefault(row.result.policy, {})[self.merged.label(row, ())] = None
        return charts.styles({policy: list(labels) for policy, labels in families.items()})

    @property
    def several(self) -> bool:
        return len(self.merged.sources) > 1

    @cached_property
    def fidelity(self) -> list[Pool]:
        """What is compared with the full cache."""
        return [pool for pool in self.pools(self.merged.fidelity_groups) if pool.budgets]

    def pools(self, groups: Sequence[Group]) -> list[Pool]:
        """Groups that differ in their seeds alone are taken together."""
        found: dict[str, list[Group]] = {}
        for group in groups:
            key = {name: value for name, value in group.key.items() if name not in ("seed", "samples", "timed")}
            # another turn may be that of another seed, or of rows that were added later, which do not compare
            turn = sorted(map(self._subject, group.rows)) if "timed" in group.key else None
            found.setdefault(repr((key, turn)), []).append(group)
        pools = []
        for members in found.values():
            parts = [group.title.split(", ") for group in members]
            shared = [part for part in parts[0] if all(part in other for other in parts)]
            folders = dict.fromkeys(row.source.label for group in members for row in group.rows)
            title = ", ".join(shared) + (f" ({', '.join(folders)})" if self.several else "")
            pools.append(self.pool((r for g in members for r in g.rows), title if len(found) > 1 else ""))
        return pools

    def _subject(self, row: Row) -> tuple[str, int]:
        return self.merged.label(row, ("batch",)), row.result.budget_bytes

    def pool(self, rows: Iterable[Row], title: str = "", over_seeds: bool = True) -> Pool:
        """These rows, those of several seeds as one entry. Names leave out what all rows share."""
        members: dict[Any, list[Row]] = {}
        for row in rows:
            members.setdefault(self._subject(row) if over_seeds else row, []).append(row)
        seeds = {key: {row.result.seed for row in of_key} for key, of_key in members.items()}
        most = max(seeds.values(), key=lambda of_key: (len(of_key), sorted(of_key))) if over_seeds else None
        axes = ("batch",) if most is not None and len(most) > 1 else ("batch", "seed")
        parts = {of_key[0]: self.merged.label(of_key[0], axes).split(SEPARATOR) for of_key in members.values()}
        shared = set.intersection(*(set(of_row[1:]) for of_row in parts.values()))
        entries, left_out = {}, []
        for key, of_key in members.items():
            policy, *rest = parts[of_key[0]]
            name = SEPARATOR.join([policy, *(part for part in rest if part not in shared)])
            if most is None or seeds[key] == most:
                entries[of_key[0]] = Entry(tuple(of_key), name, self.styles[self.merged.label(of_key[0], ())])
            else:
                left_out.append(f"{name} at {of_key[0].result.budget}")
        reference = [entry for row, entry in entries.items() if row.result.policy == REFERENCE]
        budgets = {budget: [entries[row] for row in of_budget] for budget, of_budget in budgets_of(entries).items()}
        return Pool(title, reference, budgets, left_out)

    def each(self, pools: Sequence[Pool], make: Callable[[int, Pool], list[Markup]]) -> list[Markup]:
        """The blocks of every pool, under its title where there are several."""
        return [self.ui.pools([(pool, make(index, pool)) for index, pool in enumerate(pools)])]

    def table(
        self, caption: str, entries: Sequence[Entry], columns: Iterable[Column],
        best: Sequence[Entry] = (), shaded: bool = False,
    ) -> Markup:  # fmt: skip
        """A line for every entry: policy, budget, and the columns that any entry has a figure for."""
        shown = tables.measured(columns, (row.result for entry in entries for row in entry.rows))
        lines = [[entry.cell(column) for column in shown] for entry in entries]
        if shaded:
            lines = shade(lines)
        for entry, line in zip(entries, lines, strict=True):
            if entry in best:
                line[0] = line[0]._replace(kind="best")
        titles = ["policy", "budget", *(column.title for column in shown)]
        return self.cells(caption, titles, [[*e.heads, *line] for e, line in zip(entries, lines, strict=True)])

    def cells(self, caption: str, titles: Sequence[str], lines: Sequence[Sequence[Cell]], sort: bool = True) -> Markup:
        """A table; columns of numbers stand to the right."""
        right = [i > 0 and any(isinstance(line[i].value, int | float) for line in lines) for i in range(len(titles))]
        markup: Markup = self.ui.table(caption, list(zip(titles, right, strict=True)), lines, sort)
        return markup

    def legend(self, entries: Iterable[Entry]) -> Markup:
        markup: Markup = self.ui.legend(dict((entry.style, entry.name) for entry in entries).items())
        return markup


def shade(lines: Sequence[Sequence[Cell]]) -> list[list[Cell]]:
    """The cells, tinted by where their figures are between the least and the most, on a logarithmic scale."""
    logs = [math.log(c.value) for line in lines for c in line if isinstance(c.value, float) and c.value > 0]
    if not logs or max(logs) == min(logs):
        return [list(line) for line in lines]

    def share(value: Any) -> float | None:
        return (math.log(value) - min(logs)) / (max(logs) - min(logs)) if value and value > 0 else None

    return [[cell._replace(shade=share(cell.value)) for cell in line] for line in lines]


def mib(count: float) -> str:
    return f"{count / 2**20:,.3f} MiB"


def scale_names(row: ResultRow) -> list[str]:
    """Short names of scales: the side of square ones."""
    return [str(h) if t == 1 and h == w else f"{h}x{w}" if t == 1 else f"{t}x{h}x{w}" for t, h, w in row.schedule]


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
        return (entry.mean(HELD) or 0) / 2**20, entry.mean(column) or 0

    drawn = [entry for entry in entries if entry.mean(HELD) and ((entry.mean(column) or 0) > 0 or not log)]
    lines = []
    for label in dict.fromkeys(entry.name for entry in drawn):
        members = sorted((entry for entry in drawn if entry.name == label), key=point)
        xs, ys = np.array([point(entry) for entry in members]).T
        ranges = [_range(entry, column) or (y, y) for entry, y in zip(members, ys, strict=True)]
        lines.append(Line(members[0].style, ys, xs, ranges))
    front = pareto_front(drawn, lambda entry: entry.mean(HELD), lambda entry: entry.mean(column))
    budgets = {entry.result.budget_bytes / 2**20: entry.result.budget for entry in drawn}
    label = f"{column.title} against memory; the table has the figures"
    return charts.line_chart(name, label, lines, [point(e) for e in front], budgets, column.title, log), front


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


def paired(report: Report) -> Blocks:
    """How far every policy's KL is from that of the base at the same budget, on the same images."""
    groups = [(g.title, [row for row in g.rows if row.result.versus]) for g in report.merged.fidelity_groups]
    pools = [report.pool(rows, title if len(groups) > 1 else "", over_seeds=False) for title, rows in groups if rows]

    def make(index: int, pool: Pool) -> list[Markup]:
        tracks = {budget: sorted(map(_difference, entries)) for budget, entries in pool.budgets.items()}
        groups = {budget: [track for _, track in of_budget] for budget, of_budget in tracks.items()}
        at = charts.percent_scale(track for of_budget in groups.values() for track in of_budget)
        return [report.ui.paired(groups, at, pool.compared[0].result.versus)]

    return report.each(pools, make) if pools else None


def _difference(entry: Entry) -> tuple[float, Track]:
    """A difference with its interval, and what it is sorted by."""
    versus = entry.result.versus
    assert versus is not None
    (low, high), text, colour = versus.interval, tables.difference_text(versus), f"var(--series-{entry.style.colour})"
    verdict = "closer" if high < 0 else "further" if low > 0 else "not separated"
    point = Part(versus.difference, versus.difference, text, colour, "point")
    track = Track(entry.name, entry.style, f"{text} {verdict}", ((charts.ZERO, Part(low, high, text, colour), point),))
    return versus.difference, track


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
    columns = (MEDIAN, tables.IQR, Column("of full cache", "", lambda row: shares.get(id(row)), ".2f"), HELD)

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
            phases = {name: time.phases[name] for name in PHASE_COLOURS if name in time.phases} if time.phases else {}
            bars = stacked({name: (length, PHASE_COLOURS[name]) for name, length in phases.items()}, "ms")
            whole = Part(0, time.median, f"median{note}", charts.pale(7, 40))
            lanes.append((*(bars or (whole,)), *_time_marks(time)))
            texts.append(f"{time.median:.1f} ms{note}")
    return Track(entry.name, entry.style, ", ".join(texts), tuple(lanes))


def _time_marks(time: Latency) -> list[Part]:
    low, high = time.interval or (time.median, time.median)
    text = f"median {time.median:.1f} ms, interval {low:.1f} to {high:.1f} ms"
    far = [Part(value, value, f"outlier: {value:.1f} ms", kind="outlier") for value in outliers_of(list(time.all))]
    return [Part(low, high, text, kind="span"), Part(time.median, time.median, text, kind="point"), *far]


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


def _above_weights(path: str) -> Callable[[ResultRow], float | None]:
    """What the allocator gave out beside the model's weights."""

    def size(row: ResultRow) -> float | None:
        peak, weights = look_up(row, f"memory.{path}.allocated_bytes"), look_up(row, "memory.allocator.weights_bytes")
        return None if peak is None else max(0, peak - weights)

    return size


def _beyond(path: str) -> Callable[[ResultRow], float | None]:
    """What the allocator kept from the driver beside what it gave out."""

    def size(row: ResultRow) -> float | None:
        peaks = look_up(row, f"memory.{path}")
        return peaks and max(0, peaks.reserved_bytes - peaks.allocated_bytes)

    return size


def _device(name: str, path: str, tensors: str, colour: str) -> dict[Column, str]:
    """A lane of what the device saw: of the allocator on a GPU, of tensors else."""
    lane = {Column(name, "MiB", _above_weights(path), ledger="allocator"): colour}
    lane[Column("reserved beyond", "MiB", _beyond(path), ledger="allocator")] = charts.pale(0, 20)
    return lane | {Column(name, "MiB", tensors, ledger="tensors"): colour}


_PHASE_SHADES = {"opened": charts.pale(0, 40), "drawing": "var(--series-0)", "decode": charts.pale(0, 65)}
LANES = [
    {Column("cache", "MiB", "planned_bytes", ledger="planned"): "var(--series-6)"},
    {Column(name, "MiB", f"{field}_bytes", ledger="arena"): f"var(--series-{colour})"
     for field, name, colour in (("allocated", "cache", 1), ("index", "index tables", 4), ("workspace", "workspace", 5))},
    *(_device(name, f"allocator.peaks.{phase}", f"memory.tensors.peak_bytes.{phase}", _PHASE_SHADES[phase])
      for phase, name in PHASES.items()),
    _device("with CUDA graphs", "graphs.peaks", "memory.graphs.reason", "var(--series-3)"),
]  # fmt: skip
"""The bars of a row, one under the other: the parts of each with their colours."""


def _memory_track(entry: Entry) -> Track:
    row, lanes = entry.result, []
    for parts in LANES:
        found = {
            column: column.value(row) for column in parts if column.ledger != "tensors" or not row.memory.allocator
        }
        lengths = {f"{c.ledger}: {c.name}": (v / 2**20, parts[c]) for c, v in found.items() if v is not None}
        lanes.append(stacked(lengths, "MiB"))
    limit = row.budget_bytes / 2**20
    budget = Part(limit, limit, f"budget: {limit:.3f} MiB", kind="limit")
    text = f"{mib(row.allocated_bytes or 0)} in the arena, {lanes[3][0].end:.3f} on the device"
    return Track(entry.name, entry.style, text, (*((*lane, budget) for lane in lanes[:2]), *filter(None, lanes[2:])))


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
        axes = [axis for axis in tables.AXES if axis.name in source.axes]
        pool = report.pool(source.rows, over_seeds=False)
        caption = f"{source.label}, {report.merged.machines[source.machine]}"
        blocks.append(report.table(caption, pool.entries, (*axes, *tables.RESULTS, tables.REMARK)))
    return [*blocks, report.ui.figure_words()]


def environment(report: Report) -> Blocks:
    """Where and how all was measured, and the settings of every policy."""
    facts: dict[str, dict[str, str]] = {}
    for source in report.merged.sources:
        told, first = msgspec.to_builtins(source.results), source.results.rows[0]
        found = {"model": first.model, "weights": first.model_fingerprint, "schedule": ScaleSchedule(first.schedule)}
        found |= told["environment"] | (told["sampling"] or {}) | told["request"]
        if found.get("statistics"):
            found["statistics"] = f"{len(found['statistics']['samples'])} samples of {found['statistics']['model']}"
        facts[source.label] = {name: in_words(value) for name, value in found.items() if value is not None}
    names = dict.fromkeys(name for found in facts.values() for name in found)
    lines = [[Cell(name.replace("_", " ")), *(Cell(of.get(name, "-")) for of in facts.values())] for name in names]
    machines = report.cells("Machine, sampling and request", ["", *facts], lines, sort=False)
    settings: dict[tuple[str, str], dict[str, None]] = {}
    for row in report.merged.rows:
        chosen = {name: value for name, value in row.result.settings.items() if name != "budget"}
        settings.setdefault((report.merged.label(row, ()), in_words(chosen)), {})[row.result.budget] = None
    lines = [
        [Cell(label, label, report.styles[label]), Cell(", ".join(budgets)), Cell(text, kind="wide")]
        for (label, text), budgets in settings.items()
    ]
    return [machines, report.cells("Settings of every policy", ["policy", "budgets", "settings"], lines, sort=False)]


def in_words(value: Any) -> str:
    """A value of JSON in one line."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {in_words(inner)}" for name, inner in value.items() if inner is not None) or "none"
    if isinstance(value, list):
        return ", ".join(map(in_words, value[:8])) + (f" and {len(value) - 8} more" if len(value) > 8 else "")
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.6g}" if isinstance(value, float) else str(value)
