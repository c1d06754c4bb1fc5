"""Result folders, one or several, as one set of rows in groups whose figures compare; rankings and fronts of these."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from heatkv.core.schedule import ScaleSchedule
from heatkv.errors import FormatError
from heatkv.profiling.results.comparable import REFERENCE, check_distinct, conditions, timing_conditions
from heatkv.profiling.results.row import ResultRow, Results, read_results

SEPARATOR = " · "
"""Between the parts of a label."""
AXES = ("batch", "seed")
"""What rows of one policy and budget of a folder may differ in."""

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Row:
    """One row of a folder's results."""

    source: Source
    result: ResultRow


@dataclass(frozen=True, eq=False)
class Source:
    """A result folder, under the label that it has in the report."""

    label: str
    folder: Path
    results: Results

    @cached_property
    def rows(self) -> tuple[Row, ...]:
        return tuple(Row(self, row) for row in self.results.rows)

    @cached_property
    def axes(self) -> tuple[str, ...]:
        """What rows of one policy and budget differ in: "batch", "seed", both or nothing."""
        return tuple(axis for axis in AXES if len({getattr(row, axis) for row in self.results.rows}) > 1)

    @property
    def machine(self) -> tuple[Any, ...]:
        """Equal only where times of two folders may stand in one ranking."""
        place = self.results.environment
        return place.device, place.device_name, place.threads, place.system, tuple(sorted(place.versions.items()))


@dataclass(frozen=True, eq=False)
class Group:
    """Rows whose figures compare. `key` is all that they share, `title` says what sets them apart from other groups."""

    title: str
    rows: tuple[Row, ...]
    key: dict[str, Any]


@dataclass(frozen=True, eq=False)
class Merged:
    """All folders of a report, in an order that does not depend on the one they were named in."""

    sources: tuple[Source, ...]

    @cached_property
    def rows(self) -> tuple[Row, ...]:
        return tuple(row for source in self.sources for row in source.rows)

    @property
    def model(self) -> str:
        return self.rows[0].result.model

    @cached_property
    def machines(self) -> dict[tuple[Any, ...], str]:
        """What the report calls every machine, with a number where there are several."""
        places = {source.machine: source.results.environment for source in self.sources}
        return {
            machine: (f"machine {number}: " if len(places) > 1 else "")
            + f"{place.device_name}, {place.threads} thread{'' if place.threads == 1 else 's'}, torch "
            + str(place.versions.get("torch"))
            for number, (machine, place) in enumerate(places.items(), 1)
        }

    def label(self, row: Row, axes: Sequence[str] = AXES) -> str:
        """The policy, with its storage type, batch, seed and folder where several are in the report; of batch and seed
        only those in `axes`."""
        parts = [row.result.policy]
        if len({other.result.storage for other in self.rows}) > 1:
            parts.append(row.result.storage)
        parts += [f"{axis} {getattr(row.result, axis)}" for axis in row.source.axes if axis in axes]
        return SEPARATOR.join([*parts, row.source.label] if len(self.sources) > 1 else parts)

    @cached_property
    def fidelity_groups(self) -> tuple[Group, ...]:
        """Rows with a KL, by what it was measured on. Batches share a comparison: its first row stands for all."""
        found: dict[tuple[Any, ...], Row] = {}
        for row in self.rows:
            if row.result.kl is not None:
                found.setdefault((row.source, row.result.name, row.result.comparison), row)

        def key(row: Row) -> dict[str, Any]:
            # without its samples a folder shares them with none
            shared = conditions(row.source.results, row.result)
            return shared | {"samples": shared["samples"] or f"of {row.source.label}"}

        return _groups(found.values(), key)

    @cached_property
    def timing_groups(self) -> tuple[Group, ...]:
        """Rows with a time, by machine, what was timed, and when: only what was timed in turns stands in one ranking,
        since machines are not equally fast at all times."""

        def key(row: Row) -> dict[str, Any]:
            machine = {"on": self.machines[row.source.machine]}
            return machine | timing_conditions(row.source.results, row.result) | {"timed": row.result.timed}

        return _groups((row for row in self.rows if row.result.latency_ms is not None), key)


def _groups(rows: Iterable[Row], key: Callable[[Row], dict[str, Any]]) -> tuple[Group, ...]:
    """By equal keys, with what differs between these as titles; samples go without saying where each seed has its
    own."""
    found: dict[str, tuple[dict[str, Any], list[Row]]] = {}
    for row in rows:
        shared = key(row)
        found.setdefault(repr(shared), (shared, []))[1].append(row)
    keys = [shared for shared, _ in found.values()]
    differ = [name for name in keys[0] if any(shared[name] != keys[0][name] for shared in keys)] if keys else []
    seeds = {shared["seed"] for shared in keys}
    if "samples" in differ and len({(shared["seed"], shared["samples"]) for shared in keys}) == len(seeds):
        differ.remove("samples")
    return tuple(
        Group(", ".join(f"{name} {_in_words(shared[name])}" for name in differ), tuple(members), shared)
        for shared, members in found.values()
    )


