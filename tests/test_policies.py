"""HeatKV's rule and windows against a reading of their texts, options, and finding policies of plug-ins."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import math
import re
import sys
import types
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from strategies import SEEDS, geometries, live_by_formula, live_table, shares, statistics_of

import heatkv.policies
from heatkv import registry
from heatkv.core.budget import Budget
from heatkv.core.geometry import CacheGeometry
from heatkv.core.rankings import HeadRankings
from heatkv.core.schedule import ScaleSchedule
from heatkv.core.schema import IntArray
from heatkv.errors import BudgetError, HeatKVError, PlanError, PolicyError, StatisticsError
from heatkv.policies.base import EvictionPolicy, PlanningProblem, StaticPolicy, make_policy
from heatkv.policies.composition import AdaKV, PerLayer, Protected, policy_text, read_policy
from heatkv.policies.h2o import H2O
from heatkv.policies.hack_like import HackLike
from heatkv.policies.heatkv import HeatKV, Random
from heatkv.policies.snapkv import SnapKV
from heatkv.policies.windows import Full, SlidingWindow, Streaming
from heatkv.testing.material import made_up_mass, made_up_problem

POLICIES = registry.registered_policies()

SQUARE = ScaleSchedule.square((1, 2, 3, 4, 5, 6))  # N = 55; three sink scales are 14 tokens


def problem_of(
    geometry: CacheGeometry, share: Fraction, seed: int = 0, sink_scales: int = 2, **changes: Any
) -> PlanningProblem:
    """A problem with everything that any policy may need, level costs for so many sink scales."""
    statistics = statistics_of(geometry, made_up_mass(geometry, 2, seed), sink_scales=sink_scales)
    fields: dict[str, Any] = {"statistics": statistics, "seed": seed, "model": "tiny", **changes}
    return PlanningProblem(geometry, Budget("share", share), **fields)


# ---------------------------------------------------------------------- what is refused, and units of the budget


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("snapkv", {"window": 0}, "window of policy 'snapkv' is a whole number at least 1, not 0"),
        ("snapkv", {"width": 3}, "no option 'width'; did you mean 'window'?"),
        ("heatvk", {}, "did you mean 'heatkv'?"),
        ("pyramidkv", {"beta": math.nan}, "not nan"), ("pyramidkv", {"beta": math.inf}, "not inf"),
        ("streaming-tokens", {"sink_tokens": -1}, "not -1"), ("snapkv", {"window": True}, "not True"),
        ("h2o", {"mean_per_scale": 3}, "true or false, not 3"), ("h2o", {"recent": 1.5}, "not 1.5"),
        ("hack-like", {"contextual_share": 1.0}, "not 1.0"), ("hack-like", {"contextual": ["a"]}, "not ['a']"),
        ("heatkv-lp", {"value": "all"}, "joint or error or mass, not 'all'"),
        ("heatkv-mr", {"max_kl": 0.0}, "not 0.0"), ("heatkv", {"sink_scales": "2"}, "not '2'"),
        ("adakv", {"base": 3}, "not 3"),
    ],
)  # fmt: skip
def test_options_of_a_wrong_type_or_range(name: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(PolicyError, match=re.escape(said)):
        make_policy(name, **options)


@pytest.mark.parametrize(
    ("policy", "value"),
    [
        (make_policy("streaming", sink_scales=-1), "sink_scales=-1"), (HeatKV(sink_scales=6), "sink_scales=6"),
        (SnapKV(kernel=4), "kernel=4"), (make_policy("ams-kv-like", condensed=6), "condensed=6"),
        (HackLike(sinks=6), "sinks=6"), (HackLike(contextual=[1]), "contextual=(1,)"),
        (make_policy("scalekv", drafters="0,x"), "'0,x'"), (make_policy("scalekv", drafters="1"), "'1'"),
        (AdaKV(base="adakv"), "base='adakv'"), (AdaKV(base="snapkv:window"), "base='snapkv:window'"),
        (AdaKV(base="heatkv"), "base='heatkv'"), (AdaKV(base="hack-like:contextual=[0"), "'[0'"),
        (PerLayer(weights="1,x"), "weights='1,x'"), (PerLayer(weights="1,0"), "weights='1,0'"),
        (Protected(scales="-1"), "scales='-1'"), (Protected(scales="5"), "scales='5'"),
        (make_policy("heatkv-lp", solver="greedy"), "solver=greedy"),
    ],
)  # fmt: skip
def test_options_that_do_not_fit_the_problem(policy: EvictionPolicy, value: str) -> None:
    with pytest.raises(PolicyError, match=re.escape(value)):
        policy.plan(problem_of(CacheGeometry(1, 1, 4, SQUARE), Fraction(1), sink_scales=0))


@pytest.mark.parametrize("name", [name for name, known in POLICIES.items() if known.policy().needs])
def test_missing_statistics(name: str) -> None:
    with pytest.raises(PolicyError, match=rf"policy '{name}' needs .*statistics|level costs"):
        make_policy(name).plan(problem_of(CacheGeometry(1, 1, 4, SQUARE), Fraction(1, 2), statistics=None))


def test_budget_below_the_sinks() -> None:
    geometry = CacheGeometry(32, 16, 128, ScaleSchedule.infinity("1M", 1.0))
    problem = PlanningProblem(geometry, Budget.parse("0.2%"), rankings=HeadRankings.random(geometry, 0))
    for name in ("heatkv", "random", "streaming"):
        with pytest.raises(BudgetError, match=re.escape("0.002 (0.2%) is below 21/6425 = 0.33%, the 3 sink scales")):
            make_policy(name).plan(problem)
        make_policy(name, sink_scales=2).plan(problem)  # room for 12.85 tokens: two sink scales are 5


def test_statistics_of_another_model() -> None:
    geometry, other = CacheGeometry(2, 2, 4, SQUARE), CacheGeometry(2, 3, 4, SQUARE)
    with pytest.raises(StatisticsError, match="2 layers x 3 heads"):
        problem_of(geometry, Fraction(1, 2), statistics=statistics_of(other, made_up_mass(other, 1, 0)))
    with pytest.raises(StatisticsError, match="rankings are of 2 layers x 3 heads, the model has 2 x 2"):
        problem_of(geometry, Fraction(1, 2), rankings=HeadRankings.random(other, 0))


def test_budget_in_bytes_with_rows_and_storage() -> None:
    geometry = CacheGeometry(2, 2, 4, SQUARE)  # full: 220 token-heads of 4 * 4 bytes a row in bfloat16
    budget = Budget.parse("3520B")
    for rows, storage, held in ((1, "bfloat16", 220), (2, "bfloat16", 110), (2, "float32", 55)):
        problem = PlanningProblem(geometry, budget, rows=rows, storage=storage)
        plan = SlidingWindow().plan(problem)
        assert plan.budget_token_heads == held
        assert plan.budget == held / 220
        assert plan.bytes(rows, storage) <= 3520


@pytest.mark.parametrize("name", heatkv.policies.__all__)
def test_names_for_authors(name: str) -> None:
    assert getattr(heatkv.policies, name).__name__ == name


# ---------------------------------------------------------------------- composition


@pytest.mark.parametrize(
    ("text", "policy"),
    [
        ("h2o:mean_per_scale=false:recent=0.25", H2O(recent=0.25, mean_per_scale=False)),
        ("per-layer:weights=3,1", PerLayer(weights="3,1")),
        ("hack-like:contextual=(0, 3)", HackLike(contextual=[0, 3])),
        ("hack-like:contextual=None", HackLike()),
        ("streaming-tokens:sink_tokens=none", make_policy("streaming-tokens")),
        ("adakv:base=h2o", AdaKV(base="h2o")),
        ("adakv:base=[h2o:recent=0.25]:alpha=0.5", AdaKV(base="h2o:recent=0.25", alpha=0.5)),
        ("protected:base=[adakv:base=[h2o:recent=0.25]]:scales=1",
         Protected(base="adakv:base=[h2o:recent=0.25]", scales="1")),
    ],
)  # fmt: skip
def test_texts_of_policies(text: str, policy: Any) -> None:
    assert read_policy(text) == policy
    assert read_policy(policy_text(policy)) == policy


def test_composition_of_objects() -> None:
    problem = made_up_problem(AdaKV(), CacheGeometry(2, 2, 4, SQUARE), Fraction(1, 3))
    plan = AdaKV(base=SnapKV(window=4)).plan(problem)
    assert plan.settings["base"] == "snapkv:window=4:kernel=5"
    assert plan == AdaKV(base="snapkv:window=4:kernel=5").plan(problem)
    plan = PerLayer(base=AdaKV(base=HackLike(sinks=1))).plan(problem)
    assert re.fullmatch(
        r"adakv:base=\[hack-like:contextual_share=0.5:contextual_capacity=0.5:sinks=1:contextual=\(.*\)\]:alpha=0.2",
        plan.settings["base"],
    )
    assert AdaKV(base=HackLike()).needs == {"statistics"}
    assert AdaKV(base=HackLike(contextual=[0])).needs == set()


# ---------------------------------------------------------------------- HeatKV's rule

Pair = tuple[int, int]


def early_drops(
    last_read: list[list[list[int]]], tokens: tuple[int, ...], most: Fraction, rank: Callable[[int, int, int], int]
) -> None:
    """Checkpoint by checkpoint: while one exceeds the budget, the next decided drop of a later layer is made early."""
    layers = len(last_read)
    for t in range(len(tokens)):
        for l in range(layers):
            while live_by_formula(last_read, tokens, t, l) > most:
                decided = [
                    (-later, -s, rank(later, h, s), h)
                    for later in range(l + 1, layers)
                    for h, cells in enumerate(last_read[later])
                    for s in range(t)
                    if cells[s] == t
                ]
                later, s, _, h = min(decided)
                last_read[-later][h][-s] = t - 1


def rule_by_the_text(
    orders: list[list[Pair]], geometry: CacheGeometry, b: Fraction, sink_scales: int
) -> list[list[list[int]]]:
    """HeatKV's rule as the paper words it, with one set of dropped cells per target.

    `orders[s]` ranks the (layer, head) pairs of source scale s, the one to go first in front.
    """
    tokens, layers, heads = geometry.schedule.tokens, geometry.layers, geometry.heads
    pairs, scales = layers * heads, len(tokens)
    room, p = b * sum(tokens[:-1]), sum(tokens[:sink_scales])
    last_read = [[list(range(scales)) for _ in range(heads)] for _ in range(layers)]
    for l in range(layers):
        for h in range(heads):
            last_read[l][h][scales - 1] = scales - 1
            for s in range(scales - 1):
                gone = False
                for t in range(s + 1, scales):
                    before = sum(tokens[:t])
                    x = 0
                    if before > max(p, room):
                        x = min(pairs, math.ceil(Fraction(pairs) * (before - room) / (before - p)))
                    gone = gone or (s >= sink_scales and (l, h) in orders[s][:x])
                    if not gone:
                        last_read[l][h][s] = t
    early_drops(last_read, tokens, pairs * room, lambda l, h, s: orders[s].index((l, h)))
    return last_read


@st.composite
def rule_problems(draw: st.DrawFn) -> tuple[list[list[Pair]], CacheGeometry, Fraction, int]:
    geometry = draw(geometries(min_scales=3))
    tokens = geometry.schedule.tokens
    pairs = [(l, h) for l in range(geometry.layers) for h in range(geometry.heads)]
    orders = [draw(st.permutations(pairs)) for _ in range(len(tokens) - 1)]
    sink_scales = draw(st.integers(0, len(tokens) - 1))
    full = sum(tokens[:-1])
    lowest = Fraction(sum(tokens[:sink_scales]), full)
    # the exact boundaries are drawn often: b*N == p, b*N == the tokens before a scale, b = 1
    exact = [Fraction(sum(tokens[:t]), full) for t in range(max(1, sink_scales), len(tokens))]
    share = draw(st.one_of(st.sampled_from(exact), shares(max(lowest, Fraction(1, 200)))))
    return orders, geometry, share, sink_scales


@settings(max_examples=300)
@given(problem=rule_problems())
def test_heatkv_follows_the_text(problem: tuple[list[list[Pair]], CacheGeometry, Fraction, int]) -> None:
    orders, geometry, share, sink_scales = problem
    flat = np.array([[l * geometry.heads + h for l, h in order] for order in orders])
    rankings = HeadRankings(geometry.layers, geometry.heads, 0, flat)
    plan = HeatKV(sink_scales=sink_scales).plan(PlanningProblem(geometry, Budget("share", share), rankings=rankings))
    assert plan.last_read.tolist() == rule_by_the_text(orders, geometry, share, sink_scales)


@settings(max_examples=50)
@given(geometry=geometries(min_scales=4), share=shares(), seed=SEEDS)
def test_heatkv_ranks_by_scas(geometry: CacheGeometry, share: Fraction, seed: int) -> None:
    # coarse scores, so that ties are broken as the paper says: by head, then layer
    rng = np.random.default_rng(seed)
    scales = len(geometry.schedule)
    mass = np.zeros((1, geometry.layers, geometry.heads, scales, scales))
    for t in range(scales):
        mass[0, :, :, t, :t] = rng.integers(0, 3, (geometry.layers, geometry.heads, t)) / 16
        mass[0, :, :, t, t] = 1 - mass[0, :, :, t, :t].sum(axis=2)
    statistics = statistics_of(geometry, mass)
    pairs = [(l, h) for l in range(geometry.layers) for h in range(geometry.heads)]
    orders = [
        sorted(pairs, key=lambda pair: (np.mean(mass[0, *pair, s + 1 :, s]), pair[1], pair[0]))
        for s in range(scales - 1)
    ]
    problem = PlanningProblem(geometry, Budget("share", share), statistics=statistics)
    plan = HeatKV(sink_scales=0).plan(problem)
    assert plan.last_read.tolist() == rule_by_the_text(orders, geometry, share, 0)


def test_given_rankings_go_before_statistics() -> None:
    geometry = CacheGeometry(2, 3, 4, SQUARE)
    rankings = HeadRankings.random(geometry, 1)
    both = HeatKV().plan(problem_of(geometry, Fraction(1, 2), rankings=rankings))
    assert both == HeatKV().plan(problem_of(geometry, Fraction(1, 2), statistics=None, rankings=rankings))
    assert both != HeatKV().plan(problem_of(geometry, Fraction(1, 2)))


def test_rankings_must_cover_what_may_be_dropped() -> None:
    geometry = CacheGeometry(1, 2, 4, SQUARE)
    rankings = HeadRankings(1, 2, 3, np.array([[0, 1], [0, 1]]))  # source scales 3 and 4
    problem = PlanningProblem(geometry, Budget.parse("50%"), rankings=rankings)
    HeatKV().plan(problem)
    with pytest.raises(PolicyError, match="below the 3 first scales, which the rankings leave out; raise it"):
        HeatKV(sink_scales=2).plan(problem)
    too_early = HeadRankings(1, 2, 2, np.array([[0, 1], [0, 1]]))  # none of source scale 4
    with pytest.raises(StatisticsError, match="cover the source scales 2 to 3; 3 to 4 are needed"):
        HeatKV().plan(dataclasses.replace(problem, rankings=too_early))


def test_random_keeps_the_shape_of_the_rule() -> None:
    """Only who is dropped is drawn: for every target and source as many cells are read as by the rule itself."""
    geometry = CacheGeometry(1, 8, 4, SQUARE)  # with one layer no drop is ever early
    for share in (Fraction(3, 10), Fraction(1, 2), Fraction(4, 5)):
        rule = HeatKV().plan(problem_of(geometry, share))
        drawn = Random().plan(problem_of(geometry, share, 3))
        for t in range(1, 6):
            assert (drawn.last_read[:, :, :t] >= t).sum(axis=(0, 1)).tolist() == (
                rule.level_read(t) < len(rule.levels)
            ).sum(axis=(0, 1)).tolist()


# ---------------------------------------------------------------------- windows

WINDOWS = pytest.mark.parametrize("policy", [SlidingWindow(), Streaming(), SlidingWindow(sink_scales=1)], ids=repr)


def window_counts(geometry: CacheGeometry, share: Fraction, sink_scales: int) -> list[list[int]]:
    """counts[t][s]: heads that read source s at target t: complete scales, newest first, then what heads fit."""
    tokens, pairs = geometry.schedule.tokens, geometry.layers * geometry.heads
    most = math.floor(share * sum(tokens[:-1]) * pairs)
    counts = []
    for t in range(len(tokens)):
        room = most - pairs * sum(tokens[: min(sink_scales, t)])
        row = [pairs if s < sink_scales else 0 for s in range(t)]
        for s in reversed(range(sink_scales, t)):
            row[s] = min(pairs, room // tokens[s])
            room -= row[s] * tokens[s]
            if row[s] < pairs:
                break
        counts.append(row)
    return counts


@st.composite
def window_problems(draw: st.DrawFn, policy: EvictionPolicy, layers: int | None = None) -> PlanningProblem:
    geometry = draw(geometries(min_scales=4))
    if layers is not None:
        geometry = dataclasses.replace(geometry, layers=layers)
    tokens = geometry.schedule.tokens
    lowest = Fraction(sum(tokens[: policy.sink_scales]), sum(tokens[:-1]))
    share = draw(st.one_of(st.just(max(lowest, Fraction(1, 200))), shares(max(lowest, Fraction(1, 200)))))
    return PlanningProblem(geometry, Budget("share", share))


@WINDOWS
@given(data=st.data())
def test_windows_hold_the_most_recent_scales(policy: EvictionPolicy, data: st.DataObject) -> None:
    """With one layer every checkpoint is the end of a scale, so nothing is dropped early and the window is exact."""
    problem = data.draw(window_problems(policy, layers=1))
    plan = policy.plan(problem)
    expected = window_counts(problem.geometry, problem.budget.amount, policy.sink_scales)
    for t in range(1, len(plan.schedule)):
        assert (plan.last_read[:, :, :t] >= t).sum(axis=(0, 1)).tolist() == expected[t]


@WINDOWS
@settings(max_examples=150)
@given(data=st.data())
def test_windows_fill_the_budget(policy: EvictionPolicy, data: st.DataObject) -> None:
    """While anything is dropped, less than one cell's room is unused: before the target runs, or at the checkpoint
    within it that forced cells out early. The last of several such targets in a row is tight: what is dropped early
    for one may also have been held during the one before."""
    problem = data.draw(window_problems(policy))
    plan = policy.plan(problem)
    tokens, most = plan.schedule.tokens, problem.budget_token_heads
    live = live_table(plan.last_read.tolist(), tokens)
    allowed = window_counts(problem.geometry, problem.budget.amount, policy.sink_scales)
    counts_of = [(plan.last_read[:, :, :t] >= t).sum(axis=(0, 1)).tolist() for t in range(len(tokens))]
    for t in range(policy.sink_scales + 1, len(tokens)):
        counts = counts_of[t]
        assert all(count <= most_heads for count, most_heads in zip(counts, allowed[t], strict=True))
        if (plan.last_read[:, :, :t] >= t).all():
            continue
        before, within = most - live[t - 1][-1], most - max(live[t])
        if counts == allowed[t]:
            # the newest scale that is not complete had no room for one more head
            partial = max(s for s in range(t) if counts[s] < plan.geometry.layers * plan.geometry.heads)
            assert before < tokens[partial]
        elif counts_of[t + 1 : t + 2] == allowed[t + 1 : t + 2]:
            early = max(tokens[s] for s in range(t) if counts[s] < allowed[t][s])
            assert within < early


def test_a_window_by_hand() -> None:
    """Two heads of 30 tokens each: the last target has room for scale 4 (25), not for the 16 of scale 3 beside it."""
    plan = SlidingWindow().plan(PlanningProblem(CacheGeometry(1, 2, 4, SQUARE), Budget.parse("30tokens")))
    assert plan.budget_token_heads == 60
    # targets 1 to 4 have 1, 5, 14, 30 tokens before them: all fit; target 5 reads scale 4 in both heads
    assert plan.last_read.tolist() == [[[4, 4, 4, 4, 5, 5]] * 2]
    plan = Streaming().plan(PlanningProblem(CacheGeometry(1, 2, 4, SQUARE), Budget.parse("30tokens")))
    assert plan.last_read.tolist() == [[[5, 5, 5, 4, 5, 5], [5, 5, 5, 4, 4, 5]]]


@given(geometry=geometries(min_scales=4), share=shares())
@example(geometry=CacheGeometry(2, 2, 4, SQUARE), share=Fraction(1))
def test_streaming_without_sinks_is_the_sliding_window(geometry: CacheGeometry, share: Fraction) -> None:
    problem = PlanningProblem(geometry, Budget("share", share))
    streaming = Streaming(sink_scales=0).plan(problem)
    assert np.array_equal(streaming.last_read, SlidingWindow().plan(problem).last_read)
    if share == 1:
        assert np.array_equal(streaming.last_read, Full().plan(problem).last_read)


# ---------------------------------------------------------------------- finding policies


@dataclass(frozen=True)
class KeepNothing(StaticPolicy):
    """Only the sink scales are cached."""

    name = "keep-nothing"

    def last_read(self, problem: PlanningProblem) -> IntArray:
        return self.sinks_only(problem)


@pytest.fixture
def plug_ins(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Starts the search for policies anew, as a fresh process with these installed plug-ins would."""

    def install(**loaders: Callable[[], Any]) -> None:
        entries = []
        for name, load in loaders.items():
            module = types.ModuleType(f"plug_in_{name}")
            module.__getattr__ = lambda attribute, load=load: load()  # type: ignore[method-assign]
            monkeypatch.setitem(sys.modules, module.__name__, module)
            entries.append(importlib.metadata.EntryPoint(name, f"{module.__name__}:found", registry.ENTRY_POINT_GROUP))

        def entry_points(**params: Any) -> Iterable[importlib.metadata.EntryPoint]:
            return importlib.metadata.EntryPoints(entries).select(**params)

        monkeypatch.setattr(importlib.metadata, "entry_points", entry_points)
        monkeypatch.setattr(registry, "_registered", dict(POLICIES))
        monkeypatch.setattr(registry, "_broken", {})
        monkeypatch.setattr(registry, "_searched", False)

    return install


