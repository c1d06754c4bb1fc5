"""How long the best plan takes and how good it provably is: `python benchmarks/bench_allocation.py`.

The linear program, its greedy stand-in and HeatKV's rule plan side by side for published geometries, on synthetic
heavy-tailed statistics with a fixed seed, in turns with a fixed matrix product. All times are processor time on one
thread, which other programs on the machine disturb least. Prints a table; benchmarks/results/allocation.json was
written with --out. `make bench` times the same plans.
"""

from __future__ import annotations

import statistics
import time
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from msgspec import to_builtins
from yardstick import matrix_product_ms, parse

from heatkv.core.budget import Budget
from heatkv.core.geometry import CacheGeometry
from heatkv.core.io import write_json
from heatkv.core.statistics import Provenance, Statistics
from heatkv.models.catalogue import model_info
from heatkv.policies.base import EvictionPolicy, PlanningProblem
from heatkv.policies.heatkv import HeatKV
from heatkv.policies.lp import HeatKVLP
from heatkv.profiling.measure.environment import environment

REPEATS, SEED = 5, 0
MODELS = ("infinity-2b", "infinity-8b", "var-d30")
BUDGETS = ("5%", "10%", "20%")
POLICIES: dict[str, EvictionPolicy] = {
    "lp": HeatKVLP(sink_scales=1, value="error"),
    "greedy": HeatKVLP(sink_scales=1, value="error", solver="greedy"),
    "rule": HeatKV(),
}
TARGET_SECONDS = {"infinity-2b": 1.0, "infinity-8b": 3.0}
TARGET_GAP = 0.005


def heavy_tailed(geometry: CacheGeometry, seed: int) -> Statistics:
    """Heads differ by orders of magnitude in how far back they look; drop errors follow the squared mass."""
    rng = np.random.default_rng(seed)
    layers, heads, scales = geometry.layers, geometry.heads, len(geometry.schedule)
    tokens = np.array(geometry.schedule.tokens)
    distance = np.arange(scales)[:, None] - np.arange(scales)
    decay = rng.exponential(1.0, (layers, heads, 1, 1))
    logits = np.log(tokens) - decay * distance + rng.normal(0, 1.5, (layers, heads, 1, scales))
    logits = logits + rng.normal(0, 0.5, (layers, heads, scales, scales))
    mass = np.where(distance >= 0, np.exp(logits), 0)
    mass /= mass.sum(axis=3, keepdims=True)
    error = np.where(distance > 0, tokens[:, None] * mass**2 * np.exp(rng.normal(-6, 2, (layers, heads, 1, 1))), 0)
    told = Provenance("synthetic", f"seed {seed}", None, {}, ("synthetic",))
    return Statistics(geometry.schedule, mass, mass**2, told, all_mass_sum=mass, error_sum=error)


@cache
def problem(model: str, budget: str) -> PlanningProblem:
    geometry = model_info(model).geometry()
    return PlanningProblem(geometry, Budget.parse(budget), heavy_tailed(geometry, SEED), model=model)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("model", MODELS)
def bench_allocation(benchmark: Any, model: str, budget: str, policy: str) -> None:
    """Statistics in memory to a validated plan."""
    instance = problem(model, budget)
    plan = benchmark.pedantic(POLICIES[policy].plan, (instance,), rounds=3, warmup_rounds=1)
    if plan.gap is not None:
        benchmark.extra_info["gap_percent"] = round(100 * plan.gap, 4)


def measure(model: str, budget: str) -> dict[str, Any]:
    """All policies in turns with the fixed matrix product; values as shares of the linear program's bound."""
    instance = problem(model, budget)
    statistics_ = instance.statistics
    assert statistics_ is not None
    times: dict[str, list[float]] = {name: [] for name in POLICIES}
    walls: dict[str, list[float]] = {name: [] for name in POLICIES}
    plans, products = {}, []
    for _ in range(REPEATS):
        products.append(matrix_product_ms())
        for name, policy in POLICIES.items():
            began, began_wall = time.process_time(), time.perf_counter()
            plans[name] = policy.plan(instance)
            times[name].append(time.process_time() - began)
            walls[name].append(time.perf_counter() - began_wall)
    bound = plans["lp"].value_bound
    assert bound is not None
    product_ms = statistics.median(products)
    row: dict[str, Any] = {
        "model": model,
        "budget": budget,
        "matrix_product_1024_fp32_processor_ms": round(product_ms, 3),
        "value_bound": bound,
    }
    for name, plan in plans.items():
        seconds = statistics.median(times[name])
        value = sum(
            float((statistics_.drop_error[:, :, t, :t] * (plan.last_read[:, :, :t] >= t)).sum())
            for t in range(len(plan.schedule))
        )
        row[name] = {
            "processor_seconds": round(seconds, 4),
            "runs": [round(run, 4) for run in times[name]],
            "wall_seconds": round(statistics.median(walls[name]), 4),
            "share_of_bound": round(value / bound, 6),
            "own_gap": plan.gap,
        }
    return row


def main() -> None:
    arguments = parse(__doc__, MODELS)
    torch.set_num_threads(1)
    before = to_builtins(environment(torch.device("cpu")))
    rows = []
    print("model        budget |   LP s      gap |  greedy s      gap (own bound) |   rule s  of bound | product ms")
    for model in arguments.models:
        for budget in BUDGETS:
            row = measure(model, budget)
            rows.append(row)
            lp, greedy, rule = (row[name] for name in POLICIES)
            seconds = {name: row[name]["processor_seconds"] for name in POLICIES}
            print(
                f"{model:12} {budget:>6} | {seconds['lp']:6.3f} {lp['own_gap']:8.4%} | {seconds['greedy']:9.3f} "
                f"{1 - greedy['share_of_bound']:8.4%} ({greedy['own_gap']:9.4%}) | {seconds['rule']:8.4f} "
                f"{rule['share_of_bound']:9.2%} | {row['matrix_product_1024_fp32_processor_ms']:10.1f}"
            )
    told = {"repeats": REPEATS, "seed": SEED, "target_seconds": TARGET_SECONDS, "target_gap": TARGET_GAP}
    if arguments.out:
        write_json(arguments.out, {"environment": before, **told, "rows": rows}, indent=1)
    for row in rows:
        slow = row["lp"]["processor_seconds"] > TARGET_SECONDS.get(row["model"], float("inf"))
        if slow or row["lp"]["own_gap"] > TARGET_GAP:
            print(f"target missed: {row['model']} at {row['budget']}")


if __name__ == "__main__":
    main()
