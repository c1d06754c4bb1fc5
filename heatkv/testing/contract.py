"""The contract that every eviction policy keeps, for the tests of whoever writes one; any test runner will do.

    from heatkv.testing.contract import check_policy

    def test_my_policy_keeps_the_contract():
        check_policy("my-policy", window=16)

Geometries, statistics and attention inputs are small and made up from a seed. A broken promise is an AssertionError
that names the policy, the check, what is wrong and where it was seen. `contract_checks` gives the checks one by one.
Shapes: R rows, H heads, N tokens of the running scale, D head size, W width of the model.
"""

from __future__ import annotations

import dataclasses
import json
import math
import random
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from heatkv.core.budget import Budget
from heatkv.core.capacity_plan import CapacityPlan
from heatkv.core.geometry import CacheGeometry
from heatkv.core.levels import LEVELS, NONE, LevelChoices, level_tokens, log_counts
from heatkv.core.plan import CachePlan, Plan
from heatkv.core.plan_file import load_plan
from heatkv.core.schedule import ScaleSchedule
from heatkv.core.statistics import LevelStatistics, Provenance, Statistics
from heatkv.core.storage_type import STORAGE_BYTES, StorageType
from heatkv.engine.arena_cache import KVCache
from heatkv.engine.open_cache import policy_of
from heatkv.engine.token_cache import SelectingCache
from heatkv.errors import BudgetError, PolicyError, StatisticsError
from heatkv.policies.base import EvictionPolicy, PlanningProblem, StaticPolicy, make_policy
from heatkv.policies.dynamic import Candidates, DynamicPolicy
from heatkv.policies.windows import Full
from heatkv.registry import check_name, registered_policies

FloatArray = NDArray[np.float64]

REFERENCE = Full.name
"""The one policy that may refuse every budget below the full cache."""

SHARES = tuple(Fraction(percent, 100) for percent in (2, 5, 10, 15, 20, 33, 50, 70, 90, 99))
"""Budgets below the full cache that policies are asked for."""

MEASURED = ("all_mass_sum", "error_sum", "levels", "concentration_sum", "similarity_sum")
"""Parts of statistics that a file may lack."""


# ------------------------------------------------------------------------------------------- made-up material


def small_geometries(seed: int = 0) -> tuple[CacheGeometry, ...]:
    """Models to check on: an ordinary one, a single head, and drawn ones whose scales need not be square or grow."""
    draw = random.Random(seed)
    found = [
        CacheGeometry(3, 4, 8, ScaleSchedule.square((1, 2, 3, 4, 5, 6))),
        CacheGeometry(1, 1, 4, ScaleSchedule.square((1, 2, 3, 4, 5))),
    ]
    for frames in (1, 3):
        scales = tuple(
            (draw.randint(1, frames), draw.randint(1, 5), draw.randint(1, 5)) for _ in range(draw.randint(4, 6))
        )
        found.append(CacheGeometry(draw.randint(2, 4), draw.randint(1, 3), 4, ScaleSchedule(scales)))
    return tuple(found)


def made_up_mass(geometry: CacheGeometry, count: int, seed: int) -> FloatArray:
    """Attention mass of `count` samples, (samples, L, H, T, T): rows sum to one, nothing beyond the target scale."""
    scales = len(geometry.schedule)
    raw = np.random.default_rng(seed).random((count, geometry.layers, geometry.heads, scales, scales)) + 1e-3
    raw = np.where(np.tril(np.ones((scales, scales), dtype=bool)), raw, 0)
    normal: FloatArray = raw / raw.sum(axis=-1, keepdims=True)
    return normal


