"""One rank's heads in the cache and in the models: R shards against one process that runs all of them."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from PIL import Image
from test_selecting_cache import POLICIES
from torch import Tensor

from heatkv.cli import run
from heatkv.compensation import fit_compensation
from heatkv.core.budget import Budget
from heatkv.core.geometry import CacheGeometry
from heatkv.core.plan import CachePlan, Plan
from heatkv.core.schedule import ScaleSchedule
from heatkv.engine.arena_cache import KVCache
from heatkv.engine.token_cache import SelectingCache, open_cache
from heatkv.errors import ModelError, PlanError
from heatkv.generation.loop import Generator
from heatkv.models.bsq import BitwiseVAE, BSQConfig
from heatkv.models.class_conditional import ClassConditionalModel, fingerprint
from heatkv.models.infinity import Infinity, InfinityConfig
from heatkv.models.sampling import BitSamplingSettings, SamplingSettings
from heatkv.models.tensor_parallel import shard_model
from heatkv.models.text_conditional import Prompt, TextConditionalModel
from heatkv.models.var import VAR, VARConfig
from heatkv.models.vqvae import VQVAE, VQVAEConfig
from heatkv.parallel.ranks import Ranks
from heatkv.policies.base import EvictionPolicy, PlanningProblem, make_policy
from heatkv.policies.composition import AdaKV
from heatkv.policies.levels import HeatKVLevels
from heatkv.policies.lp import HeatKVLP
from heatkv.policies.ranked import plan_ranks
from heatkv.policies.windows import Full
from heatkv.ranked_plan import RankedPlan
from heatkv.testing.contract import made_up_statistics

Result = TypeVar("Result")
Model = ClassConditionalModel | TextConditionalModel

HERE = Path(__file__).parent
GEOMETRY = CacheGeometry(3, 4, 8, ScaleSchedule.square((1, 2, 3, 5, 4, 6)))
WIDTH, ROWS = 32, 2


@functools.cache
def ranked_plan(policy: EvictionPolicy, budget: str, ranks: int, geometry: CacheGeometry = GEOMETRY) -> RankedPlan:
    """A plan for ranks whose heads are not in a row."""
    statistics = made_up_statistics(geometry, 3)
    found = plan_ranks(policy, PlanningProblem(geometry, Budget.parse(budget), statistics, model="tiny"), ranks)
    if not found.contiguous:
        return found
    # plans may be of any heads when nobody asks what they are worth
    mixed = np.stack([np.random.default_rng(layer).permutation(geometry.heads) for layer in range(geometry.layers)])
    return dataclasses.replace(found, heads=np.stack(np.split(mixed, ranks, axis=1)))


# ----------------------------------------------------------------------------------------------------- cache


def inputs(seed: int = 0) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Attention inputs (R, N, W), and q, k, v (R, H, N, D), of every scale and layer."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(ROWS, GEOMETRY.heads, n, GEOMETRY.head_dim) for n in GEOMETRY.schedule.tokens for _ in range(3)]
    return [
        (
            torch.randn((ROWS, shape[2], WIDTH), generator=generator),
            *(torch.randn(shape, generator=generator) for _ in range(3)),
        )
        for shape in shapes
    ]


def query_weight(layer: int) -> Tensor:
    return torch.randn((GEOMETRY.heads, GEOMETRY.head_dim, WIDTH), generator=torch.Generator().manual_seed(layer))


def run_cache(
    plan: CachePlan, heads_LH: np.ndarray[Any, Any], storage: str | None = None, attention: str = "auto"
) -> tuple[list[Tensor], KVCache | SelectingCache]:
    """What a cache for these heads gives when it is told their queries, keys and values alone."""
    heads = torch.tensor(heads_LH)
    cache = open_cache(
        plan, ROWS, query_weight=lambda layer: query_weight(layer)[heads[layer]], storage=storage, attention=attention
    )
    outs = []
    for call, (u, q, k, v) in enumerate(inputs()):
        layer = call % GEOMETRY.layers
        if isinstance(cache, SelectingCache) and cache.wants_input:
            cache.see_input(layer, u)
        outs.append(cache.attend(layer, *(x[:, heads[layer]] for x in (q, k, v))))
    return outs, cache


def shards_against_one(ranked: RankedPlan, **how: Any) -> tuple[float, list[KVCache | SelectingCache]]:
    """The largest difference between the outputs of all shards, put in their places, and those of one cache."""
    everything = np.tile(np.arange(GEOMETRY.heads), (GEOMETRY.layers, 1))
    one, whole = run_cache(ranked.whole(), everything, **how)
    together = [torch.full_like(out, torch.nan) for out in one]
    caches = []
    for heads_LH, plan in zip(ranked.heads, ranked.plans, strict=True):
        outs, cache = run_cache(plan, heads_LH, **how)
        for call, out in enumerate(outs):
            together[call][:, torch.tensor(heads_LH[call % GEOMETRY.layers])] = out
        caches.append(cache)
    assert whole.allocated_bytes <= sum(cache.allocated_bytes for cache in caches)
    return max(float((a - b).abs().max()) for a, b in zip(one, together, strict=True)), caches


STATIC = {
    "full": (Full(), "100%"),
    "heatkv": (make_policy("heatkv", sink_scales=2), "30%"),
    "streaming": (make_policy("streaming", sink_scales=2), "40%"),
    "lp": (HeatKVLP(value="error"), "30%"),
    "levels": (HeatKVLevels(), "35%"),
}


@pytest.mark.parametrize("storage", [None, "int8"])
@pytest.mark.parametrize(("name", "ranks"), [*((name, 2) for name in STATIC), ("lp", 4), ("heatkv", 4)])
def test_shards_of_a_static_plan_give_what_one_cache_gives(name: str, ranks: int, storage: str | None) -> None:
    policy, budget = STATIC[name]
    ranked = ranked_plan(policy, budget, ranks)
    assert not ranked.contiguous
    difference, caches = shards_against_one(ranked, storage=storage)
    assert difference < 2e-6
    kept = "int8/float32" if storage else "float32"
    for cache, plan in zip(caches, ranked.plans, strict=True):
        assert cache.allocated_bytes <= plan.budget_bytes(ROWS, kept)


def _static(plan: CachePlan) -> Plan:
    assert isinstance(plan, Plan)
    return plan


APART = ("hack-like", "adakv", "adakv over h2o", "protected, shared")
"""Dynamic policies whose ranks decide something for themselves."""


@pytest.mark.parametrize("name", [name for name in POLICIES if name not in APART])
def test_shards_of_a_dynamic_plan_give_what_one_cache_gives(name: str) -> None:
    difference, _ = shards_against_one(ranked_plan(POLICIES[name], "40%", 2))
    assert difference < 2e-6


def test_heads_that_share_choose_within_their_rank() -> None:
    """Against a cache of one rank's heads that knows nothing of ranks."""
    ranked = ranked_plan(AdaKV(base="snapkv:window=2"), "40%", 2)
    for heads_LH, plan in zip(ranked.heads, ranked.plans, strict=True):
        outs, cache = run_cache(plan, heads_LH)
        assert isinstance(cache, SelectingCache)
        assert cache.allocated_bytes <= plan.budget_bytes(ROWS, "float32")
        alone = AdaKV(base="snapkv:window=2").plan(
            PlanningProblem(plan.geometry, Budget.parse("40%"), made_up_statistics(plan.geometry), model="tiny")
        )
        assert alone == plan
        for one, other in zip(outs, run_cache(alone, heads_LH)[0], strict=True):
            assert torch.equal(one, other)


