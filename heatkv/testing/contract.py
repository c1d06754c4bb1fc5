"""The contract that every eviction policy keeps, for the tests of whoever writes one; any test runner will do.

    from heatkv import check_policy

    def test_my_policy_keeps_the_contract():
        check_policy("my-policy", window=16)

The models, statistics and attention inputs are small and made up from a seed (`heatkv.testing.material`). A broken
promise is an AssertionError that names the policy, the check, what is wrong and where it was seen. `contract_checks`
gives the checks one by one.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from heatkv.core.budget import Budget
from heatkv.core.capacity_plan import CapacityPlan
from heatkv.core.geometry import CacheGeometry
from heatkv.core.levels import level_tokens
from heatkv.core.plan import CachePlan, Plan
from heatkv.core.plan_file import load_plan
from heatkv.core.storage_type import STORAGE_BYTES, StorageType
from heatkv.engine.arena_cache import KVCache
from heatkv.engine.open_cache import policy_of
from heatkv.engine.token_cache import SelectingCache
from heatkv.errors import BudgetError, PolicyError, StatisticsError
from heatkv.policies.base import NEEDS, EvictionPolicy, PlanningProblem, StaticPolicy, make_policy
from heatkv.policies.composition import Protected, Wrapper
from heatkv.policies.dynamic import Candidates, DynamicPolicy
from heatkv.policies.windows import Full
from heatkv.registry import check_name, registered_policies
from heatkv.testing.material import AttentionInput, made_up_inputs, made_up_problem, small_geometries

SHARES = tuple(Fraction(percent, 100) for percent in (2, 5, 10, 15, 20, 33, 50, 70, 90, 99))
"""Budgets below the full cache that policies are asked for."""

MEASURED = ("all_mass_sum", "error_sum", "levels", "concentration_sum", "similarity_sum")
"""Parts of statistics that a file may lack."""

Subject = str | EvictionPolicy | type[EvictionPolicy]
Body = Callable[[EvictionPolicy, CacheGeometry, int], None]


def _demand(holds: bool, otherwise: str) -> None:
    if not holds:
        raise AssertionError(otherwise)


@dataclass(frozen=True)
class ContractCheck:
    """One promise of the contract: called with a policy, it raises AssertionError where that is broken."""

    name: str
    promise: str
    body: Body

    def __call__(self, policy: Subject, *, geometries: Sequence[CacheGeometry] | None = None, seed: int = 0) -> None:
        subject = _instance(policy, {})
        for geometry in small_geometries(seed) if geometries is None else geometries:
            try:
                self.body(subject, geometry, seed)
            except Exception as error:  # whatever it is, the check failed and must be named
                what = str(error) if type(error) is AssertionError else f"{type(error).__name__}: {error}"
                name = getattr(subject, "name", type(subject).__name__)
                raise AssertionError(
                    f"policy {name!r} breaks the contract, {self.name} ({self.promise}): {what} "
                    f"[{geometry.layers} layers x {geometry.heads} heads, schedule {geometry.schedule}, seed {seed}]"
                ) from error


def contract_checks() -> Iterator[tuple[str, ContractCheck]]:
    """Every check by name, for instance to parametrise a test with."""
    yield from _checks.items()


def check_policy(
    policy: Subject, *, geometries: Sequence[CacheGeometry] | None = None, seed: int = 0, **options: Any
) -> None:
    """Check the whole contract of a policy, given by name, class or object, made with these options.

    Give `geometries` when its options fit some models only. Raises AssertionError at the first broken promise.
    """
    subject = _instance(policy, options)
    for check in _checks.values():
        check(subject, geometries=geometries, seed=seed)


def _instance(policy: Subject, options: dict[str, Any]) -> EvictionPolicy:
    if isinstance(policy, str):
        return make_policy(policy, **options)
    if isinstance(policy, type):
        return policy(**options)
    return dataclasses.replace(policy, **options) if options else policy


_checks: dict[str, ContractCheck] = {}


def _check(body: Body) -> ContractCheck:
    """Make the function a check of the contract, under its own name; its docstring is the promise."""
    name = body.__name__.removeprefix("check_").replace("_", "-")
    _checks[name] = ContractCheck(name, (body.__doc__ or "").rstrip("."), body)
    return _checks[name]


def _planned(policy: EvictionPolicy, problem: PlanningProblem) -> CachePlan | None:
    """The plan, or None where the budget is refused as it should be."""
    try:
        plan = policy.plan(problem)
    except BudgetError as error:
        _demand(bool(str(error).strip()), f"the budget {problem.budget} is refused without a word of why")
        return None
    _demand(isinstance(plan, CachePlan), f"plan() gave {type(plan).__name__}, no plan")
    return plan


def _some_plans(
    policy: EvictionPolicy, geometry: CacheGeometry, seed: int, **changes: Any
) -> Iterator[tuple[PlanningProblem, CachePlan]]:
    """Plans at a few budgets that are not refused: up to 70 %, or the first above."""
    found = 0
    for percent in (15, 33, 70, 99, 100):
        if found and percent > 70:
            return
        problem = made_up_problem(policy, geometry, Fraction(percent, 100), seed, **changes)
        plan = _planned(policy, problem)
        if plan is not None:
            found += 1
            yield problem, plan


def _held(plan: CachePlan, layer: int, target: int) -> int:
    """Token-heads that a layer holds for a target, counted anew, cell by cell."""
    geometry = plan.geometry
    if target == len(geometry.schedule):
        return 0
    if isinstance(plan, CapacityPlan):
        return int(plan.capacity[layer, :, target].sum())
    assert isinstance(plan, Plan)
    total = 0
    for head, source in np.ndindex(geometry.heads, target):
        read = [level for level, last_read in plan.levels if last_read[layer, head, source] >= target]
        total += level_tokens(geometry.schedule, read[0])[source] if read else 0
    return total


class _WatchedCache(SelectingCache):
    """Sees to it that a policy changes nothing of what it is shown, and scores in floating point."""

    def _guarded(self, name: str, method: Callable[[Candidates], Tensor], seen: Candidates) -> Tensor:
        before = {part: (x, x.clone()) for part, x in vars(seen).items() if isinstance(x, Tensor)}
        result = super()._guarded(name, method, seen)
        for part, (x, copy) in before.items():
            _demand(torch.equal(x, copy), f"{name}() changed {part} of its candidates; work on a copy")
        _demand(isinstance(result, Tensor), f"{name}() gave {type(result).__name__}, not a tensor")
        _demand(result.is_floating_point(), f"{name}() gave {result.dtype}; scores are floating-point numbers")
        return result


def open_watched(policy: EvictionPolicy, plan: CachePlan, rows: int = 2, storage: str = "float32") -> Any:
    """The cache of a plan that the policy made, with query weights for those that want them."""
    kind = StorageType.parse(storage)
    dtype = getattr(torch, kind.compute)
    if isinstance(plan, Plan):
        return KVCache(plan, rows, dtype, code=kind.code)
    planned = with_settings(policy, plan)
    assert isinstance(plan, CapacityPlan)
    assert isinstance(planned, DynamicPolicy), "its plan has capacities, but it is no DynamicPolicy"
    heads, dim = plan.geometry.heads, plan.geometry.head_dim

    def query_weight(layer: int) -> Tensor:
        return torch.randn((heads, dim, heads * dim), generator=torch.Generator().manual_seed(layer))

    return _WatchedCache(plan, planned, rows, dtype, query_weight=query_weight, code=kind.code)


def with_settings(policy: EvictionPolicy, plan: CachePlan) -> EvictionPolicy:
    """The policy with the options that its plan records."""
    names = {field.name for field in dataclasses.fields(policy) if field.init}
    return dataclasses.replace(policy, **{name: value for name, value in plan.settings.items() if name in names})


def run_attention(cache: KVCache | SelectingCache, inputs: Sequence[Sequence[AttentionInput]]) -> list[Tensor]:
    """Attention outputs, scale by scale and layer by layer, for new images."""
    cache.reset()
    outs = [out for layers in inputs for out in run_scale(cache, layers)]
    cache.check()
    return outs


def run_scale(cache: KVCache | SelectingCache, layers: Sequence[AttentionInput]) -> Iterator[Tensor]:
    """Attention outputs of the next scale, layer by layer."""
    for layer, x in enumerate(layers):
        cache.see_input(layer, x.input_RNW)
        yield cache.attend(layer, x.q_RHND, x.k_RHND, x.v_RHND)


def _same(outs: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(outs, others, strict=True))


def _tensors_of(policy: Any) -> Iterator[str]:
    """The attributes that hold tensors, also of policies within the policy."""
    for name, value in vars(policy).items():
        parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else [value]
        for part in parts:
            if isinstance(part, Tensor):
                yield name
            elif isinstance(part, EvictionPolicy):
                yield from (f"{name}.{inner}" for inner in _tensors_of(part))


def _scramble(seed: int) -> None:
    """Set the global generators, which no policy may depend on."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@_check
