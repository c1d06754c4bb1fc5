"""Published per-layer budget files: what is read, and what is refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from heatkv.core.geometry import CacheGeometry
from heatkv.core.schedule import ScaleSchedule
from heatkv.errors import FormatError, StatisticsError
from heatkv.layer_budgets import LayerBudgets

SQUARE = ScaleSchedule.infinity("1M", 1.0)  # 13 scales
# The published budgets at 10 %: scale (from 1), large layers, Max, Min. Every row averages 650 tokens.
PUBLISHED = {
    "2b": (
        CacheGeometry(32, 16, 128, SQUARE),
        [
            (9, [0, 23], 920, 632),
            (10, [0, 23], 1490, 594),
            (11, [0, 23], 2510, 526),
            (12, [0, 23], 4100, 420),
            (13, [0], 6385, 465),
        ],
    ),
    "8b": (
        CacheGeometry(40, 28, 128, SQUARE),
        [
            (9, [0, 1, 2], 909, 629),
            (10, [0, 1, 2], 1464, 584),
            (11, [0, 1, 2], 2463, 503),
            (12, [0, 1, 2], 4054, 374),
            (13, [0, 1, 2], 6200, 200),
        ],
    ),
}

SMALL = CacheGeometry(2, 3, 4, ScaleSchedule.square((1, 2, 3, 4)))
FILE: dict[str, Any] = {
    "Scale 3": {"Block 0": 1, "Block 1": 0, "High": 1, "Max": 5, "Min": 2, "Limit": 5},
    "Scale 4": {"Block 0": 0, "Block 1": 1, "High": 1, "Max": 12, "Min": 3, "Limit": 14},
}


@pytest.mark.parametrize("size", PUBLISHED)
def test_the_published_tables(size: str, tmp_path: Path) -> None:
    geometry, table = PUBLISHED[size]
    written = {
        f"Scale {scale}": {
            **{f"Block {layer}": int(layer in large) for layer in range(geometry.layers)},
            **{"High": len(large), "Max": most, "Min": least, "Limit": most + 4},
        }
        for scale, large, most, least in table
    }
    path = tmp_path / "budgets.json"
    path.write_text(json.dumps(written))
    budgets = LayerBudgets.load(path, geometry)
    assert budgets.first_target == 8
    assert budgets.tokens.shape == budgets.large.shape == (5, geometry.layers)
    assert (budgets.tokens.mean(axis=1) == 650).all()
    for row, (_, large, most, least) in enumerate(table):
        assert np.flatnonzero(budgets.large[row]).tolist() == large
        assert set(budgets.tokens[row, large].tolist()) == {most}
        assert set(np.delete(budgets.tokens[row], large).tolist()) == {least}


def test_a_file_by_hand() -> None:
    budgets = LayerBudgets.from_json(FILE, SMALL, "given.json")
    assert budgets.first_target == 2
    assert budgets.tokens.tolist() == [[5, 2], [3, 12]]
    assert budgets.large.tolist() == [[True, False], [False, True]]
    for array in (budgets.tokens, budgets.large):
        with pytest.raises(ValueError, match="read-only"):
            array[0, 0] = 1


def changed(*path: str, to: Any) -> Any:
    told = copy.deepcopy(FILE)
    place = told
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = to
    return told


def without(*path: str) -> Any:
    told = copy.deepcopy(FILE)
    place = told
    for step in path[:-1]:
        place = place[step]
    del place[path[-1]]
    return told


@pytest.mark.parametrize(
    ("told", "error", "phrase"),
    [
        ([], FormatError, "given.json is no object of budgets by scale"),
        ({}, FormatError, "no object of budgets"),
        (None, FormatError, "no object of budgets"),
        (
            {"format": "heatkv-plan", "version": 1},
            FormatError,
            "must hold 'Scale n' for consecutive n, not 'format, ver",
        ),
        (changed("Scale 6", to={}), FormatError, "consecutive"),
        (changed("Scale 04", to={}), FormatError, "consecutive"),
        (dict(reversed(FILE.items())), FormatError, "consecutive"),
        (without("Scale 4"), StatisticsError, "scales 3 to 3, counted from 1; the schedule's scales 2 to 4 read"),
        (changed("Scale 5", to=FILE["Scale 4"]), StatisticsError, "budgets for scales 3 to 5"),
        ({f"Scale {n}": FILE["Scale 3"] for n in (1, 2, 3, 4)}, StatisticsError, "scales 1 to 4"),
        (changed("Scale 4", to=[1, 2]), FormatError, "given.json: Scale 4 is no object"),
        (changed("Scale 3", "Mean", to=3), FormatError, "Scale 3 holds 'Mean', which a published file does not"),
        (without("Scale 3", "Block 0"), FormatError, "without a gap"),
        (changed("Scale 3", "Block 3", to=0), FormatError, "without a gap"),
        (changed("Scale 3", "Block 2", to=0), StatisticsError, "Scale 3 is of 3 layers, the model has 2"),
        (without("Scale 4", "Block 1"), StatisticsError, "Scale 4 is of 1 layers, the model has 2"),
        (without("Scale 3", "Max"), FormatError, "'Max' is None; it must be a whole number"),
        (without("Scale 3", "High"), FormatError, "'High' is None"),
        (changed("Scale 3", "Block 0", to=2), FormatError, "'Block 0' is 2; it must be a whole number from 0 to 1"),
        (changed("Scale 3", "Block 0", to=True), FormatError, "'Block 0' is True"),
        (changed("Scale 3", "Max", to=5.0), FormatError, r"'Max' is 5\.0"),
        (changed("Scale 3", "Min", to=-1), FormatError, "'Min' is -1"),
        (changed("Scale 3", "Max", to=10**400), FormatError, "'Max' is 1000"),
        (changed("Scale 3", "Min", to="2"), FormatError, "'Min' is '2'"),
        (changed("Scale 3", "High", to=2), FormatError, "says High 2, but 1 layers are marked 1"),
        (changed("Scale 4", "Min", to=13), FormatError, "Scale 4 says Min 13, above Max 12"),
    ],
)
def test_wrong_files_are_refused(told: Any, error: type[Exception], phrase: str) -> None:
    with pytest.raises(error, match=phrase):
        LayerBudgets.from_json(told, SMALL, "given.json")


def test_unreadable_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "budgets.json"
    with pytest.raises(FormatError, match="cannot read"):
        LayerBudgets.load(path, SMALL)
    for text in (json.dumps(FILE)[:-1], '{"Scale 3": NaN}', ""):
        path.write_text(text)
        with pytest.raises(FormatError, match="is not JSON"):
            LayerBudgets.load(path, SMALL)


def test_arrays_are_checked() -> None:
    tokens, large = np.ones((2, 3)), np.zeros((2, 3))
    LayerBudgets(1, tokens, large)
    for wrong in ((1, tokens[0], large), (1, tokens, large[:1]), (1, tokens[:0], large[:0])):
        with pytest.raises(StatisticsError, match=r"budgets are \(targets, layers\)"):
            LayerBudgets(*wrong)
    for wrong in ((0, tokens, large), (1, -tokens, large)):
        with pytest.raises(StatisticsError, match="not below 0, of targets from scale 1 on"):
            LayerBudgets(*wrong)
