"""The regression guard: two results files of the same measurement, and whether the newer one is worse.

Bytes and fidelity only: times of two runs do not compare. What was measured before and is not any more is worse too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from heatkv.errors import HeatKVError
from heatkv.profiling.results.comparable import match
from heatkv.profiling.results.ledgers import PHASES, figure_at
from heatkv.profiling.results.row import ResultRow, Results, read_results

BYTES = ("planned_bytes", "allocated_bytes", "current_bytes", "index_bytes", "workspace_bytes")
DEVICE_BYTES = ("device_peak_bytes", "graph_pool_bytes")
"""Compared only where both files have them: not every device has them."""

_Path = tuple[str, ...]

PLAN_AND_ARENA: dict[_Path, str] = {
    ("memory", "planned", "cache_bytes"): "planned_bytes",
    ("memory", "arena", "cache_bytes"): "allocated_bytes",
    ("memory", "arena", "index_bytes"): "index_bytes",
    ("memory", "arena", "workspace_bytes"): "workspace_bytes",
}
"""Figures of the ledgers that follow from the plan, the same everywhere, and the row's fields of the same bytes."""
TENSORS: tuple[_Path, ...] = (
    *(("memory", "tensors", "peak_bytes", phase) for phase in PHASES), ("memory", "tensors", "arena_bytes"),
    ("memory", "weights_bytes"),
)  # fmt: skip
"""Figures of the ledger of tensors: the same wherever one release of torch runs on one type of device."""
DEVICE_LEDGERS = ("host", "allocator", "graphs", "driver")
"""Parts that depend on the type of device; that they are there is looked at, not what they hold."""


@dataclass(frozen=True)
class Tolerances:
    """How much worse a figure may be. `bytes`, `tensors` and `kl` are shares of the baseline's, the others differences.

    `kl_floor` is in nats: a KL that grows by less is the same. Raises HeatKVError for what is negative or no number,
    and for a fall of top-1 or SSIM by more than 1, which no run could have.
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
            if not (math.isfinite(value) and value >= 0):
                raise HeatKVError(f"the tolerance of {name} is {value}; it must be a number from 0 on")
            if name in ("top1", "ssim") and value > 1:
                raise HeatKVError(f"the tolerance of {name} is {value:g}; no run falls by more than 1: write 0.01")

    def limits(self, row: ResultRow, tensors: bool) -> dict[_Path, tuple[float, bool]]:
        """The worst value that every figure of a baseline's row allows, by where the row has it, and whether more is
        worse; those of the ledger of tensors only with `tensors`."""
        limits: dict[_Path, tuple[float, bool]] = {}
        exact = (*((name,) for name in (*BYTES, *DEVICE_BYTES)), *PLAN_AND_ARENA)
        for paths, share in ((exact, self.bytes), (TENSORS if tensors else (), self.tensors)):
            for path in paths:
                if (value := figure_at(row, path)) is not None:
                    limits[path] = value * (1 + share), True
        if (kl := row.kl) is not None:
            limits["kl",] = kl + max(self.kl * kl, self.kl_floor), True
        for name, allowed in (("top1_agreement", self.top1), ("psnr_db", self.psnr), ("ssim", self.ssim)):
            if (value := getattr(row, name)) is not None:
                limits[name,] = value - allowed, False
        return limits

    def __str__(self) -> str:
        return (
            f"may be worse by: bytes {_percent(self.bytes)}, tensors {_percent(self.tensors)}, "
            f"KL {_percent(self.kl)} (at least {self.kl_floor:g} nats), top-1 {_percent(self.top1)} of all choices, "
            f"PSNR {self.psnr:g} dB, SSIM {self.ssim:g}"
        )


def _percent(share: float) -> str:
    return f"{share * 100:.6g}%"


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
    """One row of the baseline: its figures, compared; none where the newer file has no such row.

    `faults` are what no comparison of figures shows: why the row could not be measured, what is lost, and what
    contradicts itself. `nearest` are the fields in which the likeliest row of the newer file differs from a missing
    one.
    """

    name: str
    missing: bool
    changes: tuple[Change, ...]
    faults: tuple[str, ...] = ()
    nearest: tuple[str, ...] = ()

    @property
    def failed(self) -> bool:
        return self.missing or bool(self.faults) or any(change.failed for change in self.changes)


@dataclass(frozen=True)
class Verdict:
    """All rows of the baseline, the names of rows that only the newer file has, notes on how both were made and on
    what was not compared, and the tolerances that were held against them."""

    rows: tuple[RowCheck, ...]
    extra: tuple[str, ...]
    notes: tuple[str, ...]
    tolerances: Tolerances

    @property
    def failed(self) -> bool:
        return any(row.failed for row in self.rows)

    def to_json(self) -> dict[str, Any]:
        return {
            "failed": self.failed,
            "tolerances": dict(vars(self.tolerances)),
            "rows": [
                {
                    "name": row.name, "failed": row.failed, "missing": row.missing, "nearest": list(row.nearest),
                    "faults": list(row.faults), "changes": [change.to_json() for change in row.changes],
                }
                for row in self.rows
            ],
            "extra": list(self.extra),
            "notes": list(self.notes),
        }  # fmt: skip


def check_results(results: Path, baseline: Path, tolerances: Tolerances | None = None) -> Verdict:
    """Compare a results.json with an earlier one of the same measurement.

    Raises FormatError for files that are none, name a row twice or hold figures that cannot be, HeatKVError for
    measurements that do not compare: other samples, seeds or sampling, or a baseline without rows, or that contradicts
    itself.
    """
    tolerances = tolerances if tolerances is not None else Tolerances()
    now, before = read_results(results), read_results(baseline)
    if not before.rows:
        raise HeatKVError(f"{baseline} has no rows, so nothing can be held against it; write it with heatkv compare")
    for row in before.rows:
        for fault in _contradictions(row):
            raise HeatKVError(f"{baseline}: {row.name}: {fault}; make a new baseline")
    matched = match(now, before)
    made, made_before = now.environment, before.environment
    same_device = made.device == made_before.device
    tensors = same_device and made.versions.get("torch") == made_before.versions.get("torch")
    rows = tuple(
        RowCheck(row.name, True, (), nearest=nearest)
        if other is None
        else _checked(row, other, tolerances, same_device, tensors)
        for row, other, nearest in matched.pairs
    )
    notes = [*matched.notes, *_left_out(now, before, same_device, tensors)]
    return Verdict(rows, tuple(row.name for row in matched.extra), tuple(notes), tolerances)


def _left_out(now: Results, before: Results, same_device: bool, tensors: bool) -> Iterator[str]:
    """Notes on what of the baseline's memory was not compared, and why."""
    if all(row.memory is None for row in before.rows):
        yield "not compared: ledgers of memory, of which the baseline has none"
        return
    here, there = (
        f"device {of.device}, torch {of.versions.get('torch')}" for of in (now.environment, before.environment)
    )
    if not tensors:
        yield f"not compared: the ledger of tensors ({here}; in the baseline {there})"
    if not same_device:
        yield f"not compared: whether there are {', '.join(DEVICE_LEDGERS)} ({here}; in the baseline {there})"


