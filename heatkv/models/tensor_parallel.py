"""One model on several devices: every rank computes its heads of every layer and its part of every feed-forward.

As in Megatron-LM (Shoeybi et al. 2019): queries, keys, values and the first matrix of the feed-forward are split by
columns, the output projections by rows, and each block sums over ranks after either. All else, the residual stream, the
logits and the decoder, is the same on every rank, and so are random numbers; rank 0's choices are everybody's.
Shapes: R rows, N tokens, C width, H heads of the rank, D head size, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields

import numpy as np
from torch import Tensor, nn
from torch.nn import functional as F

from heatkv.core.plan import IntArray
from heatkv.core.schema import shown
from heatkv.errors import ModelError
from heatkv.head_assignment import check_ranks, contiguous_heads
from heatkv.models.class_conditional import ClassConditionalModel
from heatkv.models.class_conditional import Drawing as ClassDrawing
from heatkv.models.infinity import CrossAttention
from heatkv.models.infinity import SelfAttention as InfinitySelfAttention
from heatkv.models.sampling import Settings
from heatkv.models.text_conditional import Drawing as TextDrawing
from heatkv.models.text_conditional import Prompt, TextConditionalModel
from heatkv.models.var import FeedForward
from heatkv.models.var import SelfAttention as VARSelfAttention
from heatkv.parallel.ranks import Ranks

# --------------------------------------------------------------------------------------------- split weights


class SummedLinear(nn.Linear):
    """A linear layer that has some of its inputs here and the others on other ranks; its bias is added once."""

    def __init__(self, weight: Tensor, bias: Tensor, ranks: Ranks) -> None:
        super().__init__(weight.shape[1], weight.shape[0], device="meta")
        self.weight, self.bias = _parameter(weight), _parameter(bias)
        self.ranks = ranks

    def forward(self, input: Tensor) -> Tensor:
        out: Tensor = self.ranks.sum(F.linear(input, self.weight)) + self.bias
        return out


def _parameter(values: Tensor) -> nn.Parameter:
    """Memory of its own, so that the whole matrix can be freed."""
    return nn.Parameter(values.detach().clone(), requires_grad=False)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    made.weight = _parameter(weight)
    if bias is not None:
        made.bias = _parameter(bias)
    return made


class _Part:
    """What one rank keeps of the parameters that have a place per head, for its heads of one layer."""

    def __init__(self, heads: Sequence[int], of: int, ranks: Ranks) -> None:
        self.heads, self.of, self.ranks = list(heads), of, ranks

    def outputs(self, values: Tensor, groups: int = 1) -> Tensor:
        """Rows of (groups * H * D, ...): those of its heads in every group, such as queries, keys and values."""
        taken: Tensor = values.detach().unflatten(0, (groups, self.of, -1))[:, self.heads].flatten(0, 2)
        return taken

    def summed(self, layer: nn.Linear) -> SummedLinear:
        """An output projection that reads its heads."""
        weight = layer.weight.detach().unflatten(1, (self.of, -1))[:, self.heads].flatten(1)
        return SummedLinear(weight, layer.bias, self.ranks)


def _shard_self_attention(attention: VARSelfAttention | InfinitySelfAttention, part: _Part) -> None:
    attention.mat_qkv = _linear(part.outputs(attention.mat_qkv.weight, 3), None)
    attention.q_bias = _parameter(part.outputs(attention.q_bias))
    attention.v_bias = _parameter(part.outputs(attention.v_bias))
    if isinstance(attention, VARSelfAttention):
        attention.zero_k_bias = part.outputs(attention.zero_k_bias).clone()
    if isinstance(attention, InfinitySelfAttention) or attention.l2_norm:
        attention.scale_mul_1H11 = _parameter(attention.scale_mul_1H11[:, part.heads])
    attention.proj = part.summed(attention.proj)
    attention.heads = len(part.heads)


def _shard_cross_attention(attention: CrossAttention, part: _Part) -> None:
    attention.mat_q = _linear(part.outputs(attention.mat_q.weight), part.outputs(attention.mat_q.bias))
    attention.mat_kv = _linear(part.outputs(attention.mat_kv.weight, 2), None)
    attention.v_bias = _parameter(part.outputs(attention.v_bias))
    attention.proj = part.summed(attention.proj)
    attention.heads = len(part.heads)


def _shard_feed_forward(layer: FeedForward, ranks: Ranks) -> None:
    """An equal part of the hidden channels, or nearly so where they do not divide."""
    weight, bias, out = (
        whole.tensor_split(ranks.size, dim=dim)[ranks.rank]
        for whole, dim in ((layer.fc1.weight, 0), (layer.fc1.bias, 0), (layer.fc2.weight, 1))
    )
    layer.fc1 = _linear(weight, bias)
    layer.fc2 = SummedLinear(out, layer.fc2.bias, ranks)


# ---------------------------------------------------------------------------------------------------- models


@dataclass(frozen=True)
class ShardedClassModel(ClassConditionalModel):
    """One rank's part of a class-conditional model; all ranks draw the same images together."""

    ranks: Ranks = field(kw_only=True)

    def begin(self, labels: Sequence[int], settings: Settings, *, reusable: bool = False) -> ClassDrawing:
        """Start drawing one image per label, on all ranks at once. Raises ModelError for what is no class."""
        del reusable
        return _AgreedClassDrawing(self, labels, settings)


