"""A VAR as somebody else's repository has it, for `heatkv.attach`: every self-attention keeps `cached_k` and `cached_v`
of its own and grows them by concatenation. Written from the published facts; the parameters have the public names."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from heatkv.models.sampling import SamplingSettings
from heatkv.models.vqvae import VQVAE
from support.public_sampler import PublicSampler


class SelfAttention(nn.Module):
    def __init__(self, width: int, num_heads: int, attn_l2_norm: bool, using_flash: bool = False) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, width // num_heads
        self.attn_l2_norm, self.using_flash = attn_l2_norm, using_flash
        if attn_l2_norm:
            self.scale: float = 1
            self.scale_mul_1H11 = nn.Parameter(torch.full((1, num_heads, 1, 1), math.log(4.0)))
            self.max_scale_mul = math.log(100)
        else:
            self.scale = 0.25 / math.sqrt(self.head_dim)
        self.mat_qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.zeros(width))
        self.register_buffer("zero_k_bias", torch.zeros(width))
        self.proj, self.proj_drop = nn.Linear(width, width), nn.Dropout(0.1)
        self.caching = False
        self.cached_k: Tensor | None = None
        self.cached_v: Tensor | None = None

    def kv_caching(self, enable: bool) -> None:
        self.caching, self.cached_k, self.cached_v = enable, None, None

    def forward(self, x: Tensor, attn_bias: Tensor | None) -> Tensor:
        rows, tokens, width = x.shape
        joined = self.mat_qkv(x) + torch.cat([self.q_bias, self.zero_k_bias, self.v_bias])
        q, k, v = (part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in joined.chunk(3, dim=-1))
        if self.attn_l2_norm:
            q = F.normalize(q, dim=-1) * self.scale_mul_1H11.clamp(max=self.max_scale_mul).exp()
            k = F.normalize(k, dim=-1)
        if self.caching:
            along = 1 if self.using_flash else 2
            if self.using_flash:
                k, v = k.transpose(1, 2), v.transpose(1, 2)
            if self.cached_k is not None and self.cached_v is not None:
                k, v = torch.cat([self.cached_k, k], along), torch.cat([self.cached_v, v], along)
            self.cached_k, self.cached_v = k, v
            if self.using_flash:
                k, v = k.transpose(1, 2), v.transpose(1, 2)
        weights = q.mul(self.scale) @ k.transpose(2, 3)
        if attn_bias is not None:
            weights = weights + attn_bias
        out = weights.softmax(-1) @ v.to(weights.dtype)
        return self.proj_drop(self.proj(out.transpose(1, 2).reshape(rows, tokens, width)))


class FeedForward(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


def modulated(x: Tensor, gain: Tensor, shift: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + gain) + shift


class Block(nn.Module):
    def __init__(self, width: int, num_heads: int, hidden: int, shared_aln: bool, attn_l2_norm: bool) -> None:
        super().__init__()
        self.attn = SelfAttention(width, num_heads, attn_l2_norm)
        self.ffn = FeedForward(width, hidden)
        if shared_aln:
            self.ada_gss = nn.Parameter(torch.zeros(1, 1, 6, width))
        else:
            self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, condition: Tensor, attn_bias: Tensor | None) -> Tensor:
        six = (
            condition + self.ada_gss if hasattr(self, "ada_gss") else self.ada_lin(condition).unflatten(-1, (1, 6, -1))
        )
        gate_a, gate_f, gain_a, gain_f, shift_a, shift_f = six.unbind(2)
        x = x + gate_a * self.attn(modulated(x, gain_a, shift_a), attn_bias=attn_bias)
        return x + gate_f * self.ffn(modulated(x, gain_f, shift_f))


class HeadNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        return modulated(x, *self.ada_lin(condition)[:, None].chunk(2, dim=-1))


class VAR(nn.Module):
    """`record` gets the guided logits and the halves of every scale; `vae` is set from outside."""

    def __init__(
        self,
        patch_nums: Sequence[int],
        depth: int,
        width: int,
        num_heads: int,
        *,
        num_classes: int = 10,
        vocab_size: int = 64,
        z_channels: int = 8,
        mlp_ratio: float = 4,
        shared_aln: bool = False,
        attn_l2_norm: bool = True,
    ) -> None:
        super().__init__()
        self.patch_nums, self.num_classes = tuple(patch_nums), num_classes
        sizes = [side * side for side in patch_nums]
        self.word_embed = nn.Linear(z_channels, width)
        self.class_emb = nn.Embedding(num_classes + 1, width)
        self.pos_start = nn.Parameter(torch.randn(1, sizes[0], width) * 0.1)
        self.pos_1LC = nn.Parameter(torch.randn(1, sum(sizes), width) * 0.1)
        self.lvl_embed = nn.Embedding(len(sizes), width)
        self.register_buffer("lvl_1L", torch.tensor([[i for i, size in enumerate(sizes) for _ in range(size)]]))
        if shared_aln:
            self.shared_ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        hidden = round(width * mlp_ratio)
        self.blocks = nn.ModuleList(Block(width, num_heads, hidden, shared_aln, attn_l2_norm) for _ in range(depth))
        self.head_nm, self.head = HeadNorm(width), nn.Linear(width, vocab_size)
        self.record: list[dict[str, Tensor]] = []
        self.vae: list[VQVAE] = []  # a list, so that its weights are no part of this module

    def run(self, x: Tensor, classes: Tensor, attn_bias: Tensor | None = None) -> Tensor:
        condition = (
            self.shared_ada_lin(classes).unflatten(-1, (1, 6, -1)) if hasattr(self, "shared_ada_lin") else classes
        )
        for block in self.blocks:
            x = block(x, condition, attn_bias)
        return self.head(self.head_nm(x, classes))

    @torch.no_grad()
    def autoregressive_infer_cfg(
        self, B: int, label_B: Sequence[int], g_seed: int = 0, cfg: float = 1.5, top_k: int = 0, top_p: float = 0.0
    ) -> Tensor:
        settings = SamplingSettings(cfg=cfg, top_k=top_k, top_p=top_p)
        sampler = PublicSampler(torch.Generator().manual_seed(g_seed), settings)
        labels = torch.tensor(list(label_B))
        halves = [labels, torch.full_like(labels, self.num_classes)] if settings.guided else [labels]
        classes = self.class_emb(torch.cat(halves))
        positions = self.lvl_embed(self.lvl_1L) + self.pos_1LC
        quantize, f_hat, first = self.vae[0].quantize, torch.zeros(()), 0
        self.record.clear()
        for block in self.blocks:
            block.attn.kv_caching(True)
        x = classes[:, None] + self.pos_start
        for scale, side in enumerate(self.patch_nums):
            logits = self.run(x + positions[:, first : first + side * side], classes)
            guided = settings.guide(logits, scale, len(self.patch_nums))
            tokens = sampler.choose(scale, guided)
            told = {"logits_cfg": guided, "tokens": tokens, "logits_cond": logits[:B]}
            self.record.append(told | ({"logits_uncond": logits[B:]} if settings.guided else {}))
            last = scale + 1 == len(self.patch_nums)
            f_hat = f_hat + quantize.code_features(tokens, scale)
            first += side * side
            if not last:
                maps = quantize.next_map(f_hat, scale + 1).flatten(2).transpose(1, 2)
                x = self.word_embed(maps).repeat(len(halves), 1, 1)
        for block in self.blocks:
            block.attn.kv_caching(False)
        return (self.vae[0].decode(f_hat) + 1) / 2
