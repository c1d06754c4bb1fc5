"""The sections that are made of what lies beside the results: S-CAS of the heads, plans, pictures.

Arrays: L layers, H heads, T scales, S source scales, B pictures.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
from markupsafe import Markup
from PIL import Image

from heatkv.core.capacity_plan import CapacityPlan, available_tokens
from heatkv.core.levels import level_tokens
from heatkv.core.plan import CachePlan, Plan
from heatkv.profiling.analysis.explain import kept_of_heads, kept_of_scales
from heatkv.profiling.report import charts
from heatkv.profiling.report.charts import Colour, Line, Panel, Pixels
from heatkv.profiling.report.pools import Cell, Report, mib, scale_names
from heatkv.profiling.report.sections import Blocks, coarser
from heatkv.profiling.results.artefacts import pictures_of, plans_of, scas_of
from heatkv.profiling.results.comparable import REFERENCE
from heatkv.profiling.results.merging import Row, budgets_of

_NEVER: Colour = (128, 128, 128, 56)
_STEPS = 64


def scas(report: Report) -> Blocks:
    """S-CAS of every head by source scale."""
    blocks: list[Markup] = []
    for source in report.merged.sources:
        if report.several:
            blocks.append(report.ui.heading(source.label))
        found = scas_of(source.folder, source.results.request.statistics)
        if isinstance(found, str):
            blocks.append(report.ui.note(f"No S-CAS: {found}.", True))
            continue
        scas_LHS = np.array(found.scas)
        largest_S = np.maximum(scas_LHS.max(axis=(0, 1)), np.finfo(float).tiny)
        steps = np.round(scas_LHS / largest_S * (_STEPS - 1)).astype(np.int64)
        layers, heads, scales = scas_LHS.shape
        names = scale_names(source.rows[0].result)[:-1]
        colours = charts.ramp("magma", _STEPS, 0.05)
        samples = f"{len(found.provenance['samples'])} samples"
        uri = charts.heat_map([steps[:, :, s] for s in range(scales)], colours)
        alt = f"Heat map of S-CAS, {layers} layers by {heads} heads, for each of {scales} source scales"
        blocks.append(report.ui.heat(uri, alt, f"S-CAS of {report.merged.model}, {samples}", layers, heads, names))
        keys = {0: "0", _STEPS // 3: "", 2 * _STEPS // 3: "", _STEPS - 1: "the scale's largest"}
        blocks.append(report.ui.legend([(charts.css(colours[step]), text) for step, text in keys.items()]))
        lines = []
        for s, name in enumerate(names):
            layer, head = np.unravel_index(int(scas_LHS[:, :, s].argmax()), (layers, heads))
            mean, largest = float(scas_LHS[:, :, s].mean()), float(largest_S[s])
            figures = [Cell(f"{value:.4f}", value) for value in (mean, largest)]
            lines.append([Cell(name, s), *figures, Cell(f"layer {layer}, head {head}")])
        titles = ["source scale", "mean S-CAS", "largest", "of which head"]
        blocks.append(report.cells(f"S-CAS by source scale, {samples}", titles, lines))
    return blocks


# ------------------------------------------------------------------------------------------------------- plans


def plans(report: Report) -> Blocks:
    """What every plan keeps, and what the cache holds over time."""
    missing: dict[str, list[str]] = {}
    points: dict[str, list[Row]] = {}
    for row in report.merged.rows:
        points.setdefault(", ".join(f"{axis} {getattr(row.result, axis)}" for axis in row.source.axes), []).append(row)
    folds: list[Markup] = []
    numbers = itertools.count()
    for point, rows in points.items():
        for budget, of_budget in reversed(budgets_of(rows).items()):
            cards = []
            for row in of_budget:
                found = plans_of(row.source.folder, row.result)
                if isinstance(found, str):
                    missing.setdefault(found, []).append(f"{report.merged.label(row)} {row.result.budget}")
                else:
                    cards.append(_card(report, row, found, f"plan-{next(numbers)}"))
            if cards:
                title = ", ".join(filter(None, [f"Plans at {budget}", point]))
                folds.append(report.ui.fold(title, [report.ui.cards(cards)], not folds))
    names = scale_names(report.merged.rows[0].result)[1:]
    colours = list(zip(map(charts.css, charts.ramp("viridis", len(names))), names, strict=True))
    words = [report.ui.plan_words(charts.css(_NEVER), colours)] if folds else []
    return [*words, *folds, report.ui.missing("plan", missing)]


def _card(report: Report, row: Row, found: Sequence[CachePlan], name: str) -> Markup:
    result, style = row.result, report.styles[report.merged.label(row, ())]
    label = f"{report.merged.label(row)} at {result.budget}"
    lines = []
    for plan in found:
        live = [
            [plan.bytes_of(int(count), result.rows, result.storage) for count in of_scale] for of_scale in plan.live
        ]
        lines.append(Line(style, coarser(np.array(live) / 2**20)))
    limit, scales = result.budget_bytes / 2**20, scale_names(result)
    svg = charts.scale_chart(name, f"Memory of {label} over time", [Panel("", lines, limit)], scales, "MiB", True)
    kept = float(np.mean([kept_of_heads(plan.held, plan.schedule.tokens).mean() for plan in found]))
    target, layer = found[0].peak_checkpoint
    texts = [f"holds {kept:.0%} of all tokens over time"]
    texts.append(f"at most {mib(max(line.y.max() for line in lines) * 2**20)}, after layer {layer} of scale {target}")
    texts += [f"the first of {len(found)} plans above, all of them below"] if len(found) > 1 else []
    if isinstance(found[0], CapacityPlan):
        texts.append("chooses tokens while drawing")
        texts += ["the heads of a layer share their room"] if found[0].shared else []
    markup: Markup = report.ui.card(
        style, report.merged.label(row), "; ".join(texts), [*_heats(report, label, found[0], scales), svg]
    )
    return markup


def _heats(report: Report, label: str, plan: CachePlan, names: Sequence[str]) -> list[Markup]:
    layers, heads, scales = plan.held.shape
    colours = [*charts.ramp("viridis", scales - 1), _NEVER]
    if not isinstance(plan, Plan):
        share = plan.held / np.maximum(available_tokens(plan.geometry), 1)
        steps = np.where(plan.held > 0, np.ceil(share * (scales - 2)), scales - 1).astype(np.int64)
        below = [f"{100 * mean:.0f}" for mean in share.mean(axis=(0, 1))[1:]]
        uri = charts.heat_map([steps[:, :, t] for t in range(1, scales)], colours)
        alt = f"Share of earlier tokens that {label} holds, in % by target scale: {', '.join(below)}"
        return [report.ui.heat(uri, alt, "share held", layers, heads, names[1:], below)]
    tokens = [level_tokens(plan.schedule, level) for level, _ in plan.levels]
    kept = kept_of_scales([last_read for _, last_read in plan.levels], tokens)
    below = [f"{100 * share:.0f}" for share in kept]
    heats = []
    for level, last_read in plan.levels:
        until = np.where(last_read > np.arange(scales), last_read - 1, scales - 1)
        uri = charts.heat_map([until[:, :, s] for s in range(scales - 1)], colours)
        title = f"kept until, at level {level}" if plan.coarse else "kept until"
        alt = f"What {label} keeps ({title}), in % of the tokens over time by source scale: {', '.join(below)}"
        last = level == plan.levels[-1][0]
        heats.append(report.ui.heat(uri, alt, title, layers, heads, names[:-1], below if last else ()))
    return heats


# ---------------------------------------------------------------------------------------------------- pictures

_SHEET_PIXELS = 1_300_000
"""Of all pictures of a report and their differences, so that it stays small."""
_LARGEST_SIDE = 128


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
    sheets: list[Markup] = []
    for (label, seed), found in seeds.items():
        full = next((images for row, images in found.values() if row.result.policy == REFERENCE), None)
        rows = dict(found.values())
        for budget, of_budget in reversed(budgets_of(rows).items()):
            strips = [] if full is None else [("full cache", "", charts.strip(full), "")]
            for row in of_budget:
                difference = "" if full is None else charts.strip(rows[row], full)
                psnr = row.result.psnr_db
                text = "" if psnr is None else f"{psnr:.1f} dB"
                strips.append((row.result.policy, text, charts.strip(rows[row]), difference))
            parts = [label] if report.several else []
            parts += [f"Cache of {budget}", *([f"seed {seed}"] if len({key[1] for key in seeds}) > 1 else [])]
            count, _, across, _ = rows[of_budget[0]].shape
            width = count * (min(max(across, 72), 112) + charts.STRIP_GAP) - charts.STRIP_GAP
            title = ", ".join(parts)
            sheets.append(report.ui.fold(title, [report.ui.sheet(title, strips, width)], not sheets))
    shares = [charts.DIFFERENCE_MOST * step / 5 for step in range(1, 6)]
    keys = [(charts.css(tuple(charts.difference_colour(share))), f"{share:.0%}") for share in shares]
    legend = [report.ui.legend(keys, "difference, of the channels' range")] if sheets else []
    return [*legend, *sheets, report.ui.missing("pictures", missing)]


def _thumbnails(images_BHW3: Pixels, rows: int) -> Pixels:
    """The first pictures of one of this many rows, as many and as large as all of them together may have pixels."""
    height, width = images_BHW3.shape[1:3]
    scale = min(1.0, _LARGEST_SIDE / max(height, width))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    chosen = images_BHW3[: max(3, min(12, _SHEET_PIXELS // (2 * rows * size[0] * size[1])))]
    return np.stack([np.asarray(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS)) for image in chosen])
