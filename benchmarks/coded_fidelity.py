"""What 8-bit storage costs and gains, at equal bytes: `python benchmarks/coded_fidelity.py`.

The embedded model, in fp32 and in bf16: the full cache in 8 bits, and heatkv-mr and heatkv at 20, 10 and 6.5 % of the
full cache's bytes in that type, held as it is and in 8 bits. KL is to the full cache in the same type, over samples
that the calibration did not see. `--out benchmarks/results/coded_fidelity.json` writes the published result.
"""

from __future__ import annotations

import argparse
import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from msgspec import to_builtins
from yardstick import matrix_product_ms

from heatkv.calibration.run import calibrate
from heatkv.core.budget import Budget
from heatkv.core.io import write_json
from heatkv.core.statistics import Statistics
from heatkv.core.storage_type import StorageType
from heatkv.models.catalogue import load_model
from heatkv.policies.base import PlanningProblem, make_policy
from heatkv.profiling.measure.environment import environment
from heatkv.profiling.measure.fidelity import FidelityBench
from heatkv.profiling.measure.subjects import Subject

SHARES = (Fraction(20, 100), Fraction(10, 100), Fraction(65, 1000))
SAMPLES, IMAGES, ROWS, SEED = 64, 32, 2, 1
CODINGS = (None, "int8", "fp8")


def measure(dtype: str, measured: Statistics) -> list[dict[str, Any]]:
    model = load_model("emoji", dtype=dtype)
    bench = FidelityBench(model, images=IMAGES, pictures=16, seed=SEED, settings=model.sampling)
    full_bytes, rows = model.geometry.full_bytes(ROWS, dtype), []
    cases: list[tuple[str, Budget]] = [("full", Budget.parse("100%"))]
    cases += [
        (policy, Budget("bytes", Fraction(math.floor(full_bytes * share))))
        for share in SHARES
        for policy in ("heatkv", "heatkv-mr")
    ]
    for policy, budget in cases:
        for coding in CODINGS:
            if policy == "full" and coding is None:
                continue  # the reference itself
            storage = str(StorageType(dtype, coding))
            problem = PlanningProblem(model.geometry, budget, measured, rows=ROWS, storage=storage, model=model.name)
            plan = make_policy(policy).plan(problem)
            subject = Subject(policy, str(budget), (plan,), storage)
            cache = subject.generator(model, model.sampling, 0, 1).cache
            figures = bench.measure(subject)
            allowed = None if policy == "full" else int(budget.amount)
            rows.append({
                "policy": policy, "dtype": dtype, "storage": storage, "budget_bytes": allowed,
                "budget_over_full": None if allowed is None else round(allowed / full_bytes, 4),
                "allocated_bytes": cache.allocated_bytes,
                "allocated_over_full": round(cache.allocated_bytes / full_bytes, 4),
                "token_heads_share": round(plan.peak_token_heads / model.geometry.full_token_heads, 4),
                **{name: getattr(figures, name) for name in ("kl", "top1_agreement", "psnr_db", "ssim")},
            })  # fmt: skip
            row = rows[-1]
            print(
                f"{policy:10} {storage:14} {row['allocated_bytes']:>9} bytes ({row['allocated_over_full']:6.1%} of the "
                f"full cache's, {row['token_heads_share']:6.1%} of its token-heads): KL {row['kl']:.4f}, top-1 "
                f"{row['top1_agreement']:.3f}, PSNR {row['psnr_db']:.2f} dB",
                flush=True,
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="also write the result as JSON")
    out = parser.parse_args().out
    torch.set_num_threads(1)
    before = matrix_product_ms()
    model = load_model("emoji")
    measured = calibrate(model, SAMPLES, levels="error")
    rows = [row for dtype in ("float32", "bfloat16") for row in measure(dtype, measured)]
    if out is not None:
        told = {
            "environment": to_builtins(environment(torch.device("cpu"))),
            "matrix_product_1024_fp32_processor_ms": before,
        }
        counts = {"calibration_samples": SAMPLES, "images": IMAGES, "seed": SEED}
        write_json(out, told | counts | {"rows": rows}, indent=1)


if __name__ == "__main__":
    main()
