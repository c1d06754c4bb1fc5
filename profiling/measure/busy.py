"""Whether a machine has other work: times taken beside it are of both."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

IDLE_UTILISATION = 5
"""Per cent of the time with a kernel running, up to which a GPU counts as idle; drivers round up."""
_NVML_WINDOW_S = 1.0
"""NVML's utilisation is of at most the last second, so that after so long our own work is out of it."""


@dataclass(frozen=True)
class Load:
    """What was going on before a measurement. None where it cannot be known, which is never the same as 0.

    `load_average`: of the last minute, all processes of the machine, this one too. `gpu_utilisation`: per cent of the
    last second with a kernel running, none of which is ours. `gpu_processes`: other processes with a context there.
    """

    load_average: float | None
    cores: int
    gpu_utilisation: int | None = None
    gpu_processes: int | None = None

    @property
    def reasons(self) -> list[str]:
        """What speaks for the machine being busy; empty when nothing does."""
        told = []
        if self.load_average is not None and self.load_average > self.cores:
            told.append(f"a load average of {self.load_average:.1f} on {self.cores} cores")
        if self.gpu_utilisation is not None and self.gpu_utilisation > IDLE_UTILISATION:
            told.append(f"the GPU is used {self.gpu_utilisation}% of the time by others")
        if self.gpu_processes:
            told.append(f"{self.gpu_processes} other processes on the GPU")
        return told

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "busy": bool(self.reasons)}


def busy_reasons(environment: Mapping[str, Any]) -> list[str]:
    """What a results.json tells of a busy machine; empty when nothing does, or the load is not told."""
    load = environment.get("load")
    if not isinstance(load, Mapping):
        return []

    def told(name: str) -> Any:
        value = load.get(name)
        return value if isinstance(value, int | float) and not isinstance(value, bool) else None

    cores, utilisation, processes = told("cores"), told("gpu_utilisation"), told("gpu_processes")
    # without a count of cores no load average is too high
    average = None if cores is None else told("load_average")
    found = Load(average, cores or 1, utilisation, processes).reasons
    return found or (["it says so itself"] if load.get("busy") is True else [])


def load_of(device: torch.device) -> Load:
    """The load as it is now; on a CUDA device this waits for a second with the device idle."""
    try:
        average = round(os.getloadavg()[0], 2)
    except OSError:
        average = None
    cores = os.cpu_count() or 1
    if device.type != "cuda":
        return Load(average, cores)
    return Load(average, cores, *_nvml(device))


def _nvml(device: torch.device) -> tuple[int | None, int | None]:
    """Utilisation, and how many processes beside this one have a context on the device."""
    try:
        import pynvml
    except ImportError:
        return None, None
    torch.cuda.synchronize(device)
    time.sleep(_NVML_WINDOW_S)
    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        used = int(pynvml.nvmlDeviceGetUtilizationRates(handle).gpu)
        # in a container our own number is another one, but we are one of them
        return used, max(0, len(pynvml.nvmlDeviceGetComputeRunningProcesses(handle)) - 1)
    except pynvml.NVMLError:
        return None, None
