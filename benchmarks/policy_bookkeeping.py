"""What every policy's own work takes of drawing: `python benchmarks/policy_bookkeeping.py`.

One image of the embedded model with guidance on one thread, all policies in turns. Bookkeeping is what a cache does
beside the attention itself: reading what is held, scores, choice of tokens, writing. The full cache reads and writes,
too. Choosing is the policy's own part: scores, the best of them, and gathering what is kept.
`--out benchmarks/results/policy_bookkeeping.json` writes the published result anew.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from msgspec import to_builtins
from yardstick import matrix_product_ms

from heatkv.calibration.run import calibrate
from heatkv.core.io import write_json
from heatkv.generation.loop import Generator
from heatkv.models.catalogue import load_model
from heatkv.profiling.measure.environment import environment
from heatkv.registry import registered_policies

REPEATS, MOST = 5, 0.2
BUDGETS = ("20%", "10%")


class Stopwatch:
    """Adds up processor time inside a call."""

    seconds = 0.0

    def wrap(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **options: Any) -> Any:
            began = time.process_time()
            out = call(*arguments, **options)
            self.seconds += time.process_time() - began
            return out

        return timed


def measure(budget: str) -> list[dict[str, Any]]:
    model = load_model("emoji")
    measured = calibrate(model, 8, levels="error", level_samples=8)
    generators = {
        name: Generator(model, model.plan(name, "100%" if name == "full" else budget, statistics=measured), 1)
        for name in registered_policies()
    }
    attention, cache, choosing = Stopwatch(), Stopwatch(), Stopwatch()
    rows: dict[str, list[tuple[float, float, float]]] = {name: [] for name in generators}
    timed = attention.wrap(torch.nn.functional.scaled_dot_product_attention)
    for generator in generators.values():
        generator.cache.attend = cache.wrap(generator.cache.attend)
        for chooses in ("_chosen", "_keep_shared"):
            if hasattr(generator.cache, chooses):
                setattr(generator.cache, chooses, choosing.wrap(getattr(generator.cache, chooses)))
    with patch.object(torch.nn.functional, "scaled_dot_product_attention", timed):
        for turn in range(REPEATS + 1):
            for name, generator in generators.items():
                attention.seconds = cache.seconds = choosing.seconds = 0.0
                began = time.process_time()
                generator.draw([0])
                if turn:  # the first warms up
                    whole = time.process_time() - began
                    rows[name].append((whole, cache.seconds - attention.seconds, choosing.seconds))
    return [
        {
            "policy": name,
            "budget": budget,
            "image_processor_ms": round(1e3 * statistics.median(total for total, _, _ in times), 1),
            "bookkeeping_share": round(statistics.median(own / total for total, own, _ in times), 4),
            "choosing_share": round(statistics.median(own / total for total, _, own in times), 4),
        }
        for name, times in rows.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="also write the result as JSON")
    out = parser.parse_args().out
    torch.set_num_threads(1)
    before = matrix_product_ms()
    rows = [row for budget in BUDGETS for row in measure(budget)]
    print("policy                  budget  ms/image  bookkeeping  choosing")
    for row in rows:
        over = "  above 20 %" if row["choosing_share"] > MOST else ""
        print(
            f"{row['policy']:22} {row['budget']:>7} {row['image_processor_ms']:>9.1f} "
            f"{row['bookkeeping_share']:>12.1%} {row['choosing_share']:>9.1%}{over}"
        )
    print(f"1024 cubed fp32 product: {before:.1f} ms before, {matrix_product_ms():.1f} ms after")
    if out is not None:
        told = to_builtins(environment(torch.device("cpu")))
        write_json(out, {"environment": told, "matrix_product_1024_fp32_processor_ms": before, "rows": rows}, indent=1)


if __name__ == "__main__":
    main()
