"""Levels: which tokens are averaged, keys at the mean position, and the choices of a plan, against plain loops."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import SEEDS, members, pooled, schedules, tokens_at
from torch import Tensor

from heatkv.core.levels import (
    LEVELS,
    NONE,
    LevelChoices,
    blocks,
    level_tokens,
    log_counts,
    useful_levels,
)
from heatkv.core.schedule import ScaleSchedule
from heatkv.engine.attention.pooling import Reduction, pooled_cells
from heatkv.engine.attention.rotary import rotate, rotation_of
from heatkv.models.infinity import rope_positions, rotation_angles

SCALES = st.tuples(st.integers(1, 3), st.integers(1, 7), st.integers(1, 7))
CPU = torch.device("cpu")


# ---------------------------------------------------------------------- blocks


@settings(max_examples=40)
@given(scale=SCALES, level=st.sampled_from(LEVELS))
def test_blocks(scale: tuple[int, int, int], level: str) -> None:
    made, expected = blocks(scale, level), members(scale, level)
    assert [[token for token, block in enumerate(made.of) if block == i] for i in range(made.count)] == expected
    assert made.sizes.tolist() == [len(block) for block in expected]
    assert made.count == tokens_at(level, scale)


def test_blocks_by_hand() -> None:
    assert blocks((1, 3, 3), "pool2").of == (0, 0, 1, 0, 0, 1, 2, 2, 3)  # 4, 2, 2 and 1 tokens
    assert blocks((2, 2, 2), "pool2").of == (0, 0, 0, 0, 1, 1, 1, 1)  # frames are never mixed


@settings(max_examples=30)
@given(schedule=schedules(max_side=9), level=st.sampled_from(LEVELS))
def test_tokens_and_log_counts(schedule: ScaleSchedule, level: str) -> None:
    tokens = [tokens_at(level, scale) for scale in schedule.scales]
    assert list(level_tokens(schedule, level)) == tokens
    expected = [math.log(f * h * w / n) for (f, h, w), n in zip(schedule.scales, tokens, strict=True)]
    assert log_counts(schedule, level).tolist() == pytest.approx(expected, abs=1e-12)


# ---------------------------------------------------------------------- averages


def tensors(scale: tuple[int, int, int], seed: int, pairs: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values (R, N, D) and angles (N, P)."""
    generator = torch.Generator().manual_seed(seed)
    tokens = math.prod(scale)
    k, v = torch.randn(2, 2, tokens, 2 * pairs, generator=generator)
    return k, v, torch.rand(tokens, pairs, generator=generator, dtype=torch.float64) * 60 - 30


@settings(max_examples=30)
@given(scale=SCALES, level=st.sampled_from(LEVELS), rotates=st.booleans(), seed=SEEDS)
def test_means_at_mean_positions(scale: tuple[int, int, int], level: str, rotates: bool, seed: int) -> None:
    k, v, angles = tensors(scale, seed)
    told = angles if rotates else None
    reduction = Reduction.of(scale, "full", level, CPU, told)
    torch.testing.assert_close(reduction.keys(k).double(), pooled(k, scale, level, told), rtol=0, atol=2e-5)
    torch.testing.assert_close(reduction.values(v).double(), pooled(v, scale, level), rtol=0, atol=1e-6)
    cells = pooled_cells(k[:, None], v[:, None], scale, level, told)
    torch.testing.assert_close(cells[0][:, 0], reduction.keys(k), rtol=0, atol=2e-5)
    torch.testing.assert_close(cells[1][:, 0], reduction.values(v), rtol=0, atol=1e-6)
    # full -> pool2 -> mean weighs every token alike, also where blocks at the edge are smaller
    first, then = Reduction.of(scale, "full", "pool2", CPU, told), Reduction.of(scale, "pool2", "mean", CPU, told)
    expected_k, expected_v = pooled(k, scale, "mean", told), pooled(v, scale, "mean")
    torch.testing.assert_close(then.keys(first.keys(k)).double(), expected_k, rtol=0, atol=4e-5)
    torch.testing.assert_close(then.values(first.values(v)).double(), expected_v, rtol=0, atol=1e-6)


