"""Making a plan keep its promise: at every checkpoint the cache holds at most the budget."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from heatkv.errors import BudgetError
from heatkv.plan import held_after

IntArray = NDArray[np.int64]


def fit_checkpoints(
    last_read_LHT: IntArray, tokens: tuple[int, ...], budget_token_heads: int, order_LHT: IntArray
) -> IntArray:
    """Make drops early where a checkpoint would exceed the budget; returns a new `last_read`.

    While target t runs, layers already done hold what target t+1 needs and the others still what t needs, which can
    be more than either need in all. A checkpoint that exceeds the budget takes cells that are read for the last time
    by t in later layers and drops them before t runs: last layer first, within a layer in ascending `order`, only
    until that checkpoint fits (HeatKV's rule). Raises BudgetError when that is not enough.
    """
    last_read = last_read_LHT.copy()
    layers, heads, scales = last_read.shape
    sizes = np.asarray(tokens, dtype=np.int64)
    after_LT = held_after(last_read, tokens)
    layer_of = np.repeat(np.arange(layers), heads)
    for target in range(scales):
        done = after_LT[:, target].cumsum()
        before = after_LT[:, target - 1] if target else np.zeros(layers, dtype=np.int64)
        excess_L = done + before.sum() - before.cumsum() - budget_token_heads
        if excess_L.max() <= 0:
            continue
        pair, source = np.nonzero(last_read[:, :, :target].reshape(layers * heads, target) == target)
        layer = layer_of[pair]
        order = np.lexsort((order_LHT.reshape(layers * heads, scales)[pair, source], -layer))
        pair, source, layer = pair[order], source[order], layer[order]
        cumulative = np.concatenate([[0], sizes[source].cumsum()])
        # candidates come last layer first, so those in layers above l are a prefix
        available = np.searchsorted(-layer, -np.arange(layers), side="left")
        dropped = 0
        for at in np.flatnonzero(excess_L > 0):
            needed = int(np.searchsorted(cumulative, excess_L[at], side="left"))
            if needed > available[at]:
                raise BudgetError(
                    f"after layer {at} of scale {target} the plan holds {excess_L[at] - cumulative[available[at]]} "
                    f"token-heads more than the budget of {budget_token_heads}, and no later layer can drop enough"
                )
            dropped = max(dropped, needed)
        chosen_pair, chosen_source = pair[:dropped], source[:dropped]
        last_read.reshape(layers * heads, scales)[chosen_pair, chosen_source] = target - 1
        np.subtract.at(after_LT[:, target - 1], layer[:dropped], sizes[chosen_source])
    return last_read
