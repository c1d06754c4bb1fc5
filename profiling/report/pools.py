"""What sections of a report are made of: rows as entries whose figures compare, their names, styles and tables."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from heatkv.profiling.report import charts, tables
from heatkv.profiling.report.charts import Style
from heatkv.profiling.report.tables import Column
from heatkv.profiling.results.comparable import REFERENCE
from heatkv.profiling.results.ledgers import figure_at
from heatkv.profiling.results.merging import AXES, SEPARATOR, Group, Merged, Row, budgets_of
from heatkv.profiling.results.row import ResultRow

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
        found = [figure_at(row.result, path) for row in self.rows]
        return np.mean(found, axis=0) if all(found) else None

    def range(self, column: Column) -> tuple[float, float] | None:
        """The least and the most over seeds, or over the plans of a policy that draws at random; of a time at one seed,
        as long as the distance of its quartiles."""
        time = self.result.latency_ms
        if len(self.rows) == 1 and column is tables.MEDIAN and time and time.iqr is not None:
            return time.median - time.iqr / 2, time.median + time.iqr / 2
        values = self.values(column) if len(self.rows) > 1 else (column is tables.KL and self.result.kl_of_draws) or ()
        return (min(values), max(values)) if len(values) > 1 else None

    def cell(self, column: Column, best: bool = False) -> Cell:
        """The mean of a figure, with its deviation over seeds."""
        values = self.values(column)
        if not values:
            return Cell(tables.NOT_MEASURED, kind="missing")
        if not isinstance(values[0], int | float):
            texts = list(dict.fromkeys(map(column.text, values)))
            return Cell("; ".join(texts), texts[0])
        several = len(values) > 1 and column.form.endswith("f")
        mean = statistics.fmean(values) if several else values[0]
        text = column.text(mean) + (f" ± {column.text(statistics.stdev(values))}" if several else "")
        return Cell(text, mean, kind="best" if best else "")


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
        return charts.styles(families)

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
            title = ", ".join(part for part in parts[0] if all(part in other for other in parts))
            title = re.sub(r"(?<=\d)T([\d:]{8})\S*", r" \1", title)  # moments in short
            rows = [row for group in members for row in group.rows]
            title += f" ({', '.join(dict.fromkeys(row.source.label for row in rows))})" if self.several else ""
            pools.append(self.pool(rows, title if len(found) > 1 else ""))
        return pools

    def _subject(self, row: Row) -> tuple[str, int]:
        return self.merged.label(row, ("batch",)), row.result.budget_bytes

    def pool(self, rows: Iterable[Row], title: str = "", over_seeds: bool = True) -> Pool:
        """These rows, those of several seeds as one entry. Names leave out what all rows share."""
        members: dict[Any, list[Row]] = {}
        for row in rows:
            members.setdefault(self._subject(row) if over_seeds else row, []).append(row)
        seeds = [{row.result.seed for row in same} for same in members.values()]
        most = max(seeds, key=lambda of_entry: (len(of_entry), sorted(of_entry)))
        axes = ("batch",) if over_seeds and len(most) > 1 else AXES
        labels = [self.merged.label(same[0], axes).split(SEPARATOR) for same in members.values()]
        shared = set.intersection(*(set(parts[1:]) for parts in labels))
        entries, left_out = {}, []
        for same, of_entry, (policy, *rest) in zip(members.values(), seeds, labels, strict=True):
            name = SEPARATOR.join([policy, *(part for part in rest if part not in shared)])
            if over_seeds and of_entry != most:
                left_out.append(f"{name} at {same[0].result.budget}")
            else:
                entries[same[0]] = Entry(tuple(same), name, self.styles[self.merged.label(same[0], ())])
        reference = [entry for row, entry in entries.items() if row.result.policy == REFERENCE]
        budgets = {budget: [entries[row] for row in of_budget] for budget, of_budget in budgets_of(entries).items()}
        return Pool(title, reference, budgets, left_out)

    def each(self, pools: Sequence[Pool], make: Callable[[Pool], list[Markup]]) -> Blocks:
        """The blocks of every pool, under its title where there are several; None without pools."""
        return [self.ui.pools([(pool, make(pool)) for pool in pools])] if pools else None

    def table(
        self, caption: str, entries: Sequence[Entry], columns: Iterable[Column], best: Sequence[Entry] = (),
        shaded: bool = False,
    ) -> Markup:  # fmt: skip
        """A line for every entry: policy, budget, and the columns that any entry has a figure for; the first of these
        is bold in the best."""
        shown = tables.measured(columns, [row.result for entry in entries for row in entry.rows])
        lines = [
            [
                Cell(entry.name, entry.name, entry.style), Cell(entry.result.budget, entry.result.budget_bytes),
                *(entry.cell(column, place == 0 and entry in best) for place, column in enumerate(shown)),
            ]
            for entry in entries
        ]  # fmt: skip
        return self.cells(caption, ["policy", "budget", *(column.title for column in shown)], lines, shaded=shaded)

    def cells(
        self, caption: str, titles: Sequence[str], lines: Sequence[Sequence[Cell]], *, sortable: bool = True,
        shaded: bool = False,
    ) -> Markup:  # fmt: skip
        """A table; shades are of the figures above 0, on a logarithmic scale."""
        figures = [cell.value for line in lines for cell in line if isinstance(cell.value, float) and cell.value > 0]
        if shaded and len(set(figures)) > 1:
            tints = charts.Axis(min(figures), max(figures), {}, log=True)
            shades: dict[Any, float] = {figure: tints.at(figure) for figure in figures}
            lines = [[cell._replace(shade=shades.get(cell.value)) for cell in line] for line in lines]
        markup: Markup = self.ui.table(caption, titles, lines, sortable)
        return markup


def mib(count: float) -> str:
    """Bytes in MiB, with the unit."""
    return f"{count / 2**20:,.3f} MiB"


def scale_names(row: ResultRow) -> list[str]:
    """Short names of scales: the side of square ones."""
    return [str(h) if t == 1 and h == w else f"{h}x{w}" if t == 1 else f"{t}x{h}x{w}" for t, h, w in row.schedule]
