"""Plans for several ranks: who gets which heads, budgets of every rank, values and bounds, files."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from strategies import SEEDS, level_live_table, schedules, shares
from test_selecting_cache import POLICIES

from heatkv.core.budget import Budget
from heatkv.core.capacity_plan import CapacityPlan
from heatkv.core.geometry import CacheGeometry
from heatkv.core.plan import CachePlan, Plan
from heatkv.core.plan_file import load_plan
from heatkv.core.rankings import HeadRankings
from heatkv.core.schedule import ScaleSchedule
from heatkv.errors import BudgetError, FormatError, HeatKVError, PlanError, PolicyError
from heatkv.head_assignment import balanced_heads, contiguous_heads, part_needed
from heatkv.policies.base import EvictionPolicy, PlanningProblem, make_policy
from heatkv.policies.composition import AdaKV, PerLayer
from heatkv.policies.hack_like import HackLike
from heatkv.policies.heatkv import HeatKV, Random
from heatkv.policies.levels import HeatKVLevels
from heatkv.policies.lp import HeatKVLP
from heatkv.policies.ranked import plan_ranks
from heatkv.policies.scalekv import ScaleKV
from heatkv.policies.snapkv import SnapKV
from heatkv.ranked_plan import RankedPlan, load_either
from heatkv.registry import registered_policies
from heatkv.testing.contract import made_up_statistics

IntArray = NDArray[np.int64]

GEOMETRY = CacheGeometry(3, 6, 8, ScaleSchedule.square((1, 2, 3, 4, 5, 6)))
STATISTICS = made_up_statistics(GEOMETRY, 4)
SMALL = CacheGeometry(2, 4, 8, ScaleSchedule.square((1, 2, 3, 4, 5)))
"""For what takes long to solve; its two sink scales are a sixth of it."""
SPLITS = ("balanced", "contiguous")


def problem(budget: str = "40%", **more: Any) -> PlanningProblem:
    given = {"statistics": STATISTICS, "model": "tiny", "seed": 5, **more}
    return PlanningProblem(GEOMETRY, Budget.parse(budget), **given)


def small(budget: str) -> PlanningProblem:
    return PlanningProblem(SMALL, Budget.parse(budget), made_up_statistics(SMALL, 4), model="tiny", seed=5)


def live_oracle(plan: CachePlan) -> int:
    """The most that a plan holds at any checkpoint, by the formulas of either kind."""
    if isinstance(plan, Plan):
        return max(map(max, level_live_table(plan)))
    assert isinstance(plan, CapacityPlan)
    capacity = np.concatenate([plan.capacity, np.zeros_like(plan.capacity[..., :1])], axis=2).sum(axis=1).tolist()
    return max(
        sum(of_layer[target + (at <= layer)] for at, of_layer in enumerate(capacity))
        for target in range(len(plan.schedule))
        for layer in range(len(capacity))
    )


def unevenness(held_LHT: IntArray, heads_RLH: IntArray) -> float:
    """What `balanced_heads` makes small: weighted squares of what ranks hold beside an equal part, by plain loops."""
    layers, _, scales = held_LHT.shape
    ranks = len(heads_RLH)
    table: dict[tuple[int, int, int], int] = {}
    for target, layer, rank in itertools.product(range(scales), range(layers), range(ranks)):
        readers = [min(target + (at <= layer), scales) for at in range(layers)]
        table[target, layer, rank] = sum(
            int(held_LHT[at, head, readers[at]])
            for at in range(layers)
            for head in heads_RLH[rank, at]
            if readers[at] < scales
        )
    checkpoints = list(itertools.product(range(scales), range(layers)))
    whole = {at: sum(table[(*at, rank)] for rank in range(ranks)) for at in checkpoints}
    most = max(whole.values())
    return sum(
        (whole[at] / most) ** 4 * (table[(*at, rank)] - whole[at] / ranks) ** 2
        for at in checkpoints
        for rank in range(ranks)
    )


# --------------------------------------------------------------------------------------------- who gets what


@given(layers=st.integers(1, 4), each=st.integers(1, 3), ranks=st.integers(1, 4), scales=st.integers(2, 6), seed=SEEDS)
def test_every_head_has_one_rank(layers: int, each: int, ranks: int, scales: int, seed: int) -> None:
    heads = each * ranks
    held = np.random.default_rng(seed).integers(0, 50, (layers, heads, scales))
    for split in (balanced_heads(held, ranks), contiguous_heads(layers, heads, ranks)):
        assert split.shape == (ranks, layers, each)
        assert (np.diff(split, axis=2) > 0).all()
        for layer in range(layers):
            assert sorted(split[:, layer].ravel().tolist()) == list(range(heads))


@settings(max_examples=40)
@given(seed=SEEDS, scales=st.integers(2, 5), layers=st.integers(1, 2))
def test_no_swap_makes_a_balanced_split_more_even(seed: int, scales: int, layers: int) -> None:
    held = np.random.default_rng(seed).integers(0, 30, (layers, 6, scales))
    held[:, :, 0] = 0
    held[0, 0, 1] = 30  # so that something is held
    split = balanced_heads(held, 3)
    least = unevenness(held, split)
    for layer, (one, other), a, b in itertools.product(
        range(layers), itertools.combinations(range(3), 2), range(2), range(2)
    ):
        swapped = split.copy()
        swapped[one, layer, a], swapped[other, layer, b] = split[other, layer, b], split[one, layer, a]
        assert unevenness(held, swapped) >= least - 1e-6 * (1 + least)


def test_heads_of_equal_appetite_are_spread() -> None:
    held = np.zeros((3, 4, 4), dtype=np.int64)
    held[:, :2, 1:] = 9  # in every layer the first two heads hold all there is
    assert part_needed(held, contiguous_heads(3, 4, 2)) == 2
    split = balanced_heads(held, 2)
    assert part_needed(held, split) == 1
    assert all((split[rank, layer] < 2).sum() == 1 for rank in range(2) for layer in range(3))


@pytest.mark.parametrize("ranks", [0, 4, 7, -2, 2.0, True, None])
def test_ranks_that_do_not_divide_the_heads_are_told_those_that_do(ranks: Any) -> None:
    with pytest.raises(PlanError, match=r"6 heads cannot be split evenly over .* ranks; take one of 1, 2, 3, 6"):
        plan_ranks(HeatKV(), problem(), ranks)


# --------------------------------------------------------------------------------- a part of what was measured


@pytest.mark.parametrize("rank", range(2))
def test_a_rank_plans_from_the_figures_of_its_heads(rank: int) -> None:
    heads = balanced_heads(np.random.default_rng(0).integers(0, 9, (3, 6, 6)), 2)[rank]
    part = STATISTICS.of_heads(heads)
    for layer, head in itertools.product(range(3), range(3)):
        whole = int(heads[layer, head])
        for name in ("mass_sum", "mass_square_sum", "all_mass_sum", "error_sum", "concentration_sum"):
            assert np.array_equal(getattr(part, name)[layer, head], getattr(STATISTICS, name)[layer, whole])
        mine, theirs = part.levels, STATISTICS.levels
        assert mine is not None
        assert theirs is not None
        assert np.array_equal(mine.log_bias[layer, head], theirs.log_bias[layer, whole])
        assert np.array_equal(mine.single_sum[layer, head], theirs.single_sum[layer, whole])
        for own, all_heads in zip(mine.joint_sum, theirs.joint_sum, strict=True):
            assert np.array_equal(own[layer, head], all_heads[layer, whole])
    assert np.array_equal(part.similarity, STATISTICS.similarity)
    assert part.provenance == STATISTICS.provenance


@given(seed=SEEDS)
def test_rankings_of_some_heads_keep_their_order(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rankings = HeadRankings.random(GEOMETRY, seed)
    heads = np.stack([rng.permutation(6)[:2] for _ in range(3)])
    part = rankings.of_heads(heads)
    for whole, own in zip(rankings.order.tolist(), part.order.tolist(), strict=True):
        named = [(pair // 6, pair % 6) for pair in whole if pair % 6 in heads[pair // 6].tolist()]
        assert [(pair // 2, int(heads[pair // 2, pair % 2])) for pair in own] == named


def test_orders_and_their_statistics_give_one_plan() -> None:
    by_orders = problem(statistics=None, rankings=HeadRankings.from_scores(STATISTICS.scas))
    split = plan_ranks(HeatKV(), by_orders, 2)
    assert [plan.to_json() for plan in split.plans] == [
        plan.to_json() for plan in plan_ranks(HeatKV(), problem(), 2).plans
    ]


# -------------------------------------------------------------------------------------------------- budgets


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("name", registered_policies())
def test_every_policy_plans_every_rank_within_its_budget(name: str, ranks: int, split: Any) -> None:
    policy = make_policy(name)
    asked = small("100%" if name == "full" else "50%")
    ranked = plan_ranks(policy, asked, ranks, split)
    most = math.floor(asked.share * SMALL.full_token_heads / ranks)
    for plan in ranked.plans:
        assert plan.geometry == dataclasses.replace(SMALL, heads=4 // ranks)
        assert plan.budget_token_heads == most
        assert live_oracle(plan) == plan.peak_token_heads <= most
    assert ranked.budget_token_heads == asked.budget_token_heads
    assert RankedPlan.from_json(json.loads(json.dumps(ranked.to_json()))) == ranked


@pytest.mark.parametrize("name", ["heatkv", "random", "streaming", "heatkv-lp", "heatkv-mr", "snapkv", "pyramidkv"])
@settings(max_examples=12)
@given(
    schedule=schedules(min_scales=4),
    layers=st.integers(1, 3),
    each=st.integers(1, 3),
    ranks=st.integers(1, 3),
    share=shares(),
    seed=SEEDS,
    split=st.sampled_from(SPLITS),
)
def test_no_rank_exceeds_its_budget_at_any_checkpoint(
    name: str, schedule: ScaleSchedule, layers: int, each: int, ranks: int, share: Fraction, seed: int, split: Any
) -> None:
    geometry = CacheGeometry(layers, each * ranks, 4, schedule)
    policy = make_policy(name, **({} if name in ("snapkv", "pyramidkv") else {"sink_scales": 2}))
    asked = PlanningProblem(geometry, Budget("share", share), made_up_statistics(geometry, seed % 100), seed=seed)
    try:
        ranked = plan_ranks(policy, asked, ranks, split)
    except (BudgetError, PolicyError):
        with pytest.raises((BudgetError, PolicyError)):  # one rank's part is too small, as is that of one head
            policy.plan(asked.of_heads(contiguous_heads(layers, each * ranks, ranks)[0], seed))
        return
    most = math.floor(share * geometry.full_token_heads / ranks)
    for plan in ranked.plans:
        assert live_oracle(plan) <= plan.budget_token_heads == most
    whole = ranked.whole()
    assert live_oracle(whole) <= math.floor(share * geometry.full_token_heads)
    for rank, heads_LH in enumerate(ranked.heads):
        for layer, of_layer in enumerate(heads_LH):
            assert np.array_equal(whole.held[layer, of_layer], ranked.plans[rank].held[layer])


def test_budgets_in_bytes_are_divided() -> None:
    asked = problem("18000B", rows=2, storage="int8/float32")
    ranked = plan_ranks(HeatKV(sink_scales=2), asked, 3)
    for plan in ranked.plans:
        assert plan.bytes(2, "int8/float32") <= 6000
        assert plan.settings["budget"] == "6000B"
    assert ranked.whole().settings["budget"] == "18000B"
    share = plan_ranks(HeatKV(sink_scales=2), problem("40%"), 3)
    assert {plan.settings["budget"] for plan in (*share.plans, share.whole())} == {"40%"}


def test_caps_of_layers_in_bytes_are_divided_too() -> None:
    def caps(text: str) -> list[Any]:
        policy = HeatKVLP(value="error", layer_cap=text)
        return [plan.settings["layer_cap"] for plan in plan_ranks(policy, problem("60%"), 2).plans]

    assert caps("8000B") == ["4000B", "4000B"]
    assert caps("70%") == ["70%", "70%"]


# ---------------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize("policy", [HeatKVLP(value="error"), HeatKVLP(value="mass", solver="greedy")])
@settings(max_examples=5)
@given(seed=SEEDS, share=st.fractions(Fraction(1, 4), 1, max_denominator=20), ranks=st.sampled_from([2, 3, 6]))
def test_balanced_is_worth_no_less_than_contiguous(policy: HeatKVLP, seed: int, share: Fraction, ranks: int) -> None:
    statistics = made_up_statistics(GEOMETRY, seed).with_levels(None)
    # some heads want much and others little, unevenly over contiguous halves
    appetite = np.random.default_rng(seed).lognormal(0, 2, (3, 6, 1, 1))
    sums = {name: getattr(statistics, name) * appetite for name in ("error_sum",)}
    asked = PlanningProblem(GEOMETRY, Budget("share", share), dataclasses.replace(statistics, **sums))
    balanced, contiguous = (plan_ranks(policy, asked, ranks, split) for split in ("balanced", "contiguous"))
    check_certificates(balanced, policy, asked)
    assert balanced.value is not None
    assert contiguous.value is not None
    assert balanced.value >= contiguous.value
    assert contiguous.contiguous


def check_certificates(ranked: RankedPlan, policy: EvictionPolicy, asked: PlanningProblem) -> None:
    """Values and bounds add up, and none is beyond the bound of one device."""
    unsplit = policy.plan(asked)
    assert isinstance(unsplit, Plan)
    assert (ranked.unsplit_value, ranked.unsplit_bound) == (unsplit.value, unsplit.value_bound)
    for name in ("value", "value_bound"):
        assert getattr(ranked, name) == pytest.approx(sum(getattr(plan, name) for plan in ranked.plans))
    whole = ranked.whole()
    assert isinstance(whole, Plan)
    assert whole.value == ranked.value
    assert whole.value_bound == unsplit.value_bound
    assert ranked.value is not None
    assert ranked.value_bound is not None
    assert unsplit.value_bound is not None
    assert ranked.value <= unsplit.value_bound + 1e-9 * abs(unsplit.value_bound)
    of = abs(ranked.value) if ranked.value < 0 else abs(unsplit.value_bound)
    assert ranked.any_split_gap == pytest.approx((unsplit.value_bound - ranked.value) / of if of else 0)
    of = abs(ranked.value) if ranked.value < 0 else ranked.value_bound
    assert ranked.gap == pytest.approx((ranked.value_bound - ranked.value) / of if of else 0, abs=1e-12)


@pytest.mark.parametrize("policy", [HeatKVLevels(), HeatKVLP()])
def test_costs_of_ranks_add_up(policy: EvictionPolicy) -> None:
    asked = small("40%")
    balanced, contiguous = (plan_ranks(policy, asked, 2, split) for split in ("balanced", "contiguous"))
    check_certificates(balanced, policy, asked)
    assert balanced.value is not None
    assert contiguous.value is not None
    assert balanced.value >= contiguous.value


def test_the_value_of_the_whole_plan_is_the_sum() -> None:
    """Worked out from the statistics, cell by cell."""
    ranked = plan_ranks(HeatKVLP(value="error"), problem("40%"), 3)
    whole = ranked.whole()
    assert isinstance(whole, Plan)
    error = STATISTICS.drop_error
    worth = sum(
        float(error[layer, head, target, source])
        for layer, head, source in itertools.product(range(3), range(6), range(6))
        for target in range(source + 1, int(whole.last_read[layer, head, source]) + 1)
    )
    assert worth == pytest.approx(ranked.value)


def test_foretold_kl_adds_up() -> None:
    asked = dataclasses.replace(small("40%"), statistics=made_up_statistics(SMALL, 4, cost="fisher"))
    ranked = plan_ranks(HeatKVLevels(cost="fisher"), asked, 2)
    told = [plan.predicted_kl for plan in ranked.plans]
    assert None not in told
    assert ranked.whole().predicted_kl == pytest.approx(sum(told))  # type: ignore[arg-type]


@settings(max_examples=25)
@given(seed=SEEDS, ranks=st.sampled_from([2, 3, 6]))
def test_without_values_the_fullest_rank_is_no_fuller_than_contiguous(seed: int, ranks: int) -> None:
    asked = problem("40%", statistics=made_up_statistics(GEOMETRY, seed))
    held = HeatKV().plan(asked).held
    ranked = plan_ranks(HeatKV(), asked, ranks)
    assert part_needed(held, ranked.heads) <= part_needed(held, contiguous_heads(3, 6, ranks))


# ------------------------------------------------------------------------------------------ one rank, one head


@pytest.mark.parametrize("name", registered_policies())
def test_one_rank_has_the_plain_plan(name: str) -> None:
    policy = make_policy(name)
    asked = small("100%" if name == "full" else "50%")
    ranked = plan_ranks(policy, asked, 1)
    assert ranked.plans == (policy.plan(asked),)
    assert ranked.contiguous


def test_as_many_ranks_as_heads() -> None:
    ranked = plan_ranks(HeatKVLevels(), small("40%"), 4)
    assert ranked.heads.shape == (4, 2, 1)
    assert ranked.geometry == SMALL


# ------------------------------------------------------------------------- what is decided over several heads


def test_kinds_of_layers_are_those_of_the_whole_model() -> None:
    for policy in (ScaleKV(), AdaKV(base="scalekv")):
        (told,) = {json.dumps(plan.settings["base" if "base" in plan.settings else "drafters"])
                   for plan in plan_ranks(policy, problem("30%"), 3).plans}  # fmt: skip
        unsplit = policy.plan(problem("30%")).settings
        assert told == json.dumps(unsplit["base" if "base" in unsplit else "drafters"])


@pytest.mark.parametrize("wrapped", [False, True])
def test_kinds_of_heads_go_with_their_heads(wrapped: bool) -> None:
    whole = HackLike().plan(problem("40%")).settings["contextual"]
    policy = PerLayer(base=f"hack-like:contextual={whole}") if wrapped else HackLike()
    ranked = plan_ranks(policy, problem("40%"), 2)
    found = []
    for heads_LH, plan in zip(ranked.heads, ranked.plans, strict=True):
        told = plan.settings["base"].split("contextual=")[1] if wrapped else plan.settings["contextual"]
        own = json.loads(told.replace("(", "[").replace(",)", "]").replace(")", "]")) if wrapped else told
        found += [pair // 3 * 6 + int(heads_LH[pair // 3, pair % 3]) for pair in own]
    assert sorted(found) == whole
    with pytest.raises(PlanError, match=r"every rank has its own (contextual|base); run it on 2 ranks \(torchrun"):
        ranked.whole()


def test_heads_that_share_do_so_within_their_rank() -> None:
    ranked = plan_ranks(AdaKV(base="snapkv"), problem("40%"), 2)
    assert all(isinstance(plan, CapacityPlan) and plan.shared for plan in ranked.plans)
    with pytest.raises(PlanError, match="on each of the 2 ranks for themselves"):
        ranked.whole()


def test_ranks_draw_rankings_of_their_own() -> None:
    ranked = plan_ranks(Random(), problem(), 3, "contiguous")
    assert [plan.settings["seed"] for plan in ranked.plans] == [15, 16, 17]
    assert ranked.plans[0].held.tobytes() != ranked.plans[1].held.tobytes()
    assert ranked.whole().settings["seed"] == [15, 16, 17]


@pytest.mark.parametrize(
    ("policy", "budget", "split", "says"),
    [
        (HeatKVLP(ranks=2), "40%", "balanced", "ranks=2 splits the heads within one plan"),
        (HeatKVLevels(cost="fisher", max_kl=0.1), "auto", "balanced", "solve without ranks first"),
        (HeatKV(), "40%", "even", "split='even' is unknown; known: balanced, contiguous"),
        (HeatKV(), "5%", "balanced", "sink scales"),
        (SnapKV(), "1%", "balanced", "fewer than one"),
    ],
)
def test_what_cannot_be_split_is_refused(policy: EvictionPolicy, budget: str, split: Any, says: str) -> None:
    with pytest.raises(HeatKVError, match=says):
        plan_ranks(policy, problem(budget), 2, split)


@dataclass(frozen=True)
class FewestHeads(HeatKV):
    """HeatKV's rule, but not for the first heads of the model, or not for any part of them."""

    fails: str = "any"

    def of_heads(self, heads_LH: IntArray, heads: int) -> FewestHeads:
        broken = self.fails == "any" or (heads_LH == np.arange(heads_LH.shape[1])).all()
        return dataclasses.replace(self, fails="here" if broken else "not here")

    def last_read(self, problem: PlanningProblem) -> IntArray:
        if self.fails == "here":
            raise BudgetError("nothing fits")
        return super().last_read(problem)


