"""What a result was made with."""

from __future__ import annotations

import platform
from importlib import metadata

from heatkv import __version__


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that can change a number."""
    others = {name: metadata.version(name) for name in ("torch", "numpy", "scipy")}
    return {"python": platform.python_version(), "heatkv": __version__, **others}
