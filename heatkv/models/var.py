"""VAR: the class-conditional next-scale transformer (Tian et al. 2024), from its published facts.

The state dict has the public checkpoints' names. A model never sees a cache's insides: every block hands its queries,
keys and values to one verb, `attend(layer, q, k, v)`, and adds what comes back. Parts that Infinity shares come first.

Shapes: R rows (images, doubled by guidance), N tokens of the running scale, C width, H heads, D head size,
L tokens of all scales, V codes, Z code channels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from heatkv.core.schedule import ScaleSchedule
from heatkv.engine.arena_cache import Attend
from heatkv.engine.spans import FEED_FORWARD, layer_name, span
from heatkv.engine.turns import Rows
from heatkv.models.adapter import BlockView, ModelAdapter

MAX_LOG_SCALE = math.log(100)
NORM_EPS = 1e-6


# ------------------------------------------------------------------------------------- what both families share


def layer_norm(x_RNC: Tensor) -> Tensor:
    """Over the width, without gain and bias."""
    return F.layer_norm(x_RNC, (x_RNC.shape[-1],), eps=NORM_EPS)


def modulated(x_RNC: Tensor, gain: Tensor, shift: Tensor) -> Tensor:
    """The normalised stream with the gain and the shift of AdaLN."""
    return torch.addcmul(shift, layer_norm(x_RNC), gain + 1)


class AttentionProjections(nn.Module):
    """The projections around self-attention. Keys have no bias; with `l2_norm` every head learns a temperature."""

    def __init__(self, width: int, heads: int, l2_norm: bool = True) -> None:
        super().__init__()
        self.heads, self.l2_norm = heads, l2_norm
        self.mat_qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        if l2_norm:
            self.scale_mul_1H11 = nn.Parameter(torch.full((1, heads, 1, 1), math.log(4.0)))
        self.proj = nn.Linear(width, width)

    def projected(self, u_RNC: Tensor) -> Tensor:
        """Queries, keys and values with their biases, (3, R, H, N, D)."""
        weight = self.mat_qkv.weight
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias]).to(weight.dtype)
        qkv: Tensor = F.linear(u_RNC.to(weight.dtype), weight, bias).unflatten(-1, (3, self.heads, -1))
        return qkv.permute(2, 0, 3, 1, 4)

    def temperature(self) -> Tensor:
        """What normalised queries are multiplied with, (1, H, 1, 1)."""
        return self.scale_mul_1H11.clamp(max=MAX_LOG_SCALE).exp()

    def project(self, out_RHND: Tensor) -> Tensor:
        out: Tensor = self.proj(merge_heads(out_RHND))
        return out


def merge_heads(x_RHND: Tensor) -> Tensor:
    """(R, N, H * D)."""
    return x_RHND.transpose(1, 2).flatten(2)


class FeedForward(nn.Module):
    """Two linear layers with a tanh GELU between them."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, u_RNC: Tensor) -> Tensor:
        h_RNX: Tensor = self.fc1(u_RNC.to(self.fc1.weight.dtype))
        if torch.is_grad_enabled():
            h_RNX = F.gelu(h_RNX, approximate="tanh")
        else:
            torch.ops.aten.gelu_(h_RNX, approximate="tanh")  # the widest tensor of a block, once and not twice
        out: Tensor = self.fc2(h_RNX)
        return out


