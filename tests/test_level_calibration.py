"""Biases and joint costs of levels against dense attention in float64, one combination after the other.

Shapes: R rows (conditional halves first), H heads, N queries, M keys, D head size, C width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import SEEDS, pooled, schedules
from support.tiny_models import tiny_infinity, tiny_var
from torch import Tensor

from heatkv.calibration import level_costs as level_calibration
from heatkv.calibration.fisher import DRAWS, FisherCostCache, _drawn_log_likelihoods, measure_fisher
from heatkv.calibration.level_costs import (
    BiasCache,
    ErrorCostCache,
    level_choices,
    measure_biases,
    measure_errors,
)
from heatkv.core.geometry import CacheGeometry
from heatkv.core.level_statistics import LevelStatistics, calibrated_bias
from heatkv.core.levels import LEVELS, NONE, LevelChoices, log_counts, useful_levels
from heatkv.core.plan import Plan
from heatkv.core.schedule import ScaleSchedule
from heatkv.core.schema import FloatArray
from heatkv.engine.arena_cache import Attend
from heatkv.errors import StatisticsError
from heatkv.generation.loop import run_scales
from heatkv.levels.columns import allocate_levels
from heatkv.models.base import ImageModel
from heatkv.models.class_conditional import ClassConditionalModel
from heatkv.models.sampling import CommonRandomSampler
from heatkv.solve.checkpoints import Capacity

Cell = tuple[int, int]
"""A source and the level it is held at."""

Cost = Callable[[dict[int, int]], FloatArray]
"""The cost, (H,), of holding sources at levels and all others whole."""

# ---------------------------------------------------------------------- the oracle


class Dense:
    """What one layer reads at one target, by plain softmax in float64 over all that is held."""

    def __init__(
        self,
        schedule: ScaleSchedule,
        q: Tensor,
        keys: Sequence[Tensor],
        values: Sequence[Tensor],
        bias_HTV: FloatArray,
        angles: Sequence[Tensor] | None = None,
    ) -> None:
        self.q, self.target = q.double(), len(keys) - 1
        self.bias = torch.from_numpy(np.asarray(bias_HTV))
        self.cells: dict[Cell, tuple[Tensor, Tensor]] = {}
        for s, (k, v) in enumerate(zip(keys, values, strict=True)):
            for index, level in enumerate(LEVELS):
                told = None if angles is None else angles[s]
                of_scale = schedule.scales[s]
                self.cells[s, index] = pooled(k, of_scale, level, told), pooled(v, of_scale, level)
        self.out = self.attention({})

    def logits(self, source: int, level: int, biased: bool = True) -> Tensor:
        plain = self.q @ self.cells[source, level][0].mT
        return plain + self.bias[:, source, level][:, None, None] * (level > 0 and biased)

    def attention(self, held: dict[int, int]) -> Tensor:
        """Output (R, H, N, D) with the sources in `held` at their levels and all others whole."""
        levels = [(s, held.get(s, 0)) for s in range(self.target + 1)]
        read = [cell for cell in levels if cell[1] != NONE]
        logits = torch.cat([self.logits(*cell) for cell in read], dim=-1)
        return logits.softmax(-1) @ torch.cat([self.cells[cell][1] for cell in read], dim=-2)

    def change(self, held: dict[int, int]) -> Tensor:
        return self.attention(held) - self.out

    def masses(self) -> tuple[Tensor, Tensor]:
        """Over all queries and rows: (H, S) of whole cells, and (H, S, V) of pooled keys without a bias, in units of
        every query's full softmax."""
        total = torch.cat([self.logits(s, 0) for s in range(self.target + 1)], dim=-1).exp().sum(-1, keepdim=True)
        by_level = [
            [(self.logits(s, v, biased=False).exp() / total).sum((0, 2, 3)) for v in range(len(LEVELS))]
            for s in range(self.target)
        ]
        pooled_HSV = torch.stack([torch.stack(levels, dim=-1) for levels in by_level], dim=1)
        return pooled_HSV[..., 0], pooled_HSV


