"""Drawings of a report that suit a light page and a dark one: charts as inline SVG whose colours are the page's, and
pictures and heat maps as PNG in data URIs.

Charts are drawn by matplotlib in stand-ins for colours; `svg` puts the page's variables in their place, drops all that
a drawing inside a page does not need, names of fonts and addresses of standards included, and makes ids unique.
"""

from __future__ import annotations

import base64
import io
import math
import re
import unicodedata
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray
from PIL import Image

INK, MUTED, GRID, SURFACE, FRONT, LIMIT = "#010101", "#010102", "#010103", "#010104", "#010105", "#010106"
COLOURS = 8
"""Colours of series, told apart by the colour-blind too; markers tell apart what shares one."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p")
_VARIABLES = {INK: "ink", MUTED: "muted", GRID: "grid", SURFACE: "surface", FRONT: "front", LIMIT: "limit"}
_VARIABLES |= {f"#0200{index:02x}": f"series-{index}" for index in range(COLOURS)}

_RC: dict[Any, Any] = {
    "svg.fonttype": "none", "svg.hashsalt": "heatkv", "font.size": 11.5, "font.family": "DejaVu Sans",
    "text.color": INK, "axes.edgecolor": MUTED, "axes.labelcolor": INK, "xtick.color": MUTED, "ytick.color": MUTED,
    "xtick.labelcolor": INK, "ytick.labelcolor": INK, "axes.facecolor": "none", "axes.linewidth": 0.8,
    "axes.spines.top": False, "axes.spines.right": False, "axes.labelsize": 11, "xtick.labelsize": 10.5,
    "ytick.labelsize": 10.5, "grid.color": GRID, "grid.linewidth": 0.8, "axes.axisbelow": True,
    "axes.unicode_minus": False,
}  # fmt: skip

Pixels = NDArray[np.uint8]
Colour = tuple[int, int, int, int]


@dataclass(frozen=True)
class Style:
    """How a series is drawn, the same in all charts of a report."""

    colour: int
    marker: int

    @property
    def sentinel(self) -> str:
        return f"#0200{self.colour:02x}"


def styles(families: Mapping[str, Sequence[str]]) -> dict[str, Style]:
    """A style for every member of every family: a colour for each family, as far as there are colours, and another
    marker for each of its members."""
    of_names = {}
    for index, members in enumerate(families.values()):
        turn, colour = divmod(index, COLOURS)
        for place, name in enumerate(members):
            of_names[name] = Style(colour, (colour + 3 * turn + 2 * place) % len(MARKERS))
    return of_names


# ------------------------------------------------------------------------------------------------------- charts


@contextmanager
def chart(width: float, height: float) -> Iterator[Any]:
    """A matplotlib figure of this many points, in the style of the report."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_RC), warnings.catch_warnings():
        # texts stay texts, which the browser's own fonts draw: matplotlib's need no glyph for them
        warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from font", UserWarning)
        yield Figure(figsize=(width / 72, height / 72))


