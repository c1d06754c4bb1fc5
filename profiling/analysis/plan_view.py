"""Tables and charts of a plan: what it keeps, how full the cache gets, and what room is worth.

Arrays: L layers, H heads, T scales; T-1 of them are cached. `levels` are names with last_read arrays, fine to coarse.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from heatkv.core.io import replacing
from heatkv.core.statistics import Statistics
from heatkv.profiling.analysis.explain import LEVEL_COSTS, MEASURES, Worth, ends_of_cells, reads_of_scales

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]

Levels = Sequence[tuple[str, IntArray]]


def bar(share: float, width: int = 20) -> str:
    """A bar of characters for a share; only nothing at all is shown empty."""
    full = min(width, max(round(share * width), int(share > 0)))
    return "█" * full + "░" * (width - full)


def _table(title: str, columns: Sequence[str], lines: Iterable[Iterable[object]]) -> Table:
    """A table whose figures, all columns but the bars, stand to the right."""
    table = Table(title=title)
    for name in columns:
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    for line in lines:
        table.add_row(*map(str, line))
    return table


def scales_table(levels: Levels, kept_S: FloatArray, names: Sequence[str]) -> Table:
    """Per source scale: the share of token-time that is kept, how its cells end, and at which levels they are read."""
    last_reads = [last_read for _, last_read in levels]
    others, read = ends_of_cells(last_reads[-1]), list[str]()
    if len(levels) > 1:  # a single level's share of the reads is that of token-time
        others, read = np.hstack([others, reads_of_scales(last_reads).T]), [f"read {level}" for level, _ in levels]
    columns = ["scale", "tokens", "kept token-time", "", "never cached", "dropped early", "to the end", *read]
    lines = [
        [scale, names[scale], f"{share:.1%}", bar(share), *(f"{other:.1%}" for other in others[scale])]
        for scale, share in enumerate(kept_S)
    ]
    table = _table("kept per source scale", columns, lines)
    table.caption = (
        "kept token-time: tokens held times the later targets that read them, of the full cache's; never, early, end: "
        "share of the cells" + ("; read: share of the reads that a level serves" if read else "")
    )
    return table


def layers_table(kept_LH: FloatArray) -> Table:
    """Per layer: the share of token-time that is kept, and by which heads the least and the most."""
    lines = []
    for layer, kept_H in enumerate(kept_LH):
        ends = [f"{kept_H[head]:.1%} ({head})" for head in (kept_H.argmin(), kept_H.argmax())]
        lines.append([layer, f"{kept_H.mean():.1%}", bar(kept_H.mean()), *ends])
    return _table("kept per layer", ["layer", "kept token-time", "", "least, by head", "most, by head"], lines)


def use_table(live_TL: IntArray, budget: int, names: Sequence[str]) -> Table:
    """Per target scale: the most token-heads that the cache holds after any of its layers."""
    lines = []
    for target, live_L in enumerate(live_TL):
        share = live_L.max() / max(budget, 1)
        lines.append([target, names[target], live_L.max(), f"{share:.1%}", bar(share), live_L.argmax()])
    columns = ["target", "tokens", "most token-heads", "of the budget", "", "after layer"]
    return _table("cache use", columns, lines)


def worth_table(worth: Worth) -> Table:
    """The checkpoints that hold more value back, and how much of it."""
    lines = []
    total = float(worth.price_TL.sum() + worth.cap_price_LT.sum())
    for prices_TL, kind in ((worth.price_TL, ""), (worth.cap_price_LT.T, " (layer cap)")):
        for target in np.flatnonzero(prices_TL.any(axis=1)):
            layers, share = ", ".join(map(str, np.flatnonzero(prices_TL[target]))), prices_TL[target].sum() / total
            lines.append([target, f"{layers}{kind}", f"{share:.1%}", bar(share)])
    return _table("what binds", ["after target", "layers that bind", "of the price", ""], lines)


def worth_lines(worth: Worth) -> list[str]:
    """What a plan and its budget are worth, in sentences."""
    costs = worth.measure in LEVEL_COSTS

    def amount(value: float) -> str:
        if costs:
            return f"{0 - value:.6g}"
        return f"{value:.6g}, {value / worth.full if worth.full > 0 else 1.0:.2%} of the full cache's"

    lines = [worth.instead] if worth.instead else []
    name, beyond = ("cost", "less") if costs else ("value", "more")
    lines.append(
        f"{name} ({MEASURES[worth.measure]}): {amount(worth.value)}; no plan within this budget, with these sinks, "
        f"levels and caps, has {beyond} than {amount(worth.best)}, so that the plan is at most {worth.gap:.3%} from "
        "the best"
    )
    if worth.price == 0:
        binds = "only the cap on single layers binds" if worth.cap_price_LT.any() else "no checkpoint binds"
        return [*lines, f"{binds}: by these statistics a larger budget is worth nothing"]
    step, change = f"{worth.budget_token_heads / 100:.4g} token-heads", f"{worth.change(0.01):.3%}"
    more, takes = ("less cost", "adds") if costs else ("more value", "takes")
    lines.append(
        f"1 % more budget ({step}) gives the best plan at most {change} {more}, 1 % less {takes} at least {change} "
        "(estimated from the prices of the binding checkpoints)"
    )
    return lines


# ------------------------------------------------------------------------------------------------------ charts


def save_figure(figure: Any, path: Path) -> None:
    """Write a figure of matplotlib as PNG."""
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", bbox_inches="tight")


def save_heat_maps(
    path: Path, values_LHS: FloatArray, names: Sequence[str], title: str, legend: str, colours: str,
    steps: int | None = None,
) -> None:  # fmt: skip
    """A heat map per source scale, layers by heads, of figures from 0 to 1, or of whole numbers below `steps`; what is
    no number is grey."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    layers, heads, scales = values_LHS.shape
    columns = min(4, scales)
    lines = -(-scales // columns)
    size = (1.2 + columns * max(1.6, 0.09 * heads), 0.9 + lines * max(1.5, 0.4 + 0.09 * layers))
    figure = Figure(figsize=size, dpi=110, layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True)
    shown = colormaps[colours].with_extremes(bad="0.88").resampled(steps or 256)
    limits = {"vmin": -0.5, "vmax": steps - 0.5} if steps else {"vmin": 0, "vmax": 1}
    for ax in axes.flat[scales:]:
        ax.set_axis_off()
    for source, ax in zip(range(scales), axes.flat, strict=False):
        ax.imshow(values_LHS[:, :, source], cmap=shown, aspect="auto", interpolation="nearest", **limits)
        ax.set_title(f"source {source} ({names[source]})", fontsize=8)
        ax.tick_params(labelsize=6)
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_major_locator(MaxNLocator(8, integer=True))
    figure.supxlabel("head", fontsize=8)
    figure.supylabel("layer", fontsize=8)
    figure.suptitle(title, fontsize=9)
    scale = figure.colorbar(axes.flat[0].images[0], ax=axes, ticks=range(steps) if steps else None, fraction=0.04)
    scale.set_label(legend, fontsize=7)
    scale.ax.tick_params(labelsize=7)
    save_figure(figure, path)


def save_last_read(path: Path, last_read_LHT: IntArray, names: Sequence[str], title: str) -> None:
    """Heat maps of until which target scale every cell is read, at a level."""
    scales = last_read_LHT.shape[2]
    until = np.where(last_read_LHT > np.arange(scales), last_read_LHT, np.nan)[:, :, :-1]
    legend = "last target scale that reads the cell (grey: never cached)"
    save_heat_maps(path, until, names, title, legend, "viridis", scales)


def save_scas_maps(path: Path, statistics: Statistics) -> None:
    """Heat maps of the S-CAS of every head."""
    scas_LHS, names = statistics.scas[:, :, :-1], [f"{h}x{w}" for _, h, w in statistics.schedule.scales]
    relative = scas_LHS / np.maximum(scas_LHS.max(axis=(0, 1)), np.finfo(float).tiny)
    title = f"S-CAS of {statistics.provenance.model}, {statistics.count} samples"
    save_heat_maps(path, relative, names, title, "share of the scale's largest", "magma")


def save_use(path: Path, live_TL: IntArray, full_TL: IntArray, budget: int, names: Sequence[str], title: str) -> None:
    """Token-heads held after every layer of every target scale, against the budget and the full cache."""
    from matplotlib.figure import Figure

    scales, layers = live_TL.shape
    figure = Figure(figsize=(7.5, 3.4), dpi=110, layout="constrained")
    ax, edges = figure.subplots(), np.arange(live_TL.size + 1)
    ax.stairs(live_TL.ravel(), edges, fill=True, color="tab:blue", alpha=0.35, label="held")
    ax.stairs(full_TL.ravel(), edges, baseline=None, color="0.5", linewidth=0.8, linestyle=":", label="full cache")
    ax.axhline(budget, color="tab:red", linewidth=1, label="budget")
    # the full cache leaves the picture, or it would leave nothing else in it
    ax.set(xlim=(0, live_TL.size), ylim=(0, 1.25 * max(budget, 1)), title=title)
    ax.set_xticks(np.arange(scales) * layers, [f"{t}\n{names[t]}" for t in range(scales)], fontsize=6, ha="left")
    ax.grid(axis="x", color="0.9")
    ax.set(xlabel=f"target scale, {layers} layers each", ylabel="token-heads")
    ax.legend(fontsize=7, loc="upper left")
    save_figure(figure, path)
