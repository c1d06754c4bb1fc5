"""Sections made of the rows of results: summary, fidelity and time against memory, scales, all figures, environment."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from heatkv.profiling import figures
from heatkv.profiling.blocks import (
    MISSING,
    Block,
    Cell,
    Chart,
    Fold,
    Key,
    Legend,
    Note,
    Section,
    Table,
    Tile,
    Tiles,
    log_shade,
    mib,
    mib_cell,
    number_cell,
)
from heatkv.profiling.memory_figures import unplaced
from heatkv.profiling.merging import Group, Row, Source, budgets_of, pareto_front, ranked
from heatkv.profiling.reporting import Report, heading, held_of, kl_of, median_of, of_cache, scale_names
from heatkv.profiling.row_fields import KNOWN, is_number
from heatkv.profiling.runner import LEAST_USED

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
    told = f"{best.policy} of {best.source.label}" if report.several else best.policy
    return f"{of_cache(budget)}, {told} stays closest to the full cache"


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
            others = [row for row in others if row.policy != best.policy]
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
        blocks += heading(group, groups)
        blocks.append(Tiles(tuple(tiles)))
        columns = ("budget", "least KL", "KL, nats per token", "top-1", "next policy", "its KL")
        blocks.append(Fold("The same as a table", (Table("Best policy at each budget", columns, tuple(lines), 1),)))
    if not blocks:
        blocks.append(Note("Fidelity was not measured: there is no KL in these results.", missing=True))
    elif len(groups) > 1:
        blocks.insert(0, Note(
            "These folders measured fidelity on different things; only what was measured alike is ranked together."
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
        blocks += heading(group, groups)
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
            if (found_row := of_labels[label].get(budget)) is None:
                cells.append(MISSING)
                continue
            kl, kind = kl_of(found_row), "best" if id(found_row) in best else ""
            cells.append(number_cell(kl, ".4f", kind, log_shade(kl, *bounds)))
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
        blocks += heading(group, groups)
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
        blocks += _yardsticks(group)
        blocks.append(_time_table(report, group, {id(row) for row in front}))
    return Section(
        "latency", "Latency", "Memory and latency",
        "Times are ranked within one machine only: the same device, threads, system and versions.", blocks,
    )  # fmt: skip


_YARDSTICK = "matrix_product_1024_fp32_one_thread_ms"
_ALIKE = 1.1
"""Times as long as another that a yardstick may take on a machine that ran alike."""


def _yardsticks(group: Group) -> list[Block]:
    """A warning where the folders of a ranking measured the same machine at different speeds."""
    took = [told for source in group.sources if is_number(told := source.environment.get(_YARDSTICK)) and told > 0]
    if not took or max(took) <= _ALIKE * min(took):
        return []
    return [
        Note(
            f"A fixed matrix product took {min(took):.1f} to {max(took):.1f} ms in these folders: the machine was not "
            "equally fast in all of them, or they are of two machines that tell the same of themselves. Times of "
            "different folders do not compare well then.",
            missing=True,
        )
    ]


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
    columns = ("rank", "policy", "budget", "median ms", "IQR ms", "of full cache", "arena MiB")
    return Table("Time of one batch, the fastest first; the Pareto front in bold", columns, tuple(lines), 2)


# ---------------------------------------------------------------------------------------------- all that is told

_LEDGERS = (
    ("budget_bytes", "allowed"), ("planned_bytes", "planned"), ("allocated_bytes", "allocated"),
    ("compensation_bytes", "corrections"), ("index_bytes", "tables"), ("workspace_bytes", "workspace"),
    ("current_bytes", "running layer"), ("device_peak_bytes", "device peak"), ("nvml_bytes", "driver"),
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
                number_cell(median_of(row), ".1f"), number_cell(time.get("iqr"), ".1f"),
                number_cell(time.get("runs"), "g"),
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


def broken_promises(row: Row) -> list[str]:
    """What a row's bytes are that they must not be, in words."""
    allowed, planned, allocated = (row.number(f"{name}_bytes") for name in ("budget", "planned", "allocated"))
    told = []
    if allocated is not None and planned is not None and allocated != planned:
        told.append(f"allocated and planned differ by {_difference(allocated - planned)}")
    for name, count in (("allocated", allocated), ("planned", planned)):
        if count is not None and allowed is not None and count > allowed:
            told.append(f"{name} is above the budget by {_difference(count - allowed)}")
    return told


def _difference(count: float) -> str:
    """Bytes with what they are in MiB, where these are more than a few."""
    return f"{abs(count):,.0f} bytes" + (f" ({mib(abs(count))} MiB)" if abs(count) >= 2**17 else "")


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
        blocks += heading(group, groups)
        panels = {
            budget: [figures.ScaleLine(report.style(row), row.told["kl_per_scale"]) for row in rows]
            for budget, rows in budgets.items()
        }
        if panels:
            labels = dict.fromkeys(report.merged.label(row) for rows in budgets.values() for row in rows)
            legend = Legend(tuple(Key(label, report.styles[label]) for label in labels))
            drawing = figures.scale_panels(
                f"scales-{index}", "KL by target scale, a panel for every budget; the table below has the figures.",
                panels, names, "KL, nats per token",
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
