"""Write a policy, check that it keeps the contract of all policies, and compare it with others at equal bytes.

    python examples/compare_my_policy.py --budget 20%

The policy keeps the cells with the most attention for their size. From the command line the same is
`heatkv new-policy`, then `heatkv compare` (docs/new-policy.md).
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

import heatkv
from heatkv.errors import HeatKVError
from heatkv.profiling.measure.fidelity import FidelityBench, paired_bootstrap
from heatkv.profiling.measure.subjects import Subject


@heatkv.register
@dataclass(frozen=True)
class MassPerToken(heatkv.ScoredCells):
    """Keeps the cells that later scales attend to most, for their size."""

    name = "mass-per-token"
    needs = frozenset({"statistics"})
    source = "examples/compare_my_policy.py"

    def value(self, problem: heatkv.PlanningProblem) -> NDArray[np.float64]:
        return problem.measured.scas


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", default="20%")
    parser.add_argument("--samples", type=int, default=16, help="images to calibrate on")
    parser.add_argument("--images", type=int, default=16, help="images to compare on")
    given = parser.parse_args()

    heatkv.check_policy(MassPerToken.name)
    print("the policy keeps the contract")

    model = heatkv.load_model("emoji")
    statistics = heatkv.calibrate(model, samples=given.samples)
    bench = FidelityBench(model, images=given.images, pictures=0, seed=1, settings=model.sampling)
    kl = {}
    for name in (MassPerToken.name, "heatkv", "streaming"):
        plan = model.plan(name, given.budget, statistics=statistics)
        (compared,) = bench.compare(Subject(name, given.budget, (plan,), "float32"))
        kl[name] = compared.kl_of_images()
        print(f"{name:>15}: {plan.peak_token_heads} token-heads, KL {kl[name].mean():.4f} nats per token")
    found = paired_bootstrap(kl[MassPerToken.name], kl["heatkv"])
    print(f"against heatkv, image by image: {found.mean:+.4f} ({found.low:+.4f} to {found.high:+.4f})")


if __name__ == "__main__":
    try:
        main()
    except HeatKVError as error:
        raise SystemExit(str(error)) from None
