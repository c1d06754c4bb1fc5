"""The slot layout of a plan: no two live cells share a slot, and the arena is exactly as large as the peak."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import level_live_table, level_plans, live_table, plans, shares, tokens_at

from heatkv.core.budget import Budget
from heatkv.core.geometry import CacheGeometry
from heatkv.core.plan import Plan
from heatkv.core.schedule import ScaleSchedule
from heatkv.engine.layout import ArenaLayout
from heatkv.policies.base import PlanningProblem
from heatkv.policies.heatkv import Random

GOLDEN = Path(__file__).parent / "golden" / "schedules"


def check_layout(plan: Plan) -> ArenaLayout:
    """Run the plan in the cache's order over an array that says which cell owns every slot."""
    layout = ArenaLayout.of(plan)
    layers, heads, scales = plan.last_read.shape
    ends = [last_read.tolist() for _, last_read in plan.levels]
    live = plan.live.tolist()
    if layers * heads <= 64:
        live = level_live_table(plan) if plan.coarse else live_table(ends[0], plan.schedule.tokens)
    assert layout.slots == max(map(max, live)) == plan.peak_token_heads
    assert len(layout.levels) == len(ends)
    for cells in layout.levels:
        assert (len(cells), len(cells[0]), len(cells[0][0])) == (layers, heads, scales)

    def read_at(l: int, h: int, s: int, t: int) -> int | None:
        """The level at which target t reads a cell."""
        return (
            next((i for i, last_read in enumerate(ends) if last_read[l][h][s] >= t), None) if s < t < scales else None
        )

    free = -1
    owner, placed = np.full(layout.slots, free), set()
    for t in range(scales):
        for l in range(layers):
            starting = []
            for h, s in np.ndindex(heads, t + 1):
                now, then, name = read_at(l, h, s, t), read_at(l, h, s, t + 1), (l * heads + h) * scales + s
                if now is not None:  # every cell that target t reads is still there, whole
                    runs = layout.levels[now][l][h][s]
                    assert all((owner[first : first + size] == name).all() for first, size in runs)
                    assert sum(size for _, size in runs) == tokens_at(plan.levels[now][0], plan.schedule.scales[s])
                    if then != now:
                        owner[owner == name] = free
                if then is not None and then != now:
                    starting.append((then, h, s, name))
            for then, h, s, name in starting:  # all that go have gone by now
                runs = layout.levels[then][l][h][s]
                placed.add((then, l, h, s))
                assert sum(size for _, size in runs) == tokens_at(plan.levels[then][0], plan.schedule.scales[s])
                for first, size in runs:
                    assert size > 0
                    assert 0 <= first <= first + size <= layout.slots
                    assert (owner[first : first + size] == free).all()
                    owner[first : first + size] = name
            assert (owner != free).sum() == live[t][l]
    assert (owner == free).all()
    for i, l, h, s in np.ndindex(len(ends), layers, heads, scales):
        assert bool(layout.levels[i][l][h][s]) == ((i, l, h, s) in placed)
    return layout


@settings(max_examples=200)
@given(plan=plans())
def test_no_two_live_cells_share_a_slot(plan: Plan) -> None:
    layout = check_layout(plan)
    assert layout.cells == (plan.last_read > np.arange(len(plan.schedule)))[:, :, :-1].sum()


@settings(max_examples=200)
@given(plan=level_plans())
def test_cells_at_coarser_levels_share_no_slot_either(plan: Plan) -> None:
    layout = check_layout(plan)
    pieces = [runs for level in layout.levels for heads in level for cells in heads for runs in cells if runs]
    assert layout.cells == len(pieces)  # a cell counts once for every level it is held at


@settings(max_examples=30)
@given(share=shares(), seed=st.integers(0, 99))
def test_tight_plans_of_a_policy(share: Any, seed: int) -> None:
    """Plans that fill their budget, where cells must be split."""
    geometry = CacheGeometry(4, 3, 4, ScaleSchedule.of([(1, 1), (2, 1), (3, 2), (4, 4), (5, 6), (7, 8)]))
    check_layout(Random(sink_scales=0).plan(PlanningProblem(geometry, Budget("share", share), seed=seed)))


def test_a_cell_is_split_where_no_stretch_is_long_enough() -> None:
    """Layers 0 and 2 drop scale 0 and leave a hole of one token each; scale 1 with two tokens needs both."""
    geometry = CacheGeometry(3, 1, 4, ScaleSchedule.of([(1, 1), (1, 2), (1, 2)]))
    last_read = np.array([[[1, 1, 2]], [[2, 1, 2]], [[1, 2, 2]]])
    layout = check_layout(Plan("by-hand", geometry, last_read, budget=1.0, budget_token_heads=9, sink_scales=0))
    assert layout.slots == 3
    assert sorted(layout.runs[2][0][1]) == [(0, 1), (2, 1)]


def test_a_plan_that_caches_nothing_takes_no_slot() -> None:
    geometry = CacheGeometry(2, 2, 4, ScaleSchedule.square((1, 2, 3)))
    last_read = np.broadcast_to(np.arange(3), (2, 2, 3))
    layout = check_layout(Plan("none", geometry, last_read, budget=0.5, budget_token_heads=10, sink_scales=0))
    assert (layout.slots, layout.cells) == (0, 0)


@pytest.mark.parametrize("name", ["heatkv_2b_0.05", "heatkv_2b_0.1", "heatkv_2b_0.2", "heatkv_8b_0.1"])
def test_layouts_of_infinity(name: str) -> None:
    told = json.loads((GOLDEN / f"{name}.json").read_text())
    schedule = ScaleSchedule.infinity("1M", 1.0)
    plan = Plan(
        policy="heatkv",
        geometry=CacheGeometry(told["layers"], told["heads"], 128, schedule),
        last_read=np.array(told["last_read"]),
        budget=told["budget"],
        budget_token_heads=int(told["budget_tokens"]),
        sink_scales=told["sink_scales"],
    )
    layout = ArenaLayout.of(plan)
    assert layout.slots == told["peak_tokens"] <= told["budget_tokens"]
    runs = [cell for heads in layout.runs for cells in heads for cell in cells if cell]
    assert sum(map(len, runs)) <= 1.25 * len(runs)
    assert sum(len(cell) == 1 for cell in runs) >= 0.9 * len(runs)
    assert max(map(len, runs)) <= 50
    # the sinks and the cells kept to the end are never given up: together they overlap nowhere
    kept = np.zeros(layout.slots, dtype=np.int64)
    for (l, h, s), last in np.ndenumerate(plan.last_read[:, :, :-1]):
        if last == len(schedule) - 1:
            for first, size in layout.runs[l][h][s]:
                kept[first : first + size] += 1
    assert kept.max() == 1