class _AgreedClassDrawing(ClassDrawing):
    """All ranks take what rank 0 chose: where they differ in rounding, a choice might."""

    _model: ShardedClassModel

    def accept(self, tokens_BN: Tensor) -> None:
        self._model.ranks.take_first(tokens_BN)
        super().accept(tokens_BN)


@dataclass(frozen=True)
class ShardedTextModel(TextConditionalModel):
    """One rank's part of a text-to-image model; all ranks draw the same images together."""

    ranks: Ranks = field(kw_only=True)

    def begin(self, labels: Sequence[Prompt], settings: Settings, *, reusable: bool = False) -> TextDrawing:
        """Start drawing one image per prompt, on all ranks at once. Raises ModelError for features that do not fit."""
        return _AgreedTextDrawing(self, labels, settings, reusable)


class _AgreedTextDrawing(TextDrawing):
    """All ranks take what rank 0 chose."""

    _model: ShardedTextModel

    def accept(self, choices_BN: Tensor) -> None:
        self._model.ranks.take_first(choices_BN)
        super().accept(choices_BN)


def shard_model(
    model: ClassConditionalModel | TextConditionalModel, ranks: Ranks, heads_LH: IntArray | None = None
) -> ShardedClassModel | ShardedTextModel:
    """This rank's part of a model: these heads of every layer, (L, H / ranks), in order; default: contiguous ones.

    The model's transformer itself becomes the part, so that the memory of all else is free; the model must not be used
    any more. What is given back draws with all ranks together, under a plan of its heads (`RankedPlan.plans[rank]`);
    its geometry is that of the part. Cross attention and the feed-forward are split evenly whatever the heads. Raises
    ModelError for another kind of model, one that is a part already, or heads that it does not have, PlanError when so
    many ranks do not divide the heads.
    """
    if isinstance(model, ShardedClassModel | ShardedTextModel):
        raise ModelError(f"{model.name} is one rank's part already; load the model again")
    if not isinstance(model, ClassConditionalModel | TextConditionalModel):
        raise ModelError(f"model is {shown(model)}; load one with heatkv.load_model")
    geometry = model.geometry
    check_ranks(geometry.heads, ranks.size)
    even_RLH = contiguous_heads(geometry.layers, geometry.heads, ranks.size)
    taken = np.asarray(even_RLH[ranks.rank] if heads_LH is None else heads_LH)
    _check_heads(taken, geometry.layers, geometry.heads, ranks.size)
    parts = [_Part(heads, geometry.heads, ranks) for heads in taken.tolist()]
    if isinstance(model, ClassConditionalModel):
        for block, part in zip(model.transformer.layers(), parts, strict=True):
            _shard_self_attention(block.attn, part)
            _shard_feed_forward(block.ffn, ranks)
        return ShardedClassModel(**{own.name: getattr(model, own.name) for own in fields(model)}, ranks=ranks)
    even = _Part(even_RLH[ranks.rank, 0].tolist(), geometry.heads, ranks)
    for text_block, part in zip(model.transformer.layers(), parts, strict=True):
        _shard_self_attention(text_block.sa, part)
        _shard_cross_attention(text_block.ca, even)
        _shard_feed_forward(text_block.ffn, ranks)
    return ShardedTextModel(**{own.name: getattr(model, own.name) for own in fields(model)}, ranks=ranks)


def _check_heads(heads_LH: IntArray, layers: int, heads: int, size: int) -> None:
    """Raise ModelError unless these are equally many different heads of every layer."""
    if heads_LH.shape != (layers, heads // size) or not np.issubdtype(heads_LH.dtype, np.integer):
        raise ModelError(
            f"heads is {heads_LH.dtype} of shape {heads_LH.shape}; one of {size} ranks has whole numbers, "
            f"{(layers, heads // size)}"
        )
    for layer, of_layer in enumerate(heads_LH.tolist()):
        if len(set(of_layer)) < len(of_layer) or not all(0 <= head < heads for head in of_layer):
            raise ModelError(
                f"heads of layer {layer} are {shown(of_layer)}; they are different ones from 0 to {heads - 1}"
            )
