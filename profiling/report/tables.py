"""The columns of results: one list, which the tables of the terminal and those of the page are made of."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from heatkv.engine.spans import PHASES as TIME_PHASES
from heatkv.profiling.analysis.stability import Agreement
from heatkv.profiling.measure.runner import LEAST_USED
from heatkv.profiling.results.ledgers import PHASES, UNEXPLAINED
from heatkv.profiling.results.row import ResultRow, Versus

BARS = " ▁▂▃▄▅▆▇█"
NOT_MEASURED = "not measured"
TIMES = {"latency_ms": "", "graph_latency_ms": "CUDA graphs"}
"""The times of a row, and what their columns are called beside the eager ones."""


def look_up(holder: Any, path: str) -> Any:
    """What is under a path of attributes, keys and places, such as "latency_ms.scales.0"; None where a part is None."""
    for name in path.split("."):
        if isinstance(holder, Mapping):
            holder = holder.get(name)
        elif isinstance(holder, Sequence):
            holder = holder[int(name)] if int(name) < len(holder) else None
        elif holder is not None:
            holder = getattr(holder, name)
    return holder


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
        return look_up(row, self.source) if isinstance(self.source, str) else self.source(row)

    def text(self, value: Any) -> str:
        """A figure of this column as a reader sees it."""
        return format(value / 2**20 if self.unit == "MiB" else value, self.form)


def measured(columns: Iterable[Column], rows: Iterable[ResultRow]) -> list[Column]:
    """The columns that any of the rows has a figure for."""
    rows = list(rows)
    return [column for column in columns if any(column.value(row) is not None for row in rows)]


# ------------------------------------------------------------------------------------- figures of several fields


def difference_text(versus: Versus) -> str:
    """A paired difference with its interval."""
    low, high = versus.interval
    return f"{versus.difference:+.4f} [{low:+.4f}, {high:+.4f}]"


def broken_promises(row: ResultRow) -> list[str]:
    """What a row's bytes are that they must not be, in words."""
    sizes = {"planned": row.planned_bytes, "allocated": row.allocated_bytes}
    found = [
        f"{name} is above the budget by {size - row.budget_bytes:,} bytes"
        for name, size in sizes.items() if size is not None and size > row.budget_bytes
    ]  # fmt: skip
    if row.allocated_bytes not in (None, row.planned_bytes):
        found.append(f"allocated and planned differ: {row.allocated_bytes:,} and {row.planned_bytes:,} bytes")
    return found


def _remark(row: ResultRow) -> str | None:
    """What a reader must know of a row's figures; None where there is nothing."""
    remarks = [*([f"memory not measured: {row.error}"] if row.error else []), *broken_promises(row)]
    if row.had_no_effect or row.under_used:
        remarks.append("no effect" if row.had_no_effect else f"uses less than {LEAST_USED:.0%} of its budget")
    remarks += [f"mean of {row.draws} plans"] if row.draws > 1 else []
    return "; ".join(remarks) or None


