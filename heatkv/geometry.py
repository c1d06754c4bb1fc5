"""The size of a cache: geometry in token-heads and bytes, and the budgets people state.

A token-head is the key and the value of one token in one head of one layer, for every row alike.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from functools import cached_property
from typing import Literal

from heatkv.errors import BudgetError, PlanError
from heatkv.schedule import ScaleSchedule

STORAGE_BYTES: dict[str, tuple[int, int]] = {
    "float32": (4, 4),
    "bfloat16": (2, 2),
    "float16": (2, 2),
    "float32-key-bfloat16-value": (4, 2),
}
"""Bytes per channel of a key and of a value, by storage type. The last entry is what public code holds under
autocast (normalisation returns fp32 keys) and what published memory tables count."""

_DIMENSION_LIMIT = 1 << 16


def storage_bytes(storage: str) -> int:
    """Bytes per channel of a key and its value together. Raises BudgetError for an unknown storage type."""
    if storage not in STORAGE_BYTES:
        raise BudgetError(f"unknown storage type {storage!r}; known: {', '.join(STORAGE_BYTES)}")
    return sum(STORAGE_BYTES[storage])


@dataclass(frozen=True)
class CacheGeometry:
    """Layers, heads and head size of a model, with the schedule it runs: all that a cache's size depends on."""

    layers: int
    heads: int
    head_dim: int
    schedule: ScaleSchedule

    def __post_init__(self) -> None:
        for name in ("layers", "heads", "head_dim"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= _DIMENSION_LIMIT:
                raise PlanError(f"{name} is {value!r}; it must be a whole number from 1 to {_DIMENSION_LIMIT}")

    @cached_property
    def full_token_heads(self) -> int:
        """N*L*H: what the full cache holds (every scale but the last)."""
        return self.schedule.cached_tokens * self.layers * self.heads

    def token_head_bytes(self, rows: int = 1, storage: str = "bfloat16") -> int:
        """Bytes of one token-head over all rows (guidance doubles the rows)."""
        if rows < 1:
            raise BudgetError(f"rows is {rows}; a cache has at least 1 row")
        return self.head_dim * storage_bytes(storage) * rows

    def bytes(self, token_heads: int, rows: int = 1, storage: str = "bfloat16") -> int:
        return token_heads * self.token_head_bytes(rows, storage)

    def full_bytes(self, rows: int = 1, storage: str = "bfloat16") -> int:
        return self.bytes(self.full_token_heads, rows, storage)


_UNITS = {
    "b": 1,
    "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
    "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40,
}  # fmt: skip
_BUDGET = re.compile(r"\s*([0-9]*\.?[0-9]+(?:[eE][+-]?[0-9]{1,3})?)\s*([a-zA-Z%]*)\s*")
_HOW = "write it as 10%, 0.1, 600MiB, 2GB or 650tokens"


@dataclass(frozen=True)
class Budget:
    """How much of the cache may be held at any moment: a share, mean tokens per head, or bytes; or `auto`, what a
    policy chooses by the fidelity it is asked for.

    `amount` is exact, so that a budget written as 0.1 means one tenth and not the nearest float.
    """

    kind: Literal["share", "tokens", "bytes", "auto"]
    amount: Fraction

    def __post_init__(self) -> None:
        if self.kind not in ("share", "tokens", "bytes", "auto"):
            raise BudgetError(f"unknown kind of budget {self.kind!r}; {_HOW}")
        if self.amount <= 0:
            raise BudgetError(f"budget {self} is not above zero; {_HOW}")
        if self.kind == "share" and self.amount > 1:
            raise BudgetError(f"budget {self} is above 100 %, the full cache; {_HOW}")

    @classmethod
    def parse(cls, text: str | float | Fraction | Budget) -> Budget:
        """Read `10%`, `0.1`, `600MiB`, `2GB`, `650tokens`; a bare number is a share. Raises BudgetError."""
        if isinstance(text, Budget):
            return text
        if isinstance(text, Fraction):
            return cls("share", text)
        if str(text).strip().lower() == "auto":
            return cls("auto", Fraction(1))
        match = _BUDGET.fullmatch(str(text))
        if match is None:
            raise BudgetError(f"cannot read the budget {text!r}; {_HOW}")
        try:
            number = Fraction(Decimal(match[1]))
        except (InvalidOperation, ValueError, OverflowError) as error:
            raise BudgetError(f"cannot read the budget {text!r}; {_HOW}") from error
        unit = match[2].lower()
        if unit == "":
            if number > 1:
                hint = f"did you mean {text}%? Otherwise {_HOW}" if number <= 100 else _HOW
                raise BudgetError(f"budget {text} is above 1, the full cache; {hint}")
            return cls("share", number)
        if unit == "%":
            return cls("share", number / 100)
        if unit in ("token", "tokens"):
            return cls("tokens", number)
        if unit in _UNITS:
            return cls("bytes", number * _UNITS[unit])
        raise BudgetError(f"budget {text!r} has the unknown unit {match[2]!r}; {_HOW}")

    def share(self, geometry: CacheGeometry, rows: int = 1, storage: str = "bfloat16") -> Fraction:
        """b, the exact share of the full cache. Raises BudgetError when it is above the full cache."""
        if self.kind == "share":
            return self.amount
        if self.kind == "auto":
            raise BudgetError(
                "budget auto is for policies that choose it by a predicted KL, such as heatkv-mr with cost=fisher and "
                f"max_kl; otherwise {_HOW}"
            )
        if self.kind == "tokens":
            share = self.amount / geometry.schedule.cached_tokens
            limit = f"{geometry.schedule.cached_tokens} tokens per head"
        else:
            share = self.amount / geometry.full_bytes(rows, storage)
            limit = f"{geometry.full_bytes(rows, storage)} bytes with {rows} rows in {storage}"
        if share > 1:
            raise BudgetError(f"budget {self} is above the full cache of {limit}; use 100% to keep everything")
        return share

    def token_heads(self, geometry: CacheGeometry, rows: int = 1, storage: str = "bfloat16") -> int:
        """floor(b*N*L*H), the most token-heads that may be live at any checkpoint."""
        return math.floor(self.share(geometry, rows, storage) * geometry.full_token_heads)

    def __str__(self) -> str:
        if self.kind == "auto":
            return "auto"
        if self.kind == "share":
            return f"{_number(self.amount * 100, 6)}%"
        if self.kind == "tokens":
            return f"{_number(self.amount, 6)}tokens"
        return f"{_number(self.amount, 15)}B"


def _number(amount: Fraction, digits: int) -> str:
    try:
        return f"{float(amount):.{digits}g}"
    except OverflowError:  # an impossible budget must still be printed in its error
        return f"{Decimal(amount.numerator) / amount.denominator:.{digits}g}"
