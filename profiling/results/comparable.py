"""Which rows of results are the same subject, and which figures compare.

Fidelity over other samples, under other guidance or of other weights is another figure: it is refused or kept apart,
never compared. Times compare only between rows that were timed in turns, on one machine.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from heatkv.core.schema import shown
from heatkv.errors import FormatError, HeatKVError
from heatkv.profiling.results.row import Environment, ResultRow, Results

REFERENCE = "full"
"""The policy that all others are compared with."""
SUBJECT = ("model_fingerprint", "schedule", "policy", "budget", "storage", "dtype", "rows", "batch", "seed")
"""Fields that say what was measured: rows that are equal in them are the same subject."""
PLACE = tuple(name for name in SUBJECT if name != "policy")
"""What policies share that stand side by side."""
ASKED = (*SUBJECT, "settings", "attention", "draws")
"""All that was asked for."""
OUTCOMES = ("predicted_kl", "predicted_cfg", "solve_seconds")
"""Settings of a policy that say what came out, which may differ by rounding, or what it might take, not what was asked
for."""


def subject_key(row: ResultRow, fields: Iterable[str] = SUBJECT) -> tuple[Hashable, ...]:
    """What was measured, as a key."""
    return tuple(getattr(row, name) for name in fields)


def timing_conditions(results: Results, row: ResultRow) -> dict[str, Any]:
    """What was drawn, and how much of it at once, to take a time."""
    return {
        "weights": row.model_fingerprint, "schedule": row.schedule, "sampling": results.sampling, "rows": row.rows,
        "seed": row.seed,
    }  # fmt: skip


def conditions(results: Results, row: ResultRow) -> dict[str, Any]:
    """What a figure of fidelity was measured on beside the policy: such figures compare where these are equal."""
    types = [other.dtype for other in results.rows if other.policy == REFERENCE]
    return timing_conditions(results, row) | {
        "type": next(iter(types), row.dtype), "samples": results.request.samples_of(row.seed), "images": row.images,
        "pictures": row.pictures,
    }  # fmt: skip


def check_distinct(rows: Sequence[ResultRow], where: object) -> None:
    """Raise FormatError where two rows are the same subject, of which no table could tell which is meant."""
    found: dict[tuple[Hashable, ...], int] = {}
    for index, row in enumerate(rows):
        first = found.setdefault(subject_key(row), index)
        if first != index:
            place = ", ".join(f"{name} {getattr(row, name)}" for name in ("storage", "rows", "batch", "seed"))
            raise FormatError(f"{where} has {row.name}, {place} twice, as rows {first} and {index}; keep one of them")


@dataclass(frozen=True, eq=False)
class Matched:
    """Every row of a baseline with the one of newer results that is the same subject, or None and the fields in which
    the likeliest row differs; the rows that only the newer results have; and notes on what differs without harm."""

    pairs: tuple[tuple[ResultRow, ResultRow | None, tuple[str, ...]], ...]
    extra: tuple[ResultRow, ...]
    notes: tuple[str, ...]


def match(now: Results, before: Results) -> Matched:
    """The rows of two runs. Raises HeatKVError where the same subject was measured under other conditions, FormatError
    for a row that is there twice."""
    check_distinct(now.rows, "the newer file")
    check_distinct(before.rows, "the baseline")
    rows_now = {_asked(row): row for row in now.rows}
    rows_before = {_asked(row): row for row in before.rows}
    extra = [row for key, row in rows_now.items() if key not in rows_before]
    pairs = [(row, rows_now.get(key)) for key, row in rows_before.items()]
    other_plans = []
    for row, other in pairs:
        if other is not None:
            _check_conditions(row, conditions(now, other), conditions(before, row))
            if _plan_digests(row) != _plan_digests(other):
                other_plans.append(row.name)
    notes = [*_environment_notes(now.environment, before.environment), *_statistics_notes(now, before)]
    if other_plans:
        notes.append(f"other plans than the baseline's: {'; '.join(other_plans)}")
    with_nearest = [(row, other, () if other is not None else _nearest(row, extra)) for row, other in pairs]
    return Matched(tuple(with_nearest), tuple(extra), tuple(notes))


def _asked(row: ResultRow) -> tuple[Hashable, ...]:
    settings = {name: value for name, value in (row.settings or {}).items() if name not in OUTCOMES}
    return *subject_key(row), repr(sorted(settings.items())), row.attention, row.draws


def _nearest(row: ResultRow, others: Iterable[ResultRow]) -> tuple[str, ...]:
    """In which fields the row of the same policy and budget that is most like this one differs; none without one."""
    differing = [
        tuple(name for name, *values in zip(ASKED, _asked(row), _asked(other), strict=True) if values[0] != values[1])
        for other in others
        if other.name == row.name
    ]
    return min(differing, key=len, default=())


def _check_conditions(row: ResultRow, now: dict[str, Any], before: dict[str, Any]) -> None:
    for name, wanted in before.items():
        if wanted is not None and now[name] != wanted:
            raise HeatKVError(
                f"{row.name} was measured with {name} {shown(now[name])}, in the baseline with {shown(wanted)}; "
                "measure with the baseline's, or make a new one"
            )


def _plan_digests(row: ResultRow) -> list[str]:
    return sorted((row.plans or {}).values())


def _environment_notes(now: Environment, before: Environment) -> list[str]:
    """What may explain a change: figures compare all the same."""
    here, there = (
        {"device": f"{machine.device}, {machine.device_name}", "threads": machine.threads}
        | {name: machine.versions.get(name) for name in ("heatkv", "torch", "numpy")}
        for machine in (now, before)
    )
    return [f"{name}: {here[name]}, in the baseline {there[name]}" for name in here if here[name] != there[name]]


def _statistics_notes(now: Results, before: Results) -> list[str]:
    """Other statistics make other plans, which is for the figures to judge."""
    here, there = (dict(results.request.statistics or {}) | {"versions": None} for results in (now, before))
    if here == there:
        return []
    counts = [len(provenance.get("samples") or ()) for provenance in (here, there)]
    return [f"statistics: others than the baseline's: {counts[0]} samples, in the baseline {counts[1]}"]
