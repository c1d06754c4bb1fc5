"""The command line: its commands and how a run ends. Bad input gives one line and exit code 2; Ctrl-C gives 130,
SIGTERM 143, and both keep what was finished.

Every command is a function of its own name in a module of this package; a new one is such a module and a line below.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from importlib import import_module
from itertools import pairwise, takewhile
from typing import Annotated, Any

import typer

from heatkv.cli.options import Program, command
from heatkv.cli.output import say, say_of_any_rank
from heatkv.core.io import versions
from heatkv.errors import HeatKVError, RanksError, out_of_memory
from heatkv.parallel.ranks import current, join, leave

# Command -> its module, in the order of `heatkv --help`.
COMMANDS = {
    "doctor": "inventory",
    "models": "inventory",
    "policies": "inventory",
    "solve": "planning",
    "explain": "explain",
    "fit": "planning",
    "calibrate": "calibrate",
    "profile": "measure",
    "generate": "generate",
    "compare": "measure",
    "report": "report",
    "check": "check",
    "new-policy": "new_policy",
}

# Those whose samples several ranks share; all others run in one process.
SHARED = ("calibrate", "compare", "generate")

# Options whose texts may be empty.
TEXTS = ("--prompt", "--negative")

AGAIN_SECONDS = 2.0
"""In which another signal to stop is taken for the same one: a launcher passes on what its processes got themselves."""

app = typer.Typer(
    name="heatkv",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="KV-cache compression for visual autoregressive image models: every head keeps the scales it reads, under a "
    "byte budget that holds.",
)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"heatkv {versions()['heatkv']}")
        raise typer.Exit


@app.callback()
def _program(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="print the version and stop")
    ] = False,
    deterministic: Annotated[
        bool, typer.Option("--deterministic", help="the same bits every time on one machine (docs/numerics.md)")
    ] = False,
    attention: Annotated[
        str, typer.Option("--attention", help="attention kernel of all caches: auto, ragged or triton")
    ] = "auto",
) -> None:
    context.obj = Program(attention)
    if deterministic:
        from heatkv.engine.watch import run_deterministically

        run_deterministically()


def _alone(name: str, function: Callable[..., None]) -> Callable[..., None]:
    """The command, refused where several ranks would each do the same."""

    @wraps(function)
    def called(**given: Any) -> None:
        if current().size > 1:
            raise RanksError(f"{name} runs in one process; start it without torchrun (shared are {', '.join(SHARED)})")
        function(**given)

    return called


for _name, _module in COMMANDS.items():
    _function = command(getattr(import_module(f"heatkv.cli.{_module}"), _name.replace("-", "_")))
    app.command(_name)(_function if _name in SHARED else _alone(_name, _function))


def _usage_message(error: Exception) -> str | None:
    """The message of typer's own errors, which live in different modules in different releases."""
    form = getattr(error, "format_message", None)
    return str(form()) if callable(form) and hasattr(error, "exit_code") else None


@contextmanager
def _stopped_by_signals() -> Iterator[list[int]]:
    """SIGTERM and SIGINT within end a run alike, by a KeyboardInterrupt; what came."""
    came: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # which no signal reaches
        yield came
        return
    first = 0.0

    def stop(number: int, frame: object) -> None:
        nonlocal first
        came.append(number)
        if len(came) > 1 and time.monotonic() - first < AGAIN_SECONDS:
            return
        first = time.monotonic()
        raise KeyboardInterrupt

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)


def run(arguments: Sequence[str]) -> int:
    """Run one command and return its exit code."""
    with _stopped_by_signals() as came, warnings.catch_warnings():
        warnings.showwarning = _say_warning  # type: ignore[assignment]
        try:
            return _run(arguments, came)
        finally:
            leave()


def _check_given(arguments: Sequence[str]) -> None:
    """Refuse empty values, as of shell variables that nobody set: as a path, one would be the current folder."""
    for before, argument in pairwise(["", *takewhile(lambda argument: argument != "--", arguments)]):
        option = argument.removesuffix("=") if argument.startswith("--") else before if before.startswith("--") else ""
        if (not argument or argument == f"{option}=") and option not in TEXTS:
            raise HeatKVError(f"{option or 'an argument'} is empty; give a value, or leave it out")


def _run(arguments: Sequence[str], came: list[int]) -> int:
    try:
        join()
        _check_given(arguments)
        outcome = app(args=list(arguments), prog_name="heatkv", standalone_mode=False)
        if sys.stdout is not None:  # it may have been closed before we began
            sys.stdout.flush()
        if outcome == 130:
            return _stopped(came)
        return outcome if isinstance(outcome, int) else 0
    except HeatKVError as error:
        _fail(" ".join(str(error).split()))
        return 2
    except (KeyboardInterrupt, typer.Abort):
        return _stopped(came)
    except (BrokenPipeError, SystemExit):  # the reader of our output has seen enough; rich exits for that
        _discard_output()
        return 0
    except OSError as error:
        _discard_output()
        _fail(f"cannot go on: {error}")
        return 2
    except Exception as error:
        if out_of_memory(error):
            why = (str(error).strip().splitlines() or [type(error).__name__])[0]
            _fail(f"out of memory: {why}; draw fewer images at once, take a smaller budget, or see `heatkv fit`")
            return 2
        message = _usage_message(error)
        if message is None:
            raise
        if message:
            _fail(" ".join(message.split()))
        return 2


def _say_warning(message: Warning | str, *_: Any) -> None:
    """A warning of this package or a library, as a line."""
    say(f"note: {message}")


def _stopped(came: Sequence[int]) -> int:
    """Say that a signal ended the run; the exit code for it."""
    if not came or came[0] == signal.SIGINT:
        _fail("stopped")
        return 130
    lost = "stopped by SIGTERM, as torchrun does when another rank has ended; what was finished is kept"
    _fail(lost if current().size > 1 else "stopped")
    return 128 + came[0]


def _fail(text: str) -> None:
    """Say why the command failed, at one rank."""
    if current().may_report():
        say_of_any_rank(f"heatkv: {text}")


def _discard_output() -> None:
    """What the output still holds would fail again when Python ends."""
    if sys.stdout is not None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
