"""The attention kernels by name, and which of them runs where."""

from __future__ import annotations

import torch

from heatkv.core.schema import shown
from heatkv.engine.attention import triton_launch
from heatkv.engine.attention.base import AttentionKernel
from heatkv.engine.attention.grouped import RaggedAttention
from heatkv.engine.store import Store
from heatkv.errors import PlanError

KERNELS = {kernel.name: kernel for kernel in (RaggedAttention, triton_launch.TritonAttention)}
"""The kernels by the name that a user may give."""


def check_kernel(name: str, device: torch.device, dtype: torch.dtype, head_dim: int, code: torch.dtype | None) -> None:
    """Raise PlanError for an unknown kernel, or one that cannot run with this device and these types."""
    if name != "auto" and name not in KERNELS:
        raise PlanError(f"unknown attention kernel {shown(name)}; known: auto, {', '.join(KERNELS)}")
    missing = triton_launch.missing(device, dtype, head_dim, code) if name == "triton" else None
    if missing is not None:
        raise PlanError(f"attention kernel triton cannot run here: {missing}; use ragged")


def choose_kernel(name: str, store: Store) -> AttentionKernel:
    """The kernel of this name; "auto" is the fused one on a GPU that can run it, the plain one everywhere else.

    Raises PlanError for an unknown name, or for a kernel that cannot run on the store's device or with its types.
    """
    able = store.device, store.dtype, store.head_dim, store.code
    check_kernel(name, *able)
    if name == "auto":
        name = "triton" if store.device.type == "cuda" and triton_launch.missing(*able) is None else "ragged"
    return KERNELS[name](store)
