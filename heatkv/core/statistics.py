"""Calibration statistics: how much every head looks back at every earlier scale, and where that was measured.

S-CAS, the scale-dependent cumulative attention score of HeatKV, is the attention mass head (l, h) puts on source scale
s, averaged over queries, over later target scales (the last included) and over calibration samples.
The drop error is what the picture's stream loses when one cell is dropped: the squared change of the head's
contribution, relative to the residual stream that enters the layer.
Arrays: L layers, H heads, T scales; mass[l, h, t, s] is target scale t looking at source scale s.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save as safetensors_bytes

from heatkv.core.geometry import CacheGeometry
from heatkv.core.io import as_json, check_header, parse_json, replacing, whole_file
from heatkv.core.levels import LEVELS, NONE, LevelChoices, log_counts
from heatkv.core.schedule import ScaleSchedule
from heatkv.core.schema import EqualByContents, FloatArray, IntArray, number, of_kind, shown
from heatkv.errors import FormatError, ScheduleError, StatisticsError

FORMAT, VERSION = "heatkv-statistics", 1
_NEEDED = ("mass_sum", "mass_square_sum")
_ARRAYS = (*_NEEDED, "all_mass_sum", "error_sum")
_OF_TARGETS = ("concentration_sum", "similarity_sum")
_MASS_TOLERANCE = 1e-3  # of the sum over sources, which is 1: bf16 attention rounds


COSTS = ("error", "fisher")

LARGEST_SUM = 1e100
"""Of anything that was measured: far beyond every real one, and its sums and squares still finite."""


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


def _fixed(array: FloatArray) -> FloatArray:
    """A copy that nobody can change."""
    try:
        copy = np.array(array, dtype=np.float64)
    except (TypeError, ValueError):
        raise StatisticsError("level costs are no regular arrays of numbers; measure them again") from None
    copy.setflags(write=False)
    return copy


def _count(header: Mapping[str, Any], name: str) -> int:
    value = header[name]
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{name} is {value!r}, not a whole number")
    return value


@dataclass(frozen=True, eq=False)
class LevelStatistics(EqualByContents):
    """Costs of holding cells at coarser levels, summed over samples, under frozen biases.

    `log_bias` is (L, H, T, levels). `joint_sum[t]` is (L, H, combinations of target t) in the order of `choices`;
    `single_sum[l, h, t, s, level]` is the cost of that level alone, all else whole, for the sources that are not joint.
    `cost` is "error", the squared output error relative to the residual stream, summed over queries, or "fisher", the
    expected squared change of the log-likelihood. They are equal when all they hold is, arrays exactly so. Raises
    StatisticsError for what does not fit together.
    """

    choices: LevelChoices
    cost: str
    log_bias: FloatArray
    joint_sum: tuple[FloatArray, ...]
    single_sum: FloatArray
    samples: tuple[str, ...]
    bias_samples: tuple[str, ...]

    def __post_init__(self) -> None:
        of_kind(self.choices, LevelChoices, "choices", StatisticsError, "give the LevelChoices they were measured for")
        of_kind(self.joint_sum, Sequence, "joint_sum", StatisticsError, "give a tuple of arrays, one per target scale")
        for name in ("samples", "bias_samples"):
            of_kind(getattr(self, name), tuple, name, StatisticsError, "give a tuple of the samples' names")
        for name in ("log_bias", "single_sum"):
            object.__setattr__(self, name, _fixed(getattr(self, name)))
        object.__setattr__(self, "joint_sum", tuple(_fixed(joint) for joint in self.joint_sum))
        scales = len(self.choices.schedule)
        layers, heads = np.shape(self.log_bias)[:2] if np.ndim(self.log_bias) == 4 else (0, 0)
        expected = {
            "log_bias": (layers, heads, scales, len(LEVELS)),
            "single_sum": (layers, heads, scales, scales, NONE + 1),
        }
        if self.cost not in COSTS:
            raise StatisticsError(f"level costs are of the unknown kind {self.cost!r}; known: {', '.join(COSTS)}")
        if len(self.joint_sum) != scales:
            raise StatisticsError(f"level costs of {len(self.joint_sum)} targets, the schedule has {scales}")
        arrays = {"log_bias": self.log_bias, "single_sum": self.single_sum}
        for target, joint in enumerate(self.joint_sum):
            arrays[f"joint_sum {target}"] = joint
            expected[f"joint_sum {target}"] = (layers, heads, math.prod(self.choices.shape(target)))
        for name, array in arrays.items():
            if np.shape(array) != expected[name] or not layers * heads:
                raise StatisticsError(f"level costs: {name} has shape {np.shape(array)}, not {expected[name]}")
            fine = (np.abs(array) <= LARGEST_SUM) & ((array >= 0) | (name == "log_bias"))
            if not fine.all():
                layer, head, *rest = (int(i) for i in np.argwhere(~fine)[0])
                value = array[layer, head, *rest]
                why = "which is not finite" if not np.isfinite(value) else "a negative cost" if value < 0 else ""
                raise StatisticsError(
                    f"level costs: {name} of layer {layer}, head {head}, at {rest} is {value}, "
                    f"{why or f'above {LARGEST_SUM:g}'}; measure them again"
                )
        if not self.samples or len(set(self.samples)) != len(self.samples):
            raise StatisticsError("level costs are of no sample, or count one twice")

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
        return tuple(joint / len(self.samples) for joint in self.joint_sum)

    @cached_property
    def single(self) -> FloatArray:
        """Mean over samples of the cost of one source at a level, [l, h, t, s, level]."""
        mean: FloatArray = self.single_sum / len(self.samples)
        return mean

    def of_heads(self, heads_LH: IntArray) -> LevelStatistics:
        """The costs of these heads of every layer, in this order; (L, heads to take) indices."""
        layers = np.arange(self.layers)[:, None]
        return replace(
            self,
            log_bias=self.log_bias[layers, heads_LH],
            joint_sum=tuple(joint[layers, heads_LH] for joint in self.joint_sum),
            single_sum=self.single_sum[layers, heads_LH],
        )

    def check_alike(self, other: LevelStatistics) -> None:
        """Raise StatisticsError for other biases, kinds or choices, with which costs cannot be added up."""
        if self.cost != other.cost:
            raise StatisticsError(
                f"cannot merge level costs of kind {self.cost!r} and {other.cost!r}; measure both alike (calibrate "
                f"--levels {self.cost})"
            )
        if self.choices != other.choices:
            mine, theirs = self.choices, other.choices
            raise StatisticsError(
                f"cannot merge level costs with sink_scales={mine.sink_scales}, joint={mine.joint} and "
                f"sink_scales={theirs.sink_scales}, joint={theirs.joint}, or of other schedules; measure both alike "
                f"(calibrate --levels {self.cost} --sink-scales {mine.sink_scales})"
            )
        if not np.array_equal(self.log_bias, other.log_bias):
            raise StatisticsError(
                "cannot merge level costs measured under different biases; measure the second part with the first's"
            )

    def merge(self, other: LevelStatistics) -> LevelStatistics:
        """Both sample sets as one, exactly. Raises StatisticsError for other biases, kinds, choices or a shared
        sample."""
        of_kind(other, LevelStatistics, "the other", StatisticsError, "give LevelStatistics, as calibrate_levels does")
        self.check_alike(other)
        twice = set(self.samples) & set(other.samples)
        if twice:
            raise StatisticsError(f"{len(twice)} samples are in both level costs (for instance {min(twice)})")
        return LevelStatistics(
            self.choices,
            self.cost,
            self.log_bias,
            tuple(a + b for a, b in zip(self.joint_sum, other.joint_sum, strict=True)),
            self.single_sum + other.single_sum,
            self.samples + other.samples,
            self.bias_samples,
        )

    # ------------------------------------------------------------------ files

    def arrays(self) -> dict[str, FloatArray]:
        """The arrays by their names in a statistics file."""
        joint = {f"levels.joint_sum.{target}": array for target, array in enumerate(self.joint_sum)}
        return {"levels.log_bias": self.log_bias, "levels.single_sum": self.single_sum, **joint}

    def header(self) -> dict[str, Any]:
        return {
            "cost": self.cost,
            "sink_scales": self.choices.sink_scales,
            "joint": self.choices.joint,
            "samples": list(self.samples),
            "bias_samples": list(self.bias_samples),
        }

    @classmethod
    def from_file(
        cls, schedule: ScaleSchedule, header: Mapping[str, Any], arrays: Mapping[str, FloatArray]
    ) -> LevelStatistics:
        """From what `header` and `arrays` gave. Raises KeyError, TypeError, ValueError or StatisticsError."""
        names = [f"levels.joint_sum.{target}" for target in range(len(schedule))]
        unknown = set(arrays) - {"levels.log_bias", "levels.single_sum", *names}
        if unknown:
            raise StatisticsError(f"level costs: the array {min(unknown)} is unknown")
        joint = tuple(arrays[name] for name in names)
        return cls(
            LevelChoices(schedule, _count(header, "sink_scales"), _count(header, "joint")),
            str(header["cost"]),
            arrays["levels.log_bias"],
            joint,
            arrays["levels.single_sum"],
            tuple(str(sample) for sample in header["samples"]),
            tuple(str(sample) for sample in header["bias_samples"]),
        )


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

    def of_heads(self, heads_LH: IntArray) -> Statistics:
        """What was measured of these heads of every layer, in this order; (L, heads to take) indices.

        The similarity of scales, which is a mean over heads, stays that of the layer.
        """
        layers = np.arange(self.layers)[:, None]

        def taken(array: FloatArray | None) -> FloatArray | None:
            return None if array is None else array[layers, heads_LH]

        return replace(
            self,
            mass_sum=self.mass_sum[layers, heads_LH],
            mass_square_sum=self.mass_square_sum[layers, heads_LH],
            all_mass_sum=taken(self.all_mass_sum),
            error_sum=taken(self.error_sum),
            concentration_sum=taken(self.concentration_sum),
            levels=None if self.levels is None else self.levels.of_heads(heads_LH),
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
