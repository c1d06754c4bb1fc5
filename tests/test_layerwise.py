"""Measuring drawn images layer by layer: the statistics of calibration, one layer's keys and values at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from support.dense_reads import DenseErrors, check_drop_errors
from support.tiny_models import tiny_infinity, tiny_var
from torch import Tensor

from heatkv.calibration.level_costs import level_choices, measure_biases, measure_errors
from heatkv.calibration.measure import measure_samples
from heatkv.core.plan import Plan
from heatkv.core.sample_sums import SampleSums
from heatkv.generation.loop import Drawn, Generator, run_scales
from heatkv.models.class_conditional import ClassConditionalModel
from heatkv.models.sampling import RecordedTokens
from heatkv.online.layerwise import LayerMeasuringCache, held_bytes, measure_drawn
from heatkv.profiling.measure.ledger import TensorLedger


def drawn_by(model: Any, images: int, plan: Plan, seed: int = 0) -> Drawn:
    drawn: Drawn = Generator(model, plan, images).draw(model.labels(images), seed, decode=False)
    return drawn


def check_equal(measured: SampleSums, expected: SampleSums) -> None:
    assert set(measured.sums()) == set(expected.sums())
    for name, array in expected.sums().items():
        atol = 1e-6 * np.abs(array).max(initial=0)
        np.testing.assert_allclose(measured.sums()[name], array, rtol=1e-4, atol=atol, err_msg=name)
    assert measured.samples == expected.samples


@pytest.mark.parametrize("make", [tiny_var, tiny_infinity])
def test_calibration_on_the_same_codes(make: Any) -> None:
    model = make()
    expected, choices = measure_samples(model, range(3), seed=1), level_choices(model.geometry.schedule, 2)
    bias = measure_biases(model, choices, range(1), seed=1)
    levels = measure_errors(model, choices, bias, range(3), seed=1)
    drawn = drawn_by(model, 3, model.full_plan(), seed=1)
    measured, _ = measure_drawn(model, model.labels(3), drawn.tokens, expected.samples, levels=levels)
    check_equal(measured, expected)
    assert measured.provenance == expected.provenance
    assert measured.levels is not None
    check_equal(measured.levels, levels)
    measured.levels.check_alike(levels)
    assert levels.joint_sum[5].any()
    assert levels.single_sum.any() == (make is tiny_var)  # which has sources beside the joint ones


@pytest.mark.parametrize("autocast", [False, True])
def test_bf16_calibration(autocast: bool) -> None:
    model = tiny_infinity()
    if not autocast:
        model.transformer.set_compute_dtype(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected = measure_samples(model, range(1), seed=2)
        drawn = drawn_by(model, 1, model.full_plan(), seed=2)
        check_equal(measure_drawn(model, model.labels(1), drawn.tokens, expected.samples)[0], expected)
    if autocast:  # it matters, so it must have reached the forwards
        plain, _ = measure_drawn(model, model.labels(1), drawn.tokens, expected.samples)
        assert not np.allclose(plain.drop_error, expected.drop_error, rtol=1e-4)


def test_codes_of_a_plan_under_dense_attention() -> None:
    """Against dense attention of the whole model, which is shown the codes that a plan drew."""
    model = tiny_infinity()
    plan = model.plan("streaming", "40%")
    assert isinstance(plan, Plan)
    drawn = drawn_by(model, 3, plan)
    full = drawn_by(model, 3, model.full_plan())
    assert any(not torch.equal(a, b) for a, b in zip(drawn.tokens, full.tokens, strict=True))
    oracle = DenseErrors(model, list(model.transformer.blocks), "sa", 3 * model.sampling.rows_per_image)
    with oracle.hooked():
        run_scales(model, model.labels(3), oracle, RecordedTokens(drawn.tokens), model.sampling)
    check_drop_errors(measure_drawn(model, model.labels(3), drawn.tokens, ["a", "b", "c"])[0], oracle)


@pytest.mark.parametrize("kind", ["emoji", "infinity"])
def test_held_bytes_against_all_tensors(
    kind: str, emoji: ClassConditionalModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside what drawing holds anyway, as many in every layer: nothing of the layer before is left."""
    model: Any = emoji if kind == "emoji" else tiny_infinity()
    tokens, labels = drawn_by(model, 2, model.full_plan()).tokens, model.labels(2)
    live: list[int] = []
    attend = LayerMeasuringCache.attend

    def weighed(self: LayerMeasuringCache, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = attend(self, layer, q, k, v)
        live.append(ledger.live)
        return out

    monkeypatch.setattr(LayerMeasuringCache, "attend", weighed)
    monkeypatch.setattr(LayerMeasuringCache, "observe", lambda *_: None)
    with torch.inference_mode(), TensorLedger() as ledger:
        drawing = model.begin(labels, model.sampling)
        for choices in tokens:
            drawing.accept(choices)
        geometry = model.geometry
        factors = [torch.empty(geometry.heads, geometry.head_dim, geometry.head_dim) for _ in range(geometry.layers)]
        anyway = ledger.live
        del factors
    with TensorLedger() as ledger:
        _, peak = measure_drawn(model, labels, tokens, ["a", "b"])
    assert peak <= 2 * held_bytes(model, model.sampling)
    held = np.array(live) - anyway
    assert np.abs(held - peak).max() < 0.04 * peak
