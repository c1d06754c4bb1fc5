"""The regression guard: two results files of the same measurement, and whether the newer one is worse.

Bytes and fidelity only: times of two runs do not compare. Rows are matched by all that decides them beforehand.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from heatkv.errors import FormatError, HeatKVError
from heatkv.profiling.reading import Results, read_results
from heatkv.profiling.row_fields import printable

BYTES = ("planned_bytes", "allocated_bytes", "current_bytes", "index_bytes", "workspace_bytes", "compensation_bytes")
DEVICE_BYTES = ("device_peak_bytes", "graph_pool_bytes")
"""Compared only where both files have them: not every machine can measure them."""

IDENTITY = (
    "model_fingerprint", "policy", "settings", "budget", "rows", "storage", "dtype", "schedule", "images", "pictures",
    "draws",
)  # fmt: skip
IDENTITY_WHERE_TOLD = ("seed", "batch", "attention")
"""Part of the identity when every row of both files has them."""
OUTCOMES = ("predicted_kl", "predicted_cfg")
"""Settings of a policy that tell what came out, not what was asked for; they may differ by rounding."""


@dataclass(frozen=True)
class Tolerances:
    """How much worse a figure may be. `bytes` and `kl` are shares of the baseline's, the others differences.

    `kl_floor` is in nats: a KL that grows by less is the same. Raises HeatKVError for what is negative or no number.
    """

    bytes: float = 0.0
    kl: float = 0.1
    kl_floor: float = 1e-4
    top1: float = 0.01
    psnr: float = 0.5
    ssim: float = 0.01

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not (math.isfinite(value) and value >= 0):
                raise HeatKVError(f"the tolerance of {name} is {value}; it must be a number from 0 on")

    def limits(self, row: Mapping[str, Any]) -> dict[str, tuple[float, bool]]:
        """The worst value that every figure of a baseline's row allows, and whether more is worse."""
        limits: dict[str, tuple[float, bool]] = {}
        for name in (*BYTES, *DEVICE_BYTES):
            if (value := row.get(name)) is not None:
                limits[name] = value * (1 + self.bytes), True
        if (kl := row.get("kl")) is not None:
            limits["kl"] = kl + max(self.kl * kl, self.kl_floor), True
        for name, allowed in (("top1_agreement", self.top1), ("psnr_db", self.psnr), ("ssim", self.ssim)):
            if (value := row.get(name)) is not None:
                limits[name] = value - allowed, False
        return limits


@dataclass(frozen=True)
class Change:
    """A figure of one row in both files; `now` is None where the newer one lacks it. `limit` is the worst allowed."""

    figure: str
    baseline: float
    now: float | None
    limit: float
    failed: bool

    def to_json(self) -> dict[str, Any]:
        return dict(vars(self))


@dataclass(frozen=True)
class RowCheck:
    """One row of the baseline: its figures, compared; none where the newer file has no such row."""

    name: str
    missing: bool
    changes: tuple[Change, ...]

    @property
    def failed(self) -> bool:
        return self.missing or any(change.failed for change in self.changes)


@dataclass(frozen=True)
class Verdict:
    """All rows of the baseline, the names of rows that only the newer file has, and notes on how both were made."""

    rows: tuple[RowCheck, ...]
    extra: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def failed(self) -> bool:
        return any(row.failed for row in self.rows)

    def to_json(self) -> dict[str, Any]:
        return {
            "failed": self.failed,
            "rows": [
                {
                    "name": row.name, "failed": row.failed, "missing": row.missing,
                    "changes": [change.to_json() for change in row.changes],
                }
                for row in self.rows
            ],
            "extra": list(self.extra),
            "notes": list(self.notes),
        }  # fmt: skip


def check_results(results: Path, baseline: Path, tolerances: Tolerances | None = None) -> Verdict:
    """Compare a results.json with an earlier one of the same measurement.

    Raises FormatError for files that are none or name a row twice, HeatKVError for measurements that do not compare:
    other samples, seeds or sampling, or a baseline without rows.
    """
    tolerances = tolerances if tolerances is not None else Tolerances()
    told, earlier = read_results(results), read_results(baseline)
    rows_now, rows_before = told.rows, earlier.rows
    told_by_all = [name for name in IDENTITY_WHERE_TOLD if all(name in row for row in (*rows_now, *rows_before))]
    names = (*IDENTITY, *told_by_all)
    now, before = _by_identity(results, rows_now, names), _by_identity(baseline, rows_before, names)
    if not before:
        raise HeatKVError(f"{baseline} has no rows, so nothing can be held against it; write it with heatkv compare")
    _check_same_measurement(told, earlier, results, baseline)
    rows = tuple(_checked(row, now.get(key), tolerances) for key, row in before.items())
    extra = tuple(_name(row) for key, row in now.items() if key not in before)
    return Verdict(rows, extra, tuple(_notes(told, earlier)))


