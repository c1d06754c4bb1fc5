"""The columns of results: one list, which the tables of the terminal and those of the page are made of."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from heatkv.engine.spans import PHASES as TIME_PHASES
from heatkv.profiling.measure.runner import LEAST_USED
from heatkv.profiling.results.ledgers import PHASES

BARS = " ▁▂▃▄▅▆▇█"
NOT_MEASURED = "not measured"


def look_up(holder: Any, path: str) -> Any:
    """What is under a path of attributes, keys and places, such as "latency_ms.scales.0"; None where a part is missing."""
    for name in path.split("."):
        if holder is None:
            return None
        if isinstance(holder, Mapping):
            holder = holder.get(name)
        elif isinstance(holder, Sequence):
            holder = holder[int(name)] if int(name) < len(holder) else None
        else:
            holder = getattr(holder, name)
    return holder


@dataclass(frozen=True)
class Column:
    """A figure of every row: its name, its unit, where a row has it, and its format. `ledger` is who counts it. The
    terminal, which is narrower than the page, has the `brief` columns alone."""

    name: str
    unit: str
    source: str | Callable[[Any], Any]
    form: str = ""
    ledger: str = ""
    brief: bool = True

    @property
    def title(self) -> str:
        name = f"{self.ledger}: {self.name}" if self.ledger else self.name
        return f"{name}, {self.unit}" if self.unit else name

    def value(self, row: Any) -> Any:
        """The figure in full; None where it was not measured."""
        return look_up(row, self.source) if isinstance(self.source, str) else self.source(row)

    def text(self, value: Any) -> str:
        """A figure of this column as a reader sees it."""
        return format(value / 2**20 if self.unit == "MiB" else value, self.form)


# ------------------------------------------------------------------------------------------------------ columns


def _share_of_full(row: Any) -> float | None:
    allocated, full = look_up(row, "allocated_bytes"), look_up(row, "full_bytes")
    return None if allocated is None or not full else allocated / full


def difference_text(versus: Any) -> str | None:
    """A paired difference with its interval."""
    if versus is None:
        return None
    low, high = look_up(versus, "interval")
    return f"{look_up(versus, 'difference'):+.4f} [{low:+.4f}, {high:+.4f}]"


def remark(row: Any) -> str | None:
    """What a reader must know of a row's figures; None where there is nothing."""
    allowed, planned, allocated = (look_up(row, f"{name}_bytes") for name in ("budget", "planned", "allocated"))
    remarks = []
    if error := look_up(row, "error"):
        remarks.append(f"memory not measured: {error}")
    if allocated is not None and planned is not None and allocated != planned:
        remarks.append(f"allocated and planned differ by {abs(allocated - planned):,.0f} bytes")
    for name, count in (("allocated", allocated), ("planned", planned)):
        if count is not None and allowed is not None and count > allowed:
            remarks.append(f"{name} is above the budget by {count - allowed:,.0f} bytes")
    if look_up(row, "had_no_effect"):
        remarks.append("no effect: nothing is dropped")
    elif look_up(row, "under_used"):
        remarks.append(f"uses less than {LEAST_USED:.0%} of its budget")
    if (draws := look_up(row, "draws") or 1) > 1:
        remarks.append(f"mean of {draws} plans")
    if look_up(row, "memory.process") == "shared":
        remarks.append("memory measured in a process that had done other things")
    return "; ".join(remarks) or None


