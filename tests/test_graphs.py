"""Drawing with graphs: replayed steps draw what eager ones draw, at fixed addresses, and never wait for the device."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.public_sampler import PublicSampler
from support.tape import AddressRunner, TapeRunner, WatchedRunner
from support.tiny_models import SHORT_SCHEDULE, features, small_classes, small_prompts
from torch import Tensor

from heatkv.calibration.run import calibrate
from heatkv.core.capacity_plan import CapacityPlan
from heatkv.core.plan import CachePlan, Plan
from heatkv.core.statistics import Statistics
from heatkv.errors import GraphError, ModelError, NumericsError, PolicyError
from heatkv.generation.batches import generate
from heatkv.generation.graphs import CUDAGraphRunner, EagerRunner, GraphRunner, Step
from heatkv.generation.loop import Drawn, Generator
from heatkv.models import base, class_conditional, text_conditional
from heatkv.models.base import ImageModel
from heatkv.models.catalogue import load_model
from heatkv.models.class_conditional import ClassConditionalModel
from heatkv.models.sampling import (
    CommonRandomSampler,
    RecordedTokens,
    SamplingSettings,
    Settings,
)
from heatkv.models.text_conditional import Prompt
from heatkv.models.var import VAR
from heatkv.policies.base import make_policy
from heatkv.policies.dynamic import Candidates
from heatkv.policies.windows import SlidingWindowTokens
from heatkv.profiling.measure.ledger import TensorLedger
from heatkv.profiling.measure.runner import graph_latency
from heatkv.registry import registered_policies
from heatkv.testing.material import made_up_problem

OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "adakv over hack-like": ("adakv", {"base": "hack-like"}),
    "protected, carrying": ("protected", {"base": "h2o", "scales": "1"}),
    "heatkv, two sinks": ("heatkv", {"sink_scales": 2}),
}
KINDS = ("full", "heatkv-mr", "snapkv", "adakv", "scalekv", "hack-like", *OTHERS)
"""One policy of every kind: static, with coarser levels, dynamic, with shared heads, wanting inputs, carrying."""


def first_layers(model: ClassConditionalModel, count: int) -> ClassConditionalModel:
    """The embedded model with its first layers only, which draws as much as these tests need."""
    transformer = VAR(dataclasses.replace(model.transformer.config, depth=count)).eval().requires_grad_(False)
    kept = transformer.state_dict().keys()
    transformer.load_state_dict({name: x for name, x in model.transformer.state_dict().items() if name in kept})
    return dataclasses.replace(model, transformer=transformer)


@pytest.fixture(scope="module")
def short(emoji: ClassConditionalModel) -> ClassConditionalModel:
    return first_layers(emoji, 2)


@pytest.fixture(scope="module")
def measured(short: ClassConditionalModel) -> Statistics:
    return calibrate(short, 2, levels="error", level_samples=2)


@pytest.fixture(scope="module")
def tiny() -> ClassConditionalModel:
    return small_classes()


def plan_of(
    name: str,
    model: ImageModel[Any],
    statistics: Statistics | None = None,
    budget: str = "50%",
    storage: str = "float32",
) -> CachePlan:
    """With made-up statistics when none are given."""
    policy_name, options = OTHERS.get(name, (name, {}))
    policy = make_policy(policy_name, **options)
    more: dict[str, Any] = {"storage": storage} | ({} if statistics is None else {"statistics": statistics})
    return policy.plan(made_up_problem(policy, model.geometry, "100%" if name == "full" else budget, **more))


PROMPTS = (
    [Prompt(features(4)), Prompt(features(9), features(15))],
    [Prompt(features(20)), Prompt(features(1), features(2))],
    [Prompt(features(7)), Prompt(features(7, seed=1))],
)


class Fixed(EagerRunner):
    """Calls every step, with all tensors where they would be for graphs."""

    replays = True


def same(one: Drawn, other: Drawn) -> bool:
    assert one.images is not None
    assert other.images is not None
    tokens = all(torch.equal(a, b) for a, b in zip(one.tokens, other.tokens, strict=True))
    return tokens and torch.equal(one.images, other.images)


def check_replays(generator: Generator[Any], reference: Generator[Any], batches: Sequence[Sequence[Any]]) -> None:
    """Batches but the first, which warms up, are drawn as by the reference; the second is recorded."""
    generator.draw(batches[0], seed=0)
    for seed, labels in enumerate(batches[1:], 1):
        first = seed * len(labels)
        samples = range(first, first + len(labels))
        assert same(generator.draw(labels, seed, samples), reference.draw(labels, seed, samples)), seed
    assert isinstance(generator.runner, GraphRunner)
    assert generator.runner.graphs == len(generator.model.geometry.schedule)


def check_policy(model: ImageModel[Any], plan: CachePlan, batches: Sequence[Sequence[Any]]) -> None:
    size = len(batches[0])
    made = Generator(model, plan, size, runner=TapeRunner())
    check_replays(made, Generator(model, plan, size, runner=Fixed()), batches)


def test_generators_that_share_a_runner(tiny: ClassConditionalModel) -> None:
    """Each draws its own pictures, whoever was recorded before."""
    runner, plans = TapeRunner(), [tiny.plan(), tiny.plan("streaming", "70%", sink_scales=1)]
    sharing = [Generator(tiny, plan, 2, runner=runner) for plan in plans]
    alone = [Generator(tiny, plan, 2, runner=Fixed()) for plan in plans]
    for seed, turn in enumerate((0, 0, 0, 1, 0, 1, 1, 1, 0)):
        drawn, wanted = (made[turn].draw([1, 3], seed) for made in (sharing, alone))
        assert same(drawn, wanted), seed


# ------------------------------------------------------------------------------------------ as eager ones


BATCHES = [[3, 4], [9, 1], [5, 0]]


@pytest.mark.parametrize("name", [*registered_policies(), *OTHERS])
def test_replayed_steps_of_every_policy(short: ClassConditionalModel, measured: Statistics, name: str) -> None:
    plan = plan_of(name, short, measured, "20%")
    assert plan.had_no_effect() == (name == "full")
    check_replays(Generator(short, plan, 1, runner=TapeRunner()), Generator(short, plan, 1), [[3], [9], [50]])


@pytest.mark.parametrize(
    ("name", "dtype", "code"),
    [
        *((name, "float32", "int8") for name in KINDS), ("full", "float32", "fp8"), ("adakv", "float32", "fp8"),
        *((name, "bfloat16", None) for name in ("heatkv-mr", "snapkv", "adakv")),
    ],
)  # fmt: skip
def test_replayed_steps_of_other_storage(name: str, dtype: str, code: str | None) -> None:
    model = small_classes()
    model.transformer.set_compute_dtype(getattr(torch, dtype))
    plan = plan_of(name, model, storage=dtype if code is None else f"{code}/{dtype}")
    replayed, eager = (Generator(model, plan, 2, runner=run, code=code) for run in (TapeRunner(), EagerRunner()))
    check_replays(replayed, eager, BATCHES)


def test_replayed_steps_of_heads_of_different_sizes(tiny: ClassConditionalModel) -> None:
    plan = plan_of("scalekv", tiny)
    assert isinstance(plan, CapacityPlan)
    capacity = plan.capacity.copy()
    capacity[:, 1::2, 2:] -= 1
    check_policy(tiny, dataclasses.replace(plan, capacity=capacity), BATCHES)


def test_replayed_steps_without_guidance(tiny: ClassConditionalModel) -> None:
    settings = SamplingSettings(cfg=0, top_k=20, top_p=0.9)
    replayed, eager = (Generator(tiny, tiny.plan(), 2, settings, runner=run) for run in (TapeRunner(), EagerRunner()))
    check_replays(replayed, eager, BATCHES)


# ------------------------------------------------------------------------------------------------- prompts


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("full", torch.float32), ("heatkv-mr", torch.float32), ("scalekv", torch.float32), ("adakv", torch.bfloat16),
    ],
)  # fmt: skip
def test_prompts_of_any_length_share_graphs(name: str, dtype: torch.dtype) -> None:
    model = small_prompts()
    model.transformer.set_compute_dtype(dtype)
    plan = plan_of(name, model)
    check_policy(model, plan, PROMPTS)
    # and padding changes nothing but rounding
    padded, plain = (Generator(model, plan, 2, runner=runner) for runner in (TapeRunner(), EagerRunner()))
    logits: dict[str, list[Tensor]] = {"padded": [], "plain": []}
    for prompts in PROMPTS:
        tokens = plain.draw(prompts, decode=False).tokens
        for key, generator in (("padded", padded), ("plain", plain)):
            generator.draw(
                prompts,
                sampler=RecordedTokens(tokens),
                observe=lambda _, x, key=key: logits[key].append(x),  # type: ignore[misc]
                decode=False,
            )
    for a, b in zip(logits["padded"], logits["plain"], strict=True):
        limit = 1e-4 if dtype == torch.float32 else 0.1 * float(b.std())
        torch.testing.assert_close(a, b, rtol=0, atol=limit)


def test_longer_and_refused_prompts() -> None:
    """A longer prompt is recorded anew; one that cannot be drawn changes nothing."""
    model, runner = small_prompts(), TapeRunner()
    generator, reference = (Generator(model, model.plan(), 1, runner=r) for r in (runner, Fixed()))
    short, longer = Prompt(features(5)), Prompt(features(70), features(3))
    recorded = []
    for seed, prompt in enumerate([short, short, longer, longer, short, longer]):
        assert same(generator.draw([prompt], seed), reference.draw([prompt], seed))
        recorded.append(runner.graphs)
    assert recorded == [0, 4, 0, 4, 4, 4]
    with pytest.raises(ModelError, match="no unconditional half"):
        generator.draw([Prompt(features(21))])
    assert same(generator.draw([short]), reference.draw([short]))
    assert runner.graphs == 4


def test_one_rotation_table_per_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    made, original = [], text_conditional.rotation_table
    monkeypatch.setattr(text_conditional, "rotation_table", lambda *given: made.append(given[1]) or original(*given))
    model = small_prompts()
    for _ in range(2):
        Generator(model, model.plan(), 1).draw([Prompt(features(5))])
    assert made == list(range(len(SHORT_SCHEDULE)))


# --------------------------------------------------------------------------------- samplers and observers


def test_observers_and_other_samplers(tiny: ClassConditionalModel) -> None:
    """In any order: every way of drawing has graphs of its own."""
    plan = plan_of("snapkv", tiny)
    runner = TapeRunner()
    generators = [Generator(tiny, plan, 2, runner=r) for r in (runner, EagerRunner())]
    forced = generators[1].draw([7, 8], decode=False).tokens
    ways: dict[str, Callable[[], dict[str, Any]]] = {
        "plain": dict,
        "forced": lambda: {"sampler": RecordedTokens(forced)},
        "public": lambda: {"sampler": PublicSampler(torch.Generator().manual_seed(5), tiny.sampling)},
    }
    scales = len(tiny.geometry.schedule)
    order = "plain+ public+ plain plain+ forced+ public plain+ plain forced plain public+".split()
    for i, (way, watch) in enumerate((way.rstrip("+"), way.endswith("+")) for way in order):
        seen: list[list[Tensor]] = [[], []]
        drawn = []
        for generator, logits in zip(generators, seen, strict=True):
            keep: Any = {"observe": lambda _, x, logits=logits: logits.append(x)} if watch else {}
            drawn.append(generator.draw([i, 2 * i], i, **ways[way](), **keep))
        assert same(*drawn), (i, way)
        assert [len(logits) for logits in seen] == [scales * watch] * 2
        assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))
    assert runner.graphs == 4 * scales  # plain, plain and observed, and two steps a scale for the others


class Likeliest:
    """A sampler in two parts, of which one does nothing."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def noise(self, scale: int, noise_BNV: Tensor, first: int = 0) -> None:
        pass

    def pick(self, logits_BNV: Tensor, noise_BNV: Tensor) -> Tensor:
        return logits_BNV.argmax(dim=-1)

    def choose(self, scale: int, logits_BNV: Tensor) -> Tensor:
        return self.pick(logits_BNV, logits_BNV)


