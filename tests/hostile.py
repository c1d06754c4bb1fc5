"""Every loader with whole files for it, and what is held of it when a file is damaged: a typed error of one line or a
valid result, in bounded time and memory, without running, writing or connecting to anything."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import random
import re
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mutations import (
    NUMBERS,
    TEXTS,
    Mutator,
    damage_bytes,
    damage_json,
    damage_lines,
    damage_safetensors,
    misplaced,
    torch_damager,
)
from numpy.typing import NDArray
from safetensors.torch import save_file

from heatkv.cli.check import _share
from heatkv.cli.measurement import whole_numbers
from heatkv.cli.opening import _prompts, open_plan, parse_names, parse_ratio
from heatkv.cli.options import Ranking
from heatkv.cli.settings import policy_options
from heatkv.core.capacity_plan import CapacityPlan, load_plan
from heatkv.core.geometry import Budget, CacheGeometry
from heatkv.core.level_statistics import LevelStatistics
from heatkv.core.levels import LEVELS, LevelChoices
from heatkv.core.plan import CoarseCells, Plan
from heatkv.core.schedule import ScaleSchedule
from heatkv.core.statistics import HeadRankings, Provenance, Statistics
from heatkv.engine.token_cache import policy_of
from heatkv.errors import LONGEST_MESSAGE, HeatKVError
from heatkv.layer_budgets import LayerBudgets
from heatkv.models.bsq import BitwiseVAE, BSQConfig
from heatkv.models.checkpoint import (
    build_bsq,
    build_infinity,
    build_var,
    build_vqvae,
    read_checkpoint,
    var_state,
    vqvae_state,
)
from heatkv.models.class_conditional import ClassConditionalModel
from heatkv.models.infinity import Infinity, InfinityConfig
from heatkv.models.text_encoder import T5TextEncoder
from heatkv.models.var import VAR, VARConfig
from heatkv.models.vqvae import VQVAE, VQVAEConfig
from heatkv.policies.base import PlanningProblem, make_policy
from heatkv.policies.snapkv import SnapKV
from heatkv.profiling.analysis.guard import change_lines, check_results
from heatkv.profiling.measure.runner import FIDELITY, versus
from heatkv.profiling.report.latency_table import latency_table
from heatkv.profiling.report.memory_table import memory_table
from heatkv.profiling.report.page import report_data, write_report
from heatkv.profiling.report.old_artefacts import pictures_of, plans_of, scas_of
from heatkv.profiling.results.folder import ResultsFolder, check_replaceable, file_digest, save_scas
from heatkv.profiling.report.old_merging import merge
from heatkv.registry import registered_policies

GEOMETRY = CacheGeometry(2, 3, 4, ScaleSchedule.of([(1, 1), (1, 2), (2, 2), (4, 4), (5, 4)]))
SIDES = (1, 2, 3)


@dataclass(frozen=True)
class Target:
    """A loader: the folder of whole files that it reads, which of them are damaged and how, and what reads them.

    `share` is how often it is tried, against 1; slow ones less.
    """

    name: str
    folder: Path
    mutators: Mapping[str, Mutator]
    load: Callable[[Path], Any]
    share: float = 1.0
    writes: bool = False


@dataclass(frozen=True)
class TextTarget:
    """What reads text from a command line."""

    name: str
    whole: tuple[str, ...]
    load: Callable[[str], Any]
    share: float = 1.0


# ------------------------------------------------------------------------------------------------------ watching


_OUT_OF_MEMORY = re.compile(r"(can't|cannot|unable to) allocate|not enough memory|MemoryError|bad_alloc", re.IGNORECASE)
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


class Broken(AssertionError):
    """What a loader must never do."""


class Watch:
    """Tells, by Python's audit events, when anything runs, is unpickled, written outside `inside`, or connected to.

    Hooks cannot be taken away, so there is one for the process, and it does nothing while nothing is watched.
    """

    _FORBIDDEN = frozenset(
        "os.system os.exec os.fork os.forkpty os.posix_spawn os.spawn os.startfile subprocess.Popen socket.connect "
        "socket.bind socket.getaddrinfo pickle.find_class ctypes.dlopen pty.spawn os.kill shutil.rmtree shutil.move "
        "urllib.Request webbrowser.open code.__new__".split()
    )
    _CHANGING = frozenset("os.mkdir os.rename os.remove os.rmdir os.link os.symlink os.truncate os.chmod".split())

    def __init__(self) -> None:
        self.seen: list[str] = []
        self._inside: Path | None = None
        self._on = False
        sys.addaudithook(self._heard)

    @contextmanager
    def watching(self, inside: Path | None) -> Iterator[None]:
        """`inside` is the only folder that may be written to, if there is one."""
        self.seen, self._inside, self._on = [], inside, True
        try:
            yield
        finally:
            self._on = False

    def _heard(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self._on:
            return
        if event in self._FORBIDDEN:
            self.seen.append(f"{event} {str(arguments)[:200]}")
        elif event in self._CHANGING or (event == "open" and isinstance(arguments[2], int) and arguments[2] & _WRITING):
            self._written(event, arguments[0])

    def _written(self, event: str, path: Any) -> None:
        if isinstance(path, str | bytes | os.PathLike):
            place = Path(os.path.abspath(os.fsdecode(path)))
            if self._inside is None or not place.is_relative_to(self._inside):
                self.seen.append(f"{event} {place}")


def outcome(load: Callable[[], Any], watch: Watch, canary: Path, inside: Path | None = None) -> str:
    """How a load ended: "whole", or the typed error. Raises Broken for anything else."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            with watch.watching(inside):
                load()
            told = "whole"
        except HeatKVError as error:
            told = str(error)
            if not told.strip() or len(told) > LONGEST_MESSAGE or not told.isprintable():
                raise Broken(f"{type(error).__name__} of {len(told)} characters: {told[:300]!r}") from error
            if _OUT_OF_MEMORY.search(told):
                raise Broken(f"it ran out of memory: {told[:300]}") from error
        except Exception as error:
            raise Broken(f"{type(error).__module__}.{type(error).__name__}: {str(error)[:300]}") from error
    if watch.seen:
        raise Broken(f"it did {watch.seen[:3]}")
    if canary.exists():
        raise Broken("code in a file ran")
    return told


