"""Counts the bytes of tensors that are alive at once, by watching every operation; shapes alone are enough."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class TensorLedger(TorchDispatchMode):
    """While it is active, follows every storage that an operation creates; `peak` is the most bytes alive at once.

    Storages that existed before (weights, inputs) are not counted, whatever views of them are made; nor are those of
    another device than `device`, where there is one.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self._device = device
        self._followed: dict[int, int] = {}
        self._followed_bytes = 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    @property
    def live(self) -> int:
        """Bytes alive now."""
        return sum(size for _, size in self._still_alive().values()) + self._followed_bytes

    def reset_peak(self) -> None:
        """Let the peak begin with what is alive now."""
        self.peak = self.live

    def follow(self, tensors: Iterable[Tensor]) -> None:
        """Count these too, which no operation made, numpy's for example; they must live as long as this is active."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage._cdata not in self._alive and self._counts(tensor):
                self._followed[storage._cdata] = storage.nbytes()
        self._followed_bytes = sum(self._followed.values())
        self.peak = max(self.peak, self.live)

    def bytes_seen(self, tensors: Iterable[Tensor]) -> int:
        """Bytes of those storages among these tensors' that are followed and alive."""
        sizes = {key: size for key, (_, size) in self._still_alive().items()} | self._followed
        return sum(sizes.get(key, 0) for key in {tensor.untyped_storage()._cdata for tensor in tensors})

    def _still_alive(self) -> dict[int, tuple[StorageWeakRef, int]]:
        self._alive = {key: entry for key, entry in self._alive.items() if not entry[0].expired()}
        return self._alive

    def _counts(self, tensor: Tensor) -> bool:
        return self._device is None or tensor.device == self._device

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        inputs = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in inputs and self._counts(tensor):
                storage = tensor.untyped_storage()
                self._alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.peak = max(self.peak, self.live)
        return out


class FusedAttention(TorchFunctionMode):
    """Lets `scaled_dot_product_attention` take what a fused kernel takes: its output, which is zeros here, never the
    matrix of weights.

    On meta tensors torch would otherwise choose the path that materialises it.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            q, _, v = args[:3]
            return q.new_zeros((*q.shape[:-1], v.shape[-1]))
        return func(*args, **(kwargs or {}))
