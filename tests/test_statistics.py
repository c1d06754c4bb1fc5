"""Calibration statistics and head rankings, against slow loops, explicit samples and damaged files."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from strategies import PAIRS, SEEDS, geometries, statistics_of

from heatkv.core.geometry import CacheGeometry
from heatkv.core.level_statistics import LevelStatistics
from heatkv.core.levels import LevelChoices
from heatkv.core.rankings import HeadRankings
from heatkv.core.schedule import ScaleSchedule
from heatkv.core.statistics import Statistics
from heatkv.errors import FormatError, HeatKVError, ScheduleError, StatisticsError
from heatkv.testing.material import level_costs_of, made_up_mass

GEOMETRY = CacheGeometry(2, 3, 4, ScaleSchedule.of([(1, 1), (1, 2), (2, 2), (2, 3)]))
LEVEL_GEOMETRY = CacheGeometry(2, 3, 4, ScaleSchedule.of([(1, 1), (1, 2), (2, 2), (4, 4), (2, 3)]))


def small(count: int = 3, seed: int = 0, first_sample: int = 0, **provenance: object) -> Statistics:
    """Without level costs, which have tests of their own."""
    return statistics_of(GEOMETRY, made_up_mass(GEOMETRY, count, seed), first_sample, None, **provenance)


# ---------------------------------------------------------------------- what follows from the sums


@settings(max_examples=40)
@given(geometry=geometries(), count=st.integers(1, 5), seed=SEEDS)
def test_mean_spread_scas_and_gini(geometry: CacheGeometry, count: int, seed: int) -> None:
    samples = made_up_mass(geometry, count, seed)
    measured = statistics_of(geometry, samples)
    assert (measured.layers, measured.heads, measured.count) == (geometry.layers, geometry.heads, count)
    np.testing.assert_allclose(measured.mass, samples.mean(axis=0), rtol=1e-12)
    # sums of squares cancel: the root of their rounding is what remains
    expected = samples.std(axis=0, ddof=1) if count > 1 else np.zeros_like(samples[0])
    np.testing.assert_allclose(measured.spread, expected, rtol=1e-6, atol=1e-7)

    for l, h, s in np.ndindex(measured.scas.shape):
        seen = samples[:, l, h, s + 1 :, s].ravel().tolist()
        assert measured.scas[l, h, s] == pytest.approx(sum(seen) / max(len(seen), 1), rel=1e-12)
    for scale, gini in enumerate(measured.gini()):  # the mean difference of pairs
        scores = measured.scas[:, :, scale].ravel().tolist()
        differences = sum(abs(first - second) for first in scores for second in scores)
        assert gini == pytest.approx(differences / (2 * len(scores) * sum(scores)), abs=1e-12)


def with_scas(scores: NDArray[np.float64]) -> Statistics:
    """Statistics of one sample in which scale 0 gets `scores` (L, H) of every later target's mass."""
    geometry = CacheGeometry(*scores.shape, 4, ScaleSchedule.square((1, 2, 3)))
    mass = np.zeros((1, *scores.shape, 3, 3))
    mass[..., 0, 0] = 1
    for target in (1, 2):
        mass[0, :, :, target, 0], mass[0, :, :, target, target] = scores, 1 - scores
    return statistics_of(geometry, mass)


@pytest.mark.parametrize(
    ("scores", "gini"),
    [
        ([[0.0, 0.0], [0.9, 0.0]], 3 / 4),  # one of n does it all: (n - 1) / n
        ([[0.1, 0.2, 0.3, 0.4]], 1 / 4),
        ([[0.0, 0.0]], 0.0),  # nobody looks: no inequality, and no division by zero
    ],
)
def test_gini(scores: list[list[float]], gini: float) -> None:
    measured = with_scas(np.array(scores))
    assert measured.gini().tolist() == pytest.approx([gini, 0.0], abs=1e-12)  # nobody looks at scale 1


# ---------------------------------------------------------------------- merging


