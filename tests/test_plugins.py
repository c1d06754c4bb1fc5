"""`heatkv new-policy` and what it writes: installed as its users would, the policies are found, listed and tested."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from heatkv.cli import run
from heatkv.cli.new_policy import skeleton

ROOT = Path(__file__).parents[1]
# .pth files, by which editable installations are found, are read in folders of packages only.
WITH_SITE = (
    "import runpy, site, sys; site.addsitedir(sys.argv.pop(1)); sys.argv.pop(0); "
    "runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)"
)

pytestmark = pytest.mark.xdist_group("plugins")


def python(site: Path, module: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a module where this folder of installed packages is seen."""
    return subprocess.run(
        [sys.executable, "-c", WITH_SITE, str(site), module, *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a static policy's package, a dynamic one's, and both installed in `site`."""
    folder = tmp_path_factory.mktemp("plugins")
    for name, options in (("keep-coarse", []), ("keep-read", ["--dynamic"])):
        written = python(folder, "heatkv", "new-policy", name, *options, "--out", folder / name)
        assert written.returncode == 0, written.stderr
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    to = ["--target", str(folder / "site")]
    subprocess.run([*install, *to, str(folder / "keep-coarse")], check=True, stdin=subprocess.DEVNULL)
    subprocess.run([*install, *to, "-e", str(folder / "keep-read")], check=True, stdin=subprocess.DEVNULL)
    return folder


def test_list_with_packages(folder: Path) -> None:
    listed = {row["policy"]: row for row in json.loads(python(folder / "site", "heatkv", "policies", "--json").stdout)}
    facts = {name: tuple(listed[name][what] for what in ("kind", "needs", "from")) for name in listed}
    assert facts["keep-coarse"] == ("static", "nothing", "heatkv-keep-coarse")
    assert facts["keep-read"] == ("dynamic", "nothing", "heatkv-keep-read")
    assert facts["heatkv"] == ("static", "statistics or rankings", "heatkv.policies.heatkv")
    assert listed["keep-coarse"]["summary"].startswith("Keeps the coarsest scales")
    without = {row["policy"] for row in json.loads(python(folder, "heatkv", "policies", "--json").stdout)}
    assert without == set(listed) - {"keep-coarse", "keep-read"}


@pytest.mark.parametrize("name", ["keep-coarse", "keep-read"])
def test_tests_of_written_packages(folder: Path, name: str) -> None:
    ran = python(folder / "site", "pytest", "-q", "-p", "no:cacheprovider", folder / name)
    assert ran.returncode == 0, ran.stdout
    assert "10 passed" in ran.stdout


def test_plans_of_installed_policies(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    base = ["solve", "--model", "var-d16", "--policy"]
    ran = python(folder / "site", "heatkv", *base, "keep-coarse", "--budget", "20%", "--out", out)
    assert ran.returncode == 0, ran.stderr
    plan = json.loads(out.read_text())
    last = {scale: {cells[scale] for heads in plan["last_read"] for cells in heads} for scale in range(10)}
    # 1 + 4 + 9 + 16 + 25 = 55 tokens are at most 20 % of 424; the next scale's 36 have room in some heads
    assert all(last[scale] == {9} for scale in range(5))
    assert {5, 9} <= last[5]
    assert plan["budget_token_heads"] - 36 < plan["peak_token_heads"] <= plan["budget_token_heads"]
    ran = python(folder / "site", "heatkv", *base, "keep-read", "--set", "first=-1", "--budget", "20%")
    assert ran.returncode == 2
    assert "first of policy 'keep-read' is a whole number at least 0, not '-1'" in ran.stderr


@pytest.mark.parametrize(
    ("module", "said"),
    [
        ("import absent_package\n", "ModuleNotFoundError: No module named 'absent_package'"),
        ("raise SystemExit(3)\n", "SystemExit: 3"),
        ("class KeepCoarse:\n    name = 'keep-coarse'\n", "PolicyError: KeepCoarse has no kind, needs, plan"),
        ("class Other:\n    pass\n", "AttributeError: module 'heatkv_keep_coarse' has no attribute 'KeepCoarse'"),
    ],
)
def test_broken_plugins(folder: Path, tmp_path: Path, module: str, said: str) -> None:
    site = tmp_path / "site"
    shutil.copytree(folder / "site", site)
    (site / "heatkv_keep_coarse.py").write_text(module)
    ran = python(site, "heatkv", "policies")
    assert ran.returncode == 0
    assert f"'keep-coarse' could not be loaded: heatkv-keep-coarse: {said}" in ran.stderr
    shown = " ".join(re.sub("[│┃]", " ", ran.stdout).split())
    assert f"could not be loaded: keep-coarse (heatkv-keep-coarse: {said}" in shown
    assert "heatkv-keep-read" in shown
    if "absent" in module:  # other commands tell it too, and work
        ran = python(site, "heatkv", "solve", "--policy", "keep-read", "--budget", "20%", "--json")
        assert ran.returncode == 0
        assert "'keep-coarse' could not be loaded" in ran.stderr


# ---------------------------------------------------------------------- what is written, and what is refused


def test_written_packages_are_python_in_style(tmp_path: Path) -> None:
    classes = {"keep-coarse": "KeepCoarse", "2-none": "Policy2None", "none": "PolicyNone", "scored-cells": None}
    for name, policy in classes.items():
        for dynamic in (False, True):
            for path, (text, _) in skeleton(name, dynamic).items():
                assert "$" not in text
                if policy is not None and path.startswith("src/"):
                    assert f"class {policy}(" in text
                file = tmp_path / f"{name}-{dynamic}" / path
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(text)
    for arguments in (["check", "--ignore", "D103,E741"], ["format", "--check"]):
        ruff = [sys.executable, "-m", "ruff", *arguments, "--no-cache", "--config", str(ROOT / "pyproject.toml")]
        ran = subprocess.run([*ruff, str(tmp_path)], capture_output=True, text=True, check=False)
        assert ran.returncode == 0, ran.stdout


@pytest.mark.parametrize("name", ["Mine", "a_b", "-a", "", "a/b"])
def test_bad_names(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["new-policy", "--out", str(tmp_path / "out"), "--", name]) == 2
    assert "a name is lower-case letters, digits and hyphens between them" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_taken_names_and_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["new-policy", "heatkv", "--out", str(tmp_path / "out")]) == 2
    assert "named 'heatkv' already, from heatkv.policies.heatkv; choose another name" in capsys.readouterr().err
    assert run(["new-policy", "mine", "--out", str(tmp_path)]) == 2
    assert f"{tmp_path} exists already; name a folder that does not" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_default_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["new-policy", "mine"]) == 0
    listed = {line.partition(":")[0] for line in capsys.readouterr().out.splitlines()}
    assert {str(path) for path in Path("heatkv-mine").rglob("*.*")} == listed
