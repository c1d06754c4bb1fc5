"""Whose turn it is: the rows that are at work, and the call of attention that is due."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from heatkv.core.geometry import CacheGeometry
from heatkv.errors import PlanError


@dataclass(frozen=True)
class Rows:
    """The rows of some images among those of all: from each of `parts` equal parts, `count` from `first` on."""

    parts: int
    first: int
    count: int

    def of(self, x: Tensor, dim: int) -> Tensor:
        """These rows as a view of a tensor that has all rows in `dim`: (..., F, B, ...)."""
        view: Tensor = x.unflatten(dim, (self.parts, -1)).narrow(dim + 1, self.first, self.count)
        return view

    def __len__(self) -> int:
        return self.parts * self.count


class Turn:
    """Which call of attention is due: the layers of a scale one after the other, then those of the next scale.

    `rows` is 0 until it is known; a cache knows it from the start. `at_work` rows run through all layers of a scale
    before the next ones do, and the next scale comes when all have.
    """

    def __init__(self, geometry: CacheGeometry, rows: int = 0) -> None:
        self.geometry, self.rows = geometry, rows
        self.restart()

    def restart(self) -> None:
        """Expect the first call of new images."""
        self.target, self.layer, self.done_rows, self.at_work = 0, 0, 0, self.rows

    def serve(self, rows: int) -> None:
        """Expect so many rows from now on. Raises PlanError between two layers."""
        if self.layer:
            raise PlanError(f"rows may change before layer 0 of a scale, not before layer {self.layer}")
        self.at_work = rows

    @property
    def done(self) -> bool:
        """Whether all scales have run in all layers."""
        return self.target == len(self.geometry.schedule)

    def check(self, layer: int, rows: int, tokens: int) -> None:
        """Raise PlanError unless a call of this layer, with so many rows and tokens of the scale, is due."""
        if self.done or layer != self.layer:
            raise PlanError(
                f"attend was called for layer {layer} when layer {self.layer} of scale {self.target} was due; "
                "call reset() before new images"
            )
        expected = (self.at_work or rows, self.geometry.schedule.tokens[self.target])
        if (rows, tokens) != expected:
            raise PlanError(
                f"{rows} rows of {tokens} tokens arrived in layer {layer} of scale {self.target}; the plan's schedule "
                f"and these images need {expected[0]} of {expected[1]}"
            )

    def advance(self) -> None:
        """Go on to the call that is due next."""
        self.layer += 1
        if self.layer == self.geometry.layers:
            self.layer, self.done_rows = 0, self.done_rows + self.at_work
            if self.done_rows >= self.rows:
                self.target, self.done_rows = self.target + 1, 0
