"""What the benchmarks share: a fixed matrix product beside their times, and their command line."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable
from pathlib import Path

import torch


def matrix_product_ms() -> float:
    """Processor time of one fp32 product of 1024 cubed."""
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    a @ b
    began = time.process_time()
    for _ in range(5):
        a @ b
    return (time.process_time() - began) / 5 * 1e3


def parse(description: str | None, models: Iterable[str]) -> argparse.Namespace:
    """Which of the models to measure, and where to write the results, if anywhere."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(models), choices=list(models))
    parser.add_argument("--out", type=Path, help="write the results here as JSON")
    return parser.parse_args()
