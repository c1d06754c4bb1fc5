"""Does the package do here what it promises? A few checks in seconds, each against something worked out another way.

They need nothing but the installed package: no test runner, network or files of theirs (`heatkv doctor --self-test`).
Shapes: R rows, H heads, N queries, M keys, D head size.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from heatkv.calibration.measure import calibrate
from heatkv.core.budget import Budget
from heatkv.core.plan import CachePlan, Plan
from heatkv.core.plan_file import load_plan
from heatkv.core.statistics import Statistics
from heatkv.core.storage_type import torch_dtype
from heatkv.engine.arena_cache import KVCache
from heatkv.engine.attention import triton_launch
from heatkv.engine.store import available_codes, decode, encode
from heatkv.generation.loop import Generator, run_scales
from heatkv.models.base import ImageModel
from heatkv.models.catalogue import load_model, model_info
from heatkv.models.sampling import CommonRandomSampler
from heatkv.policies.base import PlanningProblem, make_policy
from heatkv.registry import registered_policies
from heatkv.testing.contract import contract_checks, made_up_statistics, small_geometries

SAMPLES = 2
BUDGET = "20%"
MOST_GAP = 0.005
"""Of the solver, of the certified bound (design: 0.5 %)."""


class SelfTestError(AssertionError):
    """Something is not as promised."""


@dataclass(frozen=True)
class Outcome:
    """What came of a check: `passed` is None where it cannot be made on this machine."""

    name: str
    passed: bool | None
    told: str


class _NotHere(Exception):
    """A check that cannot be made on this machine."""


def _demand(holds: bool, otherwise: str) -> None:
    if not holds:
        raise SelfTestError(otherwise)


class MaskedAttention:
    """Attention that keeps everything and hides what a static plan without levels has dropped, in float64."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._seen: list[list[tuple[Tensor, Tensor]]] = [[] for _ in plan.last_read]

    def attend(self, layer: int, q_RHND: Tensor, k_RHND: Tensor, v_RHND: Tensor) -> Tensor:
        seen = self._seen[layer]
        target = len(seen)
        seen.append((k_RHND.double(), v_RHND.double()))
        k, v = (torch.cat(parts, dim=2) for parts in zip(*seen, strict=True))
        read_HS = self._plan.last_read[layer, :, : target + 1] >= target
        read_HM = np.repeat(read_HS, self._plan.schedule.tokens[: target + 1], axis=1)
        hidden_HM = torch.from_numpy(~read_HM).to(k.device)
        logits = q_RHND.double() @ k.transpose(2, 3)
        return (logits.masked_fill(hidden_HM[:, None], -torch.inf).softmax(dim=-1) @ v).to(v_RHND.dtype)


class _Material:
    """What several checks use, made when the first of them asks."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    @cached_property
    def model(self) -> ImageModel[Any]:
        return load_model("emoji", device=self.device)

    @cached_property
    def statistics(self) -> Statistics:
        return calibrate(self.model, SAMPLES, batch=SAMPLES)

    @cached_property
    def plan(self) -> Plan:
        plan = self.model.plan("heatkv", BUDGET, statistics=self.statistics)
        assert isinstance(plan, Plan)
        return plan

    @cached_property
    def logits(self) -> list[Tensor]:
        return self.logits_of(Generator(self.model, self.plan, SAMPLES))

    def logits_of(self, generator: Generator[Any]) -> list[Tensor]:
        """Guided logits of every scale, of pictures that the generator draws."""
        seen: list[Tensor] = []
        generator.draw(self.model.labels(SAMPLES), observe=lambda _, logits_BNV: seen.append(logits_BNV))
        return seen

    def expect(self, logits: Sequence[Tensor], what: str, most: float) -> str:
        """The largest difference from this plan's logits, in words. Raises SelfTestError beyond `most`."""
        differences = [float((one - other).abs().max()) for one, other in zip(logits, self.logits, strict=True)]
        worst = max(differences)
        _demand(worst <= most, f"{what}: logits differ by {worst:.2g}, more than {most:.2g}")
        return f"{len(logits)} scales of {SAMPLES} pictures, logits within {worst:.1e}"


def _attention(material: _Material) -> str:
    """attention over the arena, against all keys and a mask"""
    model = material.model
    seen: list[Tensor] = []
    sampler = CommonRandomSampler(0, range(SAMPLES), model.sampling)
    run_scales(
        model, model.labels(SAMPLES), MaskedAttention(material.plan), sampler, model.sampling,
        observe=lambda _, logits_BNV: seen.append(logits_BNV), decode=False,
    )  # fmt: skip
    return material.expect(seen, "attention with a mask", 1e-3)


def _mass(material: _Material) -> str:
    """calibration, against its definition"""
    mass = material.statistics.mass
    _demand(bool(np.isfinite(mass).all()), "the statistics are not finite")
    _demand(bool(np.allclose(mass.sum(-1), 1, atol=1e-5)), "a head's attention to all scales does not sum to 1")
    _demand(not np.triu(mass, 1).any(), "a scale was read before it was drawn")
    layers, heads = mass.shape[:2]
    return f"{SAMPLES} samples, {layers}x{heads} heads, mass sums to 1"


