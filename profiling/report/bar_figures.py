"""Charts of a report whose lines are rows of results: stacked bars against a limit, differences with their intervals,
and what a cache holds over time.

The name of a row stands over what belongs to it, so that all of the width is left for figures, on a phone too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup

from heatkv.profiling.report.figures import GRID, INK, LIMIT, MARKERS, MUTED, SURFACE, Style, chart, cut, shortened, svg

WIDTH = 380.0
LONGEST = 56
"""Letters of the name of a row."""
MOST_ROWS = 20
"""Rows of results in one chart: tables have them all."""
_FAR = 1.5
"""Times the longest bar: what lies further out is drawn at the edge."""
_ROOM_FOR_NAME = 26
"""Letters of a name beside its figures."""
_MOST_STEPS = 160
"""Of a line over time: more checkpoints than so many are drawn by the fullest of several layers."""


@dataclass(frozen=True)
class Part:
    """A stretch of a bar. `colour` is that of a series; `strength`, from 0 to 1, how much of it is seen."""

    colour: int
    length: float
    strength: float = 1.0


@dataclass(frozen=True)
class Bar:
    """Parts end to end, from 0. Over them, where they are told, an interval with a mark at its middle figure, and
    single values that lie far off; `tip` is told over every part."""

    parts: tuple[Part, ...]
    tip: str
    middle: float | None = None
    interval: tuple[float, float] | None = None
    far: tuple[float, ...] = ()

    @property
    def end(self) -> float:
        whole: float = sum(part.length for part in self.parts)
        ends: list[float] = [whole, self.middle or 0.0, *(self.interval or ())]
        return max(ends)


@dataclass(frozen=True)
class BarGroup:
    """Bars of one row of results, and the limit that they are held against."""

    title: str
    bars: tuple[Bar, ...]
    limit: float | None = None


def bar_chart(name: str, label: str, groups: Sequence[BarGroup], axis: str, thick: float) -> Markup:
    """Bars of every group under its title; `thick` is the height of one in points."""
    above, below, foot, left, right = 17.0, 7.0, 38.0, 8.0, 12.0
    pitch = thick + 1.5
    height = sum(above + below + pitch * len(group.bars) for group in groups) + foot
    ends = [max([*(bar.end for bar in group.bars), group.limit or 0]) for group in groups]
    most = max(ends, default=0) or 1.0
    edge = max([most, *(value for group in groups for bar in group.bars for value in bar.far if value < _FAR * most)])
    tips: dict[str, str] = {}
    with chart(WIDTH, height) as figure:
        ax = figure.add_axes((left / WIDTH, foot / height, (WIDTH - left - right) / WIDTH, 1 - foot / height))
        ax.set_xlim(0, 1.03 * edge)
        ax.set_ylim(height - foot, 0)
        ax.grid(axis="x")
        ax.spines["left"].set_visible(False)
        ax.set_yticks([])
        top = 0.0
        for place, group in enumerate(groups):
            ax.text(0, top + above - 4.5, cut(group.title, LONGEST), fontsize=10.5, va="baseline", color=INK,
                    bbox={"facecolor": SURFACE, "edgecolor": "none", "pad": 0.5})  # fmt: skip
            middle = top + above + thick / 2
            for index, bar in enumerate(group.bars):
                gids = [f"bar-{place}-{index}-{part}" for part in range(len(bar.parts))]
                tips |= dict.fromkeys(gids, bar.tip)
                _draw_bar(ax, bar, middle + pitch * index, thick, edge, gids)
            bottom = top + above + pitch * len(group.bars)
            if group.limit is not None:
                ax.plot([group.limit] * 2, [top + above - 1, bottom], color=LIMIT, linewidth=1.5,
                        linestyle=(0, (3, 1.5)), zorder=4)  # fmt: skip
            top = bottom + below
        _x_axis(ax, axis)
        return svg(figure, name, label, tips)


def _draw_bar(ax: Any, bar: Bar, at: float, thick: float, edge: float, gids: Sequence[str]) -> None:
    begin = 0.0
    for gid, part in zip(gids, bar.parts, strict=True):
        drawn = ax.barh(at, part.length, thick, left=begin, color=Style(part.colour, 0).sentinel, alpha=part.strength,
                        linewidth=0, zorder=2)  # fmt: skip
        drawn[0].set_gid(gid)
        begin += part.length
    if bar.interval is not None:
        ax.plot(bar.interval, [at, at], color=INK, linewidth=1.2, zorder=4, solid_capstyle="butt")
    if bar.middle is not None:
        ax.plot(bar.middle, at, marker="D", markersize=4.5, color=INK, markeredgecolor=SURFACE, markeredgewidth=0.8,
                zorder=5)  # fmt: skip
    for value in bar.far:
        beyond = value > edge
        ax.plot(min(value, 1.015 * edge), at, marker=">" if beyond else "o", markersize=4.5, color="none",
                markeredgecolor=INK, markeredgewidth=0.9, zorder=5)  # fmt: skip


def _x_axis(ax: Any, title: str, fontsize: float = 9.5, count: int = 5) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    ax.xaxis.set_major_locator(MaxNLocator(count, steps=[1, 2, 2.5, 5, 10]))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda place, _: f"{place:g}"))
    ax.tick_params(axis="x", labelsize=fontsize)
    ax.set_xlabel(title, fontsize=10, labelpad=3)


# ---------------------------------------------------------------------------------------------------- differences


@dataclass(frozen=True)
class Difference:
    """A figure with its interval, and how the three are written."""

    title: str
    style: Style
    value: float
    low: float
    high: float
    text: str


def forest(name: str, label: str, panels: Mapping[str, Sequence[Difference]], axis: str) -> Markup:
    """A forest plot: a panel with an axis of its own for every title, a line at 0, and in it every difference with its
    interval, the figures beside the name."""
    pitch, above, below, foot, left, right = 28.0, 20.0, 24.0, 16.0, 8.0, 8.0
    height = sum(above + below + pitch * len(lines) for lines in panels.values()) + foot
    tips: dict[str, str] = {}
    with chart(WIDTH, height) as figure:
        top = 0.0
        for place, (title, lines) in enumerate(panels.items()):
            tall = pitch * len(lines)
            ax = figure.add_axes(
                (left / WIDTH, 1 - (top + above + tall) / height, (WIDTH - left - right) / WIDTH, tall / height)
            )
            low, high = min(0.0, *(line.low for line in lines)), max(0.0, *(line.high for line in lines))
            room = 0.04 * ((high - low) or 1.0)
            ax.set_xlim(low - room, high + room)
            ax.set_ylim(tall, 0)
            ax.set_yticks([])
            ax.spines["left"].set_visible(False)
            ax.grid(axis="x")
            ax.set_title(title, fontsize=10.5, loc="left", color=INK, pad=5, fontweight="bold")
            ax.axvline(0, color=MUTED, linewidth=1.1, linestyle=(0, (3, 1.5)), zorder=1)
            texts = shortened([line.title for line in lines], _ROOM_FOR_NAME)
            for index, line in enumerate(lines):
                at, gid = pitch * index + 20.5, f"line-{place}-{index}"
                words = {"fontsize": 10.5, "va": "center", "color": INK, "transform": ax.get_yaxis_transform()}
                words["bbox"] = {"facecolor": SURFACE, "edgecolor": "none", "pad": 0.5}
                ax.text(0.0, at - 11.5, texts[line.title], ha="left", **words)
                ax.text(1.0, at - 11.5, line.text, ha="right", **words)
                ax.plot([line.low, line.high], [at, at], color=line.style.sentinel, linewidth=2.2, zorder=2,
                        solid_capstyle="butt")  # fmt: skip
                ax.plot(line.value, at, marker=MARKERS[line.style.marker], markersize=6.5, color=line.style.sentinel,
                        markeredgecolor=SURFACE, markeredgewidth=0.8, zorder=3, gid=gid)  # fmt: skip
                tips[gid] = f"{line.title}: {line.text}"
            _x_axis(ax, axis if place == len(panels) - 1 else "", 9)
            top += above + tall + below
        return svg(figure, name, label, tips)


# ------------------------------------------------------------------------------------------------------ over time


@dataclass(frozen=True)
class Held:
    """What a cache holds by scale and layer, [T][L]."""

    style: Style
    values: Sequence[Sequence[float]]


@dataclass(frozen=True)
class Panel:
    """Caches over time that have one limit; a tick of y is written by `texts`."""

    title: str
    limit: float
    lines: Sequence[Held]
    texts: Mapping[float, str]


def over_time(name: str, label: str, panels: Sequence[Panel], names: Sequence[str], y: str) -> Markup:
    """A panel for every budget: what caches hold after every layer of every scale, against the limit (dashed)."""
    columns = 1 if len(panels) == 1 else 2
    rows = -(-len(panels) // columns)
    height = 44 + 138.0 * rows
    with chart(WIDTH, height) as figure:
        axes = figure.subplots(rows, columns, squeeze=False)
        figure.subplots_adjust(
            left=46 / WIDTH, right=1 - 8 / WIDTH, bottom=42 / height, top=1 - 20 / height, wspace=0.26, hspace=0.34
        )
        for ax in axes.flat[len(panels) :]:
            ax.set_axis_off()
        step = -(-len(names) // (9 if columns == 1 else 7))
        for ax, panel in zip(axes.flat, panels, strict=False):
            ax.set_title(panel.title, fontsize=10, loc="left", color=INK, pad=4)
            for line in panel.lines:
                values = coarser(line.values)
                edges = np.linspace(0, len(names), values.size + 1)
                ax.stairs(values.ravel(), edges, baseline=None, color=line.style.sentinel, linewidth=1.3, alpha=0.9)
            ax.axhline(panel.limit, color=LIMIT, linewidth=1.3, linestyle=(0, (4, 2)))
            most = max([panel.limit, *(max(map(max, line.values)) for line in panel.lines)])
            ax.set_ylim(0, 1.1 * most or 1.0)
            ax.set_xlim(0, len(names))
            ax.set_xticks(np.arange(len(names)), [""] * len(names))
            ax.set_xticks((np.arange(len(names)) + 0.5)[::step], names[::step], minor=True, fontsize=9)
            ax.tick_params(axis="x", which="minor", length=0, pad=3)
            ax.tick_params(axis="x", which="major", length=3, color=GRID)
            ax.grid(axis="x", which="major")
            ax.set_yticks(list(panel.texts), list(panel.texts.values()), fontsize=9)
        figure.supxlabel(
            "target scale, side in tokens" if all("x" not in n for n in names) else "target scale",
            fontsize=10, y=4 / height,
        )  # fmt: skip
        figure.supylabel(y, fontsize=10, x=3 / WIDTH)
        return svg(figure, name, label)


def coarser(values_TL: Sequence[Sequence[float]]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """The same by scale and groups of layers, the fullest of each, as few that a line stays drawable: (T, groups)."""
    values = np.asarray(values_TL, dtype=np.float64)
    scales, layers = values.shape
    groups = min(layers, max(1, _MOST_STEPS // scales))
    starts = [layers * group // groups for group in range(groups)]
    return np.maximum.reduceat(values, starts, axis=1)