def level_costs_of(
    geometry: CacheGeometry,
    mass: FloatArray,
    samples: tuple[str, ...],
    sink_scales: int = 2,
    joint: int = 5,
    cost: str = "error",
) -> LevelStatistics:
    """Level costs that follow from the mass of samples: what combinations lose of it adds up before it is squared."""
    choices = LevelChoices(geometry.schedule, sink_scales, joint)
    scales = len(geometry.schedule)
    lost = mass[..., None] * np.array([0.0, 0.3, 0.6, 1.0])  # per sample, layer, head, target, source and level
    sums = []
    for target in range(scales):
        table = choices.combinations(target)
        parts = [lost[:, :, :, target, s][..., table[:, i]] for i, s in enumerate(choices.joint_sources(target))]
        of_samples = sum(parts, np.zeros((*mass.shape[:3], len(table)))) ** 2
        sums.append(of_samples.sum(axis=0))
    bias = np.stack([log_counts(geometry.schedule, level) for level in LEVELS], axis=-1)
    single = (lost**2).sum(axis=0)
    assert single.shape[-1] == NONE + 1
    return LevelStatistics(
        choices, cost, np.broadcast_to(bias, (geometry.layers, geometry.heads, *bias.shape)).copy(), tuple(sums),
        single, samples, samples[:1],
    )  # fmt: skip


def made_up_statistics(
    geometry: CacheGeometry, seed: int = 0, *, sink_scales: int = 2, cost: str = "error"
) -> Statistics:
    """Statistics with all that any policy may plan from; level costs are for so many sink scales, of that kind."""
    rng = np.random.default_rng(seed)
    mass = made_up_mass(geometry, 2, seed)
    layers, heads, scales = geometry.layers, geometry.heads, len(geometry.schedule)
    samples = tuple(f"{seed}:{index}:0" for index in range(len(mass)))
    return Statistics(
        geometry.schedule,
        mass.sum(axis=0),
        (mass**2).sum(axis=0),
        Provenance("made-up", "0" * 16, None, {}, samples),
        all_mass_sum=made_up_mass(geometry, 2, seed + 1).sum(axis=0),
        error_sum=np.tril(rng.random((layers, heads, scales, scales)), -1),
        levels=level_costs_of(geometry, mass, samples, sink_scales, cost=cost),
        concentration_sum=rng.random((layers, heads, scales)),
        similarity_sum=rng.uniform(-1, 1, (layers, scales)),
    )


def made_up_problem(
    policy: EvictionPolicy, geometry: CacheGeometry, budget: Budget | Fraction | str, seed: int = 0, **changes: Any
) -> PlanningProblem:
    """A problem with the statistics this policy needs; `changes` are other fields of it."""
    sinks = policy.sink_scales if isinstance(policy, StaticPolicy) else 2
    statistics = made_up_statistics(geometry, seed, sink_scales=sinks, cost=policy.level_cost or "error")
    told: dict[str, Any] = {
        "statistics": statistics, "seed": seed, "rows": 2, "storage": "float32", "model": "made-up"
    }  # fmt: skip
    return PlanningProblem(geometry, Budget.parse(budget), **{**told, **changes})


@dataclass(frozen=True)
class AttentionInput:
    """What one layer is given at one scale: the attention's input (R, N, W), and q, k, v (R, H, N, D)."""

    input_RNW: Tensor
    q_RHND: Tensor
    k_RHND: Tensor
    v_RHND: Tensor


def made_up_inputs(geometry: CacheGeometry, rows: int, seed: int) -> list[list[AttentionInput]]:
    """Attention inputs of every scale and layer."""
    generator = torch.Generator().manual_seed(seed)
    width = geometry.heads * geometry.head_dim
    return [
        [
            AttentionInput(
                torch.randn((rows, tokens, width), generator=generator),
                *torch.randn((3, rows, geometry.heads, tokens, geometry.head_dim), generator=generator).unbind(0),
            )
            for _ in range(geometry.layers)
        ]
        for tokens in geometry.schedule.tokens
    ]


def run_attention(cache: KVCache | SelectingCache, inputs: Sequence[Sequence[AttentionInput]]) -> list[Tensor]:
    """What attention gives, scale by scale and layer by layer, for new images."""
    cache.reset()
    outs = []
    for of_scale in inputs:
        for layer, given in enumerate(of_scale):
            cache.see_input(layer, given.input_RNW)
            outs.append(cache.attend(layer, given.q_RHND, given.k_RHND, given.v_RHND))
    cache.check()
    return outs


