"""Profiler traces of one generation, for Perfetto or chrome://tracing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile

from heatkv.files import replacing
from heatkv.generation import Generator
from heatkv.models.base import ImageModel
from heatkv.plan import CachePlan
from heatkv.sampling import Settings


def save_trace(path: Path, model: ImageModel[Any], plan: CachePlan, batch: int, settings: Settings) -> None:
    """Draw `batch` images under the profiler and write a Chrome trace; ranges are named `scale N` and `decode`."""
    generator, labels = Generator(model, plan, batch, settings), model.labels(batch)
    generator.draw(labels)
    activities = [ProfilerActivity.CPU]
    if model.device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as profiler:
        generator.draw(labels)
    with replacing(path) as temporary:
        profiler.export_chrome_trace(str(temporary))
