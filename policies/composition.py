"""Policies made of others: heads that share, layers of different sizes, scales that are always kept."""

from __future__ import annotations

import ast
import dataclasses
import math
from collections.abc import Set
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, Self

import numpy as np
import torch
from msgspec import Meta
from torch import Tensor

from heatkv.core.schema import FloatArray, IntArray
from heatkv.errors import PolicyError
from heatkv.policies.base import PlanningProblem, make_policy
from heatkv.policies.dynamic import FIRST, Candidates, DynamicPolicy, put_first
from heatkv.policies.options import numbers_from, options_of
from heatkv.registry import find_policy, register


def read_policy(text: str) -> DynamicPolicy:
    """A dynamic policy written as its name, or with options as `snapkv:window=16:kernel=3`; a base with options of its
    own goes in brackets, as in `adakv:base=[h2o:recent=0.2]:alpha=0.1`. Raises PolicyError."""
    name, *pairs = _parts(text)
    known, options = options_of(find_policy(name)), dict[str, Any]()
    for pair in pairs:
        option, equals, value = (part.strip() for part in pair.partition("="))
        if not equals:
            raise PolicyError(f"cannot read base={text!r}; write it as snapkv or snapkv:window=16:kernel=3")
        options[option] = value
        if option in known and known[option].wanted is None:  # lists, which only settings of plans have in them
            try:
                options[option] = ast.literal_eval(value)
            except (ValueError, SyntaxError) as error:
                raise PolicyError(f"{option} of policy {name!r} cannot be read from {value!r}") from error
        elif option in known:
            options[option] = known[option].parse(value.removeprefix("[").removesuffix("]"), name)
    policy = make_policy(name, **options)
    if not isinstance(policy, DynamicPolicy):
        raise PolicyError(f"base={text!r} is no dynamic policy; compose those that score tokens, such as snapkv")
    return policy


def _parts(text: str) -> list[str]:
    """What stands between colons that are not in brackets."""
    parts, depth = [""], 0
    for character in text:
        depth += (character == "[") - (character == "]")
        if character == ":" and not depth:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def policy_text(policy: DynamicPolicy) -> str:
    """The policy with all its options, as `read_policy` reads it."""
    options = {field.name: getattr(policy, field.name) for field in dataclasses.fields(policy)}
    for name, value in options.items():
        if isinstance(policy, Wrapper) and name == "base":
            text = value if isinstance(value, str) else policy_text(value)
            options[name] = f"[{text}]" if ":" in text else text
    return ":".join([policy.name, *(f"{name}={value}" for name, value in options.items())])


