"""results.json as it is read everywhere: its fields of the kinds they must be, whoever wrote the file.

What a row lacks is None, "not measured", and never 0. Fields that this release does not know are left as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from heatkv.checks import shown
from heatkv.errors import FormatError, ScheduleError
from heatkv.files import check_header, read_json
from heatkv.schedule import ScaleSchedule

FORMAT, VERSION = "heatkv-results", 1

_TEXTS = (
    "comparison",
    "model",
    "model_fingerprint",
    "policy",
    "budget",
    "dtype",
    "storage",
    "attention",
    "measurement",
    "timed",
    "error",
)
_NUMBERS = (
    "budget_bytes", "planned_bytes", "allocated_bytes", "full_bytes",
    "current_bytes", "index_bytes", "workspace_bytes", "compensation_bytes", "device_peak_bytes", "nvml_bytes",
    "kl", "predicted_kl", "top1_agreement", "psnr_db", "ssim",
)  # fmt: skip
_MORE_NUMBERS = ("lpips", "fid", "graph_pool_bytes")
_COUNTS = ("batch", "rows", "draws", "images", "pictures")
_LISTS = ("kl_per_scale", "kl_of_draws")
_FLAGS = ("under_used", "had_no_effect")
_OF_SAMPLES = {
    "kl_of_images": "images", "top1_of_images": "images", "psnr_of_pictures": "pictures",
    "ssim_of_pictures": "pictures", "lpips_of_pictures": "pictures",
}  # fmt: skip
"""Lists of one figure for every sample, and what counts these."""
_SERIES = ("timeline_bytes", "top1_per_scale", *_OF_SAMPLES)
"""Of single samples and moments: other figures sum them up."""
_TIMES = ("latency_ms", "graph_latency_ms")
_OBJECTS = ("settings", "plans")
KNOWN = frozenset((*_TEXTS, *_NUMBERS, *_COUNTS, "seed", *_LISTS, *_FLAGS, *_TIMES, *_OBJECTS, *_SERIES, "schedule"))
"""Fields of a row that the report has a place for; it lists all others as they are."""


@dataclass(frozen=True)
class Results:
    """What a results.json holds; `rows` have all known fields of their kinds, or None."""

    environment: dict[str, Any]
    sampling: dict[str, Any]
    request: dict[str, Any]
    rows: list[dict[str, Any]]


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
    return Results(**parts, rows=[_checked_row(row, f"{path}, row {index}") for index, row in enumerate(rows)])


def _checked_row(row: Any, where: str) -> dict[str, Any]:
    """The row, with all known fields of their kinds or None. Raises FormatError."""

    def need(good: bool, name: str, kind: str) -> None:
        if not good:
            raise FormatError(f"{where}: {name!r} is {shown(row.get(name))}; it must be {kind}")

    if not isinstance(row, dict):
        raise FormatError(f"{where} is {shown(row)}, no object")
    for name in ("policy", "budget"):
        need(bool(row.get(name)), name, "a text")
    for name, value in row.items():
        if value is not None and name in _KINDS:
            kind, good = _KINDS[name]
            need(good(value), name, kind)
    for name in _NUMBERS:
        if name.endswith("_bytes"):
            need((row.get(name) or 0) >= 0, name, "at least 0")
    for name, count in _OF_SAMPLES.items():
        told = row.get(name)
        need(told is None or len(told) == row.get(count), name, f"one number for each of the {count}")
    if row.get("schedule") is not None:
        try:
            ScaleSchedule.of(row["schedule"])
        except ScheduleError as error:
            raise FormatError(f"{where}: {error}") from error
        of_scales = row.get("kl_per_scale")
        need(of_scales is None or len(of_scales) == len(row["schedule"]), "kl_per_scale", "one number for every scale")
    return row


_LARGEST = 1e100
"""Of a figure: far beyond every real one, and what is worked out from it still finite."""


def is_number(value: Any) -> TypeGuard[float]:
    """Whether it is a number of JSON from -1e100 to 1e100, and no boolean."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _LARGEST


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 31


def _is_list(value: Any) -> bool:
    return isinstance(value, list) and all(map(is_number, value))


def _are_numbers(value: Any, *names: str) -> bool:
    """Whether it is an object of numbers or nulls: the fields of these names, or all."""
    return isinstance(value, dict) and all(
        inner is None or is_number(inner) for name, inner in value.items() if not names or name in names
    )


def _is_time(value: Any) -> bool:
    if not _are_numbers(value, "median", "iqr", "runs", "confidence", "outliers") or value.get("median") is None:
        return False
    interval, phases, scales = (value.get(name) for name in ("interval", "phases", "scales"))
    return (
        (interval is None or (_is_list(interval) and len(interval) == 2))
        and (phases is None or _are_numbers(phases))
        and (scales is None or _is_list(scales))
    )


def _is_memory(value: Any) -> bool:
    if not isinstance(value, dict) or not {"process", "allocator", "host"} <= value.keys():
        return False
    parts = {name: value.get(name) or {} for name in ("tensors", "allocator", "host", "graphs", "driver")}
    steps = value.get("steps") or []
    peaks = parts["allocator"].get("peaks") or {} if isinstance(parts["allocator"], dict) else None
    return (
        _are_numbers(value, "weights_bytes")
        and all(isinstance(part, dict) for part in parts.values())
        and _are_numbers(parts["tensors"].get("peak_bytes") or {})
        and isinstance(peaks, dict)
        and all(_are_numbers(peak) and {"allocated_bytes", "reserved_bytes"} <= peak.keys() for peak in peaks.values())
        and _are_numbers(parts["host"], "most_bytes")
        and _are_numbers(parts["graphs"], "pool_bytes")
        and _are_numbers(parts["driver"], "process_bytes", "reserved_bytes")
        and isinstance(steps, list)
        and all(isinstance(step, dict) and _are_numbers(step.get("parts")) for step in steps)
    )


_NUMBER = ("a finite number", is_number)
_LIST = ("a list of finite numbers", _is_list)
_KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    **dict.fromkeys(_TEXTS, ("a text", lambda value: isinstance(value, str))),
    **dict.fromkeys((*_NUMBERS, *_MORE_NUMBERS), _NUMBER),
    **dict.fromkeys(_COUNTS, ("a whole number of at least 0", _is_count)),
    "seed": ("a whole number", lambda value: type(value) is int and is_number(value)),
    **dict.fromkeys((*_LISTS, *_OF_SAMPLES), _LIST),
    **dict.fromkeys(_FLAGS, ("true or false", lambda value: isinstance(value, bool))),
    **dict.fromkeys(_OBJECTS, ("an object", lambda value: isinstance(value, dict))),
    "not_measured": (
        "an object of texts",
        lambda value: isinstance(value, dict) and all(isinstance(reason, str) for reason in value.values()),
    ),
    "memory": ("an object as `heatkv profile` writes it", _is_memory),
    **dict.fromkeys(_TIMES, ("an object with the median in ms, and what else is told of times", _is_time)),
}
"""What the known fields of a row must be where they are not null."""


def printable(value: Any) -> Any:
    """The same with a mark in the place of every character that cannot be printed, in all texts it holds."""
    if isinstance(value, str):
        return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in value)
    if isinstance(value, Mapping):
        return {printable(str(name)): printable(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [printable(inner) for inner in value]
    return value
