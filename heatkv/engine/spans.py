"""Named stretches of drawing: scales, layers and phases, for profilers and clocks.

The code that draws marks them with `span`, which does nothing unless somebody listens: torch's profiler, which sees
them as ranges, or whoever called `listening`. A CUDA graph that is replayed runs no Python: nothing in it is marked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

from torch.autograd import profiler
from torch.profiler import record_function

ATTENTION, FEED_FORWARD, CACHE_UPDATE = "attention", "feed-forward", "cache update"
SAMPLING, DECODE = "sampling", "decode"
PHASES = (ATTENTION, FEED_FORWARD, CACHE_UPDATE, SAMPLING, DECODE)
"""`attention` is what a cache does to answer queries, gathering included; projections are in none of them."""

Listener = Callable[[str], AbstractContextManager[Any]]

_listener: ContextVar[Listener | None] = ContextVar("heatkv_span_listener", default=None)
_SILENT = nullcontext()


def span(name: str) -> AbstractContextManager[Any]:
    """What marks the block under it as `name`."""
    listener = _listener.get()
    if listener is not None:
        return listener(name)
    if profiler._is_profiler_enabled:
        return record_function(name)
    return _SILENT


def scale_name(scale: int) -> str:
    """The span of a scale."""
    return f"scale {scale}"


def layer_name(layer: int) -> str:
    """The span of a layer within a scale."""
    return f"layer {layer}"


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Inside the block, in this thread, `listener(name)` gives the context manager of every span."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)
