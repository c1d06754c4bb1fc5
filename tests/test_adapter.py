"""The view of a model's blocks: what it says a head adds to the residual stream, and hooks that do not stay."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.tiny_models import tiny_infinity
from torch import Tensor, nn

from heatkv.calibration import measure as calibration
from heatkv.engine.arena_cache import Attend
from heatkv.models.adapter import ModelAdapter
from heatkv.models.base import ImageModel
from heatkv.models.class_conditional import ClassConditionalModel


class OneHead(Attend):
    """Attention that gives nothing but a random output of one head in one layer."""

    def __init__(self, layer: int, head: int) -> None:
        self.layer, self.head = layer, head
        self.out = Tensor()

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        full = torch.zeros_like(q)
        if layer == self.layer:
            self.out = torch.randn(q[:, self.head].shape, generator=torch.Generator().manual_seed(0))
            full[:, self.head] = self.out
        return full


class Nothing(Attend):
    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.zeros_like(q)


def silence(block: nn.Module) -> None:
    """Leave only self-attention, so that a block adds to its input what that adds."""
    for name, parameter in block.named_parameters():
        if name.startswith(("ffn.fc2", "ca.proj")):
            parameter.data.zero_()


def check_contributions(model: ImageModel[Any], transformer: nn.Module) -> None:
    """A head adds gate * (W_o @ its output) to the stream that enters its layer."""
    for block in transformer.blocks:  # type: ignore[union-attr]
        silence(block)
    adapter: ModelAdapter = model.adapter
    for layer, head in ((0, 0), (1, model.geometry.heads - 1)):
        weight = adapter.output_weight(layer)
        assert weight.shape == (
            model.geometry.heads,
            model.geometry.head_dim * model.geometry.heads,
            model.geometry.head_dim,
        )
        after: list[Tensor] = []
        seen: dict[int, tuple[Tensor, Tensor]] = {}

        def keep(_: nn.Module, __: Any, out: Tensor, after: list[Tensor] = after) -> None:
            after.append(out)

        def watch(at: int, x: Tensor, gate: Tensor, seen: dict[int, tuple[Tensor, Tensor]] = seen) -> None:
            seen[at] = (x, gate)

        hook = adapter.blocks[layer].block.register_forward_hook(keep)
        attend = OneHead(layer, head)
        with torch.inference_mode():
            for cache in (attend, Nothing()):
                drawing = model.begin(model.labels(2), model.sampling)
                with adapter.watching(watch):
                    drawing.logits(cache)
        hook.remove()
        assert sorted(seen) == list(range(model.geometry.layers))
        x, gate = seen[layer]
        added = gate * (attend.out @ weight[head].T)
        assert added.abs().max() > 0.01
        torch.testing.assert_close(after[0] - after[1], added, rtol=1e-3, atol=1e-4)
        bias = adapter.blocks[layer].projection.bias
        torch.testing.assert_close(after[1], x + gate * bias, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["emoji", "infinity"])
def test_what_a_head_adds(family: str, emoji: ClassConditionalModel) -> None:
    model: ImageModel[Any] = emoji if family == "emoji" else tiny_infinity()
    transformer = copy.deepcopy(model.transformer)
    check_contributions(dataclasses.replace(model, transformer=transformer), transformer)  # type: ignore[type-var]


def hooks(model: ImageModel[Any]) -> int:
    return sum(len(view.block._forward_pre_hooks) for view in model.adapter.blocks)


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()], ids=repr)
def test_hooks_do_not_outlive_an_error(
    emoji: ClassConditionalModel, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def fail(*_: Any) -> None:
        raise error

    with pytest.raises(type(error)), emoji.adapter.watching(fail):
        emoji.begin([0], emoji.sampling).logits(Nothing())
    assert hooks(emoji) == 0
    monkeypatch.setattr(calibration, "run_scales", lambda *_, **__: fail())
    with pytest.raises(type(error)):
        calibration.measure_samples(emoji, range(1))
    assert hooks(emoji) == 0


def test_weights_follow_the_type_they_run_in_and_cannot_be_trained_by_mistake(emoji: ClassConditionalModel) -> None:
    transformer = copy.deepcopy(emoji.transformer).requires_grad_(True).set_compute_dtype(torch.bfloat16)
    weight: Callable[[int], Tensor] = transformer.adapter().output_weight
    assert weight(0).dtype == torch.bfloat16
    assert not weight(0).requires_grad
