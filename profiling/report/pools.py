"""What sections of a report are made of: rows as entries whose figures compare, their names, styles and tables."""

from __future__ import annotations

import math
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
from heatkv.profiling.report.tables import Column, look_up
from heatkv.profiling.results.comparable import REFERENCE
from heatkv.profiling.results.merging import SEPARATOR, Group, Merged, Row, budgets_of
from heatkv.profiling.results.row import ResultRow


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
        values = self.values(column) if len(self.rows) > 1 else (column is tables.KL and self.result.kl_of_draws) or ()
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
            moment = re.sub(r"(?<=\d)T([\d:]{8})\S*", r" \1", ", ".join(shared))
            title = f"{moment} ({', '.join(folders)})" if self.several else moment
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
        markup: Markup = self.ui.legend({entry.style: entry.name for entry in entries}.items())
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
    """Bytes in MiB, with the unit."""
    return f"{count / 2**20:,.3f} MiB"


def scale_names(row: ResultRow) -> list[str]:
    """Short names of scales: the side of square ones."""
    return [str(h) if t == 1 and h == w else f"{h}x{w}" if t == 1 else f"{t}x{h}x{w}" for t, h, w in row.schedule]
