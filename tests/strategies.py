"""Random problems for the property tests, and slow loops that say what the fast code must compute."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction

import numpy as np
import torch
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from heatkv.core.geometry import CacheGeometry
from heatkv.core.plan import CoarseCells, Plan
from heatkv.core.schedule import ScaleSchedule
from heatkv.core.statistics import Provenance, Statistics
from heatkv.testing.material import level_costs_of

Nested = Sequence[Sequence[Sequence[int]]]

SEEDS = st.integers(0, 2**32 - 1)

PAIRS = [[0, 0], [1, 0], [2, 0], [0, 1], [1, 1], [2, 1]]
"""Every [head, layer] of 2 layers x 3 heads, as published rankings list them."""


def live_by_formula(last_read: Nested, tokens: Sequence[int], target: int, layer: int) -> int:
    """live(t, l), cell by cell: layers up to l hold what is read after t, the later ones what t itself reads."""
    live = 0
    for l, heads in enumerate(last_read):
        for cells in heads:
            for s, last in enumerate(cells):
                if l <= layer:
                    live += tokens[s] if s <= target and last > target else 0
                else:
                    live += tokens[s] if s < target and last >= target else 0
    return live


def live_table(last_read: Nested, tokens: Sequence[int]) -> list[list[int]]:
    return [
        [live_by_formula(last_read, tokens, target, layer) for layer in range(len(last_read))]
        for target in range(len(tokens))
    ]


def tokens_at(level: str, scale: tuple[int, int, int]) -> int:
    """Tokens of a scale at a level, worked out anew."""
    frames, height, width = scale
    return {
        "full": frames * height * width,
        "pool2": frames * ((height + 1) // 2) * ((width + 1) // 2),
        "mean": 1,
    }[level]


def level_live_table(plan: Plan) -> list[list[int]]:
    """live(t, l) of a plan with levels, cell by cell: a cell is held at the finest level that the reader may read."""
    layers, heads, scales = plan.last_read.shape
    ends = [(level, last_read.tolist()) for level, last_read in plan.levels]

    def held(l: int, h: int, reader: int) -> int:
        tokens = 0
        for s in range(min(reader, scales)):
            levels = [level for level, last_read in ends if last_read[l][h][s] >= reader]
            tokens += tokens_at(levels[0], plan.schedule.scales[s]) if levels else 0
        return tokens

    return [
        [
            sum(held(l, h, t + 1 if l <= layer else t) for l in range(layers) for h in range(heads))
            for layer in range(layers)
        ]
        for t in range(scales)
    ]


def members(scale: tuple[int, int, int], level: str) -> list[list[int]]:
    """Which tokens every token of a level stands for, frame by frame, row by row."""
    frames, height, width = scale
    if level == "full":
        return [[token] for token in range(frames * height * width)]
    if level == "mean":
        return [list(range(frames * height * width))]
    return [
        [
            (f * height + r) * width + c
            for r in range(height)
            for c in range(width)
            if (r // 2, c // 2) == (block_r, block_c)
        ]
        for f in range(frames)
        for block_r in range((height + 1) // 2)
        for block_c in range((width + 1) // 2)
    ]


def pooled(x_RHND: Tensor, scale: tuple[int, int, int], level: str, angles_NP: Tensor | None = None) -> Tensor:
    """Plain means over the members in float64; with angles, of the unrotated pairs, turned to the mean angle."""
    x = x_RHND.double()
    blocks = members(scale, level)
    if angles_NP is None:
        return torch.stack([x[..., block, :].mean(dim=-2) for block in blocks], dim=-2)
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    angles = angles_NP.double()
    straight = pairs * torch.polar(torch.ones_like(angles), -angles)
    mean_angles = torch.stack([angles[block].mean(dim=0) for block in blocks])
    means = torch.stack([straight[..., block, :].mean(dim=-2) for block in blocks], dim=-2)
    return torch.view_as_real(means * torch.polar(torch.ones_like(mean_angles), mean_angles)).flatten(-2)


@st.composite
def schedules(draw: st.DrawFn, min_scales: int = 2, max_scales: int = 6, max_side: int = 4) -> ScaleSchedule:
    """Images and clips, square or not; scales may also shrink, which nothing may rely on never happening."""
    side = st.integers(1, max_side)
    frames = draw(st.sampled_from([st.just(1), st.integers(1, 3)]))
    scale = st.tuples(frames, side, side)
    return ScaleSchedule(tuple(draw(st.lists(scale, min_size=min_scales, max_size=max_scales))))


@st.composite
def geometries(draw: st.DrawFn, min_scales: int = 2, max_side: int = 4, head_dim: int = 4) -> CacheGeometry:
    schedule = draw(schedules(min_scales=min_scales, max_side=max_side))
    return CacheGeometry(draw(st.integers(1, 4)), draw(st.integers(1, 4)), head_dim, schedule)


@st.composite
def last_reads(draw: st.DrawFn, geometry: CacheGeometry, sink_scales: int = 0) -> NDArray[np.int64]:
    scales = len(geometry.schedule)
    cell = st.tuples(*(st.integers(scales - 1 if s < sink_scales else s, scales - 1) for s in range(scales)))
    pairs = geometry.layers * geometry.heads
    drawn = draw(st.lists(cell, min_size=pairs, max_size=pairs))
    return np.array(drawn, dtype=np.int64).reshape(geometry.layers, geometry.heads, scales)


@st.composite
def plans(draw: st.DrawFn, max_side: int = 4) -> Plan:
    """Any valid plan: its budget is somewhere from its own peak to the full cache."""
    geometry = draw(geometries(max_side=max_side))
    sink_scales = draw(st.integers(0, len(geometry.schedule) - 1))
    last_read = draw(last_reads(geometry, sink_scales))
    peak = max(map(max, live_table(last_read.tolist(), geometry.schedule.tokens)))
    held = draw(st.integers(peak, geometry.full_token_heads))
    return Plan(
        policy="drawn",
        geometry=geometry,
        last_read=last_read,
        budget=max(held, 1) / geometry.full_token_heads,
        budget_token_heads=held,
        sink_scales=sink_scales,
        model="tiny",
        settings={"budget": f"{held} token-heads", "sink_scales": sink_scales},
    )


@st.composite
def level_plans(draw: st.DrawFn, max_side: int = 5, head_dim: int = 4) -> Plan:
    """Any valid plan with one or both coarser levels, with biases of any size, some of them zero."""
    geometry = draw(geometries(max_side=max_side, head_dim=head_dim))
    sink_scales = draw(st.integers(0, len(geometry.schedule) - 1))
    finer = last_read = draw(last_reads(geometry, sink_scales))
    rng = np.random.default_rng(draw(SEEDS))
    coarse = []
    for level in draw(st.sampled_from([("pool2",), ("mean",), ("pool2", "mean")])):
        finer = np.maximum(finer, draw(last_reads(geometry)))
        bias = rng.normal(0, 1.5, finer.shape) * (rng.random(finer.shape) < 0.8)
        coarse.append(CoarseCells(level, finer, bias))
    most = geometry.full_token_heads
    full = Plan("drawn", geometry, last_read, 1.0, most, sink_scales, coarse=tuple(coarse))
    held = draw(st.integers(max(map(max, level_live_table(full))), most))
    return replace(full, budget=max(held, 1) / most, budget_token_heads=held, model="tiny", settings={"a": 1})


def shares(lowest: Fraction = Fraction(1, 200)) -> st.SearchStrategy[Fraction]:
    """Budgets as exact shares of the full cache, up to the whole of it."""
    return st.fractions(lowest, 1, max_denominator=200)


def statistics_of(
    geometry: CacheGeometry,
    mass: NDArray[np.float64],
    first_sample: int = 0,
    sink_scales: int | None = 2,
    **provenance: object,
) -> Statistics:
    """Statistics of explicit samples, as a calibration sums them up, with level costs for so many sink scales, or
    without."""
    told: dict[str, object] = {"model": "tiny", "fingerprint": "0f", "cfg": 1.5, "settings": {"top_k": 10}}
    samples = tuple(f"7:{first_sample + index}:3" for index in range(len(mass)))
    where = Provenance(**{**told, "samples": samples, "versions": {"torch": "2"}, **provenance})  # type: ignore[arg-type]
    # any figures will do for all rows and for errors, as long as they follow from the samples
    later = np.tril(np.ones(mass.shape[-2:]), -1)
    return Statistics(
        geometry.schedule, mass.sum(axis=0), (mass**2).sum(axis=0), where,
        all_mass_sum=mass.sum(axis=0), error_sum=(mass**3 * later).sum(axis=0),
        levels=None if sink_scales is None else level_costs_of(geometry, mass, samples, sink_scales),
    )  # fmt: skip
