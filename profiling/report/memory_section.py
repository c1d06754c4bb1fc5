"""The section of memory: the three ledgers of every row beside each other, and the cache over time.

Planned and arena are the same on every machine; what the device shows is not, so every folder has its own charts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from heatkv.profiling.report import bar_figures
from heatkv.profiling.report.bar_figures import LONGEST, MOST_ROWS, Bar, BarGroup, Held, Panel, Part
from heatkv.profiling.report.blocks import (
    MISSING,
    Block,
    Cell,
    Chart,
    Fold,
    Heading,
    Key,
    Legend,
    Note,
    Section,
    Table,
    mib,
    mib_cell,
)
from heatkv.profiling.report.figures import shortened
from heatkv.profiling.report.memory_figures import (
    ARENA,
    DEVICE,
    FIGURES,
    PHASES,
    PLANNED,
    TEXTS,
    in_memory,
    unexplained,
)
from heatkv.profiling.report.old_merging import Row, Source, budgets_of
from heatkv.profiling.report.reporting import Report, scale_names, under

MOST_TOGETHER = 14
"""Rows of one chart; of more, every budget has a chart of its own."""

_PLAN, _CACHE, _TABLES, _WORKSPACE, _SEEN = 6, 1, 4, 5, 0
_STRENGTHS = {"opened": 0.4, "drawing": 1.0, "decode": 0.65}
_OF = {figure.path: figure for figure in FIGURES}


def memory(report: Report) -> Section | None:
    """What every row takes, by who counts it."""
    if not any(row.told.get("memory") is not None or row.timeline is not None for row in report.merged.rows):
        return None
    blocks: list[Block] = []
    tables: list[Block] = []
    for number, source in enumerate(report.merged.sources):
        for place, (images, rows) in enumerate(_by_size(source.rows).items()):
            told = [source.label] if report.several else []
            told += [images] if len(_by_size(source.rows)) > 1 else []
            charts = [
                *_ledgers(report, rows, f"memory-{number}-{place}"),
                *_timelines(report, rows, f"held-{number}-{place}"),
            ]
            if charts and told:
                blocks.append(Heading(", ".join(told)))
            blocks += charts
        tables += _tables(report, source)
    return Section(
        "memory", "Memory", "Planned, allocated, and seen by the device",
        "Three ledgers of the same drawing: what the plan holds at most, what the arena allocated for it, and what "
        "whoever counts on the device saw. Every figure is under the name of its ledger.", [*blocks, *tables],
    )  # fmt: skip


def _by_size(rows: Sequence[Row]) -> Mapping[str, list[Row]]:
    """Rows by how many images are drawn at once: their bytes do not compare."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        batch, of_cache = row.number("batch"), row.number("rows")
        told = [f"{batch:g} image{'s' if batch != 1 else ''} at once"] if batch is not None else []
        told += [f"{of_cache:g} rows"] if of_cache is not None else []
        found.setdefault(", ".join(told) or "a batch that is not told", []).append(row)
    return found


def titles(report: Report, pairs: Sequence[tuple[str, Row]]) -> dict[Row, str]:
    """Names of the rows of one chart with their budgets, which stay whole."""
    names = report.short_labels([row for _, row in pairs])
    room = LONGEST - max((len(f" at {budget}") for budget, _ in pairs), default=0)
    texts = shortened(list(dict.fromkeys(names.values())), room)
    return {row: f"{texts[names[row]]} at {budget}" for budget, row in pairs}


