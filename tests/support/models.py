"""A small Infinity with random weights, and prompts for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from heatkv.core.schedule import ScaleSchedule
from heatkv.generation.loop import Generator
from heatkv.models.base import fingerprint
from heatkv.models.bsq import BitwiseVAE, BSQConfig
from heatkv.models.infinity import Infinity, InfinityConfig
from heatkv.models.sampling import BitSamplingSettings
from heatkv.models.text_conditional import Prompt, TextConditionalModel

TINY = InfinityConfig(
    depth=4, width=64, heads=2, bits=8, mlp_hidden=256, pool_heads=2, text_channels=24, text_positions=20
)
SCHEDULE = ScaleSchedule.of([(1, 1), (2, 2), (3, 2), (6, 4)])


def features(length: int, seed: int = 0, channels: int = TINY.text_channels) -> Tensor:
    return torch.randn(length, channels, generator=torch.Generator().manual_seed(100 * length + seed))


def make_infinity(patch: int = 1, schedule: ScaleSchedule = SCHEDULE, **sampling: Any) -> TextConditionalModel:
    torch.manual_seed(5)
    transformer = Infinity(TINY).eval().requires_grad_(False)
    with torch.no_grad():
        transformer.head.weight.mul_(4)  # logits that spread as a trained model's do
    vae = BitwiseVAE(BSQConfig(TINY.bits // patch**2, 32, (1, 1)), encoder=False).eval().requires_grad_(False)
    settings = BitSamplingSettings(**sampling)
    return TextConditionalModel("tiny", transformer, vae, schedule, settings, fingerprint(transformer))


def draw_logits(model: TextConditionalModel, prompts: list[Prompt], bits: tuple[Tensor, ...]) -> list[Tensor]:
    """Guided logits of all scales when the model is shown these bits."""
    logits: list[Tensor] = []

    class Playback:
        def choose(self, scale: int, logits_BNV: Tensor) -> Tensor:
            logits.append(logits_BNV)
            return bits[scale]

    Generator(model, model.plan(), len(prompts)).draw(prompts, sampler=Playback(), decode=False)
    return logits
