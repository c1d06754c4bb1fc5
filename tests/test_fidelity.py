"""Fidelity against scipy, by hand and against the full cache itself; measures that need weights with stand-ins."""

from __future__ import annotations

import socket
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from support.rows import row

from heatkv.core.budget import Budget
from heatkv.errors import HeatKVError
from heatkv.models.class_conditional import ClassConditionalModel
from heatkv.policies.base import make_policy
from heatkv.profiling.measure import perceptual
from heatkv.profiling.measure.fidelity import (
    Compared,
    FidelityBench,
    kl_divergence,
    load_compared,
    paired_difference,
    psnr,
    save_compared,
    spread,
    ssim,
)
from heatkv.profiling.measure.perceptual import FID_LEAST_PICTURES, fid, open_lpips, why_no_fid
from heatkv.profiling.measure.runner import with_versus
from heatkv.profiling.measure.subjects import Subject, plan_subjects


def test_kl_equals_scipy() -> None:
    generator = torch.Generator().manual_seed(0)
    p, q = torch.randn(2, 3, 7, generator=generator) * 4, torch.randn(2, 3, 7, generator=generator) * 4
    expected = stats.entropy(p.double().softmax(-1).numpy(), q.double().softmax(-1).numpy(), axis=-1)
    np.testing.assert_allclose(kl_divergence(p, q).numpy(), expected, rtol=1e-6)
    assert (kl_divergence(p, p) == 0).all()
    assert not np.allclose(kl_divergence(q, p).numpy(), expected)


def test_psnr_of_known_errors() -> None:
    black = torch.zeros(3, 3, 8, 8)
    off = black.clone()
    off[1] += 51 / 255  # a fifth of the range everywhere: -10 log10(0.04) dB
    off[2, :, 0, 0] = 1.0  # one pixel of 64 wrong by the whole range: 10 log10(64) dB
    assert psnr(off, black) == pytest.approx([58.92, 13.979, 18.062], abs=1e-2)


