"""The section of latency: time against memory, ranked within what was timed in turns."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence

from heatkv.profiling.measure.busy import busy_reasons
from heatkv.profiling.report import figures
from heatkv.profiling.report.against_memory import EQUALS, Point, at_budgets, memory_axis, series, unnamed
from heatkv.profiling.report.blocks import Block, Cell, Chart, Note, Section, Table, mib, mib_cell, number_cell
from heatkv.profiling.report.reporting import Report, apart, held_of, listed, median_of
from heatkv.profiling.results.merging import Group, Row, pareto_front, ranked
from heatkv.profiling.results.fields import is_number


def memory_and_time(report: Report) -> Section | None:
    """Time against bytes, for every set of runs that were timed in turns."""
    groups = report.merged.timing_groups
    if not groups:
        return None
    blocks: list[Block] = []
    if len(groups) > 1:
        blocks.append(Note(
            "Only runs that were timed in turns, on one machine and of the same work, stand in one ranking: a machine "
            "is not equally fast at all times. A share of the full cache's time is of the full cache in the same turns."
        ))  # fmt: skip
        blocks += _yardsticks(groups)
        if shares := _shares(report, groups):
            blocks += [*busy(groups), *shares]

    def of_group(index: int, group: Group) -> list[Block]:
        names = report.short_labels(group.rows)
        front = pareto_front(group.rows, held_of, median_of)
        lines = series(
            report,
            [Point(row, row.held_bytes, median_of(row), _quartiles(row), _time_tip(names, row)) for row in group.rows],
            names, set(front),
        )  # fmt: skip
        made: list[Block] = [*busy([group])]
        if lines:
            points = [(x / 2**20, y) for row in front if (x := held_of(row)) and (y := median_of(row)) is not None]
            on_front = f"On the Pareto front: {at_budgets(names, reversed(front))}."
            drawing = figures.line_chart(
                f"latency-{index}", f"Time against memory. {on_front}", lines, points, memory_axis(group.rows),
                figures.Axis("ms per batch"),
            )  # fmt: skip
            captions = (
                "Lower left is better. Median time of drawing one batch, decode included; bars are as long as the "
                "distance of the quartiles. The axis of time need not begin at 0.",
                f"The broad band is the Pareto front: nothing else on it is as fast in as few bytes; {EQUALS}. "
                f"{on_front}",
                "Where bars overlap, so do the times: an order within them says nothing.",
                *unnamed(lines),
            )
            made.append(Chart(drawing, captions))
        return [*made, _time_table(report, group, names, front)]

    blocks += apart(report, groups, of_group)
    return Section(
        "latency", "Latency", "Memory and latency",
        "Times are ranked among runs that were timed in turns, on the same device, threads, system and versions.",
        blocks,
    )  # fmt: skip


def load_reasons(rows: Iterable[Row]) -> list[str]:
    """What speaks for the machine having been busy when these rows were timed."""
    return list(dict.fromkeys(reason for row in rows for reason in busy_reasons(row.timed_on)))


def busy(groups: Sequence[Group]) -> list[Block]:
    """A warning where times of these groups were taken beside other work."""
    rows = [row for group in groups for row in group.rows]
    told = load_reasons(rows)
    if not told:
        return []
    folders = dict.fromkeys(row.source.label for row in rows if busy_reasons(row.timed_on))
    of_folder = "" if len({row.source for row in rows}) == 1 else f" of {listed(folders)}"
    return [
        Note(
            f"The machine was busy before this run{of_folder} ({'; '.join(told)}): times taken beside other work are "
            "too long and spread, and an order among them may be that of the other work.",
            missing=True,
        )
    ]


def _shares(report: Report, groups: Sequence[Group]) -> list[Block]:
    """Times as shares of the full cache's over several rankings, for each machine and work that has some."""
    of_work: dict[tuple[tuple[str, str], ...], list[Group]] = {}
    for group in groups:
        if any(row.is_reference for row in group.rows):
            key = tuple((name, value) for name, value in group.key.items() if name not in ("seed", "timed"))
            of_work.setdefault(key, []).append(group)
    blocks: list[Block] = []
    for together in of_work.values():
        if len(together) < 2:
            continue
        found: dict[tuple[str, str], list[tuple[float, Row]]] = {}
        names = report.short_labels([row for group in together for row in group.rows], ())
        for group in together:
            for row in group.rows:
                if not row.is_reference and (share := of_full(group, row)) is not None:
                    found.setdefault((names[row], row.budget), []).append((share, row))
        lines = tuple(
            (
                report.name(shares[0][1], name), Cell(budget, shares[0][1].number("budget_bytes")),
                number_cell(statistics.fmean(share for share, _ in shares), ".2f"),
                number_cell(min(share for share, _ in shares), ".2f"),
                number_cell(max(share for share, _ in shares), ".2f"), number_cell(len(shares), "g"),
            )
            for (name, budget), shares in sorted(found.items(), key=lambda p: statistics.fmean(s for s, _ in p[1]))
        )  # fmt: skip
        if not lines:
            continue
        row = together[0].rows[0]
        on = f"{row.told.get('rows')} rows, {report.merged.machines[row.source.machine]}"
        columns = ("policy", "budget", "mean share", "least share", "most share", "rankings")
        caption = f"Time as a share of the full cache's in the same turns, over {len(together)} rankings of {on}"
        blocks.append(Table(caption, columns, lines))
    return blocks