def svg(figure: Any, name: str, label: str, tips: Mapping[str, str] | None = None) -> Markup:
    """The figure as an inline SVG element. `name` is unique in the page; `label` is read to who cannot see it; `tips`
    are shown over the parts that have these gids."""
    text = io.StringIO()
    figure.savefig(text, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    root = ElementTree.fromstring(text.getvalue())
    return Markup(_InlineSvg(root, name, tips or {}).text(label))


_REFERENCE = re.compile(r"url\(#([^)]+)\)")
_DECIMALS = re.compile(r"-?\d+\.\d{3,}")
_COLOUR = re.compile("|".join(_VARIABLES))
_NEEDLESS = re.compile(r"\s*(?:font-family:[^;]*|stroke-linejoin: miter|stroke-linecap: (?:square|butt))(?:;|$)")


class _InlineSvg:
    """Rewrites an SVG document as an element of a page."""

    def __init__(self, root: ElementTree.Element, name: str, tips: Mapping[str, str]) -> None:
        self._root, self._name, self._tips = root, name, tips
        self._used = {found for element in root.iter() for found in self._references(element)}
        self._ids: dict[str, str] = {}

    @staticmethod
    def _references(element: ElementTree.Element) -> Iterator[str]:
        for key, value in element.attrib.items():
            yield from _REFERENCE.findall(value)
            if key.endswith("href") and value.startswith("#"):
                yield value[1:]

    def _id(self, told: str) -> str:
        return self._ids.setdefault(told, f"{self._name}-{len(self._ids)}")

    def text(self, label: str) -> str:
        for child in list(self._root):
            if child.tag.endswith("metadata") or (child.tag.endswith("defs") and child.find("./{*}style") is not None):
                self._root.remove(child)
        view_box = self._root.attrib["viewBox"]
        self._rewrite(self._root)
        width, height = (float(side) for side in view_box.split()[2:])
        self._root.attrib.clear()
        self._root.attrib |= {
            "class": "chart", "role": "img", "aria-label": label, "viewBox": f"0 0 {width:g} {height:g}",
            "style": f"--w:{width:g}",
        }  # fmt: skip
        return ElementTree.tostring(self._root, encoding="unicode", short_empty_elements=True)

    def _rewrite(self, element: ElementTree.Element) -> None:
        element.tag = element.tag.rpartition("}")[2]
        gid = element.attrib.get("id")
        given = {key.rpartition("}")[2]: value for key, value in element.attrib.items()}
        element.attrib.clear()
        for key, value in given.items():
            if key == "id":
                if value in self._used:
                    element.attrib["id"] = self._id(value)
            elif key == "href" and value.startswith("#"):
                element.attrib["href"] = f"#{self._id(value[1:])}"
            elif key != "version" and not value.startswith("rotate(-0 "):
                element.attrib[key] = self._value(value)
        if not (element.attrib.get("style") or "").strip():
            element.attrib.pop("style", None)
        if element.tag != "text":
            element.text = None
        element.tail = None
        for child in list(element):
            self._rewrite(child)
        if gid is not None and gid in self._tips:
            title = ElementTree.Element("title")
            title.text = self._tips[gid]
            element.insert(0, title)
        for index, child in reversed(list(enumerate(element))):
            if child.tag == "g" and not child.attrib and child.find("title") is None:  # a group without meaning
                element[index : index + 1] = list(child)
            elif child.tag == "path" and child.attrib.get("style") == "fill: none":  # nothing to be seen
                element.remove(child)

    def _value(self, value: str) -> str:
        value = _REFERENCE.sub(lambda found: f"url(#{self._id(found[1])})", value)
        value = _COLOUR.sub(lambda found: f"var(--{_VARIABLES[found[0]]})", value)
        value = _DECIMALS.sub(lambda found: f"{float(found[0]):.2f}".rstrip("0").rstrip("."), value)
        return " ".join(_NEEDLESS.sub("", value).split())


def spread_out(wanted: Sequence[float], least: float, low: float, high: float) -> list[float]:
    """Places near the wanted ones, in their order, between the bounds, and at least `least` apart if there is room."""
    order = sorted(range(len(wanted)), key=lambda index: wanted[index])
    if len(order) > 1:
        least = min(least, (high - low) / (len(order) - 1))
    # groups of labels that touch are centred on where they want to be
    groups: list[tuple[float, list[int]]] = []
    for index in order:
        groups.append((wanted[index], [index]))
        while True:
            centre, members = groups[-1]
            half = least * (len(members) - 1) / 2
            groups[-1] = (min(max(centre, low + half), high - half), members)
            if len(groups) < 2 or groups[-2][0] + least * (len(groups[-2][1]) - 1) / 2 + least <= groups[-1][0] - half:
                break
            (_, before), (_, after) = groups[-2:]
            both = before + after
            target = sum(wanted[i] - least * (place - (len(both) - 1) / 2) for place, i in enumerate(both)) / len(both)
            groups[-2:] = [(target, both)]
    places = [0.0] * len(wanted)
    for centre, members in groups:
        for place, index in enumerate(members):
            places[index] = centre + least * (place - (len(members) - 1) / 2)
    return places


@dataclass(frozen=True)
class Line:
    """A series of a chart: points by x, each with the range of y around it, and what is told over it. `named` is
    whether its name stands at its end."""

    name: str
    style: Style
    points: tuple[tuple[float, float], ...]
    ranges: tuple[tuple[float, float], ...]
    tips: tuple[str, ...]
    named: bool = True


@dataclass(frozen=True)
class Axis:
    """A title, and ticks where they are chosen by hand."""

    title: str
    log: bool = False
    ticks: tuple[tuple[float, str], ...] = ()


_LABEL_PITCH = 14.0
_LETTER = 5.7  # points of a letter of 10.5 points, on the wide side
_LONGEST = 26
"""Letters of a name at the end of a line, more only if they tell two names apart; the tables have the whole."""
MOST_NAMED = 24
"""Lines of a chart that have their names in it."""


def line_chart(
    name: str, label: str, lines: Sequence[Line], front: Sequence[tuple[float, float]], x: Axis, y: Axis
) -> Markup:
    """Lines named at their ends, none of the names over another, with the Pareto front under them."""
    texts = shortened([line.name for line in lines if line.named], _LONGEST)
    beside = 24 + _LETTER * max(map(columns, texts.values()), default=0)
    width = max(360.0, 262 + beside)
    height = max(278.0, 70 + _LABEL_PITCH * len(texts))
    left, bottom, top = 48.0, 52.0, 8.0
    tips: dict[str, str] = {}
    with chart(width, height) as figure:
        ax = figure.add_axes(
            (left / width, bottom / height, (width - left - beside) / width, (height - bottom - top) / height)
        )
        ax.grid(True)
        if len(front) > 1:
            ax.plot(*zip(*front, strict=True), color=FRONT, linewidth=10, alpha=0.28, solid_capstyle="round",
                    solid_joinstyle="round", zorder=1)  # fmt: skip
        elif front:
            ax.plot(*front[0], color=FRONT, marker="o", markersize=16, alpha=0.28, markeredgewidth=0, zorder=1)
        for at, line in enumerate(lines):
            xs, ys = (np.array(values) for values in zip(*line.points, strict=True))
            ends = np.array(line.ranges)
            ax.plot(xs, ys, color=line.style.sentinel, linewidth=1.4, zorder=2)
            if (ends[:, 0] < ends[:, 1]).any():
                ax.vlines(xs, ends[:, 0], ends[:, 1], color=line.style.sentinel, linewidth=4, alpha=0.35, zorder=2)
            for index, point in enumerate(line.points):
                gid = f"tip-{at}-{index}"
                ax.plot(*point, marker=MARKERS[line.style.marker], markersize=6.5, color=line.style.sentinel,
                        markeredgecolor=SURFACE, markeredgewidth=0.8, zorder=3, gid=gid)  # fmt: skip
                tips[gid] = line.tips[index]
        _scale(ax.xaxis, ax.set_xscale, x)
        _scale(ax.yaxis, ax.set_yscale, y)
        ax.set_xlabel(x.title)
        ax.set_ylabel(y.title)
        ax.margins(0.06, 0.08)
        _name_ends(ax, [line for line in lines if line.named], texts, height - bottom - top)
        return svg(figure, name, label, tips)


def _scale(axis: Any, set_scale: Any, told: Axis) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

    if told.log:
        set_scale("log")
    axis.set_minor_locator(NullLocator())
    if told.ticks:
        axis.set_major_locator(FixedLocator([place for place, _ in told.ticks]))
        texts = dict(told.ticks)
        axis.set_major_formatter(FuncFormatter(lambda place, _: texts.get(place, "")))
    else:
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)) if told.log else MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
        axis.set_major_formatter(FuncFormatter(lambda place, _: f"{place:g}"))


