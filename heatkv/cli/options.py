"""The options that commands share, each written once, and the groups in which several commands take them."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from heatkv.core.storage_type import CODES, DTYPES
from heatkv.errors import HeatKVError

Model = Annotated[str, typer.Option("--model", help="name of a model, see `heatkv models`")]
Statistic = Annotated[Path | None, typer.Option("--statistics", help="statistics file of `heatkv calibrate`")]
Orders = Annotated[Path | None, typer.Option("--orders", help="published ranking file (JSON) instead of statistics")]
Seed = Annotated[int, typer.Option("--seed", help="seed of samples and random policies")]
Cfg = Annotated[
    float | None, typer.Option("--cfg", help="guidance strength; default: the model's; none is 0, for Infinity 1")
]
Rows = Annotated[
    int | None, typer.Option("--rows", help="cache rows; guidance takes two per image (default: one image)")
]
Dtype = Annotated[str, typer.Option("--dtype", help=f"compute and storage type: {', '.join(DTYPES)}")]
Device = Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:1, mps")]
Deterministic = Annotated[
    bool, typer.Option("--deterministic", help="the same bits every time on one machine (docs/numerics.md)")
]
Storage = Annotated[
    str | None,
    typer.Option("--storage", help=f"8-bit codes in the cache: {', '.join(CODES)}; default: the compute type"),
]
Attention = Annotated[str, typer.Option("--attention", help="attention kernel: auto, ragged or triton")]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON instead of a table")]
PlanFiles = Annotated[list[Path] | None, typer.Option("--plan", help="plan.json of `heatkv solve`; may be repeated")]
Policy = Annotated[
    str | None,
    typer.Option(
        "--policy", help="name of a policy, see `heatkv policies`; default: full in generate, heatkv in solve"
    ),
]
Policies = Annotated[
    str | None,
    typer.Option(
        "--policies", help="names separated by commas, or all, see `heatkv policies`; default: none with --plan"
    ),
]
Budgets = Annotated[str, typer.Option("--budgets", help="separated by commas: 10%, 0.1, 600MiB, 2GB or 650tokens")]
BudgetText = Annotated[
    str | None, typer.Option("--budget", help="10%, 0.1, 600MiB, 2GB, 650tokens, or auto, where a policy chooses it")
]
SinkScales = Annotated[
    int | None, typer.Option("--sink-scales", help="first scales that are never dropped; default: the policy's")
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="an option of a policy, see `heatkv policies`; may be repeated"),
]
Weights = Annotated[Path | None, typer.Option("--weights", help="weights file or folder, see `heatkv models`")]
Vae = Annotated[Path | None, typer.Option("--vae", help="its VAE file; default: looked for beside the weights")]
TextEncoder = Annotated[
    str | None, typer.Option("--text-encoder", help="T5 encoder: local folder or hub name (Infinity)")
]
Prompts = Annotated[
    Path | None, typer.Option("--prompts", help="text file, one prompt a line, for measurements (Infinity)")
]
Size = Annotated[str | None, typer.Option("--size", help="0.06M, 0.25M, 0.60M or 1M (Infinity); see `heatkv models`")]
Ratio = Annotated[str | None, typer.Option("--ratio", help="height/width, as 1.5 or 3:2")]
Repeats = Annotated[int, typer.Option("--repeats", help="timed runs of every policy")]
Resume = Annotated[
    bool,
    typer.Option("--resume", help="finish the run that was stopped here, and no other; starts where there is none"),
]
OutFolder = Annotated[Path, typer.Option("--out", help="folder to write to")]


@dataclass(frozen=True)
class Source:
    """Which model, and where its parts come from."""

    model: Model = "emoji"
    weights: Weights = None
    vae: Vae = None
    text_encoder: TextEncoder = None
    prompts: Prompts = None
    size: Size = None
    ratio: Ratio = None


@dataclass(frozen=True)
class Ranking:
    """What policies plan from, and the options they are made with."""

    statistics: Statistic = None
    orders: Orders = None
    sink_scales: SinkScales = None
    set: Set = None

    def __post_init__(self) -> None:
        if self.statistics is not None and self.orders is not None:
            raise HeatKVError("--statistics and --orders both rank heads; give one of them")


@dataclass(frozen=True)
class Running:
    """How the model runs."""

    seed: Seed = 0
    cfg: Cfg = None
    rows: Rows = None
    dtype: Dtype = "float32"
    device: Device = "cpu"
    storage: Storage = None
    attention: Attention = "auto"
    deterministic: Deterministic = False


@dataclass(frozen=True)
class Sweep:
    """What is measured over, beside policies and budgets, and in which process memory is."""

    batches: Annotated[
        str | None, typer.Option("--batches", help="images at once, separated by commas, in place of --rows")
    ] = None
    seeds: Annotated[str | None, typer.Option("--seeds", help="separated by commas, in place of --seed")] = None
    in_process: Annotated[
        bool,
        typer.Option("--in-process", help="a quick look: memory in this process, not a fresh one for every figure"),
    ] = False


@dataclass(frozen=True)
class Following:
    """Whether, and how, the plan follows the images that are drawn."""

    follow_every: Annotated[
        int | None,
        typer.Option("--follow-every", help="measure every so many-th image and let the plan follow (docs/online.md)"),
    ] = None
    half_life: Annotated[
        float | None, typer.Option("--half-life", help="measured images after which one weighs half (default 32)")
    ] = None
    adopt_above: Annotated[
        str | None,
        typer.Option(
            "--adopt-above", help="adopt a plan that gains more than this share of what the old one loses (default 5%)"
        ),
    ] = None
    measuring_memory: Annotated[
        str | None,
        typer.Option(
            "--measuring-memory", help="bytes for measuring beside the cache, as 64MiB (default: in its place)"
        ),
    ] = None
    save_statistics: Annotated[
        Path | None, typer.Option("--save-statistics", help="write the statistics that the plan followed here")
    ] = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if self.follow_every is None and value is not None:
                raise HeatKVError(f"--{name.replace('_', '-')} is for a plan that follows; add --follow-every")
        if self.follow_every is not None and self.follow_every < 1:
            raise HeatKVError(f"--follow-every is {self.follow_every}; it must be a whole number of at least 1")
        if self.half_life is not None and not 0 < self.half_life < math.inf:
            raise HeatKVError(f"--half-life is {self.half_life:g}; it is a number of measured images above 0")


class Without(str):
    """In `Annotated[Group, Without(name)]`: the command lacks this option of the group, which keeps its default."""


def command(function: Callable[..., None]) -> Callable[..., None]:
    """The function as typer is to see it: in the place of a parameter that is a group, a dataclass, its options.

    All parameters are keyword-only, so that a group may follow an option with a default.
    """
    groups: dict[str, tuple[Callable[..., Any], list[str]]] = {}
    parameters: list[inspect.Parameter] = []
    for parameter in inspect.signature(function, eval_str=True).parameters.values():
        group, *notes = get_args(parameter.annotation) or (parameter.annotation,)
        options = [parameter]
        if is_dataclass(group):
            assert isinstance(group, type)
            options = [o for o in inspect.signature(group, eval_str=True).parameters.values() if o.name not in notes]
            groups[parameter.name] = group, [option.name for option in options]
        parameters += [option.replace(kind=inspect.Parameter.KEYWORD_ONLY) for option in options]

    @functools.wraps(function)
    def called(**given: Any) -> None:
        made = {name: group(**{o: given.pop(o) for o in options}) for name, (group, options) in groups.items()}
        function(**given, **made)

    called.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return called