def _budgets(material: _Material) -> str:
    """every policy's plan and arena, against the budget"""
    geometry = small_geometries()[0]
    checks = dict(contract_checks())
    names = list(registered_policies())
    for name in names:
        for check in ("budget", "memory"):
            checks[check](name, geometries=[geometry])
    return f"{len(names)} policies, peak and allocated bytes within it"


def _published(material: _Material) -> str:
    """plans of Infinity-2B at 1M, and their arena's bytes"""
    geometry = model_info("infinity-2b").geometry("1M")
    statistics = made_up_statistics(geometry)
    shown = []
    for policy in ("heatkv", "heatkv-lp"):
        problem = PlanningProblem(geometry, Budget.parse("10%"), statistics, rows=2, storage="bfloat16")
        plan = make_policy(policy, **({"value": "error"} if policy == "heatkv-lp" else {})).plan(problem)
        assert isinstance(plan, Plan)
        cache = KVCache(plan, 2, torch.bfloat16, "meta")
        allowed = geometry.full_bytes(rows=2, storage="bfloat16") // 10
        _demand(
            cache.allocated_bytes <= allowed, f"{policy} takes {cache.allocated_bytes} bytes, {allowed} are allowed"
        )
        if plan.gap is not None:
            _demand(plan.gap <= MOST_GAP, f"the solver leaves a gap of {plan.gap:.2%}")
        shown.append(f"{policy} {cache.allocated_bytes / allowed:.2%}")
    return f"of the 10 % allowed: {', '.join(shown)}"


def _files(material: _Material) -> str:
    """statistics and plans, through files"""
    with tempfile.TemporaryDirectory() as folder:
        saved = Path(folder) / "statistics.safetensors"
        material.statistics.save(saved)
        loaded = Statistics.load(saved)
        _demand(np.array_equal(loaded.mass, material.statistics.mass), "statistics change in a file")
        for name in ("heatkv", "snapkv"):
            plan: CachePlan = material.model.plan(name, BUDGET, statistics=material.statistics)
            path = Path(folder) / f"{name}.json"
            plan.save(path)
            _demand(load_plan(path) == plan, f"a plan of {name} changes in a file")
    return "the same again"


def _codes(material: _Material) -> str:
    """8-bit storage, against the step of its codes"""
    x_MD = torch.randn(512, 64, generator=torch.Generator().manual_seed(0)).to(material.device)
    most_M1 = x_MD.abs().amax(dim=-1, keepdim=True)
    # half a step of rounding, with as much again for the scale's own bf16
    allowed = {"int8": most_M1 / 127, "fp8": x_MD.abs() / 16 + most_M1 / 256}
    codings = available_codes(material.device)
    for coding in codings:
        back_MD = decode(*encode(x_MD, torch_dtype(coding)), torch.float32)
        _demand(bool(((back_MD - x_MD).abs() <= allowed[coding]).all()), f"{coding} is off by more than its step")
        logits = material.logits_of(Generator(material.model, material.plan, SAMPLES, storage=coding))
        _demand(all(bool(scale.isfinite().all()) for scale in logits), f"logits over {coding} are not finite")
    if not codings:
        raise _NotHere("no 8-bit type can be stored here")
    return f"{', '.join(codings)}: values come back within it, and logits are finite"


def _fused(material: _Material) -> str:
    """the fused attention kernel, against the plain one"""
    why_not = triton_launch.missing(material.device, material.model.compute_dtype, material.model.geometry.head_dim)
    if material.device.type != "cuda":
        raise _NotHere(why_not or "no CUDA device, and the interpreter takes minutes")
    if why_not:
        raise _NotHere(why_not)
    logits = material.logits_of(Generator(material.model, material.plan, SAMPLES, attention="triton"))
    return material.expect(logits, "the fused kernel", 1e-2)


def _graphs(material: _Material) -> str:
    """CUDA graphs, against drawing without"""
    if material.device.type != "cuda":
        raise _NotHere("no CUDA device")
    generator = Generator(material.model, material.plan, SAMPLES, graphs=True)
    logits = [material.logits_of(generator) for _ in range(3)][-1]  # the second is recorded, the third replayed
    return material.expect(logits, "a replayed graph", 1e-4)


CHECKS: tuple[Callable[[_Material], str], ...] = (
    _mass, _attention, _budgets, _published, _files, _codes, _fused, _graphs,
)  # fmt: skip


def self_test(device: torch.device | str = "cpu") -> Iterator[Outcome]:
    """Run every check on the device and tell of each as it ends, whatever it raised."""
    material = _Material(torch.device(device))
    for check in CHECKS:
        name = check.__doc__ or check.__name__
        try:
            yield Outcome(name, True, check(material))
        except _NotHere as reason:
            yield Outcome(name, None, str(reason))
        except Exception as error:  # whatever it is, the check failed, and the others are still of interest
            told = str(error) if isinstance(error, AssertionError) else f"{type(error).__name__}: {error}"
            yield Outcome(name, False, told or type(error).__name__)
