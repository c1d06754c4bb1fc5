"""What a row of results may hold, and that it is of the kinds and within the limits it must be: it is read from files.

A field that is null or missing is None, "not measured". Fields that are not known here are kept as they are. Limits are
those of what a figure means, such as a share from 0 to 1, or far beyond all that can be measured: a figure outside of
them is a damaged one, and must not win a comparison.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

from heatkv.core.checks import shown
from heatkv.core.schedule import ScaleSchedule
from heatkv.errors import FormatError, ScheduleError
from heatkv.profiling.measure.memory_figures import FIGURES, in_memory

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
OBJECTS = ("settings", "plans", "timing_machine")
KNOWN = frozenset((
    *TEXTS, *NUMBERS, *LISTS, *FLAGS, *TIMES, *OBJECTS, *SERIES, "schedule", "timeline_bytes", "memory", "versus",
))  # fmt: skip
"""Fields of a row that the report has a place for; it lists all others as they are."""

MOST_BYTES = 2**60
MOST_NATS = 1e6
MOST_MS = 1e9
ROUNDING = 1e-9
"""How far below 0, or outside its range, rounding may take a figure."""
SINGLE_ROUNDING = 1e-5
"""The same of SSIM and LPIPS, which are computed in float32."""


@dataclass(frozen=True)
class Limits:
    """What a figure may be, both ends included, and in words. `whole` for what is counted."""

    low: float
    high: float
    words: str
    whole: bool = False

    def hold(self, values: Iterable[float]) -> bool:
        return all(self.low <= value <= self.high and (not self.whole or value == int(value)) for value in values)


_KL = Limits(-ROUNDING, MOST_NATS, f"at least 0 and at most {MOST_NATS:g} nats")
_SHARE = Limits(-ROUNDING, 1 + ROUNDING, "a share from 0 to 1")
_SSIM = Limits(-1 - SINGLE_ROUNDING, 1 + SINGLE_ROUNDING, "from -1 to 1")
_PSNR = Limits(-ROUNDING, 100, "from 0 to 100 dB")
_BYTES = Limits(0, MOST_BYTES, "a whole number from 0 to 2^60 bytes", whole=True)
_COUNT = Limits(0, 1e12, "a whole number from 0 to 1e12", whole=True)
_COUNT_OF_ONE = Limits(1, 1e12, "a whole number from 1 to 1e12", whole=True)
LIMITS: dict[str, Limits] = {
    **dict.fromkeys(("kl", "kl_per_scale", "kl_of_draws", "kl_of_images"), _KL),
    "predicted_kl": Limits(-MOST_NATS, MOST_NATS, f"within {MOST_NATS:g} nats"),  # a forecast may be off to any side
    **dict.fromkeys(("top1_agreement", "top1_per_scale", "top1_of_images"), _SHARE),
    **dict.fromkeys(("ssim", "ssim_of_pictures"), _SSIM),
    **dict.fromkeys(("lpips", "lpips_of_pictures"), Limits(-SINGLE_ROUNDING, MOST_NATS, "at least 0")),
    **dict.fromkeys(("psnr_db", "psnr_of_pictures"), _PSNR),
    **dict.fromkeys(("batch", "rows", "draws"), _COUNT_OF_ONE),
    **dict.fromkeys(("images", "pictures"), _COUNT),
    **{name: _BYTES for name in NUMBERS if name.endswith("_bytes")},
}
"""Of figures, and of every one in a list of them."""

IDENTITY = ("policy", "budget", "storage", "dtype", "rows", "batch", "seed", "model_fingerprint", "schedule")
"""What tells the rows of one folder apart."""


def check_apart(rows: Sequence[Mapping[str, Any]], where: str) -> None:
    """Raise FormatError for two rows of the same name in a file, of which no table could tell which is meant."""
    found: dict[str, int] = {}
    for index, row in enumerate(rows):
        first = found.setdefault(json.dumps([row.get(name) for name in IDENTITY], sort_keys=True), index)
        if first != index:
            place = [
                f"{name} {row[name]}" for name in ("storage", "rows", "batch", "seed") if row.get(name) is not None
            ]
            named = ", ".join([f"{row['policy']} {row['budget']}", *place])
            raise FormatError(f"{where} has {named} twice, as rows {first} and {index}; keep one of them")


def checked_row(row: Any, where: str) -> dict[str, Any]:
    """The row, with all known fields of their kinds and within their limits or None, and printable. Raises FormatError
    that names the row as `where` does."""

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
    for name, limits in LIMITS.items():
        if (told := row.get(name)) is not None:
            need(limits.hold(told if isinstance(told, list) else [told]), name, limits.words)
    for name in TIMES:
        if row.get(name) is not None:
            need(_is_possible(row[name]), name, _POSSIBLE)
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


_POSSIBLE = (
    f"of times above 0 and at most {MOST_MS:g} ms, with the interval from low to high, at least 1 run and a confidence "
    "from 0 to 1"
)


def _is_possible(time: Mapping[str, Any]) -> bool:
    """Whether a time could have been taken."""
    given = {name: value for name, value in time.items() if value is not None}
    interval = given.get("interval", [])
    phases = [value for value in given.get("phases", {}).values() if value is not None]
    return (
        all(0 < value <= MOST_MS for value in [given["median"], *given.get("all", []), *interval])
        # parts of a time may be too short to be told
        and all(0 <= value <= MOST_MS for value in [given.get("iqr", 0), *given.get("scales", []), *phases])
        and interval == sorted(interval)
        and _COUNT_OF_ONE.hold([given.get("runs", 1)])
        and _COUNT.hold([given.get("outliers", 0)])
        and _SHARE.hold([given.get("confidence", 1)])
    )


def _is_timeline(value: Any) -> bool:
    """Bytes by scale and layer: lists of one length, none of them empty."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(_are_numbers(layers) and layers and _BYTES.hold(layers) for layers in value)
        and len({len(layers) for layers in value}) == 1
    )


