"""The sections of a report that are made of rows of results: what a budget costs in fidelity, time and memory."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, NamedTuple

import msgspec
import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from heatkv.core.schedule import ScaleSchedule
from heatkv.engine.spans import PHASES as TIME_PHASES
from heatkv.profiling.measure.latency import OUTLIER_IQRS, outliers_of
from heatkv.profiling.report import charts, tables
from heatkv.profiling.report.charts import Axis, Line, Panel, Part, Style, Track
from heatkv.profiling.report.tables import Column, look_up
from heatkv.profiling.results.comparable import REFERENCE
from heatkv.profiling.results.ledgers import PHASES, AllocatorPeaks
from heatkv.profiling.results.merging import (
    EQUAL_BYTES,
    SEPARATOR,
    Group,
    Merged,
    Row,
    Source,
    budgets_of,
    leaders,
    pareto_front,
    ranked,
)
from heatkv.profiling.results.row import Latency, ResultRow

KL, TOP1, HELD, MEDIAN = (
    next(column for column in tables.ALL if column.source == source)
    for source in ("kl", "top1_agreement", "allocated_bytes", "latency_ms.median")
)
MOST_TRACKS = 14
"""Rows that are drawn below each other; of more, those of every budget are folded."""


class Cell(NamedTuple):
    """A field of a table. `value` is the figure in full, which the page sorts by; `shade`, from 0 to 1, tints it."""

    text: str
    value: float | str | None = None
    style: Style | None = None
    shade: float | None = None
    kind: str = ""


MISSING = Cell(tables.NOT_MEASURED, kind="missing")


@dataclass(frozen=True)
class Section:
    """A part of the report, named `id` in links and `short` in the list of contents; blocks are HTML."""

    id: str
    short: str
    title: str
    lead: str
    blocks: Sequence[Markup]


@dataclass(frozen=True, eq=False)
class Entry:
    """Rows of one policy at one budget that differ in their seed alone; its figures are means over them."""

    rows: tuple[Row, ...]

    @property
    def result(self) -> ResultRow:
        """That of its first row."""
        return self.rows[0].result

    def values(self, column: Column) -> list[Any]:
        """The figure of every row; none unless all have it, as means over other seeds do not compare."""
        found = [column.value(row.result) for row in self.rows]
        return [] if None in found else found

    def mean(self, column: Column) -> float | None:
        values = self.values(column)
        return statistics.fmean(values) if values else None

    def array(self, path: str) -> NDArray[np.float64] | None:
        """The mean of a list of figures, such as one for every scale."""
        found = [look_up(row.result, path) for row in self.rows]
        return None if None in found or () in found else np.mean(found, axis=0)

    def range(self, column: Column) -> tuple[float, float] | None:
        """The least and the most over seeds, or over the plans of a policy that draws at random."""
        values = self.values(column)
        if len(values) == 1 and column is KL:
            values = list(self.result.kl_of_draws or ())
        return (min(values), max(values)) if len(values) > 1 else None


@dataclass(frozen=True, eq=False)
class Pool:
    """Entries whose figures compare, by budget, and those of the full cache. `title` says what sets them apart from
    other pools; `left_out` names what lacks a seed that others have."""

    title: str
    rows: tuple[Row, ...]
    budgets: Mapping[str, list[Entry]]
    reference: list[Entry]
    left_out: list[str]

    @property
    def entries(self) -> list[Entry]:
        """All, the full cache first."""
        return [*self.reference, *(entry for entries in self.budgets.values() for entry in entries)]


@dataclass(frozen=True, eq=False)
class Report:
    """What sections are made of: merged results, the styles of policies, and `ui`, the macros that write blocks."""

    merged: Merged
    ui: Any

    @cached_property
    def _styles(self) -> dict[str, Style]:
        families: dict[str, dict[str, None]] = {}
        for row in sorted(self.merged.rows, key=lambda row: row.result.policy == REFERENCE):
            families.setdefault(row.result.policy, {})[self.merged.label(row, ())] = None
        return charts.styles({policy: list(labels) for policy, labels in families.items()})

    def style(self, entry: Entry | Row) -> Style:
        return self._styles[self.merged.label(entry if isinstance(entry, Row) else entry.rows[0], ())]

    def names(self, entries: Iterable[Entry]) -> dict[Entry, str]:
        """Labels without what all of these entries share, and without seeds where several are taken together."""
        parts = {}
        for entry in entries:
            axes = ("batch",) if len(entry.rows) > 1 else ("batch", "seed")
            parts[entry] = self.merged.label(entry.rows[0], axes).split(SEPARATOR)
        shared = set.intersection(*(set(part[1:]) for part in parts.values())) if parts else set()
        return {
            entry: SEPARATOR.join([part[0], *(text for text in part[1:] if text not in shared)])
            for entry, part in parts.items()
        }

    @property
    def several(self) -> bool:
        return len(self.merged.sources) > 1

    def pools(self, groups: Sequence[Group]) -> list[Pool]:
        """Groups that differ in their seeds alone are taken together."""
        found: dict[str, list[Group]] = {}
        for group in groups:
            key = {name: value for name, value in group.key.items() if name not in ("seed", "samples", "timed")}
            # another turn may be that of another seed, or of rows that were added later
            turn = sorted(self._key(row) for row in group.rows) if "timed" in group.key else []
            found.setdefault(repr((key, turn)), []).append(group)
        return [self._pool(members, alone=len(found) == 1) for members in found.values()]

    def _key(self, row: Row) -> tuple[str, int]:
        return self.merged.label(row, ("batch",)), row.result.budget_bytes

    def _pool(self, groups: Sequence[Group], alone: bool) -> Pool:
        parts = [group.title.split(", ") for group in groups]
        title = ", ".join(part for part in parts[0] if all(part in other for other in parts))
        folders = ", ".join(dict.fromkeys(row.source.label for group in groups for row in group.rows))
        rows = tuple(row for group in groups for row in group.rows)
        pool = self.pool(rows, "" if alone else f"{title} ({folders})" if self.several else title)
        return pool

    def pool(self, rows: Iterable[Row], title: str = "") -> Pool:
        """These rows, those of several seeds as one entry."""
        rows = tuple(rows)
        found: dict[tuple[str, int], list[Row]] = {}
        for row in rows:
            found.setdefault(self._key(row), []).append(row)
        seeds = {key: sorted({row.result.seed for row in members}) for key, members in found.items()}
        wanted = max(seeds.values(), key=lambda of_key: (len(of_key), of_key), default=[])
        entries = {members[0]: Entry(tuple(members)) for key, members in found.items() if seeds[key] == wanted}
        return Pool(
            title, rows,
            {budget: [entries[row] for row in of_budget] for budget, of_budget in budgets_of(entries).items()},
            [entry for row, entry in entries.items() if row.result.policy == REFERENCE],
            [f"{key[0]} at {found[key][0].result.budget}" for key in found if seeds[key] != wanted],
        )  # fmt: skip

    def each(self, pools: Sequence[Pool], make: Callable[[int, Pool], list[Markup]]) -> list[Markup]:
        """The blocks of every pool, under its title where there are several; many are folded but for the first."""
        blocks: list[Markup] = []
        for index, pool in enumerate(pools):
            made = make(index, pool)
            if pool.left_out:
                made.append(self.ui.note(f"Left out, as they lack a seed: {', '.join(pool.left_out)}."))
            if len(pools) > 3:
                blocks.append(self.ui.fold(pool.title, made, index == 0))
            else:
                blocks += [*([self.ui.heading(pool.title)] if pool.title else []), *made]
        return blocks

    # ------------------------------------------------------------------------------------------------ tables

    def name(self, entry: Entry | Row, text: str) -> Cell:
        """The policy as the first cell of a line."""
        return Cell(text, text, self.style(entry))

    def table(
        self, caption: str, entries: Sequence[Entry], columns: Iterable[Column], best: Collection[Entry] = (),
        shaded: bool = False,
    ) -> Markup:  # fmt: skip
        """A line for every entry: policy, budget, and the columns that any entry has a figure for."""
        shown = tables.measured(columns, (row.result for entry in entries for row in entry.rows))
        means = [mean for entry in entries for column in shown if shaded and (mean := entry.mean(column)) is not None]
        names = self.names(entries)
        lines = []
        for entry in entries:
            cells = [column_cell(entry, column) for column in shown]
            if shaded:
                cells = [cell._replace(shade=log_shade(cell.value, means)) for cell in cells]
            if entry in best:
                cells[0] = cells[0]._replace(kind="best")
            budget = Cell(entry.result.budget, entry.result.budget_bytes)
            lines.append([self.name(entry, names[entry]), budget, *cells])
        return self.cells(caption, ["policy", "budget", *(column.title for column in shown)], lines)

    def cells(
        self, caption: str, titles: Sequence[str], lines: Sequence[Sequence[Cell]], sortable: bool = True
    ) -> Markup:
        """A table; columns of numbers stand to the right."""
        numeric = [any(isinstance(line[i].value, int | float) for line in lines) for i in range(len(titles))]
        markup: Markup = self.ui.table(caption, list(zip(titles, numeric, strict=True)), lines, sortable)
        return markup

    def legend(self, entries: Iterable[Entry]) -> Markup:
        """The styles of the entries of a chart, each once."""
        keys = {self.merged.label(entry.rows[0], ()): entry for entry in entries}
        names = self.names(keys.values())
        markup: Markup = self.ui.legend([(self.style(entry), names[entry]) for entry in keys.values()])
        return markup

    def tracks(
        self, entries: Mapping[str, Sequence[tuple[Entry, Track]]], captions: Sequence[str], beside: Sequence[Markup]
    ) -> list[Markup]:  # fmt: skip
        """Tracks by budget, all on one scale; of very many those of all budgets but the first are folded."""
        groups = {title: [track for _, track in pairs] for title, pairs in entries.items() if pairs}
        at = charts.percent_scale(track for group in groups.values() for track in group)
        if sum(map(len, groups.values())) <= MOST_TRACKS:
            return [self.ui.tracks(groups, at, captions, beside)] if groups else []
        return [
            *beside,
            *(self.ui.fold(title, [self.ui.tracks({"": group}, at, captions)], index == 0)
              for index, (title, group) in enumerate(groups.items())),
        ]  # fmt: skip


def column_cell(entry: Entry, column: Column) -> Cell:
    """The mean of a figure, with its deviation over seeds."""
    values = entry.values(column)
    if not values:
        return MISSING
    if isinstance(values[0], str):
        return Cell("; ".join(dict.fromkeys(values)), values[0])
    mean = statistics.fmean(values)
    text = column.text(mean)
    if len(values) > 1 and column.form.endswith("f") and len(set(values)) > 1:
        text += f" ± {column.text(statistics.stdev(values))}"
    return Cell(text, mean if len(values) > 1 else values[0])


def log_shade(value: Any, others: Sequence[float]) -> float | None:
    """Where a figure is among others, on a logarithmic scale of the positive ones."""
    positive = [other for other in others if other > 0]
    if value is None or value <= 0 or len(set(positive)) < 2:
        return None
    return math.log(value / min(positive)) / math.log(max(positive) / min(positive))


def listed(names: Iterable[str]) -> str:
    """Names in words."""
    *others, last = names
    return f"{', '.join(others)} and {last}" if others else last


def mib(count: float) -> str:
    """Bytes in MiB, with the unit."""
    return f"{count / 2**20:,.3f} MiB"


def scale_names(schedule: Iterable[tuple[int, int, int]]) -> list[str]:
    """Short names of scales: the side of square ones."""
    return [str(h) if t == 1 and h == w else f"{h}x{w}" if t == 1 else f"{t}x{h}x{w}" for t, h, w in schedule]


def titled_budgets(pool: Pool) -> dict[str, list[Entry]]:
    """The entries by budget, under titles that say how large it is; the full cache comes first."""
    full = {"full cache": pool.reference} if pool.reference else {}
    sized = {
        text if "MiB" in text else f"{text}, {mib(of_budget[0].result.budget_bytes)}": of_budget
        for text, of_budget in pool.budgets.items()
    }
    return full | sized


# ------------------------------------------------------------------------------------------------------ summary


def headline(report: Report) -> str:
    """The main result in a sentence."""
    pools = [pool for pool in report.pools(report.merged.fidelity_groups) if pool.budgets]
    if not pools:
        count = len({row.result.policy for row in report.merged.rows} - {REFERENCE})
        return f"Memory and time of {count} cache polic{'y' if count == 1 else 'ies'} of {report.merged.model}"
    budget, entries = list(max(pools, key=lambda pool: len(pool.rows)).budgets.items())[-1]
    best = [
        f"{entry.result.policy} of {entry.rows[0].source.label}" if report.several else entry.result.policy
        for entry in leaders(entries, lambda entry: entry.mean(KL))
    ]
    where = f"With {budget} of the cache" if budget.endswith("%") else f"Within {budget}"
    tie = f"{listed(best)} tie as" if len(best) > 1 else f"{best[0]} stays"
    return f"{where}, {tie} closest to the full cache"


def summary(report: Report) -> Section:
    """The best policy at every budget."""
    pools = [pool for pool in report.pools(report.merged.fidelity_groups) if pool.budgets]
    blocks = [] if pools else [report.ui.note("Fidelity was not measured: these results have no KL.", True)]
    if len(pools) > 1:
        blocks.append(report.ui.note("Fidelity was measured on different things; only what compares ranks together."))
    for pool in pools:
        names = report.names(pool.entries)
        tiles = [_tile(report, names, budget, entries) for budget, entries in pool.budgets.items()]
        blocks += [*([report.ui.heading(pool.title)] if pool.title else []), report.ui.tiles(tiles)]
    merged, first = report.merged, (pools[0].rows[0] if pools else report.merged.rows[0]).result
    facts = [f"KL and top-1 over {first.images} images"] if first.images else []
    facts += [f"PSNR and SSIM over {first.pictures} pictures"] if first.pictures else []
    seeds = sorted({row.result.seed for row in merged.rows})
    facts += [f"means over the seeds {listed(map(str, seeds))}"] if len(seeds) > 1 else []
    rows = listed(map(str, sorted({row.result.rows for row in merged.rows})))
    facts.append(f"a cache of {rows} rows in {listed(dict.fromkeys(row.result.storage for row in merged.rows))}")
    facts.append(f"on {listed(merged.machines.values())}")
    lead = (
        f"{merged.model}: {', '.join(facts)}. KL compares the guided logits under the full cache with those under the "
        "policy, in nats per token. Lower is better."
    )
    return Section("summary", "Summary", headline(report), lead, blocks)


def _tile(report: Report, names: Mapping[Entry, str], budget: str, entries: list[Entry]) -> dict[str, Any]:
    best = leaders(entries, lambda entry: entry.mean(KL))
    first = best[0]
    policies = {entry.result.policy for entry in best}
    others = [
        e for e in ranked(entries, lambda entry: entry.mean(KL)) if e not in best and e.result.policy not in policies
    ]
    facts = [f"{len(best)} tie"] if len(best) > 1 else []
    if span := first.range(KL):
        facts.append(f"{span[0]:.3f} to {span[1]:.3f} over {'seeds' if len(first.rows) > 1 else 'its plans'}")
    if (top1 := first.mean(TOP1)) is not None and len(best) == 1:
        facts.append(f"{top1:.1%} of the likeliest codes unchanged")
    if others:
        facts.append(f"next is {names[others[0]]} with {others[0].mean(KL):.3f}")
    facts += [text for entry in best if (text := tables.remark(entry.result))]
    over = budget if "MiB" in budget else f"{budget} · {mib(first.result.budget_bytes)}"
    return {
        "over": over, "figure": f"{first.mean(KL):.3f}", "unit": "KL, nats per token",
        "title": listed(names[entry] for entry in best), "text": "; ".join(facts), "style": report.style(first),
    }  # fmt: skip


# ----------------------------------------------------------------------------------------------- against memory


def _against_memory(
    report: Report, name: str, entries: Sequence[Entry], column: Column, log: bool,
    ranges: Mapping[Entry, tuple[float, float] | None],
) -> tuple[Markup, list[Entry], str]:  # fmt: skip
    """A chart of a figure against the bytes held; its Pareto front, and that in words."""

    def figure(entry: Entry) -> float | None:
        return entry.mean(column)

    def held(entry: Entry) -> float | None:
        return entry.mean(HELD)

    names = report.names(entries)
    of_names: dict[str, list[tuple[float, float, Entry]]] = {}
    for entry in entries:
        if (x := held(entry)) and (y := figure(entry)) is not None and (y > 0 or not log):
            of_names.setdefault(names[entry], []).append((x / 2**20, y, entry))
    lines = []
    for points in of_names.values():
        points.sort(key=lambda point: point[:2])
        xs, ys, members = zip(*points, strict=True)
        around = [ranges[entry] or (y, y) for y, entry in zip(ys, members, strict=True)]
        lines.append(Line(report.style(members[0]), np.array(ys), np.array(xs), around))
    drawn = [entry for points in of_names.values() for *_, entry in points]
    front = pareto_front(drawn, held, figure)
    ticks = {
        entry.result.budget_bytes / 2**20: f"{entry.result.budget}\n{entry.result.budget_bytes / 2**20:.3g}"
        for entry in drawn
    }
    on_front: dict[str, list[str]] = {}
    for entry in reversed(front):
        on_front.setdefault(names[entry], []).append(entry.result.budget)
    words = "; ".join(f"{name} at {', '.join(budgets)}" for name, budgets in on_front.items())
    words = (
        f"The broad band is the Pareto front: {words}. Nothing else is better in as few bytes; bytes within "
        f"{EQUAL_BYTES:.0%} of each other count as equal."
    )
    points_of_front = [((held(entry) or 0) / 2**20, figure(entry) or 0) for entry in front]
    svg = charts.line_chart(
        name, f"{column.title} against memory. {words}", lines, points_of_front,
        Axis("budget, and its MiB", True, sparse(ticks)), Axis(column.title, log),
    )  # fmt: skip
    return svg, front, words


def sparse(ticks: Mapping[float, str]) -> dict[float, str]:
    """The ticks of a logarithmic axis that leave room for their texts, from the left."""
    shown: dict[float, str] = {}
    span = math.log(max(ticks) / min(ticks)) if ticks else 0
    for place in sorted(ticks):
        if not shown or math.log(place / list(shown)[-1]) >= 0.09 * span:
            shown[place] = ticks[place]
    return shown


def fidelity(report: Report) -> Section | None:
    """KL against memory, and by policy and budget."""

    def make(index: int, pool: Pool) -> list[Markup]:
        entries = [entry for of_budget in pool.budgets.values() for entry in of_budget]
        table = _kl_table(report, pool)
        if not any((entry.mean(KL) or 0) > 0 for entry in entries):
            return [table]
        ranges = {entry: entry.range(KL) for entry in entries}
        svg, _, words = _against_memory(report, f"fidelity-{index}", entries, KL, True, ranges)
        over = "seeds" if any(len(entry.rows) > 1 for entry in entries) else "the plans of a policy that is random"
        captions = [
            "Lower left is better. Points lie at the bytes that the arena allocates.", words,
            f"Bars are the range over {over}." if any(ranges.values()) else "",
            "A KL of 0 has no place on this axis." if any(entry.mean(KL) == 0 for entry in entries) else "",
        ]  # fmt: skip
        return [report.ui.chart(svg, captions, [table])]

    pools = [pool for pool in report.pools(report.merged.fidelity_groups) if pool.budgets]
    if not pools:
        return None
    return Section(
        "fidelity", "Fidelity", "What a budget costs in fidelity",
        "Every policy at every budget, compared with the full cache, whose KL is 0.", report.each(pools, make),
    )  # fmt: skip


def _kl_table(report: Report, pool: Pool) -> Markup:
    """KL by policy and budget; the least of every budget is bold."""
    entries = [entry for of_budget in pool.budgets.values() for entry in of_budget]
    names, means = report.names(entries), [entry.mean(KL) or 0 for entry in entries]
    best = [entry for of_budget in pool.budgets.values() for entry in leaders(of_budget, lambda e: e.mean(KL))]
    of_names: dict[str, dict[str, Entry]] = {}
    for budget, of_budget in pool.budgets.items():
        for entry in of_budget:
            of_names.setdefault(names[entry], {})[budget] = entry
    smallest = list(pool.budgets)[-1]

    def order(item: tuple[str, dict[str, Entry]]) -> tuple[bool, float]:
        entry = item[1].get(smallest)
        return entry is None, 0.0 if entry is None else entry.mean(KL) or 0.0

    lines = []
    for name, of_name in sorted(of_names.items(), key=order):
        cells = [report.name(next(iter(of_name.values())), name)]
        for budget in pool.budgets:
            cell = column_cell(of_name[budget], KL) if budget in of_name else MISSING
            kind = "best" if of_name.get(budget) in best else cell.kind
            cells.append(cell._replace(shade=log_shade(cell.value, means), kind=kind))
        lines.append(cells)
    over = f"{entries[0].result.images} images"
    over += f" at each of {len(entries[0].rows)} seeds" if len(entries[0].rows) > 1 else ""
    return report.cells(
        f"KL in nats per token by budget, over {over}; the least is bold", ["policy", *pool.budgets], lines
    )


def paired(report: Report) -> Section | None:
    """How far every policy's KL is from that of the base at the same budget, on the same images."""
    groups = [
        Group(group.title, tuple(row for row in group.rows if row.result.versus is not None), group.key)
        for group in report.merged.fidelity_groups
    ]
    groups = [group for group in groups if group.rows]
    if not groups:
        return None
    blocks: list[Markup] = []
    for group in groups:
        names = report.names(Entry((row,)) for row in group.rows)
        titles = {entry.rows[0]: name for entry, name in names.items()}
        tracks = {}
        for budget, rows in budgets_of(group.rows).items():
            bases = dict.fromkeys(row.result.versus.policy for row in rows if row.result.versus is not None)
            entries = [(Entry((row,)), _difference(titles[row], report.style(row), row)) for row in rows]
            entries.sort(key=lambda pair: pair[1].lanes[0][-1].begin)
            tracks[f"{budget}, against {' or '.join(bases)}"] = entries
        versus = next(row.result.versus for row in group.rows if row.result.versus is not None)
        captions = [
            f"Points are means over {versus.images} images, bars their bootstrap intervals with a confidence of "
            f"{versus.confidence or 0:.0%}, in nats per token. The base is the line at 0: a policy left of it is "
            "closer to the full cache than the base, a policy right of it is further away.",
            "Where a bar crosses the line, these images do not separate the two. The interval covers other images, not "
            "other draws of a random policy or other calibrations.",
        ]
        blocks += [*([report.ui.heading(group.title)] if group.title else []), *report.tracks(tracks, captions, [])]
    return Section(
        "paired", "Paired", "Differences on the same images",
        "The KL of a policy minus that of the base at the same budget, image by image. What images share cancels, so "
        "that differences show which two separate figures would hide.", blocks,
    )  # fmt: skip


