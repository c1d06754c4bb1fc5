"""Eviction policies: pure decisions, one small dataclass each; with the names that the author of one needs."""

from heatkv.errors import PolicyError
from heatkv.policies.base import EvictionPolicy, PlanningProblem, ScoredCells, StaticPolicy, make_policy
from heatkv.policies.dynamic import Candidates, DynamicPolicy
from heatkv.registry import register

__all__ = [
    "Candidates", "DynamicPolicy", "EvictionPolicy", "PlanningProblem", "PolicyError", "ScoredCells", "StaticPolicy",
    "make_policy", "register",
]  # fmt: skip
