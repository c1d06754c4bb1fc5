"""Where a measurement was made: device, threads, versions, other load, and a yardstick to compare machines by."""

from __future__ import annotations

import os
import platform
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from msgspec import structs
from torch.utils.benchmark import Timer

from heatkv.core.io import versions
from heatkv.engine.watch import is_deterministic
from heatkv.profiling.results.row import Environment, Load, TimingMachine


def matrix_product_ms() -> float:
    """Median time of an fp32 matrix product of 1024 cubed on one thread, in milliseconds.

    Times of two machines compare best as multiples of it.
    """
    operands = {"a": torch.randn(1024, 1024), "b": torch.randn(1024, 1024)}
    return Timer("a @ b", globals=operands, num_threads=1).blocked_autorange(min_run_time=0.15).median * 1e3


def processor() -> str:
    """The CPU's name, as the system gives it."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def device_name(device: torch.device) -> str:
    """The name a person knows the device by."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else processor()


def load_of(device: torch.device) -> Load:
    """The load as it is now; on a CUDA device this waits for a second with the device idle."""
    average = round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None  # Windows has none
    used, others = _others_on(device) if device.type == "cuda" else (None, None)
    load = Load(average, os.cpu_count(), used, others)
    return structs.replace(load, busy=bool(load.reasons))


def nvml_device(device: torch.device) -> tuple[Any, Any] | None:
    """NVML's module and its handle of a CUDA device; None without pynvml or without access."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        return pynvml, pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
    except pynvml.NVMLError:
        return None


def _others_on(device: torch.device) -> tuple[int | None, int | None]:
    """Utilisation, and how many processes beside this one have a context on the device."""
    found = nvml_device(device)
    if found is None:
        return None, None
    nvml, handle = found
    torch.cuda.synchronize(device)
    time.sleep(1.0)  # utilisation is of at most the last second: our own work is out of it then
    try:
        used = int(nvml.nvmlDeviceGetUtilizationRates(handle).gpu)
        # in a container our own number is another one, but we are one of them
        return used, max(0, len(nvml.nvmlDeviceGetComputeRunningProcesses(handle)) - 1)
    except nvml.NVMLError:
        return None, None


def timing_machine(device: torch.device) -> TimingMachine:
    """What times are to be read with, taken as they are measured."""
    load = load_of(device)  # before our own product
    return TimingMachine(load=load, matrix_product_1024_fp32_one_thread_ms=round(matrix_product_ms(), 3))


def environment(device: torch.device) -> Environment:
    """What every result states about the machine it was measured on."""
    return Environment(
        **structs.asdict(timing_machine(device)), device=device.type, device_name=device_name(device),
        threads=torch.get_num_threads(), deterministic=is_deterministic(), system=platform.platform(),
        versions=versions(),
    )  # fmt: skip
