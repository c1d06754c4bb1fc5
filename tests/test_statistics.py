"""Calibration statistics and head rankings, against slow loops, explicit samples and damaged files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from strategies import SEEDS, geometries, statistics_of

from heatkv.core.geometry import CacheGeometry
from heatkv.core.rankings import HeadRankings
from heatkv.core.schedule import ScaleSchedule
from heatkv.core.statistics import Statistics
from heatkv.errors import FormatError, ScheduleError, StatisticsError
from heatkv.testing.contract import made_up_mass

SHARED_FOLDER = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])

GEOMETRY = CacheGeometry(2, 3, 4, ScaleSchedule.of([(1, 1), (1, 2), (2, 2), (2, 3)]))


def small(count: int = 3, seed: int = 0, first_sample: int = 0, **provenance: object) -> Statistics:
    """Without level costs, which have tests of their own."""
    return statistics_of(GEOMETRY, made_up_mass(GEOMETRY, count, seed), first_sample, None, **provenance)


# ---------------------------------------------------------------------- what follows from the sums


@given(geometry=geometries(), count=st.integers(1, 5), seed=SEEDS)
def test_mean_spread_and_scas(geometry: CacheGeometry, count: int, seed: int) -> None:
    samples = made_up_mass(geometry, count, seed)
    measured = statistics_of(geometry, samples)
    assert (measured.layers, measured.heads, measured.count) == (geometry.layers, geometry.heads, count)
    np.testing.assert_allclose(measured.mass, samples.mean(axis=0), rtol=1e-12)
    # sums of squares cancel: the root of their rounding is what remains
    expected = samples.std(axis=0, ddof=1) if count > 1 else np.zeros_like(samples[0])
    np.testing.assert_allclose(measured.spread, expected, rtol=1e-6, atol=1e-7)

    scales = len(geometry.schedule)
    for l in range(geometry.layers):
        for h in range(geometry.heads):
            for s in range(scales):
                seen = [samples[i][l, h, t, s] for i in range(count) for t in range(s + 1, scales)]
                mean = sum(seen) / len(seen) if seen else 0.0
                assert measured.scas[l, h, s] == pytest.approx(mean, rel=1e-12)


def with_scas(scores: NDArray[np.float64]) -> Statistics:
    """Statistics of one sample in which scale 0 gets `scores` (L, H) of every later target's mass."""
    layers, heads = scores.shape
    geometry = CacheGeometry(layers, heads, 4, ScaleSchedule.square((1, 2, 3)))
    mass = np.zeros((1, layers, heads, 3, 3))
    mass[..., 0, 0] = 1
    for target in (1, 2):
        mass[0, :, :, target, 0] = scores
        mass[0, :, :, target, target] = 1 - scores
    return statistics_of(geometry, mass)


@pytest.mark.parametrize(
    ("scores", "gini"),
    [
        ([[0.25, 0.25], [0.25, 0.25]], 0.0),
        ([[0.0, 0.0], [0.9, 0.0]], 3 / 4),  # one of n does it all: (n - 1) / n
        ([[0.0, 0.6], [0.6, 0.0]], 1 / 2),
        ([[0.3, 0.1]], 1 / 4),
        ([[0.1, 0.2, 0.3, 0.4]], 1 / 4),
        ([[0.0, 0.0]], 0.0),  # nobody looks: no inequality, and no division by zero
    ],
)
def test_gini(scores: list[list[float]], gini: float) -> None:
    measured = with_scas(np.array(scores))
    assert measured.gini().tolist() == pytest.approx([gini, 0.0], abs=1e-12)  # nobody looks at scale 1


@given(geometry=geometries(), seed=SEEDS)
def test_gini_is_the_mean_difference_of_pairs(geometry: CacheGeometry, seed: int) -> None:
    measured = statistics_of(geometry, made_up_mass(geometry, 2, seed))
    for scale, gini in enumerate(measured.gini()):
        scores = measured.scas[:, :, scale].ravel().tolist()
        differences = sum(abs(first - second) for first in scores for second in scores)
        assert gini == pytest.approx(differences / (2 * len(scores) * sum(scores)), abs=1e-12)


# ---------------------------------------------------------------------- merging


