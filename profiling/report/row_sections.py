"""Sections that tell all of the results: every figure of every row, what has no other place, and the environment."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from heatkv.profiling.measure.memory_figures import unplaced
from heatkv.profiling.measure.runner import LEAST_USED
from heatkv.profiling.report.blocks import MISSING, Block, Cell, Note, Section, Table, mib_cell, number_cell
from heatkv.profiling.report.reporting import Report, broken_promises, kl_of, median_of
from heatkv.profiling.results.merging import Row, Source
from heatkv.profiling.results.fields import KNOWN

# ---------------------------------------------------------------------------------------------- all that is told

_LEDGERS = (
    ("budget_bytes", "allowed"), ("planned_bytes", "planned"), ("allocated_bytes", "allocated"),
    ("compensation_bytes", "corrections"), ("index_bytes", "tables"), ("workspace_bytes", "workspace"),
    ("current_bytes", "running layer"), ("device_peak_bytes", "device peak"), ("nvml_bytes", "driver"),
    ("full_bytes", "full cache"),
)  # fmt: skip
_TIMED = ("median, ms", "IQR, ms", "runs", "CUDA graphs, ms", "their IQR, ms")
_JUDGED = (
    ("kl", "KL, nats", ".4f"), ("predicted_kl", "foretold KL, nats", ".4f"), ("top1_agreement", "top-1", ".1%"),
    ("psnr_db", "PSNR, dB", ".2f"), ("ssim", "SSIM", ".3f"), ("images", "images", "g"), ("pictures", "pictures", "g"),
)  # fmt: skip


def all_rows(report: Report) -> Section:
    """Every figure of every row, a table for every folder."""
    blocks: list[Block] = []
    for source in report.merged.sources:
        lines = []
        for row in source.rows:
            time, graphs = row.time(), row.time("graph_latency_ms")
            draws = row.told.get("kl_of_draws")
            judged = [number_cell(row.number(name), form) for name, _, form in _JUDGED]
            of_draws = MISSING if draws is None else Cell(" ".join(f"{kl:.4f}" for kl in draws), kl_of(row))
            lines.append((
                report.name(row), Cell(row.budget, row.number("budget_bytes")),
                *(mib_cell(row.number(name)) for name, _ in _LEDGERS),
                number_cell(median_of(row), ".1f"), number_cell(time.get("iqr"), ".1f"),
                number_cell(time.get("runs"), "g"),
                *(number_cell(graphs.get(name), ".1f") for name in ("median", "iqr")),
                judged[0], of_draws, *judged[1:], Cell(_remark(row)),
            ))  # fmt: skip
        names = [title for _, title, _ in _JUDGED]
        columns = (
            "policy",
            "budget",
            *(f"{title}, MiB" for _, title in _LEDGERS),
            *_TIMED,
            names[0],
            "of its plans, nats",
            *names[1:],
            "remark",
        )
        spans = (
            ("", 2),
            ("bytes by ledger", len(_LEDGERS)),
            ("one batch", len(_TIMED)),
            ("fidelity", len(_JUDGED) + 1),
            ("", 1),
        )
        machine = report.merged.machines[source.machine]
        caption = f"All figures of {source.label}" + (f", {machine}" if len(report.merged.machines) > 1 else "")
        blocks.append(Table(caption, columns, tuple(lines), 1, spans))
    blocks.append(
        Note(
            "Ledgers: allowed is the budget; planned, the most that the plan holds at any moment; allocated, the "
            "storage of the arena, as it was made; corrections, parameters beside the cache, once for all images; "
            "tables say what is read and written where; workspace is what attention gathers into; running layer, its "
            "own keys and values at the largest scale; device peak, the allocator's on the device; driver, what NVML "
            "counts for the process; full cache, what no "
            "policy would take. Timed is one batch, decode included."
        )
    )
    return Section(
        "rows", "All figures", "All figures", "One row for every policy and budget, as in results.json.", blocks
    )


def _remark(row: Row) -> str:
    draws = row.number("draws") or 1
    told = [
        f"memory not measured: {row.told['error']}" if row.told.get("error") else "",
        *broken_promises(row),
        "no effect: nothing is dropped" if row.told.get("had_no_effect") else "",
        f"used less than {LEAST_USED:.0%} of its budget" if row.told.get("under_used") else "",
        f"mean of {draws:g} plans" if draws > 1 else "",
    ]
    return "; ".join(filter(None, told))


def further(report: Report) -> Section | None:
    """Figures that this release has no place for: listed as they are."""
    blocks: list[Block] = []
    for source in report.merged.sources:
        names = {name for row in source.rows for name, value in row.told.items() if value is not None} - KNOWN
        flat = []
        for row in source.rows:
            told = {name: value for name, value in row.told.items() if name in names}
            flat.append(
                dict(_flat(told | ({"memory": rest} if (rest := unplaced(row.told.get("memory") or {})) else {})))
            )
        columns = list(dict.fromkeys(name for told in flat for name in told))
        if columns:
            lines = tuple(
                (report.name(row), Cell(row.budget, row.number("budget_bytes")),
                 *(_plain(told.get(name)) for name in columns))
                for row, told in zip(source.rows, flat, strict=True)
            )  # fmt: skip
            blocks.append(Table(f"Further figures of {source.label}", ("policy", "budget", *columns), lines))
    if not blocks:
        return None
    return Section(
        "further", "Further", "Further figures", "As results.json has them, under their names there.", blocks
    )


def _flat(told: dict[str, Any], before: str = "") -> Iterable[tuple[str, Any]]:
    for name, value in told.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{before}{name} ")
        else:
            yield f"{before}{name}", value


def _plain(value: Any) -> Cell:
    """A value of any kind, in short."""
    if value is None:
        return MISSING
    if isinstance(value, bool) or not isinstance(value, int | float):
        return Cell(plain_text(value))
    return Cell(f"{value:.6g}" if isinstance(value, float) else str(value), value)


def plain_text(value: Any) -> str:
    """A value of JSON in one line."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        texts = [plain_text(inner) for inner in value[:8]]
        return ", ".join(texts) + (f" and {len(value) - 8} more" if len(value) > 8 else "")
    if isinstance(value, dict):
        return ", ".join(f"{name} {plain_text(inner)}" for name, inner in value.items()) or "none"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


