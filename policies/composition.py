"""Policies made of others: heads that share, layers of different sizes, scales that are always kept."""

from __future__ import annotations

import ast
import dataclasses
import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from heatkv.core.capacity_plan import available_tokens
from heatkv.errors import PolicyError
from heatkv.policies.base import PlanningProblem, make_policy
from heatkv.policies.dynamic import Candidates, DynamicPolicy
from heatkv.policies.options import options_of
from heatkv.registry import find_policy, register

IntArray = NDArray[np.int64]


def inner_policy(text: str) -> DynamicPolicy:
    """A dynamic policy written as its name, or with options as `snapkv:window=16:kernel=3`. Raises PolicyError."""
    name, *pairs = str(text).split(":")
    options: dict[str, Any] = {}
    for pair in pairs:
        option, equals, value = pair.partition("=")
        if not equals or not option.strip():
            raise PolicyError(f"cannot read base={text!r}; write it as snapkv or snapkv:window=16:kernel=3")
        options[option.strip()] = _read(name, option.strip(), value)
    policy = make_policy(name, **options)
    if not isinstance(policy, DynamicPolicy):
        raise PolicyError(f"base={text!r} is no dynamic policy; compose those that score tokens, such as snapkv")
    return policy


def _read(name: str, option: str, value: str) -> Any:
    """The value of an option, by its type. Raises PolicyError for one that the policy does not have."""
    known = options_of(find_policy(name))
    if option not in known:
        raise PolicyError(f"policy {name!r} has no option {option!r}; its options are {', '.join(known)}")
    if known[option].wanted is None:  # lists, which only a plan's own settings have in them
        try:
            return ast.literal_eval(value)
        except (ValueError, SyntaxError) as error:
            raise PolicyError(f"{option} of policy {name!r} cannot be read from {value!r}") from error
    return known[option].parse(value, name)


@dataclass(frozen=True)
class Wrapper(DynamicPolicy):
    """What policies share that change another one, their `base`, which is written as `inner_policy` reads it."""

    needs: ClassVar[str] = "what its base needs"

    base: str = "snapkv"

    def plans_from(self) -> str:
        return self.inner.plans_from()

    @cached_property
    def inner(self) -> DynamicPolicy:
        return inner_policy(self.base)

    @property
    def shared(self) -> bool:
        return self.inner.shared

    @property
    def carried(self) -> int:
        return self.inner.carried

    @property
    def wants_input(self) -> bool:
        return self.inner.wants_input

    @property
    def level_cost(self) -> str | None:
        return self.inner.level_cost

    def check(self, problem: PlanningProblem) -> None:
        super().check(problem)
        self.inner.check(problem)

    def check_measured(self, problem: PlanningProblem) -> None:
        self.inner.check_measured(problem)

    def resolved(self, problem: PlanningProblem) -> DynamicPolicy:
        return self._over(self.inner.resolved(problem))

    def _over(self, inner: DynamicPolicy) -> DynamicPolicy:
        """The same over another base."""
        told = [f"{field.name}={getattr(inner, field.name)}" for field in dataclasses.fields(inner)]
        return self if inner == self.inner else dataclasses.replace(self, base=":".join([inner.name, *told]))

    def capacities(self, problem: PlanningProblem, mean: int) -> IntArray:
        return self.inner.capacities(problem, mean)

    def carry(self, seen: Candidates) -> Tensor:
        return self.inner.carry(seen)

    def score(self, seen: Candidates) -> Tensor:
        return self.inner.score(seen)


@register
@dataclass(frozen=True)
class AdaKV(Wrapper):
    """The heads of a layer share its places: what scores highest over all heads is kept, whichever head it is in.

    Each head first keeps its own floor(alpha m) best tokens, m being the mean capacity and `alpha` 0.2 (published); the
    rest of the layer's places go to the highest scores. Every row of the batch shares for itself. The scores must be
    comparable between heads, as probabilities are.
    """

    name: ClassVar[str] = "adakv"
    source: ClassVar[str] = "Ada-KV (Feng et al. 2024)"

    alpha: float = 0.2

    @property
    def shared(self) -> bool:
        return True

    def check(self, problem: PlanningProblem) -> None:
        super().check(problem)
        if self.inner.shared:
            raise PolicyError(f"the heads of base={self.base!r} share already; name another base")
        if not 0 <= self.alpha <= 1:
            raise PolicyError(f"alpha={self.alpha!r} must be a share from 0 to 1")

    def score(self, seen: Candidates) -> Tensor:
        score = self.inner.score(seen)
        if seen.valid_RHC is not None:
            score = score.masked_fill(~seen.valid_RHC, -math.inf)
        own = min(math.floor(self.alpha * seen.capacity), seen.count)
        best = score.topk(own, dim=-1).indices
        # a head's own part may not be larger than what it has
        has = torch.ones_like(best, dtype=torch.bool) if seen.valid_RHC is None else seen.valid_RHC.gather(-1, best)
        return score.scatter(-1, best, torch.where(has, math.inf, -math.inf).to(score.dtype))


