"""Attention under a 10 % plan beside full and no cache, one layer, one thread: `python benchmarks/bench_attention.py`.

For Infinity-2B (16 heads x 128) and 8B (28 x 128) in fp32 and bf16: attention of the last three scales of the square 1M
schedule, gathering included, all variants in turns in one process. The layer is the one of the plan of the published
rankings that holds what is nearest to a tenth of the full cache while the last scale runs. `--fit` measures the cost
model anew and writes heatkv/engine/attention/costs.json; `--out` writes the published result.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from msgspec import to_builtins
from numpy.typing import NDArray
from yardstick import matrix_product_ms

import heatkv.engine.attention
from heatkv.core.budget import Budget
from heatkv.core.io import read_json, write_json
from heatkv.core.plan import Plan
from heatkv.core.rankings import HeadRankings
from heatkv.engine.attention.base import CallShape
from heatkv.engine.attention.grouped import AttentionCost, RaggedAttention
from heatkv.engine.store import Store
from heatkv.models.catalogue import model_info
from heatkv.policies.base import PlanningProblem
from heatkv.policies.heatkv import HeatKV
from heatkv.profiling.measure.environment import environment

ORDERS = Path(__file__).parents[1] / "tests" / "golden" / "orders"
COSTS = Path(heatkv.engine.attention.__file__).with_name("costs.json")
ROWS, LAST, REPEATS = 1, 3, 3
MOST_OVER_FULL, MOST_OVER_NO_PAST = 0.55, 1.3
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
STRATEGIES = {  # what the split of heads becomes when only calls, or only arithmetic, cost anything
    "chosen": None,
    "per head": AttentionCost(0.0, 1.0, 1e6, 0.0),
    "dense": AttentionCost(1e12, 1.0, 1.0, 0.0),
}


def tenth(size: str) -> Plan:
    geometry = model_info(f"infinity-{size}").geometry()
    rankings = HeadRankings.load_orders(ORDERS / f"{size}.json", geometry)
    return HeatKV().plan(PlanningProblem(geometry, Budget.parse("10%"), rankings=rankings))


def counts_of_layer(plan: Plan, targets: Sequence[int]) -> tuple[int, NDArray[np.int64]]:
    """The layer nearest to a tenth while the last target runs, and what its heads hold for every target."""
    held = plan.held.mean(axis=1)[:, targets[-1]]
    layer = int(np.abs(held - plan.schedule.cached_tokens / 10).argmin())
    return layer, plan.held[layer][:, targets]


class Variant:
    """Attention of a layer over so many held tokens per head, at every target."""

    def __init__(
        self, counts_HT: NDArray[np.int64], tokens: Sequence[int], dim: int, dtype: torch.dtype, cost: Any
    ) -> None:
        slots = int(counts_HT.max(axis=1).sum()) + 1
        store = Store(ROWS, slots, dim, dtype, torch.device("cpu"))
        store.arena_2RPD.normal_()
        self.kernel = RaggedAttention(store, cost)
        firsts = np.concatenate([[0], counts_HT.max(axis=1).cumsum()])
        self.prepared = [
            self.kernel.prepare(
                [firsts[h] + np.arange(counts_HT[h, t]) for h in range(len(counts_HT))],
                None,
                CallShape(ROWS, n, dim, dtype.itemsize),
            )
            for t, n in enumerate(tokens)
        ]

    def run(self, qkv: Sequence[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]) -> None:
        for given, prepared in zip(qkv, self.prepared, strict=True):
            self.kernel.attend(*given, prepared)


def in_turns(calls: dict[str, Callable[[], object]], repeats: int = REPEATS) -> dict[str, list[float]]:
    """Processor milliseconds of every call, in turns after one warm-up."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats + 1):
        for name, call in calls.items():
            began = time.process_time()
            call()
            if turn:
                times[name].append((time.process_time() - began) * 1e3)
    return times


def measure(size: str, dtype: str) -> dict[str, Any]:
    plan, kind = tenth(size), DTYPES[dtype]
    geometry = plan.geometry
    targets = list(range(len(plan.schedule) - LAST, len(plan.schedule)))
    tokens = [plan.schedule.tokens[t] for t in targets]
    layer, held = counts_of_layer(plan, targets)
    available = np.broadcast_to([plan.schedule.offsets[t] for t in targets], held.shape)
    shapes = [(ROWS, geometry.heads, n, geometry.head_dim) for n in tokens]
    qkv = [tuple(torch.randn(shape).to(kind) for _ in range(3)) for shape in shapes]
    given = {
        **{name: (held, cost) for name, cost in STRATEGIES.items()},
        "full cache": (available, None),
        "no past": (np.zeros_like(held), None),
    }
    variants = {
        name: Variant(counts, tokens, geometry.head_dim, kind, cost or AttentionCost.measured(kind))
        for name, (counts, cost) in given.items()
    }
    with torch.inference_mode():
        times = in_turns({name: (lambda v=variant: v.run(qkv)) for name, variant in variants.items()})
    ms = {name: round(statistics.median(runs), 1) for name, runs in times.items()}
    work = {
        name: int(sum(n * (counts[:, i] + n).sum() for i, n in enumerate(tokens)))
        for i_, (name, (counts, _)) in enumerate(given.items())
    }
    return {
        "model": f"infinity-{size}",
        "dtype": dtype,
        "heads": geometry.heads,
        "head_dim": geometry.head_dim,
        "layer": layer,
        "tokens": tokens,
        "groups": [len(groups) for groups in variants["chosen"].prepared],
        "ms": ms,
        "runs_ms": {name: [round(x, 1) for x in runs] for name, runs in times.items()},
        "over_full_cache": round(ms["chosen"] / ms["full cache"], 4),
        "over_no_past": round(ms["chosen"] / ms["no past"], 4),
        "work_over_full_cache": round(work["chosen"] / work["full cache"], 4),
        "work_over_no_past": round(work["chosen"] / work["no past"], 4),
        "limits": {"over_full_cache": MOST_OVER_FULL, "over_no_past": MOST_OVER_NO_PAST},
    }


