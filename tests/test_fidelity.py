"""Spread, paired intervals, and measures that need weights: against scipy, by hand, and with stand-ins for networks."""

from __future__ import annotations

import importlib.util
import json
import socket
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from heatkv.cli import run
from heatkv.core.budget import Budget
from heatkv.errors import HeatKVError
from heatkv.models.class_conditional import ClassConditionalModel
from heatkv.profiling.measure import perceptual
from heatkv.profiling.measure.fidelity import FidelityBench, paired_bootstrap, spread
from heatkv.profiling.measure.perceptual import FID_LEAST_PICTURES, fid, open_lpips, why_no_fid
from heatkv.profiling.measure.runner import bytes_row, fidelity_row, plan_subjects, versus
from heatkv.profiling.report.tables import results_table


def test_the_paired_interval_is_scipys() -> None:
    rng = np.random.default_rng(3)
    ours, theirs = rng.gamma(2, 0.1, 20), rng.gamma(2, 0.1, 20)
    got = paired_bootstrap(ours, theirs)
    expected = stats.bootstrap(
        (ours, theirs), lambda a, b, axis: (a - b).mean(axis=axis), paired=True, vectorized=True, method="percentile",
        n_resamples=20_000, rng=np.random.default_rng(5),
    ).confidence_interval  # fmt: skip
    width = expected.high - expected.low
    assert got.mean == pytest.approx((ours - theirs).mean())
    assert got.low == pytest.approx(expected.low, abs=width / 50)
    assert got.high == pytest.approx(expected.high, abs=width / 50)
    assert got == paired_bootstrap(list(ours), list(theirs))  # the same every time
    assert (got.samples, got.confidence) == (20, 0.95)
    narrow = paired_bootstrap(ours, theirs, confidence=0.5)
    assert got.low < narrow.low < narrow.high < got.high


def test_what_samples_have_in_common_cancels() -> None:
    hard = np.random.default_rng(0).gamma(1, 1, 12)  # some images are hard under every policy
    got = paired_bootstrap(hard + 0.01, hard)
    assert (got.mean, got.low, got.high) == pytest.approx((0.01, 0.01, 0.01))
    for one, other in (([1.0], [1.0, 2.0]), ([], []), ([[1.0]], [[1.0]])):
        with pytest.raises(HeatKVError, match="are not of the same samples"):
            paired_bootstrap(np.array(one), np.array(other))


def test_spread_by_hand() -> None:
    assert spread(np.array([1.0, 2.0, 3.0, 6.0])) == {
        "sd": pytest.approx(stats.tstd([1, 2, 3, 6])), "quartiles": [1.75, 2.5, 3.75],
    }  # fmt: skip
    assert spread(np.array([2.0])) == {"sd": None, "quartiles": [2, 2, 2]}


def row(policy: str, budget: str, kl: list[float] | None) -> dict[str, Any]:
    return {"policy": policy, "budget": budget, "kl_of_images": kl}


def test_every_policy_is_compared_with_heatkv_at_its_budget() -> None:
    rows = [
        row("full", "100%", [0, 0]), row("streaming", "30%", [2, 4]), row("heatkv", "30%", [1, 2]),
        row("streaming", "10%", [5, 5]), row("heatkv", "10%", [6, 6]), row("streaming", "5%", [1, 1]),
        row("random", "10%", None),
    ]  # fmt: skip
    told = versus(rows)
    assert [None if one is None else (one["policy"], one["difference"]) for one in told] == [
        None, ("heatkv", 1.5), None, ("heatkv", -1), None, None, None,
    ]  # fmt: skip
    assert told[1] is not None
    assert told[1]["interval"] == [1, 2]
    # without heatkv the first policy named stands in; without figures nothing does
    told = versus([row("full", "100%", [0, 0]), row("h2o", "30%", [2, 4]), row("snapkv", "30%", [3, 5])])
    assert [one and one["policy"] for one in told] == [None, None, "h2o"]
    assert versus([row("full", "100%", None), row("h2o", "30%", None)]) == [None, None]
    # each seed by itself
    seeds = [row(policy, "30%", [kl]) | {"seed": seed} for policy, kl, seed in (
        ("heatkv", 1.0, 0), ("h2o", 2.0, 0), ("heatkv", 5.0, 1), ("h2o", 9.0, 1),
    )]  # fmt: skip
    assert [one and one["difference"] for one in versus(seeds)] == [None, 1, None, 4]