def combinations(choices: LevelChoices, target: int, most: int | None = None) -> list[tuple[int, dict[int, int]]]:
    """(index, levels of the joint sources): all of them, or some chosen at random with the first and the last."""
    table = choices.combinations(target)
    which = np.arange(len(table))
    if most is not None and len(which) > most:
        inner = np.random.default_rng(target).choice(which[1:-1], most - 2, replace=False)
        which = np.array([0, *sorted(inner), len(table) - 1])
    sources = choices.joint_sources(target)
    return [(int(i), dict(zip(sources, table[i].tolist(), strict=True))) for i in which]


def biases_of(schedule: ScaleSchedule, layers: int, heads: int, seed: int = 0) -> FloatArray:
    """Near the log of the count, 0 for whole cells."""
    bias = np.stack([log_counts(schedule, level) for level in LEVELS], axis=-1)
    bias = bias + np.random.default_rng(seed).normal(0, 0.3, (layers, heads, *bias.shape))
    bias[..., 0] = 0
    return bias


# ---------------------------------------------------------------------- reads that are made up, or of a model


@dataclasses.dataclass
class Case:
    """What is read at every target and layer, and |gate|^2 / |x|^2 of every row there; halves of images are rows."""

    schedule: ScaleSchedule
    choices: LevelChoices
    bias: FloatArray
    reads: list[list[tuple[Tensor, Tensor, Tensor]]]
    weights: list[Tensor]
    angles: Sequence[Tensor] | None
    entering: list[list[tuple[Tensor, Tensor]]]
    """Residual stream (R, N, C) and gate (R, 1, C)."""
    halves: int = 2

    @classmethod
    def made_up(
        cls, schedule: ScaleSchedule, choices: LevelChoices, seed: int, sharpness: float = 1.0, rotates: bool = False
    ) -> Case:
        """Two layers, two heads, two images."""
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        reads = [
            [(draw(4, 2, n, 4) * sharpness, draw(4, 2, n, 4), draw(4, 2, n, 4)) for _ in range(2)]
            for n in schedule.tokens
        ]
        angles = [torch.rand(n, 2, generator=generator).double() * 9 for n in schedule.tokens] if rotates else None
        weights = [draw(2, 7, 4) for _ in range(2)]
        entering = [[(draw(4, n, 7) * 3, draw(4, 1, 7)) for _ in range(2)] for n in schedule.tokens]
        return cls(schedule, choices, biases_of(schedule, 2, 2, seed), reads, weights, angles, entering)

    @classmethod
    def drawn(cls, model: ImageModel[Any], bias: FloatArray, samples: range, seed: int) -> Case:
        """What a model reads under dense attention."""
        recorder, geometry = Recorder(), model.geometry
        sampler = CommonRandomSampler(seed, samples, model.sampling)
        with model.adapter.watching(recorder.see):
            labels = model.labels(len(samples), samples.start)
            run_scales(model, labels, recorder, sampler, model.sampling)
        reads, entering = (
            [[table[layer][target] for layer in range(geometry.layers)] for target in range(len(geometry.schedule))]
            for table in (recorder.reads, recorder.entering)
        )
        weights = [model.adapter.output_weight(layer) for layer in range(geometry.layers)]
        return cls(
            geometry.schedule, LevelChoices(geometry.schedule), bias, reads, weights, model.key_angles, entering,
            model.sampling.rows_per_image,
        )  # fmt: skip

    @property
    def plan(self) -> Plan:
        geometry = CacheGeometry(2, 2, 4, self.schedule)
        whole = np.full((2, 2, len(self.schedule)), len(self.schedule) - 1)
        return Plan("full", geometry, whole, 1.0, geometry.full_token_heads, 0)

    def dense(self, target: int, layer: int) -> Dense:
        past = [self.reads[s][layer] for s in range(target + 1)]
        return Dense(
            self.schedule, past[-1][0], [k for _, k, _ in past], [v for *_, v in past], self.bias[layer], self.angles
        )

    def alone(self, target: int) -> list[Cell]:
        return [(s, level) for s in self.choices.other_sources(target) for level in self.choices.of_other(s)]

    def run(self, cache: ErrorCostCache | BiasCache) -> None:
        for target, scale in enumerate(self.reads):
            for layer, qkv in enumerate(scale):
                cache.see(layer, *self.entering[target][layer])
                cache.attend(layer, *qkv)

    def error_cache(self) -> ErrorCostCache:
        cache = ErrorCostCache(
            self.choices, self.bias, self.plan, 4, 2, key_angles=self.angles, output_weights=self.weights
        )
        self.run(cache)
        return cache

    def check(
        self, cost: Cost, joint: FloatArray, single: FloatArray, target: int, atol: float, most: int, rtol: float
    ) -> None:
        """Costs of one layer for one target, (H, combinations) and (H, T, V + 1)."""
        for index, held in combinations(self.choices, target, most):
            np.testing.assert_allclose(joint[:, index], cost(held), rtol=rtol, atol=atol, err_msg=f"{held}")
        assert (joint[:, 0] == 0).all()  # nothing changes where all is whole
        expected = np.zeros_like(single)
        for source, level in self.alone(target):
            expected[:, source, level] = cost({source: level})
        np.testing.assert_allclose(single, expected, rtol=rtol, atol=atol)

    def check_errors(
        self, joint: Sequence[FloatArray], single: FloatArray, most: int = 40, rtol: float = 2e-3, rest: float = 2e-6
    ) -> None:
        """Every cost against |W (o^c - o)|^2 mean(gate^2) / mean |x|^2: sum over queries and images, mean of halves,
        up to a share `rest` of what the outputs themselves amount to."""
        for target, layer in np.ndindex(len(self.schedule), len(self.weights)):
            if target <= self.choices.sink_scales:
                assert not joint[target].any()
                assert not single[:, :, target].any()
                continue
            oracle, (x, gate) = self.dense(target, layer), self.entering[target][layer]
            relative = gate.double().square().mean((1, 2)) / x.double().square().sum(-1).mean(1)

            weight = self.weights[layer].double()

            def size(out: Tensor, weight: Tensor = weight, relative: Tensor = relative) -> FloatArray:
                squares = (out @ weight.mT).square().sum((2, 3))
                return np.asarray((squares * relative[:, None]).sum(0)) / self.halves

            def cost(held: dict[int, int], oracle: Dense = oracle, size: Any = size) -> FloatArray:
                return np.asarray(size(oracle.change(held)))

            atol = rest * self.halves * float(size(oracle.out).max())
            self.check(cost, joint[target][layer], single[layer, :, target], target, atol, most, rtol)

    def check_biases(self, bias: FloatArray, atol: float) -> None:
        """Log of the mass on whole cells over that on their pooled keys; of the count where nothing is measured."""
        scales = len(self.schedule)
        for layer in range(len(self.weights)):
            whole, means = np.zeros(bias.shape[1:3]), np.zeros(bias.shape[1:])
            for target in range(1, scales):
                whole_HS, pooled_HSV = self.dense(target, layer).masses()
                whole[:, :target] += whole_HS.numpy()
                means[:, :target] += pooled_HSV.numpy()
            for s, scale in enumerate(self.schedule.scales[:-1]):
                for index, level in enumerate(LEVELS):
                    count = log_counts(self.schedule, level)[s]
                    if level not in useful_levels(scale):
                        np.testing.assert_allclose(bias[layer, :, s, index], count)
                        continue
                    expected = np.log(whole[:, s] / means[:, s, index])
                    np.testing.assert_allclose(bias[layer, :, s, index], expected, rtol=0, atol=atol)
        assert (bias[..., 0] == 0).all()


