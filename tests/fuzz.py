"""Thousands of hostile files against every loader: `make fuzz`, or `python tests/fuzz.py --count 12000 --seed 0`.

A child process loads mutant after mutant; this one watches that it goes on, and takes another when it dies or stands
still. A load may take a second of processor time, or twenty times that of the whole file if that is more, and may make
the process grow by a gigabyte.
"""

from __future__ import annotations

import argparse
import collections
import json
import resource
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import FrameType
from typing import Any

SECONDS = 1.0
TIMES_WHOLE = 20
GROWTH = 1 << 30
ROOM = 6 << 30
"""Of address space, beyond what the process has at its start: past that, allocations fail, and the machine is safe."""
STANDSTILL = 60
"""Seconds without a word after which a child is given up."""


class TooLong(BaseException):
    """A load that waits for something that does not come."""


def _stop(number: int, frame: FrameType | None) -> None:
    raise TooLong


def _status(name: str) -> int:
    """A figure of /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(name)


def _tell(**fields: Any) -> None:
    print(json.dumps(fields), flush=True)


def work(count: int, offset: int, skip: int, only: str | None) -> None:
    """Load the mutants from the `skip`th on, telling of every one before and after."""
    import torch
    from conftest import make_t5
    from hostile import Broken, Watch, make_targets, outcome, prepare, schedule_of_trials, text_targets, whole
    from mutations import CANARY

    from heatkv.models.catalogue import load_model

    torch.set_num_threads(1)
    signal.signal(signal.SIGALRM, _stop)
    watch = Watch()
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        canary, place = root / CANARY, root / "place"
        (root / "t5").mkdir()
        make_t5(root / "t5")
        targets: list[Any] = [
            *make_targets(root / "whole", canary, load_model("emoji"), root / "t5", 1280), *text_targets(),
        ]  # fmt: skip
        limits: dict[str, float] = {}
        for target in targets:
            load = whole(target, place / "x")
            load()
            began = time.process_time()
            load()
            limits[target.name] = max(SECONDS, TIMES_WHOLE * (time.process_time() - began))
        resource.setrlimit(resource.RLIMIT_AS, (_status("VmSize") + ROOM,) * 2)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        for index, (target, seed) in enumerate(schedule_of_trials(targets, count)):
            if index < skip or (only is not None and target.name != only):
                continue
            trial = prepare(target, seed + offset, place / "x")
            _tell(
                index=index,
                seed=seed + offset,
                target=trial.target,
                told=trial.told.encode("ascii", "replace").decode(),
            )
            Path("/proc/self/clear_refs").write_text("5")  # the peak begins with what is held now
            before, began = _status("VmRSS"), time.process_time()
            signal.setitimer(signal.ITIMER_REAL, 30)
            try:
                told = outcome(trial.load, watch, canary, trial.inside)
                broken = None
            except Broken as error:
                told, broken = "broken", str(error)
            except TooLong:
                told, broken = "broken", "it stood still for 30 seconds"
            signal.setitimer(signal.ITIMER_REAL, 0)
            seconds, grown = time.process_time() - began, _status("VmHWM") - before
            if seconds > limits[target.name]:
                broken = f"{broken or told[:80]}; it took {seconds:.1f} s"
            if grown > GROWTH:
                broken = f"{broken or told[:80]}; it grew by {grown >> 20} MiB"
            if canary.exists():
                canary.rmdir()
            _tell(done=index, whole=told == "whole", broken=broken, seconds=seconds, grown=grown)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=12_000, help="mutants in all")
    parser.add_argument("--seed", type=int, default=0, help="others than those of seed 0")
    parser.add_argument("--only", help="name of one loader")
    parser.add_argument("--work", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.work is not None:
        work(given.count, given.seed * 10**7, given.work, given.only)
        return 0
    began, done = time.monotonic(), 0
    counts: collections.Counter[str] = collections.Counter()
    failures: list[str] = []
    slowest: dict[str, float] = collections.defaultdict(float)
    largest: dict[str, int] = collections.defaultdict(int)
    skip = 0
    while True:
        command = [
            sys.executable,
            __file__,
            "--count",
            str(given.count),
            "--seed",
            str(given.seed),
            "--work",
            str(skip),
        ]
        command += [] if given.only is None else ["--only", given.only]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert child.stdout is not None
        ready = selectors.DefaultSelector()
        ready.register(child.stdout, selectors.EVENT_READ)
        now: dict[str, Any] | None = None
        how = "died"
        while True:
            if not ready.select(STANDSTILL):
                how = f"stood still for {STANDSTILL} seconds"
                child.kill()
            line = child.stdout.readline()
            if not line:
                break
            told = json.loads(line)
            if "index" in told:
                now = told
                continue
            assert now is not None
            done += 1
            counts[now["target"]] += 1
            counts["valid"] += told["whole"]
            slowest[now["target"]] = max(slowest[now["target"]], told["seconds"])
            largest[now["target"]] = max(largest[now["target"]], told["grown"])
            if told["broken"]:
                failures.append(f"{now['target']} {now['seed']}: {now['told']}\n    {told['broken']}")
                print(failures[-1], flush=True)
            skip, now = told["done"] + 1, None
            if done % 1000 == 0:
                print(f"{done} mutants, {len(failures)} broken, {time.monotonic() - began:.0f} s", flush=True)
        code = child.wait()
        if now is None:
            if code:
                print(f"the child ended with {code} before a mutant", file=sys.stderr)
                return 2
            break
        failures.append(f"{now['target']} {now['seed']}: {now['told']}\n    the process {how} ({code})")
        print(failures[-1], flush=True)
        done, skip = done + 1, now["index"] + 1
    for name in slowest:
        print(
            f"{name:28} {counts[name]:6} mutants, slowest {slowest[name]:6.2f} s, grew by {largest[name] >> 20:5} MiB"
        )
    valid = counts["valid"]
    print(f"{done} mutants in {time.monotonic() - began:.0f} s: {valid} valid, {done - valid - len(failures)} refused")
    print(f"{len(failures)} broken")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
