"""What every process of a tensor-parallel test runs under torchrun: choices and logits of a random Infinity."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from test_tensor_parallel import draw, tiny_infinity

from heatkv.models.tensor_parallel import shard_model
from heatkv.parallel import ranks
from heatkv.ranked_plan import RankedPlan

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    team = ranks.join()
    plan = RankedPlan.load(folder / "infinity.json")
    part = shard_model(tiny_infinity(), team, plan.heads[team.rank])
    torch.save(draw(part, plan.plans[team.rank]), folder / f"rank{team.rank}.pt")
    ranks.leave()
