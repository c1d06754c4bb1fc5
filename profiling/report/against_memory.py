"""What charts of a figure against bytes share: points, lines named at their ends, the axis of bytes, and the words."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from heatkv.profiling.report import figures
from heatkv.profiling.report.old_merging import EQUAL_BYTES, Row
from heatkv.profiling.report.reporting import Report


@dataclass(frozen=True)
class Point:
    """A point of a chart: bytes held against a figure of a row, with the range around it."""

    row: Row
    held: float | None
    value: float | None
    around: tuple[float, float] | None
    tip: str


def series(
    report: Report, points: Iterable[Point], names: Mapping[Row, str], front: Collection[Row]
) -> list[figures.Line]:  # fmt: skip
    """A line for every name, its points by bytes held. Of very many only some are named in the chart: those with most
    points on the front first, then those that come down to the least value."""
    of_names: dict[str, list[tuple[float, float, Point]]] = {}
    for point in points:
        if point.held and point.value is not None:
            of_names.setdefault(names[point.row], []).append((point.held / 2**20, point.value, point))
    order = sorted(
        of_names,
        key=lambda name: (
            -sum(point.row in front for *_, point in of_names[name]), min(value for _, value, _ in of_names[name])
        ),
    )  # fmt: skip
    named = set(order[: figures.MOST_NAMED])
    lines = []
    for name, entries in of_names.items():
        entries.sort(key=lambda entry: entry[:2])
        lines.append(
            figures.Line(
                name, report.style(entries[0][2].row), tuple(entry[:2] for entry in entries),
                tuple(point.around or (value, value) for _, value, point in entries),
                tuple(point.tip for *_, point in entries), name in named,
            )
        )  # fmt: skip
    return lines


def unnamed(lines: Sequence[figures.Line]) -> list[str]:
    """A caption where not all lines are named."""
    count = sum(line.named for line in lines)
    if count == len(lines):
        return []
    return [f"Of {len(lines)} policies {count} are named: those on the front, then the lowest. The table has them all."]


def memory_axis(rows: Iterable[Row]) -> figures.Axis:
    """Bytes held on a logarithmic axis, with a tick at every budget."""
    places = {}
    for row in rows:
        room = row.number("budget_bytes")
        if room:
            places[room / 2**20] = f"{row.budget}\n{room / 2**20:.3g}"
    return figures.Axis("budget, and its MiB", True, figures.share_ticks(places))


EQUALS = f"bytes within {EQUAL_BYTES:.0%} of each other count as equal"


def at_budgets(names: Mapping[Row, str], rows: Iterable[Row]) -> str:
    """The rows in words, each policy once."""
    of_names: dict[str, list[str]] = {}
    for row in rows:
        of_names.setdefault(names[row], []).append(row.budget)
    texts = [f"{name} at {', '.join(budgets)}" for name, budgets in of_names.items()]
    more = len(texts) - figures.MOST_NAMED
    return "; ".join(texts[: figures.MOST_NAMED]) + (f"; and {more} more" if more > 0 else "")