# ---------------------------------------------------------------------------------------------------- environment


def environment(report: Report) -> Section:
    """Where and how all was measured."""
    sources = report.merged.sources
    told = [dict(_told_of(source)) for source in sources]
    names = list(dict.fromkeys(name for of_source in told for name in of_source))
    lines = tuple(
        (Cell(name), *(MISSING if name not in of_source else Cell(of_source[name]) for of_source in told))
        for name in names
    )  # fmt: skip
    blocks: list[Block] = [
        Table("Machine, sampling and request", ("what", *(source.label for source in sources)), lines, sortable=False)
    ]
    settings: dict[tuple[str, ...], tuple[Row, list[str]]] = {}
    for row in report.merged.rows:
        options = {name: value for name, value in (row.told.get("settings") or {}).items() if name != "budget"}
        text = ", ".join(f"{name} {plain_text(value)}" for name, value in options.items()) or "none told"
        settings.setdefault((report.merged.label(row, ()), text), (row, []))[1].append(row.budget)
    of_policies = tuple(
        (report.name(row, label), Cell(", ".join(dict.fromkeys(budgets))), Cell(text, kind="wide"))
        for (label, text), (row, budgets) in settings.items()
    )
    blocks.append(Table("Settings of every policy", ("policy", "budgets", "settings"), of_policies, sortable=False))
    return Section(
        "environment", "Environment", "Where and how this was measured", "What decides the figures above.", blocks
    )


def _told_of(source: Source) -> Iterable[tuple[str, str]]:
    first = source.rows[0]
    yield "model", plain_text(first.told.get("model"))
    yield "weights", plain_text(first.told.get("model_fingerprint"))
    yield "schedule", "none" if first.schedule is None else str(first.schedule)
    for part, values in (("", source.environment), ("sampling: ", source.sampling), ("request: ", source.request)):
        for name, value in values.items():
            if name == "statistics" and isinstance(value, dict):
                samples = value.get("samples")
                count = f"{len(samples)} samples of " if isinstance(samples, list) else ""
                yield f"{part}{name}", f"{count}{plain_text(value.get('model'))}"
            elif isinstance(value, dict):
                for inner, of_inner in value.items():
                    yield f"{part}{inner.replace('_', ' ')}", plain_text(of_inner)
            else:
                yield f"{part}{name.replace('_', ' ')}", plain_text(value)