def _by_identity(path: Path, rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, Mapping[str, Any]]:
    found: dict[str, Mapping[str, Any]] = {}
    for row in rows:
        if "model_fingerprint" not in row:
            raise FormatError(f"a row of {path} lacks model_fingerprint; write the file with heatkv compare or profile")
        settings = row.get("settings")
        asked = {k: v for k, v in settings.items() if k not in OUTCOMES} if isinstance(settings, dict) else settings
        key = json.dumps([row.get(name) if name != "settings" else asked for name in names], sort_keys=True)
        if key in found:
            raise FormatError(f"{path} has {_name(row)} twice; keep one of the rows")
        found[key] = row
    return found


def _name(row: Mapping[str, Any]) -> str:
    return str(printable(f"{row['policy']} {row['budget']}, {row.get('rows')} rows, {row.get('storage')}"))


def _check_same_measurement(told: Results, earlier: Results, results: Path, baseline: Path) -> None:
    """Figures over other samples, or under other guidance, are other figures."""
    asked, before = told.request, earlier.request
    named: list[tuple[str, Any, Any]] = [("sampling", told.sampling, earlier.sampling)]
    told_by_both = [name for name in ("seed", "images", "pictures") if name in asked and name in before]
    named += [(name, asked[name], before[name]) for name in told_by_both]
    for name, one, other in named:
        if one != other:
            raise HeatKVError(
                f"{results} has {name} {_told(one)}, {baseline} has {_told(other)}; measure with the baseline's, or "
                "make a new one"
            )


def _notes(told: Results, earlier: Results) -> list[str]:
    """What differs and may explain a change."""
    one, other = (
        {
            "device": made.environment.get("device_name"),
            "versions": _known_versions(made.environment.get("versions")),
            "statistics": _samples(made.request.get("statistics")),
        }
        for made in (told, earlier)
    )
    return [
        f"{name}: {_told(one[name])}, in the baseline {_told(other[name])}" for name in one if one[name] != other[name]
    ]


def _told(value: Any) -> str:
    """A value of a file in a line that can be printed."""
    return str(printable(value))[:300]


def _known_versions(versions: Any) -> dict[str, Any]:
    known = ("heatkv", "torch", "numpy")
    return {k: v for k, v in versions.items() if k in known} if isinstance(versions, dict) else {}


def _samples(provenance: Any) -> int | None:
    samples = provenance.get("samples") if isinstance(provenance, dict) else None
    return len(samples) if isinstance(samples, list) else None


def _checked(row: Mapping[str, Any], now: Mapping[str, Any] | None, tolerances: Tolerances) -> RowCheck:
    if now is None:
        return RowCheck(_name(row), True, ())
    changes = []
    for name, (limit, more_is_worse) in tolerances.limits(row).items():
        value, before = now.get(name), row.get(name)
        assert before is not None
        if value is None:
            if name not in DEVICE_BYTES:
                changes.append(Change(name, before, None, limit, True))
            continue
        failed = value > limit if more_is_worse else value < limit
        changes.append(Change(name, before, value, limit, failed))
    return RowCheck(_name(row), False, tuple(changes))


def change_lines(verdict: Verdict, everything: bool = False) -> Sequence[tuple[str, ...]]:
    """Lines of a table: row, figure, baseline, now, change, worst allowed, verdict; only what changed, or all."""
    lines: list[tuple[str, ...]] = []
    for row in verdict.rows:
        if row.missing:
            lines.append((row.name, "", "", "", "", "", "MISSING"))
        for change in row.changes:
            if not everything and not change.failed and change.now == change.baseline:
                continue
            form = ",.0f" if change.figure in (*BYTES, *DEVICE_BYTES) else ".5f"
            now = "-" if change.now is None else format(change.now, form)
            moved = "" if change.now is None else _moved(change.baseline, change.now, form)
            told = "FAILED" if change.failed else "ok"
            lines.append(
                (row.name, change.figure, format(change.baseline, form), now, moved, format(change.limit, form), told)
            )
    lines += [(name, "", "", "", "", "", "new") for name in verdict.extra]
    return lines


def _moved(before: float, now: float, form: str) -> str:
    share = f" ({(now - before) / before:+.1%})" if before else ""
    return f"{now - before:+{form}}{share}"