def test_graphs_of_samplers_of_several_kinds_and_settings(tiny: ClassConditionalModel) -> None:
    generators = [Generator(tiny, tiny.plan(), 1, runner=r) for r in (TapeRunner(), EagerRunner())]
    narrow, wide = (dataclasses.replace(tiny.sampling, top_k=top_k) for top_k in (2, 0))
    samplers = [CommonRandomSampler(1, [0], narrow), CommonRandomSampler(1, [0], wide), Likeliest(wide)]
    drawn = [[g.draw([3], sampler=samplers[i]) for g in generators] for i in (0, 0, 1, 2, 0, 1, 1, 2, 2, 0)]
    assert all(same(*pair) for pair in drawn)
    assert not any(same(drawn[i][1], drawn[j][1]) for i, j in ((0, 2), (0, 3), (2, 3)))


def test_results_are_not_overwritten(tiny: ClassConditionalModel) -> None:
    generator = Generator(tiny, tiny.plan(), 1, runner=TapeRunner())
    logits: list[Tensor] = []
    drawn = [generator.draw([3], seed, observe=lambda _, x: logits.append(x)) for seed in range(3)]
    results = [*logits, *(x for one in drawn for x in one.tokens)]
    copies = [x.clone() for x in results]
    assert not same(drawn[1], drawn[2])
    generator.draw([5], 9, observe=lambda *_: None)
    assert all(torch.equal(a, b) for a, b in zip(results, copies, strict=True))


