"""Calibration statistics: how much every head looks back at every earlier scale, and where that was measured.

S-CAS, the scale-dependent cumulative attention score of HeatKV, is the attention mass head (l, h) puts on source scale
s, averaged over queries, over later target scales (the last included) and over calibration samples.
The drop error is what the picture's stream loses when one cell is dropped: the squared change of the head's
contribution, relative to the residual stream that enters the layer.
Arrays: L layers, H heads, T scales; mass[l, h, t, s] is target scale t looking at source scale s; levels are indices
into LEVELS with NONE after them.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import msgspec
import numpy as np
from msgspec import Meta, Struct

from heatkv.core.geometry import CacheGeometry
from heatkv.core.io import check_header, in_file, read_tensors, write_tensors
from heatkv.core.levels import LEVELS, NONE, LevelChoices, log_counts
from heatkv.core.schedule import ScaleSchedule
from heatkv.core.schema import EqualByContents, FloatArray, convert, fixed
from heatkv.errors import FormatError, StatisticsError

FORMAT, VERSION = "heatkv-statistics", 1

_AXES = {
    "mass_sum": "LHTT", "mass_square_sum": "LHTT", "all_mass_sum": "LHTT", "error_sum": "LHTT",
    "concentration_sum": "LHT", "similarity_sum": "LT",
}  # fmt: skip
"""The arrays of a statistics file; all but the first two may be missing."""

_MASS_TOLERANCE = 1e-3  # of the sum over sources, which is 1: bf16 attention rounds

COSTS = ("error", "fisher")
"""The kinds of level costs."""

LARGEST_SUM = 1e100
"""Of anything that was measured: far above every real one, and its sums and squares still finite."""


def mean_over_targets(values_LHTT: FloatArray) -> FloatArray:
    """[l, h, s]: mean of values[l, h, t, s] over the later target scales t > s; 0 for the last scale."""
    layers, heads, scales, _ = values_LHTT.shape
    mean = np.zeros((layers, heads, scales))
    for source in range(scales - 1):
        mean[:, :, source] = values_LHTT[:, :, source + 1 :, source].mean(axis=2)
    return mean


def calibrated_bias(schedule: ScaleSchedule, whole_LHT: FloatArray, pooled_LHTV: FloatArray) -> FloatArray:
    """log_bias[l, h, s, level] = log(attention mass on the whole cell / the same with its pooled keys and no bias).

    Both masses are sums over all later queries, relative to the full attention's. The log of the count stands in
    where nothing was read; level "full" has 0.
    """
    counts = np.stack([log_counts(schedule, level) for level in LEVELS], axis=-1)
    bias = np.broadcast_to(counts, pooled_LHTV.shape).copy()
    read = (whole_LHT[..., None] > 0) & (pooled_LHTV > 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        bias[read] = np.log(whole_LHT[..., None] / pooled_LHTV)[read]
    bias[..., 0] = 0
    return bias


def _check_array(array: FloatArray, shape: tuple[int, ...], name: str, least: float = 0) -> None:
    """Raise StatisticsError for another shape, or an entry below `least`, above LARGEST_SUM or not a number."""
    if array.shape != shape or 0 in shape:
        raise StatisticsError(f"{name} has shape {array.shape}, not {shape}")
    wrong = np.argwhere(~((array >= least) & (array <= LARGEST_SUM)))
    if len(wrong):
        place = tuple(int(i) for i in wrong[0])
        raise StatisticsError(
            f"{name}{list(place)} is {array[place]}; it must be from {least:g} to {LARGEST_SUM:g}: measure it again"
        )


class SampleSums(EqualByContents, ABC):
    """Arrays that were summed over samples, so that those of disjoint samples add up; equal when all they hold is."""

    samples: tuple[str, ...]

    @abstractmethod
    def sums(self) -> dict[str, FloatArray]:
        """What was measured, summed over samples, by the names in files."""

    @abstractmethod
    def with_sums(self, sums: Mapping[str, FloatArray], samples: tuple[str, ...]) -> Self:
        """Other sums, over other samples, measured alike."""

    @abstractmethod
    def check_alike(self, other: Self) -> None:
        """Raise StatisticsError for what was measured in another way, so that sums cannot be added up."""

    @property
    def count(self) -> int:
        """Samples measured."""
        return len(self.samples)

    def merge(self, other: Self) -> Self:
        """Both sample sets as one. Raises StatisticsError when they were not measured alike or share a sample."""
        self.check_alike(other)
        shared = set(self.samples) & set(other.samples)
        if shared:
            raise StatisticsError(
                f"{len(shared)} samples are in both (for instance {min(shared)}); measure others, with another seed"
            )
        mine, theirs = self.sums(), other.sums()
        if set(mine) != set(theirs):
            raise StatisticsError(
                f"cannot merge statistics of {', '.join(mine)} with those of {', '.join(theirs)}; calibrate again"
            )
        return self.with_sums(
            {name: array + theirs[name] for name, array in mine.items()}, self.samples + other.samples
        )

    def _check_samples(self) -> None:
        if not self.samples or len(set(self.samples)) != self.count:
            raise StatisticsError("statistics are of no sample, or count one twice")


class _LevelHeader(Struct):
    cost: Literal["error", "fisher"]
    sink_scales: Annotated[int, Meta(ge=0)]
    joint: Annotated[int, Meta(ge=0)]
    samples: tuple[str, ...]
    bias_samples: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class LevelStatistics(SampleSums):
    """Costs of holding cells at coarser levels, summed over samples, under frozen biases.

    `log_bias` is (L, H, T, levels). `joint_sum[t]` is (L, H, combinations of target t) in the order of `choices`;
    `single_sum[l, h, t, s, level]` is the cost of that level alone, all else whole, for the sources that are not joint.
    `cost` is "error", the squared output error relative to the residual stream, summed over queries, or "fisher", the
    expected squared change of the log-likelihood.
    """

    choices: LevelChoices
    cost: str
    log_bias: FloatArray
    joint_sum: tuple[FloatArray, ...]
    single_sum: FloatArray
    samples: tuple[str, ...]
    bias_samples: tuple[str, ...]

    def __post_init__(self) -> None:
        for name in ("log_bias", "single_sum"):
            object.__setattr__(self, name, fixed(np.array(getattr(self, name), dtype=np.float64)))
        joint = tuple(fixed(np.array(array, dtype=np.float64)) for array in self.joint_sum)
        object.__setattr__(self, "joint_sum", joint)

    def __hash__(self) -> int:
        return hash((self.choices, self.cost, self.samples))

    @property
    def layers(self) -> int:
        return int(self.log_bias.shape[0])

    @property
    def heads(self) -> int:
        return int(self.log_bias.shape[1])

    @cached_property
    def joint(self) -> tuple[FloatArray, ...]:
        """Mean over samples of the cost of every combination, per target (L, H, combinations)."""
        return tuple(joint / self.count for joint in self.joint_sum)

    @cached_property
    def single(self) -> FloatArray:
        """Mean over samples of the cost of one source at a level, [l, h, t, s, level]."""
        return self.single_sum / self.count

    def sums(self) -> dict[str, FloatArray]:
        joint = {f"joint_sum.{target}": array for target, array in enumerate(self.joint_sum)}
        return {"single_sum": self.single_sum, **joint}

    def with_sums(self, sums: Mapping[str, FloatArray], samples: tuple[str, ...]) -> LevelStatistics:
        joint = tuple(sums[f"joint_sum.{target}"] for target in range(len(self.joint_sum)))
        return replace(self, joint_sum=joint, single_sum=sums["single_sum"], samples=samples)

    def check(self) -> None:
        """Raise StatisticsError for arrays that do not fit together, costs that are not finite or negative, and samples
        that are none or counted twice."""
        scales, heads = len(self.choices.schedule), self.log_bias.shape[:2]
        _check_array(self.log_bias, (*heads, scales, len(LEVELS)), "log_bias of levels", -LARGEST_SUM)
        _check_array(self.single_sum, (*heads, scales, scales, NONE + 1), "single_sum of levels")
        for target, joint in enumerate(self.joint_sum):
            combinations = math.prod(self.choices.shape(target))
            _check_array(joint, (*heads, combinations), f"joint_sum of levels for target {target}")
        self._check_samples()

    def check_alike(self, other: LevelStatistics) -> None:
        """Raise StatisticsError for other biases, kinds or choices, with which costs cannot be added up."""
        for name in ("cost", "choices"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                raise StatisticsError(f"cannot merge level costs of {name} {mine} and {theirs}; measure both alike")
        if not np.array_equal(self.log_bias, other.log_bias):
            raise StatisticsError(
                "cannot merge level costs measured under different biases; measure the second part with the first's"
            )

    # ------------------------------------------------------------------ files

    def arrays(self) -> dict[str, FloatArray]:
        """The arrays by their names in a statistics file."""
        return {"levels.log_bias": self.log_bias} | {f"levels.{name}": array for name, array in self.sums().items()}

    def header(self) -> dict[str, Any]:
        """What a statistics file says of them."""
        choices, samples = self.choices, list(self.samples)
        names = {"cost": self.cost, "sink_scales": choices.sink_scales, "joint": choices.joint}
        return names | {"samples": samples, "bias_samples": list(self.bias_samples)}

    @classmethod
    def from_file(
        cls, schedule: ScaleSchedule, header: Any, arrays: Mapping[str, FloatArray], source: str | Path = "level costs"
    ) -> LevelStatistics:
        """From what `header` and `arrays` gave. Raises FormatError or StatisticsError."""
        fields = convert(header, _LevelHeader, source)
        joint = [f"levels.joint_sum.{target}" for target in range(len(schedule))]
        _check_names(arrays, ("levels.log_bias", "levels.single_sum", *joint), (), source)
        costs = cls(
            LevelChoices(schedule, fields.sink_scales, fields.joint), fields.cost, arrays["levels.log_bias"],
            tuple(arrays[name] for name in joint), arrays["levels.single_sum"], fields.samples, fields.bias_samples,
        )  # fmt: skip
        costs.check()
        return costs


def _check_names(
    arrays: Mapping[str, FloatArray], needed: tuple[str, ...], optional: tuple[str, ...], source: str | Path
) -> None:
    if not set(needed) <= set(arrays) <= {*needed, *optional}:
        raise FormatError(f"{source} holds the arrays {sorted(arrays)}; it must hold {', '.join((*needed, *optional))}")
    if other := sorted(name for name, array in arrays.items() if array.dtype.kind != "f"):
        raise FormatError(f"{source}: {other[0]} is of {arrays[other[0]].dtype}, not of floating-point numbers")


@dataclass(frozen=True)
class Provenance:
    """Where statistics were measured. All but `samples` and `versions` must agree for a merge.

    `samples` names every calibration sample once, as "seed:index:label". `cfg` is None when the guidance is unknown.
    """

    model: str
    fingerprint: str
    cfg: float | None
    settings: Mapping[str, Any]
    samples: tuple[str, ...]
    versions: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """As in the header of a statistics file."""
        fields: dict[str, Any] = msgspec.to_builtins(self)
        return fields


class _Header(Struct):
    schedule: list[list[int]]
    provenance: Provenance
    levels: Any = None


@dataclass(frozen=True, eq=False)
class Statistics(SampleSums):
    """Sums over samples, so that shards merge by addition; float64 (L, H, T, T), entries with s > t are zero.

    `mass_sum` and `mass_square_sum` are of the conditional rows' attention mass, as the paper has it, `all_mass_sum`
    of the mean over all rows, `error_sum` of the drop error, summed over queries, mean over rows; `levels` are the
    costs of coarser levels. `concentration_sum` (L, H, T) is of how unevenly a scale's queries attend to the keys,
    `similarity_sum` (L, T) of how much its keys and values are like those of the scale before. The last five are None
    where they were not measured.
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
        for name, array in self.sums().items():
            object.__setattr__(self, name, fixed(np.array(array, dtype=np.float64)))

    def __hash__(self) -> int:
        return hash((self.schedule, self.provenance.fingerprint, self.samples))

    @property
    def layers(self) -> int:
        return int(self.mass_sum.shape[0])

    @property
    def heads(self) -> int:
        return int(self.mass_sum.shape[1])

    @property
    def samples(self) -> tuple[str, ...]:  # type: ignore[override]
        """The name of every sample."""
        return self.provenance.samples

    def sums(self) -> dict[str, FloatArray]:
        """What was measured, summed over samples, by the names in files."""
        return {name: array for name in _AXES if (array := getattr(self, name)) is not None}

    def with_sums(self, sums: Mapping[str, FloatArray], samples: tuple[str, ...]) -> Statistics:
        """The same with other sums, over other samples; the level costs stay."""
        return replace(self, provenance=replace(self.provenance, samples=samples), **sums)  # type: ignore[arg-type]

    # ------------------------------------------------------------------ means

    @cached_property
    def mass(self) -> FloatArray:
        """Mean attention mass [l, h, t, s] over samples and queries."""
        return self._mean("mass_sum")

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
        return self._mean("all_mass_sum")

    @property
    def drop_error(self) -> FloatArray:
        """Mean over samples and rows of the squared error of dropping cell (l, h, s) for target t, summed over queries:
        sum_q |W_o^h p_s (o_s - o_rest)|^2 mean(gate^2) / mean |x|^2, x the residual stream entering layer l.

        Raises StatisticsError when it was not measured.
        """
        return self._mean("error_sum")

    @property
    def concentration(self) -> FloatArray:
        """How unevenly target t's queries attend to the keys, [l, h, t]: the variance over keys of the mean probability
        they receive, relative to the square of its mean; 0 where all receive the same. Mean over samples.

        Raises StatisticsError when it was not measured.
        """
        return self._mean("concentration_sum")

    @property
    def similarity(self) -> FloatArray:
        """Cosine between the keys of target t and those of the scale before, resized to its grid, and of the values
        alike, [l, t]; mean over heads, samples and both. 0 for the first scale.

        Raises StatisticsError when it was not measured.
        """
        return self._mean("similarity_sum")

    def _mean(self, name: str) -> FloatArray:
        sums: FloatArray | None = getattr(self, name)
        if sums is None:
            raise StatisticsError(
                f"these statistics ({self.provenance.model}) lack {name}, which was not measured with them; calibrate "
                "again with this release"
            )
        return sums / self.count

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

    # ------------------------------------------------------------------ checks

    def check(self) -> None:
        """Raise StatisticsError for wrong shapes, values that are not finite or negative, masses that do not sum to
        one, and samples that are none or counted twice."""
        sizes = {"L": self.layers, "H": self.heads, "T": len(self.schedule)} if self.mass_sum.ndim == 4 else {}
        for name, array in self.sums().items():
            shape = tuple(sizes.get(axis, -1) for axis in _AXES[name])
            _check_array(array, shape, name, -LARGEST_SUM if name == "similarity_sum" else 0)
            if len(shape) == 4 and np.triu(array, 1).any():
                raise StatisticsError(f"{name}: a target scale looks at a later source scale, which does not exist yet")
        self._check_samples()
        for sums in (self.mass_sum, self.all_mass_sum):
            off = 0 if sums is None else np.abs((sums / self.count).sum(axis=3) - 1).max()
            if off > _MASS_TOLERANCE:
                raise StatisticsError(f"the attention mass of a head sums to 1 +- {off:.3g} over its sources, not to 1")
        if self.levels is not None:
            self._check_levels(self.levels)

    def _check_levels(self, levels: LevelStatistics) -> None:
        mine = (self.layers, self.heads, self.schedule)
        theirs = (levels.layers, levels.heads, levels.choices.schedule)
        if mine != theirs:
            raise StatisticsError(
                "the level costs are of {} layers x {} heads and the schedule {}, ".format(*theirs)
                + "the rest of {} x {} and {}".format(*mine)
            )

    def check_geometry(self, geometry: CacheGeometry) -> None:
        """Raise StatisticsError unless they were measured on a model of this geometry and schedule."""
        what = f"calibrate this model, not {self.provenance.model}: the statistics are of"
        geometry.check_holds(self.layers, self.heads, self.schedule, what, StatisticsError)

    def check_fingerprint(self, fingerprint: str) -> None:
        """Raise StatisticsError unless they were measured on the very weights with this fingerprint."""
        if self.provenance.fingerprint != fingerprint:
            raise StatisticsError(
                f"the statistics were measured on other weights ({self.provenance.model}, fingerprint "
                f"{self.provenance.fingerprint}; the model's is {fingerprint}); calibrate this model"
            )

    def check_alike(self, other: Statistics) -> None:
        """Raise StatisticsError for statistics of another model, guidance, schedule or settings."""
        for name in ("model", "fingerprint", "cfg", "settings"):
            mine, theirs = getattr(self.provenance, name), getattr(other.provenance, name)
            if mine != theirs:
                raise StatisticsError(f"cannot merge statistics with {name} {mine!r} and {theirs!r}")
        if self.schedule != other.schedule or self.mass_sum.shape != other.mass_sum.shape:
            raise StatisticsError("cannot merge statistics of different schedules or head counts")

    # ------------------------------------------------------------------ level costs, merging, files

    def with_levels(self, levels: LevelStatistics | None) -> Statistics:
        """The same with these level costs. Raises StatisticsError when they are of another geometry."""
        if levels is not None:
            self._check_levels(levels)
        return replace(self, levels=levels)

    def merge(self, other: Statistics) -> Statistics:
        """Both sample sets as one, and their level costs. Raises StatisticsError when they were not measured alike or
        share a sample."""
        levels = self.levels or other.levels
        if self.levels is not None and other.levels is not None:
            levels = self.levels.merge(other.levels)
        return replace(super().merge(other), levels=levels)

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
        write_tensors(path, header, arrays)

    @classmethod
    def load(cls, path: str | Path) -> Statistics:
        """Read a statistics file; nothing in it is executed.

        Raises FormatError, ScheduleError or StatisticsError.
        """
        text, arrays = read_tensors(path, "statistics")
        header = convert(check_header(text, path, FORMAT, VERSION), _Header, path)
        with in_file(path):
            schedule, levels = ScaleSchedule.of(header.schedule), None
            if header.levels is not None:
                costs = {name: arrays.pop(name) for name in list(arrays) if name.startswith("levels.")}
                levels = LevelStatistics.from_file(schedule, header.levels, costs)
            needed, optional = tuple(_AXES)[:2], tuple(_AXES)[2:]
            _check_names(arrays, needed, optional, "the file")
            statistics = cls(schedule, provenance=header.provenance, levels=levels, **arrays)
            statistics.check()
        return statistics
