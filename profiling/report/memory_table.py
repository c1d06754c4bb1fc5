"""Memory on screen: every figure under the name of the ledger that it is from, and the cache over time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from heatkv.profiling.report.wide_table import WideTable

BARS = " ▁▂▃▄▅▆▇█"


def sparkline(timeline_bytes: Sequence[Sequence[int]], budget_bytes: int) -> str:
    """The fullest checkpoint of every scale as a bar; a full one is the budget."""
    eighths = [-(-8 * max(of_layers) // budget_bytes) if budget_bytes else 0 for of_layers in timeline_bytes]
    return "".join(BARS[min(count, 8)] for count in eighths)


def memory_table(rows: Sequence[Mapping[str, Any]], title: str) -> Table:
    """A line per row, in MiB; "-" is a figure that was not measured."""
    measured = [row["memory"] for row in rows if row.get("memory")]
    cuda = any(memory["allocator"] for memory in measured)
    host = any(memory["host"] for memory in measured)
    seeds = len({row.get("seed") for row in rows}) > 1
    table = WideTable(heads=3 + seeds, title=title)
    for name in (
        "policy", "budget", "images", *(["seed"] if seeds else []),
        "planned", "arena", "tensors, drawing", "tensors, decode", "weights",
        *(["allocated", "reserved", "graph pool", "process (NVML)", "driver's own"] if cuda else []),
        *(["resident"] if host else []), "unexplained", "cache by scale",
    ):  # fmt: skip
        table.add_column(name, justify="left" if name in ("policy", "cache by scale") else "right", no_wrap=True)
    for row in rows:
        memory: Mapping[str, Any] = row.get("memory") or {}
        peaks = (memory.get("tensors") or {}).get("peak_bytes") or {}
        steps = memory.get("steps") or []
        unexplained = [step["parts"]["unexplained"] for step in steps if "unexplained" in step["parts"]]
        device = []
        if cuda:
            of_phases = ((memory.get("allocator") or {}).get("peaks") or {}).values()
            device = [
                max((peaks["allocated_bytes"] for peaks in of_phases), default=None),
                max((peaks["reserved_bytes"] for peaks in of_phases), default=None),
                (memory.get("graphs") or {}).get("pool_bytes"),
                (memory.get("driver") or {}).get("process_bytes"),
                (memory.get("driver") or {}).get("reserved_bytes"),
            ]
        if host:
            device.append((memory.get("host") or {}).get("most_bytes"))
        table.add_row(
            row["policy"],
            row["budget"],
            str(row["batch"]),
            *([str(row["seed"])] if seeds else []),
            *map(
                _mib,
                (
                    row["planned_bytes"], row["allocated_bytes"], peaks.get("drawing"), peaks.get("decode"),
                    memory.get("weights_bytes"), *device, sum(unexplained) if unexplained else None,
                ),
            ),
            sparkline(row["timeline_bytes"], row["budget_bytes"]),
        )  # fmt: skip
    notes = ["MiB; the bars are shares of the budget"]
    if any(memory["process"] == "shared" for memory in measured):
        notes.append("measured in a process that has done other things, which colour it (leave --in-process out)")
    failed = [row for row in rows if row.get("error")]
    notes += [f"{row['policy']} {row['budget']}, {row['batch']} images: {row['error']}" for row in failed]
    table.caption = "\n".join(notes)
    return table


def _mib(count: int | None) -> str:
    return "-" if count is None else f"{count / 2**20:.3f}"
