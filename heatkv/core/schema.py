"""What every reader of files and arguments shares: schemas decoded by msgspec, arrays of a shape, numbers, names.

What is of the wrong kind is refused in one sentence, with the value, the limit and the way out.
"""

from __future__ import annotations

import difflib
import math
import operator
import reprlib
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from heatkv.errors import FormatError, HeatKVError

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]

T = TypeVar("T")

_LONGEST = 60


def convert(value: Any, kind: type[T], source: str | Path) -> T:
    """`value`, as JSON is parsed, as the msgspec type `kind`.

    Raises FormatError with the file `source`, the place in it, what stands there and what must.
    """
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        what, _, place = str(error).partition(" - at `$")
        place = place.strip("`.")
        raise FormatError(f"{source}: {place + ': ' if place else ''}{what[:1].lower()}{what[1:]}") from error


def are_other_weights(one: str, other: str) -> bool:
    """Whether two fingerprints are of different weights. They have parts, of transformer and decoder, of which an
    attached model shows the first only: what both tell is compared."""
    return any(mine != theirs for mine, theirs in zip(one.split("-"), other.split("-"), strict=False))


def suggest(name: str, known: Iterable[str]) -> str:
    """The end of a sentence about an unknown name: the closest one that is known, and all of them."""
    names = list(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
    return f"{f'; did you mean {near[0]!r}?' if near else '.'} Known: {', '.join(names)}"


def integer_array(value: Any, shape: tuple[int, ...], name: str, error: type[HeatKVError]) -> IntArray:
    """A read-only copy of whole numbers of this shape, from an array or nested lists. Raises `error` for others."""
    return fixed(_array(value, shape, name, error, "iu", "whole numbers").astype(np.int64))


def float_array(value: Any, shape: tuple[int, ...], name: str, error: type[HeatKVError]) -> FloatArray:
    """A read-only float64 copy of numbers of this shape, from an array or nested lists. Raises `error` for others."""
    return fixed(_array(value, shape, name, error, "iuf", "numbers").astype(np.float64))


def _array(
    value: Any, shape: tuple[int, ...], name: str, error: type[HeatKVError], kinds: str, what: str
) -> NDArray[Any]:
    try:
        array = np.asarray(value)
    except (ValueError, OverflowError):
        raise error(f"{name} is no regular array; it must be {what} of shape {shape}") from None
    if array.shape != shape or array.dtype.kind not in kinds:
        raise error(f"{name} is {array.dtype} of shape {array.shape}; it must be {what} of shape {shape}")
    return array


def fixed(array: NDArray[Any]) -> NDArray[Any]:
    """The array, which nobody can write to any more."""
    array.setflags(write=False)
    return array


_REPR = reprlib.Repr()
_REPR.maxlevel = 8
_REPR.maxtuple = _REPR.maxlist = _REPR.maxdict = _REPR.maxset = _REPR.maxfrozenset = _LONGEST
_REPR.maxother = _REPR.maxstring = _REPR.maxlong = 4 * _LONGEST


def shown(value: Any) -> str:
    """A value in one line, cut where it is long."""
    text = " ".join(_REPR.repr(value).split())
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."


def as_whole(value: Any) -> int | None:
    """An integer of Python, numpy or torch as an int; None for everything else, booleans and floats included."""
    try:
        return None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return None


def whole(value: Any, name: str, error: type[HeatKVError], least: int | None = None, most: int | None = None) -> int:
    """The value as an int from `least` to `most`, both included."""
    number = as_whole(value)
    if number is None or (least is not None and number < least) or (most is not None and number > most):
        raise error(f"{name} is {shown(value)}; it must be a whole number{_range(least, most)}")
    return number


LARGEST_SEED = 2**62
"""Seeds count modulo 2^64: two of them must not be the same."""


def seed_of(value: Any, error: type[HeatKVError]) -> int:
    """A seed, from -2^62 to 2^62."""
    return whole(value, "seed", error, -LARGEST_SEED, LARGEST_SEED)


def seed_after(seed: int, more: int = 1) -> int:
    """The seed so many after this one; the least comes after the largest."""
    return (seed + more + LARGEST_SEED) % (2 * LARGEST_SEED + 1) - LARGEST_SEED


def as_number(value: Any) -> float:
    """A number of Python, numpy or torch as a float; NaN for everything else, booleans and text included."""
    try:
        return math.nan if isinstance(value, bool | str | bytes) else float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def number(
    value: Any, name: str, error: type[HeatKVError], least: float | None = None, most: float | None = None
) -> float:
    """The value as a finite float from `least` to `most`, both included."""
    found = as_number(value)
    if not math.isfinite(found) or (least is not None and found < least) or (most is not None and found > most):
        raise error(f"{name} is {shown(value)}; it must be a finite number{_range(least, most)}")
    return found


def _range(least: float | None, most: float | None) -> str:
    if least is None:
        return "" if most is None else f" of at most {most}"
    return f" of at least {least}" if most is None else f" from {least} to {most}"


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