def fitted(dtype: str) -> dict[str, float]:
    """The cost model of a type from calls of many shapes: least squares of relative errors."""
    kind, told, rows = DTYPES[dtype], [], []
    for dim, heads, tokens, held in (
        (32, 1, 1, 8), (32, 2, 4, 20), (32, 6, 16, 40), (32, 3, 64, 100), (64, 4, 64, 200), (64, 16, 100, 60),
        (64, 1, 256, 600), (128, 2, 64, 300), (128, 1, 256, 1000), (128, 4, 400, 500), (128, 1, 1024, 2000),
        (128, 8, 1024, 300), (128, 1, 2304, 600), (128, 1, 4096, 600),
    ):  # fmt: skip
        store = Store(2, heads * held, dim, kind, torch.device("cpu"))
        store.arena_2RPD.normal_()
        shape, numbers = (2, heads, tokens, dim), AttentionCost(0.0, 1.0, 1.0, 0.0)
        q, k, v = (torch.randn(shape).to(kind) for _ in range(3))
        slots = [np.arange(h * held, (h + 1) * held) for h in range(heads)]
        for masked in (False, True):
            kernel = RaggedAttention(store, AttentionCost(1e12, 1.0, 1.0, 0.0))
            bias = [np.full(held, 0.5)] * heads if masked else None
            prepared = kernel.prepare(slots, bias, CallShape(2, tokens, dim, kind.itemsize))
            with torch.inference_mode():
                runs = in_turns({"one": partial(kernel.attend, q, k, v, prepared)}, 9)
            us = 1e3 * min(runs["one"])
            work = numbers.microseconds(heads, held, False, CallShape(2, tokens, dim, kind.itemsize))
            moved = 2e-3 * 2 * heads * (held + tokens) * dim * kind.itemsize
            told.append(us)
            rows.append([1.0, 0.0 if masked else work, work if masked else 0.0, moved])
    given = np.array(rows) / np.array(told)[:, None]
    from scipy.optimize import nnls

    (call, flop, masked_flop, byte), _ = nnls(given, np.ones(len(given)))
    return {
        "call_us": round(float(call), 2),
        "us_per_megaflop": round(float(flop), 3),
        "masked": round(max(1.0, float(masked_flop / flop)), 3),
        "us_per_kilobyte": round(float(byte), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fit", action="store_true", help="measure the cost model anew and write its table")
    parser.add_argument("--sizes", nargs="+", default=["2b", "8b"], choices=["2b", "8b"])
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument("--out", type=Path, help="also write the result as JSON, in place of the same cases there")
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if given.fit:
        told = {"measured_with": "python benchmarks/bench_attention.py --fit"}
        table = told | {name: fitted(name) for name in DTYPES}
        write_json(COSTS, table, indent=1)
        print(json.dumps(table, indent=1))
        return
    before = matrix_product_ms()
    rows = [
        measure(size, dtype) | {"matrix_product_1024_fp32_processor_ms": before}
        for size in given.sizes
        for dtype in given.dtypes
    ]
    for row in rows:
        print(
            f"{row['model']:12} {row['dtype']:9} {row['ms']['chosen']:8.1f} ms: {row['over_full_cache']:.3f} of the "
            f"full cache's (at most {MOST_OVER_FULL}; work {row['work_over_full_cache']:.3f}), "
            f"{row['over_no_past']:.3f} of that without a past (at most {MOST_OVER_NO_PAST}; work "
            f"{row['work_over_no_past']:.3f}); per head {row['ms']['per head']:.1f}, dense {row['ms']['dense']:.1f} ms"
        )
    print(f"1024 cubed fp32 product: {before:.1f} ms before, {matrix_product_ms():.1f} ms after")
    if given.out is not None:
        earlier = read_json(given.out)["rows"] if given.out.exists() else []
        cases = {(row["model"], row["dtype"]): row for row in (*earlier, *rows)}
        told = {"environment": to_builtins(environment(torch.device("cpu")))}
        write_json(given.out, told | {"rows": list(cases.values())}, indent=1)


if __name__ == "__main__":
    main()
