"""The sections of a report, each a function of the merged results that gives its blocks, or None where it has nothing to
say. A new section is a new function in SECTIONS.

Arrays: L layers, H heads, T scales.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from PIL import Image

from heatkv.capacities import CapacityPlan, available_tokens
from heatkv.levels import FULL, LEVELS, level_tokens
from heatkv.plan import CachePlan, Plan
from heatkv.profiling import figures
from heatkv.profiling.artefacts import Missing, pictures_of, plans_of, scas_of
from heatkv.profiling.blocks import (
    MISSING,
    NOT_MEASURED,
    Block,
    Card,
    Cards,
    Cell,
    Chart,
    Fold,
    Heading,
    Heat,
    Key,
    Legend,
    Note,
    Section,
    Sheet,
    Strip,
    Table,
    Tile,
    Tiles,
    log_shade,
    mib,
    mib_cell,
    number_cell,
)
from heatkv.profiling.explain import kept_of_heads, kept_of_scales
from heatkv.profiling.figures import Style
from heatkv.profiling.merging import (
    KNOWN,
    REFERENCE,
    Group,
    Merged,
    Row,
    Source,
    budgets_of,
    pareto_front,
    ranked,
)
from heatkv.profiling.runner import LEAST_USED
from heatkv.schedule import ScaleSchedule


def kl_of(row: Row) -> float | None:
    """KL in nats per token."""
    return row.number("kl")


def median_of(row: Row) -> float | None:
    """Median time in ms."""
    return row.time().get("median")


def held_of(row: Row) -> float | None:
    """Bytes of the arena and of corrections."""
    return row.held_bytes


@dataclass(frozen=True, eq=False)
class Report:
    """What sections are made of."""

    merged: Merged

    @cached_property
    def styles(self) -> dict[str, Style]:
        """By label: a policy has the same colour and marker in all charts."""
        rows = self.merged.rows
        return figures.styles([self.merged.label(row) for row in sorted(rows, key=lambda row: row.is_reference)])

    def style(self, row: Row) -> Style:
        return self.styles[self.merged.label(row)]

    def name(self, row: Row, style: bool = True) -> Cell:
        """The policy of a row as a cell."""
        return Cell(self.merged.label(row), self.merged.label(row), style=self.style(row) if style else None)

    @property
    def several(self) -> bool:
        return len(self.merged.sources) > 1

    @property
    def main_group(self) -> Group | None:
        """The largest group whose fidelity compares."""
        return max(self.merged.fidelity_groups, key=lambda group: len(group.rows), default=None)


def _heading(group: Group, groups: Sequence[Group]) -> list[Block]:
    return [Heading(group.title)] if len(groups) > 1 else []


def scale_names(schedule: ScaleSchedule) -> list[str]:
    """Short names: the side of square scales."""
    return [str(h) if t == 1 and h == w else f"{h}×{w}" if t == 1 else f"{t}×{h}×{w}" for t, h, w in schedule.scales]


def _under(names: Sequence[str]) -> tuple[str, ...]:
    """What stands under narrow blocks: names of more than a side give way to the number of the scale."""
    return tuple(names) if all("×" not in name for name in names) else tuple(str(s) for s in range(len(names)))


def _of_cache(budget: str) -> str:
    return f"With {budget} of the cache" if budget.endswith("%") else f"Within {budget}"


# ------------------------------------------------------------------------------------------------------ summary


def headline(report: Report) -> str:
    """The main result in a sentence."""
    group = report.main_group
    budgets = budgets_of(group.rows) if group is not None else {}
    if not budgets:
        policies = len({row.policy for row in report.merged.rows if not row.is_reference})
        return f"What {policies} cache polic{'y' if policies == 1 else 'ies'} of {report.merged.model} take"
    budget, rows = list(budgets.items())[-1]
    best = ranked(rows, kl_of)[0]
    return f"{_of_cache(budget)}, {report.merged.label(best)} stays closest to the full cache"


def summary(report: Report) -> Section:
    """The best policy of every budget, in large letters and in a table."""
    blocks: list[Block] = []
    groups = report.merged.fidelity_groups
    for group in groups:
        found = budgets_of(group.rows)
        if not found:
            continue
        tiles, lines = [], []
        for budget, rows in found.items():
            best, *others = ranked(rows, kl_of)
            kl, top = kl_of(best), best.number("top1_agreement")
            told = [] if top is None else [f"{top:.1%} of the likeliest codes unchanged"]
            if others:
                told.append(f"next is {report.merged.label(others[0])} with {kl_of(others[0]):.3f}")
            room = best.number("budget_bytes")
            tiles.append(
                Tile(
                    over=budget if room is None else f"{budget} · {mib(room)} MiB",
                    figure=f"{kl:.3f}", unit="KL, nats per token", title=report.merged.label(best),
                    text="; ".join(told), style=report.style(best),
                )
            )  # fmt: skip
            second = others[0] if others else None
            lines.append((
                Cell(budget, room), report.name(best), number_cell(kl, ".4f"), number_cell(top, ".1%"),
                Cell("none") if second is None else report.name(second),
                Cell("none") if second is None else number_cell(kl_of(second), ".4f"),
            ))  # fmt: skip
        blocks += _heading(group, groups)
        blocks.append(Tiles(tuple(tiles)))
        columns = ("budget", "least KL", "KL, nats per token", "top-1", "next", "its KL")
        blocks.append(Fold("The same as a table", (Table("Best policy at each budget", columns, tuple(lines), 1),)))
    if not blocks:
        blocks.append(Note("Fidelity was not measured: there is no KL in these results.", missing=True))
    elif len(groups) > 1:
        blocks.insert(0, Note(
            "These folders measured fidelity on different things; only what was measured on the same is ranked together."
        ))  # fmt: skip
    return Section("summary", "Summary", headline(report), _lead(report), blocks)


def _lead(report: Report) -> str:
    """What was measured, in a sentence."""
    merged, group = report.merged, report.main_group
    row = next(iter(group.rows if group is not None else merged.rows))
    facts = []
    if row.number("images") is not None:
        facts.append(f"KL and top-1 over {row.told['images']} images")
    if row.number("pictures"):
        facts.append(f"PSNR and SSIM over {row.told['pictures']} pictures")
    if row.number("rows") is not None:
        facts.append(f"a cache of {row.told['rows']} rows in {row.told.get('dtype') or 'a type that is not told'}")
    where = list(merged.machines.values())
    facts.append(f"on {where[0]}" if len(where) == 1 else f"on {len(where)} machines")
    return (
        f"{merged.model}: {', '.join(facts)}. KL is that of the guided logits under the full cache to those under the "
        "policy, in nats per token, lower is better."
    )


# -------------------------------------------------------------------------------------------- fidelity and time


def _series(
    report: Report, rows: Iterable[Row], y: Callable[[Row], float | None],
    around: Callable[[Row], tuple[float, float] | None], tip: Callable[[Row], str],
) -> list[figures.Line]:  # fmt: skip
    """A line for every label, its points by bytes held."""
    of_labels: dict[str, list[tuple[float, float, Row]]] = {}
    for row in rows:
        held, value = row.held_bytes, y(row)
        if held and value is not None:
            of_labels.setdefault(report.merged.label(row), []).append((held / 2**20, value, row))
    lines = []
    for label, entries in of_labels.items():
        entries.sort(key=lambda entry: entry[:2])
        lines.append(
            figures.Line(
                label, report.styles[label], tuple(entry[:2] for entry in entries),
                tuple(around(row) or (value, value) for _, value, row in entries),
                tuple(tip(row) for *_, row in entries),
            )
        )  # fmt: skip
    return lines


def _memory_axis(rows: Iterable[Row]) -> figures.Axis:
    """Bytes held on a logarithmic axis, with a tick at every budget."""
    places = {}
    for row in rows:
        room = row.number("budget_bytes")
        if room:
            places[room / 2**20] = f"{row.budget}\n{room / 2**20:.3g}"
    return figures.Axis("budget, and its MiB", True, figures.share_ticks(places))


def frontier(report: Report) -> Section | None:
    """KL against bytes."""
    groups = report.merged.fidelity_groups
    if not groups:
        return None
    blocks: list[Block] = []
    for index, group in enumerate(groups):
        budgets = budgets_of(group.rows)
        rows = [row for of_budget in budgets.values() for row in of_budget]
        shown = [row for row in rows if (kl_of(row) or 0) > 0]
        blocks += _heading(group, groups)
        if shown:
            front = pareto_front(shown, held_of, kl_of)
            lines = _series(report, shown, kl_of, lambda row: row.spread, lambda row: _fidelity_tip(report, row))
            points = [(x / 2**20, y) for row in front if (x := held_of(row)) and (y := kl_of(row)) is not None]
            on_front = f"On the Pareto front: {_listed(report, reversed(front))}."
            drawing = figures.line_chart(
                f"frontier-{index}", f"KL against memory, both logarithmic. {on_front}", lines, points,
                _memory_axis(shown), figures.Axis("KL, nats per token", True),
            )  # fmt: skip
            captions = [
                "Lower left is better. The broad band is the Pareto front: nothing else has less KL in as few bytes. "
                "Points lie at the bytes that are allocated in the arena, with corrections where a plan has some.",
                on_front,
            ]
            if any(row.spread for row in shown):
                captions.append("Bars are the range over the plans of a policy that draws at random.")
            if left_out := [row for row in rows if row not in shown]:
                captions.append(f"A KL of 0 has no place on this axis: {_listed(report, left_out)}.")
            blocks.append(Chart(drawing, tuple(captions), (_kl_table(report, group, budgets),)))
        elif budgets:
            blocks.append(_kl_table(report, group, budgets))
    return Section(
        "fidelity", "Fidelity", "What a budget costs in fidelity",
        "Every policy at every budget; the full cache, with a KL of 0, is what they are compared with.", blocks,
    )  # fmt: skip


def _listed(report: Report, rows: Iterable[Row]) -> str:
    """The rows in words, each policy once."""
    of_labels: dict[str, list[str]] = {}
    for row in rows:
        of_labels.setdefault(report.merged.label(row), []).append(row.budget)
    return "; ".join(f"{label} at {', '.join(budgets)}" for label, budgets in of_labels.items())


def _fidelity_tip(report: Report, row: Row) -> str:
    return f"{report.merged.label(row)} at {row.budget}: KL {kl_of(row):.4f}, {mib(row.held_bytes or 0)} MiB"


def _kl_table(report: Report, group: Group, budgets: dict[str, list[Row]]) -> Table:
    """KL by policy and budget, from the least at the smallest budget on; the least of every budget is marked."""
    found = [kl for rows in budgets.values() for row in rows if (kl := kl_of(row))]
    bounds = (min(found), max(found)) if found else (0.0, 0.0)
    best = {id(ranked(rows, kl_of)[0]) for rows in budgets.values()}
    of_labels: dict[str, dict[str, Row]] = {}
    for budget, rows in budgets.items():
        for row in rows:
            of_labels.setdefault(report.merged.label(row), {}).setdefault(budget, row)

    def order(label: str) -> tuple[Any, ...]:
        of_label = of_labels[label]
        return (*((b not in of_label, kl_of(of_label[b]) if b in of_label else 0) for b in reversed(budgets)), label)

    lines = []
    for label in sorted(of_labels, key=order):
        cells = [Cell(label, label, style=report.styles[label])]
        for budget in budgets:
            row = of_labels[label].get(budget)
            if row is None:
                cells.append(MISSING)
                continue
            kl = kl_of(row)
            cells.append(number_cell(kl, ".4f", "best" if id(row) in best else "", log_shade(kl, *bounds)))
        lines.append(tuple(cells))
    on = group.rows[0]
    caption = f"KL in nats per token by budget, over {on.told.get('images') or 'untold'} images; the least in bold"
    return Table(caption, ("policy", *budgets), tuple(lines))


def memory_and_time(report: Report) -> Section | None:
    """Time against bytes, machine by machine."""
    groups = report.merged.timing_groups
    if not groups:
        return None
    blocks: list[Block] = []
    if len(groups) > 1:
        blocks.append(Note(
            "Times of different machines, or of different work, are not comparable: each has its own chart and ranking."
        ))  # fmt: skip
    for index, group in enumerate(groups):
        blocks += _heading(group, groups)
        front = pareto_front(group.rows, held_of, median_of)
        lines = _series(report, group.rows, median_of, _quartiles, lambda row: _time_tip(report, row))
        if lines:
            points = [(x / 2**20, y) for row in front if (x := held_of(row)) and (y := median_of(row)) is not None]
            on_front = f"On the Pareto front: {_listed(report, reversed(front))}."
            drawing = figures.line_chart(
                f"latency-{index}", f"Time against memory. {on_front}", lines, points, _memory_axis(group.rows),
                figures.Axis("ms per batch"),
            )  # fmt: skip
            captions = (
                "Lower left is better. Median time of drawing one batch, decode included; bars are as long as the "
                "distance of the quartiles. The axis of time need not begin at 0.",
                f"The broad band is the Pareto front: nothing else is as fast in as few bytes. {on_front}",
                "Where bars overlap, so do the times: an order within them says nothing.",
            )
            blocks.append(Chart(drawing, captions))
        blocks.append(_time_table(report, group, {id(row) for row in front}))
    return Section(
        "latency", "Latency", "Memory and latency",
        "Times are ranked within one machine only: the same device, threads, system and versions.", blocks,
    )  # fmt: skip


def _quartiles(row: Row) -> tuple[float, float] | None:
    time = row.time()
    iqr = time.get("iqr")
    return None if iqr is None else (time["median"] - iqr / 2, time["median"] + iqr / 2)


def _time_tip(report: Report, row: Row) -> str:
    return f"{report.merged.label(row)} at {row.budget}: {median_of(row):.1f} ms, {mib(row.held_bytes or 0)} MiB"


def _time_table(report: Report, group: Group, front: set[int]) -> Table:
    """All rows of one machine from the fastest on."""
    base = {row.source: median_of(row) for row in group.rows if row.is_reference}
    lines = []
    for place, row in enumerate(ranked(group.rows, median_of), 1):
        median, full = median_of(row), base.get(row.source)
        of_full = median / full if median is not None and full else None
        lines.append((
            Cell(str(place), place), report.name(row), Cell(row.budget, row.number("budget_bytes")),
            number_cell(median, ".1f", "best" if id(row) in front else ""), number_cell(row.time().get("iqr"), ".1f"),
            number_cell(of_full, ".2f"), mib_cell(row.held_bytes),
        ))  # fmt: skip
    columns = ("rank", "policy", "budget", "median ms", "IQR ms", "× full cache", "arena MiB")
    return Table("Time of one batch, the fastest first; the Pareto front in bold", columns, tuple(lines), 2)


# ---------------------------------------------------------------------------------------------- all that is told

_LEDGERS = (
    ("budget_bytes", "allowed"), ("planned_bytes", "planned"), ("allocated_bytes", "allocated"),
    ("compensation_bytes", "corrections"), ("device_peak_bytes", "device peak"), ("nvml_bytes", "driver"),
    ("full_bytes", "full cache"),
)  # fmt: skip
_TIMED = ("median", "IQR", "runs", "CUDA graphs", "their IQR")
_JUDGED = (
    ("kl", "KL", ".4f"), ("predicted_kl", "foretold KL", ".4f"), ("top1_agreement", "top-1", ".1%"),
    ("psnr_db", "PSNR dB", ".2f"), ("ssim", "SSIM", ".3f"), ("images", "images", "g"), ("pictures", "pictures", "g"),
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
                *(number_cell(time.get(name), form) for name, form in (("median", ".1f"), ("iqr", ".1f"), ("runs", "g"))),
                *(number_cell(graphs.get(name), ".1f") for name in ("median", "iqr")),
                judged[0], of_draws, *judged[1:], Cell(_remark(row)),
            ))  # fmt: skip
        names = [title for _, title, _ in _JUDGED]
        columns = (
            "policy",
            "budget",
            *(title for _, title in _LEDGERS),
            *_TIMED,
            names[0],
            "of its plans",
            *names[1:],
            "remark",
        )
        spans = (
            ("", 2),
            ("MiB by ledger", len(_LEDGERS)),
            ("ms per batch", len(_TIMED)),
            ("fidelity", len(_JUDGED) + 1),
            ("", 1),
        )
        machine = report.merged.machines[source.machine]
        caption = f"All figures of {source.label}" + (f", {machine}" if len(report.merged.machines) > 1 else "")
        blocks.append(Table(caption, columns, tuple(lines), 1, spans))
    blocks.append(
        Note(
            "Ledgers: allowed is the budget; planned, the most that the plan holds at any moment; allocated, the storage "
            "of the arena, as it was made; corrections, parameters beside the cache, once for all images; device peak, "
            "the allocator's on the device; driver, what NVML counts for the process; full cache, what no policy "
            "would take. Timed is one batch, decode included."
        )
    )
    return Section(
        "rows", "All figures", "All figures", "One row for every policy and budget, as in results.json.", blocks
    )


def _remark(row: Row) -> str:
    if row.told.get("had_no_effect"):
        return "no effect: nothing is dropped"
    used = f"used less than {LEAST_USED:.0%} of its budget" if row.told.get("under_used") else ""
    draws = row.number("draws") or 1
    return "; ".join(filter(None, [used, f"mean of {draws:g} plans" if draws > 1 else ""]))


def further(report: Report) -> Section | None:
    """Figures that this release has no place for: listed as they are."""
    blocks: list[Block] = []
    for source in report.merged.sources:
        found = [{name: value for name, value in row.told.items() if name not in KNOWN} for row in source.rows]
        flat = [dict(_flat(told)) for told in found]
        columns = list(dict.fromkeys(name for told in flat for name in told))
        if columns:
            lines = tuple(
                (report.name(row), Cell(row.budget, row.number("budget_bytes")), *(_plain(told.get(name)) for name in columns))
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


# --------------------------------------------------------------------------------------------------- scale by scale


def per_scale(report: Report) -> Section | None:
    """KL by target scale."""
    groups = [
        Group(group.title, tuple(row for row in group.rows if row.told.get("kl_per_scale")))
        for group in report.merged.fidelity_groups
    ]
    groups = [group for group in groups if group.rows]
    if not groups:
        return None
    blocks: list[Block] = []
    for index, group in enumerate(groups):
        budgets = budgets_of(group.rows)
        of_scales = [row.told["kl_per_scale"] for row in group.rows]
        schedule = group.rows[0].schedule
        names = [str(s) for s in range(len(of_scales[0]))] if schedule is None else scale_names(schedule)
        blocks += _heading(group, groups)
        panels = {
            budget: [(report.merged.label(row), report.style(row), row.told["kl_per_scale"]) for row in rows]
            for budget, rows in budgets.items()
        }
        if panels:
            labels = dict.fromkeys(label for lines in panels.values() for label, *_ in lines)
            legend = Legend(tuple(Key(label, report.styles[label]) for label in labels))
            drawing = figures.scale_panels(
                f"scales-{index}", "KL by target scale, a panel for every budget; the table below has the figures.",
                panels, names,
            )  # fmt: skip
            captions = ("A panel for every budget, all on the same axes.", _first_losses(budgets, names))
            blocks.append(Chart(drawing, captions, (legend,)))
        positive = [kl for told in of_scales for kl in told if kl > 0]
        bounds = (min(positive), max(positive)) if positive else (0.0, 0.0)
        lines = tuple(
            (report.name(row), Cell(row.budget, row.number("budget_bytes")),
             *(number_cell(kl, ".4f", "", log_shade(kl, *bounds)) for kl in row.told["kl_per_scale"]))
            for row in [*(r for rows in budgets.values() for r in ranked(rows, kl_of)),
                        *(r for r in group.rows if r.is_reference)]
        )  # fmt: skip
        blocks.append(Table("KL in nats per token by target scale", ("policy", "budget", *names), lines))
    return Section(
        "scales", "By scale", "Where along the scales fidelity is lost",
        "KL of the tokens of every target scale. The first scale reads no cache, so nothing can be lost there.", blocks,
    )  # fmt: skip


_LOSS = 1e-6
"""KL below which nothing is lost but by rounding."""


def _first_losses(budgets: dict[str, list[Row]], names: Sequence[str]) -> str:
    """From which scale on anything is lost, by budget."""
    found = {}
    for budget, rows in budgets.items():
        lossy = [s for row in rows for s, kl in enumerate(row.told["kl_per_scale"]) if kl > _LOSS]
        found[budget] = f"scale {min(lossy)} ({names[min(lossy)]})" if lossy else "no scale"
    return (
        f"The first scale at which any policy loses something: {', '.join(f'{at} at {b}' for b, at in found.items())}."
    )


# ------------------------------------------------------------------------------------------------- what heads look at

_SCAS_STEPS = 64


def scas(report: Report) -> Section | None:
    """S-CAS of every head by source scale."""
    blocks: list[Block] = []
    for source in report.merged.sources:
        if report.several:
            blocks.append(Heading(source.label))
        found = scas_of(source)
        if isinstance(found, Missing):
            blocks.append(Note(f"No S-CAS: {found.why}.", missing=True))
            continue
        most_S = np.maximum(found.scas_LHS.max(axis=(0, 1)), np.finfo(float).tiny)
        shares = np.maximum(found.scas_LHS, 0) / most_S
        steps = np.round(shares * (_SCAS_STEPS - 1)).astype(np.int64)
        colours = [*figures.ramp("magma", _SCAS_STEPS, 0.05), (0, 0, 0, 0)]
        names = scale_names(found.schedule)[:-1]
        layers, heads, scales = found.scas_LHS.shape
        uri = figures.indexed_png(figures.blocks_image([steps[:, :, s] for s in range(scales)], _SCAS_STEPS), colours)
        means = found.scas_LHS.mean(axis=(0, 1))
        tops = [np.unravel_index(int(found.scas_LHS[:, :, s].argmax()), (layers, heads)) for s in range(scales)]
        alt = (
            f"Heat map of S-CAS, {layers} layers by {heads} heads for each of {scales} source scales; the largest of "
            "every scale is in the table below."
        )
        blocks.append(Heat(
            uri, alt, f"S-CAS of {report.merged.model}, {found.samples} samples", _under(names), (), layers, heads,
        ))  # fmt: skip
        sample = [colours[round(i * (_SCAS_STEPS - 1) / 6)] for i in range(7)]
        blocks.append(Legend((
            *(Key("0" if i == 0 else "the scale's largest" if i == 6 else "", colour=figures.css(colour))
              for i, colour in enumerate(sample)),
        ), ramp=True))  # fmt: skip
        lines = tuple(
            (Cell(name, s), number_cell(float(means[s]), ".4f"), number_cell(float(most_S[s]), ".4f"),
             Cell(f"layer {tops[s][0]}, head {tops[s][1]}"))
            for s, name in enumerate(names)
        )  # fmt: skip
        columns = ("source scale", "mean S-CAS", "largest", "of which head")
        blocks.append(Table(f"S-CAS by source scale, {found.samples} samples", columns, lines))
    return Section(
        "scas", "S-CAS", "What the heads look back at",
        "S-CAS is the attention mass that a head puts on an earlier scale, mean over later scales and samples. A block "
        "for every source scale; in it, a row for every layer and a column for every head.", blocks,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------ plans and memory over time

_NEVER: figures.Colour = (128, 128, 128, 56)
_NOTHING: figures.Colour = (0, 0, 0, 0)
_LEVEL_TITLES = {FULL: "whole", **{level: f"{level} or finer" for level in LEVELS[1:]}}
_SHARE_STEPS = 32


def plans(report: Report) -> Section:
    """What every plan keeps, and what the cache holds over time."""
    lines: list[tuple[Cell, ...]] = []
    missing: dict[str, list[str]] = {}
    folds: list[Block] = []
    kinds: dict[str, CachePlan] = {}
    order = [(budget, row) for budget, rows in reversed(budgets_of(report.merged.rows).items()) for row in rows]
    order += [(row.budget, row) for row in report.merged.rows if row.is_reference]
    cards: dict[str, list[Card]] = {}
    for number, (budget, row) in enumerate(order):
        found = plans_of(row)
        if isinstance(found, Missing):
            missing.setdefault(found.why, []).append(f"{report.merged.label(row)} {row.budget}")
            continue
        timed = _timeline(report, row, found, f"time-{number}")
        lines.append(_peak_line(report, row, found))
        if not row.is_reference:
            kinds.setdefault("dynamic" if isinstance(found[0], CapacityPlan) else "static", found[0])
            picture = _plan_heats(report, row, found[0])
            cards.setdefault(budget, []).append(
                Card(report.merged.label(row), report.style(row), _card_text(row, found), (*picture, *timed))
            )
    blocks: list[Block] = [*_plan_legends(kinds)]
    for place, (budget, of_budget) in enumerate(cards.items()):
        folds.append(Fold(f"Plans at {budget}", (Cards(tuple(of_budget)),), open=place == 0))
    blocks += folds
    if lines:
        columns = ("policy", "budget", "most held, MiB", "planned, MiB", "budget, MiB", "after scale", "after layer")
        caption = "The most that the cache holds at any moment, from the plan's own arrays, beside what the row tells"
        blocks.append(Table(caption, columns, tuple(lines)))
    for why, rows in missing.items():
        listed = ", ".join(rows[:6]) + (f" and {len(rows) - 6} more" if len(rows) > 6 else "")
        blocks.append(Note(f"No plan of {listed}: {why}.", missing=True))
    return Section(
        "plans", "Plans", "What is kept, where, until when",
        "Above, what a plan keeps: a block for every scale, in it a row for every layer and a column for every head. Below, the memory that the "
        "cache takes after every layer of every scale, against the budget (dashed).", blocks,
    )  # fmt: skip


def _live_bytes(row: Row, plan: CachePlan) -> list[int] | None:
    """Bytes at every checkpoint, scale by scale and layer by layer; None where the row does not tell rows and type."""
    rows, dtype = row.number("rows"), row.told.get("dtype")
    if rows is None or dtype is None:
        return None
    return [plan.bytes_of(int(live), int(rows), dtype) for live in plan.live.ravel()]


def _timeline(report: Report, row: Row, found: Sequence[CachePlan], name: str) -> list[Block]:
    live = [of_plan for plan in found if (of_plan := _live_bytes(row, plan)) is not None]
    if not live or row.is_reference:
        return []
    names, budget = _under(scale_names(found[0].schedule)), row.number("budget_bytes")
    most = max(max(values) for values in live)
    label = f"Memory of {report.merged.label(row)} at {row.budget} over time: at most {mib(most)} MiB" + (
        "" if budget is None else f" of the {mib(budget)} MiB allowed"
    )
    power, unit = (30, "GiB") if most >= 2**30 else (20, "MiB") if most >= 2**17 else (10, "KiB")
    in_unit = [[value / 2**power for value in values] for values in live]
    drawing = figures.timeline(
        name, label, in_unit, None if budget is None else budget / 2**power, None, found[0].geometry.layers, names,
        report.style(row), unit,
    )  # fmt: skip
    return [Chart(drawing)]


def _peak_line(report: Report, row: Row, found: Sequence[CachePlan]) -> tuple[Cell, ...]:
    peaks = [(max(live), plan) for plan in found if (live := _live_bytes(row, plan)) is not None]
    most, plan = max(peaks, key=lambda pair: pair[0], default=(None, found[0]))
    target, layer = plan.peak_checkpoint
    planned = row.number("planned_bytes")
    wrong = most is not None and planned is not None and most != planned
    return (
        report.name(row), Cell(row.budget, row.number("budget_bytes")),
        MISSING if most is None else Cell(mib(most) + (" (not what the row tells)" if wrong else ""), most),
        mib_cell(planned), mib_cell(row.number("budget_bytes")), Cell(str(target), target), Cell(str(layer), layer),
    )  # fmt: skip


def _card_text(row: Row, found: Sequence[CachePlan]) -> str:
    kept = float(np.mean([kept_of_heads(plan.held, plan.schedule.tokens).mean() for plan in found]))
    parts = [f"holds {kept:.0%} of all tokens over time"]
    if len(found) > 1:
        parts.append(f"first of {len(found)} plans above, all of them below")
    if isinstance(found[0], CapacityPlan):
        parts.append("which tokens, it chooses while drawing")
        if found[0].shared:
            parts.append("the heads of a layer share their room")
    return "; ".join(parts)


def _plan_heats(report: Report, row: Row, plan: CachePlan) -> list[Block]:
    label, names = f"{report.merged.label(row)} at {row.budget}", scale_names(plan.schedule)
    layers, heads, scales = plan.held.shape
    if isinstance(plan, Plan):
        kept = kept_of_scales(
            [last_read for _, last_read in plan.levels],
            [level_tokens(plan.schedule, level) for level, _ in plan.levels],
        )
        below = tuple(f"{share:.0%}".removesuffix("%") for share in kept)
        told = ", ".join(f"{share:.0%} of scale {s}" for s, share in enumerate(kept))
        heats: list[Block] = []
        for level, last_read in plan.levels:
            until = np.where(last_read > np.arange(scales), last_read, scales)
            image = figures.blocks_image([until[:, :, s] for s in range(scales - 1)], scales + 1)
            title = _LEVEL_TITLES[level] if plan.coarse else "kept until"
            heats.append(Heat(
                figures.indexed_png(image, [*_until_colours(scales), _NEVER, _NOTHING]),
                f"What {label} keeps ({title}), of the tokens over time: {told}.", title, _under(names)[:-1],
                below if level == plan.levels[-1][0] else (), layers, heads,
            ))  # fmt: skip
        return heats
    available = np.maximum(available_tokens(plan.geometry), 1)
    share = plan.held / available
    steps = np.where(plan.held > 0, np.ceil(share * (_SHARE_STEPS - 1)), _SHARE_STEPS).astype(np.int64)
    image = figures.blocks_image([steps[:, :, t] for t in range(1, scales)], _SHARE_STEPS + 1)
    means = share.mean(axis=(0, 1))[1:]
    told = ", ".join(f"{mean:.0%} at scale {t}" for t, mean in enumerate(means, 1))
    colours = [*figures.ramp("viridis", _SHARE_STEPS), _NEVER, _NOTHING]
    return [
        Heat(
            figures.indexed_png(image, colours), f"Share of earlier tokens that {label} holds: {told}.",
            "share held", _under(names)[1:], tuple(f"{mean:.0%}".removesuffix("%") for mean in means), layers, heads,
        )
    ]  # fmt: skip


def _until_colours(scales: int) -> list[figures.Colour]:
    """A colour for every target scale; the first is nobody's last."""
    return [_NEVER, *figures.ramp("viridis", scales - 1)]


