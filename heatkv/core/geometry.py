"""The size of a cache: geometry in token-heads and bytes, and the budgets people state.

A token-head is the key and the value of one token in one head of one layer, for every row alike.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from functools import cached_property
from typing import Literal

from heatkv.core.checks import of_kind, shown, whole, written_out
from heatkv.core.schedule import ScaleSchedule
from heatkv.errors import BudgetError, PlanError

STORAGE_BYTES: dict[str, tuple[int, int]] = {
    "float32": (4, 4),
    "bfloat16": (2, 2),
    "float16": (2, 2),
    "float32-key-bfloat16-value": (4, 2),
}
"""Bytes per channel of a key and of a value, by storage type. The last entry is what public code holds under
autocast (normalisation returns fp32 keys) and what published memory tables count."""

CODED_BYTES = {"int8": 1, "fp8": 1}
"""Bytes per channel of a key or a value that is held as codes, by how it is coded."""

SCALE_BYTES = 2
"""Of the bfloat16 scale that every coded key, and every coded value, of one token, head and row has."""

UNCODED_SCALES = 2
"""The first scales, which are held in the compute type whatever the storage: few tokens that all others look at."""

_DIMENSION_LIMIT = 1 << 16

_MOST_TOKEN_HEADS = 1 << 56
"""Of all scales of a model: sums of these, and their bytes for any number of rows in use, stay whole in 64 bits."""


@dataclass(frozen=True)
class StorageType:
    """How keys and values are held: in the compute type, or coded in 8 bits but for the first `UNCODED_SCALES`.

    Its name is that of the compute type, one of STORAGE_BYTES, behind a coding, one of CODED_BYTES, and a slash where
    there is one: `bfloat16`, `int8/bfloat16`.
    """

    compute: str
    coding: str | None = None

    @classmethod
    def parse(cls, name: str) -> StorageType:
        """Raises BudgetError for an unknown name."""
        coding, slash, compute = name.rpartition("/") if isinstance(name, str) else ("", "", "")
        if compute not in STORAGE_BYTES or (slash and coding not in CODED_BYTES):
            raise BudgetError(
                f"unknown storage type {shown(name)}; known: {', '.join(STORAGE_BYTES)}, and "
                f"{', '.join(f'{coding}/...' for coding in CODED_BYTES)} with one of them"
            )
        return cls(compute, coding or None)

    def __str__(self) -> str:
        return self.compute if self.coding is None else f"{self.coding}/{self.compute}"

    @property
    def compute_bytes(self) -> int:
        """Bytes per channel of a key and its value together in the compute type."""
        return sum(STORAGE_BYTES[self.compute])

    def token_head_bytes(self, head_dim: int) -> tuple[int, int]:
        """Bytes of one token-head and row: of the uncoded scales, and of all others.

        Raises BudgetError when coding would not make them smaller.
        """
        uncoded = head_dim * self.compute_bytes
        if self.coding is None:
            return uncoded, uncoded
        coded = 2 * (head_dim * CODED_BYTES[self.coding] + SCALE_BYTES)
        if coded >= uncoded:
            raise BudgetError(
                f"in {self.coding} a token-head of {head_dim} channels takes {coded} bytes with its scales, no less "
                f"than the {uncoded} in {self.compute}; use {self.compute}"
            )
        return uncoded, coded


@dataclass(frozen=True)
class CacheGeometry:
    """Layers, heads and head size of a model, with the schedule it runs: all that a cache's size depends on.

    `head_dim` is in channels. Raises PlanError for what is no whole number from 1 to 65536, no ScaleSchedule, or more
    token-heads than can be counted.
    """

    layers: int
    heads: int
    head_dim: int
    schedule: ScaleSchedule

    def __post_init__(self) -> None:
        for name in ("layers", "heads", "head_dim"):
            value = whole(getattr(self, name), name, PlanError, 1, _DIMENSION_LIMIT)
            object.__setattr__(self, name, value)
        of_kind(self.schedule, ScaleSchedule, "schedule", PlanError, "make one with ScaleSchedule.of([[h, w], ...])")
        token_heads = self.schedule.total_tokens * self.layers * self.heads
        if token_heads > _MOST_TOKEN_HEADS:
            raise PlanError(
                f"{self.layers} layers x {self.heads} heads of {self.schedule.total_tokens} tokens are {token_heads} "
                f"token-heads; at most {_MOST_TOKEN_HEADS} can be counted"
            )

    @cached_property
    def full_token_heads(self) -> int:
        """N*L*H: what the full cache holds (every scale but the last)."""
        return self.schedule.cached_tokens * self.layers * self.heads

    def token_head_bytes(self, rows: int = 1, storage: str = "bfloat16") -> tuple[int, int]:
        """Bytes of one token-head over all rows (guidance doubles the rows): of the uncoded scales, and of all others.

        They only differ for a coded storage type. Raises BudgetError.
        """
        rows = whole(rows, "rows", BudgetError, 1)
        uncoded, others = StorageType.parse(storage).token_head_bytes(self.head_dim)
        return uncoded * rows, others * rows

    def uncoded_token_heads(self, uncoded_scales: int = UNCODED_SCALES) -> int:
        """Token-heads of so many of the first scales, as many as a full cache holds."""
        tokens = sum(self.schedule.tokens[: min(uncoded_scales, len(self.schedule) - 1)])
        return tokens * self.layers * self.heads

    def bytes(
        self, token_heads: int, rows: int = 1, storage: str = "bfloat16", uncoded_scales: int = UNCODED_SCALES
    ) -> int:
        """The most bytes that so many token-heads take over all rows: those of the uncoded scales are among them.

        Raises BudgetError.
        """
        uncoded, others = self.token_head_bytes(rows, storage)
        first = min(whole(token_heads, "token_heads", BudgetError, 0), self.uncoded_token_heads(uncoded_scales))
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
