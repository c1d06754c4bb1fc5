"""The multi-scale VQVAE of VAR: codes of every scale to images.

Written from the published facts about FoundationVision/VAR (Tian et al. 2024, "Visual Autoregressive
Modeling", section 3); the state dict has the public checkpoints' names. One class serves the public
`vae_ch160v4096z32` (stride 16) and the embedded `emoji` model (stride 4).

Shapes: B images, Z code channels, P latent side, p side of a scale, H and W pixels, V codes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F


def phi_index(scale: int, num_scales: int, num_phi: int) -> int:
    """Which of `num_phi` shared convolutions serves `scale` of `num_scales` (VAR, section 3.3): the nearest tick.

    Ticks tie exactly for some numbers of scales. The published weights were trained with the outcome that rounding in
    float64 has, so the expression must stay as it is.
    """
    edge = 1 / (3 * num_phi) if num_phi == 4 else 1 / (2 * num_phi)
    ticks = np.linspace(edge, 1 - edge, num_phi)
    return int(np.abs(ticks - scale / max(num_scales - 1, 1)).argmin())


class AutoencoderConfig:
    """What encoders and decoders are built from."""

    z_channels: int
    channels: int
    channel_multipliers: tuple[int, ...]

    @property
    def sizes(self) -> list[int]:
        """Channels of every resolution, the highest first."""
        return [self.channels * multiplier for multiplier in self.channel_multipliers]

    @property
    def stride(self) -> int:
        """Pixels per latent position and side."""
        return int(2 ** (len(self.channel_multipliers) - 1))

    def decoding_bytes(self, height: int, width: int) -> int:
        """About what decoding one latent of this size takes at most, in fp32: the map that enters the last level,
        normalised once, and one of its own."""
        entering = self.sizes[1] if len(self.sizes) > 1 else self.sizes[0]
        return 4 * (2 * entering + self.sizes[0]) * height * width * self.stride**2


@dataclass(frozen=True)
class VQVAEConfig(AutoencoderConfig):
    """Everything the shapes of a VQVAE depend on. `patch_sides` are the sides of the scales in tokens."""

    patch_sides: tuple[int, ...]
    vocab_size: int = 4096
    z_channels: int = 32
    channels: int = 160
    channel_multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    num_phi: int = 4
    residual_ratio: float = 0.5


def norm(channels: int) -> nn.GroupNorm:
    """Of 32 groups, or 24 where only those divide the channels."""
    groups = 24 if channels % 32 and channels % 24 == 0 else 32
    return nn.GroupNorm(groups, channels, eps=1e-6)


def conv3(in_channels: int, out_channels: int) -> nn.Conv2d:
    """A convolution of width 3 that keeps the size."""
    return nn.Conv2d(in_channels, out_channels, 3, padding=1)


_LARGE = 1 << 24
"""Numbers of a map from which on less memory is worth a few more calls."""


def normalised(norm: nn.GroupNorm, x_BCHW: Tensor) -> Tensor:
    """Of a map that nobody needs afterwards: in its place where it is large, a quarter of the groups at a time."""
    if torch.is_grad_enabled() or x_BCHW.numel() < _LARGE or norm.num_groups % 4:
        return norm(x_BCHW)  # type: ignore[no-any-return]
    quarters = zip(x_BCHW.chunk(4, dim=1), norm.weight.chunk(4), norm.bias.chunk(4), strict=True)
    for x, weight, bias in quarters:
        x.copy_(F.group_norm(x, norm.num_groups // 4, weight, bias, norm.eps))
    return x_BCHW


class ResidualBlock(nn.Module):
    """Two pre-activated convolutions beside a shortcut."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm1 = norm(in_channels)
        self.conv1 = conv3(in_channels, out_channels)
        self.norm2 = norm(out_channels)
        self.conv2 = conv3(out_channels, out_channels)
        same = in_channels == out_channels
        self.nin_shortcut = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        maps = [x_BCHW]
        del x_BCHW
        self.replace(maps)
        return maps[0]

    def replace(self, maps: list[Tensor]) -> None:
        """Put the output in the place of the one map given, which is let go of as soon as nothing needs it any more."""
        shortcut = self.nin_shortcut(maps[0])
        h = self.norm1(maps[0]) if shortcut is maps[0] else normalised(self.norm1, maps[0])
        maps.clear()
        # in place, as fresh memory for a large map costs more than the operation itself
        h = self.conv1(F.silu(h, inplace=True))
        h = self.norm2(h)
        h = self.conv2(F.silu(h, inplace=True))
        maps.append(h.add_(shortcut))


