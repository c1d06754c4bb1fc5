"""What the sections of a report share: the merged results, names and styles of series, and the figures that rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from heatkv.profiling import figures
from heatkv.profiling.blocks import Block, Cell, Heading
from heatkv.profiling.figures import Style
from heatkv.profiling.merging import SEPARATOR, Group, Merged, Row
from heatkv.schedule import ScaleSchedule


def kl_of(row: Row) -> float | None:
    """KL in nats per token."""
    return row.number("kl")


def median_of(row: Row) -> float | None:
    """Median time in ms."""
    return row.time().get("median")


def held_of(row: Row) -> float | None:
    """Bytes of the arena and of corrections."""
    return row.held_bytes


@dataclass(frozen=True, eq=False)
class Report:
    """What sections are made of."""

    merged: Merged

    @cached_property
    def styles(self) -> dict[str, Style]:
        """By label: a policy has the same colour in all charts, and in every folder a marker of its own."""
        families: dict[str, dict[str, None]] = {}
        for row in sorted(self.merged.rows, key=lambda row: row.is_reference):
            families.setdefault(row.policy, {})[self.merged.label(row)] = None
        return figures.styles({policy: list(labels) for policy, labels in families.items()})

    def style(self, row: Row) -> Style:
        return self.styles[self.merged.label(row)]

    def name(self, row: Row) -> Cell:
        """The policy of a row as a cell."""
        return Cell(self.merged.label(row), self.merged.label(row), style=self.style(row))

    def short_labels(self, rows: Sequence[Row]) -> dict[Row, str]:
        """Labels for one chart: what all of its rows share, but for the policy, is left out."""
        parts = {row: self.merged.label(row).split(SEPARATOR) for row in rows}
        shared = set.intersection(*(set(of_row[1:]) for of_row in parts.values())) if parts else set()
        return {
            row: SEPARATOR.join([of_row[0], *(part for part in of_row[1:] if part not in shared)])
            for row, of_row in parts.items()
        }

    @property
    def several(self) -> bool:
        return len(self.merged.sources) > 1

    @property
    def main_group(self) -> Group | None:
        """The largest group whose fidelity compares."""
        return max(self.merged.fidelity_groups, key=lambda group: len(group.rows), default=None)


def heading(group: Group, groups: Sequence[Group]) -> list[Block]:
    """What sets a group apart, where there are several."""
    folders = ", ".join(source.label for source in group.sources)
    return [Heading(f"{group.title} ({folders})")] if len(groups) > 1 else []


def scale_names(schedule: ScaleSchedule) -> list[str]:
    """Short names: the side of square scales."""
    return [str(h) if t == 1 and h == w else f"{h}x{w}" if t == 1 else f"{t}x{h}x{w}" for t, h, w in schedule.scales]


def under(names: Sequence[str]) -> tuple[str, ...]:
    """What stands under narrow blocks: names of more than a side give way to the number of the scale."""
    return tuple(names) if all("x" not in name for name in names) else tuple(str(s) for s in range(len(names)))


def of_cache(budget: str) -> str:
    """The beginning of a sentence about a budget."""
    return f"With {budget} of the cache" if budget.endswith("%") else f"Within {budget}"