def raising(error: BaseException) -> Callable[[], Any]:
    def load() -> Any:
        raise error

    return load


def test_plug_in(plug_ins: Callable[..., None]) -> None:
    plug_ins(mine=lambda: KeepNothing)
    assert registry.find_policy("keep-nothing") is KeepNothing
    assert registry.registered_policies()["keep-nothing"].source == "plug_in_mine:found"
    assert registry.broken_plugins() == {}
    plan = make_policy("keep-nothing").plan(problem_of(CacheGeometry(2, 2, 4, SQUARE), Fraction(1, 2)))
    assert plan.peak_token_heads == 14 * 4


def test_broken_plug_ins_hide_nothing(plug_ins: Callable[..., None], caplog: pytest.LogCaptureFixture) -> None:
    impostor = type("Impostor", (KeepNothing,), {"name": "heatkv"})
    plug_ins(aaa=raising(RuntimeError("boom")), mine=lambda: KeepNothing, number=lambda: 3, taken=lambda: impostor)
    assert set(registry.registered_policies()) == {*POLICIES, "keep-nothing"}
    assert set(registry.broken_plugins()) == {"aaa", "number", "taken"}
    assert registry.broken_plugins()["aaa"] == "plug_in_aaa:found: RuntimeError: boom"
    assert "two policies are named 'heatkv'" in registry.broken_plugins()["taken"]
    assert caplog.messages[0] == "heatkv: the plug-in 'aaa' could not be loaded: plug_in_aaa:found: RuntimeError: boom"
    with pytest.raises(PolicyError, match=r"unknown policy 'aaa'.*plug-in 'aaa' is broken: .*RuntimeError"):
        registry.find_policy("aaa")