@settings(max_examples=40)
@given(geometry=geometries(min_scales=3), counts=st.lists(st.integers(1, 3), min_size=2, max_size=4), seed=SEEDS)
def test_merging_parts_is_measuring_at_once(geometry: CacheGeometry, counts: list[int], seed: int) -> None:
    samples = made_up_mass(geometry, sum(counts), seed)
    starts = np.cumsum([0, *counts])
    parts = [
        statistics_of(geometry, samples[start : start + count], int(start))
        for start, count in zip(starts, counts, strict=False)
    ]
    merged, whole = reduce(Statistics.merge, parts), statistics_of(geometry, samples)
    assert merged.provenance == whole.provenance
    assert merged.levels.samples == whole.levels.samples == merged.samples
    for one, other in ((merged, whole), (merged.levels, whole.levels)):
        for name, array in other.sums().items():
            np.testing.assert_allclose(one.sums()[name], array, rtol=1e-12)
    np.testing.assert_allclose(merged.spread, samples.std(axis=0, ddof=1), rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(whole.levels.single, whole.levels.single_sum / len(samples))


def level_costs(mass: NDArray[np.float64], first: int = 0) -> LevelStatistics:
    return level_costs_of(LEVEL_GEOMETRY, mass, tuple(f"7:{first + i}:3" for i in range(len(mass))))


def test_merging_with_statistics_without_level_costs() -> None:
    mass = made_up_mass(LEVEL_GEOMETRY, 4, 1)
    one, other = statistics_of(LEVEL_GEOMETRY, mass[:2]), statistics_of(LEVEL_GEOMETRY, mass[2:], 2, None)
    assert one.merge(other).levels is other.merge(one).levels is one.levels


def test_what_cannot_be_merged() -> None:
    mine = small(first_sample=10)
    one = small(versions={"torch": "2"})
    other = small(first_sample=20, versions={"torch": "3", "heatkv": "2"})  # a later release may add samples
    for merged in (one.merge(other), other.merge(one), one.merge(other).merge(small(first_sample=30))):
        assert merged.provenance.versions == {"torch": "2, 3", "heatkv": "2"}
    others: dict[str, list[Statistics]] = {
        "different schedules or head counts": [
            statistics_of(other, made_up_mass(other, 1, 0))
            for other in (replace(GEOMETRY, schedule=ScaleSchedule.square((1, 2, 3, 4))), replace(GEOMETRY, heads=2))
        ],
        r"2 samples are in both \(for instance 7:11:3\)": [small(first_sample=11)],
        "mass_square_sum, error_sum": [replace(small(), all_mass_sum=None)],
    }
    for name, value in (("model", "other"), ("fingerprint", "ff"), ("cfg", 2.0), ("settings", {"top_k": 11})):
        others[f"with {name} "] = [small(**{name: value})]
    for said, refused in others.items():
        for other in refused:
            with pytest.raises(StatisticsError, match=said):
                mine.merge(other)
    costs = level_costs(made_up_mass(LEVEL_GEOMETRY, 1, 0))
    choices = LevelChoices(LEVEL_GEOMETRY.schedule, 3)
    for changes in ({"cost": "fisher"}, {"choices": choices}, {"log_bias": costs.log_bias + 1}):
        with pytest.raises(StatisticsError, match="cannot merge level costs"):
            costs.merge(replace(costs, samples=("b",), **changes))


# ---------------------------------------------------------------------- what no measurement gives


def mass_with(value: Any, *place: int) -> NDArray[np.float64]:
    mass: NDArray[np.float64] = small(1).mass_sum.copy()
    mass[place] = value
    return mass


def mass_of(geometry: CacheGeometry) -> NDArray[np.float64]:
    return made_up_mass(geometry, 1, 0)


COSTS = level_costs(made_up_mass(LEVEL_GEOMETRY, 2, 0))
OTHER_HEADS = replace(GEOMETRY, layers=3, heads=2)


@pytest.mark.parametrize(
    ("whole", "changes", "said"),
    [
        (small(1), {"mass_sum": mass_with(np.nan, 1, 2, 3, 0)}, r"mass_sum\[1, 2, 3, 0\] is nan"),
        (small(1), {"mass_sum": mass_with(-0.25, 1, 0, 1, 1)}, r"mass_sum\[1, 0, 1, 1\] is -0\.25"),
        (small(1), {"mass_sum": mass_with(0.1, 0, 0, 1, 2)}, "looks at a later source scale"),
        *(
            (small(1), {"mass_sum": mass_with(small(1).mass_sum[1, 2, 3] * factor, 1, 2, 3)}, r"sums to 1 \+- ")
            for factor in (0.0, 0.99, 1.01)
        ),
        *(
            (small(1), {"mass_sum": small(1).mass_sum[wrong]}, "mass_sum has shape")
            for wrong in (np.s_[0], np.s_[:, :, 1:], np.s_[:, :, :, 1:], np.s_[:0])
        ),
        (small(1), {"mass_square_sum": small(1).mass_sum[:1]}, r"mass_square_sum has shape \(1, 3, 4, 4\)"),
        (small(1), {"all_mass_sum": small(1).mass_sum * 0.99}, "sums to 1"),
        (small(1), {"error_sum": np.full((2, 3, 4, 4), 1.7e308)}, "error_sum.* from 0 to 1e.100"),
        (small(1), {"concentration_sum": np.zeros((2, 4))}, r"concentration_sum has shape \(2, 4\), not \(2, 3, 4\)"),
        (small(1), {"similarity_sum": np.full((2, 4), np.inf)}, r"similarity_sum\[0, 0\] is inf"),
        (small(samples=()), {}, "no sample"),
        (small(samples=("a", "b", "a")), {}, "twice"),
        (small(samples=("a", "b")), {}, "sums to 1"),  # three were summed
        (small(1), {"levels": COSTS}, "level costs are of 2 layers x 3 heads and the schedule 1x1,1x2,2x2,4x4,2x3"),
        (small(1), {"levels": level_costs_of(OTHER_HEADS, mass_of(OTHER_HEADS), ("a",))}, "are of 3 layers x 2 heads"),
        (COSTS, {"joint_sum": (*COSTS.joint_sum[:-1], np.zeros((2, 3, 7)))}, r"target 4 has .*, not \(2, 3, 12\)"),
        (COSTS, {"joint_sum": (*COSTS.joint_sum[:-1], np.full((2, 3, 12), -1e-9))}, r"target 4\[0, 0, 0\] is -1e-09"),
        (COSTS, {"single_sum": np.zeros((2, 3, 5, 5, 3))}, r"not \(2, 3, 5, 5, 4\)"),
        (COSTS, {"single_sum": np.full((2, 3, 5, 5, 4), np.inf)}, "single_sum.* is inf"),
        (COSTS, {"log_bias": np.full((2, 3, 5, 3), np.nan)}, "log_bias.* is nan"),
        (COSTS, {"log_bias": np.zeros((0, 3, 5, 3))}, "log_bias.* has shape"),
        (COSTS, {"choices": LevelChoices(LEVEL_GEOMETRY.schedule, 3)}, "target 3 has shape"),
        (COSTS, {"samples": ("a", "a")}, "twice"),
    ],
)
def test_impossible_statistics(whole: Any, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(StatisticsError, match=said):
        replace(whole, **changes).check()
    replace(small(1), mass_sum=small(1).mass_sum * 1.0005).check()  # as half precision rounds


def test_statistics_cannot_be_changed() -> None:
    mass = made_up_mass(GEOMETRY, 1, 0)[0]
    source = mass.copy()
    measured = Statistics(GEOMETRY.schedule, source, source**2, small(1).provenance)
    source[:] = 0
    assert np.array_equal(measured.mass_sum, mass)
    for array in (measured.mass_sum, COSTS.log_bias, COSTS.single_sum, *COSTS.joint_sum):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0


def test_equality() -> None:
    def nudged(array: NDArray[np.float64]) -> NDArray[np.float64]:
        changed = array.copy()
        place = tuple(np.argwhere(changed)[-1])
        changed[place] = np.nextafter(changed[place], 0)
        return changed

    one = replace(statistics_of(LEVEL_GEOMETRY, made_up_mass(LEVEL_GEOMETRY, 2, 0)), levels=COSTS)
    changes: list[dict[str, Any]] = [
        {}, {"mass_sum": nudged(one.mass_sum)}, {"error_sum": None}, {"levels": None},
        {"levels": replace(COSTS, joint_sum=(*COSTS.joint_sum[:-1], nudged(COSTS.joint_sum[-1])))},
        {"provenance": replace(one.provenance, versions={})},
    ]  # fmt: skip
    made, again = ([replace(one, **change) for change in changes] for _ in range(2))
    for i, first in enumerate(made):
        assert [first == other for other in again] == [i == j for j in range(len(made))]
        assert hash(first) == hash(again[i])


def test_statistics_of_another_model() -> None:
    measured = small()
    measured.check_geometry(GEOMETRY)
    measured.check_fingerprint("0f")
    for wrong in (
        CacheGeometry(3, 2, 4, GEOMETRY.schedule),
        CacheGeometry(2, 3, 4, ScaleSchedule.square((1, 2, 3, 4))),
    ):
        with pytest.raises(StatisticsError, match="calibrate"):
            measured.check_geometry(wrong)
    with pytest.raises(StatisticsError, match=r"\(tiny, fingerprint 0f; the model's is f0\)"):
        measured.check_fingerprint("f0")


# ---------------------------------------------------------------------- files


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(geometry=geometries(), sinks=st.sampled_from([None, 0, 1, 3]), joint=st.integers(0, 5), seed=SEEDS)
def test_files_round_trip_bit_for_bit(
    geometry: CacheGeometry, sinks: int | None, joint: int, seed: int, tmp_path: Path
) -> None:
    mass = made_up_mass(geometry, 1 + seed % 3, seed)
    measured = statistics_of(geometry, mass, sink_scales=None)
    if sinks is not None:
        costs = level_costs_of(geometry, mass, measured.samples, sinks, joint)
        bias = np.random.default_rng(seed).normal(size=costs.log_bias.shape)
        costs = replace(costs, log_bias=bias, cost=("error", "fisher")[seed % 2], bias_samples=("7:9:ä",))
        measured = measured.with_levels(costs)
    measured.save(tmp_path / "s.safetensors")
    again = Statistics.load(tmp_path / "s.safetensors")
    assert again == measured
    again.save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "s.safetensors").read_bytes()


Change = Callable[[dict[str, Any], dict[str, NDArray[Any]]], object]


def rewrite(path: Path, change: Change) -> None:
    """A whole statistics file with level costs, whose header or arrays were changed."""
    statistics_of(LEVEL_GEOMETRY, made_up_mass(LEVEL_GEOMETRY, 2, 0)).save(path)
    with safe_open(path, framework="numpy") as file:
        header = json.loads(file.metadata()["heatkv"])
    arrays = load_file(path)
    change(header, arrays)
    save_file(arrays, path, metadata={"heatkv": json.dumps(header)})


def set_array(name: str, made: Callable[[NDArray[Any]], NDArray[Any]]) -> Change:
    return lambda _, arrays: arrays.update({name: made(arrays[name])})


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        (lambda header, _: header.update(format="heatkv-plan"), FormatError, "'heatkv-plan'"),
        (lambda header, _: header.pop("provenance"), FormatError, "provenance"),
        (lambda header, _: header.update(schedule=[[1, 1]]), ScheduleError, "scales"),
        (lambda header, _: header.update(schedule=None), FormatError, "schedule"),
        (lambda header, _: header.update(schedule=[[1, 1], [2, 2]]), HeatKVError, "levels.joint_sum.2"),
        (lambda header, _: header["provenance"].update(cfg="a"), FormatError, r"provenance\.cfg"),
        (lambda header, _: header["provenance"].update(settings=[1]), FormatError, r"provenance\.settings"),
        (lambda header, _: header["provenance"].update(samples=None), FormatError, r"provenance\.samples"),
        (lambda header, _: header["provenance"].update(samples=["a"]), StatisticsError, "sums to 1"),
        (lambda header, _: header.update(levels=3), FormatError, "expected `object`"),
        (lambda header, _: header["levels"].update(cost="mass"), FormatError, "'mass'"),
        (lambda header, _: header["levels"].pop("cost"), FormatError, "cost"),
        (lambda header, _: header["levels"].update(sink_scales=-1), FormatError, "sink_scales"),
        (lambda header, _: header["levels"].update(joint=True), FormatError, "joint"),
        (lambda header, _: header["levels"].update(sink_scales=3), StatisticsError, "target 3 has shape"),
        (lambda header, _: header["levels"].update(samples=[]), StatisticsError, "no sample"),
        (lambda _, arrays: arrays.pop("mass_square_sum"), FormatError, "mass_square_sum"),
        (lambda _, arrays: arrays.pop("levels.joint_sum.3"), FormatError, r"levels\.joint_sum\.3"),
        (lambda _, arrays: arrays.update(more=np.zeros(1)), FormatError, "'more'"),
        (lambda _, arrays: arrays.update({"levels.more": np.zeros(1)}), FormatError, r"'levels\.more'"),
        (set_array("mass_sum", lambda x: x.astype(np.int64)), FormatError, "mass_sum is of int64"),
        (set_array("mass_sum", lambda x: x / 0.5), StatisticsError, "sums to 1"),
        (set_array("levels.log_bias", lambda x: x * np.nan), StatisticsError, "is nan"),
    ],
)
def test_files_changed_by_hand(change: Change, error: type[HeatKVError], said: str, tmp_path: Path) -> None:
    rewrite(tmp_path / "mine.safetensors", change)
    with pytest.raises(error, match=rf"mine\.safetensors.*{said}"):
        Statistics.load(tmp_path / "mine.safetensors")