def told_apart(
    rows: Sequence[Row], make: Callable[[Sequence[tuple[str, Row]], str], Block | None]
) -> list[Block]:  # fmt: skip
    """A chart of all rows with their budgets, the full cache first; or, of many, one of every budget, to be unfolded.

    `make` is given rows and what to add to the name of the chart.
    """
    full = [(row.budget, row) for row in rows if row.is_reference]
    budgets = {budget: [(budget, row) for row in of_budget] for budget, of_budget in budgets_of(rows).items()}
    every = [*full, *(pair for pairs in budgets.values() for pair in pairs)]
    if len(every) <= MOST_TOGETHER:
        made = make(every, "")
        return [] if made is None else [made]
    blocks: list[Block] = []
    for place, (budget, pairs) in enumerate(budgets.items()):
        of_budget = [*full, *pairs]
        if (made := make(of_budget[:MOST_ROWS], f"-{place}")) is None:
            continue
        more = len(of_budget) - MOST_ROWS
        note = [Note(f"Drawn are {MOST_ROWS} rows; {more} more are in the table.", of_drawing=True)] if more > 0 else []
        blocks.append(Fold(f"At {budget}, beside the full cache", (made, *note), open=not blocks))
    return blocks


# -------------------------------------------------------------------------------------------------- the ledgers


def _ledgers(report: Report, rows: Sequence[Row], name: str) -> list[Block]:
    """Bars of every row, where anything was measured."""
    measured = _measured(rows)
    if not measured:
        return []

    def make(pairs: Sequence[tuple[str, Row]], more: str) -> Block | None:
        names = titles(report, pairs)
        groups = [group for _, row in pairs if (group := _bars(names[row], row)) is not None]
        if not groups:
            return None
        label = "Bytes of every row in three ledgers, planned, arena and device; the tables below have the figures."
        drawing = bar_figures.bar_chart(f"{name}{more}", label, groups, "MiB, without the model's weights", 6.5)
        return Chart(drawing, tuple(_captions(measured)), (_legend(measured),))

    return told_apart(measured, make)


def _measured(rows: Iterable[Row]) -> list[Row]:
    return [row for row in rows if row.told.get("memory") is not None or row.number("graph_pool_bytes") is not None]


def _bars(title: str, row: Row) -> BarGroup | None:
    """Planned, arena and the phases of the device, in MiB."""
    bars = []

    def size(*path: str) -> float | None:
        return row.memory(_OF[path])

    def add(ledger: str, *parts: tuple[str, int, float | None, float]) -> None:
        told = [(what, colour, count / 2**20, strength) for what, colour, count, strength in parts if count is not None]
        if told:
            tip = ", ".join(f"{what} {length:.3f}" for what, _, length, _ in told)
            drawn = tuple(Part(colour, length, strength) for _, colour, length, strength in told)
            bars.append(Bar(drawn, f"{title}, {ledger}: {tip} MiB"))

    add("planned", ("cache", _PLAN, size("planned", "cache_bytes"), 1))
    add(
        "arena",
        ("cache", _CACHE, size("arena", "cache_bytes"), 1),
        ("index tables", _TABLES, size("arena", "index_bytes"), 1),
        ("workspace", _WORKSPACE, size("arena", "workspace_bytes"), 1),
    )
    for phase, called in PHASES.items():
        seen = _allocated(row, ("allocator", "peaks", phase))
        if not seen and (alive := size("tensors", "peak_bytes", phase)) is not None:
            seen = [("tensors", alive)]
        strengths = (_STRENGTHS[phase], 0.2)
        add(called, *((what, _SEEN, count, strengths[i]) for i, (what, count) in enumerate(seen)))
    if graphs := _allocated(row, ("graphs", "peaks")):
        add("with CUDA graphs", *((what, 3, count, (1, 0.3)[i]) for i, (what, count) in enumerate(graphs)))
    limit = size("planned", "budget_bytes")
    return BarGroup(title, tuple(bars), None if limit is None else limit / 2**20) if bars else None


def _allocated(row: Row, path: tuple[str, ...]) -> list[tuple[str, float]]:
    """What the allocator gave out above the weights, and what it kept from the driver beyond that."""
    weights = row.memory(_OF["allocator", "weights_bytes"])
    allocated, reserved = (row.memory(_OF[*path, f"{kind}_bytes"]) for kind in ("allocated", "reserved"))
    if weights is None or allocated is None:
        return []
    above = [("allocated", max(0.0, allocated - weights))]
    return above if reserved is None else [*above, ("reserved beyond it", max(0.0, reserved - allocated))]


