"""How long planning takes, without start-up: `make bench`, or `pytest benchmarks --benchmark-only`.

Every time stands beside that of a fixed matrix product on one thread of the same machine, in the same run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from bench_arena import runs_per_cell

from heatkv.core.budget import Budget
from heatkv.core.rankings import HeadRankings
from heatkv.engine.layout import ArenaLayout
from heatkv.models.catalogue import model_info
from heatkv.policies.base import PlanningProblem
from heatkv.policies.heatkv import HeatKV

ORDERS = Path(__file__).parents[1] / "tests" / "golden" / "orders"


def problem(size: str, budget: str) -> PlanningProblem:
    geometry = model_info(f"infinity-{size}").geometry()
    rankings = HeadRankings.load_orders(ORDERS / f"{size}.json", geometry)
    return PlanningProblem(geometry, Budget.parse(budget), rankings=rankings)


def bench_yardstick(benchmark: Any) -> None:
    torch.set_num_threads(1)
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    benchmark(torch.mm, a, b)


@pytest.mark.parametrize("budget", ["5%", "10%", "20%"])
@pytest.mark.parametrize("size", ["2b", "8b"])
def bench_heatkv_plan(benchmark: Any, size: str, budget: str) -> None:
    """Rankings in memory to a validated plan. The ranks are computed anew every time."""

    def plan() -> None:
        rankings = HeadRankings(given.layers, given.heads, given.first_scale, given.order)
        HeatKV().plan(PlanningProblem(instance.geometry, instance.budget, rankings=rankings))

    instance = problem(size, budget)
    assert instance.rankings is not None
    given = instance.rankings
    benchmark(plan)


@pytest.mark.parametrize("size", ["2b", "8b"])
def bench_arena_layout(benchmark: Any, size: str) -> None:
    """A plan to the slots of every cell."""
    plan = HeatKV().plan(problem(size, "10%"))
    layout = benchmark(ArenaLayout.for_plan, plan)
    benchmark.extra_info["runs_per_cell"] = round(runs_per_cell(layout), 3)
