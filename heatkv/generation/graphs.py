"""Running the steps of generation again and again: as Python, or recorded once and replayed, as CUDA graphs are.

A step takes no arguments and returns nothing: it reads and writes tensors that lie at the same addresses for every
image. Whatever else it makes is gone after it.
"""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Literal, Protocol

import torch

from heatkv.errors import GraphError
from heatkv.models.sampling import Settings

Step = Callable[[], None]


@dataclass(frozen=True)
class StepKey:
    """Names a step: all of a scale, or what comes before or after a choice that is made between two steps, for the
    images from `first` on.

    `observed` says whether the logits are kept, `sampler` and `settings` how a whole step chooses.
    """

    scale: int
    part: Literal["all", "logits", "accept"]
    observed: bool = False
    sampler: type | None = None
    settings: Settings | None = None
    first: int = 0

    def __str__(self) -> str:
        images = f", images from {self.first}" if self.first else ""
        return f"scale {self.scale}" + (f" ({self.part})" if self.part != "all" else "") + images


class StepRunner(Protocol):
    """Runs steps; `replays` says whether it does so without running their Python again."""

    replays: bool

    def run(self, key: Hashable, step: Step) -> None:
        """Do what `step` does. Steps of one key are the same step of different images."""

    def forget(self) -> None:
        """Drop all recordings: addresses have changed, or an image was broken off between two steps."""

    def serve(self, owner: object) -> None:
        """Expect the steps of this owner; recordings of another's, which lie at its addresses, are dropped."""


class EagerRunner:
    """Calls every step."""

    replays = False

    def run(self, key: Hashable, step: Step) -> None:
        del key
        step()

    def forget(self) -> None:
        pass

    def serve(self, owner: object) -> None:
        pass


class GraphRunner(ABC):
    """Calls a step the first time its key is seen, records it the second time, and replays it from then on.

    Recording runs the step's Python, so that counters in Python go on, but none of its operations; a replay follows at
    once.
    """

    replays = True

    def __init__(self) -> None:
        self._warm: set[Hashable] = set()
        self._recorded: dict[Hashable, Step] = {}
        self._owner: Callable[[], object] = lambda: None

    @property
    def graphs(self) -> int:
        """How many steps are recorded."""
        return len(self._recorded)

    @property
    def pool_bytes(self) -> int | None:
        """Bytes that the recordings' memory pool has reserved on the device; None where they are not known."""
        return None

    def run(self, key: Hashable, step: Step) -> None:
        """Do what `step` does. Raises GraphError when it cannot be recorded."""
        if key not in self._warm:
            self._warm_up(step)
            self._warm.add(key)
            return
        if key not in self._recorded:
            self._recorded[key] = self._record_named(key, step)
        self._recorded[key]()

    def _record_named(self, key: Hashable, step: Step) -> Step:
        failed: BaseException | None = None  # what the step raised: ending a broken recording raises once more

        def watched() -> None:
            nonlocal failed
            try:
                step()
            except BaseException as error:
                failed = error
                raise

        try:
            return self._record(watched)
        except BaseException as error:
            reason = failed or error
            if not isinstance(reason, Exception):
                raise reason from None
            raise GraphError(
                f"{key} cannot be recorded as a graph: {type(reason).__name__}: {reason}; draw without graphs, or "
                "leave out of it what waits for the device"
            ) from reason

    def forget(self) -> None:
        self._warm.clear()
        self._recorded.clear()

    def serve(self, owner: object) -> None:
        if self._owner() is not owner:
            self.forget()
            self._owner = weakref.ref(owner)

    @abstractmethod
    def _warm_up(self, step: Step) -> None:
        """Call the step, so that everything made on first use is there."""

    @abstractmethod
    def _record(self, step: Step) -> Step:
        """Run the step's Python, and return what does its operations."""


def check_has_graphs(device: torch.device) -> None:
    """Raise GraphError for a device without CUDA graphs."""
    if device.type != "cuda":
        raise GraphError(f"CUDA graphs need a CUDA device; the model is on {device}: draw without graphs")


class CUDAGraphRunner(GraphRunner):
    """Records steps as CUDA graphs that share one memory pool. Raises GraphError for a device that has none."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        check_has_graphs(device)
        self._device = device
        # warm-up and recording share a stream, so that libraries have their workspaces before any recording
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    @property
    def pool_bytes(self) -> int | None:
        try:
            segments = torch.cuda.memory_snapshot()
            return sum(int(s["total_size"]) for s in segments if tuple(s["segment_pool_id"]) == tuple(self._pool))
        except (KeyError, TypeError, RuntimeError):  # other allocators have no such snapshot
            return None

    def run(self, key: Hashable, step: Step) -> None:
        with torch.cuda.device(self._device):
            super().run(key, step)

    def forget(self) -> None:
        super().forget()
        self._pool = torch.cuda.graph_pool_handle()

    def _warm_up(self, step: Step) -> None:
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            step()
        current.wait_stream(self._stream)

    def _record(self, step: Step) -> Step:
        graph = torch.cuda.CUDAGraph()
        # the outer block restores the current stream even where ending a broken recording raises
        with torch.cuda.stream(self._stream), torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            step()
        return graph.replay
