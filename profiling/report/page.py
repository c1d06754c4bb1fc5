"""The report of result folders: report.html, one file that needs nothing else, and report.md and report.json beside it.

All three are made of what the folders hold, and the same folders, in whatever order, give the same bytes.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from heatkv.core.io import check_header, opened, read_json, write_json, write_text
from heatkv.errors import FormatError
from heatkv.profiling.report import figures
from heatkv.profiling.report.blocks import Block, Cell, Chart, Fold, Heading, Note, Section, Table
from heatkv.profiling.report.fidelity_sections import headline
from heatkv.profiling.report.latency_section import load_reasons, of_full
from heatkv.profiling.report.old_merging import Group, Merged, Row, budgets_of, merge, pareto_front, ranked
from heatkv.profiling.report.over_seeds import Entry, Family, families
from heatkv.profiling.report.reporting import Report, held_of, kl_of, median_of
from heatkv.profiling.report.sections import SECTIONS

FORMAT, VERSION = "heatkv-report", 1
FILES = ("report.html", "report.md", "report.json")
_HTML_MARK, _MD_MARK = '<meta name="generator" content="HeatKV">', "<!-- generator: HeatKV -->"

_MARKER_PATHS = {
    "o": "M10 6A4 4 0 1 1 2 6A4 4 0 1 1 10 6z", "s": "M2.5 2.5H9.5V9.5H2.5z", "^": "M6 1.5L10.5 10H1.5z",
    "D": "M6 1L11 6L6 11L1 6z", "v": "M6 10.5L10.5 2H1.5z",
    "P": "M4.5 1.5H7.5V4.5H10.5V7.5H7.5V10.5H4.5V7.5H1.5V4.5H4.5z",
    "X": "M1.5 3.5L3.5 1.5L6 4L8.5 1.5L10.5 3.5L8 6L10.5 8.5L8.5 10.5L6 8L3.5 10.5L1.5 8.5L4 6z",
    "p": "M6 1L11 4.7L9.1 10.5H2.9L1 4.7z",
}  # fmt: skip


@dataclass(frozen=True)
class Written:
    """The files of a report, and what report.json holds."""

    files: tuple[Path, ...]
    data: dict[str, Any]


def write_report(folders: Sequence[Path], out: Path) -> Written:
    """Write the report of result folders into the folder `out`, which exists.

    Raises FormatError for a folder without results of `heatkv compare` or `heatkv profile`, for damaged files, for
    results of several models, and when a file to be replaced is no report; other HeatKVErrors for damaged plans.
    """
    check_report_replaceable(out)
    merged = merge(folders)
    report = Report(merged)
    sections = [section for make in SECTIONS if (section := make(report)) is not None]
    data = report_data(merged)
    for name, text in ((FILES[0], as_html(report, sections)), (FILES[1], as_markdown(report, sections))):
        write_text(out / name, text)
    write_json(out / FILES[2], data, indent=1)
    return Written(tuple(out / name for name in FILES), data)


def check_report_replaceable(out: Path) -> None:
    """Raise FormatError for a file in the place of a report that is none of ours."""
    for name, mark in zip(FILES[:2], (_HTML_MARK, _MD_MARK), strict=True):
        path = out / name
        if path.exists():
            with opened(path) as file:
                start = file.read(1000)
            if mark.encode() not in start:
                raise FormatError(f"{path} is no report of HeatKV; move it away or write to another folder (--out)")
    if (path := out / FILES[2]).exists():
        try:
            check_header(read_json(path), path, FORMAT, VERSION)
        except FormatError as error:
            raise FormatError(f"{error}; move it away or write to another folder (--out)") from error


# --------------------------------------------------------------------------------------------------------- JSON


def report_data(merged: Merged) -> dict[str, Any]:
    """The rows of all folders, with what compares: rankings by KL, within a budget, and by time, of what was timed in
    turns."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "model": merged.model,
        "sources": [
            {
                "label": source.label, "machine": merged.machines[source.machine], "environment": source.environment,
                "sampling": source.sampling, "request": source.request,
            }
            for source in merged.sources
        ],
        "over_seeds": [_seeds_data(family) for family in families(merged) if family.entries],
        "fidelity": [_fidelity_data(group) for group in merged.fidelity_groups],
        "latency": [_latency_data(merged, group) for group in merged.timing_groups],
        "rows": [{"source": row.source.label, **row.told} for row in merged.rows],
    }  # fmt: skip


def _named(row: Row, **figures: float | None) -> dict[str, Any]:
    place = {axis: row.told.get(axis) for axis in row.source.axes}
    return {"source": row.source.label, "policy": row.policy, "budget": row.budget, **place, **figures}


def _seeds_data(family: Family) -> dict[str, Any]:
    def named(entry: Entry) -> dict[str, Any]:
        place = {axis: entry.first.told.get(axis) for axis in entry.source.axes if axis != "seed"}
        return {
            "source": entry.source.label, "policy": entry.policy, "budget": entry.first.budget, **place,
            "kl": entry.kl, "sd": entry.sd, "range": [min(entry.kls), max(entry.kls)], "bytes": entry.held_bytes,
        }  # fmt: skip

    return {
        "of": family.title,
        "seeds": family.seeds,
        "budgets": {
            budget: [named(entry) for entry in ranked(entries, lambda entry: entry.kl)]
            for budget, entries in family.entries.items()
        },
    }


