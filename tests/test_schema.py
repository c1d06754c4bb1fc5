"""What every reader shares: schemas, arrays of a shape, numbers, suggestions, and messages of one line."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from heatkv.core.schema import convert, float_array, integer_array, number, shown, suggest, whole
from heatkv.errors import FormatError, HeatKVError, PlanError


class Point(msgspec.Struct):
    x: int
    y: dict[str, float]


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"x": 1}, "f.json: object missing required field `y`"),
        ({"x": 2.0, "y": {}}, "f.json: x: expected `int`, got `float`"),
        ({"x": True, "y": {}}, "f.json: x: expected `int`, got `bool`"),
        ({"x": 1, "y": {"a": "b"}}, "f.json: y[...]: expected `float`, got `str`"),
        ([], "f.json: expected `object`, got `array`"),
    ],
)
def test_a_schema_names_the_file_the_place_and_what_must_stand_there(value: Any, said: str) -> None:
    with pytest.raises(FormatError) as caught:
        convert(value, Point, "f.json")
    assert str(caught.value) == said
    assert convert({"x": 1, "y": {"a": 2}, "more": 3}, Point, "f.json") == Point(1, {"a": 2.0})


@pytest.mark.parametrize(
    "value", [[[1, 2]], [[1, 2], [3]], [[1.0, 2], [3, 4]], [[True, False]] * 2, [["1", "2"]] * 2, [[1, 2**64]] * 2, "x"]
)
def test_integer_arrays_of_another_shape_or_kind(value: Any) -> None:
    with pytest.raises(PlanError, match=r"last_read .* whole numbers of shape \(2, 2\)"):
        integer_array(value, (2, 2), "last_read", PlanError)


def test_arrays_are_copies_that_cannot_be_changed() -> None:
    source = np.array([[1, 2], [3, 4]], dtype=np.int32)
    whole_numbers, numbers = integer_array(source, (2, 2), "a", PlanError), float_array(source, (2, 2), "a", PlanError)
    source[:] = 0
    assert (whole_numbers.dtype, numbers.dtype) == (np.int64, np.float64)
    for array in (whole_numbers, numbers):
        assert array.tolist() == [[1, 2], [3, 4]]
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0
    with pytest.raises(PlanError, match="numbers of shape"):
        float_array([["a"]], (1, 1), "a", PlanError)


def test_numbers_of_every_library() -> None:
    for three in (3, np.int64(3), np.uint8(3), np.array(3), torch.tensor(3)):
        assert type(whole(three, "x", PlanError, 0, 3)) is int
    for half in (0.5, np.float32(0.5), torch.tensor(0.5), Fraction(1, 2), np.array(0.5)):
        assert number(half, "x", PlanError) == 0.5
    for wrong in (None, True, 3.0, "3", 4, -1, [3], 10**400):
        with pytest.raises(PlanError, match=r"x is .* whole number from 0 to 3"):
            whole(wrong, "x", PlanError, 0, 3)
    for wrong in (None, True, "0.5", float("nan"), float("inf"), -1, [0.5], 10**400):
        with pytest.raises(PlanError, match=r"x is .* finite number of at least 0"):
            number(wrong, "x", PlanError, 0)


def test_suggestions() -> None:
    assert suggest("heatvk", ["heatkv", "full"]) == "; did you mean 'heatkv'? Known: heatkv, full"
    assert suggest("zzz", ["heatkv", "full"]) == ". Known: heatkv, full"


def test_what_is_shown_is_one_short_line() -> None:
    assert shown([1, 2.5, "x", None]) == "[1, 2.5, 'x', None]"
    assert len(shown("a" * 1000)) <= 60
    assert "\n" not in shown(np.ones((3, 3)))


def test_messages_are_one_line_that_can_be_printed() -> None:
    assert str(HeatKVError("a\nb\x1b[31m\ud800")) == "a b\N{REPLACEMENT CHARACTER}[31m\N{REPLACEMENT CHARACTER}"
    assert len(str(HeatKVError("a" * 10**6))) == 2000
