"""Calibrate the embedded model, draw with a fifth of its cache, and see what that took and changed.

    python examples/draw_under_a_budget.py --out pictures.png

The sheet has the full cache's pictures above those of the plan. For another model write
`heatkv.load_model("var-d16", "weights/")`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import heatkv
from heatkv.errors import HeatKVError
from heatkv.generation.images import image_grid
from heatkv.generation.loop import Generator
from heatkv.profiling.measure.fidelity import psnr

NAMES = ["pizza", "star", "penguin", "rainbow"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("pictures.png"), help="the sheet to write")
    parser.add_argument("--budget", default="20%")
    parser.add_argument("--samples", type=int, default=16, help="images to calibrate on")
    given = parser.parse_args()

    model = heatkv.load_model("emoji")
    statistics = heatkv.calibrate(model, samples=given.samples)
    labels = [model.label(name) for name in NAMES]

    rows = []
    for policy, budget in (("full", "100%"), ("heatkv", given.budget)):
        plan = model.plan(policy, budget, statistics=statistics)
        generator = Generator(model, plan, batch=len(labels))
        drawn = generator.draw(labels)  # the same random numbers under every plan
        assert drawn.images is not None
        rows.append(drawn.images)
        print(f"{policy:>8}: {generator.cache.allocated_bytes / 2**20:.3f} MiB of cache for {len(labels)} images")
    for name, value in zip(NAMES, psnr(rows[1], rows[0]), strict=True):
        print(f"{name:>8}: {value:.1f} dB to the full cache's picture")
    image_grid(torch.cat(rows), columns=len(labels), enlarge=3).save(given.out)
    print(f"written: {given.out}")


if __name__ == "__main__":
    try:
        main()
    except HeatKVError as error:
        raise SystemExit(str(error)) from None
