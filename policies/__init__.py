"""Eviction policies: pure decisions, one small dataclass each. What the author of one needs can be imported from here.

Loaded when first used, as everything about dynamic policies needs torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

_EXPORTS = {
    "Candidates": "heatkv.policies.dynamic",
    "DynamicPolicy": "heatkv.policies.dynamic",
    "EvictionPolicy": "heatkv.policies.base",
    "PlanningProblem": "heatkv.policies.base",
    "PolicyError": "heatkv.errors",
    "ScoredCells": "heatkv.policies.base",
    "StaticPolicy": "heatkv.policies.base",
    "make_policy": "heatkv.policies.base",
    "register": "heatkv.registry",
}

__all__ = [
    "Candidates", "DynamicPolicy", "EvictionPolicy", "PlanningProblem", "PolicyError", "ScoredCells", "StaticPolicy",
    "make_policy", "register",
]  # fmt: skip

if TYPE_CHECKING:
    from heatkv.errors import PolicyError
    from heatkv.policies.base import EvictionPolicy, PlanningProblem, ScoredCells, StaticPolicy, make_policy
    from heatkv.policies.dynamic import Candidates, DynamicPolicy
    from heatkv.registry import register


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'heatkv.policies' has no attribute {name!r}")