class Recorder(Attend):
    """Dense attention that keeps what every layer reads at every target, and what enters the layer."""

    def __init__(self) -> None:
        self.reads: dict[int, list[tuple[Tensor, Tensor, Tensor]]] = {}
        self.entering: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def see(self, layer: int, x: Tensor, gate: Tensor) -> None:
        self.entering.setdefault(layer, []).append((x.clone(), gate.clone()))

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.reads.setdefault(layer, []).append((q, k, v))
        past = self.reads[layer]
        scores = q @ torch.cat([k for _, k, _ in past], dim=2).mT
        return scores.softmax(-1) @ torch.cat([v for *_, v in past], dim=2)


# other sources than the joint ones, odd sides, frames, and a scale smaller than the one before
LONG = ScaleSchedule.of([(1, 1), (1, 2), (2, 2), (4, 4), (2, 3), (5, 4), (2, 4, 4), (3, 3)])
CASES = [
    (ScaleSchedule.square((1, 2, 3, 4, 5)), LevelChoices(ScaleSchedule.square((1, 2, 3, 4, 5)))),
    (LONG, LevelChoices(LONG, 1, 2)),
    (LONG, LevelChoices(LONG, 0, 0)),
]


@pytest.mark.parametrize(("schedule", "choices"), CASES, ids=["joint", "others", "alone"])
@pytest.mark.parametrize("rotates", [False, True])
def test_error_costs_of_dense_attention(schedule: ScaleSchedule, choices: LevelChoices, rotates: bool) -> None:
    case = Case.made_up(schedule, choices, 3, 1.0, rotates)
    cache = case.error_cache()
    case.check_errors(cache.joint, cache.single)


