"""docs/new-policy.md runs as it stands: Python blocks in one module, `heatkv` commands in between, in order."""

from __future__ import annotations

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


@pytest.mark.slow
def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    text = PAGE.read_text()
    assert len(text.splitlines()) < 150
    blocks = re.findall(r"^```(\w+)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    assert [kind for kind, _ in blocks] == ["sh", "python", "python", "python", "sh", "sh"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(registry, "_registered", registry.registered_policies())
    module = types.ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", module)
    for kind, block in blocks:
        if kind == "python":
            exec(block, vars(module))
            continue
        for line in block.splitlines():
            program, *arguments = shlex.split(line)
            assert program == "heatkv"
            assert run(arguments) == 0, capsys.readouterr().err
    assert (tmp_path / "heatkv-best-cells" / "pyproject.toml").exists()
    rows = json.loads((tmp_path / "results" / "mine" / "results.json").read_text())["rows"]
    assert [row["policy"] for row in rows] == ["full", "best-cells", "fading", "heatkv"]
