"""The cache of dynamic policies against an oracle that keeps everything and hides what was dropped."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from heatkv.core.budget import Budget
from heatkv.core.capacity_plan import CapacityPlan
from heatkv.core.geometry import CacheGeometry
from heatkv.core.plan_file import load_plan
from heatkv.core.schedule import ScaleSchedule
from heatkv.core.statistics import Provenance, Statistics
from heatkv.engine.arena_cache import KVCache
from heatkv.engine.token_cache import SelectingCache, policy_of
from heatkv.errors import BudgetError, FormatError, PlanError, PolicyError, StatisticsError
from heatkv.policies.ams_kv_like import AmsKvLike
from heatkv.policies.base import PlanningProblem
from heatkv.policies.composition import AdaKV, PerLayer, Protected
from heatkv.policies.dynamic import Candidates, DynamicPolicy
from heatkv.policies.h2o import H2O
from heatkv.policies.hack_like import HackLike
from heatkv.policies.windows import SlidingWindowTokens, StreamingTokens
from heatkv.policies.scalekv import ScaleKV, ScaleKVFixed
from heatkv.policies.snapkv import PyramidKV, SnapKV

SIDES = (1, 2, 3, 5, 4, 6)
GEOMETRY = CacheGeometry(3, 4, 8, ScaleSchedule.square(SIDES))
WIDTH = GEOMETRY.heads * GEOMETRY.head_dim
POLICIES: dict[str, DynamicPolicy] = {
    "sliding-window-tokens": SlidingWindowTokens(),
    "streaming-tokens": StreamingTokens(),
    "streaming-tokens of 2": StreamingTokens(sink_tokens=2),
    "snapkv": SnapKV(window=4, kernel=3),
    "snapkv, a window of all": SnapKV(),
    "pyramidkv": PyramidKV(window=4, beta=4),
    "h2o": H2O(),
    "h2o, all sums": H2O(recent=0, mean_per_scale=False),
    "scalekv": ScaleKV(drafters="1"),
    "scalekv-fixed": ScaleKVFixed(drafters="0,2"),
    "adakv": AdaKV(base="snapkv:window=2"),
    "adakv over h2o": AdaKV(base="h2o:recent=0.2", alpha=0.5),
    "hack-like": HackLike(),
    "ams-kv-like": AmsKvLike(),
    "per-layer": PerLayer(base="h2o", weights="3,1"),
    "protected": Protected(base="snapkv:window=2", scales="0,1"),
    "protected later": Protected(base="h2o", scales="2"),
    "protected, shared": Protected(base="adakv:base=sliding-window-tokens", scales="0,1"),
}


def made_up_statistics() -> Statistics:
    rng = np.random.default_rng(0)
    layers, heads, scales = GEOMETRY.layers, GEOMETRY.heads, len(SIDES)
    mass = np.tril(rng.random((layers, heads, scales, scales)))
    mass /= mass.sum(axis=3, keepdims=True)
    return Statistics(
        GEOMETRY.schedule,
        mass,
        mass**2,
        Provenance("random", "0" * 16, None, {}, ("0:0:0",)),
        concentration_sum=rng.random((layers, heads, scales)),
        similarity_sum=rng.uniform(-1, 1, (layers, scales)),
    )


STATISTICS = made_up_statistics()


def problem(budget: str, rows: int = 2, statistics: Statistics | None = STATISTICS) -> PlanningProblem:
    return PlanningProblem(GEOMETRY, Budget.parse(budget), statistics, rows=rows, storage="float32", model="random")


def solved(name: str, budget: str, rows: int = 2) -> tuple[DynamicPolicy, CapacityPlan]:
    """The policy as its plan describes it, and the plan."""
    plan = POLICIES[name].plan(problem(budget, rows))
    return policy_of(plan), plan


def inputs(rows: int, seed: int) -> list[list[tuple[Tensor, Tensor, Tensor, Tensor]]]:
    """The attention's input, q, k, v of every scale and layer."""
    generator = torch.Generator().manual_seed(seed)
    steps = []
    for tokens in GEOMETRY.schedule.tokens:
        shape = (rows, GEOMETRY.heads, tokens, GEOMETRY.head_dim)
        steps.append(
            [
                (
                    torch.randn((rows, tokens, WIDTH), generator=generator),
                    *torch.randn((3, *shape), generator=generator).unbind(0),
                )
                for _ in range(GEOMETRY.layers)
            ]
        )
    return steps


