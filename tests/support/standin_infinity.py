"""An Infinity as somebody else's repository has it, for `heatkv.attach`: blocks in chunks, self-attention named `sa`, a
rotary table for every schedule. Written from the published facts; the parameters have the public names."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from support.standin_var import FeedForward, HeadNorm, modulated

Scales = Sequence[tuple[int, int, int]]


def rotary_table(scales: Scales, full: tuple[int, int], head_dim: int) -> Tensor:
    """(2, 1, 1, 1, tokens, head_dim / 2): cos and sin; positions are stretched to the `full` grid and rounded."""
    theta = 10000 ** (-2 * torch.arange(head_dim // 4, dtype=torch.float64) / (head_dim // 2))
    angles = []
    for _, height, width in scales:
        rows, columns = ((torch.arange(n).double() * f / n).round() for n, f in zip((height, width), full, strict=True))
        grid = torch.cartesian_prod(rows, columns)
        angles.append((grid[:, :, None] * theta).flatten(1))
    angle = torch.cat(angles)
    return torch.stack([angle.cos(), angle.sin()]).float()[:, None, None, None]


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    as_complex = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(as_complex * torch.complex(cos, sin)).flatten(-2)


class SelfAttention(nn.Module):
    def __init__(self, width: int, num_heads: int, using_flash: bool, cos_attn: bool) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, width // num_heads
        self.cos_attn, self.using_flash = cos_attn, using_flash
        if cos_attn:
            shape = (1, 1, num_heads, 1) if using_flash else (1, num_heads, 1, 1)
            self.scale: float = 1
            self.scale_mul_1H11 = nn.Parameter(torch.full(shape, math.log(4.0)))
            self.max_scale_mul = math.log(100)
        else:
            self.scale = 1 / math.sqrt(self.head_dim)
        self.mat_qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.zeros(width))
        self.register_buffer("zero_k_bias", torch.zeros(width))
        self.proj, self.proj_drop = nn.Linear(width, width), nn.Identity()
        self.caching = False
        self.cached_k: Tensor | None = None
        self.cached_v: Tensor | None = None

    def kv_caching(self, enable: bool) -> None:
        self.caching, self.cached_k, self.cached_v = enable, None, None

    def forward(
        self,
        x: Tensor,
        attn_bias_or_two_vector: Any,
        attn_fn: Any = None,
        scale_schedule: Any = None,
        rope2d_freqs_grid: Any = None,
        scale_ind: int = 0,
    ) -> Tensor:
        rows, tokens, width = x.shape
        joined = self.mat_qkv(x) + torch.cat([self.q_bias, self.zero_k_bias, self.v_bias])
        along = 1 if self.using_flash else 2  # the dimension of the tokens
        q, k, v = (part.unflatten(-1, (self.num_heads, -1)) for part in joined.chunk(3, dim=-1))
        if not self.using_flash:
            q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        if self.cos_attn:
            q = F.normalize(q, dim=-1) * self.scale_mul_1H11.clamp(max=self.max_scale_mul).exp()
            k = F.normalize(k, dim=-1)
        if rope2d_freqs_grid is not None:
            first = sum(t * h * w for t, h, w in scale_schedule[:scale_ind])
            cos, sin = rope2d_freqs_grid[str(tuple(scale_schedule))][:, 0, 0, 0, first : first + tokens]
            if self.using_flash:
                cos, sin = cos[:, None], sin[:, None]
            q, k = turned(q, cos, sin), turned(k, cos, sin)
        if self.caching:
            if self.cached_k is not None and self.cached_v is not None:
                k, v = torch.cat([self.cached_k, k], along), torch.cat([self.cached_v, v], along)
            self.cached_k, self.cached_v = k, v
        if self.using_flash:
            q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        out = (q.mul(self.scale) @ k.transpose(2, 3)).softmax(-1) @ v.to(q.dtype)
        return self.proj_drop(self.proj(out.transpose(1, 2).reshape(rows, tokens, width)))


def attend_text(q: Tensor, kv: Tensor, v_bias: Tensor) -> Tensor:
    """q (heads, queries, head size) over the keys and values (text, 2 width) of one prompt; (queries, width)."""
    heads, _, dim = q.shape
    k, v = (part.unflatten(-1, (heads, dim)).transpose(0, 1) for part in kv.chunk(2, dim=-1))
    v = v + v_bias.view(heads, 1, dim)
    out = (q / math.sqrt(dim) @ k.transpose(1, 2)).softmax(-1) @ v
    return out.transpose(0, 1).flatten(1)


class CrossAttention(nn.Module):
    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.mat_q, self.mat_kv = nn.Linear(width, width), nn.Linear(width, 2 * width, bias=False)
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.register_buffer("zero_k_bias", torch.zeros(width))
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, prompts: Sequence[Tensor]) -> Tensor:
        q = self.mat_q(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        rows = [attend_text(row, self.mat_kv(text), self.v_bias) for row, text in zip(q, prompts, strict=True)]
        return self.proj(torch.stack(rows))


class TextPool(nn.Module):
    def __init__(self, channels: int, width: int, num_heads: int) -> None:
        super().__init__()
        self.mat_q = nn.Parameter(torch.randn(1, num_heads, width // num_heads))
        self.mat_kv = nn.Linear(channels, 2 * width, bias=False)
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.register_buffer("zero_k_bias", torch.zeros(width))
        self.proj = nn.Linear(width, width)

    def forward(self, prompts: Sequence[Tensor]) -> Tensor:
        query = self.mat_q.transpose(0, 1)
        return self.proj(torch.cat([attend_text(query, self.mat_kv(text), self.v_bias) for text in prompts]))


class CrossAttnBlock(nn.Module):
    def __init__(self, width: int, num_heads: int, using_flash: bool, cos_attn: bool, fused_norm: bool) -> None:
        super().__init__()
        self.fused_norm = fused_norm
        self.sa = SelfAttention(width, num_heads, using_flash, cos_attn)
        self.ca, self.ca_norm = CrossAttention(width, num_heads), nn.LayerNorm(width, eps=1e-6)
        self.ffn = FeedForward(width, 4 * width)
        self.ada_gss = nn.Parameter(torch.randn(1, 1, 6, width) * 0.1)

    def forward(self, x: Tensor, six: Tensor, prompts: Sequence[Tensor], rotary: dict[str, Any]) -> Tensor:
        gate_a, gate_f, gain_a, gain_f, shift_a, shift_f = (six + self.ada_gss).unbind(2)
        told = rotary if self.fused_norm else {}
        x = x + gate_a * self.sa(modulated(x, gain_a, shift_a), None, None, **told)
        x = x + self.ca(self.ca_norm(x), prompts)
        return x + gate_f * self.ffn(modulated(x, gain_f, shift_f))


class Chunk(nn.Module):
    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.module = nn.ModuleList(blocks)


class Infinity(nn.Module):
    """`record` gets logits and bits of every scale. There is no VAE: what is drawn are the summed codes."""

    def __init__(
        self,
        depth: int,
        width: int,
        num_heads: int,
        chunks: int = 2,
        *,
        text_channels: int = 256,
        bits: int = 32,
        using_flash: bool = False,
        cos_attn: bool = True,
        fused_norm: bool = True,
    ) -> None:
        super().__init__()
        self.bits = bits
        self.cfg_uncond = nn.Parameter(torch.randn(512, text_channels))
        self.pos_start = nn.Parameter(torch.randn(1, 1, width))
        self.lvl_embed = nn.Embedding(15, width)
        self.word_embed = nn.Linear(bits, width)
        self.text_norm = nn.RMSNorm(text_channels, eps=1e-6)
        self.text_proj_for_sos = nn.ModuleDict({"ca": TextPool(text_channels, width, text_channels // 128)})
        self.text_proj_for_ca = nn.Sequential(
            nn.Linear(text_channels, width), nn.GELU(approximate="tanh"), nn.Linear(width, width)
        )
        self.shared_ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        blocks = [CrossAttnBlock(width, num_heads, using_flash, cos_attn, fused_norm) for _ in range(depth)]
        size = depth // chunks
        self.block_chunks = nn.ModuleList(Chunk(blocks[first : first + size]) for first in range(0, depth, size))
        self.unregistered_blocks = blocks
        self.head_nm, self.head = HeadNorm(width), nn.Linear(width, 2 * bits)
        self.rope2d_freqs_grid: dict[str, Tensor] = {}
        self.record: list[dict[str, Tensor]] = []

    def add_schedule(self, scales: Scales, full: tuple[int, int]) -> None:
        head_dim = self.unregistered_blocks[0].sa.head_dim
        self.rope2d_freqs_grid[str(tuple(scales))] = rotary_table(scales, full, head_dim)

    @torch.no_grad()
    def autoregressive_infer_cfg(
        self, scale_schedule: Scales, text: Sequence[Tensor], cfg: float = 3.0, tau: float = 1.0
    ) -> Tensor:
        """Summed codes (B, bits, H, W), every bit the likelier one."""
        guided, batch = cfg != 1, len(text)
        prompts = [*text, *(self.cfg_uncond[: len(t)] for t in text)] if guided else list(text)
        prompts = [self.text_norm(t) for t in prompts]
        pooled = self.text_proj_for_sos["ca"](prompts)
        prompts = [self.text_proj_for_ca(t) for t in prompts]
        six = self.shared_ada_lin(pooled).unflatten(-1, (1, 6, -1))
        full = scale_schedule[-1][1:]
        total, x = torch.zeros(batch, self.bits, *full), pooled[:, None] + self.pos_start
        self.record.clear()
        for block in self.unregistered_blocks:
            block.sa.kv_caching(True)
        for scale, (_, height, width) in enumerate(scale_schedule):
            rotary = {
                "scale_schedule": scale_schedule, "rope2d_freqs_grid": self.rope2d_freqs_grid, "scale_ind": scale,
            }  # fmt: skip
            x = x + self.lvl_embed.weight[scale]
            for chunk in self.block_chunks:
                for block in chunk.module:
                    x = block(x, six, prompts, rotary)
            told = self.head(self.head_nm(x, pooled))
            logits = told / tau
            if guided:
                logits = cfg * logits[:batch] + (1 - cfg) * logits[batch:]
            chosen = logits.unflatten(-1, (-1, 2)).argmax(-1)
            bits = chosen.view(batch, height, width, self.bits)
            codes = (2 * bits - 1).permute(0, 3, 1, 2).float() / math.sqrt(self.bits)
            self.record.append(
                {"logits_cond": told[:batch], "logits_uncond": told[batch:], "logits_cfg": logits,
                 "bits": bits[:, None].byte()}
            )  # fmt: skip
            if scale + 1 == len(scale_schedule):
                total = total + codes
            else:
                total = total + F.interpolate(codes, size=full, mode="bilinear")
                following = F.interpolate(total, size=scale_schedule[scale + 1][1:], mode="bilinear")
                x = self.word_embed(following.flatten(2).transpose(1, 2)).repeat(2 if guided else 1, 1, 1)
            self.record[-1]["summed_codes"] = total
        for block in self.unregistered_blocks:
            block.sa.kv_caching(False)
        return total
