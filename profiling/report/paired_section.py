"""The section of paired comparisons: how far every policy's KL is from that of one of them, on the same images."""

from __future__ import annotations

from typing import Any

from heatkv.profiling.report import bar_figures
from heatkv.profiling.report.bar_figures import MOST_ROWS, Difference
from heatkv.profiling.report.blocks import Block, Cell, Chart, Section, Table, number_cell
from heatkv.profiling.report.figures import Style
from heatkv.profiling.report.old_merging import Group, Row, budgets_of
from heatkv.profiling.report.reporting import Report, apart, kl_of


def paired(report: Report) -> Section | None:
    """Differences with their bootstrap intervals; None where no row was compared in pairs."""
    groups = report.merged.paired_groups
    if not groups:
        return None

    def of_group(index: int, group: Group) -> list[Block]:
        budgets = {
            budget: sorted(rows, key=lambda row: (_versus(row)["difference"], report.merged.label(row)))
            for budget, rows in budgets_of(group.rows).items()
        }
        if not budgets:
            return []
        names = report.short_labels(group.rows)
        panels = {
            f"{budget}, against {_bases(rows)}": [
                _difference(names[row], report.style(row), row) for row in rows[:MOST_ROWS]
            ]
            for budget, rows in budgets.items()
        }  # fmt: skip
        label = "Paired differences of the KL with their intervals; the table beside has the figures."
        drawing = bar_figures.forest(f"paired-{index}", label, panels, "difference of the KL, nats per token")
        captions = list(_captions(group))
        if any(len(rows) > MOST_ROWS for rows in budgets.values()):
            captions.append(f"Drawn are the {MOST_ROWS} least of every budget; the table has all.")
        return [Chart(drawing, tuple(captions)), _table(report, names, budgets)]

    blocks = apart(report, groups, of_group)
    return Section(
        "paired", "Paired", "Differences on the same images",
        "The KL of a policy less that of the base at the same budget, image by image. What images have in common "
        "cancels, so that smaller differences show than two separate figures would tell apart.", blocks,
    )  # fmt: skip


def _versus(row: Row) -> dict[str, Any]:
    found: dict[str, Any] = row.told["versus"]
    return found


def _bases(rows: list[Row]) -> str:
    """Whom the rows are compared with."""
    return " or ".join(dict.fromkeys(str(_versus(row)["policy"]) for row in rows))


def _difference(name: str, style: Style, row: Row) -> Difference:
    value, (low, high) = _versus(row)["difference"], _versus(row)["interval"]
    text = f"{value:+.4f} [{low:+.4f}, {high:+.4f}]"
    return Difference(name, style, value, low, high, text)


def _captions(group: Group) -> tuple[str, ...]:
    def listed(name: str, form: str) -> str:
        found = {float(told) for row in group.rows if (told := _versus(row).get(name)) is not None}
        return " or ".join(format(value, form) for value in sorted(found)) or "untold"

    batches = any("batch" in source.axes for source in group.sources)
    return (
        f"Points are means over {listed('images', 'g')} images, bars their bootstrap intervals (percentiles, with a "
        f"confidence of {listed('confidence', '.0%')}), in nats per token. The base, "
        f"{_bases(list(group.rows))}, is the line at 0: left of it a policy is closer to the full cache than the base "
        "at the same budget, right of it further away. Every panel has an axis of its own.",
        "Where a bar crosses the line, these images do not tell the two apart. Images are the samples: the interval "
        "says nothing of other draws of a random policy, or of other calibrations."
        + (" Batch sizes share these images: the first of them stands for all." if batches else ""),
    )


def _verdict(row: Row) -> str:
    low, high = _versus(row)["interval"]
    base = _versus(row)["policy"]
    return f"closer than {base}" if high < 0 else f"further than {base}" if low > 0 else "not told apart"


def _table(report: Report, names: dict[Row, str], budgets: dict[str, list[Row]]) -> Table:
    lines = []
    for budget, rows in budgets.items():
        for row in rows:
            told = _versus(row)
            low, high = told["interval"]
            lines.append((
                report.name(row, names[row]), Cell(budget, row.number("budget_bytes")),
                Cell(told["policy"], told["policy"]),
                number_cell(kl_of(row), ".4f"), number_cell(told["difference"], "+.4f"), number_cell(low, "+.4f"),
                number_cell(high, "+.4f"), number_cell(told.get("confidence"), ".0%"),
                number_cell(told.get("images"), "g"), Cell(_verdict(row)),
            ))  # fmt: skip
    columns = (
        "policy", "budget", "base", "its KL, nats", "less the base's, nats", "from, nats", "to, nats", "confidence",
        "images", "on these images",
    )  # fmt: skip
    caption = "KL per token less that of the base at the same budget, mean over the same images, with its interval"
    return Table(caption, columns, tuple(lines))
