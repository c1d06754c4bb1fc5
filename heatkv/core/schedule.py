"""Scale schedules: how many tokens a next-scale model draws at every step.

A schedule is a tuple of (t, h, w) per scale: t frames (1 for images), h rows and w columns of tokens.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from importlib import resources
from itertools import accumulate
from typing import Any

from heatkv.core.schema import shown
from heatkv.errors import ScheduleError

MAX_SIDE = 1 << 16
"""Largest number of frames, rows or columns a scale may have: far above any model, far below integer trouble."""

MAX_SCALES = 1024
"""Most scales of a schedule; published ones have 10 to 14. What is made of every pair of scales stays small."""

_VAR_SIDES = {
    "256": (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
    "512": (1, 2, 3, 4, 6, 9, 13, 18, 24, 32),
    "1024": (1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64),
}


@dataclass(frozen=True)
class ScaleSchedule:
    """The scales of one image or clip, coarse to fine; `scales[s]` is (t, h, w) in tokens.

    Raises ScheduleError for fewer than two scales, more than MAX_SCALES, or a side that is no whole number from 1 to
    MAX_SIDE.
    """

    scales: tuple[tuple[int, int, int], ...]

    def __post_init__(self) -> None:
        if not 2 <= len(self.scales) <= MAX_SCALES:
            raise ScheduleError(f"a schedule has 2 to {MAX_SCALES} scales, this one has {len(self.scales)}")
        for index, scale in enumerate(self.scales):
            if len(scale) != 3 or not all(type(side) is int and 1 <= side <= MAX_SIDE for side in scale):
                raise ScheduleError(
                    f"scale {index} is {shown(scale)}; it must be (t, h, w), whole numbers from 1 to {MAX_SIDE}"
                )

    @classmethod
    def of(cls, scales: Iterable[Sequence[int]]) -> ScaleSchedule:
        """From (h, w) pairs or (t, h, w) triples, as lists or tuples (for instance from JSON). Raises ScheduleError."""
        try:
            return cls(tuple((1, *entry) if len(entry) == 2 else tuple(entry) for entry in scales))  # type: ignore[misc]
        except TypeError as error:
            raise ScheduleError(f"a schedule is a list of [t, h, w] or [h, w], not {shown(scales)}") from error

    @classmethod
    def square(cls, sides: Iterable[int]) -> ScaleSchedule:
        """An image schedule of square scales with these sides. Raises ScheduleError."""
        return cls(tuple((1, side, side) for side in sides))

    @classmethod
    def var(cls, pixels: int | str = 256) -> ScaleSchedule:
        """VAR's published schedules (Tian et al. 2024): 256 or 512 px, or the 1024-px one of its training code.

        Raises ScheduleError for another size.
        """
        sides = _VAR_SIDES.get(str(pixels).removesuffix("px"))
        if sides is None:
            raise ScheduleError(f"VAR has no {pixels} px schedule; known: {', '.join(_VAR_SIDES)}")
        return cls.square(sides)

    @classmethod
    def infinity(cls, size: str = "1M", ratio: float = 1.0) -> ScaleSchedule:
        """Infinity's schedule for a pixel budget ("0.06M", "0.25M", "0.60M", "1M") and a height/width ratio.

        The nearest published template to `ratio` is taken, the first one on ties, as the model itself does. Raises
        ScheduleError for another size or a ratio outside 0.1 to 10.
        """
        data = _infinity_data()
        if size not in data["sizes"]:
            raise ScheduleError(f"Infinity has no size {shown(size)}; known: {', '.join(data['sizes'])}")
        nearest = cls.infinity_template(ratio)
        template = next(entry for entry in data["templates"].values() if entry["h_div_w"] == nearest)
        return cls.of(template["scales"][: data["sizes"][size]])

    @classmethod
    def infinity_template(cls, ratio: float) -> float:
        """Height/width of the published template nearest to `ratio`, upstream's first on ties. Raises ScheduleError."""
        if not 0.1 <= ratio <= 10:
            raise ScheduleError(f"height/width ratio {ratio} is outside 0.1 to 10; templates run from 0.333 to 3.0")
        ratios = (entry["h_div_w"] for entry in _infinity_data()["templates"].values())
        return min(ratios, key=lambda own: abs(own - ratio))  # type: ignore[no-any-return]

    @classmethod
    def infinity_sizes(cls) -> tuple[str, ...]:
        """The pixel budgets that have published schedules, as "1M"."""
        return tuple(_infinity_data()["sizes"])

    def __len__(self) -> int:
        return len(self.scales)

    @cached_property
    def tokens(self) -> tuple[int, ...]:
        """n_t, the tokens of every scale."""
        return tuple(t * h * w for t, h, w in self.scales)

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Tokens before every scale; one entry more than scales, the last is the total."""
        return tuple(accumulate(self.tokens, initial=0))

    @property
    def total_tokens(self) -> int:
        return self.offsets[-1]

    @property
    def cached_tokens(self) -> int:
        """N, the full cache per head: all scales but the last, which nobody reads."""
        return self.offsets[-2]

    def slice(self, scale: int) -> slice:
        """Where the tokens of one scale lie in the flat sequence."""
        return slice(self.offsets[scale], self.offsets[scale + 1])

    def to_json(self) -> list[list[int]]:
        """[t, h, w] of every scale."""
        return [list(scale) for scale in self.scales]

    def __str__(self) -> str:
        if all(t == 1 and h == w for t, h, w in self.scales):
            return ",".join(str(h) for _, h, _ in self.scales)
        return ",".join(f"{h}x{w}" if t == 1 else f"{t}x{h}x{w}" for t, h, w in self.scales)


@cache
def _infinity_data() -> dict[str, Any]:
    text = resources.files("heatkv.core").joinpath("infinity_schedules.json").read_text(encoding="utf-8")
    data: dict[str, Any] = json.loads(text)
    return data
