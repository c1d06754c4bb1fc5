"""What people look at: tables on screen, image sheets and heat maps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from heatkv.core.io import replacing
from heatkv.core.statistics import Statistics
from heatkv.generation.images import to_pixels
from heatkv.profiling.analysis.stability import Agreement
from heatkv.profiling.measure.runner import LEAST_USED
from heatkv.profiling.report.wide_table import WideTable


def _number(value: float | None, form: str, missing: str = "-") -> str:
    return missing if value is None else format(value, form)


def _difference(versus: Mapping[str, Any] | None) -> str:
    """A paired difference with its interval."""
    if versus is None:
        return "-"
    low, high = versus["interval"]
    return f"{versus['difference']:+.4f} [{low:+.4f}, {high:+.4f}]"


def results_table(rows: Sequence[Mapping[str, Any]], title: str) -> Table:
    """The comparison as a table; "-" is a figure that was not measured."""
    axes = [name for name in ("batch", "seed") if len({row.get(name) for row in rows}) > 1]
    table = WideTable(heads=2 + len(axes), title=title)
    foretold = any(row.get("predicted_kl") is not None for row in rows)
    graphs = any(row.get("graph_latency_ms") for row in rows)
    reference = next((row["versus"]["policy"] for row in rows if row.get("versus")), None)
    for name in (
        "policy", "budget", *axes, "budget MiB", "planned MiB", "allocated MiB", "of full",
        "ms", *(["ms, graphs"] if graphs else []), "KL",
        *([f"KL - {reference}'s [95%]"] if reference else []),
        *(["foretold KL"] if foretold else []), "top-1", "PSNR dB", "SSIM",
    ):  # fmt: skip
        table.add_column(name, justify="left" if name == "policy" else "right", no_wrap=True)
    previous = None
    for row in rows:
        if previous is not None and row["budget"] != previous:
            table.add_section()
        previous = row["budget"]
        name = row["policy"] + (f" (mean of {row['draws']})" if row["draws"] > 1 else "")
        time, with_graphs = row.get("latency_ms"), row.get("graph_latency_ms")
        table.add_row(
            name + (" *" if row["had_no_effect"] else " †" if row.get("under_used") else ""),
            row["budget"],
            *(str(row[axis]) for axis in axes),
            f"{row['budget_bytes'] / 2**20:.3f}",
            f"{row['planned_bytes'] / 2**20:.3f}",
            _number(None if row["allocated_bytes"] is None else row["allocated_bytes"] / 2**20, ".3f"),
            _number(None if row["allocated_bytes"] is None else row["allocated_bytes"] / row["full_bytes"], ".1%"),
            _number(time["median"] if time else None, ".1f"),
            *([_number(with_graphs["median"] if with_graphs else None, ".1f")] if graphs else []),
            _number(row.get("kl"), ".4f"),
            *([_difference(row.get("versus"))] if reference else []),
            *([_number(row.get("predicted_kl"), ".4f")] if foretold else []),
            _number(row.get("top1_agreement"), ".1%"),
            _number(row.get("psnr_db"), ".2f"),
            _number(row.get("ssim"), ".3f"),
        )
    notes = []
    if any(row["had_no_effect"] for row in rows):
        notes.append("* had no effect: nothing was dropped at this budget")
    if any(row.get("under_used") and not row["had_no_effect"] for row in rows):
        notes.append(f"† used less than {LEAST_USED:.0%} of its budget")
    table.caption = "\n".join(notes) or None
    return table


def stability_tables(agreements: Sequence[Agreement]) -> list[Table]:
    """How far rankings and plans of two disjoint halves of the samples agree, a column for every size of a half."""
    counts = [str(agreement.samples) for agreement in agreements]
    kinds = [("S-CAS", [a.scas for a in agreements])]
    if all(a.error is not None for a in agreements):
        kinds.append(("drop error", [a.error for a in agreements if a.error is not None]))
    heads = Table(title="rank correlation of heads between halves, by samples per half")
    plans = Table(title="plans of the two halves, by samples per half")
    columns = ["source scale", *(f"{kind} {count}" for kind, _ in kinds for count in counts)]
    for table, names in (
        (heads, columns),
        (plans, ["policy", "budget", *(f"{what} {count}" for what in ("overlap", "loss") for count in counts)]),
    ):
        for name in names:
            table.add_column(name, justify="left" if name == "policy" else "right")
    for scale in range(len(agreements[0].scas)):
        heads.add_row(str(scale), *(f"{of_scales[scale]:.3f}" for _, found in kinds for of_scales in found))
    for same in zip(*(agreement.plans for agreement in agreements), strict=True):
        overlaps, losses = [f"{plan.overlap:.1%}" for plan in same], [f"{plan.loss:.2%}" for plan in same]
        plans.add_row(same[0].policy, same[0].budget, *overlaps, *losses)
    measures = {plan.policy: plan.measure for plan in agreements[0].plans}
    plans.caption = (
        "overlap: token-time kept by both plans, of that kept by either; loss: value that a plan of one half misses on "
        f"the other ({', '.join(f'{policy}: {measure}' for policy, measure in measures.items())})"
    )
    return [heads, plans]


def save_image_sheet(path: Path, lines: Sequence[tuple[str, Any]], columns: int, title: str) -> None:
    """A PNG with one labelled line of pictures per (label, images) pair; images are (B, 3, H, W) in [0, 1]."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.1 * columns + 1.6, 1.15 * len(lines) + 0.4), dpi=110)
    axes = figure.subplots(len(lines), columns, squeeze=False)
    for line, (label, images) in enumerate(lines):
        pixels = to_pixels(images[:columns]).numpy()
        for column in range(columns):
            ax = axes[line, column]
            ax.set_xticks([])
            ax.set_yticks([])
            for spine in ax.spines.values():
                spine.set_visible(False)
            if column < len(pixels):
                ax.imshow(pixels[column], interpolation="nearest")
        axes[line, 0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=9)
    figure.suptitle(title, fontsize=10)
    figure.tight_layout(pad=0.3, rect=(0, 0, 1, 1 - 0.25 / figure.get_figheight()))
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")


def save_scas_heat_map(path: Path, statistics: Statistics) -> None:
    """S-CAS of every head (rows: layer by layer) by source scale, each column on its own colour scale."""
    from matplotlib.figure import Figure

    layers, heads = statistics.layers, statistics.heads
    scas = statistics.scas[:, :, :-1].reshape(layers * heads, -1)
    shown = scas / np.maximum(scas.max(axis=0, keepdims=True), np.finfo(float).tiny)
    figure = Figure(figsize=(1.5 + 0.55 * scas.shape[1], 2 + 0.07 * layers * heads), dpi=110)
    ax = figure.subplots()
    image = ax.imshow(shown, aspect="auto", cmap="magma", vmin=0, vmax=1, interpolation="nearest")
    sides = [f"{s}\n{h}x{w}" for s, (_, h, w) in enumerate(statistics.schedule.scales[:-1])]
    ax.set_xticks(range(scas.shape[1]), sides, fontsize=8)
    ax.set_yticks(np.arange(layers) * heads - 0.5, [f"layer {layer}" for layer in range(layers)], fontsize=7)
    ax.grid(axis="y", color="white", linewidth=0.4)
    ax.set_xlabel("source scale")
    ax.set_ylabel(f"{heads} heads of every layer")
    ax.set_title(
        f"S-CAS of {statistics.provenance.model}, {statistics.count} samples\n(share of the scale's largest)",
        fontsize=9,
    )
    figure.colorbar(image, ax=ax, fraction=0.06)
    figure.tight_layout()
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")
