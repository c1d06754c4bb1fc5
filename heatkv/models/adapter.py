"""What a policy or a statistic may know of a model beyond queries, keys and values: one small view of its blocks.

Shapes: R rows, N tokens of the running scale, C width, H heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

Watch = Callable[[int, Tensor, Tensor], None]
"""Called with layer, the residual stream that enters it (R, N, C) and its attention gate (R, 1, C)."""


@dataclass(frozen=True)
class BlockView:
    """One transformer block: the module, its attention with the output projection, and where its gate comes from.

    `attention` has `mat_qkv`, whose first rows make the queries. `gate` finds the AdaLN factor on the attention branch,
    (R, 1, C), among the arguments of the block's forward.
    """

    block: Any
    attention: Any
    projection: nn.Linear
    gate: Callable[[Sequence[Any]], Tensor]


@dataclass(frozen=True)
class ModelAdapter:
    """The blocks of a model in order."""

    blocks: tuple[BlockView, ...]
    heads: int

    def output_weight(self, layer: int) -> Tensor:
        """W_o of every head, (H, C, D): head h adds gate * (W_o[h] @ its output) to the residual stream."""
        weight: Tensor = self.blocks[layer].projection.weight.detach().unflatten(1, (self.heads, -1))
        return weight.permute(1, 0, 2)

    def query_weight(self, layer: int) -> Tensor:
        """W_q of every head, (H, D, C); queries are made from it without bias, norm and rotation yet."""
        weight: Tensor = self.blocks[layer].attention.mat_qkv.weight.detach()
        of_heads: Tensor = weight[: len(weight) // 3].unflatten(0, (self.heads, -1))
        return of_heads

    @contextmanager
    def watching(self, watch: Watch) -> Iterator[None]:
        """Inside the block, `watch` is called before every layer runs."""
        with ExitStack() as undo:
            for layer, view in enumerate(self.blocks):

                def see(_: nn.Module, args: Any, kwargs: dict[str, Any], layer: int = layer, view: Any = view) -> None:
                    arguments = (*args, *kwargs.values())
                    watch(layer, arguments[0], view.gate(arguments))

                undo.callback(view.block.register_forward_pre_hook(see, with_kwargs=True).remove)
            yield