def check_introduction(policy: EvictionPolicy, geometry: CacheGeometry, seed: int) -> None:
    """It says what it is, and can be found by its name."""
    del geometry, seed
    cls = type(policy)
    check_name(policy.name, cls.__qualname__)
    known = registered_policies().get(policy.name)
    assert known is not None, "it is not registered; put @heatkv.register above the class, which opens its plans"
    _demand(known.policy is cls, f"its name belongs to {known.policy!r}")
    _demand(policy.kind in ("static", "dynamic"), f"kind is {policy.kind!r}; subclass StaticPolicy or DynamicPolicy")
    _demand(not policy.summary().startswith(f"{cls.__name__}("), "it has no docstring; its first line is the summary")
    for name, text in (("docstring", policy.summary()), ("source", policy.source)):
        _demand(bool(text.strip()) and "\n" not in text, f"its {name} is {text!r}; it is to be one line of text")
    _demand(set(policy.needs) <= set(NEEDS), f"its needs are {set(policy.needs)}; they are to be of {NEEDS}")


@_check
def check_options(policy: EvictionPolicy, geometry: CacheGeometry, seed: int) -> None:
    """Its options are the fields of a frozen dataclass, and a plan records them all."""
    cls = type(policy)
    frozen = "__dataclass_params__" in vars(cls) and vars(cls)["__dataclass_params__"].frozen
    _demand(frozen, f"{cls.__qualname__} is no frozen dataclass; put @dataclass(frozen=True) above the class")
    problem, plan = next(_some_plans(policy, geometry, seed))
    lacking = [field.name for field in dataclasses.fields(policy) if field.name not in plan.settings]
    _demand(not lacking, f"its plan's settings lack {', '.join(lacking)}; settings() has all options")
    again = with_settings(policy, plan).plan(problem)
    _demand(again == plan, f"made with the options that its plan records, {dict(plan.settings)}, it plans otherwise")