def of_full(group: Group, row: Row) -> float | None:
    """A row's time as a share of the full cache's that was timed in the same turns; None where none was."""
    full = [median for other in group.rows if other.is_reference and (median := median_of(other))]
    median = median_of(row)
    return None if median is None or not full else median / full[0]


_YARDSTICK = "matrix_product_1024_fp32_one_thread_ms"
_ALIKE = 1.1
"""Times as long as another that a yardstick may take on a machine that ran alike."""


def _yardsticks(groups: Sequence[Group]) -> list[Block]:
    """A warning where rankings of one machine tell that it ran at different speeds."""
    of_machines: dict[str, dict[tuple[str, float], float]] = {}
    for group in groups:
        for row in group.rows:
            told = row.timed_on.get(_YARDSTICK)
            if is_number(told) and told > 0:
                of_machines.setdefault(row.source.machine, {})[row.source.label, told] = told
    return [
        Note(
            f"A fixed matrix product took {min(took.values()):.1f} to {max(took.values()):.1f} ms in "
            f"the rankings of {listed(dict.fromkeys(label for label, _ in took))}: the machine was not equally fast "
            "in all of them, or they are of two machines that tell the same of themselves. Such times do not compare "
            "well.",
            missing=True,
        )
        for took in of_machines.values() if max(took.values()) > _ALIKE * min(took.values())
    ]  # fmt: skip


def _quartiles(row: Row) -> tuple[float, float] | None:
    time = row.time()
    iqr = time.get("iqr")
    return None if iqr is None else (time["median"] - iqr / 2, time["median"] + iqr / 2)


def _time_tip(names: Mapping[Row, str], row: Row) -> str:
    return f"{names[row]} at {row.budget}: {median_of(row):.1f} ms, {mib(row.held_bytes or 0)} MiB"


def _time_table(report: Report, group: Group, names: Mapping[Row, str], front: Sequence[Row]) -> Table:
    """All rows that were timed in turns, from the fastest on; equally fast ones share a rank."""
    lines, times = [], []
    for row in ranked(group.rows, median_of):
        median = median_of(row)
        times.append(median)
        place = times.index(median) + 1
        lines.append((
            Cell(str(place), place), report.name(row, names[row]), Cell(row.budget, row.number("budget_bytes")),
            number_cell(median, ".1f", "best" if row in front else ""), number_cell(row.time().get("iqr"), ".1f"),
            number_cell(of_full(group, row), ".2f"), mib_cell(row.held_bytes),
        ))  # fmt: skip
    columns = ("rank", "policy", "budget", "median, ms", "IQR, ms", "of full cache", "arena, MiB")
    return Table("Time of one batch, the fastest first; the Pareto front in bold", columns, tuple(lines), 2)
