"""The folders are layers: no module imports from a higher one, and none below the command line speaks of it."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LAYERS: list[tuple[str, ...]] = [
    ("errors",),
    ("core",),
    ("registry", "parallel"),
    ("solve",),
    ("levels",),
    ("policies",),
    ("engine", "engine.attention"),
    ("models",),
    ("generation",),
    ("calibration",),
    ("attachment",),
    ("online",),
    ("testing",),
    ("profiling.measure", "profiling.results"),
    ("profiling.analysis", "profiling.report"),
    ("profiling",),
    ("cli",),
]
"""From the lowest; folders of one entry may import each other."""
ENTRANCES = {"heatkv", "heatkv.__main__"}
"""The public names of the package, and the start of the program: these see every layer."""
COMMANDS = (
    "doctor", "models", "policies", "calibrate", "solve", "explain", "generate", "profile", "compare", "report",
    "check", "fit", "new-policy",
)  # fmt: skip
OF_COMMAND_LINE = re.compile(rf"(?<![\w(-])--[a-z][a-z-]+|\bheatkv ({'|'.join(COMMANDS)})\b")


def _modules() -> dict[str, Path]:
    found = {}
    for folder, package in (("heatkv", "heatkv"), ("policies", "heatkv.policies"), ("profiling", "heatkv.profiling")):
        for path in (ROOT / folder).rglob("*.py"):
            name = ".".join([package, *path.relative_to(ROOT / folder).with_suffix("").parts])
            found[name.removesuffix(".__init__")] = path
    return found


MODULES = _modules()


def layer(module: str) -> int:
    """The index of the module's layer; that of its longest prefix among the folders."""
    inside = module.removeprefix("heatkv.")
    fitting = [
        (len(folder), index)
        for index, folders in enumerate(LAYERS)
        for folder in folders
        if inside == folder or inside.startswith(f"{folder}.")
    ]
    assert fitting, f"{module} belongs to no layer"
    return max(fitting)[1]


def imports(path: Path) -> set[str]:
    """Modules of the package that a file imports, anywhere in it, for types only too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            names = (f"{node.module}.{alias.name}" for alias in node.names)
            found |= {name if name in MODULES else node.module for name in names}
    return {name for name in found if name.split(".")[0] == "heatkv"} - {"heatkv"}


def test_imports_go_down() -> None:
    upward = {
        module: names
        for module, path in MODULES.items()
        if module not in ENTRANCES and (names := {name for name in imports(path) if layer(name) > layer(module)})
    }
    assert not upward


def test_no_module_below_the_command_line_names_it() -> None:
    below = [
        path for module, path in MODULES.items() if not module.startswith("heatkv.cli") and module not in ENTRANCES
    ]
    naming = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in below
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if OF_COMMAND_LINE.search(line)
    ]
    assert not naming


def test_an_upward_import_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "plan.py"
    path.write_text("def load():\n    from heatkv.cli import app\n    import heatkv.engine.layout\n    return app\n")
    assert {layer(name) > layer("heatkv.core.plan") for name in imports(path)} == {True}
