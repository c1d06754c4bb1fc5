"""The ledgers of measured memory, as the field `memory` of a row of results holds them (docs/memory.md).

`requested`, `allocated` and `reserved` are those of torch's CUDA allocator: asked for; given out, rounded up; and kept
from the driver, given out or not. None is what could not be measured.
"""

from __future__ import annotations

from typing import Annotated, Any, Generic, Literal, TypeVar

from msgspec import Meta, Struct

T = TypeVar("T")
ByteCount = Annotated[int, Meta(ge=0, le=2**60)]
Difference = Annotated[int, Meta(ge=-(2**60), le=2**60)]

PHASES = {"opened": "opening", "drawing": "drawing", "decode": "decode"}
"""The fields of Phases, and what a reader calls them."""
UNEXPLAINED = "unexplained"


class PlannedMemory(Struct, frozen=True, kw_only=True):
    """The plan's peak, and what it may be at most."""

    cache_bytes: ByteCount
    budget_bytes: ByteCount


class ArenaMemory(Struct, frozen=True, kw_only=True):
    """Real storage: of all that is cached with the scales of 8-bit codes, of the tables that say what is where, and of
    what attention gathers into."""

    cache_bytes: ByteCount
    index_bytes: ByteCount
    workspace_bytes: ByteCount


class Phases(Struct, Generic[T], frozen=True):
    """A figure of opening the cache, of drawing all scales, and of decoding them to pictures; each starts anew."""

    opened: T
    drawing: T
    decode: T

    @property
    def each(self) -> tuple[T, T, T]:
        return self.opened, self.drawing, self.decode


class TensorMemory(Struct, frozen=True, kw_only=True):
    """Most bytes of tensors alive at once on the model's device, without the model's own; `arena_bytes` of them are the
    arena's. Memory that a library takes inside of an operation is not seen."""

    peak_bytes: Phases[ByteCount]
    arena_bytes: ByteCount


class HostMemory(Struct, frozen=True, kw_only=True):
    """Resident memory of the process: Python, libraries, weights, and pages that were touched; `source` was read.

    What loading took is None in a process that has done other things, `peak_bytes` where the system cannot start a peak
    anew: `most_bytes` is then that of the whole process.
    """

    source: str
    before_bytes: ByteCount | None = None
    loading_peak_bytes: ByteCount | None = None
    loaded_bytes: ByteCount | None = None
    peak_bytes: Phases[ByteCount] | None = None
    most_bytes: ByteCount


class AllocatorPeaks(Struct, frozen=True, kw_only=True):
    """Most bytes at once by torch's CUDA allocator."""

    requested_bytes: ByteCount
    allocated_bytes: ByteCount
    reserved_bytes: ByteCount


class AllocatorMemory(Struct, frozen=True, kw_only=True):
    """The allocator's peaks while the model was loaded (None in a process that has done other things) and in every
    phase, weights included. `weights_bytes`: allocated before the cache was opened."""

    weights_bytes: ByteCount
    loading: AllocatorPeaks | None = None
    peaks: Phases[AllocatorPeaks]


class GraphMemory(Struct, frozen=True, kw_only=True):
    """Drawing with CUDA graphs: what their private pool has reserved, which is part of what the allocator has reserved,
    and the allocator's peaks; or for which `reason` there are no graphs."""

    pool_bytes: ByteCount | None = None
    peaks: AllocatorPeaks | None = None
    reason: str | None = None


class DriverMemory(Struct, frozen=True, kw_only=True):
    """NVML after drawing: what this process has, its CUDA context included; and of the whole device how much there is,
    the driver keeps to itself, all processes use (without what the driver keeps), and is free."""

    process_bytes: ByteCount | None = None
    total_bytes: ByteCount | None = None
    reserved_bytes: ByteCount | None = None
    used_bytes: ByteCount | None = None
    free_bytes: ByteCount | None = None


class Step(Struct, frozen=True):
    """From one figure to the next: `parts` are what the second holds beside the first, and add up to the difference.
    What nothing accounts for is called `unexplained`."""

    source: str
    source_bytes: ByteCount
    target: str
    target_bytes: ByteCount
    parts: dict[str, Difference]


class Ledgers(Struct, frozen=True, kw_only=True):
    """All that was measured of one plan. `process`: `own`, or `shared` with other work, which colours the figures."""

    process: Literal["own", "shared"]
    weights_bytes: ByteCount
    planned: PlannedMemory
    arena: ArenaMemory
    tensors: TensorMemory
    host: HostMemory | None = None
    allocator: AllocatorMemory | None = None
    graphs: GraphMemory | None = None
    driver: DriverMemory | None = None
    steps: tuple[Step, ...] = ()


def figure_at(holder: Any, path: str) -> Any:
    """What is under a path of attributes, keys and places, such as "latency_ms.scales.0"; None where a part is None."""
    for name in path.split("."):
        if isinstance(holder, dict):
            holder = holder.get(name)
        elif isinstance(holder, tuple):
            holder = holder[int(name)] if int(name) < len(holder) else None
        elif holder is not None:
            holder = getattr(holder, name)
    return holder
