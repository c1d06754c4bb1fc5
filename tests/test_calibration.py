"""Attention mass and the measuring of it on a model, against dense softmax."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from heatkv import calibration
from heatkv.calibration import MeasuringCache, calibrate, ranking_agreement, read_sources
from heatkv.errors import PlanError, StatisticsError
from heatkv.generation import run_scales
from heatkv.models.class_conditional import ClassConditionalModel
from heatkv.sampling import CommonRandomSampler, RecordedTokens
from heatkv.schedule import ScaleSchedule
from heatkv.statistics import Provenance, Statistics


@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    queries=st.integers(1, 7),
    block=st.sampled_from([1, 1 << 22]),
    sharpness=st.sampled_from([0.1, 30.0]),
)
def test_masses_equal_dense_softmax(sizes: list[int], queries: int, block: int, sharpness: float) -> None:
    generator = torch.Generator().manual_seed(sum(sizes) * 8 + queries)
    q = torch.randn(2, 3, queries, 4, generator=generator) * sharpness
    keys = [torch.randn(2, 3, size, 4, generator=generator) for size in sizes]
    before, calibration.MAX_BLOCK_NUMBERS = calibration.MAX_BLOCK_NUMBERS, block
    try:
        got = read_sources(q, keys).mass / queries
    finally:
        calibration.MAX_BLOCK_NUMBERS = before
    dense = (q.double() @ torch.cat(keys, dim=2).double().transpose(2, 3)).softmax(-1)
    expected = torch.stack([part.sum(-1).mean(-1) for part in dense.split(sizes, dim=-1)], dim=-1)
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


class DenseMass:
    """An oracle that keeps every key densely and measures with one softmax over all of them."""

    def __init__(self, model: ClassConditionalModel, images: int) -> None:
        self.keys: dict[int, list[Tensor]] = {}
        self.values: dict[int, list[Tensor]] = {}
        geometry, scales = model.geometry, len(model.geometry.schedule)
        self.images = images
        self.sizes = geometry.schedule.tokens
        self.mass = np.zeros((geometry.layers, geometry.heads, scales, scales))

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.keys.setdefault(layer, []).append(k)
        self.values.setdefault(layer, []).append(v)
        target = len(self.keys[layer]) - 1
        shares = (q @ torch.cat(self.keys[layer], dim=2).transpose(2, 3)).softmax(-1)
        for source, part in enumerate(shares[: self.images].split(list(self.sizes[: target + 1]), dim=-1)):
            self.mass[layer, :, target, source] += part.sum(-1).mean(-1).sum(0).double().numpy()
        return shares @ torch.cat(self.values[layer], dim=2)


def test_calibration_equals_a_dense_oracle(emoji: ClassConditionalModel) -> None:
    measured = calibrate(emoji, 3, seed=5, batch=2)
    oracle = DenseMass(emoji, 3)
    sampler = CommonRandomSampler(5, range(3), emoji.sampling)
    cache = MeasuringCache(emoji.plan(), 6, 3)
    drawn = run_scales(emoji, emoji.labels(3), cache, sampler, emoji.sampling, decode=False)
    run_scales(emoji, emoji.labels(3), oracle, RecordedTokens(drawn.tokens), emoji.sampling, decode=False)
    np.testing.assert_allclose(measured.mass, oracle.mass / 3, atol=2e-5)
    assert measured.provenance.samples == ("5:0:0", "5:1:1", "5:2:2")
    assert measured.provenance.fingerprint == emoji.fingerprint


def test_shards_merge_to_one_run(emoji: ClassConditionalModel) -> None:
    whole = calibrate(emoji, 4, seed=1, batch=2)
    parts = calibrate(emoji, 2, seed=1, batch=2).merge(calibrate(emoji, 2, seed=1, first_sample=2, batch=2))
    np.testing.assert_allclose(parts.mass_sum, whole.mass_sum, rtol=1e-12)
    np.testing.assert_allclose(parts.spread, whole.spread, rtol=1e-6, atol=1e-9)
    assert parts.provenance.samples == whole.provenance.samples


def test_measuring_does_not_change_the_drawing(emoji: ClassConditionalModel) -> None:
    from heatkv.generation import Generator

    cache = MeasuringCache(emoji.plan(), 4, 2)
    sampler = CommonRandomSampler(3, range(2), emoji.sampling)
    measured = run_scales(emoji, [4, 9], cache, sampler, emoji.sampling)
    plain = Generator(emoji, cache.plan, 2).draw([4, 9], seed=3)
    assert all(torch.equal(a, b) for a, b in zip(measured.tokens, plain.tokens, strict=True))


def test_a_reset_starts_the_sums_anew(emoji: ClassConditionalModel) -> None:
    cache, sums = MeasuringCache(emoji.plan(), 4, 2), []
    for _ in range(2):
        cache.reset()
        sampler = CommonRandomSampler(3, range(2), emoji.sampling)
        run_scales(emoji, [4, 9], cache, sampler, emoji.sampling, decode=False)
        sums.append((cache.mass_sum.copy(), cache.mass_square_sum.copy()))
    for first, second in zip(*sums, strict=True):
        assert np.array_equal(first, second)
        assert first.any()


def test_only_the_full_cache_can_be_measured(emoji: ClassConditionalModel) -> None:
    with pytest.raises(PlanError, match="'streaming' drops cells"):
        MeasuringCache(emoji.plan("streaming", "50%"), 4, 2)
    for images in (0, 5):
        with pytest.raises(PlanError, match=f"{images} images cannot be measured in 4 rows"):
            MeasuringCache(emoji.plan(), 4, images)


def test_masses_are_not_rounded_by_autocast() -> None:
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(1, 2, 5, 8, generator=generator)
    keys = [torch.randn(1, 2, size, 8, generator=generator) for size in (3, 4)]
    plain = read_sources(q, keys).mass
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(read_sources(q, keys).mass, plain)


def test_no_sample_is_refused(emoji: ClassConditionalModel) -> None:
    with pytest.raises(StatisticsError, match="at least 1"):
        calibrate(emoji, 0)


def test_ranking_agreement_of_equal_and_reversed_statistics() -> None:
    schedule = ScaleSchedule.square([1, 2, 3, 4])
    lower = np.tril(np.ones((4, 4)))
    noise = np.random.default_rng(0).random((2, 3, 4, 4)) * lower
    noise -= noise.sum(-1, keepdims=True) / lower.sum(-1)[:, None] * lower

    def of(mass: NDArray[np.float64]) -> Statistics:
        return Statistics(schedule, mass, mass**2, Provenance("model", "weights", 0.0, {}, ("0:0:0",)))

    flat = np.broadcast_to(lower / lower.sum(-1, keepdims=True), noise.shape)
    one, reversed_ = of(flat + 0.2 * noise), of(flat - 0.2 * noise)
    assert ranking_agreement(one, one) == pytest.approx([1, 1, 1])
    assert ranking_agreement(one, reversed_) == pytest.approx([-1, -1, -1])
