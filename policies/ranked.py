"""Plans for several devices that share the heads of a model (tensor parallel), by any policy.

The problem separates over ranks: each plans its own heads under floor(b*N*L*H / R) of the budget, as if they were a
model, so that values, costs and bounds add up. What is left to choose is who gets which heads.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from heatkv.core.plan import CachePlan
from heatkv.core.schema import of_kind, seed_after, shown
from heatkv.errors import HeatKVError, PolicyError
from heatkv.head_assignment import balanced_heads, check_ranks, contiguous_heads, part_needed
from heatkv.policies.base import EvictionPolicy, PlanningProblem
from heatkv.policies.dynamic import DynamicPolicy
from heatkv.ranked_plan import RankedPlan

IntArray = NDArray[np.int64]

SPLITS = ("balanced", "contiguous")


def plan_ranks(
    policy: EvictionPolicy,
    problem: PlanningProblem,
    ranks: int,
    split: Literal["balanced", "contiguous"] = "balanced",
) -> RankedPlan:
    """One plan for each of `ranks` devices, each with equally many heads of every layer.

    `split` is "contiguous", each rank's heads in a row as Megatron-LM splits weights, or "balanced": heads of equal
    appetite are spread by what they hold in the policy's plan for one device. That is never worth less than contiguous,
    which is planned too, by the policy's value, or for policies without one never needs more room in one rank. Raises
    PlanError when so many ranks do not divide the heads, PolicyError for an unknown split, for budget auto and for
    options that cannot be split, and what the policy raises.
    """
    of_kind(policy, EvictionPolicy, "policy", PolicyError, "make one with make_policy")
    of_kind(problem, PlanningProblem, "problem", PolicyError, "give a PlanningProblem")
    geometry = problem.geometry
    ranks = check_ranks(geometry.heads, ranks)
    if split not in SPLITS:
        raise PolicyError(f"split={shown(split)} is unknown; known: {', '.join(SPLITS)}")
    if problem.budget.kind == "auto":
        raise PolicyError(
            "budget auto is chosen for the whole cache: solve without ranks first, then give the share that it found"
        )
    contiguous = contiguous_heads(geometry.layers, geometry.heads, ranks)
    policy.of_heads(contiguous[0], geometry.heads)  # refuses what cannot be split before anything is solved
    unsplit = policy.plan(problem)
    if isinstance(policy, DynamicPolicy):  # what it takes from all heads, such as kinds of layers, is the same for all
        policy = policy.resolved(policy.checked(problem))
    splits = [contiguous]
    if split == "balanced" and ranks > 1:
        balanced = balanced_heads(unsplit.held, ranks)
        if getattr(unsplit, "value", None) is not None:
            splits.append(balanced)
        elif part_needed(unsplit.held, balanced) < part_needed(unsplit.held, contiguous):
            splits.insert(0, balanced)
    return _best(policy, problem, unsplit, splits)


def _best(policy: EvictionPolicy, problem: PlanningProblem, unsplit: CachePlan, splits: list[IntArray]) -> RankedPlan:
    """The plans under the split that is worth most; without values, under the first that can be planned for."""
    found: RankedPlan | None = None
    error: HeatKVError | None = None
    for heads_RLH in splits:
        try:
            made = _planned(policy, problem, unsplit, heads_RLH)
        except HeatKVError as raised:  # one rank's heads may not fit its part where another split's do
            error = error or raised
            continue
        if made.value is None:
            return made
        if found is None or found.value is None or made.value > found.value:
            found = made
    if found is None:
        assert error is not None
        raise error
    return found


def _planned(policy: EvictionPolicy, problem: PlanningProblem, unsplit: CachePlan, heads_RLH: IntArray) -> RankedPlan:
    """The plans of all ranks under this split."""
    ranks, plans = len(heads_RLH), []
    for rank, heads_LH in enumerate(heads_RLH):
        of_rank = policy.of_heads(heads_LH, problem.geometry.heads)
        # a seed of its own for every rank; for one rank that of the problem
        seed = seed_after(problem.seed * ranks, rank)
        try:
            plans.append(of_rank.plan(problem.of_heads(heads_LH, seed)))
        except HeatKVError as error:
            raise type(error)(f"rank {rank} of {ranks}: {error}") from error
    checked = policy.checked(problem)
    return RankedPlan(
        heads_RLH,
        tuple(plans),
        checked.budget_token_heads,
        getattr(unsplit, "value", None),
        getattr(unsplit, "value_bound", None),
    )
