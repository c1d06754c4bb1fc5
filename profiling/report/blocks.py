"""What a report is made of: sections of tables, charts, heat maps and pictures, without a word about how they are
written. The page and the Markdown are both written from these.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from markupsafe import Markup

from heatkv.profiling.report.figures import Style

NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class Cell:
    """A field of a table. `value` is the figure in full, which the page sorts by; `shade`, from 0 to 1, tints it."""

    text: str
    value: float | str | None = None
    kind: str = ""
    shade: float | None = None
    style: Style | None = None


MISSING = Cell(NOT_MEASURED, kind="missing")


def number_cell(value: float | None, form: str, kind: str = "", shade: float | None = None) -> Cell:
    """The figure in this format, or that it was not measured."""
    return MISSING if value is None else Cell(format(value, form), value, kind, shade)


def mib(count: float) -> str:
    """Bytes in MiB, without the unit."""
    size = count / 2**20
    return f"{size:,.3f}" if size < 100 else f"{size:,.1f}"


def mib_cell(value: float | None) -> Cell:
    """Bytes in MiB, or that they were not measured."""
    return MISSING if value is None else Cell(mib(value), value)


def log_shade(value: float | None, least: float, most: float) -> float | None:
    """Where a figure is between two positive ones, on a logarithmic scale."""
    if value is None or value <= 0 or not 0 < least < most:
        return None
    return min(1.0, max(0.0, math.log(value / least) / math.log(most / least)))


@dataclass(frozen=True)
class Table:
    """`columns` are titles; `spans` are titles over so many of them each; the first `heads` columns head the rows."""

    kind: ClassVar[str] = "table"

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    heads: int = 1
    spans: tuple[tuple[str, int], ...] = ()
    sortable: bool = True

    @property
    def numeric(self) -> tuple[bool, ...]:
        """Which columns are of figures, and stand to the right."""
        return tuple(
            index > 0
            and all(row[index].kind == "missing" or isinstance(row[index].value, int | float) for row in self.rows)
            for index in range(len(self.columns))
        )


@dataclass(frozen=True)
class Note:
    """A paragraph; `missing` when it says what the folder lacks, or what speaks against its figures. One `of_drawing`
    is about what is seen above or below it, and left out where there is nothing to see."""

    kind: ClassVar[str] = "note"

    text: str
    missing: bool = False
    of_drawing: bool = False


@dataclass(frozen=True)
class Heading:
    """A heading within a section."""

    kind: ClassVar[str] = "heading"

    text: str


@dataclass(frozen=True)
class Key:
    """What a colour stands for: that of a series with its marker, or any other."""

    text: str
    style: Style | None = None
    colour: str = ""


@dataclass(frozen=True)
class Legend:
    """What colours stand for; those of a `ramp` go over into each other, and only some are named."""

    kind: ClassVar[str] = "legend"

    keys: tuple[Key, ...]
    ramp: bool = False


@dataclass(frozen=True)
class Chart:
    """An inline SVG; beside it, where there is room, what helps to read it, and below that paragraphs about it."""

    kind: ClassVar[str] = "chart"

    svg: Markup
    captions: tuple[str, ...] = ()
    beside: tuple[Block, ...] = ()


@dataclass(frozen=True)
class Heat:
    """A picture of layers by heads, a block for every scale: `labels` stand under the blocks, `below` under those."""

    kind: ClassVar[str] = "heat"

    uri: str
    alt: str
    title: str
    labels: tuple[str, ...]
    below: tuple[str, ...] = ()
    layers: int = 1
    heads: int = 1


@dataclass(frozen=True)
class Card:
    """What belongs to one policy at one budget."""

    kind: ClassVar[str] = "card"

    title: str
    style: Style
    text: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class Cards:
    """Cards side by side, as many as there is room for."""

    kind: ClassVar[str] = "cards"

    cards: tuple[Card, ...]


@dataclass(frozen=True)
class Tile:
    """One fact in large letters."""

    over: str
    figure: str
    unit: str
    title: str
    text: str
    style: Style


@dataclass(frozen=True)
class Tiles:
    """The main facts."""

    kind: ClassVar[str] = "tiles"

    tiles: tuple[Tile, ...]


@dataclass(frozen=True)
class Strip:
    """Pictures in a row, and under them where they differ from those of the full cache."""

    label: str
    text: str
    uri: str
    alt: str
    difference: str = ""


@dataclass(frozen=True)
class Sheet:
    """Strips of the same samples, one under the other; `width` is that of a strip in pixels of the page."""

    kind: ClassVar[str] = "sheet"

    title: str
    strips: tuple[Strip, ...]
    width: int


@dataclass(frozen=True)
class Fold:
    """Blocks that are shown when asked for."""

    kind: ClassVar[str] = "fold"

    title: str
    blocks: tuple[Block, ...]
    open: bool = False


Block = Table | Note | Heading | Legend | Chart | Heat | Cards | Tiles | Sheet | Fold


@dataclass(frozen=True)
class Section:
    """A part of the report, named `id` in links, with `short` in the list of contents."""

    id: str
    short: str
    title: str
    lead: str
    blocks: Sequence[Block]