def _legend(rows: Sequence[Row]) -> Legend:
    on_device = any(_allocated(row, ("allocator", "peaks", "drawing")) for row in rows)
    ledger = "device, torch's CUDA allocator" if on_device else "device, tensors alive"

    def shade(strength: float, colour: int = _SEEN) -> str:
        return f"color-mix(in srgb, var(--series-{colour}) {strength:.0%}, transparent)"

    keys = [
        Key("planned: the cache", colour=f"var(--series-{_PLAN})"),
        Key("arena: the cache", colour=f"var(--series-{_CACHE})"),
        Key("arena: index tables", colour=f"var(--series-{_TABLES})"),
        Key("arena: workspace", colour=f"var(--series-{_WORKSPACE})"),
        *(Key(f"{ledger}, {name}", colour=shade(_STRENGTHS[phase])) for phase, name in PHASES.items()),
    ]
    if on_device:
        keys.append(Key("reserved beyond what is allocated", colour=shade(0.2)))
    if any(_allocated(row, ("graphs", "peaks")) for row in rows):
        keys.append(Key("device, with CUDA graphs", colour=shade(1, 3)))
    return Legend((*keys, Key("dashed: the budget", colour="var(--limit)")))


def _captions(rows: Sequence[Row]) -> list[str]:
    weights = sorted({found for row in rows if (found := row.memory(_OF["weights_bytes",])) is not None})
    captions = [
        "The budget (dashed) is a promise about the cache, planned and allocated. The device also holds activations, "
        "which no budget limits: its bars are the peaks of opening the cache, of drawing all scales, and of decoding."
    ]
    if weights:
        told = " or ".join(f"{mib(count)} MiB" for count in weights)
        captions.append(f"The model's weights, {told}, are in none of the bars; they are the same under every policy.")
    if any(in_memory(row.told.get("memory"), ("process",)) == "shared" for row in rows):
        captions.append(
            "Measured in a process that had done other things: resident memory, the allocator and NVML are coloured by "
            "them, the plan, the arena and tensors are not."
        )
    return captions


def _tables(report: Report, source: Source) -> list[Block]:
    """All figures of a folder: one table of the cache, one of the device; columns that no row has are left out."""
    of_folder = f" of {source.label}" if report.several else ""
    blocks: list[Block] = []
    measured = _measured(source.rows)
    if measured:
        shown = [figure for figure in (*PLANNED, *ARENA) if any(row.memory(figure) is not None for row in measured)]
        lines = tuple((*_names(report, row), *(mib_cell(row.memory(figure)) for figure in shown)) for row in measured)
        columns = ("policy", "budget", *(figure.title for figure in shown))
        blocks.append(Table(f"Cache{of_folder}: what is planned, and what the arena allocated", columns, lines))
        seen = [figure for figure in DEVICE if any(row.memory(figure) is not None for row in measured)]
        texts = [(title, path) for title, path in TEXTS if any(_text(row, path) for row in measured)]
        rests = [unexplained(row.told.get("memory")) for row in measured]
        steps = list(dict.fromkeys(step for of_row in rests for step in of_row))
        lines = tuple(
            (
                *_names(report, row), *(mib_cell(row.memory(figure)) for figure in seen),
                *(mib_cell(rest.get(step)) for step in steps),
                *(Cell(_text(row, path)) if _text(row, path) else MISSING for _, path in texts),
            )
            for row, rest in zip(measured, rests, strict=True)
        )  # fmt: skip
        columns = ("policy", "budget", *(figure.title for figure in seen),
                   *(f"unexplained, {step}, MiB" for step in steps), *(title for title, _ in texts))  # fmt: skip
        blocks.append(Table(f"Device{of_folder}: what was seen, by who counts it", columns, lines))
        blocks.append(Note(
            "Tensors are storages alive at once by torch's operations, without the model's; the allocator is torch's "
            "on a GPU, with the weights in its figures; NVML counts for the driver; resident is what the system holds "
            "for the whole process, Python and libraries with it."
            + (
                " Unexplained is what the known parts of a step, from one ledger to the next, leave over: where it is "
                "negative, the parts are more than the step, since peaks of two ledgers need not be of one moment, and "
                "pages that were never touched are in no resident figure." if steps else ""
            )
        ))  # fmt: skip
    if timed := [row for row in source.rows if row.timeline is not None]:
        schedule = timed[0].schedule
        count = max(len(row.timeline or ()) for row in timed)
        names = scale_names(schedule) if schedule is not None else [str(scale) for scale in range(count)]
        lines = tuple(
            (
                *_names(report, row), mib_cell(row.number("budget_bytes")),
                *(mib_cell(max(layers)) for layers in row.timeline or ()),
                *([MISSING] * (count - len(row.timeline or ()))),
            )
            for row in timed
        )  # fmt: skip
        columns = (
            "policy",
            "budget",
            "budget, MiB",
            *(f"scale {scale} ({name}), MiB" for scale, name in enumerate(names)),
        )
        caption = f"Most that the cache{of_folder} holds while each target scale runs, by the plan"
        blocks.append(Table(caption, columns, lines))
    return blocks