@given(geometry=geometries(), counts=st.lists(st.integers(1, 3), min_size=2, max_size=4), seed=SEEDS)
def test_merging_shards_is_measuring_at_once(geometry: CacheGeometry, counts: list[int], seed: int) -> None:
    samples = made_up_mass(geometry, sum(counts), seed)
    starts = np.cumsum([0, *counts])
    shards = [
        statistics_of(geometry, samples[start : start + count], int(start))
        for start, count in zip(starts, counts, strict=False)
    ]
    merged = shards[0]
    for shard in shards[1:]:
        merged = merged.merge(shard)
    whole = statistics_of(geometry, samples)
    assert merged.provenance == whole.provenance
    np.testing.assert_allclose(merged.mass, whole.mass, rtol=1e-12)
    np.testing.assert_allclose(merged.mass_square_sum, whole.mass_square_sum, rtol=1e-12)
    np.testing.assert_allclose(merged.spread, samples.std(axis=0, ddof=1), rtol=1e-6, atol=1e-7)


def test_what_cannot_be_merged() -> None:
    mine = small(first_sample=10)
    for name, value in (("model", "other"), ("fingerprint", "ff"), ("cfg", 2.0), ("settings", {"top_k": 11})):
        with pytest.raises(StatisticsError, match=f"cannot merge statistics with {name} "):
            mine.merge(small(**{name: value}))
    small(versions={"torch": "3"}).merge(mine)  # a later release may add samples
    with pytest.raises(StatisticsError, match=r"2 samples are in both statistics \(for instance 7:11:3\); use another"):
        mine.merge(small(first_sample=11))
    for other in (
        CacheGeometry(2, 3, 4, ScaleSchedule.of([(1, 1), (2, 1), (2, 2), (2, 3)])),
        CacheGeometry(3, 2, 4, GEOMETRY.schedule),
    ):
        with pytest.raises(StatisticsError, match="different schedules or head counts"):
            mine.merge(statistics_of(other, made_up_mass(other, 1, 0)))


# ---------------------------------------------------------------------- validation


def changed(change: Callable[[NDArray[np.float64]], None]) -> Statistics:
    mass = made_up_mass(GEOMETRY, 1, 0)
    change(mass)
    return statistics_of(GEOMETRY, mass, sink_scales=None)


def set_to(value: float, *index: int) -> Callable[[NDArray[np.float64]], None]:
    def change(mass: NDArray[np.float64]) -> None:
        mass[(0, *index)] = value

    return change


def scaled(factor: float) -> Callable[[NDArray[np.float64]], None]:
    def change(mass: NDArray[np.float64]) -> None:
        mass[0, 1, 2, 3] *= factor

    return change


@pytest.mark.parametrize(
    ("change", "phrase"),
    [
        (set_to(float("nan"), 1, 2, 3, 0), "layer 1, head 2, target 3, source 0 is nan; it must be finite"),
        (set_to(float("inf"), 0, 1, 2, 1), "layer 0, head 1, target 2, source 1 is inf"),
        (set_to(-0.25, 1, 0, 1, 1), r"layer 1, head 0, target 1, source 1 is -0\.25; .* not negative"),
        (set_to(0.1, 0, 0, 1, 2), "looks at a later source scale, which does not exist yet"),
        (scaled(1.01), r"sums to 1 \+- 0\.01 over its sources, not to 1"),
        (scaled(0.99), "not to 1"),
        (scaled(0.0), "not to 1"),
    ],
)
def test_impossible_mass_is_refused(change: Callable[[NDArray[np.float64]], None], phrase: str) -> None:
    with pytest.raises(StatisticsError, match=phrase):
        changed(change)


def test_rounding_of_half_precision_is_accepted() -> None:
    changed(scaled(1.0005))


def test_shapes_and_samples_are_checked() -> None:
    mass = made_up_mass(GEOMETRY, 2, 0)
    good = statistics_of(GEOMETRY, mass)
    where = good.provenance
    for wrong in (mass[0, 0], mass[0, :, :, 1:], mass[0, :, :, :, 1:], mass[0, :0]):
        with pytest.raises(StatisticsError, match=r"mass_sum has shape .*; it must be \(layers, heads, 4, 4\)"):
            Statistics(GEOMETRY.schedule, wrong, wrong, where)
    with pytest.raises(StatisticsError, match=r"mass_sum is \(2, 3, 4, 4\), mass_square_sum \(1, 3, 4, 4\)"):
        Statistics(GEOMETRY.schedule, good.mass_sum, good.mass_square_sum[:1], where)
    with pytest.raises(StatisticsError, match="of no sample"):
        small(samples=())
    with pytest.raises(StatisticsError, match="counted twice"):
        small(samples=("a", "b", "a"))
    with pytest.raises(StatisticsError, match="not to 1"):
        small(samples=("a", "b"))  # three were summed