class SpatialAttention(nn.Module):
    """Single-head attention over all positions of a feature map."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        batch, channels, height, width = x_BCHW.shape
        qkv = self.qkv(self.norm(x_BCHW)).reshape(batch, 3, channels, height * width)
        q, k, v = qkv.transpose(2, 3).unbind(1)
        out = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
        projected: Tensor = self.proj_out(out.transpose(1, 2).reshape(batch, channels, height, width))
        return x_BCHW + projected


_FOLD_FROM = 32 * 32
"""Pixels of a map from which on folding the kernel costs less than it saves."""


class Upsample(nn.Module):
    """Each pixel four times, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = conv3(channels, channels)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        if x_BCHW.is_cpu and x_BCHW[0, 0].numel() >= _FOLD_FROM:
            # both steps as one transposed convolution, whose outputs take 4 products in place of 9
            flipped_IO33 = self.conv.weight.flip(2, 3).transpose(0, 1).contiguous(memory_format=torch.channels_last)
            kernel_IO44 = F.avg_pool2d(flipped_IO33, 2, stride=1, padding=1, divisor_override=1)
            return F.conv_transpose2d(x_BCHW, kernel_IO44, self.conv.bias, stride=2, padding=1)
        batch, channels, height, width = x_BCHW.shape
        strip = height if torch.is_grad_enabled() else max(1, _LARGE // (4 * batch * channels * width))
        out_BCHW = None if strip >= height else x_BCHW.new_empty((batch, channels, 2 * height, 2 * width))
        for top in range(0, height, strip):
            first = max(top - 1, 0)  # a row of neighbours on either side
            rows_BCHW = self.conv(F.interpolate(x_BCHW[:, :, first : top + strip + 1], scale_factor=2, mode="nearest"))
            if out_BCHW is None:
                return rows_BCHW  # type: ignore[no-any-return]
            kept_BCHW = rows_BCHW[:, :, 2 * (top - first) :][:, :, : 2 * strip]
            out_BCHW[:, :, 2 * top : 2 * (top + strip)] = kept_BCHW
        assert out_BCHW is not None
        return out_BCHW


class Mid(nn.Module):
    """What lies between encoder and decoder: two residual blocks around attention."""

    def __init__(self, channels: int, attention: bool) -> None:
        super().__init__()
        self.block_1 = ResidualBlock(channels, channels)
        self.attn_1 = SpatialAttention(channels) if attention else nn.Identity()
        self.block_2 = ResidualBlock(channels, channels)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        out: Tensor = self.block_2(self.attn_1(self.block_1(x_BCHW)))
        return out


class _Level(nn.Module):
    """Three blocks of one resolution, with attention at the lowest one, then the step up to the next resolution."""

    def __init__(self, in_channels: int, out_channels: int, attention: bool, up: bool) -> None:
        super().__init__()
        self.block = nn.ModuleList(
            ResidualBlock(in_channels if i == 0 else out_channels, out_channels) for i in range(3)
        )
        self.attn = nn.ModuleList(SpatialAttention(out_channels) for _ in range(3 if attention else 0))
        self.upsample = Upsample(out_channels) if up else nn.Identity()

    def replace(self, maps: list[Tensor]) -> None:
        """As of a block."""
        for i, block in enumerate(self.block):
            block.replace(maps)  # type: ignore[operator]
            if self.attn:
                maps.append(self.attn[i](maps.pop()))
        maps.append(self.upsample(maps.pop()))


class Decoder(nn.Module):
    """Latent of Z channels to an image, three residual blocks a level, lowest resolution first.

    `attention` is that of the lowest resolution.
    """

    def __init__(self, config: AutoencoderConfig, attention: bool = True) -> None:
        super().__init__()
        sizes = config.sizes
        self.conv_in = conv3(config.z_channels, sizes[-1])
        self.mid = Mid(sizes[-1], attention)
        stages = []
        for level, size in enumerate(sizes):
            lowest = level == len(sizes) - 1
            below = size if lowest else sizes[level + 1]
            stages.append(_Level(below, size, attention=attention and lowest, up=level > 0))
        self.up = nn.ModuleList(stages)
        self.norm_out = norm(sizes[0])
        self.conv_out = conv3(sizes[0], 3)

    def forward(self, latent_BZPP: Tensor) -> Tensor:
        maps = [self.mid(self.conv_in(latent_BZPP))]
        for level in reversed(range(len(self.up))):
            self.up[level].replace(maps)  # type: ignore[operator]
        out: Tensor = self.conv_out(F.silu(self.norm_out(maps.pop()), inplace=True))
        return out


class _SharedPhi(nn.Module):
    """Holder that gives the shared phi convolutions their public names."""

    def __init__(self, channels: int, count: int) -> None:
        super().__init__()
        if count == 1:
            self.qresi = conv3(channels, channels)
        else:
            self.qresi_ls = nn.ModuleList(conv3(channels, channels) for _ in range(count))
        self.count = count

    def conv(self, index: int) -> nn.Module:
        return self.qresi if self.count == 1 else self.qresi_ls[index]


class MultiScaleQuantizer(nn.Module):
    """Residual quantisation over scales (VAR, algorithms 1 and 2): every scale codes what the coarser ones left."""

    def __init__(self, config: VQVAEConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.z_channels)
        self.quant_resi = _SharedPhi(config.z_channels, config.num_phi)

    def code_features(self, tokens_BN: Tensor, scale: int) -> Tensor:
        """What the codes of one scale add to f_hat, (B, Z, P, P): enlarged, and refined by the scale's phi."""
        sides, ratio = self.config.patch_sides, self.config.residual_ratio
        h_BZPP = self.embedding(tokens_BN).transpose(1, 2).unflatten(2, (sides[scale], sides[scale]))
        if sides[scale] != sides[-1]:
            h_BZPP = F.interpolate(h_BZPP, size=(sides[-1], sides[-1]), mode="bicubic")
        phi = self.quant_resi.conv(phi_index(scale, len(sides), self.config.num_phi))
        refined: Tensor = h_BZPP * (1 - ratio) + phi(h_BZPP) * ratio
        return refined

    def next_map(self, f_hat_BZPP: Tensor, scale: int) -> Tensor:
        """The input map of `scale`, (B, Z, p, p): the sum so far, averaged over areas."""
        side = self.config.patch_sides[scale]
        return F.interpolate(f_hat_BZPP, size=(side, side), mode="area")


class VQVAE(nn.Module):
    """Multi-scale quantiser and decoder, the half of the VQVAE that generation needs."""

    def __init__(self, config: VQVAEConfig) -> None:
        super().__init__()
        self.config = config
        self.quantize = MultiScaleQuantizer(config)
        self.post_quant_conv = conv3(config.z_channels, config.z_channels)
        self.decoder = Decoder(config)

    def decode(self, f_hat_BZPP: Tensor) -> Tensor:
        """Sum of code features to an image in [-1, 1], clamped."""
        dtype = self.post_quant_conv.weight.dtype
        out: Tensor = self.decoder(self.post_quant_conv(f_hat_BZPP.to(dtype)))
        return out.float().clamp(-1, 1)
