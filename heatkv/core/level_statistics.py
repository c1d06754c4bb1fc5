"""What it costs to hold cells at coarser levels, measured on samples: the second part of a statistics file.

Arrays: L layers, H heads, T scales; levels are indices into LEVELS with NONE after them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from msgspec import Meta, Struct

from heatkv.core.levels import LEVELS, NONE, LevelChoices, log_counts
from heatkv.core.sample_sums import LARGEST_SUM, SampleSums, check_array, check_names
from heatkv.core.schedule import ScaleSchedule
from heatkv.core.schema import FloatArray, convert, fixed
from heatkv.errors import StatisticsError

COSTS = ("error", "fisher")
"""The kinds of level costs."""


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
        check_array(self.log_bias, (*heads, scales, len(LEVELS)), "log_bias of levels", -LARGEST_SUM)
        check_array(self.single_sum, (*heads, scales, scales, NONE + 1), "single_sum of levels")
        for target, joint in enumerate(self.joint_sum):
            combinations = math.prod(self.choices.shape(target))
            check_array(joint, (*heads, combinations), f"joint_sum of levels for target {target}")
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
        check_names(arrays, ("levels.log_bias", "levels.single_sum", *joint), (), source)
        costs = cls(
            LevelChoices(schedule, fields.sink_scales, fields.joint), fields.cost, arrays["levels.log_bias"],
            tuple(arrays[name] for name in joint), arrays["levels.single_sum"], fields.samples, fields.bias_samples,
        )  # fmt: skip
        costs.check()
        return costs