def test_refused_sampler(tiny: ClassConditionalModel) -> None:
    with pytest.raises(ModelError, match=r"chose \(1, 3\) codes at scale 1; \(images, choices\) are \(1, 4\)"):
        Generator(tiny, tiny.plan(), 1).draw([3], sampler=RecordedTokens([torch.zeros(1, 1), torch.zeros(1, 3)]))


@pytest.mark.parametrize("image", [0, 1, 2])
def test_images_after_one_that_was_broken_off(tiny: ClassConditionalModel, image: int) -> None:
    runner = TapeRunner()
    generator, plain = (Generator(tiny, tiny.plan(), 1, runner=r) for r in (runner, EagerRunner()))

    def stop(scale: int, _: Tensor) -> None:
        if scale == 3:
            raise KeyboardInterrupt

    for seed in range(image):
        generator.draw([1], seed, observe=lambda *_: None)
    with pytest.raises(KeyboardInterrupt):
        generator.draw([1], 5, observe=stop)
    assert runner.graphs == 0
    for seed in range(3):
        assert same(generator.draw([4], seed, observe=lambda *_: None), plain.draw([4], seed))
    assert runner.graphs == len(tiny.geometry.schedule)


# --------------------------------------------------------------------------- addresses, memory, waiting


@pytest.mark.parametrize("name", KINDS)
def test_addresses_of_every_image(tiny: ClassConditionalModel, name: str) -> None:
    runner = AddressRunner()
    generator = Generator(tiny, plan_of(name, tiny), 1, runner=runner)
    for seed, label in enumerate([3, 9, 50]):
        generator.draw([label], seed, decode=False)
        held = [torch.empty(1000) for _ in range(50)]  # so that what is made anew would lie elsewhere
        assert held
    assert len(runner.addresses) == len(tiny.geometry.schedule)
    arena = generator.cache.store.arena_2RPD.data_ptr()
    for second, third in runner.addresses.values():
        assert second == third
        assert arena in second


