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


def test_installed_policies_are_listed_with_their_packages(folder: Path) -> None:
    listed = {row["policy"]: row for row in json.loads(python(folder / "site", "heatkv", "policies", "--json").stdout)}
    told = {name: tuple(listed[name][what] for what in ("kind", "needs", "from")) for name in listed}
    assert told["keep-coarse"] == ("static", "nothing", "heatkv-keep-coarse")
    assert told["keep-read"] == ("dynamic", "nothing", "heatkv-keep-read")
    assert told["heatkv"] == ("static", "statistics or rankings", "heatkv.policies.heatkv")
    assert listed["keep-coarse"]["summary"].startswith("Keeps the coarsest scales")
    without = {row["policy"] for row in json.loads(python(folder, "heatkv", "policies", "--json").stdout)}
    assert without == set(listed) - {"keep-coarse", "keep-read"}


@pytest.mark.parametrize("name", ["keep-coarse", "keep-read"])
def test_its_own_test_passes(folder: Path, name: str) -> None:
    ran = python(folder / "site", "pytest", "-q", "-p", "no:cacheprovider", folder / name)
    assert ran.returncode == 0, ran.stdout
    assert "9 passed" in ran.stdout


def test_an_installed_policy_plans(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    base = ["solve", "--model", "var-d16", "--policy"]
    ran = python(folder / "site", "heatkv", *base, "keep-coarse", "--budget", "20%", "--out", out)
    assert ran.returncode == 0, ran.stderr
    # 1 + 4 + 9 + 16 + 25 = 55 tokens are at most 20 % of 424, the next scale's 36 are not
    assert json.loads(out.read_text())["peak_token_heads"] == 55 * 16 * 16
    ran = python(folder / "site", "heatkv", *base, "keep-read", "--set", "first=-1", "--budget", "20%")
    assert ran.returncode == 2
    assert "first=-1 cannot be below 0" in ran.stderr


@pytest.mark.parametrize(
    ("module", "said"),
    [
        ("import absent_package\n", "ModuleNotFoundError: No module named 'absent_package'"),
        ("raise RuntimeError('out of order')\n", "RuntimeError: out of order"),
        ("raise SystemExit(3)\n", "SystemExit: 3"),
        ("KeepCoarse = 3\n", "PolicyError: 3 is no class"),
        ("class KeepCoarse:\n    name = 'Keep Coarse'\n", "PolicyError: KeepCoarse is named 'Keep Coarse'; a name is"),
        ("class KeepCoarse:\n    name = 'keep-coarse'\n", "PolicyError: KeepCoarse has no kind, needs, plan"),
        ("class Other:\n    pass\n", "AttributeError: module 'heatkv_keep_coarse' has no attribute 'KeepCoarse'"),
    ],
)
def test_a_broken_plugin_is_named_and_the_others_still_work(
    folder: Path, tmp_path: Path, module: str, said: str
) -> None:
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


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(
    ("name", "policy"),
    [
        ("keep-coarse", "KeepCoarse"),
        ("2-none", "Policy2None"),
        ("none", "PolicyNone"),
        ("static-policy", None),
        ("dynamic-policy", None),
        ("tensor", None),
    ],
)
def test_what_is_written_is_python_in_style(name: str, policy: str | None, dynamic: bool, tmp_path: Path) -> None:
    files = skeleton(name, dynamic)
    (code,) = (text for path, (text, _) in files.items() if path.startswith("src/"))
    if policy is not None:
        assert f"class {policy}(" in code
    assert not any("$" in text for text, _ in files.values())
    for path, (text, _) in files.items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(text)
    for arguments in (["check", "--ignore", "D103"], ["format", "--check"]):
        ruff = [sys.executable, "-m", "ruff", *arguments, "--no-cache", "--config", str(ROOT / "pyproject.toml")]
        ran = subprocess.run([*ruff, str(tmp_path)], capture_output=True, text=True, check=False)
        assert ran.returncode == 0, ran.stdout


@pytest.mark.parametrize("name", ["Mine", "a_b", "a--b", "-a", "a-", "a b", "", "ä", "a/b", ".."])
def test_bad_names_are_refused(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["new-policy", "--out", str(tmp_path / "out"), "--", name]) == 2
    assert "a name is lower-case letters, digits and hyphens between them" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_names_and_folders_that_are_taken_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["new-policy", "heatkv", "--out", str(tmp_path / "out")]) == 2
    assert "named 'heatkv' already, from heatkv.policies.heatkv; choose another name" in capsys.readouterr().err
    assert run(["new-policy", "mine", "--out", str(tmp_path)]) == 2
    assert f"{tmp_path} exists already; name a folder that does not" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_folder_is_named_after_the_policy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["new-policy", "mine", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["folder"] == "heatkv-mine"
    assert {str(path.relative_to("heatkv-mine")) for path in Path("heatkv-mine").rglob("*.*")} == set(told["files"])