def _checked(row: ResultRow, now: ResultRow, tolerances: Tolerances, same_device: bool, tensors: bool) -> RowCheck:
    faults = [*_faults(row, now, same_device), *_contradictions(now)]
    changes = []
    for path, (limit, more_is_worse) in tolerances.limits(row, tensors).items():
        before, value, name = figure_at(row, path), figure_at(now, path), ".".join(path)
        if value is None:
            of_lost_ledger = path[0] == "memory" and now.memory is None  # which is a fault already
            if not of_lost_ledger and (same_device or name not in DEVICE_BYTES):
                changes.append(Change(name, before, None, limit, True))
            continue
        failed = value > limit if more_is_worse else value < limit
        changes.append(Change(name, before, value, limit, failed))
    return RowCheck(row.name, False, tuple(changes), tuple(faults))


def _faults(row: ResultRow, now: ResultRow, same_device: bool) -> Iterator[str]:
    """Why a row could not be measured, or what the baseline's has and this one lacks, but for single figures."""
    # what could not be measured before either is not worse
    if now.error is not None and row.error is None:
        yield f"error: {now.error}"
        return
    if row.memory is not None and now.memory is None:
        yield "lost: memory"
    elif same_device:
        for ledger in DEVICE_LEDGERS:
            if figure_at(row.memory, [ledger]) is not None and figure_at(now.memory, [ledger]) is None:
                yield f"lost: memory.{ledger}"
    for name in ("latency_ms", *(("graph_latency_ms",) if same_device else ())):
        if getattr(row, name) is not None and getattr(now, name) is None:
            yield f"lost: {name}"


def _contradictions(row: ResultRow) -> Iterator[str]:
    """Ledgers that tell other bytes than the row's own fields, which the same plan makes.

    The ledgers are of the first plan, the fields the most of all plans.
    """
    for path, field in PLAN_AND_ARENA.items():
        of_ledger, of_row = figure_at(row, path), getattr(row, field)
        if (
            of_ledger is not None
            and of_row is not None
            and (of_ledger != of_row if row.draws == 1 else of_ledger > of_row)
        ):
            yield f"{'.'.join(path)} is {of_ledger:,.0f}, {field} {of_row:,.0f}{'' if row.draws == 1 else ' at most'}"


def change_lines(verdict: Verdict, everything: bool = False) -> Sequence[tuple[str, ...]]:
    """Lines of a table: row, figure, baseline, now, change, worst allowed, verdict; only what changed, or all."""
    lines: list[tuple[str, ...]] = []
    for row in verdict.rows:
        if row.missing:
            differs = f"the likeliest has another {', '.join(row.nearest)}" if row.nearest else ""
            lines.append((row.name, differs, "", "", "", "", "MISSING"))
        lines += [(row.name, fault, "", "", "", "", "FAILED") for fault in row.faults]
        for change in row.changes:
            if not everything and not change.failed and change.now == change.baseline:
                continue
            form = ",.0f" if "_bytes" in change.figure else ".5f"
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