@pytest.mark.parametrize("model", ["classes", "prompts"])
@pytest.mark.parametrize("graphs", [False, True])
def test_memory_from_image_to_image(tiny: ClassConditionalModel, model: str, graphs: bool) -> None:
    drawn: ImageModel[Any] = tiny if model == "classes" else small_prompts()
    batches: Sequence[Any] = [[3, 1], [9, 2], [5, 50]] if model == "classes" else PROMPTS
    for name in ("snapkv", "heatkv-mr"):
        generator = Generator(drawn, plan_of(name, drawn), 2, runner=Fixed() if graphs else None)
        alive = []
        with TensorLedger() as ledger:
            for labels in (*batches, batches[0]):
                generator.draw(labels, observe=lambda *_: None)
                alive.append(ledger.live)
        assert alive[1:] == alive[:1] * (len(alive) - 1)
        assert alive[0] > 0  # buffers


@pytest.mark.parametrize("family", ["classes", "prompts"])
@pytest.mark.parametrize("name", KINDS)
def test_steps_that_never_touch_the_host(family: str, name: str) -> None:
    """Where tensors have no numbers, none can be looked at, and what comes from the host is of another device."""
    model: ImageModel[Any] = on_meta(small_classes() if family == "classes" else small_prompts())
    plan = plan_of(name, model)
    if name == "heatkv-mr":
        assert isinstance(plan, Plan)
        assert plan.coarse
    labels = [0] if family == "classes" else [Prompt(features(5))]
    runner = WatchedRunner("meta")
    ways: list[dict[str, Any]] = [{}]
    generator = Generator(model, plan, 1, runner=runner)
    if name == "full":
        ways += [{"observe": lambda *_: None}, {"sampler": RecordedTokens(generator._buffers.tokens)}]
    for way in ways:
        for _ in range(2):
            generator.draw(labels, decode=False, **way)
    assert {key.part for key in runner.watched} == ({"all", "logits", "accept"} if name == "full" else {"all"})
    assert all(count > 0 for count in runner.watched.values())
    assert sum(runner.watched.values()) > 500


