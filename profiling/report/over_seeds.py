"""Fidelity over several seeds: rows of one policy and budget that differ in their samples alone, as one entry.

A row that has no such others is an entry of its own, so that summaries, charts and tables are made of entries only.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from heatkv.profiling.report.old_merging import Group, Merged, Row, Source, budgets_of


@dataclass(frozen=True, eq=False)
class Entry:
    """Rows of one policy and budget, one of every seed."""

    rows: tuple[Row, ...]

    @property
    def first(self) -> Row:
        return self.rows[0]

    @property
    def policy(self) -> str:
        return self.first.policy

    @property
    def source(self) -> Source:
        return self.first.source

    @property
    def kls(self) -> list[float]:
        """KL in nats per token, by seed."""
        return [kl for row in self.rows if (kl := row.number("kl")) is not None]

    @property
    def kl(self) -> float:
        """Their mean."""
        return statistics.fmean(self.kls)

    @property
    def sd(self) -> float | None:
        """Their standard deviation; None for a single one."""
        return statistics.stdev(self.kls) if len(self.kls) > 1 else None

    @property
    def span(self) -> tuple[float, float] | None:
        """The least and the most over seeds, or over the plans of a policy that draws at random."""
        return (min(self.kls), max(self.kls)) if len(self.kls) > 1 else self.first.spread

    @property
    def top1(self) -> float | None:
        """Mean share of the likeliest codes that stay; None unless all seeds have it."""
        found = [value for row in self.rows if (value := row.number("top1_agreement")) is not None]
        return statistics.fmean(found) if len(found) == len(self.rows) else None

    @property
    def held_bytes(self) -> float | None:
        """Mean bytes of the arena; None unless all seeds have them."""
        found = [held for row in self.rows if (held := row.held_bytes) is not None]
        return statistics.fmean(found) if len(found) == len(self.rows) else None


@dataclass(frozen=True, eq=False)
class Family:
    """Groups of fidelity that differ in their seeds and samples alone. `title` says what sets it apart from others."""

    title: str
    groups: tuple[Group, ...]
    entries: dict[str, list[Entry]]
    """By budget, the largest first: of all seeds that every one of these has, where there are several. Else empty."""

    @property
    def seeds(self) -> list[int]:
        """Those of the entries."""
        first = next((entry for entries in self.entries.values() for entry in entries), None)
        return [] if first is None else [row.seed for row in first.rows if row.seed is not None]

    @property
    def size(self) -> int:
        return sum(len(group.rows) for group in self.groups)


def entries_of(rows: Iterable[Row]) -> dict[str, list[Entry]]:
    """Every row as an entry, by budget."""
    return {budget: [Entry((row,)) for row in of_budget] for budget, of_budget in budgets_of(rows).items()}


def families(merged: Merged) -> tuple[Family, ...]:
    """The fidelity of a report, seeds taken together."""
    found: dict[str, list[Group]] = {}
    for group in merged.fidelity_groups:
        key = {name: value for name, value in group.key.items() if name not in ("seed", "samples")}
        found.setdefault(json.dumps(key), []).append(group)
    return tuple(
        Family("" if len(found) == 1 else _shared_title(groups), tuple(groups), _over_seeds(merged, groups))
        for groups in found.values()
    )


def _shared_title(groups: Sequence[Group]) -> str:
    """What the titles of groups have in common."""
    parts = [group.title.split(", ") for group in groups]
    return ", ".join(part for part in parts[0] if all(part in others for others in parts))


def _over_seeds(merged: Merged, groups: Sequence[Group]) -> dict[str, list[Entry]]:
    """Entries of the seeds of every folder that has several; a policy that lacks one of its folder's is left out, since
    means over other seeds do not compare. Folders of other seeds do not either: those of most seeds are taken."""
    rows = [row for group in groups for row in group.rows]
    seeds: dict[Source, set[int]] = {}
    for row in rows:
        if row.seed is not None:
            seeds.setdefault(row.source, set()).add(row.seed)
    wanted = max(map(sorted, seeds.values()), key=lambda found: (len(found), found), default=[])
    if len(wanted) < 2:
        return {}
    found: dict[str, list[Entry]] = {}
    for budget, of_budget in budgets_of(rows).items():
        of_labels: dict[str, dict[int, Row]] = {}
        for row in of_budget:
            if row.seed is not None:
                of_labels.setdefault(merged.label(row, ("batch",)), {}).setdefault(row.seed, row)
        whole = [Entry(tuple(of[seed] for seed in wanted)) for of in of_labels.values() if set(of) >= set(wanted)]
        if whole:
            found[budget] = whole
    return found
