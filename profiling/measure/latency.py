"""How long a call takes: warmed up, synchronised, repeated in changing order; nothing dropped.

Where the time goes is measured in runs of its own, so that looking does not colour the totals.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from heatkv.engine.spans import PHASES, listening, scale_name

CONFIDENCE = 0.95
"""Of the interval of a median, where there are runs enough for it."""
OUTLIER_IQRS = 1.5
"""Runs further than so many quartile distances outside the quartiles are counted as outliers."""


def median_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> tuple[float, float, float]:
    """An interval of the median from order statistics, whatever the distribution: low, high, and its confidence.

    The narrowest symmetric pair of order statistics that reaches `confidence`; with too few values the least and the
    greatest, whose confidence is then lower (1 - 2^(1-n): six values are the fewest for 95 %).
    """
    ordered, n = sorted(values), len(values)
    inside, kept = 1 - 2 ** (1 - n), 0
    # leaving out one more on either side loses the chance that exactly that many lie on one side of the median
    while 2 * (kept + 1) < n and (narrower := inside - 2 * math.comb(n, kept + 1) / 2**n) >= confidence:
        inside, kept = narrower, kept + 1
    return ordered[kept], ordered[n - 1 - kept], inside


def outliers_of(values: Sequence[float]) -> list[float]:
    """Those further than OUTLIER_IQRS quartile distances outside the quartiles, in their order."""
    low, high = np.percentile(values, [25, 75])
    far = OUTLIER_IQRS * (high - low)
    return [value for value in values if not low - far <= value <= high + far]


@dataclass(frozen=True)
class Breakdown:
    """Medians over instrumented runs in milliseconds: of every scale, and of every phase of one drawing.

    `phases` has those of heatkv.engine.spans and `other`, the rest: projections, norms, embeddings, logits. None where
    no Python runs inside a scale, as with CUDA graphs. Scales do not hold the decoder.
    """

    scales_ms: tuple[float, ...]
    phases_ms: Mapping[str, float] | None


@dataclass(frozen=True)
class Latency:
    """Wall-clock times of repeated runs in the order they were made, in milliseconds, and where time goes."""

    runs_ms: tuple[float, ...]
    breakdown: Breakdown | None = None

    @property
    def median_ms(self) -> float:
        return float(np.median(self.runs_ms))

    @property
    def iqr_ms(self) -> float:
        """Distance between the quartiles."""
        low, high = np.percentile(self.runs_ms, [25, 75])
        return float(high - low)

    @property
    def outliers(self) -> int:
        """How many runs lie far outside the quartiles; they count in everything else."""
        return len(outliers_of(self.runs_ms))

    def to_json(self) -> dict[str, Any]:
        low, high, confidence = median_interval(self.runs_ms)
        told: dict[str, Any] = {
            "median": round(self.median_ms, 3),
            "iqr": round(self.iqr_ms, 3),
            "runs": len(self.runs_ms),
            "interval": [round(low, 3), round(high, 3)],
            "confidence": round(confidence, 4),
            "outliers": self.outliers,
            "all": [round(run, 3) for run in self.runs_ms],
        }
        if self.breakdown is not None:
            phases = self.breakdown.phases_ms
            told["scales"] = [round(x, 3) for x in self.breakdown.scales_ms]
            told["phases"] = None if phases is None else {name: round(x, 3) for name, x in phases.items()}
        return told


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def _timed(call: Callable[[], object], device: torch.device) -> float:
    _synchronise(device)
    began = time.perf_counter()
    call()
    _synchronise(device)
    return (time.perf_counter() - began) * 1e3


def turns(count: int, repeats: int) -> list[list[int]]:
    """The order of every repeat: each is the last one reversed, and every other one starts one further.

    So that a drift of the machine, and what a call leaves behind for the next, hit all alike.
    """
    orders = []
    for repeat in range(repeats):
        first = repeat // 2 % count
        order = [(first + i) % count for i in range(count)]
        orders.append(order if repeat % 2 == 0 else order[::-1])
    return orders


def measure_interleaved(
    calls: Mapping[str, Callable[[], object]],
    device: torch.device,
    repeats: int,
    progress: Callable[[], None] | None = None,
) -> dict[str, Latency]:
    """Time every call `repeats` times after one warm-up, in `turns`."""
    for call in calls.values():
        call()
    names = list(calls)
    runs: dict[str, list[float]] = {name: [] for name in names}
    for order in turns(len(names), repeats):
        for index in order:
            runs[names[index]].append(_timed(calls[names[index]], device))
            if progress is not None:
                progress()
    return {name: Latency(tuple(times)) for name, times in runs.items()}


class SpanClock:
    """Sums the time of every span of one drawing: by events on a CUDA device, by the clock, synchronised, elsewhere."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._spans: list[tuple[str, Any, Any]] = []

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """A listener of heatkv.engine.spans."""
        began = self._now()
        yield
        self._spans.append((name, began, self._now()))

    def _now(self) -> Any:
        if self._device.type != "cuda":
            _synchronise(self._device)
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def sums_ms(self) -> dict[str, float]:
        """Milliseconds by name; waits for the device."""
        _synchronise(self._device)
        sums: dict[str, float] = defaultdict(float)
        for name, began, ended in self._spans:
            if self._device.type == "cuda":
                sums[name] += began.elapsed_time(ended)
            else:
                sums[name] += (ended - began) * 1e3
        return dict(sums)


def measure_breakdown(
    call: Callable[[], object], device: torch.device, scales: int, repeats: int, phases: bool = True
) -> Breakdown:
    """Medians over `repeats` drawings that are watched; `call` is warm. Without `phases`, of the scales alone."""
    of_runs: list[dict[str, float]] = []
    for _ in range(repeats):
        clock = SpanClock(device)
        with listening(clock.span):
            _synchronise(device)
            with clock.span("all"):
                call()
        of_runs.append(clock.sums_ms())
    names = [scale_name(scale) for scale in range(scales)]

    def median(values: Sequence[float]) -> float:
        return float(np.median(values))

    found = None
    if phases:
        found = {name: median([run.get(name, 0.0) for run in of_runs]) for name in PHASES}
        found["other"] = median([run["all"] - sum(run.get(name, 0.0) for name in PHASES) for run in of_runs])
    return Breakdown(tuple(median([run[name] for run in of_runs]) for name in names), found)
