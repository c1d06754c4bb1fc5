"""What every head of a layer reads: slots of a store, head by head. Both ways of computing attention start from this.

Shapes: R rows, H heads, X slots of all lists of a layer, one list after another.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class HeldTokens:
    """Slots that every head of one layer reads for one target.

    Head h of row r reads slots_X[begins[r, h] : begins[r, h] + counts[r, h]]; both are int32, (R, H), or (1, H) when
    all rows read alike. `bias_X`, fp32, beside the slots, is added to the logits; None where no held token stands for
    several.
    """

    slots_X: Tensor
    begins_RH: Tensor
    counts_RH: Tensor
    bias_X: Tensor | None = None
