"""Measuring drawn images layer by layer: the statistics of calibration, one layer's keys and values at a time."""

from __future__ import annotations

import dataclasses
import threading
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest
import torch
from support.models import features, make_infinity
from test_calibration import DenseErrors, check_drop_errors
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from heatkv.calibration.level_costs import calibrate_levels
from heatkv.calibration.measure import calibrate
from heatkv.core.plan import Plan
from heatkv.core.schedule import ScaleSchedule
from heatkv.core.statistics import Statistics
from heatkv.errors import ModelError
from heatkv.generation.loop import Drawn, Generator
from heatkv.models.class_conditional import ClassConditionalModel
from heatkv.models.text_conditional import Prompt, TextConditionalModel
from heatkv.online import layerwise
from heatkv.online.layerwise import LayerMeasuringCache, held_bytes, measure_drawn, nothing_cached, run_layers
from heatkv.profiling.measure.ledger import TensorLedger

SCHEDULE = ScaleSchedule.of([(1, 1), (2, 2), (3, 2), (4, 3), (6, 4), (8, 6)])


def infinity() -> TextConditionalModel:
    examples = (Prompt(features(7)), Prompt(features(4), features(9)), Prompt(features(5)))
    return dataclasses.replace(make_infinity(schedule=SCHEDULE), examples=examples)


def drawn_by(model: Any, images: int, plan: Plan, seed: int = 0) -> Drawn:
    drawn: Drawn = Generator(model, plan, images).draw(model.labels(images), seed, decode=False)
    return drawn


def same(measured: Statistics, expected: Statistics) -> None:
    assert set(measured.sums()) == set(expected.sums())
    for name, array in expected.sums().items():
        np.testing.assert_allclose(
            measured.sums()[name], array, rtol=1e-4, atol=1e-6 * np.abs(array).max(), err_msg=name
        )
    assert measured.provenance == expected.provenance


def test_measuring_equals_calibration_on_the_same_codes(emoji: ClassConditionalModel) -> None:
    expected = calibrate(emoji, 1, seed=3)
    drawn = drawn_by(emoji, 1, emoji.full_plan(), seed=3)
    same(measure_drawn(emoji, emoji.labels(1), drawn.tokens, expected.provenance.samples)[0], expected)


def test_measuring_infinity_equals_its_calibration() -> None:
    model = infinity()
    expected = calibrate(model, 3, seed=1)
    levels = calibrate_levels(model, 3, seed=1)
    drawn = drawn_by(model, 3, model.full_plan(), seed=1)
    measured, _ = measure_drawn(model, model.labels(3), drawn.tokens, expected.provenance.samples, levels=levels)
    same(measured, expected)
    found = measured.levels
    assert found is not None
    assert found.samples == levels.samples
    assert levels.joint_sum[5].any()
    assert levels.single_sum.any() == bool(levels.choices.other_sources(5))
    for mine, theirs in zip((*found.joint_sum, found.single_sum), (*levels.joint_sum, levels.single_sum), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-6 * theirs.max(initial=0))


