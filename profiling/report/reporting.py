"""What the sections of a report share: the merged results, names and styles of series, and the figures that rank."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from heatkv.core.schedule import ScaleSchedule
from heatkv.profiling.report import figures
from heatkv.profiling.report.blocks import Block, Cell, Fold, Heading, Key, Legend, mib
from heatkv.profiling.report.figures import Style
from heatkv.profiling.report.old_merging import AXES, SEPARATOR, Group, Merged, Row
from heatkv.profiling.report.over_seeds import Family, families


def kl_of(row: Row) -> float | None:
    """KL in nats per token."""
    return row.number("kl")


def median_of(row: Row) -> float | None:
    """Median time in ms."""
    return row.time().get("median")


def held_of(row: Row) -> float | None:
    """Bytes of the arena."""
    return row.held_bytes


@dataclass(frozen=True, eq=False)
class Report:
    """What sections are made of."""

    merged: Merged

    @cached_property
    def _styles(self) -> dict[str, Style]:
        """By label without batch and seed, which have charts of their own: a policy has the same colour in all charts,
        and in every folder a marker of its own."""
        families: dict[str, dict[str, None]] = {}
        for row in sorted(self.merged.rows, key=lambda row: row.is_reference):
            families.setdefault(row.policy, {})[self.merged.label(row, ())] = None
        return figures.styles({policy: list(labels) for policy, labels in families.items()})

    def style(self, row: Row) -> Style:
        return self._styles[self.merged.label(row, ())]

    def name(self, row: Row, text: str | None = None) -> Cell:
        """The policy of a row as a cell: its label, or a shorter text."""
        told = self.merged.label(row) if text is None else text
        return Cell(told, told, style=self.style(row))

    def short_labels(self, rows: Iterable[Row], axes: Sequence[str] = AXES) -> dict[Row, str]:
        """Labels for one chart: what all of its rows share, but for the policy, is left out; of batch and seed those
        in `axes` are told."""
        parts = {row: self.merged.label(row, axes).split(SEPARATOR) for row in rows}
        shared = set.intersection(*(set(of_row[1:]) for of_row in parts.values())) if parts else set()
        return {
            row: SEPARATOR.join([of_row[0], *(part for part in of_row[1:] if part not in shared)])
            for row, of_row in parts.items()
        }

    def legend(self, rows: Iterable[Row]) -> Legend:
        """The styles of the rows of one chart: of many only the first ones."""
        names = self.short_labels(rows, ())
        keys = {name: Key(name, self.style(row)) for row, name in names.items()}
        shown = list(keys.values())[: figures.MOST_NAMED]
        more = [Key(f"and {len(keys) - len(shown)} more, in the table")] if len(keys) > len(shown) else []
        return Legend((*shown, *more))

    @property
    def several(self) -> bool:
        return len(self.merged.sources) > 1

    @cached_property
    def families(self) -> tuple[Family, ...]:
        return families(self.merged)

    @property
    def main_family(self) -> Family | None:
        """The one that most rows are in."""
        return max(self.families, key=lambda family: family.size, default=None)

    @property
    def main_group(self) -> Group | None:
        """The largest group whose fidelity compares."""
        return max(self.merged.fidelity_groups, key=lambda group: len(group.rows), default=None)


def heading(report: Report, group: Group, groups: Sequence[Group]) -> list[Block]:
    """What sets a group apart, where there are several."""
    return [Heading(_heading(report, group))] if len(groups) > 1 else []


def _heading(report: Report, group: Group) -> str:
    folders = ", ".join(source.label for source in group.sources)
    return f"{group.title} ({folders})" if report.several else group.title


_MOST_OPEN = 3
"""Groups that are shown one under the other; more are folded."""


def apart(report: Report, groups: Sequence[Group], make: Callable[[int, Group], list[Block]]) -> list[Block]:
    """The blocks of every group under a heading of its own; of many groups all but the first are folded."""
    blocks: list[Block] = []
    for index, group in enumerate(groups):
        made = make(index, group)
        if len(groups) > _MOST_OPEN:
            blocks.append(Fold(_heading(report, group), tuple(made), open=index == 0))
        else:
            blocks += [*heading(report, group, groups), *made]
    return blocks


def scale_names(schedule: ScaleSchedule) -> list[str]:
    """Short names: the side of square scales."""
    return [str(h) if t == 1 and h == w else f"{h}x{w}" if t == 1 else f"{t}x{h}x{w}" for t, h, w in schedule.scales]


def under(names: Sequence[str]) -> tuple[str, ...]:
    """What stands under narrow blocks: names of more than a side give way to the number of the scale."""
    return tuple(names) if all("x" not in name for name in names) else tuple(str(s) for s in range(len(names)))


def of_cache(budget: str) -> str:
    """The beginning of a sentence about a budget."""
    return f"With {budget} of the cache" if budget.endswith("%") else f"Within {budget}"


def listed(names: Iterable[str]) -> str:
    """Names in words."""
    *others, last = names
    return f"{', '.join(others)} and {last}" if others else last


def broken_promises(row: Row) -> list[str]:
    """What a row's bytes are that they must not be, in words."""
    allowed, planned, allocated = (row.number(f"{name}_bytes") for name in ("budget", "planned", "allocated"))
    told = []
    if allocated is not None and planned is not None and allocated != planned:
        told.append(f"allocated and planned differ by {_difference(allocated - planned)}")
    for name, count in (("allocated", allocated), ("planned", planned)):
        if count is not None and allowed is not None and count > allowed:
            told.append(f"{name} is above the budget by {_difference(count - allowed)}")
    return told


def _difference(count: float) -> str:
    """Bytes with what they are in MiB, where these are more than a few."""
    return f"{abs(count):,.0f} bytes" + (f" ({mib(abs(count))} MiB)" if abs(count) >= 2**17 else "")