# ---------------------------------------------------------------------------------------------------- models


@dataclass
class Room:
    """Where the threads of one process meet."""

    size: int
    parts: list[Tensor | None] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.parts = [None] * self.size
        self.barrier = threading.Barrier(self.size, timeout=120)


def one_of(size: int, rank: int = 0) -> Ranks:
    """A rank that the others need not answer."""
    team = Ranks()
    team.rank, team.size = rank, size
    return team


class ThreadRanks(Ranks):
    """Ranks that are threads."""

    def __init__(self, rank: int, room: Room) -> None:
        super().__init__()
        self.rank, self.size, self.room = rank, room.size, room

    def _parts(self, mine: Tensor) -> list[Tensor]:
        self.room.parts[self.rank] = mine.clone()
        self.room.barrier.wait()
        found = [part for part in self.room.parts if part is not None]
        self.room.barrier.wait()
        return found

    def sum(self, part: Tensor) -> Tensor:
        return part.copy_(torch.stack(self._parts(part)).sum(dim=0))

    def take_first(self, value: Tensor) -> None:
        value.copy_(self._parts(value)[0])


def on_threads(size: int, task: Callable[[Ranks], Result]) -> list[Result]:
    """What the task gives on every rank."""
    room, results, errors = Room(size), dict[int, Result](), list[BaseException]()

    def work(rank: int) -> None:
        try:
            results[rank] = task(ThreadRanks(rank, room))
        except BaseException as error:
            errors.append(error)
            room.barrier.abort()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return [results[rank] for rank in range(size)]


