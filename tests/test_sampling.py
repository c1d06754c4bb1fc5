"""Random numbers that policies share, and guidance."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from heatkv.errors import ModelError
from heatkv.models.sampling import CommonRandomSampler, RecordedTokens, SamplingSettings, noise_seed

PLAIN = SamplingSettings(cfg=0)


def test_noise_is_a_function_of_seed_sample_and_scale() -> None:
    logits = torch.zeros(3, 40, 50)
    alone = CommonRandomSampler(7, [5], PLAIN).choose(2, logits[:1])
    together = CommonRandomSampler(7, [4, 5, 6], PLAIN).choose(2, logits)
    assert torch.equal(together[1], alone[0])
    assert not torch.equal(together[0], together[1])
    for seed, sample, scale in ((8, 5, 2), (7, 6, 2), (7, 5, 3)):
        assert not torch.equal(CommonRandomSampler(seed, [sample], PLAIN).choose(scale, logits[:1]), alone)


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


@pytest.mark.parametrize(("ramp", "strengths"), [(True, [0.0, 1.5, 3.0]), (False, [3.0, 3.0, 3.0])])
def test_guidance(ramp: bool, strengths: list[float]) -> None:
    settings = SamplingSettings(cfg=3.0, ramp=ramp)
    conditional, unconditional = torch.tensor([[[2.0, 0.0]]]), torch.tensor([[[1.0, 4.0]]])
    for scale, g in enumerate(strengths):
        guided = settings.guide(torch.cat([conditional, unconditional]), scale, 3)
        assert guided.tolist() == [[[2 + g * (2 - 1), 0 + g * (0 - 4)]]]


def test_without_guidance_there_is_one_row_per_image() -> None:
    assert PLAIN.rows_per_image == 1
    logits = torch.randn(2, 3, 4)
    assert torch.equal(PLAIN.guide(logits, 0, 3), logits)


@pytest.mark.parametrize("options", [{"cfg": -1.0}, {"cfg": float("nan")}, {"top_k": -1}, {"top_p": 1.5}])
def test_bad_settings_are_refused(options: dict[str, float]) -> None:
    (name,) = options
    with pytest.raises(ModelError, match=name):
        SamplingSettings(**options)  # type: ignore[arg-type]


def test_recorded_tokens_are_played_back() -> None:
    tokens = [torch.tensor([[1]]), torch.tensor([[2, 3]])]
    assert torch.equal(RecordedTokens(tokens).choose(1, torch.zeros(1, 2, 5)), tokens[1])


def test_a_wrong_number_of_samples_is_refused() -> None:
    with pytest.raises(ModelError, match="2 images were drawn for 1 samples"):
        CommonRandomSampler(0, [0], PLAIN).choose(0, torch.zeros(2, 1, 4))
