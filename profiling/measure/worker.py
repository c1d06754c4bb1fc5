"""Measures the memory of one plan in a process of its own, so that nothing that ran before colours it.

`python -m heatkv.profiling.measure.worker FOLDER` takes FOLDER/job.json and FOLDER/plan.json
and leaves FOLDER/result.json. It ends when its standard input does, which is when the process that started it does.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from heatkv.core.io import read_json, write_json
from heatkv.core.plan import CachePlan
from heatkv.core.plan_file import load_plan
from heatkv.core.schema import shown
from heatkv.core.storage_type import StorageType
from heatkv.engine.watch import run_deterministically
from heatkv.errors import FormatError, HeatKVError, out_of_memory
from heatkv.models.catalogue import load_model
from heatkv.profiling.measure.memory import Loading, record_snapshots, save_snapshot
from heatkv.profiling.measure.runner import Subject, memory_row, subject_memory

FOLDER = ".memory_job"
"""Within the folder of results; there while a worker runs."""

_FILES = JOB, PLAN, RESULT = "job.json", "plan.json", "result.json"


@dataclass(frozen=True)
class Job:
    """What to measure: `model` as `load_model` takes it, of these weights, drawing `batch` images under a plan that
    goes with it. `storage` codes the cache, or None does not; `digest` names the measurement, `snapshot` where the CUDA
    allocator's state is to go; `deterministic` as in --deterministic."""

    model: dict[str, Any]
    fingerprint: str
    cfg: float | None
    batch: int
    seed: int
    storage: str | None
    attention: str
    threads: int
    digest: str
    snapshot: str | None = None
    deterministic: bool = False


def measure(job: Job, plan: CachePlan) -> dict[str, Any]:
    """The fields of a row. Raises HeatKVError when the model is not the one that the job was made for."""
    torch.set_num_threads(job.threads)
    if job.deterministic:
        run_deterministically()
    if job.snapshot is not None:
        record_snapshots()
    device = torch.device(job.model["device"])
    model, loading = Loading.watch(lambda: load_model(**job.model), device)
    if model.fingerprint != job.fingerprint:
        raise HeatKVError(
            f"the weights of {model.name} are {model.fingerprint} now, and were {job.fingerprint} when the run began; "
            "measure again"
        )
    settings = model.sampling if job.cfg is None else replace(model.sampling, cfg=job.cfg)
    held_as = str(StorageType.for_dtype(model.compute_dtype, job.storage))
    subject = Subject("", "", (plan,), held_as, job.attention)
    row = memory_row(subject_memory(model, subject, job.batch, settings, seed=job.seed, loading=loading))
    if job.snapshot is not None:
        save_snapshot(Path(job.snapshot))
    return row


def measure_apart(folder: Path, job: Job, plan: CachePlan) -> dict[str, Any]:
    """The fields of a row, measured in a new process by way of files in `folder`; where it failed, `error` alone.

    An interrupt ends the process too.
    """
    place = folder / FOLDER
    clear(folder)
    place.mkdir()
    try:
        write_json(place / JOB, asdict(job))
        plan.save(place / PLAN)
        code, said = _run(place)
        try:
            told = read_json(place / RESULT)
        except FormatError:
            return {"error": _why(code, said)}
        if not isinstance(told, dict) or told.pop("digest", None) != job.digest:
            return {"error": f"the worker gave {shown(told)}"}
        return told
    finally:
        clear(folder)


def clear(folder: Path) -> None:
    """Remove what a worker, or one that was killed, left in a folder of results."""
    place = folder / FOLDER
    if place.is_dir():
        for name in _FILES:
            (place / name).unlink(missing_ok=True)
            for left in place.glob(f".{name}.*.tmp"):
                left.unlink(missing_ok=True)
        place.rmdir()


def _run(place: Path) -> tuple[int, str]:
    """Exit code and last words of the worker."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)}
    command = [sys.executable, "-m", "heatkv.profiling.measure.worker", str(place)]
    worker = None
    try:
        with _interrupts_held():  # one amid starting would leave a process that nobody knows
            worker = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment
            )
        assert worker.stderr is not None
        said = worker.stderr.read()  # not communicate, which would end its input
        return worker.wait(), said.decode(errors="replace")
    finally:
        if worker is not None:
            if worker.poll() is None:
                worker.kill()
                worker.wait()
            for pipe in (worker.stdin, worker.stderr):
                assert pipe is not None
                pipe.close()


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """An interrupt or SIGTERM within comes at the end."""
    if threading.current_thread() is not threading.main_thread():  # which they do not reach
        yield
        return
    came: list[int] = []
    held = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, lambda number, frame: came.append(number)) for number in held}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if came:
        signal.raise_signal(came[0])


def _why(code: int, said: str) -> str:
    last = (said.strip().splitlines() or ["it said nothing"])[-1]
    if code < 0:
        name = signal.Signals(-code).name
        likely = ", as the system does when memory runs out" if name == "SIGKILL" else ""
        return f"the worker was ended by {name}{likely}"
    return f"the worker ended with code {code}: {last}"


def _end_with_input() -> None:
    """End this process when its input ends."""
    os.read(0, 1)
    os._exit(1)


def do_job(place: Path) -> None:
    """Measure, and leave the result or what went wrong."""
    job = Job(**read_json(place / JOB))
    try:
        result = {"error": None} | measure(job, load_plan(place / PLAN))
    except Exception as error:
        result = {"error": why_failed(error)}
    write_json(place / RESULT, {"digest": job.digest} | result)


def why_failed(error: Exception) -> str:
    """One line for a row of results."""
    line = " ".join(str(error).split())
    if isinstance(error, HeatKVError):
        return line
    return f"{'out of memory' if out_of_memory(error) else type(error).__name__}: {line}"


if __name__ == "__main__":
    threading.Thread(target=_end_with_input, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever started this one ends it
    do_job(Path(sys.argv[1]))