def test_other_precision_and_other_files(tmp_path: Path) -> None:
    path = tmp_path / "s.safetensors"
    rewrite(path, set_array("levels.log_bias", lambda x: x.astype(np.float32)))
    assert Statistics.load(path).levels.log_bias.dtype == np.float64
    metadata: dict[str, str] | None
    for metadata in (None, {}, {"heatkv": "{"}, {"heatkv": "null"}):
        save_file({"mass_sum": np.ones((1, 1, 2, 2))}, path, metadata=metadata)
        with pytest.raises(FormatError, match=r"s\.safetensors"):
            Statistics.load(path)


# ---------------------------------------------------------------------- rankings


@settings(max_examples=30)
@given(data=st.data(), geometry=geometries())
def test_ranking_breaks_ties_by_head_then_layer(data: st.DataObject, geometry: CacheGeometry) -> None:
    layers, heads, scales = geometry.layers, geometry.heads, len(geometry.schedule)
    few = st.sampled_from([0.0, 0.25, 0.5])  # so that ties are the rule
    drawn = data.draw(st.lists(few, min_size=layers * heads * scales, max_size=layers * heads * scales))
    scores = np.array(drawn).reshape(layers, heads, scales)
    rankings = HeadRankings.from_scores(scores)
    assert rankings.order.shape == (scales, layers * heads)
    ranks = rankings.for_scales(0, scales)
    for s in range(scales):
        expected = sorted((scores[l, h, s], h, l) for l in range(layers) for h in range(heads))
        assert [divmod(int(pair), heads) for pair in rankings.order[s]] == [(l, h) for _, h, l in expected]
        for rank, (_, h, l) in enumerate(expected):
            assert ranks[s, l, h] == rank


