"""What takes longer: many more random problems, and the main result on the embedded model. `make check-slow`."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import heatkv
from heatkv.core.budget import Budget
from heatkv.core.geometry import CacheGeometry
from heatkv.core.schedule import ScaleSchedule
from heatkv.errors import BudgetError
from heatkv.models.class_conditional import ClassConditionalModel
from heatkv.policies.base import PlanningProblem, make_policy
from heatkv.profiling.measure.fidelity import FidelityBench
from heatkv.profiling.measure.subjects import plan_subjects

pytestmark = pytest.mark.slow


@settings(max_examples=3000)
@given(
    name=st.sampled_from(["random", "streaming", "sliding-window"]),
    layers=st.integers(1, 12),
    heads=st.integers(1, 8),
    scales=st.lists(st.tuples(st.integers(1, 2), st.integers(1, 9), st.integers(1, 9)), min_size=2, max_size=9),
    sinks=st.integers(0, 4),
    share=st.fractions(min_value=0, max_value=1, max_denominator=200),
    seed=st.integers(0, 1000),
)
def test_no_plan_exceeds_its_budget_at_any_checkpoint(
    name: str, layers: int, heads: int, scales: list[tuple[int, int, int]], sinks: int, share: float, seed: int
) -> None:
    geometry = CacheGeometry(layers, heads, 4, ScaleSchedule.of(scales))
    sinks = min(sinks, len(scales) - 1)
    policy = make_policy(name, sink_scales=sinks)
    if share == 0:
        return
    problem = PlanningProblem(geometry, Budget.parse(share), seed=seed)
    sink_tokens = geometry.schedule.offsets[sinks]
    if share * geometry.schedule.cached_tokens < sink_tokens:
        with pytest.raises(BudgetError):
            policy.plan(problem)
        return
    plan = policy.plan(problem)
    tokens, last_read = geometry.schedule.tokens, plan.last_read
    for target in range(len(scales)):
        for layer in range(layers):
            done, waiting = range(layer + 1), range(layer + 1, layers)
            live = sum(
                tokens[source] * int((last_read[at, :, source] > target).sum())
                for at in done
                for source in range(target + 1)
            )
            live += sum(
                tokens[source] * int((last_read[at, :, source] >= target).sum())
                for at in waiting
                for source in range(target)
            )
            assert live <= share * geometry.full_token_heads
            assert live == plan.live[target, layer]


def test_heatkv_is_closer_to_the_full_cache_than_windows_and_chance(emoji: ClassConditionalModel) -> None:
    """The figures of `make compare` on fewer images: the least KL at 30 % of the cache and below."""
    statistics = heatkv.calibrate(emoji, 32)
    budgets = [Budget.parse(text) for text in ("30%", "20%", "10%")]
    policies = [make_policy(name) for name in ("heatkv", "sliding-window", "random")]
    subjects = plan_subjects(emoji, policies, budgets, statistics=statistics, rows=2, storage="float32", draws=2)
    bench = FidelityBench(emoji, images=16, pictures=1, seed=1, settings=emoji.sampling)
    kl = {subject.name: bench.measure(subject).kl for subject in subjects}
    for budget in ("30%", "20%", "10%"):
        assert kl[f"heatkv {budget}"] < kl[f"sliding-window {budget}"]
        assert kl[f"heatkv {budget}"] < kl[f"random {budget}"]
    assert np.all(np.diff([kl[f"heatkv {budget}"] for budget in ("30%", "20%", "10%")]) > 0)
