"""results.json as it is read everywhere: its fields of the kinds they must be, whoever wrote the file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from heatkv.core.checks import shown
from heatkv.core.io import check_header, read_json
from heatkv.errors import FormatError
from heatkv.profiling.results.fields import checked_row

FORMAT, VERSION = "heatkv-results", 1


@dataclass(frozen=True)
class Results:
    """What a results.json holds; `rows` have all known fields of their kinds, or None."""

    environment: dict[str, Any]
    sampling: dict[str, Any]
    request: dict[str, Any]
    rows: tuple[dict[str, Any], ...]


def read_results(path: Path) -> Results:
    """A results.json. Raises FormatError when it is none, or a known field is not of its kind."""
    data = check_header(read_json(path), path, FORMAT, VERSION)
    rows = data.get("rows")
    if not isinstance(rows, list):
        raise FormatError(f"{path} is not a whole {FORMAT} file: its rows are {shown(rows)}, no list of rows")
    parts = {}
    for name in ("environment", "sampling", "request"):
        parts[name] = {} if data.get(name) is None else data[name]
        if not isinstance(parts[name], dict):
            raise FormatError(f"{path} is not a whole {FORMAT} file: its {name} is {shown(parts[name])}, no object")
    return Results(**parts, rows=tuple(checked_row(row, f"{path}, row {index}") for index, row in enumerate(rows)))
