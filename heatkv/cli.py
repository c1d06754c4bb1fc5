"""The command line. Bad input gives one line and exit code 2; Ctrl-C gives 130 and keeps what was finished."""

from __future__ import annotations

import difflib
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from heatkv.errors import FormatError, HeatKVError, ModelError, PlanError, ScheduleError, StatisticsError
from heatkv.files import check_writable, make_folder, read_json
from heatkv.geometry import Budget, CacheGeometry
from heatkv.models import COMPUTE_DTYPES, MODELS, ModelInfo, load_model, model_info
from heatkv.models.base import ImageModel
from heatkv.models.class_conditional import ClassConditionalModel
from heatkv.models.text_conditional import TextConditionalModel
from heatkv.plan import Plan
from heatkv.policies.base import EvictionPolicy, PlanningProblem, make_policy
from heatkv.registry import broken_plugins, find_policy, registered_policies
from heatkv.sampling import Settings
from heatkv.schedule import ScaleSchedule
from heatkv.statistics import HeadRankings, Statistics
from heatkv.versions import versions

app = typer.Typer(
    name="heatkv",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="KV-cache compression for visual autoregressive image models: every head keeps the scales it reads, under a "
    "byte budget that holds.",
)

Model = Annotated[str, typer.Option("--model", help="name of a model, see `heatkv models`")]
Statistic = Annotated[Path | None, typer.Option("--statistics", help="statistics file of `heatkv calibrate`")]
Orders = Annotated[Path | None, typer.Option("--orders", help="published ranking file (JSON) instead of statistics")]
Seed = Annotated[int, typer.Option("--seed", help="seed of samples and random policies")]
Cfg = Annotated[float | None, typer.Option("--cfg", help="guidance strength; default: the model's; 0 = none")]
Rows = Annotated[
    int | None, typer.Option("--rows", help="cache rows; guidance takes two per image (default: one image)")
]
Dtype = Annotated[str, typer.Option("--dtype", help=f"compute and storage type: {', '.join(COMPUTE_DTYPES)}")]
Device = Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:1, mps")]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON instead of a table")]
PlanFiles = Annotated[list[Path] | None, typer.Option("--plan", help="plan.json of `heatkv solve`; may be repeated")]
Policies = Annotated[str, typer.Option("--policies", help="names separated by commas, see `heatkv policies`")]
Budgets = Annotated[str, typer.Option("--budgets", help="separated by commas: 10%, 0.1, 600MiB, 2GB or 650tokens")]
BudgetText = Annotated[str | None, typer.Option("--budget", help="10%, 0.1, 600MiB, 2GB or 650tokens")]
SinkScales = Annotated[
    int | None, typer.Option("--sink-scales", help="first scales that are never dropped; default: the policy's")
]
Weights = Annotated[Path | None, typer.Option("--weights", help="weights file or folder, see `heatkv models`")]
Vae = Annotated[Path | None, typer.Option("--vae", help="its VAE file; default: looked for beside the weights")]
TextEncoder = Annotated[
    str | None, typer.Option("--text-encoder", help="T5 encoder: local folder or hub name (Infinity)")
]
Prompts = Annotated[
    Path | None, typer.Option("--prompts", help="text file, one prompt a line, for measurements (Infinity)")
]
Size = Annotated[str | None, typer.Option("--size", help="256, 512 (VAR), 0.06M, 0.25M, 0.60M, 1M (Infinity)")]
Ratio = Annotated[str | None, typer.Option("--ratio", help="height/width, as 1.5 or 3:2")]
OutFolder = Annotated[Path, typer.Option("--out", help="folder to write to")]

DEFAULT_POLICIES = "heatkv,sliding-window,streaming,random"
DEFAULT_BUDGETS = "50%,30%,20%,10%"


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"heatkv {versions()['heatkv']}")
        raise typer.Exit


@app.callback()
def _program(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="print the version and stop")
    ] = False,
) -> None:
    pass


def _say(text: str) -> None:
    Console(stderr=True, highlight=False).print(text, soft_wrap=True, markup=False)


def _show(value: Table | Any, as_json: bool, data: Any) -> None:
    if as_json:
        print(json.dumps(data, indent=1))
    else:
        console = Console(markup=False)
        # a pipe has no width of its own, and a table cut to 80 columns loses figures
        (console if console.is_terminal else Console(markup=False, width=160)).print(value)


@contextmanager
def _progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar on the error stream; the callback is told how much more is done."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda count: bar.advance(task, count)


