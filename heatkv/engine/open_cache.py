"""Opening the cache that a plan describes, static or dynamic: the one place that tells the kinds of plans apart."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from fractions import Fraction

import torch
from torch import Tensor

from heatkv.core.budget import Budget
from heatkv.core.capacity_plan import CapacityPlan
from heatkv.core.plan import CachePlan, Plan
from heatkv.core.storage_type import StorageType, torch_dtype
from heatkv.engine.arena_cache import KVCache
from heatkv.engine.attention.kernels import check_kernel
from heatkv.engine.store import check_code
from heatkv.engine.token_cache import SelectingCache
from heatkv.errors import PlanError, PolicyError
from heatkv.policies.base import PlanningProblem, make_policy
from heatkv.policies.dynamic import DynamicPolicy
from heatkv.registry import find_policy


def open_cache(
    plan: CachePlan,
    rows: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    key_angles: Sequence[Tensor] | None = None,
    query_weight: Callable[[int], Tensor] | None = None,
    code: str | None = None,
    attention: str = "auto",
    rows_at_once: Sequence[int] | None = None,
) -> KVCache | SelectingCache:
    """The cache of a plan: see KVCache for the arguments, SelectingCache for `query_weight`.

    Raises PolicyError when the policy of a dynamic plan is not known here, and PlanError for a code or an attention
    kernel that cannot be, or a plan that takes more bytes with these rows and this type than its budget.
    """
    check_cache(plan, dtype, device, code, attention)
    plan.check_bytes(rows, str(StorageType.for_dtype(dtype, code)))
    if isinstance(plan, CapacityPlan):
        return SelectingCache(plan, policy_of(plan), rows, dtype, device, query_weight, code, rows_at_once)
    assert isinstance(plan, Plan)
    return KVCache(plan, rows, dtype, device, key_angles, code, attention, rows_at_once)


def check_cache(
    plan: CachePlan, dtype: torch.dtype, device: torch.device | str, code: str | None, attention: str
) -> None:
    """Raise PlanError for a code or a kernel that a cache of this plan cannot have here.

    Dynamic policies look at every candidate, which are gathered for them, so that their attention is the plain one.
    """
    check_code(code, torch.device(device))
    if attention == "triton" and isinstance(plan, CapacityPlan):
        raise PlanError("attention kernel triton is not for dynamic policies, whose tokens are gathered; use ragged")
    check_kernel(
        attention, torch.device(device), dtype, plan.geometry.head_dim, None if code is None else torch_dtype(code)
    )


def policy_of(plan: CapacityPlan) -> DynamicPolicy:
    """The policy that a dynamic plan was made by, with its settings. Raises PolicyError, and PlanError for settings or
    numbers that are not that policy's."""
    names = {field.name for field in dataclasses.fields(find_policy(plan.policy)) if field.init}
    settings = plan.settings.keys() - {"budget", "seed"}
    if settings != names:
        raise PlanError(
            f"the plan's settings are {', '.join(sorted(settings)) or 'none'}; those of policy {plan.policy!r} are "
            f"{', '.join(sorted(names)) or 'none'}: solve a plan with it"
        )
    policy = make_policy(plan.policy, **{name: plan.settings[name] for name in names})
    if not isinstance(policy, DynamicPolicy):
        raise PolicyError(f"the plan has capacities, but policy {plan.policy!r} is no dynamic one")
    if not plan.had_no_effect() and (plan.shared, plan.carried) != (policy.shared, policy.carried):
        raise PlanError(
            f"the plan was not made by policy {policy.name!r}: it has shared={plan.shared} and carried={plan.carried}, "
            f"the policy {policy.shared} and {policy.carried}; solve one with it"
        )
    share = Fraction(max(plan.budget_token_heads, 1), plan.geometry.full_token_heads)
    policy.check(PlanningProblem(plan.geometry, Budget("share", share)))
    return policy