def test_all_policies_of_a_plug_in_or_none(plug_ins: Callable[..., None]) -> None:
    second = type("Second", (KeepNothing,), {"name": "second"})

    def load(error: Exception | None) -> Any:
        registry.register(second)
        if error is not None:
            raise error
        return registry.register(KeepNothing)

    plug_ins(whole=lambda: load(None))
    sources = {name: known.source for name, known in registry.registered_policies().items() if name not in POLICIES}
    assert sources == {"keep-nothing": "plug_in_whole:found", "second": "plug_in_whole:found"}
    plug_ins(half=lambda: load(RuntimeError("boom")))
    assert set(registry.registered_policies()) == set(POLICIES)


@pytest.mark.parametrize(
    ("last_read", "error", "said"),
    [
        (lambda: np.zeros(1, dtype=np.int64) // 0, PolicyError, "policy 'boom' failed: RuntimeWarning"),
        (lambda: [[1], [2, 3]], PlanError, "no regular array"),
    ],
)
def test_policy_that_fails(last_read: Callable[[], Any], error: type[HeatKVError], said: str) -> None:
    @dataclass(frozen=True)
    class Boom(StaticPolicy):
        name = "boom"

        def last_read(self, problem: PlanningProblem) -> IntArray:
            return last_read()  # type: ignore[no-any-return]

    geometry = CacheGeometry(2, 2, 4, ScaleSchedule.square([1, 2, 3]))
    with pytest.raises(error, match=said):
        Boom(sink_scales=0).plan(PlanningProblem(geometry, Budget.parse("50%")))