def _is_memory(value: Any) -> bool:
    """An object whose known figures are bytes within their limits, or null, or of a part that is null."""
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
        if found is not None and not (is_number(found) and _BYTES.hold([found])):
            return False
    steps = value.get("steps") or []
    return isinstance(steps, list) and all(
        isinstance(step, dict)
        and isinstance(step.get("parts"), dict)
        and all(is_number(part) and abs(part) <= MOST_BYTES for part in step["parts"].values())
        and all(isinstance(step.get(name, ""), str) for name in ("source", "target"))
        for step in steps
    )


def _is_versus(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and isinstance(value.get("policy"), str)
        and is_number(value.get("difference"))
        and _are_numbers(value.get("interval"))
        and len(value["interval"]) == 2
        and value["interval"][0] <= value["interval"][1]
        and max(map(abs, [value["difference"], *value["interval"]])) <= MOST_NATS
        and all(
            value.get(name) is None or (is_number(value[name]) and limits.hold([value[name]]))
            for name, limits in (("confidence", _SHARE), ("images", _COUNT_OF_ONE))
        )
    )


_KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    **dict.fromkeys(TEXTS, ("a text", lambda value: isinstance(value, str))),
    **dict.fromkeys(NUMBERS, ("a finite number", is_number)),
    "seed": ("a whole number", lambda value: type(value) is int and is_number(value)),
    **dict.fromkeys((*LISTS, *SERIES), ("a list of finite numbers", _are_numbers)),
    **dict.fromkeys(FLAGS, ("true or false", lambda value: isinstance(value, bool))),
    **dict.fromkeys(OBJECTS, ("an object", lambda value: isinstance(value, dict))),
    **dict.fromkeys(
        TIMES,
        ("an object with the median in ms, and perhaps iqr, runs, interval, all, scales and phases", _is_time),
    ),
    **dict.fromkeys(("lpips", "fid"), ("a finite number", is_number)),
    "not_measured": (
        "an object of texts",
        lambda value: isinstance(value, dict) and all(isinstance(reason, str) for reason in value.values()),
    ),
    "timeline_bytes": ("bytes of every layer for every scale", _is_timeline),
    "memory": ("an object of ledgers, whose figures are numbers of at least 0 and at most 2^60 bytes", _is_memory),
    "versus": ("an object with policy, difference and the two ends of its interval, from low to high", _is_versus),
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
