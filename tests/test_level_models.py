"""Models that draw under plans with coarser cells, against an oracle that unrotates, averages and rotates by itself.

Shapes: R rows, H heads, N tokens of the running scale, D head size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from strategies import members, pooled
from support.foreign import KINDS, SCALES, attention_of
from support.golden import check_infinity_run, check_scales, replays
from support.standin_infinity import turned
from support.tiny_models import SHORT_SCHEDULE, features, make_infinity, tiny_var
from torch import Tensor
from torch.nn import functional as F

import heatkv
from heatkv.core.geometry import CacheGeometry
from heatkv.core.levels import LEVELS
from heatkv.core.plan import CoarseCells, Plan
from heatkv.core.schedule import ScaleSchedule
from heatkv.engine.arena_cache import Attend
from heatkv.generation.loop import Generator, run_scales
from heatkv.models import infinity
from heatkv.models.base import ImageModel
from heatkv.models.sampling import RecordedTokens
from heatkv.models.text_conditional import Prompt, TextConditionalModel


def pooling_plan(geometry: CacheGeometry, seed: int = 0) -> Plan:
    """A random plan that holds about a third of the cells whole, pooled, as a mean or not at all at any time."""
    rng, scales = np.random.default_rng(seed), len(geometry.schedule)
    shape = (geometry.layers, geometry.heads, scales)
    whole = rng.integers(np.broadcast_to(np.arange(scales), shape), scales)
    finer, coarse = whole, []
    for level in LEVELS[1:]:
        finer = rng.integers(finer, scales)
        coarse.append(CoarseCells(level, finer, rng.normal(1, 0.5, shape)))
    return Plan("drawn", geometry, whole, 1.0, geometry.full_token_heads, 0, coarse=tuple(coarse))


class DenseLevels(Attend):
    """Head by head in float64 over plain means; `unrotated` and `angles` of every scale where keys are rotated."""

    def __init__(self, plan: Plan, angles: Sequence[Tensor] | None = None) -> None:
        self.plan, self.angles = plan, angles
        self.reads: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def key(self, k: Tensor, layer: int) -> Tensor:
        return k

    def past(self, layer: int, source: int, level: str, head: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a source at a level, (R, M, D)."""
        k, v = self.reads[layer][source]
        scale = self.plan.schedule.scales[source]
        if self.angles is None:
            return pooled(k[:, head], scale, level), pooled(v[:, head], scale, level)
        angles = torch.stack([self.angles[source][block].mean(dim=0) for block in members(scale, level)])
        pairs = torch.view_as_complex(pooled(k[:, head], scale, level).unflatten(-1, (-1, 2)).contiguous())
        turned = torch.view_as_real(pairs * torch.exp(1j * angles)).flatten(-2)
        return turned, pooled(v[:, head], scale, level)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        reads = self.reads.setdefault(layer, [])
        target, out = len(reads), torch.zeros_like(q)
        for h in range(q.shape[1]):
            logits, values = [q[:, h].double() @ k[:, h].double().mT], [v[:, h].double()]
            for s in range(target):
                held = [i for i, (_, last_read) in enumerate(self.plan.levels) if last_read[layer, h, s] >= target]
                if held:
                    keys, of_source = self.past(layer, s, self.plan.levels[held[0]][0], h)
                    bias = self.plan.coarse[held[0] - 1].log_bias[layer, h, s] if held[0] else 0.0
                    logits.append(q[:, h].double() @ keys.mT + bias)
                    values.append(of_source)
            out[:, h] = (torch.cat(logits, dim=-1).softmax(-1) @ torch.cat(values, dim=1)).to(q.dtype)
        reads.append((self.key(k, layer), v))
        return out