def _difference(name: str, style: Style, row: Row) -> Track:
    versus = row.result.versus
    assert versus is not None
    low, high = versus.interval
    text = f"{tables.difference_text(versus)}"
    verdict = f"closer than {versus.policy}" if high < 0 else f"further than {versus.policy}" if low > 0 else "no verdict"
    colour = f"var(--series-{style.colour})"
    lane = (
        Part(0, 0, "", "", "zero"),
        Part(low, high, f"{name}: {text}", colour),
        Part(versus.difference, versus.difference, f"{name}: {text}", colour, "point"),
    )
    return Track(name, style, f"{text} {verdict}", (lane,))


def per_scale(report: Report) -> Section | None:
    """KL by target scale."""

    def make(index: int, pool: Pool) -> list[Markup]:
        entries, scales = pool.entries, scale_names(pool.rows[0].result.schedule)
        found = {e: values for e in entries if (values := e.array("kl_per_scale")) is not None}
        panels = [
            Panel(budget, [Line(report.style(entry), found[entry]) for entry in of_budget if entry in found])
            for budget, of_budget in pool.budgets.items()
        ]
        blocks = []
        if panels:
            svg = charts.scale_chart(f"scales-{index}", "KL by target scale", panels, scales, "KL, nats per token")
            first = {
                budget: next((s for s in range(len(scales)) if any(found[e][s] > 1e-6 for e in of if e in found)), None)
                for budget, of in pool.budgets.items()
            }
            lost = [f"scale {s} at {budget}" if s is not None else f"none at {budget}" for budget, s in first.items()]
            captions = [
                "A panel for every budget, on the same axes; scales are named by their side in tokens.",
                f"The first scale at which any policy loses something: {', '.join(lost)}.",
            ]
            legend = report.legend(entry for of_budget in pool.budgets.values() for entry in of_budget)
            blocks.append(report.ui.chart(svg, captions, [legend]))
        columns = tables.scale_columns("kl_per_scale", scales, "", ".4f")
        ordered = ranked(found, lambda entry: entry.mean(KL))
        ordered.sort(key=lambda entry: -entry.result.budget_bytes)
        return [*blocks, report.table("KL in nats per token by target scale", ordered, columns, shaded=True)]

    pools = [
        pool for pool in report.pools(report.merged.fidelity_groups)
        if any(row.result.kl_per_scale for row in pool.rows)
    ]  # fmt: skip
    if not pools:
        return None
    return Section(
        "scales", "By scale", "Where along the scales fidelity is lost",
        "KL of the tokens of every target scale. The first scale reads no cache and loses nothing.",
        report.each(pools, make),
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------ latency


def latency(report: Report) -> Section | None:
    """Time against memory, and by phase and scale, of what was timed in turns."""
    groups = report.merged.timing_groups
    if not groups:
        return None
    of_full = Column("of full cache", "", _shares(groups).get, ".2f")

    def make(index: int, pool: Pool) -> list[Markup]:
        entries = pool.entries
        svg, front, words = _against_memory(
            report, f"latency-{index}", entries, MEDIAN, False, {entry: _quartiles(entry) for entry in entries}
        )
        captions = [
            "Lower left is better. Median time of one batch, decoding included; bars are as long as the distance of "
            "the quartiles, or the range over seeds. Where bars overlap, the order of the times says nothing.", words,
        ]  # fmt: skip
        columns = (MEDIAN, Column("IQR", "ms", "latency_ms.iqr", ".1f"), of_full, HELD)
        ordered = ranked(entries, lambda entry: entry.mean(MEDIAN))
        return [
            *_busy(report, pool),
            report.ui.chart(svg, captions, [report.legend(entries)]),
            report.table("Time of one batch, the fastest first; the Pareto front is bold", ordered, columns, front),
            *_phases(report, pool),
            *_time_by_scale(report, pool, f"time-{index}"),
        ]

    return Section(
        "latency", "Latency", "Memory and latency",
        "Only runs that were timed in turns, on one machine and of the same work, are ranked together.",
        report.each(report.pools(groups), make),
    )  # fmt: skip


class _Shares(dict[int, float]):
    """Times as shares of the full cache's in the same turns, by the identity of rows."""

    def get(self, row: Any, default: Any = None) -> Any:
        return super().get(id(row), default)


def _shares(groups: Iterable[Group]) -> _Shares:
    shares = _Shares()
    for group in groups:
        full = [MEDIAN.value(row.result) for row in group.rows if row.result.policy == REFERENCE]
        if full:
            shares |= {id(row.result): MEDIAN.value(row.result) / full[0] for row in group.rows}
    return shares


def _quartiles(entry: Entry) -> tuple[float, float] | None:
    time = entry.result.latency_ms
    if len(entry.rows) > 1 or time is None or time.iqr is None:
        return entry.range(MEDIAN)
    return time.median - time.iqr / 2, time.median + time.iqr / 2


def _busy(report: Report, pool: Pool) -> list[Markup]:
    """A warning where times were taken beside other work."""
    machines = [row.result.timing_machine or row.source.results.environment for row in pool.rows]
    reasons = dict.fromkeys(reason for machine in machines if machine.load for reason in machine.load.reasons)
    if not reasons:
        return []
    return [
        report.ui.note(
            f"The machine was busy before this run ({'; '.join(reasons)}): times are too long and spread, and their "
            "order may be that of the other work.", True,
        )
    ]  # fmt: skip


_PHASE_COLOURS = {name: f"var(--series-{number})" for number, name in enumerate((*TIME_PHASES, "other"))}
_PHASE_COLOURS["other"] = "var(--series-7)"


def _phases(report: Report, pool: Pool) -> list[Markup]:
    """Bars by phase, with the median and its interval, and the same in a table."""
    entries = [entry for entry in pool.entries if entry.result.latency_ms and entry.result.latency_ms.phases]
    if not entries:
        return []
    names = report.names(entries)
    tracks = {
        title: [(e, _time_track(names[e], report.style(e), e.result)) for e in of_budget if e in entries]
        for title, of_budget in titled_budgets(pool).items()
    }
    times = [time for e in entries for time in (e.result.latency_ms, e.result.graph_latency_ms) if time]
    outliers = sum(time.outliers or 0 for time in times)
    captions = [
        "A bar is one batch by phase, decoding included: medians over drawings that were watched. Attention is what "
        "the cache does to answer queries; other is projections, norms, embeddings and logits. The diamond is the "
        "median of drawings that were not watched, the line its interval.",
        f"Circles are outliers ({outliers}), more than {OUTLIER_IQRS:g} quartile distances outside the quartiles. They "
        "count in every figure." if outliers else "",
        "The pale bar is drawing with CUDA graphs, which has no phases." if len(times) > len(entries) else "",
        "Of several seeds the bars show the first." if any(len(entry.rows) > 1 for entry in entries) else "",
    ]  # fmt: skip
    legend = report.ui.legend([(colour, name) for name, colour in _PHASE_COLOURS.items()])
    return [
        *report.tracks(tracks, captions, [legend]),
        report.table("Time of one batch, with the interval of its median, and by phase", pool.entries, tables.LATENCY),
    ]


def _time_track(name: str, style: Style, row: ResultRow) -> Track:
    lanes, texts = [], []
    for time, note in ((row.latency_ms, ""), (row.graph_latency_ms, " with CUDA graphs")):
        if time is None:
            continue
        phases = {name: time.phases[name] for name in _PHASE_COLOURS if name in time.phases} if time.phases else {}
        bars = charts.stacked({name: (ms, _PHASE_COLOURS[name]) for name, ms in phases.items()}, "ms")
        lanes.append((*(bars or (Part(0, time.median, f"median{note}", _pale(7, 40)),)), *_time_marks(time)))
        texts.append(f"{time.median:.1f} ms{note}")
    return Track(name, style, ", ".join(texts), tuple(lanes))


def _time_marks(time: Latency) -> list[Part]:
    low, high = time.interval or (time.median, time.median)
    text = f"median {time.median:.1f} ms, interval {low:.1f} to {high:.1f} ms"
    far = [Part(value, value, f"outlier: {value:.1f} ms", "", "outlier") for value in outliers_of(time.all)]
    return [Part(low, high, text, "", "span"), Part(time.median, time.median, text, "", "point"), *far]


def _pale(colour: int, percent: int) -> str:
    return f"color-mix(in srgb, var(--series-{colour}) {percent}%, transparent)"


def _time_by_scale(report: Report, pool: Pool, name: str) -> list[Markup]:
    """Lines by target scale, those with CUDA graphs dashed, and the same in a table."""
    fields_of_lines = (("latency_ms.scales", False), ("graph_latency_ms.scales", True))
    panels = [
        Panel(
            title,
            [
                Line(report.style(entry), values, dashed=dashed)
                for entry in [*pool.reference, *of_budget] for path, dashed in fields_of_lines
                if (values := entry.array(path)) is not None
            ],
        )
        for title, of_budget in (pool.budgets or {"full cache": []}).items()
    ]  # fmt: skip
    if not any(panel.lines for panel in panels):
        return []
    scales = scale_names(pool.rows[0].result.schedule)
    svg = charts.scale_chart(name, "Time of one batch by target scale", panels, scales, "ms per batch")
    captions = ["Time of one batch by target scale, without the decoder; a panel for every budget, on the same axes."]
    if any(line.dashed for panel in panels for line in panel.lines):
        captions.append("Dashed lines are drawn with CUDA graphs.")
    columns = [
        column for path, ledger in (("latency_ms", ""), ("graph_latency_ms", "CUDA graphs"))
        for column in tables.scale_columns(f"{path}.scales", [f"scale {s}" for s in scales], "ms", ".1f", ledger)
    ]  # fmt: skip
    table = report.table("Time of one batch by target scale, medians of watched drawings", pool.entries, columns)
    return [report.ui.chart(svg, captions, [report.legend(pool.entries)]), table]


# ------------------------------------------------------------------------------------------------------- memory


def memory(report: Report) -> Section:
    """Every ledger of every row, and the cache over time, folder by folder."""
    blocks: list[Markup] = []
    for number, source in enumerate(report.merged.sources):
        batches = sorted({row.result.batch for row in source.rows})
        for batch in batches:
            pool = report.pool(row for row in source.rows if row.result.batch == batch)
            title = [source.label] if report.several else []
            title += [f"{batch} image{'s' if batch > 1 else ''} at once"] if len(batches) > 1 else []
            blocks += [report.ui.heading(", ".join(title))] if title else []
            blocks += [*_ledgers(report, pool), *_over_time(report, pool, f"memory-{number}-{batch}")]
            blocks += _memory_tables(report, pool)
    return Section(
        "memory", "Memory", "Planned, allocated, and seen by the device",
        "Three ledgers of the same drawing: the most that the plan holds, what the arena allocates for it, and what is "
        "counted on the device.", blocks,
    )  # fmt: skip


_LEDGER_COLOURS = {
    "planned: cache": "var(--series-6)", "arena: cache": "var(--series-1)", "arena: index tables": "var(--series-4)",
    "arena: workspace": "var(--series-5)", "device: opening": _pale(0, 40), "device: drawing": "var(--series-0)",
    "device: decode": _pale(0, 65), "device: reserved beyond": _pale(0, 20),
    "device: with CUDA graphs": "var(--series-3)",
}  # fmt: skip


def _ledgers(report: Report, pool: Pool) -> list[Markup]:
    """Bars of every entry by ledger, where memory was measured."""
    entries = [entry for entry in pool.entries if entry.result.memory is not None]
    if not entries:
        return []
    names = report.names(entries)
    tracks = {
        title: [(e, _memory_track(names[e], report.style(e), e.result)) for e in of_budget if e in entries]
        for title, of_budget in titled_budgets(pool).items()
    }
    used = {part.title.rpartition(": ")[0] for of in tracks.values() for _, track in of for lane in track.lanes
            for part in lane}  # fmt: skip
    weights = listed(dict.fromkeys(mib(entry.result.memory.weights_bytes) for entry in entries if entry.result.memory))
    captions = [
        "The budget (dashed) limits the cache, planned and allocated. The device also holds activations, which no "
        "budget limits: its bars are the peaks of opening the cache, of drawing all scales and of decoding.",
        f"The model's weights, {weights}, are in none of the bars.",
    ]
    legend = report.ui.legend([(colour, name) for name, colour in _LEDGER_COLOURS.items() if name in used])
    return report.tracks(tracks, captions, [legend])


def _memory_track(name: str, style: Style, row: ResultRow) -> Track:
    ledgers = row.memory
    assert ledgers is not None

    def lane(prefix: str, parts: Mapping[str, float]) -> tuple[Part, ...]:
        named = {f"{prefix}: {part}": count / 2**20 for part, count in parts.items()}
        return charts.stacked({title: (size, _LEDGER_COLOURS[title]) for title, size in named.items()}, "MiB")

    def allocated(part: str, peaks: AllocatorPeaks) -> dict[str, float]:
        above = peaks.allocated_bytes - (ledgers.allocator.weights_bytes if ledgers.allocator else 0)
        return {part: max(0, above), "reserved beyond": max(0, peaks.reserved_bytes - peaks.allocated_bytes)}

    arena = ledgers.arena
    lanes = [
        lane("planned", {"cache": ledgers.planned.cache_bytes}),
        lane("arena", {
            "cache": arena.cache_bytes, "index tables": arena.index_bytes, "workspace": arena.workspace_bytes,
        }),
    ]  # fmt: skip
    limit = ledgers.planned.budget_bytes / 2**20
    lanes = [(*parts, Part(limit, limit, f"budget: {limit:.3f} MiB", "", "limit")) for parts in lanes]
    for field, phase in PHASES.items():
        if ledgers.allocator is not None:
            lanes.append(lane("device", allocated(phase, getattr(ledgers.allocator.peaks, field))))
        else:
            lanes.append(lane("device", {phase: getattr(ledgers.tensors.peak_bytes, field)}))
    if ledgers.graphs is not None and ledgers.graphs.peaks is not None:
        lanes.append(lane("device", allocated("with CUDA graphs", ledgers.graphs.peaks)))
    drawing = max(part.end for part in lanes[3])
    return Track(name, style, f"{mib(arena.cache_bytes)} in the arena, {drawing:.3f} on the device", tuple(lanes))


def _over_time(report: Report, pool: Pool, name: str) -> list[Markup]:
    """What every policy's cache holds after every layer of every scale, a panel for every budget."""
    panels, fullest = [], []
    for title, entries in titled_budgets(pool).items():
        limit = entries[0].result.budget_bytes
        if title == "full cache" or not limit:
            continue
        lines = [Line(report.style(e), coarser(np.array(e.result.timeline_bytes) / 2**20)) for e in entries]
        panels.append(Panel(title, lines, limit / 2**20))
        fullest.append(f"{max(line.y.max() for line in lines) * 2**20 / limit:.1%} of {title.partition(',')[0]}")
    if not panels:
        return []
    scales = scale_names(pool.rows[0].result.schedule)
    svg = charts.scale_chart(name, "Bytes of the cache over time against the budget", panels, scales, "MiB held")
    captions = [
        "What the cache holds after every layer of every target scale, by the plan. The dashed line is the budget, "
        "which no point may pass. Every panel has an axis of its own; the full cache is not drawn.",
        f"At the fullest moment: {', '.join(fullest)}.",
    ]
    entries = [entry for of_budget in pool.budgets.values() for entry in of_budget]
    return [report.ui.chart(svg, captions, [report.legend(entries)])]


def coarser(values_TL: NDArray[np.float64], most: int = 160) -> NDArray[np.float64]:
    """The same by scale and groups of layers, the fullest of each, as few that a line stays drawable: (T, groups)."""
    scales, layers = values_TL.shape
    groups = min(layers, max(1, most // scales))
    starts = [layers * group // groups for group in range(groups)]
    return np.maximum.reduceat(values_TL, starts, axis=1)


def _memory_tables(report: Report, pool: Pool) -> list[Markup]:
    """The figures of all ledgers, and the most that the cache holds at every scale."""
    entries = [entry for entry in pool.entries if entry.result.memory is not None]
    blocks = []
    if entries:
        blocks = [
            report.table("Cache: what is planned, and what the arena allocates", entries, tables.PLANNED),
            report.table("Device: what was counted, and by whom", entries, tables.DEVICE),
            report.ui.note(
                "Tensors are all that are alive at once, without the model's; the allocator is torch's on a GPU, with "
                "the weights in its figures; NVML counts for the driver; resident is what the system holds for the "
                "process, Python and libraries included. Unexplained is what the known parts of the steps between "
                "ledgers leave over; it is negative where peaks of two ledgers are not of one moment."
            ),
        ]
    scales = scale_names(pool.rows[0].result.schedule)
    columns = [Column(f"scale {name}", "MiB", _peak_of_scale(s), ".3f") for s, name in enumerate(scales)]
    table = report.table("The most that the cache holds while each target scale runs", pool.entries, columns)
    return [*blocks, report.ui.fold("The cache by target scale", [table])]


def _peak_of_scale(scale: int) -> Callable[[ResultRow], float]:
    return lambda row: max(row.timeline_bytes[scale])


# ---------------------------------------------------------------------------------------------------- all figures


def all_figures(report: Report) -> Section:
    """Every row of every folder."""
    blocks = []
    for source in report.merged.sources:
        axes = [axis for axis in tables.AXES if axis.name in source.axes]
        shown = tables.measured((*axes, *tables.CACHE, *tables.TIME, *tables.FIDELITY, tables.REMARK),
                                source.results.rows)  # fmt: skip
        lines = [
            [report.name(row, row.result.policy), Cell(row.result.budget, row.result.budget_bytes),
             *(column_cell(Entry((row,)), column) for column in shown)]
            for row in source.rows
        ]  # fmt: skip
        caption = f"{source.label}, {report.merged.machines[source.machine]}"
        blocks.append(report.cells(caption, ["policy", "budget", *(column.title for column in shown)], lines))
    blocks.append(report.ui.note(
        "Allowed is the budget; planned is the most that the plan holds; arena is the storage that is allocated; index "
        "tables say what is read and written where; workspace is what attention gathers into; running layer is its own "
        "keys and values at the largest scale; device peak is the allocator's; driver is what NVML counts. Times are of "
        "one batch, decoding included."
    ))  # fmt: skip
    return Section("rows", "All figures", "All figures", "A line for every row of results.json.", blocks)


def environment(report: Report) -> Section:
    """Where and how all was measured."""
    facts = {source: dict(_facts(source)) for source in report.merged.sources}
    names = dict.fromkeys(name for of_source in facts.values() for name in of_source)
    lines = [[Cell(name), *(Cell(of.get(name, "none")) for of in facts.values())] for name in names]
    table = report.cells("Machine, sampling and request", ["", *(source.label for source in facts)], lines, False)
    settings: dict[tuple[str, str], list[Row]] = {}
    for row in report.merged.rows:
        chosen = {name: value for name, value in row.result.settings.items() if name != "budget"}
        settings.setdefault((report.merged.label(row, ()), in_words(chosen)), []).append(row)
    lines = [
        [report.name(rows[0], label), Cell(", ".join(dict.fromkeys(row.result.budget for row in rows))),
         Cell(text, kind="wide")]
        for (label, text), rows in settings.items()
    ]  # fmt: skip
    policies = report.cells("Settings of every policy", ["policy", "budgets", "settings"], lines, False)
    return Section(
        "environment", "Environment", "Where and how this was measured", "What decides the figures above.",
        [table, policies],
    )  # fmt: skip


def _facts(source: Source) -> Iterable[tuple[str, str]]:
    results, first = source.results, source.results.rows[0]
    yield "model", first.model
    yield "weights", first.model_fingerprint
    yield "schedule", str(ScaleSchedule(first.schedule))
    request = {f.name: getattr(results.request, f.name) for f in msgspec.structs.fields(results.request)}
    if provenance := request.pop("statistics"):
        request["statistics"] = f"{len(provenance.get('samples', ()))} samples of {provenance.get('model')}"
    machine = {f.name: getattr(results.environment, f.name) for f in fields(results.environment)}
    for part, values in (("", machine), ("sampling: ", results.sampling or {}), ("request: ", request)):
        for name, value in values.items():
            if value is not None:
                yield f"{part}{name.replace('_', ' ')}", in_words(msgspec.to_builtins(value))


def in_words(value: Any) -> str:
    """A value of JSON in one line."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {in_words(inner)}" for name, inner in value.items() if inner is not None) or "none"
    if isinstance(value, list | tuple):
        return ", ".join(map(in_words, value[:8])) + (f" and {len(value) - 8} more" if len(value) > 8 else "")
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.6g}" if isinstance(value, float) else str(value)
