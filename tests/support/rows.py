"""Rows and files of results that are whole, for tests that change a field or two."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec

from heatkv.profiling.results.row import ResultRow

LEDGERS: dict[str, Any] = {
    "process": "own", "weights_bytes": 5000,
    "planned": {"cache_bytes": 900, "budget_bytes": 1000},
    "arena": {"cache_bytes": 900, "index_bytes": 20, "workspace_bytes": 30},
    "tensors": {"peak_bytes": {"opened": 1000, "drawing": 2000, "decode": 1500}, "arena_bytes": 900},
    "host": {"source": "VmHWM", "most_bytes": 10**6},
}  # fmt: skip
ROW: dict[str, Any] = {
    "model": "toy", "model_fingerprint": "f", "policy": "heatkv", "settings": {"sink_scales": 3}, "budget": "10%",
    "rows": 2, "batch": 1, "seed": 0, "dtype": "float32", "storage": "float32", "attention": "ragged",
    "schedule": [[1, 1, 1], [1, 2, 2]], "draws": 1, "comparison": "c", "measurement": "m",
    "budget_bytes": 1000, "planned_bytes": 900, "allocated_bytes": 900, "full_bytes": 9000, "current_bytes": 10,
    "index_bytes": 20, "workspace_bytes": 30, "timeline_bytes": [[0, 900], [900, 0]], "under_used": False,
    "had_no_effect": False,
}  # fmt: skip
FILE: dict[str, Any] = {
    "format": "heatkv-results", "version": 1,
    "environment": {
        "device": "cpu", "device_name": "a", "threads": 1, "deterministic": False, "system": "x",
        "versions": {"torch": "2.13"},
    },
    "sampling": {"cfg": 3.0}, "request": {"seed": 0, "seeds": [0], "samples_digest": "s"},
}  # fmt: skip


def row_data(**changes: Any) -> dict[str, Any]:
    """A row as results.json has it; of memory, times and fidelity nothing is measured."""
    return copy.deepcopy(ROW | changes)


def row(**changes: Any) -> ResultRow:
    """The same as it is read."""
    return replace(msgspec.convert(row_data(**changes), ResultRow))


def write_file(folder: Path, rows: Any, name: str = "results.json", **changes: Any) -> Path:
    """A results.json with these rows."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(json.dumps(FILE | {"rows": rows} | changes))
    return path
