"""What commands tell: results on the output, as a table or JSON; all else, and progress, on the error stream."""

from __future__ import annotations

import json
import os
import time
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

from heatkv.core.io import check_place
from heatkv.core.plan import CachePlan, Plan
from heatkv.errors import FormatError
from heatkv.parallel.ranks import current

_TOLD_SECONDS = 10
"""Less time left than this is not told in logs."""


def say(text: str) -> None:
    """A line for the user, beside the result; the first of several ranks says it."""
    if current().first:
        say_of_any_rank(text)


def say_of_any_rank(text: str) -> None:
    """A line that this rank says, whichever it is."""
    Console(stderr=True, highlight=False).print(text, soft_wrap=True, markup=False)


def show(value: Table | Any, as_json: bool, data: Any) -> None:
    """The result of a command: `value`, or `data` as JSON."""
    if as_json:
        print(json.dumps(data, indent=1))
    else:
        console = Console(markup=False)
        if not console.is_terminal:  # a pipe has no width of its own, and a table that is cut loses figures
            wide = Console(markup=False, width=1000)
            console = Console(markup=False, width=max(160, wide.measure(value).minimum))
        console.print(value)


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


def chosen_by_kl(plan: CachePlan) -> dict[str, str]:
    """The budget that a bound on the KL chose, and the KL that is foretold, where they are known."""
    told = {}
    if plan.settings.get("budget") == "auto":
        most = plan.settings.get("max_kl")
        told["budget"] = f"{plan.budget:.1%}, in steps of 0.1% the smallest with a foretold KL of at most {most}"
    if plan.predicted_kl is not None:
        told["foretold KL"] = f"{plan.predicted_kl:.4g} nats per token"
    return told


@contextmanager
def progress(what: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
    """Progress on the error stream, as a bar, or in a log as a line for every tenth, with the time left; the callback
    is told how much more is done. Without a total the bar only moves. Of several ranks the first one shows it."""
    if not current().first:
        yield lambda count: None
        return
    console = Console(stderr=True, highlight=False)
    if not console.is_terminal:
        done, began = 0, time.monotonic()

        def advance(count: int) -> None:
            nonlocal done
            before, done = done, done + count
            if total is not None and 10 * done // total > 10 * before // total:
                left = round((time.monotonic() - began) * (total - done) / done)
                more = f", {left // 60}:{left % 60:02} left" if left >= _TOLD_SECONDS else ""
                say(f"{what}: {done} of {total}{more}")

        yield advance
        return
    columns: list[ProgressColumn] = [TextColumn("{task.description}"), BarColumn()]
    columns += [TimeElapsedColumn()] if total is None else [MofNCompleteColumn(), TimeRemainingColumn()]
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda count: bar.advance(task, count)


@contextmanager
def shared_progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Progress of all ranks together, in one place: the first rank shows what each has told."""
    ranks, shown = current(), 0
    if ranks.size == 1:
        with progress(what, total) as advance:
            yield advance
        return
    counter = ranks.counter()
    if not ranks.first:

        def add(count: int) -> None:
            counter(count)

        yield add
        return
    with progress(what, total) as advance:

        def tell(count: int) -> None:
            nonlocal shown
            done = counter(count)
            if done > shown:
                advance(done - shown)
                shown = done

        ranks.while_waiting = lambda: tell(0)
        try:
            yield tell
        finally:
            ranks.while_waiting = None


def make_folder(path: Path, option: str = "--out") -> Path:
    """Create the folder of an option and its parents, or say in one line why that cannot be, or why it takes no
    files."""
    if path.suffix.lower() in (".png", ".json") and not os.path.isdir(path):
        raise FormatError(f"{option} {path} names a file, but takes a folder for several; write {option} {path.parent}")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        file = next((part for part in (path, *path.parents) if os.path.isfile(part)), None)
        if file is not None:
            raise FormatError(f"{option} {path} cannot be a folder: {file} is a file; name another folder") from error
        raise FormatError(f"cannot create the folder {path}: {error.strerror or error}; name another folder") from error
    check_place(path / "file")
    return path