@register
@dataclass(frozen=True)
class PerLayer(Wrapper):
    """Layers of different sizes: the mean of the base's capacities, divided among the layers by given weights.

    `weights` are one number per layer, or two, for the first and the last with a straight line between them.
    """

    name: ClassVar[str] = "per-layer"
    source: ClassVar[str] = "composition"

    weights: str = "2,1"

    def check(self, problem: PlanningProblem) -> None:
        super().check(problem)
        self._weights(problem.geometry.layers)

    def _weights(self, layers: int) -> NDArray[np.float64]:
        try:
            given = [float(weight) for weight in str(self.weights).split(",")]
        except ValueError as error:
            raise PolicyError(f"weights={self.weights!r}; write numbers as 2,1") from error
        if len(given) not in (2, layers) or not all(math.isfinite(w) and w > 0 for w in given):
            raise PolicyError(
                f"weights={self.weights!r} must be {layers} numbers above zero, one per layer, or 2 for first and last"
            )
        weights = np.linspace(given[0], given[1], layers) if len(given) == 2 != layers else np.array(given)
        return np.asarray(weights / weights.mean())

    def capacities(self, problem: PlanningProblem, mean: int) -> IntArray:
        of_layers = [
            self.inner.capacities(problem, math.floor(mean * weight))[layer]
            for layer, weight in enumerate(self._weights(problem.geometry.layers))
        ]
        return np.stack(of_layers)


@register
@dataclass(frozen=True)
class Protected(Wrapper):
    """The base, but the tokens of given scales are never dropped.

    `scales` are numbers from 0, separated by commas. Unless they are the first ones, which stay in front of what a head
    holds, every token carries its scale, 4 bytes, which count against the budget.
    """

    name: ClassVar[str] = "protected"
    source: ClassVar[str] = "composition"

    scales: str = "0,1,2"

    def _scales(self) -> tuple[int, ...]:
        try:
            scales = tuple(sorted({int(scale) for scale in str(self.scales).split(",")}))
        except ValueError as error:
            raise PolicyError(f"scales={self.scales!r}; write scales as 0,1,2") from error
        if scales[0] < 0:
            raise PolicyError(f"scales={self.scales!r}; they count from 0")
        return scales

    def _first(self) -> bool:
        scales = self._scales()
        return scales == tuple(range(len(scales)))

    @property
    def carried(self) -> int:
        return self.inner.carried + (0 if self._first() else 1)

    def check(self, problem: PlanningProblem) -> None:
        super().check(problem)
        last = len(problem.geometry.schedule) - 2
        if self._scales()[-1] > last:
            raise PolicyError(f"scales={self.scales!r}; the last scale that is cached is {last}")

    def capacities(self, problem: PlanningProblem, mean: int) -> IntArray:
        found = self.inner.capacities(problem, mean)
        kept = np.zeros(len(problem.geometry.schedule), dtype=np.int64)
        for scale in self._scales():
            kept[scale + 1 :] += problem.geometry.schedule.tokens[scale]
        if (found.min(axis=(0, 1)) < kept).any() and problem.budget_token_heads < problem.geometry.full_token_heads:
            found = np.maximum(found, np.minimum(kept, available_tokens(problem.geometry)))
        return found

    def carry(self, seen: Candidates) -> Tensor:
        assert seen.carried_RHCX is not None
        if self._first():
            return self.inner.carry(seen)
        own = seen.carried_RHCX[..., -1:].clone()
        own[:, :, seen.held :] = seen.target
        if not self.inner.carried:
            return own
        inner = self.inner.carry(dataclasses.replace(seen, carried_RHCX=seen.carried_RHCX[..., :-1]))
        return torch.cat([inner, own], dim=-1)

    def score(self, seen: Candidates) -> Tensor:
        scales = self._scales()
        if self._first():
            kept = seen.index_RHC < seen.schedule.offsets[len(scales)]
            return self.inner.score(seen).masked_fill(kept, math.inf)
        assert seen.carried_RHCX is not None
        of_scale = seen.carried_RHCX[..., -1]
        kept = torch.zeros_like(of_scale, dtype=torch.bool)
        for scale in scales:
            kept |= of_scale == scale
        given = seen.carried_RHCX[..., :-1] if self.inner.carried else None
        return self.inner.score(dataclasses.replace(seen, carried_RHCX=given)).masked_fill(kept, math.inf)
