"""What every process of a tensor-parallel test runs, under torchrun: pictures by the command line, logits in Python."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from test_tensor_parallel import draw, tiny_infinity

from heatkv.cli import run
from heatkv.models.tensor_parallel import launched_ranks, shard_model
from heatkv.ranked_plan import RankedPlan

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    pictures = ["--label", "pizza", "--label", "star", "--out", str(folder / "together")]
    with launched_ranks() as ranks:
        code = run(["generate", "--plan", str(folder / "emoji.json"), *pictures])
        if code == 0:
            plan = RankedPlan.load(folder / "infinity.json")
            part = shard_model(tiny_infinity(), ranks, plan.heads[ranks.rank])
            torch.save(draw(part, plan.plans[ranks.rank]), folder / f"rank{ranks.rank}.pt")
    sys.exit(code)
