"""The examples run as they stand, with fewer images, and do what they say."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from heatkv.core.plan import Plan
from heatkv.core.plan_file import load_plan
from heatkv.models.catalogue import model_info

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def run(name: str, *arguments: str, cwd: Path) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "examples" / name), *arguments]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_drawing_under_a_budget(tmp_path: Path) -> None:
    told = run("draw_under_a_budget.py", "--samples", "2", "--budget", "30%", cwd=tmp_path)
    full, planned = (float(found) for found in re.findall(r"([\d.]+) MiB", told))
    assert planned <= 0.3 * full
    with Image.open(tmp_path / "pictures.png") as sheet:
        assert sheet.width > sheet.height > 2 * 3 * 48 - 1


def test_comparing_a_policy(tmp_path: Path) -> None:
    printed = run("compare_my_policy.py", "--images", "2", "--out", "out", cwd=tmp_path)
    kl = {name: float(value) for name, value in re.findall(r"([\w-]+): [\d,]+ bytes of cache, KL ([\d.]+)", printed)}
    assert list(kl) == ["full", "mass-per-token", "heatkv", "streaming"]
    assert kl["full"] == 0 < min(kl["mass-per-token"], kl["heatkv"], kl["streaming"])
    assert (tmp_path / "out" / "report.html").exists()


def test_planning_for_a_memory(tmp_path: Path) -> None:
    told = run("plan_for_a_memory.py", cwd=tmp_path)
    plan = load_plan(tmp_path / "plan.json")
    assert isinstance(plan, Plan)
    plan.check_geometry(model_info("infinity-2b").geometry("1M"))
    gib = [float(found) for found in re.findall(r"([\d.]+) GiB", told)]
    without, cache = gib[0], gib[-1]
    assert 6.9 < without + cache <= 7.01  # printed with two and three decimals


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_every_example_is_tested_and_explains_itself(path: Path, tmp_path: Path) -> None:
    assert f'"{path.name}"' in Path(__file__).read_text()
    assert "python examples/" in run(path.name, "--help", cwd=tmp_path)