def _name_ends(ax: Any, lines: Sequence[Line], texts: Mapping[str, str], room: float) -> None:
    """The text for the name of every line beside its last point, with a thin line to it."""
    ends = [max(line.points) for line in lines]
    heights = [float(ax.transAxes.inverted().transform(ax.transData.transform(end))[1]) * room for end in ends]
    ax.set_autoscale_on(False)
    for line, end, place in zip(lines, ends, spread_out(heights, _LABEL_PITCH, 4, room - 4), strict=True):
        ax.annotate(
            texts[line.name], end, (1.06, place / room), textcoords="axes fraction", va="center", fontsize=10.5,
            color=INK, annotation_clip=False,
            arrowprops={"arrowstyle": "-", "relpos": (0, 0.5), "color": line.style.sentinel, "linewidth": 0.7,
                        "alpha": 0.6, "shrinkA": 1, "shrinkB": 4},
        )  # fmt: skip


def columns(text: str) -> int:
    """How wide a text is, in letters: those of East Asia take two."""
    return sum(2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in text)


def cut(text: str, most: int) -> str:
    """The text, with its middle left out where it is wider than so many letters: names differ at their ends."""
    if columns(text) <= most:
        return text
    begin, end = "", ""
    for first, last in zip(text, reversed(text), strict=True):
        if columns(begin + end + first) >= most:
            break
        begin += first
        if columns(begin + end + last) >= most:
            break
        end = last + end
    return f"{begin}…{end}"


