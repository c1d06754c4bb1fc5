"""Traces of one generation by torch's profiler, for TensorBoard (torch-tb-profiler) and Perfetto.

Ranges are those of heatkv.engine.spans: `scale N`, in it `layer L`, in that the phases.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile, schedule

from heatkv.core.io import file_name, replacing
from heatkv.errors import FormatError
from heatkv.models.base import ImageModel
from heatkv.models.sampling import Settings
from heatkv.profiling.measure.subjects import Subject


def save_trace(
    folder: Path, model: ImageModel[Any], subject: Subject, batch: int, settings: Settings, point: str = ""
) -> Path:
    """Draw `batch` images eagerly under the profiler and write its trace; the file, `<worker>.<time>.pt.trace.json`.

    The worker is the subject, so that torch-tb-profiler lists subjects beside each other as workers of one run;
    `point` is added to its name. One drawing warms up and one is recorded. Raises FormatError when the file cannot
    be written.
    """
    generator, labels = subject.generator(model, settings, 0, batch), model.labels(batch)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if model.device.type == "cuda" else [])]
    worker = file_name(f"{subject.name.replace('%', 'percent')} batch {batch}{point}")
    path = folder / f"{worker}.{time.time_ns()}.pt.trace.json"
    folder.mkdir(parents=True, exist_ok=True)

    def write(profiler: Any) -> None:
        with replacing(path) as temporary:
            profiler.export_chrome_trace(str(temporary))
            # the profiler's library writes beside it, and tells nobody when it cannot
            temporary.with_name(f"{temporary.name}.tmp").unlink(missing_ok=True)
            if not temporary.read_bytes().rstrip().endswith(b"}"):
                raise FormatError(f"cannot write {path}: the profiler could not finish it; is there room on the disk?")

    with _output_on_errors(), profile(
        activities=activities, schedule=schedule(wait=0, warmup=1, active=1, repeat=1), on_trace_ready=write
    ) as profiler:  # fmt: skip
        for _ in range(2):
            generator.draw(labels)
            profiler.step()
    return path


@contextmanager
def _output_on_errors() -> Iterator[None]:
    """What the profiler's library prints goes to the error stream: the output belongs to results."""
    sys.stdout.flush()
    kept = os.dup(1)
    try:
        os.dup2(2, 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
