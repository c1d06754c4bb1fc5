"""Where a measurement was made: device, threads, versions, and a yardstick to compare machines by."""

from __future__ import annotations

import platform
import statistics
import time
from typing import Any

import torch

from heatkv.core.io import versions
from heatkv.engine.watch import is_deterministic
from heatkv.profiling.measure.busy import load_of

_YARDSTICK_SIDE = 1024


def matrix_product_ms(repeats: int = 7) -> float:
    """Median time of an fp32 matrix product of 1024 cubed on one thread, in milliseconds.

    Times of two machines compare best as multiples of it.
    """
    threads = torch.get_num_threads()
    a, b = torch.randn(_YARDSTICK_SIDE, _YARDSTICK_SIDE), torch.randn(_YARDSTICK_SIDE, _YARDSTICK_SIDE)
    torch.set_num_threads(1)
    try:
        times = []
        for _ in range(repeats + 2):
            began = time.perf_counter()
            a @ b
            times.append(time.perf_counter() - began)
    finally:
        torch.set_num_threads(threads)
    return statistics.median(times[2:]) * 1e3


def processor() -> str:
    """The CPU's name, as the system gives it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def device_name(device: torch.device) -> str:
    """The name a person knows the device by."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else processor()


_PRODUCT = "matrix_product_1024_fp32_one_thread_ms"


def timing_machine(device: torch.device) -> tuple[dict[str, Any], list[str]]:
    """What times are to be read with, taken as they are measured, and why the machine counts as busy, if it does."""
    load = load_of(device)  # before our own product
    return {"load": load.to_json(), _PRODUCT: round(matrix_product_ms(), 3)}, load.reasons


def environment(device: torch.device) -> dict[str, Any]:
    """What every result states about the machine it was measured on."""
    machine, _ = timing_machine(device)
    return {
        "device": device.type,
        "device_name": device_name(device),
        "threads": torch.get_num_threads(),
        "deterministic": is_deterministic(),
        "system": platform.platform(),
        "versions": versions(),
        **machine,
    }
