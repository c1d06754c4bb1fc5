"""HeatKV's rule and windows against a reading of their texts, what policies refuse, and finding policies."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import math
import sys
import types
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from strategies import SEEDS, geometries, live_by_formula, live_table, shares, statistics_of

from heatkv import registry
from heatkv.core.budget import Budget
from heatkv.core.geometry import CacheGeometry
from heatkv.core.rankings import HeadRankings
from heatkv.core.schedule import ScaleSchedule
from heatkv.errors import BudgetError, PlanError, PolicyError, StatisticsError
from heatkv.policies.base import EvictionPolicy, PlanningProblem, StaticPolicy
from heatkv.policies.heatkv import HeatKV, Random
from heatkv.policies.windows import Full, SlidingWindow, Streaming
from heatkv.testing.material import made_up_mass

POLICIES = registry.registered_policies()

SQUARE = ScaleSchedule.square((1, 2, 3, 4, 5, 6))  # N = 55; three sink scales are 14 tokens


def problem_of(
    geometry: CacheGeometry, share: Fraction, seed: int = 0, sink_scales: int = 2, **changes: Any
) -> PlanningProblem:
    """A problem with everything that any policy may need, level costs for so many sink scales."""
    statistics = statistics_of(geometry, made_up_mass(geometry, 2, seed), sink_scales=sink_scales)
    told: dict[str, Any] = {"statistics": statistics, "seed": seed, "model": "tiny"}
    return PlanningProblem(geometry, Budget("share", share), **{**told, **changes})


# ---------------------------------------------------------------------- sinks, statistics and units of the budget


@pytest.mark.parametrize("name", [name for name, known in POLICIES.items() if known.policy.kind == "static"])
@pytest.mark.parametrize("sink_scales", [-1, 6, 7])
def test_sinks_must_fit_the_schedule(name: str, sink_scales: int) -> None:
    policy = POLICIES[name].policy(sink_scales=sink_scales)
    with pytest.raises(PolicyError, match=f"sink_scales={sink_scales} does not fit a schedule of 6 scales: 0 to 5"):
        policy.plan(problem_of(CacheGeometry(1, 1, 4, SQUARE), Fraction(1), sink_scales=0))


@pytest.mark.parametrize("policy", [HeatKV(), Random(), Streaming()], ids=lambda policy: policy.name)
def test_a_budget_below_the_sinks_says_the_way_out(policy: EvictionPolicy) -> None:
    geometry = CacheGeometry(32, 16, 128, ScaleSchedule.infinity("1M", 1.0))
    with pytest.raises(BudgetError) as caught:
        policy.plan(PlanningProblem(geometry, Budget.parse("0.2%"), rankings=HeadRankings.random(geometry, 0)))
    for phrase in ("0.002 (0.2%)", "21/6425 = 0.33%", "the 3 sink scales", "raise it or lower sink_scales"):
        assert phrase in str(caught.value)
    # at 0.2 % there is room for 12.85 tokens: two sink scales are 5
    dataclasses.replace(policy, sink_scales=2).plan(
        PlanningProblem(geometry, Budget.parse("0.2%"), rankings=HeadRankings.random(geometry, 0))
    )


def test_statistics_of_another_model_are_refused() -> None:
    geometry, other = CacheGeometry(2, 2, 4, SQUARE), CacheGeometry(2, 3, 4, SQUARE)
    with pytest.raises(StatisticsError, match="2 layers x 3 heads"):
        problem_of(geometry, Fraction(1, 2), statistics=statistics_of(other, made_up_mass(other, 1, 0)))
    with pytest.raises(StatisticsError, match="rankings are of 2 layers x 3 heads, the model has 2 x 2"):
        problem_of(geometry, Fraction(1, 2), rankings=HeadRankings.random(other, 0))


def test_rows_and_storage_scale_a_budget_in_bytes() -> None:
    geometry = CacheGeometry(2, 2, 4, SQUARE)  # full: 220 token-heads of 4 * 4 bytes a row in bfloat16
    budget = Budget.parse("3520B")
    for rows, storage, held in ((1, "bfloat16", 220), (2, "bfloat16", 110), (2, "float32", 55)):
        problem = PlanningProblem(geometry, budget, rows=rows, storage=storage)
        plan = SlidingWindow().plan(problem)
        assert plan.budget_token_heads == held
        assert plan.budget == held / 220
        assert plan.bytes(rows, storage) <= 3520


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
            assert drawn.reads(t).sum(axis=(0, 1)).tolist() == rule.reads(t).sum(axis=(0, 1)).tolist()


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
        assert plan.reads(t).sum(axis=(0, 1)).tolist() == expected[t]


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
    counts_of = [plan.reads(t).sum(axis=(0, 1)).tolist() for t in range(len(tokens))]
    for t in range(policy.sink_scales + 1, len(tokens)):
        counts = counts_of[t]
        assert all(count <= most_heads for count, most_heads in zip(counts, allowed[t], strict=True))
        if plan.reads(t).all():
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

    name: ClassVar[str] = "keep-nothing"

    def last_read(self, problem: PlanningProblem) -> NDArray[np.int64]:
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


def test_the_policies_of_this_package_are_found() -> None:
    assert {"full", "heatkv", "random", "sliding-window", "streaming"} <= set(POLICIES)
    assert list(POLICIES) == sorted(POLICIES)
    assert registry.find_policy("heatkv") is HeatKV
    assert POLICIES["heatkv"].source == "heatkv.policies.heatkv"


@pytest.mark.parametrize(
    ("typed", "meant"), [("heatvk", "heatkv"), ("sliding_window", "sliding-window"), ("ful", "full")]
)
def test_an_unknown_name_gets_a_suggestion(typed: str, meant: str) -> None:
    with pytest.raises(PolicyError, match=rf"unknown policy '{typed}'.*did you mean '{meant}'\?.*Known: .*streaming"):
        registry.find_policy(typed)


def test_a_name_like_no_other_gets_the_list() -> None:
    with pytest.raises(PolicyError) as caught:
        registry.find_policy("0123456789")
    assert "did you mean" not in str(caught.value)
    assert all(name in str(caught.value) for name in POLICIES)


def test_a_plug_in_is_found(plug_ins: Callable[..., None]) -> None:
    plug_ins(mine=lambda: KeepNothing)
    assert registry.find_policy("keep-nothing") is KeepNothing
    assert registry.registered_policies()["keep-nothing"].source == "plug_in_mine:found"
    assert registry.broken_plugins() == {}
    plan = registry.find_policy("keep-nothing")().plan(problem_of(CacheGeometry(2, 2, 4, SQUARE), Fraction(1, 2)))
    assert plan.peak_token_heads == 14 * 4


@pytest.mark.parametrize("error", [ImportError("no module named dream"), RuntimeError("boom"), KeyError("x")], ids=repr)
def test_a_broken_plug_in_hides_nothing(plug_ins: Callable[..., None], error: Exception) -> None:
    plug_ins(aaa=raising(error), mine=lambda: KeepNothing, zzz=raising(error))
    assert set(registry.registered_policies()) == {*POLICIES, "keep-nothing"}
    assert set(registry.broken_plugins()) == {"aaa", "zzz"}
    assert registry.broken_plugins()["aaa"] == f"plug_in_aaa:found: {type(error).__name__}: {error}"
    with pytest.raises(PolicyError, match=rf"unknown policy 'aaa'.*plug-in 'aaa' is broken: .*{type(error).__name__}"):
        registry.find_policy("aaa")


def test_a_broken_plug_in_is_told(plug_ins: Callable[..., None], caplog: pytest.LogCaptureFixture) -> None:
    plug_ins(aaa=raising(RuntimeError("boom")), number=lambda: 3)
    registry.registered_policies()
    assert caplog.messages == [
        "heatkv: the plug-in 'aaa' could not be loaded: plug_in_aaa:found: RuntimeError: boom",
        "heatkv: the plug-in 'number' could not be loaded: plug_in_number:found: PolicyError: 3 is no class; register "
        "a subclass of heatkv.EvictionPolicy",
    ]


def test_all_policies_of_a_plug_in_come_from_it_or_none_do(plug_ins: Callable[..., None]) -> None:
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
    assert set(registry.broken_plugins()) == {"half"}


@pytest.mark.parametrize("name", ["Mine", "my_policy", "a--b", "-a", "a-", "a b", "a,b", "ä"])
def test_names_have_one_form(name: str) -> None:
    with pytest.raises(PolicyError, match="a name is lower-case letters, digits and hyphens between them"):
        registry.register(type("Named", (KeepNothing,), {"name": name}))


def test_a_plug_in_cannot_take_a_name(plug_ins: Callable[..., None]) -> None:
    impostor = type("Impostor", (KeepNothing,), {"name": "heatkv"})
    plug_ins(mine=lambda: impostor)
    assert registry.find_policy("heatkv") is HeatKV
    assert "two policies are named 'heatkv'" in registry.broken_plugins()["mine"]


def test_registering(plug_ins: Callable[..., None]) -> None:
    plug_ins()
    assert registry.register(KeepNothing) is KeepNothing
    registry.register(KeepNothing)  # a module imported twice
    assert registry.find_policy("keep-nothing") is KeepNothing
    with pytest.raises(PolicyError, match=r"two policies are named 'keep-nothing': .*Other.*; rename one"):
        registry.register(type("Other", (KeepNothing,), {}))
    assert registry.find_policy("keep-nothing") is KeepNothing
    for nameless in (type("Nameless", (), {}), type("Nameless", (), {"name": ""}), type("Nameless", (), {"name": 3})):
        with pytest.raises(PolicyError, match="Nameless is named"):
            registry.register(nameless)


def test_a_class_that_is_no_policy_is_not_registered() -> None:
    class Stranger:
        name = "stranger"

    with pytest.raises(PolicyError, match=r"has no kind, needs, plan, random, source, summary; subclass"):
        registry.register(Stranger)
    assert "stranger" not in registry.registered_policies()


def test_a_policy_that_fails_is_named() -> None:
    @dataclass(frozen=True)
    class Boom(StaticPolicy):
        name: ClassVar[str] = "boom"

        def last_read(self, problem: PlanningProblem) -> NDArray[np.int64]:
            return np.zeros(1, dtype=np.int64) // 0 if problem.seed else [[1], [2, 3]]  # type: ignore[return-value]

    geometry = CacheGeometry(2, 2, 4, ScaleSchedule.square([1, 2, 3]))
    with pytest.raises(PolicyError, match="policy 'boom' failed: RuntimeWarning"):
        Boom(sink_scales=0).plan(PlanningProblem(geometry, Budget.parse("50%"), seed=1))
    with pytest.raises(PlanError, match="no regular array"):
        Boom(sink_scales=0).plan(PlanningProblem(geometry, Budget.parse("50%")))
