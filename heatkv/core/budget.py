"""The budgets people state: how much of the cache may be held at any moment."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from decimal import Decimal
from fractions import Fraction
from typing import Literal

from heatkv.core.geometry import CacheGeometry
from heatkv.core.schema import shown
from heatkv.core.storage_type import UNCODED_SCALES
from heatkv.errors import BudgetError

_BYTES = {
    "b": 1,
    "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
    "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40,
}  # fmt: skip
_AMOUNT = re.compile(r"\s*([0-9]*\.?[0-9]+(?:[eE][+-]?[0-9]{1,2})?)\s*([a-zA-Z%]*)\s*")
_LONGEST = 100
"""Characters of an amount: the pattern tries a long row of digits at every length."""
_HOW = "write it as 10%, 0.1, 600MiB, 2GB or 650tokens"


def parse_amount(text: str) -> tuple[Fraction, str] | None:
    """The exact number of a text such as 600MiB or 10%, and its unit in lower case; None for any other text."""
    match = _AMOUNT.fullmatch(text) if len(text) <= _LONGEST else None
    return None if match is None else (Fraction(Decimal(match[1])), match[2].lower())


def parse_bytes(text: str) -> int | None:
    """Whole bytes of a size with its unit, such as 24GiB; None for any other text."""
    number, unit = parse_amount(text) or (Fraction(0), "")
    return math.floor(number * _BYTES[unit]) if unit in _BYTES else None


@dataclass(frozen=True)
class Budget:
    """How much of the cache may be held at any moment: a share, mean tokens per head, or bytes; or `auto`, what a
    policy chooses by the fidelity it is asked for.

    `amount` is exact, so that a budget written as 0.1 means one tenth and not the nearest float: a share of the
    full cache, tokens per head or bytes. `name` is what messages call it; other limits are written alike. Raises
    BudgetError for an amount that is not above zero or above the full cache.
    """

    kind: Literal["share", "tokens", "bytes", "auto"]
    amount: Fraction
    name: str = field(default="budget", compare=False)

    def __post_init__(self) -> None:
        if self.amount <= 0:
            raise BudgetError(f"{self.name} {self} is not above zero; {_HOW}")
        if self.kind == "share" and self.amount > 1:
            raise BudgetError(f"{self.name} {self} is above 100 %, the full cache; {_HOW}")

    @classmethod
    def parse(cls, text: str | float | Fraction | Budget, name: str = "budget") -> Budget:
        """Read `10%`, `0.1`, `600MiB`, `2GB`, `650tokens`; a bare number is a share. Raises BudgetError."""
        if isinstance(text, Budget):
            return text
        if isinstance(text, Fraction):
            return cls("share", text, name)
        if name == "budget" and str(text).strip().lower() == "auto":  # other limits cannot be
            return cls("auto", Fraction(1), name)
        amount = parse_amount(str(text))
        if amount is None:
            raise BudgetError(f"cannot read the {name} {shown(text)}; {_HOW}")
        number, unit = amount
        if unit == "" and number > 1:
            hint = f"did you mean {text}%? Otherwise {_HOW}" if number <= 100 else _HOW
            raise BudgetError(f"{name} {text} is above 1, the full cache; {hint}")
        if unit in ("", "%"):
            return cls("share", number / (100 if unit else 1), name)
        if unit in ("token", "tokens"):
            return cls("tokens", number, name)
        if unit in _BYTES:
            return cls("bytes", number * _BYTES[unit], name)
        raise BudgetError(f"{name} {text!r} has the unknown unit {unit!r}; {_HOW}")

    def share(
        self, geometry: CacheGeometry, rows: int = 1, storage: str = "bfloat16", uncoded_scales: int = UNCODED_SCALES
    ) -> Fraction:
        """b, the exact share of the full cache. Raises BudgetError when it is above the full cache."""
        if self.kind == "auto":
            raise BudgetError(f"budget auto is for policies that choose it by a predicted KL; {_HOW}")
        if self.kind == "share":
            return self.amount
        if self.kind == "tokens":
            share = self.amount / geometry.schedule.cached_tokens
            limit = f"{geometry.schedule.cached_tokens} tokens per head"
        else:
            full = geometry.full_token_heads
            share = geometry.token_heads_within(self.amount, rows, storage, uncoded_scales) / full
            limit = f"{geometry.bytes(full, rows, storage, uncoded_scales)} bytes with {rows} rows in {storage}"
        if share > 1:
            raise BudgetError(f"{self.name} {self} is above the full cache of {limit}; use 100% to keep everything")
        return share

    def token_heads(
        self, geometry: CacheGeometry, rows: int = 1, storage: str = "bfloat16", uncoded_scales: int = UNCODED_SCALES
    ) -> int:
        """floor(b*N*L*H), the most token-heads that may be live at any checkpoint."""
        return math.floor(self.share(geometry, rows, storage, uncoded_scales) * geometry.full_token_heads)

    def __str__(self) -> str:
        amount = float(self.amount)
        return {
            "share": f"{float(self.amount * 100):.6g}%", "tokens": f"{amount:.6g}tokens", "bytes": f"{amount:.15g}B",
            "auto": "auto",
        }[self.kind]  # fmt: skip