def on_meta(model: Any) -> Any:
    """The model with shapes alone."""
    for part in ("transformer", "vqvae", "vae"):
        if hasattr(model, part):
            getattr(model, part).to("meta")
    return model


# --------------------------------------------------------------------------- what the checks above would find


def in_steps(step: Callable[[Tensor], Any]) -> Step:
    state = torch.zeros(4)
    return lambda: state.copy_(torch.as_tensor(step(state))) and None


@pytest.mark.parametrize(
    ("step", "said"),
    [
        (lambda x: x.sum().item(), "makes the host wait"),
        (lambda x: x if x.sum() > 0 else -x, "makes the host wait"),
        (lambda x: float(x[0]) * x, "makes the host wait"),
        (lambda x: x[x >= 0], "makes the host wait"),
        (lambda x: x.nonzero()[:, 0], "makes the host wait"),
        (lambda x: x.masked_select(x >= 0), "makes the host wait"),
        (lambda x: x.unique().expand(4), "makes the host wait"),
        (lambda x: torch.tensor([1.0, 2, 3, 4]) + x, "made of the host's numbers"),
        (lambda x: x + torch.rand(4), "draws by itself"),
        (lambda x: x.to("meta").to("meta"), "touches a tensor on meta"),
    ],
)
def test_refused_steps(step: Callable[[Tensor], Any], said: str) -> None:
    runner = TapeRunner()
    runner.run("it", lambda: None)
    with pytest.raises(GraphError, match=f"^it cannot be recorded as a graph: AssertionError: .*{said}"):
        runner.run("it", in_steps(step))