# ------------------------------------------------------------------------------------------------- whole files


def _finite(*arrays: NDArray[np.float64]) -> None:
    for array in arrays:
        assert np.isfinite(array).all()


def _statistics() -> Statistics:
    rng = np.random.default_rng(0)
    layers, heads, scales = GEOMETRY.layers, GEOMETRY.heads, len(GEOMETRY.schedule)
    mass = np.tril(rng.random((layers, heads, scales, scales)) + 0.1)
    mass /= mass.sum(axis=3, keepdims=True)
    choices = LevelChoices(GEOMETRY.schedule, sink_scales=1, joint=2)
    shape = (layers, heads)
    joint = tuple(rng.random((*shape, len(choices.combinations(target)))) for target in range(scales))
    levels = LevelStatistics(
        choices, "error", rng.normal(size=(*shape, scales, len(LEVELS))), joint,
        rng.random((*shape, scales, scales, len(LEVELS) + 1)), ("7:0:1", "7:1:2"), ("7:0:1",),
    )  # fmt: skip
    where = Provenance("tiny", "0f", 1.5, {"top_k": 10}, ("7:0:1", "7:1:2"), {"torch": "2"})
    later = np.tril(np.ones((scales, scales)), -1)
    return Statistics(
        GEOMETRY.schedule, 2 * mass, 2 * mass**2 + 0.01 * later, where, all_mass_sum=2 * mass, error_sum=mass * later,
        levels=levels, concentration_sum=rng.random((*shape, scales)),
        similarity_sum=rng.random((layers, scales)) - 0.5,
    )  # fmt: skip


def _use_plan(plan: Any) -> None:
    assert plan.live.min() >= 0
    assert plan.peak_token_heads <= plan.budget_token_heads
    json.dumps(plan.to_json(), allow_nan=False)
    plan.bytes(2, "bfloat16")
    plan.budget_bytes(2, "float32")
    assert plan.had_no_effect() in (True, False)
    if isinstance(plan, CapacityPlan):
        policy_of(plan)
    if plan.predicted_kl is not None:
        _finite(np.array(plan.predicted_kl))


