"""Models of a few thousand random weights, with attention and gates far from uniform."""

from __future__ import annotations

import dataclasses

import torch
from test_infinity import features
from test_infinity import make as make_infinity

from heatkv.core.schedule import ScaleSchedule
from heatkv.models.class_conditional import ClassConditionalModel, fingerprint
from heatkv.models.sampling import SamplingSettings
from heatkv.models.text_conditional import Prompt, TextConditionalModel
from heatkv.models.var import VAR, VARConfig
from heatkv.models.vqvae import VQVAE, VQVAEConfig

SIDES = (1, 1, 2, 2, 3, 4, 4, 5, 4)
"""At the last target source 2 is none of the five largest."""
SCHEDULE = ScaleSchedule.of([(1, 1), (2, 2), (3, 2), (4, 3), (6, 4), (8, 6)])


def tiny_var() -> ClassConditionalModel:
    torch.manual_seed(7)
    transformer = VAR(VARConfig(SIDES, 2, 32, 2, num_classes=5, vocab_size=32, z_channels=8)).eval()
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            if "scale_mul" in name:
                parameter.add_(torch.rand_like(parameter) * 2)
            elif parameter.ndim >= 2:
                parameter.normal_(std=1.5 / parameter.shape[-1] ** 0.5)
    vqvae = VQVAE(VQVAEConfig(SIDES, 32, 8, 32, (1,)), encoder=False).eval()
    for module in (transformer, vqvae):
        module.requires_grad_(False)
    settings = SamplingSettings(cfg=2.0, ramp=True, top_k=10)
    return ClassConditionalModel("tiny", transformer, vqvae, settings, fingerprint(transformer))


def tiny_infinity(schedule: ScaleSchedule = SCHEDULE) -> TextConditionalModel:
    """With prompts of different lengths, one of them with a negative one."""
    examples = (Prompt(features(7)), Prompt(features(4), features(9)), Prompt(features(5)))
    return dataclasses.replace(make_infinity(schedule=schedule), examples=examples)
