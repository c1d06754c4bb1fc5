"""Infinity: the text-to-image next-scale transformer over bits (Han et al. 2024), from its published facts.

The state dict has the names of the public checkpoints, with blocks counted through (`blocks.i`); `checkpoint` maps the
chunked names to these. As in VAR, every block hands its queries, keys and values to one verb, `attend`. Cross
attention reads nothing but the prompt, so its keys and values are made once per text and layer, for the text's own
positions.

Shapes: R rows (prompts, then their unconditional halves), N tokens of the running scale, C width, H heads, D head
size, P = D/2 rotated pairs, M text positions of a row (padded), S positions of all texts, E text channels, K bits per
token.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cache
from itertools import accumulate

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from heatkv.core.schedule import ScaleSchedule
from heatkv.engine.arena_cache import Attend
from heatkv.engine.attention.rotary import rotate, rotation_of
from heatkv.engine.spans import FEED_FORWARD, layer_name, span
from heatkv.engine.turns import Rows
from heatkv.errors import ModelError
from heatkv.models.var import (
    NORM_EPS,
    AttentionProjections,
    FeedForward,
    HeadNorm,
    Transformer,
    merge_heads,
    modulated,
    own_rows,
)


@dataclass(frozen=True)
class InfinityConfig:
    """Everything the shapes of an Infinity transformer depend on.

    `text_positions` is the longest prompt with a learnt unconditional half, `max_scales` the longest schedule.
    """

    depth: int
    width: int
    heads: int
    bits: int
    mlp_hidden: int
    pool_heads: int
    text_channels: int = 2048
    text_positions: int = 512
    max_scales: int = 15

    @property
    def head_dim(self) -> int:
        return self.width // self.heads


INFINITY_2B = InfinityConfig(depth=32, width=2048, heads=16, bits=32, mlp_hidden=8192, pool_heads=16)
INFINITY_8B = InfinityConfig(depth=40, width=3584, heads=28, bits=56, mlp_hidden=14336, pool_heads=16)


# ------------------------------------------------------------------------------------------ rotary positions


@cache
def rope_positions(schedule: ScaleSchedule) -> tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]:
    """Position of every row and of every column, per scale: its place on the last 1M scale, halves to even.

    That of the template nearest in height/width, which is its own for every published schedule of any size.
    """
    _, own_height, own_width = schedule.scales[-1]
    _, last_height, last_width = ScaleSchedule.infinity("1M", own_height / own_width).scales[-1]

    def places(count: int, last: int) -> tuple[int, ...]:
        return tuple(round(Fraction(i * last, count)) for i in range(count))

    return tuple((places(height, last_height), places(width, last_width)) for _, height, width in schedule.scales)


def rotation_angles(schedule: ScaleSchedule, scale: int, head_dim: int) -> Tensor:
    """The angles of every token of `scale`, (N, P) float64: rows turn the first half of the pairs, columns the
    second."""
    rows, columns = (torch.tensor(places, dtype=torch.float64) for places in rope_positions(schedule)[scale])
    frequencies = 10000.0 ** (torch.arange(head_dim // 4, dtype=torch.float64) / (head_dim // 4)).neg()
    down = (rows[:, None, None] * frequencies).expand(-1, len(columns), -1)
    right = (columns[None, :, None] * frequencies).expand(len(rows), -1, -1)
    return torch.cat([down, right], dim=-1).flatten(0, 1)


def rotation_table(schedule: ScaleSchedule, scale: int, head_dim: int, device: torch.device | str = "cpu") -> Tensor:
    """Cosines and sines of `rotation_angles`, (2, N, P) fp32."""
    return rotation_of(rotation_angles(schedule, scale, head_dim)).to(device)


# ------------------------------------------------------------------------------------------------- attention


def prompt_attention(q_RHND: Tensor, k_RHMD: Tensor, v_RHMD: Tensor, mask_R11M: Tensor | None) -> Tensor:
    """Attention over the row's own prompt only; no mask means that all prompts are equally long."""
    return F.scaled_dot_product_attention(q_RHND, k_RHMD, v_RHMD, attn_mask=mask_R11M)