def _use_statistics(path: Path) -> None:
    found = Statistics.load(path)
    _finite(found.mass, found.spread, found.scas, found.gini(), found.mass_square_sum)
    for name in ("all_mass_sum", "error_sum", "concentration_sum", "similarity_sum"):
        if getattr(found, name) is not None:
            _finite(getattr(found, name) / found.count)
    if found.levels is not None:
        _finite(found.levels.single, *found.levels.joint, found.levels.log_bias)
    HeadRankings.from_scores(found.scas)
    json.dumps(found.provenance.to_json(), allow_nan=False)
    found.check_geometry(GEOMETRY)
    found.merge(dataclasses.replace(_OTHER_STATISTICS))


_OTHER_STATISTICS = dataclasses.replace(
    _statistics(),
    provenance=Provenance("tiny", "0f", 1.5, {"top_k": 10}, ("8:0:1", "8:1:2"), {"torch": "2"}),
    levels=None,
)


def _results_folder(folder: Path, emoji: ClassConditionalModel) -> None:
    """A folder as `heatkv compare` leaves it, of two rows; memory and times are made up."""
    statistics = _statistics()
    request = {
        "seed": 0, "images": 2, "pictures": 2, "samples_digest": "0", "statistics": statistics.provenance.to_json(),
    }  # fmt: skip
    results = ResultsFolder(folder, emoji, emoji.sampling, request, pictures=2)
    plans = {"heatkv": _plan(), "snapkv": _capacity_plan()}
    rows: list[dict[str, Any]] = []
    (folder / "plans").mkdir()
    for place, (policy, plan) in enumerate([("full", None), *plans.items()]):
        row: dict[str, Any] = {
            "model": "tiny", "model_fingerprint": "0f", "policy": policy, "budget": "50%" if place else "100%",
            "settings": {"budget": "50%"}, "rows": 2, "dtype": "float32", "storage": "float32", "attention": "auto",
            "schedule": GEOMETRY.schedule.to_json(), "draws": 1, "seed": 0, "batch": 1,
            "budget_bytes": 1000, "planned_bytes": 900, "allocated_bytes": 900, "full_bytes": 2000,
            "current_bytes": 10, "index_bytes": 1, "workspace_bytes": 2, "compensation_bytes": 0,
            "timeline_bytes": [[1, 2]] * 5, "comparison": f"c{place}", "measurement": f"m{place}",
        } | dict.fromkeys(FIDELITY) | {
            "images": 2, "pictures": 2, "kl": 0.1 * place, "kl_per_scale": [0.1] * 5,
            "kl_of_draws": [0.1 * place], "top1_agreement": 0.9,
            "kl_of_images": [0.1, 0.2], "psnr_of_pictures": [30.0, 31.0], "not_measured": {"lpips": "x"},
            "psnr_db": 30.0, "ssim": 0.9, "device_peak_bytes": None, "nvml_bytes": None, "error": None,
            "under_used": False, "had_no_effect": False, "timed": "now",
            "latency_ms": {
                "median": 10.0, "iqr": 1.0, "runs": 2, "interval": [9.0, 11.0], "confidence": 0.9, "outliers": 0,
                "phases": {"attention": 1.0}, "scales": [1.0] * 5,
            },
            "memory": {
                "process": "own", "device": "cpu", "weights_bytes": 5,
                "tensors": {"peak_bytes": {"drawing": 1, "decode": 2}},
                "allocator": None, "host": {"most_bytes": 3}, "graphs": None, "driver": None,
                "steps": [{"parts": {"unexplained": 1}}],
            },
        }  # fmt: skip
        if plan is not None:
            path = folder / "plans" / f"{policy}.json"
            plan.save(path)
            row["plans"] = {path.name: file_digest(path)}
        results.save_pictures(f"{policy} {row['budget']}", f"c{place}", torch.rand(2, 3, 6, 6))
        rows.append(row)
    save_scas(folder / "scas.json", statistics)
    results.finish(rows)
    write_report([folder], folder)