@dataclass(frozen=True)
class Wrapper(DynamicPolicy):
    """What policies share that change another one, their `base`: a policy, or its text as `read_policy` reads it."""

    base: str | DynamicPolicy = "snapkv"

    @cached_property
    def inner(self) -> DynamicPolicy:
        return read_policy(self.base) if isinstance(self.base, str) else self.base

    @property
    def needs(self) -> Set[str]:
        return self.inner.needs

    @property
    def shared(self) -> bool:
        return self.inner.shared

    @property
    def carried(self) -> int:
        return self.inner.carried

    @property
    def wants_input(self) -> bool:
        return self.inner.wants_input

    def check(self, problem: PlanningProblem) -> None:
        super().check(problem)
        self.inner.check(problem)

    def check_measured(self, problem: PlanningProblem) -> None:
        self.inner.check_measured(problem)

    def resolved(self, problem: PlanningProblem) -> Self:
        inner = self.inner.resolved(problem)
        return self if inner == self.inner else dataclasses.replace(self, base=policy_text(inner))

    def settings(self, problem: PlanningProblem) -> dict[str, Any]:
        base = self.base if isinstance(self.base, str) else policy_text(self.base)
        return super().settings(problem) | {"base": base}

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

    Each head first keeps its own floor(alpha m) best tokens, at least one (chosen), m being the mean capacity and
    `alpha` 0.2 (published); the rest of the layer's places go to the highest scores. Tokens that the base scores +inf
    come before those of a head's own. Every row of the batch shares for itself. The scores must be comparable between
    heads, as probabilities are.
    """

    name = "adakv"
    source = "Ada-KV (Feng et al. 2024)"
    shared = True

    alpha: Annotated[float, Meta(ge=0, le=1)] = 0.2

    def check(self, problem: PlanningProblem) -> None:
        super().check(problem)
        if self.inner.shared:
            raise PolicyError(f"the heads of base={self.base!r} share already; name another base")

    def score(self, seen: Candidates) -> Tensor:
        score = self.inner.score(seen).float()
        if seen.valid_RHC is not None:
            score = score.masked_fill(~seen.valid_RHC, -math.inf)
        own = min(max(1, math.floor(self.alpha * seen.capacity)), seen.count)  # no head is left with nothing
        worth, best = score.topk(own, dim=-1)
        # a head's own part may not be larger than what it has
        has = torch.ones_like(best, dtype=torch.bool) if seen.valid_RHC is None else seen.valid_RHC.gather(-1, best)
        return score.scatter(-1, best, worth.clamp(min=FIRST).masked_fill(~has, -math.inf))


@register
@dataclass(frozen=True)
class PerLayer(Wrapper):
    """Layers of different sizes: the mean of the base's capacities, divided among the layers by given weights.

    `weights` are one number per layer, or two, for the first and the last with a straight line between them.
    """

    name = "per-layer"
    source = "composition"

    weights: str = "2,1"

    def check(self, problem: PlanningProblem) -> None:
        super().check(problem)
        self._weights(problem.geometry.layers)

    def _weights(self, layers: int) -> FloatArray:
        """The weight of every layer; their mean is 1."""
        numbers = numbers_from(self.weights, float, "weights")
        if len(numbers) not in (2, layers) or not all(math.isfinite(w) and w > 0 for w in numbers):
            raise PolicyError(
                f"weights={self.weights!r} must be {layers} numbers above zero, one per layer, or 2 for first and last"
            )
        weights = np.linspace(numbers[0], numbers[1], layers) if len(numbers) == 2 != layers else np.array(numbers)
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

    They come before those that the base scores +inf, such as a window of recent tokens, which gives way where there is
    no room for both. `scales` are numbers from 0, separated by commas. Unless they are the first ones, which stay in
    front of what a head holds, every token carries its scale, 4 bytes, which count against the budget.
    """

    name = "protected"
    source = "composition"

    scales: str = "0,1,2"

    @cached_property
    def _scales(self) -> tuple[int, ...]:
        return tuple(sorted(set(numbers_from(self.scales, int, "scales"))))

    @property
    def _first(self) -> bool:
        return self._scales == tuple(range(len(self._scales)))

    @property
    def carried(self) -> int:
        return self.inner.carried + (0 if self._first else 1)

    def check(self, problem: PlanningProblem) -> None:
        super().check(problem)
        last = len(problem.geometry.schedule) - 2
        if not 0 <= self._scales[0] <= self._scales[-1] <= last:
            raise PolicyError(f"scales={self.scales!r}; the scales that are cached are 0 to {last}")

    def capacities(self, problem: PlanningProblem, mean: int) -> IntArray:
        capacities = self.inner.capacities(problem, mean)
        kept = np.zeros(len(problem.geometry.schedule), dtype=np.int64)
        for scale in _protected(self):
            kept[scale + 1 :] += problem.geometry.schedule.tokens[scale]
        return np.maximum(capacities, kept)

    def carry(self, seen: Candidates) -> Tensor:
        if self._first:
            return self.inner.carry(seen)
        own = seen.carried_RHCX[..., -1:].clone()
        own[:, :, seen.held :] = seen.target
        inner = self._without_own(seen)
        return torch.cat([self.inner.carry(inner), own], dim=-1) if self.inner.carried else own

    def score(self, seen: Candidates) -> Tensor:
        if self._first:
            kept = seen.index_RHC < seen.schedule.offsets[len(self._scales)]
            return put_first(self.inner.score(seen), kept)
        scale_RHC = seen.carried_RHCX[..., -1]
        kept = torch.zeros_like(scale_RHC, dtype=torch.bool)
        for scale in self._scales:
            kept |= scale_RHC == scale
        return put_first(self.inner.score(self._without_own(seen)), kept)

    @staticmethod
    def _without_own(seen: Candidates) -> Candidates:
        """The candidates as the base sees them, without the scale that every token carries."""
        return dataclasses.replace(seen, carried_RHCX=seen.carried_RHCX[..., :-1])


def _protected(policy: DynamicPolicy) -> set[int]:
    """The scales that it never drops, or a policy within it."""
    own = set(policy._scales) if isinstance(policy, Protected) else set[int]()
    return own | (_protected(policy.inner) if isinstance(policy, Wrapper) else set())
