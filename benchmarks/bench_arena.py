"""Bytes that arenas really take, over their budgets: `python benchmarks/bench_arena.py`.

Plans of HeatKV's rule from the published rankings of Infinity-2B and 8B, square 1M schedule, two rows in bf16; every
arena is allocated, and its size read from its storage. Beside it: the time of the layout, how many runs a cell is
split into, and what a cache needs that is no cached token: the running layer's own keys and values, the tables of what
is read where, and what attention gathers into. Coded: the same plan with int8 storage, over its own bytes' budget.
`--out benchmarks/results/arena.json` writes the published result.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from msgspec import to_builtins
from yardstick import matrix_product_ms

from heatkv.core.budget import Budget
from heatkv.core.io import write_json
from heatkv.core.rankings import HeadRankings
from heatkv.engine.arena_cache import KVCache
from heatkv.engine.layout import ArenaLayout
from heatkv.models.catalogue import model_info
from heatkv.policies.base import PlanningProblem
from heatkv.policies.heatkv import HeatKV
from heatkv.profiling.measure.environment import environment

ORDERS = Path(__file__).parents[1] / "tests" / "golden" / "orders"
BUDGETS = ("5%", "10%", "15%", "20%", "30%", "50%")
ROWS, STORAGE = 2, "bfloat16"
MOST_LAYOUT_S, MOST_RUNS = 0.1, 1.25


def runs_per_cell(layout: ArenaLayout) -> float:
    """Mean number of runs of a held cell; 1 is perfect."""
    return sum(map(len, layout.runs.values())) / len(layout.runs)


def measure(size: str, budget: str) -> dict[str, Any]:
    geometry = model_info(f"infinity-{size}").geometry()
    rankings = HeadRankings.load_orders(ORDERS / f"{size}.json", geometry)
    plan = HeatKV().plan(PlanningProblem(geometry, Budget.parse(budget), rankings=rankings))
    took = []
    for _ in range(5):
        began = time.process_time()
        layout = ArenaLayout.for_plan(plan)
        took.append(time.process_time() - began)
    cache = KVCache(plan, ROWS, getattr(torch, STORAGE))
    allowed = geometry.bytes(plan.budget_token_heads, ROWS, STORAGE)
    row = {
        "model": f"infinity-{size}",
        "budget": budget,
        "budget_bytes": allowed,
        "allocated_bytes": cache.allocated_bytes,
        "allocated_over_budget": round(cache.allocated_bytes / allowed, 6),
        "runs_per_cell": round(runs_per_cell(layout), 4),
        "cells": len(layout.runs),
        "layout_s": round(sorted(took)[2], 4),
        "current_bytes": cache.current_bytes,
        "index_bytes": cache.index_bytes,
        "workspace_bytes": cache.workspace_bytes,
    }
    del cache
    coded, storage = KVCache(plan, ROWS, getattr(torch, STORAGE), code="int8"), f"int8/{STORAGE}"
    row["coded_allocated_bytes"] = coded.allocated_bytes
    row["coded_allocated_over_budget"] = round(
        coded.allocated_bytes / geometry.bytes(plan.budget_token_heads, ROWS, storage), 6
    )
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="also write the result as JSON")
    out = parser.parse_args().out
    torch.set_num_threads(1)
    before = matrix_product_ms()
    rows = [measure(size, budget) for size in ("2b", "8b") for budget in BUDGETS]
    print("model        budget      MiB /budget  runs/cell  layout s  own k, v  tables  workspace  int8 MiB  /budget")
    for row in rows:
        mib = {name: value / 2**20 for name, value in row.items() if name.endswith("_bytes")}
        print(
            f"{row['model']:12} {row['budget']:>6} {mib['allocated_bytes']:8.1f} {row['allocated_over_budget']:8.4f} "
            f"{row['runs_per_cell']:10.3f} {row['layout_s']:9.4f} {mib['current_bytes']:9.1f} "
            f"{mib['index_bytes']:7.1f} {mib['workspace_bytes']:10.1f} {mib['coded_allocated_bytes']:9.1f} "
            f"{row['coded_allocated_over_budget']:9.4f}"
        )
    worst = {name: max(row[name] for row in rows) for name in ("allocated_over_budget", "runs_per_cell", "layout_s")}
    print(f"largest: {worst}; asked: 1, {MOST_RUNS}, {MOST_LAYOUT_S}")
    print(f"1024 cubed fp32 product: {before:.1f} ms before, {matrix_product_ms():.1f} ms after")
    if out is not None:
        told = {
            "environment": to_builtins(environment(torch.device("cpu"))),
            "matrix_product_1024_fp32_processor_ms": before,
        }
        write_json(out, told | {"rows": rows}, indent=1)


if __name__ == "__main__":
    main()
