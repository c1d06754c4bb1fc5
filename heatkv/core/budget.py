"""The budgets people state: how much of the cache may be held at any moment."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, replace
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from typing import Literal

from heatkv.core.geometry import CacheGeometry
from heatkv.core.schema import of_kind, shown, written_out
from heatkv.core.storage_type import UNCODED_SCALES
from heatkv.errors import BudgetError

_UNITS = {
    "b": 1,
    "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
    "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40,
}  # fmt: skip
_BUDGET = re.compile(r"\s*([0-9]*\.?[0-9]+(?:[eE][+-]?[0-9]{1,3})?)\s*([a-zA-Z%]*)\s*")
_LONGEST_BUDGET = 100
_HOW = "write it as 10%, 0.1, 600MiB, 2GB or 650tokens"


@dataclass(frozen=True)
class Budget:
    """How much of the cache may be held at any moment: a share, mean tokens per head, or bytes; or `auto`, what a
    policy chooses by the fidelity it is asked for.

    `amount` is exact, so that a budget written as 0.1 means one tenth and not the nearest float: a share of 1, tokens
    per head or bytes. `name` is what messages call it; other limits are written alike. Raises BudgetError for another
    kind, or an amount that is not above zero or above the full cache.
    """

    kind: Literal["share", "tokens", "bytes", "auto"]
    amount: Fraction
    name: str = field(default="budget", compare=False)

    def __post_init__(self) -> None:
        if self.kind not in ("share", "tokens", "bytes", "auto"):
            raise BudgetError(f"unknown kind of budget {shown(self.kind)}; known: share, tokens, bytes, auto")
        if isinstance(self.amount, bool) or not isinstance(self.amount, int | Fraction):
            raise BudgetError(f"amount is {shown(self.amount)}; give a Fraction, or use Budget.parse and {_HOW}")
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
        if isinstance(text, str) and text.strip().lower() == "auto":
            return cls("auto", Fraction(1), name)
        written = text if isinstance(text, str) else written_out(text)
        # the pattern tries a long row of digits at every length
        match = _BUDGET.fullmatch(written) if len(written) <= _LONGEST_BUDGET else None
        if match is None:
            raise BudgetError(f"cannot read the {name} {shown(text)}; {_HOW}")
        try:
            number = Fraction(Decimal(match[1]))
        except (InvalidOperation, ValueError, OverflowError) as error:
            raise BudgetError(f"cannot read the {name} {shown(text)}; {_HOW}") from error
        unit = match[2].lower()
        if unit == "":
            if number > 1:
                hint = f"did you mean {match[1]}%? Otherwise {_HOW}" if number <= 100 else _HOW
                raise BudgetError(f"{name} {match[1]} is above 1, the full cache; {hint}")
            return cls("share", number, name)
        if unit == "%":
            return cls("share", number / 100, name)
        if unit in ("token", "tokens"):
            return cls("tokens", number, name)
        if unit in _UNITS:
            return cls("bytes", number * _UNITS[unit], name)
        raise BudgetError(f"{name} {text!r} has the unknown unit {match[2]!r}; {_HOW}")

    @classmethod
    def size_in_bytes(cls, text: str | float | Budget) -> int | None:
        """Whole bytes of a size with its unit, such as 24GiB; None for anything else."""
        try:
            size = cls.parse(text)
        except BudgetError:
            return None
        return math.floor(size.amount) if size.kind == "bytes" else None

    def part(self, share: Fraction) -> Budget:
        """The same budget for this share of the heads: bytes are divided, all others are relative to heads."""
        return replace(self, amount=self.amount * share) if self.kind == "bytes" else self

    def share(
        self,
        geometry: CacheGeometry,
        rows: int = 1,
        storage: str = "bfloat16",
        uncoded_scales: int = UNCODED_SCALES,
    ) -> Fraction:
        """b, the exact share of the full cache. Raises BudgetError when it is above the full cache."""
        of_kind(geometry, CacheGeometry, "geometry", BudgetError, "give the CacheGeometry of a model: model.geometry")
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
            held = geometry.token_heads_within(self.amount, rows, storage, uncoded_scales)
            share, full = held / geometry.full_token_heads, geometry.full_token_heads
            limit = f"{geometry.bytes(full, rows, storage, uncoded_scales)} bytes with {rows} rows in {storage}"
        if share > 1:
            raise BudgetError(f"{self.name} {self} is above the full cache of {limit}; use 100% to keep everything")
        return share

    def token_heads(
        self,
        geometry: CacheGeometry,
        rows: int = 1,
        storage: str = "bfloat16",
        uncoded_scales: int = UNCODED_SCALES,
    ) -> int:
        """floor(b*N*L*H), the most token-heads that may be live at any checkpoint."""
        return math.floor(self.share(geometry, rows, storage, uncoded_scales) * geometry.full_token_heads)

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