def tiny_infinity(heads: int = 4, hidden: int = 250) -> TextConditionalModel:
    """Random weights with something in every bias, and prompts to draw."""
    torch.manual_seed(5)
    config = InfinityConfig(
        depth=3, width=16 * heads, heads=heads, bits=8, mlp_hidden=hidden, pool_heads=2, text_channels=24,
        text_positions=20,
    )  # fmt: skip
    transformer = _filled(Infinity(config))
    with torch.no_grad():
        transformer.head.weight.mul_(4)  # logits that spread as a trained model's do
    vae = BitwiseVAE(BSQConfig(8, 32, (1, 1)), encoder=False).eval().requires_grad_(False)
    prompts = tuple(Prompt(torch.randn(length, 24)) for length in (5, 9))
    schedule = ScaleSchedule.of([(1, 1), (2, 2), (3, 2), (6, 4)])
    return TextConditionalModel(
        "tiny", transformer, vae, schedule, BitSamplingSettings(), fingerprint(transformer), examples=prompts
    )


def tiny_var(l2_norm: bool, shared: bool) -> ClassConditionalModel:
    torch.manual_seed(6)
    sides = (1, 2, 3, 4)
    transformer = _filled(VAR(VARConfig(sides, 3, 48, 6, 7, 32, 8, 2.0, shared, l2_norm)))
    vqvae = VQVAE(VQVAEConfig(sides, 32, 8, 32, (1, 1)), encoder=False).eval().requires_grad_(False)
    return ClassConditionalModel("tiny", transformer, vqvae, SamplingSettings(), fingerprint(transformer))


AnyModule = TypeVar("AnyModule", bound=torch.nn.Module)


def _filled(module: AnyModule) -> AnyModule:
    """Biases and temperatures are not left at what they are made with, where a mistake would not show."""
    for name, parameter in module.eval().requires_grad_(False).named_parameters():
        if name.endswith("bias") or "scale_mul" in name:
            parameter.add_(0.3 * torch.randn_like(parameter))
    return module


def draw(model: Model, plan: CachePlan) -> list[Tensor]:
    """Guided logits of every scale of two images that are drawn freely, and the codes that were chosen."""
    seen: list[Tensor] = []
    generator: Generator[Any] = Generator(model, plan, 2)  # type: ignore[arg-type]
    drawn = generator.draw(model.labels(2), seed=1, observe=lambda _, logits: seen.append(logits), decode=False)
    return [*seen, *drawn.tokens]


def parts_of(model: Model, ranked: RankedPlan) -> list[list[Tensor]]:
    return on_threads(
        ranked.ranks,
        lambda ranks: draw(
            shard_model(copy.deepcopy(model), ranks, ranked.heads[ranks.rank]), ranked.plans[ranks.rank]
        ),
    )


def check_alike(one: list[Tensor], other: list[Tensor], tolerance: float) -> None:
    for mine, theirs in zip(one, other, strict=True):
        if mine.is_floating_point():
            torch.testing.assert_close(mine, theirs, rtol=0, atol=tolerance)
        else:
            assert torch.equal(mine, theirs)


MODELS: dict[str, Callable[[], Model]] = {
    "infinity": tiny_infinity,
    "var": lambda: tiny_var(l2_norm=True, shared=False),
    "var without norm, shared AdaLN": lambda: tiny_var(l2_norm=False, shared=True),
}


