"""Drawing images: the same under every batch size, every cache that keeps everything, and every second run."""

from __future__ import annotations

import copy
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.tape import TapeRunner
from support.tiny_models import features, small_classes, small_prompts, tiny_infinity
from torch import Tensor

from heatkv.calibration.run import calibrate
from heatkv.core.budget import Budget
from heatkv.core.plan import Plan
from heatkv.engine.arena_cache import ArenaCache
from heatkv.errors import ModelError, PlanError
from heatkv.generation import loop, micro_batches
from heatkv.generation.batches import draw_batches, generate
from heatkv.generation.loop import Generator
from heatkv.generation.micro_batches import decode_in_slices
from heatkv.models.catalogue import load_model, model_info
from heatkv.models.class_conditional import ClassConditionalModel
from heatkv.models.sampling import SamplingSettings
from heatkv.models.text_conditional import Prompt
from heatkv.models.var import FeedForward
from heatkv.policies.base import PlanningProblem, StaticPolicy, make_policy
from heatkv.policies.scalekv import ScaleKV
from heatkv.policies.windows import Full
from heatkv.registry import registered_policies
from heatkv.testing.material import made_up_problem


def plan_of(model: ClassConditionalModel, budget: str) -> Plan:
    return model.plan("full" if budget == "100%" else "streaming", budget)