def test_statistics_cannot_be_changed() -> None:
    mass = made_up_mass(GEOMETRY, 1, 0)[0]
    given_array = mass.copy()
    measured = Statistics(GEOMETRY.schedule, given_array, given_array**2, small(1).provenance)
    given_array[:] = 0
    assert np.array_equal(measured.mass_sum, mass)
    with pytest.raises(ValueError, match="read-only"):
        measured.mass_sum[0] = 0


def test_statistics_of_another_model_are_refused() -> None:
    measured = small()
    measured.check_geometry(GEOMETRY)
    measured.check_fingerprint("0f")
    with pytest.raises(StatisticsError, match=r"of 2 layers x 3 heads \(tiny\), the model has 3 x 2; calibrate"):
        measured.check_geometry(CacheGeometry(3, 2, 4, GEOMETRY.schedule))
    with pytest.raises(StatisticsError, match="of the schedule 1x1,1x2,2x2,2x3, the model runs 1,2,3,4; calibrate"):
        measured.check_geometry(CacheGeometry(2, 3, 4, ScaleSchedule.square((1, 2, 3, 4))))
    with pytest.raises(StatisticsError, match=r"other weights \(tiny, fingerprint 0f; the model's is f0\); calibrate"):
        measured.check_fingerprint("f0")


# ---------------------------------------------------------------------- files


@SHARED_FOLDER
@given(geometry=geometries(), count=st.integers(1, 3), seed=SEEDS)
def test_files_round_trip_bit_for_bit(geometry: CacheGeometry, count: int, seed: int, tmp_path: Path) -> None:
    measured = statistics_of(geometry, made_up_mass(geometry, count, seed))
    measured.save(tmp_path / "s.safetensors")
    again = Statistics.load(tmp_path / "s.safetensors")
    assert again.mass_sum.tobytes() == measured.mass_sum.tobytes()
    assert again.mass_square_sum.tobytes() == measured.mass_square_sum.tobytes()
    assert again.schedule == measured.schedule
    assert again.provenance == measured.provenance


def rewrite(path: Path, change: Callable[[dict[str, Any], dict[str, NDArray[Any]]], object]) -> None:
    """A whole safetensors file whose header or arrays were changed."""
    small().save(path)
    arrays = load_file(path)
    header: dict[str, Any] = {
        "format": "heatkv-statistics",
        "version": 1,
        "schedule": GEOMETRY.schedule.to_json(),
        "provenance": small().provenance.to_json(),
    }
    change(header, arrays)
    save_file(arrays, path, metadata={"heatkv": json.dumps(header)})


def test_the_documented_header_is_enough(tmp_path: Path) -> None:
    path = tmp_path / "s.safetensors"
    rewrite(path, lambda header, arrays: None)
    assert Statistics.load(path).provenance == small().provenance


