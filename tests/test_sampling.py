"""Random numbers that policies share, guidance, and bits drawn by themselves."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from support.public_sampler import PublicSampler

from heatkv.errors import ModelError
from heatkv.models.sampling import (
    BitSamplingSettings,
    CommonRandomSampler,
    RecordedTokens,
    SamplingSettings,
    noise_seed,
)

PLAIN = SamplingSettings(cfg=0)
BOTH = torch.tensor([[[2.0, 0.0]], [[1.0, 4.0]]])
"""Logits of a conditional row and its unconditional one."""


def test_noise_is_a_function_of_seed_sample_and_scale() -> None:
    logits = torch.zeros(3, 40, 50)
    alone = CommonRandomSampler(7, [5], PLAIN).choose(2, logits[:1])
    together = CommonRandomSampler(7, [4, 5, 6], PLAIN).choose(2, logits)
    assert torch.equal(together[1], alone[0])
    assert not torch.equal(together[0], together[1])
    for seed, sample, scale in ((8, 5, 2), (7, 6, 2), (7, 5, 3)):
        assert not torch.equal(CommonRandomSampler(seed, [sample], PLAIN).choose(scale, logits[:1]), alone)
    with pytest.raises(ModelError, match="2 images were drawn for 1 samples"):
        CommonRandomSampler(0, [0], PLAIN).choose(0, logits[:2])


def test_noise_seeds_do_not_collide() -> None:
    seeds = {noise_seed(seed, sample, scale) for seed in range(10) for sample in range(100) for scale in range(20)}
    assert len(seeds) == 10 * 100 * 20
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert noise_seed(-1, 0, 0) != noise_seed(1, 0, 0)


def test_draws_follow_the_softmax() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0])
    tokens = CommonRandomSampler(1, [0], PLAIN).choose(0, logits.expand(1, 20000, 4))
    counts = torch.bincount(tokens.flatten(), minlength=4).numpy()
    expected = np.asarray(logits.double().softmax(0)) * 20000
    assert stats.chisquare(counts, expected).pvalue > 1e-3


def test_what_is_cut_is_never_drawn() -> None:
    settings = SamplingSettings(cfg=0, top_k=3)
    logits = torch.randn(1, 500, 20, generator=torch.Generator().manual_seed(0))
    tokens = CommonRandomSampler(1, [0], settings).choose(0, logits)
    best = logits.topk(3, dim=-1).indices
    assert (tokens[..., None] == best).any(-1).all()
    assert (tokens[..., None] == best).float().mean((0, 1)).min() > 0.05  # and not only the best one


def test_bits_follow_their_probabilities_and_sure_ones_are_fixed() -> None:
    probabilities = torch.tensor([0.5, 0.8, 0.96, 0.98, 0.01])
    logits = torch.stack([(1 - probabilities).log(), probabilities.log()], dim=-1)
    logits = logits.expand(1, 4000, 5, 2).reshape(1, 20000, 2)
    settings = BitSamplingSettings(top_k=900, top_p=0.97)
    for sampler in (CommonRandomSampler(1, [0], settings), PublicSampler(torch.Generator().manual_seed(1), settings)):
        ones = sampler.choose(0, logits).view(4000, 5).sum(0).tolist()
        assert ones[3:] == [4000, 0]
        for count, p in zip(ones[:3], (0.5, 0.8, 0.96), strict=True):
            assert stats.binomtest(count, 4000, p).pvalue > 1e-3
    greedy = CommonRandomSampler(1, [0], BitSamplingSettings(top_k=1)).choose(0, logits).view(4000, 5)
    assert greedy[:, 1:].float().mean(0).tolist() == [1, 1, 1, 0]
    assert 0.45 < greedy[:, 0].float().mean() < 0.55  # an exact tie stays random


@pytest.mark.parametrize(("ramp", "strengths"), [(True, [0.0, 1.5, 3.0]), (False, [3.0, 3.0, 3.0])])
def test_guidance(ramp: bool, strengths: list[float]) -> None:
    settings = SamplingSettings(cfg=3.0, ramp=ramp)
    for scale, g in enumerate(strengths):
        assert settings.guide(BOTH, scale, 3).tolist() == [[[2 + g * (2 - 1), 0 + g * (0 - 4)]]]
    assert (settings.rows_per_image, PLAIN.rows_per_image) == (2, 1)
    assert torch.equal(PLAIN.guide(BOTH, 0, 3), BOTH)


def test_guidance_and_temperature_of_bits_per_scale() -> None:
    settings = BitSamplingSettings(cfg=(1.0, 3.0, 0.5), tau=(1.0, 0.5, 2.0))
    assert settings.rows_per_image == 2
    assert settings.guide(BOTH, 0, 3).tolist() == [[[2.0, 0.0]]]
    assert settings.guide(BOTH, 1, 3).tolist() == [[[3 * 4 - 2 * 2, 3 * 0 - 2 * 8]]]
    assert settings.guide(BOTH, 2, 3).tolist() == [[[0.5 * 1 + 0.5 * 0.5, 0.5 * 0 + 0.5 * 2]]]
    overflowed = BOTH * torch.tensor([1.0, math.inf])[:, None, None]
    assert settings.guide(overflowed.nan_to_num(nan=math.inf), 0, 3)[0, 0, 0] == 2.0
    with pytest.raises(ModelError, match="cfg has 3 values for 4 scales"):
        settings.guide(BOTH, 0, 4)
    alone = BitSamplingSettings(cfg=1, tau=0.5)
    assert alone.rows_per_image == 1
    assert alone.guide(BOTH[:1], 0, 3).tolist() == [[[4.0, 0.0]]]


BAD: list[dict[str, Any]] = [
    {"cfg": -1.0}, {"cfg": math.nan}, {"top_k": -1}, {"top_p": 1.5},
    {"cfg": (1.0, math.nan)}, {"tau": 0.0}, {"tau": (1.0, -1.0)},
]  # fmt: skip


@pytest.mark.parametrize("options", BAD, ids=str)
def test_bad_settings_are_refused(options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(ModelError, match=name):
        BitSamplingSettings(**options)


def test_recorded_tokens_are_played_back() -> None:
    tokens = [torch.tensor([[1]]), torch.tensor([[2, 3]])]
    assert torch.equal(RecordedTokens(tokens).choose(1, torch.zeros(1, 2, 5)), tokens[1])