def shortened(names: Sequence[str], most: int) -> dict[str, str]:
    """Every name cut to so many letters, or to as few more as are needed to tell all of them apart."""
    while True:
        texts = {name: cut(name, most) for name in names}
        if len(set(texts.values())) == len(texts):
            return texts
        most += 2


def share_ticks(places: Mapping[float, str], least: float = 0.085) -> tuple[tuple[float, str], ...]:
    """Those of the ticks that leave room for their texts on a logarithmic axis, from the left."""
    shown: list[tuple[float, str]] = []
    logs = [math.log(place) for place in places if place > 0]
    span = (max(logs) - min(logs)) or 1.0 if logs else 1.0
    for place in sorted(place for place in places if place > 0):
        if not shown or (math.log(place) - math.log(shown[-1][0])) / span >= least:
            shown.append((place, places[place]))
    return tuple(shown)


@dataclass(frozen=True)
class ScaleLine:
    """A series by target scale."""

    style: Style
    values: Sequence[float]
    dashed: bool = False


def scale_panels(
    name: str, label: str, panels: Mapping[str, Sequence[ScaleLine]], names: Sequence[str], y: str
) -> Markup:
    """A panel for every title: lines by scale, all panels on one axis of y, which is titled."""
    columns = 1 if len(panels) == 1 else 2
    rows = -(-len(panels) // columns)
    width, height = 380.0, 46 + 136.0 * rows
    most = max((max(line.values, default=0) for lines in panels.values() for line in lines), default=0) or 1
    with chart(width, height) as figure:
        axes = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
        figure.subplots_adjust(
            left=46 / width, right=1 - 6 / width, bottom=42 / height, top=1 - 20 / height, wspace=0.07, hspace=0.24
        )
        for ax in axes.flat[len(panels) :]:
            ax.set_axis_off()
        for ax, (title, lines) in zip(axes.flat, panels.items(), strict=False):
            ax.grid(axis="y")
            ax.set_title(title, fontsize=10, loc="left", color=INK, pad=4)
            for line in lines:
                ax.plot(range(len(line.values)), line.values, color=line.style.sentinel, linewidth=1.3,
                        linestyle=(0, (3, 1.5)) if line.dashed else "-", marker=MARKERS[line.style.marker],
                        markersize=4, markeredgecolor=SURFACE, markeredgewidth=0.5, clip_on=False)  # fmt: skip
            step = -(-len(names) // 9)
            ax.set_xticks(range(0, len(names), step), names[::step], fontsize=9)
            ax.set_ylim(0, 1.04 * most)
        for ax in axes[:, 0]:
            ax.tick_params(labelsize=9)
        figure.supxlabel(
            "target scale, side in tokens" if all("x" not in n for n in names) else "target scale",
            fontsize=10,
            y=4 / height,
        )
        figure.supylabel(y, fontsize=10, x=3 / width)
        return svg(figure, name, label)


def timeline(
    name: str, label: str, live: Sequence[Sequence[float]], budget: float | None,
    layers: int, names: Sequence[str], style: Style, unit: str,
) -> Markup:  # fmt: skip
    """What the cache holds after every layer of every scale, by draw, against the budget."""
    width, height = 330.0, 118.0
    top = max([*(max(values) for values in live), budget or 0]) * 1.12 or 1.0
    count = len(live[0])
    with chart(width, height) as figure:
        ax = figure.add_axes((40 / width, 20 / height, (width - 46) / width, (height - 26) / height))
        edges = np.arange(count + 1)
        for values in live:
            ax.stairs(values, edges, fill=True, color=style.sentinel, alpha=0.3 / len(live) + 0.05)
            ax.stairs(values, edges, baseline=None, color=style.sentinel, linewidth=1.1)
        if budget is not None:
            ax.axhline(budget, color=LIMIT, linewidth=1.1, linestyle=(0, (4, 2)))
        ax.set_ylim(0, top)
        ax.set_xlim(0, count)
        step = -(-len(names) // 9)
        ax.set_xticks(np.arange(len(names)) * layers, [""] * len(names))
        ax.set_xticks((np.arange(len(names)) + 0.5)[::step] * layers, names[::step], minor=True, fontsize=9)
        ax.tick_params(axis="x", which="minor", length=0, pad=3)
        ax.tick_params(axis="x", which="major", length=3, color=GRID)
        ax.grid(axis="x", which="major")
        peak = max(max(values) for values in live)
        ax.set_yticks([0, peak], ["0", f"{peak:.3g}"], fontsize=9)
        ax.set_ylabel(unit, fontsize=9, labelpad=-14)
        return svg(figure, name, label)


# ----------------------------------------------------------------------------------------- heat maps and pictures


def ramp(name: str, count: int, low: float = 0.0, high: float = 1.0) -> list[Colour]:
    """So many colours of a colour map of matplotlib, from its share `low` to `high`."""
    from matplotlib import colormaps

    chosen = colormaps[name](np.linspace(low, high, count), bytes=True)
    return [(int(r), int(g), int(b), int(a)) for r, g, b, a in chosen]


def css(colour: Colour) -> str:
    """The colour as the page writes it."""
    red, green, blue, alpha = colour
    return f"rgb({red} {green} {blue})" if alpha == 255 else f"rgb({red} {green} {blue} / {alpha / 255:.2f})"


def indexed_png(index_HW: Pixels, colours: Sequence[Colour]) -> str:
    """A PNG of these colours, some of which may let the page shine through, as a data URI."""
    height, width = index_HW.shape
    image = Image.frombytes("P", (width, height), np.ascontiguousarray(index_HW).tobytes())
    image.putpalette([channel for colour in colours for channel in colour[:3]])
    return _data_uri(image, optimize=True, transparency=bytes(colour[3] for colour in colours))


def rgba_png(pixels_HW4: Pixels) -> str:
    """A PNG as a data URI."""
    return _data_uri(Image.fromarray(pixels_HW4))


def _data_uri(image: Image.Image, **options: Any) -> str:
    out = io.BytesIO()
    image.save(out, format="PNG", **options)
    return f"data:image/png;base64,{base64.b64encode(out.getvalue()).decode()}"


DIFFERENCE_STEPS = 16
DIFFERENCE_MOST = 0.25
"""Mean difference of the channels, of their range, from which on a difference map has its strongest colour."""


def difference_colours() -> list[Colour]:
    """From nothing at all to a strong colour."""
    red, green, blue = 214, 71, 0
    return [(red, green, blue, round(255 * step / (DIFFERENCE_STEPS - 1))) for step in range(DIFFERENCE_STEPS)]


def difference_png(pixels_HW3: Pixels, reference_HW3: Pixels) -> str:
    """Where and how much two pictures differ: the mean difference of their channels, up to DIFFERENCE_MOST."""
    apart = np.abs(pixels_HW3.astype(np.int16) - reference_HW3).mean(axis=2) / 255
    steps = np.minimum(apart / DIFFERENCE_MOST, 1) * (DIFFERENCE_STEPS - 1)
    return indexed_png(np.ceil(steps).astype(np.uint8), difference_colours())


def blocks_image(blocks: Sequence[NDArray[np.int64]], gap: int) -> Pixels:
    """Arrays (L, H) of colour indices side by side, a column of `gap` between them."""
    layers = blocks[0].shape[0]
    between = np.full((layers, 1), gap)
    parts = [part for block in blocks for part in (block, between)][:-1]
    return np.concatenate(parts, axis=1).astype(np.uint8)
