"""HeatKV: KV-cache compression for visual autoregressive image models, by scale and by head."""

import importlib
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any


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


__version__ = "0.1.0"

if not Path(__file__).with_name("policies").is_dir():
    sys.meta_path.insert(0, _CheckoutFinder)

# Loaded when first used, so that `import heatkv` does not wait for torch.
_EXPORTS = {
    "Budget": "heatkv.core.budget",
    "CacheGeometry": "heatkv.core.geometry",
    "Candidates": "heatkv.policies.dynamic",
    "CapacityPlan": "heatkv.core.capacity_plan",
    "DynamicPolicy": "heatkv.policies.dynamic",
    "EvictionPolicy": "heatkv.policies.base",
    "Generator": "heatkv.generation.loop",
    "HeatKVError": "heatkv.errors",
    "KVCache": "heatkv.engine.arena_cache",
    "Plan": "heatkv.core.plan",
    "PlanningProblem": "heatkv.policies.base",
    "PolicyError": "heatkv.errors",
    "ScaleSchedule": "heatkv.core.schedule",
    "ScoredCells": "heatkv.policies.base",
    "StaticPolicy": "heatkv.policies.base",
    "Statistics": "heatkv.core.statistics",
    "attach": "heatkv.attachment.api",
    "calibrate": "heatkv.calibration.run",
    "check_policy": "heatkv.testing.contract",
    "compare": "heatkv.profiling.comparison",
    "decode_in_slices": "heatkv.generation.micro_batches",
    "generate": "heatkv.generation.batches",
    "load_model": "heatkv.models.catalogue",
    "load_plan": "heatkv.core.plan_file",
    "make_policy": "heatkv.policies.base",
    "measure": "heatkv.attachment.api",
    "profile": "heatkv.profiling.comparison",
    "register": "heatkv.registry",
}

__all__ = [
    "Budget", "CacheGeometry", "Candidates", "CapacityPlan", "DynamicPolicy", "EvictionPolicy", "Generator",
    "HeatKVError", "KVCache", "Plan", "PlanningProblem", "PolicyError", "ScaleSchedule", "ScoredCells",
    "StaticPolicy", "Statistics", "attach", "calibrate", "check_policy", "compare", "decode_in_slices", "generate",
    "load_model", "load_plan", "make_policy", "measure", "profile", "register",
]  # fmt: skip

if TYPE_CHECKING:
    from heatkv.attachment.api import attach, measure
    from heatkv.calibration.run import calibrate
    from heatkv.core.budget import Budget
    from heatkv.core.capacity_plan import CapacityPlan
    from heatkv.core.geometry import CacheGeometry
    from heatkv.core.plan import Plan
    from heatkv.core.plan_file import load_plan
    from heatkv.core.schedule import ScaleSchedule
    from heatkv.core.statistics import Statistics
    from heatkv.engine.arena_cache import KVCache
    from heatkv.errors import HeatKVError, PolicyError
    from heatkv.generation.batches import generate
    from heatkv.generation.loop import Generator
    from heatkv.generation.micro_batches import decode_in_slices
    from heatkv.models.catalogue import load_model
    from heatkv.policies.base import EvictionPolicy, PlanningProblem, ScoredCells, StaticPolicy, make_policy
    from heatkv.policies.dynamic import Candidates, DynamicPolicy
    from heatkv.profiling.comparison import compare, profile
    from heatkv.registry import register
    from heatkv.testing.contract import check_policy


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'heatkv' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *(name for name in globals() if name.startswith("__"))])
