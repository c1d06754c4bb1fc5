"""Result folders, one or several, as one set of rows: read and checked, and told apart where figures do not compare.

Fidelity compares between folders that measured the same weights, schedule, guidance, type, rows and samples; times only
between runs that were timed in turns, on one machine. What a row lacks is None, "not measured", and never 0. All texts
are made printable here, where they come in.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, TypeVar

from heatkv.core.io import is_folder, is_there, resolved
from heatkv.core.schedule import ScaleSchedule
from heatkv.errors import FormatError
from heatkv.profiling.measure.memory_figures import MemoryFigure, in_memory
from heatkv.profiling.report.blocks import mib
from heatkv.profiling.results.reading import FORMAT, read_results
from heatkv.profiling.results.fields import check_apart, printable

SEPARATOR = " · "
"""Between the parts of a label."""
AXES = ("batch", "seed")
"""What rows of one policy and budget of a folder may differ in."""
REFERENCE = "full"
"""The policy that all others are compared with; it is in no ranking."""


@dataclass(frozen=True, eq=False)
class Row:
    """One row of a results.json, and the folder it is from. `told` holds its fields, of the kinds they must be."""

    source: Source
    told: Mapping[str, Any]

    @property
    def policy(self) -> str:
        return str(self.told["policy"])

    @property
    def budget(self) -> str:
        return str(self.told["budget"])

    @property
    def name(self) -> str:
        return f"{self.policy} {self.budget}"

    @property
    def seed(self) -> int | None:
        """Its own, or that of its folder, which older ones told once for all rows."""
        found = self.told.get("seed", self.source.request.get("seed"))
        return None if found is None else int(found)

    @property
    def is_reference(self) -> bool:
        return self.policy == REFERENCE

    @property
    def storage(self) -> str | None:
        """How the cache is held; older rows only tell the type that they compute in."""
        found = self.told.get("storage") or self.told.get("dtype")
        return None if found is None else str(found)

    def number(self, name: str) -> float | None:
        """A figure; None where it was not measured."""
        found: float | None = self.told.get(name)
        return found

    def memory(self, figure: MemoryFigure) -> float | None:
        """Bytes of a ledger under the row's first plan; None where they were not measured."""
        found: float | None = in_memory(self.told.get("memory"), figure.path)
        return self.number(figure.field) if found is None and figure.field else found

    @property
    def timeline(self) -> Sequence[Sequence[float]] | None:
        """Bytes of the cache after every layer of every scale, [T][L], under the row's first plan."""
        found: Sequence[Sequence[float]] | None = self.told.get("timeline_bytes")
        return found

    def time(self, name: str = "latency_ms") -> Mapping[str, Any]:
        """A time as results.json has it, with `median` at least; empty where it was not measured."""
        return self.told.get(name) or {}

    @property
    def timed(self) -> str:
        """When it was timed: rows of one moment were timed in turns. Those of a folder that does not tell it, too."""
        found = self.told.get("timed")
        return f"not told by {self.source.label}" if found is None else _moment(str(found))

    @property
    def timed_on(self) -> Mapping[str, Any]:
        """The machine's load and speed when the row was timed, or, where that is not told, when its folder was made."""
        found: Mapping[str, Any] | None = self.told.get("timing_machine")
        return self.source.environment if found is None else found

    @property
    def held_bytes(self) -> float | None:
        """What the policy takes on the device: the arena, and the corrections of its plan if it has some."""
        allocated = self.number("allocated_bytes")
        return None if allocated is None else allocated + (self.number("compensation_bytes") or 0)

    @property
    def spread(self) -> tuple[float, float] | None:
        """Least and most KL of the plans of a policy that draws at random."""
        draws = self.told.get("kl_of_draws") or ()
        return (min(draws), max(draws)) if len(draws) > 1 else None

    @cached_property
    def schedule(self) -> ScaleSchedule | None:
        told = self.told.get("schedule")
        return None if told is None else ScaleSchedule.of(told)


