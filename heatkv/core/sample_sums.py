"""Sums over samples, which add up: what statistics of whole cells and of coarser levels have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Self

import numpy as np

from heatkv.core.schema import EqualByContents, FloatArray
from heatkv.errors import FormatError, StatisticsError

LARGEST_SUM = 1e100
"""Of anything that was measured: far above every real one, and its sums and squares still finite."""


def check_array(array: FloatArray, shape: tuple[int, ...], name: str, least: float = 0) -> None:
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


def check_names(
    arrays: Mapping[str, FloatArray], needed: tuple[str, ...], optional: tuple[str, ...], source: str | Path
) -> None:
    """Raise FormatError unless a file has the needed arrays, and no others than the optional ones, all of floats."""
    if not set(needed) <= set(arrays) <= {*needed, *optional}:
        raise FormatError(f"{source} holds the arrays {sorted(arrays)}; it must hold {', '.join((*needed, *optional))}")
    if other := sorted(name for name, array in arrays.items() if array.dtype.kind != "f"):
        raise FormatError(f"{source}: {other[0]} is of {arrays[other[0]].dtype}, not of floating-point numbers")