def _in_words(value: Any) -> str:
    if isinstance(value, tuple):
        return str(ScaleSchedule(value))
    return ", ".join(f"{name} {inner}" for name, inner in value.items()) if isinstance(value, dict) else str(value)


# ------------------------------------------------------------------------------------------- rankings and fronts


def budgets_of(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """The rows of every budget, the largest first; those of the full cache are left out."""
    found: dict[int, list[Row]] = {}
    for row in rows:
        if row.result.policy != REFERENCE:
            found.setdefault(row.result.budget_bytes, []).append(row)
    texts = {size: min(row.result.budget for row in found[size]) for size in sorted(found, reverse=True)}
    several = Counter(texts.values())
    return {
        f"{text} ({size / 2**20:.3f} MiB)" if several[text] > 1 else text: found[size] for size, text in texts.items()
    }


Figure = Callable[[T], float | None]

EQUAL_BYTES = 0.01
"""Of the fewer bytes: what differs by no more counts as equally large on a Pareto front. Policies fill the same budget
up to a cell or two, which is no merit of theirs."""


def ranked(entries: Iterable[T], figure: Figure[T]) -> list[T]:
    """From the least figure to the largest, without those that lack it; ties in their order."""
    return [entry for _, entry in _with_figures(entries, figure)]


def leaders(entries: Iterable[T], figure: Figure[T]) -> list[T]:
    """The first of a ranking, and all that tie with it but for rounding."""
    having = _with_figures(entries, figure)
    return [entry for value, entry in having if math.isclose(value, having[0][0], rel_tol=1e-9, abs_tol=1e-12)]


def _with_figures(entries: Iterable[T], figure: Figure[T]) -> list[tuple[float, T]]:
    having = [(value, entry) for entry in entries if (value := figure(entry)) is not None]
    return sorted(having, key=lambda pair: pair[0])


def pareto_front(entries: Iterable[T], x: Figure[T], y: Figure[T]) -> list[T]:
    """By x, in bytes, the entries that no other on the front beats; less is better in both figures.

    One beats another with a smaller y in as many bytes at most, or with the same y in fewer; numbers of bytes within
    EQUAL_BYTES of each other are equal.
    """
    points = [(of_y, of_x, e) for e in entries if (of_x := x(e)) is not None and (of_y := y(e)) is not None]
    front: list[tuple[float, float, T]] = []
    # from the least y on: only what is on the front already can beat the next one
    for of_y, of_x, entry in sorted(points, key=lambda point: point[:2]):
        if not any(
            least <= of_x * (1 + EQUAL_BYTES) if lower < of_y else least * (1 + EQUAL_BYTES) < of_x
            for lower, least, _ in front
        ):
            front.append((of_y, of_x, entry))
    return [entry for *_, entry in sorted(front, key=lambda point: (point[1], point[0]))]


# ------------------------------------------------------------------------------------------------------ reading


def merge(folders: Sequence[Path]) -> Merged:
    """Read result folders of one model. Raises FormatError for others, and for a folder that is named twice."""
    places = [folder.resolve() for folder in folders]
    for index, place in enumerate(places):
        if place in places[:index]:
            raise FormatError(f"{folders[index]} is named twice; name every folder once")
    depth = 1
    while len({place.parts[-depth:] for place in places}) < len(places):
        depth += 1
    labels = ["/".join(place.parts[-depth:]) for place in places]
    sources = [Source(label, folder, _read(folder)) for folder, label in zip(folders, labels, strict=True)]
    models = {row.model: source.folder for source in sources for row in source.results.rows}
    if len(models) > 1:
        names = ", ".join(f"{folder} is of the model {model}" for model, folder in models.items())
        raise FormatError(f"{names}; a report compares results of one model: report them apart")
    return Merged(tuple(sorted(sources, key=lambda source: source.label)))


def _read(folder: Path) -> Results:
    path = folder / "results.json"
    if not path.exists():
        raise FormatError(f"{folder} has no results.json; name a folder of results, or start its stopped run again")
    results = read_results(path)
    if not results.rows:
        raise FormatError(f"{path} has no rows; measure something first")
    check_distinct(results.rows, path)
    return results
