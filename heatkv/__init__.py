"""HeatKV: KV-cache compression for visual autoregressive image models, by scale and by head."""

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType


class _CheckoutFinder:
    """Finds `heatkv.policies` and `heatkv.profiling` in a checkout, where they lie beside this folder, not in it.

    The import hook of an editable installation does so too, but there may be none (a wheel is installed, or nothing),
    or it may belong to another checkout. Being asked first keeps all parts of the package from one place.
    """

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name in ("heatkv.policies", "heatkv.profiling"):
            return PathFinder.find_spec(name, [str(Path(__file__).parents[1])], target)
        return None


if not Path(__file__).with_name("policies").is_dir():
    sys.meta_path.insert(0, _CheckoutFinder)