def _plan_legends(kinds: dict[str, CachePlan]) -> list[Block]:
    blocks: list[Block] = []
    if "static" in kinds:
        names = scale_names(kinds["static"].schedule)
        colours = _until_colours(len(names))
        keys = [Key("never cached", colour=figures.css(_NEVER))]
        keys += [Key(name, colour=figures.css(colours[t])) for t, name in enumerate(names) if t]
        blocks.append(
            Note(
                "Kept until: a block for every source scale; the colour is the last target scale that reads the cell. Numbers under the blocks are the share kept of the scale's tokens over time, in %."
            )
        )
        blocks.append(Legend(tuple(keys)))
    if "dynamic" in kinds:
        colours = figures.ramp("viridis", 5)
        keys = [Key("none", colour=figures.css(_NEVER))]
        keys += [
            Key(f"{share:.0%}" if share else "few", colour=figures.css(colour))
            for share, colour in zip((0, 0.25, 0.5, 0.75, 1), colours, strict=True)
        ]
        blocks.append(
            Note(
                "Share held: policies that choose tokens while drawing have a block for every target scale; the colour is how many of all earlier tokens the head holds, and the numbers are the mean in %."
            )
        )
        blocks.append(Legend(tuple(keys)))
    return blocks


# ------------------------------------------------------------------------------------------------------- pictures

