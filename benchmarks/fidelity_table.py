"""Every policy at five budgets on the embedded model: `python benchmarks/fidelity_table.py`.

Calibrates on seed 1000, then compares with the full cache on other seeds: KL of the guided logits under teacher
forcing, PSNR of pictures drawn freely. Means over images and seeds with 95 % bootstrap intervals (over the images of
a seed, the same ones for every policy). Writes benchmarks/results/fidelity_table.json after every plan; what it holds
already is not measured again.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from msgspec import to_builtins

from heatkv.calibration.run import calibrate
from heatkv.core.io import read_json, write_json
from heatkv.core.plan import Plan
from heatkv.core.statistics import Statistics
from heatkv.models.catalogue import load_model
from heatkv.profiling.measure.environment import environment
from heatkv.profiling.measure.fidelity import FidelityBench
from heatkv.profiling.measure.subjects import Subject

OUT = Path(__file__).parent / "results" / "fidelity_table.json"
CALIBRATION_SEED, SEEDS, IMAGES = 1000, (1, 2, 3), 48
BUDGETS = ("50%", "30%", "20%", "10%", "6.5%")
POLICIES: dict[str, tuple[str, dict[str, Any]]] = {
    "heatkv": ("heatkv", {}),
    "sliding-window": ("sliding-window", {}),
    "streaming": ("streaming", {}),
    "random": ("random", {}),
    "heatkv-lp, mass": ("heatkv-lp", {"value": "mass"}),
    "heatkv-lp, single error, 1 sink": ("heatkv-lp", {"value": "error", "sink_scales": 1}),
    "heatkv-lp": ("heatkv-lp", {}),
    "heatkv-mr": ("heatkv-mr", {}),
    "heatkv-mr, fisher": ("heatkv-mr", {"cost": "fisher"}),
}


def statistics(model: Any, cost: str, kept: Path) -> Statistics:
    """Attention and drop errors of 64 samples, level costs of 32, biases of 16; measured once and kept beside OUT."""
    path = kept.with_suffix(f".{cost}.safetensors")
    if not path.exists():
        calibrate(model, 64, seed=CALIBRATION_SEED, levels=cost).save(path)
    return Statistics.load(path)


def plans(model: Any, measured: Statistics, name: str, budget: str) -> list[Plan]:
    """One plan, or three of a policy that draws at random. Sinks that the budget cannot hold are given up."""
    policy, options = POLICIES[name]
    if budget == "6.5%" and policy in ("heatkv", "random", "streaming"):
        options = {**options, "sink_scales": 3}  # 14 of 230 tokens: 6.1 %
    return [
        model.plan(policy, budget, statistics=measured, seed=seed, **options)
        for seed in ((0, 1, 2) if name == "random" else (0,))
    ]


def bootstrap(values: list[np.ndarray], draws: int = 2000) -> tuple[float, float, float]:
    """Mean over seeds of the means over images, and its 95 % interval."""
    generator = np.random.default_rng(0)
    means = np.mean([x[generator.integers(0, len(x), (draws, len(x)))].mean(axis=1) for x in values], axis=0)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(np.mean([x.mean() for x in values])), float(low), float(high)


def report(rows: dict[str, Any]) -> None:
    """A table of what there is so far."""
    for figure, digits in (("kl", 4), ("psnr_db", 2)):
        print(f"\n{figure}: mean [95 % interval]\n| policy | " + " | ".join(BUDGETS) + " |")
        print("|---|" + "---|" * len(BUDGETS))
        for name in POLICIES:
            cells = []
            for budget in BUDGETS:
                found = [
                    np.array(row[figure]) for row in rows.values() if (row["name"], row["budget"]) == (name, budget)
                ]
                mean, low, high = bootstrap(found) if found else (np.nan,) * 3
                cells.append(f"{mean:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]" if found else "-")
            print(f"| {name} | " + " | ".join(cells) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--report", action="store_true", help="only print what there is")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    out = arguments.out
    rows: dict[str, Any] = read_json(out)["rows"] if out.exists() else {}
    if not arguments.report:
        model = load_model("emoji")
        for seed in arguments.seeds:
            bench = None
            for budget in BUDGETS:
                for name in POLICIES:
                    key = f"{seed} {budget} {name}"
                    if key in rows:
                        continue
                    bench = bench or FidelityBench(
                        model, images=IMAGES, pictures=IMAGES, seed=seed, settings=model.sampling
                    )
                    measured = statistics(model, POLICIES[name][1].get("cost", "error"), out)
                    made = plans(model, measured, name, budget)
                    found = bench.compare(Subject(name, budget, tuple(made), "float32"))
                    rows[key] = {
                        "name": name, "budget": budget, "seed": seed,
                        "peak_over_budget": max(plan.peak_token_heads / plan.budget_token_heads for plan in made),
                        "gap": made[0].gap, "predicted_kl": made[0].settings.get("predicted_kl"),
                        "kl": np.mean([x.kl_of_images() for x in found], axis=0).round(6).tolist(),
                        "psnr_db": np.mean([np.concatenate(x.psnr_db) for x in found], axis=0).round(3).tolist(),
                    }  # fmt: skip
                    write_json(
                        out, {"environment": to_builtins(environment(model.device)), "images": IMAGES, "rows": rows}
                    )
                    print(
                        key,
                        json.dumps({f: round(float(np.mean(rows[key][f])), 4) for f in ("kl", "psnr_db")}),
                        flush=True,
                    )
    report(rows)


if __name__ == "__main__":
    main()
