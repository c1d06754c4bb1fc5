"""Attention mass, drop errors and the measuring of them on a model, against dense softmax."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from support.tiny_models import features, make_infinity
from torch import Tensor, nn

from heatkv.calibration import measure as calibration
from heatkv.calibration.measure import (
    MeasuringCache,
    calibrate,
    concentration,
    ranking_agreement,
    read_sources,
    similarity,
)
from heatkv.core.schedule import ScaleSchedule
from heatkv.core.statistics import Provenance, Statistics
from heatkv.errors import PlanError, StatisticsError
from heatkv.generation.loop import run_scales
from heatkv.models.base import ImageModel
from heatkv.models.class_conditional import ClassConditionalModel
from heatkv.models.sampling import CommonRandomSampler, RecordedTokens
from heatkv.models.text_conditional import Prompt


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
    np.testing.assert_allclose(parts.all_mass, whole.all_mass, rtol=1e-12)
    np.testing.assert_allclose(parts.drop_error, whole.drop_error, rtol=1e-12)
    assert parts.provenance.samples == whole.provenance.samples


def test_measuring_does_not_change_the_drawing(emoji: ClassConditionalModel) -> None:
    from heatkv.generation.loop import Generator

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
        sums.append([array.copy() for array in cache.sums().values()])
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


# ---------------------------------------------------------------------- drop errors


def dense_errors(
    q: Tensor, keys: list[Tensor], values: list[Tensor], weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Mass (R, H, S) and |W_o^h (o - o without source s)|^2 (R, H, S), summed over queries, in float64.

    The output without a source is attention anew, with that source's logits at minus infinity.
    """
    logits = q.double() @ torch.cat(keys, dim=2).double().transpose(2, 3)
    v = torch.cat(values, dim=2).double()
    full = logits.softmax(-1)
    masses, errors, first = [], [], 0
    for k in keys:
        part = slice(first, first := first + k.shape[2])
        masses.append(full[..., part].sum((2, 3)))
        if k is keys[-1]:  # the running scale is never dropped
            errors.append(torch.zeros_like(masses[-1]))
            continue
        without = logits.clone()
        without[..., part] = -torch.inf
        change = full @ v - without.softmax(-1) @ v
        if weights is not None:
            change = change @ weights.double().transpose(1, 2)
        errors.append(change.square().sum((2, 3)))
    return torch.stack(masses, dim=-1), torch.stack(errors, dim=-1)


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
    sharpness=st.sampled_from([0.1, 1.0, 10.0]),
)
def test_drop_errors_equal_attention_without_the_source(
    sizes: list[int], queries: int, block: int, sharpness: float
) -> None:
    """Whatever the blocks of queries."""
    q, keys, values, factor = random_reads(sizes, queries, sharpness)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibration, "MAX_BLOCK_NUMBERS", block)
        got = read_sources(q, keys, values, factor)
    mass, errors = dense_errors(q, keys, values, factor)
    assert got.drop_error is not None
    assert got.drop_error.dtype == torch.float64
    torch.testing.assert_close(got.mass, mass, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got.drop_error, errors, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("lead", [5.0, 15.0, 40.0, 90.0, 150.0, 300.0])
@pytest.mark.parametrize("winner", [0, 1, 2, 3])
def test_drop_errors_where_one_source_has_nearly_all_mass(winner: int, lead: float) -> None:
    """Its logits lead by so much that the others have e^-lead of the mass; what is left still is their attention."""
    q, keys, values, factor = random_reads([2, 3, 4, 5], 6, 1.0, dim=5)
    q[..., -1] = lead
    for source, k in enumerate(keys):
        k[..., -1] = 1.0 if source == winner else 0.0
    got = read_sources(q, keys, values, factor)
    mass, errors = dense_errors(q, keys, values, factor)
    if winner < 3:
        assert errors[..., winner].min() > 0.1
        assert mass[..., winner].min() / 6 > (0.9 if lead > 10 else 0.1)
    assert got.drop_error is not None
    torch.testing.assert_close(got.drop_error, errors, rtol=1e-3, atol=1e-9)


def test_drop_errors_are_not_rounded_by_autocast() -> None:
    q, keys, values, factor = random_reads([3, 4, 5], 6, 2.0)
    plain = read_sources(q, keys, values, factor).drop_error
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = read_sources(q, keys, values, factor).drop_error
    assert plain is not None
    assert rounded is not None
    assert torch.equal(rounded, plain)


class DenseErrors:
    """An oracle that keeps everything densely and takes x, the gate and W_o from the model's own modules; `attention`
    names the self-attention in every block."""

    def __init__(self, model: ImageModel[Any], blocks: list[nn.Module], attention: str, rows: int) -> None:
        geometry, scales = model.geometry, len(model.geometry.schedule)
        self.heads, self.blocks, self.attention = geometry.heads, blocks, attention
        self.keys: dict[int, list[Tensor]] = {}
        self.values: dict[int, list[Tensor]] = {}
        self.rows = rows
        shape = (rows, geometry.layers, geometry.heads, scales, scales)
        self.mass, self.error = np.zeros(shape), np.zeros(shape)
        self.x, self.gate = Tensor(), Tensor()

    @contextmanager
    def hooked(self) -> Iterator[None]:
        with ExitStack() as undo:
            for block in self.blocks:
                undo.callback(block.register_forward_pre_hook(self._see).remove)
            yield

    def _see(self, _: nn.Module, arguments: tuple[Any, ...]) -> None:
        self.x = arguments[0]
        told = arguments[1]  # VAR: (R, 6, 1, C); Infinity: the condition of all layers; the gate comes first in both
        self.gate = (told if isinstance(told, Tensor) else told.modulations[arguments[2]]).unbind(1)[0]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.keys.setdefault(layer, []).append(k)
        self.values.setdefault(layer, []).append(v)
        keys, values = self.keys[layer], self.values[layer]
        joined = getattr(self.blocks[layer], self.attention).proj.weight  # (C, heads in a row)
        weights = torch.stack(joined.chunk(self.heads, dim=1))
        mass, error = dense_errors(q, keys, values, weights)
        size = self.x.double().square().sum(2).mean(1)
        relative = error * (self.gate.double().square().mean((1, 2)) / size)[:, None, None]
        target = len(keys) - 1
        self.mass[:, layer, :, target, : target + 1] = (mass / q.shape[2]).numpy()
        self.error[:, layer, :, target, : target + 1] = relative.numpy()
        return (q @ torch.cat(keys, dim=2).transpose(2, 3)).softmax(-1) @ torch.cat(values, dim=2)


def measured_and_dense(
    model: ImageModel[Any], blocks: list[nn.Module], attention: str, images: int
) -> tuple[Statistics, DenseErrors]:
    """Both on the same drawn tokens."""
    measured = calibrate(model, images, seed=5, batch=2)
    rows = images * model.sampling.rows_per_image
    labels = model.labels(images)
    sampler = CommonRandomSampler(5, range(images), model.sampling)
    drawn = run_scales(model, labels, MeasuringCache(model.plan(), rows, images), sampler, model.sampling, decode=False)
    oracle = DenseErrors(model, blocks, attention, rows)
    with oracle.hooked():
        run_scales(model, labels, oracle, RecordedTokens(drawn.tokens), model.sampling, decode=False)
    return measured, oracle


def check_drop_errors(measured: Statistics, oracle: DenseErrors) -> None:
    np.testing.assert_allclose(measured.all_mass, oracle.mass.mean(0), atol=2e-5)
    expected = oracle.error.mean(0)
    scales = expected.shape[2]
    past = np.tril(np.ones((scales, scales), dtype=bool), -1)
    assert (measured.drop_error[:, :, ~past] == 0).all()
    assert (expected[:, :, past] > 0).all()
    # fp32 against float64: 0.5 % of every cell's own error, but for cells of less than a millionth of the largest
    np.testing.assert_allclose(measured.drop_error, expected, rtol=5e-3, atol=1e-6 * expected.max())


def test_drop_errors_of_the_embedded_model_equal_a_dense_oracle(emoji: ClassConditionalModel) -> None:
    check_drop_errors(*measured_and_dense(emoji, list(emoji.transformer.blocks), "attn", 2))


def test_drop_errors_of_infinity_equal_a_dense_oracle() -> None:
    model = make_infinity()
    examples = (Prompt(features(7)), Prompt(features(4), features(9)))
    model = dataclasses.replace(model, examples=examples)
    check_drop_errors(*measured_and_dense(model, list(model.transformer.blocks), "sa", 3))


def test_blocks_of_queries_do_not_change_what_is_measured(
    emoji: ClassConditionalModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = calibrate(emoji, 1, seed=1)
    monkeypatch.setattr(calibration, "MAX_BLOCK_NUMBERS", 20_000)
    blockwise = calibrate(emoji, 1, seed=1)
    np.testing.assert_allclose(blockwise.mass, whole.mass, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(blockwise.drop_error, whole.drop_error, rtol=1e-3, atol=1e-7 * whole.drop_error.max())


def test_errors_need_to_see_the_residual_stream(emoji: ClassConditionalModel) -> None:
    weights = [emoji.adapter.output_weight(layer) for layer in range(emoji.geometry.layers)]
    cache = MeasuringCache(emoji.plan(), 4, 2, output_weights=weights)
    sampler = CommonRandomSampler(3, range(2), emoji.sampling)
    with pytest.raises(PlanError, match=r"the residual stream was not told before attention; call see\(\)"):
        run_scales(emoji, [4, 9], cache, sampler, emoji.sampling, decode=False)


def test_without_weights_no_errors_are_measured(emoji: ClassConditionalModel) -> None:
    cache = MeasuringCache(emoji.plan(), 4, 2)
    run_scales(emoji, [4, 9], cache, CommonRandomSampler(3, range(2), emoji.sampling), emoji.sampling, decode=False)
    measured_names = {"mass_sum", "mass_square_sum", "all_mass_sum", "concentration_sum", "similarity_sum"}
    assert set(cache.sums()) == measured_names
    provenance = Provenance("emoji", emoji.fingerprint, None, {}, ("a", "b"))
    measured = Statistics(emoji.geometry.schedule, provenance=provenance, **cache.sums())
    assert measured.all_mass.any()
    with pytest.raises(StatisticsError, match="lack error_sum, which was not measured with them; calibrate again"):
        _ = measured.drop_error


def test_concentration_is_the_variance_of_what_keys_receive() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 3, 5, 4, generator=generator), torch.randn(2, 3, 11, 4, generator=generator)
    received = (q.double() @ k.double().mT).softmax(-1).mean(2).numpy()
    expected = received.var(axis=2) / received.mean(axis=2) ** 2
    np.testing.assert_allclose(concentration(q, k).numpy(), expected, rtol=1e-5)
    assert (concentration(torch.zeros(1, 1, 70, 4), k[:1, :1]) < 1e-6).all()  # all keys receive the same


def test_similarity_is_the_cosine_with_the_scale_before() -> None:
    generator = torch.Generator().manual_seed(1)
    before = torch.randn(2, 3, 4, 5, generator=generator)
    # every token of a 2x2 grid four times: away from the edges resizing gives the same again
    same = before.view(2, 3, 2, 2, 5).repeat_interleave(3, dim=2).repeat_interleave(3, dim=3).flatten(2, 3)
    alike = similarity(before, same, (1, 2, 2), (1, 6, 6))
    assert (alike > 0.8).all()
    np.testing.assert_allclose(similarity(before, -2 * before, (1, 2, 2), (1, 2, 2)).numpy(), -1, rtol=1e-6)
    np.testing.assert_allclose(similarity(before, before, (1, 2, 2), (1, 2, 2)).numpy(), 1, rtol=1e-6)


def test_calibration_measures_both(emoji: ClassConditionalModel) -> None:
    one, two = calibrate(emoji, 1), calibrate(emoji, 1, first_sample=1)
    together = one.merge(two)
    np.testing.assert_allclose(together.concentration, (one.concentration + two.concentration) / 2)
    np.testing.assert_allclose(together.similarity, calibrate(emoji, 2).similarity, atol=1e-5)
    assert (one.concentration[:, :, 1:] > 0).all()
    assert (np.abs(one.similarity[:, 1:]) <= 1).all()
    assert not one.similarity[:, 0].any()
