"""How long the cache itself takes, without a model: `make bench`.

One guided image in the shape of VAR-d16 (16 layers, 16 heads of 64 channels, 680 tokens, two rows, fp32): every call
of `attend`, that is attention over what is held and the running scale, and writing what is kept. And what opening a
cache takes: layout and the tables of what is read and written where.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from heatkv.core.budget import Budget
from heatkv.core.plan import CachePlan
from heatkv.core.rankings import HeadRankings
from heatkv.engine.open_cache import open_cache
from heatkv.models.catalogue import model_info
from heatkv.policies.base import PlanningProblem, make_policy

ORDERS = Path(__file__).parents[1] / "tests" / "golden" / "orders" / "2b.json"
ROWS = 2
CASES: dict[str, tuple[str, str, str | None]] = {
    "full": ("full", "100%", None),
    "random 10%": ("random", "10%", None),
    "random 10% int8": ("random", "10%", "int8"),
    "streaming 10%": ("streaming", "10%", None),
    "snapkv 10%": ("snapkv", "10%", None),
}


@cache
def inputs() -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """q, k, v of every scale, normalised as VAR's are; all layers get the same."""
    generator = torch.Generator().manual_seed(0)
    geometry = model_info("var-d16").geometry()
    given = []
    for tokens in geometry.schedule.tokens:
        q, k, v = (torch.randn(ROWS, geometry.heads, tokens, geometry.head_dim, generator=generator) for _ in range(3))
        given.append((4 * torch.nn.functional.normalize(q, dim=-1), torch.nn.functional.normalize(k, dim=-1), v))
    return given


@pytest.mark.parametrize("case", CASES)
def bench_attend(benchmark: Any, case: str) -> None:
    """All calls of one image."""
    torch.set_num_threads(1)
    policy, budget, coding = CASES[case]
    geometry = model_info("var-d16").geometry()
    plan = make_policy(policy).plan(PlanningProblem(geometry, Budget.parse(budget), model="var-d16"))
    held = open_cache(plan, ROWS, torch.float32, "cpu", code=coding)
    given = inputs()

    def image() -> None:
        held.reset()
        for q, k, v in given:
            for layer in range(geometry.layers):
                held.attend(layer, q, k, v)

    with torch.inference_mode():
        benchmark.pedantic(image, rounds=5, warmup_rounds=1)
    benchmark.extra_info["allocated_bytes"] = held.allocated_bytes


@pytest.mark.parametrize("policy", ["heatkv", "streaming", "snapkv"])
def bench_open(benchmark: Any, policy: str) -> None:
    """A plan of Infinity-2B at 10 % to a cache that is ready, in bf16."""
    geometry = model_info("infinity-2b").geometry()
    rankings = HeadRankings.load_orders(ORDERS, geometry) if policy == "heatkv" else None
    plan: CachePlan = make_policy(policy).plan(PlanningProblem(geometry, Budget.parse("10%"), rankings=rankings))
    benchmark.pedantic(open_cache, (plan, ROWS, torch.bfloat16, "cpu"), rounds=3, warmup_rounds=1)
