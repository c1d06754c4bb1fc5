"""A third-party policy, installed as its users would install it, is found, listed and planned with."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the example package installed in it."""
    folder = tmp_path_factory.mktemp("plugin")
    source = shutil.copytree(ROOT / "examples" / "keep_coarse", folder / "source")
    site = folder / "site"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*install, "--target", str(site), str(source)], check=True, stdin=subprocess.DEVNULL)
    return site


def heatkv(site: Path | None, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | ({} if site is None else {"PYTHONPATH": str(site)})
    return subprocess.run(
        [sys.executable, "-m", "heatkv", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )


def test_an_installed_policy_is_listed_with_its_package(site: Path) -> None:
    listed = {row["policy"]: row for row in json.loads(heatkv(site, "policies", "--json").stdout)}
    assert listed["keep-coarse"]["from"] == "heatkv-keep-coarse"
    assert listed["keep-coarse"]["summary"].startswith("Keeps the coarsest scales")
    without = {row["policy"] for row in json.loads(heatkv(None, "policies", "--json").stdout)}
    assert without == set(listed) - {"keep-coarse"}


def test_an_installed_policy_plans(site: Path, tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    ran = heatkv(site, "solve", "--model", "var-d16", "--policy", "keep-coarse", "--budget", "20%", "--out", str(out))
    assert ran.returncode == 0, ran.stderr
    plan = json.loads(out.read_text())
    # 1 + 4 + 9 + 16 + 25 = 55 tokens are at most 20 % of 424, the next scale's 36 are not
    assert plan["peak_token_heads"] == 55 * 16 * 16


def test_a_broken_plugin_is_named_and_the_others_still_work(site: Path, tmp_path: Path) -> None:
    shutil.copytree(site, tmp_path / "site")
    (tmp_path / "site" / "heatkv_keep_coarse.py").write_text("raise RuntimeError('out of order')\n")
    ran = heatkv(tmp_path / "site", "policies", "--json")
    assert ran.returncode == 0
    assert "heatkv" in {row["policy"] for row in json.loads(ran.stdout)}
    assert "'keep-coarse' could not be loaded: heatkv-keep-coarse: RuntimeError: out of order" in ran.stderr
