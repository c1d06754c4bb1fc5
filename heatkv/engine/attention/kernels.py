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

from heatkv.core.schema import shown
from heatkv.engine.attention import triton_kernels
from heatkv.engine.attention.grouping import AttentionCost, CallShape
from heatkv.engine.attention.held import HeldTokens
from heatkv.engine.attention.ragged import HeadGroup, Workspace, group_heads, group_numbers, ragged_attention
from heatkv.engine.store import Store
from heatkv.errors import PlanError

IntArrays = Sequence[NDArray[np.int64]]
FloatArrays = Sequence[NDArray[np.float64]]


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

    def prepare_kept(self, heads: Sequence[int], slots_KN: NDArray[np.int64]) -> Any:
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
        self.workspace = Workspace()

    def prepare(
        self, slots_of_head: IntArrays, bias_of_head: FloatArrays | None, shape: CallShape
    ) -> tuple[HeadGroup, ...]:
        groups = group_heads(self.store, slots_of_head, bias_of_head, shape, self.cost)
        self.workspace.reserve(group_numbers(groups, shape), self.store.dtype, self.store.device)
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
        first = self.store.uncoded_slots
        of_part: list[HeldTokens | None] = []
        for coded in (False, True):
            chosen = [(slots >= first) == coded for slots in slots_of_head]
            counts = np.array([int(mine.sum()) for mine in chosen], dtype=np.int32)
            if not counts.any():
                of_part.append(None)
                continue
            slots = [slots[mine] - first * coded for slots, mine in zip(slots_of_head, chosen, strict=True)]
            bias = None
            if bias_of_head is not None:
                bias = np.concatenate([x[mine] for x, mine in zip(bias_of_head, chosen, strict=True)])
            begins = np.concatenate([[0], counts.cumsum()[:-1]]).astype(np.int32)
            of_part.append(
                HeldTokens(
                    self._on_device(np.concatenate(slots).astype(np.int32)),
                    self._on_device(begins[None]),
                    self._on_device(counts[None]),
                    self._on_device(bias.astype(np.float32)) if bias is not None and bias.any() else None,
                )
            )
        return of_part[0], of_part[1]

    def _on_device(self, array: NDArray[Any]) -> Tensor:
        return torch.from_numpy(array).to(self.store.device)

    def attend(
        self,
        q_RHND: Tensor,
        k_RHND: Tensor,
        v_RHND: Tensor,
        prepared: tuple[HeldTokens | None, HeldTokens | None],
    ) -> Tensor:
        if torch.is_grad_enabled() and any(x.requires_grad for x in (q_RHND, k_RHND, v_RHND)):
            raise PlanError(
                "attention kernel triton gives no gradients; draw under torch.inference_mode() or torch.no_grad(), or "
                'use attention="ragged"'
            )
        uncoded, coded = prepared
        plain = None if uncoded is None else (self.store.arena_2RPD, uncoded)
        codes = None
        if coded is not None:
            assert self.store.codes_2RQD is not None
            assert self.store.scales_2RQ is not None
            codes = (self.store.codes_2RQD, self.store.scales_2RQ, coded)
        return triton_kernels.fused_attention(q_RHND, k_RHND, v_RHND, plain, codes)

    def prepare_kept(self, heads: Sequence[int], slots_KN: NDArray[np.int64]) -> tuple[Tensor, Tensor, bool]:
        coded = bool((slots_KN >= self.store.uncoded_slots).all())  # all are of one scale
        within = slots_KN - self.store.uncoded_slots * coded
        return self._on_device(np.array(heads, dtype=np.int32)), self._on_device(within.astype(np.int32)), coded

    def keep(self, k_RHND: Tensor, v_RHND: Tensor, prepared: tuple[Tensor, Tensor, bool]) -> None:
        heads_K, slots_KN, coded = prepared
        if coded:
            codes, scales = self.store.codes_2RQD, self.store.scales_2RQ
            triton_kernels.append_kept(k_RHND, v_RHND, heads_K, slots_KN, None, codes, scales)
        else:
            triton_kernels.append_kept(k_RHND, v_RHND, heads_K, slots_KN, self.store.arena_2RPD)


KERNELS = {kernel.name: kernel for kernel in (RaggedAttention, TritonAttention)}
"""The kernels by the name that a user may give."""


def check_kernel(
    name: str, device: torch.device, dtype: torch.dtype, head_dim: int, code: torch.dtype | None, gathered: bool
) -> None:
    """Raise PlanError for an unknown kernel, or one that cannot run with this device and these types, or, where tokens
    are `gathered` to be scored, one that reads them where they are."""
    if not isinstance(name, str) or (name != "auto" and name not in KERNELS):
        raise PlanError(f"unknown attention kernel {shown(name)}; known: auto, {', '.join(KERNELS)}")
    if name == "triton" and gathered:
        raise PlanError(
            "attention kernel triton is not for dynamic policies, whose tokens are gathered to be scored; use auto or "
            "ragged"
        )
    missing = triton_kernels.supports(device, dtype, head_dim, code)
    if name == "triton" and missing is not None:
        raise PlanError(f"attention kernel triton cannot run here: {missing}; use ragged")


def choose_kernel(name: str, store: Store) -> AttentionKernel:
    """The kernel of this name; "auto" is the fused one on a GPU that can run it, the plain one everywhere else.

    Raises PlanError for an unknown name, or for a kernel that cannot run on the store's device or with its types.
    """
    check_kernel(name, store.device, store.dtype, store.head_dim, store.code, gathered=False)
    missing = triton_kernels.supports(store.device, store.dtype, store.head_dim, store.code)
    if name == "auto":
        return TritonAttention(store) if store.device.type == "cuda" and missing is None else RaggedAttention(store)
    return KERNELS[name](store)
