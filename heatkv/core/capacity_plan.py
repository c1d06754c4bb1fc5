"""The plan of a dynamic policy: how many past tokens every head holds for every target scale.

Which tokens these are is chosen while the images are drawn, by the policy's scores; the numbers are fixed before, so
that the promised bytes hold and all shapes are static. Arrays: L layers, H heads, T scales.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np

from heatkv.core.geometry import CacheGeometry
from heatkv.core.plan import CachePlan
from heatkv.core.schema import IntArray, integer_array
from heatkv.errors import PlanError


def available_tokens(geometry: CacheGeometry) -> IntArray:
    """Tokens of all earlier scales, for every target, (T,)."""
    return np.asarray(geometry.schedule.offsets[: len(geometry.schedule)], dtype=np.int64)


@dataclass(frozen=True, eq=False)
class CapacityPlan(CachePlan):
    """`capacity[l, h, t]`: past tokens that head (l, h) reads while target t runs, its own scale not counted.

    With `shared`, the heads of a layer share the sum of theirs, and how much each gets is decided while drawing.
    `carried` numbers of 4 bytes go with every held token of every row. Raises PlanError for capacities that are not
    there, and for a checkpoint that holds more than the budget.
    """

    policy: str
    geometry: CacheGeometry
    capacity: IntArray
    budget: float
    budget_token_heads: int
    model: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    shared: bool = False
    carried: int = 0
    weights: str = ""

    def __post_init__(self) -> None:
        array = integer_array(self.capacity, self.geometry.shape, "capacity", PlanError)
        object.__setattr__(self, "capacity", array)
        object.__setattr__(self, "settings", MappingProxyType(dict(self.settings)))
        self._check()

    @property
    def held(self) -> IntArray:
        return self.capacity

    def had_no_effect(self) -> bool:
        return bool((self.capacity == available_tokens(self.geometry)).all())

    def bytes_of(self, token_heads: int, rows: int, storage: str) -> int:
        """Bytes of so many token-heads, with what is carried and, where heads share, the count of each.

        Tokens are chosen while drawing, so that none has a place among uncoded ones.
        """
        _, each = self.geometry.token_head_bytes(rows, storage)
        counts = 4 * rows * self.geometry.layers * self.geometry.heads if self.shared else 0
        return token_heads * (each + 4 * rows * self.carried) + counts

    def _check(self) -> None:
        """Raise PlanError when an entry is negative, more than the earlier scales have, or more than the last target's
        capacity and new tokens allow, and when a checkpoint holds more than the budget."""
        if self.carried < 0:
            raise PlanError(f"carried is {self.carried}; it cannot be below 0")
        # what was dropped cannot come back: at most what was held, and the tokens that came with the last target
        grown = np.zeros_like(self.capacity)
        grown[..., 1:] = self.capacity[..., :-1] + np.asarray(self.schedule.tokens[:-1])
        limit = np.minimum(available_tokens(self.geometry), grown)
        held = self.capacity
        if self.shared:
            held, limit = (np.broadcast_to(x.sum(axis=1, keepdims=True), held.shape) for x in (held, limit))
        wrong = np.argwhere((self.capacity < 0) | (held > limit))
        if len(wrong):
            layer, head, target = (int(i) for i in wrong[0])
            heads = "all heads" if self.shared else f"head {head}"
            raise PlanError(
                f"capacity of layer {layer}, {heads}, target {target} is {held[layer, head, target]}; it must be "
                f"from 0 to {limit[layer, head, target]}, the tokens there are"
            )
        self.check_budget()

    def to_json(self) -> dict[str, Any]:
        return super().to_json() | {
            "shared": self.shared, "carried": self.carried, "capacity": self.capacity.tolist(),
        }  # fmt: skip
