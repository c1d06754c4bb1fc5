"""How keys and values are held: the names of the types, their bytes, and torch's types by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from heatkv.errors import BudgetError

if TYPE_CHECKING:
    import torch

DTYPES = ("float32", "bfloat16", "float16")
"""The compute types a model can be loaded in."""

STORAGE_BYTES: dict[str, tuple[int, int]] = {
    **{name: (size, size) for name, size in zip((*DTYPES, "float64"), (4, 2, 2, 8), strict=True)},
    "float32-key-bfloat16-value": (4, 2),
}
"""Bytes per channel of a key and of a value, by compute type. The last entry is what public code holds under
autocast (normalisation returns fp32 keys) and what published memory tables count."""

CODES = {"int8": "int8", "fp8": "float8_e4m3fn"}
"""The codes of one byte per channel, with torch's names of their types."""

SCALE_BYTES = 2
"""Of the bfloat16 scale that every coded key, and every coded value, of one token, head and row has."""

UNCODED_SCALES = 2
"""The first scales, which are held in the compute type whatever the storage: few tokens that all others look at."""


def torch_dtype(name: str) -> torch.dtype:
    """Torch's type of a compute type or a code: `torch.bfloat16` of "bfloat16", `torch.float8_e4m3fn` of "fp8"."""
    import torch

    dtype: torch.dtype = getattr(torch, CODES.get(name, name))
    return dtype


@dataclass(frozen=True)
class StorageType:
    """How keys and values are held: in the compute type, or coded in 8 bits but for the first `UNCODED_SCALES`.

    Its name is that of the compute type, one of STORAGE_BYTES, behind a code, one of CODES, and a slash where there is
    one: `bfloat16`, `int8/bfloat16`.
    """

    compute: str
    code: str | None = None

    @classmethod
    def parse(cls, name: str) -> StorageType:
        """Raises BudgetError for an unknown name."""
        code, slash, compute = name.rpartition("/")
        if compute not in STORAGE_BYTES or (slash and code not in CODES):
            raise BudgetError(
                f"unknown storage type {name!r}; known: {', '.join(STORAGE_BYTES)}, and "
                f"{', '.join(f'{code}/...' for code in CODES)} with one of them"
            )
        return cls(compute, code or None)

    @classmethod
    def for_dtype(cls, dtype: torch.dtype, code: str | None = None) -> StorageType:
        """The storage type of a model that computes in a type of torch's, with a code or without."""
        return cls(str(dtype).removeprefix("torch."), code)

    def __str__(self) -> str:
        return self.compute if self.code is None else f"{self.code}/{self.compute}"

    @property
    def compute_bytes(self) -> int:
        """Bytes per channel of a key and its value together in the compute type."""
        return sum(STORAGE_BYTES[self.compute])

    def token_head_bytes(self, head_dim: int) -> tuple[int, int]:
        """Bytes of one token-head and row: of the uncoded scales, and of all others.

        Raises BudgetError when coding would not make them smaller.
        """
        uncoded = head_dim * self.compute_bytes
        if self.code is None:
            return uncoded, uncoded
        coded = 2 * (head_dim + SCALE_BYTES)
        if coded >= uncoded:
            raise BudgetError(
                f"in {self.code} a token-head of {head_dim} channels takes {coded} bytes with its scales, no less "
                f"than the {uncoded} in {self.compute}; use {self.compute}"
            )
        return uncoded, coded
