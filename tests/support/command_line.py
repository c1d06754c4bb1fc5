"""Commands run in this process, and what they are refused with."""

from __future__ import annotations

import pytest

from heatkv.cli import run


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The line that a command is refused with: exit code 2, nothing on the output, one line on the error stream."""
    capsys.readouterr()
    assert run(arguments) == 2
    out, error = capsys.readouterr()
    assert out == ""
    (line,) = error.strip().splitlines()
    assert line.startswith("heatkv: ")
    return line