def _plan() -> Plan:
    scales = len(GEOMETRY.schedule)
    last_read = np.tile(np.maximum(np.arange(scales), [4, 4, 2, 3, 4]), (GEOMETRY.layers, GEOMETRY.heads, 1))
    coarser = np.maximum(last_read, [4, 4, 4, 3, 4])
    bias = np.full(last_read.shape, 0.5)
    return Plan(
        "heatkv", GEOMETRY, last_read, 0.95, int(0.95 * GEOMETRY.full_token_heads), 2, "tiny",
        {"budget": "95%", "sink_scales": 2, "predicted_kl": 0.1}, 1.0, 1.5, 0.3,
        (CoarseCells("pool2", coarser, bias), CoarseCells("mean", coarser, bias)),
    )  # fmt: skip


def _capacity_plan() -> Any:
    return SnapKV().plan(PlanningProblem(GEOMETRY, Budget.parse("50%"), model="tiny"))


def _layer_budgets() -> dict[str, Any]:
    return {
        f"Scale {scale}": {"Block 0": 1, "Block 1": 0, "High": 1, "Max": 12, "Min": 3, "Limit": 99} for scale in (4, 5)
    }


def _var() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    config = VARConfig(SIDES, depth=2, width=16, heads=2, num_classes=3, vocab_size=6, z_channels=4)
    state = VAR(config).state_dict()
    levels = torch.cat([torch.full((side * side,), level) for level, side in enumerate(SIDES)])
    return {**state, "lvl_1L": levels[None]}


def _vqvae() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    config = VQVAEConfig(SIDES, vocab_size=6, z_channels=4, channels=32, channel_multipliers=(1, 1))
    return VQVAE(config, encoder=False).state_dict()


def _infinity() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    config = InfinityConfig(
        depth=2, width=16, heads=2, bits=4, mlp_hidden=32, pool_heads=2, text_channels=6, text_positions=5
    )
    return Infinity(config).state_dict()


def _bsq() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return BitwiseVAE(BSQConfig(4, 32, (1, 1)), encoder=False).state_dict()


def _checkpoints(root: Path, canary: Path, bomb_mib: int) -> Iterator[Target]:
    """Every network in every form of file."""
    damage_torch = torch_damager(canary, bomb_mib)
    made: dict[str, tuple[dict[str, torch.Tensor], Callable[[Any], Any]]] = {
        "VAR": (_var(), lambda content: build_var(var_state(content))),
        "VQVAE": (_vqvae(), lambda content: build_vqvae(vqvae_state(content), SIDES)),
        "Infinity": (_infinity(), build_infinity),
        "bitwise VAE": (_bsq(), build_bsq),
    }
    wrapped: dict[str, Callable[[Any], Any]] = {
        "VAR": lambda state: {"epoch": 1, "args": {"betas": (0.9, 0.95)}, "trainer": {"var_wo_ddp": state}},
        "VQVAE": lambda state: {"trainer": {"vae_local": state}},
        "Infinity": lambda state: {"trainer": {"gpt_fsdp": state, "gpt_ema_fsdp": state}},
        "bitwise VAE": lambda state: {"vae": state},
    }
    for name, (state, build) in made.items():
        folder = root / f"{name}.pth"
        folder.mkdir()
        torch.save(wrapped[name](state), folder / "x.pth")
        yield Target(
            f"{name} .pth", folder, {"x.pth": damage_torch},
            lambda place, build=build: build(read_checkpoint(place / "x.pth")),
        )  # fmt: skip
        folder = root / f"{name}.safetensors"
        folder.mkdir()
        save_file({key: value.contiguous() for key, value in state.items()}, folder / "x.safetensors", {"format": "pt"})
        yield Target(
            f"{name} .safetensors", folder, {"x.safetensors": damage_safetensors},
            lambda place, build=build: build(read_checkpoint(place / "x.safetensors")), 0.5,
        )  # fmt: skip
    for kind in ("model.safetensors", "pytorch_model.bin"):
        state, build = made["Infinity"]
        folder = root / f"shards of {kind}"
        (folder / "in").mkdir(parents=True)
        weight_map, stem = {}, kind.split(".")[0]
        write: Any = save_file if kind.endswith("safetensors") else torch.save
        for number, names in enumerate((list(state)[::2], list(state)[1::2])):
            file = kind.replace(".", f"-{number}.")
            write({name: state[name].clone() for name in names}, folder / "in" / file)
            weight_map |= dict.fromkeys(names, file)
            shutil.copy(folder / "in" / file, folder / f"outside-{file}")  # what `..` would lead to
            shutil.copy(folder / "in" / file, folder / file)
        index = folder / "in" / f"{kind}.index.json"
        index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
        whole: Mutator = damage_safetensors if kind.endswith("safetensors") else damage_torch
        mutators: dict[str, Mutator] = {f"in/{index.name}": _damage_index, f"in/{stem}-0.{kind.split('.')[1]}": whole}
        yield Target(
            f"index of {kind}", folder, mutators, lambda place, build=build: build(read_checkpoint(place / "in"))
        )


