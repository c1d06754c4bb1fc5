"""Stand-ins for models of other repositories with random weights, drawing with them, and plans for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from heatkv.core.geometry import CacheGeometry
from heatkv.core.plan import Plan
from heatkv.core.schedule import ScaleSchedule
from heatkv.models.vqvae import VQVAE, VQVAEConfig
from support.golden import close
from support.standin_infinity import Infinity
from support.standin_var import VAR

SIDES = (1, 2, 3, 4)
SCALES = [(1, 1, 1), (1, 2, 2), (1, 3, 2), (1, 4, 3)]


def with_random_weights(model: Any, seed: int) -> Any:
    """Weights large enough that attention is far from uniform."""
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "scale_mul" in name:
            parameter.data += torch.rand_like(parameter) * 2
        elif parameter.ndim >= 2:
            nn.init.normal_(parameter, std=1.5 / parameter.shape[-1] ** 0.5)
    return model.eval()


def make_var(seed: int = 0, sides: Sequence[int] = SIDES, **options: Any) -> VAR:
    torch.manual_seed(seed)  # biases keep the values they are made with
    model = with_random_weights(VAR(sides, 3, 32, 2, **options), seed)
    config = VQVAEConfig(tuple(sides), vocab_size=64, z_channels=8, channels=32, channel_multipliers=(1,))
    model.vae = [with_random_weights(VQVAE(config), seed)]
    return model


def make_infinity(seed: int = 0, **options: Any) -> Infinity:
    torch.manual_seed(seed)
    model = with_random_weights(Infinity(4, 32, 2, **options), seed)
    model.add_schedule(SCALES, (8, 6))
    return model


def draw_var(model: VAR, labels: Sequence[int] = (3, 7), cfg: float = 1.5, seed: int = 5) -> list[Tensor]:
    image = model.autoregressive_infer_cfg(len(labels), labels, g_seed=seed, cfg=cfg)
    return [*(told["logits_cfg"] for told in model.record), image]


def draw_infinity(model: Infinity, lengths: Sequence[int] = (4, 6), cfg: float = 3.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    text = [torch.randn(length, 256, generator=generator) for length in lengths]
    total = model.autoregressive_infer_cfg(SCALES, text, cfg=cfg)
    return [*(told["logits_cfg"] for told in model.record), total]


def same(one: Sequence[Tensor], other: Sequence[Tensor], limit: float) -> None:
    for a, b in zip(one, other, strict=True):
        close(a, b, limit)


def attention_of(model: Any) -> list[Any]:
    return [block.sa for block in model.unregistered_blocks] if isinstance(model, Infinity) else [
        block.attn for block in model.blocks
    ]  # fmt: skip


KINDS: dict[str, tuple[Callable[..., Any], Callable[..., list[Tensor]], ScaleSchedule]] = {
    "var": (make_var, draw_var, ScaleSchedule.square(SIDES)),
    "infinity": (make_infinity, draw_infinity, ScaleSchedule.of(SCALES)),
}


def dropping_plan(model: Any, schedule: ScaleSchedule, seed: int = 0) -> Plan:
    """A random plan that drops about half of the cells."""
    modules = attention_of(model)
    geometry = CacheGeometry(len(modules), modules[0].num_heads, modules[0].head_dim, schedule)
    scales = len(schedule)
    low = np.broadcast_to(np.arange(scales), (geometry.layers, geometry.heads, scales))
    last_read = np.random.default_rng(seed).integers(low, scales)
    return Plan("drawn", geometry, last_read, 1.0, geometry.full_token_heads, 0)
