"""What commands print: results on the output, as a table or JSON; all else, and progress, on the error stream."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
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

from heatkv.core.plan import CachePlan, Plan
from heatkv.parallel.ranks import current
from heatkv.parallel.reporter import Reporter

_SHORTEST_SECONDS = 10
"""Less time left than this is not printed in logs."""


def say(text: str) -> None:
    """A line for the user, beside the result; the first of several ranks says it."""
    if current().first:
        say_of_any_rank(text)


def say_of_any_rank(text: str) -> None:
    """A line that this rank says, whichever it is."""
    Console(stderr=True, highlight=False).print(text, soft_wrap=True, markup=False)


def show(value: Any, as_json: bool, data: Any) -> None:
    """The result of a command: `value`, or `data` as JSON. The first of several ranks shows it."""
    if not current().first:
        return
    if as_json:
        print(json.dumps(data, indent=1))
        return
    console = Console(markup=False)
    if not console.is_terminal:  # a pipe has no width of its own, and a table that is cut loses figures
        wide = Console(markup=False, width=1000)
        console = Console(markup=False, width=max(160, wide.measure(value).minimum))
    console.print(value)


@dataclass(frozen=True)
class Fact:
    """A fact of a result: its name and value in JSON, and its name and text on the screen. Without a `key` it is not in
    JSON, without a `label` or a value not on the screen; without a `text` the value is shown."""

    key: str
    value: Any
    label: str = ""
    text: str | None = None


def facts_table(title: str, facts: Sequence[Fact], heads: tuple[str, str] = ("what", "value")) -> Table:
    """A table of two columns."""
    table = Table(*heads, title=title)
    for fact in facts:
        if fact.label and fact.value is not None:
            table.add_row(fact.label, str(fact.value) if fact.text is None else fact.text)
    return table


def facts_json(facts: Sequence[Fact]) -> dict[str, Any]:
    """The facts as JSON has them."""
    return {fact.key: fact.value for fact in facts if fact.key}


def plan_facts(plan: CachePlan) -> list[Fact]:
    """The budget that a bound on the KL chose, the predicted KL, and what is certified; where there are such."""
    static, kl = plan if isinstance(plan, Plan) else None, plan.predicted_kl
    chosen = plan.settings.get("budget") == "auto"
    facts = [
        Fact("budget_asked", plan.settings.get("budget")),
        Fact("", chosen or None, "budget chosen", f"{plan.budget:.1%}, the smallest in steps of 0.1% with a predicted "
             f"KL of at most {plan.settings.get('max_kl')}"),
        Fact("predicted_kl", kl, "predicted KL", None if kl is None else f"{kl:.4g} nats per token"),
        Fact("sink_scales", static and static.sink_scales, "sink scales"),
    ]  # fmt: skip
    for key, label, form in (("value", "value", ".6g"), ("value_bound", "value at most", ".6g"),
                             ("gap", "certified gap", ".3%")):  # fmt: skip
        value = getattr(static, key, None)
        facts.append(Fact(key, value, label, None if value is None else format(value, form)))
    effect = "the plan has no effect: nothing is dropped" if plan.had_no_effect() else None
    return [*facts, Fact("had_no_effect", plan.had_no_effect()), Fact("", effect, "note")]


@contextmanager
def progress(what: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
    """Progress on the error stream, as a bar, or in a log as a line for every tenth, with the time left; the callback
    takes how much more is done. Without a total the bar only moves. Of several ranks the first one shows it."""
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
                more = f", {left // 60}:{left % 60:02} left" if left >= _SHORTEST_SECONDS else ""
                say(f"{what}: {done} of {total}{more}")

        yield advance
        return
    columns: list[ProgressColumn] = [TextColumn("{task.description}"), BarColumn()]
    columns += [TimeElapsedColumn()] if total is None else [MofNCompleteColumn(), TimeRemainingColumn()]
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda count: bar.advance(task, count)


class Screen(Reporter):
    """Prints what a long run reports."""

    def say(self, text: str) -> None:
        say(text)

    def progress(self, what: str, total: int) -> Any:
        return progress(what, total)


SCREEN = Screen()
