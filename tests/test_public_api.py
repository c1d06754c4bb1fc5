"""What `import heatkv` offers, and the code people copy from README."""

from __future__ import annotations

import re
import subprocess
import sys
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
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = heatkv.nonsense


def test_the_five_lines_of_the_readme_run() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    shorter = code.replace("samples=64", "samples=2")
    assert shorter != code
    names: dict[str, object] = {}
    exec(shorter, names)
    images = names["images"]
    assert tuple(images.shape) == (2, 3, 48, 48)  # type: ignore[attr-defined]
