"""Does the package work here? Draws two pictures and runs the contract on two policies, in seconds, from the installed
package alone.

Shapes: R rows, H heads, N queries, M keys, D head size, B images, V logits of a token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from heatkv.core.plan import Plan
from heatkv.engine.arena_cache import Attend
from heatkv.engine.attention import triton_launch
from heatkv.generation.loop import Generator, run_scales
from heatkv.models.base import ImageModel
from heatkv.models.catalogue import load_model
from heatkv.models.sampling import CommonRandomSampler
from heatkv.testing.contract import check_policy
from heatkv.testing.material import small_geometries

PICTURES = 2
POLICIES = ("heatkv", "snapkv")
MOST_DIFFERENCE = 1e-3
"""Of logits, between the arena and attention with a mask."""


@dataclass(frozen=True)
class Outcome:
    """What came of a check: what was seen, or what is wrong."""

    name: str
    passed: bool
    detail: str


class MaskedAttention(Attend):
    """Attention that keeps everything and hides what a static plan without levels has dropped, in float64."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._seen: list[list[tuple[Tensor, Tensor]]] = [[] for _ in plan.last_read]

    def attend(self, layer: int, q_RHND: Tensor, k_RHND: Tensor, v_RHND: Tensor) -> Tensor:
        seen, target = self._seen[layer], len(self._seen[layer])
        seen.append((k_RHND.double(), v_RHND.double()))
        k_RHMD, v_RHMD = (torch.cat(parts, dim=2) for parts in zip(*seen, strict=True))
        read_HS = self._plan.last_read[layer, :, : target + 1] >= target
        read_HM = torch.from_numpy(read_HS.repeat(self._plan.schedule.tokens[: target + 1], axis=1)).to(k_RHMD.device)
        logits_RHNM = (q_RHND.double() @ k_RHMD.transpose(2, 3)).masked_fill(~read_HM[:, None], -torch.inf)
        return (logits_RHNM.softmax(dim=-1) @ v_RHMD).to(v_RHND.dtype)


def _logits(draw: Callable[..., object]) -> list[Tensor]:
    """Guided logits of every scale while it draws."""
    seen: list[Tensor] = []
    draw(observe=lambda _, logits_BNV: seen.append(logits_BNV))
    return seen


def _draw(device: torch.device) -> str:
    model: ImageModel[Any] = load_model("emoji", device=device)
    plan, labels, settings = model.plan("random", "20%"), model.labels(PICTURES), model.sampling
    assert isinstance(plan, Plan)
    sampler = CommonRandomSampler(0, range(PICTURES), settings)
    wanted = _logits(partial(run_scales, model, labels, MaskedAttention(plan), sampler, settings))
    ways: dict[str, dict[str, Any]] = {"grouped attention": {}}
    if device.type == "cuda":
        ways["CUDA graphs"] = {"graphs": True}
        if triton_launch.missing(device, model.compute_dtype, plan.geometry.head_dim) is None:
            ways["fused kernel"] = {"attention": "triton"}
    differences = []
    for way, options in ways.items():
        generator, times = Generator(model, plan, PICTURES, **options), 3 if "graphs" in options else 1
        # with graphs the second is recorded, the third replayed
        seen = [_logits(partial(generator.draw, labels)) for _ in range(times)][-1]
        worst = max(float((one - other).abs().max()) for one, other in zip(seen, wanted, strict=True))
        if not worst <= MOST_DIFFERENCE * (10 if "attention" in options else 1):
            raise AssertionError(f"with {way} logits differ by {worst:.2g} from those of attention with a mask")
        differences.append(f"{way} within {worst:.1e}")
    return f"logits of {PICTURES} pictures: {', '.join(differences)}"


def _keep_contract(policy: str, _: torch.device) -> str:
    check_policy(policy, geometries=small_geometries()[:1])
    return "every promise is kept"


CHECKS: dict[str, Callable[[torch.device], str]] = {
    "pictures over the arena, against attention with a mask": _draw,
    **{f"the contract of {name}": partial(_keep_contract, name) for name in POLICIES},
}


def self_test(device: torch.device | str = "cpu") -> Iterator[Outcome]:
    """Run every check and give its outcome as it ends, whatever it raised."""
    for name, check in CHECKS.items():
        try:
            yield Outcome(name, True, check(torch.device(device)))
        except Exception as error:  # whatever it is, the check failed, and the others are still of interest
            yield Outcome(name, False, f"{type(error).__name__}: {error}")
