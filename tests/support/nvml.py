"""NVML as measuring uses it, made up."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any


class NVMLError(Exception):
    """What NVML raises where it cannot tell."""


def no_access(*_: Any, **__: Any) -> Any:
    raise NVMLError("Function Not Found")


def fake_nvml(process_bytes: int | None = None, pids: tuple[int, ...] = (os.getpid(),), **functions: Any) -> Any:
    """The library with one device, on which these processes run; `functions` are others than these."""
    running = [SimpleNamespace(pid=pid, usedGpuMemory=process_bytes) for pid in pids]
    nvml = SimpleNamespace(
        NVMLError=NVMLError, nvmlMemory_v2=2, nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda uuid: f"handle of {uuid}",
        nvmlDeviceGetComputeRunningProcesses=lambda handle: running,
        nvmlDeviceGetMemoryInfo=lambda handle, version: SimpleNamespace(total=1000, reserved=100, used=600, free=300),
    )  # fmt: skip
    vars(nvml).update(functions)
    return nvml
