"""The cache of dynamic policies against an oracle that keeps everything and hides what was dropped."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.dynamic import GEOMETRY, POLICIES, STATISTICS, inputs, problem, query_weight, run
from torch import Tensor

from heatkv.core.capacity_plan import CapacityPlan
from heatkv.core.geometry import CacheGeometry
from heatkv.engine.open_cache import open_cache, policy_of
from heatkv.engine.token_cache import SelectingCache
from heatkv.errors import BudgetError, PlanError, PolicyError, StatisticsError
from heatkv.policies.ams_kv_like import AmsKvLike
from heatkv.policies.base import make_policy
from heatkv.policies.composition import AdaKV, PerLayer, Protected
from heatkv.policies.dynamic import Candidates, DynamicPolicy
from heatkv.policies.hack_like import HackLike
from heatkv.policies.scalekv import ScaleKV
from heatkv.policies.snapkv import PyramidKV, SnapKV
from heatkv.policies.windows import SlidingWindowTokens, StreamingTokens
from heatkv.testing.material import AttentionInput


def by_hiding(plan: CapacityPlan, policy: DynamicPolicy, steps: Sequence[Sequence[AttentionInput]]) -> list[Tensor]:
    """The same with dense attention: nothing is dropped, a mask hides what the policy, asked row by row, would drop."""
    rows, heads = steps[0][0].q_RHND.shape[:2]
    layers = GEOMETRY.layers
    keys = [torch.zeros(rows, heads, 0, GEOMETRY.head_dim) for _ in range(layers)]
    values = [torch.zeros_like(k) for k in keys]
    shown = [torch.zeros(rows, heads, 0, dtype=torch.bool) for _ in range(layers)]
    carried = [torch.zeros(rows, heads, 0, plan.carried) for _ in range(layers)]
    outs = []
    for target, of_scale in enumerate(steps):
        for layer, x in enumerate(of_scale):
            u, q, k, v = x.input_RNW, x.q_RHND, x.k_RHND, x.v_RHND
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
                        layer=layer,
                        target=target,
                        heads=tuple(group),
                        heads_of_layer=heads,
                        schedule=GEOMETRY.schedule,
                        capacity=int(capacity[group].mean()),
                        held=widest - tokens,
                        q_RHND=q[row : row + 1, group],
                        k_RHCD=keys[layer][row, group].gather(1, index)[None],
                        v_RHCD=values[layer][row, group].gather(1, index)[None],
                        valid_RHC=valid[None] if plan.shared else None,
                        carried_RHCX=carried[layer][row, group].gather(1, at[..., None].expand(-1, -1, plan.carried))[
                            None
                        ],
                        attention_input_RNW=u[row : row + 1],
                        query_weight_HDW=query_weight(layer)[group],
                    )
                    if plan.carried:
                        seen = replace(seen, carried_RHCX=policy.carry(seen))
                        for i, head in enumerate(group):
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


@pytest.mark.parametrize(("name", "budget"), [(name, ("20%", "70%")[i % 2]) for i, name in enumerate(POLICIES)])
def test_gathering_equals_hiding(name: str, budget: str) -> None:
    plan, steps = POLICIES[name].plan(problem(budget)), inputs(2, 0)
    assert not plan.had_no_effect()
    cache = open_cache(plan, 2, query_weight=query_weight)
    expected = by_hiding(plan, policy_of(plan), steps)
    for _ in range(2):  # what is left of other images is never read
        for got, wanted in zip(run(cache, steps), expected, strict=True):
            assert (got.double() - wanted).abs().max() < 1e-5
        cache.store.spoil()


@pytest.mark.parametrize("name", ["snapkv", "h2o"])
@settings(max_examples=12)
@given(share=st.floats(0.08, 1), rows=st.integers(1, 3))
def test_use_of_the_budget(name: str, share: float, rows: int) -> None:
    """Less than one token a head of the layers, and what rounds by it, is left unused."""
    plan = POLICIES[name].plan(problem(f"{share:.3f}", 2 * rows))
    budget_bytes = plan.budget_token_heads * 2 * GEOMETRY.head_dim * 4 * 2 * rows
    unused = 2 * GEOMETRY.heads * (2 * GEOMETRY.head_dim + 1) * 4 * 2 * rows
    assert budget_bytes - unused < open_cache(plan, 2 * rows).allocated_bytes <= budget_bytes


# ------------------------------------------------------------------------------------- what policies have in common


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (StreamingTokens(sink_tokens=0), SlidingWindowTokens()),
        (PyramidKV(window=4, beta=1), SnapKV(window=4)),
        (PerLayer(base="snapkv:window=4", weights="1,1"), SnapKV(window=4)),
        (Protected(base="sliding-window-tokens", scales="0,1"), StreamingTokens(sink_tokens=5)),
    ],
    ids=["streaming without sinks", "flat pyramid", "equal weights", "protected first scales"],
)
def test_policies_that_choose_alike(one: DynamicPolicy, other: DynamicPolicy) -> None:
    plans, steps = [policy.plan(problem("30%")) for policy in (one, other)], inputs(2, 5)
    assert np.array_equal(plans[0].capacity, plans[1].capacity)
    outs = [run(SelectingCache(plan, policy, 2), steps) for plan, policy in zip(plans, (one, other), strict=True)]
    assert all((a - b).abs().max() < 1e-6 for a, b in zip(*outs, strict=True))


@pytest.mark.parametrize(("heads", "tolerance"), [(1, 1e-6), (4, 1e-5)])
def test_sharing_with_nobody(heads: int, tolerance: float) -> None:
    """A single head, and heads whose own part is everything, keep what the base of AdaKV keeps."""
    geometry = CacheGeometry(2, heads, 8, GEOMETRY.schedule)
    base, shared = SnapKV(window=2), AdaKV(base="snapkv:window=2", alpha=1.0)
    # grows again after it has dropped
    capacity = np.broadcast_to(np.array([0, 1, 3, 8, 20, 36]), (2, heads, 6))
    outs = []
    for policy in (base, shared):
        plan = CapacityPlan(policy.name, geometry, capacity, 1.0, geometry.full_token_heads, shared=policy.shared)
        steps = [
            [
                replace(x, q_RHND=x.q_RHND[:, :heads], k_RHND=x.k_RHND[:, :heads], v_RHND=x.v_RHND[:, :heads])
                for x in layers[:2]
            ]
            for layers in inputs(2, 7)
        ]
        outs.append(run(SelectingCache(plan, policy, 2), steps))
    assert all((a - b).abs().max() < tolerance for a, b in zip(*outs, strict=True))


@dataclass(frozen=True)
class LastHead(SlidingWindowTokens):
    def score(self, seen: Candidates) -> Tensor:
        return seen.no_scores() + torch.tensor(seen.heads)[:, None]


def test_no_head_is_left_with_nothing() -> None:
    """Heads that share, whatever the others score: every one keeps a token of its own."""
    policy = AdaKV(base=LastHead(), alpha=0.0)
    plan = policy.plan(problem("8%"))
    assert plan.capacity[:, :, 1:].min() >= 1
    cache = SelectingCache(plan, policy, 2)
    cache.reset()
    for layers in inputs(2, 3)[:-1]:
        for layer, x in enumerate(layers):
            cache.attend(layer, x.q_RHND, x.k_RHND, x.v_RHND)
    assert (cache._counts_LRH[..., :-1] == 1).all()


# ------------------------------------------------------------------------------------------------------- refusals


@dataclass(frozen=True)
class Broken(SlidingWindowTokens):
    how: str = "shape"

    def score(self, seen: Candidates) -> Tensor:
        if self.how == "raise":
            raise RuntimeError("boom")
        scores = super().score(seen)
        if self.how == "nan":
            return scores * (math.nan if seen.layer > 0 and seen.target == 4 else 1)
        return scores[..., 1:]


@pytest.mark.parametrize(
    ("how", "phrase"), [("raise", "boom"), ("shape", "scored"), ("nan", r"not numbers in layers 1, 2$")]
)
def test_broken_policies(how: str, phrase: str) -> None:
    policy = Broken(how=how)
    cache = SelectingCache(policy.plan(problem("20%")), policy, 2)
    with pytest.raises(PolicyError, match=f"'sliding-window-tokens'.*{phrase}"):  # noqa: PT012
        run(cache, inputs(2, 0))
        cache.check()
    cache.reset()
    cache.check()  # of other images


@pytest.mark.parametrize(
    ("changes", "error", "phrase"),
    [
        ({"settings": {"window": 2}}, PlanError, "window"),
        ({"policy": "full", "settings": {"sink_scales": 3}}, PolicyError, "'full'"),
        ({"carried": 1, "capacity": np.zeros((3, 4, 6), dtype=int)}, PlanError, "carried=1"),
    ],
)
def test_plans_of_no_policy(changes: dict[str, object], error: type[Exception], phrase: str) -> None:
    plan = replace(SnapKV().plan(problem("30%")), **changes)
    with pytest.raises(error, match=phrase):
        policy_of(plan)


@pytest.mark.parametrize(
    ("name", "arguments", "phrase"),
    [
        ("snapkv", {"attention": "triton"}, "triton"),
        ("snapkv", {"code": "int4"}, "'int4'"),
        # what is carried takes more of the budget the fewer bytes keys and values have
        ("h2o", {"dtype": torch.float16}, "float16"),
    ],
)
def test_caches_that_cannot_be(name: str, arguments: dict[str, Any], phrase: str) -> None:
    with pytest.raises(PlanError, match=phrase):
        open_cache(POLICIES[name].plan(problem("30%")), 2, **arguments)


@pytest.mark.parametrize(
    ("name", "options", "budget", "error", "phrase"),
    [
        ("snapkv", {"window": 0}, "30%", PolicyError, "window of"),
        ("snapkv", {"kernel": 4}, "30%", PolicyError, "kernel=4"),
        ("pyramidkv", {"beta": 0.5}, "30%", PolicyError, "0.5"),
        ("h2o", {"recent": 1.5}, "30%", PolicyError, "1.5"),
        ("streaming-tokens", {"sink_tokens": -1}, "30%", PolicyError, "-1"),
        ("scalekv", {"drafters": "7"}, "30%", PolicyError, "drafters='7'"),
        ("adakv", {"alpha": 2.0}, "30%", PolicyError, "alpha of"),
        ("adakv", {"base": "adakv"}, "30%", PolicyError, "share already"),
        ("adakv", {"base": "heatkv"}, "30%", PolicyError, "no dynamic policy"),
        ("adakv", {"base": "snapkv:window"}, "30%", PolicyError, "snapkv:window"),
        ("per-layer", {"weights": "0,1"}, "30%", PolicyError, "weights='0,1'"),
        ("protected", {"scales": "9"}, "30%", PolicyError, "scales='9'"),
        ("protected", {"base": "snapkv", "scales": "2"}, "12%", BudgetError, "108 token-heads.* room for 74"),
        ("snapkv", {}, "0.5%", BudgetError, "0.5% is 3 token-heads"),
    ],
)
def test_options_that_cannot_be(
    name: str, options: dict[str, Any], budget: str, error: type[Exception], phrase: str
) -> None:
    with pytest.raises(error, match=phrase):
        make_policy(name, **options).plan(problem(budget))


def test_missing_statistics() -> None:
    bare = replace(STATISTICS, concentration_sum=None, similarity_sum=None)
    for policy in (ScaleKV(), HackLike(), AmsKvLike(), AdaKV(base="hack-like")):
        with pytest.raises(PolicyError, match="needs statistics"):
            policy.plan(problem("30%", statistics=None))
    for policy in (HackLike(), AmsKvLike()):
        with pytest.raises(StatisticsError, match="calibrate again"):
            policy.plan(problem("30%", statistics=bare))