_SHEET_PIXELS = 1_300_000
"""Of all pictures of a report, so that it stays small."""
_LARGEST_SIDE = 128
_SHEET_GAP = 4


def pictures(report: Report) -> Section:
    """The same samples under the full cache and under every policy, and where they differ."""
    found: dict[int, np.ndarray[Any, Any]] = {}
    missing: dict[str, list[str]] = {}
    for row in report.merged.rows:
        of_row = pictures_of(row)
        if isinstance(of_row, Missing):
            missing.setdefault(of_row.why, []).append(f"{report.merged.label(row)} {row.budget}")
        else:
            found[id(row)] = of_row
    blocks: list[Block] = []
    largest = max((max(images.shape[1:3]) for images in found.values()), default=1)
    side = min(largest, _LARGEST_SIDE)
    columns = max(3, min(12, _SHEET_PIXELS // max(1, 2 * len(found) * side * side)))
    for source in report.merged.sources:
        reference = next((row for row in source.rows if row.is_reference and id(row) in found), None)
        for budget, rows in reversed(budgets_of(source.rows).items()):
            drawn = [row for row in rows if id(row) in found]
            if not drawn:
                continue
            strips = []
            full = None if reference is None else _thumbnails(found[id(reference)], columns, side)
            if full is not None:
                strips.append(Strip("full cache", "", _strip(full), f"{len(full)} pictures drawn with the full cache"))
            for row in drawn:
                images = _thumbnails(found[id(row)], columns, side)
                same = full is not None and full.shape == images.shape
                psnr = row.number("psnr_db")
                strips.append(Strip(
                    row.policy, "" if psnr is None else f"{psnr:.1f} dB", _strip(images),
                    f"The same {len(images)} samples under {row.policy} at {row.budget}",
                    _difference_strip(images, full) if same and full is not None else "",
                ))  # fmt: skip
            title = f"{source.label}, cache of {budget}" if report.several else f"Cache of {budget}"
            count = len(full) if full is not None else columns
            width = count * max(72, min(side, 112)) + (count - 1) * _SHEET_GAP
            sheet = Sheet(title, tuple(strips), width)
            first = not any(isinstance(block, Fold) for block in blocks)
            blocks.append(Fold(title, (sheet,), open=first))
    if blocks:
        ramp = figures.difference_colours()
        keys = [
            Key(f"{share:.0%}" + (" and more" if share == figures.DIFFERENCE_MOST else ""),
                colour=figures.css(ramp[round(share / figures.DIFFERENCE_MOST * (len(ramp) - 1))]))
            for share in (0.05, 0.1, 0.15, 0.2, 0.25)
        ]  # fmt: skip
        blocks.insert(0, Legend((Key("difference of the channels' range:", line=True), *keys)))
    for why, names in missing.items():
        listed = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
        blocks.append(Note(f"No pictures of {listed}: {why}.", missing=True))
    return Section(
        "pictures", "Pictures", "The same samples, drawn under every policy",
        "A column is one sample, drawn freely with the same random numbers; under every row, where its pictures differ "
        "from the full cache's. Of a policy that draws at random, its first plan.", blocks,
    )  # fmt: skip


Thumbnails = np.ndarray[Any, np.dtype[np.uint8]]


def _thumbnails(images_BHW3: Thumbnails, columns: int, side: int) -> Thumbnails:
    """The first pictures, at most `side` pixels wide and high."""
    chosen = images_BHW3[:columns]
    height, width = chosen.shape[1:3]
    if max(height, width) <= side:
        return chosen
    size = (max(1, round(width * side / max(height, width))), max(1, round(height * side / max(height, width))))
    return np.stack([np.asarray(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS)) for image in chosen])


def _strip(images_BHW3: Thumbnails) -> str:
    """The pictures beside each other, nothing between them."""
    count, height, width, _ = images_BHW3.shape
    pixels = np.zeros((height, count * (width + _SHEET_GAP) - _SHEET_GAP, 4), dtype=np.uint8)
    for index, image in enumerate(images_BHW3):
        left = index * (width + _SHEET_GAP)
        pixels[:, left : left + width, :3], pixels[:, left : left + width, 3] = image, 255
    return figures.rgb_png(pixels)


def _difference_strip(images_BHW3: Thumbnails, full_BHW3: Thumbnails) -> str:
    count, height, width, _ = images_BHW3.shape
    pixels = np.zeros((height, count * (width + _SHEET_GAP) - _SHEET_GAP, 3), dtype=np.uint8)
    other = pixels.copy()
    for index in range(count):
        left = index * (width + _SHEET_GAP)
        pixels[:, left : left + width], other[:, left : left + width] = images_BHW3[index], full_BHW3[index]
    return figures.difference_png(pixels, other)


# ---------------------------------------------------------------------------------------------------- environment


def environment(report: Report) -> Section:
    """Where and how all was measured."""
    sources = report.merged.sources
    told = [dict(_told_of(source)) for source in sources]
    names = list(dict.fromkeys(name for of_source in told for name in of_source))
    lines = tuple(
        (Cell(name), *(MISSING if name not in of_source else Cell(of_source[name]) for of_source in told)) for name in names
    )  # fmt: skip
    blocks: list[Block] = [
        Table("Machine, sampling and request", ("what", *(source.label for source in sources)), lines, sortable=False)
    ]
    settings: dict[tuple[str, ...], list[str]] = {}
    for row in report.merged.rows:
        options = {name: value for name, value in (row.told.get("settings") or {}).items() if name != "budget"}
        text = ", ".join(f"{name} {plain_text(value)}" for name, value in options.items()) or "none told"
        settings.setdefault((report.merged.label(row), text), []).append(row.budget)
    of_policies = tuple(
        (Cell(label, style=report.styles[label]), Cell(", ".join(dict.fromkeys(budgets))), Cell(text, kind="wide"))
        for (label, text), budgets in settings.items()
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


SECTIONS: tuple[Callable[[Report], Section | None], ...] = (
    summary, frontier, memory_and_time, per_scale, scas, plans, pictures, all_rows, further, environment,
)  # fmt: skip

__all__ = ["NOT_MEASURED", "REFERENCE", "SECTIONS", "Report", "headline", "kl_of", "median_of"]
