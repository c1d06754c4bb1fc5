"""Scale schedules: the published ones, number by number, and what is derived from any."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import schedules

from heatkv.core.schedule import MAX_SCALES, MAX_SIDE, ScaleSchedule
from heatkv.errors import ScheduleError

PUBLISHED: dict[str, Any] = json.loads((Path(__file__).parent / "data" / "infinity_schedules.json").read_text())
SIZES = ("0.06M", "0.25M", "0.60M", "1M")
TEMPLATES = list(PUBLISHED["templates"].values())


@pytest.mark.parametrize(
    ("pixels", "sides", "total", "cached"),
    [
        (256, (1, 2, 3, 4, 5, 6, 8, 10, 13, 16), 680, 424),
        (512, (1, 2, 3, 4, 6, 9, 13, 18, 24, 32), 2240, 1216),
    ],
)
def test_var(pixels: int, sides: tuple[int, ...], total: int, cached: int) -> None:
    for given_as in (pixels, str(pixels), f"{pixels}px"):
        schedule = ScaleSchedule.var(given_as)
        assert schedule.scales == tuple((1, side, side) for side in sides)
    assert schedule.total_tokens == total
    assert schedule.cached_tokens == cached
    assert schedule.offsets[3] == 14  # the three sink scales


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("template", TEMPLATES, ids=list(PUBLISHED["templates"]))
def test_infinity(template: dict[str, Any], size: str) -> None:
    expected = template[size]
    schedule = ScaleSchedule.infinity(size, template["h_div_w"])
    assert schedule.scales == tuple((1, h, w) for h, w in expected["scales"])
    assert len(schedule) == expected["num_scales"]
    assert schedule.total_tokens == expected["tokens_total"]
    assert schedule.cached_tokens == expected["tokens_without_last"]
    # one token covers 16 x 16 pixels
    assert [16 * side for side in schedule.scales[-1][1:]] == expected["image_height_width"]


def test_infinity_knows_exactly_the_published_sizes_and_templates() -> None:
    assert ScaleSchedule.infinity_sizes() == SIZES
    ratios = [template["h_div_w"] for template in TEMPLATES]
    assert [ScaleSchedule.infinity_template(ratio) for ratio in ratios] == ratios
    assert ScaleSchedule.infinity() == ScaleSchedule.infinity("1M", 1.0)


# Halfway between two templates; upstream lists the second of each pair first. A sort by ratio breaks two.
@pytest.mark.parametrize(
    ("ratio", "other", "nearest"),
    [(0.9, 0.8, 1.0), (0.45, 0.4, 0.5), (1.125, 1.25, 1.0), (1.625, 1.75, 1.5), (2.25, 2.5, 2.0), (2.75, 3.0, 2.5)],
)
def test_the_first_listed_template_wins_a_tie(ratio: float, other: float, nearest: float) -> None:
    assert abs(ratio - other) == abs(ratio - nearest)  # a tie in floating point too
    assert ScaleSchedule.infinity("1M", ratio) == ScaleSchedule.infinity("1M", nearest)
    assert ScaleSchedule.infinity("1M", ratio) != ScaleSchedule.infinity("1M", other)


@given(ratio=st.floats(0.1, 10), size=st.sampled_from(SIZES))
def test_the_nearest_template_is_taken(ratio: float, size: str) -> None:
    got = ScaleSchedule.infinity(size, ratio)
    distance = min(abs(template["h_div_w"] - ratio) for template in TEMPLATES)
    first = next(template for template in TEMPLATES if abs(template["h_div_w"] - ratio) == distance)
    assert got.to_json() == [[1, h, w] for h, w in first[size]["scales"]]


@given(schedule=schedules())
def test_derived_numbers(schedule: ScaleSchedule) -> None:
    flat = [
        (scale, frame, row, column)
        for scale, (t, h, w) in enumerate(schedule.scales)
        for frame in range(t)
        for row in range(h)
        for column in range(w)
    ]
    assert schedule.total_tokens == len(flat)
    assert schedule.cached_tokens == sum(scale < len(schedule) - 1 for scale, *_ in flat)
    assert schedule.offsets[0] == 0
    assert len(schedule.offsets) == len(schedule) + 1
    for scale in range(len(schedule)):
        part = flat[schedule.slice(scale)]
        assert len(part) == schedule.tokens[scale]
        assert {entry[0] for entry in part} == {scale}


@given(schedule=schedules())
def test_round_trips(schedule: ScaleSchedule) -> None:
    again = ScaleSchedule.of(json.loads(json.dumps(schedule.to_json())))
    assert again == schedule
    assert hash(again) == hash(schedule)
    if all(t == 1 for t, _, _ in schedule.scales):
        assert ScaleSchedule.of([(h, w) for _, h, w in schedule.scales]) == schedule


def test_frames_count() -> None:
    clip = ScaleSchedule.of([[1, 2, 3], [4, 2, 3], [5, 7, 11]])
    assert clip.tokens == (6, 24, 385)
    assert clip.offsets == (0, 6, 30, 415)
    assert clip != ScaleSchedule.of([[1, 2, 3], [4, 3, 2], [5, 7, 11]])


def test_names() -> None:
    assert str(ScaleSchedule.square((1, 2, 3))) == "1,2,3"
    assert str(ScaleSchedule.of([(1, 1), (2, 3)])) == "1x1,2x3"
    assert str(ScaleSchedule.of([(1, 1, 1), (4, 2, 3)])) == "1x1,4x2x3"


SIDES = [(0, 1), (1, -1), (1, MAX_SIDE + 1), (1, 1.0), (True, 1), (1, "2"), (1, None), (1,), (1, 1, 1, 1), (), "12"]


@pytest.mark.parametrize("scale", SIDES, ids=repr)
def test_a_malformed_scale_is_named(scale: Any) -> None:
    with pytest.raises(ScheduleError, match=rf"scale 1 is .* whole numbers from 1 to {MAX_SIDE}"):
        ScaleSchedule.of([(1, 1), scale])


@pytest.mark.parametrize("scales", [[], [(4, 4)], [(1, 1)] * (MAX_SCALES + 1)], ids=len)
def test_schedules_have_2_to_1024_scales(scales: list[tuple[int, int]]) -> None:
    with pytest.raises(ScheduleError, match=f"2 to {MAX_SCALES} scales, this one has {len(scales)}"):
        ScaleSchedule.of(scales)


@pytest.mark.parametrize("value", [7, None, [1, 2], [None, None]])
def test_no_list_of_scales(value: Any) -> None:
    with pytest.raises(ScheduleError, match=r"\[t, h, w\] or \[h, w\]"):
        ScaleSchedule.of(value)


def test_unknown_presets_name_the_known_ones() -> None:
    with pytest.raises(ScheduleError, match=r"no 300 px schedule; known: 256, 512"):
        ScaleSchedule.var(300)
    with pytest.raises(ScheduleError, match=r"no size '2M'; known: 0\.06M, 0\.25M, 0\.60M, 1M"):
        ScaleSchedule.infinity("2M")


@pytest.mark.parametrize("ratio", [0.0, -1.0, 0.0999, 10.1, float("inf"), float("nan")])
def test_a_ratio_outside_its_range(ratio: float) -> None:
    with pytest.raises(ScheduleError, match=rf"ratio {ratio} is outside 0\.1 to 10"):
        ScaleSchedule.infinity("1M", ratio)
