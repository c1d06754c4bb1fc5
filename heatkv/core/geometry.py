"""The size of a cache: layers, heads and scales, in token-heads and in bytes.

A token-head is the key and the value of one token in one head of one layer, for every row alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

from heatkv.core.schedule import ScaleSchedule
from heatkv.core.schema import whole
from heatkv.core.storage_type import UNCODED_SCALES, StorageType
from heatkv.errors import BudgetError, HeatKVError, PlanError

_MOST = 1 << 16
"""Layers, heads and channels, each."""

_MOST_TOKEN_HEADS = 1 << 56
"""Of all scales of a model: sums of these, and their bytes for any number of rows in use, stay whole in 64 bits."""


@dataclass(frozen=True)
class CacheGeometry:
    """Layers, heads and head size of a model, with the schedule it runs: all that a cache's size depends on.

    `head_dim` is in channels. Raises PlanError for what is no whole number from 1 to 65536, and more token-heads than
    can be counted.
    """

    layers: int
    heads: int
    head_dim: int
    schedule: ScaleSchedule

    def __post_init__(self) -> None:
        for name in ("layers", "heads", "head_dim"):
            object.__setattr__(self, name, whole(getattr(self, name), name, PlanError, 1, _MOST))
        token_heads = self.schedule.total_tokens * self.layers * self.heads
        if token_heads > _MOST_TOKEN_HEADS:
            raise PlanError(f"all scales have {token_heads} token-heads; at most {_MOST_TOKEN_HEADS} can be counted")

    @property
    def shape(self) -> tuple[int, int, int]:
        """(L, H, T): layers, heads and scales."""
        return self.layers, self.heads, len(self.schedule)

    def check_holds(
        self, layers: int, heads: int, schedule: ScaleSchedule, what: str, error: type[HeatKVError]
    ) -> None:
        """Raise `error` unless these are the layers, heads and schedule; `what` begins it, as "the plan is for"."""
        if (layers, heads) != (self.layers, self.heads):
            raise error(f"{what} {layers} layers x {heads} heads, the model has {self.layers} x {self.heads}")
        if schedule != self.schedule:
            raise error(f"{what} the schedule {schedule}, the model runs {self.schedule}")

    @cached_property
    def full_token_heads(self) -> int:
        """N*L*H: what the full cache holds (every scale but the last)."""
        return self.schedule.cached_tokens * self.layers * self.heads

    def token_head_bytes(self, rows: int = 1, storage: str = "bfloat16") -> tuple[int, int]:
        """Bytes of one token-head over all rows (guidance doubles the rows): of the uncoded scales, and of all others.

        They only differ for a coded storage type. Raises BudgetError.
        """
        whole(rows, "rows", BudgetError, 1)
        uncoded, others = StorageType.parse(storage).token_head_bytes(self.head_dim)
        return uncoded * rows, others * rows

    def uncoded_token_heads(self, uncoded_scales: int = UNCODED_SCALES) -> int:
        """Token-heads of so many of the first scales, as many as a full cache holds."""
        tokens = self.schedule.offsets[min(uncoded_scales, len(self.schedule) - 1)]
        return tokens * self.layers * self.heads

    def bytes(
        self, token_heads: int, rows: int = 1, storage: str = "bfloat16", uncoded_scales: int = UNCODED_SCALES
    ) -> int:
        """The most bytes that so many token-heads take over all rows: those of the uncoded scales are among them.

        Raises BudgetError.
        """
        uncoded, others = self.token_head_bytes(rows, storage)
        first = min(token_heads, self.uncoded_token_heads(uncoded_scales))
        return first * uncoded + (token_heads - first) * others

    def token_heads_within(
        self, amount: Fraction, rows: int = 1, storage: str = "bfloat16", uncoded_scales: int = UNCODED_SCALES
    ) -> Fraction:
        """The token-heads that so many bytes hold whichever they are, the inverse of `bytes`. Raises BudgetError."""
        uncoded, others = self.token_head_bytes(rows, storage)
        first = min(amount / uncoded, Fraction(self.uncoded_token_heads(uncoded_scales)))
        return first + (amount - first * uncoded) / others

    def full_bytes(self, rows: int = 1, storage: str = "bfloat16") -> int:
        """Bytes of the full cache over all rows. Raises BudgetError."""
        return self.bytes(self.full_token_heads, rows, storage)
