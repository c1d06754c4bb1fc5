"""Images under a 10 % plan beside the full cache's: `python benchmarks/bench_generation.py`.

One image with guidance on one thread, decoder left out (it is the same for all), every variant in turns in one process:
the embedded model, VAR-d16, and Infinity-2B cut to four layers at 0.25M and 1M, these three with random weights and
random rankings, which decide what is read but not how much. `--out benchmarks/results/generation.json` writes the
published result, case by case; `--cases` and `--dtypes` measure some of them anew. `make bench` times one
image of the embedded model, decoder included.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from msgspec import to_builtins
from random_models import labels_of, random_model
from yardstick import matrix_product_ms

from heatkv.calibration.run import calibrate
from heatkv.core.budget import Budget
from heatkv.core.io import read_json, write_json
from heatkv.core.plan import CachePlan
from heatkv.core.rankings import HeadRankings
from heatkv.generation.loop import Generator
from heatkv.models.base import ImageModel
from heatkv.models.catalogue import load_model
from heatkv.policies.base import PlanningProblem, make_policy
from heatkv.profiling.measure.environment import environment
from heatkv.profiling.measure.ledger import TensorLedger

CASES = {
    "emoji": ("emoji", None, None, 7),
    "var-d16": ("var-d16", None, None, 3),
    "infinity-2b-4-layers-0.25M": ("infinity-2b", "0.25M", 4, 3),
    "infinity-2b-4-layers-1M": ("infinity-2b", "1M", 4, 1),
}
BUDGET, FROM_TOKENS, PROMPT, MOST_TOKENS = "10%", 1000, 64, 3000
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def plans_of(model: ImageModel[Any]) -> dict[str, CachePlan]:
    geometry = model.geometry
    if model.name == "emoji":
        measured = calibrate(model, 8, levels="error", level_samples=8)
        names = ("heatkv", "heatkv-mr")
        return {"full": model.full_plan()} | {name: model.plan(name, BUDGET, statistics=measured) for name in names}
    rng, pairs = np.random.default_rng(0), geometry.layers * geometry.heads
    order = np.stack([rng.permutation(pairs) for _ in geometry.schedule.tokens[:-1]])
    rankings = HeadRankings(geometry.layers, geometry.heads, 0, order)
    problem = PlanningProblem(geometry, Budget.parse(BUDGET), rankings=rankings, model=model.name)
    return {"full": model.full_plan(), "heatkv": make_policy("heatkv").plan(problem)}


def grown_bytes(generator: Generator[Any], labels: list[Any]) -> int | None:
    """Bytes of tensors that one more image leaves behind; None where another image would take minutes."""
    if generator.model.geometry.schedule.total_tokens > MOST_TOKENS:
        return None
    with TensorLedger() as ledger:
        generator.draw(labels, decode=False)
    live: int = ledger.live
    return live


def measure(case: str, dtype: str) -> dict[str, Any]:
    name, size, layers, repeats = CASES[case]
    model = random_model(name, size, DTYPES[dtype], layers)
    labels = labels_of(model, 1, PROMPT)
    generators = {policy: Generator(model, plan, 1) for policy, plan in plans_of(model).items()}
    if "heatkv" in generators:
        generators["heatkv int8"] = Generator(model, generators["heatkv"].plan, 1, code="int8")
    runs: dict[str, list[float]] = {policy: [] for policy in generators}
    product = matrix_product_ms()
    warm_up = repeats > 1  # where an image takes minutes, one run of each is all there is
    for turn in range(repeats + warm_up):
        for policy, generator in generators.items():
            began = time.process_time()
            generator.draw(labels, decode=False)
            if turn >= warm_up:
                runs[policy].append(time.process_time() - began)
    seconds = {policy: statistics.median(times) for policy, times in runs.items()}
    return {
        "case": case,
        "dtype": dtype,
        "tokens": model.geometry.schedule.total_tokens,
        "seconds": {policy: round(value, 4) for policy, value in seconds.items()},
        "runs": {policy: [round(x, 4) for x in times] for policy, times in runs.items()},
        "over_full": {policy: round(value / seconds["full"], 4) for policy, value in seconds.items()},
        "matrix_product_1024_fp32_processor_ms": round(product, 2),
        "grown_bytes": {policy: grown_bytes(generator, labels) for policy, generator in generators.items()},
        "allocated_bytes": {policy: generator.cache.allocated_bytes for policy, generator in generators.items()},
    }


@pytest.mark.parametrize("policy", ["full", "random", "streaming", "snapkv", "h2o"])
def bench_generation(benchmark: Any, policy: str) -> None:
    """One guided image of the embedded model, at 10 % but for the full cache."""
    torch.set_num_threads(1)
    model = load_model("emoji")
    plan = model.full_plan() if policy == "full" else model.plan(policy, BUDGET)
    benchmark.pedantic(Generator(model, plan, 1).draw, ([0],), rounds=5, warmup_rounds=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument("--out", type=Path, help="also write the result as JSON")
    given = parser.parse_args()
    torch.set_num_threads(1)
    told = to_builtins(environment(torch.device("cpu")))
    rows: dict[str, Any] = {}
    if given.out is not None and given.out.exists():
        rows = {f"{row['case']} {row['dtype']}": row for row in read_json(given.out)["rows"]}
    for case in given.cases:
        for dtype in given.dtypes:
            row = measure(case, dtype)
            rows[f"{case} {dtype}"] = row
            slower = row["tokens"] >= FROM_TOKENS and row["over_full"]["heatkv"] > 1
            shares = {policy: f"{s:.3f} s ({row['over_full'][policy]:.3f})" for policy, s in row["seconds"].items()}
            shown = ", ".join(f"{policy} {share}" for policy, share in shares.items())
            print(
                f"{case}, {dtype}, {row['tokens']} tokens: {shown}; 1024 cubed fp32 product: "
                f"{row['matrix_product_1024_fp32_processor_ms']:.1f} ms{'  SLOWER' if slower else ''}",
                flush=True,
            )
            if given.out is not None:
                write_json(given.out, {"environment": told, "rows": list(rows.values())}, indent=1)


if __name__ == "__main__":
    main()