@pytest.mark.parametrize("lead", [5.0, 40.0, 200.0])
@pytest.mark.parametrize("winner", [0, 4, 7])
def test_error_costs_where_one_source_has_nearly_all_mass(winner: int, lead: float) -> None:
    """Its logits lead by so much that all others have e^-lead of the mass; without it they are what is read."""
    case = Case.made_up(LONG, LevelChoices(LONG, 1, 2), 4)
    for source, scale in enumerate(case.reads):
        for q, k, _ in scale:
            q[..., -1], k[..., -1] = lead, float(source == winner)
    cache = case.error_cache()
    case.check_errors(cache.joint, cache.single, 12, rtol=5e-3)


@pytest.mark.parametrize("lead", [30.0, 90.0])
def test_error_costs_where_all_that_is_always_held_is_hardly_read(lead: float) -> None:
    """The joint sources share the mass; where they are dropped, the rest is so light that its square is 0 in fp32."""
    case = Case.made_up(LONG, LevelChoices(LONG, 1, 3), 4)
    for source, scale in enumerate(case.reads):
        for q, k, _ in scale:
            q[..., -1], k[..., -1] = lead, float(source in (3, 5, 6))
    cache = case.error_cache()
    assert all(np.isfinite(joint).all() for joint in cache.joint)
    if lead == 30.0:
        case.check_errors(cache.joint, cache.single, 12, rtol=5e-3)


@pytest.mark.parametrize(("schedule", "choices"), CASES, ids=["joint", "others", "alone"])
def test_fisher_costs_of_dense_attention(schedule: ScaleSchedule, choices: LevelChoices) -> None:
    """(sum over queries and both halves of gradient * change)^2, mean over draws, summed over images."""
    case = Case.made_up(schedule, choices, 5, 1.0, rotates=True)
    cache = FisherCostCache(choices, case.bias, case.plan, 4, 2, key_angles=case.angles)
    generator, draws, gradients = torch.Generator().manual_seed(1), 3, []
    for target, scale in enumerate(case.reads):
        for layer, qkv in enumerate(scale):
            cache.attend(layer, *qkv)
        gradients.append([[torch.randn(q.shape, generator=generator) for q, *_ in scale] for _ in range(draws)])
        cache.price(target, gradients[-1])
    for target, layer in np.ndindex(len(schedule), 2):
        if target <= choices.sink_scales:
            assert not cache.joint[target].any()
            continue
        oracle = case.dense(target, layer)

        def cost(held: dict[int, int], oracle: Dense = oracle, target: int = target, layer: int = layer) -> FloatArray:
            along = [(gradients[target][i][layer].double() * oracle.change(held)).sum((2, 3)) for i in range(draws)]
            of_images = torch.stack([rows[:2] + rows[2:] for rows in along])  # rows i and i + 2 are of image i
            return np.asarray(of_images.square().mean(0).sum(0))

        atol = 1e-5 * cost(dict.fromkeys(range(choices.sink_scales, target), NONE)).max()
        case.check(cost, cache.joint[target][layer], cache.single[layer, :, target], target, atol, 40, 2e-3)


