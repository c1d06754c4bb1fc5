"""What watching for numbers that are not finite costs: `python benchmarks/watch_cost.py`.

One image with guidance on one thread, decoder left out, with and without the watch in turns in one process, in
processor time: the embedded model, and VAR-d16 with random weights. The cost is the median over turns of the ratio of
neighbours. `--out benchmarks/results/watch_cost.json` writes the published result.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from msgspec import to_builtins
from random_models import labels_of, random_model
from yardstick import matrix_product_ms, parse

from heatkv.core.io import write_json
from heatkv.engine.watch import Watch
from heatkv.generation.loop import Generator
from heatkv.profiling.measure.environment import environment

CASES = {
    "emoji": 60,
    "var-d16": 5,
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def seconds(call: Callable[[], object]) -> float:
    began = time.process_time()
    call()
    return time.process_time() - began


def measure(case: str, dtype: str) -> dict[str, Any]:
    model, turns = random_model(case, None, DTYPES[dtype]), CASES[case]
    labels = labels_of(model, 1, 0)
    generator = Generator(model, model.full_plan(), 1)
    see = Watch.see

    def draw(watched: bool) -> float:
        Watch.see = see if watched else lambda *given: None  # type: ignore[method-assign, assignment, misc]
        try:
            return seconds(lambda: generator.draw(labels, decode=False))
        finally:
            Watch.see = see  # type: ignore[method-assign]

    product = matrix_product_ms()
    draw(True), draw(False)
    pairs = []
    for turn in range(turns):
        first = draw(bool(turn % 2))
        second = draw(not turn % 2)
        pairs.append((first, second) if turn % 2 else (second, first))
    ratios = sorted(on / off for on, off in pairs)
    return {
        "case": case,
        "dtype": dtype,
        "turns": turns,
        "with_seconds": round(statistics.median(on for on, _ in pairs), 4),
        "without_seconds": round(statistics.median(off for _, off in pairs), 4),
        "cost": round(statistics.median(ratios) - 1, 5),
        "cost_quartiles": [round(ratios[len(ratios) // 4] - 1, 5), round(ratios[-1 - len(ratios) // 4] - 1, 5)],
        "matrix_product_1024_fp32_processor_ms": round(product, 2),
    }


def main() -> None:
    given = parse(__doc__, CASES)
    torch.set_num_threads(1)
    told, rows = to_builtins(environment(torch.device("cpu"))), []
    for case in given.models:
        for dtype in DTYPES:
            rows.append(measure(case, dtype))
            print(rows[-1], flush=True)
    if given.out is not None:
        write_json(given.out, {"environment": told, "rows": rows}, indent=1)


if __name__ == "__main__":
    main()
