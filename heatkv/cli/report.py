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
    from heatkv.profiling.html_report import Written


def report(
    *,
    folders: Annotated[list[Path], typer.Argument(metavar="DIR...", help="folders of `heatkv compare` or `profile`")],
    out: Annotated[
        Path | None, typer.Option("--out", help="folder to write to; default: the folder itself, if it is one")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """One page of one or several result folders, also of different machines: charts, tables, plans, pictures.

    Fidelity is ranked among what was measured on the same weights and samples, times within one machine only.

    Example: heatkv report results/laptop results/server --out results/both
    """
    if out is None and len(folders) > 1:
        raise FormatError(f"{len(folders)} folders make a report of their own; say where to write it with --out DIR")
    # read before --out is made, so that a refusal leaves no folder behind
    from heatkv.profiling.merging import merge

    merge(folders)
    written = draw_report(folders, folders[0] if out is None else make_folder(out))
    show(Group(*_tables(written.data)), as_json, written.data)
    say(f"written: {', '.join(str(path) for path in written.files)}")


def draw_report(folders: list[Path], out: Path) -> Written:
    """Write a report, with progress."""
    from heatkv.profiling.html_report import write_report

    with progress("drawing the report"):
        return write_report(folders, out)


def _tables(data: dict[str, Any]) -> list[Table]:
    """What ranks together, as on the page."""
    tables = []
    for group in data["fidelity"]:
        table = Table(title=" ".join(filter(None, ["KL, the least first,", group["of"]])).rstrip(", "))
        for name in ("budget", "policy", "of", "KL"):
            table.add_column(name, justify="right" if name == "KL" else "left")
        for budget, rows in group["budgets"].items():
            table.add_section()
            for row in rows:
                table.add_row(budget, row["policy"], row["source"], f"{row['kl']:.4f}")
        tables.append(table)
    for group in data["latency"]:
        table = Table(title=f"time, the least first, {group['of']}")
        for name in ("policy", "budget", "of", "median ms"):
            table.add_column(name, justify="right" if name == "median ms" else "left")
        for row in group["ranking"]:
            table.add_row(row["policy"], row["budget"], row["source"], f"{row['median_ms']:.1f}")
        tables.append(table)
    return tables