@pytest.mark.parametrize(
    ("change", "error", "phrase"),
    [
        (lambda header, _: header.update(format="heatkv-plan"), FormatError, "format 'heatkv-plan', not"),
        (lambda header, _: header.update(version=2), FormatError, "version 2; this release reads version 1"),
        (lambda header, _: header.update(version=True), FormatError, "version True; this release reads version 1"),
        (lambda header, _: header.update(version="1"), FormatError, "version '1'; this release reads version 1"),
        (lambda header, _: header.pop("version"), FormatError, "version None; this release reads version 1"),
        (lambda header, _: header.pop("provenance"), FormatError, "provenance"),
        (lambda header, _: header.pop("schedule"), FormatError, "schedule"),
        (lambda header, _: header.update(schedule=[[1, 1]]), ScheduleError, "at least 2 scales"),
        (lambda header, _: header.update(schedule=None), ScheduleError, "a schedule is a list"),
        (lambda header, _: header.update(schedule=[[1, 1], [2, 2]]), StatisticsError, r"\(layers, heads, 2, 2\)"),
        (lambda header, _: header.update(provenance=None), FormatError, "not a whole statistics file"),
        (lambda header, _: header.update(provenance=[]), FormatError, "not a whole statistics file"),
        (lambda header, _: header["provenance"].update(cfg="a"), FormatError, "not a whole statistics file"),
        (lambda header, _: header["provenance"].update(cfg=10**400), FormatError, "not a whole statistics file"),
        (lambda header, _: header["provenance"].update(settings=[1]), FormatError, "not a whole statistics file"),
        (lambda header, _: header["provenance"].update(samples=None), FormatError, "not a whole statistics file"),
        (lambda header, _: header["provenance"].update(samples=["a"]), StatisticsError, "not to 1"),
        (lambda _, arrays: arrays.pop("mass_square_sum"), FormatError, "known are mass_sum, mass_square_sum"),
        (lambda _, arrays: arrays.update(more=np.zeros(1)), FormatError, r"'mass_sum', 'more'\]"),
        (lambda _, arrays: arrays.update(mass_sum=arrays["mass_sum"] / 0.5), StatisticsError, "not to 1"),
        (lambda _, arrays: arrays.update(mass_sum=-arrays["mass_sum"]), StatisticsError, "not negative"),
        (lambda _, arrays: arrays.update(mass_sum=arrays["mass_sum"][0]), StatisticsError, "shape"),
        # finite, but no sum of it is
        (
            lambda _, arrays: arrays.update(mass_sum=np.tril(arrays["mass_sum"] * 0 + 1.7e308)),
            StatisticsError,
            "below 1e",
        ),
    ],
)
def test_a_file_changed_by_hand_is_refused(
    change: Callable[[dict[str, Any], dict[str, NDArray[Any]]], object],
    error: type[Exception],
    phrase: str,
    tmp_path: Path,
) -> None:
    path = tmp_path / "s.safetensors"
    rewrite(path, change)
    with pytest.raises(error, match=phrase):
        Statistics.load(path)