def test_a_row_keeps_what_single_images_gave(emoji: ClassConditionalModel) -> None:
    bench = FidelityBench(emoji, images=3, pictures=2, seed=0, settings=emoji.sampling, batch=2)
    subjects = plan_subjects(
        emoji, ["random", "streaming"], [Budget.parse("20%")], statistics=None, rows=2, storage="float32", draws=2
    )
    rows = []
    for subject in subjects:
        figures, _ = fidelity_row(bench, subject)
        rows.append(bytes_row(emoji, subject, 2) | figures)
    sizes = emoji.geometry.schedule.tokens
    for figures in rows:
        assert len(figures["kl_of_images"]) == len(figures["top1_of_images"]) == 3
        assert len(figures["psnr_of_pictures"]) == len(figures["ssim_of_pictures"]) == 2
        assert np.mean(figures["kl_of_images"]) == pytest.approx(figures["kl"])
        assert np.mean(figures["top1_of_images"]) == pytest.approx(figures["top1_agreement"])
        assert np.dot(figures["top1_per_scale"], sizes) / sum(sizes) == pytest.approx(figures["top1_agreement"])
        assert np.mean(figures["psnr_of_pictures"]) == pytest.approx(figures["psnr_db"])
        assert set(figures["spread"]) == {"kl", "top1_agreement", "psnr_db", "ssim"}
        assert figures["lpips"] is figures["fid"] is figures["lpips_of_pictures"] is None
        assert set(figures["not_measured"]) == {"lpips", "fid"}
    random = rows[1]
    assert random["draws"] == len(random["kl_of_draws"]) == 2
    assert len(set(random["kl_of_draws"])) == 2
    # the first scale sees no cache
    assert rows[2]["top1_per_scale"][0] == 1
    rows = [one | {"versus": difference} for one, difference in zip(rows, versus(rows), strict=True)]
    table = results_table(rows, "t")
    (column,) = [column for column in table.columns if str(column.header) == "KL - random's [95%]"]
    difference = rows[2]["kl"] - rows[1]["kl"]
    assert [str(cell)[:7] for cell in column._cells] == ["-", "-", f"{difference:+.4f}"]


def test_what_is_lacking_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setattr(perceptual.importlib.util, "find_spec", lambda name: None)
    assert open_lpips() == "torchmetrics and torchvision not installed (pip install heatkv[metrics])"
    assert (
        why_no_fid(FID_LEAST_PICTURES) == "torchmetrics and torch_fidelity not installed (pip install heatkv[metrics])"
    )
    few = torch.zeros(FID_LEAST_PICTURES - 1, 3, 1, 1)
    assert fid(few, few) == "2047 pictures are fewer than the 2048 that FID needs (--images, --pictures)"
    monkeypatch.setattr(perceptual.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    assert (
        why_no_fid(FID_LEAST_PICTURES)
        == f"Inception's weights are not at {perceptual._checkpoints()}/{perceptual.INCEPTION_FILE}"
    )


def test_doctor_tells_of_weights_and_opens_no_network(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Reasons without packages and without files, and the files once they are there; nothing is read or downloaded."""
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("it asks the network"))

    def told() -> tuple[str, str]:
        assert run(["doctor", "--json"]) == 0
        facts = json.loads(capsys.readouterr().out)
        return facts["LPIPS"], facts["FID"]

    found = importlib.util.find_spec
    packages = ("torchmetrics", "torchvision", "torch_fidelity")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in packages else found(name))
    assert told() == (
        "no: torchmetrics and torchvision not installed (pip install heatkv[metrics])",
        "no: torchmetrics and torch_fidelity not installed (pip install heatkv[metrics])",
    )
    monkeypatch.setattr(perceptual, "_lacking", lambda *packages: None)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    weights = SimpleNamespace(DEFAULT=SimpleNamespace(url="https://download.example/alexnet.pth"))
    stand_in(monkeypatch, "torchvision")
    stand_in(monkeypatch, "torchvision.models", AlexNet_Weights=weights)
    files = [tmp_path / "checkpoints" / name for name in ("alexnet.pth", perceptual.INCEPTION_FILE)]
    assert told() == (f"no: AlexNet's weights are not at {files[0]}", f"no: Inception's weights are not at {files[1]}")
    files[0].parent.mkdir()
    for file in files:
        file.write_bytes(b"no weights at all")
    assert told() == (f"yes, with the weights at {files[0]}", f"yes, with the weights at {files[1]}")


def stand_in(monkeypatch: pytest.MonkeyPatch, name: str, **contents: Any) -> None:
    module = ModuleType(name)
    vars(module).update(contents)
    monkeypatch.setitem(sys.modules, name, module)


def test_with_weights_every_picture_is_compared(
    emoji: ClassConditionalModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
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
    url = "https://download.example/models/alexnet-owt-7be5be79.pth"
    stand_in(monkeypatch, "torchvision")
    stand_in(monkeypatch, "torchvision.models", AlexNet_Weights=SimpleNamespace(DEFAULT=SimpleNamespace(url=url)))
    stand_in(monkeypatch, "torchmetrics.image.lpip", LearnedPerceptualImagePatchSimilarity=similarity)
    stand_in(monkeypatch, "torchmetrics.image.fid", FrechetInceptionDistance=Distance)
    weights = tmp_path / "checkpoints" / "alexnet-owt-7be5be79.pth"
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
    figures, _ = fidelity_row(bench, full)
    assert (figures["lpips"], figures["lpips_of_pictures"], figures["fid"]) == (0, [0, 0], 0)
    assert figures["not_measured"] == {}
