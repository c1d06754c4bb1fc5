"""What fits in a memory, and the plan for it: Infinity-2B at one megapixel, without weights and without a GPU.

python examples/plan_for_a_memory.py --memory 7GiB --out plan.json
"""

from __future__ import annotations

import argparse
import math
from fractions import Fraction
from pathlib import Path

import torch

from heatkv import Budget, HeatKVError, KVCache, PlanningProblem, make_policy
from heatkv.core.rankings import HeadRankings
from heatkv.models.catalogue import model_info
from heatkv.profiling.analysis.fit import footprint, largest_share, parse_memory

MODEL = "infinity-2b"
GIB = 2**30
PUBLISHED = Path(__file__).parent.parent / "tests/golden/orders/2b.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory", default="7GiB")
    parser.add_argument("--images", type=int, default=1, help="images at once")
    parser.add_argument("--orders", type=Path, default=PUBLISHED, help="head rankings; default: the published ones")
    parser.add_argument("--out", type=Path, default=Path("plan.json"))
    given = parser.parse_args()

    info = model_info(MODEL)
    geometry = info.geometry("1M")
    taken = footprint(info, given.images, size="1M", dtype="bfloat16")
    fit = largest_share(taken, parse_memory(given.memory), least=Fraction(1, 100))
    print(f"without a cache {taken.without_cache / GIB:.2f} GiB, the full cache {taken.full_cache / GIB:.2f} GiB")
    if not fit.fits:
        raise HeatKVError(f"{given.memory} is {fit.missing / GIB:.2f} GiB too little")

    budget = Budget.parse(f"{math.floor(fit.share * 1000) / 10}%")
    rankings = HeadRankings.load_orders(given.orders, geometry)
    rows = taken.rows
    plan = make_policy("heatkv").plan(
        PlanningProblem(geometry, budget, rankings=rankings, rows=rows, storage="bfloat16", model=MODEL)
    )
    cache = KVCache(plan, rows, torch.bfloat16, "meta")  # laid out, but without storage
    print(f"{budget} of the cache fits: {cache.allocated_bytes / GIB:.3f} GiB, {plan.peak_token_heads} token-heads")
    plan.save(given.out)
    print(f"written: {given.out}")


if __name__ == "__main__":
    try:
        main()
    except HeatKVError as error:
        raise SystemExit(str(error)) from None