class HeadNorm(nn.Module):
    """The AdaLN before the logits: gain and shift only."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x_RNC: Tensor, condition_RC: Tensor) -> Tensor:
        gain, shift = self.ada_lin(condition_RC).view(-1, 1, 2, condition_RC.shape[-1]).unbind(2)
        return modulated(x_RNC, gain, shift)


class Transformer(nn.Module):
    """Blocks in order. The residual stream and the head stay in fp32; the blocks' matrices may be bf16 or fp16.

    A block has its `attention`, AttentionProjections, and its `matrices`, the large linear layers. The second argument
    of its forward has the AdaLN vectors (R, 6, 1, C), of which the first is the gate of attention.
    """

    blocks: nn.ModuleList

    def layers(self) -> Iterator[Any]:
        """The blocks in order."""
        return iter(self.blocks)

    def set_compute_dtype(self, dtype: torch.dtype) -> Self:
        """Store the blocks' large matrices in `dtype`, everything else in fp32."""
        large = {id(x) for block in self.layers() for linear in block.matrices for x in linear.to(dtype).parameters()}
        for parameter in self.parameters():
            if id(parameter) not in large:
                parameter.data = parameter.data.float()
        return self

    @property
    def compute_dtype(self) -> torch.dtype:
        dtype: torch.dtype = next(self.layers()).attention.mat_qkv.weight.dtype
        return dtype

    def adapter(self) -> ModelAdapter:
        """The view of the blocks for calibration and policies."""
        attentions = [block.attention for block in self.layers()]
        views = (
            BlockView(block, attention, attention.proj, lambda arguments: arguments[1][:, 0])
            for block, attention in zip(self.blocks, attentions, strict=True)
        )
        return ModelAdapter(tuple(views), attentions[0].heads)


# ---------------------------------------------------------------------------------------------------- VAR itself


@dataclass(frozen=True)
class VARConfig:
    """Everything the shapes of a VAR transformer depend on."""

    patch_sides: tuple[int, ...]
    depth: int
    width: int
    heads: int
    num_classes: int = 1000
    vocab_size: int = 4096
    z_channels: int = 32
    mlp_ratio: float = 4.0
    shared_adaln: bool = False
    l2_norm: bool = True

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def schedule(self) -> ScaleSchedule:
        return ScaleSchedule.square(self.patch_sides)


