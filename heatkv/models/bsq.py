"""The bitwise VAE of Infinity: sums of the codes of bits to images.

Written from the published facts about FoundationVision/Infinity (Han et al. 2024; binary spherical quantisation after
Zhao et al. 2024). A code is a corner of the unit hypercube scaled to length one, so it needs no table. With spatial
patchify the transformer's token covers 2 x 2 latent positions, and all heights and widths here are twice its own.

Shapes: B images, Z bits per latent position, h and w a scale's height and width, H and W the image's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from heatkv.models.vqvae import AutoencoderConfig, Decoder


@dataclass(frozen=True)
class BSQConfig(AutoencoderConfig):
    """Everything the shapes of a bitwise VAE depend on; `z_channels` is the bits of a code."""

    z_channels: int
    channels: int = 128
    channel_multipliers: tuple[int, ...] = (1, 2, 4, 4, 4)


BSQ_D32 = BSQConfig(32)
BSQ_D56 = BSQConfig(14, channel_multipliers=(1, 2, 4, 4))
"""The VAE of the 8B models: 14 bits a position, 56 a token."""


def resize(map_BZhw: Tensor, size: tuple[int, int]) -> Tensor:
    """Linear between pixel centres, without antialiasing when shrinking, as the public transformers were trained."""
    if map_BZhw.shape[-2:] == size:
        return map_BZhw
    return F.interpolate(map_BZhw, size=size, mode="bilinear", align_corners=False)


def code_values(bits_BhwZ: Tensor) -> Tensor:
    """Bits (0 or 1) to unit vectors, (B, Z, h, w)."""
    return (2 * bits_BhwZ.float() - 1).permute(0, 3, 1, 2) / math.sqrt(bits_BhwZ.shape[-1])


class BitwiseVAE(nn.Module):
    """The decoder, without attention: the half of the bitwise VAE that generation needs."""

    def __init__(self, config: BSQConfig) -> None:
        super().__init__()
        self.config = config
        self.decoder = Decoder(config, attention=False)

    def decode(self, codes_BZhw: Tensor) -> Tensor:
        """Sum of codes to an RGB image in [-1, 1], clamped."""
        out: Tensor = self.decoder(codes_BZhw.to(self.decoder.conv_in.weight.dtype))
        return out.float().clamp(-1, 1)
