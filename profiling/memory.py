"""What the device saw of a call, beside what was planned and what the arena allocated."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class DeviceMemory:
    """What the device saw during a call; None where it cannot be measured, which is never the same as 0.

    `peak_bytes`: the CUDA allocator's peak of allocated bytes during the call, above what was allocated before.
    `nvml_bytes`: memory of this process as the driver counts it, after the call.
    """

    peak_bytes: int | None
    nvml_bytes: int | None


def nvml_process_bytes(device: torch.device) -> int | None:
    """This process's memory on `device` as NVML counts it; None without a GPU, without pynvml or without access."""
    if device.type != "cuda":
        return None
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        mine = [p for p in pynvml.nvmlDeviceGetComputeRunningProcesses(handle) if p.pid == os.getpid()]
    except pynvml.NVMLError:
        return None
    used = mine[0].usedGpuMemory if mine else None
    return None if used is None else int(used)


def measure_device(call: Callable[[], object], device: torch.device) -> DeviceMemory:
    """Run `call` once and report what the device saw of it."""
    if device.type != "cuda":
        call()
        return DeviceMemory(None, None)
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    return DeviceMemory(torch.cuda.max_memory_allocated(device) - before, nvml_process_bytes(device))
