"""The command line: its commands and how a run ends. Bad input gives one line and exit code 2; Ctrl-C gives 130 and
keeps what was finished.

Every command is a function of its own name in a module of this package; a new one is such a module and a line below.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Annotated

import typer

from heatkv.cli.options import command
from heatkv.cli.output import say
from heatkv.errors import HeatKVError
from heatkv.versions import versions

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
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="print the version and stop")
    ] = False,
) -> None:
    pass


for _name, _module in COMMANDS.items():
    app.command(_name)(command(getattr(import_module(f"heatkv.cli.{_module}"), _name.replace("-", "_"))))


def _usage_message(error: Exception) -> str | None:
    """The message of typer's own errors, which live in different modules in different releases."""
    form = getattr(error, "format_message", None)
    return str(form()) if callable(form) and hasattr(error, "exit_code") else None


def run(arguments: Sequence[str]) -> int:
    """Run one command and return its exit code."""
    try:
        outcome = app(args=list(arguments), prog_name="heatkv", standalone_mode=False)
        if sys.stdout is not None:  # it may have been closed before we began
            sys.stdout.flush()
        if outcome == 130:
            say("heatkv: stopped")
        return outcome if isinstance(outcome, int) else 0
    except HeatKVError as error:
        say(f"heatkv: {' '.join(str(error).split())}")
        return 2
    except (KeyboardInterrupt, typer.Abort):
        say("heatkv: stopped")
        return 130
    except (BrokenPipeError, SystemExit):  # the reader of our output has seen enough; rich exits for that
        _discard_output()
        return 0
    except OSError as error:
        _discard_output()
        say(f"heatkv: cannot go on: {error}")
        return 2
    except Exception as error:
        message = _usage_message(error)
        if message is None:
            raise
        if message:
            say(f"heatkv: {' '.join(message.split())}")
        return 2


def _discard_output() -> None:
    """What the output still holds would fail again when Python ends."""
    if sys.stdout is not None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