def _sparkline(row: Any) -> str | None:
    """The fullest checkpoint of every scale as a bar; a full one is the budget."""
    timeline, budget = look_up(row, "timeline_bytes"), look_up(row, "budget_bytes")
    if timeline is None or not budget:
        return None
    return "".join(BARS[min(-(-8 * max(layers) // budget), 8)] for layers in timeline)


def _unexplained(row: Any) -> float | None:
    steps = look_up(row, "memory.steps") or ()
    rests = [rest for step in steps if (rest := look_up(step, "parts").get("unexplained")) is not None]
    return sum(rests) if rests else None


def _interval(field: str) -> Callable[[Any], str | None]:
    def text(row: Any) -> str | None:
        ends = look_up(row, f"{field}.interval")
        return None if ends is None else f"{ends[0]:.1f} - {ends[1]:.1f}"

    return text


NAMES = (Column("policy", "", "policy"), Column("budget", "", "budget"))
AXES = (Column("batch", "", "batch"), Column("seed", "", "seed"))
REMARK = Column("remark", "", remark)
CACHE = (
    Column("allowed", "MiB", "budget_bytes", ".3f"),
    Column("planned", "MiB", "planned_bytes", ".3f"),
    Column("arena", "MiB", "allocated_bytes", ".3f"),
    Column("of full cache", "", _share_of_full, ".1%"),
    Column("index tables", "MiB", "index_bytes", ".3f", brief=False),
    Column("workspace", "MiB", "workspace_bytes", ".3f", brief=False),
    Column("running layer", "MiB", "current_bytes", ".3f", brief=False),
    Column("full cache", "MiB", "full_bytes", ".3f", brief=False),
    Column("device peak", "MiB", "device_peak_bytes", ".3f", brief=False),
    Column("driver", "MiB", "nvml_bytes", ".3f", brief=False),
)
FIDELITY = (
    Column("KL", "nats", "kl", ".4f"),
    Column("KL of its plans", "nats", lambda row: " ".join(f"{kl:.4f}" for kl in look_up(row, "kl_of_draws") or ())
           if (look_up(row, "draws") or 1) > 1 else None, brief=False),
    Column("KL above the base's [95%]", "nats", lambda row: difference_text(look_up(row, "versus"))),
    Column("foretold KL", "nats", "predicted_kl", ".4f"),
    Column("top-1", "", "top1_agreement", ".1%"),
    Column("PSNR", "dB", "psnr_db", ".2f"),
    Column("SSIM", "", "ssim", ".3f"),
    Column("LPIPS", "", "lpips", ".4f"),
    Column("FID", "", "fid", ".1f"),
    Column("images", "", "images", ",.0f", brief=False),
    Column("pictures", "", "pictures", ",.0f", brief=False),
)  # fmt: skip
TIME = (
    Column("median", "ms", "latency_ms.median", ".1f"),
    Column("median with CUDA graphs", "ms", "graph_latency_ms.median", ".1f"),
)


def _latency_columns(field: str, ledger: str) -> tuple[Column, ...]:
    return (
        Column("median", "ms", f"{field}.median", ".1f", ledger),
        Column("interval", "ms", _interval(field), "", ledger),
        Column("confidence", "", f"{field}.confidence", ".1%", ledger, brief=False),
        Column("runs", "", f"{field}.runs", ",.0f", ledger, brief=False),
        Column("outliers", "", f"{field}.outliers", ",.0f", ledger),
        *(Column(name, "ms", f"{field}.phases.{name}", ".1f", ledger) for name in (*TIME_PHASES, "other")),
        Column("last scale", "ms", lambda row: (look_up(row, f"{field}.scales") or (None,))[-1], ".1f", ledger),
    )


LATENCY = (*_latency_columns("latency_ms", ""), *_latency_columns("graph_latency_ms", "CUDA graphs"))


def scale_columns(path: str, scales: Sequence[str], unit: str, form: str, ledger: str = "") -> tuple[Column, ...]:
    """A column for every scale of a list in the rows."""
    return tuple(Column(name, unit, f"{path}.{place}", form, ledger) for place, name in enumerate(scales))


def _of_phases(ledger: str, path: str, kind: str = "", brief: Sequence[str] = ()) -> tuple[Column, ...]:
    return tuple(
        Column(name, "MiB", f"memory.{path}.{phase}{kind}", ".3f", ledger, phase in brief)
        for phase, name in PHASES.items()
    )


def _ledger(ledger: str, path: str, names: Mapping[str, str], brief: Sequence[str] = ()) -> tuple[Column, ...]:
    return tuple(
        Column(name, "MiB", f"memory.{path}{field}_bytes", ".3f", ledger, field in brief)
        for field, name in names.items()
    )


def _allocator(kind: str, brief: bool) -> tuple[Column, ...]:
    ledger = f"allocator, {kind}"
    return (
        Column("loading", "MiB", f"memory.allocator.loading.{kind}_bytes", ".3f", ledger, brief=False),
        *_of_phases(ledger, "allocator.peaks", f".{kind}_bytes", ("drawing", "decode") if brief else ()),
        Column("with CUDA graphs", "MiB", f"memory.graphs.peaks.{kind}_bytes", ".3f", ledger, brief=False),
    )


PLANNED = (
    *_ledger("plan", "planned.", {"budget": "budget", "cache": "cache"}, ("cache",)),
    *_ledger("arena", "arena.", {"cache": "cache", "index": "index tables", "workspace": "workspace"}, ("cache",)),
    Column("cache by scale", "", _sparkline),
)
DEVICE = (
    *_ledger("model", "", {"weights": "weights"}, ("weights",)),
    *_of_phases("tensors", "tensors.peak_bytes", brief=("drawing", "decode")),
    *_ledger("tensors", "tensors.", {"arena": "arena among them"}),
    *_ledger("allocator, allocated", "allocator.", {"weights": "before opening"}),
    *_allocator("requested", False), *_allocator("allocated", True), *_allocator("reserved", True),
    *_ledger("allocator, reserved", "graphs.", {"pool": "pool of CUDA graphs"}, ("pool",)),
    *_ledger("NVML", "driver.", {
        "process": "process", "used": "device, used by all", "reserved": "device, kept by the driver",
        "free": "device, free", "total": "device, in all",
    }, ("process", "reserved")),
    *_ledger("resident", "host.", {
        "before": "before loading", "loading_peak": "peak of loading", "loaded": "after loading",
    }),
    *_of_phases("resident", "host.peak_bytes"),
    *_ledger("resident", "host.", {"most": "largest peak"}, ("most",)),
    Column("unexplained", "MiB", _unexplained, ".3f"),
    Column("no graphs because", "", "memory.graphs.reason", brief=False),
)  # fmt: skip
ALL = (*NAMES, *AXES, *CACHE, *TIME, *FIDELITY, REMARK)


def measured(columns: Iterable[Column], rows: Iterable[Any]) -> list[Column]:
    """The columns that any of the rows has a figure for."""
    rows = list(rows)
    return [column for column in columns if any(column.value(row) is not None for row in rows)]


# -------------------------------------------------------------------------------------------- on the terminal


def _terminal_table(rows: Sequence[Any], columns: Iterable[Column], title: str) -> Table:
    """A line for every row; "-" is a figure that was not measured."""
    axes = [axis for axis in AXES if len({axis.value(row) for row in rows}) > 1]
    brief = measured((column for column in columns if column.brief), rows)
    shown = [*NAMES, *axes, *brief, *measured([REMARK], rows)]
    table = Table(title=title)
    for column in shown:
        texts = any(isinstance(column.value(row), str) for row in rows) and column is not NAMES[1]
        table.add_column(column.title, justify="left" if texts else "right", overflow="fold")
    for place, row in enumerate(rows):
        values = [(column, column.value(row)) for column in shown]
        last = place + 1 == len(rows) or look_up(rows[place + 1], "budget") != look_up(row, "budget")
        table.add_row(*("-" if v is None else c.text(v) for c, v in values), end_section=last)
    return table


def results_table(rows: Sequence[Any], title: str) -> Table:
    """Bytes, times and fidelity."""
    return _terminal_table(rows, (*CACHE, *TIME, *FIDELITY), title)


def memory_table(rows: Sequence[Any], title: str) -> Table:
    """Memory by ledger, and the cache over time: its bars are shares of the budget."""
    return _terminal_table(rows, (*PLANNED, *DEVICE), title)


def latency_table(rows: Sequence[Any], title: str) -> Table:
    """Medians with their intervals, and where the time goes, from further runs that were watched."""
    return _terminal_table(rows, LATENCY, title)
