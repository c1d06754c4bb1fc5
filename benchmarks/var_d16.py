"""One VAR-d16 image with guidance on one core, random weights: `python benchmarks/var_d16.py`.

Processor time of the whole image beside that of a fixed matrix product on the same core, and where the time goes.
`--out benchmarks/results/var_d16_cpu.json` writes the published result anew.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from msgspec import to_builtins
from random_models import random_model
from torch import Tensor

from heatkv.core.io import write_json
from heatkv.generation.loop import Generator
from heatkv.profiling.measure.environment import environment

REPEATS = 3


class Stopwatch:
    """Adds up the time spent in wrapped calls, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    def wrap(self, name: str, call: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def timed(*arguments: Any) -> Tensor:
            began = time.process_time()
            out = call(*arguments)
            self.seconds[name] += time.process_time() - began
            return out

        return timed


def measure(dtype: torch.dtype) -> dict[str, Any]:
    """Seconds of whole images, and the parts of one of them."""
    model = random_model("var-d16", None, dtype)
    generator = Generator(model, model.plan(), 1)
    generator.draw([0])
    totals = []
    for _ in range(REPEATS):
        began = time.process_time()
        generator.draw([0])
        totals.append(time.process_time() - began)
    watch = Stopwatch()
    generator.cache.attend = watch.wrap("attention", generator.cache.attend)  # type: ignore[method-assign]
    for block in model.transformer.layers():
        block.ffn.forward = watch.wrap("feed-forward", block.ffn.forward)  # type: ignore[method-assign]
        block.attn.qkv = watch.wrap("projections", block.attn.qkv)  # type: ignore[assignment, method-assign, arg-type]
        block.attn.project = watch.wrap("projections", block.attn.project)  # type: ignore[method-assign]
    model.vqvae.decode = watch.wrap("decode", model.vqvae.decode)  # type: ignore[method-assign]
    began = time.process_time()
    generator.draw([0])
    whole = time.process_time() - began
    parts = {name: round(seconds, 3) for name, seconds in watch.seconds.items()}
    parts["rest"] = round(whole - sum(parts.values()), 3)
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "seconds": round(statistics.median(totals), 3),
        "runs": [round(total, 3) for total in totals],
        "parts_seconds": parts,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="also write the result as JSON")
    out = parser.parse_args().out
    torch.set_num_threads(1)
    before = to_builtins(environment(torch.device("cpu")))
    rows = [measure(dtype) for dtype in (torch.float32, torch.bfloat16)]
    after = to_builtins(environment(torch.device("cpu")))
    name = "matrix_product_1024_fp32_one_thread_ms"
    if out is not None:
        write_json(out, {"environment": before | {f"{name}_after": after[name]}, "rows": rows}, indent=1)
    for row in rows:
        print(row["dtype"], row["seconds"], "s;", row["parts_seconds"])
    print("1024 cubed fp32 product:", before[name], "ms before,", after[name], "ms after")


if __name__ == "__main__":
    main()
