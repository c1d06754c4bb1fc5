"""Measures the memory of one plan in a process of its own, so that nothing that ran before colours it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from heatkv.core.plan_file import plan_from_json
from heatkv.engine.watch import is_deterministic, run_deterministically
from heatkv.errors import HeatKVError
from heatkv.models.catalogue import load_model
from heatkv.models.sampling import Settings
from heatkv.profiling.measure.memory import Loading, record_snapshots, save_snapshot
from heatkv.profiling.measure.runner import subject_memory, why_failed
from heatkv.profiling.measure.subjects import Subject
from heatkv.profiling.results.row import Memory


@dataclass(frozen=True)
class Job:
    """What to measure: `model` as `load_model` takes it, of these weights, drawing `batch` images under `plan`, which
    is as plan.json has it. `snapshot` is where the CUDA allocator's history is to go."""

    model: dict[str, Any]
    fingerprint: str
    settings: Settings
    plan: dict[str, Any]
    storage: str
    attention: str
    batch: int
    seed: int
    snapshot: Path | None = None
    threads: int = field(default_factory=torch.get_num_threads)
    deterministic: bool = field(default_factory=is_deterministic)


def measure_job(job: Job) -> Memory:
    """Load the model and measure. Raises HeatKVError for other weights than the job's."""
    torch.set_num_threads(job.threads)
    if job.deterministic:
        run_deterministically()
    if job.snapshot is not None:
        record_snapshots()
    model, loading = Loading.watch(lambda: load_model(**job.model), torch.device(job.model["device"]))
    if model.fingerprint != job.fingerprint:
        raise HeatKVError(
            f"the weights of {model.name} are {model.fingerprint} now, and were {job.fingerprint} when the run began; "
            "measure again"
        )
    subject = Subject("", "", (plan_from_json(job.plan),), job.storage, job.attention)
    memory = subject_memory(model, subject, job.batch, job.settings, seed=job.seed, loading=loading)
    if job.snapshot is not None:
        save_snapshot(job.snapshot)
    return memory


def measure_in_new_process(job: Job) -> Memory:
    """The memory, or the `error` why there is none. An interrupt ends the process too, and so does the end of this one.

    The process is spawned: a script that calls this needs `if __name__ == "__main__"`.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(job, sender), daemon=True)
    # the child inherits that interrupts are held back: they are for this process, which ends it
    held_back = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, held_back)
    sender.close()
    try:
        memory: Memory = receiver.recv()
        return memory
    except EOFError:
        process.join()
        return Memory(error=_why_ended(process.exitcode or 0))
    finally:
        process.kill()
        process.join()


def _run(job: Job, sender: Connection) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.dup2(2, 1)  # the output belongs to results
    try:
        memory = measure_job(job)
    except Exception as error:
        memory = Memory(error=why_failed(error))
    sender.send(memory)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _why_ended(code: int) -> str:
    if code >= 0:
        return f"the process that measured ended with code {code}"
    name = signal.Signals(-code).name
    likely = ", as the system does when memory runs out" if name == "SIGKILL" else ""
    return f"the process that measured was ended by {name}{likely}"
