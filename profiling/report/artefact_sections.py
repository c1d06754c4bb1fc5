"""The sections that are made of what lies beside the results: S-CAS of the heads, plans, pictures.

Arrays: L layers, H heads, T scales, S source scales, B pictures.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray
from PIL import Image

from heatkv.core.capacity_plan import available_tokens
from heatkv.core.levels import level_tokens
from heatkv.core.plan import CachePlan, Plan
from heatkv.profiling.analysis.explain import kept_of_heads, kept_of_scales
from heatkv.profiling.report import charts
from heatkv.profiling.report.charts import Pixels
from heatkv.profiling.report.pools import Blocks, Report, scale_names
from heatkv.profiling.report.sections import held_chart
from heatkv.profiling.results.artefacts import pictures_of, plans_of, scas_of
from heatkv.profiling.results.comparable import REFERENCE
from heatkv.profiling.results.merging import Row, budgets_of

_NEVER = np.array([128, 128, 128, 56], np.uint8)
_STEPS = 64


def _heat(report: Report, title: str, colours_LHSC: Pixels, names: Sequence[str], shares: Iterable[float]) -> Markup:
    """A heat map with a block for every scale, layers by heads; `shares` are written under these."""
    layers, heads = colours_LHSC.shape[:2]
    uri = charts.strip(list(colours_LHSC.transpose(2, 0, 1, 3)), 1)
    markup: Markup = report.ui.heat(uri, title, layers, heads, names, [f"{100 * share:.0f}" for share in shares])
    return markup


def scas(report: Report) -> Blocks:
    """S-CAS of every head by source scale."""
    blocks: list[Markup] = []
    for source in report.merged.sources:
        found = scas_of(source.folder, source.results.request.statistics)
        if isinstance(found, str):
            blocks.append(report.ui.missing("S-CAS", {found: [source.label]}))
            continue
        scas_LHS = np.array(found.scas)
        largest_S = scas_LHS.max(axis=(0, 1))
        steps = np.round(scas_LHS / np.maximum(largest_S, np.finfo(float).tiny) * (_STEPS - 1)).astype(np.int64)
        colours = charts.ramp("magma", _STEPS, 0.05)
        names = scale_names(source.rows[0].result)[:-1]
        title = f"S-CAS of {report.merged.model}, {len(found.provenance['samples'])} samples"
        keys = [charts.css(colours[step]) for step in (0, _STEPS // 3, 2 * _STEPS // 3, _STEPS - 1)]
        heat = _heat(report, title, colours[steps], names, largest_S)
        blocks.append(report.ui.scas(source.label if report.several else "", heat, keys))
    return blocks


# ------------------------------------------------------------------------------------------------------- plans


def plans(report: Report) -> Blocks:
    """What every plan keeps, and what the cache holds over time."""
    missing: dict[str, list[str]] = {}
    cards: dict[str, list[Markup]] = {}
    for budget, rows in reversed(budgets_of(report.merged.rows).items()):
        for row in rows:
            found = plans_of(row.source.folder, row.result)
            if isinstance(found, str):
                missing.setdefault(found, []).append(f"{report.merged.label(row)} {row.result.budget}")
            else:
                point = [f"{axis} {getattr(row.result, axis)}" for axis in row.source.axes]
                title = ", ".join([f"Plans at {budget}", *point])
                cards.setdefault(title, []).append(_card(report, row, found))
    names = scale_names(report.merged.rows[0].result)[1:]
    colours = zip(map(charts.css, charts.ramp("viridis", len(names))), names, strict=True)
    return [report.ui.plans(cards, charts.css(_NEVER), list(colours)), report.ui.missing("plan", missing)]


def _card(report: Report, row: Row, found: Sequence[CachePlan]) -> Markup:
    """The maps of the first plan, and the memory of all of them over time."""
    result, style = row.result, report.styles[report.merged.label(row, ())]

    def held(plan: CachePlan) -> NDArray[np.int64]:
        return np.array([[plan.bytes_of(int(n), result.rows, result.storage) for n in live_L] for live_L in plan.live])

    chart = held_chart("", [(style, held(plan)) for plan in found], result, (430, 150))
    kept = float(np.mean([kept_of_heads(plan.held, plan.schedule.tokens).mean() for plan in found]))
    most = max(held(plan).max() for plan in found)
    heats = _kept_until(report, found[0], scale_names(result))
    markup: Markup = report.ui.card(report.merged.label(row), style, heats, chart, found, kept, most)
    return markup


def _kept_until(report: Report, plan: CachePlan, names: Sequence[str]) -> list[Markup]:
    """Until when every cell is kept, at every level; of policies that choose tokens while drawing, how many they hold
    for every target scale."""
    scales = len(names)
    colours = np.vstack([charts.ramp("viridis", scales - 1), _NEVER])
    if not isinstance(plan, Plan):
        share = (plan.held / np.maximum(available_tokens(plan.geometry), 1))[:, :, 1:]
        steps = np.where(share > 0, np.ceil(share * (scales - 2)), scales - 1).astype(np.int64)
        return [_heat(report, "share held", colours[steps], names[1:], share.mean(axis=(0, 1)))]
    tokens = [level_tokens(plan.schedule, level) for level, _ in plan.levels]
    kept = kept_of_scales([last_read for _, last_read in plan.levels], tokens)
    heats = []
    for place, (level, last_read) in enumerate(plan.levels, 1):
        until = np.where(last_read > np.arange(scales), last_read - 1, scales - 1)[:, :, :-1]
        title = f"kept until, at level {level}" if plan.coarse else "kept until"
        heats.append(_heat(report, title, colours[until], names[:-1], kept if place == len(plan.levels) else ()))
    return heats


# ---------------------------------------------------------------------------------------------------- pictures

_SHEET_PIXELS = 1_300_000
"""Of all pictures of a report and their differences, so that it stays small."""
_LARGEST_SIDE = 128
_GAP = 4


def pictures(report: Report) -> Blocks:
    """The same samples under the full cache and under every policy, and where they differ."""
    missing: dict[str, list[str]] = {}
    seeds: dict[tuple[str, int], dict[str, tuple[Row, Pixels]]] = {}
    for row in report.merged.rows:
        images = pictures_of(row.source.folder, row.result)
        if isinstance(images, str):
            missing.setdefault(images, []).append(f"{report.merged.label(row)} {row.result.budget}")
        else:  # batches share comparisons, and so pictures: the first stands for all
            found = seeds.setdefault((row.source.label, row.result.seed), {})
            found.setdefault(row.result.name, (row, _thumbnails(images, len(report.merged.rows))))
    sheets = []
    for (label, seed), found in seeds.items():
        rows = dict(found.values())
        full = next((images for row, images in rows.items() if row.result.policy == REFERENCE), None)
        parts = ([label] if report.several else []), ([f"seed {seed}"] if len({key[1] for key in seeds}) > 1 else [])
        for budget, of_budget in reversed(budgets_of(rows).items()):
            strips: list[Any] = [] if full is None else [("full cache", None, charts.strip(full, _GAP), "")]
            for row in of_budget:
                far = "" if full is None else charts.strip(charts.differences(rows[row], full), _GAP)
                strips.append((row.result.policy, row.result.psnr_db, charts.strip(rows[row], _GAP), far))
            count, _, across, _ = rows[of_budget[0]].shape
            width = count * (min(max(across, 72), 112) + _GAP) - _GAP
            sheets.append((", ".join([*parts[0], f"Cache of {budget}", *parts[1]]), strips, width))
    shares = np.linspace(0, charts.DIFFERENCE_MOST, 6)[1:]
    keys = [(charts.css(charts.difference_colour(share)), f"{share:.0%}") for share in shares]
    return [report.ui.sheets(sheets, keys), report.ui.missing("pictures", missing)]


def _thumbnails(images_BHW3: Pixels, rows: int) -> Pixels:
    """The first pictures of one of this many rows, as many and as large as all of them together may have pixels."""
    small = [Image.fromarray(image) for image in images_BHW3[:12]]
    for image in small:
        image.thumbnail((_LARGEST_SIDE, _LARGEST_SIDE), Image.Resampling.LANCZOS)
    count = max(3, _SHEET_PIXELS // (2 * rows * small[0].width * small[0].height))
    return np.stack([np.asarray(image) for image in small[:count]])
