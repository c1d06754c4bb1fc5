"""What is drawn: lines over axes and bars to scale, which templates write as SVG and HTML, and pixels as PNG.

Arrays: L layers, H heads, T scales, B pictures, C channels; N colours.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from heatkv.generation.images import image_grid
from heatkv.profiling.analysis.plan_view import save_figure

Pixels = NDArray[np.uint8]
Point = tuple[float, float]

SERIES = 8
"""Colours of series in report.css, which the colour-blind can tell apart too."""
MARKERS = (
    "M10 6A4 4 0 1 1 2 6A4 4 0 1 1 10 6z", "M2.5 2.5H9.5V9.5H2.5z", "M6 1.5L10.5 10H1.5z", "M6 1L11 6L6 11L1 6z",
    "M6 10.5L10.5 2H1.5z",
)  # fmt: skip
"""Outlines in a box of 12 by 12."""


@dataclass(frozen=True)
class Style:
    """How a series is drawn, the same everywhere in a report: the number of its colour, and its marker."""

    colour: int
    outline: str

    @property
    def css(self) -> str:
        return f"var(--series-{self.colour})"


def styles(families: Mapping[str, Iterable[str]]) -> dict[str, Style]:
    """A style for every label: one colour for each family, as far as there are colours, and a marker for each member
    that differs from those of its family and of the families of the same colour."""
    return {
        label: Style(index % SERIES, MARKERS[(index + index // SERIES + place) % len(MARKERS)])
        for index, labels in enumerate(families.values())
        for place, label in enumerate(labels)
    }


# ------------------------------------------------------------------------------------------------------- charts


@dataclass(frozen=True)
class Axis:
    """Figures from `low` to `high`; `ticks` has the text of every mark."""

    low: float
    high: float
    ticks: Mapping[float, str]
    log: bool = False

    def at(self, value: float) -> float:
        """Where a figure lies, as a share of the axis."""
        low, high, place = (math.log(end) if self.log else end for end in (self.low, self.high, value))
        return (place - low) / (high - low)


def axis(values: Iterable[float], log: bool = False, ticks: Mapping[float, str] | None = None) -> Axis:
    """That of figures, with some room at both ends; marks are round unless they are given."""
    from matplotlib.ticker import LogLocator, MaxNLocator

    values = list(values)
    low, high = min(values), max(values)
    if log:
        room = (high / low) ** 0.07 if high > low else 1.5
        low, high = low / room, high * room
    else:
        room = 0.07 * (high - low) or 0.5
        low, high = low - room if low else 0.0, high + room
    if ticks is None:
        locators = [LogLocator(subs=(1, 2, 5)), MaxNLocator(6, steps=[1, 2, 2.5, 5, 10])][not log :]
        marks = [[float(x) for x in locator.tick_values(low, high) if low <= x <= high] for locator in locators]
        ticks = {mark: f"{mark:g}" for mark in (marks[0] if len(marks[0]) > 1 else marks[-1])}
    return Axis(low, high, ticks, log)


def scale_axis(names: Sequence[str]) -> Axis:
    """That of the scales; as many are named as there is room for."""
    ticks = {float(place): names[place] for place in range(0, len(names), -(-len(names) // 9))}
    return Axis(-0.5, len(names) - 0.5, ticks)


def spaced(places: Iterable[float]) -> list[float]:
    """The places on a logarithmic axis that leave room for a text at each, from the left."""
    ordered, shown = sorted(places), list[float]()
    for place in ordered:
        if not shown or math.log(place / shown[-1]) >= 0.11 * math.log(ordered[-1] / ordered[0]):
            shown.append(place)
    return shown


@dataclass(frozen=True)
class Line:
    """A series through points (x, y), and the ranges of these, from one point to another."""

    style: Style
    points: Sequence[Point]
    ranges: Sequence[tuple[Point, Point]] = ()
    dashed: bool = False


def steps(values_TL: NDArray[np.float64], most: int = 160) -> list[Point]:
    """Steps over the scales: a figure for every layer of each, or the largest of every group of layers, as few as a
    line has room for."""
    scales, layers = values_TL.shape
    groups = min(layers, max(1, most // scales))
    held = np.maximum.reduceat(values_TL, [layers * group // groups for group in range(groups)], axis=1).ravel()
    edges = np.linspace(-0.5, scales - 0.5, len(held) + 1)
    return list(zip(edges.repeat(2)[1:-1].tolist(), held.repeat(2).tolist(), strict=True))


@dataclass(frozen=True)
class Chart:
    """Lines in a box of this width and height, over their Pareto front, and against a limit of y."""

    title: str
    x: Axis
    y: Axis
    lines: Sequence[Line]
    front: Sequence[Point] = ()
    limit: float | None = None
    size: tuple[int, int] = (380, 165)

    def place(self, x: float, y: float) -> Point:
        """Where a point is in the box, from its upper left."""
        width, height = self.size
        return round(38 + (width - 46) * self.x.at(x), 1), round(height - 36 - (height - 58) * self.y.at(y), 1)

    def path(self, points: Iterable[Point]) -> str:
        """The points joined, as SVG has it."""
        return "M" + "L".join(f"{x} {y}" for x, y in (self.place(*point) for point in points))


def bar_axis(ends: Iterable[float]) -> Axis:
    """That of bars from 0 to these figures."""
    ends = [0.0, *ends]
    return Axis(min(ends), max(ends) if any(ends) else 1.0, {})


# ----------------------------------------------------------------------------------------- heat maps and pictures


def ramp(name: str, count: int, low: float = 0.0) -> Pixels:
    """This many colours of a colour map of matplotlib, (N, RGBA), from its share `low` on."""
    from matplotlib import colormaps

    colours: Pixels = colormaps[name](np.linspace(low, 1, count), bytes=True)
    return colours


def css(colour: Pixels) -> str:
    """An RGBA colour as the page writes it."""
    return "#" + colour.tobytes().hex()


def strip(images_HWC: Iterable[Pixels], gap: int) -> str:
    """Pictures beside each other, RGB or RGBA, with nothing between them, as the data URI of a PNG."""
    shown = [np.asarray(Image.fromarray(image).convert("RGBA")) for image in images_HWC]
    pixels = np.concatenate([np.pad(image, ((0, 0), (0, gap), (0, 0))) for image in shown], axis=1)[:, :-gap]
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


DIFFERENCE_MOST = 0.25
"""Mean difference of the channels, of their range, from which on a difference map has its strongest colour."""


def differences(images_BHW3: Pixels, others_BHW3: Pixels) -> Pixels:
    """Where pictures differ and how much, as colours, (B, H, W, 4)."""
    return difference_colour(np.abs(images_BHW3.astype(np.int16) - others_BHW3).mean(axis=3) / 255)


def difference_colour(share: NDArray[np.float64]) -> Pixels:
    """The colour of a mean difference of the channels, RGBA: from nothing at all to a strong one."""
    alpha = np.ceil(255 * np.minimum(share / DIFFERENCE_MOST, 1)).astype(np.uint8)
    return np.stack([np.full_like(alpha, channel) for channel in (214, 71, 0)] + [alpha], axis=-1)


def save_image_sheet(path: Path, lines: Sequence[tuple[str, Any]], columns: int, title: str) -> None:
    """A PNG with one labelled line of pictures per (label, images) pair; images are (B, 3, H, W) in [0, 1]."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.1 * columns + 1.6, 1.15 * len(lines) + 0.4), dpi=110, layout="constrained")
    for ax, (label, images) in zip(figure.subplots(len(lines), squeeze=False).flat, lines, strict=True):
        ax.imshow(image_grid(images[:columns], columns), interpolation="nearest")
        ax.set_ylabel(label, rotation=0, ha="right", va="center", fontsize=9)
        ax.set(xticks=[], yticks=[], frame_on=False)
    figure.suptitle(title, fontsize=10)
    save_figure(figure, path)
