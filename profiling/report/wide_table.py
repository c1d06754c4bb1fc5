"""Tables on screen that lose no figure: one too wide for the terminal goes on below, its first columns repeated."""

from __future__ import annotations

from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text


class WideTable(Table):
    """Columns whose cells keep to one line. Where they do not fit beside each other, as many as do are shown, the
    others below in further tables with the same rows; the first `heads` columns, which name the rows, are in all of
    them, and give way to line breaks where nothing else helps."""

    def __init__(self, *, heads: int, title: str) -> None:
        super().__init__(title=title)
        self._heads = heads

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        """What all columns take beside each other, which is what a pipe gives it."""
        width = self._width(range(len(self.columns)))
        return Measurement(width, width)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if self._width(range(len(self.columns))) <= options.max_width:
            yield from super().__rich_console__(console, options)
            return
        groups = self._groups(options.max_width)
        for place, group in enumerate(groups):
            part = self._part(group)
            part.title = self.title if place == 0 else None
            part.caption = self.caption if place == len(groups) - 1 else None
            yield part

    def _groups(self, width: int) -> list[list[int]]:
        """Columns beside the heads, as many as fit in every part."""
        groups: list[list[int]] = []
        for column in range(self._heads, len(self.columns)):
            if groups and self._width([*range(self._heads), *groups[-1], column]) <= width:
                groups[-1].append(column)
            else:
                groups.append([column])
        return groups

    def _part(self, group: list[int]) -> Table:
        part = Table()
        chosen = [*range(self._heads), *group]
        for index in chosen:
            column = self.columns[index]
            wraps = index < self._heads and self.columns[index].justify == "left"
            part.add_column(column.header, justify=column.justify, no_wrap=not wraps, overflow="fold")
        cells = [list(self.columns[index].cells) for index in chosen]
        for place, row in enumerate(self.rows):
            part.add_row(*(of_column[place] for of_column in cells), end_section=row.end_section)
        return part

    def _width(self, columns: Any) -> int:
        """Of these columns with their borders, nothing in them broken."""
        widths = [max(_length(text) for text in (self.columns[i].header, *self.columns[i].cells)) for i in columns]
        return sum(widths) + 3 * len(widths) + 1


def _length(text: Any) -> int:
    return Text(str(text)).cell_len