def test_a_rank_that_has_no_plan_is_named() -> None:
    with pytest.raises(BudgetError, match=r"^rank 0 of 2: nothing fits"):
        plan_ranks(FewestHeads(), problem(), 2)


def test_a_split_that_has_no_plan_gives_way_to_one_that_has() -> None:
    assert not plan_ranks(FewestHeads(fails="contiguous"), problem(), 2).contiguous
    with pytest.raises(BudgetError, match=r"^rank 0 of 2: nothing fits"):
        plan_ranks(FewestHeads(fails="contiguous"), problem(), 2, "contiguous")


# ---------------------------------------------------------------------------------------------------- files


@pytest.fixture(scope="module")
def ranked() -> RankedPlan:
    return plan_ranks(HeatKVLevels(), small("40%"), 2)


def test_a_file_gives_the_same_plan_again(ranked: RankedPlan, tmp_path: Path) -> None:
    path = tmp_path / "ranked.json"
    ranked.save(path)
    assert RankedPlan.load(path) == load_either(path) == ranked
    ranked.whole().save(tmp_path / "whole.json")
    assert load_either(tmp_path / "whole.json") == ranked.whole()
    with pytest.raises(FormatError, match=r"ranked.json holds a plan for each of several ranks"):
        load_plan(path)


Edit = Callable[[dict[str, Any]], object]


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (lambda d: d.update(version=2), "version 2"),
        (lambda d: d.update(ranks=3), "'ranks' is 3, but 'plans' has 2 entries"),
        (lambda d: d.update(ranks="2"), "'ranks' is '2'"),
        (lambda d: d.update(ranks=0, plans=[]), "holds no plan"),
        (lambda d: d.update(plans={}), "'plans' is {}"),
        (lambda d: d["plans"].__setitem__(1, 7), "plan of rank 1 holds no JSON object"),
        (lambda d: d["plans"].__setitem__(1, d), "plan of rank 1 holds a plan for each of several ranks"),
        (lambda d: d["plans"][1].update(policy="heatkv"), "policy of rank 1 is 'heatkv', that of rank 0 'heatkv-mr'"),
        (lambda d: d["plans"][1].update(model="other"), "model of rank 1"),
        (lambda d: d["plans"][1].update(peak_token_heads=3), "plan of rank 1: peak_token_heads says 3"),
        (lambda d: d["plans"][1].update(sink_scales=1), "sink_scales of rank 1 is 1"),
        (lambda d: d["plans"][1].update(head_dim=4), "geometry of rank 1"),
        (lambda d: d.pop("heads"), "'heads'"),
        (lambda d: d["heads"][0][0].__setitem__(0, 1.0), "'heads' must be"),
        (lambda d: d["heads"][0][0].__setitem__(0, 4), "heads of layer 0 are"),
        (lambda d: d["heads"][1][1].__setitem__(0, d["heads"][0][1][0]), "heads of layer 1 are"),
        (lambda d: d.update(heads=d["heads"][:1]), "heads is int64 of shape"),
        (lambda d: d.update(budget_token_heads=10**9), "budget_token_heads is 1000000000"),
        (lambda d: d.update(unsplit_bound=-1e9), "more than -1000000000.0, the bound of the whole cache"),
        (lambda d: d.update(unsplit_value="high"), "'unsplit_value' is 'high'"),
    ],
)
def test_a_file_that_does_not_fit_together_is_refused(ranked: RankedPlan, edit: Edit, says: str) -> None:
    data = json.loads(json.dumps(ranked.to_json()))
    edit(data)
    with pytest.raises((FormatError, PlanError), match=f"^edited.json(:| ).*{says}"):
        RankedPlan.from_json(data, "edited.json")


def test_it_knows_the_model_that_it_is_for(ranked: RankedPlan) -> None:
    ranked.check_geometry(SMALL)
    with pytest.raises(PlanError, match="4 heads over 2 ranks, the model has 6"):
        ranked.check_geometry(dataclasses.replace(SMALL, heads=6))
    with pytest.raises(PlanError, match="the plan is for 2 layers"):
        ranked.check_geometry(dataclasses.replace(SMALL, layers=3))


def test_a_dynamic_plan_of_all_ranks() -> None:
    for name in ("snapkv", "h2o", "scalekv-fixed"):
        ranked = plan_ranks(POLICIES[name] if name == "snapkv" else make_policy(name), problem("40%"), 3)
        whole = ranked.whole()
        assert isinstance(whole, CapacityPlan)
        assert whole.peak_token_heads == sum(plan.peak_token_heads for plan in ranked.plans)