@pytest.mark.parametrize("ranks", [2, "all"])
@pytest.mark.parametrize("name", MODELS)
def test_parts_of_a_model_draw_what_the_whole_draws(name: str, ranks: Any) -> None:
    model = MODELS[name]()
    size = model.geometry.heads if ranks == "all" else ranks
    ranked = ranked_plan(HeatKVLP(value="error"), "50%", size, model.geometry)
    wanted = draw(model, ranked.whole())
    full = draw(model, model.full_plan())
    assert not torch.equal(wanted[3], full[3])  # the plan takes part
    for found in parts_of(model, ranked):
        check_alike(found, wanted, 2e-4)


@pytest.mark.parametrize("policy", ["scalekv", "h2o"])
def test_dynamic_policies_run_on_parts(policy: str) -> None:
    """ScaleKV also reads the attention's input and W_q of its heads."""
    model = tiny_infinity()
    ranked = ranked_plan(POLICIES[policy], "60%", 2, model.geometry)
    wanted = draw(model, ranked.whole())
    for found in parts_of(model, ranked):
        check_alike(found, wanted, 2e-4)


def test_a_part_takes_a_part_of_the_memory() -> None:
    model = tiny_infinity(hidden=256)
    blocks = [name for name, _ in model.transformer.named_parameters() if name.startswith("blocks")]
    split = [n for n in blocks if any(part in n for part in ("mat_", "proj.weight", "fc1", "fc2.weight"))]
    before = {name: model.transformer.get_parameter(name).numel() for name in blocks}
    part = shard_model(model, one_of(4, 1))
    after = {name: part.transformer.get_parameter(name) for name in blocks}
    for name in split:
        assert after[name].numel() * 4 == before[name], name
        assert after[name].untyped_storage().nbytes() == after[name].numel() * 4  # no view of the whole
    assert part.geometry == dataclasses.replace(tiny_infinity(hidden=256).geometry, heads=1)
    assert part.fingerprint == tiny_infinity(hidden=256).fingerprint


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parts_of_half_precision_stay_within_its_rounding(dtype: torch.dtype) -> None:
    model = tiny_infinity()
    exact = draw(model, model.full_plan())[0]
    model.transformer.set_compute_dtype(dtype)
    ranked = ranked_plan(Full(), "100%", 2, model.geometry)
    whole = draw(model, ranked.whole())[0]
    (found, same) = (logits[0] for logits in parts_of(model, ranked))
    assert torch.equal(found, same)
    assert (found - exact).abs().max() < 3 * (whole - exact).abs().max()


def test_all_ranks_take_what_the_first_one_chose() -> None:
    """Though another's logits are far off."""
    model = tiny_infinity()
    ranked = ranked_plan(Full(), "100%", 2, model.geometry)

    def task(ranks: Ranks) -> list[Tensor]:
        part = shard_model(copy.deepcopy(model), ranks, ranked.heads[ranks.rank])
        if ranks.rank == 1:
            part.transformer.head.bias.copy_(torch.randn_like(part.transformer.head.bias) * 30)
        return draw(part, ranked.plans[ranks.rank])

    first, second = on_threads(2, task)
    assert not torch.allclose(first[0], second[0])
    check_alike(first[4:], second[4:], 0)


def test_corrections_are_fitted_on_the_heads_of_a_part() -> None:
    policy = HeatKVLevels(compensation="constant", levels="full+mean")
    small = tiny_infinity()
    ranked = ranked_plan(policy, "50%", 2, small.geometry)
    whole = fit_compensation(small, _static(ranked.whole()), "constant", 2)
    found = on_threads(
        2,
        lambda ranks: fit_compensation(
            shard_model(copy.deepcopy(small), ranks, ranked.heads[ranks.rank]),  # type: ignore[arg-type]
            _static(ranked.plans[ranks.rank]),
            "constant",
            2,
        ),
    )
    count = 0
    for heads_LH, fitted in zip(ranked.heads, found, strict=True):
        for (target, layer), correction in fitted.corrections.items():
            of_whole = whole.corrections[target, layer]
            for head, weight in zip(correction.heads.tolist(), correction.weight_HFD, strict=True):
                place = of_whole.heads.tolist().index(int(heads_LH[layer, head]))
                torch.testing.assert_close(weight, of_whole.weight_HFD[place], rtol=0, atol=1e-4)
                count += 1
    assert count == sum(len(correction.heads) for correction in whole.corrections.values()) > 0


