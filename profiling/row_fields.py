"""What a row of results may hold, and that it is of the kinds it must be: it is read from files.

A field that is null or missing is None, "not measured". Fields that are not known here are kept as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeGuard

from heatkv.checks import shown
from heatkv.errors import FormatError, ScheduleError
from heatkv.profiling.memory_figures import FIGURES, in_memory
from heatkv.schedule import ScaleSchedule

TEXTS = (
    "comparison", "model", "model_fingerprint", "policy", "budget", "dtype", "storage", "attention", "measurement",
    "timed", "error",
)  # fmt: skip
NUMBERS = (
    "batch", "seed", "rows", "draws", "images", "pictures",
    "budget_bytes", "planned_bytes", "allocated_bytes", "full_bytes",
    "current_bytes", "index_bytes", "workspace_bytes", "compensation_bytes", "device_peak_bytes", "nvml_bytes",
    "graph_pool_bytes", "kl", "predicted_kl", "top1_agreement", "psnr_db", "ssim",
)  # fmt: skip
LISTS = ("kl_per_scale", "kl_of_draws")
FLAGS = ("under_used", "had_no_effect")
SERIES = (
    "kl_of_images", "top1_per_scale", "top1_of_images", "psnr_of_pictures", "ssim_of_pictures", "lpips_of_pictures",
)  # fmt: skip
"""Of single samples: other figures sum them up."""
OF_SAMPLES = {
    "kl_of_images": "images", "top1_of_images": "images", "psnr_of_pictures": "pictures",
    "ssim_of_pictures": "pictures", "lpips_of_pictures": "pictures",
}  # fmt: skip
"""Lists of one figure for every sample, and what counts these."""
LARGEST = 1e100
"""Of a figure: far beyond every real one, and what is worked out from it still finite."""
TIMES = ("latency_ms", "graph_latency_ms")
OBJECTS = ("settings", "plans")
KNOWN = frozenset((
    *TEXTS, *NUMBERS, *LISTS, *FLAGS, *TIMES, *OBJECTS, *SERIES, "schedule", "timeline_bytes", "memory", "versus",
))  # fmt: skip
"""Fields of a row that the report has a place for; it lists all others as they are."""


def checked_row(row: Any, where: str) -> dict[str, Any]:
    """The row, with all known fields of their kinds or None, and printable. Raises FormatError."""

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
    for name in NUMBERS:
        if name.endswith("_bytes"):
            need((row.get(name) or 0) >= 0, name, "at least 0")
    for name, count in OF_SAMPLES.items():
        told = row.get(name)
        need(told is None or len(told) == row.get(count), name, f"one number for each of the {count}")
    if row.get("schedule") is not None:
        try:
            ScaleSchedule.of(row["schedule"])
        except ScheduleError as error:
            raise FormatError(f"{where}: {error}") from error
        scales = len(row["schedule"])
        of_scales = {name: row.get(name) for name in ("kl_per_scale", "timeline_bytes")}
        of_scales |= {name: (row.get(name) or {}).get("scales") for name in TIMES}
        for name, told in of_scales.items():
            kind = f"one number for every scale{', in scales' if name in TIMES else ''}"
            kind = "one list for every scale" if name == "timeline_bytes" else kind
            need(told is None or len(told) == scales, name, kind)
    cleaned: dict[str, Any] = printable(row)
    return cleaned


def is_number(value: Any) -> TypeGuard[float]:
    """Whether it is a number of JSON from -1e100 to 1e100, and no boolean."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST


def _are_numbers(value: Any) -> TypeGuard[Sequence[float]]:
    return isinstance(value, list) and all(map(is_number, value))


def _is_time(value: Any) -> bool:
    if not isinstance(value, dict) or not is_number(value.get("median")):
        return False
    given = {name: inner for name, inner in value.items() if inner is not None}
    phases, interval = given.get("phases", {}), given.get("interval", [0, 0])
    return (
        all(is_number(given.get(name, 0)) for name in ("iqr", "runs", "confidence", "outliers"))
        and all(_are_numbers(given.get(name, [])) for name in ("all", "scales"))
        and _are_numbers(interval)
        and len(interval) == 2
        and isinstance(phases, dict)
        and all(inner is None or (is_number(inner) and inner >= 0) for inner in phases.values())
    )


def _is_timeline(value: Any) -> bool:
    """Bytes by scale and layer: lists of one length, none of them empty."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(_are_numbers(layers) and layers and min(layers) >= 0 for layers in value)
        and len({len(layers) for layers in value}) == 1
    )


def _is_memory(value: Any) -> bool:
    """An object whose known figures are at least 0, or null, or of a part that is null."""
    if not isinstance(value, dict) or not {"process", "allocator", "host"} <= value.keys():
        return False
    for figure in FIGURES:
        part: Any = value
        for name in figure.path[:-1]:
            part = part.get(name)
            if part is None:
                break
            if not isinstance(part, dict):
                return False
        found = in_memory(value, figure.path)
        if found is not None and not (is_number(found) and found >= 0):
            return False
    steps = value.get("steps") or []
    return isinstance(steps, list) and all(
        isinstance(step, dict) and isinstance(step.get("parts"), dict) and all(map(is_number, step["parts"].values()))
        for step in steps
    )


def _is_versus(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and isinstance(value.get("policy"), str)
        and is_number(value.get("difference"))
        and _are_numbers(value.get("interval"))
        and len(value["interval"]) == 2
        and all(value.get(name) is None or is_number(value[name]) for name in ("confidence", "images"))
    )


_KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    **dict.fromkeys(TEXTS, ("a text", lambda value: isinstance(value, str))),
    **dict.fromkeys(NUMBERS, ("a finite number", is_number)),
    **dict.fromkeys(
        ("batch", "rows", "draws", "images", "pictures"),
        ("a whole number of at least 0", lambda value: type(value) is int and 0 <= value < 1 << 31),
    ),
    "seed": ("a whole number", lambda value: type(value) is int and is_number(value)),
    **dict.fromkeys(LISTS, ("a list of finite numbers", _are_numbers)),
    **dict.fromkeys(FLAGS, ("true or false", lambda value: isinstance(value, bool))),
    **dict.fromkeys(OBJECTS, ("an object", lambda value: isinstance(value, dict))),
    **dict.fromkeys(
        TIMES,
        ("an object with the median in ms, and perhaps iqr, runs, interval, all, scales and phases", _is_time),
    ),
    **dict.fromkeys((*OF_SAMPLES, "top1_per_scale"), ("a list of finite numbers", _are_numbers)),
    **dict.fromkeys(("lpips", "fid"), ("a finite number", is_number)),
    "not_measured": (
        "an object of texts",
        lambda value: isinstance(value, dict) and all(isinstance(reason, str) for reason in value.values()),
    ),
    "timeline_bytes": ("bytes of every layer for every scale", _is_timeline),
    "memory": ("an object of ledgers, whose figures are numbers of at least 0", _is_memory),
    "versus": ("an object with policy, difference and the two ends of its interval", _is_versus),
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
