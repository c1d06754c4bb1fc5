"""What every attention kernel of a cache does.

Shapes: R rows, H heads, N tokens of the running scale, D head size, K heads that keep their new tokens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from heatkv.core.schema import FloatArray, IntArray
from heatkv.engine.store import Store

IntArrays = Sequence[IntArray]
FloatArrays = Sequence[FloatArray]


@dataclass(frozen=True)
class CallShape:
    """What all heads of a layer have in common for one target: rows, queries, head size, and bytes of a channel."""

    rows: int
    tokens: int
    head_dim: int
    itemsize: int

    def gathered(self, held: int) -> int:
        """Numbers of the keys and values of one head that holds so many tokens."""
        return 2 * self.rows * (held + self.tokens) * self.head_dim


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