class _WatchedCache(SelectingCache):
    """Sees to it that a policy changes nothing of what it is shown, and scores in floating point."""

    def _guarded(self, name: str, method: Callable[[Candidates], Tensor], seen: Candidates) -> Tensor:
        shown = {part: x for part, x in vars(seen).items() if isinstance(x, Tensor)}
        before = {part: x.clone() for part, x in shown.items()}
        given = super()._guarded(name, method, seen)
        for part, x in shown.items():
            _demand(torch.equal(x, before[part]), f"{name}() changed {part} of its candidates; work on a copy")
        _demand(isinstance(given, Tensor), f"{name}() gave {type(given).__name__}, not a tensor")
        _demand(given.is_floating_point(), f"{name}() gave {given.dtype}; scores are floating-point numbers")
        return given


def open_watched(policy: EvictionPolicy, plan: CachePlan, rows: int = 2, storage: str = "float32") -> Any:
    """The cache of a plan that the policy made, with query weights for those that want them."""
    held = StorageType.parse(storage)
    dtype = getattr(torch, held.compute)
    if isinstance(plan, Plan):
        return KVCache(plan, rows, dtype, code=held.code)
    assert isinstance(plan, CapacityPlan)
    told = as_told(policy, plan)
    _demand(isinstance(told, DynamicPolicy), "its plan has capacities, but it is no DynamicPolicy")
    assert isinstance(told, DynamicPolicy)
    heads, dim = plan.geometry.heads, plan.geometry.head_dim

    def query_weight(layer: int) -> Tensor:
        return torch.randn((heads, dim, heads * dim), generator=torch.Generator().manual_seed(layer))

    return _WatchedCache(plan, told, rows, dtype, query_weight=query_weight, code=held.code)


def as_told(policy: EvictionPolicy, plan: CachePlan) -> EvictionPolicy:
    """The policy with the options that its plan tells."""
    names = {field.name for field in dataclasses.fields(policy) if field.init}
    return dataclasses.replace(policy, **{name: value for name, value in plan.settings.items() if name in names})


# ------------------------------------------------------------------------------------------- how checks run


def _demand(holds: bool, otherwise: str) -> None:
    if not holds:
        raise AssertionError(otherwise)


Subject = str | EvictionPolicy | type[EvictionPolicy]


