"""The columns of results: one list, which the tables of the terminal and those of the page are made of."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from heatkv.engine.spans import PHASES as TIME_PHASES
from heatkv.profiling.analysis.stability import Agreement
from heatkv.profiling.measure.runner import LEAST_USED
from heatkv.profiling.results.ledgers import PHASES, UNEXPLAINED, figure_at
from heatkv.profiling.results.row import ResultRow, Versus

BARS = " ▁▂▃▄▅▆▇█"
NOT_MEASURED = "not measured"
TIMES = {"latency_ms": "", "graph_latency_ms": "CUDA graphs"}
"""The times of a row, and what their columns are called beside the eager ones."""


@dataclass(frozen=True)
class Column:
    """A figure of every row: its name, its unit, where a row has it, and its format. `ledger` is who counts it. The
    terminal, which is narrower than the page, has the `brief` columns alone."""

    name: str
    unit: str
    source: str | Callable[[ResultRow], Any]
    form: str = ""
    ledger: str = ""
    brief: bool = True

    @property
    def title(self) -> str:
        name = f"{self.ledger}: {self.name}" if self.ledger else self.name
        return f"{name}, {self.unit}" if self.unit else name

    def value(self, row: ResultRow) -> Any:
        """The figure in full; None where it was not measured."""
        return figure_at(row, self.source) if isinstance(self.source, str) else self.source(row)

    def text(self, value: Any) -> str:
        """A figure of this column, or an interval, as a reader sees it."""
        if isinstance(value, tuple):
            return " - ".join(map(self.text, value))
        return format(value / 2**20 if self.unit == "MiB" else value, self.form)


def measured(columns: Iterable[Column], rows: Collection[ResultRow]) -> list[Column]:
    """The columns that any of the rows has a figure for."""
    return [column for column in columns if any(column.value(row) is not None for row in rows)]


# ------------------------------------------------------------------------------------- figures of several fields


def difference_text(versus: Versus) -> str:
    """A paired difference with its interval."""
    low, high = versus.interval
    return f"{versus.difference:+.4f} [{low:+.4f}, {high:+.4f}]"


def _remark(row: ResultRow) -> str | None:
    """What a reader must know of a row's figures; None where there is nothing."""
    remarks = [f"memory not measured: {row.error}"] if row.error else []
    if (above := max(row.planned_bytes, row.allocated_bytes or 0) - row.budget_bytes) > 0:
        remarks.append(f"{above:,} bytes above the budget")
    if row.allocated_bytes not in (None, row.planned_bytes):
        remarks.append(f"allocated and planned differ: {row.allocated_bytes:,} and {row.planned_bytes:,} bytes")
    if row.had_no_effect or row.under_used:
        remarks.append("no effect" if row.had_no_effect else f"uses less than {LEAST_USED:.0%} of its budget")
    remarks += [f"mean of {row.draws} plans"] if row.draws > 1 else []
    return "; ".join(remarks) or None


