"""docs/new-policy.md runs as it stands: Python blocks in one module, `heatkv` commands in between, in order."""

from __future__ import annotations

import ast
import json
import re
import shlex
import sys
import types
from pathlib import Path

import pytest

from heatkv import registry
from heatkv.cli import run

PAGE = Path(__file__).parents[1] / "docs" / "new-policy.md"
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE)


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """The module that the page's Python blocks run in."""
    monkeypatch.setattr(registry, "_registered", registry.registered_policies())
    module = types.ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", module)
    return module


def test_python_of_the_page(page: types.ModuleType) -> None:
    for kind, block in BLOCKS:
        if kind == "python":
            exec(block, vars(page))  # the last one checks the contract of both policies
    static = next(ast.parse(block).body[-1] for kind, block in BLOCKS if "ScoredCells" in block)
    assert isinstance(static, ast.ClassDef)
    assert static.end_lineno is not None
    assert static.end_lineno - static.lineno < 15


@pytest.mark.slow
def test_the_page_runs(
    page: types.ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for kind, block in BLOCKS:
        if kind == "python":
            exec(block, vars(page))
            continue
        for line in block.splitlines():
            program, *arguments = shlex.split(line)
            assert program == "heatkv"
            assert run(arguments) == 0, capsys.readouterr().err
    assert (tmp_path / "heatkv-best-cells" / "pyproject.toml").exists()
    rows = json.loads((tmp_path / "results" / "mine" / "results.json").read_text())["rows"]
    assert [row["policy"] for row in rows] == ["full", "best-cells", "fading", "heatkv"]
