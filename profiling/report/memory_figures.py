"""The figures of measured memory by their ledgers: where a row of results has each, and what a table calls it.

docs/memory.md tells what they are; `heatkv.profiling.measure.memory` measures them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Path = tuple[str, ...]

PHASES = {"opened": "opening", "drawing": "drawing", "decode": "decode"}
"""The phases of Phases, and what a reader calls them."""


@dataclass(frozen=True)
class MemoryFigure:
    """Bytes under `path` in the field `memory`: `ledger` counts them, `name` is what it counts.

    `field` is the row's own, where it has the figure without any measurement.
    """

    ledger: str
    name: str
    path: Path
    field: str = ""

    @property
    def title(self) -> str:
        """A heading that says whose figure it is and in what unit."""
        return f"{self.ledger}: {self.name}, MiB"


def _allocator() -> list[MemoryFigure]:
    told = [MemoryFigure("allocator, allocated", "before opening", ("allocator", "weights_bytes"))]
    for kind in ("requested", "allocated", "reserved"):
        ledger, of_kind = f"allocator, {kind}", f"{kind}_bytes"
        told.append(MemoryFigure(ledger, "loading", ("allocator", "loading", of_kind)))
        told += [MemoryFigure(ledger, name, ("allocator", "peaks", phase, of_kind)) for phase, name in PHASES.items()]
        told.append(MemoryFigure(ledger, "with CUDA graphs", ("graphs", "peaks", of_kind)))
    return told


PLANNED = (
    MemoryFigure("plan", "budget", ("planned", "budget_bytes"), "budget_bytes"),
    MemoryFigure("plan", "cache", ("planned", "cache_bytes"), "planned_bytes"),
)
ARENA = (
    MemoryFigure("arena", "cache", ("arena", "cache_bytes"), "allocated_bytes"),
    MemoryFigure("arena", "index tables", ("arena", "index_bytes"), "index_bytes"),
    MemoryFigure("arena", "workspace", ("arena", "workspace_bytes"), "workspace_bytes"),
)
DEVICE = (
    MemoryFigure("model", "weights", ("weights_bytes",)),
    *(MemoryFigure("tensors", name, ("tensors", "peak_bytes", phase)) for phase, name in PHASES.items()),
    MemoryFigure("tensors", "arena among them", ("tensors", "arena_bytes")),
    *_allocator(),
    MemoryFigure("allocator, reserved", "pool of CUDA graphs", ("graphs", "pool_bytes"), "graph_pool_bytes"),
    MemoryFigure("NVML", "process", ("driver", "process_bytes")),
    MemoryFigure("NVML", "device, used by all", ("driver", "used_bytes")),
    MemoryFigure("NVML", "device, kept by the driver", ("driver", "reserved_bytes")),
    MemoryFigure("NVML", "device, free", ("driver", "free_bytes")),
    MemoryFigure("NVML", "device, in all", ("driver", "total_bytes")),
    MemoryFigure("resident", "before loading", ("host", "before_bytes")),
    MemoryFigure("resident", "peak of loading", ("host", "loading_peak_bytes")),
    MemoryFigure("resident", "after loading", ("host", "loaded_bytes")),
    *(MemoryFigure("resident", f"peak of {name}", ("host", "peak_bytes", phase)) for phase, name in PHASES.items()),
    MemoryFigure("resident", "largest peak", ("host", "most_bytes")),
)
FIGURES = (*PLANNED, *ARENA, *DEVICE)
TEXTS: tuple[tuple[str, Path], ...] = (
    ("process of its own", ("process",)),
    ("resident as told by", ("host", "source")),
    ("no graphs because", ("graphs", "reason")),
)
"""What is told beside the figures, by the heading of its column."""


def in_memory(memory: Mapping[str, Any] | None, path: Sequence[str]) -> Any:
    """What the field `memory` has under a path; None where it, or a part on the way, is null or missing."""
    found: Any = memory
    for name in path:
        found = found.get(name) if isinstance(found, Mapping) else None
    return found


def unplaced(memory: Mapping[str, Any], at: Path = ()) -> dict[str, Any]:
    """What of `memory` is no figure and no text of ours, and no null in the place of some."""
    places = (*(figure.path for figure in FIGURES), *(path for _, path in TEXTS), ("steps",))
    found: dict[str, Any] = {}
    for name, value in memory.items():
        path = (*at, name)
        if isinstance(value, Mapping):
            found |= {name: inner} if (inner := unplaced(value, path)) else {}
        elif not any(path == place[: len(path)] for place in places):
            found[name] = value
    return found


def unexplained(memory: Mapping[str, Any] | None) -> dict[str, float]:
    """Bytes that the parts of a step leave over, by step, from one ledger to the next; below 0 they are more than the
    step."""
    found = {}
    for place, step in enumerate((memory or {}).get("steps") or []):
        if (rest := step["parts"].get("unexplained")) is not None:
            named = f"{step.get('source') or f'ledger {place + 1}'} to {step.get('target') or f'ledger {place + 2}'}"
            found[named] = rest
    return found
