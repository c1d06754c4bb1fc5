"""Every public name, handed what it cannot use: one line that says what was given, and never an error from within."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from standin_var import VAR
from strategies import statistics_of

import heatkv
from heatkv.core.checks import as_number, as_whole, shown
from heatkv.core.geometry import Budget, CacheGeometry
from heatkv.core.plan import CoarseCells, Plan
from heatkv.core.schedule import ScaleSchedule
from heatkv.core.statistics import HeadRankings, Provenance, Statistics
from heatkv.errors import BudgetError, HeatKVError, ModelError, PolicyError
from heatkv.layer_budgets import LayerBudgets
from heatkv.models.class_conditional import ClassConditionalModel
from heatkv.models.sampling import BitSamplingSettings, SamplingSettings
from heatkv.policies.base import PlanningProblem, StaticPolicy
from heatkv.testing.contract import made_up_mass

SCHEDULE = ScaleSchedule.square((1, 2, 3, 4))
GEOMETRY = CacheGeometry(2, 2, 4, SCHEDULE)
WHOLE = np.full((2, 2, 4), 3)
SAMPLES = made_up_mass(GEOMETRY, 2, 0)
STATISTICS = statistics_of(GEOMETRY, SAMPLES)
PLAN = Plan("by-hand", GEOMETRY, WHOLE, 1.0, GEOMETRY.full_token_heads, 1)
RANKINGS = HeadRankings.random(GEOMETRY, 0)
PROBLEM = PlanningProblem(GEOMETRY, Budget.parse("60%"), STATISTICS)

NOTHING: tuple[Any, ...] = (None, object(), [], {})
NOT_WHOLE: tuple[Any, ...] = (
    *NOTHING,
    "four",
    2.5,
    True,
    math.nan,
    np.float64(2),
    np.True_,
    torch.tensor(True),
    np.ones(2),
)
NOT_NUMBERS: tuple[Any, ...] = (*NOTHING, "x", True, math.nan, math.inf, np.ones(2), 10**400)
NOT_TEXT: tuple[Any, ...] = (*NOTHING, 3, 1.5, True, b"emoji")
NOT_PATHS: tuple[Any, ...] = (*NOTHING, 3, True, b"file", "a\0b")
NOT_BUDGETS: tuple[Any, ...] = (*NOTHING, math.nan, math.inf, -0.5, 0, True, "", "10 %%", b"10%", "5\n", 1j)


def check(call: Callable[[Any], object], values: Iterable[Any]) -> None:
    """Every value is refused by a typed error in one line."""
    for value in values:
        with pytest.raises(HeatKVError) as caught:
            call(value)
        assert len(str(caught.value).splitlines()) == 1, value
        assert len(str(caught.value)) > 20


def without_none(values: Iterable[Any]) -> list[Any]:
    return [value for value in values if value is not None]


# ---------------------------------------------------------------------- the checks themselves


def test_whole_numbers_of_every_library() -> None:
    for three in (3, np.int64(3), np.uint8(3), np.array(3), torch.tensor(3), torch.tensor(3, dtype=torch.int16)):
        assert as_whole(three) == 3
        assert type(as_whole(three)) is int
    for value in (*NOT_WHOLE, torch.tensor(3.0), torch.tensor([3]), np.array([3]), Fraction(3)):
        assert as_whole(value) is None


def test_numbers_of_every_library() -> None:
    for half in (0.5, np.float32(0.5), torch.tensor(0.5), Fraction(1, 2), np.array(0.5)):
        assert as_number(half) == 0.5
    assert as_number(-math.inf) == -math.inf
    for value in (None, "0.5", True, [0.5], np.array([0.5]), torch.tensor([0.5, 0.5]), 10**400, 1j):
        assert math.isnan(as_number(value))


def test_what_is_shown_is_one_short_line() -> None:
    assert shown("a") == "'a'"
    assert len(shown("a" * 1000)) == 60
    assert "\n" not in shown(np.ones((3, 3)))


# ---------------------------------------------------------------------- numbers and files


def test_budgets() -> None:
    check(Budget.parse, NOT_BUDGETS)
    check(lambda amount: Budget("share", amount), [*NOTHING, 0.5, True, "1", -1, 2])
    check(lambda kind: Budget(kind, Fraction(1, 2)), [*NOT_TEXT, "shares"])
    budget = Budget.parse("10tokens")
    check(budget.share, NOTHING)
    check(lambda geometry: budget.token_heads(geometry), NOTHING)
    check(lambda rows: Budget.parse("10B").share(GEOMETRY, rows), [*NOT_WHOLE, 0])
    check(lambda storage: Budget.parse("10B").share(GEOMETRY, 1, storage), [*NOT_TEXT, "int3"])
    with pytest.raises(BudgetError, match="budget 5 is above 1, the full cache; did you mean 5%"):
        Budget.parse(5)


def test_geometries_and_schedules() -> None:
    for name in ("layers", "heads", "head_dim"):
        check(lambda value, name=name: replace(GEOMETRY, **{name: value}), [*NOT_WHOLE, 0])  # type: ignore[misc]
    check(lambda schedule: CacheGeometry(1, 1, 4, schedule), [*NOTHING, [(1, 1, 1), (1, 2, 2)]])
    check(GEOMETRY.token_head_bytes, NOT_WHOLE)
    check(GEOMETRY.bytes, [*NOT_WHOLE, -1])
    check(GEOMETRY.full_bytes, NOT_WHOLE)
    for make in (ScaleSchedule, ScaleSchedule.of, ScaleSchedule.square):
        check(make, [*NOTHING, 3, "12", [1, "2"], [None, None], [2.0, 3.0], [True, 2]])
    check(ScaleSchedule.var, [*NOTHING, "300", 300, 256.0, True])
    check(ScaleSchedule.infinity, [*NOTHING, "2M", 1, True])
    check(lambda ratio: ScaleSchedule.infinity("1M", ratio), [*NOT_NUMBERS, 0])
    check(SCHEDULE.slice, [*NOT_WHOLE, -1, 4])
    listed = ScaleSchedule([[1, np.int64(1), 1], (1, 2, torch.tensor(2))])  # type: ignore[arg-type, list-item]
    assert listed == ScaleSchedule.square((1, 2))
    assert hash(listed) == hash(ScaleSchedule.square((1, 2)))


def test_plans(tmp_path: Path) -> None:
    for name, bad in (
        ("policy", NOT_TEXT), ("model", NOT_TEXT), ("geometry", NOTHING), ("last_read", [*NOTHING, "x", 3, WHOLE / 2]),
        ("budget", [*NOT_NUMBERS, 0, 2]), ("budget_token_heads", [*NOT_WHOLE, -1]), ("sink_scales", [*NOT_WHOLE, 4]),
        ("settings", [None, 3, [1], "x"]), ("value", without_none(NOT_NUMBERS)), ("gap", without_none(NOT_NUMBERS)),
        ("coarse", [None, 3, "x", [None], [("mean", WHOLE)]]),
    ):  # fmt: skip
        check(lambda value, name=name: replace(PLAN, **{name: value}), bad)  # type: ignore[misc]
    check(Plan.load, [*NOT_PATHS, tmp_path, tmp_path / "absent"])
    check(PLAN.save, [*NOT_PATHS, tmp_path, tmp_path / "absent" / "plan.json"])
    check(Plan.from_json, [*NOT_TEXT, "x"])
    check(PLAN.check_geometry, NOTHING)
    for read in (PLAN.reads, PLAN.level_read):
        check(read, [*NOT_WHOLE, -1, 4])
    check(lambda rows: PLAN.bytes(rows, "float32"), [*NOT_WHOLE, 0])
    check(lambda storage: PLAN.bytes(1, storage), NOT_TEXT)
    check(replace(PLAN, settings={"what": object()}).save, [tmp_path / "plan.json"])
    assert not list(tmp_path.iterdir())


def test_statistics(tmp_path: Path) -> None:
    for name, bad in (
        ("schedule", NOTHING), ("provenance", NOTHING), ("mass_sum", [*NOTHING, "x", 3, [[1], [1, 2]]]),
        ("mass_square_sum", NOTHING), ("error_sum", without_none([*NOTHING, "x"])), ("levels", without_none(NOTHING)),
    ):  # fmt: skip
        check(lambda value, name=name: replace(STATISTICS, **{name: value}), bad)  # type: ignore[misc]
    for name, bad in (
        ("model", NOT_TEXT), ("fingerprint", NOT_TEXT), ("cfg", without_none(NOT_NUMBERS)), ("settings", [None, 3, []]),
        ("samples", [*NOTHING, "7:0:3"]), ("versions", [None, []]),
    ):  # fmt: skip
        check(lambda value, name=name: replace(STATISTICS.provenance, **{name: value}), bad)  # type: ignore[misc]
    check(Statistics.load, [*NOT_PATHS, tmp_path, tmp_path / "absent"])
    check(STATISTICS.save, [*NOT_PATHS, tmp_path / "absent" / "s.safetensors"])
    check(STATISTICS.merge, [*NOTHING, STATISTICS])
    check(STATISTICS.check_geometry, NOTHING)
    check(STATISTICS.check_fingerprint, [*NOTHING, "other"])
    check(STATISTICS.with_levels, without_none(NOTHING))
    assert STATISTICS.levels is not None
    check(STATISTICS.levels.merge, NOTHING)
    for name, bad in (
        ("choices", NOTHING),
        ("joint_sum", [None, 3]),
        ("samples", [None, 3]),
        ("log_bias", [None, "x"]),
    ):
        check(lambda value, name=name: replace(STATISTICS.levels, **{name: value}), bad)  # type: ignore[misc, type-var]
    odd = replace(STATISTICS, provenance=replace(STATISTICS.provenance, settings={"what": object()}))
    check(odd.save, [tmp_path / "s.safetensors"])
    assert not list(tmp_path.iterdir())
    for name, bad in (("layers", NOT_WHOLE), ("heads", NOT_WHOLE), ("order", [*NOTHING, "x", [[1], [1, 2]], [[0.0]]])):
        check(lambda value, name=name: replace(RANKINGS, **{name: value}), bad)  # type: ignore[misc]


def test_caches() -> None:
    check(lambda plan: heatkv.KVCache(plan, 1), [*NOTHING, "full"])
    check(lambda rows: heatkv.KVCache(PLAN, rows), [*NOT_WHOLE, 0])
    check(lambda dtype: heatkv.KVCache(PLAN, 1, dtype), [*NOTHING, "float32"])
    check(lambda angles: heatkv.KVCache(PLAN, 1, key_angles=angles), [3, [], "x"])
    cache, x = heatkv.KVCache(PLAN, 1), torch.zeros(1, 2, 1, 4)
    for place in range(3):
        for bad in (*NOTHING, x.numpy(), x.half(), x[..., :2]):
            check(lambda bad, place=place: cache.attend(0, *(bad if i == place else x for i in range(3))), [bad])  # type: ignore[misc]
    check(lambda layer: cache.attend(layer, x, x, x), [None, "0", 1, -1])
    cache.attend(0, x, x, x)


# ---------------------------------------------------------------------- policies


def test_policies() -> None:
    for name, bad in (
        ("geometry", NOTHING), ("budget", [*NOTHING, "10%", 0.1]), ("statistics", without_none(NOTHING)),
        ("rankings", without_none(NOTHING)), ("seed", NOT_WHOLE), ("rows", [*NOT_WHOLE, 0]), ("storage", NOT_TEXT),
        ("model", NOT_TEXT),
    ):  # fmt: skip
        check(lambda value, name=name: replace(PROBLEM, **{name: value}), bad)  # type: ignore[misc]
    check(heatkv.make_policy, [*NOT_TEXT, "", "heatkv,streaming", heatkv.make_policy("heatkv")])
    for name in ("full", "heatkv", "heatkv-lp", "heatkv-mr", "random", "sliding-window", "streaming"):
        check(heatkv.make_policy(name).plan, NOTHING)
        check(lambda n, name=name: heatkv.make_policy(name, sink_scales=n).plan(PROBLEM), [*NOT_WHOLE, 4])  # type: ignore[misc]
        check(lambda n, name=name: heatkv.make_policy(name, nonsense=n), [None])  # type: ignore[misc]
    for name, options in (
        ("heatkv-lp", {"layer_cap": without_none(NOT_BUDGETS), "value": NOT_TEXT}),
        ("heatkv-lp", {"solver": NOT_TEXT}),
        ("heatkv-mr", {"levels": NOT_TEXT, "cost": NOT_TEXT, "compensation": NOT_TEXT, "layer_cap": [b"", 0]}),
    ):  # fmt: skip
        for option, values in options.items():
            check(
                lambda value, name=name, option=option: heatkv.make_policy(name, **{option: value}).plan(PROBLEM),  # type: ignore[misc]
                values,
            )
    auto = replace(PROBLEM, budget=Budget.parse("auto"))
    check(lambda kl: heatkv.make_policy("heatkv-mr", cost="fisher", max_kl=kl).plan(auto), NOT_NUMBERS)
    made = heatkv.make_policy("heatkv", sink_scales=np.int64(1)).plan(PROBLEM)
    assert made == heatkv.make_policy("heatkv", sink_scales=1).plan(PROBLEM)
    assert type(made.to_json()["settings"]["sink_scales"]) is int


@pytest.mark.parametrize(
    "name",
    ["a,b", "a b", "a=b", "A", "Keep-Nothing", "-a", "a-", "a--b", "a_b", "a/b", "ü", "a\n", "--set", "a.b", "٣"],
)
def test_a_name_that_the_command_line_cannot_tell_is_not_registered(name: str) -> None:
    named = type("Named", (heatkv.EvictionPolicy,), {"name": name})
    with pytest.raises(PolicyError, match=r"Named is named .*lower-case letters, digits and hyphens between"):
        heatkv.register(named)


def test_what_is_no_policy_is_not_registered() -> None:
    check(heatkv.register, [*NOT_TEXT, "heatkv", heatkv.make_policy("heatkv"), int, len, Plan])


def test_a_policy_that_cannot_be_made_is_named() -> None:
    @dataclass(frozen=True)
    class Fussy(StaticPolicy):
        """Refuses to be made."""

        name: ClassVar[str] = "fussy"

        def __post_init__(self) -> None:
            raise ValueError("not today")

        def last_read(self, problem: PlanningProblem) -> Any:
            return WHOLE

    from heatkv import registry

    heatkv.register(Fussy)
    try:
        with pytest.raises(PolicyError, match="policy 'fussy': not today"):
            heatkv.make_policy("fussy")
    finally:
        del registry._registered["fussy"]


# ---------------------------------------------------------------------- models


def test_loading() -> None:
    check(heatkv.load_model, [*NOT_TEXT, ""])
    check(lambda dtype: heatkv.load_model("emoji", dtype=dtype), [*NOT_TEXT, torch.float32])
    check(lambda device: heatkv.load_model("emoji", device=device), [*NOTHING, "x", 3.5])
    check(lambda size: heatkv.load_model("emoji", size=size), [object(), [], 3, "47"])
    check(lambda ratio: heatkv.load_model("emoji", ratio=ratio), without_none([*NOT_NUMBERS, 2]))
    check(lambda prompts: heatkv.load_model("emoji", prompts=prompts), [None, "a cat", 3, ["a cat"], [3]])
    check(lambda weights: heatkv.load_model("emoji", weights), [3, "absent"])
    check(lambda weights: heatkv.load_model("var-d16", weights), [*NOT_PATHS, "absent"])
    check(lambda weights: heatkv.load_model("infinity-2b", weights), [*NOT_PATHS, "absent"])
    check(lambda vae: heatkv.load_model("infinity-2b", "absent", vae=vae), NOT_PATHS)
    check(lambda encoder: heatkv.load_model("infinity-2b", "x", vae="x", text_encoder=encoder), [*NOT_PATHS, "a/b/c"])


def test_planning_and_labels_of_a_model(emoji: ClassConditionalModel) -> None:
    check(emoji.plan, NOT_TEXT)
    check(lambda budget: emoji.plan("streaming", budget), NOT_BUDGETS)
    check(
        lambda statistics: emoji.plan("heatkv", "20%", statistics=statistics), [*NOTHING, "s.safetensors", STATISTICS]
    )
    check(lambda rows: emoji.plan("streaming", "20%", rows=rows), without_none([*NOT_WHOLE, 0]))
    check(lambda seed: emoji.plan("random", "20%", seed=seed), NOT_WHOLE)
    check(lambda sinks: emoji.plan("streaming", "20%", sink_scales=sinks), NOT_WHOLE)
    check(emoji.label, [*NOT_WHOLE, "", "dragon", "64", "9" * 5000, -1, 64])
    check(emoji.label_name, NOT_WHOLE)
    check(emoji.labels, [*NOT_WHOLE, -1])
    check(lambda first: emoji.labels(1, first), NOT_WHOLE)
    check(lambda label: emoji.begin([label], emoji.sampling), NOT_WHOLE)


def test_drawing(emoji: ClassConditionalModel) -> None:
    plan = emoji.plan()
    check(lambda model: heatkv.generate(model, [1], plan), [*NOTHING, "emoji", emoji.transformer])
    check(lambda labels: heatkv.generate(emoji, labels, plan), [*NOTHING, 3, "pizza", [64], ["dragon"], [1.0], [True]])
    arrays = [
        np.array([1.0]),
        np.array([[1, 2]]),
        torch.tensor([0.5]),
        torch.tensor(3),
        torch.tensor([True]),
        np.array([64]),
    ]
    check(lambda labels: heatkv.generate(emoji, labels, plan), arrays)
    check(lambda plan: heatkv.generate(emoji, [1], plan), [*NOTHING, "full", PLAN])
    for name, bad in (
        ("seed", NOT_WHOLE), ("first_sample", NOT_WHOLE), ("batch", [*NOT_WHOLE, 0, -1]),
        ("settings", without_none([*NOTHING, 4.0])), ("compensation", without_none([*NOTHING, "linear"])),
        ("progress", [3, "x"]),
    ):  # fmt: skip
        check(lambda value, name=name: heatkv.generate(emoji, [1], plan, **{name: value}), bad)  # type: ignore[misc]
    wide = replace(emoji.geometry, head_dim=64)
    other = heatkv.make_policy("full").plan(PlanningProblem(wide, Budget.parse(1)))
    check(lambda plan: heatkv.generate(emoji, [1], plan), [other])


def test_the_last_label_is_checked_before_the_first_is_drawn(emoji: ClassConditionalModel) -> None:
    done: list[int] = []
    with pytest.raises(ModelError, match=r"emoji has no class 64; give a number from 0 to 63, or a name: .*pizza"):
        heatkv.generate(emoji, [1, 64], emoji.plan(), batch=1, progress=done.append)
    assert done == []


def test_labels_of_every_kind_draw_the_same(emoji: ClassConditionalModel) -> None:
    plan = emoji.plan("streaming", "20%")
    pizza, star = emoji.label("pizza"), emoji.label("star")
    expected = heatkv.generate(emoji, [pizza, star], plan, seed=2)
    for labels in (
        ["pizza", "star"], ("pizza", star), [str(pizza), np.int64(star)], np.array([pizza, star]),
        np.array(["pizza", "star"]), torch.tensor([pizza, star]), iter([pizza, star]), [torch.tensor(pizza), star],
    ):  # fmt: skip
        assert torch.equal(heatkv.generate(emoji, labels, plan, seed=np.int64(2), batch=np.int32(2)), expected)  # type: ignore[arg-type]


def test_settings() -> None:
    for kind in (SamplingSettings, BitSamplingSettings):
        for name, bad in (
            ("cfg", [*NOT_NUMBERS, -1, 101]), ("top_k", [*NOT_WHOLE, -1]), ("top_p", [*NOT_NUMBERS, -0.1, 1.1]),
        ):  # fmt: skip
            check(lambda value, kind=kind, name=name: kind(**{name: value}), bad)  # type: ignore[misc]
    check(lambda ramp: SamplingSettings(ramp=ramp), [*NOTHING, 1, "yes"])
    check(lambda tau: BitSamplingSettings(tau=tau), [*NOT_NUMBERS, 0, (1.0, "x")])


def test_measuring(emoji: ClassConditionalModel) -> None:
    from heatkv.calibration.fisher import calibrate_fisher
    from heatkv.calibration.level_costs import calibrate_levels
    from heatkv.compensation import fit_compensation

    for measure in (heatkv.calibrate, calibrate_levels, calibrate_fisher):
        not_batches = [*NOT_WHOLE, 0]
        if measure is not heatkv.calibrate:  # whose batch is None by default
            not_batches = without_none(not_batches)
        check(lambda model, measure=measure: measure(model, 1), [*NOTHING, "emoji", emoji.transformer])  # type: ignore[misc]
        check(lambda samples, measure=measure: measure(emoji, samples), [*NOT_WHOLE, 0, -1])  # type: ignore[misc]
        for name, bad in (
            ("seed", NOT_WHOLE), ("first_sample", NOT_WHOLE), ("batch", not_batches), ("progress", [3]),
            ("settings", without_none(NOTHING)),
        ):  # fmt: skip
            check(lambda value, name=name, measure=measure: measure(emoji, 1, **{name: value}), bad)  # type: ignore[misc]
    for levels in (calibrate_levels, calibrate_fisher):
        check(lambda sinks, levels=levels: levels(emoji, 1, sink_scales=sinks), [*NOT_WHOLE, -1, 99])  # type: ignore[misc]
    check(lambda plan: fit_compensation(emoji, plan, "linear"), [*NOTHING, PLAN])
    check(lambda samples: fit_compensation(emoji, emoji.plan(), "linear", samples), [*NOT_WHOLE, 0])


def test_attaching(emoji: ClassConditionalModel) -> None:
    check(lambda model: heatkv.attach(model, "full", 1), [*NOTHING, "emoji", 3, emoji])
    model = VAR((1, 2, 3), 3, 32, 2).eval()
    check(lambda policy: heatkv.attach(model, policy, 1), NOT_TEXT)
    check(lambda budget: heatkv.attach(model, "streaming", budget), NOT_BUDGETS)
    check(lambda plan: heatkv.attach(model, plan=plan), [*NOTHING, "plan.json", PLAN])
    check(lambda measure: heatkv.attach(model, measure=measure), [*NOTHING, 3, "all", 1.5])
    check(lambda bias: heatkv.attach(model, measure="levels", log_bias=bias), [*NOTHING, "x", np.ones(3), [[1.0]]])
    for name, bad in (
        ("statistics", without_none(NOTHING)), ("schedule", [[], 3, [(1, 1)]]), ("rows", [0, "2", True]),
        ("seed", NOT_WHOLE), ("first_sample", NOT_WHOLE), ("guided", [*NOTHING, 1, "no"]), ("sink_scales", NOT_WHOLE),
    ):  # fmt: skip
        check(lambda value, name=name: heatkv.attach(model, "streaming", "90%", **{name: value}), bad)  # type: ignore[misc]
    attached = heatkv.attach(model, measure=True)
    check(lambda settings: attached.statistics(settings=settings), [3, [], "x"])


# ---------------------------------------------------------------------- equality


def fresh() -> dict[str, Callable[[], Any]]:
    """How to make each kind of object that holds arrays, anew at every call."""
    return {
        "Statistics": lambda: statistics_of(GEOMETRY, SAMPLES),
        "LevelStatistics": lambda: statistics_of(GEOMETRY, SAMPLES).levels,
        "HeadRankings": lambda: HeadRankings.random(GEOMETRY, 0),
        "Plan": lambda: replace(PLAN, coarse=(CoarseCells.uncalibrated("mean", WHOLE.copy(), SCHEDULE),)),
        "CoarseCells": lambda: CoarseCells.uncalibrated("mean", WHOLE.copy(), SCHEDULE),
        "LayerBudgets": lambda: LayerBudgets(2, np.ones((2, 2)), np.ones((2, 2), dtype=bool)),  # type: ignore[arg-type]
    }


@pytest.mark.parametrize("name", fresh())
def test_equal_contents_are_equal_and_hash_alike(name: str) -> None:
    one, other = fresh()[name](), fresh()[name]()
    assert one is not other
    assert one == other
    assert hash(one) == hash(other)
    assert len({one, other}) == 1
    assert one != name
    assert one is not None


def nudged(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The same but for the last digit of its last number that is not 0."""
    changed = array.copy()
    at = tuple(np.argwhere(changed)[-1])
    changed[at] = np.nextafter(changed[at], 0)
    return changed