def _keys_and_values(text_SX: Tensor, weight: Tensor, v_bias: Tensor, heads: int) -> Tensor:
    """Keys, which have no bias, and values of text, (S, 2, heads, size)."""
    bias = torch.cat([torch.zeros_like(v_bias), v_bias]).to(weight.dtype)
    kv_S2HD: Tensor = F.linear(text_SX.to(weight.dtype), weight, bias).unflatten(-1, (2, heads, -1))
    return kv_S2HD


class SelfAttention(AttentionProjections):
    """Cosine attention with a learnt temperature per head, and rotated queries and keys."""

    def qkv(self, u_RNC: Tensor, rotation_2NP: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (scaled for a softmax of scale 1), keys as they are cached, and values."""
        qk_2RHND, v = self.projected(u_RNC).split([2, 1])
        q, k = rotate(F.normalize(qk_2RHND.float(), dim=-1), rotation_2NP)
        return (q * self.temperature()).to(v.dtype), k.to(v.dtype), v[0]


class CrossAttention(nn.Module):
    """Attention of image tokens over the projected prompt."""

    def __init__(self, config: InfinityConfig) -> None:
        super().__init__()
        width, self.heads = config.width, config.heads
        self.mat_q = nn.Linear(width, width)
        self.mat_kv = nn.Linear(width, 2 * width, bias=False)
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.proj = nn.Linear(width, width)

    def keys_and_values(self, text_SC: Tensor) -> Tensor:
        return _keys_and_values(text_SC, self.mat_kv.weight, self.v_bias, self.heads)

    def forward(self, u_RNC: Tensor, kv_S2HD: Tensor, at_RM: Tensor, mask_R11M: Tensor | None) -> Tensor:
        q = self.mat_q(u_RNC.to(self.mat_q.weight.dtype)).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = kv_S2HD.index_select(0, at_RM.flatten()).unflatten(0, at_RM.shape).permute(2, 0, 3, 1, 4).unbind(0)
        out: Tensor = self.proj(merge_heads(prompt_attention(q, k, v, mask_R11M)))
        return out


class AttentivePool(nn.Module):
    """One vector per prompt: what one learnt query per head reads from it."""

    def __init__(self, config: InfinityConfig) -> None:
        super().__init__()
        width, self.heads = config.width, config.pool_heads
        size = width // self.heads
        self.mat_q = nn.Parameter(torch.randn(1, self.heads, size) / math.sqrt(size))
        self.mat_kv = nn.Linear(config.text_channels, 2 * width, bias=False)
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.proj = nn.Linear(width, width)

    def forward(self, text_ME: Tensor) -> Tensor:
        k, v = _keys_and_values(text_ME, self.mat_kv.weight, self.v_bias, self.heads).permute(1, 2, 0, 3)[:, None]
        out: Tensor = self.proj(merge_heads(prompt_attention(self.mat_q[:, :, None], k, v, None)))[0, 0]
        return out


# ----------------------------------------------------------------------------------------------- transformer


@dataclass(frozen=True)
class TextCondition:
    """What the prompts decide once per image.

    `pooled_RC` is the start token and condition; per layer, `modulations` has the AdaLN vectors (R, 6, 1, C) and
    `keys_values` the keys and values of all texts, (S, 2, H, D). Cross attention of a row reads the positions `at_RM`,
    where `mask_R11M`, if any, is true. `rows` as in VAR's Condition.
    """

    pooled_RC: Tensor
    modulations: tuple[Tensor, ...]
    keys_values: tuple[Tensor, ...]
    at_RM: Tensor
    mask_R11M: Tensor | None
    rows: Rows | None = None

    def mine(self, x_RX: Tensor) -> Tensor:
        return own_rows(x_RX, self.rows)


PromptKeys = tuple[Tensor, Tensor, Tensor | None]
"""What cross attention reads in a layer: `keys_values`, `at_RM` and `mask_R11M` of TextCondition."""

RowText = tuple[Tensor, int]
"""What a row is drawn from: the first so many positions of text features, (M, E). Rows of the very same tensor share
what is made of it."""


class Block(nn.Module):
    """Self-attention and feed-forward, modulated by AdaLN, with ungated cross attention between them."""

    def __init__(self, config: InfinityConfig) -> None:
        super().__init__()
        self.ada_gss = nn.Parameter(torch.randn(1, 1, 6, config.width) / config.width**0.5)
        self.sa = SelfAttention(config.width, config.heads)
        self.ca_norm = nn.LayerNorm(config.width, eps=NORM_EPS)
        self.ca = CrossAttention(config)
        self.ffn = FeedForward(config.width, config.mlp_hidden)

    @property
    def attention(self) -> SelfAttention:
        return self.sa

    @property
    def matrices(self) -> tuple[nn.Linear, ...]:
        sa, ca, ffn = self.sa, self.ca, self.ffn
        return sa.mat_qkv, sa.proj, ca.mat_q, ca.mat_kv, ca.proj, ffn.fc1, ffn.fc2

    def forward(
        self, x_RNC: Tensor, modulation_R61C: Tensor, prompt: PromptKeys, layer: int, rotation_2NP: Tensor,
        cache: Attend,
    ) -> Tensor:  # fmt: skip
        gate1, gate2, gain1, gain2, shift1, shift2 = modulation_R61C.unbind(1)
        u_RNC = modulated(x_RNC, gain1, shift1)
        cache.see_input(layer, u_RNC)
        q, k, v = self.sa.qkv(u_RNC, rotation_2NP)
        del u_RNC
        out_RHND = cache.attend(layer, q, k, v)
        del q, k, v
        x_RNC = torch.addcmul(x_RNC, self.sa.project(out_RHND), gate1)
        del out_RHND
        x_RNC = x_RNC + self.ca(self.ca_norm(x_RNC), *prompt)
        with span(FEED_FORWARD):
            return torch.addcmul(x_RNC, self.ffn(modulated(x_RNC, gain2, shift2)), gate2)


class Infinity(Transformer):
    """The transformer of Infinity. It runs any schedule of at most `max_scales` scales."""

    def __init__(self, config: InfinityConfig) -> None:
        super().__init__()
        self.config = config
        width, channels = config.width, config.text_channels
        self.cfg_uncond = nn.Parameter(torch.randn(config.text_positions, channels) / math.sqrt(channels))
        self.text_norm = nn.RMSNorm(channels, eps=NORM_EPS)
        self.text_proj_for_sos = nn.ModuleDict({"ca": AttentivePool(config)})
        self.text_proj_for_ca = nn.Sequential(
            nn.Linear(channels, width), nn.GELU(approximate="tanh"), nn.Linear(width, width)
        )
        self.pos_start = nn.Parameter(torch.randn(1, 1, width) / math.sqrt(width))
        self.lvl_embed = nn.Embedding(config.max_scales, width)
        self.word_embed = nn.Linear(config.bits, width)
        self.shared_ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.head_nm = HeadNorm(width)
        self.head = nn.Linear(width, 2 * config.bits)

    def unconditional(self, positions: int) -> RowText:
        """The learnt features that stand for a prompt of so many positions."""
        if positions > self.config.text_positions:
            raise ModelError(
                f"a prompt of {positions} positions has no unconditional half: these weights hold "
                f"{self.config.text_positions}; shorten it or give a negative prompt"
            )
        return self.cfg_uncond, positions

    def project_text(self, rows: Sequence[RowText], positions: int | None = None) -> tuple[TextCondition, Tensor]:
        """Text of every row to a condition without what layers make of it, and the projection of all texts, (S, C).

        With `positions`, at least as many as any text has, every row's own text takes so many, and there is a mask
        whatever the lengths, so that other texts have room in tensors of these shapes.
        """
        sizes: dict[int, int] = {}  # positions that a text takes
        keys = [id(x) if positions is None or x is self.cfg_uncond else -1 - row for row, (x, _) in enumerate(rows)]
        lengths, on, pool = [length for _, length in rows], self.cfg_uncond.device, self.text_proj_for_sos["ca"]
        for key, length in zip(keys, lengths, strict=True):
            sizes[key] = positions or max(length, sizes.get(key, 0))
        sources = dict(zip(keys, rows, strict=True))
        texts = {key: self.text_norm(sources[key][0][:size].float()) for key, size in sizes.items()}
        padded = [F.pad(texts[key], (0, 0, 0, size - len(texts[key]))) for key, size in sizes.items()]
        starts = dict(zip(sizes, accumulate(sizes.values(), initial=0), strict=False))
        read = list(zip(keys, lengths, strict=True))
        pooled = {(key, length): pool(texts[key][:length]) for key, length in dict.fromkeys(read)}
        numbers = torch.arange(positions or max(lengths))
        mask_RM = numbers < torch.tensor(lengths)[:, None]
        at_RM = torch.tensor([starts[key] for key in keys])[:, None] + numbers * mask_RM
        masked = positions is not None or len(set(lengths)) > 1
        mask_R11M = mask_RM[:, None, None].to(on) if masked else None
        condition = TextCondition(torch.stack([pooled[text] for text in read]), (), (), at_RM.to(on), mask_R11M)
        return condition, self.text_proj_for_ca(torch.cat(padded))

    def condition(self, rows: Sequence[RowText], positions: int | None = None) -> TextCondition:
        """Text of every row to what the blocks need of it; `positions` as in `project_text`."""
        condition, text_SC = self.project_text(rows, positions)
        modulations, keys_values = zip(*self._layer_conditions(condition.pooled_RC, text_SC), strict=True)
        return replace(condition, modulations=modulations, keys_values=keys_values)

    def _layer_conditions(self, pooled_RC: Tensor, text_SC: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Modulations, and keys and values of the texts, layer by layer."""
        shared = self.shared_ada_lin(pooled_RC).view(-1, 1, 6, self.config.width)
        for block in self.layers():
            yield (shared + block.ada_gss).transpose(1, 2), block.ca.keys_and_values(text_SC)

    def condition_again(self, condition: TextCondition, rows: Sequence[RowText]) -> bool:
        """Put other texts into a condition that was made with `positions`; layer by layer, so that there is never a
        second whole one. False, and nothing changed, where they do not fit in."""
        most = condition.at_RM.shape[1]
        if condition.mask_R11M is None or any(length > most for _, length in rows):
            return False
        other, text_SC = self.project_text(rows, most)
        if len(text_SC) > len(condition.keys_values[0]):  # more rows have texts of their own
            return False
        assert other.mask_R11M is not None
        condition.pooled_RC.copy_(other.pooled_RC)
        condition.at_RM.copy_(other.at_RM)
        condition.mask_R11M.copy_(other.mask_R11M)
        held = zip(condition.modulations, condition.keys_values, strict=True)
        for (own, own_kv), (new, kv) in zip(held, self._layer_conditions(other.pooled_RC, text_SC), strict=True):
            own.copy_(new)
            own_kv[: len(kv)] = kv
        return True

    def first_input(self, condition: TextCondition) -> Tensor:
        """The start token of scale 0, (R, 1, C)."""
        out: Tensor = condition.mine(condition.pooled_RC)[:, None] + self.pos_start + self.lvl_embed.weight[0]
        return out

    def next_input(self, codes_BNK: Tensor, scale: int) -> Tensor:
        """The input tokens of `scale`, (B, N, C), from the resized sum of codes."""
        out: Tensor = self.word_embed(codes_BNK.float()) + self.lvl_embed.weight[scale]
        return out

    def hidden(self, x_RNC: Tensor, condition: TextCondition, rotation_2NP: Tensor, cache: Attend) -> Tensor:
        """The residual stream after the last block."""
        mine, mask_R11M = condition.mine, condition.mask_R11M
        read = mine(condition.at_RM), None if mask_R11M is None else mine(mask_R11M)
        for layer, block in enumerate(self.blocks):
            prompt = condition.keys_values[layer], *read
            with span(layer_name(layer)):
                x_RNC = block(x_RNC, mine(condition.modulations[layer]), prompt, layer, rotation_2NP, cache)
        return x_RNC

    def logits(self, hidden_RNC: Tensor, condition: TextCondition) -> Tensor:
        """(R, N, 2K) in fp32; number 2b + v is for bit b having value v."""
        out: Tensor = self.head(self.head_nm(hidden_RNC.float(), condition.mine(condition.pooled_RC)))
        return out

    def forward(self, x_RNC: Tensor, condition: TextCondition, rotation_2NP: Tensor, cache: Attend) -> Tensor:
        return self.logits(self.hidden(x_RNC, condition, rotation_2NP, cache), condition)
