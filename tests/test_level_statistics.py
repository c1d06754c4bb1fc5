"""Level costs by themselves: means, merging, files that come back bit for bit, and what is refused."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from strategies import SEEDS, geometries, statistics_of

from heatkv.core.geometry import CacheGeometry
from heatkv.core.levels import LEVELS, NONE, LevelChoices
from heatkv.core.schedule import ScaleSchedule
from heatkv.core.statistics import LevelStatistics, Statistics
from heatkv.errors import FormatError, HeatKVError, StatisticsError
from heatkv.testing.contract import level_costs_of, made_up_mass

SHARED_FOLDER = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)

SCHEDULE = ScaleSchedule.of([(1, 1), (1, 2), (2, 2), (4, 4), (2, 3)])
GEOMETRY = CacheGeometry(2, 3, 4, SCHEDULE)


def small(count: int = 2, seed: int = 0, **changes: Any) -> LevelStatistics:
    samples = tuple(f"7:{i}:3" for i in range(count))
    return dataclasses.replace(level_costs_of(GEOMETRY, made_up_mass(GEOMETRY, count, seed), samples), **changes)


def test_means() -> None:
    measured = small(4)
    assert (measured.layers, measured.heads) == (2, 3)
    for mean, total in zip(measured.joint, measured.joint_sum, strict=True):
        np.testing.assert_array_equal(mean, total / 4)
    np.testing.assert_array_equal(measured.single, measured.single_sum / 4)


@given(geometry=geometries(min_scales=3), counts=st.lists(st.integers(1, 3), min_size=2, max_size=4), seed=SEEDS)
@settings(max_examples=40)
def test_merging_shards_is_measuring_at_once(geometry: CacheGeometry, counts: list[int], seed: int) -> None:
    mass = made_up_mass(geometry, sum(counts), seed)
    names = tuple(f"7:{i}:3" for i in range(len(mass)))
    starts = np.cumsum([0, *counts])
    parts = [level_costs_of(geometry, mass[a : a + n], names[a : a + n]) for a, n in zip(starts, counts, strict=False)]
    merged = parts[0]
    for part in parts[1:]:
        merged = merged.merge(part)
    whole = level_costs_of(geometry, mass, names)
    assert merged.samples == whole.samples
    for one, other in zip(merged.joint, whole.joint, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-12)
    np.testing.assert_allclose(merged.single, whole.single, rtol=1e-12)


def test_merging_whole_statistics() -> None:
    mass = made_up_mass(GEOMETRY, 4, 1)
    one, other = statistics_of(GEOMETRY, mass[:2]), statistics_of(GEOMETRY, mass[2:], 2)
    levels = one.merge(other).levels
    assert levels is not None
    assert levels.samples == ("7:0:3", "7:1:3", "7:2:3", "7:3:3")
    assert one.merge(statistics_of(GEOMETRY, mass[2:], 2, None)).levels is one.levels
    assert statistics_of(GEOMETRY, mass[2:], 2, None).merge(one).levels is one.levels


def test_they_cannot_be_changed() -> None:
    bias = np.zeros((2, 3, 5, len(LEVELS)))
    measured = small(log_bias=bias)
    bias[:] = 1
    assert not measured.log_bias.any()
    for array in (measured.log_bias, measured.single_sum, *measured.joint_sum):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0


@pytest.mark.parametrize(
    ("changes", "phrase"),
    [
        ({"cost": "mass"}, "of the unknown kind 'mass'; known: error, fisher"),
        ({"joint_sum": small().joint_sum[:-1]}, "level costs of 4 targets, the schedule has 5"),
        (
            {"joint_sum": (*small().joint_sum[:-1], np.zeros((2, 3, 7)))},
            r"joint_sum 4 has shape \(2, 3, 7\), not \(2, 3, 12\)",
        ),
        (
            {"single_sum": np.zeros((2, 3, 5, 5, NONE))},
            r"single_sum has shape \(2, 3, 5, 5, 3\), not \(2, 3, 5, 5, 4\)",
        ),
        ({"log_bias": np.zeros((2, 3, 5))}, r"log_bias has shape \(2, 3, 5\)"),
        ({"log_bias": np.zeros((0, 3, 5, 3))}, r"log_bias has shape \(0, 3, 5, 3\)"),
        (
            {"log_bias": np.full((2, 3, 5, 3), np.nan)},
            "log_bias of layer 0, head 0, at .0, 0. is nan, which is not finite",
        ),
        (
            {"single_sum": np.full((2, 3, 5, 5, 4), np.inf)},
            "single_sum of layer 0, head 0, at .0, 0, 0. is inf, which is not finite",
        ),
        (
            {"joint_sum": (*small().joint_sum[:-1], np.full((2, 3, 12), -1e-9))},
            "joint_sum 4 of layer 0, head 0, at .0. is -1e-09, a negative cost",
        ),
        ({"samples": ()}, "of no sample, or count one twice"),
        ({"samples": ("a", "a")}, "of no sample, or count one twice"),
        ({"choices": LevelChoices(SCHEDULE, 3)}, r"joint_sum 3 has shape \(2, 3, 3\), not \(2, 3, 1\)"),
    ],
)
def test_what_does_not_fit_together_is_refused(changes: dict[str, Any], phrase: str) -> None:
    with pytest.raises(StatisticsError, match=phrase):
        small(**changes)


def test_they_belong_to_the_other_statistics() -> None:
    base = statistics_of(GEOMETRY, made_up_mass(GEOMETRY, 1, 0), sink_scales=None)
    for other in (CacheGeometry(3, 2, 4, SCHEDULE), CacheGeometry(2, 3, 4, ScaleSchedule.square((1, 2, 3, 4, 5)))):
        levels = level_costs_of(other, made_up_mass(other, 1, 0), ("a",))
        with pytest.raises(StatisticsError, match=r"the level costs are of . layers x . heads and the schedule"):
            dataclasses.replace(base, levels=levels)


# ---------------------------------------------------------------------- files


@SHARED_FOLDER
@given(geometry=geometries(), count=st.integers(1, 3), sinks=st.integers(0, 3), joint=st.integers(0, 5), seed=SEEDS)
def test_files_round_trip_bit_for_bit(
    geometry: CacheGeometry, count: int, sinks: int, joint: int, seed: int, tmp_path: Path
) -> None:
    mass = made_up_mass(geometry, count, seed)
    measured = statistics_of(geometry, mass, sink_scales=None)
    levels = level_costs_of(geometry, mass, measured.provenance.samples, sinks, joint)
    bias = np.random.default_rng(seed).normal(size=levels.log_bias.shape)
    levels = dataclasses.replace(levels, log_bias=bias, cost=("error", "fisher")[seed % 2], bias_samples=("7:9:ä",))
    dataclasses.replace(measured, levels=levels).save(tmp_path / "s.safetensors")
    again = Statistics.load(tmp_path / "s.safetensors").levels
    assert again is not None
    assert (again.choices, again.cost) == (levels.choices, levels.cost)
    assert (again.samples, again.bias_samples) == (levels.samples, levels.bias_samples)
    assert again.log_bias.tobytes() == levels.log_bias.tobytes()
    assert again.single_sum.tobytes() == levels.single_sum.tobytes()
    assert [x.tobytes() for x in again.joint_sum] == [x.tobytes() for x in levels.joint_sum]


def test_files_without_levels_have_none(tmp_path: Path) -> None:
    statistics_of(GEOMETRY, made_up_mass(GEOMETRY, 1, 0), sink_scales=None).save(tmp_path / "s.safetensors")
    assert Statistics.load(tmp_path / "s.safetensors").levels is None


Change = Callable[[dict[str, Any], dict[str, NDArray[Any]]], object]


def rewrite(path: Path, change: Change) -> None:
    """A whole file whose header of the levels, or arrays, were changed."""
    statistics_of(GEOMETRY, made_up_mass(GEOMETRY, 2, 0)).save(path)
    with safe_open(path, framework="numpy") as file:
        header = json.loads(file.metadata()["heatkv"])
    arrays = load_file(path)
    change(header["levels"], arrays)
    save_file(arrays, path, metadata={"heatkv": json.dumps(header)})


def set_array(name: str, made: Callable[[NDArray[Any]], NDArray[Any]]) -> Change:
    return lambda _, arrays: arrays.update({name: made(arrays[name])})


@pytest.mark.parametrize(
    ("change", "error", "phrase"),
    [
        (lambda header, _: header.update(cost="mass"), StatisticsError, "unknown kind 'mass'"),
        (lambda header, _: header.pop("cost"), FormatError, "not a whole statistics file: it lacks 'cost'"),
        (lambda header, _: header.clear(), FormatError, "not a whole statistics file"),
        (lambda header, _: header.update(sink_scales=-1), FormatError, "sink_scales=-1 and joint=5 cannot be below 0"),
        (lambda header, _: header.update(sink_scales=2.0), FormatError, r"sink_scales is 2\.0, not a whole number"),
        (lambda header, _: header.update(sink_scales="2"), FormatError, "sink_scales is '2', not a whole number"),
        (lambda header, _: header.update(joint=True), FormatError, "joint is True, not a whole number"),
        (lambda header, _: header.update(joint=None), FormatError, "joint is None, not a whole number"),
        (lambda header, _: header.update(sink_scales=3), StatisticsError, "joint_sum 3 has shape"),
        (lambda header, _: header.update(joint=1), StatisticsError, "joint_sum 4 has shape"),
        (lambda header, _: header.update(samples=[]), StatisticsError, "of no sample"),
        (lambda header, _: header.update(samples=["a", "a"]), StatisticsError, "count one twice"),
        (lambda header, _: header.update(samples=3), FormatError, "not a whole statistics file"),
        (lambda header, _: header.update(bias_samples=None), FormatError, "not a whole statistics file"),
        (lambda _, arrays: arrays.pop("levels.log_bias"), FormatError, r"not a whole .*'levels\.log_bias'"),
        (lambda _, arrays: arrays.pop("levels.joint_sum.3"), FormatError, r"not a whole .*'levels\.joint_sum\.3'"),
        (set_array("levels.single_sum", lambda x: x[:, :2]), StatisticsError, "single_sum has shape"),
        (set_array("levels.joint_sum.4", lambda x: x[..., :-1]), StatisticsError, "joint_sum 4 has shape"),
        (set_array("levels.joint_sum.4", lambda x: x - 1e9), StatisticsError, "negative cost"),
        (set_array("levels.log_bias", lambda x: x * np.nan), StatisticsError, "not finite"),
    ],
)
def test_damaged_files_are_refused(change: Change, error: type[HeatKVError], phrase: str, tmp_path: Path) -> None:
    rewrite(tmp_path / "s.safetensors", change)
    with pytest.raises(error, match=phrase):
        Statistics.load(tmp_path / "s.safetensors")


def test_single_precision_is_read_as_double(tmp_path: Path) -> None:
    rewrite(tmp_path / "s.safetensors", set_array("levels.log_bias", lambda x: x.astype(np.float32)))
    levels = Statistics.load(tmp_path / "s.safetensors").levels
    assert levels is not None
    assert levels.log_bias.dtype == np.float64


@pytest.mark.parametrize("told", [None, [], 3])
def test_a_header_that_is_no_object_is_refused(told: Any, tmp_path: Path) -> None:
    path = tmp_path / "s.safetensors"
    rewrite(path, lambda header, arrays: None)
    with safe_open(path, framework="numpy") as file:
        header = json.loads(file.metadata()["heatkv"])
    save_file(load_file(path), path, metadata={"heatkv": json.dumps({**header, "levels": told})})
    with pytest.raises(FormatError, match=r"s\.safetensors is not a whole statistics file"):
        Statistics.load(path)
