"""The section of phases: where the time of a drawing goes, by phase and by scale, machine by machine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from heatkv.engine.spans import PHASES
from heatkv.profiling.measure.latency import OUTLIER_IQRS, outliers_of
from heatkv.profiling.report import bar_figures, figures
from heatkv.profiling.report.bar_figures import Bar, BarGroup, Part
from heatkv.profiling.report.blocks import MISSING, Block, Cell, Chart, Key, Legend, Note, Section, Table, number_cell
from heatkv.profiling.report.latency_section import busy
from heatkv.profiling.report.memory_section import titles, told_apart
from heatkv.profiling.report.reporting import Report, apart, scale_names, under
from heatkv.profiling.results.merging import Group, Row, budgets_of
from heatkv.profiling.results.fields import TIMES

_EAGER, _GRAPHS = TIMES
_DRAWN = {_EAGER: "eager", _GRAPHS: "CUDA graphs"}
_OTHER = "other"
_UNDIVIDED = 7
"""Colour of what is not told by phase."""


def phases(report: Report) -> Section | None:
    """Time by phase as bars, by scale as lines; None where no row was watched."""
    groups = [
        group for group in report.merged.timing_groups
        if any(_told(row, field, what) for row in group.rows for field in TIMES for what in ("phases", "scales"))
    ]  # fmt: skip
    if not groups:
        return None
    blocks: list[Block] = []
    if len(groups) > 1:
        blocks.append(Note("Apart is what was not timed in turns, on one machine and of the same work."))

    def of_group(index: int, group: Group) -> list[Block]:
        return [
            *busy([group]),
            *_phase_bars(report, group, f"phases-{index}"),
            *_scale_lines(report, group, f"times-{index}"),
            *_tables(report, group),
        ]

    blocks += apart(report, groups, of_group)
    return Section(
        "phases", "Phases", "Where the time goes",
        "Phases and scales were timed in drawings of their own, which were watched; the medians are of drawings that "
        "were not.", blocks,
    )  # fmt: skip


def _told(row: Row, field: str, what: str) -> Any:
    """A part of a time; None where it was not measured."""
    return row.time(field).get(what)


def _names(groups: Sequence[Row]) -> list[str]:
    """Phases that any row tells, ours first and what is left last."""
    told = dict.fromkeys(name for row in groups for field in TIMES for name in _told(row, field, "phases") or ())
    ours = [name for name in PHASES if name in told]
    return [*ours, *(name for name in told if name not in (*PHASES, _OTHER)), *([_OTHER] if _OTHER in told else [])]


def _colour(name: str, names: Sequence[str]) -> int:
    if name == _OTHER:
        return _UNDIVIDED
    return PHASES.index(name) if name in PHASES else 5 + names.index(name) % 2


# ----------------------------------------------------------------------------------------------------- by phase


def _phase_bars(report: Report, group: Group, name: str) -> list[Block]:
    rows = [row for row in group.rows if any(_told(row, field, "phases") for field in TIMES)]
    names = _names(rows)

    def make(pairs: Sequence[tuple[str, Row]], more: str) -> Block | None:
        called = titles(report, pairs)
        groups = [_bars(called[row], row, names) for _, row in pairs]
        label = "Time of one batch by phase, a bar for every policy and budget; the table below has the figures."
        drawing = bar_figures.bar_chart(f"{name}{more}", label, groups, "ms per batch", 10)
        shown = [row for _, row in pairs]
        keys = [Key(one, colour=f"var(--series-{_colour(one, names)})") for one in names]
        if any(row.time(_GRAPHS) for row in shown):
            keys.append(Key("CUDA graphs, not told by phase", colour=_faint(_UNDIVIDED)))
        return Chart(drawing, tuple(_captions(shown)), (Legend(tuple(keys)),))

    return told_apart(rows, make) if rows else []


def _faint(colour: int) -> str:
    return f"color-mix(in srgb, var(--series-{colour}) 35%, transparent)"


def _bars(title: str, row: Row, names: Sequence[str]) -> BarGroup:
    bars = []
    for field, how in _DRAWN.items():
        if not (time := row.time(field)):
            continue
        told = {name: value for name, value in (time.get("phases") or {}).items() if value is not None}
        parts = [Part(_colour(name, names), told[name]) for name in names if name in told]
        tip = ", ".join(f"{name} {told[name]:.1f}" for name in names if name in told)
        interval = time.get("interval")
        bars.append(Bar(
            tuple(parts) or (Part(_UNDIVIDED, time["median"], 0.35),),
            f"{title}, {how}: median {time['median']:.1f} ms" + (f"; watched: {tip} ms" if tip else ""),
            time["median"], None if interval is None else (interval[0], interval[1]), tuple(outliers_of(_runs(time))),
        ))  # fmt: skip
    return BarGroup(title, tuple(bars))


def _runs(time: Any) -> list[float]:
    """Every run, or the median alone where they are not told."""
    found: list[float] = time.get("all") or [time["median"]]
    return found


def _captions(rows: Sequence[Row]) -> list[str]:
    captions = [
        "A bar is one batch, decode included, by phase: medians over the watched drawings. Attention is what the cache "
        "does to answer queries; other is projections, norms, embeddings and logits.",
        "The diamond is the median of the drawings that were not watched, the line its interval.",
    ]
    far = sum(len(outliers_of(_runs(time))) for row in rows for field in TIMES if (time := row.time(field)))
    if far:
        captions.append(
            f"Circles are outliers, drawings more than {OUTLIER_IQRS:g} quartile distances outside the quartiles ("
            f"{far} in all; an arrow at the edge is one beyond it). None is dropped from any figure."
        )
    else:
        captions.append(f"No drawing lies more than {OUTLIER_IQRS:g} quartile distances outside the quartiles.")
    return captions


# ----------------------------------------------------------------------------------------------------- by scale


def _scale_names(rows: Sequence[Row]) -> list[str]:
    schedule = rows[0].schedule
    if schedule is not None:
        return scale_names(schedule)
    count = max(len(_told(row, field, "scales") or ()) for row in rows for field in TIMES)
    return [str(scale) for scale in range(count)]


def _scale_lines(report: Report, group: Group, name: str) -> list[Block]:
    rows = [row for row in group.rows if any(_told(row, field, "scales") for field in TIMES)]
    budgets = budgets_of(rows)
    full = [row for row in rows if row.is_reference]
    panels = {budget: [*full, *of_budget] for budget, of_budget in budgets.items()} or {"full cache": full}
    if not rows:
        return []
    lines = {
        title: [
            figures.ScaleLine(report.style(row), values, dashed=field == _GRAPHS)
            for row in shown for field in TIMES if (values := _told(row, field, "scales"))
        ]
        for title, shown in panels.items()
    }  # fmt: skip
    label = "Time of every target scale, a panel for every budget; the table below has the figures."
    names = list(under(_scale_names(rows)))
    drawing = figures.scale_panels(name, label, lines, names, "ms per batch")
    graphs = any(_told(row, _GRAPHS, "scales") for row in rows)
    captions = [
        "Time of one batch by target scale, the decoder not in it; a panel for every budget, all on the same axes"
        + (", the full cache in each of them." if full and budgets else ".")
    ]
    if graphs:
        captions.append("Solid lines are eager drawing, dashed ones replay CUDA graphs.")
    return [Chart(drawing, tuple(captions), (report.legend(row for shown in panels.values() for row in shown),))]


# ------------------------------------------------------------------------------------------------------- tables


def _tables(report: Report, group: Group) -> list[Block]:
    """A line for every row and way of drawing: medians with their phases, and scales."""
    budgets = [(budget, row) for budget, rows in budgets_of(group.rows).items() for row in rows]
    shown = [*((row.budget, row) for row in group.rows if row.is_reference), *budgets]
    names = _names([row for _, row in shown])
    labels = report.short_labels(group.rows)
    by_phase, by_scale = [], []
    scales = _scale_names([row for _, row in shown])
    for budget, row in shown:
        for field, how in _DRAWN.items():
            if not (time := row.time(field)):
                continue
            heads = (report.name(row, labels[row]), Cell(budget, row.number("budget_bytes")), Cell(how, how))
            told, (low, high) = time.get("phases") or {}, time.get("interval") or (None, None)
            by_phase.append((
                *heads, number_cell(time["median"], ".1f"), number_cell(low, ".1f"), number_cell(high, ".1f"),
                number_cell(time.get("confidence"), ".1%"), number_cell(time.get("runs"), "g"),
                number_cell(time.get("outliers"), "g"), *(number_cell(told.get(name), ".1f") for name in names),
            ))  # fmt: skip
            if values := time.get("scales"):
                cells = [number_cell(value, ".1f") for value in values]
                by_scale.append((*heads, *cells, *([MISSING] * (len(scales) - len(cells)))))
    medians = ("median, ms", "from, ms", "to, ms", "confidence", "runs", "outliers")
    spans = (("", 3), ("one batch, not watched", len(medians)), ("median of watched drawings", len(names)))
    blocks: list[Block] = [
        Table(
            "Time of one batch by phase, with the interval of its median"
            + ("; with CUDA graphs phases cannot be told" if any(row.time(_GRAPHS) for _, row in shown) else ""),
            ("policy", "budget", "drawn", *medians, *(f"{name}, ms" for name in names)), tuple(by_phase), 1,
            spans if names else (),
        )
    ]  # fmt: skip
    if by_scale:
        columns = ("policy", "budget", "drawn", *(f"scale {scale} ({name}), ms" for scale, name in enumerate(scales)))
        blocks.append(Table("Time of one batch by target scale, medians of watched drawings", columns, tuple(by_scale)))
    return blocks