@pytest.mark.parametrize("metadata", [None, {}, {"heatkv": "{"}, {"heatkv": "null"}, {"heatkv": "[" * 100_000}])
def test_a_foreign_safetensors_file_is_refused(metadata: dict[str, str] | None, tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_file({"mass_sum": np.ones((1, 1, 2, 2)), "mass_square_sum": np.ones((1, 1, 2, 2))}, path, metadata=metadata)
    with pytest.raises(FormatError, match=r"weights\.safetensors"):
        Statistics.load(path)


@pytest.mark.parametrize("dtype", ["BF16", "F8_E4M3"])
def test_types_that_numpy_lacks_are_refused(dtype: str, tmp_path: Path) -> None:
    size = 4 * (2 if dtype == "BF16" else 1)
    told: dict[str, Any] = {"__metadata__": {"heatkv": "null"}}
    for index, name in enumerate(("mass_sum", "mass_square_sum")):
        told[name] = {"dtype": dtype, "shape": [1, 1, 2, 2], "data_offsets": [index * size, index * size + size]}
    header = json.dumps(told).encode()
    path = tmp_path / "s.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(2 * size))
    with pytest.raises(FormatError, match="not a whole statistics file"):
        Statistics.load(path)


def test_what_cannot_be_read(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing.safetensors"):
        with pytest.raises(FormatError, match=path.name):
            Statistics.load(path)


def test_a_truncated_file_is_refused_wherever_it_is_cut(tmp_path: Path) -> None:
    path = tmp_path / "s.safetensors"
    small().save(path)
    whole = path.read_bytes()
    for length in [*range(0, 700), *range(700, len(whole), 97), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(FormatError):
            Statistics.load(path)


@settings(SHARED_FOLDER, max_examples=300)
@given(data=st.data())
def test_a_damaged_file_gives_a_typed_error(data: st.DataObject, tmp_path: Path) -> None:
    path = tmp_path / "s.safetensors"
    small().save(path)
    content = bytearray(path.read_bytes())
    header_end = 8 + int.from_bytes(content[:8], "little")
    for _ in range(data.draw(st.integers(1, 3))):
        # as often in the short header as in the long data
        last = data.draw(st.sampled_from([header_end, len(content)])) - 1
        content[data.draw(st.integers(0, last))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    try:
        measured = Statistics.load(path)
    except (FormatError, StatisticsError, ScheduleError):
        return
    measured.save(path)  # what was accepted can be kept
    assert np.array_equal(Statistics.load(path).mass_sum, measured.mass_sum)
    assert abs(measured.mass.sum(axis=3) - 1).max() <= 1.001e-3


# ---------------------------------------------------------------------- rankings


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
    with pytest.raises(StatisticsError, match="are needed: change the schedule or the number of sink scales"):
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


def test_random_rankings_favour_no_head() -> None:
    geometry = CacheGeometry(2, 2, 4, ScaleSchedule.square((1, 2)))
    first = [int(HeadRankings.random(geometry, seed).order[0, 0]) for seed in range(400)]
    counts = np.bincount(first, minlength=4)
    assert (abs(counts - 100) < 45).all()  # five standard deviations


PAIRS = [[0, 0], [1, 0], [2, 0], [0, 1], [1, 1], [2, 1]]  # [head, layer] of 2 layers x 3 heads


def swapped(index: int, pair: Any) -> list[Any]:
    return [[*PAIRS[:index], pair, *PAIRS[index + 1 :]]]


@pytest.mark.parametrize(
    ("orders", "error", "phrase"),
    [
        ({}, FormatError, "no list of rankings"),
        ([], FormatError, "no list of rankings"),
        ("[[", FormatError, "no list of rankings"),
        ([PAIRS, PAIRS[:5]], FormatError, "all of the same length"),
        ([[[0, 0, 0]]], FormatError, r"of \[head, layer\] pairs of whole numbers"),
        (PAIRS, FormatError, r"\[head, layer\] pairs"),
        (swapped(2, [2.0, 0]), FormatError, "whole numbers"),
        (swapped(4, [True, 1]), FormatError, "whole numbers"),
        (swapped(4, ["1", 1]), FormatError, "whole numbers"),
        (swapped(4, [None, 1]), FormatError, "whole numbers"),
        (swapped(4, [10**400, 1]), FormatError, "whole numbers"),
        (swapped(4, [2**63, 1]), FormatError, "whole numbers"),
        ([PAIRS] * 4, StatisticsError, "has 4 rankings; the schedule caches 3 scales"),
        ([PAIRS[:5]], StatisticsError, r"ranks 5 \(head, layer\) pairs; the model has 2 layers x 3 heads = 6"),
        (swapped(5, [1, 2]), StatisticsError, "outside 3 heads and 2 layers"),  # layer and head mixed up
        (swapped(5, [-1, 1]), StatisticsError, "outside 3 heads and 2 layers"),
        (swapped(5, [0, 0]), StatisticsError, "every .* pair exactly once"),
    ],
)
def test_wrong_orders_are_refused(orders: Any, error: type[Exception], phrase: str, tmp_path: Path) -> None:
    path = tmp_path / "orders.json"
    path.write_text(json.dumps(orders))
    with pytest.raises(error, match=phrase):
        HeadRankings.load_orders(path, GEOMETRY)


def test_orders_of_another_number_of_scales_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "orders.json"
    path.write_text(json.dumps([PAIRS] * 2))  # of the cached scales 3 and 4 of six
    for scales in (4, 5, 7, 8):
        geometry = CacheGeometry(2, 3, 4, ScaleSchedule.square(range(1, scales + 1)))
        said = (
            rf"has 2 rankings, .* schedule of 6 scales \(.* first 3\); this one has {scales} scales: .*heatkv calibrate"
        )
        with pytest.raises(StatisticsError, match=said):
            HeadRankings.load_orders(path, geometry)
    rankings = HeadRankings.load_orders(path, CacheGeometry(2, 3, 4, ScaleSchedule.square(range(1, 7))))
    assert rankings.first_scale == 3


def test_unreadable_orders_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "orders.json"
    with pytest.raises(FormatError, match="cannot read"):
        HeadRankings.load_orders(path, GEOMETRY)
    path.write_text(json.dumps([PAIRS])[:-1])
    with pytest.raises(FormatError, match="is not JSON"):
        HeadRankings.load_orders(path, GEOMETRY)


def test_rankings_cannot_be_changed() -> None:
    order = np.arange(6)[None]
    rankings = HeadRankings(2, 3, 0, order)
    order[0, 0] = 5
    assert rankings.order[0, 0] == 0
    with pytest.raises(ValueError, match="read-only"):
        rankings.order[0, 0] = 5