def query_weight(layer: int) -> Tensor:
    generator = torch.Generator().manual_seed(layer)
    return torch.randn((GEOMETRY.heads, GEOMETRY.head_dim, WIDTH), generator=generator)


def run(cache: KVCache | SelectingCache, steps: list[list[tuple[Tensor, Tensor, Tensor, Tensor]]]) -> list[Tensor]:
    """What attention gives, scale by scale and layer by layer."""
    cache.reset()
    outs = []
    for of_scale in steps:
        for layer, (u, q, k, v) in enumerate(of_scale):
            if isinstance(cache, SelectingCache):
                cache.see_input(layer, u)
            outs.append(cache.attend(layer, q, k, v))
    return outs


def by_hiding(
    plan: CapacityPlan, policy: DynamicPolicy, steps: list[list[tuple[Tensor, Tensor, Tensor, Tensor]]]
) -> list[Tensor]:
    """The same with dense attention: nothing is dropped, a mask hides what the policy, asked row by row, would drop."""
    rows, heads = steps[0][0][1].shape[:2]
    layers = GEOMETRY.layers
    keys = [torch.zeros(rows, heads, 0, GEOMETRY.head_dim) for _ in range(layers)]
    values = [torch.zeros_like(k) for k in keys]
    shown = [torch.zeros(rows, heads, 0, dtype=torch.bool) for _ in range(layers)]
    carried = [torch.zeros(rows, heads, 0, plan.carried) for _ in range(layers)]
    outs = []
    for target, of_scale in enumerate(steps):
        for layer, (u, q, k, v) in enumerate(of_scale):
            tokens = k.shape[2]
            keys[layer], values[layer] = torch.cat([keys[layer], k], 2), torch.cat([values[layer], v], 2)
            shown[layer] = torch.cat([shown[layer], torch.ones(rows, heads, tokens, dtype=torch.bool)], 2)
            carried[layer] = torch.cat([carried[layer], torch.zeros(rows, heads, tokens, plan.carried)], 2)
            logits = (q.double() @ keys[layer].double().mT).masked_fill(~shown[layer][:, :, None], -math.inf)
            outs.append(logits.softmax(-1) @ values[layer].double())
            if target + 1 == len(steps):
                continue
            capacity = plan.capacity[layer, :, target + 1]
            for row in range(rows):
                whose = [list(range(heads))] if plan.shared else [[head] for head in range(heads)]
                for group in whose:
                    of_heads = [shown[layer][row, head].nonzero()[:, 0] for head in group]
                    widest = max(map(len, of_heads))
                    # pads, which come first, read what is hidden anyway
                    at = torch.stack([torch.cat([x.new_zeros(widest - len(x)), x]) for x in of_heads])
                    valid = torch.stack([torch.arange(widest) >= widest - len(x) for x in of_heads])
                    index = at[..., None].expand(-1, -1, GEOMETRY.head_dim)
                    seen = Candidates(
                        layer, target, tuple(group), heads, GEOMETRY.schedule, int(capacity[group].mean()),
                        widest - tokens,
                        q[row : row + 1, group], keys[layer][row, group].gather(1, index)[None],
                        values[layer][row, group].gather(1, index)[None], valid[None] if plan.shared else None,
                        carried[layer][row, group].gather(1, at[..., None].expand(-1, -1, plan.carried))[None],
                        u[row : row + 1], query_weight(layer)[group],
                    )  # fmt: skip
                    if plan.carried:
                        seen = dataclasses.replace(seen, carried_RHCX=policy.carry(seen))
                        for i, head in enumerate(group):
                            assert seen.carried_RHCX is not None
                            carried[layer][row, head, of_heads[i]] = seen.carried_RHCX[0, i, valid[i]]
                    total = int(capacity[group].sum())
                    if total == int(valid.sum()):
                        continue
                    scores = policy.score(seen)[0].masked_fill(~valid, -math.inf).flatten()
                    best = torch.zeros(scores.shape, dtype=torch.bool)
                    best[scores.topk(total).indices] = True
                    for i, head in enumerate(group):
                        shown[layer][row, head] = False
                        shown[layer][row, head, at[i][best.view(len(group), widest)[i]]] = True
    return outs


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("budget", ["20%", "33%", "70%"])
def test_gathering_equals_hiding(name: str, budget: str) -> None:
    (policy, plan), steps = solved(name, budget), inputs(2, 0)
    assert not plan.had_no_effect()
    cache = SelectingCache(plan, policy, 2, query_weight=query_weight)
    for _ in range(2):  # what is left of other images is never read
        for got, wanted in zip(run(cache, steps), by_hiding(plan, policy, steps), strict=True):
            assert (got.double() - wanted).abs().max() < 1e-5
        cache.store.spoil()


