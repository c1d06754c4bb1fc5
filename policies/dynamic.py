"""The interface of dynamic policies: capacities before the first image, scores of the held tokens while drawing.

Shapes: R rows, H heads of a group, N tokens of the running scale, C candidates, D head size, W width of the model.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from heatkv.core.capacity_plan import CapacityPlan, available_tokens
from heatkv.core.plan import live_of_held
from heatkv.core.schedule import ScaleSchedule
from heatkv.errors import BudgetError, HeatKVError, PolicyError
from heatkv.policies.base import EvictionPolicy, PlanningProblem

IntArray = NDArray[np.int64]

MAX_BLOCK_NUMBERS = 1 << 22
"""Most attention probabilities that exist at a time (16 MiB)."""


@dataclass(frozen=True)
class Candidates:
    """What a policy sees when a layer has run a target scale: the tokens of which it is to keep the best.

    The first `held` of the C candidates come from the cache, in sequence order, the last N are the running scale's own.
    `k`, `v` are (R, H, C, D) as they are cached; `q` (R, H, N, D) carries the softmax scale. `heads` are the indices of
    the H heads, of `heads_of_layer`; `capacity` is how many tokens each keeps (their mean where heads share). `valid`
    is None, or false for places that hold nothing, which come first. `carried` is (R, H, C, numbers), what `carry` gave
    when a token was last a candidate, 0 for new ones. `attention_input` (R, N, W) and `query_weight` (H, D, W) are
    there for policies with `wants_input`. Nothing of it may be changed.
    """

    layer: int
    target: int
    heads: tuple[int, ...]
    heads_of_layer: int
    schedule: ScaleSchedule
    capacity: int
    held: int
    q_RHND: Tensor
    k_RHCD: Tensor
    v_RHCD: Tensor
    valid_RHC: Tensor | None = None
    carried_RHCX: Tensor | None = None
    attention_input_RNW: Tensor | None = None
    query_weight_HDW: Tensor | None = None

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
        """Whether the heads of a layer share their capacity: the best scores of all heads are kept."""
        return False

    @property
    def carried(self) -> int:
        """How many numbers go with every held token, computed by `carry`; their bytes count against the budget."""
        return 0

    @property
    def wants_input(self) -> bool:
        """Whether `score` needs the attention's input and the query weights."""
        return False

    @abstractmethod
    def score(self, seen: Candidates) -> Tensor:
        """How much every candidate is worth, (R, H, C); the highest are kept, +inf before all others."""

    def carry(self, seen: Candidates) -> Tensor:
        """The numbers to carry with every candidate, (R, H, C, carried), fp32; `score` sees them as `carried`."""
        raise NotImplementedError(f"{type(self).__name__} carries numbers but has no carry()")

    def capacities(self, problem: PlanningProblem, mean: int) -> IntArray:
        """Past tokens of every head for every target, (L, H, T), when heads may hold `mean` on average: the same number
        in all heads, unless a subclass says otherwise."""
        geometry = problem.geometry
        of_target = np.minimum(available_tokens(geometry), mean)
        return np.broadcast_to(of_target, (geometry.layers, geometry.heads, len(of_target))).copy()

    def room(self, problem: PlanningProblem) -> int:
        """Token-heads that may be held, after what is carried has taken its part of the budget's bytes."""
        geometry, most = problem.geometry, problem.budget_token_heads
        # where tokens are chosen while drawing, none has a place of its own that is not coded
        _, bytes_each = geometry.token_head_bytes(1, problem.storage)
        counts = 4 * geometry.layers * geometry.heads if self.shared else 0
        return max(0, most * bytes_each - counts) // (bytes_each + 4 * self.carried)

    def plan(self, problem: PlanningProblem) -> CapacityPlan:
        """The plan with the largest mean capacity that fits at every checkpoint.

        Raises BudgetError when not one token per head fits, PlanError when a subclass's capacities are impossible.
        """
        problem = self.checked(problem)
        plan = self.resolved(problem)._plan(problem)
        plan.check()
        return plan

    def resolved(self, problem: PlanningProblem) -> DynamicPolicy:
        """The policy with what it takes from the problem, such as classes of heads, written into its options: a plan
        must tell all that its scores depend on."""
        del problem
        return self

    def _plan(self, problem: PlanningProblem) -> CapacityPlan:
        geometry = problem.geometry
        full = np.broadcast_to(available_tokens(geometry), (geometry.layers, geometry.heads, len(geometry.schedule)))
        if problem.share == 1:  # nothing is ever dropped, so nothing need be carried
            return self._finish(problem, full, everything=True)
        room = self.room(problem)
        most = room // (geometry.layers * geometry.heads)
        if most < 1:
            raise BudgetError(
                f"budget {problem.budget} is {room} token-heads, fewer than one for each of {geometry.layers} layers x "
                f"{geometry.heads} heads; raise it"
            )
        try:
            return self._finish(problem, self._largest(problem, room, most))
        except HeatKVError:
            raise
        except Exception as error:  # a third party's policy may fail in any way
            raise PolicyError(f"policy {self.name!r} failed: {type(error).__name__}: {error}") from error

    def _largest(self, problem: PlanningProblem, room: int, most: int) -> IntArray:
        """The capacities of the largest mean that fits; layers that change at different times may not reach `most`."""
        low, high = 0, most + 1
        found: IntArray | None = None
        while high - low > 1:
            mean = high - 1 if found is None and high == most + 1 else (low + high) // 2
            capacities = np.asarray(self.capacities(problem, mean))
            if int(live_of_held(capacities.sum(axis=1)).max()) <= room:
                low, found = mean, capacities
            else:
                high = mean
        if found is None:
            least = int(live_of_held(np.asarray(self.capacities(problem, 1)).sum(axis=1)).max())
            raise BudgetError(
                f"policy {self.name!r} keeps {least} token-heads at least; budget {problem.budget} has room for "
                f"{room}: raise it"
            )
        # what is left is less than one token per head: whole layers get one more, as many as there is room for
        spare = (room - int(live_of_held(found.sum(axis=1)).max())) // problem.geometry.heads
        found = found.copy()
        found[:spare] = np.minimum(found[:spare] + 1, available_tokens(problem.geometry))
        return found

    def _finish(self, problem: PlanningProblem, capacity: IntArray, everything: bool = False) -> CapacityPlan:
        return CapacityPlan(
            policy=self.name,
            geometry=problem.geometry,
            capacity=capacity,
            budget=float(problem.share),
            budget_token_heads=problem.budget_token_heads,
            model=problem.model,
            settings=self.settings(problem),
            shared=self.shared and not everything,
            carried=0 if everything else self.carried,
        )