@pytest.mark.parametrize(
    ("heads", "says"),
    [
        ([[0, 1]] * 2, r"shape \(2, 2\); one of 2 ranks has whole numbers, \(3, 2\)"),
        ([[0.0, 1.0]] * 3, "heads is float64"),
        ([[0, 1], [2, 2], [0, 1]], r"heads of layer 1 are \[2, 2\]"),
        ([[0, 1], [2, 3], [0, 4]], r"heads of layer 2 are \[0, 4\]"),
    ],
)
def test_heads_that_a_model_does_not_have_are_refused(heads: Any, says: str) -> None:
    with pytest.raises(ModelError, match=says):
        shard_model(tiny_infinity(), one_of(2, 0), np.array(heads))


def test_what_is_no_whole_model_is_refused() -> None:
    with pytest.raises(PlanError, match=r"4 heads cannot be split evenly over 3 ranks; take one of 1, 2, 4"):
        shard_model(tiny_infinity(), one_of(3, 0))
    part = shard_model(tiny_infinity(), one_of(2, 0))
    with pytest.raises(ModelError, match="is one rank's part already"):
        shard_model(part, one_of(2, 0))
    with pytest.raises(ModelError, match=r"load one with heatkv\.load_model"):
        shard_model(part.transformer, one_of(2, 0))  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="the plan is for 3 layers x 4 heads, the model has 3 x 2"):
        draw(part, tiny_infinity().full_plan())


# ----------------------------------------------------------------------------------------------- command line


def solve_emoji(path: Path, *more: str) -> None:
    assert run(["solve", "--policy", "streaming", "--budget", "30%", "--ranks", "2", *more, "--out", str(path)]) == 0


