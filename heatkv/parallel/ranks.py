"""The processes that torch's launcher starts for one command: which of them this one is, and how they share work.

torchrun tells every process its rank, their number, its number on its host, and where the first one listens (RANK,
WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT). A process that was not launched so is a team of one, for which
everything here does nothing, and torch.distributed is not imported. All ranks make the same calls in the same order.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from heatkv.errors import RanksError

if TYPE_CHECKING:
    from torch.distributed import Work

Item = TypeVar("Item")

JOINING = timedelta(minutes=10)
"""For all ranks to be there; models are loaded later."""
_LONGEST = timedelta(days=7)  # rank 0 may measure times for hours while the others wait; a rank that ends is noticed
_LOOK_SECONDS, _LONG_LOOK_SECONDS = 0.005, 0.2  # first, and where others measure times, which must not be disturbed


class Ranks:
    """A team of one, and what a team of several offers."""

    rank = 0
    size = 1
    local_rank = 0

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}
        self._names = 0
        self.while_waiting: Callable[[], object] | None = None

    @property
    def first(self) -> bool:
        """Whether this is the rank that speaks to the user, measures time and writes what is finished."""
        return self.rank == 0

    def device(self, name: str) -> str:
        """The device of this rank: for `cuda` the GPU with its number on the host. Raises RanksError for one GPU."""
        return name

    def wait(self) -> None:
        """Until all ranks have come here. Raises RanksError when one of them has ended."""

    def gather(self, value: Any) -> list[Any]:
        """The value of every rank, at every rank. Raises RanksError when one of them has ended."""
        return [value]

    def share(self, payload: bytes | None, source: int) -> bytes:
        """The payload of rank `source`, at every rank. Raises RanksError when one of them has ended."""
        assert payload is not None
        return payload

    def _count(self, name: str, more: int) -> int:
        self._counts[name] = self._counts.get(name, 0) + more
        return self._counts[name]

    def counter(self) -> Callable[[int], int]:
        """A new number that all ranks share, from 0 on: adds to it and returns the sum."""
        self._names += 1
        name = f"heatkv/count/{self._names}"
        return lambda more: self._count(name, more)

    def deal(self, items: Sequence[Item]) -> Iterator[Item]:
        """The items that fall to this rank: each goes to the one that asks first, in order."""
        asked = self.counter()
        while (index := asked(1) - 1) < len(items):
            yield items[index]

    def share_of(self, items: Sequence[Item], rank: int) -> Sequence[Item]:
        """Neighbouring items that fall to a rank when all get as many; for what is cheaper beside its neighbours."""
        return items[len(items) * rank // self.size : len(items) * (rank + 1) // self.size]

    def may_report(self) -> bool:
        """Whether this rank is the one to say why the command failed: one rank does."""
        return True

    def leave(self) -> None:
        """Part from the others, at the end of the command."""


class _Launched(Ranks):
    """One of several, which talk over gloo."""

    def __init__(self) -> None:
        import torch.distributed as dist
        from torch.distributed.rendezvous import rendezvous

        super().__init__()
        self._dist = dist
        try:
            self._store, self.rank, self.size = next(rendezvous("env://", timeout=JOINING))
            self.local_rank = int(os.environ["LOCAL_RANK"])
            dist.init_process_group("gloo", store=self._store, rank=self.rank, world_size=self.size, timeout=_LONGEST)
        except (RuntimeError, ValueError, KeyError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise RanksError(
                f"rank {os.environ.get('RANK')} of {os.environ['WORLD_SIZE']} cannot join the others: {reason}; start "
                "with torchrun, or unset WORLD_SIZE"
            ) from error

    def device(self, name: str) -> str:
        if not name.startswith("cuda"):
            return name
        import torch

        if name != "cuda":
            raise RanksError(f"{name} is one GPU, and {self.size} ranks each need one: name the device cuda")
        if torch.cuda.is_available() and self.local_rank >= torch.cuda.device_count():
            raise RanksError(
                f"rank {self.rank} is number {self.local_rank} on its host, which has {torch.cuda.device_count()} "
                "GPUs; start no more processes on a host than it has GPUs"
            )
        return f"cuda:{self.local_rank}"

    @contextmanager
    def _while_all_live(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise RanksError("another rank has ended; what was finished is kept") from error

    def _done(self, work: Work | None) -> None:
        """Look until it is done: a signal ends this, and would not end torch's own wait."""
        assert work is not None
        pause = _LOOK_SECONDS
        while not work.is_completed():
            if self.while_waiting is not None:
                self.while_waiting()
            time.sleep(pause)
            pause = min(2 * pause, _LONG_LOOK_SECONDS)
        work.wait()

    def wait(self) -> None:
        with self._while_all_live():
            self._done(self._dist.barrier(async_op=True))

    def gather(self, value: Any) -> list[Any]:
        self.wait()
        values = [None] * self.size
        with self._while_all_live():
            self._dist.all_gather_object(values, value)
        return values

    def share(self, payload: bytes | None, source: int) -> bytes:
        self.wait()
        payloads = [payload]
        with self._while_all_live():
            self._dist.broadcast_object_list(payloads, source)
        return super().share(payloads[0], source)

    def _count(self, name: str, more: int) -> int:
        with self._while_all_live():
            return int(self._store.add(name, more))

    def may_report(self) -> bool:
        try:
            return int(self._store.add("heatkv/reports", 1)) == 1
        except RuntimeError:
            return True

    def leave(self) -> None:
        self._dist.destroy_process_group()  # those who still wait for this one learn that it is gone


_current = Ranks()


def current() -> Ranks:
    """The team of this process: of one, until `join` found others."""
    return _current


def join() -> Ranks:
    """Become one of the ranks that were launched, when there are several; waits until all are there.

    Raises RanksError when the launcher's variables do not fit together, or the others cannot be reached.
    """
    global _current
    if os.environ.get("WORLD_SIZE", "1") != "1":
        _current = _Launched()
    return _current


def leave() -> None:
    """Be a team of one again."""
    global _current
    team, _current = _current, Ranks()
    team.leave()