@settings(max_examples=30)
@given(data=st.data(), geometry=geometries(min_scales=3))
def test_orders_belong_to_the_last_cached_scales(data: st.DataObject, geometry: CacheGeometry) -> None:
    layers, heads, scales = geometry.layers, geometry.heads, len(geometry.schedule)
    count = data.draw(st.integers(1, scales - 1))
    pairs = [[h, l] for l in range(layers) for h in range(heads)]
    orders = [data.draw(st.permutations(pairs)) for _ in range(count)]
    rankings = HeadRankings.from_pairs(orders, geometry)
    first = scales - 1 - count
    for given_order, ranks in zip(orders, rankings.for_scales(first, scales - 1), strict=True):
        assert [ranks[l, h] for h, l in given_order] == list(range(layers * heads))
    if first:
        with pytest.raises(StatisticsError, match=rf"cover the source scales {first} to {scales - 2}; {first - 1} to"):
            rankings.for_scales(first - 1, scales - 1)
    with pytest.raises(StatisticsError, match=rf"to {scales - 1} are needed"):
        rankings.for_scales(first, scales)


def test_random_rankings() -> None:
    geometry = CacheGeometry(8, 8, 4, ScaleSchedule.square((1, 2, 3, 4)))
    rankings = HeadRankings.random(geometry, 5)
    assert np.array_equal(rankings.order, HeadRankings.random(geometry, 5).order)
    assert not np.array_equal(rankings.order, HeadRankings.random(geometry, 6).order)
    assert rankings.order.shape == (4, 64)
    orders = {tuple(order) for order in rankings.order.tolist()}
    assert len(orders) == 4  # drawn anew for every scale
    assert all(sorted(order) == list(range(64)) for order in orders)
    geometry = CacheGeometry(2, 2, 4, ScaleSchedule.square((1, 2)))  # no head is favoured
    first = [int(HeadRankings.random(geometry, seed).order[0, 0]) for seed in range(400)]
    counts = np.bincount(first, minlength=4)
    assert (abs(counts - 100) < 45).all()  # five standard deviations


