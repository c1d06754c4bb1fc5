"""What a plan with levels is made from: calibrated logit biases, and the joint costs of every combination of levels.

Arrays: L layers, H heads, T scales; levels are indices into LEVELS with NONE after them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from heatkv.core.checks import of_kind
from heatkv.core.contents import EqualByContents
from heatkv.core.levels import LEVELS, NONE, LevelChoices, log_counts
from heatkv.core.schedule import ScaleSchedule
from heatkv.errors import StatisticsError

FloatArray = NDArray[np.float64]
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
