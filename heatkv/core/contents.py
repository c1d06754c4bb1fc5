"""Equality of dataclasses that hold arrays."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np


class EqualByContents:
    """For dataclasses with eq=False: equal when of one class with equal fields, arrays exactly so.

    Such a class says itself what it hashes by, since arrays and mappings have no hash.
    """

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        return all(_same(getattr(self, f.name), getattr(other, f.name)) for f in fields(self))  # type: ignore[arg-type]


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, np.ndarray) or isinstance(other, np.ndarray):
        return np.array_equal(one, other)
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(_same(a, b) for a, b in zip(one, other, strict=True))
    return bool(one == other)
