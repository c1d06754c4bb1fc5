"""What the site is made of besides its pages: the commands' page from the program itself, and links that lead outside.

Read by mkdocs (mkdocs.yml), never imported by the package.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

from heatkv.cli import app

_OUTSIDE = re.compile(r"\[([^\]]*)\]\((\.\./[^)#\s]+)\)")


def on_config(config: Any) -> None:
    """Say what is missing, where the page of Python would end in a traceback."""
    installed = Path(config.config_file_path).parent / "build" / "typed" / "heatkv"
    if not installed.is_dir():
        raise PluginError(f"{installed} is missing, the package that the pages of Python are made from; run make docs")


def on_files(files: Files, config: Any) -> Files:
    """Add commands.md."""
    files.append(File.generated(config, "commands.md", content="\n".join(_commands())))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Name what lies in the repository and not on the site: a link there would lead nowhere."""
    del page, config, files
    return _OUTSIDE.sub(lambda found: f"{found[1]} (`{found[2].replace('../', '')}`)", markdown)


def _commands() -> Iterator[str]:
    group: Any = typer.main.get_command(app)
    yield "# Every command\n"
    yield (
        "Printed from the program itself; `heatkv COMMAND --help` says the same. Bad input gives one line and exit "
        "code 2, Ctrl-C gives 130 and keeps what was finished; `check` ends with 1 when something grew worse, and so "
        "does `doctor --self-test` when something is broken.\n"
    )
    yield "## Before the command\n"
    yield from _table(group.params)
    for name, command in group.commands.items():
        text, _, example = command.help.partition("Example:")
        yield f"## heatkv {name}\n"
        yield f"{_prose(text)}\n"
        yield f"```sh\n{' '.join(example.split())}\n```\n"
        arguments = [p for p in command.params if p.param_type_name == "argument"]
        options = [p for p in command.params if p.param_type_name == "option"]
        yield from _table([*arguments, *options])


def _table(parameters: list[Any]) -> Iterator[str]:
    yield "| given | meaning | default |\n| --- | --- | --- |"
    for parameter in parameters:
        yield f"| {_names(parameter)} | {_cell(parameter.help or '')} | {_default(parameter)} |"
    yield ""


def _prose(text: str) -> str:
    return "\n\n".join(" ".join(part.split()) for part in text.strip().split("\n\n"))


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def _names(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        return f"`{parameter.name.upper()}`"
    return ", ".join(f"`{option}`" for option in (*parameter.opts, *parameter.secondary_opts))


def _default(parameter: Any) -> str:
    if parameter.required:
        return "required"
    default = parameter.default
    return "" if default in (None, False, [], ()) else f"`{default}`"
