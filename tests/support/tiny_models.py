"""Models of a few thousand random weights, with attention and gates far from uniform."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from heatkv.core.schedule import ScaleSchedule
from heatkv.generation.loop import Generator
from heatkv.models.bsq import BitwiseVAE, BSQConfig
from heatkv.models.class_conditional import ClassConditionalModel
from heatkv.models.infinity import Infinity, InfinityConfig
from heatkv.models.sampling import BitSamplingSettings, SamplingSettings
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
    vqvae = VQVAE(VQVAEConfig(SIDES, 32, 8, 32, (1,))).eval()
    for module in (transformer, vqvae):
        module.requires_grad_(False)
    settings = SamplingSettings(cfg=2.0, ramp=True, top_k=10)
    return ClassConditionalModel("tiny", transformer, vqvae, settings)


def save_tiny_var(folder: Path) -> list[str]:
    """The options of the command line that open the tiny VAR, whose files are written here; its images are 16 x 16."""
    model = tiny_var()
    tokens = torch.tensor(model.geometry.schedule.tokens)
    levels = torch.repeat_interleave(torch.arange(len(tokens)), tokens)[None]
    torch.save(model.transformer.state_dict() | {"lvl_1L": levels}, folder / "tiny.pth")
    torch.save(VQVAE(VQVAEConfig(SIDES, 32, 8, 32, (1, 1, 1))).state_dict(), folder / "vae.pth")
    return ["--model", "var", "--weights", f"{folder / 'tiny.pth'}", "--weights", f"vae={folder / 'vae.pth'}"]


def tiny_infinity(schedule: ScaleSchedule = SCHEDULE) -> TextConditionalModel:
    """With prompts of different lengths, one of them with a negative one."""
    examples = (Prompt(features(7)), Prompt(features(4), features(9)), Prompt(features(5)))
    return dataclasses.replace(make_infinity(schedule=schedule), examples=examples)


TINY = InfinityConfig(
    depth=4, width=64, heads=2, bits=8, mlp_hidden=256, pool_heads=2, text_channels=24, text_positions=20
)
SHORT_SCHEDULE = ScaleSchedule.of([(1, 1), (2, 2), (3, 2), (6, 4)])


def features(length: int, seed: int = 0, channels: int = TINY.text_channels) -> Tensor:
    return torch.randn(length, channels, generator=torch.Generator().manual_seed(100 * length + seed))


def make_infinity(patch: int = 1, schedule: ScaleSchedule = SHORT_SCHEDULE, **sampling: Any) -> TextConditionalModel:
    torch.manual_seed(5)
    transformer = Infinity(TINY).eval().requires_grad_(False)
    with torch.no_grad():
        transformer.head.weight.mul_(4)  # logits that spread as a trained model's do
    vae = BitwiseVAE(BSQConfig(TINY.bits // patch**2, 32, (1, 1))).eval().requires_grad_(False)
    settings = BitSamplingSettings(**sampling)
    return TextConditionalModel("tiny", transformer, vae, schedule, settings)


def draw_logits(model: TextConditionalModel, prompts: list[Prompt], bits: tuple[Tensor, ...]) -> list[Tensor]:
    """Guided logits of all scales when the model is shown these bits."""
    logits: list[Tensor] = []

    class Playback:
        def choose(self, scale: int, logits_BNV: Tensor) -> Tensor:
            logits.append(logits_BNV)
            return bits[scale]

    Generator(model, model.plan(), len(prompts)).draw(prompts, sampler=Playback(), decode=False)
    return logits


def chunked(state: dict[str, Tensor], per_chunk: int) -> dict[str, Tensor]:
    """The tensors of an Infinity under the names of a model built in chunks, as published."""
    renamed = {}
    for name, tensor in state.items():
        first, _, rest = name.partition(".")
        if first == "blocks":
            block, _, rest = rest.partition(".")
            chunk, place = divmod(int(block), per_chunk)
            name = f"block_chunks.{chunk}.module.{place}.{rest}"
        renamed[name] = tensor
    return renamed


def small_classes() -> ClassConditionalModel:
    """Four scales whose steps take little memory, for graphs."""
    torch.manual_seed(0)
    sides = (1, 2, 3, 4)
    transformer = VAR(VARConfig(sides, 2, 32, 4, num_classes=60, vocab_size=40, z_channels=8))
    vqvae = VQVAE(VQVAEConfig(sides, 40, 8, 32, (1, 1)))
    for module in (transformer, vqvae):
        module.eval().requires_grad_(False)
    for x in (transformer.head.weight, *(block.ada_lin[1].weight for block in transformer.layers())):
        x.mul_(4)  # so that classes and what is kept make a difference
    settings = SamplingSettings(cfg=2.0, top_k=20)
    return ClassConditionalModel("tiny", transformer, vqvae, settings)


def small_prompts() -> TextConditionalModel:
    """Four scales whose steps take little memory, for graphs."""
    torch.manual_seed(5)
    transformer = Infinity(dataclasses.replace(TINY, depth=2)).eval().requires_grad_(False)
    transformer.head.weight.mul_(4)
    vae = BitwiseVAE(BSQConfig(TINY.bits, 32, (1, 1))).eval().requires_grad_(False)
    settings = BitSamplingSettings(cfg=3.0)
    return TextConditionalModel("tiny", transformer, vae, SHORT_SCHEDULE, settings)