@_check
def check_budget(policy: EvictionPolicy, geometry: CacheGeometry, seed: int) -> None:
    """No checkpoint holds more than the budget, and what cannot be held is refused with BudgetError."""
    tokens = geometry.schedule.tokens
    cached, full_bytes = sum(tokens[:-1]), geometry.full_bytes(2, "float32")
    full = cached * geometry.layers * geometry.heads
    shares = [Fraction(1, 2 * full), *SHARES, Fraction(full - 1, full), Fraction(1)]
    budgets = [(Budget("share", share), share) for share in sorted(shares)]
    budgets.append((Budget("tokens", Fraction(cached * 2, 5)), Fraction(2, 5)))
    amount = Fraction(full_bytes * 3 // 5 + 1)
    budgets.append((Budget("bytes", amount), amount / full_bytes))
    planned: list[Budget] = []
    for budget, share in budgets:
        problem = made_up_problem(policy, geometry, budget, seed)
        plan = _planned(policy, problem)
        if plan is None:
            refused = [other for other in planned if budget.kind == "share" and other.amount < budget.amount]
            _demand(not refused, f"it refuses {budget}, but not the smaller {refused[:1]}")
            continue
        planned.append(budget)
        kind = Plan if policy.kind == "static" else CapacityPlan
        _demand(isinstance(plan, kind), f"a {policy.kind} policy made a {type(plan).__name__}")
        most = math.floor(share * full)
        for name, value, wanted in (
            ("policy", plan.policy, policy.name),
            ("model", plan.model, problem.model),
            ("geometry", plan.geometry, geometry),
            ("settings['budget']", plan.settings.get("budget"), str(budget)),
            ("budget_token_heads", plan.budget_token_heads, most),
        ):
            _demand(value == wanted, f"{name} of its plan for {budget} is {value!r}, not {wanted!r}")
        if isinstance(plan, CapacityPlan):
            _demand(bool(plan.capacity[:, :, 1:].all()), f"its plan for {budget} leaves heads without any token")
        layers = range(geometry.layers)
        for target in range(len(tokens)):
            now, then = ([_held(plan, layer, t) for layer in layers] for t in (target, target + 1))
            for layer in layers:
                live = sum(then[: layer + 1]) + sum(now[layer + 1 :])
                _demand(live <= most, f"{live} of {most} token-heads ({budget}) after layer {layer} of scale {target}")
    _demand(any(budget.amount == 1 for budget in planned), "it refuses the full cache")
    sinks = policy.sink_scales if isinstance(policy, StaticPolicy) else 3
    if policy.name != Full.name and sinks < len(tokens) - 1:
        below = any(budget.kind == "share" and budget.amount < 1 for budget in planned)
        _demand(below, "it refuses every budget below the full cache")


@_check
def check_memory(policy: EvictionPolicy, geometry: CacheGeometry, seed: int) -> None:
    """A real cache takes no more bytes than the budget, also after attention ran through it, and also in 8 bits."""
    tokens, pairs = geometry.schedule.tokens, geometry.layers * geometry.heads
    full = sum(tokens[:-1]) * pairs
    for storage, rows in (("float32", 4), ("bfloat16", 1), ("int8/float32", 2)):
        for problem, plan in _some_plans(policy, geometry, seed, storage=storage, rows=rows):
            cache = open_watched(policy, plan, rows, storage)
            before = cache.allocated_bytes
            outs = run_attention(cache, made_up_inputs(geometry, rows, seed))
            uncoded = geometry.head_dim * sum(STORAGE_BYTES[StorageType.parse(storage).compute])
            # a byte a channel and two of scale, but for the first two scales where they are sinks
            coded = 2 * (geometry.head_dim + 2) if "/" in storage else uncoded
            first = sum(tokens[:-1][: min(2, plan.sink_scales)]) * pairs if isinstance(plan, Plan) else 0
            held = math.floor(problem.share * full)
            most = rows * (min(held, first) * uncoded + max(0, held - first) * coded)
            where = f"{rows} rows in {storage} at {problem.budget}"
            taken, promised = cache.allocated_bytes, plan.bytes(rows, storage)
            _demand(before == taken, f"{before} bytes became {taken} while attention ran ({where})")
            _demand(taken <= most, f"{taken} bytes, {most} are allowed ({where})")
            _demand(taken == promised, f"{taken} bytes, its plan says {promised} ({where})")
            _demand(all(bool(out.isfinite().all()) for out in outs), f"attention is not finite ({where})")
            remembered = list(_tensors_of(cache.policy)) if isinstance(cache, SelectingCache) else []
            _demand(not remembered, f"it keeps tensors in {', '.join(remembered)}, beside the budget; see carry()")


@_check
def check_determinism(policy: EvictionPolicy, geometry: CacheGeometry, seed: int) -> None:
    """Nothing but the problem decides: no global generator, no other images; the seed only where it says so."""
    inputs = made_up_inputs(geometry, 2, seed)
    for problem, plan in _some_plans(policy, geometry, seed):
        _scramble(1)
        _demand(_planned(policy, problem) == plan, f"planned twice for {problem.budget}, it makes different plans")
        if isinstance(plan, CapacityPlan):
            cache = open_watched(policy, plan)
            first = run_attention(cache, inputs)
            _scramble(2)
            run_attention(cache, made_up_inputs(geometry, 2, seed + 1))
            cache.store.spoil()
            _demand(_same(run_attention(cache, inputs), first), "it chooses otherwise after other images")
        others = [_planned(policy, dataclasses.replace(problem, seed=seed + more)) for more in (1, 2, 3)]
        seeds = [None if other is None else other.settings.get("seed") for other in (plan, *others)]
        expected = [seed + more if policy.random else None for more in range(4)]
        _demand(seeds == expected, f"its plans record the seeds {seeds}, not {expected}: is `random` as it should be?")
        if not policy.random:
            _demand(all(other == plan for other in others), "the seed changes its plan; set `random` to True")
        elif geometry.layers * geometry.heads >= 8 and problem.share < Fraction(90, 100):
            wanted = run_attention(open_watched(policy, plan), inputs)
            drawn = [run_attention(open_watched(policy, other), inputs) for other in others if other is not None]
            _demand(not all(_same(outs, wanted) for outs in drawn), "`random` is True, but the seed changes nothing")


@_check
def check_rows(policy: EvictionPolicy, geometry: CacheGeometry, seed: int) -> None:
    """What one row of the batch keeps does not depend on the others."""
    inputs, others = made_up_inputs(geometry, 3, seed), made_up_inputs(geometry, 3, seed + 1)

    def first_row_of(x: AttentionInput, y: AttentionInput) -> AttentionInput:
        return AttentionInput(*(torch.cat([vars(x)[part][:1], vars(y)[part][1:]]) for part in vars(x)))

    mixed = [[first_row_of(x, y) for x, y in zip(*layers, strict=True)] for layers in zip(inputs, others, strict=True)]
    for problem, plan in _some_plans(policy, geometry, seed):
        outs, mixed_outs = (run_attention(open_watched(policy, plan, 3), batch) for batch in (inputs, mixed))
        same = _same([out[0] for out in outs], [out[0] for out in mixed_outs])
        _demand(same, f"at {problem.budget} the first row changes when only the other rows do")


@_check
def check_full_budget(policy: EvictionPolicy, geometry: CacheGeometry, seed: int) -> None:
    """With the full budget attention is that of the full cache, bit for bit."""
    plan = policy.plan(made_up_problem(policy, geometry, Fraction(1), seed))
    _demand(bool((plan.held == np.asarray(geometry.schedule.offsets[:-1])).all()), "its plan drops something")
    _demand(plan.had_no_effect(), "its plan keeps everything, but says that it had an effect")
    full = KVCache(Full().plan(made_up_problem(Full(), geometry, Fraction(1), seed)), 2)
    cache, inputs = open_watched(policy, plan), made_up_inputs(geometry, 2, seed)
    _demand(cache.allocated_bytes == full.allocated_bytes, f"{cache.allocated_bytes} bytes, not {full.allocated_bytes}")
    _demand(_same(run_attention(cache, inputs), run_attention(full, inputs)), "attention differs")


@_check
def check_protection(policy: EvictionPolicy, geometry: CacheGeometry, seed: int) -> None:
    """Composed with `protected`, a dynamic policy drops no token of a protected scale."""
    if not isinstance(policy, DynamicPolicy):
        return
    composed: list[DynamicPolicy] = []
    if isinstance(policy, Wrapper):
        composed.append(dataclasses.replace(policy, base=Protected(policy.inner, "1")))
    composed += [Protected(policy, scales) for scales in ("1", "0,1")]
    inputs = made_up_inputs(geometry, 2, seed)
    for target, layers in enumerate(inputs):
        for x in layers:
            x.v_RHND.fill_(target)  # so that what is held tells its scale
    for subject in composed:
        for _, plan in _some_plans(subject, geometry, seed):
            cache = open_watched(subject, plan)
            for target, layers in enumerate(inputs[:-1]):
                list(run_scale(cache, layers))
                held = cache.layout.places[target + 1]
                for scale, layer in itertools.product({1, int(subject is not composed[-1])}, range(geometry.layers)):
                    slots = torch.from_numpy(np.concatenate(held[layer]))
                    v_RM = cache.store.read_rows(slots.expand(2, -1))[1][..., 0]
                    wanted = geometry.schedule.tokens[scale] * geometry.heads if scale <= target else 0
                    found = (v_RM == scale).sum(dim=1).tolist()
                    _demand(found == [wanted] * 2, f"{subject} holds {found} of {wanted} tokens of scale {scale}")


@_check
def check_plan_file(policy: EvictionPolicy, geometry: CacheGeometry, seed: int) -> None:
    """Plan.json gives back the plan, and the policy with its options."""
    for problem, plan in _some_plans(policy, geometry, seed):
        json.dumps(plan.to_json(), allow_nan=False)
        with tempfile.TemporaryDirectory() as folder:
            plan.save(Path(folder) / "plan.json")
            again = load_plan(Path(folder) / "plan.json")
        _demand(again == plan, f"the plan for {problem.budget} comes back as another")
        if isinstance(again, CapacityPlan):
            opened, inputs = policy_of(again), made_up_inputs(geometry, 2, seed)
            outs, wanted = (run_attention(open_watched(p, plan), inputs) for p in (opened, policy))
            _demand(_same(outs, wanted), f"opened from its plan, {opened} chooses otherwise")


@_check
def check_statistics(policy: EvictionPolicy, geometry: CacheGeometry, seed: int) -> None:
    """Without statistics it refuses, or plans as it does with them; check() does without."""
    problem, plan = next(_some_plans(policy, geometry, seed))
    policy.check(dataclasses.replace(problem, statistics=None))
    lacking: dict[str, Any] = {"statistics": None}
    lacking |= {part: dataclasses.replace(problem.measured, **dict[str, Any]({part: None})) for part in MEASURED}
    for part, statistics in lacking.items():
        try:
            other = policy.plan(dataclasses.replace(problem, statistics=statistics))
        except (PolicyError, StatisticsError) as error:
            _demand(bool(policy.needs), f"`needs` is empty, but without {part} it says: {error}")
            named = any(word in str(error) for word in ("statistics", "level costs", "calibrate"))
            _demand(named, f"without {part} it says {str(error)!r}; name the statistics it needs")
        else:
            _demand(other == plan, f"without {part} it silently makes another plan; raise PolicyError instead")
