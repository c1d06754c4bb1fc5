"""The attention kernels of a cache behind one interface, and which of them runs where.

Shapes: R rows, H heads, N tokens of the running scale, D head size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from heatkv.core.schema import FloatArray, IntArray, shown
from heatkv.engine.attention import triton_launch
from heatkv.engine.attention.grouped import (
    AttentionCost,
    CallShape,
    HeadGroup,
    Workspace,
    group_heads,
    ragged_attention,
)
from heatkv.engine.attention.triton_launch import HeldTokens
from heatkv.engine.store import Store
from heatkv.errors import PlanError

IntArrays = Sequence[IntArray]
FloatArrays = Sequence[FloatArray]


class AttentionKernel(ABC):
    """Attention of one layer over what its heads hold and the current scale, and the writing of what they keep of it.

    `prepare` and `prepare_kept` are called once for every layer and target, before the first image, and what they
    return is handed to `attend` and `keep` for every image.
    """

    name: str

    def __init__(self, store: Store) -> None:
        self.store = store

    @abstractmethod
    def prepare(self, slots_of_head: IntArrays, bias_of_head: FloatArrays | None, shape: CallShape) -> Any:
        """`slots_of_head[h]` has the slots of head h in token order, `bias_of_head` what is added to their logits."""

    @abstractmethod
    def attend(self, q_RHND: Tensor, k_RHND: Tensor, v_RHND: Tensor, prepared: Any) -> Tensor:
        """softmax(q [held, k]^T + bias) [held, v] per head, (R, H, N, D)."""

    def prepare_kept(self, heads: Sequence[int], slots_KN: IntArray) -> Any:
        """These heads keep the tokens of the running scale, in these slots, one or more of each."""
        return (
            torch.tensor(heads, dtype=torch.long, device=self.store.device),
            self.store.places(slots_KN.ravel(), writing=True),
        )

    def keep(self, k_RHND: Tensor, v_RHND: Tensor, prepared: Any) -> None:
        """Write the new keys and values of the heads that keep them."""
        heads, places = prepared
        everyone = len(heads) == k_RHND.shape[1]
        k, v = (x if everyone else x.index_select(1, heads) for x in (k_RHND, v_RHND))
        self.store.write(places, k.flatten(1, 2), v.flatten(1, 2))

    @property
    def workspace_bytes(self) -> int:
        """Bytes that the kernel keeps beside the arena to work in."""
        return 0


class RaggedAttention(AttentionKernel):
    """Heads in groups through `scaled_dot_product_attention`: plain PyTorch, on every device."""

    name = "ragged"

    def __init__(self, store: Store, cost: AttentionCost | None = None) -> None:
        super().__init__(store)
        self.cost = cost if cost is not None else AttentionCost.measured(store.dtype)
        self.workspace = Workspace(store.dtype, store.device)

    def prepare(
        self, slots_of_head: IntArrays, bias_of_head: FloatArrays | None, shape: CallShape
    ) -> tuple[HeadGroup, ...]:
        groups = group_heads(self.store, slots_of_head, bias_of_head, shape, self.cost)
        self.workspace.reserve(groups, shape)
        return groups

    def attend(self, q_RHND: Tensor, k_RHND: Tensor, v_RHND: Tensor, prepared: tuple[HeadGroup, ...]) -> Tensor:
        return ragged_attention(q_RHND, k_RHND, v_RHND, self.store, prepared, self.workspace)

    @property
    def workspace_bytes(self) -> int:
        return self.workspace.nbytes


class TritonAttention(AttentionKernel):
    """One fused kernel for all heads, which reads the arena where it is: for GPUs, and in the interpreter for tests."""

    name = "triton"

    def prepare(
        self, slots_of_head: IntArrays, bias_of_head: FloatArrays | None, shape: CallShape
    ) -> tuple[HeldTokens | None, HeldTokens | None]:
        """Lists of the uncoded slots and of the coded ones, None where no head reads any."""
        biases = bias_of_head or [np.zeros(len(slots)) for slots in slots_of_head]
        first, lists = self.store.uncoded_slots, []
        for coded in (False, True):
            chosen = [(slots >= first) == coded for slots in slots_of_head]
            counts = np.array([mine.sum() for mine in chosen])
            slots = np.concatenate([slots[mine] for slots, mine in zip(slots_of_head, chosen, strict=True)])
            bias = np.concatenate([x[mine] for x, mine in zip(biases, chosen, strict=True)])
            held = HeldTokens(
                self._on_device(slots - first * coded),
                self._on_device((counts.cumsum() - counts)[None]),
                self._on_device(counts[None]),
                self._on_device(bias, np.float32) if bias.any() else None,
            )
            lists.append(held if len(slots) else None)
        return lists[0], lists[1]

    def _on_device(self, array: NDArray[Any], kind: type[np.generic] = np.int32) -> Tensor:
        return torch.from_numpy(array.astype(kind)).to(self.store.device)

    def attend(
        self, q_RHND: Tensor, k_RHND: Tensor, v_RHND: Tensor, prepared: tuple[HeldTokens | None, HeldTokens | None]
    ) -> Tensor:
        if torch.is_grad_enabled() and any(x.requires_grad for x in (q_RHND, k_RHND, v_RHND)):
            raise PlanError(
                "attention kernel triton gives no gradients; draw under torch.inference_mode() or torch.no_grad(), or "
                'use attention="ragged"'
            )
        uncoded, coded = prepared
        return triton_launch.fused_attention(
            q_RHND,
            k_RHND,
            v_RHND,
            None if uncoded is None else (self.store.arena_2RPD, uncoded),
            None if coded is None else (self.store.codes_2RQD, self.store.scales_2RQ, coded),
        )

    def prepare_kept(self, heads: Sequence[int], slots_KN: IntArray) -> tuple[Tensor, Tensor, bool]:
        coded = bool((slots_KN >= self.store.uncoded_slots).all())  # all are of one scale
        within = slots_KN - self.store.uncoded_slots * coded
        return self._on_device(np.array(heads)), self._on_device(within), coded

    def keep(self, k_RHND: Tensor, v_RHND: Tensor, prepared: tuple[Tensor, Tensor, bool]) -> None:
        heads_K, slots_KN, coded = prepared
        into = (self.store.codes_2RQD, self.store.scales_2RQ) if coded else (self.store.arena_2RPD,)
        triton_launch.append_kept(k_RHND, v_RHND, heads_K, slots_KN, *into)


KERNELS = {kernel.name: kernel for kernel in (RaggedAttention, TritonAttention)}
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
