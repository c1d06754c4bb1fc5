"""What `import heatkv` offers, and the code people copy from README."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import heatkv

ROOT = Path(__file__).parents[1]


def test_importing_heatkv_does_not_wait_for_torch() -> None:
    code = "import heatkv, sys; print('torch' in sys.modules, 'numpy' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["False", "False"]


def test_every_public_name_is_there() -> None:
    for name, module in heatkv._EXPORTS.items():
        assert getattr(heatkv, name) is getattr(sys.modules[module], name)
        assert name in dir(heatkv)
    assert heatkv.__all__ == sorted(heatkv._EXPORTS)
    assert [name for name in dir(heatkv) if not name.startswith("__")] == heatkv.__all__
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = heatkv.nonsense


def test_every_public_name_says_what_it_is() -> None:
    for name in heatkv.__all__:
        found = getattr(heatkv, name)
        assert found.__doc__, name
        if isinstance(found, type):
            members = {key: value for key, value in vars(found).items() if not key.startswith("_")}
            calls = {key: value for key, value in members.items() if callable(value) or isinstance(value, classmethod)}
            assert [key for key, value in calls.items() if not inspect.getdoc(value)] == [], name


def test_the_version_is_that_of_the_distribution() -> None:
    assert heatkv.__version__ == metadata.version("heatkv")


def test_the_five_lines_of_the_readme_run() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    shorter = code.replace("samples=64", "samples=2")
    assert shorter != code
    names: dict[str, object] = {}
    exec(shorter, names)
    images = names["images"]
    assert tuple(images.shape) == (2, 3, 48, 48)  # type: ignore[attr-defined]