def _sparkline(row: ResultRow) -> str:
    """The fullest checkpoint of every scale as a bar; a full one is the budget."""
    budget = row.budget_bytes or 1
    return "".join(BARS[min(-(-8 * max(layers) // budget), 8)] for layers in row.timeline_bytes)


def _unexplained(row: ResultRow) -> int | None:
    steps = row.memory.steps if row.memory else ()
    rests = [step.parts[UNEXPLAINED] for step in steps if UNEXPLAINED in step.parts]
    return sum(rests) if rests else None


def _kl_of_plans(row: ResultRow) -> str | None:
    kls = row.kl_of_draws or ()
    return " ".join(f"{kl:.4f}" for kl in kls) if len(kls) > 1 else None


def _interval(field: str) -> Callable[[ResultRow], str | None]:
    def text(row: ResultRow) -> str | None:
        ends = look_up(row, f"{field}.interval")
        return ends and f"{ends[0]:.1f} - {ends[1]:.1f}"

    return text


# ------------------------------------------------------------------------------------------------------ columns


def _figures(form: str, brief: bool = True, **named: tuple[str, str]) -> list[Column]:
    """Columns by the field of the row that they show, each with its name and unit."""
    return [Column(name, unit, field, form, brief=brief) for field, (name, unit) in named.items()]


def scale_columns(path: str, scales: Sequence[str], unit: str, form: str, ledger: str = "") -> list[Column]:
    """A column for every scale of a list in the rows."""
    return [Column(name, unit, f"{path}.{place}", form, ledger) for place, name in enumerate(scales)]


POLICY, BUDGET = Column("policy", "", "policy"), Column("budget", "", "budget")
AXES = (Column("batch", "", "batch"), Column("seed", "", "seed"))
REMARK = Column("remark", "", _remark)
KL, TOP1 = Column("KL", "nats", "kl", ".4f"), Column("top-1", "", "top1_agreement", ".1%")
ARENA = Column("arena", "MiB", "allocated_bytes", ".3f")
MEDIAN, IQR = Column("time", "ms", "latency_ms.median", ".1f"), Column("IQR", "ms", "latency_ms.iqr", ".1f")
RESULTS = (
    *_figures(".3f", budget_bytes=("allowed", "MiB"), planned_bytes=("planned", "MiB")), ARENA,
    Column("of full", "", lambda r: None if r.allocated_bytes is None else r.allocated_bytes / r.full_bytes, ".1%"),
    *_figures(
        ".3f", False, index_bytes=("index tables", "MiB"), workspace_bytes=("workspace", "MiB"),
        current_bytes=("running layer", "MiB"), full_bytes=("full cache", "MiB"),
        device_peak_bytes=("device peak", "MiB"), nvml_bytes=("driver", "MiB"),
    ),
    MEDIAN, Column("time, CUDA graphs", "ms", "graph_latency_ms.median", ".1f"), KL,
    Column("KL of its plans", "nats", _kl_of_plans, brief=False),
    Column("above the base's", "nats", lambda row: row.versus and difference_text(row.versus)),
    *_figures(".4f", predicted_kl=("foretold KL", "nats")), TOP1,
    *_figures(".2f", psnr_db=("PSNR", "dB")), *_figures(".3f", ssim=("SSIM", ""), lpips=("LPIPS", "")),
    *_figures(".1f", fid=("FID", "")), *_figures("d", False, images=("images", ""), pictures=("pictures", "")),
)  # fmt: skip
LATENCY = [
    column
    for field, ledger in TIMES.items()
    for column in (
        Column("median", "ms", f"{field}.median", ".1f", ledger),
        Column("interval", "ms", _interval(field), "", ledger),
        Column("confidence", "", f"{field}.confidence", ".1%", ledger, brief=False),
        Column("runs", "", f"{field}.runs", "d", ledger, brief=False),
        Column("outliers", "", f"{field}.outliers", "d", ledger),
        *(Column(name, "ms", f"{field}.phases.{name}", ".1f", ledger) for name in (*TIME_PHASES, "other")),
        Column("last scale", "ms", f"{field}.scales.-1", ".1f", ledger),
    )
]  # fmt: skip


def _ledger(ledger: str, path: str, names: Mapping[str, str], brief: str = "", ending: str = "_bytes") -> list[Column]:
    """Columns of `memory` under a path, by the beginning of the field; the terminal has those in `brief`."""
    return [
        Column(name, "MiB", f"memory.{path}{field}{ending}", ".3f", ledger, field in brief.split())
        for field, name in names.items()
    ]


def _allocator(kind: str, brief: str = "") -> list[Column]:
    ledger, ending = f"allocator, {kind}", f".{kind}_bytes"
    return [
        *_ledger(ledger, "allocator.", {"loading": "loading"}, ending=ending),
        *_ledger(ledger, "allocator.peaks.", PHASES, brief, ending),
        *_ledger(ledger, "graphs.", {"peaks": "with CUDA graphs"}, ending=ending),
    ]


PLANNED = (
    *_ledger("plan", "planned.", {"budget": "budget", "cache": "cache"}, "cache"),
    *_ledger("arena", "arena.", {"cache": "cache", "index": "index tables", "workspace": "workspace"}, "cache"),
    Column("cache by scale", "", _sparkline),
)  # fmt: skip
DEVICE = (
    *_ledger("model", "", {"weights": "weights"}, "weights"),
    *_ledger("tensors", "tensors.peak_bytes.", PHASES, "drawing decode", ""),
    *_ledger("tensors", "tensors.", {"arena": "arena among them"}),
    *_ledger("allocator, allocated", "allocator.", {"weights": "before opening"}),
    *_allocator("requested"), *_allocator("allocated", "drawing"), *_allocator("reserved", "drawing"),
    *_ledger("allocator, reserved", "graphs.", {"pool": "pool of CUDA graphs"}, "pool"),
    *_ledger("NVML", "driver.", {
        "process": "process", "used": "device, used by all", "reserved": "device, kept by the driver",
        "free": "device, free", "total": "device, in all",
    }, "process reserved"),
    *_ledger("resident", "host.", {
        "before": "before loading", "loading_peak": "peak of loading", "loaded": "after loading",
    }),
    *_ledger("resident", "host.peak_bytes.", PHASES, ending=""),
    *_ledger("resident", "host.", {"most": "largest peak"}, "most"),
    Column(UNEXPLAINED, "MiB", _unexplained, ".3f"),
    Column("no CUDA graphs because", "", "memory.graphs.reason", brief=False),
)  # fmt: skip


# -------------------------------------------------------------------------------------------- on the terminal


def _terminal_table(rows: Sequence[ResultRow], columns: Iterable[Column], title: str) -> Table:
    """A line for every row; "-" is a figure that was not measured."""
    axes = [axis for axis in AXES if len({axis.value(row) for row in rows}) > 1]
    brief = measured([column for column in (*columns, REMARK) if column.brief], rows)
    table = Table(title=title)
    for column in (shown := [POLICY, BUDGET, *axes, *brief]):
        title = column.title.replace(", ", ",\n").replace(": ", ":\n")  # narrow columns leave room for others
        right = bool(column.form) or column in (BUDGET, *axes)
        table.add_column(title, justify="right" if right else "left", overflow="fold")
    for row, following in zip(rows, [*rows[1:], None], strict=True):
        texts = ["-" if (value := column.value(row)) is None else column.text(value) for column in shown]
        table.add_row(*texts, end_section=following is not None and following.budget != row.budget)
    return table


def results_table(rows: Sequence[ResultRow], title: str) -> Table:
    """Bytes, times and fidelity."""
    return _terminal_table(rows, RESULTS, title)


def memory_table(rows: Sequence[ResultRow], title: str) -> Table:
    """Memory by ledger, and the cache over time: its bars are shares of the budget."""
    return _terminal_table(rows, (*PLANNED, *DEVICE), title)


def latency_table(rows: Sequence[ResultRow], title: str) -> Table:
    """Medians with their intervals, and where the time goes, from further runs that were watched."""
    return _terminal_table(rows, LATENCY, title)


def stability_tables(agreements: Sequence[Agreement]) -> list[Table]:
    """How far rankings and plans of two disjoint halves of the samples agree, a column for every size of a half."""
    kinds = [("S-CAS", [agreement.scas for agreement in agreements])]
    if all(agreement.error is not None for agreement in agreements):
        kinds.append(("drop error", [agreement.error for agreement in agreements if agreement.error is not None]))
    counts = [str(agreement.samples) for agreement in agreements]
    heads = Table("source scale", title="rank correlation of heads between halves, by samples per half")
    plans = Table("policy", "budget", title="plans of the two halves, by samples per half")
    for name in (f"{kind} {count}" for kind, _ in kinds for count in counts):
        heads.add_column(name, justify="right")
    for name in (f"{kind} {count}" for kind in ("overlap", "loss") for count in counts):
        plans.add_column(name, justify="right")
    for scale in range(len(agreements[0].scas)):
        heads.add_row(str(scale), *(f"{of_scales[scale]:.3f}" for _, found in kinds for of_scales in found))
    for same in zip(*(agreement.plans for agreement in agreements), strict=True):
        figures = [f"{plan.overlap:.1%}" for plan in same] + [f"{plan.loss:.2%}" for plan in same]
        plans.add_row(same[0].policy, same[0].budget, *figures)
    measures = ", ".join(f"{policy}: {m}" for policy, m in {p.policy: p.measure for p in agreements[0].plans}.items())
    plans.caption = (
        "overlap: token-time kept by both plans, of that kept by either; loss: value that a plan of one half misses on "
        f"the other ({measures})"
    )
    return [heads, plans]
