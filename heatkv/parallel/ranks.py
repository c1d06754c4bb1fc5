"""The processes that torch's launcher starts for one command: which of them this one is, and how they share work.

torchrun tells every process its rank, their number, its number on its host, and where the first one listens (RANK,
WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT). Who was not launched so is a team of one, for which everything here
does nothing, and torch.distributed is not imported. All ranks make the same calls in the same order.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from heatkv.errors import RanksError

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup, Work

Item = TypeVar("Item")

JOINING_SECONDS = 600
"""For all ranks to be there; models are loaded later."""

_NEEDED = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_MOST_RANKS = 1_000_000
_LONGEST = timedelta(days=7)  # rank 0 may measure times for hours while the others wait; a rank that ends is noticed
_LOOK_SECONDS, _LONG_LOOK_SECONDS = 0.005, 0.2  # first, and where others measure times, which must not be disturbed
_TELL_SECONDS = 10.0  # of waiting for others, after which it is told
_CONNECT_SECONDS = 2.0
RESUME = "what was finished is kept, and the same command with --resume goes on"


_Tell = Callable[[str], object]


class Ranks:
    """A team of one, and what a team of several offers."""

    rank = 0
    size = 1
    local_rank = 0
    kept = RESUME
    """What is told of the work so far when another rank ends."""

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}
        self._names = 0
        self.while_waiting: Callable[[], object] | None = None

    @property
    def first(self) -> bool:
        """Whether this is the rank that tells the user, measures time and writes what is finished."""
        return self.rank == 0

    def device(self, name: str) -> str:
        """The device of this rank: of `cuda` the GPU with its number on the host. Raises RanksError for one GPU."""
        return name

    def use(self, device: torch.device) -> None:
        """Send by way of this device from now on."""

    def wait(self) -> None:
        """Until all ranks have come here. Raises RanksError when one of them has ended."""

    def share(self, payload: bytes | None, source: int) -> bytes:
        """What rank `source` gives, at every rank. Raises RanksError when one of them has ended."""
        assert payload is not None
        return payload

    def gather(self, value: Any) -> list[Any]:
        """What every rank gives, in JSON's types, at every rank."""
        return [json.loads(self.share(self._as_bytes(value, source), source)) for source in range(self.size)]

    def _as_bytes(self, value: Any, source: int) -> bytes | None:
        return json.dumps(value).encode() if source == self.rank else None

    def count(self, name: str, more: int) -> int:
        """Add to a number that all ranks have in common; the sum. Raises RanksError when it cannot be reached."""
        self._counts[name] = self._counts.get(name, 0) + more
        return self._counts[name]

    def counter(self) -> Callable[[int], int]:
        """A new number in common, from 0 on: adds to it and gives the sum."""
        self._names += 1
        name = f"heatkv/count/{self._names}"
        return lambda more: self.count(name, more)

    def deal(self, items: Sequence[Item]) -> Iterator[Item]:
        """The items that fall to this rank: each goes to the one that asks first, in order."""
        asked = self.counter()
        while (index := asked(1) - 1) < len(items):
            yield items[index]

    def share_of(self, items: Sequence[Item], rank: int) -> Sequence[Item]:
        """Neighbouring items that fall to a rank when all get as many; for what is cheaper beside its neighbours."""
        return items[len(items) * rank // self.size : len(items) * (rank + 1) // self.size]

    def may_tell(self, error: str) -> bool:
        """Whether this rank is the one to say that the command failed so: the same is said once."""
        return True

    def leave(self) -> None:
        """Part from the others, at the end of the command."""


class _Launched(Ranks):
    """One of several, joined through the launcher's store; they talk over gloo, on GPUs they send over NCCL."""

    def __init__(self, rank: int, size: int, local_rank: int, address: tuple[str, int], tell: _Tell) -> None:
        import torch.distributed as dist
        from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

        super().__init__()
        self.rank, self.size, self.local_rank = rank, size, local_rank
        self._dist, self._address = dist, address
        self._sending: tuple[torch.device, ProcessGroup | None] | None = None
        waiting = _Waiting(tell)
        # torchrun's own process has the store
        serves = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        if not serves:
            self._await_store(waiting)
        try:
            store = TCPStore(
                *address, size, serves, timedelta(seconds=JOINING_SECONDS), wait_for_workers=False, multi_tenant=True
            )
            self._store = PrefixStore(_attempt(), store)
            self._await_all(waiting)
            dist.init_process_group("gloo", store=self._store, rank=rank, world_size=size, timeout=_LONGEST)
        except RuntimeError as error:
            raise RanksError(f"rank {rank} of {size} cannot join the others: {_one_line(error)}") from error

    def _await_store(self, waiting: _Waiting) -> None:
        """Until somebody listens there; the store itself would try in a call that no signal ends."""
        host, port = self._address
        while True:
            try:
                socket.create_connection(self._address, timeout=_CONNECT_SECONDS).close()
            except (OSError, UnicodeError) as error:  # UnicodeError for what can be no name
                why = f"nobody listens at {host}:{port} (MASTER_ADDR, MASTER_PORT): {_one_line(error)}"
            else:
                return
            waiting.go_on(f"rank {self.rank} of {self.size} waits for rank 0: {why}")

    def _await_all(self, waiting: _Waiting) -> None:
        """Looking, not in a call that no signal ends."""
        joined = self.count("heatkv/joined", 1)
        while joined < self.size:
            host, port = self._address
            waiting.go_on(
                f"{joined} of {self.size} ranks came to {host}:{port}, waiting for the others; start them all"
                if self.rank == 0
                else ""
            )
            joined = self.count("heatkv/joined", 0)

    def device(self, name: str) -> str:
        if not name.startswith("cuda"):
            return name
        if name != "cuda":
            raise RanksError(f"--device {name} is one GPU, and {self.size} ranks each need one: write --device cuda")
        import torch

        if torch.cuda.is_available() and self.local_rank >= torch.cuda.device_count():
            raise RanksError(
                f"rank {self.rank} is number {self.local_rank} on its host, which has {torch.cuda.device_count()} "
                "GPUs; start no more processes on a host than it has GPUs (--nproc-per-node)"
            )
        return f"cuda:{self.local_rank}"

    def use(self, device: torch.device) -> None:
        if device.type == "cuda":
            self._sending = device, self._dist.new_group(backend="nccl")

    def _done(self, work: Work | None) -> None:
        """Wait for it, so that a signal ends the wait."""
        assert work is not None
        pause = _LOOK_SECONDS
        try:
            while not work.is_completed():
                if self.while_waiting is not None:
                    self.while_waiting()
                time.sleep(pause)
                pause = min(2 * pause, _LONG_LOOK_SECONDS)
            work.wait()
        except RuntimeError as error:
            raise RanksError(f"another rank has ended; {self.kept}") from error

    def _start(self, call: Callable[..., Work | None], *arguments: Any, **named: Any) -> None:
        try:
            work = call(*arguments, **named, async_op=True)
        except RuntimeError as error:
            raise RanksError(f"another rank has ended; {self.kept}") from error
        self._done(work)

    def wait(self) -> None:
        self._start(self._dist.barrier)

    def share(self, payload: bytes | None, source: int) -> bytes:
        import torch

        length = torch.tensor([-1 if payload is None else len(payload)])
        self._start(self._dist.broadcast, length, source)
        device, group = self._sending or (torch.device("cpu"), None)
        if payload is None or source != self.rank:
            sent = torch.empty(int(length), dtype=torch.uint8, device=device)
        else:
            sent = torch.frombuffer(bytearray(payload), dtype=torch.uint8).to(device)
        if group is not None:
            self.wait()  # NCCL does not notice a rank that is gone
        self._start(self._dist.broadcast, sent, source, group=group)
        return sent.cpu().numpy().tobytes()

    def count(self, name: str, more: int) -> int:
        try:
            return int(self._store.add(name, more))
        except RuntimeError as error:
            raise RanksError(f"the launcher or rank 0 has ended; {self.kept}") from error

    def may_tell(self, error: str) -> bool:
        lost = self.kept in error  # by a rank that may have told more itself
        digest = hashlib.sha256(error.encode()).hexdigest()
        try:
            told = int(self._store.add("heatkv/told", 0 if lost else 1))
            if lost and told:
                return False
            return int(self._store.add("heatkv/lost" if lost else f"heatkv/told/{digest}", 1)) == 1
        except RuntimeError:
            return True

    def leave(self) -> None:
        # those who still wait for this one must learn that it is gone
        if self._dist.is_initialized():
            self._dist.destroy_process_group()


class _Waiting:
    """For other ranks to come: told after a while, and ended after a longer one."""

    def __init__(self, tell: _Tell) -> None:
        self._tell, self._began, self._told, self._pause = tell, time.monotonic(), False, _LOOK_SECONDS

    def go_on(self, why: str) -> None:
        """Wait a little more; `why` is told once, if it is not empty. Raises RanksError when it has been too long."""
        waited = time.monotonic() - self._began
        if waited > JOINING_SECONDS:
            raise RanksError(f"not all ranks came within {JOINING_SECONDS} s" + (f": {why}" if why else ""))
        if why and not self._told and waited > _TELL_SECONDS:
            self._told = True
            self._tell(f"waiting, for {JOINING_SECONDS} s at most: {why}")
        time.sleep(self._pause)
        self._pause = min(2 * self._pause, _LONG_LOOK_SECONDS)


def _attempt() -> str:
    """The launcher's try that this is. On one host torchrun starts again (--max-restarts) with the store as it was
    left; of several hosts not all count tries alike, but they get a new store."""
    one_host = os.environ.get("GROUP_WORLD_SIZE") == "1"
    return f"heatkv/try/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0') if one_host else '0'}"


def _one_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


_current = Ranks()


def current() -> Ranks:
    """The team of this process: of one, until `join` found others."""
    return _current


def join(tell: _Tell = lambda _: None) -> Ranks:
    """Become one of the ranks that were launched, when there are several; waits until all are there, and tells for
    whom when that takes a while.

    Raises RanksError when the launcher's variables do not fit together, or the others cannot be reached.
    """
    global _current
    size = _number("WORLD_SIZE", 1, _MOST_RANKS) if "WORLD_SIZE" in os.environ else 1
    if size > 1:
        lacking = [name for name in _NEEDED if name not in os.environ]
        if lacking:
            raise RanksError(
                f"WORLD_SIZE is {size}, but {' and '.join(lacking)} are not set; start with torchrun, or unset "
                "WORLD_SIZE"
            )
        rank, local_rank = _number("RANK", 0, size - 1), _number("LOCAL_RANK", 0, size - 1)
        address = os.environ["MASTER_ADDR"], _number("MASTER_PORT", 1, 65535)
        _current = _Launched(rank, size, local_rank, address, tell)
    return _current


def leave() -> None:
    """Be a team of one again."""
    global _current
    team, _current = _current, Ranks()
    team.leave()


def _number(name: str, least: int, most: int) -> int:
    try:
        number = int(os.environ[name])
    except ValueError:
        raise RanksError(f"{name} is {os.environ[name]!r}; torchrun sets it to a whole number") from None
    if not least <= number <= most:
        raise RanksError(f"{name} is {number}; it must be from {least} to {most}")
    return number
