"""Oracles of calibration: attention mass and drop errors by plain softmax in float64 over all keys.

Shapes: R rows, H heads, N queries, M keys, D head size, S sources, C width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from heatkv.core.statistics import Statistics
from heatkv.engine.arena_cache import Attend
from heatkv.models.base import ImageModel


def dense_errors(
    q: Tensor, keys: list[Tensor], values: list[Tensor], weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Mass (R, H, S) and |W_o^h (o - o without source s)|^2 (R, H, S), summed over queries, in float64.

    The output without a source is attention anew, with that source's logits at minus infinity.
    """
    logits = q.double() @ torch.cat(keys, dim=2).double().transpose(2, 3)
    v = torch.cat(values, dim=2).double()
    full = logits.softmax(-1)
    masses, errors, first = [], [], 0
    for k in keys:
        part = slice(first, first := first + k.shape[2])
        masses.append(full[..., part].sum((2, 3)))
        if k is keys[-1]:  # the running scale is never dropped
            errors.append(torch.zeros_like(masses[-1]))
            continue
        without = logits.clone()
        without[..., part] = -torch.inf
        change = full @ v - without.softmax(-1) @ v
        if weights is not None:
            change = change @ weights.double().transpose(1, 2)
        errors.append(change.square().sum((2, 3)))
    return torch.stack(masses, dim=-1), torch.stack(errors, dim=-1)


class DenseErrors(Attend):
    """Keeps everything densely and takes x, the gate and W_o from the model's own modules; `attention` names the
    self-attention in every block."""

    def __init__(self, model: ImageModel[Any], blocks: list[nn.Module], attention: str, rows: int) -> None:
        geometry, scales = model.geometry, len(model.geometry.schedule)
        self.heads, self.blocks, self.attention = geometry.heads, blocks, attention
        self.keys: dict[int, list[Tensor]] = {}
        self.values: dict[int, list[Tensor]] = {}
        shape = (rows, geometry.layers, geometry.heads, scales, scales)
        self.mass, self.error = np.zeros(shape), np.zeros(shape)
        self.x, self.gate = Tensor(), Tensor()

    @contextmanager
    def hooked(self) -> Iterator[None]:
        with ExitStack() as undo:
            for block in self.blocks:
                undo.callback(block.register_forward_pre_hook(self._see).remove)
            yield

    def _see(self, _: nn.Module, arguments: tuple[Any, ...]) -> None:
        self.x, condition = arguments[:2]
        # VAR: (R, 6, 1, C); Infinity: the condition of all layers; the gate comes first in both
        of_layer = condition if isinstance(condition, Tensor) else condition.modulations[arguments[2]]
        self.gate = of_layer.unbind(1)[0]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.keys.setdefault(layer, []).append(k)
        self.values.setdefault(layer, []).append(v)
        keys, values = self.keys[layer], self.values[layer]
        joined = getattr(self.blocks[layer], self.attention).proj.weight  # (C, heads in a row)
        mass, error = dense_errors(q, keys, values, torch.stack(joined.chunk(self.heads, dim=1)))
        size = self.x.double().square().sum(2).mean(1)
        relative = error * (self.gate.double().square().mean((1, 2)) / size)[:, None, None]
        target = len(keys) - 1
        self.mass[:, layer, :, target, : target + 1] = (mass / q.shape[2]).numpy()
        self.error[:, layer, :, target, : target + 1] = relative.numpy()
        return (q @ torch.cat(keys, dim=2).transpose(2, 3)).softmax(-1) @ torch.cat(values, dim=2)


def check_drop_errors(measured: Statistics, oracle: DenseErrors) -> None:
    np.testing.assert_allclose(measured.all_mass, oracle.mass.mean(0), atol=2e-5)
    expected = oracle.error.mean(0)
    scales = expected.shape[2]
    past = np.tril(np.ones((scales, scales), dtype=bool), -1)
    assert (measured.drop_error[:, :, ~past] == 0).all()
    assert (expected[:, :, past] > 0).all()
    # fp32 against float64: 0.5 % of every cell's own error, but for cells of less than a millionth of the largest
    np.testing.assert_allclose(measured.drop_error, expected, rtol=5e-3, atol=1e-6 * expected.max())
