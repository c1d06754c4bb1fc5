"""Corrections of attention outputs: the regression against its normal equations, and what they do under a plan."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from heatkv.compensation import RIDGE, compensation_bytes, compensation_of, fit_compensation, fit_correction
from heatkv.core.plan import CoarseCells, Plan
from heatkv.errors import PolicyError
from heatkv.generation.loop import Generator, generate
from heatkv.models.class_conditional import ClassConditionalModel
from heatkv.profiling.measure.fidelity import FidelityBench


def reduced_plan(model: ClassConditionalModel, **settings: object) -> Plan:
    """Layers 2 and 5 hold all scales but the first two as means, the others hold everything."""
    geometry = model.geometry
    scales = len(geometry.schedule)
    last_read = np.full((geometry.layers, geometry.heads, scales), scales - 1)
    mean = last_read.copy()
    last_read[[2, 5], :, 2:] = np.arange(2, scales)
    coarse = CoarseCells.uncalibrated("mean", mean, geometry.schedule)
    return Plan("by-hand", geometry, last_read, 1.0, geometry.full_token_heads, 2, settings=settings, coarse=(coarse,))


def outputs(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q, out, wanted = (torch.randn(3, 4, 10, 5, generator=generator) for _ in range(3))
    return q, out, wanted


def test_a_constant_is_the_mean_of_what_is_missing() -> None:
    q, out, wanted = outputs()
    heads = torch.tensor([1, 3])
    corrected = fit_correction("constant", q, out, wanted, heads).apply("constant", q, out)
    missing = (wanted - out).mean(dim=(0, 2))
    for head in range(4):
        shift = missing[head] if head in (1, 3) else torch.zeros(5)
        torch.testing.assert_close(corrected[:, head], out[:, head] + shift)


def test_a_linear_map_solves_the_ridge_equations() -> None:
    q, out, wanted = outputs(1)
    found = fit_correction("linear", q, out, wanted, torch.tensor([2])).weight_HFD[0].double().numpy()
    x = np.concatenate([out[:, 2].reshape(30, 5), q[:, 2].reshape(30, 5), np.ones((30, 1))], axis=1).astype(float)
    y = (wanted - out)[:, 2].reshape(30, 5).double().numpy()
    covariance = x.T @ x / 30
    # the gradient of |y - x w|^2 / n + ridge |w|^2 is zero
    gradient = covariance @ found + RIDGE * np.trace(covariance) / 11 * found - x.T @ y / 30
    np.testing.assert_allclose(gradient, 0, atol=1e-6)


def test_a_linear_error_is_repaired() -> None:
    q, out, _ = outputs(2)
    generator = torch.Generator().manual_seed(3)
    wanted = out + 0.1 * q @ torch.randn(5, 5, generator=generator) + 0.5
    corrected = fit_correction("linear", q, out, wanted, torch.arange(4)).apply("linear", q, out)
    assert (corrected - wanted).square().sum() < 1e-3 * (out - wanted).square().sum()


@pytest.mark.parametrize(("kind", "of_head"), [("constant", 32), ("linear", 2 * 32**2 + 32)])
def test_parameters_are_those_of_heads_with_reduced_cells(
    emoji: ClassConditionalModel, kind: str, of_head: int
) -> None:
    found = fit_compensation(emoji, reduced_plan(emoji), kind, samples=2)  # type: ignore[arg-type]
    # targets 3 to 7 read a reduced cell in 2 layers of 6 heads
    assert set(found.corrections) == {(target, layer) for target in range(3, 8) for layer in (2, 5)}
    assert found.parameters == 5 * 2 * 6 * of_head
    assert found.bytes == 4 * found.parameters


def test_corrections_bring_the_logits_nearer(emoji: ClassConditionalModel) -> None:
    plan = reduced_plan(emoji, compensation="linear")
    found = compensation_of(emoji, plan, seed=50)
    bench = FidelityBench(emoji, images=4, pictures=0, seed=7, settings=emoji.sampling)
    with_it, without = (bench.compare(lambda n, c=c: Generator(emoji, plan, n, compensation=c)) for c in (found, None))
    assert with_it.kl() < 0.9 * without.kl()


def test_nothing_reduced_is_nothing_corrected(emoji: ClassConditionalModel) -> None:
    found = fit_compensation(emoji, emoji.plan(), "linear", samples=1)
    assert found.corrections == {}
    plain = Generator(emoji, emoji.plan(), 1).draw([3])
    corrected = Generator(emoji, emoji.plan(), 1, compensation=found).draw([3])
    assert plain.images is not None
    assert corrected.images is not None
    assert torch.equal(plain.images, corrected.images)


def test_what_asks_for_no_or_unknown_corrections(emoji: ClassConditionalModel) -> None:
    assert compensation_of(emoji, reduced_plan(emoji)) is None
    assert compensation_of(emoji, reduced_plan(emoji, compensation="none")) is None
    with pytest.raises(PolicyError, match="'quadratic' in the plan's settings is unknown; known: constant, linear"):
        compensation_of(emoji, reduced_plan(emoji, compensation="quadratic"))
    with pytest.raises(PolicyError, match="'quadratic' is unknown"):
        emoji.plan("heatkv-mr", "50%", compensation="quadratic")


@pytest.mark.parametrize("kind", ["constant", "linear"])
def test_bytes_are_told_before_anything_is_fitted(emoji: ClassConditionalModel, kind: str) -> None:
    plan = reduced_plan(emoji, compensation=kind)
    fitted = compensation_of(emoji, plan)
    assert fitted is not None
    assert compensation_bytes(plan, "float32") == fitted.bytes
    assert compensation_bytes(plan, "bfloat16") == fitted.bytes // 2
    assert compensation_bytes(reduced_plan(emoji), "float32") == 0


@pytest.mark.slow
def test_generate_fits_what_the_plan_asks_for(emoji: ClassConditionalModel) -> None:
    plan, labels = reduced_plan(emoji, compensation="linear"), ["pizza", "star"]
    drawn = generate(emoji, labels, plan, seed=3)
    given = generate(emoji, labels, plan, seed=3, compensation=compensation_of(emoji, plan, seed=3))
    assert torch.equal(drawn, given)
    assert not torch.equal(drawn, generate(emoji, labels, reduced_plan(emoji), seed=3))
    with pytest.raises(PolicyError, match="compensation='cubic'"):
        generate(emoji, labels, reduced_plan(emoji, compensation="cubic"))
