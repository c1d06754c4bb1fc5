"""Figures of a row of results that cannot be, whatever was measured: files are edited and truncated, programs err."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from heatkv.checks import shown
from heatkv.errors import FormatError
from heatkv.profiling.fidelity import ROUNDING_MSE
from heatkv.profiling.memory_figures import FIGURES, in_memory
from heatkv.profiling.row_fields import TIMES, is_number

MOST_BYTES = 2**60
"""No machine has as many."""
ROUNDING = 1e-9
"""By how much a mean of float64 may miss its bound."""
SINGLE_ROUNDING = 1e-5
"""The same of SSIM and LPIPS, which are computed in float32."""

_TOP1 = (-ROUNDING, 1 + ROUNDING, "it lies from 0 to 1")
_KL = (-ROUNDING, math.inf, "it is at least 0")
_PSNR = (-ROUNDING, -10 * math.log10(ROUNDING_MSE) + ROUNDING, "it lies from 0 dB to that of rounding to 8 bits")
_SSIM = (-1 - SINGLE_ROUNDING, 1 + SINGLE_ROUNDING, "it lies from -1 to 1")
_LPIPS = (-SINGLE_ROUNDING, math.inf, "it is at least 0")
RANGES: dict[str, tuple[float, float, str]] = {
    **dict.fromkeys(("kl", "predicted_kl", "kl_per_scale", "kl_of_draws", "kl_of_images"), _KL),
    **dict.fromkeys(("top1_agreement", "top1_per_scale", "top1_of_images"), _TOP1),
    **dict.fromkeys(("psnr_db", "psnr_of_pictures"), _PSNR),
    **dict.fromkeys(("ssim", "ssim_of_pictures"), _SSIM),
    **dict.fromkeys(("lpips", "lpips_of_pictures"), _LPIPS),
}
"""Least and most of a field, which is a number or a list of them, and why."""
COUNTS = {"batch": 1, "rows": 1, "draws": 1, "images": 0, "pictures": 0}
"""The least of whole numbers."""


def check_plausible(row: Mapping[str, Any], where: str) -> None:
    """Raise FormatError for a figure that cannot be, in a row whose fields are of their kinds (`checked_row`)."""
    for name, value, least, most, why in _bounded(row):
        if not (is_number(value) and least <= value <= most):
            raise FormatError(
                f"{where}: {name} {shown(value)} cannot be: {why}; write the file anew with heatkv compare or profile"
            )


def _bounded(row: Mapping[str, Any]) -> Iterator[tuple[str, Any, float, float, str]]:
    """The name and value of every figure with a bound, its least and most, and why."""
    for name, (least, most, why) in RANGES.items():
        value = row.get(name)
        for one in value if isinstance(value, list) else [] if value is None else [value]:
            yield name, one, least, most, why
    for name, least in COUNTS.items():
        if row.get(name) is not None:
            yield name, _whole(row[name]), least, math.inf, f"it is a whole number of at least {least}"
    for name, value in _bytes(row):
        yield name, _whole(value), 0, MOST_BYTES - 1, "bytes are a whole number from 0 on and below 2**60"
    for name in TIMES:
        for part, value, above in _times(row.get(name) or {}):
            # the least float above 0 stands for all that are
            least = math.ulp(0.0) if above else 0.0
            yield f"{name}.{part}", value, least, math.inf, f"times are {'above' if above else 'at least'} 0 ms"


def _whole(value: Any) -> Any:
    """The value, or what is no number in the place of a number that is not whole."""
    return str(value) if is_number(value) and not float(value).is_integer() else value


def _bytes(row: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in row.items():
        if name == "timeline_bytes":
            yield from ((name, one) for layers in value or [] for one in layers)
        elif name.endswith("_bytes") and value is not None:
            yield name, value
    for figure in FIGURES:
        found = in_memory(row.get("memory"), figure.path)
        if found is not None:
            yield ".".join(("memory", *figure.path)), found


def _times(told: Mapping[str, Any]) -> Iterator[tuple[str, Any, bool]]:
    """Every time with the name of its field, and whether it must be above 0."""
    for name, above in (("median", True), ("all", True), ("interval", True), ("iqr", False), ("scales", False)):
        value = told.get(name)
        for one in value if isinstance(value, list) else [] if value is None else [value]:
            yield name, one, above