def _damage_index(data: bytes, rng: random.Random) -> tuple[str, bytes]:
    """Mostly other names of files: those of folders, of places outside, and what is no name."""
    if rng.random() < 0.4:
        return damage_json(data, rng)
    told = json.loads(data)
    files = sorted(set(told["weight_map"].values()))
    new = rng.choice(("..", ".", "", "../" + files[0], "../outside-" + files[0], "/etc/passwd", "\0", *TEXTS, 3, None))
    old = rng.choice(files)
    told["weight_map"] = {key: new if file == old else file for key, file in told["weight_map"].items()}
    return f"{new!r:.40} for {old}", json.dumps(told).encode()


def _journal(folder: Path, emoji: ClassConditionalModel) -> None:
    """What `compare` and `profile` do with the files of a run that was stopped."""
    results = ResultsFolder(folder, emoji, emoji.sampling, {"seed": 0}, pictures=2)
    rows = []
    for place in range(3):
        row: dict[str, Any] = {
            "policy": "p", "budget": "50%", "batch": 1, "seed": 0, "planned_bytes": 1, "allocated_bytes": 1,
            "timeline_bytes": [[1]], "budget_bytes": 4, "comparison": f"c{place}", "measurement": f"m{place}",
        }  # fmt: skip
        row |= results.memory(f"m{place}", own=True) or {}
        row |= results.times(f"m{place}", 2) or {}
        earlier = results.earlier(f"c{place}")
        if earlier is not None:
            row |= earlier[0]
            assert earlier[1].ndim == 4
        rows.append(row)
    memory_table(rows, "memory")
    latency_table(rows, "time")
    versus(rows)
    results.save(rows)
    results.finish(rows)


def _read_report(folder: Path) -> None:
    merged = merge([folder])
    json.dumps(report_data(merged), allow_nan=False)
    for row in merged.rows:
        plans_of(row)
        pictures_of(row)
    for source in merged.sources:
        scas_of(source)


def _check(folder: Path) -> None:
    verdict = check_results(folder / "results.json", folder / "baseline.json")
    change_lines(verdict, everything=True)
    json.dumps(verdict.to_json(), allow_nan=False)


