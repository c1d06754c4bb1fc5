"""Commands in processes of their own that are stopped at a chosen moment, alone or as several ranks.

The processes are forked from one that has imported everything. A moment is the k-th file operation below a folder, or
the k-th attention: so every run of a test stops at the same place, however fast the machine is.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

_FILE_EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "tempfile.mkstemp"}

Kind = Literal["file", "attention"]


@dataclass(frozen=True)
class Moment:
    """The `count`-th event of a kind, counted from 1, and the signal that the process then sends itself."""

    kind: Kind
    count: int
    number: signal.Signals


@dataclass(frozen=True)
class Ended:
    """How a command ended: exit code, minus the signal's number where one killed it, and its error stream."""

    code: int
    error: str


_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    ["heatkv.cli", "heatkv.profiling.report.tables", "heatkv.profiling.report.page", "support.stopping"]
)


def run_apart(
    arguments: list[str], folder: Path, moment: Moment | None = None, *, ranks: int = 1, stopped_rank: int = 0
) -> list[Ended]:
    """The command in a process, or as so many ranks; one of them is stopped at the moment."""
    environments = [_environment(rank, ranks) for rank in range(ranks)]
    port = free_port()
    for environment in environments if ranks > 1 else ():
        environment["MASTER_PORT"] = str(port)
    logs = [folder.with_name(f"{folder.name}.rank{rank}.log") for rank in range(ranks)]
    processes = [
        _context.Process(
            target=_command, args=(arguments, environments[r], logs[r], folder, moment if r == stopped_rank else None)
        )
        for r in range(ranks)
    ]
    for process in processes:
        process.start()
    ended = []
    for process, log in zip(processes, logs, strict=True):
        process.join(300)
        assert process.exitcode is not None, log.read_text()
        ended.append(Ended(process.exitcode, log.read_text()))
        log.unlink()
    return ended


def count_events(arguments: list[str], folder: Path) -> Counter[Kind]:
    """How many events of every kind the command has when nothing stops it."""
    path = folder.with_name(f"{folder.name}.events")
    process = _context.Process(target=_counted, args=(arguments, folder, path))
    process.start()
    process.join(300)
    assert process.exitcode == 0
    files, attentions = path.read_text().split()
    path.unlink()
    return Counter({"file": int(files), "attention": int(attentions)})


def _environment(rank: int, ranks: int) -> dict[str, str]:
    if ranks == 1:
        return {}
    return {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _watch(folder: Path, moment: Moment | None) -> Counter[Kind]:
    """Count events from now on, and send the signal at the moment."""
    from heatkv.engine.arena_cache import KVCache

    counts: Counter[Kind] = Counter()
    below = str(folder)

    def happened(kind: Kind) -> None:
        counts[kind] += 1
        if moment is not None and (kind, counts[kind]) == (moment.kind, moment.count):
            os.kill(os.getpid(), moment.number)

    def audit(event: str, values: tuple[Any, ...]) -> None:
        if event in _FILE_EVENTS and values and str(values[0]).startswith(below):
            happened("file")

    attend = KVCache.attend

    def watched(*given: Any, **named: Any) -> Any:
        happened("attention")
        return attend(*given, **named)

    KVCache.attend = watched  # type: ignore[method-assign]
    sys.addaudithook(audit)
    return counts


def _prepare(arguments: list[str], log: Path | None) -> None:
    import torch

    torch.set_num_threads(1)
    for stream in (1, 2):
        where = os.devnull if log is None or stream == 1 else str(log)
        os.dup2(os.open(where, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)


def _command(arguments: list[str], environment: dict[str, str], log: Path, folder: Path, moment: Moment | None) -> None:
    from heatkv.cli import run

    os.environ.update(environment)
    _prepare(arguments, log)
    _watch(folder, moment)
    code = run(arguments)
    sys.stderr.flush()
    os._exit(code)


def _counted(arguments: list[str], folder: Path, path: Path) -> None:
    from heatkv.cli import run

    _prepare(arguments, None)
    counts = _watch(folder, None)
    code = run(arguments)
    path.write_text(f"{counts['file']} {counts['attention']}")
    os._exit(code)
