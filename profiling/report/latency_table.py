"""Times as a table: medians with their intervals, and where the time goes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from heatkv.engine.spans import PHASES
from heatkv.profiling.report.wide_table import WideTable


def latency_table(rows: Sequence[Mapping[str, Any]], title: str) -> Table:
    """A line for every row that was timed, one more where it was with graphs; "-" is what was not measured."""
    phases = (*PHASES, "other")
    axes = [name for name in ("batch", "seed") if len({row.get(name) for row in rows}) > 1]
    table = WideTable(heads=2 + len(axes), title=title)
    for name in ("policy", "budget", *axes, "ms", "interval", "outliers", *phases, "last scale"):
        table.add_column(name, justify="left" if name == "policy" else "right", no_wrap=True)
    confidences, outliers = set(), 0
    for row in rows:
        for field, by in (("latency_ms", ""), ("graph_latency_ms", ", graphs")):
            told = row.get(field)
            if not told:
                continue
            low, high = told["interval"]
            confidences.add(told["confidence"])
            outliers += told["outliers"]
            of_phases, scales = told.get("phases") or {}, told.get("scales")
            table.add_row(
                row["policy"] + by,
                row["budget"],
                *(str(row[axis]) for axis in axes),
                f"{told['median']:.1f}",
                f"{low:.1f} - {high:.1f}",
                str(told["outliers"]),
                *(f"{of_phases[name]:.1f}" if name in of_phases else "-" for name in phases),
                f"{scales[-1]:.1f}" if scales else "-",
            )
    notes = []
    if confidences:
        notes.append(f"intervals of the median hold it with {' or '.join(f'{c:.1%}' for c in sorted(confidences))}")
    if outliers:
        notes.append(f"outliers ({outliers}) are counted in")
    notes.append("phases and scales are of further runs, which were watched")
    table.caption = "; ".join(notes)
    return table