def swapped(index: int, pair: Any) -> list[Any]:
    return [[*PAIRS[:index], pair, *PAIRS[index + 1 :]]]


@pytest.mark.parametrize(
    ("orders", "error", "said"),
    [
        ({}, FormatError, "array"),
        ([], StatisticsError, "whole numbers"),
        ([PAIRS, PAIRS[:5]], StatisticsError, "regular"),
        ([[[0, 0, 0]]], StatisticsError, r"\(1, 6, 2\)"),
        (PAIRS, FormatError, "int"),
        *((swapped(2, pair), FormatError, "int") for pair in ([2.0, 0], [True, 0], ["1", 0], [None, 0])),
        (swapped(4, [2**64, 1]), StatisticsError, "whole numbers"),
        ([PAIRS] * 4, StatisticsError, "4 rankings; the schedule caches 3 scales"),
        ([PAIRS[:5]], StatisticsError, r"\(1, 5, 2\)"),
        (swapped(5, [1, 2]), StatisticsError, "exactly once"),  # layer and head mixed up
        (swapped(5, [-1, 1]), StatisticsError, "exactly once"),
        (swapped(5, [0, 0]), StatisticsError, "exactly once"),
    ],
)
def test_wrong_orders(orders: Any, error: type[HeatKVError], said: str, tmp_path: Path) -> None:
    (tmp_path / "orders.json").write_text(json.dumps(orders))
    with pytest.raises(error, match=rf"orders\.json.*{said}"):
        HeadRankings.load_orders(tmp_path / "orders.json", GEOMETRY)


