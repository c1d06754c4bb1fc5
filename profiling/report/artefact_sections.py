"""Sections made of what lies beside the results: S-CAS of the heads, plans and the memory they take, pictures.

Arrays: L layers, H heads, T scales, S the T-1 source scales, B pictures.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from heatkv.core.capacity_plan import CapacityPlan, available_tokens
from heatkv.core.levels import FULL, LEVELS, level_tokens
from heatkv.core.plan import CachePlan, Plan
from heatkv.core.storage_type import StorageType
from heatkv.errors import BudgetError
from heatkv.profiling.analysis.explain import kept_of_heads, kept_of_scales
from heatkv.profiling.report import figures
from heatkv.profiling.report.blocks import (
    MISSING,
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
    mib,
    mib_cell,
    number_cell,
)
from heatkv.profiling.report.old_artefacts import Missing, pictures_of, plans_of, scas_of
from heatkv.profiling.report.old_merging import Merged, Row, Source, budgets_of
from heatkv.profiling.report.reporting import Report, scale_names, under

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
            uri, alt, f"S-CAS of {report.merged.model}, {found.samples} samples", under(names), (), layers, heads,
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
    order = _order(report)
    cards: dict[str, list[Card]] = {}
    for number, (title, row, name) in enumerate(order):
        found = plans_of(row)
        if isinstance(found, Missing):
            missing.setdefault(found.why, []).append(f"{report.merged.label(row)} {row.budget}")
            continue
        timed = _timeline(report, row, found, f"time-{number}")
        lines.append(_peak_line(report, row, found))
        if not row.is_reference:
            kinds.setdefault("dynamic" if isinstance(found[0], CapacityPlan) else "static", found[0])
            picture = _plan_heats(report, row, found[0])
            cards.setdefault(title, []).append(
                Card(name, report.style(row), _card_text(row, found), (*picture, *timed))
            )
    blocks: list[Block] = [*_plan_legends(kinds)]
    for place, (title, of_title) in enumerate(cards.items()):
        folds.append(Fold(title, (Cards(tuple(of_title)),), open=place == 0))
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
        "Above, what a plan keeps: a block for every scale, in it a row for every layer and a column for every head. "
        "Below, the memory that the cache takes after every layer of every scale, against the budget (dashed).", blocks,
    )  # fmt: skip


def _order(report: Report) -> list[tuple[str, Row, str]]:
    """All rows with their title and a name under it: those of a batch and seed together, the smallest budget first; the
    full cache last."""
    points: dict[str, list[Row]] = {}
    for row in report.merged.rows:
        points.setdefault(report.merged.point(row), []).append(row)
    order = []
    for point, rows in points.items():
        for budget, of_budget in reversed(budgets_of(rows).items()):
            names = report.short_labels(of_budget)
            room = of_budget[0].number("budget_bytes")
            size = "" if room is None or "MiB" in budget or not point else f"{mib(room)} MiB"
            title = ", ".join(filter(None, [f"Plans at {budget}", size, point]))
            order += [(title, row, names[row]) for row in of_budget]
    return order + [("", row, row.policy) for row in report.merged.rows if row.is_reference]


def _live_bytes(row: Row, plan: CachePlan) -> list[int] | None:
    """Bytes at every checkpoint, scale by scale and layer by layer; None where the row tells no rows, or no type that
    this release knows."""
    rows, storage = row.number("rows"), row.storage
    try:
        StorageType.parse(storage or "")
    except BudgetError:
        return None
    if rows is None or storage is None:
        return None
    return [plan.bytes_of(int(live), int(rows), storage) for live in plan.live.ravel()]


def _timeline(report: Report, row: Row, found: Sequence[CachePlan], name: str) -> list[Block]:
    live = [of_plan for plan in found if (of_plan := _live_bytes(row, plan)) is not None]
    if not live or row.is_reference:
        return []
    names, budget = under(scale_names(found[0].schedule)), row.number("budget_bytes")
    most = max(max(values) for values in live)
    label = f"Memory of {report.merged.label(row)} at {row.budget} over time: at most {mib(most)} MiB" + (
        "" if budget is None else f" of the {mib(budget)} MiB allowed"
    )
    power, unit = (30, "GiB") if most >= 2**30 else (20, "MiB") if most >= 2**17 else (10, "KiB")
    in_unit = [[value / 2**power for value in values] for values in live]
    drawing = figures.timeline(
        name, label, in_unit, None if budget is None else budget / 2**power, found[0].geometry.layers, names,
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
                f"What {label} keeps ({title}), of the tokens over time: {told}.", title, under(names)[:-1],
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
            "share held", under(names)[1:], tuple(f"{mean:.0%}".removesuffix("%") for mean in means), layers, heads,
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
                "Kept until: a block for every source scale; the colour is the last target scale that reads the cell. "
                "Numbers under the blocks are the share kept of the scale's tokens over time, in %.",
                of_drawing=True,
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
                "Share held: policies that choose tokens while drawing have a block for every target scale; the colour "
                "is how many of all earlier tokens the head holds, and the numbers are the mean in %.",
                of_drawing=True,
            )
        )
        blocks.append(Legend(tuple(keys)))
    return blocks


# ------------------------------------------------------------------------------------------------------- pictures

Thumbnails = np.ndarray[Any, np.dtype[np.uint8]]

_SHEET_PIXELS = 1_300_000
"""Of all pictures of a report and their differences, so that it stays small."""
_LARGEST_SIDE = 128
_SHEET_GAP = 4


def pictures(report: Report) -> Section:
    """The same samples under the full cache and under every policy, and where they differ."""
    found: dict[int, Thumbnails] = {}
    missing: dict[str, list[str]] = {}
    for row in report.merged.rows:
        of_row = pictures_of(row)
        if isinstance(of_row, Missing):
            missing.setdefault(of_row.why, []).append(f"{report.merged.label(row)} {row.budget}")
        else:
            found[id(row)] = _thumbnails(of_row, len(report.merged.rows))
    blocks: list[Block] = []
    for source, of_seed in _seeds(report.merged):
        reference = next((row for row in of_seed if row.is_reference and id(row) in found), None)
        full = None if reference is None else found[id(reference)]
        full_strip = "" if full is None else _strip(full)
        for budget, rows in reversed(budgets_of(of_seed).items()):
            drawn = [row for row in rows if id(row) in found]
            if not drawn:
                continue
            strips = []
            if full is not None:
                strips.append(Strip("full cache", "", full_strip, f"{len(full)} pictures drawn with the full cache"))
            for row in drawn:
                images = found[id(row)]
                same = full is not None and full.shape == images.shape
                psnr = row.number("psnr_db")
                strips.append(Strip(
                    row.policy, "" if psnr is None else f"{psnr:.1f} dB", _strip(images),
                    f"The same {len(images)} samples under {row.policy} at {row.budget}",
                    _difference_strip(images, full) if same and full is not None else "",
                ))  # fmt: skip
            title = f"{source.label}, cache of {budget}" if report.several else f"Cache of {budget}"
            title += f", seed {rows[0].seed}" if "seed" in source.axes else ""
            count, _, across, _ = found[id(drawn[0])].shape
            width = count * min(max(across, 72), 112) + (count - 1) * _SHEET_GAP
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
        blocks.insert(0, Legend((Key("difference, of the channels' range:"), *keys)))
    for why, names in missing.items():
        listed = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
        blocks.append(Note(f"No pictures of {listed}: {why}.", missing=True))
    return Section(
        "pictures", "Pictures", "The same samples, drawn under every policy",
        "A column is one sample, drawn freely with the same random numbers; under every row, where its pictures differ "
        "from the full cache's. Of a policy that draws at random, its first plan.", blocks,
    )  # fmt: skip


def _seeds(merged: Merged) -> list[tuple[Source, list[Row]]]:
    """The rows of every seed of every folder; batches share comparisons, and so pictures: the first stands for all."""
    found: dict[tuple[Source, int | None], dict[tuple[object, ...], Row]] = {}
    for row in merged.rows:
        found.setdefault((row.source, row.seed), {}).setdefault((row.name, row.told.get("comparison") or row), row)
    return [(source, list(of_seed.values())) for (source, _), of_seed in found.items()]


def _thumbnails(images_BHW3: Thumbnails, rows: int) -> Thumbnails:
    """The first pictures of one of so many rows, as many and as large as all of them together may have pixels."""
    height, width = images_BHW3.shape[1:3]
    largest = max(height, width)
    side = min(largest, _LARGEST_SIDE)
    chosen = images_BHW3[: max(3, min(12, _SHEET_PIXELS // (2 * rows * side * side)))]
    if largest == side:
        return chosen
    size = max(1, round(width * side / largest)), max(1, round(height * side / largest))
    return np.stack([np.asarray(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS)) for image in chosen])


def _strip(images_BHW3: Thumbnails) -> str:
    """The pictures beside each other, nothing between them."""
    count, height, width, _ = images_BHW3.shape
    pixels = np.zeros((height, count * (width + _SHEET_GAP) - _SHEET_GAP, 4), dtype=np.uint8)
    for index, image in enumerate(images_BHW3):
        left = index * (width + _SHEET_GAP)
        pixels[:, left : left + width, :3], pixels[:, left : left + width, 3] = image, 255
    return figures.rgba_png(pixels)


def _difference_strip(images_BHW3: Thumbnails, full_BHW3: Thumbnails) -> str:
    count, height, width, _ = images_BHW3.shape
    pixels = np.zeros((height, count * (width + _SHEET_GAP) - _SHEET_GAP, 3), dtype=np.uint8)
    other = pixels.copy()
    for index in range(count):
        left = index * (width + _SHEET_GAP)
        pixels[:, left : left + width], other[:, left : left + width] = images_BHW3[index], full_BHW3[index]
    return figures.difference_png(pixels, other)
