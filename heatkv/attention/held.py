"""What the heads of a layer read of the cache: lists of slots, for kernels that follow them token by token.

Shapes: R rows, H heads, X slots of all heads.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class HeldTokens:
    """Slots that every head of one layer reads for one target.

    Head h of row r reads slots_X[begins[r, h] : begins[r, h] + counts[r, h]]; all are int32, begins and counts (R, H),
    or (1, H) when all rows read alike. `bias_X`, fp32, beside the slots, is added to the logits; None where no held
    token stands for several.
    """

    slots_X: Tensor
    begins_RH: Tensor
    counts_RH: Tensor
    bias_X: Tensor | None = None
