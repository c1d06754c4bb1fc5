"""Calibration statistics: how much every head looks back at every earlier scale, and where that was measured.

S-CAS, the scale-dependent cumulative attention score of HeatKV, is the attention mass head (l, h) puts on source scale
s, averaged over queries, over later target scales (the last included) and over calibration samples.
The drop error is what the picture's stream loses when one cell is dropped: the squared change of the head's
contribution, relative to the residual stream that enters the layer.
Arrays: L layers, H heads, T scales; mass[l, h, t, s] is target scale t looking at source scale s.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from msgspec import Struct

from heatkv.core.geometry import CacheGeometry
from heatkv.core.io import check_header, in_file, read_tensors, write_tensors
from heatkv.core.level_statistics import LevelStatistics
from heatkv.core.sample_sums import LARGEST_SUM, SampleSums, check_array, check_names
from heatkv.core.schedule import ScaleSchedule
from heatkv.core.schema import FloatArray, are_other_weights, convert, fixed
from heatkv.errors import StatisticsError

FORMAT, VERSION = "heatkv-statistics", 1

_AXES = {
    "mass_sum": "LHTT", "mass_square_sum": "LHTT", "all_mass_sum": "LHTT", "error_sum": "LHTT",
    "concentration_sum": "LHT", "similarity_sum": "LT",
}  # fmt: skip
"""The arrays of a statistics file; all but the first two may be missing."""

_MASS_TOLERANCE = 1e-3  # of the sum over sources, which is 1: bf16 attention rounds


def mean_over_targets(values_LHTT: FloatArray) -> FloatArray:
    """[l, h, s]: mean of values[l, h, t, s] over the later target scales t > s; 0 for the last scale."""
    layers, heads, scales, _ = values_LHTT.shape
    mean = np.zeros((layers, heads, scales))
    for source in range(scales - 1):
        mean[:, :, source] = values_LHTT[:, :, source + 1 :, source].mean(axis=2)
    return mean


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
        sum_q |W_o^h p_s (o_s - o_rest)|^2 mean(gate^2) / mean |x|^2, with p_s the mass on s, o_s and o_rest the outputs
        of attention over s and over the rest, W_o^h the head's output projection, gate the block's adaptive-norm gate
        and x the residual stream entering layer l.

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
            check_array(array, shape, name, -LARGEST_SUM if name == "similarity_sum" else 0)
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
        if are_other_weights(self.provenance.fingerprint, fingerprint):
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
        """Both sample sets as one, with their level costs and all releases that measured them. Raises StatisticsError
        when they were not measured alike or share a sample."""
        levels = self.levels or other.levels
        if self.levels is not None and other.levels is not None:
            levels = self.levels.merge(other.levels)
        mine, theirs = self.provenance.versions, other.provenance.versions
        seen = {name: {text for part in (mine, theirs) if name in part for text in part[name].split(", ")}
                for name in (*mine, *theirs)}  # fmt: skip
        merged = super().merge(other)
        versions = {name: ", ".join(sorted(texts)) for name, texts in seen.items()}
        return replace(merged, levels=levels, provenance=replace(merged.provenance, versions=versions))

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
            check_names(arrays, needed, optional, "the file")
            statistics = cls(schedule, provenance=header.provenance, levels=levels, **arrays)
            statistics.check()
        return statistics