def test_solve_tells_every_rank(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    solve_emoji(tmp_path / "plan.json", "--json")
    told = json.loads(capsys.readouterr().out)
    ranked = RankedPlan.load(tmp_path / "plan.json")
    assert [rank["peak_token_heads"] for rank in told["of_ranks"]] == [plan.peak_token_heads for plan in ranked.plans]
    assert (told["ranks"], told["heads_per_rank"], told["value"]) == (2, 3, None)
    assert told["of_ranks"][1]["planned_bytes"] == ranked.plans[1].bytes(2, "bfloat16")
    solve_emoji(tmp_path / "plan.json", "--split", "contiguous")  # may replace a plan
    said = capsys.readouterr().out
    assert "3 of 6 of every layer on each rank, contiguous" in said
    assert RankedPlan.load(tmp_path / "plan.json").contiguous


def test_one_process_takes_what_all_ranks_hold(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    solve_emoji(tmp_path / "ranked.json")
    RankedPlan.load(tmp_path / "ranked.json").whole().save(tmp_path / "whole.json")
    capsys.readouterr()
    for name in ("ranked", "whole"):
        drawn = ["--plan", str(tmp_path / f"{name}.json"), "--label", "pizza", "--out", str(tmp_path / name)]
        assert run(["generate", *drawn]) == 0
        assert ("is for 2 ranks; taken as the plan of one process" in capsys.readouterr().err) == (name == "ranked")
    assert (tmp_path / "ranked/0000_pizza.png").read_bytes() == (tmp_path / "whole/0000_pizza.png").read_bytes()
    told = []
    for name in ("ranked", "whole"):
        assert run(["explain", str(tmp_path / f"{name}.json"), "--json"]) == 0
        told.append(json.loads(capsys.readouterr().out))
    assert told[0] == told[1]
    assert run(["solve", "--plan", str(tmp_path / "ranked.json"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["peak_token_heads"] == told[1]["peak_token_heads"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--budget", "30%", "--ranks", "4"], "6 heads cannot be split evenly over 4 ranks; take one of 1, 2, 3, 6"),
        (["--budget", "30%", "--ranks", "2", "--split", "even"], "--split is 'even'"),
        (["--budget", "30%", "--split", "contiguous"], "--split is 'contiguous'; it goes with --ranks"),
        (["--plan", "plan.json", "--ranks", "2"], "--plan is a finished plan; leave --ranks out"),
        (["--budget", "1%", "--ranks", "2"], "sink scales"),
    ],
)
def test_what_solve_refuses(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["solve", "--policy", "streaming", *arguments]) == 2
    assert says in " ".join(capsys.readouterr().err.split())


def test_a_plan_that_only_ranks_can_run_is_told_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = ["solve", "--policy", "adakv", "--budget", "30%", "--ranks", "2", "--out", str(tmp_path / "plan.json")]
    assert run(made) == 0
    for command in (["generate", "--label", "0", "--out", str(tmp_path / "out"), "--plan"], ["explain"]):
        assert run([*command, str(tmp_path / "plan.json")]) == 2
        assert "run it on 2 ranks (torchrun --nproc-per-node 2 -m heatkv generate)" in " ".join(
            capsys.readouterr().err.split()
        )


@pytest.mark.parametrize(
    ("ranks", "arguments", "says"),
    [
        (3, ["--plan", "ranked.json"], "ranked.json is for 2 ranks, and 3 processes were started; solve one for 3"),
        (2, ["--plan", "plain.json"], "plain.json is for 1 rank, and 2 processes were started"),
        (2, ["--policy", "full"], "2 processes draw together with --plan and a plan for as many ranks"),
        (2, ["--plan", "ranked.json", "--graphs"], "without --graphs"),
    ],
)
def test_processes_that_do_not_fit_the_plan_are_told(
    ranks: int,
    arguments: list[str],
    says: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    solve_emoji(Path("ranked.json"))
    assert run(["solve", "--policy", "streaming", "--budget", "30%", "--out", "plain.json"]) == 0

    team = one_of(ranks)
    monkeypatch.setattr("heatkv.parallel.ranks._current", team)
    monkeypatch.setattr("heatkv.cli.join", lambda tell: team)
    capsys.readouterr()
    assert run(["generate", *arguments, "--label", "0", "--out", "out"]) == 2
    assert says in " ".join(capsys.readouterr().err.split())
    assert not Path("out").exists()


@pytest.mark.slow
def test_two_processes_draw_the_pictures_of_one(tmp_path: Path, emoji: ClassConditionalModel) -> None:
    """torchrun and gloo, from the command line on the embedded model, and in Python on a random Infinity."""
    statistics = made_up_statistics(emoji.geometry)
    asked = PlanningProblem(emoji.geometry, Budget.parse("20%"), statistics, model="emoji")
    plan_ranks(HeatKVLP(value="error"), asked, 2).save(tmp_path / "emoji.json")
    infinity = tiny_infinity()
    ranked = ranked_plan(HeatKVLP(value="error"), "50%", 2, infinity.geometry)
    ranked.save(tmp_path / "infinity.json")
    paths = os.pathsep.join([str(HERE.parent), str(HERE), os.environ.get("PYTHONPATH", "")])
    pictures = ["--plan", str(tmp_path / "emoji.json"), "--label", "pizza", "--label", "star"]

    def launch(*what: str) -> str:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *what]
        environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
        ran = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr
        return " ".join(ran.stderr.split())

    told = launch("-m", "heatkv", "generate", *pictures, "--out", str(tmp_path / "together"))
    assert told.count("written: 2 images") == 1
    assert "on each of 2 ranks" in told
    launch(str(HERE / "tensor_parallel_worker.py"), str(tmp_path))
    assert run(["generate", *pictures, "--out", str(tmp_path / "alone")]) == 0
    for name in ("0000_pizza.png", "0001_star.png"):
        one, two = (np.asarray(Image.open(tmp_path / where / name), dtype=int) for where in ("alone", "together"))
        assert np.abs(one - two).max() <= 1
    wanted = draw(infinity, ranked.whole())
    for rank in range(2):
        check_alike(torch.load(tmp_path / f"rank{rank}.pt", weights_only=True), wanted, 2e-4)
