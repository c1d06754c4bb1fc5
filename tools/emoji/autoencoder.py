"""Encoders for the decoders of the package, which training needs and generation does not: images to codes."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from heatkv.models.bsq import BitwiseVAE, BSQConfig, code_values, resize
from heatkv.models.vqvae import VQVAE, AutoencoderConfig, Mid, ResidualBlock, SpatialAttention, VQVAEConfig, conv3, norm


class Downsample(nn.Module):
    """A strided convolution, padded at the right and the bottom only."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        out: Tensor = self.conv(F.pad(x_BCHW, (0, 1, 0, 1)))
        return out


class _Level(nn.Module):
    """Two blocks of one resolution, with attention at the lowest one, then the step down to the next resolution."""

    def __init__(self, in_channels: int, out_channels: int, attention: bool, down: bool) -> None:
        super().__init__()
        self.block = nn.ModuleList(
            ResidualBlock(in_channels if i == 0 else out_channels, out_channels) for i in range(2)
        )
        self.attn = nn.ModuleList(SpatialAttention(out_channels) for _ in range(2 if attention else 0))
        self.downsample = Downsample(out_channels) if down else nn.Identity()

    def forward(self, x_BCHW: Tensor) -> Tensor:
        for i, block in enumerate(self.block):
            x_BCHW = block(x_BCHW)
            if self.attn:
                x_BCHW = self.attn[i](x_BCHW)
        out: Tensor = self.downsample(x_BCHW)
        return out


class Encoder(nn.Module):
    """Image in [-1, 1] to a latent of Z channels, two residual blocks a level.

    `attention` is that of the lowest resolution.
    """

    def __init__(self, config: AutoencoderConfig, attention: bool = True) -> None:
        super().__init__()
        sizes = config.sizes
        self.conv_in = conv3(3, config.channels)
        self.down = nn.ModuleList()
        for level, size in enumerate(sizes):
            lowest = level == len(sizes) - 1
            below = config.channels if level == 0 else sizes[level - 1]
            self.down.append(_Level(below, size, attention=attention and lowest, down=not lowest))
        self.mid = Mid(sizes[-1], attention)
        self.norm_out = norm(sizes[-1])
        self.conv_out = conv3(sizes[-1], config.z_channels)

    def forward(self, image_B3HW: Tensor) -> Tensor:
        h = self.conv_in(image_B3HW)
        for stage in self.down:
            h = stage(h)
        out: Tensor = self.conv_out(F.silu(self.norm_out(self.mid(h)), inplace=True))
        return out


class VQAutoencoder(VQVAE):
    """A VQVAE with its encoder."""

    def __init__(self, config: VQVAEConfig) -> None:
        super().__init__(config)
        self.encoder = Encoder(config)
        self.quant_conv = conv3(config.z_channels, config.z_channels)

    def latent(self, image_B3HW: Tensor) -> Tensor:
        """Image in [-1, 1] to the latent before quantisation, (B, Z, P, P)."""
        out: Tensor = self.quant_conv(self.encoder(image_B3HW))
        return out

    def nearest(self, z_MZ: Tensor) -> Tensor:
        """Index of the nearest code (squared Euclidean, first minimum) for every row."""
        codes = self.quantize.embedding.weight
        distance = (z_MZ**2).sum(1, keepdim=True) + (codes**2).sum(1) - 2 * z_MZ @ codes.T
        return distance.argmin(1)

    def codes(self, f_BZPP: Tensor) -> list[Tensor]:
        """Codes of every scale, each (B, p*p), of a latent: every scale codes what the coarser ones left."""
        rest, tokens = f_BZPP, list[Tensor]()
        for scale in range(len(self.config.patch_sides)):
            z_BZpp = self.quantize.next_map(rest, scale)
            tokens.append(self.nearest(z_BZpp.flatten(2).transpose(1, 2).flatten(0, 1)).view(len(z_BZpp), -1))
            rest = rest - self.quantize.code_features(tokens[-1], scale)
        return tokens


class BitwiseAutoencoder(BitwiseVAE):
    """A bitwise VAE with its encoder."""

    def __init__(self, config: BSQConfig) -> None:
        super().__init__(config)
        self.encoder = Encoder(config, attention=False)

    def bits(self, latent_BZhw: Tensor, sizes: Sequence[tuple[int, int]]) -> list[Tensor]:
        """Bits of every scale, (B, h, w, Z) bool each: every scale codes what the coarser ones left. `sizes` are (h, w)
        on the latent's grid, the last all of it."""
        rest, full = latent_BZhw, sizes[-1]
        bits = list[Tensor]()
        for size in sizes:
            z = rest if size == full else F.interpolate(rest, size=size, mode="area")
            bits.append((z > 0).permute(0, 2, 3, 1))
            rest = rest - resize(code_values(bits[-1]), full)
        return bits