@pytest.mark.parametrize("autocast", [False, True])
def test_bf16_is_measured_as_it_is_calibrated(autocast: bool) -> None:
    model = infinity()
    if not autocast:
        model.transformer.set_compute_dtype(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected = calibrate(model, 1, seed=2)
        drawn = drawn_by(model, 1, model.full_plan(), seed=2)
        measured, _ = measure_drawn(model, model.labels(1), drawn.tokens, expected.provenance.samples)
    same(measured, expected)
    if autocast:  # it matters, so it must have reached the forwards
        plain, _ = measure_drawn(model, model.labels(1), drawn.tokens, expected.provenance.samples)
        assert not np.allclose(plain.drop_error, measured.drop_error, rtol=1e-4)


def test_codes_of_a_plan_are_measured_under_full_attention() -> None:
    """Against dense attention of the whole model, which is shown the codes that a plan drew."""
    from heatkv.generation.loop import run_scales
    from heatkv.models.sampling import RecordedTokens

    model = infinity()
    plan = model.plan("streaming", "40%")
    assert isinstance(plan, Plan)
    drawn = drawn_by(model, 3, plan)
    full = drawn_by(model, 3, model.full_plan())
    assert any(not torch.equal(a, b) for a, b in zip(drawn.tokens, full.tokens, strict=True))
    oracle = DenseErrors(model, list(model.transformer.blocks), "sa", 3 * model.sampling.rows_per_image)
    with oracle.hooked():
        run_scales(model, model.labels(3), oracle, RecordedTokens(drawn.tokens), model.sampling, decode=False)
    check_drop_errors(measure_drawn(model, model.labels(3), drawn.tokens, ["a", "b", "c"])[0], oracle)


class Shared(TorchDispatchMode):
    """Lets one ledger follow what a thread does."""

    def __init__(self, ledger: TensorLedger) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._ledger = ledger

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self._ledger.__torch_dispatch__(func, types, args, kwargs)


class Weighing(LayerMeasuringCache):
    """Measures nothing but what is alive after every attention."""

    ledger: TensorLedger

    def observe(self, layer: int, q_RHND: Tensor, keys: list[Tensor], values: list[Tensor]) -> None:
        pass

    def _advance(self) -> None:
        super()._advance()
        self.live = [*getattr(self, "live", []), self.ledger.live]


@pytest.mark.parametrize("kind", ["emoji", "infinity"])
def test_what_is_held_is_what_is_told(kind: str, emoji: ClassConditionalModel, monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = emoji if kind == "emoji" else infinity()
    tokens, labels = drawn_by(model, 2, model.full_plan()).tokens, model.labels(2)
    ledger, contexts = TensorLedger(), layerwise._contexts

    def watched(device: torch.device) -> Any:
        inner = contexts(device)

        def entered() -> ExitStack:
            stack = inner()
            stack.enter_context(Shared(ledger))
            return stack

        return entered

    monkeypatch.setattr(layerwise, "_contexts", watched)
    rows = 2 * model.sampling.rows_per_image
    cache = Weighing(nothing_cached(model.geometry), rows, 2, model.compute_dtype, model.device, model.key_angles)
    cache.ledger = ledger
    run_layers(model, labels, tokens, model.sampling, cache)
    told, scales = 2 * held_bytes(model, model.sampling), len(model.geometry.schedule)
    assert cache.peak_bytes <= told
    # after the first attention of scale 0 hardly anything is held but what drawing holds at any time
    held = np.array(cache.live) - cache.live[0]
    assert held.max() <= told
    assert abs(cache.peak_bytes - held.max()) < 0.02 * told
    # as much in every layer but the first, where streams and inputs are the same: nothing of a layer before is left
    ends = held[scales - 1 :: scales][1:-1]
    assert ends.max() - ends.min() < 0.02 * told
    assert cache.allocated_bytes == 0


@pytest.mark.parametrize("error", [ModelError, KeyboardInterrupt])
def test_an_error_ends_all_forwards(error: type[BaseException], monkeypatch: pytest.MonkeyPatch) -> None:
    model = infinity()
    tokens, before = drawn_by(model, 1, model.full_plan()).tokens, threading.active_count()

    def fail(self: Any, layer: int, *_: Any) -> None:
        if layer == 2 and self._target == 1:
            raise error("as told")

    monkeypatch.setattr(LayerMeasuringCache, "observe", fail)
    with pytest.raises(error, match="as told"):
        measure_drawn(model, model.labels(1), tokens, ["a"])
    assert threading.active_count() == before
    monkeypatch.undo()
    measure_drawn(model, model.labels(1), tokens, ["a"])
    assert threading.active_count() == before


def test_a_model_that_ends_early_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    model = infinity()
    tokens = drawn_by(model, 1, model.full_plan()).tokens
    blocks = model.transformer.blocks
    monkeypatch.setattr(model.transformer, "hidden", lambda x, c, r, cache: blocks[0](x, c, 0, r, cache))
    with pytest.raises(ModelError, match="a forward ended before all layers had called attend"):
        measure_drawn(model, model.labels(1), tokens, ["a"])
