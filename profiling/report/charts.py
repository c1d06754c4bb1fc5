"""What is drawn: charts as inline SVG in the page's colours, heat maps and pictures as PNG.

Arrays: L layers, H heads, T scales, B pictures.
"""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup, escape
from numpy.typing import NDArray
from PIL import Image

from heatkv.core.io import replacing
from heatkv.core.statistics import Statistics
from heatkv.generation.images import to_pixels

Pixels = NDArray[np.uint8]
Colour = tuple[int, int, int, int]

SERIES = 8
PALETTE = {
    "paper": ("#fbfaf7", "#131518"), "surface": ("#ffffff", "#1a1d21"), "sunken": ("#f3f1ec", "#22262b"),
    "ink": ("#1d1f23", "#eceae5"), "soft": ("#4a4f57", "#c3c5c9"), "muted": ("#636871", "#9aa0a8"),
    "line": ("#dfdbd2", "#32373d"), "grid": ("#e7e3da", "#2b3036"), "accent": ("#b23c06", "#ff9a5c"),
    "front": ("#e8742c", "#ff9a5d"), "limit": ("#c22f2f", "#ff7a7a"), "focus": ("#00679a", "#8fd0ff"),
    "series-0": ("#c43e00", "#ff8f57"), "series-1": ("#0067a8", "#5cb2f2"), "series-2": ("#00795a", "#42cfa0"),
    "series-3": ("#a3387c", "#ec93cc"), "series-4": ("#3a8fc4", "#a5dcff"), "series-5": ("#946300", "#efbe55"),
    "series-6": ("#5f4bb0", "#b6a6f5"), "series-7": ("#5a5f66", "#b9bec5"),
}  # fmt: skip
"""The page's colours, light and dark; series are told apart by the colour-blind too. A chart is drawn in the light ones
and shown in those of the reader's scheme."""
INK, MUTED, GRID, SURFACE, FRONT, LIMIT = (
    PALETTE[name][0] for name in ("ink", "muted", "grid", "surface", "front", "limit")
)
MARKERS = {
    "o": "M10 6A4 4 0 1 1 2 6A4 4 0 1 1 10 6z", "s": "M2.5 2.5H9.5V9.5H2.5z", "^": "M6 1.5L10.5 10H1.5z",
    "D": "M6 1L11 6L6 11L1 6z", "v": "M6 10.5L10.5 2H1.5z",
}  # fmt: skip
"""Markers of matplotlib, each with its outline for the page in a box of 12 by 12."""

_RC: dict[Any, Any] = {
    "svg.fonttype": "none", "font.size": 10.5, "font.family": "DejaVu Sans", "text.color": INK, "axes.edgecolor": MUTED,
    "axes.labelcolor": INK, "xtick.color": MUTED, "ytick.color": MUTED, "xtick.labelcolor": INK,
    "ytick.labelcolor": INK, "axes.linewidth": 0.8, "axes.spines.top": False, "axes.spines.right": False,
    "axes.titlesize": 10.5, "axes.titlelocation": "left", "grid.color": GRID, "axes.axisbelow": True,
    "axes.unicode_minus": False,
}  # fmt: skip


@dataclass(frozen=True)
class Style:
    """How a series is drawn, the same everywhere in a report: the number of its colour, and its marker."""

    colour: int
    marker: str

    @property
    def hex(self) -> str:
        return PALETTE[f"series-{self.colour}"][0]

    @property
    def css(self) -> str:
        return f"var(--series-{self.colour})"

    @property
    def outline(self) -> str:
        return MARKERS[self.marker]


