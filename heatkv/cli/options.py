"""The options that commands share, each written once, and the groups in which several commands take them."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from heatkv.core.schema import shown, suggest
from heatkv.core.storage_type import CODES, DTYPES
from heatkv.errors import HeatKVError

Model = Annotated[str, typer.Option("--model", help="name of a model, see `heatkv models`")]
Weights = Annotated[
    list[str] | None,
    typer.Option(
        "--weights", metavar="[vae=|text=]PATH",
        help="weights file or folder, see `heatkv models`; repeat it for the VAE, vae=FILE (default: looked for beside "
        "the weights), and Infinity's text encoder, text=FOLDER or its hub name",
    ),
]  # fmt: skip
Prompts = Annotated[
    Path | None, typer.Option("--prompts", help="text file, one prompt a line, for measurements (Infinity)")
]
Size = Annotated[
    str | None,
    typer.Option(
        "--size", metavar="SIZE[,RATIO]",
        help="0.06M, 0.25M, 0.60M or 1M (Infinity), see `heatkv models`; RATIO is height/width, as 1.5 or 3:2",
    ),
]  # fmt: skip
StatisticsFile = Annotated[Path | None, typer.Option("--statistics", help="statistics file of `heatkv calibrate`")]
Orders = Annotated[Path | None, typer.Option("--orders", help="published ranking file (JSON) instead of statistics")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="an option of a policy, see `heatkv policies`; may be repeated"),
]
Seed = Annotated[int, typer.Option("--seed", help="seed of samples and random policies")]
Seeds = Annotated[str, typer.Option("--seed", help="seeds of samples and random policies, separated by commas")]
Cfg = Annotated[
    float | None, typer.Option("--cfg", help="guidance strength; default: the model's; none is 0, for Infinity 1")
]
Rows = Annotated[
    int | None,
    typer.Option("--rows", help="cache rows, two an image with guidance; default: solve 2, generate what fits"),
]
RowsList = Annotated[
    str | None,
    typer.Option("--rows", help="cache rows, comma-separated, two an image with guidance; default: one image"),
]
Dtype = Annotated[
    str,
    typer.Option(
        "--dtype", help=f"compute type: {', '.join(DTYPES)}; with {' or '.join(CODES)} and a slash before it, as "
        "int8/bfloat16, the cache is coded in 8 bits",
    ),
]  # fmt: skip
Device = Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:1, mps")]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON instead of a table")]
PlanFile = Annotated[Path | None, typer.Option("--plan", help="plan.json of `heatkv solve`, instead of a policy")]
PlanFiles = Annotated[list[Path] | None, typer.Option("--plan", help="plan.json of `heatkv solve`; may be repeated")]
Policy = Annotated[
    str | None,
    typer.Option(
        "--policy", help="name of a policy, see `heatkv policies`; default: full in generate, heatkv in solve"
    ),
]  # fmt: skip
Policies = Annotated[
    str | None,
    typer.Option(
        "--policies", help="names separated by commas, or all, see `heatkv policies`; default: none with --plan"
    ),
]  # fmt: skip
BudgetText = Annotated[
    str | None, typer.Option("--budget", help="10%, 0.1, 600MiB, 2GB, 650tokens, or auto, where a policy chooses it")
]
Budgets = Annotated[str, typer.Option("--budgets", help="separated by commas: 10%, 0.1, 600MiB, 2GB or 650tokens")]
Repeats = Annotated[int, typer.Option("--repeats", help="timed runs of every policy")]
OutFolder = Annotated[Path, typer.Option("--out", help="folder to write to")]


@dataclass(frozen=True)
class Program:
    """What is said before the command and holds for all of it; `context.obj` of every command."""

    attention: str = "auto"


@dataclass(frozen=True)
class Source:
    """Which model, and where its parts come from."""

    model: Model = "emoji"
    weights: Weights = None
    size: Size = None


@dataclass(frozen=True)
class MeasuredSource(Source):
    """A model that draws for measurements."""

    prompts: Prompts = None


@dataclass(frozen=True)
class Ranking:
    """What policies plan from, and the options they are made with."""

    statistics: StatisticsFile = None
    orders: Orders = None
    set: Set = None

    def __post_init__(self) -> None:
        if self.statistics is not None and self.orders is not None:
            raise HeatKVError("--statistics and --orders both rank heads; give one of them")


@dataclass(frozen=True)
class Planning(Ranking):
    """One policy at a budget, or a finished plan."""

    policy: Policy = None
    budget: BudgetText = None
    plan: PlanFile = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value in vars(self).items():
            if self.plan is not None and value is not None and name != "plan":
                raise HeatKVError(f"--plan is a finished plan; leave --{name} out")


@dataclass(frozen=True)
class Running:
    """How the model runs."""

    cfg: Cfg = None
    dtype: Dtype = "float32"
    device: Device = "cpu"


@dataclass(frozen=True)
class Sweep:
    """Policies, budgets and finished plans, over rows and seeds."""

    policies: Policies = None
    budgets: Budgets = "50%,30%,20%,10%"
    plan: PlanFiles = None
    rows: RowsList = None
    seed: Seeds = "0"


def command(function: Callable[..., None]) -> Callable[..., None]:
    """The function as typer is to see it: in the place of a parameter that is a group, a dataclass, its options.

    All parameters are keyword-only, so that a group may follow an option with a default.
    """
    groups: dict[str, tuple[Callable[..., Any], list[str]]] = {}
    parameters: list[inspect.Parameter] = []
    for parameter in inspect.signature(function, eval_str=True).parameters.values():
        group = (get_args(parameter.annotation) or (parameter.annotation,))[0]
        options = [parameter]
        if is_dataclass(group):
            assert isinstance(group, type)
            options = list(inspect.signature(group, eval_str=True).parameters.values())
            groups[parameter.name] = group, [option.name for option in options]
        parameters += [option.replace(kind=inspect.Parameter.KEYWORD_ONLY) for option in options]

    @functools.wraps(function)
    def called(**given: Any) -> None:
        made = {name: group(**{o: given.pop(o) for o in options}) for name, (group, options) in groups.items()}
        function(**given, **made)

    called.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return called


# ----------------------------------------------------------------------------------------- values of options


def names_of(text: str, what: str) -> list[str]:
    """Names separated by commas, each once. Raises HeatKVError."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise HeatKVError(f"no {what} was named")
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise HeatKVError(f"{what} {shown(twice)} is named twice")
    return names