class SelfAttention(AttentionProjections):
    """Self-attention of one block, over normalised queries and keys or plain ones."""

    def qkv(self, u_RNC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (scaled for a softmax of scale 1), keys as they are cached, and values."""
        q, k, v = self.projected(u_RNC).unbind(0)
        if self.l2_norm:
            q = (F.normalize(q.float(), dim=-1) * self.temperature()).to(v.dtype)
            k = F.normalize(k.float(), dim=-1).to(v.dtype)
        else:
            q = q * (0.25 / math.sqrt(q.shape[-1]))
        return q, k, v


class Block(nn.Module):
    """Attention and feed-forward, each modulated by AdaLN (gain, shift and gate from the class)."""

    def __init__(self, config: VARConfig) -> None:
        super().__init__()
        self.attn = SelfAttention(config.width, config.heads, config.l2_norm)
        self.ffn = FeedForward(config.width, round(config.width * config.mlp_ratio))
        if config.shared_adaln:
            self.ada_gss = nn.Parameter(torch.randn(1, 1, 6, config.width) / config.width**0.5)
        else:
            self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(config.width, 6 * config.width))

    @property
    def attention(self) -> SelfAttention:
        return self.attn

    @property
    def matrices(self) -> tuple[nn.Linear, ...]:
        return self.attn.mat_qkv, self.attn.proj, self.ffn.fc1, self.ffn.fc2

    def modulation(self, class_RC: Tensor, shared_R16C: Tensor | None) -> Tensor:
        """(R, 6, 1, C): gates, gains and shifts of attention and feed-forward."""
        if shared_R16C is not None:
            vectors = shared_R16C + self.ada_gss
        else:
            vectors = self.ada_lin(class_RC).view(-1, 1, 6, class_RC.shape[-1])
        return vectors.transpose(1, 2)

    def forward(self, x_RNC: Tensor, modulation_R61C: Tensor, layer: int, cache: Attend) -> Tensor:
        gate1, gate2, gain1, gain2, shift1, shift2 = modulation_R61C.unbind(1)
        u_RNC = modulated(x_RNC, gain1, shift1)
        cache.see_input(layer, u_RNC)
        q, k, v = self.attn.qkv(u_RNC)
        del u_RNC
        out_RHND = cache.attend(layer, q, k, v)
        del q, k, v
        x_RNC = torch.addcmul(x_RNC, self.attn.project(out_RHND), gate1)
        del out_RHND
        with span(FEED_FORWARD):
            return torch.addcmul(x_RNC, self.ffn(modulated(x_RNC, gain2, shift2)), gate2)


def own_rows(x_RX: Tensor, rows: Rows | None) -> Tensor:
    """These rows of a tensor of all, which is not copied where they are all."""
    return x_RX if rows is None or len(rows) == len(x_RX) else rows.of(x_RX, 0).flatten(0, 1)


@dataclass(frozen=True)
class Condition:
    """What the class decides once per image: its embedding (R, C) and every block's AdaLN vectors (R, 6, 1, C).

    `rows` are those that run now, all where there are none; `mine` takes them of a tensor when they are needed.
    """

    class_RC: Tensor
    modulations: tuple[Tensor, ...]
    rows: Rows | None = None

    def mine(self, x_RX: Tensor) -> Tensor:
        return own_rows(x_RX, self.rows)

    def copy_(self, other: Condition) -> None:
        """Take over the numbers of another condition."""
        for own, new in zip((self.class_RC, *self.modulations), (other.class_RC, *other.modulations), strict=True):
            own.copy_(new)


class VAR(Transformer):
    """The transformer of VAR, for the one schedule that its positions were trained for."""

    def __init__(self, config: VARConfig) -> None:
        super().__init__()
        self.config = config
        self.schedule = config.schedule
        width, total = config.width, self.schedule.total_tokens
        self.word_embed = nn.Linear(config.z_channels, width)
        self.class_emb = nn.Embedding(config.num_classes + 1, width)
        self.pos_start = nn.Parameter(torch.empty(1, self.schedule.tokens[0], width))
        self.pos_1LC = nn.Parameter(torch.empty(1, total, width))
        self.lvl_embed = nn.Embedding(len(self.schedule), width)
        if config.shared_adaln:
            self.shared_ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.head_nm = HeadNorm(width)
        self.head = nn.Linear(width, config.vocab_size)
        for parameter in (self.pos_start, self.pos_1LC):
            nn.init.trunc_normal_(parameter, std=math.sqrt(1 / width / 3))

    def condition(self, classes_R: Tensor) -> Condition:
        """Class indices (R,), `num_classes` for "no class", to what the blocks need of them."""
        class_RC = self.class_emb(classes_R)
        shared = None
        if self.config.shared_adaln:
            shared = self.shared_ada_lin(class_RC).view(-1, 1, 6, class_RC.shape[-1])
        return Condition(class_RC, tuple(block.modulation(class_RC, shared) for block in self.layers()))

    def positions(self, scale: int) -> Tensor:
        """Position plus scale embedding of the tokens of a scale, (1, N, C)."""
        return self.pos_1LC[:, self.schedule.slice(scale)] + self.lvl_embed.weight[scale]

    def first_input(self, condition: Condition) -> Tensor:
        """The start tokens of scale 0, (R, N, C)."""
        start = condition.mine(condition.class_RC)[:, None].expand(-1, self.schedule.tokens[0], -1) + self.pos_start
        return start + self.positions(0)

    def next_input(self, map_BZpp: Tensor, scale: int) -> Tensor:
        """The input tokens of `scale`, (B, N, C), from the area-resized sum of codes."""
        tokens: Tensor = self.word_embed(map_BZpp.flatten(2).transpose(1, 2).float())
        return tokens + self.positions(scale)

    def hidden(self, x_RNC: Tensor, condition: Condition, cache: Attend) -> Tensor:
        """The residual stream after the last block."""
        for layer, block in enumerate(self.blocks):
            with span(layer_name(layer)):
                x_RNC = block(x_RNC, condition.mine(condition.modulations[layer]), layer, cache)
        return x_RNC

    def logits(self, hidden_RNC: Tensor, condition: Condition) -> Tensor:
        """(R, N, V) in fp32."""
        out: Tensor = self.head(self.head_nm(hidden_RNC.float(), condition.mine(condition.class_RC)))
        return out

    def forward(self, x_RNC: Tensor, condition: Condition, cache: Attend) -> Tensor:
        return self.logits(self.hidden(x_RNC, condition, cache), condition)
