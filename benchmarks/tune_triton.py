"""Chooses the tiles of the Triton kernels for the GPU at hand: `python benchmarks/tune_triton.py`.

Times every candidate on the last three scales of Infinity-2B at 1M, guided, at 10 % of the cache, heads of which hold
from nothing to twice the mean, and writes the fastest as the device's entries of
heatkv/engine/attention/tiles.json. That compiles a few hundred kernels. Ends with exit code 2 where they cannot run.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import torch

from heatkv.core.io import write_text
from heatkv.engine.attention.triton_launch import HeldTokens, Tile, fused_attention, missing
from heatkv.models.catalogue import model_info

TABLE = Path(__file__).resolve().parents[1] / "heatkv/engine/attention/tiles.json"
HEAD_DIMS = (32, 64, 128)
TYPES = {16: torch.bfloat16, 32: torch.float32}
BUDGET, ROWS, SCALES, REPEATS = 0.1, 2, 3, 20

Run = Callable[[Tile], object]


def candidates(bits: int) -> list[Tile]:
    """Products in fp32 have no tensor cores; larger tiles than these do not fit into the registers."""
    if bits == 32:
        shapes = product((16, 32, 64), (16, 32), (4, 8), (1, 2))
    else:
        shapes = product((64, 128), (32, 64, 128), (4, 8), (2, 3, 4))
    return [Tile(*shape) for shape in shapes]


def workload(
    head_dim: int,
    dtype: torch.dtype,
    stores: tuple[str, ...],
    biased: bool,
    heads: int,
    tokens: int,
    mean_held: int,
    device: str,
) -> Run:
    """Attention of one layer over tokens held in `stores`, of plain and coded: how it runs in a given tile."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    counts = [round(2 * mean_held * head / max(heads - 1, 1)) for head in range(heads)]
    slots = sum(counts)
    begins = [sum(counts[:head]) for head in range(heads)]
    held = HeldTokens(
        torch.arange(slots, dtype=torch.int32, device=device),  # cells lie in one run each, nearly always
        torch.tensor([begins], dtype=torch.int32, device=device),
        torch.tensor([counts], dtype=torch.int32, device=device),
        torch.zeros(slots, device=device) if biased else None,
    )
    q, k, v = normal(ROWS, tokens, 3, heads, head_dim).permute(2, 0, 3, 1, 4).unbind()
    plain = coded = None
    if "plain" in stores:
        plain = normal(2, ROWS, slots, head_dim), held
    if "coded" in stores:
        codes = torch.randint(-127, 128, (2, ROWS, slots, head_dim), generator=generator, dtype=torch.int8).to(device)
        coded = codes, torch.full((2, ROWS, slots), 1 / 127, dtype=torch.bfloat16, device=device), held
    return lambda tile: fused_attention(q, k, v, plain, coded, tile=tile)


def microseconds(run: Run, tile: Tile) -> float:
    """The median time on the device; infinite where the tile does not fit."""
    from triton.runtime.errors import OutOfResources

    try:
        run(tile)
    except OutOfResources:
        return math.inf
    times = []
    for _ in range(REPEATS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run(tile)
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3)
    return median(times)


def fastest(runs: Sequence[Run], tiles: Iterable[Tile], time_of: Callable[[Run, Tile], float]) -> tuple[float, Tile]:
    """The tile with the least time over all runs together, and that time."""
    return min(((sum(time_of(run, tile) for run in runs), tile) for tile in tiles), key=lambda timed: timed[0])


def entry(head_dim: int, bits: int, coded: bool, tile: Tile, time_us: float) -> dict[str, Any]:
    """An entry of the table."""
    return {"head_dim": head_dim, "bits": bits, "coded": coded} | vars(tile) | {"microseconds": round(time_us, 1)}


def write_table(path: Path, table: dict[str, Any]) -> None:
    """JSON with one line for every entry."""
    devices = []
    for name, told in table.items():
        facts = [f"  {json.dumps(key)}: {json.dumps(fact)}" for key, fact in told.items() if key != "entries"]
        entries = ",\n".join(f"   {json.dumps(of)}" for of in told["entries"])
        facts.append(f'  "entries": [\n{entries}\n  ]')
        devices.append(f" {json.dumps(name)}: {{\n" + ",\n".join(facts) + "\n }")
    write_text(path, "{\n" + ",\n".join(devices) + "\n}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--head-dims", nargs="+", type=int, default=HEAD_DIMS)
    parser.add_argument("--table", type=Path, default=TABLE, help="the table to add the device's entries to")
    given = parser.parse_args()
    reason = missing("cuda", torch.bfloat16, max(given.head_dims))
    if reason:
        print(f"tiles can be tuned only where the kernels run compiled: {reason}", file=sys.stderr)
        raise SystemExit(2)
    import triton

    info = model_info("infinity-2b")
    schedule = info.schedule("1M")
    mean_held = round(BUDGET * sum(schedule.tokens[:-1]))
    entries = []
    for head_dim, bits, coded in product(given.head_dims, TYPES, (False, True)):
        stores = ("coded",) if coded else ("plain",)
        runs = [
            workload(head_dim, TYPES[bits], stores, False, info.heads, tokens, mean_held, "cuda")
            for tokens in schedule.tokens[-SCALES:]
        ]
        # One that takes hardly any time: the tile must fit where biases and, with codes, a plain store come along.
        runs.append(workload(head_dim, TYPES[bits], (*stores, "plain"), True, 1, 1, 1, "cuda"))
        time_us, tile = fastest(runs, candidates(bits), microseconds)
        entries.append(entry(head_dim, bits, coded, tile, time_us))
        print(json.dumps(entries[-1]), flush=True)
    table = json.loads(given.table.read_text())
    told = {"tuned": True, "torch": torch.__version__, "triton": triton.__version__, "entries": entries}
    write_table(given.table, table | {torch.cuda.get_device_name(): told})


if __name__ == "__main__":
    main()
