"""Counts what the code base weighs, and fails where it grew past its limits: `python tools/size.py [--check]`.

Lines are lines of Python files, blank ones included. A limit is lowered to what is reached, and raised by
nothing but a new capability that no deletion pays for.
"""

from __future__ import annotations

import ast
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import typer
from rich.console import Console
from rich.table import Table

from heatkv.cli import app

ROOT = Path(__file__).resolve().parents[1]
PRODUCT = ("heatkv", "policies", "profiling")
LONGEST = 60
READING_PATH = """
heatkv/core: schedule geometry budget plan statistics
policies: base heatkv
heatkv/solve: checkpoints cells
heatkv/engine: layout store steps arena_cache
heatkv/engine/attention: base grouped kernels
heatkv/generation: loop
heatkv/models: sampling
"""
"""The modules that explain the whole idea, in the order in which docs/reading-path.md presents them."""
LIMITS = {
    "lines of product": 22_990,
    "lines of tests": 19_588,
    "modules in the fullest folder": 14,
    "options of the command line": 120,
    f"functions over {LONGEST} lines": 2,
    "lines of the reading path": 3_300,
}


def python_files(*folders: str) -> Iterator[Path]:
    """The Python files below the folders, sorted."""
    for folder in folders:
        yield from sorted((ROOT / folder).rglob("*.py"))


def lines(path: Path) -> int:
    """Lines of a file, blank ones included."""
    return len(path.read_text(encoding="utf-8").splitlines())


def long_functions() -> list[str]:
    """Functions of the product longer than LONGEST lines, docstrings included, as `path:name lines`."""
    found = []
    for path in python_files(*PRODUCT):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > LONGEST:
                    found.append(f"{path.relative_to(ROOT)}:{node.name} {length}")
    return found


def reading_path() -> list[Path]:
    """The files of the reading path, in order."""
    folders = (line.split(": ") for line in READING_PATH.strip().splitlines())
    return [ROOT / folder / f"{name}.py" for folder, names in folders for name in names.split()]


def options() -> int:
    """Arguments and options of all commands, `--help` not counted."""
    commands = typer.main.get_group(app).commands.values()
    return sum(parameter.name != "help" for command in commands for parameter in command.params)


def main() -> int:
    """Print the tables; 1 when asked to check and something is over its limit."""
    console = Console(width=100)
    folders: dict[str, list[int]] = {}
    modules: Counter[str] = Counter()
    for path in python_files(*PRODUCT, "tests", "benchmarks", "tools"):
        folder = str(path.parent.relative_to(ROOT))
        folders.setdefault(folder, []).append(lines(path))
        modules[folder] += path.name != "__init__.py"
    table = Table("folder", "modules", "lines", title="Python")
    for folder, sizes in sorted(folders.items()):
        table.add_row(folder, str(modules[folder]), f"{sum(sizes):,}")
    console.print(table)

    def weight(*tops: str) -> int:
        return sum(sum(sizes) for folder, sizes in folders.items() if folder.split("/")[0] in tops)

    measured = {
        "lines of product": weight(*PRODUCT),
        "lines of tests": weight("tests"),
        "modules in the fullest folder": max(modules[folder] for folder in folders if folder.split("/")[0] in PRODUCT),
        "options of the command line": options(),
        f"functions over {LONGEST} lines": len(long_functions()),
        "lines of the reading path": sum(lines(path) for path in reading_path() if path.exists()),
    }
    table = Table("size", "now", "limit")
    for name, value in measured.items():
        mark = "" if value <= LIMITS[name] else "[red]"
        table.add_row(name, f"{mark}{value:,}", f"{LIMITS[name]:,}")
    console.print(table)
    for name in long_functions():
        console.print(f"longer than {LONGEST} lines: {name}")
    absent = [str(path.relative_to(ROOT)) for path in reading_path() if not path.exists()]
    for name in absent:
        console.print(f"the reading path names a file that is not there: {name}")
    over = [name for name, value in measured.items() if value > LIMITS[name]]
    return 1 if "--check" in sys.argv and (over or absent) else 0


if __name__ == "__main__":
    sys.exit(main())