@pytest.mark.parametrize("name", registered_policies())
def test_micro_batches_and_slices(name: str) -> None:
    """Images run a few at a time through large scales, and are decoded in slices, as they would be at once."""
    policy = make_policy(name, **({"scales": "1"} if name == "protected" else {}))
    if isinstance(policy, StaticPolicy):
        policy = replace(policy, sink_scales=1)
    budget = {"full": "100%", "protected": "80%"}.get(name, "40%")
    cases: list[tuple[Any, list[Any]]] = [
        (small_classes(), [3, 9, 50, 7, 1]),
        (small_prompts(), [Prompt(features(4)), Prompt(features(9), features(15)), Prompt(features(20))]),
    ]
    for model, labels in cases:
        plan = policy.plan(made_up_problem(policy, model.geometry, budget))
        whole = Generator(model, plan, len(labels), micro_batch=len(labels), decode_batch=len(labels)).draw(labels, 3)
        for micro_batch in (1, 2):
            runner = TapeRunner()
            generator = Generator(model, plan, len(labels), micro_batch=micro_batch, decode_batch=2, runner=runner)
            for _ in range(3):
                drawn = generator.draw(labels, 3)
                assert all(torch.equal(one, other) for one, other in zip(drawn.tokens, whole.tokens, strict=True))
                torch.testing.assert_close(drawn.images, whole.images, rtol=0, atol=2e-6)
            at_once = micro_batches.images_at_once(model.geometry.schedule, len(labels), micro_batch)
            assert (at_once[0], at_once[-1]) == (len(labels), micro_batch)
            assert runner.graphs == sum(-(-len(labels) // count) for count in at_once)


@pytest.mark.parametrize("kind", ["classes", "prompts"])
def test_queries_are_gone_when_the_feed_forward_layer_runs(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = small_classes() if kind == "classes" else small_prompts()
    seen, attend, forward = list[weakref.ref[Any]](), ArenaCache.attend, FeedForward.forward

    def watched(self: ArenaCache, layer: int, *qkv: Tensor) -> Tensor:
        seen.extend(map(weakref.ref, qkv))
        return attend(self, layer, *qkv)

    def run(self: FeedForward, u_RNC: Tensor) -> Tensor:
        assert all(x() is None for x in seen)
        return forward(self, u_RNC)

    monkeypatch.setattr(ArenaCache, "attend", watched)
    monkeypatch.setattr(FeedForward, "forward", run)
    Generator(model, model.plan(), 1).draw([3 if kind == "classes" else Prompt(features(4))], decode=False)
    assert seen


def test_one_arena_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A smaller last batch opens its cache when the former is gone, as is its own when its pictures come."""
    model, opened, alive = small_classes(), loop.open_cache, list[weakref.ref[Any]]()

    def open_cache(*given: Any) -> Any:
        assert all(cache() is None for cache in alive)
        alive.append(weakref.ref(cache := opened(*given)))
        return cache

    monkeypatch.setattr(loop, "open_cache", open_cache)
    parts = []
    for part in draw_batches(model, [1, 2, 3, 4, 5], model.plan(), batch=2, decode_batch=1):
        parts.append(part)
        assert (alive[-1]() is None) == (len(parts) == 5)
    generator = Generator(model, model.plan(), 5, micro_batch=5)
    whole = generator.draw([1, 2, 3, 4, 5]).images
    assert [len(part) for part in parts] == [1] * 5
    torch.testing.assert_close(torch.cat(parts), whole, rtol=0, atol=2e-6)
    monkeypatch.setattr(loop, "free_bytes", lambda _: model.decoding_bytes - 1)
    again = generator.draw([1, 2, 3, 4, 5])
    assert alive[-1]() is None  # no room beside the arena
    torch.testing.assert_close(again.images, whole, rtol=0, atol=2e-6)
    torch.testing.assert_close(generator.draw([1, 2, 3, 4, 5]).images, whole, rtol=0, atol=2e-6)
    decoder = torch.nn.Conv2d(2, 3, 1)  # of a stranger: with gradients, unless nobody asks for them
    pictures = decode_in_slices(decoder, torch.ones(5, 2, 4, 4), 2)
    assert torch.equal(pictures, decoder(torch.ones(5, 2, 4, 4)))
    assert not pictures.requires_grad


@pytest.mark.parametrize(("images", "fitting", "micro_batch"), [(0, 1, 1), (3, 3, 3), (1000, 16, 16)])
def test_what_fits(images: int, fitting: int, micro_batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the memory; what keeps a processor busy is 512 tokens, here of 16 images with two rows."""
    model = small_classes()
    full, step = model.geometry.full_bytes(2, "float32"), micro_batches.step_bytes(model, 2)
    monkeypatch.setattr(micro_batches, "_memory", lambda *_: 2 * images * (full + step))
    assert micro_batches.images_that_fit(model, 2, 16) == fitting
    monkeypatch.setattr(micro_batches, "_memory", lambda *_: 2 * images * step + full)
    assert micro_batches.choose_micro_batch(model, 20, 2, full) == micro_batch


@pytest.mark.parametrize("budget", ["100%", "30%"])
def test_images_in_batches(emoji: ClassConditionalModel, budget: str) -> None:
    plan, labels = plan_of(emoji, budget), [3, 60, 17]
    together = generate(emoji, labels, plan, seed=4, batch=3)
    one_by_one = generate(emoji, labels, plan, seed=4, batch=1)
    torch.testing.assert_close(together, one_by_one, rtol=0, atol=1e-3)
    third = generate(emoji, labels[2:], plan, seed=4, first_sample=2)
    torch.testing.assert_close(third, together[2:], rtol=0, atol=1e-3)
    assert together.shape == (3, 3, 48, 48)
    assert together.min() >= 0
    assert together.max() <= 1


def test_bits_of_a_second_run(emoji: ClassConditionalModel) -> None:
    generator = Generator(emoji, plan_of(emoji, "20%"), 2)
    first = generator.draw([1, 2], seed=9)
    generator.cache.store.spoil()  # nothing of the first images may be read
    second = generator.draw([1, 2], seed=9)
    assert first.images is not None
    assert second.images is not None
    assert torch.equal(first.images, second.images)
    other = generator.draw([1, 2], seed=10)
    assert not all(torch.equal(a, b) for a, b in zip(first.tokens, other.tokens, strict=True))


def test_bits_of_a_full_budget(emoji: ClassConditionalModel) -> None:
    plan = emoji.plan("random")
    assert plan.had_no_effect()
    assert torch.equal(generate(emoji, [5, 6], plan, seed=1), generate(emoji, [5, 6], emoji.plan(), seed=1))


def test_rows_without_guidance(emoji: ClassConditionalModel) -> None:
    generator = Generator(emoji, plan_of(emoji, "100%"), 2, SamplingSettings(cfg=0, top_k=1))
    assert generator.cache.rows == 2
    drawn = generator.draw([1, 1])
    # greedy and of one class: both rows are the same picture
    assert all(torch.equal(tokens[0], tokens[1]) for tokens in drawn.tokens)


def test_budgets_in_bytes(emoji: ClassConditionalModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """They hold for what is opened: as many images at once as there is room for, and no more."""
    opened: list[int] = []
    begin = ArenaCache.reset
    monkeypatch.setattr(ArenaCache, "reset", lambda self: (opened.append(self.allocated_bytes), begin(self)))
    limit = 4 << 20
    for rows, most in ((2, 1), (6, 3)):
        plan = emoji.plan("streaming", f"{limit}B", rows=rows)
        opened.clear()
        generate(emoji, [1] * 5, plan)
        assert limit * 0.9 < max(opened) <= limit
        with pytest.raises(PlanError, match=str(limit)):
            generate(emoji, [1] * 5, plan, batch=most + 1)


def test_plans_of_other_weights(emoji: ClassConditionalModel) -> None:
    """They are told from those of these weights, and from those that nothing was measured for."""
    plan = emoji.plan("heatkv", "40%", statistics=calibrate(emoji, 1))
    other = replace(emoji, vqvae=copy.deepcopy(emoji.vqvae))
    assert plan.weights == other.fingerprint
    for fitting in (plan, emoji.plan("streaming", "40%")):
        Generator(other, fitting, 1)
    with torch.no_grad():
        other.vqvae.quantize.embedding.weight[0, 0] += 1
    Generator(other, emoji.plan("streaming", "40%"), 1)
    with pytest.warns(UserWarning, match=plan.weights):
        Generator(other, plan, 1)


def test_bytes_and_logits_of_bfloat16(emoji: ClassConditionalModel) -> None:
    half = load_model("emoji", dtype="bfloat16")
    logits: dict[str, list[torch.Tensor]] = {"float32": [], "bfloat16": []}
    sizes, tokens = {}, Generator(emoji, plan_of(emoji, "30%"), 1).draw([7], seed=0).tokens
    for name, model in (("float32", emoji), ("bfloat16", half)):
        generator = Generator(model, plan_of(model, "30%"), 1)

        class Playback:
            def choose(self, scale: int, logits_BNV: torch.Tensor, name: str = name) -> torch.Tensor:
                logits[name].append(logits_BNV)
                return tokens[scale]

        generator.draw([7], sampler=Playback(), decode=False)
        sizes[name] = generator.cache.allocated_bytes
    assert sizes["float32"] == 2 * sizes["bfloat16"]
    assert len(tokens) == len(logits["float32"])
    for a, b in zip(logits["float32"], logits["bfloat16"], strict=True):
        assert 0 < (a - b).abs().max() < 0.15 * a.std() + 0.5


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"labels": []}, r"labels is \[\]"), ({"labels": "pizza"}, "labels is 'pizza'"), ({"labels": [999]}, "999"),
        ({"batch": 0}, "batch is 0"), ({"seed": 0.5}, "seed is 0.5"), ({"first_sample": "a"}, "first_sample is 'a'"),
    ],
)  # fmt: skip
def test_refused_images(emoji: ClassConditionalModel, options: dict[str, Any], named: str) -> None:
    with pytest.raises(ModelError, match=named):
        generate(emoji, **({"labels": [1], "plan": emoji.full_plan()} | options))