@pytest.mark.parametrize("rotates", [False, True])
def test_biases_of_dense_attention(rotates: bool) -> None:
    case = Case.made_up(LONG, LevelChoices(LONG), 6, 1.5, rotates)
    cache = BiasCache(case.choices, case.plan, 4, 2, key_angles=case.angles)
    case.run(cache)
    bias = calibrated_bias(LONG, cache.whole, cache.pooled_mass)
    case.check_biases(bias, 2e-5)
    assert np.abs(bias[:, :, 3, 2] - log_counts(LONG, "mean")[3]).max() > 0.01  # not just the count


def test_biases_where_nothing_was_read() -> None:
    schedule = ScaleSchedule.square((1, 4, 5))
    whole, means = np.ones((1, 1, 3)), np.ones((1, 1, 3, 3)) * 0.25
    whole[0, 0, 2], means[0, 0, 1, 1] = 0, 0
    bias = calibrated_bias(schedule, whole, means)
    assert bias[0, 0, 1].tolist() == pytest.approx([0, np.log(4), np.log(4)])  # by count; by mass
    assert bias[0, 0, 2].tolist() == pytest.approx([0, np.log(25 / 9), np.log(25)])


@settings(max_examples=15)
@given(
    schedule=schedules(min_scales=3, max_scales=7, max_side=5),
    sinks=st.integers(0, 2),
    joint=st.integers(0, 4),
    seed=SEEDS,
)
def test_error_costs_of_any_schedule(schedule: ScaleSchedule, sinks: int, joint: int, seed: int) -> None:
    case = Case.made_up(schedule, LevelChoices(schedule, sinks, joint), seed)
    cache = case.error_cache()
    case.check_errors(cache.joint, cache.single, 8)


def test_blocks_of_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case.made_up(LONG, LevelChoices(LONG, 1, 3), 8)

    def measured() -> list[FloatArray]:
        biases, errors = BiasCache(case.choices, case.plan, 4, 2), case.error_cache()
        fisher = FisherCostCache(case.choices, case.bias, case.plan, 4, 2)
        case.run(biases)
        for target, scale in enumerate(case.reads):
            for layer, qkv in enumerate(scale):
                fisher.attend(layer, *qkv)
            fisher.price(target, [[q + v for q, _, v in scale]])
        return [biases.whole, biases.pooled_mass, errors.single, fisher.single, *errors.joint, *fisher.joint]

    at_once = measured()
    blocks: list[int] = []
    original = level_calibration.query_blocks

    def counted(*arguments: Any) -> Iterator[Tensor]:
        for block in original(*arguments):
            blocks.append(block.shape[2])
            yield block

    monkeypatch.setattr(level_calibration, "MAX_BLOCK_NUMBERS", 9_000)
    monkeypatch.setattr(level_calibration, "query_blocks", counted)
    for one, other in zip(measured(), at_once, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6 * max(other.max(), 1e-9))
    assert 1 <= min(blocks) < max(LONG.tokens)


def test_costs_under_autocast() -> None:
    case = Case.made_up(LONG, LevelChoices(LONG, 1, 3), 8)
    plain = case.error_cache()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cache = case.error_cache()
    assert np.array_equal(cache.single, plain.single)
    assert all(np.array_equal(one, other) for one, other in zip(cache.joint, plain.joint, strict=True))


# ---------------------------------------------------------------------- whole models


@pytest.fixture(scope="module")
def var() -> ClassConditionalModel:
    return tiny_var()


