"""Level costs as the expected squared change of the log-likelihood (Fisher information).

Images are drawn with the full cache and gradients; tokens are drawn anew from the guided distribution, and the gradient
of their log-likelihood with respect to a head's output says what a change of that output does to the image. Half the
costs' sum over the heads, per token, predicts the KL divergence.
Shapes: B rows, H heads, N queries, D head size, G draws, K combinations of levels.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from heatkv.calibration.level_costs import LevelBatch, LevelCostCache, LevelMeasurement, single_changes
from heatkv.core.schema import FloatArray
from heatkv.engine.steps import LayerStep

DRAWS = 4
"""Token maps drawn per image and scale."""


class FisherCostCache(LevelCostCache):
    """Keeps every layer's attention output in the autograd graph of a scale; prices combinations once gradients are
    known."""

    def reset(self) -> None:
        super().reset()
        self.outputs: list[Tensor] = []
        self._inputs: list[tuple[Tensor, Tensor, Tensor]] = []

    def _attention(self, layer: int, q_RHND: Tensor, k_RHND: Tensor, v_RHND: Tensor, step: LayerStep) -> Tensor:
        out = super()._attention(layer, q_RHND, k_RHND, v_RHND, step)
        self.outputs.append(out if out.requires_grad else out.requires_grad_())
        self._inputs.append((q_RHND.detach(), k_RHND.detach(), v_RHND.detach()))
        return out

    def _keep(self, k_RHND: Tensor, v_RHND: Tensor, step: LayerStep) -> None:
        super()._keep(k_RHND.detach(), v_RHND.detach(), step)

    def observe(self, layer: int, q_RHND: Tensor, keys: list[Tensor], values: list[Tensor]) -> None:
        """Nothing is known before the scale has run."""

    def price(self, target: int, gradients: Sequence[Sequence[Tensor]]) -> None:
        """Add the costs of `target`, which has just run; `gradients[g][l]` are those of layer l's output, (B, H, N, D)
        each."""
        inputs, self.outputs, self._inputs = self._inputs, [], []
        if target <= self.choices.sink_scales:
            return
        for layer, (q, k, v) in enumerate(inputs):
            gradient_GBHND = torch.stack([of_draw[layer] for of_draw in gradients]).float()
            self._price_layer(target, layer, gradient_GBHND, q, *self.sources(target, layer, k, v))

    def _price_layer(
        self, target: int, layer: int, gradient_GBHND: Tensor, q_RHND: Tensor, keys: list[Tensor], values: list[Tensor]
    ) -> None:
        cells = self.cells(target, layer, keys, values)
        combinations, alone = self.combinations(target), self.alone(target)
        shape = gradient_GBHND.shape[:3]
        joint_GBHK = q_RHND.new_zeros((*shape, combinations.holds.shape[1]), dtype=torch.float64)
        single_GBHA = q_RHND.new_zeros((*shape, len(alone)), dtype=torch.float64)
        first = 0
        for q in combinations.blocks(q_RHND, cells):
            block_GBHND = gradient_GBHND[:, :, :, first : first + q.shape[2]]
            first += q.shape[2]
            items = combinations.items(q, cells)
            scale_BHNK = (items.weight @ combinations.holds).reciprocal_()
            for draw, gradient in enumerate(block_GBHND):
                along_BHNI = (items.moment @ gradient[..., None])[..., 0]
                changes = (along_BHNI @ combinations.holds).mul_(scale_BHNK)
                changes[..., 0] = 0  # all is whole; rounding may give another number
                joint_GBHK[draw] += changes.sum(dim=2, dtype=torch.float64)
            for cell, change in single_changes(q, cells, alone):
                single_GBHA[..., alone.index(cell)] += (change * block_GBHND).sum(dim=(-2, -1), dtype=torch.float64)
        self.joint[target][layer] += self._expected(joint_GBHK).cpu().numpy()
        for (source, level), cost_H in zip(alone, self._expected(single_GBHA).mT.cpu().numpy(), strict=True):
            self.single[layer, :, target, source, level] += cost_H

    def _expected(self, changes_GBHK: Tensor) -> Tensor:
        """Square of the change in all rows of an image together, mean over draws, sum over images, (H, K)."""
        draws, rows, heads, count = changes_GBHK.shape
        of_image = changes_GBHK.view(draws, rows // self.images, self.images, heads, count).sum(dim=1)
        return of_image.square().mean(dim=0).sum(dim=0)


def _drawn_log_likelihoods(logits_BNV: Tensor, seed: int, samples: Sequence[int], scale: int) -> list[Tensor]:
    """For every draw the summed log-likelihood of tokens drawn from softmax(logits), with its autograd graph.

    The random numbers depend on seed, sample, scale and draw alone, not on the batch.
    """
    log_p = logits_BNV.log_softmax(-1)
    out = []
    for draw in range(DRAWS):
        noise = []
        for sample in samples:
            key = np.random.SeedSequence([abs(seed), sample, scale, draw, 0xF15]).generate_state(1, np.uint64)[0]
            generator = torch.Generator().manual_seed(int(key >> np.uint64(1)))
            noise.append(torch.rand(log_p.shape[1:], generator=generator))
        uniform = torch.stack(noise).to(log_p.device).clamp(1e-20, 1 - 1e-7)
        drawn = (log_p.detach() - (-uniform.log()).log()).argmax(-1)
        out.append(log_p.gather(-1, drawn[..., None]).sum())
    return out


def _draw_for_fisher(batch: LevelBatch, log_bias: FloatArray) -> FisherCostCache:
    cache, sampler = batch.cache(FisherCostCache, log_bias), batch.sampler
    with torch.no_grad():
        drawing = batch.model.begin(batch.labels, batch.settings)
        for scale in range(len(batch.choices.schedule)):
            with torch.enable_grad():
                logits = drawing.logits(cache)
                likelihoods = _drawn_log_likelihoods(logits, batch.seed, batch.samples, scale)
            gradients = [
                torch.autograd.grad(likelihood, cache.outputs, retain_graph=likelihood is not likelihoods[-1])
                for likelihood in (likelihoods if scale > batch.choices.sink_scales else ())
            ]
            cache.price(scale, gradients)
            drawing.accept(sampler.choose(scale, logits.detach()))
    return cache


measure_fisher = LevelMeasurement("fisher", 4, _draw_for_fisher)
"""Measures expected squared changes of the log-likelihood."""