def make_targets(
    root: Path, canary: Path, emoji: ClassConditionalModel, t5_folder: Path | None, bomb_mib: int = 32
) -> list[Target]:
    """All loaders of files; their whole files are made below `root`. Bombs unpack to so many MiB."""
    (root / "plan").mkdir(parents=True)
    folder = root / "plan"
    _plan().save(folder / "plan.json")
    _capacity_plan().save(folder / "capacities.json")
    mixed = [[h, l] for l in range(GEOMETRY.layers) for h in range(GEOMETRY.heads)]
    (folder / "orders.json").write_text(json.dumps([mixed]))
    (folder / "budgets.json").write_text(json.dumps(_layer_budgets()))
    (folder / "prompts.txt").write_text("a red pizza\n\na star, é\n")
    _statistics().save(folder / "statistics.safetensors")
    own = {name: root / name for name in ("plan.json", "capacities.json", "orders.json", "budgets.json", "prompts.txt")}
    for name, place in {**own, "statistics.safetensors": root / "statistics"}.items():
        place.mkdir()
        shutil.copy(folder / name, place / name)
    targets = [
        Target(
            "plan", own["plan.json"], {"plan.json": damage_json},
            lambda place: _use_plan(load_plan(place / "plan.json", 64)), 2,
        ),
        Target(
            "capacity plan", own["capacities.json"], {"capacities.json": damage_json},
            lambda place: _use_plan(load_plan(place / "capacities.json")), 1.5,
        ),
        Target(
            "plan of a model", own["plan.json"], {"plan.json": damage_json},
            lambda place: open_plan(place / "plan.json", GEOMETRY, "tiny"), 0.5,
        ),
        Target(
            "orders", own["orders.json"], {"orders.json": damage_json},
            lambda place: HeadRankings.load_orders(place / "orders.json", GEOMETRY).ranks,
        ),
        Target(
            "layer budgets", own["budgets.json"], {"budgets.json": damage_json},
            lambda place: LayerBudgets.load(place / "budgets.json", GEOMETRY),
        ),
        Target(
            "prompts", own["prompts.txt"], {"prompts.txt": damage_lines}, lambda place: _prompts(place / "prompts.txt"),
        ),
        Target(
            "statistics", root / "statistics", {"statistics.safetensors": damage_safetensors},
            lambda place: _use_statistics(place / "statistics.safetensors"), 3,
        ),
        *_checkpoints(root, canary, bomb_mib),
    ]  # fmt: skip
    folder = root / "results"
    folder.mkdir()
    _results_folder(folder, emoji)
    (root / "check").mkdir()
    for name in ("results.json", "baseline.json"):
        shutil.copy(folder / "results.json", root / "check" / name)
    (root / "journal").mkdir()
    shutil.copytree(folder / "pictures", root / "journal" / "pictures")
    for name in ("results.partial.json", "results.1.json"):
        shutil.copy(folder / "results.json", root / "journal" / name)
    shutil.copy(folder / "scas.json", root / "journal")
    of_folder: dict[str, Mutator] = {
        "results.json": damage_json, "scas.json": damage_json, "plans/heatkv.json": damage_json,
        "plans/snapkv.json": damage_json, "pictures/heatkv_50percent.png": damage_bytes,
        "report.html": damage_bytes, "report.json": damage_json,
    }  # fmt: skip
    journal: dict[str, Mutator] = {
        "results.partial.json": damage_json, "results.1.json": damage_json, "scas.json": damage_json,
        "pictures/full_100percent.png": damage_bytes,
    }  # fmt: skip
    targets += [
        Target(
            "check", root / "check", {"results.json": damage_json, "baseline.json": damage_json}, _check, 2
        ),
        Target("report folder", folder, of_folder, _read_report, 3),
        Target("report", folder, of_folder, lambda place: write_report([place], place), 0.15, writes=True),
        Target("journal", root / "journal", journal, lambda place: _journal(place, emoji), 2, writes=True),
        Target("replaceable results", folder, of_folder, check_replaceable, 0.5),
    ]  # fmt: skip
    if t5_folder is not None:
        shutil.copytree(t5_folder, root / "t5")
        files: dict[str, Mutator] = {
            "config.json": damage_json, "tokenizer.json": damage_json, "tokenizer_config.json": damage_json,
            "model.safetensors": damage_safetensors,
        }  # fmt: skip
        targets.append(
            Target("text encoder", root / "t5", files, lambda place: T5TextEncoder(place).encode(["a cat"]), 0.15)
        )
    return targets


# -------------------------------------------------------------------------------------------------------- texts


def _use_budget(text: str) -> None:
    budget = Budget.parse(text)
    str(budget)
    if budget.kind != "auto":
        budget.token_heads(GEOMETRY)
        budget.token_heads(GEOMETRY, 2, "int8/float32")


def _use_set(text: str) -> None:
    """Policies made with the option, as a command makes them, and a plan where they can without statistics."""
    for name in registered_policies():
        try:
            options = policy_options([name], Ranking(set=[text]))
        except HeatKVError as error:
            last = error
            continue
        policy = make_policy(name, **options[name])
        policy.check(PlanningProblem(GEOMETRY, Budget.parse("60%"), _OTHER_STATISTICS))
        return
    raise last