def _sparkline(row: ResultRow) -> str:
    """The fullest checkpoint of every scale as a bar; a full one is the budget."""
    return "".join(BARS[min(-(-8 * max(layers) // (row.budget_bytes or 1)), 8)] for layers in row.timeline_bytes)


def _unexplained(row: ResultRow) -> int | None:
    steps = row.memory.steps if row.memory else ()
    rests = [step.parts[UNEXPLAINED] for step in steps if UNEXPLAINED in step.parts]
    return sum(rests) if rests else None


# ------------------------------------------------------------------------------------------------------ columns


def scale_columns(path: str, scales: Sequence[str], unit: str, form: str, ledger: str = "") -> list[Column]:
    """A column for every scale of a list in the rows."""
    return [Column(name, unit, f"{path}.{place}", form, ledger) for place, name in enumerate(scales)]


def _bytes(ledger: str, path: str, names: Mapping[str, str], brief: Collection[str] = ()) -> list[Column]:
    """Columns of bytes by what "{}" in the path stands for; the terminal has those in `brief`."""
    return [Column(name, "MiB", path.format(f), ".3f", ledger, f in brief) for f, name in names.items()]


POLICY, BUDGET = Column("policy", "", "policy"), Column("budget", "", "budget")
AXES = (Column("batch", "", "batch"), Column("seed", "", "seed"))
REMARK = Column("remark", "", _remark)
KL, TOP1 = Column("KL", "nats", "kl", ".4f"), Column("top-1", "", "top1_agreement", ".1%")
ARENA = Column("arena", "MiB", "allocated_bytes", ".3f")
MEDIAN, IQR = Column("time", "ms", "latency_ms.median", ".1f"), Column("IQR", "ms", "latency_ms.iqr", ".1f")
RESULTS = (
    *_bytes("", "{}_bytes", {"budget": "allowed", "planned": "planned"}, ("budget", "planned")), ARENA,
    Column("of full", "", lambda r: None if r.allocated_bytes is None else r.allocated_bytes / r.full_bytes, ".1%"),
    *_bytes("", "{}_bytes", {
        "index": "index tables", "workspace": "workspace", "current": "running layer", "full": "full cache",
        "device_peak": "device peak", "nvml": "driver",
    }),
    MEDIAN, Column("time, CUDA graphs", "ms", "graph_latency_ms.median", ".1f"), KL,
    Column("above the base's", "nats", lambda row: row.versus and difference_text(row.versus)),
    Column("predicted KL", "nats", "predicted_kl", ".4f"), TOP1, Column("PSNR", "dB", "psnr_db", ".2f"),
    Column("SSIM", "", "ssim", ".3f"), Column("LPIPS", "", "lpips", ".3f"), Column("FID", "", "fid", ".1f"),
    *(Column(name, "", name, "d", brief=False) for name in ("images", "pictures")),
)  # fmt: skip
LATENCY = [
    column
    for field, ledger in TIMES.items()
    for column in (
        Column("median", "ms", f"{field}.median", ".1f", ledger),
        Column("interval", "ms", f"{field}.interval", ".1f", ledger),
        Column("confidence", "", f"{field}.confidence", ".1%", ledger, brief=False),
        Column("runs", "", f"{field}.runs", "d", ledger, brief=False),
        Column("outliers", "", f"{field}.outliers", "d", ledger),
        *(Column(name, "ms", f"{field}.phases.{name}", ".1f", ledger) for name in (*TIME_PHASES, "other")),
        Column("last scale", "ms", f"{field}.scales.-1", ".1f", ledger),
    )
]  # fmt: skip
PLANNED = (
    *_bytes("plan", "memory.planned.{}_bytes", {"budget": "budget", "cache": "cache"}, ["cache"]),
    *_bytes("arena", "memory.arena.{}_bytes",
            {"cache": "cache", "index": "index tables", "workspace": "workspace"}, ["cache"]),
    Column("cache by scale", "", _sparkline),
)  # fmt: skip


def _allocator(kind: str, brief: Collection[str] = ()) -> list[Column]:
    names = {"allocator.loading": "loading"} | {f"allocator.peaks.{phase}": name for phase, name in PHASES.items()}
    names["graphs.peaks"] = "with CUDA graphs"
    return _bytes(f"allocator, {kind}", f"memory.{{}}.{kind}_bytes", names, brief)


DEVICE = (
    *_bytes("model", "memory.{}_bytes", {"weights": "weights"}, ["weights"]),
    *_bytes("tensors", "memory.tensors.peak_bytes.{}", PHASES, ["drawing", "decode"]),
    *_bytes("tensors", "memory.tensors.{}_bytes", {"arena": "arena among them"}),
    *_bytes("allocator, allocated", "memory.allocator.{}_bytes", {"weights": "before opening"}),
    *_allocator("requested"), *_allocator("allocated", ["allocator.peaks.drawing"]),
    *_allocator("reserved", ["allocator.peaks.drawing"]),
    *_bytes("allocator, reserved", "memory.graphs.{}_bytes", {"pool": "pool of CUDA graphs"}, ["pool"]),
    *_bytes("NVML", "memory.driver.{}_bytes", {
        "process": "process", "used": "device, used by all", "reserved": "device, kept by the driver",
        "free": "device, free", "total": "device, in all",
    }, ["process", "reserved"]),
    *_bytes("resident", "memory.host.{}_bytes", {
        "before": "before loading", "loading_peak": "peak of loading", "loaded": "after loading",
    }),
    *_bytes("resident", "memory.host.peak_bytes.{}", PHASES),
    *_bytes("resident", "memory.host.{}_bytes", {"most": "largest peak"}, ["most"]),
    Column(UNEXPLAINED, "MiB", _unexplained, ".3f"),
    Column("no CUDA graphs because", "", "memory.graphs.reason", brief=False),
)  # fmt: skip


# -------------------------------------------------------------------------------------------- on the terminal


def terminal_table(rows: Sequence[ResultRow], columns: Iterable[Column], title: str) -> Table:
    """A line for every row; "-" is a figure that was not measured."""
    axes = [axis for axis in AXES if len({axis.value(row) for row in rows}) > 1]
    brief = measured([column for column in (*columns, REMARK) if column.brief], rows)
    table = Table(title=title)
    for column in (shown := [POLICY, BUDGET, *axes, *brief]):
        heading = column.title.replace(", ", ",\n").replace(": ", ":\n")  # narrow columns leave room for others
        right = bool(column.form) or column in (BUDGET, *axes)
        table.add_column(heading, justify="right" if right else "left", overflow="fold")
    for row, following in zip(rows, [*rows[1:], None], strict=True):
        texts = ["-" if (value := column.value(row)) is None else column.text(value) for column in shown]
        table.add_row(*texts, end_section=following is not None and following.budget != row.budget)
    return table


def stability_tables(agreements: Sequence[Agreement]) -> list[Table]:
    """How far rankings and plans of two disjoint halves of the samples agree, a column for every size of a half."""
    heads = Table("source scale", title="rank correlation of heads between halves, by samples per half")
    plans = Table("policy", "budget", title="plans of the two halves, by samples per half")
    kinds = {"S-CAS": [a.scas for a in agreements], "drop error": [a.error for a in agreements if a.error is not None]}
    rankings = {kind: found for kind, found in kinds.items() if len(found) == len(agreements)}
    for table, names in ((heads, rankings), (plans, ("overlap", "loss"))):
        for name in names:
            for agreement in agreements:
                table.add_column(f"{name} {agreement.samples}", justify="right")
    for scale in range(len(agreements[0].scas)):
        heads.add_row(str(scale), *(f"{of_scales[scale]:.3f}" for found in rankings.values() for of_scales in found))
    for same in zip(*(agreement.plans for agreement in agreements), strict=True):
        figures = [f"{plan.overlap:.1%}" for plan in same] + [f"{plan.loss:.2%}" for plan in same]
        plans.add_row(same[0].policy, same[0].budget, *figures)
    measures = dict.fromkeys(f"{plan.policy}: {plan.measure}" for plan in agreements[0].plans)
    plans.caption = (
        "overlap: token-time kept by both plans, of that kept by either; loss: value that a plan of one half misses on "
        f"the other ({', '.join(measures)})"
    )
    return [heads, plans]