class Unrotated(DenseLevels):
    """Keeps keys as they were before the model rotated them, which it sees by standing in for that function."""

    def __init__(self, plan: Plan) -> None:
        head_dim = plan.geometry.head_dim
        frequencies = 10000.0 ** -(torch.arange(head_dim // 4, dtype=torch.float64) / (head_dim // 4))
        angles = []
        for rows, columns in infinity.rope_positions(plan.schedule):
            grid = torch.cartesian_prod(torch.tensor(rows), torch.tensor(columns)).double().view(-1, 2)
            angles.append((grid[:, :, None] * frequencies).flatten(1))
        super().__init__(plan, angles)
        self.straight = Tensor()

    @contextmanager
    def watching(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        original = infinity.rotate

        def rotate(x_2RHND: Tensor, rotation: Tensor) -> Tensor:
            self.straight = x_2RHND[1]
            return original(x_2RHND, rotation)

        with monkeypatch.context() as patch:
            patch.setattr(infinity, "rotate", rotate)
            yield

    def key(self, k: Tensor, layer: int) -> Tensor:
        return self.straight


def check_generator(
    model: ImageModel[Any],
    labels: list[Any],
    plan: Plan,
    codes: Sequence[Tensor] | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same guided logits at every scale, shown the same codes, and not those of the full cache."""
    logits: dict[str, list[Tensor]] = {"ours": [], "oracle": [], "full": []}
    generator = Generator(model, plan, len(labels))
    if codes is None:
        codes = generator.draw(labels, seed=3, decode=False).tokens

    def keep(name: str) -> Callable[[int, Tensor], None]:
        return lambda _, x: logits[name].append(x.clone())

    generator.draw(labels, sampler=RecordedTokens(codes), observe=keep("ours"), decode=False)
    Generator(model, model.plan(), len(labels)).draw(
        labels, sampler=RecordedTokens(codes), observe=keep("full"), decode=False
    )
    oracle = Unrotated(plan) if model.key_angles is not None else DenseLevels(plan)
    arguments = (model, labels, oracle, RecordedTokens(codes), model.sampling, keep("oracle"))
    if isinstance(oracle, Unrotated):
        with oracle.watching(monkeypatch):
            run_scales(*arguments)
    else:
        run_scales(*arguments)
    for ours, expected in zip(logits["ours"], logits["oracle"], strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4 * float(expected.std()))
    assert any(
        (full - expected).abs().max() > 0.02 * expected.std()
        for full, expected in zip(logits["full"], logits["oracle"], strict=True)
    )


LONGER = ScaleSchedule.of([(1, 1), (2, 2), (4, 4), (5, 3), (6, 8), (8, 8)])


@pytest.mark.parametrize("schedule", [SHORT_SCHEDULE, LONGER], ids=str)
@pytest.mark.parametrize("patch", [1, 2])
def test_infinity_reads_means_at_mean_positions(
    schedule: ScaleSchedule, patch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_infinity(patch, schedule)
    prompts = [Prompt(features(7)), Prompt(features(4), features(9))]
    check_generator(model, prompts, pooling_plan(model.geometry), None, monkeypatch)


def test_var_reads_means(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_var()
    check_generator(model, [1, 4], pooling_plan(model.geometry), None, monkeypatch)


def test_golden_models_read_means(golden_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for model, drawn, _, _ in replays(golden_model, torch.float32):
        check_generator(model, list(drawn), pooling_plan(model.geometry), None, monkeypatch)


def test_golden_runs_with_levels_that_no_cell_is_held_at(golden_model: Path) -> None:
    """Nothing is pooled: every recorded number comes out as without them."""
    for model, drawn, plan, expected in replays(golden_model, torch.float32):
        bias = np.ones(plan.last_read.shape)
        levels = dataclasses.replace(plan, coarse=tuple(CoarseCells(x, plan.last_read, bias) for x in LEVELS[1:]))
        if isinstance(model, TextConditionalModel):
            check_infinity_run(model, list(drawn), levels, expected)
        else:
            check_scales(model, list(drawn), levels, expected)


# ---------------------------------------------------------------------- attached to other implementations


def stand_in_forward(module: Any, layer: int, oracle: DenseLevels) -> Callable[..., Tensor]:
    """The stand-in's self-attention with the oracle in place of a softmax over its whole cache."""

    def forward(x: Tensor, *_: Any, **told: Any) -> Tensor:
        joined = module.mat_qkv(x) + torch.cat([module.q_bias, module.zero_k_bias, module.v_bias])
        q, k, v = (part.unflatten(-1, (module.num_heads, -1)).transpose(1, 2) for part in joined.chunk(3, dim=-1))
        q, k = F.normalize(q, dim=-1) * module.scale_mul_1H11.exp(), F.normalize(k, dim=-1)
        if isinstance(oracle, Unrotated):
            oracle.straight, scale = k, told["scale_ind"]
            table = told["rope2d_freqs_grid"][str(tuple(SCALES))][:, 0, 0, 0, oracle.plan.schedule.slice(scale)]
            q, k = turned(q, *table), turned(k, *table)
        out: Tensor = module.proj(oracle.attend(layer, q, k, v).transpose(1, 2).flatten(2))
        return out

    return forward


@pytest.mark.parametrize("name", list(KINDS))
def test_attached_models_read_means(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, draw, schedule = KINDS[name]
    model = make()
    if name == "infinity":  # with the rotary table of the published template nearest to its 4 x 3
        model.add_schedule(SCALES, ScaleSchedule.infinity("1M", 4 / 3).scales[-1][1:])
    modules = attention_of(model)
    plan = pooling_plan(CacheGeometry(len(modules), modules[0].num_heads, modules[0].head_dim, schedule))
    plain = draw(model)
    with heatkv.attach(model, plan) as attached:
        ours = draw(model)
    assert attached.cache.allocated_bytes == plan.bytes(4, "float32")
    oracle = Unrotated(plan) if name == "infinity" else DenseLevels(plan)
    for layer, module in enumerate(modules):
        monkeypatch.setattr(module, "forward", stand_in_forward(module, layer, oracle))
    expected = draw(model)
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-4 * float(other.std()) + 1e-6)
    assert any((one - other).abs().max() > 0.02 * other.std() for one, other in zip(plain, expected, strict=True))