@pytest.fixture(scope="module")
def infinity() -> ImageModel[Any]:
    return tiny_infinity(ScaleSchedule.of([(1, 1), (2, 2), (3, 2), (4, 5), (6, 4)]))


@pytest.fixture(params=["var", "infinity"])
def model(request: pytest.FixtureRequest) -> ImageModel[Any]:
    found: ImageModel[Any] = request.getfixturevalue(request.param)
    return found


def test_biases_of_a_model(model: ImageModel[Any]) -> None:
    bias = measure_biases(model, LevelChoices(model.geometry.schedule), range(3), seed=5)
    Case.drawn(model, bias, range(3), 5).check_biases(bias, 2e-4)


def test_error_costs_of_a_model(model: ImageModel[Any]) -> None:
    geometry = model.geometry
    bias = biases_of(geometry.schedule, geometry.layers, geometry.heads)
    measured = measure_errors(model, LevelChoices(geometry.schedule), bias, range(1, 3), seed=5)
    assert np.array_equal(measured.log_bias, bias)
    assert [name.split(":")[:2] for name in measured.samples] == [["5", "1"], ["5", "2"]]
    case = Case.drawn(model, bias, range(1, 3), 5)
    case.check_errors(measured.joint_sum, measured.single_sum, 30, rtol=5e-3, rest=1e-5)