def count_of(text: str, name: str) -> int:
    """A whole number. Raises HeatKVError."""
    try:
        return int(text)
    except ValueError:
        raise HeatKVError(f"{name} {shown(text)} is no whole number") from None


def decimal_of(text: str, name: str) -> float:
    """A number. Raises HeatKVError."""
    try:
        return float(text)
    except ValueError:
        raise HeatKVError(f"{name} {shown(text)} is no number") from None


def share_of(text: str, name: str) -> float:
    """ "5%" or "0.05" as a share; a number from 1 on without % may mean either, and is refused."""
    in_percent = text.endswith("%")
    value = decimal_of(text.removesuffix("%"), name)
    if not in_percent and not value < 1:
        raise HeatKVError(f"{name} {shown(text)} without % is a share; write 5% or 0.05")
    return value / 100 if in_percent else value


def settings_of(
    texts: Iterable[str], option: str, known: Mapping[str, Callable[[str, str], Any]] | None = None
) -> dict[str, Any]:
    """name -> value of texts such as `name=value`, read by what is known of each name; as text where nothing is.

    Raises HeatKVError for other texts, and for a name that is unknown or set twice.
    """
    values: dict[str, Any] = {}
    for text in texts:
        name, equals, value = (part.strip() for part in text.partition("="))
        name = name.replace("-", "_")
        if not (name and equals and value):
            raise HeatKVError(f"cannot read {option} {shown(text)}; write it as name=value")
        if known is not None and name not in known:
            raise HeatKVError(f"unknown name {shown(name)} in {option}{suggest(name, known)}")
        if name in values:
            raise HeatKVError(f"{option}: {shown(name)} is set twice")
        values[name] = value if known is None else known[name](value, f"{option}: {name}")
    return values