def styles(families: Mapping[str, Sequence[str]]) -> dict[str, Style]:
    """A style for every label: one colour for each family, as far as there are colours, and a marker for each member
    that differs from those of its family and of the families of the same colour."""
    names = list(MARKERS)
    return {
        label: Style(index % SERIES, names[(index + index // SERIES + place) % len(names)])
        for index, labels in enumerate(families.values())
        for place, label in enumerate(labels)
    }


# ------------------------------------------------------------------------------------------------------- charts


@dataclass(frozen=True)
class Line:
    """A series of figures `y` at `x`, each with a range. Along scales there is no `x` and no range, and `y` has one
    figure for every scale, (T,), or for every layer of every scale, (T, L)."""

    style: Style
    y: NDArray[np.float64]
    x: NDArray[np.float64] | None = None
    ranges: Sequence[tuple[float, float]] = ()
    dashed: bool = False


@dataclass(frozen=True)
class Panel:
    """Lines along scales, and the limit that they are held against."""

    title: str
    lines: Sequence[Line]
    limit: float | None = None


@contextmanager
def _figure(name: str, width: float, height: float) -> Iterator[Any]:
    """A matplotlib figure of this many points in the style of the report. `name` is unique in the page."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_RC | {"svg.hashsalt": name}):
        yield Figure(figsize=(width / 72, height / 72))


def _svg(figure: Any, label: str) -> Markup:
    """The figure as an element of the page; `label` is read to who cannot see it."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    needless = r' id="[a-zA-Z][\w.]*?_\d+"|<defs>\s*<style.*?</defs>|<metadata>.*?</metadata>'
    text = re.sub(needless, "", buffer.getvalue(), flags=re.DOTALL)
    for name, (light, _) in PALETTE.items():
        text = text.replace(light, f"var(--{name})")
    view_box = re.findall(r'viewBox="(0 0 (\S+) \S+)"', text)[0]
    opening = (
        f'<svg class="chart" role="img" aria-label="{escape(label)}" viewBox="{view_box[0]}" style="--w:{view_box[1]}">'
    )
    return Markup(opening + text[text.index(">", text.index("<svg")) + 1 :])


def line_chart(
    name: str, label: str, lines: Sequence[Line], front: Sequence[tuple[float, float]], budgets: Mapping[float, str],
    y: str, log: bool,
) -> Markup:  # fmt: skip
    """Figures against MiB, over their Pareto front as a broad band; `budgets` are named by their MiB."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

    with _figure(name, 380, 270) as figure:
        ax = figure.add_axes((0.13, 0.19, 0.85, 0.79))
        ax.grid(True)
        ax.plot(*np.reshape(front, (-1, 2)).T, color=FRONT, linewidth=10, alpha=0.28, solid_capstyle="round",
                marker="o", markersize=14 if len(front) == 1 else 0, markeredgewidth=0, zorder=1)  # fmt: skip
        for line in lines:
            ax.vlines(line.x, *np.transpose(line.ranges), color=line.style.hex, linewidth=4, alpha=0.35)
            ax.plot(line.x, line.y, color=line.style.hex, linewidth=1.5, marker=line.style.marker, markersize=7,
                    markeredgecolor=SURFACE, markeredgewidth=0.8, zorder=3)  # fmt: skip
        ax.set(xscale="log", xlabel="budget, and its MiB", yscale="log" if log else "linear", ylabel=y)
        ax.set_xticks(_spaced(budgets), [f"{budgets[size]}\n{size:.3g}" for size in _spaced(budgets)])
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)) if log else MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
        ax.yaxis.set_major_formatter(lambda place, _: f"{place:g}")
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_minor_locator(NullLocator())
        ax.margins(0.06, 0.08)
        return _svg(figure, label)


def _spaced(places: Iterable[float]) -> list[float]:
    """The places on a logarithmic axis that leave room for a text at each, from the left."""
    ordered, shown = sorted(places), list[float]()
    for place in ordered:
        if not shown or math.log(place / shown[-1]) >= 0.09 * math.log(ordered[-1] / ordered[0]):
            shown.append(place)
    return shown


def scale_chart(
    name: str, label: str, panels: Sequence[Panel], scales: Sequence[str], y: str, small: bool = False
) -> Markup:
    """Lines along the target scales, a panel for every title. Panels without a limit share one axis of y."""
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    width, height = (330.0, 118.0) if small else (380.0, 40 + 140.0 * rows)
    top, bottom = (6, 20) if small else (20, 40)
    with _figure(name, width, height) as figure:
        axes = figure.subplots(rows, columns, squeeze=False, sharey=all(panel.limit is None for panel in panels))
        figure.subplots_adjust(
            left=46 / width, right=1 - 6 / width, bottom=bottom / height, top=1 - top / height, wspace=0.2, hspace=0.35
        )
        for ax in axes.flat[len(panels) :]:
            ax.set_axis_off()
        step = -(-len(scales) // 9)
        for ax, panel in zip(axes.flat, panels, strict=False):
            ax.set_title(panel.title)
            ax.grid(True, axis="y")
            for line in panel.lines:
                _draw_along_scales(ax, line, fill=small)
            if panel.limit is not None:
                ax.axhline(panel.limit, color=LIMIT, linewidth=1.3, linestyle=(0, (4, 2)))
            ax.set_xticks(np.arange(0, len(scales), step), scales[::step])
            ax.tick_params(labelsize=9)
        for ax in axes.flat:
            ax.set_ylim(0, None)
        figure.supylabel(y, fontsize=10, x=2 / width)
        if not small:
            figure.supxlabel("target scale", fontsize=10, y=4 / height)
        return _svg(figure, label)


def _draw_along_scales(ax: Any, line: Line, fill: bool) -> None:
    colour = line.style.hex
    if line.y.ndim == 1:
        ax.plot(line.y, color=colour, linewidth=1.4, linestyle=(0, (3, 1.5)) if line.dashed else "-", clip_on=False,
                marker=line.style.marker, markersize=4.5, markeredgecolor=SURFACE, markeredgewidth=0.5)  # fmt: skip
        return
    edges = np.linspace(-0.5, len(line.y) - 0.5, line.y.size + 1)
    if fill:
        ax.stairs(line.y.ravel(), edges, fill=True, color=colour, alpha=0.25)
    ax.stairs(line.y.ravel(), edges, baseline=None, color=colour, linewidth=1.3)
    ax.set_xlim(edges[0], edges[-1])


@dataclass(frozen=True)
class Part:
    """A stretch of a lane, from one figure to another; `kind` is how it is drawn: "bar", "span", "point", "outlier",
    "limit" or "zero". `title` is told over it."""

    begin: float
    end: float
    title: str
    colour: str = ""
    kind: str = "bar"


@dataclass(frozen=True)
class Track:
    """The figures of one row, drawn to scale: lanes of parts, one under the other, and what they say in words."""

    name: str
    style: Style
    text: str
    lanes: tuple[tuple[Part, ...], ...]


def pale(colour: int, percent: int) -> str:
    """A part of a series' colour."""
    return f"color-mix(in srgb, var(--series-{colour}) {percent}%, transparent)"


def stacked(lengths: Mapping[str, tuple[float, str]], unit: str) -> tuple[Part, ...]:
    """Bars end to end, by their names: how long, in which colour of CSS."""
    parts, begin = [], 0.0
    for name, (length, colour) in lengths.items():
        parts.append(Part(begin, begin + length, f"{name}: {length:.4g} {unit}", colour))
        begin += length
    return tuple(parts)


def percent_scale(tracks: Iterable[Track]) -> Callable[[float], str]:
    """Where a figure is on the common scale of tracks, which 0 is on, in per cent of its length."""
    ends = [end for track in tracks for lane in track.lanes for part in lane for end in (part.begin, part.end)]
    low, high = min([0.0, *ends]), max([0.0, *ends])
    return lambda value: f"{100 * (value - low) / ((high - low) or 1):.2f}"


# ----------------------------------------------------------------------------------------- heat maps and pictures


def ramp(name: str, count: int, low: float = 0.0) -> list[Colour]:
    """This many colours of a colour map of matplotlib, from its share `low` on."""
    from matplotlib import colormaps

    chosen = colormaps[name](np.linspace(low, 1, count), bytes=True)
    return [(int(r), int(g), int(b), int(a)) for r, g, b, a in chosen]


def css(colour: Colour) -> str:
    """The colour as the page writes it."""
    return "#" + bytes(colour).hex()


def _data_uri(image: Image.Image, **options: Any) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", **options)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def heat_map(blocks_LH: Sequence[NDArray[np.int64]], colours: Sequence[Colour]) -> str:
    """Arrays of colour numbers side by side with a column between them, as the data URI of a PNG."""
    between = np.full((len(blocks_LH[0]), 1), len(colours))
    pixels = np.concatenate([part for block in blocks_LH for part in (block, between)][:-1], axis=1).astype(np.uint8)
    image = Image.fromarray(pixels)
    all_colours = [*colours, (0, 0, 0, 0)]
    image.putpalette([channel for colour in all_colours for channel in colour[:3]])
    return _data_uri(image, optimize=True, transparency=bytes(colour[3] for colour in all_colours))


DIFFERENCE_MOST = 0.25
"""Mean difference of the channels, of their range, from which on a difference map has its strongest colour."""
STRIP_GAP = 4


def difference_colour(share: NDArray[np.float64] | float) -> Pixels:
    """The colour of a mean difference of the channels, RGBA: from nothing at all to a strong one."""
    alpha = np.ceil(255 * np.minimum(np.asarray(share) / DIFFERENCE_MOST, 1)).astype(np.uint8)
    return np.stack([np.full_like(alpha, channel) for channel in (214, 71, 0)] + [alpha], axis=-1)


def strip(images_BHW3: Pixels, reference_BHW3: Pixels | None = None) -> str:
    """Pictures beside each other as a data URI; with a reference, where and how much they differ from it."""
    if reference_BHW3 is None:
        cells = np.concatenate([images_BHW3, np.full_like(images_BHW3[..., :1], 255)], axis=3)
    else:
        cells = difference_colour(np.abs(images_BHW3.astype(np.int16) - reference_BHW3).mean(axis=3) / 255)
    padded = np.pad(cells, ((0, 0), (0, 0), (0, STRIP_GAP), (0, 0)))
    return _data_uri(Image.fromarray(np.concatenate(list(padded), axis=1)[:, :-STRIP_GAP]), optimize=True)


def save_image_sheet(path: Path, lines: Sequence[tuple[str, Any]], columns: int, title: str) -> None:
    """A PNG with one labelled line of pictures per (label, images) pair; images are (B, 3, H, W) in [0, 1]."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.1 * columns + 1.6, 1.15 * len(lines) + 0.4), dpi=110)
    axes = figure.subplots(len(lines), columns, squeeze=False)
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[], frame_on=False)
    for of_line, (label, images) in zip(axes, lines, strict=True):
        of_line[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=9)
        for ax, pixels in zip(of_line, to_pixels(images[:columns]).numpy(), strict=False):
            ax.imshow(pixels, interpolation="nearest")
    figure.suptitle(title, fontsize=10)
    figure.tight_layout(pad=0.3, rect=(0, 0, 1, 1 - 0.25 / figure.get_figheight()))
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")


def save_scas_heat_map(path: Path, statistics: Statistics) -> None:
    """A PNG with S-CAS of every head (rows: layer by layer) by source scale, each column on its own colour scale."""
    from matplotlib.figure import Figure

    layers, heads = statistics.layers, statistics.heads
    scas = statistics.scas[:, :, :-1].reshape(layers * heads, -1)
    figure = Figure(figsize=(1.5 + 0.55 * scas.shape[1], 2 + 0.07 * layers * heads), dpi=110)
    ax = figure.subplots()
    shown = scas / np.maximum(scas.max(axis=0, keepdims=True), np.finfo(float).tiny)
    image = ax.imshow(shown, aspect="auto", cmap="magma", vmin=0, vmax=1, interpolation="nearest")
    sides = [f"{s}\n{h}x{w}" for s, (_, h, w) in enumerate(statistics.schedule.scales[:-1])]
    ax.set_xticks(range(scas.shape[1]), sides, fontsize=8)
    ax.set_yticks(np.arange(layers) * heads - 0.5, [f"layer {layer}" for layer in range(layers)], fontsize=7)
    ax.grid(axis="y", color="white", linewidth=0.4)
    ax.set(xlabel="source scale", ylabel=f"{heads} heads of every layer")
    samples = f"S-CAS of {statistics.provenance.model}, {statistics.count} samples"
    ax.set_title(f"{samples}\n(share of the scale's largest)", fontsize=9)
    figure.colorbar(image, ax=ax, fraction=0.06)
    figure.tight_layout()
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")
