"""The one place that calls HiGHS (Huangfu and Hall 2018), through scipy."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import sparse
from scipy.optimize import Bounds, LinearConstraint, linprog, milp

from heatkv.core.schema import BoolArray, FloatArray
from heatkv.errors import PlanError

MOST_SECONDS = 600.0
"""After which a call ends, unless it is given less."""
_TIME, _INFEASIBLE = 1, 2  # statuses of scipy


@dataclass(frozen=True, eq=False)
class Optimum:
    """The least cost, its x, and the dual prices of `limits`, which are not negative."""

    cost: float
    x: FloatArray
    prices: FloatArray


@dataclass(frozen=True, eq=False)
class LinearProgram:
    """Minimise cost @ x where equal @ x = right, limits @ x <= most and 0 <= x <= upper."""

    cost: FloatArray
    equal: sparse.csr_array
    right: FloatArray
    limits: sparse.csr_array
    most: FloatArray
    upper: FloatArray

    def solve(self) -> Optimum | None:
        """The optimum; None where it takes more than MOST_SECONDS."""
        solved = linprog(
            self.cost,
            A_ub=self.limits,
            b_ub=self.most,
            A_eq=self.equal,
            b_eq=self.right,
            bounds=np.stack([np.zeros(len(self.upper)), self.upper], axis=1),
            method="highs-ds",
            options={"time_limit": MOST_SECONDS},
        )
        if solved.status == _TIME:
            return None
        if solved.x is None:
            raise PlanError(f"the solver found no plan: {solved.message}")
        return Optimum(float(solved.fun), solved.x, np.maximum(-solved.ineqlin.marginals, 0))

    def solve_whole(self, is_whole: BoolArray, ends: float, **options: Any) -> tuple[float, FloatArray | None]:
        """A bound that no x with whole numbers where `is_whole` costs less than, and a cheap x, None if none was found
        by the time that the clock says `ends`.

        `options` are those of scipy's milp.
        """
        solved = milp(
            self.cost,
            integrality=is_whole,
            bounds=Bounds(0, self.upper),
            constraints=[
                LinearConstraint(self.equal, self.right, self.right),
                LinearConstraint(self.limits, -np.inf, self.most),
            ],
            options=options | {"time_limit": min(max(ends - time.monotonic(), 0.01), MOST_SECONDS)},
        )
        if solved.status == _INFEASIBLE:
            return np.inf, None
        return -np.inf if solved.mip_dual_bound is None else float(solved.mip_dual_bound), solved.x