class Perturbed(Attend):
    """Dense attention with a nudge along given changes of heads' outputs, by one number per image and change."""

    def __init__(self, images: int, target: int, changes: dict[tuple[int, int, int], Tensor]) -> None:
        self.target, self.images, self.changes = target, images, changes
        self.past: dict[int, list[tuple[Tensor, Tensor]]] = {}
        self.nudge = {key: torch.zeros(images, requires_grad=True) for key in changes}

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        past = self.past.setdefault(layer, [])
        keys, values = (torch.cat([*(pair[i] for pair in past), x], dim=2) for i, x in ((0, k), (1, v)))
        out = (q @ keys.mT).softmax(-1) @ values
        if len(past) == self.target:
            for (of_layer, head, index), change in self.changes.items():
                if of_layer == layer:
                    of_rows = self.nudge[of_layer, head, index].repeat(len(q) // self.images)
                    one_head = torch.zeros_like(out)
                    one_head[:, head] = change.float()
                    out = out + of_rows[:, None, None, None] * one_head
        past.append((k.detach(), v.detach()))
        return out


def test_fisher_costs_of_a_model(model: ImageModel[Any]) -> None:
    """The change of the drawn tokens' log-likelihood along a change of one head's output, squared."""
    geometry = model.geometry
    bias = biases_of(geometry.schedule, geometry.layers, geometry.heads)
    measured = measure_fisher(model, LevelChoices(geometry.schedule), bias, range(1, 3), seed=5)
    case, choices = Case.drawn(model, bias, range(1, 3), 5), measured.choices
    for target in (3, len(geometry.schedule) - 1):
        cells = [held for _, held in combinations(choices, target, 12)]
        which = [index for index, _ in combinations(choices, target, 12)]
        cells += [{source: level} for source, level in case.alone(target)]
        oracles = [case.dense(target, layer) for layer in range(geometry.layers)]
        changes = {
            (layer, head, i): oracle.change(held)[:, head]
            for layer, oracle in enumerate(oracles)
            for head in range(geometry.heads)
            for i, held in enumerate(cells)
        }
        cache = Perturbed(2, target, changes)
        sampler, drawing = (
            CommonRandomSampler(5, (1, 2), model.sampling),
            model.begin(model.labels(2, 1), model.sampling),
        )
        for scale in range(target + 1):
            logits = drawing.logits(cache)
            if scale < target:
                drawing.accept(sampler.choose(scale, logits))
        likelihoods = _drawn_log_likelihoods(logits, 5, (1, 2), target)
        assert len(likelihoods) == DRAWS
        slopes = [torch.autograd.grad(x, list(cache.nudge.values()), retain_graph=True) for x in likelihoods]
        costs = {
            key: np.mean([float(slope[i].double().square().sum()) for slope in slopes]) / 2
            for i, key in enumerate(cache.nudge)
        }
        atol = 1e-5 * max(costs.values())
        for (layer, head, i), cost in costs.items():
            if i < len(which):
                got = measured.joint[target][layer, head, which[i]]
            else:
                ((source, level),) = cells[i].items()
                got = measured.single[layer, head, target, source, level]
            assert got == pytest.approx(cost, rel=1e-2, abs=atol)
        assert atol > 0


def test_fisher_draws() -> None:
    logits = torch.tensor([0.0, 1.0, -2.0, 2.5])
    p = logits.softmax(-1)
    drawn = _drawn_log_likelihoods(logits.expand(2, 20_000, 4), 3, (4, 5), 1)
    assert len({float(x) for x in drawn}) == DRAWS
    mean = sum(float(x) for x in drawn) / (DRAWS * 40_000)
    assert mean == pytest.approx(float((p * p.log()).sum()), abs=0.01)  # 160,000 draws of spread 1.1 or so
    # a sample's draws are its own, whatever stands beside it, and differ from scale to scale
    some = torch.randn(3, 50, 4, generator=torch.Generator().manual_seed(0))
    together = _drawn_log_likelihoods(some, 3, (4, 5, 6), 1)
    one_by_one = [_drawn_log_likelihoods(some[i : i + 1], 3, (4 + i,), 1) for i in range(3)]
    for draw, total in enumerate(together):
        assert float(total) == pytest.approx(sum(float(x[draw]) for x in one_by_one), rel=1e-5)
    assert float(_drawn_log_likelihoods(some, 3, (4, 5, 6), 2)[0]) != pytest.approx(float(together[0]), rel=1e-4)


MEASURES = pytest.mark.parametrize("measure", [measure_errors, measure_fisher])


@MEASURES
def test_merged_batches(measure: Any, var: ClassConditionalModel) -> None:
    choices, bias = LevelChoices(var.geometry.schedule), biases_of(var.geometry.schedule, 2, 2)
    together, *parts = (measure(var, choices, bias, samples, seed=4) for samples in (range(3), range(2), range(2, 3)))
    merged = parts[0].merge(parts[1])
    assert merged.samples == together.samples == ("4:0:0", "4:1:1", "4:2:2")
    largest = max(joint.max() for joint in together.joint_sum)
    for name, array in together.sums().items():
        np.testing.assert_allclose(merged.sums()[name], array, rtol=1e-3, atol=1e-6 * largest, err_msg=name)


def test_refused_measurements(var: ClassConditionalModel) -> None:
    schedule = var.geometry.schedule
    for sinks in (-1, 9):
        with pytest.raises(StatisticsError, match=f"sink_scales is {sinks}"):
            level_choices(schedule, sinks)
    with pytest.raises(StatisticsError, match="log_bias is float64"):
        measure_errors(var, LevelChoices(schedule), np.zeros((2, 2, 9)), range(1))


@MEASURES
def test_plans_of_other_sinks(measure: Any, var: ClassConditionalModel) -> None:
    """Plans with three sinks are equal, from costs of three and of fewer."""
    schedule = var.geometry.schedule
    bias = biases_of(schedule, 2, 2)

    def costs(sinks: int, samples: int = 2) -> LevelStatistics:
        found: LevelStatistics = measure(var, level_choices(schedule, sinks), bias, range(samples))
        return found

    capacity = Capacity(2, 2, schedule.tokens, 2 * 2 * schedule.cached_tokens // 2)
    of_three = allocate_levels(costs(3), capacity)
    assert of_three.cost > 0
    for sinks in (0, 2):
        found = allocate_levels(costs(sinks), capacity, sink_scales=3)
        assert found.cost == pytest.approx(of_three.cost, rel=0.01)
        assert found.bound == pytest.approx(of_three.bound, rel=0.01)
    assert not any(joint.any() for joint in costs(len(schedule) - 1, 1).joint_sum)
