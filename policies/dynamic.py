"""Dynamic policies: capacities before the first image, scores of the held tokens while drawing.

A class must give `score`, beside what `base` lists. It may give `carried` and `carry`, numbers that go with every held
token; `capacities`, or `largest` where they follow no mean; `shared`, `wants_input` and `resolved`.

Shapes: R rows, H heads of a group, N tokens of the running scale, C candidates, D head size, X carried numbers, W width
of the model; L layers, T scales.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal, Self

import numpy as np
import torch
from torch import Tensor

from heatkv.core.capacity_plan import CapacityPlan, available_tokens
from heatkv.core.plan import live_of_held
from heatkv.core.schedule import ScaleSchedule
from heatkv.core.schema import IntArray
from heatkv.errors import BudgetError
from heatkv.policies.base import EvictionPolicy, PlanningProblem, third_party

MAX_BLOCK_NUMBERS = 1 << 22
"""Most attention probabilities that exist at a time (16 MiB)."""

_NOTHING = torch.empty(0)  # made once: a step of a CUDA graph makes no tensors on the host


@dataclass(frozen=True)
class Candidates:
    """What a policy sees when a layer has run a target scale: the tokens of which it is to keep the best.

    The first `held` of the C candidates come from the cache, in sequence order, the last N are the running scale's own.
    Nothing of it may be changed.
    """

    layer: int
    target: int
    heads: tuple[int, ...]
    """Indices of the H heads."""
    heads_of_layer: int
    schedule: ScaleSchedule
    capacity: int
    """How many tokens each head keeps; their mean where heads share."""
    held: int
    q_RHND: Tensor
    """Queries, which carry the softmax scale."""
    k_RHCD: Tensor
    """Keys as they are cached; so are the values."""
    v_RHCD: Tensor
    valid_RHC: Tensor | None = None
    """False for places that hold nothing, which come first; None where all hold a token."""
    carried_RHCX: Tensor = _NOTHING
    """What `carry` gave when a token was last a candidate, 0 for new ones; fp32."""
    attention_input_RNW: Tensor = _NOTHING
    """The attention's input, for policies with `wants_input`; so is the query weight."""
    query_weight_HDW: Tensor = _NOTHING

    @property
    def count(self) -> int:
        """C."""
        return self.k_RHCD.shape[2]

    @property
    def new(self) -> int:
        """N."""
        return self.q_RHND.shape[2]

    @property
    def index_RHC(self) -> Tensor:
        """How many tokens of the head come before each candidate, (R, H, C) or a shape that broadcasts to it."""
        if self.valid_RHC is None:
            return torch.arange(self.count, device=self.k_RHCD.device)
        return self.valid_RHC.cumsum(dim=-1) - 1

    def no_scores(self) -> Tensor:
        """Zeros, (R, H, C) fp32, to start from."""
        return torch.zeros(self.k_RHCD.shape[:3], device=self.k_RHCD.device)

    def probabilities(self, queries: slice = slice(None)) -> Iterator[Tensor]:
        """What these queries attend to, (R, H, some of N, C) fp32, block by block."""
        q_RHND = self.q_RHND[:, :, queries]
        keys_RHDC = self.k_RHCD.float().transpose(2, 3)
        rows, heads, count, _ = q_RHND.shape
        block = max(1, MAX_BLOCK_NUMBERS // (rows * heads * self.count))
        for first in range(0, count, block):
            logits = q_RHND[:, :, first : first + block].float() @ keys_RHDC
            if self.valid_RHC is not None:
                logits.masked_fill_(~self.valid_RHC[:, :, None], -math.inf)
            yield logits.softmax(dim=-1)

    def received(self, queries: slice = slice(None)) -> Tensor:
        """Attention probability that every candidate receives, summed over these queries, (R, H, C) fp32."""
        total = self.no_scores()
        for p_RHNC in self.probabilities(queries):
            total += p_RHNC.sum(dim=2)
        return total


@dataclass(frozen=True)
class DynamicPolicy(EvictionPolicy):
    """A policy that scores tokens while images are drawn; the cache keeps the best, as many as the plan says.

    Totals are static, so the promised bytes hold whatever is chosen, and every row of the batch chooses for itself.
    """

    kind: ClassVar[Literal["static", "dynamic"]] = "dynamic"

    @property
    def shared(self) -> bool:
        """Whether the heads of a layer share their capacity: the best scores of all are kept."""
        return False

    @property
    def carried(self) -> int:
        """How many numbers go with every held token; 4 bytes each count against the budget."""
        return 0

    @property
    def wants_input(self) -> bool:
        """Whether `score` needs the attention's input and the query weights."""
        return False

    @abstractmethod
    def score(self, seen: Candidates) -> Tensor:
        """How much every candidate is worth, (R, H, C); the highest are kept, +inf before all others. Policies made of
        others put theirs in front with `put_first`."""

    def carry(self, seen: Candidates) -> Tensor:
        """The numbers to carry with every candidate, (R, H, C, X) fp32; `score` and the next target see them."""
        raise NotImplementedError(f"{type(self).__name__} carries numbers but has no carry()")

    def capacities(self, problem: PlanningProblem, mean: int) -> IntArray:
        """Past tokens of every head for every target, (L, H, T), when heads may hold `mean` on average."""
        return np.broadcast_to(np.minimum(available_tokens(problem.geometry), mean), problem.geometry.shape).copy()

    def largest(self, problem: PlanningProblem, room: int) -> IntArray:
        """The capacities, (L, H, T), of the largest mean that hold at most `room` token-heads at every checkpoint; at
        least one token in every head.

        Raises BudgetError when none do.
        """
        geometry = problem.geometry
        most = room // (geometry.layers * geometry.heads)
        if most < 1:
            raise BudgetError(f"budget {problem.budget} is {room} token-heads, fewer than one a head; raise it")
        # layers that change one after another may not reach `most`, which is tried first
        low, high, largest = 0, most + 1, None
        while high - low > 1:
            mean = most if high > most and largest is None else (low + high) // 2
            capacities = self._at_least_one(problem, mean)
            if peak(capacities) <= room:
                low, largest = mean, capacities
            else:
                high = mean
        if largest is None:
            least = peak(self._at_least_one(problem, 1))
            raise BudgetError(f"{self.name} holds {least} token-heads or more, {problem.budget} has room for {room}")
        # what is left is less than one token per head: whole layers get one more, as many as there is room for
        spare = (room - peak(largest)) // geometry.heads
        largest = largest.copy()
        largest[:spare] = np.minimum(largest[:spare] + 1, available_tokens(geometry))
        return largest

    def _at_least_one(self, problem: PlanningProblem, mean: int) -> IntArray:
        """The capacities of this mean, but no head without a token where there is one."""
        return np.maximum(self.capacities(problem, mean), np.minimum(available_tokens(problem.geometry), 1))

    def resolved(self, problem: PlanningProblem) -> Self:
        """The policy with what it takes from the problem, such as classes of heads, written into its options: a plan
        must record all that its scores depend on."""
        return self

    def plan(self, problem: PlanningProblem) -> CapacityPlan:
        """A checked plan. Raises BudgetError when not one token per head fits, PolicyError for options that are wrong,
        and PlanError for capacities that are impossible."""
        problem = self.checked(problem)
        policy, full = self.resolved(problem), problem.share == 1
        if full:  # nothing is ever dropped, so nothing need be carried
            capacity: IntArray = np.broadcast_to(available_tokens(problem.geometry), problem.geometry.shape)
        else:
            with third_party(f"policy {self.name!r} failed"):
                capacity = policy.largest(problem, policy.room(problem))
        if not np.asarray(capacity)[:, :, 1:].all():
            raise BudgetError(f"{self.name} leaves heads without any token at {problem.budget}; raise it")
        shared, carried = (False, 0) if full else (policy.shared, policy.carried)
        return CapacityPlan(**policy.common(problem), capacity=capacity, shared=shared, carried=carried)

    def room(self, problem: PlanningProblem) -> int:
        """Token-heads that may be held, after what is carried has taken its part of the budget's bytes."""
        geometry = problem.geometry
        # where tokens are chosen while drawing, none has a place of its own that is not coded
        _, bytes_each = geometry.token_head_bytes(1, problem.storage)
        counts = 4 * geometry.layers * geometry.heads if self.shared else 0
        return max(0, problem.budget_token_heads * bytes_each - counts) // (bytes_each + 4 * self.carried)


FIRST = torch.finfo(torch.float32).max / 2**16
"""Scores from here on are of tokens that are put before others."""


def put_first(score_RHC: Tensor, which_RHC: Tensor) -> Tensor:
    """The scores, in fp32, with +inf for these tokens; what was +inf comes next, and the order of all others stays."""
    score = score_RHC.float()
    lowered = (score / 2).clamp(max=torch.finfo(torch.float32).max)
    return torch.where(score >= FIRST, lowered, score).masked_fill(which_RHC, math.inf)


def alike_in_heads(problem: PlanningProblem, capacity_LT: IntArray) -> IntArray:
    """(L, H, T), the same in all heads of a layer; what a layer has dropped for one target it lacks for the next."""
    capacity_LT = capacity_LT.copy()
    for target, tokens in enumerate(problem.geometry.schedule.tokens[:-1], start=1):
        capacity_LT[:, target] = np.minimum(capacity_LT[:, target], capacity_LT[:, target - 1] + tokens)
    return np.broadcast_to(capacity_LT[:, None], problem.geometry.shape).copy()


def peak(capacity_LHT: IntArray) -> int:
    """Token-heads that capacities hold at the fullest checkpoint."""
    return int(live_of_held(np.asarray(capacity_LHT).sum(axis=1)).max())
