"""Attention mass, drop errors and the measuring of them on a model, against dense softmax."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.dense_reads import DenseErrors, check_drop_errors, dense_errors
from support.tiny_models import tiny_infinity, tiny_var
from torch import Tensor

from heatkv.calibration import measure as calibration
from heatkv.calibration.measure import (
    MeasuringCache,
    concentration,
    measure_samples,
    output_weights,
    ranking_agreement,
    read_sources,
    similarity,
)
from heatkv.core.schedule import ScaleSchedule
from heatkv.core.schema import FloatArray
from heatkv.core.statistics import Provenance, Statistics
from heatkv.errors import PlanError, StatisticsError
from heatkv.generation.loop import Drawn, Generator, run_scales
from heatkv.models.base import ImageModel
from heatkv.models.class_conditional import ClassConditionalModel
from heatkv.models.sampling import CommonRandomSampler, RecordedTokens


@pytest.fixture(scope="module")
def var() -> ClassConditionalModel:
    return tiny_var()


# ---------------------------------------------------------------------- reads of made-up keys


def random_reads(
    sizes: list[int], queries: int, sharpness: float, dim: int = 4
) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor]:
    """Queries, keys, values and one square factor per head, (2 rows, 3 heads)."""
    generator = torch.Generator().manual_seed(sum(sizes) * 8 + queries)
    q = torch.randn(2, 3, queries, dim, generator=generator) * sharpness
    keys, values = ([torch.randn(2, 3, size, dim, generator=generator) for size in sizes] for _ in range(2))
    return q, keys, values, torch.randn(3, dim, dim, generator=generator)


@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    queries=st.integers(1, 7),
    block=st.sampled_from([1, 200, 1 << 22]),
    sharpness=st.sampled_from([0.1, 1.0, 10.0, 30.0]),
)
def test_reads_of_dense_softmax(sizes: list[int], queries: int, block: int, sharpness: float) -> None:
    """Whatever the blocks of queries, and under autocast."""
    q, keys, values, factor = random_reads(sizes, queries, sharpness)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibration, "MAX_BLOCK_NUMBERS", block)
        reads = read_sources(q, keys, values, factor)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            again = read_sources(q, keys, values, factor)
    mass, errors = dense_errors(q, keys, values, factor)
    assert reads.drop_error is not None
    assert again.drop_error is not None
    torch.testing.assert_close(reads.mass, mass, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(reads.drop_error, errors, rtol=1e-3, atol=1e-6)
    assert torch.equal(again.mass, reads.mass)
    assert torch.equal(again.drop_error, reads.drop_error)


@pytest.mark.parametrize("lead", [5.0, 15.0, 40.0, 90.0, 150.0, 300.0])
@pytest.mark.parametrize("winner", [0, 1, 2, 3])
def test_drop_errors_where_one_source_has_nearly_all_mass(winner: int, lead: float) -> None:
    """Its logits lead by so much that the others have e^-lead of the mass; what is left still is their attention."""
    q, keys, values, factor = random_reads([2, 3, 4, 5], 6, 1.0, dim=5)
    q[..., -1] = lead
    for source, k in enumerate(keys):
        k[..., -1] = 1.0 if source == winner else 0.0
    reads = read_sources(q, keys, values, factor)
    mass, errors = dense_errors(q, keys, values, factor)
    if winner < 3:
        assert errors[..., winner].min() > 0.1
        assert mass[..., winner].min() / 6 > (0.9 if lead > 10 else 0.1)
    assert reads.drop_error is not None
    torch.testing.assert_close(reads.drop_error, errors, rtol=1e-3, atol=1e-9)


def test_concentration_of_dense_softmax() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 3, 5, 4, generator=generator), torch.randn(2, 3, 11, 4, generator=generator)
    received = (q.double() @ k.double().mT).softmax(-1).mean(2).numpy()
    expected = received.var(axis=2) / received.mean(axis=2) ** 2
    np.testing.assert_allclose(concentration(q, k).numpy(), expected, rtol=1e-5)
    assert (concentration(torch.zeros(1, 1, 70, 4), k[:1, :1]) < 1e-6).all()  # all keys receive the same


def test_similarity_of_known_grids() -> None:
    generator = torch.Generator().manual_seed(1)
    before = torch.randn(2, 3, 4, 5, generator=generator)
    # every token of a 2x2 grid nine times: away from the edges resizing gives the same again
    same = before.view(2, 3, 2, 2, 5).repeat_interleave(3, dim=2).repeat_interleave(3, dim=3).flatten(2, 3)
    assert (similarity(before, same, (1, 2, 2), (1, 6, 6)) > 0.8).all()
    np.testing.assert_allclose(similarity(before, -2 * before, (1, 2, 2), (1, 2, 2)).numpy(), -1, rtol=1e-6)
    np.testing.assert_allclose(similarity(before, before, (1, 2, 2), (1, 2, 2)).numpy(), 1, rtol=1e-6)


# ---------------------------------------------------------------------- whole models


@pytest.mark.parametrize("kind", ["emoji", "infinity"])
def test_statistics_of_dense_attention(kind: str, emoji: ClassConditionalModel) -> None:
    """On the same drawn tokens, also in blocks of queries."""
    model: ImageModel[Any] = emoji if kind == "emoji" else tiny_infinity()
    images = 2 if kind == "emoji" else 3
    measured = measure_samples(model, range(images), seed=5)
    labels, sampler = model.labels(images), CommonRandomSampler(5, range(images), model.sampling)
    rows = images * model.sampling.rows_per_image
    drawn = run_scales(model, labels, MeasuringCache(model.plan(), rows, images), sampler, model.sampling)
    oracle = DenseErrors(model, list(model.transformer.blocks), "attn" if kind == "emoji" else "sa", rows)
    with oracle.hooked():
        run_scales(model, labels, oracle, RecordedTokens(drawn.tokens), model.sampling)
    check_drop_errors(measured, oracle)
    np.testing.assert_allclose(measured.mass, oracle.mass[:images].mean(0), atol=2e-5)
    np.testing.assert_allclose(measured.spread, oracle.mass[:images].std(0, ddof=1), atol=5e-5)
    assert measured.provenance.fingerprint == model.fingerprint
    assert [name.split(":")[:2] for name in measured.samples] == [["5", str(i)] for i in range(images)]


def test_merged_batches(var: ClassConditionalModel, monkeypatch: pytest.MonkeyPatch) -> None:
    together = measure_samples(var, range(3), seed=1)
    monkeypatch.setattr(calibration, "MAX_BLOCK_NUMBERS", 500)  # so that there are several blocks of queries
    merged = measure_samples(var, range(2), seed=1).merge(measure_samples(var, range(2, 3), seed=1))
    assert merged.samples == together.samples == ("1:0:0", "1:1:1", "1:2:2")
    for name, array in together.sums().items():
        np.testing.assert_allclose(merged.sums()[name], array, rtol=1e-4, atol=1e-6 * array.max(), err_msg=name)
    assert (together.concentration[:, :, 2:] > 0).all()
    assert (np.abs(together.similarity[:, 1:]) <= 1 + 1e-6).all()
    assert not together.similarity[:, 0].any()


def drawn_through(model: ClassConditionalModel, cache: MeasuringCache) -> Drawn:
    sampler = CommonRandomSampler(3, range(2), model.sampling)
    return run_scales(model, [4, 2], cache, sampler, model.sampling)


def test_tokens_drawn_while_measuring(var: ClassConditionalModel) -> None:
    cache = MeasuringCache(var.plan(), 4, 2)
    plain = Generator(var, cache.plan, 2).draw([4, 2], seed=3)
    assert all(torch.equal(a, b) for a, b in zip(drawn_through(var, cache).tokens, plain.tokens, strict=True))
    first = cache.sums()
    cache.reset()
    drawn_through(var, cache)
    assert all(np.array_equal(array, first[name]) and array.any() for name, array in cache.sums().items())


def test_statistics_without_output_weights(var: ClassConditionalModel) -> None:
    cache = MeasuringCache(var.plan(), 4, 2)
    drawn_through(var, cache)
    assert set(cache.sums()) == {"mass_sum", "mass_square_sum", "all_mass_sum", "concentration_sum", "similarity_sum"}
    provenance = Provenance("tiny", var.fingerprint, None, {}, ("a", "b"))
    measured = Statistics(var.geometry.schedule, provenance=provenance, levels=None, **cache.sums())
    with pytest.raises(StatisticsError, match="lack error_sum"):
        _ = measured.drop_error


def test_refused_measurements(var: ClassConditionalModel) -> None:
    with pytest.raises(PlanError, match="'streaming' drops cells"):
        MeasuringCache(var.plan("streaming", "50%"), 4, 2)
    for images in (0, 5):
        with pytest.raises(PlanError, match=f"{images} images cannot be measured in 4 rows"):
            MeasuringCache(var.plan(), 4, images)
    with pytest.raises(PlanError, match=r"call see\(\)"):
        drawn_through(var, MeasuringCache(var.plan(), 4, 2, output_weights=output_weights(var)))


def test_ranking_agreement_of_equal_and_reversed_statistics() -> None:
    schedule = ScaleSchedule.square([1, 2, 3, 4])
    lower = np.tril(np.ones((4, 4)))
    noise = np.random.default_rng(0).random((2, 3, 4, 4)) * lower
    noise -= noise.sum(-1, keepdims=True) / lower.sum(-1)[:, None] * lower

    def with_mass(mass: FloatArray) -> Statistics:
        return Statistics(schedule, mass, mass**2, Provenance("model", "weights", 0.0, {}, ("0:0:0",)))

    flat = np.broadcast_to(lower / lower.sum(-1, keepdims=True), noise.shape)
    one, reversed_ = with_mass(flat + 0.2 * noise), with_mass(flat - 0.2 * noise)
    assert ranking_agreement(one, one) == pytest.approx([1, 1, 1])
    assert ranking_agreement(one, reversed_) == pytest.approx([-1, -1, -1])
