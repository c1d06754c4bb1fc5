"""How long a call takes: warmed up, synchronised, repeated; medians and spread, nothing dropped."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True)
class Latency:
    """Wall-clock times of repeated runs, in milliseconds."""

    runs_ms: tuple[float, ...]

    @property
    def median_ms(self) -> float:
        return float(np.median(self.runs_ms))

    @property
    def iqr_ms(self) -> float:
        """Distance between the quartiles."""
        low, high = np.percentile(self.runs_ms, [25, 75])
        return float(high - low)

    def to_json(self) -> dict[str, Any]:
        return {"median": round(self.median_ms, 3), "iqr": round(self.iqr_ms, 3), "runs": len(self.runs_ms)}


def _timed(call: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - began) * 1e3


def measure_interleaved(
    calls: Mapping[str, Callable[[], object]],
    device: torch.device,
    repeats: int,
    progress: Callable[[], None] | None = None,
) -> dict[str, Latency]:
    """Time every call `repeats` times after one warm-up, in turns, so that a drift of the machine hits all alike."""
    for call in calls.values():
        call()
    runs: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            runs[name].append(_timed(call, device))
            if progress is not None:
                progress()
    return {name: Latency(tuple(times)) for name, times in runs.items()}
