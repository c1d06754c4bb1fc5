"""Where a long run reports what it does: nowhere by default, on the screen from the command line."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from heatkv.parallel.ranks import current


class Reporter:
    """Silent; a subclass shows lines and progress."""

    def say(self, text: str) -> None:
        """Take a line for the user."""

    def progress(self, what: str, total: int) -> AbstractContextManager[Callable[[int], object]]:
        """Take progress of `what` out of `total`; the callback takes how much more is done."""
        return nullcontext(lambda count: None)


SILENT = Reporter()


@contextmanager
def shared_progress(reporter: Reporter, what: str, total: int) -> Iterator[Callable[[int], object]]:
    """Progress of all ranks together, in one place: the first rank shows what all have done."""
    ranks, shown = current(), 0
    counter = ranks.counter()
    if not ranks.first:
        yield counter
        return
    with reporter.progress(what, total) as advance:

        def show(count: int) -> None:
            nonlocal shown
            done = counter(count)
            advance(done - shown)
            shown = done

        ranks.while_waiting = lambda: show(0)
        try:
            yield show
        finally:
            ranks.while_waiting = None
