"""Write a policy, and compare it with others at equal bytes.

    python examples/compare_my_policy.py --out my-policy

The policy keeps the cells with the most attention for their size. The folder then holds a report to look at.
"""

import argparse
from dataclasses import dataclass

import heatkv
from heatkv.core.schema import FloatArray


@dataclass(frozen=True)
class MassPerToken(heatkv.ScoredCells):
    """Keeps the cells with the most attention per token."""

    name = "mass-per-token"
    needs = frozenset({"statistics"})

    def value(self, problem: heatkv.PlanningProblem) -> FloatArray:
        return problem.measured.scas


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="my-policy", help="folder to write to")
    parser.add_argument("--images", type=int, default=16, help="images to calibrate and to compare on")
    asked = parser.parse_args()
    policies, few = [MassPerToken(), "heatkv", "streaming"], {"samples": asked.images, "images": asked.images}
    for row in heatkv.compare("emoji", policies, ["20%"], out=asked.out, **few).rows:
        print(f"{row.policy:>15}: {row.allocated_bytes:,} bytes of cache, KL {row.kl:.4f} nats per token")