def test_ssim_is_one_for_equal_pictures_only() -> None:
    picture = torch.rand(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    assert ssim(picture, picture) == pytest.approx([1, 1])
    values = ssim(picture.flip(3), picture)
    assert values is not None
    assert (values < 0.5).all()


# ------------------------------------------------------------------------------------------------ paired differences


@pytest.mark.parametrize("draw", ["normal", "gamma", "mixture"])
@pytest.mark.parametrize("count", [2, 3, 4, 8, 16, 32])
def test_coverage_of_paired_intervals(count: int, draw: str) -> None:
    """They hold the true difference as often as they say, whatever the number of images, or little less."""
    rng, shape = np.random.default_rng(count), (1500, count)
    ours, theirs = {
        "normal": lambda: (rng.normal(1.3, 0.1, shape), rng.normal(1, 0.3, shape)),
        "gamma": lambda: (rng.gamma(2, 0.2, shape), rng.gamma(2, 0.05, shape)),
        "mixture": lambda: (rng.normal(1, 0.1, shape) + 0.3 * (rng.random(shape) < 0.3), rng.normal(1, 0.1, shape)),
    }[draw]()
    true = {"normal": 0.3, "gamma": 0.3, "mixture": 0.09}[draw]
    found = [paired_difference(one, other) for one, other in zip(ours, theirs, strict=True)]
    held = float(np.mean([one.low <= true <= one.high for one in found]))
    assert 0.9 < held < 0.985
    one = found[0]
    interval = stats.ttest_rel(ours[0], theirs[0]).confidence_interval(0.95)
    assert (one.low, one.high) == pytest.approx((interval.low, interval.high), rel=1e-9)


def test_what_samples_have_in_common_cancels() -> None:
    hard = np.random.default_rng(0).gamma(1, 1, 12)  # some images are hard under every policy
    got = paired_difference(hard + 0.01, hard)
    assert (got.mean, got.low, got.high) == pytest.approx((0.01, 0.01, 0.01))
    for ours, theirs in (([1.0, 2.0], [1.0]), ([], []), ([2.0], [1.5]), ([[1.0]], [[1.0]])):
        with pytest.raises(HeatKVError, match="are not of the same two samples"):
            paired_difference(np.array(ours), np.array(theirs))


def test_spread_by_hand() -> None:
    found = spread(np.array([1.0, 2.0, 3.0, 6.0]))
    assert (found.sd, found.quartiles) == (pytest.approx(stats.tstd([1, 2, 3, 6])), (1.75, 2.5, 3.75))
    assert spread(np.array([2.0])).sd is None


def differences(*rows: tuple[str, str, list[float] | None, int]) -> list[tuple[str, float] | None]:
    """By (policy, budget, KL of images, seed), whom each row is compared with and the difference."""
    made = [
        row(policy=policy, budget=budget, kl_of_images=kl, images=len(kl or ()), seed=seed)
        for policy, budget, kl, seed in rows
    ]
    found = [row.versus for row in with_versus(made)]
    return [None if versus is None else (versus.policy, versus.difference) for versus in found]


def test_every_policy_is_compared_with_heatkv_at_its_place() -> None:
    assert differences(
        ("full", "100%", [0, 0], 0), ("streaming", "30%", [2, 4], 0), ("heatkv", "30%", [1, 2], 0),
        ("streaming", "10%", [5, 5], 0), ("heatkv", "10%", [6, 6], 0), ("streaming", "5%", [1, 1], 0),
        ("random", "10%", None, 0), ("heatkv", "10%", [1, 1], 1), ("streaming", "10%", [4, 4], 1),
    ) == [None, ("heatkv", 1.5), None, ("heatkv", -1), None, None, None, None, ("heatkv", 3)]  # fmt: skip
    # without heatkv the first policy named stands in; without figures, or of one image alone, nothing does
    assert differences(("h2o", "30%", [2, 2], 0), ("snapkv", "30%", [3, 3], 0)) == [None, ("h2o", 1)]
    assert differences(("h2o", "30%", [2], 0), ("snapkv", "30%", [3], 0)) == [None, None]
    assert differences(("full", "100%", None, 0), ("h2o", "30%", None, 0)) == [None, None]


# -------------------------------------------------------------------------------------------------------- the bench


@pytest.fixture(scope="module")
def bench(emoji: ClassConditionalModel) -> FidelityBench:
    return FidelityBench(emoji, images=3, pictures=2, seed=0, settings=emoji.sampling, batch=2)


@pytest.fixture(scope="module")
def subjects(emoji: ClassConditionalModel) -> list[Subject]:
    return plan_subjects(
        emoji,
        [make_policy("sliding-window"), make_policy("random")],
        [Budget.parse("10%")],
        statistics=None,
        rows=2,
        storage="float32",
        draws=2,
    )


@pytest.fixture(scope="module")
def compared(bench: FidelityBench, subjects: list[Subject]) -> list[list[Compared]]:
    """Every plan of every subject, compared once."""
    return [bench.compare(subject) for subject in subjects]


def test_the_full_cache_is_the_full_cache(bench: FidelityBench, compared: list[list[Compared]]) -> None:
    plans = compared[0]
    figures = bench.figures(plans)
    assert (figures.kl, figures.top1_agreement, figures.images, figures.pictures) == (0, 1, 3, 2)
    assert figures.ssim == pytest.approx(1)
    originals = torch.cat([bench.reference(index)[0].images for index in range(2)])[:2]  # type: ignore[misc]
    assert plans[0].pictures_P3HW is not None
    assert torch.equal(plans[0].pictures_P3HW, originals)


def test_figures_sum_up_those_of_images(bench: FidelityBench, compared: list[list[Compared]]) -> None:
    sizes = bench.model.geometry.schedule.tokens
    full = bench.figures(compared[0])
    for place in (1, 2):
        figures = bench.figures(compared[place])
        assert (figures.kl or 0) > 0.001
        assert len(figures.kl_of_images or ()) == len(figures.top1_of_images or ()) == 3
        assert len(figures.psnr_of_pictures or ()) == len(figures.ssim_of_pictures or ()) == 2
        assert np.mean(figures.kl_of_images or ()) == pytest.approx(figures.kl)
        assert np.mean(figures.top1_of_images or ()) == pytest.approx(figures.top1_agreement)
        assert np.mean(figures.psnr_of_pictures or ()) == pytest.approx(figures.psnr_db)
        assert np.dot(figures.kl_per_scale or (), sizes) / sum(sizes) == pytest.approx(figures.kl)
        assert np.dot(figures.top1_per_scale or (), sizes) / sum(sizes) == pytest.approx(figures.top1_agreement)
        assert 0 < (figures.top1_agreement or 0) < 1
        assert (figures.psnr_db or 0) < (full.psnr_db or 0)
        # the first scale sees no cache, so nothing can differ there
        assert ((figures.kl_per_scale or ())[0], (figures.top1_per_scale or ())[0]) == (0, 1)
        assert set(figures.spread or ()) == {"kl", "top1_agreement", "psnr_db", "ssim"}
        assert figures.lpips is figures.fid is figures.lpips_of_pictures is None
        assert set(figures.not_measured or ()) == {"lpips", "fid"}
        draws = [float(plan.kl_of_images().mean()) for plan in compared[place]]
        assert (len(set(draws)), figures.kl_of_draws) == (place, tuple(draws))


def test_batches_can_be_kept_and_joined(
    emoji: ClassConditionalModel, subjects: list[Subject], compared: list[list[Compared]], tmp_path: Path
) -> None:
    """Batch by batch, without all references at once, and through files: the same, but for pictures in 8 bits."""
    held = FidelityBench(emoji, images=3, pictures=2, seed=0, settings=emoji.sampling, batch=2, hold=False)
    parts = []
    for index in range(2):
        save_compared(tmp_path / f"{index}.safetensors", held.compare_plans(subjects[2], index), 2)
        parts.append(load_compared(tmp_path / f"{index}.safetensors"))
    joined = [Compared.join(of_plan) for of_plan in zip(*parts, strict=True)]
    assert held.figures(joined) == held.figures(compared[2])
    for one, other in zip(joined, compared[2], strict=True):
        assert one.pictures_P3HW is not None
        assert other.pictures_P3HW is not None
        torch.testing.assert_close(one.pictures_P3HW, other.pictures_P3HW, atol=0.5 / 255 + 1e-6, rtol=0)


# ------------------------------------------------------------------------------------------- what needs weights


def test_what_is_lacking_is_told_and_not_fetched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("it asks the network"))
    monkeypatch.setattr(perceptual.importlib.util, "find_spec", lambda name: None)
    assert "torchmetrics and torchvision not installed" in str(open_lpips())
    assert "torchmetrics and torch_fidelity not installed" in str(why_no_fid(FID_LEAST_PICTURES))
    assert why_no_fid(FID_LEAST_PICTURES - 1) == "2047 pictures are fewer than the 2048 that FID needs"
    monkeypatch.setattr(perceptual.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    inception = tmp_path / "checkpoints" / perceptual.INCEPTION_FILE
    assert why_no_fid(FID_LEAST_PICTURES) == f"Inception's weights are not at {inception}"


def stand_in(monkeypatch: pytest.MonkeyPatch, name: str, **contents: Any) -> None:
    module = ModuleType(name)
    vars(module).update(contents)
    monkeypatch.setitem(sys.modules, name, module)


def test_with_weights_every_picture_is_compared(
    emoji: ClassConditionalModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Networks are stood in for; what is handed to them, and that they are not asked without weights, is ours."""
    (tmp_path / "checkpoints").mkdir()
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(perceptual.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(perceptual, "FID_LEAST_PICTURES", 2)

    class Distance:
        def __init__(self, **given: Any) -> None:
            assert given == {"normalize": True, "feature_extractor_weights_path": str(inception)}
            self.sums = {True: 0.0, False: 0.0}

        def update(self, pictures: torch.Tensor, real: bool) -> None:
            self.sums[real] += float(pictures.double().sum())

        def compute(self) -> torch.Tensor:
            return torch.tensor(self.sums[False] - self.sums[True])

    def similarity(**given: Any) -> Any:
        assert given == {"net_type": "alex", "normalize": True}
        return lambda one, other: (one - other).abs().mean()

    inception = tmp_path / "checkpoints" / perceptual.INCEPTION_FILE
    weights = tmp_path / "checkpoints" / perceptual.ALEXNET_FILE
    stand_in(monkeypatch, "torchmetrics.image.lpip", LearnedPerceptualImagePatchSimilarity=similarity)
    stand_in(monkeypatch, "torchmetrics.image.fid", FrechetInceptionDistance=Distance)
    assert open_lpips() == f"AlexNet's weights are not at {weights}"
    weights.touch()
    inception.touch()
    pictures, reference = torch.rand(3, 3, 4, 4), torch.rand(3, 3, 4, 4)
    measured = open_lpips()
    assert not isinstance(measured, str)
    np.testing.assert_allclose(measured(pictures, reference), (pictures - reference).abs().mean((1, 2, 3)), rtol=1e-6)
    assert fid(pictures, reference, batch=2) == pytest.approx(float(pictures.sum() - reference.sum()), rel=1e-4)
    bench = FidelityBench(emoji, images=2, pictures=2, seed=0, settings=emoji.sampling)
    (full,) = plan_subjects(emoji, [], [], statistics=None, rows=2, storage="float32")
    figures = bench.measure(full)
    assert (figures.lpips, figures.lpips_of_pictures, figures.fid, figures.not_measured) == (0, (0, 0), 0, {})