def _fidelity_data(group: Group) -> dict[str, Any]:
    budgets = budgets_of(group.rows)
    positive = [row for rows in budgets.values() for row in rows if (kl_of(row) or 0) > 0]
    return {
        "of": group.title,
        "also": list(group.also),
        "sources": [source.label for source in group.sources],
        "budgets": {
            budget: [_named(row, kl=kl_of(row)) for row in ranked(rows, kl_of)] for budget, rows in budgets.items()
        },
        "front": [_named(row, bytes=held_of(row), kl=kl_of(row)) for row in pareto_front(positive, held_of, kl_of)],
    }  # fmt: skip


def _latency_data(merged: Merged, group: Group) -> dict[str, Any]:
    front = pareto_front(group.rows, held_of, median_of)
    return {
        "of": group.title,
        "machine": merged.machines[group.rows[0].source.machine],
        "sources": [source.label for source in group.sources],
        "busy": load_reasons(group.rows),
        "ranking": [
            _named(row, median_ms=median_of(row), of_full=of_full(group, row)) for row in ranked(group.rows, median_of)
        ],
        "front": [_named(row, bytes=held_of(row), median_ms=median_of(row)) for row in front],
    }


# --------------------------------------------------------------------------------------------------------- HTML


def as_html(report: Report, sections: Sequence[Section]) -> str:
    """The page."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["whole_words"] = _whole_words
    environment.globals["marker"] = lambda style: _MARKER_PATHS[figures.MARKERS[style.marker]]
    folder = resources.files("heatkv.profiling.report").joinpath("templates")
    style, script = (folder.joinpath(name).read_text(encoding="utf-8") for name in ("report.css", "report.js"))
    style, script = _squeezed(style), _squeezed(script)
    template = environment.from_string(folder.joinpath("report.html.jinja").read_text(encoding="utf-8"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    text = template.render(
        title=f"{report.merged.model}: {headline(report)}",
        sections=sections,
        sources=[source.label for source in report.merged.sources],
        style=Markup(style),
        script=Markup(script),
        script_digest=digest,
        generator=Markup(_HTML_MARK),
    )
    return re.sub(r"\n\s*", "\n", text)


def _whole_words(text: str) -> Markup:
    """Names with hyphens stay on one line."""
    whole = Markup('<span class="whole">{}</span>')
    return Markup(" ").join(whole.format(word) if "-" in word else word for word in text.split(" "))


def _squeezed(style: str) -> str:
    return re.sub(r"\n\s*", "\n", re.sub(r"/\*.*?\*/", "", style, flags=re.DOTALL)).strip()


# ----------------------------------------------------------------------------------------------------- Markdown


def as_markdown(report: Report, sections: Sequence[Section]) -> str:
    """Headings, tables, notes and titles of folds over tables; charts and pictures are in the page only."""
    parts = [_MD_MARK, f"# {_escaped(headline(report))}"]
    for section in sections:
        if section.id != "summary":
            parts.append(f"## {_escaped(section.title)}")
        parts.append(_escaped(section.lead))
        parts += _markdown_blocks(section.blocks)
    parts.append(f"Charts, plans and pictures are in [{FILES[0]}]({FILES[0]}).")
    return "\n\n".join(parts) + "\n"


def _markdown_blocks(blocks: Sequence[Block]) -> list[str]:
    parts = []
    for block in blocks:
        if isinstance(block, Table):
            parts.append(f"**{_escaped(block.caption)}**\n\n{_markdown_table(block)}")
        elif isinstance(block, Note) and not block.of_drawing:
            parts.append(_escaped(block.text))
        elif isinstance(block, Heading):
            parts.append(f"### {_escaped(block.text)}")
        elif isinstance(block, Fold):
            inner = _markdown_blocks(block.blocks)
            alone = len(block.blocks) == 1 and isinstance(block.blocks[0], Table)  # which has a title of its own
            parts += inner if alone or not inner else [f"**{_escaped(block.title)}**", *inner]
        elif isinstance(block, Chart):
            parts += _markdown_blocks(block.beside)
    return parts


def _markdown_table(table: Table) -> str:
    def line(texts: Sequence[str]) -> str:
        return f"| {' | '.join(texts)} |"

    def text(cell: Cell) -> str:
        escaped = _escaped(cell.text)
        return f"**{escaped}**" if cell.kind == "best" else escaped

    rules = ["---:" if right else "---" for right in table.numeric]
    return "\n".join([
        line([_escaped(name) for name in table.columns]), line(rules),
        *(line([text(cell) for cell in row]) for row in table.rows),
    ])  # fmt: skip


def _escaped(text: str) -> str:
    """Text that Markdown shows as it is."""
    return re.sub(r"([\\`*_\[\]<>|#~&])", r"\\\1", text)
