"""docs/tutorial.md runs as it stands, from an empty folder, in order."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from heatkv.cli import run

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_tutorial_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    text = (ROOT / "docs" / "tutorial.md").read_text()
    blocks = re.findall(r"^```sh\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    lines = [line for block in blocks for line in block.splitlines() if line.startswith("heatkv ")]
    assert len(lines) == 9
    (tmp_path / "tests").symlink_to(ROOT / "tests")  # the clone that its reader is in
    monkeypatch.chdir(tmp_path)
    for line in lines:
        assert run(shlex.split(line)[1:]) == 0, capsys.readouterr().err
    assert (tmp_path / "results" / "first" / "report.html").exists()
    assert len(list((tmp_path / "pictures").glob("*.png"))) == 2
    rows = json.loads((tmp_path / "results" / "first" / "results.json").read_text())["rows"]
    assert len(rows) == 7
    plan = json.loads((tmp_path / "infinity.json").read_text())
    assert plan["peak_token_heads"] <= plan["budget_token_heads"]
