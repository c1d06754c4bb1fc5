"""`heatkv report`: result folders as one page to look at, with what compares between them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Group
from rich.table import Table

from heatkv.cli.options import AsJson
from heatkv.cli.output import make_folder, progress, say, show
from heatkv.errors import FormatError

if TYPE_CHECKING:
    from heatkv.profiling.report.page import Written


def report(
    *,
    folders: Annotated[list[Path], typer.Argument(metavar="DIR...", help="folders of `heatkv compare` or `profile`")],
    out: Annotated[
        Path | None, typer.Option("--out", help="folder to write to; default: the folder itself, if it is one")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """One page of one or several result folders, also of different machines: charts, tables, plans, pictures.

    Fidelity is ranked among what was measured on the same weights and samples, times among what was timed in turns.

    Example: heatkv report results/laptop results/server --out results/both
    """
    if out is None and len(folders) > 1:
        raise FormatError(f"{len(folders)} folders make a report of their own; say where to write it with --out DIR")
    # read before --out is made, so that a refusal leaves no folder behind
    from heatkv.profiling.report.old_merging import merge

    merge(folders)
    written = draw_report(folders, folders[0] if out is None else make_folder(out))
    show(Group(*_tables(written.data)), as_json, written.data)
    say(f"written: {', '.join(str(path) for path in written.files)}")


def draw_report(folders: list[Path], out: Path) -> Written:
    """Write a report, with progress."""
    from heatkv.profiling.report.page import write_report

    with progress("drawing the report"):
        return write_report(folders, out)


def _tables(data: dict[str, Any]) -> list[Table]:
    """What ranks together, as on the page; means over seeds first."""
    several = len(data["sources"]) > 1
    tables = []
    for family in data["over_seeds"]:
        rows = [(budget, row) for budget, of_budget in family["budgets"].items() for row in of_budget]
        title = ", ".join(filter(None, [f"KL over the seeds {', '.join(map(str, family['seeds']))}", family["of"]]))
        told = {"mean KL": "kl", "SD": "sd"}
        tables.append(_table(title, rows, several, {
            **{name: [f"{row[field]:.4f}" for _, row in rows] for name, field in told.items()},
            "range": [f"{low:.4f} - {high:.4f}" for _, row in rows for low, high in [row["range"]]],
        }))  # fmt: skip
    for group in data["fidelity"]:
        rows = [(budget, row) for budget, of_budget in group["budgets"].items() for row in of_budget]
        title = ", ".join(filter(None, ["KL, the least first", group["of"]]))
        table = _table(title, rows, several, {"KL": [f"{row['kl']:.4f}" for _, row in rows]})
        if group["also"]:
            table.caption = f"the same at {', '.join(group['also'])}"
        tables.append(table)
    for group in data["latency"]:
        rows = [(row["budget"], row) for row in group["ranking"]]
        shares = ["-" if row["of_full"] is None else f"{row['of_full']:.2f}" for _, row in rows]
        medians = [f"{row['median_ms']:.1f}" for _, row in rows]
        title = f"time, the least first, {group['of']}"
        table = _table(title, rows, several, {"median ms": medians, "of full cache": shares}, sections=False)
        if group["busy"]:
            table.caption = f"the machine was busy ({'; '.join(group['busy'])}): times are too long and spread"
        tables.append(table)
    return tables


def _table(
    title: str, rows: list[tuple[str, dict[str, Any]]], several: bool, figures: dict[str, list[str]],
    sections: bool = True,
) -> Table:  # fmt: skip
    """A line for every row, told by policy, budget, and what else tells it apart from others of its folder."""
    axes = [axis for axis in ("batch", "seed") if any(axis in row for _, row in rows)]
    table = Table(title=title)
    for name in ("policy", "budget", *axes, *(["of"] if several else []), *figures):
        table.add_column(name, justify="right" if name in figures or name in axes else "left")
    for place, (budget, row) in enumerate(rows):
        if sections and place and budget != rows[place - 1][0]:
            table.add_section()
        place_of_row = [str(row.get(axis, "")) for axis in axes] + ([row["source"]] if several else [])
        table.add_row(row["policy"], budget, *place_of_row, *(column[place] for column in figures.values()))
    return table
