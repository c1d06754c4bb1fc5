"""Calibration statistics: how much every head looks back at every earlier scale, and where that was measured.

S-CAS, the scale-dependent cumulative attention score of HeatKV, is the attention mass head (l, h) puts on source scale
s, averaged over queries, over later target scales (the last included) and over calibration samples.
The drop error is what the picture's stream loses when one cell is dropped: the squared change of the head's
contribution, relative to the residual stream that enters the layer.
Arrays: L layers, H heads, T scales; mass[l, h, t, s] is target scale t looking at source scale s.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save as safetensors_bytes

from heatkv.core.checks import number, of_kind, regular_array, shown, whole
from heatkv.core.contents import EqualByContents
from heatkv.core.geometry import CacheGeometry
from heatkv.core.io import as_json, check_header, parse_json, read_json, replacing, whole_file
from heatkv.core.level_statistics import LARGEST_SUM, LevelStatistics
from heatkv.core.schedule import ScaleSchedule
from heatkv.errors import FormatError, ScheduleError, StatisticsError

FORMAT, VERSION = "heatkv-statistics", 1
_NEEDED = ("mass_sum", "mass_square_sum")
_ARRAYS = (*_NEEDED, "all_mass_sum", "error_sum")
_OF_TARGETS = ("concentration_sum", "similarity_sum")
_MASS_TOLERANCE = 1e-3  # of the sum over sources, which is 1: bf16 attention rounds

PUBLISHED_SINKS = 3
"""First scales that published rankings leave out, as the paper never drops them."""

_MEASURE_INSTEAD = "plan from statistics of it (heatkv calibrate, then --statistics FILE)"

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]


def mean_over_targets(values_LHTT: FloatArray) -> FloatArray:
    """[l, h, s]: mean of values[l, h, t, s] over the later target scales t > s; 0 for the last scale."""
    layers, heads, scales, _ = values_LHTT.shape
    mean = np.zeros((layers, heads, scales))
    for source in range(scales - 1):
        mean[:, :, source] = values_LHTT[:, :, source + 1 :, source].mean(axis=2)
    return mean


@dataclass(frozen=True)
class Provenance:
    """Where statistics were measured. All but `samples`, `seed` and `versions` must agree for a merge.

    `samples` names every calibration sample once, as "seed:index:label". `cfg` is None when the guidance was not told.
    """

    model: str
    fingerprint: str
    cfg: float | None
    settings: Mapping[str, Any]
    samples: tuple[str, ...]
    versions: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("model", "fingerprint"):
            of_kind(getattr(self, name), str, name, StatisticsError, "give it as text")
        for name in ("settings", "versions"):
            of_kind(getattr(self, name), Mapping, name, StatisticsError, "give a dictionary")
        if self.cfg is not None:
            object.__setattr__(self, "cfg", number(self.cfg, "cfg", StatisticsError))
        of_kind(self.samples, tuple, "samples", StatisticsError, "give a tuple of names, seed:index:label")

    def to_json(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "fingerprint": self.fingerprint,
            "cfg": self.cfg,
            "settings": dict(self.settings),
            "samples": list(self.samples),
            "versions": dict(self.versions),
        }


@dataclass(frozen=True, eq=False)
class Statistics(EqualByContents):
    """Sums over samples, so that shards merge by addition; float64 (L, H, T, T), entries with s > t are zero.

    `mass_sum` and `mass_square_sum` are of the conditional rows' attention mass, as the paper has it, `all_mass_sum`
    of the mean over all rows, `error_sum` of the drop error, summed over queries, mean over rows; `levels` are the
    costs of coarser levels. `concentration_sum` (L, H, T) is of how unevenly a scale's queries attend to the keys,
    `similarity_sum` (L, T) of how much its keys and values are like those of the scale before. The last five are None
    where they were not measured. Statistics are equal when all they hold is, arrays exactly so. Raises StatisticsError
    for wrong kinds or shapes, values that are not finite or negative, or masses that do not sum to one.
    """

    schedule: ScaleSchedule
    mass_sum: FloatArray
    mass_square_sum: FloatArray
    provenance: Provenance
    all_mass_sum: FloatArray | None = None
    error_sum: FloatArray | None = None
    levels: LevelStatistics | None = None
    concentration_sum: FloatArray | None = None
    similarity_sum: FloatArray | None = None

    def __post_init__(self) -> None:
        of_kind(self.schedule, ScaleSchedule, "schedule", StatisticsError, "give the ScaleSchedule they are of")
        of_kind(
            self.provenance, Provenance, "provenance", StatisticsError, "say in a Provenance where they were measured"
        )
        if self.levels is not None:
            of_kind(self.levels, LevelStatistics, "levels", StatisticsError, "give LevelStatistics, or None for none")
        scales = len(self.schedule)
        for name, given in self.sums().items():
            if name in _OF_TARGETS:
                self._check_of_targets(name, given)
                continue
            try:
                array = np.array(given, dtype=np.float64)
            except (TypeError, ValueError):
                raise StatisticsError(f"{name} is {shown(given)}; it must be an array of numbers") from None
            if array.ndim != 4 or array.shape[2:] != (scales, scales) or 0 in array.shape:
                raise StatisticsError(f"{name} has shape {array.shape}; it must be (layers, heads, {scales}, {scales})")
            if not ((array >= 0) & (array <= LARGEST_SUM)).all():
                layer, head, target, source = (int(i) for i in np.argwhere(~((array >= 0) & (array <= LARGEST_SUM)))[0])
                raise StatisticsError(
                    f"{name} of layer {layer}, head {head}, target {target}, source {source} is "
                    f"{array[layer, head, target, source]}; it must be finite and not negative, and below "
                    f"{LARGEST_SUM:g}"
                )
            if array.shape != np.shape(self.mass_sum):
                raise StatisticsError(f"mass_sum is {np.shape(self.mass_sum)}, {name} {array.shape}")
            if np.triu(array, 1).any():
                raise StatisticsError(f"{name}: a target scale looks at a later source scale, which does not exist yet")
            array.setflags(write=False)
            object.__setattr__(self, name, array)
        if self.levels is not None and (
            (self.levels.layers, self.levels.heads) != (self.layers, self.heads)
            or self.levels.choices.schedule != self.schedule
        ):
            raise StatisticsError(
                f"the level costs are of {self.levels.layers} layers x {self.levels.heads} heads and the schedule "
                f"{self.levels.choices.schedule}, the rest of {self.layers} x {self.heads} and {self.schedule}"
            )
        if not self.count:
            raise StatisticsError("statistics of no sample say nothing; calibrate with at least one")
        if len(set(self.provenance.samples)) != self.count:
            raise StatisticsError("a calibration sample is counted twice")
        for sums in (self.mass_sum, self.all_mass_sum):
            if sums is None:
                continue
            off = np.abs((sums / self.count).sum(axis=3) - 1).max()
            if off > _MASS_TOLERANCE:
                raise StatisticsError(f"the attention mass of a head sums to 1 +- {off:.3g} over its sources, not to 1")
        self._check_possible()

    def _check_possible(self) -> None:
        """Raise StatisticsError for sums that no samples can have: squares beside their masses, cosines, variances."""
        mean, square = self.mass_sum / self.count, self.mass_square_sum / self.count
        # of shares from 0 to 1: mean^2 <= mean of squares <= mean
        impossible = (square < mean**2 - _MASS_TOLERANCE) | (square > mean + _MASS_TOLERANCE)
        if impossible.any():
            layer, head, target, source = (int(i) for i in np.argwhere(impossible)[0])
            raise StatisticsError(
                f"mass_square_sum of layer {layer}, head {head}, target {target}, source {source} cannot be that of "
                f"masses whose sum is mass_sum; measure the statistics again"
            )
        keys = np.cumsum(self.schedule.tokens, dtype=float)  # that a target may see: the variance is below their count
        for name, most in (("similarity_sum", 1.0), ("concentration_sum", keys)):
            array = getattr(self, name)
            if array is not None and (np.abs(array / self.count) > most * (1 + _MASS_TOLERANCE)).any():
                raise StatisticsError(f"{name} is beyond what it can be of {self.count} samples; measure them again")

    def sums(self) -> dict[str, FloatArray]:
        """What was measured, summed over samples, by the names in files."""
        names = (*_ARRAYS, *_OF_TARGETS)
        return {name: array for name in names if (array := getattr(self, name)) is not None or name in _NEEDED}

    def _check_of_targets(self, name: str, given: FloatArray) -> None:
        array = np.array(given, dtype=np.float64)
        of_heads = name == "concentration_sum"
        wanted = (self.layers, *((self.heads,) if of_heads else ()), len(self.schedule))
        if array.shape != wanted:
            raise StatisticsError(f"{name} has shape {array.shape}; it must be {wanted}")
        fine = (np.abs(array) <= LARGEST_SUM) & ((array >= 0) | (not of_heads))
        if not fine.all():
            layer, *head, target = (int(i) for i in np.argwhere(~fine)[0])
            of_head = f", head {head[0]}" if head else ""
            raise StatisticsError(
                f"{name} of layer {layer}{of_head}, target {target} is {array[layer, *head, target]}; it must be finite"
                f"{' and not negative' if of_heads else ''}, and below {LARGEST_SUM:g}"
            )
        array.setflags(write=False)
        object.__setattr__(self, name, array)

    def __hash__(self) -> int:
        return hash((self.schedule, self.provenance.fingerprint, self.provenance.samples))

    @property
    def layers(self) -> int:
        return int(self.mass_sum.shape[0])

    @property
    def heads(self) -> int:
        return int(self.mass_sum.shape[1])

    @property
    def count(self) -> int:
        """Samples measured."""
        return len(self.provenance.samples)

    @cached_property
    def mass(self) -> FloatArray:
        """Mean attention mass [l, h, t, s] over samples and queries."""
        mean: FloatArray = self.mass_sum / self.count
        return mean

    @cached_property
    def spread(self) -> FloatArray:
        """Standard deviation of the mass over samples (zero for a single one)."""
        if self.count < 2:
            return np.zeros_like(self.mass)
        variance = (self.mass_square_sum - self.count * self.mass**2) / (self.count - 1)
        spread: FloatArray = np.sqrt(np.maximum(variance, 0))
        return spread

    @property
    def all_mass(self) -> FloatArray:
        """Mean attention mass [l, h, t, s] over samples, queries and all rows, the unconditional ones too.

        Raises StatisticsError when it was not measured.
        """
        return self._measured("all_mass_sum")

    @property
    def drop_error(self) -> FloatArray:
        """Mean over samples and rows of the squared error of dropping cell (l, h, s) for target t, summed over queries:
        sum_q |W_o^h p_s (o_s - o_rest)|^2 mean(gate^2) / mean |x|^2, x the residual stream entering layer l.

        Raises StatisticsError when it was not measured.
        """
        return self._measured("error_sum")

    @property
    def concentration(self) -> FloatArray:
        """How unevenly target t's queries attend to the keys, [l, h, t]: the variance over keys of the mean probability
        they receive, relative to the square of its mean; 0 where all receive the same. Mean over samples.

        Raises StatisticsError when it was not measured.
        """
        return self._measured("concentration_sum")

    @property
    def similarity(self) -> FloatArray:
        """Cosine between the keys of target t and those of the scale before, resized to its grid, and of the values
        alike, [l, t]; mean over heads, samples and both. 0 for the first scale.

        Raises StatisticsError when it was not measured.
        """
        return self._measured("similarity_sum")

    def _measured(self, name: str) -> FloatArray:
        sums: FloatArray | None = getattr(self, name)
        if sums is None:
            raise StatisticsError(
                f"these statistics ({self.provenance.model}) lack {name}, which was not measured with them; calibrate "
                "again with this release"
            )
        mean: FloatArray = sums / self.count
        return mean

    @cached_property
    def scas(self) -> FloatArray:
        """S-CAS [l, h, s]: mean over the later target scales t > s; the last scale, read by nobody, has 0."""
        return mean_over_targets(self.mass)

    def gini(self) -> FloatArray:
        """Gini coefficient of S-CAS over all heads, per source scale: 0 = all alike, near 1 = one head does it all."""
        flat = np.sort(self.scas[:, :, :-1].reshape(-1, len(self.schedule) - 1), axis=0)
        count = flat.shape[0]
        weights = 2 * np.arange(1, count + 1) - count - 1
        total = flat.sum(axis=0)
        gini: FloatArray = np.divide(weights @ flat, count * total, out=np.zeros_like(total), where=total > 0)
        return gini

    def check_geometry(self, geometry: CacheGeometry) -> None:
        """Raise StatisticsError unless they were measured on a model of this geometry and schedule."""
        of_kind(geometry, CacheGeometry, "geometry", StatisticsError, "give that of a model: model.geometry")
        if (self.layers, self.heads) != (geometry.layers, geometry.heads):
            raise StatisticsError(
                f"the statistics are of {self.layers} layers x {self.heads} heads ({self.provenance.model}), the model "
                f"has {geometry.layers} x {geometry.heads}; calibrate this model"
            )
        if self.schedule != geometry.schedule:
            raise StatisticsError(
                f"the statistics are of the schedule {self.schedule}, the model runs {geometry.schedule}; calibrate it"
            )

    def check_fingerprint(self, fingerprint: str) -> None:
        """Raise StatisticsError unless they were measured on the very weights with this fingerprint."""
        if self.provenance.fingerprint != fingerprint:
            raise StatisticsError(
                f"the statistics were measured on other weights ({self.provenance.model}, fingerprint "
                f"{self.provenance.fingerprint}; the model's is {fingerprint}); calibrate this model"
            )

    def with_levels(self, levels: LevelStatistics | None) -> Statistics:
        """The same with these level costs. Raises StatisticsError when they are of another geometry."""
        return replace(self, levels=levels)

    def merge(self, other: Statistics) -> Statistics:
        """Both sample sets as one. Raises StatisticsError when they were not measured alike or share a sample."""
        of_kind(other, Statistics, "the other", StatisticsError, "load statistics with Statistics.load, or calibrate")
        mine, theirs = self.provenance, other.provenance
        for name in ("model", "fingerprint", "cfg", "settings"):
            if getattr(mine, name) != getattr(theirs, name):
                raise StatisticsError(
                    f"cannot merge statistics with {name} {getattr(mine, name)!r} and {getattr(theirs, name)!r}"
                )
        if self.schedule != other.schedule or self.mass_sum.shape != other.mass_sum.shape:
            raise StatisticsError("cannot merge statistics of different schedules or head counts")
        twice = set(mine.samples) & set(theirs.samples)
        if twice:
            raise StatisticsError(
                f"{len(twice)} samples are in both statistics (for instance {min(twice)}); use another seed"
            )
        merged = Provenance(
            mine.model, mine.fingerprint, mine.cfg, mine.settings, mine.samples + theirs.samples, mine.versions
        )
        arrays, more = self.sums(), other.sums()
        if set(arrays) != set(more):
            raise StatisticsError(
                f"cannot merge statistics of {', '.join(arrays)} with those of {', '.join(more)}; calibrate again"
            )
        sums = {name: array + more[name] for name, array in arrays.items()}
        mine_levels, their_levels = self.levels, other.levels
        levels = mine_levels if mine_levels is not None else their_levels
        if mine_levels is not None and their_levels is not None:
            levels = mine_levels.merge(their_levels)
        return Statistics(self.schedule, provenance=merged, levels=levels, **sums)

    # ------------------------------------------------------------------ files

    def save(self, path: str | Path) -> None:
        """Write a statistics file, whole or not at all. Raises FormatError."""
        header = {
            "format": FORMAT,
            "version": VERSION,
            "schedule": self.schedule.to_json(),
            "provenance": self.provenance.to_json(),
        }
        arrays = self.sums()
        if self.levels is not None:
            header["levels"] = self.levels.header()
            arrays |= self.levels.arrays()
        text = as_json(header, path)
        with replacing(path) as temporary:
            temporary.write_bytes(safetensors_bytes(arrays, metadata={"heatkv": text}))

    @classmethod
    def load(cls, path: str | Path) -> Statistics:
        """Read a statistics file; nothing in it is executed.

        Raises FormatError, ScheduleError or StatisticsError.
        """
        path = whole_file(path)
        try:
            with safe_open(path, framework="numpy") as file:
                text = (file.metadata() or {}).get("heatkv", "null")
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        except OSError as error:
            raise FormatError(f"cannot read {path}: {error.strerror or error}") from error
        except Exception as error:  # whatever safetensors stumbles over: types that numpy lacks, shapes beyond it
            raise FormatError(f"{path} is not a whole statistics file: {error}") from error
        if other := sorted(name for name, array in arrays.items() if array.dtype.kind != "f"):
            raise FormatError(
                f"{path} is not a whole statistics file: {shown(other[0])} is of {arrays[other[0]].dtype}, not of "
                "floating-point numbers"
            )
        header = check_header(parse_json(text, path), path, FORMAT, VERSION)
        try:
            told = header["provenance"]
            for name in ("settings", "versions"):
                if not isinstance(told[name], dict):
                    raise FormatError(
                        f"{path} is not a whole statistics file: its {name} is {shown(told[name])}, no object"
                    )
            levels = None
            if "levels" in header:
                of_levels = {name: arrays.pop(name) for name in list(arrays) if name.startswith("levels.")}
                levels = LevelStatistics.from_file(ScaleSchedule.of(header["schedule"]), header["levels"], of_levels)
            known = (*_ARRAYS, *_OF_TARGETS)
            if not set(_NEEDED) <= set(arrays) <= set(known):
                raise FormatError(f"{path} holds the arrays {sorted(arrays)}; known are {', '.join(known)}")
            return cls(
                ScaleSchedule.of(header["schedule"]),
                **arrays,
                levels=levels,
                provenance=Provenance(
                    model=str(told["model"]),
                    fingerprint=str(told["fingerprint"]),
                    cfg=None if told["cfg"] is None else float(told["cfg"]),
                    settings=dict(told["settings"]),
                    samples=tuple(str(sample) for sample in told["samples"]),
                    versions=dict(told["versions"]),
                ),
            )
        except (StatisticsError, ScheduleError) as error:
            raise type(error)(f"{path}: {error}") from error
        except KeyError as error:
            raise FormatError(f"{path} is not a whole statistics file: it lacks {shown(error.args[0])}") from error
        except (TypeError, ValueError, OverflowError) as error:
            raise FormatError(f"{path} is not a whole statistics file: {error}") from error


@dataclass(frozen=True, eq=False)
class HeadRankings(EqualByContents):
    """For consecutive source scales, every (layer, head) pair from least to most important.

    `order[i]`, of (scales, L*H), belongs to source scale `first_scale + i` and lists flat pair indices l*H + h, first
    dropped first. Rankings are equal when all they hold is. Raises StatisticsError for what is no such array.
    """

    layers: int
    heads: int
    first_scale: int
    order: IntArray

    def __post_init__(self) -> None:
        for name, least in (("layers", 1), ("heads", 1), ("first_scale", 0)):
            object.__setattr__(self, name, whole(getattr(self, name), name, StatisticsError, least))
        try:
            given = np.asarray(self.order)
        except ValueError:
            raise StatisticsError("the rankings are not all of the same length") from None
        if not np.issubdtype(given.dtype, np.integer):
            raise StatisticsError(f"rankings list whole numbers l*H + h, not {shown(self.order)}")
        order = given.astype(np.int64)
        pairs = self.layers * self.heads
        if order.ndim != 2 or order.shape[1] != pairs:
            raise StatisticsError(f"a ranking must list all {pairs} (layer, head) pairs; got an array {order.shape}")
        if (np.sort(order, axis=1) != np.arange(pairs)).any():
            raise StatisticsError("a ranking must list every (layer, head) pair exactly once")
        order.setflags(write=False)
        object.__setattr__(self, "order", order)

    def __hash__(self) -> int:
        return hash((self.layers, self.heads, self.first_scale, self.order.tobytes()))

    @cached_property
    def ranks(self) -> IntArray:
        """Position of every pair in its ranking, shape (scales, L, H)."""
        ranks = np.empty_like(self.order)
        np.put_along_axis(ranks, self.order, np.arange(self.order.shape[1])[None], axis=1)
        return ranks.reshape(-1, self.layers, self.heads)

    def for_scales(self, first: int, stop: int) -> IntArray:
        """Ranks (stop - first, L, H) of the source scales from `first` up to `stop`, not included."""
        last = self.first_scale + len(self.order)
        if first < self.first_scale or stop > last:
            raise StatisticsError(
                f"the rankings cover the source scales {self.first_scale} to {last - 1}; {first} to {stop - 1} are "
                "needed: change the schedule or the number of sink scales"
            )
        return self.ranks[first - self.first_scale : stop - self.first_scale]

    @classmethod
    def from_scores(cls, scores_LHS: FloatArray) -> HeadRankings:
        """Rank ascending by score, ties by head, then layer (HeatKV, section 3)."""
        layers, heads, _ = scores_LHS.shape
        by_head = scores_LHS.transpose(2, 1, 0).reshape(scores_LHS.shape[2], -1)
        order = np.argsort(by_head, axis=1, kind="stable")
        return cls(layers, heads, 0, (order % layers) * heads + order // layers)

    @classmethod
    def random(cls, geometry: CacheGeometry, seed: int) -> HeadRankings:
        """An independent uniformly random ranking for every source scale."""
        generator = np.random.default_rng(seed % (1 << 64))  # a negative seed is a seed too
        pairs = geometry.layers * geometry.heads
        order = np.stack([generator.permutation(pairs) for _ in range(len(geometry.schedule))])
        return cls(geometry.layers, geometry.heads, 0, order)

    @classmethod
    def load_orders(cls, path: str | Path, geometry: CacheGeometry) -> HeadRankings:
        """Read a ranking file as published with HeatKV: a list of rankings, each a list of [head, layer] pairs.

        Such a file has one ranking for every cached scale but the first three, and is refused for a schedule of
        another number of scales. What else it was measured on it does not tell. Raises FormatError or StatisticsError.
        """
        rankings, scales = cls.from_pairs(read_json(path), geometry, path), len(geometry.schedule)
        count = len(rankings.order)
        if rankings.first_scale != PUBLISHED_SINKS:
            raise StatisticsError(
                f"{path} has {count} rankings, which are those of a schedule of {count + PUBLISHED_SINKS + 1} scales "
                f"(all cached ones but the first {PUBLISHED_SINKS}); this one has {scales} scales: {_MEASURE_INSTEAD}"
            )
        return rankings

    @classmethod
    def from_pairs(cls, value: Sequence[Any], geometry: CacheGeometry, source: str | Path) -> HeadRankings:
        """From such a list of any number of rankings; the last one is that of the last cached scale, T-2."""
        layers, heads, scales = geometry.layers, geometry.heads, len(geometry.schedule)
        if not isinstance(value, list) or not value:
            raise FormatError(f"{source} is no list of rankings")
        pairs = regular_array(value, 3)
        if pairs is None or pairs.shape[2] != 2:
            raise FormatError(
                f"{source} must be a list of rankings, all of the same length, of [head, layer] pairs of whole numbers"
            )
        if pairs.shape[1] != layers * heads:
            raise StatisticsError(
                f"{source} ranks {pairs.shape[1]} (head, layer) pairs; the model has {layers} layers x {heads} heads = "
                f"{layers * heads}"
            )
        if pairs.shape[0] > scales - 1:
            raise StatisticsError(
                f"{source} has {pairs.shape[0]} rankings; the schedule caches {scales - 1} scales: {_MEASURE_INSTEAD}"
            )
        head, layer = pairs[..., 0], pairs[..., 1]
        if (head < 0).any() or (head >= heads).any() or (layer < 0).any() or (layer >= layers).any():
            raise StatisticsError(f"{source} names a head or layer outside {heads} heads and {layers} layers")
        return cls(layers, heads, scales - 1 - pairs.shape[0], layer * heads + head)