@dataclass(frozen=True)
class ByTheClock(SlidingWindowTokens):
    """Scores differ with how often the policy was asked."""

    def score(self, seen: Candidates) -> Tensor:
        counted = self.__dict__.setdefault("counted", [0])
        counted[0] += 1
        return super().score(seen) * math.cos(counted[0])


def check_fails(model: ImageModel[Any], plan: CachePlan) -> None:
    with pytest.raises((AssertionError, GraphError, NumericsError)):  # of destroyed memory, the last
        check_policy(model, plan, [[3], [9], [50]])


def test_counting_policy_on_a_tape(tiny: ClassConditionalModel, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = tiny.plan("sliding-window-tokens", "20%")
    check_policy(tiny, plan, [[3], [9], [50]])
    monkeypatch.setattr("heatkv.engine.open_cache.policy_of", lambda plan: ByTheClock())
    check_fails(tiny, plan)


def test_host_numbers_of_a_policy_on_a_tape(tiny: ClassConditionalModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "heatkv.policies.hack_like._flags", lambda flags, device: torch.tensor(flags, device=device)[:, None]
    )
    check_fails(tiny, plan_of("adakv over hack-like", tiny))


def test_tensors_of_one_image_on_a_tape(tiny: ClassConditionalModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def restart(self: Any, labels: Sequence[int]) -> bool:
        self._condition, self.scale = self._condition_for(labels), 0
        return True

    monkeypatch.setattr(class_conditional.Drawing, "restart", restart)
    check_fails(tiny, tiny.plan())
    runner = AddressRunner()
    generator = Generator(tiny, tiny.plan(), 1, runner=runner)
    kept = []
    for label in (3, 9, 50):
        generator.draw([label], decode=False)
        kept.append(generator._drawing._condition)  # type: ignore[union-attr]
    assert all(second != third for second, third in runner.addresses.values())


# ----------------------------------------------------------------------------------------------- the runners


class Noted(GraphRunner):
    def __init__(self, notes: list[str]) -> None:
        super().__init__()
        self.notes = notes

    def _warm_up(self, step: Step) -> None:
        self.notes.append("warm up")
        step()

    def _record(self, step: Step) -> Step:
        self.notes.append("record")
        step()
        return lambda: self.notes.append("replay")


def test_order_of_a_graph_runner() -> None:
    notes: list[str] = []
    runner = Noted(notes)

    def steps() -> list[str]:
        notes.clear()
        for key in "ab":
            runner.run(key, lambda key=key: notes.append(key))  # type: ignore[misc]
        return list(notes)

    for _ in range(2):
        assert (steps(), runner.graphs) == (["warm up", "a", "warm up", "b"], 0)
        assert (steps(), runner.graphs) == (["record", "a", "replay", "record", "b", "replay"], 2)
        assert steps() == ["replay", "replay"]
        runner.forget()


def test_step_that_cannot_be_recorded_at_first() -> None:
    runner = Noted([])
    runner.run("scale 7", lambda: None)
    with pytest.raises(GraphError, match=r"^scale 7 cannot be recorded as a graph: ValueError: boom; draw without"):
        runner.run("scale 7", raising(ValueError("boom")))
    assert runner.graphs == 0
    runner.run("scale 7", lambda: None)
    assert runner.graphs == 1


def raising(error: BaseException) -> Step:
    def step() -> None:
        raise error

    return step


def test_graphs_without_a_cuda_device(tiny: ClassConditionalModel) -> None:
    for draw in (
        lambda: Generator(tiny, tiny.plan(), 1, graphs=True),
        lambda: generate(tiny, [1], tiny.plan(), graphs=True),
    ):
        with pytest.raises(GraphError, match=r"^CUDA graphs need a CUDA device; the model is on cpu"):
            draw()


class FakeCUDA:
    """Takes down what is asked of torch.cuda, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.notes: list[str] = []
        self.fails_at_the_end = False
        self.segments: Any = []
        fakes = {
            "Stream": lambda device: FakeStream(self, "side"),
            "current_stream": lambda: FakeStream(self, "current"),
            "stream": lambda stream: self.block(f"on {stream.name}"),
            "device": lambda device: nullcontext(),
            "graph_pool_handle": lambda: (0, 7),
            "CUDAGraph": lambda: SimpleNamespace(replay=lambda: self.notes.append("replay")),
            "graph": lambda graph, pool, stream: self.block(f"capture in {pool} on {stream.name}", True),
            "memory_snapshot": lambda: self.segments,
        }
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)

    @contextmanager
    def block(self, what: str, fails: bool = False) -> Iterator[None]:
        self.notes.append(what)
        try:
            yield
        finally:
            self.notes.append(f"end {what}")
            if fails and self.fails_at_the_end:
                raise RuntimeError("the recording was broken off")


@dataclass
class FakeStream:
    cuda: FakeCUDA
    name: str

    def wait_stream(self, other: FakeStream) -> None:
        self.cuda.notes.append(f"{self.name} waits for {other.name}")


def test_calls_of_torch_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCUDA(monkeypatch)
    runner = CUDAGraphRunner(torch.device("cuda"))
    for _ in range(3):
        cuda.notes.append("-")
        runner.run("a", lambda: cuda.notes.append("step"))
    capture = "capture in (0, 7) on side"
    assert cuda.notes == [
        "-", "side waits for current", "on side", "step", "end on side", "current waits for side",
        "-", "on side", capture, "step", f"end {capture}", "end on side", "replay", "-", "replay",
    ]  # fmt: skip
    assert runner.graphs == 1
    cuda.segments = [{"total_size": size, "segment_pool_id": (0, pool)} for size, pool in ((100, 7), (20, 0), (3, 7))]
    assert runner.pool_bytes == 103
    cuda.segments = [{"total_size": 100}]
    assert runner.pool_bytes is None


def test_reason_of_a_failed_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first one is said, and the stream is given back."""
    cuda = FakeCUDA(monkeypatch)
    runner = CUDAGraphRunner(torch.device("cuda"))
    runner.run("scale 2", lambda: None)
    cuda.fails_at_the_end = True
    with pytest.raises(GraphError, match=r"^scale 2 cannot be recorded as a graph: PolicyError: policy 'mine' waits"):
        runner.run("scale 2", raising(PolicyError("policy 'mine' waits for the device")))
    assert cuda.notes[-1] == "end on side"
    with pytest.raises(GraphError, match="RuntimeError: the recording was broken off"):
        runner.run("scale 2", lambda: None)
    with pytest.raises(KeyboardInterrupt):
        runner.run("scale 2", raising(KeyboardInterrupt()))


def test_times_with_graphs(tiny: ClassConditionalModel, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = Generator(tiny, tiny.plan(), 1, runner=TapeRunner())
    runs: list[int] = []
    latency, _ = graph_latency(
        generator,
        lambda: generator.draw([3]),
        2,
        lambda: runs.append(generator.runner.graphs),  # type: ignore[attr-defined]
    )
    assert latency.runs == 2
    assert runs == [4, 4]  # everything was recorded before the first one
    monkeypatch.setattr(base.Drawing, "_add", lambda self, added: self.f_hat.fill_(added.sum().item()))
    broken = Generator(tiny, tiny.plan(), 1, runner=TapeRunner())
    with pytest.raises(GraphError, match="scale 0 cannot be recorded"):
        graph_latency(broken, lambda: broken.draw([3]), 2)


# ------------------------------------------------------------------------------------------------ on a GPU


@pytest.fixture(scope="module")
def on_cuda() -> ClassConditionalModel:
    if not torch.cuda.is_available():
        pytest.skip("CUDA graphs need a CUDA device, and there is none")
    return load_model("emoji", device="cuda")


def allocations() -> int:
    """How often memory was asked of the device itself."""
    return int(torch.cuda.memory_stats()["num_device_alloc"])


@pytest.mark.gpu
@pytest.mark.parametrize("name", [*registered_policies(), *OTHERS])
def test_captured_graphs_draw_what_eager_steps_draw(on_cuda: ClassConditionalModel, name: str) -> None:
    plan = plan_of(name, on_cuda, budget="20%")
    captured, eager = (Generator(on_cuda, plan, 2, graphs=graphs) for graphs in (True, False))
    for way in ("in one step", "around the sampler"):
        counts = []
        for seed, labels in enumerate([[3, 4], [9, 1], [50, 0], [7, 7]]):
            tokens = eager.draw(labels, seed).tokens
            if way == "in one step":
                given = captured.draw(labels, seed)
                if not (isinstance(plan, Plan) and plan.coarse):  # sums of pooled tokens are in no fixed order
                    assert all(torch.equal(a, b) for a, b in zip(given.tokens, tokens, strict=True))
            else:
                logits: list[list[Tensor]] = [[], []]
                for generator, kept in zip((captured, eager), logits, strict=True):
                    watch = {"sampler": RecordedTokens(tokens), "observe": lambda _, x, kept=kept: kept.append(x)}
                    generator.draw(labels, **watch)  # type: ignore[arg-type]
                for a, b in zip(*logits, strict=True):
                    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-2)
            counts.append(allocations())
        assert counts[2] == counts[3]  # nothing is allocated any more
    assert isinstance(captured.runner, CUDAGraphRunner)
    assert captured.runner.graphs == 3 * len(on_cuda.geometry.schedule)
    assert captured.runner.pool_bytes is not None
    assert captured.runner.pool_bytes > 0


@pytest.mark.gpu
def test_eager_steps_never_wait_for_the_device(on_cuda: ClassConditionalModel) -> None:
    class Strict(Fixed):
        def run(self, key: Any, step: Step) -> None:
            if key not in seen:  # what is made on first use may wait
                seen.add(key)
                return step()
            torch.cuda.set_sync_debug_mode("error")
            try:
                return step()
            finally:
                torch.cuda.set_sync_debug_mode("default")

    for name in registered_policies():
        seen: set[Any] = set()
        generator = Generator(on_cuda, plan_of(name, on_cuda, budget="20%"), 1, runner=Strict())
        for _ in range(2):
            generator.draw([3])


@pytest.mark.gpu
def test_prompts_share_graphs_on_a_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("CUDA graphs need a CUDA device, and there is none")
    model = small_prompts()
    model.transformer.cuda()
    model.vae.cuda()
    plan = plan_of("snapkv", model)
    captured, padded = Generator(model, plan, 2, graphs=True), Generator(model, plan, 2, runner=Fixed())
    for seed, prompts in enumerate([*PROMPTS, *PROMPTS]):
        given, wanted = captured.draw(prompts, seed), padded.draw(prompts, seed)
        assert all(torch.equal(a, b) for a, b in zip(given.tokens, wanted.tokens, strict=True))


@pytest.mark.gpu
def test_a_policy_that_waits_cannot_be_captured(
    on_cuda: ClassConditionalModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    @dataclass(frozen=True)
    class Waits(SlidingWindowTokens):
        def score(self, seen: Candidates) -> Tensor:
            return super().score(seen) + seen.k_RHCD.sum().item()

    monkeypatch.setattr("heatkv.engine.open_cache.policy_of", lambda plan: Waits())
    generator = Generator(on_cuda, on_cuda.plan("sliding-window-tokens", "20%"), 1, graphs=True)
    generator.draw([3])
    with pytest.raises(GraphError, match=r"^scale \d cannot be recorded as a graph: PolicyError: score of policy"):
        generator.draw([3])