def test_reductions_together() -> None:
    parts, keys, expected = [], [], []
    for seed, (scale, level) in enumerate([((1, 3, 3), "pool2"), ((2, 1, 4), "mean"), ((1, 2, 2), "pool2")]):
        k, _, angles = tensors(scale, seed)
        parts.append(Reduction.of(scale, "full", level, CPU, angles))
        keys.append(k)
        expected.append(parts[-1].keys(k))
    together = Reduction.together(parts)
    assert together.count == 4 + 1 + 1
    assert torch.equal(together.keys(torch.cat(keys, dim=1)), torch.cat(expected, dim=1))


@settings(max_examples=20)
@given(seed=SEEDS, pairs=st.integers(1, 4))
def test_rotation_and_back(seed: int, pairs: int) -> None:
    k, _, angles = tensors((1, 3, 4), seed, pairs)
    turned = rotate(k, rotation_of(angles))
    torch.testing.assert_close(rotate(turned, rotation_of(-angles)), k, rtol=0, atol=1e-5)
    torch.testing.assert_close(turned.norm(dim=-1), k.norm(dim=-1), rtol=0, atol=1e-5)
    as_complex = torch.view_as_complex(k.double().unflatten(-1, (-1, 2)))
    expected = as_complex * torch.exp(1j * angles)
    torch.testing.assert_close(
        torch.view_as_complex(turned.double().unflatten(-1, (-1, 2))), expected, rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("level", ["pool2", "mean"])
def test_mean_positions_between_tokens(level: str) -> None:
    """Keys of Infinity: what every token has in common stands at the mean row and the mean column of the block."""
    schedule, head_dim = ScaleSchedule.infinity("0.06M", 1.0), 8
    source = next(i for i, scale in enumerate(schedule.scales) if scale == (1, 6, 6))
    rows, columns = rope_positions(schedule)[source]
    frequencies = [10000.0**-0.0, 10000.0**-0.5]  # two for rows, two for columns
    straight = torch.randn(head_dim // 2, generator=torch.Generator().manual_seed(1), dtype=torch.complex128)

    def at(row: float, column: float) -> Tensor:
        angles = torch.tensor([*(row * f for f in frequencies), *(column * f for f in frequencies)])
        return torch.view_as_real(straight * torch.exp(1j * angles.double())).flatten()

    k = torch.stack([at(row, column) for row in rows for column in columns])[None]
    reduction = Reduction.of((1, 6, 6), "full", level, CPU, rotation_angles(schedule, source, head_dim))
    expected = [
        at(float(np.mean([rows[i // 6] for i in block])), float(np.mean([columns[i % 6] for i in block])))
        for block in members((1, 6, 6), level)
    ]
    torch.testing.assert_close(reduction.keys(k)[0].double(), torch.stack(expected), rtol=0, atol=1e-5)


# ---------------------------------------------------------------------- what a plan may choose


def test_useful_levels() -> None:
    for scale in ((1, 1, 2), (1, 1, 64), (1, 3, 9), (4, 1, 1)):
        assert useful_levels(scale) == ("full", "mean")
    assert useful_levels((1, 1, 1)) == ("full",)
    assert useful_levels((1, 4, 4)) == useful_levels((2, 4, 7)) == ("full", "pool2", "mean")


@settings(max_examples=40)
@given(schedule=schedules(max_scales=8, max_side=5), sinks=st.integers(0, 4), joint=st.integers(0, 4))
def test_choices(schedule: ScaleSchedule, sinks: int, joint: int) -> None:
    choices = LevelChoices(schedule, sinks, joint)
    for target in range(len(schedule)):
        free = list(range(sinks, target))
        largest = set(sorted(free, key=lambda s: (-schedule.tokens[s], -s))[:joint])  # the later one of equals
        assert choices.joint_sources(target) == tuple(s for s in free if s in largest)
        assert choices.other_sources(target) == tuple(s for s in free if s not in largest)
        axes = [[LEVELS.index(x) for x in useful_levels(schedule.scales[s])] + [NONE] for s in sorted(largest)]
        assert [tuple(row) for row in choices.combinations(target)] == list(itertools.product(*axes))
        assert choices.combinations(target).shape == (math.prod(map(len, axes)), len(axes))
        assert choices.shape(target) == tuple(map(len, axes))
        if target:  # a source that has left the largest never comes back
            assert set(choices.other_sources(target - 1)) <= set(choices.other_sources(target))
    for source, scale in enumerate(schedule.scales):
        assert choices.tokens(source).tolist() == [*(tokens_at(level, scale) for level in LEVELS), 0]
        assert choices.of_other(source) == tuple(x for x in choices.of_source(source) if x != LEVELS.index("pool2"))
