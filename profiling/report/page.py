"""The report of result folders: report.html, one file that needs nothing else. The same folders, in whatever order,
give the same bytes."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from heatkv.core.io import opened, write_text
from heatkv.errors import FormatError
from heatkv.profiling.report import pools, sections, tables
from heatkv.profiling.report.artefact_sections import pictures, plans, scas
from heatkv.profiling.report.pools import Blocks, Report
from heatkv.profiling.results.merging import Merged, merge

NAME = "report.html"
_MARK = b'<meta name="generator" content="HeatKV">'
SECTIONS: dict[str, Callable[[Report], Blocks]] = {
    "summary": sections.summary, "fidelity": sections.fidelity, "paired": sections.paired,
    "scales": sections.per_scale, "latency": sections.latency, "memory": sections.memory, "scas": scas,
    "plans": plans, "pictures": pictures, "rows": sections.all_figures, "environment": sections.environment,
}  # fmt: skip
"""In their order; `words` in the templates has the title of each, and what a reader must know."""


def write_report(folders: Sequence[Path], out: Path) -> Path:
    """Write the report of result folders into the folder `out`, which exists: its path.

    Raises FormatError for a folder without results, for damaged files, for results of several models, and where the
    file to be replaced is no report; other HeatKVErrors for damaged plans.
    """
    check_report_replaceable(out)
    write_text(out / NAME, render(merge(folders)))
    return out / NAME


def check_report_replaceable(out: Path) -> None:
    """Raise FormatError for another file in the place of the report."""
    path = out / NAME
    if path.exists():
        with opened(path) as file:
            if _MARK not in file.read(1000):
                raise FormatError(f"{path} is no report of HeatKV; move it away or write to another folder")


def render(merged: Merged) -> str:
    """The page of merged results."""
    loader = PackageLoader("heatkv.profiling.report")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.globals |= {"tables": tables, "mib": pools.mib, "zip": zip}
    ui: Any = environment.get_template("blocks.html.jinja").module
    report = Report(merged, ui)
    style, script = (loader.get_source(environment, name)[0].strip() for name in ("report.css", "report.js"))
    return environment.get_template("report.html.jinja").render(
        headline=ui.headline(sections.answer(report), merged.model),
        sections={id: blocks for id, make in SECTIONS.items() if (blocks := make(report)) is not None},
        merged=merged,
        words=ui.words,
        style=Markup(style),
        script=Markup(script),
        script_digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )
