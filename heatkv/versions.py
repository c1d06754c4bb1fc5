"""What a result was made with."""

from __future__ import annotations

import platform
from importlib import metadata


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that can change a number."""
    names = ("heatkv", "torch", "numpy", "scipy")
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in names}}