@dataclass(frozen=True)
class ContractCheck:
    """One promise of the contract: called with a policy, it raises AssertionError where that is broken."""

    name: str
    promise: str
    body: Callable[[EvictionPolicy, CacheGeometry, int], None]

    def __call__(self, policy: Subject, *, geometries: Sequence[CacheGeometry] | None = None, seed: int = 0) -> None:
        subject = _made(policy, {})
        for geometry in small_geometries(seed) if geometries is None else geometries:
            try:
                self.body(subject, geometry, seed)
            except Exception as error:  # whatever it is, the check failed and must be named
                seen = str(error) if type(error) is AssertionError else f"{type(error).__name__}: {error}"
                name = getattr(subject, "name", type(subject).__name__)
                raise AssertionError(
                    f"policy {name!r} breaks the contract, {self.name} ({self.promise}): {seen} "
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
    subject = _made(policy, options)
    for _, check in contract_checks():
        check(subject, geometries=geometries, seed=seed)


def _made(policy: Subject, options: dict[str, Any]) -> EvictionPolicy:
    if isinstance(policy, str):
        return make_policy(policy, **options)
    if isinstance(policy, type):
        return policy(**options)
    return dataclasses.replace(policy, **options) if options else policy


_checks: dict[str, ContractCheck] = {}


def _check(body: Callable[[EvictionPolicy, CacheGeometry, int], None]) -> ContractCheck:
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
    """Plans at a few budgets, of those that are not refused."""
    found = 0
    for share in (Fraction(15, 100), Fraction(33, 100), Fraction(70, 100), Fraction(99, 100), Fraction(1)):
        if found and share > Fraction(70, 100):
            return
        problem = made_up_problem(policy, geometry, share, seed, **changes)
        plan = _planned(policy, problem)
        if plan is not None:
            found += 1
            yield problem, plan


def _live(plan: CachePlan) -> list[list[int]]:
    """Token-heads held after every layer of every target, counted anew, cell by cell."""
    geometry = plan.geometry
    layers, targets = range(geometry.layers), range(len(geometry.schedule))

    def held(layer: int, head: int, target: int) -> int:
        if target == len(targets):
            return 0
        if isinstance(plan, CapacityPlan):
            return int(plan.capacity[layer, head, target])
        assert isinstance(plan, Plan)
        total = 0
        for source in range(target):
            read = [level for level, last_read in plan.levels if last_read[layer, head, source] >= target]
            total += level_tokens(geometry.schedule, read[0])[source] if read else 0
        return total

    of = [[sum(held(l, h, t) for h in range(geometry.heads)) for l in layers] for t in (*targets, len(targets))]
    return [[sum(of[t + 1][: l + 1]) + sum(of[t][l + 1 :]) for l in layers] for t in targets]


def _tensors_of(policy: Any, depth: int = 4) -> Iterator[str]:
    """The attributes that hold tensors, also of policies within the policy."""
    for name, value in getattr(policy, "__dict__", {}).items():
        parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else [value]
        for part in parts:
            if isinstance(part, Tensor):
                yield name
            elif isinstance(part, EvictionPolicy) and depth:
                yield from (f"{name}.{inner}" for inner in _tensors_of(part, depth - 1))


def _same(outs: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(outs, others, strict=True))


def _scramble(seed: int) -> None:
    """Set the global generators, which no policy may depend on."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


# ------------------------------------------------------------------------------------------- the contract


@_check
def check_introduction(policy: EvictionPolicy, geometry: CacheGeometry, seed: int) -> None:
    """It says what it is, and can be found by its name."""
    del geometry, seed
    cls = type(policy)
    check_name(policy.name, cls.__qualname__)
    known = registered_policies().get(policy.name)
    _demand(known is not None, "it is not registered; put @heatkv.register above the class, which opens its plans")
    assert known is not None
    _demand(known.policy is cls, f"its name belongs to {known.policy!r}")
    _demand(policy.kind in ("static", "dynamic"), f"kind is {policy.kind!r}; subclass StaticPolicy or DynamicPolicy")
    _demand(not policy.summary().startswith(f"{cls.__name__}("), "it has no docstring; its first line is the summary")
    for name, text in (("docstring", policy.summary()), ("source", policy.source), ("needs", policy.needs)):
        _demand(bool(text.strip()) and "\n" not in text, f"its {name} is {text!r}; it is to be one line of text")


@_check
def check_options(policy: EvictionPolicy, geometry: CacheGeometry, seed: int) -> None:
    """Its options are the fields of a frozen dataclass, and a plan tells them all."""
    cls = type(policy)
    _demand(
        "__dataclass_params__" in vars(cls) and vars(cls)["__dataclass_params__"].frozen,
        f"{cls.__qualname__} is no frozen dataclass; put @dataclass(frozen=True) above the class",
    )
    problem, plan = next(_some_plans(policy, geometry, seed))
    lacking = [field.name for field in dataclasses.fields(policy) if field.name not in plan.settings]
    _demand(not lacking, f"its plan's settings lack {', '.join(lacking)}; settings() has all options")
    told = as_told(policy, plan).plan(problem)
    _demand(told == plan, f"made with the options its plan tells, {dict(plan.settings)}, it makes another plan")


@_check
def check_budget(policy: EvictionPolicy, geometry: CacheGeometry, seed: int) -> None:
    """No checkpoint holds more than the budget, and what cannot be held is refused with BudgetError."""
    tokens = geometry.schedule.tokens
    full = sum(tokens[:-1]) * geometry.layers * geometry.heads
    shares = [Fraction(1, 2 * full), *SHARES, Fraction(full - 1, full), Fraction(1)]
    budgets = [Budget("share", share) for share in sorted(shares)]
    budgets.append(Budget("tokens", Fraction(sum(tokens[:-1]) * 2, 5)))
    budgets.append(Budget("bytes", Fraction(geometry.full_bytes(2, "float32") * 3 // 5 + 1)))
    kind = Plan if policy.kind == "static" else CapacityPlan
    planned: list[Budget] = []
    for budget in budgets:
        problem = made_up_problem(policy, geometry, budget, seed)
        plan = _planned(policy, problem)
        if plan is None:
            refused = [other for other in planned if budget.kind == "share" and other.amount < budget.amount]
            _demand(not refused, f"it refuses {budget}, but not the smaller {refused[:1]}")
            continue
        planned.append(budget)
        _demand(isinstance(plan, kind), f"a {policy.kind} policy made a {type(plan).__name__}")
        for name, value, wanted in (
            ("policy", plan.policy, policy.name),
            ("model", plan.model, problem.model),
            ("geometry", plan.geometry, geometry),
            ("settings['budget']", plan.settings.get("budget"), str(budget)),
        ):
            _demand(value == wanted, f"{name} of its plan for {budget} is {value!r}, not {wanted!r}")
        share = {"share": budget.amount, "tokens": budget.amount / sum(tokens[:-1])}.get(
            budget.kind, budget.amount / geometry.full_bytes(2, "float32")
        )
        most = math.floor(share * full)
        _demand(
            plan.budget_token_heads == most, f"for {budget} its plan promises {plan.budget_token_heads}, not {most}"
        )
        for target, of_layers in enumerate(_live(plan)):
            for layer, live in enumerate(of_layers):
                _demand(live <= most, f"{live} of {most} token-heads ({budget}) after layer {layer} of scale {target}")
    _demand(any(budget.amount == 1 for budget in planned), "it refuses the full cache")
    sinks = policy.sink_scales if isinstance(policy, StaticPolicy) else 3
    if policy.name != REFERENCE and sinks < len(tokens) - 1:
        below = [budget for budget in planned if budget.kind == "share" and budget.amount < 1]
        _demand(bool(below), "it refuses every budget below the full cache")


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
            each = geometry.head_dim * sum(STORAGE_BYTES[StorageType.parse(storage).compute])
            most = problem.share * full * each * rows
            if "/" in storage:  # a byte a channel and two of scale, but for the first two scales where they are sinks
                first = sum(tokens[:-1][: min(2, plan.sink_scales)]) * pairs if isinstance(plan, Plan) else 0
                held = math.floor(problem.share * full)
                coded = max(0, held - first) * 2 * (geometry.head_dim + 2)
                most = Fraction(rows * (min(held, first) * each + coded))
            where = f"{rows} rows in {storage} at {problem.budget}"
            taken, promised = cache.allocated_bytes, plan.bytes(rows, storage)
            _demand(before == taken, f"{before} bytes became {taken} while attention ran ({where})")
            _demand(taken <= most, f"{taken} bytes, {float(most):.0f} are allowed ({where})")
            _demand(taken == promised, f"{taken} bytes, its plan says {promised} ({where})")
            _demand(all(bool(out.isfinite().all()) for out in outs), f"attention is not finite ({where})")
            remembered = list(_tensors_of(cache.policy)) if isinstance(cache, SelectingCache) else []
            _demand(not remembered, f"it keeps tensors in {', '.join(remembered)}, beside the budget; see carry()")


@_check
def check_determinism(policy: EvictionPolicy, geometry: CacheGeometry, seed: int) -> None:
    """Nothing but the problem decides: no global generator, no other images; the seed only where it says so."""
    for problem, plan in _some_plans(policy, geometry, seed):
        _scramble(1)
        again = _planned(policy, problem)
        _demand(again == plan, f"planned twice for {problem.budget}, it makes different plans")
        if isinstance(plan, CapacityPlan):
            cache, inputs = open_watched(policy, plan), made_up_inputs(geometry, 2, seed)
            first = run_attention(cache, inputs)
            _scramble(2)
            run_attention(cache, made_up_inputs(geometry, 2, seed + 1))
            cache.store.spoil()
            _demand(_same(run_attention(cache, inputs), first), "it chooses otherwise after other images")
        others = [_planned(policy, dataclasses.replace(problem, seed=seed + more)) for more in (1, 2, 3)]
        told = [None if other is None else other.settings.get("seed") for other in (plan, *others)]
        expected = [seed + more if policy.random else None for more in range(4)]
        _demand(told == expected, f"its plans tell the seeds {told}, not {expected}: is `random` as it should be?")
        if not policy.random:
            _demand(all(other == plan for other in others), "the seed changes its plan; set `random` to True")
        elif geometry.layers * geometry.heads >= 8 and problem.share < Fraction(90, 100):
            inputs = made_up_inputs(geometry, 2, seed)
            wanted = run_attention(open_watched(policy, plan), inputs)
            drawn = [run_attention(open_watched(policy, other), inputs) for other in others if other is not None]
            _demand(not all(_same(outs, wanted) for outs in drawn), "`random` is True, but the seed changes nothing")


@_check
def check_rows(policy: EvictionPolicy, geometry: CacheGeometry, seed: int) -> None:
    """What one row of the batch keeps does not depend on the others."""
    inputs, others = made_up_inputs(geometry, 3, seed), made_up_inputs(geometry, 3, seed + 1)
    mixed = [
        [
            AttentionInput(
                *(torch.cat([a[:1], b[1:]]) for a, b in zip(vars(x).values(), vars(y).values(), strict=True))
            )
            for x, y in zip(*layers, strict=True)
        ]
        for layers in zip(inputs, others, strict=True)
    ]
    for problem, plan in _some_plans(policy, geometry, seed):
        outs, of_mixed = (run_attention(open_watched(policy, plan, 3), given) for given in (inputs, mixed))
        _demand(
            _same([out[0] for out in outs], [out[0] for out in of_mixed]),
            f"at {problem.budget} the first row changes when only the other rows do",
        )


@_check
def check_full_budget(policy: EvictionPolicy, geometry: CacheGeometry, seed: int) -> None:
    """With the full budget attention is that of the full cache, bit for bit."""
    plan = policy.plan(made_up_problem(policy, geometry, Fraction(1), seed))
    available = np.asarray(geometry.schedule.offsets[:-1])
    _demand(bool((plan.held == available).all()), "its plan drops something")
    _demand(plan.had_no_effect(), "its plan keeps everything, but says that it had an effect")
    full = KVCache(Full().plan(made_up_problem(Full(), geometry, Fraction(1), seed)), 2)
    cache, inputs = open_watched(policy, plan), made_up_inputs(geometry, 2, seed)
    _demand(cache.allocated_bytes == full.allocated_bytes, f"{cache.allocated_bytes} bytes, not {full.allocated_bytes}")
    _demand(_same(run_attention(cache, inputs), run_attention(full, inputs)), "attention differs")


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
            inputs = made_up_inputs(geometry, 2, seed)
            wanted, given = (run_attention(open_watched(p, plan), inputs) for p in (policy, policy_of(again)))
            _demand(_same(given, wanted), f"opened from its plan, {policy_of(again)} chooses otherwise")


@_check
def check_statistics(policy: EvictionPolicy, geometry: CacheGeometry, seed: int) -> None:
    """Without statistics it refuses, or plans as it does with them; check() does without."""
    problem, plan = next(_some_plans(policy, geometry, seed))
    statistics = problem.statistics
    assert statistics is not None
    bare = dataclasses.replace(problem, statistics=None)
    policy.check(bare)
    changed = {"statistics": bare}
    for part in MEASURED:
        lacking: dict[str, Any] = {part: None}
        changed[part] = dataclasses.replace(problem, statistics=dataclasses.replace(statistics, **lacking))
    for part, without in changed.items():
        try:
            other = policy.plan(without)
        except (PolicyError, StatisticsError) as error:
            _demand(
                "statistics" in policy.plans_from(), f"`needs` is {policy.needs!r}, but without {part} it says: {error}"
            )
            said = re.search("statistics|level costs|calibrate", str(error))
            _demand(said is not None, f"without {part} it says {str(error)!r}; name the statistics it needs")
        else:
            _demand(other == plan, f"without {part} it silently makes another plan; raise PolicyError instead")