def test_refused_batches(emoji: ClassConditionalModel) -> None:
    with pytest.raises(ModelError, match="3 labels for a generator of batch 2"):
        Generator(emoji, emoji.full_plan(), 2).draw([1, 2, 3])
    with pytest.raises(ModelError, match="batch is 0"):
        Generator(emoji, emoji.full_plan(), 0)
    other = Full().plan(PlanningProblem(model_info("var-d16").geometry(), Budget.parse("100%")))
    with pytest.raises(PlanError, match="the plan is for 16 layers x 16 heads, the model has 12 x 6"):
        Generator(emoji, other, 1)


@pytest.mark.parametrize("name", [name for name in registered_policies() if not name.startswith("heatkv-mr")])
def test_two_threads_draw_what_one_draws(name: str) -> None:
    """Nothing of the model is changed while it draws: not for policies that look at the attention's input either."""
    model = tiny_infinity()
    policy = make_policy(name, **({"value": "error"} if name == "heatkv-lp" else {}))
    budget = "100%" if name == "full" else "50%"
    plan = replace(policy.plan(made_up_problem(policy, model.geometry, budget)), weights="")
    labels = [model.labels(2), model.labels(2, 1)]

    def draw(index: int) -> list[torch.Tensor]:
        generator = Generator(model, plan, 2)
        return [tokens for _ in range(4) for tokens in generator.draw(labels[index], seed=index).tokens]

    alone = [draw(index) for index in range(2)]
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(draw, range(2)))
    for one, other in zip(alone, together, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_drawing_while_drawing() -> None:
    """A second generator draws within what observes the first."""
    model = tiny_infinity()
    plan = ScaleKV(drafters="0").plan(made_up_problem(ScaleKV(), model.geometry, "50%"))
    outer, inner = (Generator(model, plan, 1) for _ in range(2))
    wanted = outer.draw(model.labels(1)).tokens
    within: list[list[torch.Tensor]] = []
    drawn = outer.draw(model.labels(1), observe=lambda *_: within.append(inner.draw(model.labels(1)).tokens))
    for tokens in (drawn.tokens, *within):
        assert all(torch.equal(a, b) for a, b in zip(tokens, wanted, strict=True))
    assert len(within) == len(model.schedule)