def _names(text: str, what: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise HeatKVError(f"no {what} was named")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise HeatKVError(f"{what} {twice[0]!r} is named twice")
    return names


def _ratio(text: str | None) -> float | None:
    """Height/width as a number or h:w."""
    if text is None:
        return None
    try:
        height, colon, width = text.partition(":")
        return float(height) / (float(width) if colon else 1.0)
    except (ValueError, ZeroDivisionError) as error:
        raise ScheduleError(f"cannot read the height/width ratio {text!r}; write it as 1.5 or 3:2") from error


def _say_template(model: str, ratio: str | None) -> None:
    """Say which published height/width is drawn when it is not the one asked for; theirs are cut to 3 decimals."""
    wanted = _ratio(ratio)
    if wanted is None or model_info(model).family != "infinity":
        return
    taken = ScaleSchedule.infinity_template(wanted)
    if abs(taken - wanted) > 0.0015:
        _say(f"no published schedule has height/width {wanted:.4g}; taking the nearest, {taken:.4g}")


def _guided(info: ModelInfo, cfg: float | None) -> bool:
    """Whether unconditional rows run, too."""
    if cfg is not None and not 0 <= cfg <= 100:
        raise HeatKVError(f"cfg is {cfg}; guidance is from 0 to 100")
    return cfg is None or cfg != (1.0 if info.family == "infinity" else 0.0)


def _storage(dtype: str) -> str:
    if dtype not in COMPUTE_DTYPES:
        near = difflib.get_close_matches(dtype, COMPUTE_DTYPES, n=1, cutoff=0.4)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise ModelError(f"unknown dtype {dtype!r}{hint} Known: {', '.join(COMPUTE_DTYPES)}")
    return dtype


def _positive(name: str, value: int, least: int = 1) -> int:
    if value < least:
        raise HeatKVError(f"--{name} is {value}; it must be at least {least}")
    return value


def _settings(model: ImageModel[Any], cfg: float | None) -> Settings:
    if cfg is None:
        return model.sampling
    assert isinstance(model, ClassConditionalModel | TextConditionalModel)
    return replace(model.sampling, cfg=cfg)


def _load(
    model: str,
    weights: Path | None,
    vae: Path | None,
    text_encoder: str | None,
    prompts: Path | None,
    size: str | None,
    ratio: str | None,
    dtype: str,
    device: str,
    measuring: bool = True,
) -> ClassConditionalModel | TextConditionalModel:
    """The named model, with the prompts of a file for measurements."""
    if measuring and prompts is None and model_info(model).family == "infinity":  # said before anything is loaded
        raise ModelError(f"measuring {model} needs prompts to draw; name a file of them (--prompts)")
    loaded = load_model(
        model,
        weights,
        vae=vae,
        text_encoder=text_encoder,
        prompts=() if prompts is None else _prompts(prompts),
        size=size,
        ratio=_ratio(ratio),
        dtype=_storage(dtype),
        device=device,
    )
    _say_template(model, ratio)
    return loaded


def _prompts(path: Path) -> list[str]:
    """The lines of a text file, empty ones left out."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise FormatError(f"cannot read {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise FormatError(f"{path} is no UTF-8 text, one prompt a line") from error
    found = [line.strip() for line in lines if line.strip()]
    if not found:
        raise FormatError(f"{path} holds no prompt; write one a line")
    return found


def _rankings(path: Path | None, geometry: CacheGeometry) -> HeadRankings | None:
    return None if path is None else HeadRankings.load_orders(path, geometry)


def _statistics(path: Path | None, model: ImageModel[Any], settings: Settings | None = None) -> Statistics | None:
    """Statistics from a file, when they are of this very model, and of the guidance that it is to run with."""
    if path is None:
        return None
    statistics = Statistics.load(path)
    statistics.check_geometry(model.geometry)
    statistics.check_fingerprint(model.fingerprint)
    measured = statistics.provenance.cfg
    wanted = None if settings is None else settings.to_json()["cfg"]
    if measured is not None and wanted is not None and measured != wanted:
        raise StatisticsError(
            f"{path} was measured at cfg {measured:g}, this run has {wanted}; calibrate at that, or set --cfg"
        )
    return statistics


def _policy(name: str, sink_scales: int | None) -> EvictionPolicy:
    return make_policy(name, **({} if sink_scales is None else {"sink_scales": sink_scales}))


def _needs_statistics(names: Sequence[str]) -> bool:
    return any("statistics" in find_policy(name).needs for name in names)  # type: ignore[attr-defined]


def _one_ranking(statistics: Path | None, orders: Path | None) -> None:
    if statistics is not None and orders is not None:
        raise HeatKVError("--statistics and --orders both rank heads; give one of them")


def _nothing_beside_a_plan(budget: str | None, statistics: Path | None, orders: Path | None, sinks: int | None) -> None:
    given = {"--budget": budget, "--statistics": statistics, "--orders": orders, "--sink-scales": sinks}
    for name, value in given.items():
        if value is not None:
            raise HeatKVError(f"--plan is a finished plan; leave {name} out")


def _load_plan(path: Path, geometry: CacheGeometry) -> Plan:
    plan = Plan.load(path, geometry.head_dim)
    try:
        plan.check_geometry(geometry)
    except PlanError as error:
        raise PlanError(f"{path}: {error}") from error
    return plan


# ------------------------------------------------------------------------------------------- what there is


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """What this machine offers: torch, devices, Triton, NVML, optional extras, models with weights.

    Example: heatkv doctor
    """
    import importlib.util
    from importlib import metadata

    import torch

    from heatkv.profiling.environment import environment

    def extra(package: str, distribution: str, why: str) -> str:
        if importlib.util.find_spec(package) is None:
            return f"not installed ({why})"
        return metadata.version(distribution)

    where = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    told = environment(where)
    mps = torch.backends.mps.is_available()
    facts = {
        "heatkv": told["versions"]["heatkv"],
        "python": told["versions"]["python"],
        "torch": told["versions"]["torch"],
        "device": f"{told['device_name']} ({told['device']})",
        "threads": str(told["threads"]),
        "1024^3 fp32 product, one thread": f"{told['matrix_product_1024_fp32_one_thread_ms']} ms",
        "CUDA graphs": "yes" if torch.cuda.is_available() else "no CUDA device",
        "mps": "yes" if mps else "no",
        "triton": extra("triton", "triton", "heatkv[triton]"),
        "NVML": extra("pynvml", "nvidia-ml-py", "heatkv[nvml]"),
        "torchmetrics": extra("torchmetrics", "torchmetrics", "heatkv[metrics]; SSIM needs it"),
        "models with weights": ", ".join(info.name for info in MODELS.values() if info.bundled),
    }
    table = Table("what", "found", title="heatkv doctor")
    for name, found in facts.items():
        table.add_row(name, found)
    _show(table, as_json, facts)


@app.command()
def models(as_json: AsJson = False) -> None:
    """The models that can be named: geometry, full cache per image, where weights come from.

    Example: heatkv models
    """
    table = Table(
        "model", "layers", "heads", "head size", "size", "tokens N", "full MiB/image", "weights", title="models"
    )
    data = []
    for info in MODELS.values():
        geometry = info.geometry()
        row = {
            "model": info.name,
            "layers": info.layers,
            "heads": info.heads,
            "head_dim": info.head_dim,
            "size": info.default_size,
            "cached_tokens": geometry.schedule.cached_tokens,
            "full_bytes": geometry.full_bytes(rows=2, storage="bfloat16"),
            "weights": info.weights,
            "runs_here": info.bundled,
        }
        data.append(row)
        table.add_row(
            info.name, str(info.layers), str(info.heads), str(info.head_dim), info.default_size,
            str(row["cached_tokens"]), f"{geometry.full_bytes(2, 'bfloat16') / 2**20:.2f}", info.weights,
        )  # fmt: skip
    table.caption = "full cache with guidance (2 rows) in bfloat16"
    _show(table, as_json, data)


@app.command()
def policies(as_json: AsJson = False) -> None:
    """The policies that can be named: kind, what they plan from, one line, source.

    Example: heatkv policies
    """
    table = Table("policy", "kind", "needs", "what it does", "source", "from", title="policies")
    data = []
    for name, known in registered_policies().items():
        policy = known.policy
        row = {
            "policy": name, "kind": policy.kind, "needs": policy.needs, "summary": policy.summary(),
            "source": policy.source, "from": known.source,
        }  # fmt: skip
        data.append(row)
        table.add_row(*row.values())
    _show(table, as_json, data)
    for name, reason in broken_plugins().items():
        _say(f"heatkv: the plug-in {name!r} could not be loaded: {reason}")


# ------------------------------------------------------------------------------------------------ planning


@app.command()
def solve(
    model: Model = "emoji",
    policy: Annotated[str, typer.Option("--policy", help="name of a policy, see `heatkv policies`")] = "heatkv",
    budget: BudgetText = None,
    statistics: Statistic = None,
    orders: Orders = None,
    plan: Annotated[
        Path | None, typer.Option("--plan", help="check and describe this plan.json instead of solving")
    ] = None,
    size: Size = None,
    ratio: Ratio = None,
    sink_scales: SinkScales = None,
    rows: Rows = None,
    dtype: Dtype = "bfloat16",
    cfg: Cfg = None,
    device: Device = "cpu",
    seed: Seed = 0,
    out: Annotated[Path | None, typer.Option("--out", help="plan.json to write")] = None,
    as_json: AsJson = False,
) -> None:
    """Compute a plan from geometry and statistics or published rankings; needs no weights.

    Example: heatkv solve --model infinity-2b --policy heatkv --budget 0.1 --orders orders.json --out plan.json
    """
    info = model_info(model)
    geometry = info.geometry(size, _ratio(ratio))
    guided = _guided(info, cfg)
    _one_ranking(statistics, orders)
    storage = _storage(dtype)
    rows = rows if rows is not None else (2 if guided else 1)
    if plan is not None:
        _nothing_beside_a_plan(budget, statistics, orders, sink_scales)
        solved = _load_plan(plan, geometry)
    else:
        if budget is None:
            raise HeatKVError(
                "solve needs --budget, written 10%, 0.1, 600MiB, 2GB or 650tokens (or --plan to check a file)"
            )
        chosen = _policy(policy, sink_scales)
        loaded = None if statistics is None else Statistics.load(statistics)
        if loaded is not None and info.bundled:
            loaded.check_fingerprint(load_model(model).fingerprint)
        problem = PlanningProblem(
            geometry, Budget.parse(budget), loaded, _rankings(orders, geometry), seed, rows, storage, model
        )
        solved = chosen.plan(problem)
    if out is not None:
        solved.save(out)
    target, layer = solved.peak_checkpoint
    facts: dict[str, Any] = {
        "model": model,
        "policy": solved.policy,
        "schedule": str(geometry.schedule),
        "budget": solved.budget,
        "budget_token_heads": solved.budget_token_heads,
        "peak_token_heads": solved.peak_token_heads,
        "peak_over_budget": solved.peak_token_heads / max(solved.budget_token_heads, 1),
        "peak_checkpoint": {"scale": target, "layer": layer},
        "full_token_heads": geometry.full_token_heads,
        "planned_bytes": solved.bytes(rows, storage),
        "full_bytes": geometry.full_bytes(rows, storage),
        "rows": rows,
        "dtype": storage,
        "sink_scales": solved.sink_scales,
        "gap": solved.gap,
        "had_no_effect": solved.had_no_effect(),
        "out": None if out is None else str(out),
    }
    table = Table("what", "value", title=f"{solved.policy} at {solved.budget:.4g} of the cache of {model}")
    table.add_row("schedule", str(geometry.schedule))
    share = solved.peak_token_heads / max(solved.budget_token_heads, 1)
    held = f"{solved.peak_token_heads} of {solved.budget_token_heads} token-heads"
    table.add_row("peak", f"{held} ({share:.2%} of the budget)")
    table.add_row("at", f"after layer {layer} of scale {target}")
    table.add_row(
        "bytes",
        f"{facts['planned_bytes'] / 2**20:.2f} MiB of {facts['full_bytes'] / 2**20:.2f} MiB ({rows} rows, {storage})",
    )
    table.add_row("sink scales", str(solved.sink_scales))
    table.add_row("certified gap", "none: this policy solves no program" if solved.gap is None else f"{solved.gap:.3%}")
    if facts["had_no_effect"]:
        table.add_row("note", "the plan has no effect: nothing is dropped at this budget")
    if out is not None:
        table.add_row("written", str(out))
    _say_template(model, ratio)
    _show(table, as_json, facts)


@app.command()
def fit(
    memory: Annotated[str, typer.Option("--memory", help="what there is, as 24GiB or 24GB")],
    model: Model = "infinity-2b",
    batch: Annotated[int | None, typer.Option("--batch", help="images at once (default 1)")] = None,
    budget: Annotated[
        str | None, typer.Option("--budget", help="cache budget (bytes: of one image): then the largest batch is found")
    ] = None,
    size: Size = None,
    ratio: Ratio = None,
    cfg: Cfg = None,
    dtype: Dtype = "bfloat16",
    text_encoder: Annotated[bool, typer.Option(help="keep Infinity's text encoder in the same memory")] = True,
    as_json: AsJson = False,
) -> None:
    """What fits in a memory: weights, text encoder, working memory, and the largest budget or batch.

    Example: heatkv fit --model infinity-8b --memory 24GiB --batch 4
    """
    from heatkv.profiling.fit import Footprint, footprint, largest_batch, largest_share, parse_memory

    info, available = model_info(model), parse_memory(memory)
    _storage(dtype)
    guided = _guided(info, cfg)

    def measure(images: int) -> Footprint:
        return footprint(
            info, images, size=size, ratio=_ratio(ratio), dtype=dtype, guided=guided, text_encoder=text_encoder
        )

    if batch is not None and budget is not None:
        raise HeatKVError("--batch asks for the largest budget, --budget for the largest batch; give one of them")
    if budget is None:
        taken = measure(1 if batch is None else batch)
        share = largest_share(taken, available)
    else:
        geometry = info.geometry(size, _ratio(ratio))
        share = Budget.parse(budget).share(geometry, 2 if guided else 1, dtype)
        taken = largest_batch(measure, available, share)
    held = int(share * taken.full_cache)
    percent = f"{math.floor(share * 1000) / 10}%"  # rounded down, so that asked back it fits
    facts = {
        "model": model,
        "memory_bytes": available,
        "images": taken.images,
        "rows": taken.rows,
        "dtype": dtype,
        "schedule": str(info.schedule(size, _ratio(ratio))),
        "transformer_bytes": taken.transformer,
        "decoder_bytes": taken.decoder,
        "text_encoder_bytes": taken.text_encoder,
        "prompt_bytes": taken.prompt,
        "working_bytes": taken.working,
        "full_cache_bytes": taken.full_cache,
        "budget": float(share),
        "cache_bytes": held,
        "total_bytes": taken.without_cache + held,
    }
    table = Table("what", "GiB", title=f"{model} in {memory}: {taken.images} at once, {dtype}")
    for name, value in (
        ("transformer", taken.transformer),
        ("decoder of codes", taken.decoder),
        ("text encoder", taken.text_encoder),
        ("classes or prompts (longest)", taken.prompt),
        ("working memory (peak)", taken.working),
        ("cache, full", taken.full_cache),
        (f"cache at {percent}", held),
        ("total with that", taken.without_cache + held),
    ):
        table.add_row(name, f"{value / 2**30:.3f}")
    found = "the full cache fits" if share == 1 else f"the largest budget is {percent}"
    table.caption = (
        f"{found if budget is None else f'the largest batch is {taken.images}'}; from shapes, without the driver's own "
        "memory and fragmentation"
    )
    _say_template(model, ratio)
    schedule, sinks = info.schedule(size, _ratio(ratio)), make_policy("heatkv").sink_scales
    least = Fraction(schedule.offsets[min(sinks, len(schedule) - 1)], schedule.cached_tokens)
    if share < least:
        _say(f"no policy plans that unless told so: their {sinks} sink scales alone are {float(least):.2%}")
    _show(table, as_json, facts)


# ----------------------------------------------------------------------------------------------- measuring


def _calibrate(
    model: ImageModel[Any], samples: int, seed: int, settings: Settings, first: int = 0
) -> Iterator[Statistics]:
    """Statistics of one batch after another, so that an interrupt loses a batch at most."""
    from heatkv.calibration import calibrate as measure

    batch = min(16, -(-samples // 2))  # two batches at least, so that halves can be compared
    with _progress(f"calibrating {model.name}", samples) as advance:
        for start in range(first, first + samples, batch):
            count = min(batch, first + samples - start)
            yield measure(model, count, seed=seed, first_sample=start, batch=batch, settings=settings)
            advance(count)


def _merged(parts: Sequence[Statistics]) -> Statistics:
    total = parts[0]
    for part in parts[1:]:
        total = total.merge(part)
    return total


def _agreement(parts: Sequence[Statistics]) -> list[float] | None:
    """Spearman correlation of the head rankings of two disjoint halves, per source scale."""
    from heatkv.calibration import ranking_agreement

    if len(parts) < 2:
        return None
    return [float(x) for x in ranking_agreement(_merged(parts[::2]), _merged(parts[1::2]))]


def _calibration_table(statistics: Statistics, agreement: Sequence[float] | None) -> Table:
    table = Table(
        "source scale", "tokens", "mean S-CAS", "Gini over heads", "rank agreement of halves", title="calibration"
    )
    gini, mean = statistics.gini(), statistics.scas.mean(axis=(0, 1))
    for scale, (_, height, width) in enumerate(statistics.schedule.scales[:-1]):
        table.add_row(
            str(scale),
            f"{height}x{width}",
            f"{mean[scale]:.4f}",
            f"{gini[scale]:.3f}",
            "-" if agreement is None else f"{agreement[scale]:.3f}",
        )
    table.caption = f"{statistics.count} samples of {statistics.provenance.model}"
    return table


@app.command()
def calibrate(
    out: Annotated[Path, typer.Option("--out", help="statistics file to write")],
    model: Model = "emoji",
    weights: Weights = None,
    vae: Vae = None,
    text_encoder: TextEncoder = None,
    prompts: Prompts = None,
    size: Size = None,
    ratio: Ratio = None,
    samples: Annotated[int, typer.Option("--samples", help="images to measure, all classes in turn")] = 64,
    append: Annotated[bool, typer.Option("--append", help="add samples to an existing file")] = False,
    seed: Seed = 0,
    cfg: Cfg = None,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    as_json: AsJson = False,
) -> None:
    """Measure how much every head looks back at every scale; writes a statistics file.

    Example: heatkv calibrate --model emoji --samples 64 --out statistics.safetensors
    """
    _positive("samples", samples)
    if out.exists() and not append:
        raise FormatError(f"{out} exists; add samples to it with --append or name another file")
    if append and not out.exists():
        raise FormatError(f"{out} does not exist; leave --append out to create it")
    if not out.parent.is_dir():
        raise FormatError(f"the folder {out.parent} does not exist")
    check_writable(out.parent)
    loaded = _load(model, weights, vae, text_encoder, prompts, size, ratio, dtype, device)
    settings = _settings(loaded, cfg)
    before = _statistics(out, loaded) if append else None
    taken = [] if before is None else [s.split(":", 2) for s in before.provenance.samples]
    first = max((int(index) + 1 for given, index, _ in taken if int(given) == seed), default=0)
    parts: list[Statistics] = []
    total: Statistics | None = None
    try:
        for part in _calibrate(loaded, samples, seed, settings, first):
            if before is not None and not parts:
                before.merge(part)  # refuse before hours are spent
            parts.append(part)
    finally:
        if parts:
            total = _merged(parts if before is None else [before, *parts])
            total.save(out)
            _say(f"{out}: {total.count} samples")
    assert total is not None
    agreement = _agreement(parts)
    data = {
        "out": str(out),
        "samples": total.count,
        "gini": total.gini().tolist(),
        "rank_agreement_of_halves": agreement,
    }
    _show(_calibration_table(total, agreement), as_json, data)


def _statistics_of_folder(
    folder: Path, model: ImageModel[Any], samples: int, seed: int, settings: Settings
) -> Statistics:
    """The folder's own statistics: those of an earlier run as far as they fit, the rest measured now."""
    from heatkv.calibration import sample_names, told_settings

    path = folder / "statistics.safetensors"
    wanted = sample_names(model, seed, model.labels(samples), 0)
    parts: list[Statistics] = []
    if path.exists():
        try:
            found = _statistics(path, model)
            assert found is not None
            if (found.provenance.cfg, found.provenance.settings) == told_settings(settings, model) and list(
                found.provenance.samples
            ) == wanted[: found.count]:
                parts.append(found)
            else:
                _say(f"measuring again: {path} was measured with other samples or guidance")
        except HeatKVError as error:
            _say(f"measuring again: {error}")
    done = sum(part.count for part in parts)
    if done == samples:
        _say(f"using {path} ({done} samples)")
        return parts[0]
    try:
        parts.extend(_calibrate(model, samples - done, seed, settings, first=done))
    finally:
        if parts:
            _merged(parts).save(path)
    agreement = _agreement(parts)
    if agreement is not None:
        worst, mean = min(agreement), sum(agreement) / len(agreement)
        _say(
            f"calibrated on {samples} samples; head rankings of two halves agree by {mean:.2f} "
            f"(Spearman, mean over scales; worst {worst:.2f})"
        )
    return _merged(parts)


def _check_request(
    model: ImageModel[Any],
    names: Sequence[str],
    budgets: Sequence[Budget],
    plans: Sequence[Path],
    orders: Path | None,
    rows: int,
    sink_scales: int | None,
) -> None:
    """Refuse bad policies, budgets, plans and rankings before anything is measured."""
    texts = [str(budget) for budget in budgets]
    for text in texts:
        if texts.count(text) > 1:
            raise HeatKVError(f"budget {text} is named twice")
    for name in names:
        policy = _policy(name, sink_scales)
        for budget in budgets:
            if name != "full":
                policy.check(
                    PlanningProblem(model.geometry, budget, rows=rows, storage=_storage_of(model), model=model.name)
                )
    for path in plans:
        _load_plan(path, model.geometry)
    _rankings(orders, model.geometry)


def _subjects(
    model: ImageModel[Any],
    names: Sequence[str],
    budgets: Sequence[Budget],
    plans: Sequence[Path],
    *,
    statistics: Statistics | None,
    orders: Path | None,
    rows: int,
    seed: int,
    draws: int,
    sink_scales: int | None,
) -> list[Any]:
    from heatkv.profiling.runner import Subject, plan_subjects

    subjects = plan_subjects(
        model, names, budgets, statistics=statistics, rankings=_rankings(orders, model.geometry), rows=rows,
        storage=_storage_of(model), seed=seed, draws=draws,
        options={} if sink_scales is None else {"sink_scales": sink_scales},
    )  # fmt: skip
    for path in plans:
        plan = _load_plan(path, model.geometry)
        subjects.append(Subject(f"{plan.policy} ({path.name})", f"{plan.budget:.4%}".replace(".0000", ""), (plan,)))
    taken: set[str] = set()
    for subject in subjects:
        if subject.name in taken:
            raise HeatKVError(f"{subject.name} is named twice")
        taken.add(subject.name)
    return subjects


def _storage_of(model: ImageModel[Any]) -> str:
    return next(name for name, dtype in COMPUTE_DTYPES.items() if dtype == model.compute_dtype)


def _measure_latency(
    model: ImageModel[Any],
    subjects: Sequence[Any],
    rows: int,
    settings: Settings,
    repeats: int,
    seed: int,
) -> dict[str, Any]:
    from heatkv.profiling.runner import latency_row, measure_latency

    with _progress("timing", len(subjects) * repeats) as advance:
        measured = measure_latency(
            model, subjects, rows=rows, settings=settings, repeats=repeats, seed=seed, progress=lambda: advance(1)
        )
    return {name: latency_row(result) for name, result in measured.items()}


@app.command()
def profile(
    out: OutFolder,
    model: Model = "emoji",
    weights: Weights = None,
    vae: Vae = None,
    text_encoder: TextEncoder = None,
    prompts: Prompts = None,
    size: Size = None,
    ratio: Ratio = None,
    policies: Policies = "sliding-window,streaming",
    budgets: Budgets = DEFAULT_BUDGETS,
    plan: PlanFiles = None,
    statistics: Statistic = None,
    orders: Orders = None,
    sink_scales: SinkScales = None,
    repeats: Annotated[int, typer.Option("--repeats", help="timed runs of every policy")] = 10,
    trace: Annotated[bool, typer.Option("--trace", help="also write a profiler trace (JSON) per policy")] = False,
    seed: Seed = 0,
    cfg: Cfg = None,
    rows: Rows = None,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    as_json: AsJson = False,
) -> None:
    """Memory and latency of every policy at every budget.

    Example: heatkv profile --model emoji --policies streaming --budgets 20%,10% --out results/profile
    """
    from heatkv.profiling.runner import bytes_row, images_of_rows, save_results
    from heatkv.profiling.trace import save_trace

    _positive("repeats", repeats)
    _one_ranking(statistics, orders)
    names = _names(policies, "policy")
    parsed = [Budget.parse(text) for text in _names(budgets, "budget")]
    loaded = _load(model, weights, vae, text_encoder, prompts, size, ratio, dtype, device)
    settings = _settings(loaded, cfg)
    rows = rows if rows is not None else settings.rows_per_image
    images_of_rows(rows, settings)
    subjects = _subjects(
        loaded, names, parsed, plan or [], statistics=_statistics(statistics, loaded, settings), orders=orders,
        rows=rows, seed=seed, draws=1, sink_scales=sink_scales,
    )  # fmt: skip
    folder = make_folder(out)
    results = [bytes_row(loaded, subject, rows, _storage_of(loaded)) for subject in subjects]
    request: dict[str, Any] = {"seed": seed, "repeats": repeats}
    # an interrupt keeps what is known by then
    save_results(folder / "results.json", loaded, settings, results, request)
    times = _measure_latency(loaded, subjects, rows, settings, repeats, seed)
    for subject, row in zip(subjects, results, strict=True):
        row |= times[subject.name]
        if trace:
            name = "".join(c if c.isalnum() else "_" for c in subject.name)
            save_trace(
                folder / f"trace_{name}.json", loaded, subject.plans[0], images_of_rows(rows, settings), settings
            )
    _finish(
        folder,
        loaded,
        settings,
        results,
        request,
        as_json,
        f"{loaded.name}, {rows} rows, {_storage_of(loaded)}, {loaded.device}",
    )


def _finish(
    folder: Path,
    model: ImageModel[Any],
    settings: Settings,
    rows: list[dict[str, Any]],
    request: dict[str, Any],
    as_json: bool,
    title: str,
) -> None:
    from heatkv.profiling.report import results_table
    from heatkv.profiling.runner import save_results

    save_results(folder / "results.json", model, settings, rows, request)
    _show(results_table(rows, title), as_json, read_json(folder / "results.json") if as_json else None)
    _say(f"written: {folder}")


@app.command()
def generate(
    out: OutFolder,
    label: Annotated[list[str] | None, typer.Option("--label", help="class name or number; may be repeated")] = None,
    prompt: Annotated[list[str] | None, typer.Option("--prompt", help="text (Infinity); may be repeated")] = None,
    negative: Annotated[str | None, typer.Option("--negative", help="negative prompt of all prompts")] = None,
    model: Model = "emoji",
    weights: Weights = None,
    vae: Vae = None,
    text_encoder: TextEncoder = None,
    size: Size = None,
    ratio: Ratio = None,
    policy: Annotated[str, typer.Option("--policy", help="name of a policy, see `heatkv policies`")] = "full",
    budget: BudgetText = None,
    plan: Annotated[Path | None, typer.Option("--plan", help="plan.json of `heatkv solve`")] = None,
    statistics: Statistic = None,
    orders: Orders = None,
    sink_scales: SinkScales = None,
    count: Annotated[int, typer.Option("--count", help="images per label")] = 1,
    seed: Seed = 0,
    cfg: Cfg = None,
    rows: Rows = None,
    dtype: Dtype = "float32",
    device: Device = "cpu",
) -> None:
    """Draw images under a budget.

    Example: heatkv generate --policy streaming --budget 20% --label pizza --label star --out pictures
    """
    from heatkv.generation import generate as draw
    from heatkv.images import image_grid
    from heatkv.profiling.runner import images_of_rows

    _positive("count", count)
    _one_ranking(statistics, orders)
    loaded = _load(model, weights, vae, text_encoder, None, size, ratio, dtype, device, measuring=False)
    settings = _settings(loaded, cfg)
    if negative is not None and not settings.guided:
        raise ModelError(f"--negative takes no part without guidance, and cfg {cfg:g} is none")
    wanted = _what_to_draw(loaded, label or [], prompt or [], negative)
    labels, titles = ([item for item in column for _ in range(count)] for column in zip(*wanted, strict=True))
    batch = min(len(labels), 16 if rows is None else images_of_rows(rows, settings))
    if plan is not None:
        _nothing_beside_a_plan(budget, statistics, orders, sink_scales)
        chosen = _load_plan(plan, loaded.geometry)
    else:
        if budget is None and policy != "full":
            raise HeatKVError(f"policy {policy!r} needs --budget, written 10%, 0.1, 600MiB, 2GB or 650tokens")
        problem = PlanningProblem(
            loaded.geometry, Budget.parse(budget or "100%"), _statistics(statistics, loaded, settings),
            _rankings(orders, loaded.geometry), seed, batch * settings.rows_per_image, _storage_of(loaded), model,
        )  # fmt: skip
        chosen = _policy(policy, sink_scales).plan(problem)
    folder = make_folder(out)
    done = replaced = 0
    with _progress("drawing", len(labels)) as advance:
        for first in range(0, len(labels), batch):
            part = labels[first : first + batch]
            images = draw(loaded, part, chosen, seed=seed, first_sample=first, batch=batch, settings=settings)
            for index, image in enumerate(images):
                path = folder / f"{first + index:04d}_{titles[first + index]}.png"
                replaced += path.exists()
                _save_picture(image_grid(image[None], 1), path)
            done += len(part)
            advance(len(part))
    held = chosen.bytes(batch * settings.rows_per_image, _storage_of(loaded)) / 2**20
    where = f"{folder} ({replaced} in place of older ones)" if replaced else f"{folder}"
    _say(f"written: {done} images in {where}; {chosen.policy}, the cache took {held:.2f} MiB for {batch} at a time")


def _what_to_draw(
    model: ClassConditionalModel | TextConditionalModel, labels: list[str], prompts: list[str], negative: str | None
) -> list[tuple[Any, str]]:
    """(what to draw it from, name for its file) of every label or prompt."""
    if isinstance(model, ClassConditionalModel):
        if prompts or negative is not None:
            raise ModelError(f"{model.name} draws classes, not prompts; name them with --label")
        if not labels:
            raise ModelError(f"name what {model.name} is to draw with --label")
        chosen = [model.label(text) for text in labels]
        return [(index, model.class_names[index] if model.class_names else str(index)) for index in chosen]
    if labels:
        raise ModelError(f"{model.name} draws prompts, not classes; write them with --prompt")
    if not prompts or not all(text.strip() for text in prompts):
        raise ModelError(f"write what {model.name} is to draw with --prompt")
    encoded = model.prompts(prompts, None if negative is None else [negative] * len(prompts))
    names = ["".join(c if c.isalnum() else "_" for c in text)[:40] for text in prompts]
    return list(zip(encoded, names, strict=True))


def _save_picture(picture: Any, path: Path) -> None:
    from heatkv.files import replacing

    with replacing(path) as temporary:
        picture.save(temporary, format="PNG")


@app.command()
def compare(
    out: OutFolder,
    model: Model = "emoji",
    weights: Weights = None,
    vae: Vae = None,
    text_encoder: TextEncoder = None,
    prompts: Prompts = None,
    size: Size = None,
    ratio: Ratio = None,
    policies: Policies = DEFAULT_POLICIES,
    budgets: Budgets = DEFAULT_BUDGETS,
    plan: PlanFiles = None,
    statistics: Statistic = None,
    orders: Orders = None,
    sink_scales: SinkScales = None,
    samples: Annotated[
        int, typer.Option("--samples", help="images to calibrate on, when no statistics are given")
    ] = 64,
    images: Annotated[int, typer.Option("--images", help="images whose logits are compared (KL, top-1)")] = 32,
    pictures: Annotated[int, typer.Option("--pictures", help="images drawn freely and compared (PSNR, SSIM)")] = 16,
    draws: Annotated[int, typer.Option("--draws", help="plans of every policy that draws at random")] = 3,
    repeats: Annotated[int, typer.Option("--repeats", help="timed runs of every policy")] = 5,
    seed: Seed = 0,
    cfg: Cfg = None,
    rows: Rows = None,
    dtype: Dtype = "float32",
    device: Device = "cpu",
    as_json: AsJson = False,
) -> None:
    """The main job: calibrate if needed, plan, draw, measure; a table, results.json and pictures.

    Example: heatkv compare --model emoji --policies heatkv,streaming --budgets 20%,10% --out results/compare
    """
    from heatkv.profiling.fidelity import FidelityBench
    from heatkv.profiling.report import save_image_sheet, save_scas_heat_map
    from heatkv.profiling.runner import bytes_row, fidelity_row, images_of_rows, save_results

    for name, value in (
        ("samples", samples),
        ("images", images),
        ("pictures", pictures),
        ("draws", draws),
        ("repeats", repeats),
    ):
        _positive(name, value)
    _one_ranking(statistics, orders)
    names = _names(policies, "policy")
    parsed = [Budget.parse(text) for text in _names(budgets, "budget")]
    needed = _needs_statistics(names) and orders is None
    loaded = _load(model, weights, vae, text_encoder, prompts, size, ratio, dtype, device)
    settings = _settings(loaded, cfg)
    rows = rows if rows is not None else settings.rows_per_image
    images_of_rows(rows, settings)
    given = _statistics(statistics, loaded, settings)
    _check_request(loaded, names, parsed, plan or [], orders, rows, sink_scales)
    folder = make_folder(out)
    measured = (
        given if given is not None or not needed else _statistics_of_folder(folder, loaded, samples, seed, settings)
    )
    subjects = _subjects(
        loaded, names, parsed, plan or [], statistics=measured, orders=orders, rows=rows, seed=seed, draws=draws,
        sink_scales=sink_scales,
    )  # fmt: skip
    results = [bytes_row(loaded, subject, rows, _storage_of(loaded)) for subject in subjects]
    request: dict[str, Any] = {
        "seed": seed,
        "images": images,
        "pictures": pictures,
        "draws": draws,
        "repeats": repeats,
        "statistics": None if measured is None else measured.provenance.to_json(),
    }
    # an interrupt keeps what is known by then
    save_results(folder / "results.json", loaded, settings, results, request)
    times = _measure_latency(loaded, subjects, rows, settings, repeats, seed)
    finished: list[dict[str, Any]] = []
    sheets: dict[str, list[tuple[str, Any]]] = {}
    plans = sum(len(subject.plans) for subject in subjects)
    passes = images + plans * (images + -(-min(pictures, images) // 16) * 16)
    try:
        with _progress("comparing", passes) as advance:
            bench = FidelityBench(
                loaded, images=images, pictures=pictures, seed=seed + 1, settings=settings, progress=advance
            )  # other samples than the calibration's
            for subject, row in zip(subjects, results, strict=True):
                figures, details = fidelity_row(bench, subject)
                finished.append(row | times[subject.name] | figures)
                sheets.setdefault(subject.budget, []).append((subject.policy, details.pictures))
    except KeyboardInterrupt:
        unfinished = [row | times[s.name] for s, row in zip(subjects, results, strict=True)][len(finished) :]
        save_results(folder / "results.json", loaded, settings, finished + unfinished, request)
        _say(f"stopped; {len(finished)} of {len(subjects)} comparisons are kept in {folder / 'results.json'}")
        raise
    import torch

    reference = [("full", bench.reference_pictures())]
    for budget, lines in sheets.items():
        shown = [(name, torch.cat(parts)) for name, parts in lines if name != "full"]
        if shown:
            tag = budget.replace("%", "percent")
            columns = min(bench.pictures, 12)
            save_image_sheet(
                folder / f"images_{tag}.png", reference + shown, columns, f"{loaded.name}, cache of {budget}"
            )
    if measured is not None:
        save_scas_heat_map(folder / "scas.png", measured)
    title = (
        f"{loaded.name}: cache of {rows} rows in {_storage_of(loaded)}, KL and top-1 over {images} images, PSNR and "
        f"SSIM over {bench.pictures}"
    )
    _finish(folder, loaded, settings, finished, request, as_json, title)


# ---------------------------------------------------------------------------------------------------- entry


def _usage_message(error: Exception) -> str | None:
    """The message of typer's own errors, which live in different modules in different releases."""
    form = getattr(error, "format_message", None)
    return str(form()) if callable(form) and hasattr(error, "exit_code") else None


def run(arguments: Sequence[str]) -> int:
    """Run one command and return its exit code."""
    try:
        outcome = app(args=list(arguments), prog_name="heatkv", standalone_mode=False)
        sys.stdout.flush()
        if outcome == 130:
            _say("heatkv: stopped")
        return outcome if isinstance(outcome, int) else 0
    except HeatKVError as error:
        _say(f"heatkv: {' '.join(str(error).split())}")
        return 2
    except (KeyboardInterrupt, typer.Abort):
        _say("heatkv: stopped")
        return 130
    except BrokenPipeError:  # the reader of our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        message = _usage_message(error)
        if message is None:
            raise
        if message:
            _say(f"heatkv: {' '.join(message.split())}")
        return 2