def test_orders_of_another_number_of_scales(tmp_path: Path) -> None:
    path = tmp_path / "orders.json"
    path.write_text(json.dumps([PAIRS] * 2))  # of the cached scales 3 and 4 of six
    for scales in (4, 5, 7, 8):
        geometry = CacheGeometry(2, 3, 4, ScaleSchedule.square(range(1, scales + 1)))
        with pytest.raises(StatisticsError, match=rf"2 rankings .* schedule of 6 scales .*; this one has {scales}"):
            HeadRankings.load_orders(path, geometry)
    assert (
        HeadRankings.load_orders(path, CacheGeometry(2, 3, 4, ScaleSchedule.square(range(1, 6))), [2]).first_scale == 2
    )
    rankings = HeadRankings.load_orders(path, CacheGeometry(2, 3, 4, ScaleSchedule.square(range(1, 7))))
    assert rankings.first_scale == 3


def test_rankings_are_values() -> None:
    order = np.arange(6)[None]
    rankings = HeadRankings(2, 3, 0, order)
    order[0, 0] = 5
    assert rankings.order[0, 0] == 0
    with pytest.raises(ValueError, match="read-only"):
        rankings.order[0, 0] = 5
    assert rankings == HeadRankings(2, 3, 0, np.arange(6)[None])
    assert hash(rankings) == hash(HeadRankings(2, 3, 0, np.arange(6)[None]))
    assert rankings != replace(rankings, first_scale=1)
    assert rankings != HeadRankings(2, 3, 0, np.arange(6)[None, ::-1])