@pytest.mark.parametrize("name", ["sliding-window-tokens", "snapkv", "h2o"])
@settings(max_examples=12)
@given(share=st.floats(0.08, 1), rows=st.integers(1, 3))
def test_the_budget_is_used(name: str, share: float, rows: int) -> None:
    """Less than one token a head of the layers, and what rounds by it, is left unused."""
    policy, plan = solved(name, f"{share:.3f}", 2 * rows)
    cache = SelectingCache(plan, policy, 2 * rows, query_weight=query_weight)
    bytes_of_budget = plan.budget_token_heads * 2 * GEOMETRY.head_dim * 4 * 2 * rows
    unused = 2 * GEOMETRY.heads * (2 * GEOMETRY.head_dim + 1) * 4 * 2 * rows
    assert bytes_of_budget - unused < cache.allocated_bytes <= bytes_of_budget


# ------------------------------------------------------------------------------------- what policies have in common


def same_choice(one: DynamicPolicy, other: DynamicPolicy, budget: str = "30%") -> None:
    plans = [policy.plan(problem(budget)) for policy in (one, other)]
    assert np.array_equal(plans[0].capacity, plans[1].capacity)
    steps = inputs(2, 5)
    outs = [run(SelectingCache(plans[i], policy, 2), steps) for i, policy in enumerate((one, other))]
    assert all((a - b).abs().max() < 1e-6 for a, b in zip(*outs, strict=True))


def test_without_sinks_streaming_is_a_sliding_window() -> None:
    same_choice(StreamingTokens(sink_tokens=0), SlidingWindowTokens())


def test_a_flat_pyramid_is_snapkv() -> None:
    same_choice(PyramidKV(window=4, beta=1), SnapKV(window=4))


def test_equal_weights_change_nothing() -> None:
    same_choice(PerLayer(base="snapkv:window=4", weights="1,1"), SnapKV(window=4))


def test_protected_first_scales_of_a_window_are_sinks() -> None:
    same_choice(Protected(base="sliding-window-tokens", scales="0,1"), StreamingTokens(sink_tokens=5))


def test_a_single_head_shares_with_nobody() -> None:
    geometry = CacheGeometry(2, 1, 8, GEOMETRY.schedule)
    base, shared = SnapKV(window=2), AdaKV(base="snapkv:window=2")
    # grows again after it has dropped
    capacity = np.broadcast_to(np.array([0, 1, 3, 8, 20, 36]), (2, 1, 6))
    plans = [
        CapacityPlan(p.name, geometry, capacity, 1.0, geometry.full_token_heads, shared=p.shared)
        for p in (base, shared)
    ]
    steps = [
        [tuple(x[:, :1] if x.ndim == 4 else x for x in parts) for parts in of_scale[:2]] for of_scale in inputs(2, 7)
    ]
    outs = [run(SelectingCache(plan, policy, 2), steps) for plan, policy in zip(plans, (base, shared), strict=True)]  # type: ignore[arg-type]
    assert all((a - b).abs().max() < 1e-6 for a, b in zip(*outs, strict=True))


def test_heads_that_share_all_for_themselves_are_snapkv() -> None:
    """AdaKV whose own part is everything keeps what its base keeps."""
    base, shared = SnapKV(window=4), AdaKV(base="snapkv:window=4", alpha=1.0)
    plan = base.plan(problem("30%"))
    steps = inputs(2, 6)
    as_shared = CapacityPlan(
        "adakv", GEOMETRY, plan.capacity, plan.budget, plan.budget_token_heads, settings={}, shared=True
    )
    got = run(SelectingCache(as_shared, shared, 2), steps)
    for one, other in zip(got, run(SelectingCache(plan, base, 2), steps), strict=True):
        assert (one - other).abs().max() < 1e-5


# ------------------------------------------------------------------------------------------------------- refusals


@dataclasses.dataclass(frozen=True)
class Broken(SlidingWindowTokens):
    how: str = "shape"

    def score(self, seen: Candidates) -> Tensor:
        if self.how == "raise":
            raise RuntimeError("boom")
        scores = super().score(seen)
        return scores[..., 1:] if self.how == "shape" else scores * math.nan