def test_one_digit_makes_a_difference() -> None:
    levels = STATISTICS.levels
    assert levels is not None
    for changes in (
        {"mass_sum": nudged(STATISTICS.mass_sum)}, {"error_sum": nudged(STATISTICS.error_sum)}, {"error_sum": None},  # type: ignore[arg-type]
        {"levels": None}, {"levels": replace(levels, single_sum=nudged(levels.single_sum))},
        {"provenance": replace(STATISTICS.provenance, versions={})},
    ):  # fmt: skip
        assert replace(STATISTICS, **changes) != STATISTICS  # type: ignore[arg-type]
    joint = (*levels.joint_sum[:-1], nudged(levels.joint_sum[-1]))
    assert replace(levels, joint_sum=joint) != levels
    assert replace(levels, log_bias=nudged(levels.log_bias)) != levels
    assert HeadRankings.random(GEOMETRY, 1) != RANKINGS
    assert replace(RANKINGS, first_scale=1) != RANKINGS
    last_read = WHOLE.copy()
    last_read[1, 1, 2] = 2
    coarse = CoarseCells.uncalibrated("mean", WHOLE, SCHEDULE)
    biased = replace(coarse, log_bias=nudged(np.array(coarse.log_bias)))
    made = [
        PLAN, replace(PLAN, last_read=last_read), replace(PLAN, gap=0.5),
        replace(PLAN, coarse=(coarse,)), replace(PLAN, coarse=(biased,)), replace(PLAN, settings={"a": 1}),
        replace(PLAN, geometry=replace(GEOMETRY, head_dim=8)),
    ]  # fmt: skip
    for i, one in enumerate(made):
        assert [one == other for other in made] == [i == j for j in range(len(made))]


def test_equality_survives_files(tmp_path: Path) -> None:
    STATISTICS.save(tmp_path / "s.safetensors")
    assert Statistics.load(tmp_path / "s.safetensors") == STATISTICS
    PLAN.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == PLAN


def test_a_problem_with_statistics_can_be_hashed() -> None:
    assert hash(PROBLEM) == hash(replace(PROBLEM, statistics=statistics_of(GEOMETRY, SAMPLES)))
    assert Provenance("a", "b", None, {}, ("7:0:1",)) == Provenance("a", "b", None, {}, ("7:0:1",))