@dataclass(frozen=True, eq=False)
class Source:
    """A result folder: where and how it was measured. `label` names it in the report."""

    label: str
    folder: Path
    environment: Mapping[str, Any]
    sampling: Mapping[str, Any]
    request: Mapping[str, Any]
    told_rows: tuple[Mapping[str, Any], ...]

    @cached_property
    def rows(self) -> tuple[Row, ...]:
        return tuple(Row(self, told) for told in self.told_rows)

    @cached_property
    def axes(self) -> tuple[str, ...]:
        """What rows of one policy and budget differ in: "batch", "seed", both or nothing."""
        return tuple(name for name in AXES if len({row.told.get(name) for row in self.rows}) > 1)

    @property
    def reference_dtype(self) -> str:
        """Type of the full cache that the others are compared with, or all types where there is no such row."""
        of_full = [str(row.told.get("dtype")) for row in self.rows if row.is_reference][:1]
        return ", ".join(of_full or sorted({str(row.told.get("dtype")) for row in self.rows}))

    @property
    def machine(self) -> str:
        """Two folders have the same one only if times of both may stand in one ranking; a folder that does not tell
        its machine shares it with none."""
        named = {name: self.environment.get(name) for name in ("device", "device_name", "threads", "versions")}
        if any(value is None for value in named.values()):
            return json.dumps(self.label)
        return json.dumps(named | {"system": self.environment.get("system")}, sort_keys=True)

    @property
    def machine_title(self) -> str:
        """The machine in words."""
        name, threads = self.environment.get("device_name"), self.environment.get("threads")
        versions = self.environment.get("versions")
        release = versions.get("torch") if isinstance(versions, dict) else None
        count = None if threads is None else f"{threads} thread{'' if threads == 1 else 's'}"
        parts = [name and f"{name}", count, release and f"torch {release}"]
        return ", ".join(part for part in parts if part) or "a machine that is not told"


@dataclass(frozen=True, eq=False)
class Group:
    """Rows whose figures compare. `title` says what sets them apart from other groups, "" where there are none; `key`
    is all that they share. The very same figures were found at what `also` names, which has no group of its own."""

    title: str
    rows: tuple[Row, ...]
    key: Mapping[str, str] = field(default_factory=dict)
    also: tuple[str, ...] = ()

    @property
    def sources(self) -> tuple[Source, ...]:
        return tuple(dict.fromkeys(row.source for row in self.rows))


@dataclass(frozen=True, eq=False)
class Merged:
    """All folders of a report, in an order that does not depend on the one they were named in."""

    sources: tuple[Source, ...]

    @cached_property
    def rows(self) -> tuple[Row, ...]:
        return tuple(row for source in self.sources for row in source.rows)

    @property
    def model(self) -> str:
        return next((str(row.told["model"]) for row in self.rows if row.told.get("model")), "a model that is not told")

    @cached_property
    def machines(self) -> dict[str, str]:
        """What the report calls every machine; told apart by a letter where there are several."""
        titles = {source.machine: source.machine_title for source in self.sources}
        if len(titles) == 1:
            return titles
        return {machine: f"machine {_letter(i)}: {title}" for i, (machine, title) in enumerate(titles.items())}

    @cached_property
    def axes(self) -> tuple[str, ...]:
        """What rows of one policy and budget of any folder differ in."""
        return tuple(axis for axis in AXES if any(axis in source.axes for source in self.sources))

    @cached_property
    def _several_storages(self) -> bool:
        return len({row.storage for row in self.rows}) > 1

    def label(self, row: Row, axes: Sequence[str] = AXES) -> str:
        """The policy, with its storage type, batch, seed and folder where several are in the report; of batch and seed
        only those in `axes`."""
        parts = [row.policy]
        if self._several_storages:
            parts.append(row.storage or "type not told")
        parts += [f"{axis} {row.told.get(axis)}" for axis in row.source.axes if axis in axes]
        if len(self.sources) > 1:
            parts.append(row.source.label)
        return SEPARATOR.join(parts)

    def point(self, row: Row) -> str:
        """Batch and seed of a row, of those that differ in the report."""
        told = [f"{axis} {row.told.get(axis)}" for axis in self.axes if row.told.get(axis) is not None]
        return ", ".join(told)

    @cached_property
    def fidelity_groups(self) -> tuple[Group, ...]:
        """Rows with a KL, by what their KL and bytes were measured on.

        The KL of images is the same however many are drawn at once: a group whose every figure is in an earlier one is
        left out, and named there.
        """
        kept: list[Group] = []
        figures: list[set[tuple[object, ...]]] = []
        for group in _groups((row for row in self.rows if row.number("kl") is not None), _fidelity_key):
            told = {_figure_of(row) for row in group.rows}
            same = next((place for place, others in enumerate(figures) if told <= others), None)
            if same is None:
                kept.append(group)
                figures.append(told)
            else:
                kept[same] = replace(kept[same], also=(*kept[same].also, _size_of(group.rows[0])))
        return _titled(kept)

    @cached_property
    def paired_groups(self) -> tuple[Group, ...]:
        """Rows that were compared in pairs, by what on. Batches share a comparison: its first row stands for all."""
        found: dict[tuple[object, ...], Row] = {}
        for row in self.rows:
            if row.told.get("versus") is not None:
                found.setdefault((row.source, row.name, row.told.get("comparison") or row), row)

        def key(row: Row) -> dict[str, str]:
            return {name: value for name, value in _fidelity_key(row).items() if name != "rows"}

        return _titled(_groups(found.values(), key))

    @cached_property
    def timing_groups(self) -> tuple[Group, ...]:
        """Rows with a time, by machine, what was timed, and when: only what was timed in turns stands in one ranking,
        since machines are not equally fast at all times."""

        def key(row: Row) -> dict[str, str]:
            seed = {} if row.seed is None else {"seed": str(row.seed)}
            return {"": self.machines[row.source.machine]} | _model_key(row) | seed | {"timed": row.timed}

        # the machine is always told
        return tuple(
            replace(group, title=", ".join(filter(None, [group.key[""], group.title])))
            for group in _titled(_groups((row for row in self.rows if row.time()), key))
        )


