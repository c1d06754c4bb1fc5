"""Sections of fidelity: summary, KL against memory, and KL by scale; over seeds first, where there are several."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from heatkv.profiling.report import figures
from heatkv.profiling.report.against_memory import EQUALS, Point, at_budgets, memory_axis, series, unnamed
from heatkv.profiling.report.blocks import (
    MISSING,
    Block,
    Cell,
    Chart,
    Fold,
    Heading,
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
from heatkv.profiling.report.old_merging import Group, Row, budgets_of, leaders, pareto_front, ranked
from heatkv.profiling.report.over_seeds import Entry, Family, entries_of
from heatkv.profiling.report.reporting import (
    Report,
    apart,
    broken_promises,
    heading,
    kl_of,
    listed,
    of_cache,
    scale_names,
)

# ------------------------------------------------------------------------------------------------------ summary


def headline(report: Report) -> str:
    """The main result in a sentence."""
    family, group = report.main_family, report.main_group
    budgets = family.entries if family is not None and family.entries else entries_of(group.rows) if group else {}
    if not budgets:
        policies = len({row.policy for row in report.merged.rows if not row.is_reference})
        return f"What {policies} cache polic{'y' if policies == 1 else 'ies'} of {report.merged.model} take"
    budget, entries = list(budgets.items())[-1]
    best = [f"{e.policy} of {e.source.label}" if report.several else e.policy for e in leaders(entries, _kl)]
    if len(best) > 1:
        return f"{of_cache(budget)}, {listed(best)} tie as closest to the full cache"
    return f"{of_cache(budget)}, {best[0]} stays closest to the full cache"


def _kl(entry: Entry) -> float | None:
    return entry.kl


def _held(entry: Entry) -> float | None:
    return entry.held_bytes


def summary(report: Report) -> Section:
    """The best policy of every budget, in large letters and in a table; over seeds, and then of every one."""
    blocks: list[Block] = []
    for family in report.families:
        if family.entries:
            blocks += [Heading(_over_title(report, family)), *_best(report, family.entries)]
            of_seeds: list[Block] = []
            for group in family.groups:
                if entries := entries_of(group.rows):
                    of_seeds += [*heading(report, group, family.groups), *_best(report, entries)]
            blocks.append(Fold("Every seed", tuple(of_seeds)))
        else:
            for group in family.groups:
                if entries := entries_of(group.rows):
                    blocks += [*heading(report, group, report.merged.fidelity_groups), *_best(report, entries)]
    if not blocks:
        blocks.append(Note("Fidelity was not measured: there is no KL in these results.", missing=True))
    elif note := _apart(report):
        blocks.insert(0, Note(note))
    return Section("summary", "Summary", headline(report), _lead(report), blocks)


def _over_title(report: Report, family: Family) -> str:
    """The heading of means over seeds."""
    seeds = listed(map(str, family.seeds))
    return ", ".join(filter(None, [f"Means over {len(family.seeds)} seeds ({seeds})", family.title]))


def _apart(report: Report) -> str:
    """Why there are several rankings, and what stands for more than one batch."""
    groups = report.merged.fidelity_groups
    told = []
    if any(family.entries for family in report.families):
        told.append("Every seed has samples of its own, so that seeds are ranked apart; means over them stand first.")
    if len(report.families) > 1 or (len(groups) > 1 and not told):
        told.append(
            "These folders measured fidelity on different things; only what was measured alike is ranked together."
            if report.several else "Rows were measured on different things; only what was measured alike is ranked "
            "together."
        )  # fmt: skip
    if also := list(dict.fromkeys(text for group in groups for text in group.also)):
        told.append(
            f"The KLs of {listed(also)} are not shown again: they are of the very same images, and exactly equal. "
            "Bytes beside a KL are those of the first."
        )  # fmt: skip
    return " ".join(told)


def _best(report: Report, budgets: dict[str, list[Entry]]) -> list[Block]:
    """Tiles of the best policy at every budget, and the same as a table."""
    names = report.short_labels([entry.first for entries in budgets.values() for entry in entries], ())
    tiles, lines = [], []
    for budget, entries in budgets.items():
        best = leaders(entries, _kl)
        first, others = best[0], [entry for entry in ranked(entries, _kl) if entry not in best]
        others = [entry for entry in others if entry.policy not in {entry.policy for entry in best}]
        tops = [entry.top1 for entry in best]
        title = listed(names[entry.first] for entry in best)
        told = [f"{len(best)} tie"] if len(best) > 1 else []
        told += _over_seeds_text(first)
        told += [] if tops[0] is None or set(tops) != {tops[0]} else [f"{tops[0]:.1%} of the likeliest codes unchanged"]
        if others:
            told.append(f"next is {names[others[0].first]} with {others[0].kl:.3f}")
        told += [text for entry in best for text in broken_promises(entry.first)]
        room = first.first.number("budget_bytes")
        over = budget if room is None or "MiB" in budget else f"{budget} · {mib(room)} MiB"
        style = report.style(first.first)
        tiles.append(Tile(over, f"{first.kl:.3f}", "KL, nats per token", title, "; ".join(told), style))
        second = others[0] if others else None
        lines.append((
            Cell(budget, room), Cell(title + (" (tie)" if len(best) > 1 else ""), title, style=style),
            number_cell(first.kl, ".4f"), number_cell(tops[0], ".1%"),
            Cell("none") if second is None else report.name(second.first, names[second.first]),
            Cell("none") if second is None else number_cell(second.kl, ".4f"),
        ))  # fmt: skip
    columns = ("budget", "least KL", "KL, nats per token", "top-1", "next policy", "its KL")
    table = Table("Best policy at each budget", columns, tuple(lines), 1)
    return [Tiles(tuple(tiles)), Fold("The same as a table", (table,))]


def _over_seeds_text(entry: Entry) -> list[str]:
    if entry.sd is None:
        return []
    return [f"{min(entry.kls):.3f} to {max(entry.kls):.3f} over {len(entry.kls)} seeds"]


def _lead(report: Report) -> str:
    """What was measured, in a sentence."""
    merged, group = report.merged, report.main_group
    row = next(iter(group.rows if group is not None else merged.rows))
    facts = []
    if row.number("images") is not None:
        facts.append(f"KL and top-1 over {row.told['images']} images")
    if row.number("pictures"):
        facts.append(f"PSNR and SSIM over {row.told['pictures']} pictures")
    if any(len(source.axes) and "seed" in source.axes for source in merged.sources):
        facts[:] = [f"{fact} of every seed" for fact in facts]
    if counts := sorted({count for of_row in merged.rows if (count := of_row.number("rows")) is not None}):
        dtypes = dict.fromkeys(of_row.told.get("dtype") or "a type that is not told" for of_row in merged.rows)
        facts.append(f"a cache of {listed(f'{count:g}' for count in counts)} rows in {listed(dtypes)}")
    where = list(merged.machines.values())
    facts.append(f"on {where[0]}" if len(where) == 1 else f"on {len(where)} machines")
    return (
        f"{merged.model}: {', '.join(facts)}. KL is that of the guided logits under the full cache to those under the "
        "policy, in nats per token, lower is better."
    )


# ------------------------------------------------------------------------------------------------ against memory


def frontier(report: Report) -> Section | None:
    """KL against bytes: over seeds where there are several, and then of every one."""
    groups = report.merged.fidelity_groups
    if not groups:
        return None
    blocks: list[Block] = []
    number = itertools.count()
    for family in report.families:
        if not family.entries:
            for group in family.groups:
                blocks += heading(report, group, groups)
                blocks += _kl_chart(report, f"frontier-{next(number)}", entries_of(group.rows))
            continue
        blocks.append(Heading(_over_title(report, family)))
        blocks += _kl_chart(report, f"frontier-{next(number)}", family.entries)
        blocks.append(_seeds_table(report, family))
        of_seeds: list[Block] = []
        for group in family.groups:
            of_seeds += heading(report, group, family.groups)
            of_seeds += _kl_chart(report, f"frontier-{next(number)}", entries_of(group.rows))
        blocks.append(Fold("Every seed", tuple(of_seeds)))
    return Section(
        "fidelity", "Fidelity", "What a budget costs in fidelity",
        "Every policy at every budget; the full cache, with a KL of 0, is what they are compared with.", blocks,
    )  # fmt: skip


def _kl_chart(report: Report, name: str, budgets: dict[str, list[Entry]]) -> list[Block]:
    """KL against bytes as a chart with a table beside it; the table alone where no KL has a place on the axis."""
    entries = [entry for of_budget in budgets.values() for entry in of_budget]
    if not entries:
        return []
    names = report.short_labels([entry.first for entry in entries], ())
    table = _kl_table(report, names, budgets)
    shown = [entry for entry in entries if entry.kl > 0]
    if not shown:
        return [table]
    front = pareto_front(shown, _held, _kl)
    of_front = {entry.first for entry in front}
    lines = series(
        report, [Point(e.first, e.held_bytes, e.kl, e.span, _fidelity_tip(names, e)) for e in shown], names, of_front
    )  # fmt: skip
    points = [(held / 2**20, entry.kl) for entry in front if (held := entry.held_bytes)]
    on_front = f"On the Pareto front: {at_budgets(names, [entry.first for entry in reversed(front)])}."
    drawing = figures.line_chart(
        name, f"KL against memory, both logarithmic. {on_front}", lines, points,
        memory_axis(entry.first for entry in shown), figures.Axis("KL, nats per token", True),
    )  # fmt: skip
    captions = [
        "Lower left is better. The broad band is the Pareto front: nothing else on it has less KL in as few bytes; "
        f"{EQUALS}. Points lie at the bytes that are allocated in the arena.",
        on_front,
        *unnamed(lines),
    ]
    if any(entry.sd is not None for entry in shown):
        captions.append("Points are means over seeds, bars the range from the least to the most.")
    elif any(entry.span for entry in shown):
        captions.append("Bars are the range over the plans of a policy that draws at random.")
    if left_out := [entry.first for entry in entries if entry not in shown]:
        captions.append(f"A KL of 0 has no place on this axis: {at_budgets(names, left_out)}.")
    return [Chart(drawing, tuple(captions), (table,))]


def _fidelity_tip(names: Mapping[Row, str], entry: Entry) -> str:
    row, over = entry.first, "; ".join(["", *_over_seeds_text(entry)])
    return f"{names[row]} at {row.budget}: KL {entry.kl:.4f}{over}, {mib(entry.held_bytes or 0)} MiB"


def _kl_table(report: Report, names: Mapping[Row, str], budgets: dict[str, list[Entry]]) -> Table:
    """KL by policy and budget, from the least at the smallest budget on; the least of every budget is marked."""
    found = [entry.kl for entries in budgets.values() for entry in entries if entry.kl > 0]
    bounds = (min(found), max(found)) if found else (0.0, 0.0)
    best = {entry for entries in budgets.values() for entry in leaders(entries, _kl)}
    of_names: dict[str, dict[str, Entry]] = {}
    for budget, entries in budgets.items():
        for entry in entries:
            of_names.setdefault(names[entry.first], {})[budget] = entry

    def order(name: str) -> tuple[Any, ...]:
        of_name = of_names[name]
        return (*((b not in of_name, of_name[b].kl if b in of_name else 0) for b in reversed(budgets)), name)

    lines = []
    for name in sorted(of_names, key=order):
        cells = [report.name(next(iter(of_names[name].values())).first, name)]
        for budget in budgets:
            if (entry_here := of_names[name].get(budget)) is None:
                cells.append(MISSING)
                continue
            kl, kind = entry_here.kl, "best" if entry_here in best else ""
            cells.append(number_cell(kl, ".4f", kind, log_shade(kl, *bounds)))
        lines.append(tuple(cells))
    on = next(entry for entries in budgets.values() for entry in entries)
    images = f"{on.first.told.get('images') or 'untold'} images"
    if on.sd is not None:
        images = f"{len(on.rows)} seeds of {images} each"
    return Table(
        f"KL in nats per token by budget, over {images}; the least in bold", ("policy", *budgets), tuple(lines)
    )


def _seeds_table(report: Report, family: Family) -> Table:
    """Means over seeds with their spread."""
    names = report.short_labels([entry.first for entries in family.entries.values() for entry in entries], ())
    lines = []
    for budget, entries in family.entries.items():
        best = leaders(entries, _kl)
        lines += [
            (
                report.name(entry.first, names[entry.first]), Cell(budget, entry.first.number("budget_bytes")),
                number_cell(entry.kl, ".4f", "best" if entry in best else ""), number_cell(entry.sd, ".4f"),
                number_cell(min(entry.kls), ".4f"), number_cell(max(entry.kls), ".4f"),
                number_cell(entry.top1, ".1%"), mib_cell(entry.held_bytes),
            )
            for entry in ranked(entries, _kl)
        ]  # fmt: skip
    columns = (
        "policy", "budget", "mean KL, nats", "standard deviation, nats", "least, nats", "most, nats", "mean top-1",
        "held, MiB",
    )  # fmt: skip
    seeds = listed(map(str, family.seeds))
    caption = (
        f"KL per token over the seeds {seeds}: mean, standard deviation from seed to seed, and range; each seed has "
        "samples of its own, on which all policies are compared"
    )
    return Table(caption, columns, tuple(lines))


# --------------------------------------------------------------------------------------------------- scale by scale


def per_scale(report: Report) -> Section | None:
    """KL by target scale."""
    groups = [
        replace(group, rows=tuple(row for row in group.rows if row.told.get("kl_per_scale")))
        for group in report.merged.fidelity_groups
    ]
    groups = [group for group in groups if group.rows]
    if not groups:
        return None

    def of_group(index: int, group: Group) -> list[Block]:
        budgets = budgets_of(group.rows)
        of_scales = [row.told["kl_per_scale"] for row in group.rows]
        schedule = group.rows[0].schedule
        names = [str(s) for s in range(len(of_scales[0]))] if schedule is None else scale_names(schedule)
        labels = report.short_labels(group.rows)
        panels = {
            budget: [figures.ScaleLine(report.style(row), row.told["kl_per_scale"]) for row in rows]
            for budget, rows in budgets.items()
        }
        made: list[Block] = []
        if panels:
            drawing = figures.scale_panels(
                f"scales-{index}", "KL by target scale, a panel for every budget; the table below has the figures.",
                panels, names, "KL, nats per token",
            )  # fmt: skip
            captions = ("A panel for every budget, all on the same axes.", _first_losses(budgets, names))
            legend = report.legend(row for rows in budgets.values() for row in rows)
            made.append(Chart(drawing, captions, (legend,)))
        positive = [kl for told in of_scales for kl in told if kl > 0]
        bounds = (min(positive), max(positive)) if positive else (0.0, 0.0)
        lines = tuple(
            (report.name(row, labels[row]), Cell(row.budget, row.number("budget_bytes")),
             *(number_cell(kl, ".4f", "", log_shade(kl, *bounds)) for kl in row.told["kl_per_scale"]))
            for row in [*(r for rows in budgets.values() for r in ranked(rows, kl_of)),
                        *(r for r in group.rows if r.is_reference)]
        )  # fmt: skip
        return [*made, Table("KL in nats per token by target scale", ("policy", "budget", *names), lines)]

    blocks = apart(report, groups, of_group)
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
