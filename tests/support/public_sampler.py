"""The public models' own draw order, for parity with golden vectors and with stand-ins of public code."""

from __future__ import annotations

import torch
from torch import Tensor

from heatkv.models.sampling import Settings


class PublicSampler:
    """One generator, one multinomial call per scale over all choices. Shapes as in `heatkv.models.sampling`."""

    def __init__(self, generator: torch.Generator, settings: Settings) -> None:
        self._generator, self._settings = generator, settings

    def choose(self, scale: int, logits_BNV: Tensor) -> Tensor:
        batch, count, codes = logits_BNV.shape
        shares = self._settings.cut(logits_BNV).softmax(dim=-1).view(batch * count, codes)
        return torch.multinomial(shares, 1, replacement=True, generator=self._generator).view(batch, count)