def _figure_of(row: Row) -> tuple[object, ...]:
    """What a KL is of; unlike all others where that is not told."""
    of = row.told.get("comparison") or row
    return row.source, row.policy, row.budget, row.storage, row.seed, of, row.number("kl")


def _size_of(row: Row) -> str:
    """How much is drawn at once, in words."""
    batch = row.told.get("batch")
    return f"a cache of {row.told.get('rows')} rows" if batch is None else f"batch {batch}"


def _moment(told: str) -> str:
    """A time of day to the second, or the text as it is where it is none."""
    try:
        moment = datetime.fromisoformat(told)
    except ValueError:
        return told
    return f"{moment:%Y-%m-%d %H:%M:%S %Z}".strip()


def _letter(index: int) -> str:
    return chr(ord("A") + index) if index < 26 else str(index + 1)


def _model_key(row: Row) -> dict[str, str]:
    told, source = row.told, row.source
    return {
        "weights": str(told.get("model_fingerprint") or f"not told by {source.label}"),
        "schedule": "not told" if row.schedule is None else str(row.schedule),
        "sampling": ", ".join(f"{name} {value}" for name, value in sorted(source.sampling.items())) or "not told",
        "rows": str(told.get("rows")),
    }


def _fidelity_key(row: Row) -> dict[str, str]:
    told, request, source = row.told, row.source.request, row.source
    # without its seed a folder does not tell its samples, and may share them with none
    seed = f"not told by {source.label}" if row.seed is None else str(row.seed)
    samples = request.get("samples_digest")
    if isinstance(samples, Mapping):  # one for every seed
        samples = samples.get(seed)
    return _model_key(row) | {
        "type": source.reference_dtype,
        "seed": seed,
        "samples": str(samples or "by seed"),
        "images": str(told.get("images")),
        "pictures": str(told.get("pictures")),
    }


def _groups(rows: Iterable[Row], key: Callable[[Row], dict[str, str]]) -> list[Group]:
    """By equal keys, without titles."""
    found: dict[str, tuple[dict[str, str], list[Row]]] = {}
    for row in rows:
        of_row = key(row)
        found.setdefault(json.dumps(of_row), (of_row, []))[1].append(row)
    return [Group("", tuple(members), of_group) for of_group, members in found.values()]


def _titled(groups: Sequence[Group]) -> tuple[Group, ...]:
    """The groups with what differs between their keys as titles; samples go without saying where each seed has its
    own."""
    names = dict.fromkeys(name for group in groups for name in group.key if name)
    differ = [name for name in names if len({group.key.get(name) for group in groups}) > 1]
    seeds = {group.key.get("seed") for group in groups}
    if "samples" in differ and len({(group.key.get("seed"), group.key["samples"]) for group in groups}) == len(seeds):
        differ.remove("samples")
    return tuple(
        replace(group, title=", ".join(f"{name} {group.key[name]}" for name in differ if name in group.key))
        for group in groups
    )


# ------------------------------------------------------------------------------------------- rankings and fronts


