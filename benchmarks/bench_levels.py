"""How long the best plan with levels takes and how good it provably is: `python benchmarks/bench_levels.py`.

`allocate_levels` with all levels beside the same that only drops cells, on synthetic heavy-tailed costs with a fixed
seed for published geometries, after a fixed matrix product. All times are processor time on one thread, which other
programs on the machine disturb least. Prints a table; benchmarks/results/levels.json was written with --out. `make
bench` times the smallest.
"""

from __future__ import annotations

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
from heatkv.core.level_statistics import LevelStatistics
from heatkv.core.levels import LEVELS, NONE, LevelChoices, log_counts
from heatkv.levels.columns import ALL_LEVELS, allocate_levels
from heatkv.models.catalogue import model_info
from heatkv.profiling.measure.environment import environment
from heatkv.solve.checkpoints import Capacity

SEED = 0
TARGET_SECONDS = {"emoji": 5.0, "var-d16": 30.0, "var-d30": 120.0, "infinity-2b": 120.0}
TARGET_GAP = 0.005
BUDGETS = ("5%", "10%", "20%")
KINDS = {"levels": ALL_LEVELS, "drop": (0,)}
DIMENSIONS = 4
"""Of the made-up outputs, which add up as vectors: errors of several cells help or hinder each other."""


def heavy_tailed(geometry: CacheGeometry, seed: int) -> LevelStatistics:
    """Heads differ by orders of magnitude in how far back they look and how much they matter, and a cell's coarser
    levels lose a share of it that differs from head to head.

    Dropping moves a head's output to what is left, renormalised; a coarser cell moves it some other way.
    """
    rng = np.random.default_rng(seed)
    layers, heads, schedule = geometry.layers, geometry.heads, geometry.schedule
    scales, tokens = len(schedule), np.array(schedule.tokens)
    choices = LevelChoices(schedule)
    distance = np.arange(scales)[:, None] - np.arange(scales)
    decay = rng.exponential(1.0, (layers, heads, 1, 1))
    logits = np.log(tokens) - decay * distance + rng.normal(0, 1.5, (layers, heads, 1, scales))
    mass = np.where(distance >= 0, np.exp(logits + rng.normal(0, 0.5, (layers, heads, scales, scales))), 0)
    mass /= mass.sum(axis=3, keepdims=True)
    weight = np.exp(rng.normal(-6, 2, (layers, heads)))
    lost_mean = rng.beta(2, 3, (layers, heads, scales))
    zero, one = np.zeros_like(lost_mean), np.ones_like(lost_mean)
    lost = np.stack([zero, lost_mean * rng.beta(2, 4, lost_mean.shape), lost_mean, one], axis=-1)  # of every level
    # outputs of every source less the head's own, and what its mean token lacks
    of_source, lacks = rng.normal(0, 1, (2, layers, heads, scales, scales, DIMENSIONS))
    of_source -= (mass[..., None] * of_source).sum(axis=3, keepdims=True)
    sums, single = [], np.zeros((layers, heads, scales, scales, NONE + 1))
    for target in range(scales):
        table = choices.combinations(target)
        change = np.zeros((layers, heads, len(table), DIMENSIONS))
        left = np.ones((layers, heads, len(table)))
        for i, source in enumerate(choices.joint_sources(target)):
            share, none = mass[:, :, target, source, None], table[:, i] == NONE
            change -= (share * none)[..., None] * of_source[:, :, target, source, None]
            moved = share * lost[:, :, source][..., table[:, i]] * ~none
            change += moved[..., None] * lacks[:, :, target, source, None]
            left -= share * none
        sums.append(tokens[target] * weight[..., None] * (change**2).sum(-1) / left**2)
        for source in choices.other_sources(target):
            share = mass[:, :, target, source]
            coarse = ((lacks[:, :, target, source] ** 2).sum(-1) * share**2)[..., None] * lost[:, :, source] ** 2
            coarse[..., NONE] = (of_source[:, :, target, source] ** 2).sum(-1) * (share / (1 - share)) ** 2
            single[:, :, target, source] = tokens[target] * weight[..., None] * coarse
    bias = np.stack([log_counts(schedule, level) for level in LEVELS], axis=-1)
    log_bias = np.broadcast_to(bias, (layers, heads, *bias.shape))
    return LevelStatistics(choices, "error", log_bias, tuple(sums), single, ("synthetic",), ())


@cache
def costs(model: str) -> LevelStatistics:
    return heavy_tailed(model_info(model).geometry(), SEED)


def capacity(model: str, budget: str) -> Capacity:
    geometry = model_info(model).geometry()
    room = Budget.parse(budget).token_heads(geometry)
    return Capacity(geometry.layers, geometry.heads, geometry.schedule.tokens, room)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("budget", BUDGETS)
def bench_levels(benchmark: Any, budget: str, kind: str) -> None:
    """Costs in memory to the level of every cell."""
    given = (costs("emoji"), capacity("emoji", budget), KINDS[kind])
    found = benchmark.pedantic(allocate_levels, given, rounds=1)
    benchmark.extra_info["gap_percent"] = round(100 * found.gap, 4)


def measure(model: str, budget: str, kind: str) -> dict[str, Any]:
    began, began_wall = time.process_time(), time.perf_counter()
    found = allocate_levels(costs(model), capacity(model, budget), KINDS[kind])
    return {
        "processor_seconds": round(time.process_time() - began, 3),
        "wall_seconds": round(time.perf_counter() - began_wall, 3),
        "cost": found.cost,
        "bound": found.bound,
        "gap": found.gap,
    }


def missed(rows: list[dict[str, Any]]) -> list[str]:
    """What is slower, or proven less well, than it should be."""
    return [
        f"{row['model']} at {row['budget']}, {kind}"
        for row in rows
        for kind in KINDS
        if row[kind]["processor_seconds"] > TARGET_SECONDS[row["model"]] or row[kind]["gap"] > TARGET_GAP
    ]


def main() -> None:
    arguments = parse(__doc__, TARGET_SECONDS)
    torch.set_num_threads(1)
    told = {
        "environment": to_builtins(environment(torch.device("cpu"))),
        "seed": SEED,
        "target_seconds": TARGET_SECONDS,
        "target_gap": TARGET_GAP,
    }
    rows: list[dict[str, Any]] = []
    print("model        budget | levels s      gap |  drop s      gap | cost of drop | product ms")
    for model in arguments.models:
        for budget in BUDGETS:
            row: dict[str, Any] = {"model": model, "budget": budget}
            row["matrix_product_1024_fp32_processor_ms"] = round(matrix_product_ms(), 3)
            row |= {kind: measure(model, budget, kind) for kind in KINDS}
            rows.append(row)
            levels, drop = row["levels"], row["drop"]
            print(
                f"{model:12} {budget:>6} | {levels['processor_seconds']:8.2f} {levels['gap']:8.4%} | "
                f"{drop['processor_seconds']:7.2f} {drop['gap']:8.4%} | {drop['cost'] / levels['cost']:11.2f}x | "
                f"{row['matrix_product_1024_fp32_processor_ms']:10.1f}",
                flush=True,
            )
        costs.cache_clear()
    if arguments.out:
        write_json(arguments.out, {**told, "rows": rows, "missed": missed(rows)}, indent=1)
    for name in missed(rows):
        print(f"target missed: {name}")


if __name__ == "__main__":
    main()
