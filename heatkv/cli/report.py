"""`heatkv report`: result folders as one page to look at, with what compares between them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.console import Group

from heatkv.cli.options import AsJson
from heatkv.cli.output import progress, say, show
from heatkv.core.io import make_folder
from heatkv.errors import FormatError


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
    from heatkv.profiling.report.page import write_report
    from heatkv.profiling.report.tables import RESULTS, terminal_table
    from heatkv.profiling.results.merging import merge

    if out is None and len(folders) > 1:
        raise FormatError(f"{len(folders)} folders make a report of their own; say where to write it with --out DIR")
    merged = merge(folders)  # before --out is made, so that a refusal leaves no folder behind
    with progress("drawing the report"):
        path = write_report(folders, folders[0] if out is None else make_folder(out))
    tables = [terminal_table(source.results.rows, RESULTS, source.label) for source in merged.sources]
    show(Group(*tables), as_json, {source.label: msgspec.to_builtins(source.results) for source in merged.sources})
    say(f"written: {path}")
