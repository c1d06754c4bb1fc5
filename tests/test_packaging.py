"""The package as users get it: sdist, wheel, editable installation, bare checkout, and what they declare."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).resolve().parents[1]
# Folder in the checkout -> folder once installed.
FOLDERS = {"heatkv": "heatkv", "policies": "heatkv/policies", "profiling": "heatkv/profiling"}
# What `package-data` must carry although no such file may lie in the checkout yet.
PROBES = ("probe.safetensors", "probe.md", "probe.png")

# Where the packages come from, and what the bare names of the two outer folders would be.
REPORT = """
import json, sys
from importlib.util import find_spec
sys.path += {site!r}
import heatkv, heatkv.policies, heatkv.profiling
packages = [heatkv.__file__, heatkv.policies.__file__, heatkv.profiling.__file__]
bare = [spec.origin or "" for spec in map(find_spec, ("policies", "profiling")) if spec]
print(json.dumps(dict(packages=packages, bare=bare)))
"""

# One worker of a parallel run builds the package, not each.
pytestmark = pytest.mark.xdist_group("packaging")


def run(*command: str | Path, cwd: Path, **variables: str | Path) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {name: str(value) for name, value in variables.items()}
    done = subprocess.run([*map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def origins(cwd: Path, *, hooks: bool, **variables: str | Path) -> tuple[list[Path], list[Path]]:
    """The files of the three packages and of the bare names. Without `hooks` no .pth file is read, so no editable
    installation is seen, while its dependencies still are."""
    site = [] if hooks else sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})
    script = REPORT.format(site=site)
    report = json.loads(run(sys.executable, *([] if hooks else ["-S"]), "-c", script, cwd=cwd, **variables))
    return [Path(name).resolve() for name in report["packages"]], [Path(name).resolve() for name in report["bare"]]


def in_checkout(root: Path) -> list[Path]:
    return [root / folder / "__init__.py" for folder in FOLDERS]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy to build in, so that nothing left over in the real one can get into the package."""
    copy = (tmp_path_factory.mktemp("checkout") / "heatkv-source").resolve()
    ignore = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist")
    shutil.copytree(
        ROOT, copy, ignore=lambda folder, names: ignore(folder, names) | ({"results"} if folder == str(ROOT) else set())
    )
    for name in PROBES:
        (copy / "heatkv/models/emoji" / name).write_bytes(b"")
    return copy


@pytest.fixture(scope="module")
def wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel built from the sdist built from the checkout."""
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, checkout, cwd=out)
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("installed").resolve()
    run(sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", target, wheel, cwd=target)
    return target


def test_wheel_holds_every_source_and_data_file(checkout: Path, wheel: Path) -> None:
    expected = {
        f"{package}/{path.relative_to(checkout / folder).as_posix()}"
        for folder, package in FOLDERS.items()
        for path in (checkout / folder).rglob("*")
        if path.is_file()
    }
    assert expected >= {"heatkv/policies/__init__.py", "heatkv/profiling/__init__.py", "heatkv/models/var.py"}
    assert expected >= {
        "heatkv/py.typed",
        "heatkv/core/infinity_schedules.json",
        "heatkv/models/emoji/probe.safetensors",
    }
    names = set(zipfile.ZipFile(wheel).namelist())
    info = "heatkv-0.1.0.dist-info"
    assert {name for name in names if not name.startswith(f"{info}/")} == expected
    assert names >= {f"{info}/licenses/LICENSE", f"{info}/licenses/NOTICE"}


def test_wheel_imports_from_where_it_was_installed(installed: Path, tmp_path: Path) -> None:
    packages, bare = origins(tmp_path, hooks=False, PYTHONPATH=installed)
    assert packages == [installed / package / "__init__.py" for package in FOLDERS.values()]
    assert not [path for path in bare if path.is_relative_to(installed) or path.is_relative_to(ROOT)]


@pytest.mark.slow
def test_wheel_tests_itself(installed: Path, tmp_path: Path) -> None:
    script = "import sys, heatkv; print(heatkv.__file__); from heatkv.__main__ import main; main()"
    told = run(sys.executable, "-c", script, "doctor", "--self-test", cwd=tmp_path, PYTHONPATH=installed)
    assert Path(told.partition("\n")[0]) == installed / "heatkv/__init__.py"
    assert told.count("passed") == 3
    assert not list(tmp_path.iterdir())


def test_wheel_declares_what_it_is(installed: Path) -> None:
    (distribution,) = metadata.distributions(name="heatkv", path=[str(installed)])
    assert distribution.version == "0.1.0"
    assert distribution.metadata["License-Expression"] == "Apache-2.0"
    pythons = SpecifierSet(distribution.metadata["Requires-Python"])
    assert list(pythons.filter(f"3.{minor}.0" for minor in range(8, 17))) == ["3.11.0", "3.12.0", "3.13.0"]
    (script,) = distribution.entry_points.select(group="console_scripts")
    assert (script.name, script.value) == ("heatkv", "heatkv.__main__:main")
    extras = set(distribution.metadata.get_all("Provides-Extra", []))
    assert extras == {"dev", "docs", "infinity", "metrics", "nvml", "traces", "triton"}


def test_editable_installation_imports_from_anywhere(tmp_path: Path) -> None:
    # Asked of site-packages alone: the checkout's own egg-info says nothing about how it was installed.
    found = list(metadata.distributions(name="heatkv", path=[sysconfig.get_path("purelib")]))
    url = found[0].read_text("direct_url.json") if found else None
    if not (url and json.loads(url).get("dir_info", {}).get("editable")):
        pytest.skip("heatkv is not installed in editable mode here")
    packages, bare = origins(tmp_path, hooks=True)
    assert packages == in_checkout(ROOT)
    assert not [path for path in bare if path.is_relative_to(ROOT)]


@pytest.mark.parametrize("hooks", [False, True], ids=["not-installed", "another-one-installed"])
def test_checkout_imports_from_its_own_root(checkout: Path, hooks: bool) -> None:
    packages, _ = origins(checkout, hooks=hooks)
    assert packages == in_checkout(checkout)


def test_checkout_runs_as_a_module_from_its_root() -> None:
    assert "compare" in run(sys.executable, "-m", "heatkv", "--help", cwd=ROOT)


def test_constraints_pin_every_direct_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = [
        *project["dependencies"],
        *(line for extra in project["optional-dependencies"].values() for line in extra),
    ]
    requirements = [need for need in map(Requirement, declared) if need.name != project["name"]]
    lines = (line.partition("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines())
    pins = {pin.name: str(pin.specifier).removeprefix("==") for pin in (Requirement(line) for line in lines if line)}
    assert {need.name for need in requirements} == set(pins)
    assert not [str(need) for need in requirements if not need.specifier.contains(pins[need.name])]
