"""The plan of a dynamic policy: how many past tokens every head holds for every target scale.

Which tokens these are is chosen while the images are drawn, by the policy's scores; the numbers are fixed before, so
that the promised bytes hold and all shapes are static. Arrays: L layers, H heads, T scales.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from heatkv.core.geometry import CacheGeometry
from heatkv.core.io import check_header, read_json
from heatkv.core.plan import (
    FORMAT,
    VERSION,
    CachePlan,
    IntArray,
    Plan,
    check_peak,
    common_fields,
    integer_array,
    named,
    typed,
)
from heatkv.errors import FormatError, PlanError


def available_tokens(geometry: CacheGeometry) -> IntArray:
    """Tokens of all earlier scales, for every target, (T,)."""
    return np.asarray(geometry.schedule.offsets[: len(geometry.schedule)], dtype=np.int64)


@dataclass(frozen=True, eq=False)
class CapacityPlan(CachePlan):
    """`capacity[l, h, t]`: past tokens that head (l, h) reads while target t runs, its own scale not counted.

    With `shared`, the heads of a layer share the sum of theirs, and how much each gets is decided while drawing.
    `carried` numbers of 4 bytes go with every held token of every row. Raises PlanError when an entry is negative, more
    than the earlier scales have, or more than the last target's capacity and new tokens allow, and when a checkpoint
    holds more than `budget_token_heads`.
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

    def __post_init__(self) -> None:
        layers, heads, scales = self.geometry.layers, self.geometry.heads, len(self.schedule)
        try:
            given = np.asarray(self.capacity)
        except ValueError as error:
            raise PlanError(f"capacity is no regular array: {str(error).splitlines()[0]}") from error
        if given.shape != (layers, heads, scales) or not np.issubdtype(given.dtype, np.integer):
            raise PlanError(
                f"capacity is {given.dtype} of shape {given.shape}; {layers} layers, {heads} heads, {scales} scales "
                "need whole numbers for each"
            )
        array = given.astype(np.int64)
        array.setflags(write=False)
        object.__setattr__(self, "capacity", array)
        object.__setattr__(self, "settings", MappingProxyType(dict(self.settings)))
        if self.carried < 0:
            raise PlanError(f"carried is {self.carried}; it cannot be below 0")
        # what was dropped cannot come back: at most what was held, and the tokens that came with the last target
        grown = np.zeros_like(array)
        grown[..., 1:] = array[..., :-1] + np.asarray(self.schedule.tokens[:-1])
        limit = np.minimum(available_tokens(self.geometry), grown)
        given, limit = (x.sum(axis=1, keepdims=True) if self.shared else x for x in (array, limit))
        wrong = np.argwhere((given < 0) | (given > limit))
        if len(wrong) or (array < 0).any():
            layer, head, target = (int(i) for i in (wrong if len(wrong) else np.argwhere(array < 0))[0])
            of = "all heads" if self.shared else str(head)
            raise PlanError(
                f"capacity of layer {layer}, head {of}, target {target} is {given[layer, head, target]}; it must be "
                f"from 0 to {limit[layer, head, target]}, the tokens there are"
            )
        self.check_budget()

    @cached_property
    def held(self) -> IntArray:
        return self.capacity

    def had_no_effect(self) -> bool:
        """True when everything that can be cached is kept to the end, as the full cache does."""
        return bool((self.capacity == available_tokens(self.geometry)).all())

    def bytes_of(self, token_heads: int, rows: int, storage: str) -> int:
        """Bytes of so many token-heads, with what is carried and, where heads share, the count of each.

        Tokens are chosen while drawing, so that none has a place among uncoded ones.
        """
        _, each = self.geometry.token_head_bytes(rows, storage)
        counts = 4 * rows * self.geometry.layers * self.geometry.heads if self.shared else 0
        return token_heads * (each + 4 * rows * self.carried) + counts

    def to_json(self) -> dict[str, Any]:
        mine = {"shared": self.shared, "carried": self.carried, "capacity": self.capacity.tolist()}
        return self._common_json() | mine


def load_plan(path: str | Path, head_dim: int | None = None) -> CachePlan:
    """Read a plan.json, of a static or a dynamic policy. Raises FormatError, PlanError or ScheduleError.

    `head_dim` is the head size of a plan that does not state its own (it only matters for bytes).
    """
    value = read_json(path)
    data = check_header(value, path, FORMAT, VERSION)
    if "capacity" not in data:
        return Plan.from_json(value, path, head_dim)
    if "last_read" in data:
        raise FormatError(f"{path} holds both 'last_read' and 'capacity'; a plan is of a static or a dynamic policy")
    with named(path):
        plan = CapacityPlan(
            **common_fields(data, head_dim),
            capacity=integer_array(data["capacity"], "capacity"),
            shared=typed(data, "shared", bool),
            carried=typed(data, "carried", int),
        )
        check_peak(data, plan, "capacity")
    return plan