def text_targets() -> list[TextTarget]:
    """All texts of a command line that mean numbers."""
    sets = (
        "sink_scales=2",
        "value=error",
        "window=3",
        "joint=2",
        "seed=4",
        "max_kl=0.1",
        "kernel=5",
        "cost=fisher",
        "x=1",
    )
    return [
        TextTarget("budget", ("10%", "0.1", "600MiB", "2GB", "650tokens", "auto", "1e-3"), _use_budget),
        TextTarget("--set", sets, _use_set, 0.6),
        TextTarget("ratio", ("1.5", "3:2"), lambda text: ScaleSchedule.infinity("1M", parse_ratio(text) or 1.0), 0.3),
        TextTarget("tolerance", ("5%", "0.05"), lambda text: _share(text, "kl"), 0.3),
        TextTarget("seeds", ("1,2", "3"), lambda text: whole_numbers(text, "seed"), 0.3),
        TextTarget("names", ("heatkv,random",), lambda text: parse_names(text, "policy"), 0.3),
        TextTarget("file name", ("plan.json",), lambda text: load_plan(text), 0.3),
    ]


_SIGNS = (
    "%",
    "-",
    "+",
    ".",
    "e",
    "E",
    "_",
    ",",
    ":",
    "=",
    " ",
    "\0",
    "\n",
    "\u0661",
    "\u00bd",
    "0x",
    "inf",
    "nan",
    "/",
)


def damage_text(text: str, rng: random.Random) -> str:
    at = rng.randrange(len(text) + 1)
    match rng.randrange(8):
        case 0:
            return rng.choice(TEXTS)
        case 1:
            return str(rng.choice(NUMBERS))
        case 2:
            return text[:at] + str(rng.choice(NUMBERS)) + text[at:]
        case 3:
            return text[:at] + rng.choice(TEXTS) + text[at:]
        case 4:
            return text[:at] + rng.choice(_SIGNS) * rng.choice((1, 1, 2, 50_000)) + text[at:]
        case 5:
            return text[:at] + rng.choice("1 9.a") * 100_000 + rng.choice(("", "!", "%"))
        case 6:
            return ",".join(map(str, range(20_000))) if rng.random() < 0.5 else text + "," + text
        case _:
            name, equals, _ = text.partition("=")
            return name + equals + str(rng.choice((*NUMBERS, *TEXTS)))


# --------------------------------------------------------------------------------------------------------- runs


@dataclass(frozen=True)
class Trial:
    """A mutant that is ready to be loaded. `inside` is the only folder that may be written to."""

    target: str
    told: str
    load: Callable[[], Any]
    inside: Path | None


def prepare(target: Target | TextTarget, seed: int, folder: Path) -> Trial:
    """The mutant of this seed; files of it are made anew in `folder`."""
    rng = random.Random(f"{target.name} {seed}")
    if isinstance(target, TextTarget):
        text = damage_text(rng.choice(target.whole), rng)
        return Trial(target.name, f"{text[:60]!r} ({len(text)} characters)", lambda: target.load(text), None)
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(target.folder, folder)
    name = rng.choice(list(target.mutators))
    path = folder / name
    if rng.random() < 0.04:
        told = misplaced(path, rng)
    else:
        told, data = target.mutators[name](path.read_bytes(), rng)
        path.write_bytes(data)
    return Trial(target.name, f"{name}: {told}", lambda: target.load(folder), folder if target.writes else None)


def whole(target: Target | TextTarget, folder: Path) -> Callable[[], Any]:
    """A load of what is not damaged."""
    if isinstance(target, TextTarget):
        return lambda: [_tolerant(target.load, text) for text in target.whole]
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(target.folder, folder)
    return lambda: target.load(folder)


def _tolerant(load: Callable[[str], Any], text: str) -> None:
    with suppress(HeatKVError):  # a policy that needs what this has not, or a file that is not there
        load(text)


def schedule_of_trials(targets: list[Any], count: int) -> Iterator[tuple[Any, int]]:
    """(target, seed) so often as every target's share says, `count` in all."""
    total = sum(target.share for target in targets)
    made = 0
    for target in targets:
        for seed in range(max(1, round(count * target.share / total))):
            yield target, seed
            made += 1
    for seed in itertools.count(10**6):
        if made >= count:
            return
        yield targets[seed % len(targets)], seed
        made += 1
