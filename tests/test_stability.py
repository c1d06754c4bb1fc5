"""How far halves of the calibration samples agree: known halves, counts by loops, and the report of the command."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from strategies import SEEDS, geometries, last_reads, statistics_of

from heatkv.calibration.measure import rank_correlation
from heatkv.cli import run
from heatkv.core.budget import Budget
from heatkv.core.geometry import CacheGeometry
from heatkv.core.schedule import ScaleSchedule
from heatkv.core.statistics import Provenance, Statistics, mean_over_targets
from heatkv.policies.base import PlanningProblem, make_policy
from heatkv.profiling.analysis.stability import (
    Agreement,
    PlanAgreement,
    batch_sizes,
    compare_halves,
    enough,
    growing_halves,
    overlap,
    verdict,
)
from heatkv.testing.material import made_up_mass

SQUARE = ScaleSchedule.square((1, 2, 3, 4, 5, 6))
POLICIES = [make_policy("heatkv", sink_scales=1), make_policy("heatkv-lp", sink_scales=1, value="error")]


@settings(max_examples=25)
@given(geometry=geometries(min_scales=4), seed=SEEDS, budget=st.sampled_from(["40%", "70%", "100%"]))
def test_identical_halves(geometry: CacheGeometry, seed: int, budget: str) -> None:
    half = statistics_of(geometry, made_up_mass(geometry, 2, seed))
    problem = PlanningProblem(geometry, Budget.parse(budget))
    if problem.share * geometry.schedule.cached_tokens < geometry.schedule.tokens[0]:
        return
    found = compare_halves(half, half, POLICIES, [problem])
    assert found.samples == 2
    assert found.error is not None
    for correlations in (found.scas, found.error):
        if geometry.layers * geometry.heads > 1:
            assert correlations == pytest.approx(np.ones(len(geometry.schedule) - 1))
        else:
            assert np.isnan(correlations).all()  # a single head has no rank
    assert [(plan.policy, plan.overlap, plan.loss) for plan in found.plans] == [("heatkv", 1, 0), ("heatkv-lp", 1, 0)]


def of(mass: NDArray[np.float64], error: NDArray[np.float64], schedule: ScaleSchedule = SQUARE) -> Statistics:
    where = Provenance("tiny", "0f", 0.0, {}, ("0:0:0",))
    return Statistics(schedule, mass, mass**2, where, all_mass_sum=mass, error_sum=error)


def test_reversed_rankings() -> None:
    lower = np.tril(np.ones((6, 6)))
    noise = np.random.default_rng(0).random((2, 3, 6, 6)) * lower
    noise -= noise.sum(-1, keepdims=True) / lower.sum(-1)[:, None] * lower
    flat = np.broadcast_to(lower / lower.sum(-1, keepdims=True), noise.shape)
    one = of(flat + 0.1 * noise, lower + noise)
    other = of(flat - 0.1 * noise, lower - noise)
    problem = PlanningProblem(CacheGeometry(2, 3, 4, SQUARE), Budget.parse("40%"))
    found = compare_halves(one, other, POLICIES, [problem])
    assert found.scas == pytest.approx(-np.ones(5))
    assert found.error == pytest.approx(-np.ones(5))
    assert all(plan.loss > 0.01 and plan.overlap < 0.8 for plan in found.plans)


def test_loss_and_overlap_of_two_heads() -> None:
    """Room for one of two heads: 3 or 1 on the one half, 1 or 2 on the other; so 2/3 and 1/2 are missed."""
    pair = ScaleSchedule.square((1, 1))
    mass = np.zeros((1, 2, 2, 2))
    mass[..., 0, 0] = 1
    mass[..., 1, :] = 0.5
    halves = []
    for errors in ([3, 1], [1, 2]):
        error = np.zeros((1, 2, 2, 2))
        error[0, :, 1, 0] = errors
        halves.append(of(mass, error, pair))
    problem = PlanningProblem(CacheGeometry(1, 2, 4, pair), Budget.parse("50%"))
    found = compare_halves(halves[0], halves[1], [make_policy("heatkv-lp", sink_scales=0, value="error")], [problem])
    assert found.error == pytest.approx([-1])
    assert np.isnan(found.scas).all()  # all heads alike: no ranking to agree on
    (plan,) = found.plans
    assert (plan.measure, plan.overlap, plan.loss) == ("drop error", 0, pytest.approx(7 / 12))
    assert found.to_json()["scas_rank_correlation"] == [None]


@given(geometry=geometries(min_scales=3), data=st.data())
def test_overlap_against_every_read(geometry: CacheGeometry, data: st.DataObject) -> None:
    tokens, sinks = geometry.schedule.tokens, data.draw(st.integers(0, len(geometry.schedule) - 1))
    plans = [data.draw(last_reads(geometry)) for _ in range(2)]
    reads = [
        {(*cell, t) for cell, last in np.ndenumerate(plan) for t in range(cell[2] + 1, last + 1) if cell[2] >= sinks}
        for plan in plans
    ]
    both, either = (sum(tokens[read[2]] for read in cells) for cells in (reads[0] & reads[1], reads[0] | reads[1]))
    assert overlap(plans[0], plans[1], tokens, sinks) == pytest.approx(both / either if either else 1)


@given(samples=st.integers(1, 200), largest=st.integers(1, 20))
def test_batch_sizes(samples: int, largest: int) -> None:
    sizes = batch_sizes(samples, largest)
    assert sum(sizes) == samples
    assert max(sizes) <= largest
    halves = [np.cumsum(sizes[i : samples // 2 * 2 : 2]).tolist() for i in (0, 1)]
    pairs = len(sizes) // 2
    assert halves[0][:pairs] == halves[1][:pairs]
    half = samples // 2
    for count in [c for c in (4, 8, 16, 32, 64) if c < half] + [half] * (half > 0):
        assert count in halves[0]


def test_growing_halves() -> None:
    geometry = CacheGeometry(1, 2, 4, SQUARE)
    mass, first, parts = made_up_mass(geometry, 27, 0), 0, []
    for size in batch_sizes(27, 16):
        parts.append(statistics_of(geometry, mass[first : first + size], first_sample=first))
        first += size
    halves = growing_halves(parts)
    assert [(one.count, other.count) for one, other in halves] == [(4, 4), (8, 8), (13, 13)]
    for one, other in halves:
        assert not set(one.provenance.samples) & set(other.provenance.samples)
    taken = [int(name.split(":")[1]) for name in halves[-1][0].provenance.samples]
    np.testing.assert_allclose(halves[-1][0].mass_sum, mass[taken].sum(axis=0))
    assert len(growing_halves(parts[:5])) == 2  # the fifth has no partner
    assert growing_halves(parts[:1]) == []


def test_rank_correlation() -> None:
    scores = np.arange(12.0).reshape(2, 2, 3)
    same = np.ones((2, 2, 3))
    assert rank_correlation(scores, scores**3) == pytest.approx([1, 1])
    assert np.isnan(rank_correlation(scores, same)).all()


def test_mean_over_later_targets() -> None:
    values = np.random.default_rng(0).random((2, 3, 4, 4))
    mean = mean_over_targets(values)
    for source in range(3):
        later = [values[1, 2, target, source] for target in range(source + 1, 4)]
        assert mean[1, 2, source] == pytest.approx(sum(later) / len(later))
    assert (mean[:, :, 3] == 0).all()


@pytest.mark.parametrize(
    ("losses", "found"),
    [
        ({4: 0.02, 8: 0.009, 16: 0.001}, 8), ({4: 0.002, 8: 0.02, 16: 0.001}, 16), ({4: 0.002, 8: 0.001}, 4),
        ({4: 0.002, 8: 0.01}, None), ({1: -0.001}, 1),
    ],
)  # fmt: skip
def test_enough_samples(losses: dict[int, float], found: int | None) -> None:
    good = PlanAgreement("good", "20%", "mass", 1, -1)
    agreements = [
        Agreement(count, np.ones(2), None, (good, PlanAgreement("p", "9%", "mass", 1, loss)))
        for count, loss in losses.items()
    ]
    assert enough(agreements) == found
    count, text = found or max(losses), verdict(agreements)
    assert text.startswith(f"enough from {count} samples" if found else f"not enough with {count} samples")
    assert f"{losses[count]:.2%} of the value on the other (p at 9%)" in text


def test_report_of_calibrate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "s.safetensors"
    base = ["calibrate", "--out", str(path), "--report", "30%,20%"]
    assert run([*base, "--samples", "9", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)["report"]
    (half,) = report["halves"]
    assert half["samples_per_half"] == 4
    correlations = half["scas_rank_correlation"] + half["error_rank_correlation"]
    assert len(correlations) == 14
    assert all(0.3 < value <= 1 for value in correlations)
    assert [f"{plan['policy']} {plan['budget']}" for plan in half["plans"]] == [
        "heatkv 30%", "heatkv 20%", "heatkv-lp 30%", "heatkv-lp 20%",
    ]  # fmt: skip
    assert all(0.3 < plan["overlap"] <= 1 and plan["loss"] < 0.1 for plan in half["plans"])
    # the batches do not matter for what is measured, and only new samples are compared
    assert Statistics.load(path).provenance.samples == tuple(f"0:{i}:{i}" for i in range(9))
    assert run([*base, "--samples", "2", "--append"]) == 0
    shown = capsys.readouterr().out
    for text in ("11 samples of emoji", "rank correlation of heads", "drop error 1", "plans of the two", "enough "):
        assert text in shown


@pytest.mark.parametrize(
    ("arguments", "value"),
    [
        (["--report", "20%", "--samples", "1"], "2"), (["--report", "20%,1%"], "14/230"),
        (["--report", "some"], "'some'"),
    ],
)  # fmt: skip
def test_bad_options(arguments: list[str], value: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They are refused before anything is measured."""
    path = tmp_path / "s.safetensors"
    assert run(["calibrate", *arguments, "--out", str(path)]) == 2
    assert value in capsys.readouterr().err
    assert not path.exists()