@pytest.mark.parametrize(("how", "said"), [("raise", "boom"), ("shape", "scored"), ("nan", "not numbers")])
def test_a_broken_policy_is_named(how: str, said: str) -> None:
    policy = Broken(how=how)
    cache = SelectingCache(policy.plan(problem("20%")), policy, 2)
    with pytest.raises(PolicyError, match=f"'sliding-window-tokens'.*{said}"):
        run_and_check(cache)


def run_and_check(cache: SelectingCache) -> None:
    run(cache, inputs(2, 0))
    cache.check()


def test_scores_that_are_not_numbers_are_told_of_with_their_layers() -> None:
    @dataclasses.dataclass(frozen=True)
    class Sometimes(SlidingWindowTokens):
        def score(self, seen: Candidates) -> Tensor:
            return super().score(seen) * (math.nan if seen.layer > 0 and seen.target == 4 else 1)

    for policy in (Sometimes(), AdaKV(base="snapkv")):
        cache = SelectingCache(policy.plan(problem("20%")), policy, 2)
        run(cache, inputs(2, 0))
        if isinstance(policy, Sometimes):
            with pytest.raises(PolicyError, match=r"not numbers in layers 1, 2$"):
                cache.check()
            cache.reset()  # other images
        cache.check()


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (np.full((3, 4, 6), 5), "must be from 0 to 0"),
        (np.full((3, 4, 6), -1), "must be from 0"),
        (np.zeros((3, 4, 5), dtype=int), "shape"),
        (np.zeros((3, 4, 6)), "float64"),
    ],
)
def test_impossible_capacities_are_refused(changed: np.ndarray, said: str) -> None:
    with pytest.raises(PlanError, match=said):
        CapacityPlan("mine", GEOMETRY, changed, 1.0, GEOMETRY.full_token_heads)


def test_a_plan_with_both_arrays_is_refused(tmp_path: Path) -> None:
    import json

    told = SnapKV().plan(problem("30%")).to_json()
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(told | {"last_read": told["capacity"]}))
    with pytest.raises(FormatError, match="both"):
        load_plan(path)


@pytest.mark.parametrize(
    ("policy", "said"),
    [
        (SnapKV(window=0), "window=0"),
        (SnapKV(kernel=4), "kernel=4"),
        (PyramidKV(beta=0.5), "beta=0.5"),
        (H2O(recent=1.5), "recent=1.5"),
        (StreamingTokens(sink_tokens=-1), "sink_tokens=-1"),
        (ScaleKV(drafters="7"), "drafters='7'"),
        (ScaleKV(drafters="a"), "drafters='a'"),
        (AdaKV(alpha=2), "alpha=2"),
        (AdaKV(base="adakv"), "share already"),
        (AdaKV(base="heatkv"), "no dynamic policy"),
        (AdaKV(base="snapkv:window"), "cannot read base"),
        (AdaKV(base="nope"), "unknown policy 'nope'"),
        (PerLayer(weights="1,2,3,4"), "weights='1,2,3,4'"),
        (PerLayer(weights="0,1"), "weights='0,1'"),
        (Protected(scales="9"), "scales='9'"),
        (Protected(scales="x"), "scales='x'"),
    ],
)
def test_bad_options_are_refused(policy: DynamicPolicy, said: str) -> None:
    with pytest.raises(PolicyError, match=said):
        policy.plan(problem("30%"))


@pytest.mark.parametrize("policy", [ScaleKV(), HackLike(), AmsKvLike(), AdaKV(base="hack-like")])
def test_missing_statistics_are_said(policy: DynamicPolicy) -> None:
    with pytest.raises(PolicyError, match=r"needs statistics to tell .*heatkv calibrate"):
        policy.plan(problem("30%", statistics=None))


@pytest.mark.parametrize("policy", [HackLike(), AmsKvLike()])
def test_statistics_without_what_is_needed_are_refused(policy: DynamicPolicy) -> None:
    bare = dataclasses.replace(STATISTICS, concentration_sum=None, similarity_sum=None)
    with pytest.raises(StatisticsError, match="calibrate again"):
        policy.plan(problem("30%", statistics=bare))


def test_a_budget_below_what_is_protected_is_refused() -> None:
    with pytest.raises(BudgetError, match=r"'protected' keeps 108 token-heads at least; budget 12% has room for 74"):
        Protected(base="snapkv", scales="2").plan(problem("12%"))


def test_a_budget_below_one_token_per_head_is_refused() -> None:
    with pytest.raises(BudgetError, match="fewer than one for each of 3 layers x 4 heads"):
        SnapKV().plan(problem("0.5%"))
