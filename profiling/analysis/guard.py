"""The regression guard: two results files of the same measurement, and whether the newer one is worse.

Bytes and fidelity only: times of two runs do not compare. What was measured before and is not any more is worse too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from heatkv.errors import HeatKVError
from heatkv.profiling.results.comparable import match
from heatkv.profiling.results.ledgers import PHASES, figure_at
from heatkv.profiling.results.row import ResultRow, Results, read_results

DEVICE_BYTES = ("device_peak_bytes", "graph_pool_bytes")
"""Figures that not every device has: lost only where both files are of one type of device."""
BYTES = (
    "planned_bytes", "allocated_bytes", "current_bytes", "index_bytes", "workspace_bytes", *DEVICE_BYTES,
    "memory.planned.cache_bytes", "memory.arena.cache_bytes", "memory.arena.index_bytes",
    "memory.arena.workspace_bytes",
)  # fmt: skip
"""Figures that follow from the plan: the same on every machine."""
TENSORS = (
    *(f"memory.tensors.peak_bytes.{phase}" for phase in PHASES), "memory.tensors.arena_bytes", "memory.weights_bytes",
)  # fmt: skip
"""Figures of the ledger of tensors: the same wherever one release of torch runs on one type of device."""
FALLING = {"top1_agreement": "top1", "psnr_db": "psnr", "ssim": "ssim"}
"""Figures of which less is worse, and their tolerances."""
DEVICE_LEDGERS = ("host", "allocator", "graphs", "driver")
"""Parts of `memory` that depend on the type of device: that they are there is compared, not what they hold."""


@dataclass(frozen=True)
class Tolerances:
    """How much worse a figure may be. `bytes`, `tensors` and `kl` are shares of the baseline's, the others differences.

    `kl_floor` is in nats: a KL that grows by less is the same. Raises HeatKVError for what no tolerance can be.
    """

    bytes: float = 0.0
    tensors: float = 0.01
    kl: float = 0.1
    kl_floor: float = 1e-4
    top1: float = 0.01
    psnr: float = 0.5
    ssim: float = 0.01

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            most = 1.0 if name in ("top1", "ssim") else 1e9
            if not 0 <= value <= most:
                raise HeatKVError(f"the tolerance of {name} is {value:g}; it must be from 0 to {most:g}")

    def limits(self, row: ResultRow, tensors: bool) -> dict[str, float]:
        """The worst value that is allowed of every figure of a baseline's row; those of the ledger of tensors only with
        `tensors`."""
        grown = dict.fromkeys(BYTES, 1 + self.bytes) | {path: 1 + self.tensors for path in TENSORS if tensors}
        limits = {path: value * by for path, by in grown.items() if (value := figure_at(row, path)) is not None}
        if row.kl is not None:
            limits["kl"] = row.kl + max(self.kl * row.kl, self.kl_floor)
        fallen = {name: (getattr(row, name), getattr(self, tolerance)) for name, tolerance in FALLING.items()}
        return limits | {name: value - by for name, (value, by) in fallen.items() if value is not None}

    def __str__(self) -> str:
        size, tensors, kl, top1 = (f"{100 * share:.6g}%" for share in (self.bytes, self.tensors, self.kl, self.top1))
        return (
            f"may be worse by: bytes {size}, tensors {tensors}, KL {kl} (at least {self.kl_floor:g} nats), "
            f"top-1 {top1} of all choices, PSNR {self.psnr:g} dB, SSIM {self.ssim:g}"
        )


@dataclass(frozen=True)
class Change:
    """A figure of one row in both files; `now` is None where the newer one lacks it. `limit` is the worst allowed."""

    figure: str
    baseline: float
    now: float | None
    limit: float
    failed: bool


@dataclass(frozen=True)
class RowCheck:
    """One row of the baseline: its figures, compared; none where the newer file has no such row.

    `faults` are what no figure shows: why the row could not be measured, and what is lost. `nearest` are the fields in
    which the likeliest row of the newer file differs from a missing one.
    """

    name: str
    missing: bool
    changes: tuple[Change, ...] = ()
    faults: tuple[str, ...] = ()
    nearest: tuple[str, ...] = ()

    @property
    def failed(self) -> bool:
        return self.missing or bool(self.faults) or any(change.failed for change in self.changes)


@dataclass(frozen=True)
class Verdict:
    """All rows of the baseline, the names of rows that only the newer file has, notes on how both were made and on
    what was not compared, and the tolerances."""

    rows: tuple[RowCheck, ...]
    extra: tuple[str, ...]
    notes: tuple[str, ...]
    tolerances: Tolerances

    @property
    def failed(self) -> bool:
        return any(row.failed for row in self.rows)

    def to_json(self) -> dict[str, Any]:
        rows = [vars(row) | {"failed": row.failed, "changes": list(map(vars, row.changes))} for row in self.rows]
        return vars(self) | {"failed": self.failed, "tolerances": vars(self.tolerances), "rows": rows}


def check_results(results: Path, baseline: Path, tolerances: Tolerances | None = None) -> Verdict:
    """The verdict on a results.json by an earlier one of the same measurement.

    Raises FormatError for damaged files, HeatKVError for measurements that do not compare (other samples, seeds or
    sampling) and for a baseline without rows.
    """
    tolerances = tolerances or Tolerances()
    now, before = read_results(results), read_results(baseline)
    if not before.rows:
        raise HeatKVError(f"{baseline} has no rows, so nothing can be compared with it; measure it anew")
    matched = match(now, before)
    same_device = now.environment.device == before.environment.device
    same_torch = now.environment.versions.get("torch") == before.environment.versions.get("torch")
    rows = []
    for row, other, nearest in matched.pairs:
        changes, faults = [], []
        if other is not None:
            changes = list(_changes(row, other, tolerances.limits(row, same_device and same_torch), same_device))
            faults = list(_faults(row, other, same_device))
        rows.append(RowCheck(_name(row), other is None, tuple(changes), tuple(faults), nearest))
    notes = [*matched.notes, *_left_out(now, before, same_device, same_torch)]
    return Verdict(tuple(rows), tuple(map(_name, matched.extra)), tuple(notes), tolerances)


def _name(row: ResultRow) -> str:
    return f"{row.name}, {row.rows} rows, {row.storage}"


def _left_out(now: Results, before: Results, same_device: bool, same_torch: bool) -> Iterator[str]:
    """Notes on what of the baseline's memory was not compared, and why."""
    here, there = (f"device {e.device}, torch {e.versions.get('torch')}" for e in (now.environment, before.environment))
    if all(row.memory is None for row in before.rows):
        yield "not compared: ledgers of memory, of which the baseline has none"
    elif not (same_device and same_torch):
        ledgers = "tensors" if same_device else f"tensors, and whether there are those of {', '.join(DEVICE_LEDGERS)}"
        yield f"not compared: the ledger of {ledgers} ({here}; in the baseline {there})"


def _changes(row: ResultRow, now: ResultRow, limits: dict[str, float], same_device: bool) -> Iterator[Change]:
    """Every figure of the baseline's row, but those of lost memory, which is a fault already."""
    for path, limit in limits.items():
        before, value = figure_at(row, path), figure_at(now, path)
        if value is not None:
            yield Change(path, before, value, limit, value < limit if path in FALLING else value > limit)
        elif not path.startswith("memory.") and (same_device or path not in DEVICE_BYTES):
            yield Change(path, before, None, limit, True)


def _faults(row: ResultRow, now: ResultRow, same_device: bool) -> Iterator[str]:
    """Why a row could not be measured, or what the baseline's has and this one lacks, but for single figures."""
    if now.error is not None and row.error is None:  # what could not be measured before either is not worse
        yield f"error: {now.error}"
        return
    ledgers = [f"memory.{ledger}" for ledger in DEVICE_LEDGERS] if now.memory is not None else []
    for path in ("memory", "latency_ms", *(("graph_latency_ms", *ledgers) if same_device else ())):
        if figure_at(row, path) is not None and figure_at(now, path) is None:
            yield f"lost: {path}"
