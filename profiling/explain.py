"""What a plan keeps, where and when, and what more or less room would be worth by calibration statistics.

Token-time counts every token that is held once for each later target scale that reads it, so a cell that is kept half
as long counts half, and one that is pooled to a quarter of its tokens a quarter.
Arrays: L layers, H heads, T scales, G groups of heads that share one room; last_read as in a plan.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from heatkv.allocation import price_bound, read_value
from heatkv.errors import PolicyError
from heatkv.geometry import Budget
from heatkv.plan import Plan, live_token_heads
from heatkv.policies.base import PlanningProblem
from heatkv.policies.lp import HeatKVLP
from heatkv.statistics import Statistics

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]

_NO_PRICE = 1e-9
"""Share of the largest price below which a price is the solver's rounding."""


def full_last_read(layers: int, heads: int, scales: int) -> IntArray:
    """`last_read` of the full cache."""
    return np.full((layers, heads, scales), scales - 1, dtype=np.int64)


def reads_of_scales(last_reads: Sequence[IntArray]) -> FloatArray:
    """Share of the reads of every source scale, a later target in a head each, that every level serves, (levels, T-1).

    `last_reads` are those of a plan's levels, fine to coarse. For a single level it is the share of token-time, too.
    """
    scales = last_reads[0].shape[2]
    ends = np.stack([np.broadcast_to(np.arange(scales), last_reads[0].shape), *last_reads])
    served: FloatArray = np.diff(ends, axis=0).mean(axis=(1, 2))[:, :-1] / np.arange(scales - 1, 0, -1)
    return served


def kept_of_scales(last_reads: Sequence[IntArray], tokens: Sequence[tuple[int, ...]]) -> FloatArray:
    """Share of the full cache's token-time that is kept of every source scale but the last, (T-1,).

    `tokens` are those of every scale at every level.
    """
    sizes = np.asarray(tokens, dtype=np.float64)[:, :-1]
    kept: FloatArray = (reads_of_scales(last_reads) * sizes).sum(axis=0) / sizes[0]
    return kept


def kept_of_heads(held_LHT: IntArray, tokens: tuple[int, ...]) -> FloatArray:
    """Share of the full cache's token-time that every head keeps, (L, H), from the tokens that it holds for every
    target; the mean over heads is the layer's."""
    share: FloatArray = held_LHT.sum(axis=2) / np.cumsum(tokens)[:-1].sum()
    return share


def ends_of_cells(last_read_LHT: IntArray) -> FloatArray:
    """Shares of a source scale's cells that are never cached, dropped early, and kept to the end, (T-1, 3).

    `last_read_LHT` is that of the coarsest level, for what is kept at any.
    """
    never = last_read_LHT == np.arange(last_read_LHT.shape[2])
    whole = last_read_LHT == last_read_LHT.shape[2] - 1
    return np.stack([kind.mean(axis=(0, 1))[:-1] for kind in (never, ~never & ~whole, whole)], axis=1)


def full_use(plan: Plan) -> IntArray:
    """Token-heads that the full cache holds at every checkpoint, (T, L)."""
    geometry = plan.geometry
    full = full_last_read(geometry.layers, geometry.heads, len(plan.schedule))
    return live_token_heads(full, plan.schedule.tokens)


@dataclass(frozen=True, eq=False)
class Worth:
    """What a plan is worth by statistics, and what its budget is.

    `measure` is what counts: "error" or "mass", see heatkv-lp. No plan within the budget, with these sinks, is
    worth more than `bound`; the full cache is worth `full`. `price_GTL` is the value of one more token-head at the
    checkpoint after layer l has run target t, 0 where it does not bind; `cap_price_LT` the same under a cap on single
    layers, which the budget does not move.
    """

    measure: str
    value: float
    bound: float
    full: float
    budget_token_heads: int
    price_GTL: FloatArray
    cap_price_LT: FloatArray

    @property
    def price(self) -> float:
        """Value of one more token-head of budget, which is split over the groups: the slope of the bound."""
        return float(self.price_GTL.sum() / len(self.price_GTL))

    def change(self, share: float) -> float:
        """What the best value changes by, as a share of `bound`, when the budget changes by this share of itself.

        The bound is concave in the budget and this is its tangent: no plan gains more, none loses less.
        """
        return share * self.budget_token_heads * self.price / self.bound if self.bound > 0 else 0.0


def worth_of(plan: Plan, statistics: Statistics) -> Worth:
    """Judge a plan by a linear program over the same budget and sinks.

    A plan of heatkv-lp is judged by its own settings, any other by the drop error, or by attention mass where that was
    not measured. Raises StatisticsError for statistics of another geometry or that lack what is needed, PolicyError
    for coarser levels, which the program does not know, and for settings that a plan alone does not tell.
    """
    if plan.coarse:
        raise PolicyError(
            "the program that judges plans knows whole cells only, this plan has coarser levels; explain it without "
            "statistics"
        )
    statistics.check_geometry(plan.geometry)
    program = _program(plan, statistics)
    share = Fraction(plan.budget_token_heads, plan.geometry.full_token_heads)
    problem = PlanningProblem(plan.geometry, Budget("share", share), statistics)
    program.check_all(problem)
    values, capacity = program.values(statistics), program.capacity(problem)
    prices = program.allocation(problem).row_prices
    prices = np.where(prices > _NO_PRICE * prices.max(initial=0.0), prices, 0.0)
    layers, heads, scales = plan.last_read.shape
    checkpoints = capacity.groups * (scales - 1) * layers
    caps = prices[checkpoints:] if capacity.layer_room is not None else np.zeros(layers * scales)
    return Worth(
        measure=program.value,
        value=read_value(plan.last_read, values),
        bound=price_bound(values, capacity, program.sink_scales, prices),
        full=read_value(full_last_read(layers, heads, scales), values),
        budget_token_heads=plan.budget_token_heads,
        price_GTL=prices[:checkpoints].reshape(capacity.groups, scales - 1, layers),
        cap_price_LT=caps.reshape(layers, scales),
    )


def _program(plan: Plan, statistics: Statistics) -> HeatKVLP:
    """The program that judges a plan."""
    if plan.policy != HeatKVLP.name:
        return HeatKVLP(sink_scales=plan.sink_scales, value="mass" if statistics.error_sum is None else "error")
    known = {field.name for field in fields(HeatKVLP)}
    settings: dict[str, Any] = {name: value for name, value in plan.settings.items() if name in known}
    program = replace(HeatKVLP(**settings), sink_scales=plan.sink_scales, solver="lp")
    if program.value == "joint":  # joint errors have no price per cell
        program = replace(program, value="error")
    if program.layer_cap is not None and Budget.parse(program.layer_cap).kind == "bytes":
        raise PolicyError(
            f"the plan's layer_cap={program.layer_cap} depends on rows and storage type, which a plan does not tell; "
            "explain it without statistics"
        )
    return program
