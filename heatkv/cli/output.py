"""What commands tell: results on the output, as a table or JSON; all else, and progress, on the error stream."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from heatkv.errors import FormatError
from heatkv.plan import Plan


def say(text: str) -> None:
    """A line for the user, beside the result."""
    Console(stderr=True, highlight=False).print(text, soft_wrap=True, markup=False)


def show(value: Table | Any, as_json: bool, data: Any) -> None:
    """The result of a command: `value`, or `data` as JSON."""
    if as_json:
        print(json.dumps(data, indent=1))
    else:
        console = Console(markup=False)
        # a pipe has no width of its own, and a table cut to 80 columns loses figures
        (console if console.is_terminal else Console(markup=False, width=160)).print(value)


def pairs(title: str, heads: tuple[str, str], rows: dict[str, str]) -> Table:
    """A table of two columns."""
    table = Table(*heads, title=title)
    for row in rows.items():
        table.add_row(*row)
    return table


def certificate(plan: Plan) -> dict[str, str]:
    """What a plan is worth and how far from the best it may be, where its policy told."""
    shown = {
        "value": (plan.value, ".6g"),
        "value at most": (plan.value_bound, ".6g"),
        "certified gap": (plan.gap, ".3%"),
    }
    return {name: format(value, form) for name, (value, form) in shown.items() if value is not None}


@contextmanager
def progress(what: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
    """Progress on the error stream, as a bar, or in a log as a line for every tenth; the callback is told how much
    more is done. Without a total the bar only moves."""
    console = Console(stderr=True, highlight=False)
    if not console.is_terminal:
        done = 0

        def advance(count: int) -> None:
            nonlocal done
            before, done = done, done + count
            if total is not None and 10 * done // total > 10 * before // total:
                say(f"{what}: {done} of {total}")

        yield advance
        return
    columns: list[ProgressColumn] = [TextColumn("{task.description}"), BarColumn()]
    columns += [TimeElapsedColumn()] if total is None else [MofNCompleteColumn(), TimeRemainingColumn()]
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda count: bar.advance(task, count)


def make_folder(path: Path) -> Path:
    """Create the folder of --out and its parents, or say in one line why that cannot be."""
    if path.suffix.lower() in (".png", ".json") and not os.path.isdir(path):
        raise FormatError(f"--out {path} names a file, but takes a folder for several; write --out {path.parent}")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        file = next((part for part in (path, *path.parents) if os.path.isfile(part)), None)
        if file is not None:
            raise FormatError(f"--out {path} cannot be a folder: {file} is a file; name another folder") from error
        raise FormatError(f"cannot create the folder {path}: {error.strerror or error}; name another folder") from error
    return path
