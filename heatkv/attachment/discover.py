"""Finding the self-attention modules of a VAR or Infinity from another repository, by their attributes alone."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from heatkv.core.geometry import CacheGeometry
from heatkv.core.schedule import ScaleSchedule
from heatkv.errors import ModelError
from heatkv.models.adapter import BlockView, ModelAdapter
from heatkv.models.checkpoint import public_state
from heatkv.models.fingerprint import fingerprint

_PLACES = "model.unregistered_blocks[i], model.block_chunks[a].module[b] and model.blocks[i]"
_NEEDED = (
    "num_heads", "head_dim", "scale", "mat_qkv", "q_bias", "v_bias", "zero_k_bias", "proj", "proj_drop", "kv_caching",
)  # fmt: skip
NORM_FLAGS = ("attn_l2_norm", "cos_attn")
_NORM_NEEDED = ("scale_mul_1H11", "max_scale_mul")
_KNOWN_PARTS = {"mat_qkv", "proj", "proj_drop", "q_bias", "v_bias", "zero_k_bias", "scale_mul_1H11"}


@dataclass(frozen=True)
class FoundModel:
    """The self-attention modules of a model in order, each with its place, and the blocks around them.

    `schedule` is what the model itself says, if anything; `gated` whether every block shows the gate and the output
    projection by which errors of dropping are measured.
    """

    model: Any
    attentions: tuple[tuple[str, Any], ...]
    adapter: ModelAdapter
    gated: bool
    schedule: ScaleSchedule | None

    @property
    def name(self) -> str:
        return type(self.model).__name__

    @property
    def weight(self) -> Tensor:
        """A matrix of the attention, for its type and device."""
        weight: Tensor = self.attentions[0][1].mat_qkv.weight
        return weight

    def geometry(self, schedule: ScaleSchedule) -> CacheGeometry:
        """The geometry with the schedule that the model is to run."""
        return CacheGeometry(len(self.attentions), self.adapter.heads, self.attentions[0][1].head_dim, schedule)

    def fingerprint(self) -> str:
        """Names all weights of the transformer, as those of the same one that `heatkv.load_model` reads."""
        if isinstance(self.model, nn.Module):
            return fingerprint(public_state(self.model).items())
        blocks = nn.ModuleList(view.block for view in self.adapter.blocks)
        return fingerprint((f"blocks.{name}", x) for name, x in public_state(blocks).items())


def find(model: Any) -> FoundModel:
    """The modules to attach to. Raises ModelError for a model that HeatKV does not know, and says what it looks for."""
    blocks = list(_blocks(model))
    attentions = tuple(_self_attention(where, block) for where, block in blocks)
    name = type(model).__name__
    if not attentions:
        raise ModelError(
            f"no blocks were found in {name}: HeatKV looks at {_PLACES}; pass the transformer itself, not a wrapper"
        )
    sizes = {(module.num_heads, module.head_dim) for _, module in attentions}
    if len(sizes) > 1:
        raise ModelError(f"the blocks of {name} differ in (heads, head size): {sorted(sizes)}")
    views = [
        BlockView(block, module, module.proj, _gate(where, block))
        for (where, block), (_, module) in zip(blocks, attentions, strict=True)
    ]
    gated = all(
        isinstance(view.projection, nn.Linear) and (hasattr(view.block, "ada_gss") or hasattr(view.block, "ada_lin"))
        for view in views
    )
    brings_schedule = "scale_schedule" in inspect.signature(attentions[0][1].forward).parameters
    schedule = None if brings_schedule else _schedule(model)
    return FoundModel(model, attentions, ModelAdapter(tuple(views), attentions[0][1].num_heads), gated, schedule)


def _items(value: Any) -> list[Any]:
    """The items of a list or ModuleList, none for anything else."""
    return list(value) if isinstance(value, list | tuple | nn.ModuleList | nn.Sequential) else []


def _blocks(model: Any) -> Iterator[tuple[str, Any]]:
    """Every block in order, with its place for messages."""
    if blocks := _items(getattr(model, "unregistered_blocks", None)):
        yield from ((f"unregistered_blocks[{i}]", block) for i, block in enumerate(blocks))
    elif chunks := _items(getattr(model, "block_chunks", None)):
        for a, chunk in enumerate(chunks):
            inside = _items(getattr(chunk, "module", None))
            yield from ((f"block_chunks[{a}].module[{b}]", block) for b, block in enumerate(inside))
    else:
        yield from ((f"blocks[{i}]", block) for i, block in enumerate(_items(getattr(model, "blocks", None))))


def _self_attention(where: str, block: Any) -> tuple[str, Any]:
    """The module and its place. Raises ModelError unless HeatKV can compute what it computes."""
    attribute = next((name for name in ("sa", "attn") if isinstance(getattr(block, name, None), nn.Module)), None)
    if attribute is None:
        raise ModelError(f"{where} ({type(block).__name__}) has no self-attention named `sa` or `attn`")
    module, where = getattr(block, attribute), f"{where}.{attribute}"
    name = f"{where} ({type(module).__name__})"
    flags = [flag for flag in NORM_FLAGS if hasattr(module, flag)]
    normalised = any(getattr(module, flag) for flag in flags)
    missing = [name for name in (*_NEEDED, *(_NORM_NEEDED if normalised else ())) if not hasattr(module, name)]
    missing += [] if flags else [" or ".join(NORM_FLAGS)]
    if missing:
        raise ModelError(f"{name} is no self-attention of VAR or Infinity: it has no {', '.join(missing)}")
    # whatever else takes part in the computation would be left out in silence
    tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    parts = [part for part, child in module.named_children() if not isinstance(child, nn.Identity | nn.Dropout)]
    foreign = {*parts, *(part for part, _ in tensors)} - _KNOWN_PARTS
    foreign |= set() if module.mat_qkv.bias is None else {"mat_qkv.bias"}
    if foreign:
        raise ModelError(f"{name} also has {', '.join(sorted(foreign))}, of which HeatKV does not know what they do")
    parameters = list(inspect.signature(module.forward).parameters.values())
    if len(parameters) < 2 or any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters):
        raise ModelError(
            f"the forward of {name} is not forward(x, attn_bias, ...) with named arguments; where the model is "
            "attached already, leave the other `with` block first"
        )
    return where, module


def _gate(where: str, block: Any) -> Callable[[Sequence[Any]], Tensor]:
    """How to find the AdaLN factor on the attention branch, (R, 1, C), among the arguments of a block."""
    shared, own = getattr(block, "ada_gss", None), getattr(block, "ada_lin", None)

    def gate(arguments: Sequence[Any]) -> Tensor:
        for value in (value for value in arguments[1:] if isinstance(value, Tensor)):
            if shared is not None and value.ndim == 4 and value.shape[2] == 6:
                vectors: Tensor = value + shared
                return vectors[:, :, 0]
            if own is not None and value.ndim == 2:
                vectors = own(value)
                return vectors.view(len(value), 1, 6, -1)[:, :, 0]
        raise ModelError(f"{where} was called without the condition that its AdaLN is made from; HeatKV looks for it")

    return gate


def _schedule(model: Any) -> ScaleSchedule | None:
    """The schedule that VAR keeps in `patch_nums` or `lvl_1L`, None when there is neither."""
    if (sides := getattr(model, "patch_nums", None)) is not None:
        return ScaleSchedule.of((side, side) if isinstance(side, int) else side for side in sides)
    if not isinstance(levels := getattr(model, "lvl_1L", None), Tensor):
        return None
    return ScaleSchedule.square([math.isqrt(count) for count in torch.bincount(levels.flatten().long()).tolist()])
