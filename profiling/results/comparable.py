"""Whether two results files are of the same measurement: which of their rows belong together, and what decides that.

Figures over other samples, or under other guidance, are other figures: they are refused, never compared.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from heatkv.core.checks import shown
from heatkv.errors import FormatError, HeatKVError
from heatkv.profiling.results.reading import read_results
from heatkv.profiling.results.fields import printable

IDENTITY = (
    "model_fingerprint", "policy", "settings", "budget", "rows", "storage", "dtype", "schedule", "images", "pictures",
    "draws",
)  # fmt: skip
"""Fields that are equal in two rows that belong together."""
IDENTITY_WHERE_TOLD = ("seed", "batch", "attention")
"""The same, unless no row of the baseline tells them, as in those of earlier releases."""
OUTCOMES = ("predicted_kl", "predicted_cfg")
"""Settings of a policy that tell what came out, not what was asked for; they may differ by rounding."""

ANEW = "write it anew with heatkv compare or profile"

Row = Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Measurement:
    """A results file, whose rows have fields of their kinds and figures that can be."""

    path: Path
    environment: Mapping[str, Any]
    sampling: Mapping[str, Any] | None
    request: Mapping[str, Any]
    rows: tuple[Row, ...]

    @classmethod
    def read(cls, path: Path) -> Measurement:
        """Raises FormatError for what is no results file, and for fields and figures that cannot be."""
        told = read_results(path)
        for index, row in enumerate(told.rows):
            if row.get("model_fingerprint") is None:
                raise FormatError(f"{path}, row {index} lacks model_fingerprint; {ANEW}")
        parts = printable({name: getattr(told, name) for name in ("environment", "sampling", "request")})
        return cls(path, parts["environment"], parts["sampling"] or None, parts["request"], told.rows)

    @property
    def device(self) -> Any:
        """The type of the device: cpu or cuda; None where it is not told."""
        return self.environment.get("device")

    @property
    def torch(self) -> Any:
        """The release of torch; None where it is not told."""
        return self._versions.get("torch")

    @property
    def _versions(self) -> Mapping[str, Any]:
        found = self.environment.get("versions")
        return found if isinstance(found, dict) else {}

    @property
    def seeds(self) -> Sequence[Any] | None:
        """Those that were asked for; None where they are not told."""
        if isinstance(found := self.request.get("seeds"), list):
            return found
        return None if self.request.get("seed") is None else [self.request["seed"]]

    def samples(self, row: Row) -> Any:
        """The digest of the samples that the fidelity of a row was measured on; None where it is not told."""
        if row.get("samples_digest") is not None:
            return row["samples_digest"]
        found = self.request.get("samples_digest")
        if not isinstance(found, dict):
            return found
        return found.get(str(row.get("seed", self.request.get("seed"))))

    def what_may_explain(self) -> dict[str, Any]:
        """What is told in a note where it differs: figures compare all the same."""
        return {
            "device": [self.device, self.environment.get("device_name")],
            "threads": self.environment.get("threads"),
            "versions": {k: v for k, v in self._versions.items() if k in ("heatkv", "torch", "numpy")},
        }


def name_of(row: Row) -> str:
    """What a reader calls a row."""
    return f"{row['policy']} {row['budget']}, {row.get('rows')} rows, {row.get('storage')}"


@dataclass(frozen=True, eq=False)
class Matched:
    """Every row of the baseline with the one of the newer file that belongs to it, or None and the fields in which
    the likeliest row differs; the rows that only the newer file has; and notes on what differs, or was not compared."""

    pairs: tuple[tuple[Row, Row | None, tuple[str, ...]], ...]
    extra: tuple[Row, ...]
    notes: tuple[str, ...]


def match(now: Measurement, before: Measurement) -> Matched:
    """The rows of two files. Raises HeatKVError when they are of other samples, seeds or sampling, FormatError for a
    file that has a row twice."""
    notes = _check_alike(now, before)
    told = [name for name in IDENTITY_WHERE_TOLD if any(row.get(name) is not None for row in before.rows)]
    left_out = [name for name in IDENTITY_WHERE_TOLD if name not in told]
    notes += [_not_told(name, before) for name in left_out if any(row.get(name) is not None for row in now.rows)]
    names = (*IDENTITY, *told)
    rows_now, rows_before = _by_identity(now, names), _by_identity(before, names)
    extra = [row for key, row in rows_now.items() if key not in rows_before]
    pairs = [
        (row, rows_now.get(key), () if key in rows_now else _nearest(row, extra, names))
        for key, row in rows_before.items()
    ]
    both = [(row, other) for row, other, _ in pairs if other is not None]
    notes += _check_samples(now, before, both)
    other_plans = [name_of(row) for row, other in both if _differ(_plans(row), _plans(other))]
    if other_plans:
        notes.append(f"other plans than the baseline's: {'; '.join(other_plans)}")
    return Matched(tuple(pairs), tuple(extra), tuple(notes))


def _asked(row: Row, name: str) -> Any:
    value = row.get(name)
    return {k: v for k, v in value.items() if k not in OUTCOMES} if name == "settings" and value else value


def _by_identity(measurement: Measurement, names: Sequence[str]) -> dict[str, Row]:
    found: dict[str, Row] = {}
    for row in measurement.rows:
        key = json.dumps([_asked(row, name) for name in names], sort_keys=True)
        if key in found:
            raise FormatError(f"{measurement.path} has {name_of(row)} twice; keep one of the rows")
        found[key] = row
    return found


def _nearest(row: Row, others: Iterable[Row], names: Sequence[str]) -> tuple[str, ...]:
    """In which fields the row of the same policy and budget that is most like this one differs; none without one."""
    differing = [
        tuple(name for name in names if _asked(row, name) != _asked(other, name))
        for other in others
        if (row["policy"], row["budget"]) == (other["policy"], other["budget"])
    ]
    return min(differing, key=len, default=())


def _plans(row: Row) -> list[str] | None:
    """Digests of its plans, without the names of their files."""
    found = row.get("plans")
    return sorted(map(str, found.values())) if isinstance(found, dict) else None


def _differ(one: Any, other: Any) -> bool:
    return one is not None and other is not None and one != other


def _not_told(name: str, before: Measurement) -> str:
    return f"not compared: {name}, which {before.path} does not tell"


def _refused(name: str, now: Measurement, one: Any, before: Measurement, other: Any) -> HeatKVError:
    has = f"does not tell its {name}" if one is None else f"has {name} {shown(one)}"
    return HeatKVError(
        f"{now.path} {has}, {before.path} has {shown(other)}; measure with the baseline's, or make a new one"
    )


def _check_alike(now: Measurement, before: Measurement) -> list[str]:
    """What holds for whole files: raise where it differs; notes on what was not compared, and what may explain a
    change."""
    notes = []
    named = [("sampling", now.sampling, before.sampling)]
    named += [(name, now.request.get(name), before.request.get(name)) for name in ("images", "pictures")]
    for name, one, other in named:
        if other is not None and one != other:
            raise _refused(name, now, one, before, other)
        if one is not None and other is None:
            notes.append(_not_told(name, before))
    if before.seeds is not None and not set(map(str, now.seeds or ())) & set(map(str, before.seeds)):
        raise _refused("seed", now, _one_or_all(now.seeds), before, _one_or_all(before.seeds))
    one, other = now.what_may_explain(), before.what_may_explain()
    notes += [f"{name}: {_in_words(one[name])}, in the baseline {_in_words(other[name])}" for name in one
              if one[name] != other[name]]  # fmt: skip
    return notes + _statistics_note(now.request.get("statistics"), before.request.get("statistics"))


def _one_or_all(values: Sequence[Any] | None) -> Any:
    return values[0] if values is not None and len(values) == 1 else values


def _in_words(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _statistics_note(now: Any, before: Any) -> list[str]:
    """Other statistics make other plans, which is for the figures to judge."""

    def told(provenance: Any) -> Any:
        return {k: v for k, v in provenance.items() if k != "versions"} if isinstance(provenance, dict) else provenance

    def samples(provenance: Any) -> str:
        found = provenance.get("samples") if isinstance(provenance, dict) else None
        return f"{len(found)} samples" if isinstance(found, list) else "none told"

    if told(now) == told(before):
        return []
    return [f"statistics: others than the baseline's: {samples(now)}, in the baseline {samples(before)}"]


def _check_samples(now: Measurement, before: Measurement, pairs: Iterable[tuple[Row, Row]]) -> list[str]:
    """Raise where rows that belong together are of other samples."""
    notes: dict[str, None] = {}
    for earlier, row in pairs:
        one, other = now.samples(row), before.samples(earlier)
        if other is not None and one != other:
            raise _refused("samples_digest", now, one, before, other)
        if one is not None and other is None:
            notes[_not_told("samples_digest", before)] = None
    return list(notes)
