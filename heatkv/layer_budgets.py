"""The per-layer budget files published with ScaleKV: how many past tokens every layer keeps for every late scale.

Such a file names a scale by its number from 1, `Scale 9` to `Scale 13` for the square 1M schedule, and of every scale
each layer's kind (`Block l`: 1 for the few layers with the large budget, 0 for the others), how many are large
(`High`), and the two budgets in tokens per head (`Max`, `Min`). `Limit`, which `Max` stays below, is not used.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from heatkv.core.geometry import CacheGeometry
from heatkv.core.io import read_json
from heatkv.core.schema import EqualByContents, shown
from heatkv.errors import FormatError, StatisticsError

_SCALE = re.compile(r"Scale ([1-9][0-9]{0,3})")
_MOST_TOKENS = 1 << 31


@dataclass(frozen=True, eq=False)
class LayerBudgets(EqualByContents):
    """Tokens of earlier scales that every head of a layer keeps while a target scale runs.

    `tokens[i, l]` and `large[i, l]` (whether layer l has the large budget) are of target scale `first_target + i`; the
    last row is the last target's. Targets before `first_target` keep everything.
    """

    first_target: int
    tokens: NDArray[np.int64]
    large: NDArray[np.bool_]

    def __post_init__(self) -> None:
        tokens, large = np.array(self.tokens, dtype=np.int64), np.array(self.large, dtype=bool)
        if tokens.ndim != 2 or 0 in tokens.shape or large.shape != tokens.shape:
            raise StatisticsError(f"budgets are (targets, layers); got {tokens.shape} and kinds {large.shape}")
        if self.first_target < 1 or (tokens < 0).any():
            raise StatisticsError("budgets are tokens, not below 0, of targets from scale 1 on")
        for name, array in (("tokens", tokens), ("large", large)):
            array.setflags(write=False)
            object.__setattr__(self, name, array)

    def __hash__(self) -> int:
        return hash((self.first_target, self.tokens.tobytes()))

    @classmethod
    def load(cls, path: str | Path, geometry: CacheGeometry) -> LayerBudgets:
        """Read a published file for a model of this geometry.

        Raises FormatError for what is no such file, StatisticsError when it is of other layers or another schedule.
        """
        return cls.from_json(read_json(path), geometry, path)

    @classmethod
    def from_json(cls, value: Any, geometry: CacheGeometry, source: str | Path) -> LayerBudgets:
        """Validate a parsed file; `source` names it in messages."""
        if not isinstance(value, dict) or not value:
            raise FormatError(f"{source} is no object of budgets by scale")
        numbers = [int(match[1]) if (match := _SCALE.fullmatch(name)) else None for name in value]
        first, scales = numbers[0], len(geometry.schedule)
        if first is None or numbers != list(range(first, first + len(numbers))):
            raise FormatError(f"{source} must hold 'Scale n' for consecutive n, not {shown(', '.join(value))}")
        last = first + len(numbers) - 1
        if first < 2 or last != scales:
            raise StatisticsError(
                f"{source} has budgets for scales {first} to {last}, counted from 1; the schedule's scales 2 to "
                f"{scales} read earlier ones, and the last must be told"
            )
        rows = [_row(entry, geometry.layers, f"{source}: {name}") for name, entry in value.items()]
        large = np.array([kinds for kinds, _, _ in rows])
        most, least = (np.array([row[i] for row in rows])[:, None] for i in (1, 2))
        return cls(first - 1, np.where(large, most, least), large)


def _row(entry: Any, layers: int, source: str) -> tuple[list[bool], int, int]:
    """Kind of every layer, and the large and the small budget."""
    if not isinstance(entry, dict):
        raise FormatError(f"{source} is no object")
    blocks = [name for name in entry if name.startswith("Block ")]
    unknown = set(entry) - set(blocks) - {"High", "Max", "Min", "Limit"}
    if unknown:
        raise FormatError(f"{source} holds {shown(min(unknown))}, which a published file does not")
    if set(blocks) != {f"Block {layer}" for layer in range(len(blocks))}:
        raise FormatError(f"{source} must number its layers 'Block 0', 'Block 1' and so on without a gap")
    if len(blocks) != layers:
        raise StatisticsError(f"{source} is of {len(blocks)} layers, the model has {layers}")
    kinds = [_whole(entry, f"Block {layer}", 1, source) for layer in range(layers)]
    high, most, least = (_whole(entry, name, _MOST_TOKENS, source) for name in ("High", "Max", "Min"))
    if high != sum(kinds):
        raise FormatError(f"{source} says High {high}, but {sum(kinds)} layers are marked 1")
    if least > most:
        raise FormatError(f"{source} says Min {least}, above Max {most}")
    return [kind == 1 for kind in kinds], most, least


def _whole(entry: Mapping[str, Any], name: str, most: int, source: str) -> int:
    value = entry.get(name)
    if type(value) is not int or not 0 <= value <= most:
        raise FormatError(f"{source}: {name!r} is {shown(value)}; it must be a whole number from 0 to {most}")
    return value