def budgets_of(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """The rows of every budget, the largest first, by their bytes where these are told; the reference is left out."""
    found: dict[float | str, list[Row]] = {}
    for row in rows:
        if not row.is_reference:
            room = row.number("budget_bytes")
            found.setdefault(row.budget if room is None else room, []).append(row)
    ordered = sorted(found, key=lambda key: (isinstance(key, str), key if isinstance(key, str) else -key))
    texts = {key: min(row.budget for row in found[key]) for key in ordered}
    shared = Counter(texts.values())
    names: dict[str, list[Row]] = {}
    for key in ordered:
        text = texts[key]
        if shared[text] > 1:  # of caches of several sizes
            text += " of an untold size" if isinstance(key, str) else f" ({mib(key)} MiB)"
        names[text if text not in names else f"{text}, {key} bytes"] = found[key]
    return names


class Ranked(Protocol):
    """What can stand in a ranking."""

    @property
    def policy(self) -> str: ...

    @property
    def source(self) -> Source: ...


R = TypeVar("R", bound=Ranked)

TIE = 1e-9
"""Of a figure: what lies closer together is the same but for rounding."""
EQUAL_BYTES = 0.01
"""Of the fewer bytes: what differs by no more counts as equally large on a Pareto front. Policies fill the same budget
up to a cell or two, which is no merit of theirs."""


def ranked(rows: Iterable[R], figure: Callable[[R], float | None]) -> list[R]:
    """From the least figure to the largest, without those that lack it; ties in the order of their names."""
    having = [(found, row.policy, row.source.label, row) for row in rows if (found := figure(row)) is not None]
    return [row for *_, row in sorted(having, key=lambda entry: entry[:3])]


def leaders(rows: Iterable[R], figure: Callable[[R], float | None]) -> list[R]:
    """The first of a ranking, and all that tie with it."""
    having = [(found, row) for row in ranked(rows, figure) if (found := figure(row)) is not None]
    return [row for found, row in having if math.isclose(found, having[0][0], rel_tol=TIE, abs_tol=1e-12)]


def pareto_front(rows: Iterable[R], x: Callable[[R], float | None], y: Callable[[R], float | None]) -> list[R]:
    """By x, in bytes, the rows that no other on the front beats; less is better in both figures.

    One beats another with a smaller y in as many bytes at most, or with the same y in fewer; numbers of bytes within
    EQUAL_BYTES of each other are equal.
    """
    points = [(of_y, of_x, row) for row in rows if (of_x := x(row)) is not None and (of_y := y(row)) is not None]
    front: list[tuple[float, float, R]] = []
    # from the least y on: only what is on the front already can beat the next one
    for of_y, of_x, row in sorted(points, key=lambda point: point[:2]):
        beaten = any(
            least <= of_x * (1 + EQUAL_BYTES) if lower < of_y else least * (1 + EQUAL_BYTES) < of_x
            for lower, least, _ in front
        )
        if not beaten:
            front.append((of_y, of_x, row))
    return [row for *_, row in sorted(front, key=lambda p: (p[1], p[0], p[2].policy, p[2].source.label))]


# ------------------------------------------------------------------------------------------------------ reading


def merge(folders: Sequence[Path]) -> Merged:
    """Read result folders of one model. Raises FormatError for a folder that is none, that is named twice, or that is
    of another model."""
    places = [resolved(folder) for folder in folders]
    for index, place in enumerate(places):
        if place in places[:index]:
            raise FormatError(f"{folders[index]} is named twice; name every folder once")
    labels = _labels(places)
    sources = [_read(folder, labels[place]) for folder, place in zip(folders, places, strict=True)]
    models: dict[str, Path] = {}
    for source in sources:
        for row in source.rows:
            models.setdefault(str(row.told.get("model") or ""), source.folder)
    named = [name for name in models if name]
    if len(named) > 1:
        raise FormatError(
            f"{models[named[0]]} is of the model {named[0]}, {models[named[1]]} of {named[1]}; a report compares "
            "results of one model: report them apart"
        )
    return Merged(tuple(sorted(sources, key=lambda source: source.label)))


def _labels(places: Sequence[Path]) -> dict[Path, str]:
    """The last parts of every path, as many as tell them all apart."""
    depth = 1
    while len({place.parts[-depth:] for place in places}) < len(places):
        depth += 1
    return {place: printable("/".join(place.parts[-depth:])) for place in places}


def _read(folder: Path, label: str) -> Source:
    path = folder / "results.json"
    if not is_folder(folder):
        raise FormatError(f"{folder} is no folder; name one that `heatkv compare` or `heatkv profile` wrote")
    if not is_there(path):
        partial = is_there(folder / "results.partial.json")
        way_out = "its run was not finished; the same command goes on from there" if partial else (
            "name one that `heatkv compare` or `heatkv profile` wrote"
        )  # fmt: skip
        raise FormatError(f"{folder} has no results.json; {way_out}")
    told = read_results(path)
    if not told.rows:
        raise FormatError(f"{path} is not a whole {FORMAT} file: its rows are [], no list of rows")
    check_apart(told.rows, str(path))
    return Source(
        label,
        folder,
        environment=printable(told.environment),
        sampling=printable(told.sampling),
        request=printable(told.request),
        told_rows=told.rows,
    )
