"""Models in their published shapes with random weights: what they compute means nothing, what it takes is the same."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from heatkv.models.bsq import BSQ_D32, BitwiseVAE
from heatkv.models.catalogue import VAR_SAMPLING, load_model, model_info
from heatkv.models.class_conditional import ClassConditionalModel
from heatkv.models.infinity import INFINITY_2B, Infinity
from heatkv.models.text_conditional import SAMPLING, Prompt, TextConditionalModel
from heatkv.models.var import VAR, VARConfig
from heatkv.models.vqvae import VQVAE, VQVAEConfig


def random_model(name: str, size: str | None, dtype: torch.dtype, layers: int | None = None) -> Any:
    """A named VAR or Infinity-2B, of so many layers when not all, ready to draw; the embedded model has weights."""
    torch.manual_seed(0)
    info = model_info(name)
    schedule = info.schedule(size)
    if info.bundled:
        return load_model(name, dtype="float32" if dtype is torch.float32 else "bfloat16")
    depth = info.layers if layers is None else layers
    if info.family == "infinity":
        transformer = Infinity(replace(INFINITY_2B, depth=depth)).set_compute_dtype(dtype).eval().requires_grad_(False)
        vae = BitwiseVAE(BSQ_D32).eval().requires_grad_(False)
        return TextConditionalModel(name, transformer, vae, schedule, SAMPLING)
    sides = tuple(height for _, height, _ in schedule.scales)
    var = VAR(VARConfig(sides, depth, info.heads * info.head_dim, info.heads)).set_compute_dtype(dtype)
    vqvae = VQVAE(VQVAEConfig(sides)).eval().requires_grad_(False)
    vqvae.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return ClassConditionalModel(name, var.eval().requires_grad_(False), vqvae, VAR_SAMPLING)


def labels_of(model: Any, images: int, positions: int) -> list[Any]:
    """What to draw: classes, or prompts of so many positions."""
    if isinstance(model, ClassConditionalModel):
        return list(range(images))
    return [Prompt(torch.zeros(positions, INFINITY_2B.text_channels)) for _ in range(images)]
