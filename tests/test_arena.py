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
from heatkv.engine.layout import ArenaLayout, slots_in
from heatkv.policies.base import PlanningProblem
from heatkv.policies.heatkv import Random

GOLDEN = Path(__file__).parent / "golden" / "schedules"


def check_layout(plan: Plan) -> ArenaLayout:
    """Run the plan in the cache's order over an array that says which cell owns every slot."""
    layout = ArenaLayout.for_plan(plan)
    layers, heads, scales = plan.last_read.shape
    ends = [last_read.tolist() for _, last_read in plan.levels]
    live = plan.live.tolist()
    if layers * heads <= 64:
        live = level_live_table(plan) if plan.coarse else live_table(ends[0], plan.schedule.tokens)
    assert layout.slots == max(map(max, live)) == plan.peak_token_heads

    def read_at(l: int, h: int, s: int, t: int) -> int | None:
        """The level at which target t reads a cell."""
        reading = (i for i, last_read in enumerate(ends) if last_read[l][h][s] >= t)
        return next(reading, None) if s < t < scales else None

    free = -1
    owner, placed = np.full(layout.slots, free), set()
    for t in range(scales):
        for l in range(layers):
            starting = []
            for h, s in np.ndindex(heads, t + 1):
                now, then, name = read_at(l, h, s, t), read_at(l, h, s, t + 1), (l * heads + h) * scales + s
                if now is not None:  # every cell that target t reads is still there, whole
                    slots = slots_in(layout.runs[now, l, h, s])
                    assert (owner[slots] == name).all()
                    assert len(slots) == tokens_at(plan.levels[now][0], plan.schedule.scales[s])
                    if then != now:
                        owner[owner == name] = free
                if then is not None and then != now:
                    starting.append((then, h, s, name))
            for then, h, s, name in starting:  # all that go have gone by now
                runs = layout.runs[then, l, h, s]
                placed.add((then, l, h, s))
                assert all(size > 0 and first >= 0 for first, size in runs)
                slots = slots_in(runs)
                assert len(set(slots.tolist())) == tokens_at(plan.levels[then][0], plan.schedule.scales[s])
                assert (owner[slots] == free).all()
                owner[slots] = name
            assert (owner != free).sum() == live[t][l]
    assert (owner == free).all()
    assert layout.runs.keys() == placed
    return layout


@settings(max_examples=200)
@given(plan=st.one_of(plans(), level_plans()))
def test_live_cells_share_no_slot(plan: Plan) -> None:
    check_layout(plan)


@settings(max_examples=30)
@given(share=shares(), seed=st.integers(0, 99))
def test_tight_plans_of_a_policy(share: Any, seed: int) -> None:
    """Plans that fill their budget, where cells must be split."""
    geometry = CacheGeometry(4, 3, 4, ScaleSchedule.of([(1, 1), (2, 1), (3, 2), (4, 4), (5, 6), (7, 8)]))
    check_layout(Random(sink_scales=0).plan(PlanningProblem(geometry, Budget("share", share), seed=seed)))


def test_a_cell_split_into_two_holes() -> None:
    """Layers 0 and 2 drop scale 0 and leave a hole of one token each; scale 1 with two tokens needs both."""
    geometry = CacheGeometry(3, 1, 4, ScaleSchedule.of([(1, 1), (1, 2), (1, 2)]))
    last_read = np.array([[[1, 1, 2]], [[2, 1, 2]], [[1, 2, 2]]])
    layout = check_layout(Plan("by-hand", geometry, last_read, budget=1.0, budget_token_heads=9, sink_scales=0))
    assert layout.slots == 3
    assert sorted(layout.runs[0, 2, 0, 1]) == [(0, 1), (2, 1)]


def test_a_plan_that_caches_nothing_takes_no_slot() -> None:
    geometry = CacheGeometry(2, 2, 4, ScaleSchedule.square((1, 2, 3)))
    last_read = np.broadcast_to(np.arange(3), (2, 2, 3))
    layout = check_layout(Plan("none", geometry, last_read, budget=0.5, budget_token_heads=10, sink_scales=0))
    assert (layout.slots, layout.runs) == (0, {})


@pytest.mark.parametrize("name", ["heatkv_2b_0.05", "heatkv_2b_0.2", "heatkv_8b_0.1"])
def test_golden_schedules_lie_in_few_runs(name: str) -> None:
    golden = json.loads((GOLDEN / f"{name}.json").read_text())
    schedule = ScaleSchedule.infinity("1M", 1.0)
    geometry = CacheGeometry(golden["layers"], golden["heads"], 128, schedule)
    last_read, tokens = np.array(golden["last_read"]), int(golden["budget_tokens"])
    plan = Plan("heatkv", geometry, last_read, golden["budget"], tokens, golden["sink_scales"])
    layout = ArenaLayout.for_plan(plan)
    assert layout.slots == golden["peak_tokens"] <= golden["budget_tokens"]
    counts = [len(runs) for runs in layout.runs.values()]
    assert np.mean(counts) <= 1.25
    assert counts.count(1) >= 0.9 * len(counts)
    assert max(counts) <= 50
    # cells kept to the end are never given up: together they overlap nowhere
    kept = [slots_in(runs) for (_, *cell), runs in layout.runs.items() if last_read[tuple(cell)] == len(schedule) - 1]
    assert len(np.unique(np.concatenate(kept))) == sum(map(len, kept))