def _names(report: Report, row: Row) -> tuple[Cell, Cell]:
    return report.name(row), Cell(row.budget, row.number("budget_bytes"))


def _text(row: Row, path: tuple[str, ...]) -> str:
    found = in_memory(row.told.get("memory"), path)
    if path == ("process",):
        return {"own": "yes", "shared": "no"}.get(str(found), "")
    return found if isinstance(found, str) else ""


# ---------------------------------------------------------------------------------------------------- over time


def _timelines(report: Report, rows: Sequence[Row], name: str) -> list[Block]:
    """What every policy holds over time, a panel for every budget."""
    timed = [row for row in rows if row.timeline is not None]
    panels: list[Panel] = []
    drawn: list[Row] = []
    for budget, of_budget in budgets_of(timed).items():
        limit = of_budget[0].number("budget_bytes")
        if not limit:
            continue
        lines = [Held(report.style(row), row.timeline or ()) for row in of_budget]
        drawn += of_budget
        texts = {0.0: "0", limit / 2: f"{limit / 2**21:.3g}", limit: f"{limit / 2**20:.3g}"}
        title = budget if "MiB" in budget else f"{budget}, {mib(limit)} MiB"
        panels.append(Panel(title, limit, lines, texts))
    if not panels:
        return []
    names = _under(timed)
    drawing = bar_figures.over_time(
        name, "Bytes of the cache after every layer of every scale, against the budget, a panel for every budget.",
        panels, names, "MiB held",
    )  # fmt: skip
    captions = (
        "What the cache holds after every layer of every scale, by the plan; the dashed line is the budget, which the "
        "highest point may reach and not pass. Every panel has an axis of its own; the full cache is not drawn.",
        _fullest(budgets_of(timed), names),
    )
    return [Chart(drawing, captions, (report.legend(drawn),))]


def _under(rows: Iterable[Row]) -> tuple[str, ...]:
    row = next(iter(rows))
    count = len(row.timeline or ())
    return under(scale_names(row.schedule)) if row.schedule is not None else tuple(map(str, range(count)))


def _fullest(budgets: Mapping[str, Sequence[Row]], names: Sequence[str]) -> str:
    """Where the budget is used most, in words."""
    told = []
    for budget, rows in budgets.items():
        most, at = max((max(layers), t) for row in rows for t, layers in enumerate(row.timeline or ()))
        if limit := rows[0].number("budget_bytes"):
            told.append(f"{most / limit:.1%} of {budget} at scale {at} ({names[at]})")
    return f"Fullest: {', '.join(told)}." if told else ""
