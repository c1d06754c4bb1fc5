"""How long a call takes: warmed up, synchronised, repeated in changing order; nothing dropped.

Where the time goes is measured in runs of its own, so that looking does not colour the totals.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from scipy.stats import binom

from heatkv.engine.spans import PHASES, listening, scale_name
from heatkv.profiling.results.row import Latency

CONFIDENCE = 0.95
"""Of an interval, where there are runs enough for it."""
OUTLIER_IQRS = 1.5
"""Runs further than so many quartile distances outside the quartiles are counted as outliers."""


def median_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """An interval of the median, whatever the distribution: low, high, and its confidence.

    The narrowest symmetric pair of order statistics that reaches CONFIDENCE; with fewer than six values the least and
    the greatest, which reach less.
    """
    ordered, n = sorted(values), len(values)
    # leaving out `left` values on either side loses the chance that at most so many lie on one side of the median
    missed = [2 * float(binom.cdf(left, n, 0.5)) for left in range((n + 1) // 2)]
    left = max((left for left, chance in enumerate(missed) if chance <= 1 - CONFIDENCE), default=0)
    return ordered[left], ordered[n - 1 - left], 1 - missed[left]


def outliers_of(values: Sequence[float]) -> list[float]:
    """Those further than OUTLIER_IQRS quartile distances outside the quartiles, in their order."""
    low, high = np.percentile(values, [25, 75])
    far = OUTLIER_IQRS * (high - low)
    return [value for value in values if not low - far <= value <= high + far]


def latency_of(
    runs_ms: Sequence[float], scales: Sequence[float] | None = None, phases: Mapping[str, float] | None = None
) -> Latency:
    """Times in the order they were taken, and medians of watched runs, as a row of results has them."""
    low, high, confidence = median_interval(runs_ms)
    quartiles = np.percentile(runs_ms, [25, 75])
    return Latency(
        median=round(float(np.median(runs_ms)), 3),
        iqr=round(float(quartiles[1] - quartiles[0]), 3),
        runs=len(runs_ms),
        interval=(round(low, 3), round(high, 3)),
        confidence=round(confidence, 4),
        outliers=len(outliers_of(runs_ms)),
        all=tuple(round(run, 3) for run in runs_ms),
        scales=None if scales is None else tuple(round(scale, 3) for scale in scales),
        phases=None if phases is None else {name: round(phase, 3) for name, phase in phases.items()},
    )


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
    orders = [[(repeat // 2 + i) % count for i in range(count)] for repeat in range(repeats)]
    return [order[:: -1 if repeat % 2 else 1] for repeat, order in enumerate(orders)]


def measure_interleaved(
    calls: Mapping[str, Callable[[], object]],
    device: torch.device,
    repeats: int,
    progress: Callable[[], object] = lambda: None,
) -> dict[str, list[float]]:
    """Milliseconds of every call, `repeats` times after one warm-up, in `turns`."""
    for call in calls.values():
        call()
    names = list(calls)
    runs: dict[str, list[float]] = {name: [] for name in names}
    for order in turns(len(names), repeats):
        for index in order:
            runs[names[index]].append(_timed(calls[names[index]], device))
            progress()
    return runs


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
            sums[name] += began.elapsed_time(ended) if self._device.type == "cuda" else (ended - began) * 1e3
        return sums


def measure_breakdown(
    call: Callable[[], object], device: torch.device, scales: int, repeats: int
) -> tuple[list[float], dict[str, float]]:
    """Medians over `repeats` drawings that are watched, in milliseconds; `call` is warm.

    Of every scale, without the decoder, and of every phase of heatkv.engine.spans, with `other` for the rest:
    projections, norms, embeddings, logits. No Python runs inside a scale with CUDA graphs: there are no phases then.
    """
    runs: list[dict[str, float]] = []
    for _ in range(repeats):
        clock = SpanClock(device)
        with listening(clock.span):
            _synchronise(device)
            with clock.span("all"):
                call()
        times = clock.sums_ms()
        times["other"] = times["all"] - sum(times[name] for name in PHASES)
        runs.append(times)

    def median(name: str) -> float:
        return float(np.median([run[name] for run in runs]))

    return [median(scale_name(scale)) for scale in range(scales)], {name: median(name) for name in (*PHASES, "other")}
